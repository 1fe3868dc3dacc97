"""Readers that turn one open file of a person into records of about a paragraph each.

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
import io
import os
from collections.abc import Iterator
from typing import Any, BinaryIO

from ...common.errors import DataError
from ..training.records import Record
from .chat_exports import export, is_whatsapp, json_lines, whatsapp
from .mail import POSTMARK, mailbox
from .text_pieces import STEP, Note, Reading, clean, megabytes, pieces

__all__ = ["SUFFIXES", "read"]

SUFFIXES = frozenset(
    ["", ".txt", ".text", ".md", ".markdown", ".jsonl", ".ndjson", ".mbox", ".mbx", ".eml", ".json"]
)
HEAD = 65_536
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
                f"a JSON export of {megabytes(size)} MB, and at most "
                f"{megabytes(ask.limit)} MB of one file are read: split it, or raise the limit"
            )
        yield from export(_span(file, 0, size), ask)
        return
    if suffix == ".eml":  # what matters stands first, the attachments last
        yield from mailbox(_span(file, 0, min(size, ask.limit)), True, ask)
        return
    start = _start(file, size, ask.limit, encoding)
    if start:
        yield Note(
            f"the first {megabytes(start)} MB are left out: of one file the last "
            f"{megabytes(ask.limit)} MB are read"
        )
    if suffix in _LINES:
        yield from json_lines(_span(file, start, size), ask)
    elif suffix in _MAIL or POSTMARK.match(head):
        yield from mailbox(_span(file, start, size), False, ask)
    else:
        yield from _text(file, start, size, encoding, ask)


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


def _start(file: BinaryIO, size: int, limit: int, encoding: str | None) -> int:
    """Find where reading starts, after the first line end in the last `limit` bytes."""
    if size <= limit:
        return 0
    if encoding:
        raise DataError(
            f"{encoding.upper()} text of {megabytes(size)} MB, and at most {megabytes(limit)} "
            "MB of one file are read: save it as UTF-8, or raise the limit"
        )
    file.seek(size - limit)
    window = file.read(min(STEP, limit))
    line = window.find(b"\n") + 1
    whole = next((i for i, byte in enumerate(window[:4]) if byte & 0xC0 != 0x80), 0)
    return size - limit + (line or whole)


def _refuse_binary(head: bytes) -> str | None:
    """Refuse a file whose first bytes are not text.

    Returns UTF-16 or UTF-32 where they say so, and None where the bytes for ASCII are ASCII.
    """
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
    """Count how many bytes of `data` are among these."""
    return len(data) - len(data.translate(None, among))


def _encoding(span: BinaryIO) -> str:
    """Decide whether a file is UTF-8 or Windows-1252.

    It is UTF-8 where all of it decodes, and else Windows-1252 where it looks like Western European
    text.

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


# --- text ---------------------------------------------------------------------------------------


def _text(
    file: BinaryIO, start: int, end: int, encoding: str | None, ask: Reading
) -> Iterator[Record | Note]:
    """Read plain text, Markdown, or a chat that WhatsApp exported as text."""
    encoding = encoding or _encoding(_span(file, start, end))
    if encoding == "cp1252":
        yield Note("it is not UTF-8 and was read as Windows-1252")
    try:
        first = io.TextIOWrapper(_span(file, start, end), encoding).read(HEAD)
        if sum(not (c.isprintable() or c.isspace()) for c in first) > 0.05 * len(first) + 1:
            raise DataError("not text (too many characters that cannot be printed)")
        text = io.TextIOWrapper(_span(file, start, end), encoding)
        if is_whatsapp(first):
            lines = iter(lambda: text.readline(STEP), "")
            yield from whatsapp((line.removesuffix("\n") for line in lines), ask)
            return
        chunks = iter(lambda: text.read(HEAD), "")
        for piece in pieces(map(clean, chunks), ask.piece_chars):
            yield Record(piece, None, ask.mtime)
    except UnicodeDecodeError as error:
        raise DataError(f"damaged {encoding.upper()} text: save it as UTF-8") from error
