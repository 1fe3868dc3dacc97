"""The folders and files that the owner has added, which are scanned again and again for records.

    sources            what is watched, and of every file its fingerprint and number of records
    records/<SHA-256>  a file's records, one a line; the name is the hash of the file's key

**Guarantee**: a scan changes the vault in one transaction, as a whole or not at all; afterwards it
holds exactly the records that `scan.scan` found or had found before. Copies of a text are held
once. Nothing said here quotes a record.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ...common.errors import StateError
from ..store.device_store import ME, DeviceStore

if TYPE_CHECKING:  # the readers and numpy, which `privet client status` has no time to load
    from ..training.records import Record
    from .scan import Found, Ignored, Limits, Unchanged

    Item = Found | Ignored | Unchanged

__all__ = ["Held", "Scanned", "Sources", "read", "rescan"]

ENTRY, FORMAT = "sources", 1
DERIVED = ("profile", "retrieval/")
"""What a chat makes of the records; it goes when records go, and is made again by the next chat."""


@dataclass(frozen=True)
class Held:
    """The state of a file when it was read: fingerprint, number of records, why none."""

    fingerprint: str
    records: int
    reason: str = ""


@dataclass(frozen=True)
class Sources:
    """The folders and files that are watched, and what is held of each file.

    Attributes:
        roots: keys (`scan.key_of`) of folders and files, as they were added.
        me: the owner's names and addresses.
        files: key -> what is held.
    """

    roots: tuple[str, ...] = ()
    me: tuple[str, ...] = field(default=(), repr=False)
    files: Mapping[str, Held] = field(default_factory=dict, repr=False)

    @property
    def records(self) -> int:
        """The number of records of all files together."""
        return sum(held.records for held in self.files.values())


@dataclass(frozen=True)
class Scanned:
    """The results of a scan, with paths as keys.

    Attributes:
        found: files that were read: key, number of records, what in it was left out and why.
        ignored: key and reason.
        unchanged: files that were as before.
        gone: files whose records were removed.
        records: how many are held now.
    """

    found: tuple[tuple[str, int, tuple[str, ...]], ...]
    ignored: tuple[tuple[str, str], ...]
    unchanged: int
    gone: int
    records: int


def read(home: DeviceStore) -> Sources:
    """Read from the vault what is watched.

    Raises:
        StateError: a newer privet wrote it.
    """
    kept = home.vault.get(ENTRY)
    if kept is None:
        return Sources()
    found = json.loads(kept)
    if found.get("format") != FORMAT:
        raise StateError(
            f"the sources have format {found.get('format')!r}, and this privet reads {FORMAT}: "
            "use the privet that wrote them"
        )
    files = {key: Held(*held) for key, held in found["files"].items()}
    return Sources(tuple(found["roots"]), tuple(found["me"]), files)


def rescan(
    home: DeviceStore,
    *,
    roots: Iterable[str] | None = None,
    me: Iterable[str] | None = None,
    progress: Callable[["Item"], None] = lambda _: None,
    limits: "Limits | None" = None,
) -> Scanned:
    """Scan everything that is watched, and hold the records that are there now.

    Args:
        home: open.
        roots, me: watch these from now on; None: as before.
        progress: called with each file, before anything is written; it may raise to give up.

    Raises:
        StateError: somebody else changed the sources meanwhile; nothing was written.
    """
    from .scan import Found, Unchanged, key_of

    version, before = home.vault.version(ENTRY), read(home)
    watched = before.roots if roots is None else tuple(dict.fromkeys(roots))
    names = before.me if me is None else tuple(dict.fromkeys(me))
    files: dict[str, Held] = {}
    fresh: dict[str, bytes] = {}
    found, ignored = [], []
    unchanged = 0
    for item in _scanned(home, before, watched, names, limits):
        progress(item)
        key = key_of(item.path)
        if isinstance(item, Found):
            files[key] = Held(item.fingerprint, len(item.records))
            found.append((key, len(item.records), item.notes))
            if item.records:
                fresh[_entry(key)] = b"".join(map(_line, item.records))
        elif isinstance(item, Unchanged):
            held = files[key] = before.files[key]
            unchanged += not held.reason
            if held.reason:
                ignored.append((key, held.reason))
        else:
            if item.fingerprint:
                files[key] = Held(item.fingerprint, 0, item.reason)
            ignored.append((key, item.reason))
    after = Sources(watched, names, files)
    gone = _write(home, version, before, after, fresh)
    return Scanned(tuple(found), tuple(ignored), unchanged, gone, after.records)


def _scanned(
    home: DeviceStore,
    before: Sources,
    roots: Sequence[str],
    me: Sequence[str],
    limits: "Limits | None",
) -> Iterator["Item"]:
    from ..training.records import parse_line
    from .scan import key_of, path_of, scan

    def kept(path: Path) -> Iterator["Record"]:
        name = _entry(key_of(path))
        for line in (home.vault.get(name) or b"").splitlines():
            yield parse_line(line, name).record

    known = {key: held.fingerprint for key, held in before.files.items()}
    return scan([path_of(root) for root in roots], me=me, known=known, kept=kept, limits=limits)


def _write(
    home: DeviceStore,
    version: int | None,
    before: Sources,
    after: Sources,
    fresh: Mapping[str, bytes],
) -> int:
    """Write the results of a scan to the vault, everything at once.

    Returns how many files have no records any more.
    """
    wanted = {_entry(key) for key, held in after.files.items() if held.records}
    if after == before and not fresh:
        return 0
    with home.vault.transaction():
        if home.vault.version(ENTRY) != version:
            raise StateError(
                "the sources were changed by another process during this scan: run it again"
            )
        gone = set(home.vault.names("records/")) - wanted
        files = {key: [*asdict(held).values()] for key, held in after.files.items()}
        kept = {"format": FORMAT, "roots": after.roots, "me": after.me, "files": files}
        derived = [name for made in DERIVED for name in home.vault.names(made)] if gone else []
        home.vault.put_all(
            {**fresh, **dict.fromkeys([*gone, *derived]), ENTRY: json.dumps(kept).encode()}
        )
    return len(gone)


def _entry(key: str) -> str:
    return f"records/{hashlib.sha256(key.encode()).hexdigest()}"


def _line(record: "Record") -> bytes:
    fields = {"user": ME, "text": record.text, "label": record.label, "time": record.time}
    given = {name: value for name, value in fields.items() if value is not None}
    return json.dumps(given, ensure_ascii=False, allow_nan=False).encode() + b"\n"
