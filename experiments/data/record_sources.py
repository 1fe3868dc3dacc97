"""Files of people's own records -> who is in them, and a way to read one person's.

Read here: a .jsonl file in the native format (`client/training/records.py`), and a folder with a
file or a sub-folder per user. One pass checks every record and streams: what is
kept of a file is where each person's records lie, not the texts.
"""

import warnings
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from ...client.training.records import RECORD_LIMIT, Line, Record, Task, check_fields, decode_line
from ...common.errors import DataError

__all__ = [
    "DataSource",
    "SourceUser",
    "folder_source",
    "jsonl_source",
    "read_text",
    "source_of_texts",
]

TEXT_SUFFIXES = (".txt", ".md")


@dataclass(frozen=True)
class SourceUser:
    """One user of a source: how many records, and the group (a batch, a class) if there is one."""

    user: str
    group: str | None
    records: int


@dataclass(frozen=True)
class DataSource:
    """Everybody a source has, in its own order, and a way to read one of them.

    Attributes:
        read: user -> that user's records, earliest first.
    """

    name: str
    people: tuple[SourceUser, ...] = field(repr=False)
    task: Task
    classes: tuple[str, ...] | None
    read: Callable[[str], tuple[Record, ...]] = field(repr=False)


def jsonl_source(path: Path) -> DataSource:
    """A .jsonl file in the native format.

    Raises:
        DataError: unreadable, nobody in it, or a line that is not a record (names file and line).
    """
    census = _Census()
    for offset, number, raw in _lines(path):
        where = f"{path}, line {number}"
        census.add(check_fields(decode_line(raw, where), where), where, offset)

    def read(user: str) -> tuple[Record, ...]:
        try:
            with path.open("rb") as handle:
                return _in_order(_records_at(handle, census.places[user], user, str(path)))
        except OSError as error:
            raise _unreadable(path, error) from error

    return census.source(path.stem, read)


def _records_at(handle: BinaryIO, places: Iterable[int], user: str, where: str) -> Iterator[Record]:
    for place in places:
        handle.seek(place)
        raw = handle.readline(RECORD_LIMIT + 1)
        line = check_fields(decode_line(raw, f"{where}, byte {place}"), f"{where}, byte {place}")
        if line.user != user:
            raise DataError(f"{where} changed while it was read; start again.")
        yield line.record


def folder_source(folder: Path) -> DataSource:
    """A folder with a file or a sub-folder per user.

    .txt and .md files are split at blank lines, a paragraph a record; lines of .jsonl files may
    leave "user" out. Other files and hidden ones are ignored. Records are in the order of the
    files' names, then by time where all of a user's records have one.

    Raises:
        DataError: unreadable, no user, one user under two names, or a line that is not a record.
    """
    files = _files_of_users(folder)
    census = _Census()
    for user, paths in files.items():
        census.places.setdefault(user, array("q"))
        for where, line in _lines_of_user(user, paths):
            census.add(line, where, 0)

    def read(user: str) -> tuple[Record, ...]:
        lines = (line.record for _, line in _lines_of_user(user, files[user]))
        return _in_order(record for record in lines if record.text.strip())

    return census.source(folder.resolve().name, read)


def _files_of_users(folder: Path) -> dict[str, list[Path]]:
    """Map users to their files, and refuse a user that two entries of the folder name."""
    entries: dict[str, Path] = {}
    files: dict[str, list[Path]] = {}
    try:
        for entry in sorted(folder.iterdir()):
            if entry.name.startswith(".") or not (entry.is_dir() or _is_data(entry)):
                continue
            user = entry.name if entry.is_dir() else entry.stem
            if user in entries:
                raise DataError(
                    f"{entries[user]} and {entry} are two entries for one user, {user!r}; put "
                    f"both into one sub-folder, or rename one."
                )
            entries[user] = entry
            inside = sorted(entry.rglob("*")) if entry.is_dir() else [entry]
            files[user] = [path for path in inside if _is_data(path) and not path.is_dir()]
    except OSError as error:
        raise _unreadable(folder, error) from error
    if not files:
        raise DataError(
            f"{folder} has no users: expected a sub-folder per user, or a file per user ending "
            f"in {', '.join((*TEXT_SUFFIXES, '.jsonl'))}."
        )
    return files


def _is_data(path: Path) -> bool:
    return path.suffix in (*TEXT_SUFFIXES, ".jsonl") and not path.name.startswith(".")


def _lines_of_user(user: str, paths: Iterable[Path]) -> Iterator[tuple[str, Line]]:
    """A user's files in name order -> (file and line, line)."""
    for path in paths:
        if path.suffix != ".jsonl":
            for number, text in _paragraphs(path):
                yield f"{path}, line {number}", Line(user, None, Record(text))
            continue
        for _, number, raw in _lines(path):
            where = f"{path}, line {number}"
            line = check_fields({"user": user, **decode_line(raw, where)}, where)
            if line.user != user:
                raise DataError(
                    f"{where}: expected a record of {user!r}, whose file this is, found "
                    f"{line.user!r}; give a file with several users as the source itself."
                )
            yield where, line


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Stream a file -> (offset, line number, line), without blank lines and a leading BOM."""
    try:
        with path.open("rb") as handle:
            offset = 0
            number = 0
            while raw := handle.readline(RECORD_LIMIT + 1):
                number += 1
                if len(raw) > RECORD_LIMIT:
                    raise DataError(
                        f"{path}, line {number}: longer than {RECORD_LIMIT:,} bytes, the most a "
                        f"record may have; split the text into several records."
                    )
                start, offset = offset, offset + len(raw)
                if start == 0 and raw.startswith(b"\xef\xbb\xbf"):
                    start, raw = 3, raw[3:]
                if raw.strip():
                    yield start, number, raw
                elif path.suffix in TEXT_SUFFIXES:
                    yield start, number, b""
    except OSError as error:
        raise _unreadable(path, error) from error


def _paragraphs(path: Path) -> Iterator[tuple[int, str]]:
    """Stream a text file -> (first line's number, paragraph), split at blank lines."""
    lines: list[str] = []
    first = size = 0
    for _, number, raw in _lines(path):
        if not raw:
            if lines:
                yield first, "\n".join(lines)
            lines, size = [], 0
            continue
        first, size = (first if lines else number), size + len(raw)
        if size > RECORD_LIMIT:
            raise DataError(
                f"{path}, line {first}: this paragraph is longer than {RECORD_LIMIT:,} bytes, "
                f"the most a record may have; split it with blank lines."
            )
        lines.append(_decoded(raw, f"{path}, line {number}").rstrip())
    if lines:
        yield first, "\n".join(lines)


def _decoded(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: expected UTF-8, found byte 0x{raw[error.start]:02x} at position "
            f"{error.start + 1} of the line; save the file as UTF-8."
        ) from error


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path} cannot be read ({error.strerror}).")


def source_of_texts(name: str, texts: Mapping[str, tuple[Record, ...]]) -> DataSource:
    """A source of texts that are read already, by who wrote them."""
    people = tuple(SourceUser(user, None, len(records)) for user, records in texts.items())
    return DataSource(name, people, "generation", None, texts.__getitem__)


def read_text(path: Path) -> str:
    """A whole text file in UTF-8, with or without a mark.

    Raises:
        DataError: it cannot be read; names the file.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}).") from error


@dataclass
class _Census:
    """What one pass over a source's lines finds. It keeps no text.

    Attributes:
        places: user -> where the records lie (the source's own numbers), in order.
        groups, times: user -> group, and kind of time; both the same in all of a user's records.
        labels: the one kind of label, and where it was first seen.
        empty: records dropped because their text is blank.
    """

    places: dict[str, "array[int]"] = field(default_factory=dict)
    groups: dict[str, str | None] = field(default_factory=dict)
    times: dict[str, str] = field(default_factory=dict)
    labels: tuple[str, str] | None = None
    classes: set[str] = field(default_factory=set)
    empty: int = 0

    def add(self, line: Line, where: str, place: int) -> None:
        """Count one line. Raises DataError where it contradicts an earlier one."""
        places = self.places.setdefault(line.user, array("q"))
        if not line.record.text.strip():
            self.empty += 1
            return
        _same(self.groups.setdefault(line.user, line.group), line.group, "group", line.user, where)
        time = _kind(line.record.time)
        _same(self.times.setdefault(line.user, time), time, "kind of time", line.user, where)
        kind = "a pair" if line.record.rejected is not None else _kind(line.record.label)
        self.labels = self.labels or (kind, where)
        if self.labels[0] != kind:
            raise DataError(
                f"{where}: the label is {kind}, but {self.labels[0]} in {self.labels[1]}; labels "
                f"must be all numbers, all texts, or all absent, and records all pairs or none."
            )
        if isinstance(line.record.label, str):
            self.classes.add(line.record.label)
        places.append(place)

    def source(self, name: str, read: Callable[[str], tuple[Record, ...]]) -> DataSource:
        """Make a source of what the pass found.

        Warns of dropped records, and raises DataError where nobody was found.
        """
        if not any(self.places.values()):
            raise DataError(
                f"{name} has no records with any text ({len(self.places)} users, {self.empty} "
                f"empty records)."
            )
        if self.empty:
            warnings.warn(f"{name}: {self.empty} empty records were dropped.", stacklevel=3)
        silent = sum(not places for places in self.places.values())
        if silent:
            warnings.warn(f"{name}: {silent} users have no records.", stacklevel=3)
        tasks: dict[str, Task] = {"a number": "regression", "a text": "classification"}
        tasks["a pair"] = "preference"
        people = tuple(
            SourceUser(user, self.groups.get(user), len(places))
            for user, places in self.places.items()
        )
        task = tasks.get(self.labels[0], "generation") if self.labels else "generation"
        classes = tuple(sorted(self.classes)) if task == "classification" else None
        return DataSource(name, people, task, classes, read)


def _kind(value: float | str | None) -> str:
    if value is None:
        return "absent"
    return "a text" if isinstance(value, str) else "a number"


def _same(first: str | None, now: str | None, what: str, user: str, where: str) -> None:
    if first != now:
        raise DataError(
            f"{where}: user {user!r} has another {what} here than before ({now!r}, not "
            f"{first!r}); it must be the same in all of a user's records."
        )


def _in_order(records: Iterable[Record]) -> tuple[Record, ...]:
    """Sort records by time, earliest first.

    Ties, and records without a time, stay in the source's order.
    """
    found = list(records)
    if any(record.time is None for record in found):
        return tuple(found)
    return tuple(sorted(found, key=lambda record: record.time))  # type: ignore[arg-type, return-value]
