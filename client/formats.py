"""Readers: one open file of a person -> their own records, a piece of a paragraph's size each.

| kind | known by | what is taken |
|---|---|---|
| text, Markdown | `.txt .text .md .markdown`, no suffix | all of it |
| WhatsApp | a text that starts like its export | the messages of `me` |
| JSON Lines | `.jsonl .ndjson` | `text` (native or not), the user's side of `messages` |
| mail | `.mbox .mbx .eml`, or a text that starts like one | plain text without quotes, signature |
| Telegram | `.json` with `messages` or `chats` | the messages of `me`, none forwarded |
| ChatGPT | `.json`, a list with `mapping` | what the user wrote |

Nothing is written, and no message of this file quotes what is in a record: names of senders
are given only where the owner has to say which of them they are.

**Guarantee**: a record's text is not empty, has at most `piece_chars` characters (a labelled
record of the native format: `RECORD_LIMIT` bytes), no control characters but line end and tab,
and no half surrogate; and where a file says who wrote, it was written by `me`.

Memory: a text, JSON Lines or mail file is read in steps, whatever its size; of a JSON export,
which only parses as a whole, several times its size is held (52 MB of ChatGPT's took 260 MB).
"""

import codecs
import email
import io
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.errors import MessageError
from email.header import decode_header, make_header
from email.message import Message
from email.utils import parseaddr, parsedate_to_datetime
from html.parser import HTMLParser
from typing import Any, BinaryIO

from ..common.errors import DataError
from .data import RECORD_LIMIT, Record, check_fields, decode_line

__all__ = ["SUFFIXES", "Note", "Reading", "clean", "pieces", "read"]

SUFFIXES = frozenset(
    ["", ".txt", ".text", ".md", ".markdown", ".jsonl", ".ndjson", ".mbox", ".mbx", ".eml", ".json"]
)
HEAD = 65_536
STEP = 1 << 20
_LINES = frozenset([".jsonl", ".ndjson"])
_MAIL = frozenset([".mbox", ".mbx", ".eml"])
_MAGIC = {
    b"%PDF": "a PDF document: save its text as .txt",
    b"PK\x03\x04": "an archive or an office document: unpack it, or save its text as .txt",
    b"\xd0\xcf\x11\xe0": "an office document: save its text as .txt",
    b"{\\rtf": "an RTF document: save its text as .txt",
    b"\x1f\x8b": "a compressed file: unpack it",
    b"BZh": "a compressed file: unpack it",
    b"\xfd7zXZ": "a compressed file: unpack it",
    b"(\xb5/\xfd": "a compressed file: unpack it",
    b"7z\xbc\xaf": "an archive: unpack it",
    b"Rar!": "an archive: unpack it",
    b"SQLite format 3": "a database, not text",
    b"\x7fELF": "a program, not text",
    b"\x89PNG": "a picture, not text",
    b"\xff\xd8\xff": "a picture, not text",
    b"GIF8": "a picture, not text",
}
_BOMS = {  # the longer ones first: UTF-32's starts like UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_CONTROLS = bytes(set(range(32)) - set(b"\t\n\r\f\x1b") | {127})
_HIGH = bytes(range(128, 256))
_NOT_CP1252 = b"\x81\x8d\x8f\x90\x9d"

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
    """Something in a file that was left out, and why; `line` where there is one line to name."""

    reason: str
    line: int | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """What every reader is told.

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


def read(file: BinaryIO, suffix: str, ask: Reading) -> Iterator[Record | Note]:
    """Yield the records of one regular file, in its order, and notes on what was left out.

    Args:
        file: open for reading, seekable. Bytes that are added meanwhile are not read.
        suffix: lower case, with its dot; "" is for files that must show what they are.

    Raises:
        DataError: nothing can be taken: the message is the reason, without the file's name.
        OSError: the file cannot be read.
    """
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    head = file.read(HEAD)
    encoding = _refuse_binary(head)
    if suffix == ".json":
        if size > ask.limit:
            raise DataError(
                f"a JSON export of {_megabytes(size)} MB, and at most "
                f"{_megabytes(ask.limit)} MB of one file are read: split it, or raise the limit"
            )
        yield from _export(_span(file, 0, size), ask)
        return
    if suffix == ".eml":  # what matters stands first, the attachments last
        yield from _mailbox(_span(file, 0, min(size, ask.limit)), True, ask)
        return
    start = _start(file, size, ask.limit, encoding)
    if start:
        yield Note(
            f"the first {_megabytes(start)} MB are left out: of one file the last "
            f"{_megabytes(ask.limit)} MB are read"
        )
    if suffix in _LINES:
        yield from _json_lines(_span(file, start, size), ask)
    elif suffix in _MAIL or _POSTMARK.match(head):
        yield from _mailbox(_span(file, start, size), False, ask)
    else:
        yield from _text(file, start, size, encoding, ask)


def clean(text: str) -> str:
    """The text without control characters and half surrogates; every line end becomes one."""
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
    """Where the piece ends that starts at `start`, no white space; the text is longer than it."""
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


# --- bytes --------------------------------------------------------------------------------------


class _Span(io.RawIOBase):
    """The bytes [start, end) of a file: what is appended while reading is not read."""

    def __init__(self, file: BinaryIO, start: int, end: int) -> None:
        file.seek(start)
        self._file, self._left = file, end - start

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(min(len(buffer), self._left))
        buffer[: len(data)] = data
        self._left -= len(data)
        return len(data)


def _span(file: BinaryIO, start: int, end: int) -> io.BufferedReader:
    return io.BufferedReader(_Span(file, start, end), HEAD)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f}" if size >= 1e6 else f"{size / 1e6:.3f}"


def _start(file: BinaryIO, size: int, limit: int, encoding: str | None) -> int:
    """Where reading starts: after the first line end in the last `limit` bytes."""
    if size <= limit:
        return 0
    if encoding:
        raise DataError(
            f"{encoding.upper()} text of {_megabytes(size)} MB, and at most {_megabytes(limit)} "
            "MB of one file are read: save it as UTF-8, or raise the limit"
        )
    file.seek(size - limit)
    window = file.read(min(STEP, limit))
    line = window.find(b"\n") + 1
    whole = next((i for i, byte in enumerate(window[:4]) if byte & 0xC0 != 0x80), 0)
    return size - limit + (line or whole)


def _refuse_binary(head: bytes) -> str | None:
    """UTF-16 or UTF-32 where the head says so; None: bytes in which ASCII is ASCII."""
    for bom, encoding in _BOMS.items():
        if head.startswith(bom):
            return encoding
    for magic, reason in _MAGIC.items():
        if head.startswith(magic):
            raise DataError(reason)
    if b"\0" in head:
        raise DataError("not text (it has zero bytes); UTF-16 is read where it starts with a mark")
    _refuse_controls(head, len(head))
    return None


def _refuse_controls(data: bytes, total: int) -> None:
    if 50 * _share(data, _CONTROLS) > total:
        raise DataError("not text (too many control characters)")


def _share(data: bytes, among: bytes) -> int:
    """How many bytes of `data` are among these."""
    return len(data) - len(data.translate(None, among))


def _encoding(span: BinaryIO) -> str:
    """UTF-8 where all of it is; else Windows-1252 where it decodes and looks like text.

    The whole span is checked first: a fallback in the middle of a file would come too late.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    is_utf8, high, wrong, total = True, 0, 0, 0
    while chunk := span.read(STEP):
        if b"\0" in chunk:
            raise DataError("not text (it has zero bytes)")
        total += len(chunk)
        if not chunk.isascii():
            high, wrong = high + _share(chunk, _HIGH), wrong + _share(chunk, _NOT_CP1252)
        if is_utf8:
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError:
                is_utf8 = False
    if is_utf8 and not decoder.getstate()[0]:
        return "utf-8-sig"
    # Western European text has a few letters above ASCII; other scripts have little else.
    if wrong or high > 0.15 * total:
        raise DataError("text in an encoding that is not UTF-8: save it as UTF-8")
    return "cp1252"


def _lines(span: BinaryIO, limit: int) -> Iterator[tuple[int, bytes | None]]:
    """Numbered lines; None for one longer than `limit` bytes, which is never held."""
    number = 0
    while line := span.readline(limit + 1):
        number += 1
        if len(line) <= limit or line.endswith(b"\n"):
            yield number, line
            continue
        while (rest := span.readline(STEP)) and not rest.endswith(b"\n"):
            pass
        yield number, None


# --- text ---------------------------------------------------------------------------------------


def _text(
    file: BinaryIO, start: int, end: int, encoding: str | None, ask: Reading
) -> Iterator[Record | Note]:
    """Plain text, Markdown, or a chat that WhatsApp exported as text."""
    encoding = encoding or _encoding(_span(file, start, end))
    if encoding == "cp1252":
        yield Note("it is not UTF-8 and was read as Windows-1252")
    text = io.TextIOWrapper(_span(file, start, end), encoding)
    try:
        first = text.read(HEAD)
        if sum(not (c.isprintable() or c.isspace()) for c in first) > 0.05 * len(first) + 1:
            raise DataError("not text (too many characters that cannot be printed)")
        chunks = _chunks(first, text)
        if _is_whatsapp(first):
            yield from _whatsapp(_text_lines(chunks), ask)
            return
        for piece in pieces(map(clean, chunks), ask.piece_chars):
            yield Record(piece, None, ask.mtime)
    except UnicodeDecodeError as error:
        raise DataError(f"damaged {encoding.upper()} text: save it as UTF-8") from error


def _chunks(first: str, text: io.TextIOWrapper) -> Iterator[str]:
    yield first
    while chunk := text.read(HEAD):
        yield chunk


def _text_lines(chunks: Iterable[str]) -> Iterator[str]:
    """Lines without their ends; one longer than a chunk comes in parts."""
    rest = ""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split("\n")
        yield from whole
        if len(rest) > STEP:
            yield rest
            rest = ""
    yield rest


def _cut_up(text: str, time: float, ask: Reading) -> Iterator[Record]:
    return (Record(piece, None, time) for piece in pieces([clean(text)], ask.piece_chars))


def _time(value: object, otherwise: float) -> float:
    """POSIX seconds of a number or an ISO 8601 text (without a zone: UTC)."""
    try:
        if isinstance(value, str):
            return _moment(datetime.fromisoformat(value))
        if isinstance(value, int | float) and abs(float(value)) < 1e300:
            return float(value)
    except (ValueError, OverflowError):
        pass
    return otherwise


def _moment(time: datetime) -> float:
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


def _say_who(names: Counter[str], ask: Reading) -> DataError:
    """The reason for a file whose senders are known and none is known to be the owner."""
    shown = ", ".join(repr(clean(name)[:40]) for name, _ in names.most_common(8))
    others = f" and {len(names) - 8} more" if len(names) > 8 else ""
    none = ", none of which is a name given" if ask.me else ""
    return DataError(f"it has messages of {shown}{others}{none}: say who you are with --me NAME")


def _is_me(name: str, ask: Reading) -> bool:
    return name.strip().casefold() in ask.me


# --- mail ---------------------------------------------------------------------------------------

_POSTMARK = re.compile(rb"From [^\n]*\d\d:\d\d[^\n]*\d{4}[ \t\r]*(?:\n|$)")
_MAIL_LIMIT = 4 * STEP
_MAIL_ERRORS = (ValueError, LookupError, TypeError, AttributeError, MessageError)
_FORWARDED = re.compile(r"-{3,}[^-\n]+-{3,}\s*\n\s*\W?[A-Z][\w-]*\W{0,2}:")
_WROTE = re.compile(r"@|\d[:.]\d\d|\d{4}")
_BLOCKS = frozenset(["p", "div", "br", "li", "ul", "ol", "tr", "table", "pre", "hr", "dt", "dd"])
_HEADING = re.compile("h[1-6]")
_SKIPPED = frozenset(["script", "style", "title", "blockquote"])


def _mailbox(span: BinaryIO, is_one: bool, ask: Reading) -> Iterator[Record | Note]:
    """The owner's mails of an mbox (one mail of an `.eml`); without `me`, all of them."""
    senders: Counter[str] = Counter()
    mine = count = 0
    for number, (raw, is_cut) in enumerate(_mails(span, is_one), start=1):
        try:
            mail = email.message_from_bytes(raw)
            name, address = parseaddr(_header(mail["From"]))
            body = _body(mail)
        except _MAIL_ERRORS:
            yield Note(f"mail {number} cannot be parsed")
            continue
        count += 1
        senders[address or name] += 1
        if ask.me and not (_is_me(address, ask) or _is_me(name, ask)):
            continue
        mine += 1
        if is_cut and not mail.is_multipart():
            yield Note(f"mail {number} is left out after {_megabytes(_MAIL_LIMIT)} MB")
        yield from _cut_up(_own_lines(clean(body)), _mail_time(mail["Date"], ask.mtime), ask)
    if not count:
        raise DataError("no mail in it: a mailbox in the mbox format was expected")
    if not mine:
        raise _say_who(senders, ask)
    if not ask.me and len(senders) > 1:
        yield Note(
            f"the mails of all {len(senders)} senders were taken: --me ADDRESS takes yours only"
        )


def _mails(span: BinaryIO, is_one: bool) -> Iterator[tuple[bytes, bool]]:
    """The bytes of each mail, cut after `_MAIL_LIMIT`, and whether they were cut."""
    lines: list[bytes] | None = [] if is_one else None
    size, is_after_blank = 0, True
    for _, line in _lines(span, STEP):
        line = line or b""
        if is_after_blank and not is_one and _POSTMARK.match(line):
            if lines:
                yield b"".join(lines), size > _MAIL_LIMIT
            lines, size = [], 0
        elif lines is not None:
            size += len(line)
            if size <= _MAIL_LIMIT:
                lines.append(line)
        is_after_blank = not line.strip()
    if lines:
        yield b"".join(lines), size > _MAIL_LIMIT


def _header(value: object) -> str:
    return str(make_header(decode_header(str(value or ""))))


def _mail_time(value: object, otherwise: float) -> float:
    try:
        return _moment(parsedate_to_datetime(str(value)))
    except (*_MAIL_ERRORS, OverflowError):
        return otherwise


def _body(mail: "Message[str, str]") -> str:
    """The first plain text that is no attachment, else the first HTML as text."""
    parts = list(_leaves(mail))
    for kind, as_text in (("text/plain", str), ("text/html", _html_text)):
        for part in parts:
            if part.get_content_type() == kind:
                return as_text(_decoded(part))
    return ""


def _leaves(mail: "Message[str, str]") -> "Iterator[Message[str, str]]":
    """The parts of a mail, but for attachments; a mail that is attached is one."""
    inner = mail.get_payload()
    if mail.get_content_maintype() == "multipart" and isinstance(inner, list):
        for part in inner:
            if isinstance(part, Message):
                yield from _leaves(part)
    elif not (
        mail.is_multipart() or mail.get_filename() or mail.get_content_disposition() == "attachment"
    ):
        yield mail


def _decoded(part: "Message[str, str]") -> str:
    raw = part.get_payload(decode=True)
    raw = raw if isinstance(raw, bytes) else b""
    for charset in (part.get_content_charset(), "utf-8", "cp1252"):
        try:
            return raw.decode(charset or "utf-8")
        except (UnicodeDecodeError, LookupError):
            continue
    return raw.decode("utf-8", "replace")


def _own_lines(text: str) -> str:
    """Without quoted lines, the line that announces them, forwarded mails and the signature."""
    if found := _FORWARDED.search(text):
        text = text[: found.start()]
    kept: list[str] = []
    was_quoted = False
    for line in text.split("\n"):
        if line in ("-- ", "--"):
            break
        is_quoted = line.startswith(">") and not line.startswith(">From ")
        if is_quoted and not was_quoted:
            _drop_announcement(kept)
        if not is_quoted:
            kept.append(line[1:] if line.startswith(">From ") else line)
        was_quoted = is_quoted
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept))


def _drop_announcement(kept: list[str]) -> None:
    """'On Monday, Ann <ann@example.org> wrote:' in any language, up to three lines of it."""
    while kept and not kept[-1].strip():
        kept.pop()
    start = len(kept)
    while start and kept[start - 1].strip():
        start -= 1
    lines = kept[start:]
    is_short = 0 < len(lines) <= 3 and lines[-1].rstrip().endswith(":")
    if is_short and _WROTE.search("\n".join(lines)):
        del kept[start:]
    kept.append("")


class _HtmlText(HTMLParser):
    """What a reader sees: text, with a line end for each block; no quotes, styles or scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._hidden: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:  # noqa: ARG002
        if tag in _SKIPPED:
            self._hidden.append(tag)
        elif tag in _BLOCKS or _HEADING.fullmatch(tag):
            self.parts.append("\n" if tag in ("br", "li", "tr") else "\n\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._hidden:
            del self._hidden[self._hidden.index(tag) :]
        elif tag in _BLOCKS or _HEADING.fullmatch(tag):
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(re.sub(r"\s+", " ", data))


def _html_text(html: str) -> str:
    parser = _HtmlText()
    parser.feed(html)
    parser.close()
    return "".join(parser.parts)


# --- WhatsApp -----------------------------------------------------------------------------------

_STAMP = re.compile(
    r"\u200e?\[?(\d{1,4})([./-])(\d{1,2})\2(\d{1,4})[.,]?\s+(\d{1,2})[:.](\d\d)(?:[:.](\d\d))?"
    r"\s*([AaPp]\.?\s?[Mm]\.?)?(?:\]|\s[-–])\s(.*)"
)
_NAMED = re.compile(r"([^:]{1,60}): (.*)|([^:]{1,60}):$")


@dataclass(slots=True)
class _Message:
    date: tuple[int, int, int]
    seconds: int
    lines: list[str]


def _is_whatsapp(head: str) -> bool:
    lines = [line for line in head.split("\n", 40)[:40] if line.strip()]
    stamps = [match for line in lines if (match := _STAMP.match(line.rstrip("\r")))]
    return bool(
        stamps
        and _STAMP.match(lines[0].rstrip("\r"))
        and any(_NAMED.match(stamp[9]) for stamp in stamps)
    )


def _whatsapp(lines: Iterable[str], ask: Reading) -> Iterator[Record | Note]:
    """The owner's messages, dated once all dates were seen: 03/04 alone says no month."""
    names: Counter[str] = Counter()
    largest = [0, 0]
    twelve_hours = dotted = False
    mine: list[_Message] = []
    open_message: _Message | None = None
    for line in lines:
        stamp = _STAMP.match(line.rstrip("\r"))
        if stamp is None:
            if open_message is not None:
                open_message.lines.append(line)
            continue
        open_message = None
        date = (int(stamp[1]), int(stamp[3]), int(stamp[4]))
        if date[0] <= 31:
            largest = [max(largest[0], date[0]), max(largest[1], date[1])]
        twelve_hours, dotted = twelve_hours or bool(stamp[8]), dotted or stamp[2] != "/"
        if (named := _NAMED.match(stamp[9])) is None:
            continue  # WhatsApp's own words: somebody joined, a number changed
        name = (named[1] or named[3]).strip("\u200e\u202a\u202c ")
        names[name] += 1
        if _is_me(name, ask):
            open_message = _Message(date, _seconds(stamp), [named[2] or ""])
            mine.append(open_message)
    if names and not mine:
        raise _say_who(names, ask)
    # Where no day is above 12: the twelve-hour clock with slashes is the American way.
    month_first = largest[0] <= 12 and (largest[1] > 12 or (twelve_hours and not dotted))
    for message in mine:
        text = _without_marks("\n".join(message.lines))
        yield from _cut_up(text, _whatsapp_time(message, month_first, ask.mtime), ask)


def _seconds(stamp: re.Match[str]) -> int:
    hour, half = int(stamp[5]), (stamp[8] or "")[:1].lower()
    if half:
        hour = hour % 12 + (12 if half == "p" else 0)
    return 3600 * hour + 60 * int(stamp[6]) + int(stamp[7] or 0)


def _whatsapp_time(message: _Message, month_first: bool, otherwise: float) -> float:
    first, second, third = message.date
    if first > 31:
        year, month, day = first, second, third
    else:
        year, (month, day) = third, (first, second) if month_first else (second, first)
    try:
        start = datetime(year + 2000 if year < 100 else year, month, day, tzinfo=UTC)
    except ValueError:
        return otherwise
    return start.timestamp() + message.seconds


def _without_marks(text: str) -> str:
    """Without what WhatsApp says itself: '<media omitted>' in any language, '<edited>'."""
    text = re.sub(r"\s*\u200e<[^<>\n]*>\s*$", "", text)
    if text.startswith("\u200e") or re.fullmatch(r"\s*<[^<>\n]*>\s*", text):
        return ""
    return text


# --- JSON ---------------------------------------------------------------------------------------


def _json_lines(span: BinaryIO, ask: Reading) -> Iterator[Record | Note]:
    names: Counter[str] = Counter()
    mine = 0
    for number, line in _lines(span, RECORD_LIMIT):
        if line is None:
            yield Note(f"longer than {RECORD_LIMIT:,} bytes", number)
            continue
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        try:
            fields = decode_line(line, "")
        except DataError:  # its sentence may quote a character
            yield Note("not one JSON object in UTF-8", number)
            continue
        user = fields.get("user")
        if isinstance(user, str) and user.strip():
            names[user] += 1
            if ask.me and not _is_me(user, ask):
                continue
        mine += 1
        yield from _fields(fields, number, ask)
    if (len(names) > 1 and not ask.me) or (names and not mine):
        raise _say_who(names, ask)


def _fields(fields: dict[str, object], number: int, ask: Reading) -> Iterator[Record | Note]:
    """One line: the native format, another with `text`, or a chat with `messages`."""
    time = _time(fields.get("time"), ask.mtime)
    if "text" not in fields and isinstance(fields.get("messages"), list):
        for message in _dicts(fields["messages"]):
            if message.get("role") in ("user", "human"):
                yield from _cut_up(_parts(message.get("content")), time, ask)
        return
    if isinstance(text := fields.get("text"), str):
        fields = {**fields, "text": clean(text)}
    try:
        record = check_fields({**fields, "user": fields.get("user") or "me"}, "line").record
    except DataError as error:
        yield Note(str(error).removeprefix("line: ").rstrip("."), number)
        return
    if record.label is None:
        yield from _cut_up(record.text, time, ask)
    elif record.text.strip():  # a label belongs to the whole text
        yield Record(record.text.strip(), record.label, time)


def _dicts(values: object) -> Iterator[dict[str, Any]]:
    return (v for v in (values if isinstance(values, list) else []) if isinstance(v, dict))


def _parts(content: object) -> str:
    """A text, or a list of texts and of objects with a `text` of their own."""
    if isinstance(content, str):
        return content
    parts = [p if isinstance(p, str) else p.get("text") for p in _texts(content)]
    return "".join(part for part in parts if isinstance(part, str))


def _texts(content: object) -> Iterator[str | dict[str, Any]]:
    values = content if isinstance(content, list) else []
    return (value for value in values if isinstance(value, str | dict))


def _export(span: BinaryIO, ask: Reading) -> Iterator[Record | Note]:
    """A chat that Telegram or ChatGPT exported, as one JSON document, earliest message first."""
    try:
        content = json.loads(span.read())
    except (ValueError, RecursionError) as error:
        raise DataError("not a JSON document, or a damaged one") from error
    if isinstance(content, list) and any("mapping" in item for item in _dicts(content)):
        messages = _chatgpt(content, ask)
    elif isinstance(content, dict) and ("messages" in content or "chats" in content):
        messages = _telegram(content, ask)
    else:
        raise DataError(
            "a JSON document, but no export of Telegram (result.json) or ChatGPT "
            "(conversations.json): one JSON object a line is read from .jsonl files"
        )
    for time, text in sorted(messages, key=lambda message: message[0]):
        yield from _cut_up(text, time, ask)


def _chatgpt(content: list[object], ask: Reading) -> list[tuple[float, str]]:
    found = []
    for conversation in _dicts(content):
        nodes = conversation.get("mapping")
        start = _time(conversation.get("create_time"), ask.mtime)
        for node in nodes.values() if isinstance(nodes, dict) else ():
            message = _dict(node, "message")
            inner = _dict(message, "content")
            if (
                _dict(message, "author").get("role") == "user"
                and inner.get("content_type") in ("text", "multimodal_text")
                and not _dict(message, "metadata").get("is_visually_hidden_from_conversation")
            ):
                parts = [part for part in _texts(inner.get("parts")) if isinstance(part, str)]
                found.append((_time(message.get("create_time"), start), "\n\n".join(parts)))
    return found


def _dict(value: object, key: str) -> Mapping[str, Any]:
    inner = value.get(key) if isinstance(value, dict) else None
    return inner if isinstance(inner, dict) else {}


def _telegram(content: dict[str, Any], ask: Reading) -> list[tuple[float, str]]:
    """One chat, or all of them; in the second case the export knows whose it is."""
    owner = _dict(content, "personal_information").get("user_id")
    names: Counter[str] = Counter()
    found, mine = [], 0
    for chat in [content, *_dicts(_dict(content, "chats").get("list"))]:
        for message in _dicts(chat.get("messages")):
            name = message.get("from")
            if message.get("type") != "message" or not isinstance(name, str):
                continue
            names[name] += 1
            is_owner = owner is not None and message.get("from_id") == f"user{owner}"
            if not is_owner and not _is_me(name, ask):
                continue
            mine += 1
            if not message.get("forwarded_from"):
                found.append((_telegram_time(message, ask.mtime), _parts(message.get("text"))))
    if names and not mine:
        raise _say_who(names, ask)
    return found


def _telegram_time(message: Mapping[str, Any], otherwise: float) -> float:
    stamp = message.get("date_unixtime")
    if isinstance(stamp, str) and stamp.isascii() and stamp.isdigit():
        return _time(int(stamp[:15]), otherwise)
    return _time(message.get("date"), otherwise)
