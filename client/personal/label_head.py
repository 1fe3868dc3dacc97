"""The personal head for labels: a MAP estimate around the shared head, from cached features.

Prior of a person's change to the shared head, in units of the label noise, features scaled to
unit mean square length:

- the bias moves with variance `BIAS_VARIANCE`;
- the weight moves along the shared weight (a person uses more or less of the scale) with
  `SCALE_VARIANCE`, and in every direction with `WEIGHT_VARIANCE`.

Regression is ridge regression in closed form, its strength chosen by exact leave-one-out
(Allen 1974); classification is multinomial logistic regression by L-BFGS, its strength chosen by
folds. Strength 0, the shared head, is always among the choices.
"""

from dataclasses import dataclass, field
from typing import Literal, cast

import torch
from torch import Tensor

from ...common.errors import DataError
from .head import best_choice, minimise, number_of, pack, unpack, unusable

__all__ = ["LabelHead", "LabelTask", "fit_label_head", "label_losses", "predict"]

LabelTask = Literal["regression", "classification"]

# Public constants, tuned on raters of 40 batches and checked on 40 others; see experiments/LOG.md.
WEIGHT_VARIANCE = 0.3
BIAS_VARIANCE = 1.0
SCALE_VARIANCE = 60.0
STRENGTHS = (1.0, 0.1)  # times the prior's variances, preferred first; 0 is tried besides
FOLDS = 4


@dataclass(frozen=True)
class LabelHead:
    """A linear head, shared or personal.

    Attributes:
        weight: (o, w) float; o = 1 for regression, the number of classes otherwise.
        bias: (o,) float.
        task: what the outputs are.
        strength: 0 for a shared head and a personal one that fell back to it.

    Raises:
        DataError: shapes that do not fit, NaN or infinity.
    """

    weight: Tensor = field(repr=False)
    bias: Tensor = field(repr=False)
    task: LabelTask
    strength: float = 0.0

    def __post_init__(self) -> None:
        outputs = len(self.bias)
        if self.weight.ndim != 2 or self.bias.ndim != 1 or len(self.weight) != outputs:
            raise DataError(
                "A label head needs weight (o, w) and bias (o,), got "
                f"{tuple(self.weight.shape)} and {tuple(self.bias.shape)}."
            )
        if (outputs == 1) != (self.task == "regression"):
            raise DataError(
                f"A head for {self.task} has {outputs} outputs; regression needs 1, "
                "classification one per class and at least 2."
            )
        if not bool(torch.isfinite(self.weight).all() and torch.isfinite(self.bias).all()):
            raise DataError("The label head holds NaN or infinity; fit or load it again.")

    @property
    def is_shared(self) -> bool:
        """Whether this head changes nothing."""
        return self.strength == 0

    @classmethod
    def of(cls, layer: torch.nn.Linear) -> "LabelHead":
        """Return the shared head as a model's last layer is now.

        Later training does not change it.
        """
        task: LabelTask = "regression" if layer.out_features == 1 else "classification"
        return cls(layer.weight.detach().cpu().clone(), layer.bias.detach().cpu().clone(), task)

    def to_bytes(self) -> bytes:
        """Return the head as a safetensors file, for the vault."""
        facts = {"task": self.task, "strength": repr(self.strength)}
        return pack("label", {"weight": self.weight, "bias": self.bias}, facts)

    @classmethod
    def from_bytes(cls, content: bytes, name: str) -> "LabelHead":
        """Read a head that `to_bytes` wrote, as `PersonalHead.from_bytes` says."""
        tensors, facts = unpack("label", ("weight", "bias"), content, name)
        task = facts.get("task")
        if task not in ("regression", "classification"):
            raise unusable(name, f"its task is {task!r}")
        try:
            return cls(
                **tensors, task=cast(LabelTask, task), strength=number_of(facts, "strength", name)
            )
        except DataError as error:
            raise unusable(name, str(error)) from error


@torch.no_grad()
def predict(head: LabelHead, features: Tensor) -> Tensor:
    """Predict from features (n, w): (n,) labels, or (n, o) logits for classes."""
    scores = features.to(head.weight.dtype) @ head.weight.T + head.bias
    return scores[:, 0] if head.task == "regression" else scores


@torch.no_grad()
def label_losses(head: LabelHead, features: Tensor, labels: Tensor) -> Tensor:
    """Return a loss for each record, (n,), lower is better.

    Squared errors for regression, nats for classification.
    """
    scores = predict(head, features)
    if head.task == "regression":
        return (labels.to(scores.dtype) - scores).square()
    return torch.nn.functional.cross_entropy(scores, labels.long(), reduction="none")


def fit_label_head(features: Tensor, labels: Tensor, shared: LabelHead) -> LabelHead:
    """Fit one person's label head around the shared one.

    Run on the device, after the release.

    Args:
        features: (n, w) float, this person's records.
        labels: (n,) float, or class numbers below the shared head's number of outputs.
        shared: the head everybody starts from.

    Returns:
        The personal head; the shared one when the person's own held-out labels show no gain,
        which includes 0 and 1 records.

    Raises:
        DataError: shapes that do not fit, NaN or infinity, an unknown class.
    """
    _check(features, labels, shared)
    if len(labels) < 2:
        return shared
    if shared.task == "regression":
        return _fit_regression(features.double(), labels.double(), shared)
    return _fit_classes(features.double(), labels.long(), shared)


@torch.no_grad()
def _fit_regression(features: Tensor, labels: Tensor, shared: LabelHead) -> LabelHead:
    weight, bias = shared.weight.double()[0], shared.bias.double()[0]
    residual = labels - features @ weight - bias
    length, along = _length(features), torch.nn.functional.normalize(weight, dim=0)
    scaled = features / length
    tilt = scaled @ along
    kernel = WEIGHT_VARIANCE * scaled @ scaled.T + SCALE_VARIANCE * torch.outer(tilt, tilt)
    kernel = kernel + BIAS_VARIANCE

    def dual(strength: float) -> tuple[Tensor, Tensor]:
        """Return the dual weights (n,) and the exact leave-one-out residuals (n,)."""
        inverse = torch.linalg.inv(strength * kernel + torch.eye(len(labels)).double())
        alpha = inverse @ residual
        return alpha, alpha / inverse.diagonal()

    def held_out(strength: float) -> float:
        return float(dual(strength)[1].square().mean())

    strength = best_choice(STRENGTHS, held_out, float(residual.square().mean()))
    if strength == 0:
        return shared
    alpha = strength * dual(strength)[0]
    change = WEIGHT_VARIANCE * (alpha @ scaled) + SCALE_VARIANCE * (alpha @ tilt) * along
    return _head(shared, change[None] / length, BIAS_VARIANCE * alpha.sum()[None], strength)


def _fit_classes(features: Tensor, labels: Tensor, shared: LabelHead) -> LabelHead:
    folds = torch.arange(len(labels)) % min(FOLDS, len(labels))
    rows = [(folds != number, folds == number) for number in range(int(folds.max()) + 1)]

    def held_out(strength: float) -> float:
        losses = [
            label_losses(
                _logistic(features[rest], labels[rest], shared, strength),
                features[out],
                labels[out],
            )
            for rest, out in rows
        ]
        return float(torch.cat(losses).mean())

    alone = float(label_losses(shared, features, labels).mean())
    strength = best_choice(STRENGTHS, held_out, alone)
    return shared if strength == 0 else _logistic(features, labels, shared, strength)


def _logistic(features: Tensor, labels: Tensor, shared: LabelHead, strength: float) -> LabelHead:
    """Fit a MAP estimate by L-BFGS over standardised changes.

    They are of the weights, the biases, and one common scale.
    """
    outputs, width = shared.weight.shape
    length = _length(features)
    shared_weight, base = shared.weight.double(), predict(shared, features).double()
    size = length * shared_weight.norm()
    tilt_spread = (SCALE_VARIANCE * strength) ** 0.5 / size if size > 0 else size
    weight_spread = (WEIGHT_VARIANCE * strength) ** 0.5 / length
    bias_spread = (BIAS_VARIANCE * strength) ** 0.5
    change = torch.zeros(outputs * width + outputs + 1, dtype=torch.double, requires_grad=True)

    def parts() -> tuple[Tensor, Tensor]:
        """Return what is added to the weight (o, w) and the bias (o,)."""
        free = change[: outputs * width].view(outputs, width) * weight_spread
        tilt = change[-1] * tilt_spread * shared_weight
        return free + tilt, change[outputs * width : -1] * bias_spread

    def objective() -> Tensor:
        matrix, bias = parts()
        logits = base + features @ matrix.T + bias
        fit = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        return fit + change.square().sum() / 2

    minimise(objective, change, max_iter=60)
    matrix, bias = parts()
    return _head(shared, matrix.detach(), bias.detach(), strength)


def _head(shared: LabelHead, weight: Tensor, bias: Tensor, strength: float) -> LabelHead:
    """Return the shared head plus a change, in the shared head's own type."""
    kind = shared.weight.dtype
    return LabelHead(
        (shared.weight.double() + weight).to(kind),
        (shared.bias.double() + bias).to(kind),
        shared.task,
        strength,
    )


def _length(features: Tensor) -> Tensor:
    """Return the root mean square length of the rows, or 1 when all are zero."""
    length = features.square().sum(1).mean().sqrt()
    return length if length > 0 else torch.ones_like(length)


def _check(features: Tensor, labels: Tensor, shared: LabelHead) -> None:
    width = shared.weight.shape[1]
    if features.shape != (len(labels), width) or labels.ndim != 1:
        raise DataError(
            f"Features (n, {width}) and labels (n,) were expected, got {tuple(features.shape)} "
            f"and {tuple(labels.shape)}; take the features from the shared head's own model."
        )
    if not bool(torch.isfinite(features).all() and torch.isfinite(labels).all()):
        raise DataError("Features or labels hold NaN or infinity; leave such records out.")
    if shared.task == "classification" and len(labels):
        outputs = len(shared.bias)
        if not 0 <= float(labels.min()) <= float(labels.max()) < outputs:
            raise DataError(f"A label is not a class number from 0 to {outputs - 1}; check it.")
