"""The options that every command about a home shares, and how such a command opens the home.

It loads little, so that a `--help` is quick.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..store.device_store import DeviceStore

__all__ = ["AsJson", "HomeFolder", "PassphraseFile", "opened"]

HomeFolder = Annotated[
    Path | None, typer.Option("--home", metavar="PATH", help="Else $PRIVET_HOME, else your own.")
]
PassphraseFile = Annotated[
    Path | None, typer.Option("--passphrase-file", metavar="FILE", help="Else it is asked for.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]


def opened(home: Path | None, passphrase: Path | None) -> "DeviceStore":
    """Open the home for a command, as `access.opened` does.

    That module is imported here, because a `--help` does not need what it loads.
    """
    from ..enrolled.access import opened

    return opened(home, passphrase)
