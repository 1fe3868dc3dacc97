"""Reader of mailboxes and single mails, which takes what their owner wrote.

Quotes and signatures are left out.
"""

import re
from collections.abc import Iterator
from email import message_from_bytes, policy
from email.errors import MessageError
from email.message import EmailMessage, MIMEPart
from html.parser import HTMLParser
from typing import BinaryIO

from ...common.errors import DataError
from ..training.records import Record
from .text_pieces import (
    STEP,
    Note,
    Reading,
    Senders,
    clean,
    cut_up,
    megabytes,
    moment,
    numbered,
)

__all__ = ["POSTMARK", "mailbox"]

POSTMARK = re.compile(rb"From [^\n]*\d\d:\d\d[^\n]*\d{4}[ \t\r]*(?:\n|$)")
_MAIL_LIMIT = 4 * STEP
_MAIL_ERRORS = (ValueError, LookupError, TypeError, AttributeError, MessageError)
_FORWARDED = re.compile(r"-{3,}[^-\n]+-{3,}\s*\n\s*\W?[A-Z][\w-]*\W{0,2}:")
# what Outlook writes above a mail that it quotes, in any language
_HEADERS = re.compile(
    r"(?:^|\n\n)(?=(?:[^\n]*\n){0,2}[^\n]*(?:@|\d{4}))(?:\*?\w[\w .-]{0,19}:[^\n]+\n){3}"
)
_WROTE = re.compile(r"@|\d[:.]\d\d|\d{4}")
_BLOCKS = frozenset(["p", "div", "br", "li", "ul", "ol", "tr", "table", "pre", "hr", "dt", "dd"])
_HEADING = re.compile("h[1-6]")
_SKIPPED = frozenset(["script", "style", "title", "blockquote"])


def mailbox(span: BinaryIO, is_one: bool, ask: Reading) -> Iterator[Record | Note]:
    """Read the owner's mails from an mbox, or from one `.eml` file.

    Without `me` all mails are taken.
    """
    senders = Senders(ask)
    for number, (raw, is_cut) in enumerate(_mails(span, is_one), start=1):
        try:
            mail = message_from_bytes(raw, policy=policy.default)
            name, address = _sender(mail)
            body = _body(mail)
        except _MAIL_ERRORS:
            yield Note(f"mail {number} cannot be parsed")
            continue
        if not senders.wrote(address, name, known=not ask.me):
            continue
        if is_cut and not mail.is_multipart():
            yield Note(f"mail {number} is left out after {megabytes(_MAIL_LIMIT)} MB")
        yield from cut_up(_own_lines(clean(body)), _mail_time(mail, ask.mtime), ask)
    if not senders.names:
        raise DataError("no mail in it: a mailbox in the mbox format was expected")
    senders.refuse_strangers()
    if not ask.me and len(senders.names) > 1:
        yield Note(
            f"the mails of all {len(senders.names)} senders were taken: --me ADDRESS takes yours "
            "only"
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


def _sender(mail: EmailMessage) -> tuple[str, str]:
    """Return the display name and the address of who wrote a mail."""
    for sender in mail["From"].addresses if mail["From"] else ():
        return sender.display_name, sender.addr_spec
    return "", ""


def _mail_time(mail: EmailMessage, otherwise: float) -> float:
    try:
        return moment(mail["Date"].datetime)
    except (*_MAIL_ERRORS, OverflowError):
        return otherwise


def _body(mail: MIMEPart) -> str:
    """Return the first plain text that is no attachment, else the first HTML as text."""
    parts = list(_leaves(mail))
    for kind, as_text in (("text/plain", str), ("text/html", _html_text)):
        for part in parts:
            if part.get_content_type() == kind:
                return as_text(_decoded(part))
    return ""


def _leaves(part: MIMEPart) -> Iterator[MIMEPart]:
    """Yield the parts of a mail that are no attachments.

    A mail that is attached is an attachment.
    """
    if part.get_content_maintype() == "multipart":
        for inner in part.iter_parts():
            yield from _leaves(inner)
    elif not (part.is_multipart() or part.get_filename() or part.is_attachment()):
        yield part


def _decoded(part: MIMEPart) -> str:
    """Decode a text by the charset it names, or where that is wrong by the usual ones."""
    content = part.get_payload(decode=True)
    raw = content if isinstance(content, bytes) else b""
    for charset in (part.get_content_charset("utf-8"), "utf-8", "cp1252"):
        try:
            return raw.decode(charset)
        except (UnicodeDecodeError, LookupError):
            continue
    return raw.decode("utf-8", "replace")


def _own_lines(text: str) -> str:
    """Remove quoted lines, the line that announces them, forwarded mails and the signature."""
    for start in (_FORWARDED, _HEADERS):
        text = text[: found.start()] if (found := start.search(text)) else text
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
