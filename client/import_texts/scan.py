"""Scanning of a person's folders for texts, which says what was left out and why.

    scan(roots)  walk -> the newest files within the limits -> one file at a time -> records

A store that holds exactly the records of every `Found` and `Unchanged` of the last scan is right:
what is `Ignored`, and what is not there any more, has no records. Watching is scanning
again with the fingerprints of the last time: a file that stayed as it was costs a look at its
first bytes.

**Guarantee**: files are only read, never written or locked. Links are never followed but for
the roots themselves, so that nothing outside of what the owner named is read; sockets, pipes and
devices are never opened. A text is kept once, in the newest file that has it: a record stands
for one private example, and a copy would be a second one that the accounting does not know of.

Memory: one file at a time, in steps, and at most `Limits.records` records. A process that took
200,000 records out of a file of 200 MB or 5 GB peaked at 108 to 146 MB, 33 of them Python and NumPy
(test_scan.py); JSON exports are the exception (formats.py).
"""

import errno
import hashlib
import heapq
import os
import re
import stat
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ...common.errors import ConfigError, DataError
from ..training.records import Record
from .formats import SUFFIXES, read
from .text_pieces import Note, Reading

__all__ = ["Found", "Ignored", "Limits", "Unchanged", "key_of", "path_of", "scan"]

READERS = 2
"""Raised when a reader changes: every file is then read again."""

_CACHES = frozenset(
    ["node_modules", "bower_components", "__pycache__", "cache", "caches", "lost+found"]
)
_CACHE = "a folder of caches or of programs, not of own files"
_CACHE_MARKS = frozenset(["CACHEDIR.TAG", "pyvenv.cfg"])
_OPEN = os.O_RDONLY
for _flag in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_NOCTTY", "O_BINARY"):
    _OPEN |= getattr(os, _flag, 0)
_HEAD = 4096
_EXAMPLES = 3


@dataclass(frozen=True)
class Limits:
    """The most that one scan takes.

    Where there is more, the newest files are taken.

    Attributes:
        files: read or unchanged files.
        file_mb: megabytes (10^6 bytes) of one file: its last ones, a JSON export whole or not.
        records: of all files together; of the file that passes it, its last ones.
        total_mb: megabytes of all files together, each counted with at most `file_mb`.
        piece_chars: the most characters of a record.

    Raises:
        ConfigError: a limit below 1; `piece_chars` outside 16 to 100,000.
    """

    files: int = 20_000
    file_mb: int = 64
    records: int = 200_000
    total_mb: int = 512
    piece_chars: int = 240

    def __post_init__(self) -> None:
        for each in fields(self):
            if (value := getattr(self, each.name)) < 1:
                raise ConfigError(f"{each.name} must be at least 1; it is {value!r}.")
        if not 16 <= self.piece_chars <= 100_000:
            raise ConfigError(
                f"piece_chars must lie between 16 and 100000; it is {self.piece_chars}."
            )


@dataclass(frozen=True)
class Found:
    """A file that was read.

    Attributes:
        path: absolute.
        fingerprint: of its state and of the settings it was read with; for `known`.
        records: earliest first, each with a float as its time; empty where all are known.
        notes: what in it was left out and why, a sentence each, without any of its text.
    """

    path: Path
    fingerprint: str
    records: tuple[Record, ...] = field(repr=False)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ignored:
    """A path of which nothing is taken.

    `reason` does not name the path, so that it may serve to group such paths.

    Attributes:
        fingerprint: where it is known, it may be given as `known`, which saves reading the
            file again (it then comes as `Unchanged`, of which nothing is held); else "".
    """

    path: Path
    reason: str
    fingerprint: str = ""


@dataclass(frozen=True)
class Unchanged:
    """A file that is as it was when its known fingerprint was taken."""

    path: Path


class _Entry(NamedTuple):
    """A candidate for reading, which sorts by age.

    The newest is the last, and of several of one age the last in name.
    """

    mtime_ns: int
    path: str
    status: os.stat_result


class _Settings(NamedTuple):
    me: frozenset[str]
    limits: Limits
    mark: str


def scan(
    roots: Sequence[Path],
    *,
    me: Sequence[str] = (),
    known: Mapping[str, str] | None = None,
    kept: Callable[[Path], Iterable[Record]] | None = None,
    limits: Limits | None = None,
) -> Iterator[Found | Ignored | Unchanged]:
    """Walk `roots` and yield every file once: what is not read first, then the newest first.

    Args:
        roots: files or folders. A file named here is read whatever its suffix.
        me: the owner's names and mail addresses, as they are in chats and mails; case does
            not matter.
        known: `key_of(path)` -> fingerprint, of earlier scans with the same settings. Other
            settings (`me`, `limits`) make every fingerprint another one.
        kept: gives the records held of an unchanged file, so that they count for
            `limits.records` and their texts are not taken again. Called only when there is
            something to read. None: unchanged files count as empty.
        limits: None: `Limits()`.

    Edge cases: a folder or a link as a root is read where it really is; a root in another root
    is read once; a root that is missing is `Ignored`. A file that changes while it is read is
    read once more, and ignored when it changes again.
    """
    limits = limits or Limits()
    settings = _settings(me, limits)
    known = known or {}
    entries = yield from _newest(roots, limits)
    same = {entry.path for entry in entries if _is_same(entry, known, settings)}
    counts: dict[str, int] = {}
    seen: set[bytes] = set()
    if kept is not None and len(same) < len(entries):
        for path in same:
            marks = [_mark(record) for record in kept(Path(path))]
            counts[path] = len(marks)
            seen.update(marks)
    room = limits.records
    for number, entry in enumerate(entries):
        if not room:
            yield _left_out(entries[number:], f"{limits.records:,} records")
            return
        if entry.path in same and counts.get(entry.path, 0) <= room:
            room -= counts.get(entry.path, 0)
            yield Unchanged(Path(entry.path))
            continue
        if entry.path in same and kept is not None:
            seen.difference_update(map(_mark, kept(Path(entry.path))))
        found = _read_steadily(entry, settings, seen, room)
        if isinstance(found, Found):
            room -= len(found.records)
            seen.update(map(_mark, found.records))
        yield found


def key_of(path: Path) -> str:
    """Return a path as text that prints and that UTF-8 can hold, whatever bytes its name has.

    Bytes that are no UTF-8 and characters that do not print are written `\\xNN`, a backslash
    `\\\\`; `path_of` is the way back.
    """
    name = os.fspath(path)
    if name.isprintable() and "\\" not in name:  # half surrogates do not print
        return name
    return "".join(_escaped(character) for character in name)


def path_of(key: str) -> Path:
    """Return the path of which `key` is the `key_of`."""
    raw = re.sub(
        rb"\\(?:x([0-9a-f]{2})|\\)",
        lambda found: bytes.fromhex(found[1].decode()) if found[1] else b"\\",
        key.encode("utf-8"),
    )
    return Path(os.fsdecode(raw))


def _escaped(character: str) -> str:
    if character == "\\":
        return "\\\\"
    if character.isprintable():
        return character
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(character))


# --- choosing -----------------------------------------------------------------------------------


def _newest(
    roots: Sequence[Path], limits: Limits
) -> Generator[Found | Ignored | Unchanged, None, list[_Entry]]:
    """Choose the newest candidates within the limits.

    Yields what cannot be a candidate, and returns the candidates, newest first.

    Only `limits.files` of them are held at a time, however many there are.
    """
    heap: list[_Entry] = []
    dropped, dropped_bytes, newest_dropped = 0, 0, None
    for item in _walk(roots):
        if isinstance(item, Ignored):
            yield item
            continue
        out = heapq.heappushpop(heap, item) if len(heap) == limits.files else None
        if out is None:
            heapq.heappush(heap, item)
        else:
            dropped, dropped_bytes = dropped + 1, dropped_bytes + out.status.st_size
            newest_dropped = max(out, newest_dropped or out)
    if newest_dropped is not None:
        yield _summary(newest_dropped, dropped, dropped_bytes, f"{limits.files:,} files")
    entries = sorted(heap, reverse=True)
    total = 0
    for number, entry in enumerate(entries):
        total += min(entry.status.st_size, limits.file_mb * 1_000_000)
        if total > limits.total_mb * 1_000_000:
            yield _left_out(entries[number:], f"{limits.total_mb:,} MB")
            return entries[:number]
    return entries


def _left_out(entries: Sequence[_Entry], limit: str) -> Ignored:
    return _summary(entries[0], len(entries), sum(entry.status.st_size for entry in entries), limit)


def _summary(newest: _Entry, count: int, size: int, limit: str) -> Ignored:
    files = f"this and {count - 1:,} older files are" if count > 1 else "this file is"
    return Ignored(
        Path(newest.path),
        f"{files} left out ({size / 1e6:,.1f} MB): the limit is {limit}, and the newest are kept",
    )


def _walk(roots: Sequence[Path]) -> Iterator[_Entry | Ignored]:
    """Yield every file of the roots once: candidates, and what cannot be one, with the reason."""
    named = dict.fromkeys(os.path.realpath(root) for root in roots)
    folders: set[tuple[int, int]] = set()
    for path in named:
        try:
            status = os.stat(path)
        except (OSError, ValueError) as error:
            yield Ignored(Path(path), _why(error))
            continue
        if stat.S_ISDIR(status.st_mode):
            yield from _tree(path, folders, named.keys())
        else:
            yield _candidate(path, status)


def _tree(
    root: str, folders: set[tuple[int, int]], named: AbstractSet[str]
) -> Iterator[_Entry | Ignored]:
    waiting = [root]
    while waiting:
        path = waiting.pop()
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in folders:
                continue  # a folder that is mounted in itself
            folders.add((status.st_dev, status.st_ino))
            if path != root and _is_cache(path):
                yield Ignored(Path(path), _CACHE)
                continue
            with os.scandir(path) as listing:
                yield from _listed(path, listing, waiting, named)
        except OSError as error:
            yield Ignored(Path(path), _why(error))


def _is_cache(path: str) -> bool:
    return os.path.basename(path).casefold() in _CACHES or any(
        os.path.lexists(os.path.join(path, mark)) for mark in _CACHE_MARKS
    )


def _listed(
    folder: str,
    listing: Iterable[os.DirEntry[str]],
    waiting: list[str],
    named: AbstractSet[str],
) -> Iterator[_Entry | Ignored]:
    """Yield the files of one folder, and add its subfolders to `waiting`."""
    hidden = 0
    for item in listing:
        if item.path in named:
            continue  # a root of its own
        is_folder = item.is_dir(follow_symlinks=False)
        if item.is_symlink():
            yield Ignored(Path(item.path), "a link: name its target to have it read")
        elif item.name.startswith("."):
            if is_folder:
                yield Ignored(Path(item.path), "a hidden folder: name it to have it read")
            hidden += not is_folder
        elif is_folder:
            waiting.append(item.path)
        elif (reason := _by_name(item.name)) is not None:
            yield Ignored(Path(item.path), reason)
        else:
            try:
                yield _candidate(item.path, item.stat(follow_symlinks=False))
            except OSError as error:
                yield Ignored(Path(item.path), _why(error))
    if hidden:
        yield Ignored(Path(folder), f"{hidden:,} hidden files in it: name them to have them read")


def _suffix(name: str) -> str:
    """Return a name's suffix in lower case with its dot.

    It is "" where what follows the last dot is no suffix.
    """
    suffix = os.path.splitext(name)[1].lower()
    return suffix if len(suffix) > 1 and suffix[1:].isalnum() else ""


def _by_name(name: str) -> str | None:
    """Return the reason not to look into a file, where its name gives one."""
    if name.startswith("."):
        return "a hidden file: name it to have it read"
    suffix = _suffix(name)
    if suffix in SUFFIXES:
        return None
    shown = " ".join(sorted(SUFFIXES - {""}))
    kind = suffix if suffix.isascii() and len(suffix) <= 12 else "of its name"
    return f"the suffix {kind} is none that is read ({shown}); a file named outright is"


def _candidate(path: str, status: os.stat_result) -> _Entry | Ignored:
    if not stat.S_ISREG(status.st_mode):
        return Ignored(Path(path), "not a file: a pipe, a socket or a device")
    if not status.st_size:
        return Ignored(Path(path), "empty")
    return _Entry(status.st_mtime_ns, path, status)


_WHY = {
    errno.ENOENT: "not there (any more)",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ELOOP: "a link",
    errno.ENXIO: "not a file: a pipe, a socket or a device",
    errno.ENAMETOOLONG: "its path is too long",
}


def _why(error: OSError | ValueError) -> str:
    code = error.errno if isinstance(error, OSError) else None
    return _WHY.get(code or 0, f"cannot be read ({getattr(error, 'strerror', None) or 'bad name'})")


# --- reading ------------------------------------------------------------------------------------


def _settings(me: Sequence[str], limits: Limits) -> _Settings:
    names = frozenset(name.strip().casefold() for name in me if name.strip())
    mark = hashlib.blake2b(repr((READERS, sorted(names), limits)).encode(), digest_size=6)
    return _Settings(names, limits, mark.hexdigest())


def _open(path: str) -> BinaryIO:
    """Open a file without waiting for a pipe and without following a link."""
    return open(os.open(path, _OPEN), "rb", buffering=0)


def _state(status: os.stat_result) -> str:
    return f"{status.st_size}:{status.st_mtime_ns}:{status.st_ino}:"


def _fingerprint(file: BinaryIO, status: os.stat_result, settings: _Settings) -> str:
    file.seek(0)
    head = hashlib.blake2b(file.read(_HEAD), digest_size=8).hexdigest()
    return f"{settings.mark}:{_state(status)}{head}"


def _is_same(entry: _Entry, known: Mapping[str, str], settings: _Settings) -> bool:
    """Return whether a file still has its known fingerprint.

    Its first bytes are only read if size, time and inode are as they were.
    """
    print_before = known.get(key_of(Path(entry.path)), "")
    if not print_before.startswith(f"{settings.mark}:{_state(entry.status)}"):
        return False
    try:
        with _open(entry.path) as file:
            return _fingerprint(file, os.fstat(file.fileno()), settings) == print_before
    except OSError:
        return False  # reading it says why


def _read_steadily(
    entry: _Entry, settings: _Settings, seen: AbstractSet[bytes], room: int
) -> Found | Ignored:
    """Read a file as it was at one moment, trying twice if it changes."""
    path = Path(entry.path)
    for _ in range(2):
        try:
            with _open(entry.path) as file:
                before = os.fstat(file.fileno())
                if not stat.S_ISREG(before.st_mode):
                    return Ignored(path, _WHY[errno.ENXIO])
                mark = _fingerprint(file, before, settings)
                result = _records(file, path, mark, settings, seen, room)
                after = os.fstat(file.fileno()), os.lstat(path)
                if all(os.path.samestat(before, s) and _state(before) == _state(s) for s in after):
                    return result
        except OSError as error:
            return Ignored(path, _why(error))
    return Ignored(path, "it changed while it was read, twice: the next scan tries again")


def _records(
    file: BinaryIO,
    path: Path,
    fingerprint: str,
    settings: _Settings,
    seen: AbstractSet[bytes],
    room: int,
) -> Found | Ignored:
    """Return at most `room` records of an open file, its last ones, none of `seen`."""
    limits = settings.limits
    mtime = os.fstat(file.fileno()).st_mtime_ns / 1e9
    ask = Reading(settings.me, mtime, limits.piece_chars, limits.file_mb * 1_000_000)
    held: deque[tuple[bytes, Record]] = deque()
    own: set[bytes] = set()
    notes: dict[str, list[int]] = {}
    again = over = 0
    try:
        for item in read(file, _suffix(path.name), ask):
            if isinstance(item, Note):
                _add(notes, item)
                continue
            mark = _mark(item)
            if mark in own or mark in seen:
                again += 1
                continue
            if len(held) == room:
                own.discard(held.popleft()[0])
                over += 1
            held.append((mark, item))
            own.add(mark)
    except DataError as error:
        return Ignored(path, str(error), fingerprint)
    if not held and not again:
        reason = "; ".join(["no text of yours in it", *_sentences(notes)])
        return Ignored(path, reason, fingerprint)
    _add_left_out(notes, again, over, limits.records)
    records = sorted((record for _, record in held), key=_when)
    return Found(path, fingerprint, tuple(records), tuple(_sentences(notes)))


def _add_left_out(notes: dict[str, list[int]], again: int, over: int, limit: int) -> None:
    if again:
        _add(notes, Note(f"{again:,} texts are held already: each is kept once"))
    if over:
        _add(notes, Note(f"the first {over:,} records: the limit is {limit:,} in all"))


def _when(record: Record) -> float:
    return record.time if isinstance(record.time, float) else 0.0


def _mark(record: Record) -> bytes:
    text = f"{record.label!r}\n{record.text}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=16).digest()


def _add(notes: dict[str, list[int]], note: Note) -> None:
    """Count a note, and keep the numbers of its first lines as [count, line, line, …]."""
    lines = notes.setdefault(note.reason, [0])
    lines[0] += 1
    if note.line is not None and len(lines) <= _EXAMPLES:
        lines.append(note.line)


def _sentences(notes: Mapping[str, Sequence[int]]) -> Iterator[str]:
    for reason, (count, *lines) in notes.items():
        if not lines:
            yield reason
            continue
        numbers = ", ".join(map(str, lines)) + (", …" if count > len(lines) else "")
        yield f"{count:,} line{'s' if count > 1 else ''} ({numbers}): {reason}"
