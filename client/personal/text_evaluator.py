"""Evaluation of people who write text, in nats per token, with the head of `text_head.py`."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...common.model.adapter import Adapter, Vector
from ...common.model.base_model import final_states, pad, prefix_states, resumed_at
from ..training.records import Tokenised
from .head import PersonalHead, head_of_kind
from .text_head import (
    SharedScores,
    TextHead,
    TokenStates,
    fit_text_head,
    shared_scores,
    token_losses,
)

__all__ = ["TextEvaluator", "TextPerson"]


@dataclass(frozen=True, eq=False)
class TextPerson:
    """One person's held-out tokens under the shared model, and the head they fitted.

    Attributes:
        base: nats per token under the base model.
        head: the personal head; None where none was fitted.
        states: of the held-out tokens under the shared model.
        scores: the shared model's of them.
        output: (v, w) the model's output embedding.
    """

    base: float = field(repr=False)
    head: TextHead | None = field(repr=False)
    states: TokenStates = field(repr=False)
    scores: SharedScores = field(repr=False)
    output: Tensor = field(repr=False)

    def loss(self, head: PersonalHead | None) -> float:
        """Return the nats per held-out token with a `TextHead`.

        None is the shared model.
        """
        used = head_of_kind(TextHead, head)
        return float(token_losses(used, self.states, self.output, self.scores).mean())


class TextEvaluator:
    """Evaluates people who write text.

    The frozen prefix is computed once for base and shared model.

    Args: as `person_losses.evaluator_of`.
    """

    def __init__(
        self, adapter: Adapter, shared: Vector, kept: Vector | None = None, tokens: int = 0
    ) -> None:
        self.adapter, self.shared, self.kept, self.tokens = adapter, shared, kept, tokens
        self.output = adapter.base.output.detach()

    def person(
        self, own: Sequence[Tokenised], held_out: Sequence[Tokenised], fit: bool
    ) -> TextPerson | None:
        """Prepare one person, as `Evaluator.person` says."""
        if not held_out:
            return None
        base, shared = self._states(held_out, (self.adapter.start, self.shared))
        base_loss = token_losses(None, base, self.output, shared_scores(base, self.output)).mean()
        head = None
        if own and fit:
            (mine,) = self._states(own, (self.shared,))
            head = fit_text_head(mine, self.output)
        scores = shared_scores(shared, self.output)
        return TextPerson(float(base_loss), head, shared, scores, self.output)

    @torch.no_grad()
    def _states(self, records: Sequence[Tokenised], vectors: Sequence[Vector]) -> list[TokenStates]:
        """Return the final states of the records under each adapter."""
        base, first = self.adapter.base, self.adapter.first_block
        ids, mask = pad([record.ids for record in records], tokens=self.tokens)
        wanted = mask[:, 1:].bool()
        targets, record = ids[:, 1:][wanted], torch.nonzero(wanted)[:, 0]
        prefix = prefix_states(base, first, ids, mask)
        each = []
        for vector in vectors:
            self.adapter.write(vector, self.kept if vector is self.shared else None)
            with resumed_at(base, first, prefix):
                states = final_states(base, ids, mask)[:, :-1][wanted]
            each.append(TokenStates(states, targets, record))
        return each
