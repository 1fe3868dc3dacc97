"""`privet server directory`: look at it, and sign it where the server cannot reach the key."""

from pathlib import Path
from typing import Annotated

import typer

from ...common.errors import DataError, RunExists, StateError
from ...common.files import write_atomic

__all__ = ["app"]

app = typer.Typer(help="The signed list of devices.", no_args_is_help=True)

_Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="The server's folder.")]
_Key = Annotated[Path, typer.Option("--key", metavar="KEY", help="What `key` made.")]


@app.command("show")
def show(folder: _Folder) -> None:
    """Show the directory's version, head and key, and what waits for a signature."""
    from . import enrolment, setup

    server = setup.load(folder)
    chain, waiting = enrolment.current(server), enrolment.pending(server)
    known = chain or waiting
    if known is None:
        raise StateError(f"{folder} has no directory; restore it from a copy")
    print(f"fleet    {known.fleet}\nkey      {known.key.hex()}")
    if chain is not None:
        print(f"version  {chain.version}, {len(chain.directory.known)} devices")
        print(f"head     {chain.hash.hex()}")
    if waiting is not None:
        first = 0 if chain is None else chain.version
        added = ", ".join(map(str, waiting.entries[first:])) or "nobody yet"
        print(f"waiting  version {waiting.version} for its signature: {added}")


@app.command("key")
def key(
    path: Annotated[Path, typer.Argument(metavar="KEY", help="A new file, for the secret key.")],
) -> None:
    """Make a key that signs directories, and print its public half, which devices pin."""
    import secrets

    from ...common.secure_aggregation.keys import Identity

    if path.exists():
        raise RunExists(f"{path} exists already and was not changed; choose another name")
    signer = Identity.create(secrets.token_bytes)
    write_atomic(path, signer.seed.value.hex().encode() + b"\n")
    print(signer.public.hex())


@app.command("sign")
def sign(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="The server's directory.unsigned.")],
    key: _Key,
) -> None:
    """Sign a directory, on any machine, if it continues what KEY signed last."""
    from ...common.errors import ProtocolError
    from ...common.secure_aggregation import fleet_directory as directories
    from .enrolment import read_key

    signer, asked = read_key(key), directories.load(path, signed=False)
    if not isinstance(asked, directories.Chain):
        raise DataError(f"{path} is a list without a chain; sign the server's directory.unsigned")
    chain = asked.sign(signer)
    record = key.with_name(f"{key.name}.{chain.fleet.replace(':', '_')}")
    last = directories.load(record) if record.exists() else None
    before = last.version if isinstance(last, directories.Chain) else 0
    if isinstance(last, directories.Chain):
        try:
            directories.refuse_unless_later(last, chain)
        except ProtocolError as error:
            raise DataError(f"{path} does not continue {record}: {error}; not signed") from None
    for entry in chain.entries[before:]:
        print(f"{entry}: {entry.identity.hex()}")
    directories.write(record, chain)
    directories.write(path, chain)
    print(f"{path} is signed: version {chain.version} of {chain.fleet}, head {chain.hash.hex()}")


@app.command("take")
def take(
    folder: _Folder,
    path: Annotated[Path, typer.Argument(metavar="FILE", help="Signed by `sign`.")],
) -> None:
    """Put a directory in force that was signed elsewhere."""
    from . import enrolment, setup

    chain = enrolment.take(setup.load(folder), path)
    print(
        f"{folder} has version {chain.version} of its directory: "
        f"{len(chain.directory.known)} devices"
    )
