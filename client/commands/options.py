"""The options that every command about a home has, and how such a command opens it; light."""

from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def opened(home: Path | None, passphrase: Path | None) -> Iterator["DeviceStore"]:
    """As `access.opened`, which loads what a `--help` does not need."""
    from ..enrolled.access import opened

    with opened(home, passphrase) as found:
        yield found
