"""Models side by side on the same held-out records of each person: one person in, one line out.

    base            the base model                       prompt     and the person's own earlier
                                                                    texts in front (retrieval)
    global          the shared adapter                   retrieval  and the same texts in front
    head            shared adapter, personal head        hybrid     shared, texts in front, head
    personal        of global, retrieval, head and hybrid the one that the person's own validation
                    records are surest of; global where none is sure: the fall-back
    controls        another person's texts or head: retrieval_swapped, head_swapped, hybrid_swapped
                    (both), hybrid_other_profile, hybrid_other_head

Without a trained adapter `global` and `retrieval` are not there and the others stand on the base
model. Adapters of other runs (groups, preferences) are measured besides, when given.

The experimenter reads this off simulated devices; nothing of it passes a server, and no epsilon
covers it.

**Guarantee**: `OwnSide.of` sees a person's own records only. Head, weights and the choice of a
model are made there, before the held-out records are looked at; `evaluate_text` only scores.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...client.assistant.retrieval import Encoder
from ...client.personal.text_head import (
    CAUTION,
    MIN_RECORDS,
    SharedScores,
    TextHead,
    TokenStates,
    fit_text_head,
    no_text_head,
    shared_scores,
    token_losses,
)
from ...common.model.adapter import Adapter, Vector
from ..evaluation.contexts import Asked, History, Row, Scored, asked, states_of

__all__ = ["CONTROLS", "ComparisonEvaluator", "OwnSide", "evaluate_text", "summed", "surest"]

CONTROLS = (
    "retrieval_swapped",
    "head_swapped",
    "hybrid_swapped",
    "hybrid_other_profile",
    "hybrid_other_head",
)
CANDIDATES = ("retrieval", "head", "hybrid")
FEW = 4

Sums = dict[str, list[float]]


@dataclass(frozen=True, eq=False)
class ComparisonEvaluator:
    """What everybody is evaluated with: the models side by side.

    Attributes:
        adapter: overwritten.
        shared: the shared adapter, shape (d,); the start where none was trained.
        trained: whether `shared` is more than the base model.
        others: adapters of other runs by name; of several the person's own records choose.
        encoder: sentence vectors for retrieval; None: words only.
        budget: tokens of earlier text in front.
        opening: tokens given of each record.
        validation: fraction of the own records that chooses, the latest ones.
        half, with_marks: see `states_of`.
    """

    adapter: Adapter
    shared: Vector = field(repr=False)
    trained: bool = True
    others: Mapping[str, Sequence[Vector]] = field(default_factory=dict, repr=False)
    encoder: Encoder | None = None
    budget: int = 96
    opening: int = 8
    validation: float = 0.3
    half: bool = False
    with_marks: bool = False

    @property
    def output(self) -> Tensor:
        """The output embedding, (v, w)."""
        return self.adapter.base.output.detach()

    def states(self, rows: Sequence[Row], *vectors: Vector) -> list[Scored]:
        """Compute `states_of` the rows, under the shared adapter where none is named."""
        wanted = vectors or (self.shared,)
        return states_of(self.adapter, rows, wanted, self.half, self.with_marks)

    def asked(self, records: Sequence[Sequence[int]]) -> list[Asked]:
        """The records with their openings."""
        return [asked(ids, self.opening) for ids in records]

    def name(self, model: str) -> str:
        """Return what a model is called, which differs where no shared adapter was trained."""
        plain = {"global": "base", "retrieval": "prompt"}
        return model if self.trained else plain.get(model, model)


@dataclass(frozen=True, eq=False)
class OwnSide:
    """What one device makes of its own records.

    It is sensitive, so `repr` hides it.

    Attributes:
        history: what retrieval searches.
        head, hybrid: the heads fitted on own records without and with texts in front.
        validation: model -> nats of each own validation record; empty with too few records.
        chosen: the model that `personal` is.
        others: name -> the place of the adapter that the own records choose.
    """

    history: History = field(repr=False)
    head: TextHead = field(repr=False)
    hybrid: TextHead = field(repr=False)
    validation: Sums = field(repr=False)
    chosen: str
    others: dict[str, int] = field(repr=False)

    @classmethod
    def of(cls, evaluator: ComparisonEvaluator, own: Sequence[Sequence[int]]) -> "OwnSide":
        """Fit and choose on own records (token ids, earliest first).

        Heads and histories that choose are made without the validation records, then everything
        is made again from all own records. With fewer than `MIN_RECORDS` there is nothing to
        choose on: texts in front when there is any, else the shared model.
        """
        tokenizer = evaluator.adapter.base.tokenizer
        history = History.of(own, tokenizer, evaluator.encoder)
        nothing = no_text_head(evaluator.adapter.base.width)
        if len(own) < MIN_RECORDS:
            chosen = "retrieval" if own else "global"
            return cls(history, nothing, nothing, {}, chosen, dict.fromkeys(evaluator.others, 0))
        questions = evaluator.asked(own)
        queries = [one.query(tokenizer) for one in questions]
        fronted = [
            Row(history.context(query, evaluator.budget, before=place), one)
            for place, (query, one) in enumerate(zip(queries, questions, strict=True))
        ]
        alone = [Row((), one) for one in questions]
        plain, with_texts = (
            _Ready.of(evaluator.states(rows)[0], evaluator.output) for rows in (alone, fronted)
        )
        cut = len(own) - max(2, round(len(own) * evaluator.validation))
        validation = _validation(plain, with_texts, cut)
        return cls(
            history=history,
            head=plain.fitted(),
            hybrid=with_texts.fitted(),
            validation=validation,
            chosen=choice(validation),
            others={
                name: _best(evaluator, alone, found) for name, found in evaluator.others.items()
            },
        )


def evaluate_text(
    evaluator: ComparisonEvaluator,
    own: OwnSide,
    other: OwnSide | None,
    held_out: Sequence[Sequence[int]],
) -> dict[str, Any]:
    """One person's nats per held-out record under every model and control.

    Args:
        evaluator: the same for everybody.
        own: the person's side.
        other: another person's, for the controls; None: no controls.
        held_out: token ids, in the order of time; at least one with two tokens.

    Returns:
        `{"tokens": [...], "bytes": [...], "nats": {model: [...]}, "chosen", "validation"}`; a list
        has one entry a record, tokens and bytes are those that are scored.
    """
    tokenizer, output = evaluator.adapter.base.tokenizer, evaluator.output
    questions = evaluator.asked(held_out)
    queries = [one.query(tokenizer) for one in questions]
    alone = [Row((), one) for one in questions]
    mine = _fronted(own.history, queries, questions, evaluator.budget)
    start = evaluator.adapter.start
    vectors = (evaluator.shared, start) if evaluator.trained else (evaluator.shared,)
    extra = [found[own.others[name]] for name, found in evaluator.others.items()]
    plain, *more = (_Ready.of(one, output) for one in evaluator.states(alone, *vectors, *extra))
    fronted, *base_fronted = (_Ready.of(one, output) for one in evaluator.states(mine, *vectors))
    nats: Sums = {}
    if evaluator.trained:
        nats |= {"base": more.pop(0).sums(), "prompt": base_fronted[0].sums()}
    nats |= {
        evaluator.name("global"): plain.sums(),
        evaluator.name("retrieval"): fronted.sums(),
        "head": plain.sums(own.head),
        "hybrid": fronted.sums(own.hybrid),
        **{name: ready.sums() for name, ready in zip(evaluator.others, more, strict=True)},
    }
    chosen = evaluator.name(own.chosen)
    nats["personal"] = nats[chosen]
    if other is not None:
        theirs = _fronted(other.history, queries, questions, evaluator.budget)
        swapped = _Ready.of(evaluator.states(theirs)[0], output)
        nats |= {
            "retrieval_swapped": swapped.sums(),
            "head_swapped": plain.sums(other.head),
            "hybrid_swapped": swapped.sums(other.hybrid),
            "hybrid_other_profile": swapped.sums(own.hybrid),
            "hybrid_other_head": fronted.sums(other.hybrid),
        }
    return {
        "tokens": plain.counts(),
        "bytes": [len(one.scored_text(tokenizer).encode()) for one in questions],
        "nats": nats,
        "chosen": chosen,
        "validation": {evaluator.name(model): sums for model, sums in own.validation.items()},
    }


def summed(found: Scored, output: Tensor, head: TextHead | None) -> list[float]:
    """Nats of each row's scored tokens under a head."""
    return _Ready.of(found, output).sums(head)


def _fronted(
    history: History, queries: Sequence[str], questions: Sequence[Asked], budget: int
) -> list[Row]:
    return [
        Row(history.context(query, budget), one)
        for query, one in zip(queries, questions, strict=True)
    ]


def choice(validation: Mapping[str, Sequence[float]]) -> str:
    """Choose the model for a person by `surest`, but keep the own texts while records are few.

    With fewer than `FEW` validation records a standard error says little, nothing is sure, and a
    newcomer would lose with the fourth record what the first three brought. So texts in front,
    which stand there from the first record on, stay as long as they do better on average.
    """
    found = surest(validation)
    shared, texts = validation["global"], validation["retrieval"]
    if found == "global" and len(shared) < FEW and sum(texts) < sum(shared):
        return "retrieval"
    return found


def surest(validation: Mapping[str, Sequence[float]], caution: float = CAUTION) -> str:
    """Choose the model whose gain over `global` on the validation records is surest.

    Where none is sure, that is `global`.

    A model counts only if its mean gain per record is more than `caution` standard errors above
    zero; the best such lower bound wins, as in `client/personal/text_head.py`.

    Args:
        validation: model -> nats of each validation record, with `global` among them.
        caution: standard errors.
    """
    best, best_bound = "global", 0.0
    for model in CANDIDATES:
        if model not in validation:
            continue
        gains = np.subtract(validation["global"], validation[model])
        error = gains.std(ddof=1) / len(gains) ** 0.5 if len(gains) > 1 else np.inf
        bound = float(gains.mean() - caution * error)
        if bound > best_bound:
            best, best_bound = model, bound
    return best


def _validation(plain: "_Ready", fronted: "_Ready", cut: int) -> Sums:
    """Nats of the own records from `cut` on, under heads fitted on those before it."""
    head, hybrid = plain.where(before=cut).fitted(), fronted.where(before=cut).fitted()
    alone, with_texts = plain.where(since=cut), fronted.where(since=cut)
    return {
        "global": alone.sums(),
        "retrieval": with_texts.sums(),
        "head": alone.sums(head),
        "hybrid": with_texts.sums(hybrid),
    }


def _best(evaluator: ComparisonEvaluator, rows: Sequence[Row], vectors: Sequence[Vector]) -> int:
    """Return the place of the adapter with the lowest loss on the own records."""
    if len(vectors) == 1:
        return 0
    states = evaluator.states(rows, *vectors)
    losses = [sum(_Ready.of(one, evaluator.output).sums()) for one in states]
    return int(np.argmin(losses))


@dataclass(frozen=True, eq=False)
class _Ready:
    """States with the shared model's scores, computed once for every head."""

    states: TokenStates
    scored: Tensor
    scores: SharedScores
    output: Tensor
    first: int
    end: int

    @classmethod
    def of(cls, found: Scored, output: Tensor) -> "_Ready":
        """Compute the shared model's scores of states just made."""
        scores = shared_scores(found.states, output)
        end = int(found.states.record.max()) + 1
        return cls(found.states, found.scored, scores, output, 0, end)

    def where(self, since: int | None = None, before: int | None = None) -> "_Ready":
        """Return the records from `since` on, or those before `before`."""
        first = self.first if since is None else since
        end = self.end if before is None else before
        kept = (self.states.record >= first) & (self.states.record < end)
        states, scores = self.states.where(kept), self.scores.where(kept)
        return _Ready(states, self.scored[kept], scores, self.output, first, end)

    def fitted(self) -> TextHead:
        """Fit a personal head to all tokens of these records."""
        return fit_text_head(self.states, self.output, self.scores)

    def counts(self) -> list[int]:
        """Scored tokens of each record."""
        records = self.states.record[self.scored] - self.first
        return torch.bincount(records, minlength=self.end - self.first).tolist()

    def sums(self, head: TextHead | None = None) -> list[float]:
        """Sum the nats of each record's scored tokens, in order.

        A record without any has 0.
        """
        states, scores = self.states.where(self.scored), self.scores.where(self.scored)
        losses = token_losses(head, states, self.output, scores).double()
        sums = torch.zeros(self.end - self.first, dtype=torch.float64)
        return [float(value) for value in sums.index_add_(0, states.record - self.first, losses)]
