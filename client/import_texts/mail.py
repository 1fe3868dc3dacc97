"""Reader of mailboxes and single mails, which takes what their owner wrote.

Quotes and signatures are left out.
"""

import email
import re
from collections import Counter
from collections.abc import Iterator
from email.errors import MessageError
from email.header import decode_header, make_header
from email.message import Message
from email.utils import parseaddr, parsedate_to_datetime
from html.parser import HTMLParser
from typing import BinaryIO

from ...common.errors import DataError
from ..training.records import Record
from .text_pieces import (
    STEP,
    Note,
    Reading,
    clean,
    cut_up,
    is_me,
    megabytes,
    moment,
    numbered,
    say_who,
)

__all__ = ["POSTMARK", "mailbox"]

POSTMARK = re.compile(rb"From [^\n]*\d\d:\d\d[^\n]*\d{4}[ \t\r]*(?:\n|$)")
_MAIL_LIMIT = 4 * STEP
_MAIL_ERRORS = (ValueError, LookupError, TypeError, AttributeError, MessageError)
_FORWARDED = re.compile(r"-{3,}[^-\n]+-{3,}\s*\n\s*\W?[A-Z][\w-]*\W{0,2}:")
_WROTE = re.compile(r"@|\d[:.]\d\d|\d{4}")
_BLOCKS = frozenset(["p", "div", "br", "li", "ul", "ol", "tr", "table", "pre", "hr", "dt", "dd"])
_HEADING = re.compile("h[1-6]")
_SKIPPED = frozenset(["script", "style", "title", "blockquote"])


def mailbox(span: BinaryIO, is_one: bool, ask: Reading) -> Iterator[Record | Note]:
    """Read the owner's mails from an mbox, or from one `.eml` file.

    Without `me` all mails are taken.
    """
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
        if ask.me and not (is_me(address, ask) or is_me(name, ask)):
            continue
        mine += 1
        if is_cut and not mail.is_multipart():
            yield Note(f"mail {number} is left out after {megabytes(_MAIL_LIMIT)} MB")
        yield from cut_up(_own_lines(clean(body)), _mail_time(mail["Date"], ask.mtime), ask)
    if not count:
        raise DataError("no mail in it: a mailbox in the mbox format was expected")
    if not mine:
        raise say_who(senders, ask)
    if not ask.me and len(senders) > 1:
        yield Note(
            f"the mails of all {len(senders)} senders were taken: --me ADDRESS takes yours only"
        )


def _mails(span: BinaryIO, is_one: bool) -> Iterator[tuple[bytes, bool]]:
    """Yield the bytes of each mail, cut after `_MAIL_LIMIT`, and whether they were cut."""
    lines: list[bytes] | None = [] if is_one else None
    size, is_after_blank = 0, True
    for _, line in numbered(span, STEP):
        line = line or b""
        if is_after_blank and not is_one and POSTMARK.match(line):
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
        return moment(parsedate_to_datetime(str(value)))
    except (*_MAIL_ERRORS, OverflowError):
        return otherwise


def _body(mail: "Message[str, str]") -> str:
    """Return the first plain text that is no attachment, else the first HTML as text."""
    parts = list(_leaves(mail))
    for kind, as_text in (("text/plain", str), ("text/html", _html_text)):
        for part in parts:
            if part.get_content_type() == kind:
                return as_text(_decoded(part))
    return ""


def _leaves(mail: "Message[str, str]") -> "Iterator[Message[str, str]]":
    """Yield the parts of a mail that are no attachments.

    A mail that is attached is an attachment.
    """
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
    """Remove quoted lines, the line that announces them, forwarded mails and the signature."""
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
    """Remove 'On Monday, Ann <ann@example.org> wrote:' in any language, up to three lines of it."""
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
    """The text of an HTML mail as a reader sees it, without quotes, styles or scripts.

    Each block begins a new line.
    """

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
