"""Readers of chats, which take what their owner wrote.

They read WhatsApp, JSON Lines, and the exports of Telegram and ChatGPT.
"""

import codecs
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, BinaryIO

from ...common.errors import DataError
from ..training.records import RECORD_LIMIT, Record, check_fields, decode_line
from .text_pieces import Note, Reading, clean, cut_up, is_me, numbered, say_who, time_of

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
        if is_me(name, ask):
            open_message = _Message(date, _seconds(stamp), [named[2] or ""])
            mine.append(open_message)
    if names and not mine:
        raise say_who(names, ask)
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
    names: Counter[str] = Counter()
    mine = 0
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
        if isinstance(user, str) and user.strip():
            names[user] += 1
            if ask.me and not is_me(user, ask):
                continue
        mine += 1
        yield from _fields(fields, number, ask)
    if (len(names) > 1 and not ask.me) or (names and not mine):
        raise say_who(names, ask)


def _fields(fields: dict[str, object], number: int, ask: Reading) -> Iterator[Record | Note]:
    """Read one line: the native format, another with `text`, or a chat with `messages`."""
    time = time_of(fields.get("time"), ask.mtime)
    if "text" not in fields and isinstance(fields.get("messages"), list):
        for message in _dicts(fields["messages"]):
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


def _dicts(values: object) -> Iterator[dict[str, Any]]:
    return (v for v in (values if isinstance(values, list) else []) if isinstance(v, dict))


def _parts(content: object) -> str:
    """Join a text from its parts: a text, or a list of texts and of objects with a `text`."""
    if isinstance(content, str):
        return content
    parts = [p if isinstance(p, str) else p.get("text") for p in _texts(content)]
    return "".join(part for part in parts if isinstance(part, str))


def _texts(content: object) -> Iterator[str | dict[str, Any]]:
    values = content if isinstance(content, list) else []
    return (value for value in values if isinstance(value, str | dict))


def export(span: BinaryIO, ask: Reading) -> Iterator[Record | Note]:
    """Read a chat that Telegram or ChatGPT exported as JSON, earliest message first."""
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
        yield from cut_up(text, time, ask)


def _chatgpt(content: list[object], ask: Reading) -> list[tuple[float, str]]:
    found = []
    for conversation in _dicts(content):
        nodes = conversation.get("mapping")
        start = time_of(conversation.get("create_time"), ask.mtime)
        for node in nodes.values() if isinstance(nodes, dict) else ():
            message = _dict(node, "message")
            inner = _dict(message, "content")
            if (
                _dict(message, "author").get("role") == "user"
                and inner.get("content_type") in ("text", "multimodal_text")
                and not _dict(message, "metadata").get("is_visually_hidden_from_conversation")
            ):
                parts = [part for part in _texts(inner.get("parts")) if isinstance(part, str)]
                found.append((time_of(message.get("create_time"), start), "\n\n".join(parts)))
    return found


def _dict(value: object, key: str) -> Mapping[str, Any]:
    inner = value.get(key) if isinstance(value, dict) else None
    return inner if isinstance(inner, dict) else {}


def _telegram(content: dict[str, Any], ask: Reading) -> list[tuple[float, str]]:
    """Collect the owner's messages of one exported Telegram chat, or of all chats.

    An export of all chats knows whose it is.
    """
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
            if not is_owner and not is_me(name, ask):
                continue
            mine += 1
            if not message.get("forwarded_from"):
                found.append((_telegram_time(message, ask.mtime), _parts(message.get("text"))))
    if names and not mine:
        raise say_who(names, ask)
    return found


def _telegram_time(message: Mapping[str, Any], otherwise: float) -> float:
    stamp = message.get("date_unixtime")
    if isinstance(stamp, str) and stamp.isascii() and stamp.isdigit():
        return time_of(int(stamp[:15]), otherwise)
    return time_of(message.get("date"), otherwise)
