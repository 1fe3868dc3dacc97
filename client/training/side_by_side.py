"""Training of many simulated devices in one batch, each with an adapter of its own.

A row of the batch is a record of one device, and goes through that device's copy of the trained
weights. The gradient of such a copy is then the record's own, as Opacus's hooks would give it;
clip, sum and noise are each device's own Opacus optimiser. The results are those of one device
after the other (`local_training.py`) up to the rounding of sums in float32, about 1e-6.

Below float32 a gradient depends on the shape of its batch, so there batches keep the public shape
that each device alone has, and the adapter is one for all rows: with one local step everybody
begins with the same. The results are then those of one device after the other to the bit.

A person's own device never comes here: it has nobody else's records.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from ...common.privacy.round_plan import Plan
from .constant_work import Shape
from .local_training import (
    Named,
    PrivateOptimizer,
    Randomness,
    Trained,
    Trainer,
    backward,
    batch_of,
    begin,
    chunked,
    clear,
    finite_delta,
    losses_of,
    optimizer_of,
    statistics_of,
    step_gradient,
    taken_gradients,
)
from .records import Tokenised

__all__ = ["Task", "can_share", "train_side_by_side"]

_ROWS, _PLACES = 64, 1024
"""Rows, and tokens, of one batch: a larger one is no faster on a processor."""


@dataclass(frozen=True, eq=False)
class Task:
    """One device's training: its records and its random numbers, both secret."""

    records: Sequence[Tokenised] = field(repr=False)
    randomness: Randomness = field(repr=False)


def can_share(trainer: Trainer, plan: Plan) -> bool:
    """Return whether devices can be trained in one batch.

    Not where a part of the adapter stays with each device, where records are pairs, where some
    layer sees other rows than records, and below float32 in several local steps.
    """
    adapter = trainer.adapter
    return (
        plan.record_clip > 0
        and trainer.pairs is None
        and (plan.local_steps == 1 or not adapter.base.by_shape)
        and not adapter.local_factor.pieces
        and not adapter.mixing
    )


def train_side_by_side(
    trainer: Trainer,
    start: NDArray[np.float32],
    tasks: Sequence[Task],
    plan: Plan,
    shape: Shape | None = None,
) -> list[Trained]:
    """Train devices that begin with the same adapter, in a round with a clip for each record.

    Args:
        trainer: the model; its adapter is overwritten.
        start: the global adapter, shape (d,), float32.
        tasks: one a device.
        plan: of the round.
        shape: of every batch, below float32.

    Returns:
        What `local_training.train` would for each task, in their order.
    """
    trained, shape = begin(trainer, start, plan, shape)
    drawn = [task.randomness.drawn(len(task.records), plan) for task in tasks]
    optimizers = [optimizer_of(trained, plan, task.randomness.noise) for task in tasks]
    vectors = torch.cat([parameter.detach().flatten() for _, parameter in trained])
    vectors = vectors.repeat(len(tasks), 1)
    deltas, first = np.zeros(vectors.shape), list[list[float]]()
    for step in range(plan.local_steps):
        batches = [
            batch_of(task.records, draws[step]) for task, draws in zip(tasks, drawn, strict=True)
        ]
        losses, gradients = _gradients(trainer, trained, vectors, batches, shape)
        first = first or losses
        for number, rows in enumerate(gradients):
            along = _noised(trained, optimizers[number], rows, shape)
            deltas[number] -= plan.learning_rate * along
            vectors[number] -= plan.learning_rate * torch.from_numpy(along).to(vectors)
    clear(trainer, trained)
    return [
        Trained(finite_delta(delta), statistics_of(np.array(seen, np.float64), plan))
        for delta, seen in zip(deltas, first, strict=True)
    ]


def _gradients(
    trainer: Trainer,
    trained: Named,
    vectors: Tensor,
    batches: Sequence[Sequence[Tokenised]],
    shape: Shape | None,
) -> tuple[list[list[float]], list[Tensor]]:
    """Return each device's losses, in the order in which it alone adds them, and its gradients.

    Gradients have the shape (records, d).
    """
    whose = [number for number, batch in enumerate(batches) for _ in batch]
    records = [record for batch in batches for record in batch]
    if shape is None:
        losses, gradients = _by_own_weights(trainer, trained, vectors, whose, records)
    else:
        losses, gradients = _by_shape(trainer, trained, records, shape)
    counts = [len(batch) for batch in batches]
    seen = [sum(chunked(part.tolist(), shape), list[float]()) for part in losses.split(counts)]
    return seen, list(gradients.split(counts))


def _by_own_weights(
    trainer: Trainer,
    trained: Named,
    vectors: Tensor,
    whose: Sequence[int],
    records: Sequence[Tokenised],
) -> tuple[Tensor, Tensor]:
    """Compute losses (n,) and gradients (n, d) of records, each with its own device's weights.

    `vectors` (devices, d) has them, `whose` says which device a record is of. A record whose
    gradient is not finite counts as none, as in `local_training.py`.
    """
    losses = vectors.new_zeros(len(records))
    gradients = vectors.new_empty(len(records), vectors.shape[1])
    order = sorted(range(len(records)), key=lambda place: len(records[place].ids))
    trainer.hooked.hooks_enabled = False
    with _own_weights(trainer, trained) as use:
        for places in _chunks(order, records):
            weights = vectors[[whose[place] for place in places]].requires_grad_()
            use(weights)
            found = losses_of(trainer, [records[place] for place in places])
            (slopes,) = torch.autograd.grad(found.sum(), weights)
            slopes[~slopes.isfinite().all(1)] = 0.0
            losses[places], gradients[places] = found.detach(), slopes
    return losses, gradients


def _by_shape(
    trainer: Trainer, trained: Named, records: list[Tokenised], shape: Shape
) -> tuple[Tensor, Tensor]:
    """Compute losses (n,) and gradients (n, d) in batches of one shape, with one adapter."""
    losses, gradients = list[float](), list[Tensor]()
    for chunk in chunked(records, records=shape.records) or [[]]:
        losses += backward(trainer, trained, chunk, shape)
        gradients.append(taken_gradients(trained, len(chunk)))
    return torch.tensor(losses), torch.cat(gradients)


def _chunks(order: Sequence[int], records: Sequence[Tokenised]) -> Iterator[list[int]]:
    """Divide places, shortest records first, into batches of bounded size."""
    chunk = list[int]()
    for place in order:
        if chunk and (len(chunk) + 1) * max(1, len(records[place].ids)) > _PLACES:
            yield chunk
            chunk = []
        chunk.append(place)
        if len(chunk) == _ROWS:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


@contextmanager
def _own_weights(trainer: Trainer, trained: Named) -> Iterator[Callable[[Tensor], None]]:
    """Have the trained layers multiply each row by weights of its own.

    Yields:
        A function that sets them: shape (rows, d), in the order of the trained parameters.
    """
    named: dict[int, Tensor] = {}
    layers = [
        layer
        for layer in trainer.adapter.trainable.modules()
        if isinstance(layer, nn.Linear) and layer.weight.requires_grad
    ]

    def use(weights: Tensor) -> None:
        pieces = weights.split([parameter.numel() for _, parameter in trained], 1)
        for (_, parameter), piece in zip(trained, pieces, strict=True):
            named[id(parameter)] = piece.view(-1, *parameter.shape)

    for layer in layers:
        layer.forward = partial(_by_row, layer, named)  # type: ignore[method-assign]
    try:
        yield use
    finally:
        for layer in layers:
            del layer.forward


def _by_row(layer: nn.Linear, named: dict[int, Tensor], given: Tensor) -> Tensor:
    """Multiply row n of (n, ..., i) by weight n of (n, o, i)."""
    rows = given.flatten(1, -2) if given.ndim > 2 else given[:, None]
    out = rows @ named[id(layer.weight)].mT
    if layer.bias is not None:
        out = out + named[id(layer.bias)][:, None]
    return out.view(*given.shape[:-1], out.shape[-1])


def _noised(
    trained: Named, optimizer: PrivateOptimizer, rows: Tensor, shape: Shape | None
) -> NDArray[np.float64]:
    """Clip the rows, sum them as one device does and add the noise: the gradient, shape (d,)."""
    sizes = [parameter.numel() for _, parameter in trained]

    def give(places: list[int]) -> None:
        dummies = 0 if shape is None else shape.rows - len(places)
        pieces = functional.pad(rows[places], (0, 0, 0, dummies)).split(sizes, 1)
        for (_, parameter), piece in zip(trained, pieces, strict=True):
            parameter.grad_sample = piece.reshape(-1, *parameter.shape)  # type: ignore[attr-defined]

    optimizer.take(chunked(list(range(len(rows))), shape) or [[]], give)
    return step_gradient(trained)
