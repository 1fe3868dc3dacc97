"""What a record's loss is; the same for training, heads and evaluation.

Generation: mean negative log-likelihood of the record's tokens, nats per token; those that are
given have none. Regression: squared error of the label. Classification: cross-entropy. Records
never share a computation that would couple their gradients: no batch norm, no packing, no in-batch
negatives.
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
        given: (n,) int64: the first so many tokens of each text have no loss; at least 1.
    """

    ids: Tensor
    mask: Tensor
    labels: Tensor | None
    given: Tensor


def collate(
    ids: Sequence[Sequence[int]],
    labels: Sequence[float] | None,
    given: Sequence[int] | None = None,
) -> Batch:
    """One batch; records of similar length belong together, the caller sees to that.

    Args:
        given: as `Batch`; None: every token but the first has a loss.
    """
    padded, mask = pad(ids)
    first = torch.tensor([1] * len(ids) if given is None else given)
    return Batch(padded, mask, None if labels is None else torch.tensor(labels), first)


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
    place = torch.arange(1, batch.ids.shape[1])
    wanted = batch.mask[:, 1:].bool() & (place >= batch.given[:, None])
    losses = token_losses(base, states[:, :-1][wanted], batch.ids[:, 1:][wanted])
    rows = torch.nonzero(wanted)[:, 0]
    sums = torch.zeros(len(batch.ids), dtype=losses.dtype).index_add(0, rows, losses)
    return sums / wanted.sum(1)
