"""Helpers of all readers: the request to a reader, and the cutting of text into pieces.

**Guarantee**: as `client/import_texts/formats.py`, which calls the readers.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import BinaryIO

from ...common.errors import DataError
from ..training.records import Record

__all__ = [
    "STEP",
    "Note",
    "Reading",
    "Senders",
    "clean",
    "cut_up",
    "megabytes",
    "moment",
    "numbered",
    "pieces",
    "time_of",
]

STEP = 1 << 20

# What `str.split` takes for white space stays a boundary between words.
_BREAKS = re.compile("\r\n|[\r\x0b\x0c\x1c-\x1f\x85]")
_STRIPPED = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff]")
_SPACE = re.compile(r"\s*")
_BOUNDARIES = tuple(
    re.compile("(?s).*" + last)
    for last in (
        r"(?=\n[ \t]*\n)",  # paragraphs
        r"(?:[.!?…][\"'”’»)\]]*(?=\s)|[。！？](?=.))",  # sentences
        r"(?=\n)",
        r"\S(?=\s)",
    )
)
_MARGIN = 16
_JOINERS = frozenset("\u200d\ufe0e\ufe0f")


@dataclass(frozen=True, slots=True)
class Note:
    """A part of a file that was left out, and the reason.

    `line`: its number, where there is one line to name.
    """

    reason: str
    line: int | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """The request to a reader: whose texts, of what time, up to which size.

    Attributes:
        me: the owner's names and addresses, case folded; masked in `repr`.
        mtime: when the file was last changed, POSIX seconds: the time of what has none.
        piece_chars: the most characters of a record.
        limit: the most bytes read of one file: its last ones.
    """

    me: frozenset[str] = field(repr=False)
    mtime: float
    piece_chars: int
    limit: int


def clean(text: str) -> str:
    """Remove control characters and half surrogates, and make every line end the same."""
    return _STRIPPED.sub("", _BREAKS.sub("\n", text))


def pieces(chunks: Iterable[str], size: int) -> Iterator[str]:
    """Cut clean text into pieces of at most `size` characters.

    Each piece is as long as it can be and ends, in this order of preference, at the last end of
    a paragraph, a sentence or a line that leaves it at least a quarter full, at the last white
    space, or, inside a longer word, before a character that stands alone.

    **Guarantee**: the pieces together are the text, in order, but for white space at their ends;
    no word of at most `size` characters is cut (where sentences end with 。！？, words are not
    told apart and a cut may follow one of these).

    Args:
        chunks: the text in parts of any length, so that a file need not be held.
        size: at least 16.
    """
    rest = ""
    for chunk in chunks:
        rest, start = rest + chunk, 0
        while True:
            start = _after_space(rest, start)
            if len(rest) - start <= size + _MARGIN:
                break
            end = _cut(rest, start, size)
            yield rest[start:end].rstrip()
            start = end
        rest = rest[start:]
    while rest := rest.strip():
        end = _cut(rest, 0, size) if len(rest) > size else size
        yield rest[:end].rstrip()
        rest = rest[end:]


def _after_space(text: str, start: int) -> int:
    found = _SPACE.match(text, start)
    return found.end() if found else start


def _cut(text: str, start: int, size: int) -> int:
    """Find where the piece ends that starts at `start`.

    `start` is no white space, and the text is longer than the piece.
    """
    for boundary in _BOUNDARIES:
        # One more: the character after a piece that is just full.
        found = boundary.match(text, start, start + size + 1)
        if found and found.end() - start > (size // 4 if boundary is not _BOUNDARIES[-1] else 0):
            return found.end()
    alone = (end for end in range(start + size, start + size - _MARGIN, -1))
    return next((end for end in alone if _stands_alone(text, end)), start + size)


def _stands_alone(text: str, index: int) -> bool:
    return (
        not unicodedata.combining(text[index])
        and text[index] not in _JOINERS
        and text[index - 1] != "\u200d"
    )


def megabytes(size: int) -> str:
    """Write out a number of bytes in megabytes, for messages to the owner."""
    return f"{size / 1e6:,.0f}" if size >= 1e6 else f"{size / 1e6:.3f}"


def numbered(span: BinaryIO, limit: int) -> Iterator[tuple[int, bytes | None]]:
    """Yield the lines of a file with their numbers.

    A line longer than `limit` bytes comes as None, and is never held.
    """
    number = 0
    while line := span.readline(limit + 1):
        number += 1
        if len(line) <= limit or line.endswith(b"\n"):
            yield number, line
            continue
        while (rest := span.readline(STEP)) and not rest.endswith(b"\n"):
            pass
        yield number, None


def cut_up(text: str, time: float, ask: Reading) -> Iterator[Record]:
    """Cut a text into records of one piece each."""
    return (Record(piece, None, time) for piece in pieces([clean(text)], ask.piece_chars))


def time_of(value: object, otherwise: float) -> float:
    """Read a number or an ISO 8601 text as POSIX seconds.

    A time without a zone is UTC, and what is no time gives `otherwise`.
    """
    try:
        if isinstance(value, str):
            return moment(datetime.fromisoformat(value))
        if isinstance(value, int | float) and abs(float(value)) < 1e300:
            return float(value)
    except (ValueError, OverflowError):
        pass
    return otherwise


def moment(time: datetime) -> float:
    """Return a time as POSIX seconds.

    A time without a zone is UTC.
    """
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


class Senders:
    """Who wrote the messages of one file, to tell the owner's from the others'.

    Attributes:
        names: how many messages each sender has, in order of first appearance.
        mine: how many of them are the owner's.
    """

    def __init__(self, ask: Reading) -> None:
        self.names: Counter[str] = Counter()
        self.mine = 0
        self._ask = ask

    def wrote(self, *names: str, known: bool = False) -> bool:
        """Count a message, and return whether it is the owner's, who may have several names.

        Args:
            names: of the sender, of which the first that is not empty is shown.
            known: the message is the owner's, whatever the name.
        """
        self.names[next(filter(None, names), "")] += 1
        own = known or any(name.strip().casefold() in self._ask.me for name in names)
        self.mine += own
        return own

    def refuse_strangers(self) -> None:
        """Refuse a file with senders, none of whom is known to be the owner.

        Raises:
            DataError: names the senders, of whom the owner has to say which one is meant.
        """
        if self.names and not self.mine:
            raise self.unknown()

    def unknown(self) -> DataError:
        """Return the error for a file of which it is not known which sender is the owner."""
        shown = ", ".join(repr(clean(name)[:40]) for name, _ in self.names.most_common(8))
        others = f" and {len(self.names) - 8} more" if len(self.names) > 8 else ""
        none = ", none of which is a name given" if self._ask.me else ""
        return DataError(
            f"it has messages of {shown}{others}{none}: say who you are with --me NAME"
        )
