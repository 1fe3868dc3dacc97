"""A person's own records on their own device: how they are read, split, tokenised and drawn.

The native format is JSON Lines, one record a line:

    {"user": str, "text": str, "label"?: number | str, "time"?: number | str, "group"?: str}

A preference has two texts more, and no label: `text` is the answer that was preferred to
`rejected`, both to `prompt` (which may be left out).

A *population folder* holds `population.jsonl` (one block of lines per user) and
`population.json` (where each block lies, who trains, who is only tested).
`experiments/data/population.py` writes it; here one user's block is read and nothing else.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

import numpy as np

from ...common.errors import ConfigError, DataError
from ...common.settings.sections import TrainingSettings

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "CHARACTERS",
    "INDEX_FILE",
    "RECORDS_FILE",
    "RECORD_LIMIT",
    "Block",
    "Index",
    "Line",
    "Record",
    "Task",
    "Tokenised",
    "beginnings",
    "capped",
    "check_fields",
    "decode_line",
    "lessons",
    "parse_line",
    "poisson_indices",
    "rate_from",
    "read_index",
    "read_user",
    "split",
    "spread",
    "tokenize",
]

INDEX_FILE = "population.json"
RECORDS_FILE = "population.jsonl"
RECORD_LIMIT = 1_000_000
"""Bytes one record may have; a longer line is refused before it is read as a whole."""

Task = Literal["generation", "regression", "classification", "preference"]
SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Record:
    """One private example of one person.

    Text and label are masked in `repr`.

    Attributes:
        text: what the person wrote or was shown.
        label: a finite float (regression), a class name (classification), or None.
        time: a finite number or an ISO 8601 text, in which later sorts later, or None.
        rejected: of a preference: the answer that `text` was preferred to; None: no preference.
        prompt: of a preference: what both answers are to.
    """

    text: str = field(repr=False)
    label: float | str | None = field(default=None, repr=False)
    time: float | str | None = field(default=None, repr=False)
    rejected: str | None = field(default=None, repr=False)
    prompt: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class Line:
    """One checked line of the native format: a record, whose it is, and the person's group."""

    user: str
    group: str | None
    record: Record


@dataclass(frozen=True, slots=True)
class Block:
    """The place of one user's lines in `population.jsonl`: bytes from the start, bytes, group."""

    offset: int
    length: int
    group: str | None


@dataclass(frozen=True)
class Index:
    """The public side of a population folder: names, splits and places, no text.

    Attributes:
        train_users, test_users: disjoint, in the order they were drawn.
        blocks: user -> block, for both.
        sha256: of `population.jsonl`; `size`: its bytes.
    """

    name: str
    task: Task
    classes: tuple[str, ...] | None
    train_users: tuple[str, ...]
    test_users: tuple[str, ...]
    blocks: Mapping[str, Block] = field(repr=False)
    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class Tokenised:
    """One record as token ids, shape (tokens,), with its label.

    Both are masked in `repr`.

    Attributes:
        learnt: of a text: the places in `ids` that have a loss; None: all but the first.
        rejected: of a preference: the ids of prompt and refused answer; `ids` has the other.
        prompts: of a preference: how many ids of `ids` and of `rejected` are the prompt's.
        reference: of a preference: by how much the reference model prefers `ids`, in units of
            the score; None: the reference is the model as it is.
    """

    ids: tuple[int, ...] = field(repr=False)
    label: float | str | None = field(default=None, repr=False)
    learnt: tuple[int, ...] | None = field(default=None, repr=False, kw_only=True)
    rejected: tuple[int, ...] = field(default=(), repr=False)
    prompts: tuple[int, int] = field(default=(0, 0), repr=False)
    reference: float | None = field(default=None, repr=False)


def decode_line(line: bytes, where: str) -> dict[str, object]:
    """Read one line of bytes as the fields of its JSON object.

    Args:
        line: UTF-8, with or without its line end.
        where: file and line, for the error sentence.

    Raises:
        DataError: not UTF-8, not JSON, not an object, NaN or infinity written as a number.
    """
    try:
        fields = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: expected UTF-8, found byte 0x{line[error.start]:02x} at position "
            f"{error.start + 1} of the line; save the file as UTF-8."
        ) from error
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError(
            f"{where}: expected one JSON object a line, but it does not parse ({reason})."
        ) from error
    if not isinstance(fields, dict):
        raise DataError(f"{where}: expected a JSON object, found a {type(fields).__name__}.")
    return fields


def check_fields(fields: Mapping[str, object], where: str) -> Line:
    """Check the fields of a record, and return the line they make.

    Null counts as absent, and other fields are ignored.

    Raises:
        DataError: naming `where` and the field. Values are not quoted: they are private.
    """
    user = _text_of(fields, "user", where)
    if not user.strip():
        raise DataError(f'{where}: expected "user" to name somebody, but it is empty.')
    group = None if fields.get("group") is None else _text_of(fields, "group", where)
    label = _number_or_text(fields, "label", where)
    if isinstance(label, int):
        label = float(label)
    text, time = _text_of(fields, "text", where), _number_or_text(fields, "time", where)
    if fields.get("rejected") is None:
        return Line(user, group, Record(text, label, time))
    return Line(user, group, _preference(fields, text, label, time, where))


def _preference(
    fields: Mapping[str, object],
    text: str,
    label: float | str | None,
    time: float | str | None,
    where: str,
) -> Record:
    """Check the fields of a preference, and return it as a record of two answers.

    Records without `rejected` may use "prompt" freely, as one of the other fields.
    """
    rejected = _text_of(fields, "rejected", where)
    prompt = "" if fields.get("prompt") is None else _text_of(fields, "prompt", where)
    if label is not None:
        raise DataError(f'{where}: a record has "rejected" or "label", not both.')
    if not rejected.strip() or rejected.strip() == text.strip():
        raise DataError(f'{where}: expected "rejected" to be another text than "text".')
    return Record(text, None, time, rejected, prompt)


def parse_line(line: bytes, where: str) -> Line:
    """Read one line of bytes as a checked record with its user.

    `check_fields` of what `decode_line` gives.
    """
    return check_fields(decode_line(line, where), where)


def read_index(folder: Path) -> Index:
    """Read `population.json` of a population folder.

    Raises:
        DataError: missing, unreadable, or not such an index.
    """
    path = Path(folder) / INDEX_FILE
    try:
        raw = json.loads(path.read_bytes())
        if raw["schema"] != SCHEMA:
            raise ValueError(f"schema {raw['schema']!r} where {SCHEMA} was expected")
        classes = raw["classes"]
        return Index(
            name=raw["name"],
            task=raw["task"],
            classes=None if classes is None else tuple(classes),
            train_users=tuple(raw["train_users"]),
            test_users=tuple(raw["test_users"]),
            blocks={user: Block(int(b[0]), int(b[1]), b[2]) for user, b in raw["users"].items()},
            sha256=raw["sha256"],
            size=int(raw["bytes"]),
        )
    except OSError as error:
        raise DataError(
            f"Expected a population folder with {INDEX_FILE}, but {path} cannot be read "
            f"({error.strerror}); name a folder that privet wrote."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise DataError(
            f"{path} is not an index that this privet wrote ({error!r}); build it again."
        ) from error


def read_user(folder: Path, user: str, index: Index | None = None) -> tuple[Record, ...]:
    """Read one user's records, earliest first, and no byte of anybody else's.

    Args:
        folder: a population folder.
        user: whose block to read.
        index: the folder's index where the caller has it already; read otherwise.

    Raises:
        DataError: unknown user; the file is missing or has another length than the index says;
            the block is cut, or one of its lines belongs to another user.

    **Guarantee**: every record returned carries this user's name in the file.
    """
    index = read_index(folder) if index is None else index
    block = index.blocks.get(user)
    if block is None:
        raise DataError(f"{folder} has no user {user!r}; it has {len(index.blocks)} users.")
    path = Path(folder) / RECORDS_FILE
    raw = _read_block(path, block, index.size)
    records = []
    for number, line in enumerate(raw.splitlines(), start=1):
        where = f"{path}, line {number} of the block of {user!r}"
        parsed = parse_line(line, where)
        if parsed.user != user:
            raise DataError(f"{where} belongs to {parsed.user!r}; build the folder again.")
        records.append(parsed.record)
    return tuple(records)


def split(
    records: Sequence[Record], holdout: float
) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    """Cut one user's records into (own, held out), where the last ones are held out.

    Later records are what a personal model is for, so they are what it is measured on; a
    random cut would let it peek at the future. The number held out is `holdout * n` rounded to
    the nearest (halves to even), at least 1 and at most n - 1.

    Args:
        records: earliest first.
        holdout: the fraction, in [0, 1).

    Edge cases: no record or one record: nothing is held out. `holdout` 0: nothing is.

    Raises:
        ConfigError: `holdout` outside [0, 1) or NaN.
    """
    if not 0.0 <= holdout < 1.0:
        raise ConfigError(f"holdout must be at least 0 and below 1; it is {holdout!r}.")
    count = len(records)
    if holdout == 0.0 or count < 2:
        return tuple(records), ()
    own = count - min(count - 1, max(1, round(count * holdout)))
    return tuple(records[:own]), tuple(records[own:])


def spread(count: int, wanted: int) -> list[int]:
    """Choose `wanted` places of `count`, evenly spread, the first among them.

    Where there are fewer, it is all. These are the held-out records that a person is measured on.

    >>> spread(10, 4), spread(2, 5)
    ([0, 2, 5, 7], [0, 1])
    """
    wanted = min(count, wanted)
    return [count * place // wanted for place in range(wanted)]


def capped(own: Sequence[Record], records_per_client: int) -> tuple[Record, ...]:
    """Return the first `records_per_client` records, or all where there are fewer.

    The number is a public constant.

    Raises:
        ConfigError: `records_per_client` below 1.
    """
    if records_per_client < 1:
        raise ConfigError(f"records_per_client must be at least 1; it is {records_per_client}.")
    return tuple(own[:records_per_client])


def rate_from(batch_size: int, records_per_client: int) -> float:
    """Return the Poisson rate, batch_size / records_per_client, from public constants only.

    **Guarantee**: it cannot depend on how many records somebody has, because it is not told.
    (Opacus takes 1 / len(loader): 64 records with batches of 64 give rate 1, 65 give 0.5.)

    Raises:
        ConfigError: unless 1 <= batch_size <= records_per_client.
    """
    if not 1 <= batch_size <= records_per_client:
        raise ConfigError(
            f"batch_size must lie between 1 and records_per_client; they are {batch_size} and "
            f"{records_per_client}."
        )
    return batch_size / records_per_client


def poisson_indices(
    count: int, rate: float, rng: "np.random.Generator | torch.Generator"
) -> list[int]:
    """Draw a batch: each of `count` records independently with probability `rate`.

    Args:
        count: records at hand, >= 0.
        rate: public, in (0, 1]; see `rate_from`.
        rng: the training generator. Amplification by sampling needs it to be secret: seed it
            from the operating system outside tests.

    Returns:
        Ascending indices; empty now and then, and an empty batch still steps and is counted.

    Raises:
        ConfigError: `rate` outside (0, 1] or NaN.

    **Guarantee**: sizes are Binomial(count, rate) and adding a record leaves the others'
    chances as they were, which is what Poisson accounting assumes; shuffled batches of a fixed
    size do not (Chua et al. 2024).
    """
    if not 0.0 < rate <= 1.0:
        raise ConfigError(f"rate must be above 0 and at most 1; it is {rate!r}.")
    if isinstance(rng, np.random.Generator):
        draws = rng.random(count)
    else:
        import torch

        draws = torch.rand(count, generator=rng, dtype=torch.float64).numpy()
    return [int(index) for index in np.flatnonzero(draws < rate)]


CHARACTERS = 200
"""Read of a text, for each token that is kept: few tokens have more than ten, and tokenising a long
text takes 150 times its size, which ends the process of a device whose memory is bounded."""


def beginnings(texts: Iterable[str], max_tokens: int) -> list[str]:
    """Return as much of each text as may be kept of it in so many tokens."""
    return [text[: CHARACTERS * max_tokens] for text in texts]


def tokenize(
    records: Sequence[Record], tokenizer: "PreTrainedTokenizerBase", max_tokens: int, task: Task
) -> list[Tokenised]:
    """Turn records into token ids, each on its own, at most `max_tokens` each.

    Nothing is packed.

    Generation: the beginning token if the tokenizer has one, the text, the end token if it has
    one, then cut; records with fewer than 2 tokens have no loss and are skipped. Otherwise the
    tokenizer's own special tokens, which survive the cut.

    Args:
        tokenizer: a Hugging Face tokenizer.
        max_tokens: >= 2.

    Raises:
        ConfigError: `max_tokens` below 2.
    """
    if max_tokens < 2:
        raise ConfigError(f"max_tokens must be at least 2; it is {max_tokens}.")
    if not records:
        return []
    texts = beginnings((record.text for record in records), max_tokens)
    if task == "generation":
        before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        after = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        plain = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        rows = [(before + list(ids) + after)[:max_tokens] for ids in plain]
    else:
        rows = tokenizer(texts, truncation=True, max_length=max_tokens)["input_ids"]
    min_length = 2 if task == "generation" else 1
    return [
        Tokenised(tuple(ids), record.label)
        for ids, record in zip(rows, records, strict=True)
        if len(ids) >= min_length
    ]


def lessons(
    records: Sequence[Tokenised], end: int | None, training: TrainingSettings
) -> list[Tokenised]:
    """Return the rows that are learnt of tokenised texts.

    Evaluation, heads and retrieval see the texts as they are.

    Args:
        records: earliest first.
        end: the tokenizer's end token, if it has one.
        training: `ends`: whether it is learnt. `opening`: so many first tokens are not, at most
            half of a record, as models are asked in `privet evaluate`. `packed`: whole records
            stand in rows of so many tokens, each with those before it in front.

    Returns:
        Rows, which are one record each without `packed`. A row with nothing to learn is left out.
    """
    if training.ends and not training.opening and not training.packed:
        return list(records)
    rows: list[tuple[list[int], list[int]]] = []
    for record in records:
        first = max(1, min(training.opening, len(record.ids) // 2))
        learnt = [
            position
            for position in range(first, len(record.ids))
            if training.ends or record.ids[position] != end
        ]
        if not rows or len(rows[-1][0]) + len(record.ids) > training.packed:
            rows.append(([], []))
        ids, places = rows[-1]
        places += [len(ids) + position for position in learnt]
        ids += record.ids
    return [Tokenised(tuple(ids), learnt=tuple(places)) for ids, places in rows if places]


def _read_block(path: Path, block: Block, size: int) -> bytes:
    """Read a block's bytes, after the file's length was compared with the index's."""
    try:
        with path.open("rb") as handle:
            length = os.fstat(handle.fileno()).st_size
            handle.seek(block.offset)
            raw = handle.read(block.length)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}).") from error
    if length != size:
        raise DataError(
            f"{path} has {length} bytes where its index says {size}: it was cut or changed; "
            "build the folder again."
        )
    if len(raw) != block.length or not raw.endswith(b"\n"):
        raise DataError(f"{path} and its index do not fit together; build the folder again.")
    return raw


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a finite number")


def _text_of(fields: Mapping[str, object], key: str, where: str) -> str:
    """Return the field as text that UTF-8 can hold."""
    value = fields.get(key)
    if value is None:
        raise DataError(f'{where}: expected "{key}", but the record has none.')
    if not isinstance(value, str):
        raise DataError(f'{where}: "{key}" must be a text, found a {type(value).__name__}.')
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f'{where}: "{key}" holds half a surrogate pair, not a text.') from error
    return value


def _number_or_text(fields: Mapping[str, object], key: str, where: str) -> float | str | None:
    """Return the field as a finite number or a text.

    None where it is absent.
    """
    value = fields.get(key)
    if value is None:
        return None
    if isinstance(value, str):
        return _text_of(fields, key, where)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(
            f'{where}: "{key}" must be a number or a text, found a {type(value).__name__}.'
        )
    try:
        finite = math.isfinite(float(value))
    except OverflowError:
        finite = False
    if not finite:
        raise DataError(f'{where}: "{key}" must be finite, found NaN, infinity or too large.')
    return value
