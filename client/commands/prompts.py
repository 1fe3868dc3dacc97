"""`privet prompts`: this device's prompt templates, and what a new one would change.

Heavy imports wait inside the functions; no command here loads torch.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...common.errors import ConfigError
from . import printing
from .options import AsJson, HomeFolder, PassphraseFile, opened

if TYPE_CHECKING:
    from ...common.secure_aggregation.keys import Identity
    from ..assistant.template_store import TemplateVersion
    from ..assistant.templates import Template
    from ..store.device_store import DeviceStore

__all__ = ["app"]

app = typer.Typer(help="Prompt templates: whose, which version.", no_args_is_help=True)

_Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
_Name = Annotated[str, typer.Argument(metavar="NAME", help="Of a template.")]
_File = Annotated[Path, typer.Argument(metavar="FILE", help="A template file (TOML).")]
_Version = Annotated[
    str | None, typer.Option("--version", metavar="X.Y.Z", help="Else the one in use.")
]


@app.command("list")
def list_(
    home: HomeFolder = None, passphrase: PassphraseFile = None, as_json: AsJson = False
) -> None:
    """List every version of every template on this device."""
    from ..assistant.template_store import kept

    with opened(home, passphrase) as store:
        every = kept(store)
    if as_json:
        printing.dump([_facts(version) for version in every])
        return
    rows = [
        (version.template.name, version.template.version, _state(version),
         version.template.segment.name, version.template.about)
        for version in every
    ]  # fmt: skip
    printing.table(("template", "version", "", "for", "about"), rows)


@app.command("show")
def show_(
    name: _Name,
    version: _Version = None,
    home: HomeFolder = None,
    passphrase: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Show one template in full."""
    from ..assistant.template_store import find

    with opened(home, passphrase) as store:
        shown = find(store, name, version)
    lines = [*shown.template.lines(), f"state: {_state(shown)}"]
    printing.say(as_json, _facts(shown), "\n".join(lines))


@app.command("add")
def add(
    file: _File,
    yes: _Yes = False,
    home: HomeFolder = None,
    passphrase: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Take a signed template in, after showing what it changes."""
    from ..assistant import template_store

    content = _content(file)
    with opened(home, passphrase) as store:
        new, before = template_store.check(store, content, str(file))
        changed = template_store.changes(before, new)
        _confirm(changed, new, yes, as_json)
        template_store.add(store, content, str(file))
    facts = {"name": new.name, "version": new.version, "changed": changed}
    printing.say(as_json, facts, f"{new.name!r} {new.version} is in use.")


@app.command("diff")
def diff(
    what: Annotated[
        str, typer.Argument(metavar="NAME|FILE", help="A template, or a file to be added.")
    ],
    versions: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FROM [TO]]", help="Else: the version before, the one in use."),
    ] = None,
    home: HomeFolder = None,
    passphrase: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Show what changed between two versions, or what a file would change."""
    from ..assistant import template_store

    with opened(home, passphrase) as store:
        path = Path(what)
        if path.suffix == ".toml" or path.is_file():
            if versions:
                raise ConfigError("a file is compared with the version in use: give no versions")
            new, before = template_store.check(store, _content(path), what)
            changed = template_store.changes(before, new)
        else:
            changed = _between(store, what, versions or [])
    printing.say(as_json, {"changed": changed}, "\n".join(changed or ["nothing changed"]))


@app.command("rollback")
def rollback(
    name: _Name,
    to: Annotated[
        str | None, typer.Option("--to", metavar="X.Y.Z", help="Else the version before.")
    ] = None,
    yes: _Yes = False,
    home: HomeFolder = None,
    passphrase: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Use an earlier version again."""
    from ..assistant import template_store

    with opened(home, passphrase) as store:
        before, chosen = template_store.earlier(store, name, to)
        changed = template_store.changes(before, chosen)
        _confirm(changed, chosen, yes, as_json)
        template_store.rollback(store, name, to)
    sentence = f"{name!r} {chosen.version} is in use; it was {before.version}."
    facts = {"name": name, "version": chosen.version, "before": before.version}
    printing.say(as_json, {**facts, "changed": changed}, sentence)


@app.command("sign")
def sign(
    file: _File,
    key: Annotated[
        Path, typer.Option("--key", metavar="FILE", help="The publisher's; made if not there.")
    ],
    as_json: AsJson = False,
) -> None:
    """For publishers: sign a template file, in place."""
    from ...common.files import write_atomic
    from ..assistant.templates import sign as signed

    content = _content(file)
    identity = _publisher(key)
    write_atomic(file, signed(content, str(file), identity))
    public = identity.public.hex()
    printing.say(
        as_json,
        {"file": str(file), "publisher": public},
        f"{file} is signed by {public}; devices that trust this key take it.",
    )


def _between(store: "DeviceStore", name: str, versions: Sequence[str]) -> list[str]:
    from ..assistant import template_store

    if len(versions) > 2:
        raise ConfigError(f"two versions are compared; {len(versions)} were given")
    if versions:
        before = template_store.find(store, name, versions[0]).template
        after = template_store.find(store, name, versions[1] if versions[1:] else None).template
    else:
        after, before = template_store.earlier(store, name)
    return template_store.changes(before, after)


def _publisher(path: Path) -> "Identity":
    """Read a publisher's key from its file, or make the file if there is none.

    It has 64 hexadecimal digits, and only its owner can read it.
    """
    import os

    from ...common.files import explain_os_errors
    from ...common.secure_aggregation.keys import Identity

    if not path.exists():
        seed = os.urandom(32)
        with explain_os_errors(path, "write"):
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with os.fdopen(handle, "w") as file:
                file.write(seed.hex() + "\n")
        return Identity.of(seed)
    with explain_os_errors(path, "read"):
        text = path.read_text("ascii", "replace").strip()
    try:
        seed = bytes.fromhex(text)
    except ValueError:
        seed = b""
    if len(seed) != 32:
        raise ConfigError(f"{path} is no publisher's key: 64 hexadecimal digits were expected")
    return Identity.of(seed)


def _content(path: Path) -> bytes:
    from ...common.files import explain_os_errors
    from ..assistant.templates import MAX_FILE_BYTES

    if not path.is_file():
        raise ConfigError(f"there is no template file {path}")
    with explain_os_errors(path, "read"), path.open("rb") as file:
        return file.read(MAX_FILE_BYTES + 1)


def _confirm(changed: Sequence[str], new: "Template", yes: bool, as_json: bool) -> None:
    """Show what changes, and ask before it does."""
    if not as_json:
        for line in changed:
            print(line)
    if yes:
        return
    if not sys.stdin.isatty():
        raise ConfigError("nothing was changed: there is no terminal to ask at; add --yes")
    if not typer.confirm(f"Use version {new.version} of {new.name!r} from now on?", err=True):
        raise ConfigError("nothing was changed")


def _state(version: "TemplateVersion") -> str:
    if version.refused:
        return "not trusted any more"
    return "in use" if version.used else "kept"


def _facts(version: "TemplateVersion") -> dict[str, object]:
    return {**version.template.model_dump(mode="json"), "state": _state(version)}
