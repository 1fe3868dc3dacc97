"""Training of many simulated devices in one batch, each with an adapter of its own.

A row of the batch is a record of one device, and goes through that device's copy of the trained
weights. The gradient of such a copy is then the record's own, as Opacus's hooks would give it;
clip, sum and noise are each device's own Opacus optimiser. The results are those of one device
after the other (`local_training.py`) up to the rounding of sums in float32, about 1e-6.

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

from ...common.privacy.round_plan import Plan
from .local_training import (
    Named,
    Randomness,
    Trained,
    Trainer,
    finite_delta,
    losses_of,
    optimizer_of,
    statistics_of,
    step_gradient,
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
    layer sees other rows than records, and below float32, where a record's gradient depends on the
    shape of its batch.
    """
    adapter = trainer.adapter
    return (
        plan.record_clip > 0
        and trainer.pairs is None
        and not adapter.base.by_shape
        and not adapter.local_factor.pieces
        and not adapter.mixing
    )


def train_side_by_side(
    trainer: Trainer, start: NDArray[np.float32], tasks: Sequence[Task], plan: Plan
) -> list[Trained]:
    """Train devices that begin with the same adapter, in a round with a clip for each record.

    Args:
        trainer: the model; its adapter is overwritten.
        start: the global adapter, shape (d,), float32.
        tasks: one a device.
        plan: of the round.

    Returns:
        What `local_training.train` would for each task, in their order.
    """
    adapter = trainer.adapter
    adapter.write(start)
    trained = adapter.train_only(plan.round)
    trainer.hooked.train()
    trainer.hooked.hooks_enabled = False
    drawn = [task.randomness.drawn(len(task.records), plan) for task in tasks]
    parameters = [parameter for _, parameter in trained]
    optimizers = [optimizer_of(parameters, plan, task.randomness.noise) for task in tasks]
    flat = torch.cat([parameter.detach().flatten() for parameter in parameters])
    vectors = flat.repeat(len(tasks), 1)
    deltas = np.zeros(vectors.shape)
    first = list[list[float]]()
    for step in range(plan.local_steps):
        batches = [
            [task.records[i] for i in draws[step]] for task, draws in zip(tasks, drawn, strict=True)
        ]
        losses, gradients = _gradients(trainer, trained, vectors, batches)
        first = first or losses
        for number, rows in enumerate(gradients):
            step_along = _noised(trained, optimizers[number], rows)
            deltas[number] -= plan.learning_rate * step_along
            vectors[number] -= plan.learning_rate * torch.from_numpy(step_along).to(vectors)
    for parameter in parameters:
        parameter.grad = parameter.grad_sample = None  # type: ignore[attr-defined]
    return [
        Trained(finite_delta(delta), statistics_of(np.array(seen, np.float64), plan))
        for delta, seen in zip(deltas, first, strict=True)
    ]


def _gradients(
    trainer: Trainer, trained: Named, vectors: Tensor, batches: Sequence[Sequence[Tokenised]]
) -> tuple[list[list[float]], list[Tensor]]:
    """Return each device's losses, by record, and gradients, shape (records, d).

    A record whose gradient is not finite counts as none, as in `local_training.py`.
    """
    whose = [number for number, batch in enumerate(batches) for _ in batch]
    records = [record for batch in batches for record in batch]
    order = sorted(range(len(records)), key=lambda place: len(records[place].ids))
    losses = torch.zeros(len(records), device=vectors.device)
    gradients = vectors.new_zeros(len(records), vectors.shape[1])
    with _own_weights(trainer, trained) as use:
        for places in _chunks(order, records):
            weights = vectors[[whose[place] for place in places]].requires_grad_()
            use(weights)
            found = losses_of(trainer, [records[place] for place in places])
            (slopes,) = torch.autograd.grad(found.sum(), weights)
            slopes[~slopes.isfinite().all(1)] = 0.0
            losses[places], gradients[places] = found.detach(), slopes
    counts = [len(batch) for batch in batches]
    return [part.tolist() for part in losses.split(counts)], list(gradients.split(counts))


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


def _noised(trained: Named, optimizer: torch.optim.Optimizer, rows: Tensor) -> NDArray[np.float64]:
    """Clip the rows, sum them and add the noise: the gradient of the step, shape (d,)."""
    optimizer.zero_grad(set_to_none=True)
    pieces = rows.split([parameter.numel() for _, parameter in trained], 1)
    for (_, parameter), piece in zip(trained, pieces, strict=True):
        parameter.grad_sample = piece.view(-1, *parameter.shape)  # type: ignore[attr-defined]
    optimizer.step()
    return step_gradient(trained)
