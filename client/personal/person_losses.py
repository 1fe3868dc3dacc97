"""One person's losses on held-out records under three models: base, shared, personal.

`evaluator_of` is the one place that says which kind of head fits a task.

**Guarantee**: as `client/personal/evaluator.py`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ...common.errors import DataError
from ...common.model.adapter import Adapter, Vector
from ...common.privacy.statistics_blocks import ENTRIES
from ...common.settings.sections import PreferenceSettings
from ..training.records import Tokenised
from .evaluator import Evaluator

__all__ = ["Losses", "evaluate_person", "evaluator_of", "gains_block"]


@dataclass(frozen=True)
class Losses:
    """One person's mean losses on their held-out records.

    They are sensitive, so `repr` hides them.
    """

    base: float = field(repr=False)
    shared: float = field(repr=False)
    personal: float = field(repr=False)


def evaluator_of(
    adapter: Adapter,
    shared: Vector,
    kept: Vector | None = None,
    pairs: PreferenceSettings | None = None,
    tokens: int = 0,
) -> Evaluator:
    """Return the evaluator that fits the adapter's task, and with it the kind of personal head.

    Args:
        adapter: overwritten, again and again.
        shared: the shared adapter's weights, shape (d,), float32.
        kept: what one device keeps of the adapter (fedsa's B); the evaluator is then for its owner.
        pairs: how answers are scored, where records are pairs of them.
        tokens: that every record passes the model with, whatever it has; 0: with its own.
    """
    if pairs is not None:
        from .pair_evaluator import LikelihoodEvaluator, ScoreEvaluator

        by_pairs = LikelihoodEvaluator if adapter.head is None else ScoreEvaluator
        return by_pairs(adapter, shared, pairs, tokens)
    if adapter.head is not None:
        from .label_evaluator import LabelEvaluator

        return LabelEvaluator(adapter, shared, kept, tokens)
    from .text_evaluator import TextEvaluator

    return TextEvaluator(adapter, shared, kept, tokens)


def evaluate_person(
    evaluator: Callable[[], Evaluator],
    own: Sequence[Tokenised],
    held_out: Sequence[Tokenised],
    fit: bool,
) -> Losses | None:
    """Return one person's losses under the three models.

    Run by the client, after its delta is made.

    Args:
        evaluator: makes a new one, which remembers nothing of other records.
        own: records the head is fitted on.
        held_out: records the losses are of.
        fit: whether there is a personal head; otherwise personal is shared.

    Returns:
        None where nothing is held out, or a loss is not finite: a contribution must not depend on
        that, so such a device takes part as one that has measured nothing.
    """
    try:
        person = evaluator().person(own, held_out, fit)
        if person is None:
            return None
        losses = Losses(person.base, person.loss(None), person.loss(person.head))
    except DataError:  # states that are not finite
        return None
    finite = map(math.isfinite, (losses.base, losses.shared, losses.personal))
    return losses if all(finite) else None


def gains_block(losses: Losses | None, bound: float) -> NDArray[np.float64]:
    """Return the block of gains: what adapter and head gain, and a 1 that counts the person.

    (base - shared, shared - personal, 1), gains in [-1, 1] of the bound. All zeros where the losses
    are None.
    """
    if losses is None:
        return np.zeros(ENTRIES["gains"])
    gains = np.array([losses.base - losses.shared, losses.shared - losses.personal])
    return np.append(np.clip(gains / bound, -1.0, 1.0), 1.0)
