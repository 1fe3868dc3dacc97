"""Evaluation of people who write text, in nats per scored token, with the head of `text_head.py`.

What is scored is in `scored_text.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ...common.model.adapter import Adapter, Vector
from ..training.records import Tokenised
from .head import PersonalHead, head_of_kind
from .scored_text import OPENING, Asked, Row, ScoredText, asked, scored_texts
from .text_head import TextHead

__all__ = ["TextEvaluator", "TextPerson", "alone"]


@dataclass(frozen=True, eq=False)
class TextPerson:
    """One person's held-out text under the shared model, and the head they fitted.

    Attributes:
        base_nats: of each record under the base model.
        head: the personal head; None where none was fitted.
        text: the held-out records under the shared model.
        bytes: of each record's scored text.
    """

    base_nats: Sequence[float] = field(repr=False)
    head: TextHead | None = field(repr=False)
    text: ScoredText = field(repr=False)
    bytes: Sequence[int] = field(repr=False)

    @property
    def base(self) -> float:
        """The nats per scored token under the base model."""
        return sum(self.base_nats) / sum(self.text.counts())

    def loss(self, head: PersonalHead | None) -> float:
        """Return the nats per scored token with a `TextHead`.

        None is the shared model.
        """
        return self.text.loss(head_of_kind(TextHead, head))


@dataclass(frozen=True, eq=False)
class TextEvaluator:
    """Evaluates people who write text.

    The frozen prefix is computed once for base and shared model.

    Attributes:
        adapter, shared, kept, tokens: as `person_losses.evaluator_of`.
        opening: tokens given of each record.
    """

    adapter: Adapter
    shared: Vector = field(repr=False)
    kept: Vector | None = field(default=None, repr=False)
    tokens: int = 0
    opening: int = OPENING

    def person(
        self, own: Sequence[Tokenised], held_out: Sequence[Tokenised], fit: bool
    ) -> TextPerson | None:
        """Prepare one person, as `Evaluator.person` says.

        None also where nothing of what is held out is scored.
        """
        if not held_out:
            return None
        questions = self.asked(held_out)
        shared, base = self.scored(alone(questions), self.shared, self.adapter.start)
        head = None
        if own and fit:
            head = self.scored(alone(self.asked(own)))[0].fitted()
        if not sum(shared.counts()):
            return None
        tokenizer = self.adapter.base.tokenizer
        sizes = [len(one.scored_text(tokenizer).encode()) for one in questions]
        return TextPerson(base.sums(), head, shared, sizes)

    def asked(self, records: Sequence[Tokenised]) -> list[Asked]:
        """Return the records with their openings."""
        return [asked(record.ids, self.opening) for record in records]

    def scored(self, rows: Sequence[Row], *vectors: Vector) -> list[ScoredText]:
        """Score the rows under each adapter, or under the shared one where none is named."""
        wanted = [
            (one, self.kept if one is self.shared else None) for one in vectors or (self.shared,)
        ]
        return scored_texts(self.adapter, rows, wanted, tokens=self.tokens)


def alone(questions: Sequence[Asked]) -> list[Row]:
    """Return records with nothing in front of them."""
    return [Row((), one) for one in questions]
