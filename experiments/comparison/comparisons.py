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
from typing import TypedDict

import numpy as np

from ...client.assistant.retrieval import Encoder
from ...client.personal.scored_text import Asked, Row, ScoredText
from ...client.personal.text_evaluator import TextEvaluator, alone
from ...client.personal.text_head import CAUTION, MIN_RECORDS, TextHead, no_text_head
from ...client.training.records import Tokenised
from ...common.model.adapter import Vector
from ..evaluation.contexts import History

__all__ = ["CONTROLS", "ComparisonEvaluator", "OwnSide", "TextLosses", "evaluate_text", "surest"]

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
        text: evaluates text with nothing in front.
        trained: whether its shared adapter is more than the base model.
        others: adapters of other runs by name; of several the person's own records choose.
        encoder: sentence vectors for retrieval; None: words only.
        budget: tokens of earlier text in front.
        validation: fraction of the own records that chooses, the latest ones.
    """

    text: TextEvaluator
    trained: bool = True
    others: Mapping[str, Sequence[Vector]] = field(default_factory=dict, repr=False)
    encoder: Encoder | None = None
    budget: int = 96
    validation: float = 0.3

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
    def of(cls, evaluator: ComparisonEvaluator, own: Sequence[Tokenised]) -> "OwnSide":
        """Fit and choose on own records, earliest first.

        Heads and histories that choose are made without the validation records, then everything
        is made again from all own records. With fewer than `MIN_RECORDS` there is nothing to
        choose on: texts in front when there is any, else the shared model.
        """
        text = evaluator.text
        tokenizer = text.adapter.base.tokenizer
        history = History.of([one.ids for one in own], tokenizer, evaluator.encoder)
        nothing = no_text_head(text.adapter.base.width)
        if len(own) < MIN_RECORDS:
            chosen = "retrieval" if own else "global"
            return cls(history, nothing, nothing, {}, chosen, dict.fromkeys(evaluator.others, 0))
        questions = text.asked(own)
        (plain,) = text.scored(alone(questions))
        (with_texts,) = text.scored(
            [
                Row(history.context(one.query(tokenizer), evaluator.budget, before=place), one)
                for place, one in enumerate(questions)
            ]
        )
        validation = _validation(
            plain, with_texts, len(own) - max(2, round(len(own) * evaluator.validation))
        )
        return cls(
            history=history,
            head=plain.fitted(),
            hybrid=with_texts.fitted(),
            validation=validation,
            chosen=choice(validation),
            others={
                name: _best(text, questions, vectors) for name, vectors in evaluator.others.items()
            },
        )


class TextLosses(TypedDict):
    """One person's nats by model, and how many tokens and bytes are scored: one entry a record.

    `validation` has the nats of the own records that `chosen` rests on.
    """

    tokens: list[int]
    bytes: Sequence[int]
    nats: Sums
    chosen: str
    validation: Sums


def evaluate_text(
    evaluator: ComparisonEvaluator,
    own: OwnSide,
    other: OwnSide | None,
    held_out: Sequence[Tokenised],
) -> TextLosses | None:
    """One person's nats per held-out record under every model and control. None without records.

    Base model, shared model and personal head are `TextEvaluator.person`'s, as in a run's report.

    Args:
        evaluator: the same for everybody.
        own: the person's side.
        other: another person's, for the controls; None: no controls.
        held_out: in the order of time.
    """
    text = evaluator.text
    person = text.person((), held_out, fit=False)
    if person is None:
        return None
    questions = text.asked(held_out)
    mine = _fronted(evaluator, own.history, questions)
    vectors = (text.shared, text.adapter.start) if evaluator.trained else (text.shared,)
    fronted, *base_fronted = text.scored(mine, *vectors)
    nats: Sums = {}
    if evaluator.trained:
        nats |= {"base": list(person.base_nats), "prompt": base_fronted[0].sums()}
    nats |= _own_sums(evaluator, own, questions, person.text, fronted)
    chosen = evaluator.name(own.chosen)
    nats["personal"] = nats[chosen]
    if other is not None:
        (swapped,) = text.scored(_fronted(evaluator, other.history, questions))
        nats |= _control_sums(person.text, fronted, swapped, own, other)
    return {
        "tokens": person.text.counts(),
        "bytes": person.bytes,
        "nats": nats,
        "chosen": chosen,
        "validation": {evaluator.name(model): sums for model, sums in own.validation.items()},
    }


def _own_sums(
    evaluator: ComparisonEvaluator,
    own: OwnSide,
    questions: Sequence[Asked],
    plain: ScoredText,
    fronted: ScoredText,
) -> Sums:
    """Nats under the shared model, with the person's own side, and under other runs' adapters."""
    nats = {
        evaluator.name("global"): plain.sums(),
        evaluator.name("retrieval"): fronted.sums(),
        "head": plain.sums(own.head),
        "hybrid": fronted.sums(own.hybrid),
    }
    for name, adapters in evaluator.others.items():
        vector = adapters[own.others[name]]
        nats[name] = evaluator.text.scored(alone(questions), vector)[0].sums()
    return nats


def _control_sums(
    plain: ScoredText, fronted: ScoredText, swapped: ScoredText, own: OwnSide, other: OwnSide
) -> Sums:
    """Nats with the texts, the head or both of another person; `swapped` has the other's texts."""
    return {
        "retrieval_swapped": swapped.sums(),
        "head_swapped": plain.sums(other.head),
        "hybrid_swapped": swapped.sums(other.hybrid),
        "hybrid_other_profile": swapped.sums(own.hybrid),
        "hybrid_other_head": fronted.sums(other.hybrid),
    }


def _fronted(
    evaluator: ComparisonEvaluator, history: History, questions: Sequence[Asked]
) -> list[Row]:
    """Put the texts of a history that fit in front of each record."""
    tokenizer = evaluator.text.adapter.base.tokenizer
    return [Row(history.context(q.query(tokenizer), evaluator.budget), q) for q in questions]


def choice(validation: Mapping[str, Sequence[float]]) -> str:
    """Choose the model for a person by `surest`, but keep the own texts while records are few.

    With fewer than `FEW` validation records a standard error says little, nothing is sure, and a
    newcomer would lose with the fourth record what the first three brought. So texts in front,
    which stand there from the first record on, stay as long as they do better on average.
    """
    model = surest(validation)
    shared, texts = validation["global"], validation["retrieval"]
    if model == "global" and len(shared) < FEW and sum(texts) < sum(shared):
        return "retrieval"
    return model


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


def _validation(plain: ScoredText, fronted: ScoredText, cut: int) -> Sums:
    """Nats of the own records from `cut` on, under heads fitted on those before it."""
    head, hybrid = plain.where(before=cut).fitted(), fronted.where(before=cut).fitted()
    without, with_texts = plain.where(since=cut), fronted.where(since=cut)
    return {
        "global": without.sums(),
        "retrieval": with_texts.sums(),
        "head": without.sums(head),
        "hybrid": with_texts.sums(hybrid),
    }


def _best(text: TextEvaluator, questions: Sequence[Asked], vectors: Sequence[Vector]) -> int:
    """Return the index of the adapter with the lowest loss on the own records."""
    if len(vectors) == 1:
        return 0
    return int(
        np.argmin([sum(scored.sums()) for scored in text.scored(alone(questions), *vectors)])
    )
