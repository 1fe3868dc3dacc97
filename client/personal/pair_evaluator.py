"""Evaluation of people who prefer one answer to another, by which answer each model would choose.

The loss is the share of pairs in which the refused answer scores higher; equal scores count half.
Answers are scored by their likelihood (the head is that of `preference_head.py`), or by a shared
head over their states (that of `score_head.py`).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from ...common.model.adapter import Adapter, Vector
from ...common.model.base_model import final_states, pad, prefix_states, resumed_at
from ...common.model.objective import pooled
from ...common.model.output_layer import OutputLayer
from ...common.settings.sections import PreferenceSettings
from ..training.records import Tokenised
from .head import PersonalHead, head_of_kind
from .label_head import LabelHead
from .preference_head import AnswerTokens, fit_token_bias, token_margins
from .score_head import fit_score_head, widened
from .text_head import SharedScores, TextHead, TokenStates, shared_scores

__all__ = [
    "LikelihoodEvaluator",
    "LikelihoodPerson",
    "PairPerson",
    "ScoreEvaluator",
    "ScorePerson",
    "pair_error",
]

_ROWS = 32  # answers in memory at once


def pair_error(margin: Tensor) -> float:
    """Return the share of pairs in the wrong order.

    A margin of 0 counts half.
    """
    return float(((margin < 0).double() + 0.5 * (margin == 0).double()).mean())


@dataclass(frozen=True, eq=False)
class PairPerson(ABC):
    """One person's held-out pairs of answers, and the head they fitted.

    Attributes:
        base: share of pairs that the base model orders wrongly.
        head: the personal head; None where none was fitted.
        longer: (n,) tokens of the chosen answer less those of the rejected one.
    """

    base: float = field(repr=False)
    head: PersonalHead | None = field(repr=False)
    longer: Tensor = field(repr=False)

    @abstractmethod
    def margins(self, head: PersonalHead | None) -> Tensor:
        """Return by how much the model prefers each chosen answer to the rejected one, (n,).

        Head None is the shared model.
        """

    def loss(self, head: PersonalHead | None) -> float:
        """Return the share of the held-out pairs in the wrong order.

        Head None is the shared model.
        """
        return pair_error(self.margins(head))


@dataclass(frozen=True, eq=False)
class LikelihoodPerson(PairPerson):
    """A person whose answers are scored by their likelihood.

    Attributes:
        answers: the held-out ones' tokens under the shared model.
        scores: the shared model's of them.
        output: the model's.
    """

    head: TextHead | None = field(repr=False)
    answers: AnswerTokens = field(repr=False)
    scores: SharedScores = field(repr=False)
    output: OutputLayer = field(repr=False)

    def margins(self, head: PersonalHead | None) -> Tensor:
        """Return the margins of the pairs in nats, as `PairPerson.margins` says.

        The head is a `TextHead`.
        """
        used = head_of_kind(TextHead, head)
        return token_margins(self.answers, used, self.scores, self.output)


@dataclass(frozen=True, eq=False)
class ScorePerson(PairPerson):
    """A person whose answers are scored by a head.

    Attributes:
        differences: (n, w) views of the chosen held-out answers less those of the rejected ones.
        shared: the head everybody starts from.
    """

    head: LabelHead | None = field(repr=False)
    differences: Tensor = field(repr=False)
    shared: LabelHead = field(repr=False)

    def margins(self, head: PersonalHead | None) -> Tensor:
        """Return the margins of the pairs in the head's own unit, as `PairPerson.margins` says.

        The head is a `LabelHead`.
        """
        used = head_of_kind(LabelHead, head) or self.shared
        margins: Tensor = (self.differences.double() @ used.weight.double().T)[:, 0]
        return margins


class LikelihoodEvaluator:
    """Evaluates people whose answers are scored by their log likelihood.

    Args: as `person_losses.evaluator_of`, whose `pairs` are `settings`.
    """

    def __init__(
        self, adapter: Adapter, shared: Vector, settings: PreferenceSettings, tokens: int = 0
    ) -> None:
        self.adapter, self.shared, self.settings = adapter, shared, settings
        self.tokens, self.output = tokens, adapter.base.output

    def person(
        self, own: Sequence[Tokenised], held_out: Sequence[Tokenised], fit: bool
    ) -> LikelihoodPerson | None:
        """Prepare one person, as `Evaluator.person` says."""
        if not held_out:
            return None
        answers, scores = self._scored(held_out, self.shared)
        start, start_scores = self._scored(held_out, self.adapter.start)
        base = pair_error(token_margins(start, None, start_scores, self.output))
        head = None
        if own and fit:
            head = fit_token_bias(self._answers(own, self.shared), self.output, self.settings)
        return LikelihoodPerson(base, head, _longer(held_out), answers, scores, self.output)

    def _scored(
        self, records: Sequence[Tokenised], vector: Vector
    ) -> tuple[AnswerTokens, SharedScores]:
        """Return the answers' tokens under an adapter, and the model's scores of them."""
        answers = self._answers(records, vector)
        return answers, shared_scores(answers.tokens, self.output)

    @torch.no_grad()
    def _answers(self, records: Sequence[Tokenised], vector: Vector) -> AnswerTokens:
        """Return the answers' positions under an adapter."""
        self.adapter.write(vector)
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
                states = final_states(base, ids, mask).float().cpu()[:, :-1][wanted]
            each = wanted.sum(1)
            sign = torch.tensor([row[1] for row in part])
            if self.settings.length_normalised:
                sign = sign / each.clamp_min(1)
            pair = torch.tensor([row[0] for row in part])
            found.append((states, ids[:, 1:][wanted], pair.repeat_interleave(each),
                          sign.repeat_interleave(each)))  # fmt: skip
        states, targets, pair, weight = (torch.cat(parts) for parts in zip(*found, strict=True))
        return AnswerTokens(TokenStates(states, targets, pair), weight, _numbered(records))


class ScoreEvaluator:
    """Evaluates people whose answers are scored by a head.

    States of the same answer are computed once.

    The head sees two views of an answer: the pooled final state, and the mean of what enters the
    first block. The shared head knows the first alone.

    Args: as `person_losses.evaluator_of`, whose `pairs` are `settings`.
    """

    def __init__(
        self, adapter: Adapter, shared: Vector, settings: PreferenceSettings, tokens: int = 0
    ) -> None:
        self.adapter, self.settings, self.tokens = adapter, settings, tokens
        adapter.write(shared)
        if adapter.head is None:
            raise ValueError("answers are to be scored by a head, and there is none")
        one_view = LabelHead.of(adapter.head)
        self.widths = (one_view.weight.shape[1],) * 2
        self.shared = widened(one_view, sum(self.widths))
        self._known: dict[tuple[int, ...], Tensor] = {}

    def person(
        self, own: Sequence[Tokenised], held_out: Sequence[Tokenised], fit: bool
    ) -> ScorePerson | None:
        """Prepare one person, as `Evaluator.person` says.

        Under the base model all answers are equal.
        """
        if not held_out:
            return None
        differences, head = self._differences(held_out), None
        if own and fit:
            head = fit_score_head(
                self._differences(own),
                _longer(own),
                _numbered(own),
                self.shared,
                self.settings,
                self.widths,
            )
        return ScorePerson(0.5, head, _longer(held_out), differences, self.shared)

    def _differences(self, records: Sequence[Tokenised]) -> Tensor:
        """Return the views of the chosen answers less those of the rejected ones, (n, w)."""
        chosen = self._views([record.ids for record in records])
        return chosen - self._views([record.rejected for record in records])

    @torch.no_grad()
    def _views(self, rows: Sequence[tuple[int, ...]]) -> Tensor:
        base, new = self.adapter.base, sorted({*rows} - {*self._known}, key=len)
        for start in range(0, len(new), _ROWS):
            part = new[start : start + _ROWS]
            ids, mask = pad(part, tokens=self.tokens)
            last = pooled(base, final_states(base, ids, mask).cpu(), mask)
            first = prefix_states(base, 0, ids, mask).float().cpu()
            views = torch.cat([last, _mean_state(first, mask)], 1)
            self._known.update(zip(part, views, strict=True))
        return torch.stack([self._known[ids] for ids in rows])


def _mean_state(states: Tensor, mask: Tensor) -> Tensor:
    """Return the mean state over each row's tokens, scaled to norm 1, (n, w)."""
    return functional.normalize((states * mask[:, :, None].to(states.dtype)).sum(1), dim=1)


def _numbered(records: Sequence[Tokenised]) -> Tensor:
    """Number the answers, (n, 2), with the same number for the same ids."""
    numbers: dict[tuple[int, ...], int] = {}
    return torch.tensor(
        [[numbers.setdefault(ids, len(numbers)) for ids in (r.ids, r.rejected)] for r in records]
    )


def _longer(records: Sequence[Tokenised]) -> Tensor:
    """Return the tokens of each chosen answer less those of the rejected one, (n,)."""
    return torch.tensor(
        [
            float(len(r.ids) - r.prompts[0] - len(r.rejected) + r.prompts[1])
            for r in records
        ]
    )  # fmt: skip
