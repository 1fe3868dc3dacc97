"""The owner's verdicts on answers (accepted, rejected, edited), and the pairs they give.

    feedback/<number>  one verdict: what was asked, what was answered, what the owner did, when

**Guarantee**: verdicts live in the vault, sealed like everything else, and are erased with it
(`privet client forget`). Nothing here is read by the gate. Pairs leave only as a noised, clipped
sum of gradients, and only in a run with `data.task = "preference"` that the owner agreed to; which
answers were taken only as a noised outcome of an A/B experiment that the owner agreed to.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Literal, cast

from ...common.errors import DataError, StateError

if TYPE_CHECKING:
    from ..training.records import Record
    from .device_store import DeviceStore

__all__ = [
    "MAX_TEXT",
    "MAX_VERDICTS",
    "Pair",
    "Verdict",
    "add",
    "check",
    "forget",
    "kept",
    "own_records",
    "pairs",
]

VerdictKind = Literal["accept", "reject", "edit"]

ENTRY, FORMAT = "feedback/", 1
MAX_TEXT = 20_000
"""Characters of one text."""
MAX_VERDICTS = 10_000
"""Verdicts kept; the next one asks the owner to forget some."""
SIDE_BY_SIDE = 8
"""Rejected answers that one accepted answer to the same prompt is paired with, the latest first."""

_FIELDS = {"accept": ("over",), "reject": (), "edit": ("edited",)}


@dataclass(frozen=True, slots=True)
class Verdict:
    """The owner's verdict on one answer.

    Its texts are masked in `repr`.

    Attributes:
        kind: accept, reject, or edit.
        prompt: what was asked; may be empty.
        answer: what was shown.
        over: accept: the other answer shown beside it and not taken; None where there was none.
        edited: edit: what the owner made of the answer.
        time: seconds since 1970.
        run: the A/B experiment whose arm made the answer that was judged; empty: none.
        taken: in an experiment, whether the arm's answer was the one taken.
    """

    kind: VerdictKind
    prompt: str = field(repr=False)
    answer: str = field(repr=False)
    over: str | None = field(default=None, repr=False)
    edited: str | None = field(default=None, repr=False)
    time: float = 0.0
    run: str = ""
    taken: bool = False


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to a prompt, of which the owner prefers one.

    Its texts are masked in `repr`.
    """

    prompt: str = field(repr=False)
    chosen: str = field(repr=False)
    rejected: str = field(repr=False)
    time: float


def check(fields: Mapping[str, object], where: str, now: float) -> Verdict:
    """Check the fields of a verdict, and return it.

    Args:
        fields: `kind`, `answer`, and as they apply `prompt`, `over`, `edited`, `time`.
        where: for the error's sentence.
        now: seconds since 1970; the time of a verdict without one, and the latest allowed.

    Raises:
        DataError: names `where` and the field; texts are not quoted, they are private.
    """
    kind = fields.get("kind")
    if kind not in _FIELDS:
        raise DataError(f'{where}: "kind" must be one of {", ".join(_FIELDS)}, not {kind!r:.40}.')
    known = {"kind", "prompt", "answer", "time", *_FIELDS[str(kind)]}
    unknown = sorted(name for name, value in fields.items() if name not in known and value)
    if unknown:
        raise DataError(
            f"{where}: {unknown[0]!r:.40} does not belong to {kind}; known: "
            f"{', '.join(sorted(known))}."
        )
    answer = _text(fields, "answer", where)
    texts = {name: _optional(fields, name, where) for name in _FIELDS[str(kind)]}
    if kind == "edit" and texts["edited"] is None:
        raise DataError(f'{where}: an edit needs "edited", what the answer became.')
    for name, text in texts.items():
        if text is not None and text.strip() == answer.strip():
            raise DataError(f'{where}: "{name}" is the answer itself; a preference needs two.')
    prompt = _optional(fields, "prompt", where) or ""
    time = _time(fields, where, now)
    over, edited = texts.get("over"), texts.get("edited")
    return Verdict(cast(VerdictKind, kind), prompt, answer, over, edited, time)


def add(home: "DeviceStore", verdicts: Iterable[Verdict]) -> list[int]:
    """Keep verdicts, all or none, and return their numbers.

    Raises:
        StateError: there would be more than `MAX_VERDICTS`; nothing was kept.
    """
    with home.vault.transaction():
        names = home.vault.names(ENTRY)
        last = max(map(_number, names), default=0)
        entries = {
            f"{ENTRY}{number:08d}": json.dumps({"format": FORMAT, **asdict(verdict)}).encode()
            for number, verdict in enumerate(verdicts, start=last + 1)
        }
        if len(names) + len(entries) > MAX_VERDICTS:
            raise StateError(
                f"this device keeps {len(names):,} verdicts and at most {MAX_VERDICTS:,}: forget "
                "some with `privet client feedback forget NUMBER...`"
            )
        home.vault.put_all(entries)
    return [_number(name) for name in entries]


def kept(home: "DeviceStore") -> dict[int, Verdict]:
    """Return the verdicts that are kept, by number, in the order they were kept.

    Raises:
        StateError: a newer privet wrote one.
    """
    with home.vault.transaction(writing=False):
        entries = {_number(name): home.vault.get(name) for name in home.vault.names(ENTRY)}
    return {number: _restored(number, content or b"{}") for number, content in entries.items()}


def forget(home: "DeviceStore", numbers: Sequence[int] | None) -> int:
    """Erase these verdicts, or all of them (None), and return how many there were.

    Raises:
        StateError: a number that is not there; nothing was erased.
    """
    with home.vault.transaction():
        names = {_number(name): name for name in home.vault.names(ENTRY)}
        wanted = sorted(names) if numbers is None else sorted({*numbers})
        missing = [number for number in wanted if number not in names]
        if missing:
            raise StateError(
                f"there is no verdict {missing[0]}; `privet client feedback list` has the numbers"
            )
        home.vault.put_all({names[number]: None for number in wanted})
    return len(wanted)


def pairs(verdicts: Iterable[Verdict]) -> tuple[Pair, ...]:
    """Return the pairs of answers that verdicts give, earliest first.

    An edit: the edited answer over the original. An accept of one of two shown: over the other.
    Accepted and rejected answers to the same prompt: each of the accepted over the latest
    `SIDE_BY_SIDE` of the rejected. Where verdicts contradict each other the later one stands: an
    answer has one verdict, and two answers have one order.
    """
    ordered = sorted(verdicts, key=lambda verdict: verdict.time)
    latest: dict[tuple[str, frozenset[str]], Pair] = {}
    for pair in sorted([*_shown(ordered), *_judged(ordered)], key=lambda pair: pair.time):
        latest[pair.prompt, frozenset((pair.chosen, pair.rejected))] = pair
    return tuple(sorted(latest.values(), key=lambda pair: pair.time))


def own_records(home: "DeviceStore") -> "list[Record]":
    """Return the owner's pairs as records, which training and the personal part read."""
    from ..training.records import Record

    return [
        Record(pair.chosen, time=pair.time, prompt=pair.prompt, rejected=pair.rejected)
        for pair in pairs(kept(home).values())
    ]


def _shown(ordered: Sequence[Verdict]) -> Iterator[Pair]:
    """Yield the pairs that lie within one verdict."""
    for verdict in ordered:
        prompt, answer, time = verdict.prompt.strip(), verdict.answer.strip(), verdict.time
        if verdict.over is not None:
            yield Pair(prompt, answer, verdict.over.strip(), time)
        if verdict.edited is not None:
            yield Pair(prompt, verdict.edited.strip(), answer, time)


def _judged(ordered: Sequence[Verdict]) -> Iterator[Pair]:
    """Yield accepted over rejected answers to the same prompt."""
    latest: dict[str, dict[str, Verdict]] = {}
    for verdict in ordered:
        if verdict.kind != "edit":
            latest.setdefault(verdict.prompt.strip(), {})[verdict.answer.strip()] = verdict
    for prompt, judged in latest.items():
        rejected = [(v.time, answer) for answer, v in judged.items() if v.kind == "reject"]
        rejected = sorted(rejected, key=lambda each: each[0])[-SIDE_BY_SIDE:]
        for answer, verdict in judged.items():
            if verdict.kind == "accept":
                for time, other in rejected:
                    yield Pair(prompt, answer, other, max(verdict.time, time))


def _restored(number: int, content: bytes) -> Verdict:
    fields = json.loads(content)
    if fields.pop("format", None) != FORMAT:
        raise StateError(
            f"verdict {number} has another format than this privet reads ({FORMAT}): use the "
            "privet that wrote it"
        )
    return Verdict(**fields)


def _number(name: str) -> int:
    return int(name.partition("/")[2])


def _optional(fields: Mapping[str, object], name: str, where: str) -> str | None:
    value = fields.get(name)
    return None if value is None or value == "" else _text(fields, name, where)


def _text(fields: Mapping[str, object], name: str, where: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not value.strip():
        kind = "nothing" if value is None or isinstance(value, str) else type(value).__name__
        raise DataError(f'{where}: "{name}" must be a text that is not empty, found {kind}.')
    if len(value) > MAX_TEXT:
        raise DataError(
            f'{where}: "{name}" has {len(value):,} characters, and at most {MAX_TEXT:,} are kept; '
            "shorten it."
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f'{where}: "{name}" holds half a surrogate pair, not a text.') from error
    return value


def _time(fields: Mapping[str, object], where: str, now: float) -> float:
    value = fields.get("time")
    if value is None:
        return now
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f'{where}: "time" must be seconds since 1970, found {value!r:.40}.')
    try:
        time = float(value)
    except OverflowError:
        time = math.inf
    if not 0 <= time <= now:
        raise DataError(
            f'{where}: "time" must be seconds since 1970 and not in the future, found '
            f"{value!r:.40}."
        )
    return time
