"""Labels under base, shared, personal and another person's head, one line a person.

base          every prediction 0 (regression), or every class alike
global        the shared head
head          the personal head; shared where the own labels show no gain
personal      head or global, as the person's own validation records are surest of
head_swapped  another person's head; of the same group where there are groups
"""

from typing import Any, Protocol

from ...client.personal.label_evaluator import LabelEvaluator
from ...client.personal.label_head import LabelHead, fit_label_head, label_losses, predict
from ...client.training.records import Tokenised
from ..comparison.comparisons import surest

__all__ = ["People", "evaluate_labels"]

FEWEST = 4


class People(Protocol):
    """The people and records that `evaluate_labels` needs.

    A `Study` is one.
    """

    def own(self, user: str) -> list[Tokenised]:
        """Return a person's latest own records."""

    def labelled_held_out(self, user: str) -> tuple[list[Tokenised], list[float]]:
        """Return a person's held-out records, and how late each is."""

    def partner(self, user: str) -> str | None:
        """Return whose head the control takes. None: there is nobody else."""

    @property
    def validation(self) -> float:
        """Fraction of the own records on which a model is chosen."""


def evaluate_labels(evaluator: LabelEvaluator, people: People, user: str) -> dict[str, Any] | None:
    """Compute one person's losses and predictions on held-out records. None where there is none.

    Returns:
        As `comparisons.evaluate_text`, `nats` being losses, with `predicted` and `labels`.
    """
    held_out, time = people.labelled_held_out(user)
    if not held_out:
        return None
    own = people.own(user)
    features, labels = evaluator.features(held_out)
    validation = _validation(evaluator, own, people.validation)
    chosen = surest(validation) if validation else "global"
    heads = {
        "base": evaluator.nothing,
        "global": evaluator.shared,
        "head": _head(evaluator, own),
    }
    if (partner := people.partner(user)) is not None:
        heads["head_swapped"] = _head(evaluator, people.own(partner))
    heads["personal"] = heads[chosen]
    regression = evaluator.shared.task == "regression"
    said = {name: predict(head, features) for name, head in heads.items()}
    return {
        "time": time,
        "own": len(own),
        "all_own": len(own),
        "nats": {
            name: label_losses(head, features, labels).tolist() for name, head in heads.items()
        },
        "predicted": {
            name: (one if regression else one.argmax(1)).tolist() for name, one in said.items()
        },
        "labels": labels.tolist(),
        "task": evaluator.shared.task,
        "unit": "squared error" if regression else "nats per record",
        "chosen": chosen,
        "validation": validation,
    }


def _head(evaluator: LabelEvaluator, records: list[Tokenised]) -> LabelHead:
    """Fit a head on records. Without records it is the shared one."""
    shared = evaluator.shared
    return fit_label_head(*evaluator.features(records), shared) if records else shared


def _validation(
    evaluator: LabelEvaluator, own: list[Tokenised], fraction: float
) -> dict[str, list[float]]:
    """Compute losses of the latest own records under a head fitted on the earlier ones."""
    if len(own) < FEWEST:
        return {}
    cut = len(own) - max(2, round(len(own) * fraction))
    features, labels = evaluator.features(own[cut:])
    return {
        "global": label_losses(evaluator.shared, features, labels).tolist(),
        "head": label_losses(_head(evaluator, own[:cut]), features, labels).tolist(),
    }
