"""The loss of a record, the same for training, heads and evaluation.

Generation: mean negative log-likelihood of the record's tokens, nats per token that is
learnt. Regression: squared error of the label. Classification: cross-entropy. Rows never share a
computation that would couple their gradients: no batch norm, no in-batch negatives; a row is one
record, but where `training.packed` has it hold several of one client's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from .base_model import BaseModel, final_states, pad
from .output_layer import OutputLayer, at_least_float32

__all__ = [
    "Batch",
    "SharedHead",
    "Task",
    "collate",
    "losses_everywhere",
    "pooled",
    "record_losses",
    "token_losses",
]

Task = Literal["generation", "regression", "classification"]


@dataclass(frozen=True, eq=False)
class Batch:
    """Records padded on the right.

    Attributes:
        ids, mask: (n, t) int64.
        labels: (n,), or None.
        learnt: (n, t) bool: which tokens have a loss; never the first.
        everywhere: whether every place meets the vocabulary, with a loss or without, so that the
            work does not tell how many have one.
    """

    ids: Tensor
    mask: Tensor
    labels: Tensor | None
    learnt: Tensor
    everywhere: bool = False

    def on(self, device: torch.device) -> "Batch":
        """Return the batch on the device where the model computes."""
        labels = None if self.labels is None else self.labels.to(device)
        ids, mask, learnt = (part.to(device) for part in (self.ids, self.mask, self.learnt))
        return Batch(ids, mask, labels, learnt, self.everywhere)


def collate(
    ids: Sequence[Sequence[int]],
    labels: Sequence[float] | None,
    learnt: Sequence[Sequence[int] | None] | None = None,
    tokens: int = 0,
    everywhere: bool = False,
) -> Batch:
    """Make one padded batch of records.

    The caller puts records of similar length together.

    Args:
        learnt: for each record the places that have a loss; None: all but the first.
        tokens: of each row, whatever its record has; 0: of the longest.
        everywhere: as in `Batch`.
    """
    padded, mask = pad(ids, tokens=tokens)
    wanted = mask.bool()
    for row, places in enumerate(learnt or ()):
        if places is not None:
            wanted[row] = False
            wanted[row, list(places)] = True
    wanted[:, 0] = False
    found = None if labels is None else torch.tensor(labels)
    return Batch(padded, mask, found, wanted, everywhere)


class SharedHead(nn.Linear):
    """A linear layer on one vector a record, which adds up each row alone.

    A matrix product with few columns adds up its last rows in another order, so a record's output
    would hang, by rounding, on its place in the batch; and a server can send weights under which
    nothing is left of an output but rounding.
    """

    def forward(self, vectors: Tensor) -> Tensor:
        """Return (..., outputs) of (..., w)."""
        return (vectors[..., None, :] * self.weight).sum(-1) + self.bias


def record_losses(base: BaseModel, batch: Batch, head: SharedHead | None) -> Tensor:
    """Compute the loss of each record, shape (n,).

    The gradient of one record never depends on another.
    """
    batch = batch.on(base.compute.device)
    states = final_states(base, batch.ids, batch.mask)
    if batch.labels is None:
        return _generation(base, states, batch)
    if head is None:
        raise ValueError("a labelled batch needs a head")
    return label_losses(head(pooled(base, states, batch.mask)), batch.labels)


def label_losses(outputs: Tensor, labels: Tensor) -> Tensor:
    """Compute squared errors (one output: regression) or cross-entropies (else), shape (n,)."""
    if outputs.shape[1] == 1:
        return (outputs[:, 0] - labels).square()
    return functional.cross_entropy(outputs, labels.long(), reduction="none")


_PLACES = 128  # places that have scores for all words at once


def token_losses(base: BaseModel, states: Tensor, targets: Tensor, places: int = _PLACES) -> Tensor:
    """Compute each target's negative log-likelihood, nats: states (k, w), targets (k,) -> (k,).

    `places`: how many have scores at once; each has one for every word, and a gradient. Where that
    gradient depends on the shape of its computation, all are computed so many at a time.
    """
    if states.requires_grad and torch.is_grad_enabled():
        missing = -len(states) % places if base.by_shape else 0
        padded = functional.pad(states, (0, 0, 0, missing)), functional.pad(targets, (0, missing))
        found: Tensor = _TokenLosses.apply(*padded, base.output, places)  # type: ignore[no-untyped-call]
        return found[: len(states)]
    pairs = zip(states.split(places), targets.split(places), strict=True)
    return torch.cat([_losses(base.output, *pair) for pair in pairs])


def _losses(output: OutputLayer, states: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(output.scores(states), targets, reduction="none")


class _TokenLosses(torch.autograd.Function):
    """Losses of tokens, with their gradients by the states computed along with them.

    A loss depends on its own state alone and the output layer is frozen, so the scores, by far the
    largest tensor of a step, need not be kept for the way back.
    """

    @staticmethod
    def forward(
        context: Any, states: Tensor, targets: Tensor, output: OutputLayer, places: int
    ) -> Tensor:
        losses, slopes = list[Tensor](), list[Tensor]()
        for some, wanted in zip(states.split(places), targets.split(places), strict=True):
            with torch.enable_grad():
                here = some.detach().requires_grad_()
                each = _losses(output, here, wanted)
                slopes += torch.autograd.grad(each.sum(), here)
            losses.append(each.detach())
        context.save_for_backward(torch.cat(slopes))
        return torch.cat(losses)

    @staticmethod
    def backward(context: Any, slope: Tensor) -> tuple[Tensor, None, None, None]:
        (slopes,) = context.saved_tensors
        return (slope[:, None] * slopes).to(slopes.dtype), None, None, None


def losses_everywhere(base: BaseModel, states: Tensor, targets: Tensor, wanted: Tensor) -> Tensor:
    """Compute `token_losses` of all places, with loss and gradient exactly 0 where none is wanted.

    Args:
        states: (n, t, w).
        targets, wanted: (n, t).

    An unwanted place takes part with a state of zeros, so that whatever its own is, infinite or
    none at all, reaches no other.
    """
    rows = 2 if len(wanted) % 2 == 0 else 1  # so that all pieces have one shape
    alive = torch.where(wanted[..., None], states, states.new_zeros(()))
    places = rows * wanted.shape[1]
    losses = token_losses(base, alive.flatten(0, 1), targets.flatten(), places).view(wanted.shape)
    return torch.where(wanted, losses, losses.new_zeros(()))


def pooled(base: BaseModel, states: Tensor, mask: Tensor) -> Tensor:
    """One vector of norm 1 per record, (n, w): mean of an encoder, last of a decoder."""
    states = at_least_float32(states)
    if base.kind == "encoder":
        weights = mask[:, :, None].to(states.dtype)
        vector = (states * weights).sum(1) / weights.sum(1)
    else:
        vector = states[torch.arange(len(states), device=states.device), mask.sum(1) - 1]
    return functional.normalize(vector, dim=1)


def _generation(base: BaseModel, states: Tensor, batch: Batch) -> Tensor:
    wanted = batch.learnt[:, 1:]
    if batch.everywhere:
        every = losses_everywhere(base, states[:, :-1], batch.ids[:, 1:], wanted)
        return every.sum(1) / wanted.sum(1).clamp_min(1)
    # logits only where there is a loss: padding never meets the vocabulary
    losses = token_losses(base, states[:, :-1][wanted], batch.ids[:, 1:][wanted])
    rows = torch.nonzero(wanted)[:, 0]
    sums = losses.new_zeros(len(batch.ids)).index_add(0, rows, losses)
    return sums / wanted.sum(1).clamp_min(1)
