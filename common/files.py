"""Files that are whole or not there: atomic writes, an append-only log, damaged files kept aside.

**Guarantee** (POSIX file systems; on Windows the folder itself is not synced): after a crash or a
`kill -9` at any point, a path written by `write_atomic` holds either the old bytes or the new
bytes, and a log written by `append_line` holds every line whose call returned. What either makes is
readable by its owner alone, from its first byte on (0600).
"""

import errno
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from .errors import StateError

__all__ = [
    "append_line",
    "explain_os_errors",
    "keep_aside",
    "owners_own",
    "read_lines",
    "sync_folder",
    "write_atomic",
    "write_json_atomic",
]

_ADVICE = {
    errno.ENOSPC: "the disk is full: free some space and run again",
    errno.EDQUOT: "the disk quota is used up: free some space and run again",
    errno.EFBIG: "the file would pass the size limit of this process: raise it (ulimit -f)",
    errno.EROFS: "the file system is read-only: choose a folder that can be written",
    errno.EACCES: "permission denied: make the file and its folder readable and writable for you",
    errno.EPERM: "permission denied: make the file and its folder readable and writable for you",
    errno.ENOENT: "the file or its folder does not exist: make the folder or correct the path",
    errno.ENOTDIR: "a part of the path is a file, not a folder: correct the path",
    errno.EISDIR: "the path is a folder, not a file: correct the path",
}


@contextmanager
def explain_os_errors(path: str | os.PathLike[str], doing: str) -> Iterator[None]:
    """Turns an `OSError` inside the block into a `StateError` that names `path` and what to do."""
    try:
        yield
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, f"{error.strerror or error}: check the disk")
        raise StateError(f"Cannot {doing} {os.fspath(path)}: {advice}.") from error


def sync_folder(folder: Path) -> None:
    """Makes the names in `folder` (a rename, a new file) durable."""
    if os.name == "nt":  # a folder cannot be opened for syncing there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def owners_own(path: str, flags: int) -> int:
    """Open a file, as an `opener` for `open`, so that a new one is its owner's alone.

    It is never readable by group or world, not even for a moment. A file that is there keeps its
    mode.
    """
    return os.open(path, flags, 0o600)


def write_atomic(path: str | os.PathLike[str], data: bytes | Iterable[bytes]) -> None:
    """Replaces the content of `path` by `data`, as a whole or not at all.

    What is too large to be held comes in parts.

    **Guarantee**: on any error before the rename (also Ctrl-C) the old content stays and the
    temporary file is removed; when the call returns, the new content is durable. After `kill -9` a
    hidden file `.NAME.….tmp` may be left behind; nothing ever reads it.

    Raises:
        StateError: the disk is full, the folder is read-only or missing.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with explain_os_errors(path, "write"):
        try:
            with open(temporary, "xb", opener=owners_own) as file:
                file.writelines([data] if isinstance(data, bytes) else data)
                _sync(file)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def write_json_atomic(path: str | os.PathLike[str], value: object) -> None:
    """Write `value` as indented JSON, as a whole or not at all (`write_atomic`).

    NaN and infinity are refused.

    Raises:
        StateError: as `write_atomic`, or a number that JSON does not have.
    """
    write_atomic(path, (_json(path, value, indent=2) + "\n").encode())


def append_line(path: str | os.PathLike[str], value: object) -> None:
    """Append `value` as one line of JSON, which is durable when the call returns.

    Only one process may write at a time.

    A torn last line (a crash in the middle of an append) is moved to the end of `PATH.torn` first,
    so that the new line never continues it.

    Raises:
        StateError: the disk is full, the folder is read-only or missing, or NaN in `value`.
    """
    path = Path(path)
    line = (_json(path, value) + "\n").encode()
    with explain_os_errors(path, "append to"):
        is_new = not path.exists()
        with open(path, "a+b", opener=owners_own) as file:
            _cut_torn_line(path, file)
            file.write(line)
            _sync(file)
        if is_new:
            sync_folder(path.parent)


def read_lines(path: str | os.PathLike[str]) -> list[Any]:
    """Return the values that `append_line` wrote to a log, oldest first.

    A torn last line is left out.

    A missing file is an empty log.

    Raises:
        StateError: the file is unreadable, or a line other than a torn last one is not JSON.
    """
    try:
        with explain_os_errors(path, "read"):
            lines = Path(path).read_bytes().split(b"\n")[:-1]
    except StateError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return []
        raise
    return [_parsed(path, number, line) for number, line in enumerate(lines, start=1)]


def keep_aside(path: str | os.PathLike[str]) -> Path:
    """Renames a damaged file to `NAME.damaged-1`, `-2` …, never over an existing one.

    Returns:
        The new path.

    Raises:
        StateError: the file is missing, or its folder is read-only.
    """
    path = Path(path)
    with explain_os_errors(path, "keep aside"):
        os.stat(path)
        number = 1
        while True:
            target = path.with_name(f"{path.name}.damaged-{number}")
            try:
                # Reserves the name: the rename below replaces only this empty file.
                os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
                break
            except FileExistsError:
                number += 1
        os.replace(path, target)
        sync_folder(path.parent)
    return target


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _json(path: str | os.PathLike[str], value: object, indent: int | None = None) -> str:
    try:
        return json.dumps(value, indent=indent, allow_nan=False, ensure_ascii=False)
    except ValueError as error:
        raise StateError(
            f"Cannot write {os.fspath(path)}: {error}; write null for a number that is missing."
        ) from error


def _parsed(path: str | os.PathLike[str], number: int, line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise StateError(
            f"Line {number} of {os.fspath(path)} is not JSON ({error}): the file was edited or "
            "damaged; restore it from a copy, or remove that line."
        ) from error


def _cut_torn_line(path: Path, file: BinaryIO) -> None:
    start = _end_of_last_whole_line(file)
    if start == file.seek(0, os.SEEK_END):
        return
    file.seek(start)
    with open(f"{path}.torn", "ab", opener=owners_own) as torn:
        torn.write(file.read() + b"\n")
        _sync(torn)
    file.truncate(start)


def _end_of_last_whole_line(file: BinaryIO, step: int = 65536) -> int:
    """Reads backwards, so that an append costs the same however long the log is."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - step)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0
