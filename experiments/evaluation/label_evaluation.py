"""Labels side by side: base, shared head, personal head, another person's head; one person a line.

base          every prediction 0 (regression), or every class alike
global        the shared head
head          the personal head; shared where the own labels show no gain
personal      head or global, as the person's own validation records are surest of
head_swapped  another person's head; of the same group where there are groups
"""

from typing import Any, Protocol

import torch

from ...client.personal.evaluator import LabelMeasure
from ...client.personal.label_head import LabelHead, fit_label_head, label_losses, predict
from ...client.training.records import Tokenised
from ...common.model.adapter import Adapter, Vector
from ..comparison.comparisons import surest

__all__ = ["LabelRuler", "People", "measure_labels"]

FEWEST = 4


class People(Protocol):
    """Whom `measure_labels` asks; a `Study` is one."""

    def own(self, user: str) -> list[Tokenised]:
        """The latest own records."""

    def labelled_held_out(self, user: str) -> tuple[list[Tokenised], list[float]]:
        """Held-out records and how late each is."""

    def partner(self, user: str) -> str | None:
        """Whose head the control takes; None: there is nobody else."""

    @property
    def validation(self) -> float:
        """Fraction of the own records that chooses."""


class LabelRuler:
    """The shared head and the features, each text's computed once."""

    def __init__(self, adapter: Adapter, shared: Vector) -> None:
        self.measure = LabelMeasure(adapter, shared)
        self.shared, self.nothing = self.measure.shared, self.measure.nothing

    def features(self, records: list[Tokenised]) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, w) features and (n,) labels."""
        return self.measure._features(records)

    def head(self, records: list[Tokenised]) -> LabelHead:
        """The head fitted on records; shared where there are none."""
        return fit_label_head(*self.features(records), self.shared) if records else self.shared


def measure_labels(ruler: LabelRuler, people: People, user: str) -> dict[str, Any] | None:
    """One person's losses and predictions on held-out records; None where there is none.

    Returns:
        As `comparisons.measure_text`, `nats` being losses, with `predicted` and `labels`.
    """
    held_out, time = people.labelled_held_out(user)
    if not held_out:
        return None
    own = people.own(user)
    features, labels = ruler.features(held_out)
    validation = _validation(ruler, own, people.validation)
    chosen = surest(validation) if validation else "global"
    heads = {
        "base": ruler.nothing,
        "global": ruler.shared,
        "head": ruler.head(own),
    }
    if (partner := people.partner(user)) is not None:
        heads["head_swapped"] = ruler.head(people.own(partner))
    heads["personal"] = heads[chosen]
    regression = ruler.shared.task == "regression"
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
        "task": ruler.shared.task,
        "unit": "squared error" if regression else "nats per record",
        "chosen": chosen,
        "validation": validation,
    }


def _validation(ruler: LabelRuler, own: list[Tokenised], fraction: float) -> dict[str, list[float]]:
    """Losses of the latest own records under a head fitted on the earlier ones."""
    if len(own) < FEWEST:
        return {}
    cut = len(own) - max(2, round(len(own) * fraction))
    features, labels = ruler.features(own[cut:])
    return {
        "global": label_losses(ruler.shared, features, labels).tolist(),
        "head": label_losses(ruler.head(own[:cut]), features, labels).tolist(),
    }
