"""Labels under base, shared, personal and another person's head, one line a person.

base          every prediction 0 (regression), or every class alike
global        the shared head
head          the personal head; shared where the own labels show no gain
personal      head or global, as the person's own validation records are surest of
head_swapped  another person's head; of the same group where there are groups
"""

from typing import TYPE_CHECKING, TypedDict

from ...client.personal.label_evaluator import LabelEvaluator
from ...client.personal.label_head import LabelHead, fit_label_head, label_losses, predict
from ...client.training.records import Tokenised
from ..comparison.comparisons import surest
from .people import unit_of

if TYPE_CHECKING:
    from ..comparison.study import Study

__all__ = ["LabelLosses", "evaluate_labels"]

FEWEST = 4


class LabelLosses(TypedDict):
    """One person's losses (`nats`) and predictions by model: one entry a record.

    `validation` has the losses of the own records that `chosen` rests on.
    """

    nats: dict[str, list[float]]
    predicted: dict[str, list[float]]
    labels: list[float]
    task: str
    unit: str
    chosen: str
    validation: dict[str, list[float]]


def evaluate_labels(evaluator: LabelEvaluator, study: "Study", user: str) -> LabelLosses | None:
    """Compute one person's losses and predictions on held-out records. None where there is none.

    Base, shared and personal head are `LabelEvaluator.person`'s, as in a run's report.
    """
    own = study.own(user)
    person = evaluator.person(own, study.held_out(user), fit=True)
    if person is None:
        return None
    validation = _validation(evaluator, own, study.scenario.people.validation)
    chosen = surest(validation) if validation else "global"
    shared = evaluator.shared
    heads = {"base": evaluator.nothing, "global": shared, "head": person.head or shared}
    if (partner := study.partner(user)) is not None:
        heads["head_swapped"] = _head(evaluator, study.own(partner))
    heads["personal"] = heads[chosen]
    predicted = {name: predict(head, person.features) for name, head in heads.items()}
    regression = shared.task == "regression"
    return {
        "nats": {name: person.losses(head).tolist() for name, head in heads.items()},
        "predicted": {
            name: (outputs if regression else outputs.argmax(1)).tolist()
            for name, outputs in predicted.items()
        },
        "labels": person.labels.tolist(),
        "task": shared.task,
        "unit": unit_of(study.bench.config),
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
