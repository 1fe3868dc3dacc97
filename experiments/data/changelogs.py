"""Debian changelogs on this machine -> one person's records per maintainer.

Every package leaves its changelog in /usr/share/doc. A user is a maintainer by the name in the
signature line, a record is one entry without its first and last line, the time is the signature's.
The same entry in several packages of one source counts once. Machines of another kind lack them:
then `DataError` says so, and nothing in privet needs them.
"""

import gzip
import re
import zlib
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path

from ...client.training.records import RECORD_LIMIT, Record
from ...common.errors import DataError

__all__ = ["FOLDER", "entries", "read_changelogs"]

FOLDER = Path("/usr/share/doc")
_NAMES = ("changelog.Debian.gz", "changelog.gz")
_HEADER = re.compile(r"(\S+) \(([^)]+)\) [^;]*;")
_SIGNATURE = re.compile(r" -- (.+?) <[^>]*>  ?(.*)")


def read_changelogs(folder: Path = FOLDER) -> dict[str, tuple[Record, ...]]:
    """Read every maintainer's entries below `folder`, earliest first, names sorted.

    An entry without text or without a date is left out, and so is a file that is not readable.

    Raises:
        DataError: there is no entry at all.
    """
    people: dict[str, dict[tuple[str, str], Record]] = {}
    paths = [path for name in _NAMES for path in sorted(folder.glob(f"*/{name}"))]
    for path in paths:
        for package, version, name, time, body in entries(_text(path)):
            people.setdefault(name, {}).setdefault((package, version), Record(body, time=time))
    if not people:
        raise DataError(
            f"The source 'changelogs' needs Debian changelogs (*/{_NAMES[0]}) below {folder}, and "
            "there are none; it works on Debian and its relatives, take another source elsewhere."
        )
    return {
        name: tuple(sorted(found.values(), key=lambda record: float(record.time or 0)))
        for name, found in sorted(people.items())
    }


def entries(text: str) -> Iterator[tuple[str, str, str, float, str]]:
    """A changelog -> (package, version, maintainer, seconds since 1970, text), as in the file."""
    head: re.Match[str] | None = None
    body: list[str] = []
    for line in text.splitlines():
        if found := _HEADER.match(line):
            head, body = found, []
        elif head is not None and (signed := _SIGNATURE.match(line)):
            time = _seconds(signed[2])
            said = "\n".join(body)
            if time is not None and said and len(said) < RECORD_LIMIT // 4:
                yield head[1], head[2], signed[1].strip(), time, said
            head = None
        elif line.strip():
            body.append(" ".join(line.split()))


def _seconds(date: str) -> float | None:
    try:
        return parsedate_to_datetime(date).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None


def _text(path: Path) -> str:
    """Read a file's text. It is empty where the file cannot be read.

    Packages bring broken files too.
    """
    try:
        with gzip.open(path) as file:
            return file.read().decode("utf-8", errors="replace")
    except (OSError, EOFError, zlib.error):
        return ""
