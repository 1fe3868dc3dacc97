"""The directory while a run goes on: the newest there is, and what each device lacks of it.

It travels in the greetings: a head always, entries to those who asked for them.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from ..common.errors import ProtocolError, StateError
from ..common.secure_aggregation import fleet_directory as directories
from ..common.secure_aggregation.fleet_directory import Chain
from ..common.secure_aggregation.keys import Directory

__all__ = ["Listing", "newest"]

DIRECTORY = "directory"
NOTHING = -1
"""What a device answers that lacks no entry."""


def newest(folder: Path) -> Chain | Directory:
    """The directory that a run goes on with: the server's, where it continues the run's own.

    Args:
        folder: of the run, in the server's `runs`; a simulation's list stays what it is.

    Raises:
        StateError: the server's directory forgets or rewrites an entry that the run began with.
    """
    begun, path = directories.load(folder / DIRECTORY), _servers(folder)
    now = directories.load(path) if path.exists() else None
    if not isinstance(begun, Chain) or not isinstance(now, Chain):
        # a run begun under an earlier privet has a plain list
        return now if isinstance(now, Chain) and _continues(begun, now) else begun
    try:
        directories.refuse_unless_later(begun, now)
    except ProtocolError as error:
        raise StateError(
            f"{path} does not continue the directory that {folder} began with ({error}); put the "
            "right one back from a copy"
        ) from None
    return now


def _servers(folder: Path) -> Path:
    return folder.absolute().parent.parent / DIRECTORY


def _continues(before: Chain | Directory, now: Chain) -> bool:
    """Whether everybody of a plain list has the same number in a signed one, or was removed."""
    given = {one.client: one.identity for one in now.entries}
    plain = before.known if isinstance(before, Directory) else {}
    return bool(plain) and all(given.get(number) == key for number, key in plain.items())


class Listing:
    """What a run's server shows of its directory.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: tuple[int, ...] = ()
        self._chain: Chain | Directory = Directory({}, closed=True)
        self._lacks: dict[int, int] = {}

    def directory(self) -> Directory:
        """Return who is enrolled now, reading the file again where it has changed.

        Raises:
            StateError: as `newest`.
        """
        seen = self._stamp()
        if seen != self._seen:
            self._chain, self._seen = newest(self._folder), seen
        found = self._chain
        return found.directory if isinstance(found, Chain) else found

    def _stamp(self) -> tuple[int, ...]:
        try:
            status = os.stat(_servers(self._folder))
        except OSError:
            return (0,)
        return status.st_ino, status.st_mtime_ns, status.st_size

    def offer(self, node: int) -> Mapping[str, str | int]:
        """Return what a greeting to a node says of the directory.

        Of a plain list it says nothing.
        """
        chain = self._chain
        if not isinstance(chain, Chain):
            return {}
        since = min(self._lacks.get(node, chain.version), chain.version)
        lines = directories.lines_of(chain, since)
        return {"directory": str(chain.head), "since": since, "entries": "\n".join(lines)}

    def heard(self, node: int, reply: Mapping[str, object]) -> None:
        """Note from which entry on a node needs the directory.

        Where it lacks none, that is from the present end on.
        """
        chain, lacks = self._chain, reply.get("lacks")
        if isinstance(chain, Chain) and isinstance(lacks, int):
            self._lacks[node] = chain.version if lacks <= NOTHING else lacks
