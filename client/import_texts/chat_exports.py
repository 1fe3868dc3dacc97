"""Readers of chats, which take what their owner wrote.

They read WhatsApp, JSON Lines, and the exports of Telegram and ChatGPT.
"""

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import BinaryIO

from ...common.errors import DataError
from ..training.records import RECORD_LIMIT, Record, check_fields, decode_line
from .text_pieces import Note, Reading, Senders, clean, cut_up, numbered, time_of

__all__ = ["export", "is_whatsapp", "json_lines", "whatsapp"]

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


def is_whatsapp(head: str) -> bool:
    """Return whether a text starts like a chat that WhatsApp exported."""
    lines = [line for line in head.split("\n", 40)[:40] if line.strip()]
    stamps = [match for line in lines if (match := _STAMP.match(line.rstrip("\r")))]
    return bool(
        stamps
        and _STAMP.match(lines[0].rstrip("\r"))
        and any(_NAMED.match(stamp[9]) for stamp in stamps)
    )


def whatsapp(lines: Iterable[str], ask: Reading) -> Iterator[Record | Note]:
    """Read the owner's messages from a WhatsApp chat.

    They are dated once all dates were seen, because 03/04 alone does not say which is the month.
    """
    senders = Senders(ask)
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
        if senders.wrote((named[1] or named[3]).strip("\u200e\u202a\u202c ")):
            open_message = _Message(date, _seconds(stamp), [named[2] or ""])
            mine.append(open_message)
    senders.refuse_strangers()
    # Where no day is above 12: the twelve-hour clock with slashes is the American way.
    month_first = largest[0] <= 12 and (largest[1] > 12 or (twelve_hours and not dotted))
    for message in mine:
        text = _without_marks("\n".join(message.lines))
        yield from cut_up(text, _whatsapp_time(message, month_first, ask.mtime), ask)


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
    """Remove what WhatsApp says itself: '<media omitted>' in any language, '<edited>'."""
    text = re.sub(r"\s*\u200e<[^<>\n]*>\s*$", "", text)
    if text.startswith("\u200e") or re.fullmatch(r"\s*<[^<>\n]*>\s*", text):
        return ""
    return text


def json_lines(span: BinaryIO, ask: Reading) -> Iterator[Record | Note]:
    """Read JSON Lines, with one record, text or chat a line.

    Where there are several users, only the owner's lines are taken.
    """
    senders = Senders(ask)
    for number, line in numbered(span, RECORD_LIMIT):
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
        if not (isinstance(user, str) and user.strip()):
            senders.mine += 1
        elif not senders.wrote(user, known=not ask.me):
            continue
        yield from _fields(fields, number, ask)
    if len(senders.names) > 1 and not ask.me:
        raise senders.unknown()
    senders.refuse_strangers()


def _fields(fields: dict[str, object], number: int, ask: Reading) -> Iterator[Record | Note]:
    """Read one line: the native format, another with `text`, or a chat with `messages`."""
    time = time_of(fields.get("time"), ask.mtime)
    if "text" not in fields and isinstance(fields.get("messages"), list):
        for message in map(_dict, _list(fields["messages"])):
            if message.get("role") in ("user", "human"):
                yield from cut_up(_parts(message.get("content")), time, ask)
        return
    if isinstance(text := fields.get("text"), str):
        fields = {**fields, "text": clean(text)}
    try:
        record = check_fields({**fields, "user": fields.get("user") or "me"}, "line").record
    except DataError as error:
        yield Note(str(error).removeprefix("line: ").rstrip("."), number)
        return
    if record.label is None:
        yield from cut_up(record.text, time, ask)
    elif record.text.strip():  # a label belongs to the whole text
        yield Record(record.text.strip(), record.label, time)


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _dict(value: object, key: str = "") -> Mapping[str, object]:
    """Return an object, or the one below a key of it; empty where there is none."""
    found = value if isinstance(value, dict) else {}
    return _dict(found.get(key)) if key else found


def _parts(content: object) -> str:
    """Join a text from its parts: a text, or a list of texts and of objects with a `text`."""
    parts = [_dict(part).get("text", part) for part in _list(content)]
    if isinstance(content, str):
        parts = [content]
    return "".join(part for part in parts if isinstance(part, str))


def export(span: BinaryIO, ask: Reading) -> Iterator[Record | Note]:
    """Read a chat that Telegram or ChatGPT exported as JSON, earliest message first."""
    try:
        content = json.loads(span.read())
    except (ValueError, RecursionError) as error:
        raise DataError("not a JSON document, or a damaged one") from error
    if any("mapping" in _dict(item) for item in _list(content)):
        messages = list(_chatgpt(content, ask))
    elif "messages" in _dict(content) or "chats" in _dict(content):
        messages = list(_telegram(content, ask))
    else:
        raise DataError(
            "a JSON document, but no export of Telegram (result.json) or ChatGPT "
            "(conversations.json): one JSON object a line is read from .jsonl files"
        )
    for time, text in sorted(messages, key=lambda message: message[0]):
        yield from cut_up(text, time, ask)


def _chatgpt(content: object, ask: Reading) -> Iterator[tuple[float, str]]:
    for conversation in map(_dict, _list(content)):
        start = time_of(conversation.get("create_time"), ask.mtime)
        for node in _dict(conversation, "mapping").values():
            message = _dict(node, "message")
            inner = _dict(message, "content")
            if (
                _dict(message, "author").get("role") == "user"
                and inner.get("content_type") in ("text", "multimodal_text")
                and not _dict(message, "metadata").get("is_visually_hidden_from_conversation")
            ):
                texts = [part for part in _list(inner.get("parts")) if isinstance(part, str)]
                yield time_of(message.get("create_time"), start), "\n\n".join(texts)


def _telegram(content: object, ask: Reading) -> Iterator[tuple[float, str]]:
    """Yield the owner's messages of one exported Telegram chat, or of all chats.

    An export of all chats knows whose it is.
    """
    owner = _dict(content, "personal_information").get("user_id")
    senders = Senders(ask)
    chats = [content, *_list(_dict(content, "chats").get("list"))]
    for message in (_dict(one) for chat in chats for one in _list(_dict(chat).get("messages"))):
        name = message.get("from")
        if message.get("type") != "message" or not isinstance(name, str):
            continue
        is_owner = owner is not None and message.get("from_id") == f"user{owner}"
        if senders.wrote(name, known=is_owner) and not message.get("forwarded_from"):
            yield _telegram_time(message, ask.mtime), _parts(message.get("text"))
    senders.refuse_strangers()


def _telegram_time(message: Mapping[str, object], otherwise: float) -> float:
    stamp = message.get("date_unixtime")
    if isinstance(stamp, str) and stamp.isascii() and stamp.isdigit():
        return time_of(int(stamp[:15]), otherwise)
    return time_of(message.get("date"), otherwise)
