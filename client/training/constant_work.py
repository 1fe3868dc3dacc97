"""Constant work: what a device does in a round depends on public numbers only.

A step of training is always the same number of chunks of the same shape: what the Poisson draw
leaves empty, dummies fill, whose gradients are set to zero before they are clipped and summed. When
the answer leaves is said by `client/runtime/answer_pace.py`.

**Guarantee**: the shapes of all tensors in training, in the choice of a cluster and in the states
of what is measured, and the number of passes over the model, follow from the run's settings and the
plan; but for a batch larger than `Shape.capacity`, which comes in one step of 2^40. Reading and
tokenising the records, fitting a head on them, and single numbers that a processor takes longer
with are left to the data; the wait that follows hides them unless they outlast it.

Not covered: another program on the device, which sees the work and the wait; power and heat.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeVar

from ...common.privacy.round_plan import Plan
from ...common.settings.config import Config
from .records import Tokenised

__all__ = [
    "DUMMY",
    "Shape",
    "Work",
    "choice_of",
    "chunks_of",
    "max_drawn",
    "missing",
    "work_of",
]

_T = TypeVar("_T")

DUMMY = Tokenised((0,), 0.0, learnt=(), rejected=(0,), prompts=(1, 1))
"""A row without a loss: one token, of which nothing is learnt."""

_RARE = 2.0**-40
_STEP_ROWS, _CHOICE_ROWS, _MIN_ROWS = 16, 32, 3
_PLACES = 1024  # rows * tokens in memory at once: each has a score for every word


@dataclass(frozen=True)
class Shape:
    """The public shape of one piece of work, in chunks of rows of tokens.

    Attributes:
        chunks: how many there are, whatever was drawn.
        rows: of a chunk.
        tokens: of a row.
        spare: rows that are always dummies. No mask may be without a gap, as attention has another
            kernel for those: so there is one, or a row is longer than any record.
        constant: whether all work is the same, whatever the records are. If not, shapes are, so
            that a record's gradient is its own, but not how often they are computed.
    """

    chunks: int
    rows: int
    tokens: int
    spare: int = 1
    constant: bool = True

    @property
    def capacity(self) -> int:
        """The number of records that fit.

        More take another chunk.
        """
        return self.chunks * self.records

    @property
    def records(self) -> int:
        """The number of records in a chunk."""
        return self.rows - self.spare

    @property
    def longest(self) -> int:
        """The number of tokens of the longest record."""
        return self.tokens if self.spare else self.tokens - 1

    def of_half(self) -> "Shape":
        """Return the shape with half the records in a chunk, and room for as many altogether."""
        half = self.records // 2
        chunks = math.ceil(self.capacity / half)
        return replace(self, chunks=chunks, rows=half + self.spare)

    def made_up(self) -> list[Tokenised]:
        """Return a full chunk of the longest records, which are nobody's."""
        ids = (0,) * self.longest
        return [Tokenised(ids, 0.0, rejected=ids, prompts=(1, 1))] * self.records

    @classmethod
    def of(cls, records: int, tokens: int, max_rows: int) -> "Shape":
        """Return the shape for so many records, with few chunks of equal size."""
        records = max(1, records)
        rows = max(_MIN_ROWS, min(max_rows, _PLACES // tokens))
        chunks = math.ceil(records / (rows - 1))
        return cls(chunks, math.ceil(records / chunks) + 1, tokens)

    def dealt(self, records: Sequence[_T]) -> list[list[_T]]:
        """Divide the records evenly over the chunks.

        Some chunks may have none.
        """
        count = max(self.chunks, math.ceil(len(records) / self.records))
        return [list(records[chunk::count]) for chunk in range(count)]

    def filled(self, chunk: Sequence[Tokenised]) -> list[Tokenised]:
        """Fill a chunk with dummies behind its records."""
        return [*chunk, *[DUMMY] * (self.rows - len(chunk))]


@dataclass(frozen=True)
class Work:
    """The public shapes of all that a device does in a round.

    Attributes:
        step: one local step of training.
        choice: of a cluster, from all own training records.
        tokens: of a record that is measured.
    """

    step: Shape
    choice: Shape
    tokens: int


def work_of(config: Config, plan: Plan) -> Work | None:
    """Return the work of a device with these settings under this plan.

    None where it does what its records ask for.
    """
    choice = choice_of(config)
    if choice is None:
        return None
    records = max_drawn(config.data.records_per_client, plan.rate)
    step = Shape.of(records, choice.tokens, _STEP_ROWS)
    return Work(step, choice, config.data.max_tokens)


def chunks_of(config: Config, positions: int) -> Shape:
    """Return the shape of chunks as many as were drawn, where nobody sees how many there are.

    In bfloat16 a record's gradient depends on the shape of its batch, by more than clipping leaves
    room for; in chunks of one public shape it does not, to the bit.

    Args:
        positions: that the model has; a row of all of them has a gap only beside a dummy.
    """
    tokens = max(config.data.max_tokens, config.training.packed)
    rows = max(2, min(config.training.batch_size, _PLACES // tokens))
    if tokens < positions:
        return Shape(1, rows, tokens + 1, spare=0, constant=False)
    return Shape(1, rows + 1, tokens, constant=False)


def choice_of(config: Config) -> Shape | None:
    """Return the shape of a device's choice of its cluster.

    None where it does what its records ask for.
    """
    if not config.constant:
        return None
    row = max(config.data.max_tokens, config.training.packed)
    return Shape.of(config.data.records_per_client, row, _CHOICE_ROWS)


def missing(
    config: Config, own: Sequence[Tokenised], held_out: Sequence[Tokenised], words: int
) -> tuple[list[Tokenised], list[Tokenised]]:
    """Make up records in place of those that a person has not, one held out at least.

    Args:
        config: how many a head is fitted on, and how many are measured.
        own, held_out: what there is of them.
        words: in the vocabulary.
    """
    limits, tokens = config.evaluation, config.data.max_tokens
    measured = range(min(len(held_out), limits.records - 1), limits.records)
    return (
        [_made_up(number, tokens, words) for number in range(len(own), limits.fit_records)],
        [_made_up(number, tokens, words) for number in measured],
    )


def _made_up(number: int, tokens: int, words: int) -> Tokenised:
    """Return a record of nobody, of so many tokens."""
    ids = tuple((31 * number + 7 * position) % words for position in range(tokens))
    return Tokenised(ids, float(number % 2), rejected=ids[::-1], prompts=(1, 1))


@lru_cache(maxsize=16)
def max_drawn(count: int, rate: float) -> int:
    """Return the most records that a Poisson draw has, but for one case in 2^40 at most.

    It is the smallest k such that a draw from `count` records has more than k in at most one case
    of 2^40.
    """
    if rate >= 1:
        return count
    above = 0.0
    for size in range(count, 0, -1):
        ways = math.lgamma(count + 1) - math.lgamma(size + 1) - math.lgamma(count - size + 1)
        above += math.exp(ways + size * math.log(rate) + (count - size) * math.log1p(-rate))
        if above > _RARE:
            return size
    return 0
