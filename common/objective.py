"""What a record's loss is; the same for training, heads and evaluation.

Generation: mean negative log-likelihood of the record's tokens, nats per token that is
learnt. Regression: squared error of the label. Classification: cross-entropy. Rows never share a
computation that would couple their gradients: no batch norm, no in-batch negatives; a row is one
record, but where `training.packed` has it hold several of one client's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from .models import BaseModel, final_states, pad

__all__ = ["Batch", "Task", "collate", "pooled", "record_losses", "token_losses"]

Task = Literal["generation", "regression", "classification"]


@dataclass(frozen=True, eq=False)
class Batch:
    """Records padded on the right.

    Attributes:
        ids, mask: (n, t) int64.
        labels: (n,), or None.
        learnt: (n, t) bool: which tokens have a loss; never the first.
    """

    ids: Tensor
    mask: Tensor
    labels: Tensor | None
    learnt: Tensor


def collate(
    ids: Sequence[Sequence[int]],
    labels: Sequence[float] | None,
    learnt: Sequence[Sequence[int] | None] | None = None,
) -> Batch:
    """One batch; records of similar length belong together, the caller sees to that.

    Args:
        learnt: for each record the places that have a loss; None: all but the first.
    """
    padded, mask = pad(ids)
    wanted = mask.bool()
    for row, places in enumerate(learnt or ()):
        if places is not None:
            wanted[row] = False
            wanted[row, list(places)] = True
    wanted[:, 0] = False
    return Batch(padded, mask, None if labels is None else torch.tensor(labels), wanted)


def record_losses(base: BaseModel, batch: Batch, head: nn.Linear | None) -> Tensor:
    """Loss of each record, shape (n,); the gradient of one never depends on another."""
    states = final_states(base, batch.ids, batch.mask)
    if batch.labels is None:
        return _generation(base, states, batch)
    if head is None:
        raise ValueError("a labelled batch needs a head")
    return label_losses(head(pooled(base, states, batch.mask)), batch.labels)


def label_losses(outputs: Tensor, labels: Tensor) -> Tensor:
    """Squared error for one output (regression), else cross-entropy; shape (n,)."""
    if outputs.shape[1] == 1:
        return (outputs[:, 0] - labels).square()
    return functional.cross_entropy(outputs, labels.long(), reduction="none")


def token_losses(base: BaseModel, states: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target, nats; states (k, w), targets (k,) -> (k,)."""
    return functional.cross_entropy(states @ base.output.T, targets, reduction="none")


def pooled(base: BaseModel, states: Tensor, mask: Tensor) -> Tensor:
    """One vector of norm 1 per record, shape (n, w): mean of an encoder, last of a decoder."""
    if base.kind == "encoder":
        weights = mask[:, :, None].to(states.dtype)
        vector = (states * weights).sum(1) / weights.sum(1)
    else:
        vector = states[torch.arange(len(states)), mask.sum(1) - 1]
    return functional.normalize(vector, dim=1)


def _generation(base: BaseModel, states: Tensor, batch: Batch) -> Tensor:
    # logits only where there is a loss: padding never meets the vocabulary
    wanted = batch.learnt[:, 1:]
    losses = token_losses(base, states[:, :-1][wanted], batch.ids[:, 1:][wanted])
    rows = torch.nonzero(wanted)[:, 0]
    sums = torch.zeros(len(batch.ids), dtype=losses.dtype).index_add(0, rows, losses)
    return sums / wanted.sum(1)
