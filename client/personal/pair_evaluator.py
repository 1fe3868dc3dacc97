"""What held-out preferences say about three models: which answer would each one choose?

base, shared, personal    as `client/personal/evaluator.py`; the loss is the share of pairs in
                          which the refused answer scores higher; equal scores count half
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...common.model.adapter import Adapter, Vector
from ...common.model.base_model import final_states, pad, prefix_states, resumed_at
from ...common.model.objective import pooled
from ...common.settings.config import PreferenceSettings
from ..training.records import Tokenised
from .evaluator import Person
from .label_head import LabelHead
from .preference_head import AnswerTokens, fit_token_bias, token_margins
from .score_head import fit_score_head, widened
from .text_head import TokenStates, shared_scores

__all__ = ["PairMeasure", "pair_error"]

_ROWS = 32  # answers in memory at once


def pair_error(margin: Tensor) -> float:
    """Share of pairs in the wrong order; a margin of 0 counts half."""
    return float(((margin < 0).double() + 0.5 * (margin == 0).double()).mean())


@dataclass(frozen=True, eq=False)
class _Held:
    """A person's held-out pairs: what margins are computed from, and (n,) length differences."""

    material: Any = field(repr=False)
    longer: Tensor = field(repr=False)


class PairMeasure:
    """Preferences; with a head, states of the same answer are computed once.

    A score head sees two views of an answer: the pooled final state, and the mean of what enters
    the first block. The shared head knows the first alone.
    """

    def __init__(
        self, adapter: Adapter, shared: Vector, settings: PreferenceSettings, tokens: int = 0
    ) -> None:
        self.adapter, self.vector, self.settings = adapter, shared, settings
        self.tokens = tokens
        self.known: dict[tuple[int, ...], Tensor] = {}
        adapter.write(shared)
        head = adapter.head
        self.shared: LabelHead | None = None
        if head is not None:
            weight, bias = head.weight.detach().clone(), head.bias.detach().clone()
            self.widths = (weight.shape[1], weight.shape[1])
            self.shared = widened(LabelHead(weight, bias, "regression"), sum(self.widths))

    def person(
        self, own: Sequence[Tokenised], held_out: Sequence[Tokenised], fit: bool
    ) -> Person | None:
        """As `Measure`."""
        if not held_out:
            return None
        held, base = self._material(held_out, self.vector), 0.5  # a head of zeros: all equal
        if self.shared is None:
            start = self._material(held_out, self.adapter.start)
            base = pair_error(self._margins(start, None))
        head = self._fitted(own) if own and fit else None
        return Person(base, _Held(held, longer(held_out)), head)

    def loss(self, person: Person, head: Any) -> float:
        """As `Measure`: the share of pairs in the wrong order."""
        return pair_error(self.margins(person, head))

    def margins(self, person: Person, head: Any) -> Tensor:
        """(n,) by how much the model prefers the chosen answers of the held-out pairs."""
        return self._margins(person.held_out.material, head)

    def _fitted(self, own: Sequence[Tokenised]) -> Any:
        material = self._material(own, self.vector)
        if self.shared is not None:
            return fit_score_head(
                material, longer(own), _which(own), self.shared, self.settings, self.widths
            )
        answers, output = material[0], self.adapter.base.output.detach()
        return fit_token_bias(answers, output, self.settings)

    def _margins(self, material: Any, head: Any) -> Tensor:
        if self.shared is not None:
            used: LabelHead = head or self.shared
            found: Tensor = (material.double() @ used.weight.double().T)[:, 0]
            return found
        answers, scores = material
        return token_margins(answers, head, scores, self.adapter.base.output.detach())

    def _material(self, records: Sequence[Tokenised], vector: Vector) -> Any:
        """Differences of answers' views (n, w), or their tokens with the shared scores."""
        if self.shared is not None:
            chosen = self._views([record.ids for record in records])
            return chosen - self._views([record.rejected for record in records])
        self.adapter.write(vector)
        answers = self._answers(records)
        return answers, shared_scores(answers.tokens, self.adapter.base.output.detach())

    @torch.no_grad()
    def _views(self, rows: Sequence[tuple[int, ...]]) -> Tensor:
        base, new = self.adapter.base, sorted({*rows} - {*self.known}, key=len)
        for start in range(0, len(new), _ROWS):
            part = new[start : start + _ROWS]
            ids, mask = pad(part, tokens=self.tokens)
            last = pooled(base, final_states(base, ids, mask), mask)
            found = torch.cat([last, _mean_state(prefix_states(base, 0, ids, mask), mask)], 1)
            self.known.update(zip(part, found, strict=True))
        return torch.stack([self.known[ids] for ids in rows])

    @torch.no_grad()
    def _answers(self, records: Sequence[Tokenised]) -> AnswerTokens:
        """The answers' positions under the adapter that is loaded."""
        base, first = self.adapter.base, self.adapter.first_block
        rows = [(i, 1.0, r.ids, r.prompts[0]) for i, r in enumerate(records)]
        rows += [(i, -1.0, r.rejected, r.prompts[1]) for i, r in enumerate(records)]
        rows.sort(key=lambda row: len(row[2]))
        found: list[tuple[Tensor, ...]] = []
        for begin in range(0, len(rows), _ROWS):
            part = rows[begin : begin + _ROWS]
            ids, mask = pad([row[2] for row in part], tokens=self.tokens)
            place = torch.arange(1, ids.shape[1])[None]
            wanted = mask[:, 1:].bool() & (place >= torch.tensor([row[3] for row in part])[:, None])
            prefix = prefix_states(base, first, ids, mask)
            with resumed_at(base, first, prefix):
                states = final_states(base, ids, mask)[:, :-1][wanted]
            each = wanted.sum(1)
            sign = torch.tensor([row[1] for row in part])
            if self.settings.length_normalised:
                sign = sign / each.clamp_min(1)
            pair = torch.tensor([row[0] for row in part])
            found.append((states, ids[:, 1:][wanted], pair.repeat_interleave(each),
                          sign.repeat_interleave(each)))  # fmt: skip
        states, targets, pair, weight = (torch.cat(parts) for parts in zip(*found, strict=True))
        return AnswerTokens(TokenStates(states, targets, pair), weight, _which(records))


def _mean_state(states: Tensor, mask: Tensor) -> Tensor:
    """(n, w) mean over each row's tokens, of norm 1."""
    return functional.normalize((states * mask[:, :, None].to(states.dtype)).sum(1), dim=1)


def _which(records: Sequence[Tokenised]) -> Tensor:
    """(n, 2) a number for each answer, the same for the same ids."""
    numbers: dict[tuple[int, ...], int] = {}
    return torch.tensor(
        [[numbers.setdefault(ids, len(numbers)) for ids in (r.ids, r.rejected)] for r in records]
    )


def longer(records: Sequence[Tokenised]) -> Tensor:
    """(n,) tokens of the chosen answer less those of the rejected one."""
    return torch.tensor(
        [
            float(len(r.ids) - r.prompts[0] - len(r.rejected) + r.prompts[1])
            for r in records
        ]
    )  # fmt: skip
