"""Whether a device computes what privacy rests on.

    against a loop      each record's gradient in a batch, and by autograd on that record alone in
                        float32 on the CPU, with the same weights
    against one alone   the same device, dtype and public shape, without Opacus
    neighbours          50 batches of one public shape, the record at each place: to the bit
    bytes of the gate   of a delta that was on the device, and of the same that never was

A check that fails is a figure of the report, not an exception: the others are wanted as well.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from ....client.privacy.gate import release
from ....client.training.constant_work import Shape
from ....client.training.local_training import Trainer
from ....client.training.records import Tokenised
from ....common.errors import PrivetError
from ....common.model.adapter import Adapter
from ....common.model.base_model import final_states, pad
from ....common.model.exchange_layout import Vector
from ....common.model.objective import collate, record_losses
from ....common.privacy.noise import TestSource
from .workload import Work

__all__ = ["Check", "checks", "loop_over_records", "states_apart"]

BATCHES = 50
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
ROUNDED = {torch.float32: 1e-5, torch.bfloat16: 5e-2}
"""How far a gradient may be from the float32 loop's. In bfloat16 it is the model that rounds, block
after block: with random weights in the shape of SmolLM2-135M, 30 blocks, 1.7e-2 on a processor."""


@dataclass(frozen=True)
class Check:
    """One thing that was tried.

    Attributes:
        name: what must be small.
        figure: how large it was; None: it could not be tried, and `why` says why.
        allowed: how large it may be.
    """

    name: str
    figure: float | None
    allowed: float
    why: str = ""

    @property
    def passed(self) -> bool:
        """Whether the figure is there and small enough; NaN is not."""
        return self.figure is not None and self.figure <= self.allowed

    def as_dict(self) -> dict[str, object]:
        """The check for the report."""
        return {**asdict(self), "passed": self.passed}


def loop_over_records(adapter: Adapter, records: Sequence[Tokenised]) -> Tensor:
    """Compute each record's gradient alone, by autograd and without padding, (n, d) on the CPU."""
    trained = [parameter for _, parameter in adapter.train_only(1)]
    rows = []
    for record in records:
        loss = record_losses(adapter.base, collate([record.ids], None), None).sum()
        rows.append(torch.cat([one.ravel() for one in torch.autograd.grad(loss, trained)]).cpu())
    return torch.stack(rows)


def checks(trainer: Trainer, expected: Tensor, work: Work, shape: Shape) -> list[Check]:
    """Try everything on one device and in one dtype.

    Args:
        trainer: with the adapter, which is overwritten.
        expected: the gradients of `work.records` by `loop_over_records`, (n, d).
        work: records, start and settings.
        shape: public, of as many rows as there are records.
    """
    dtype = trainer.adapter.base.compute.dtype
    tried: dict[str, tuple[float, Callable[[], float]]] = {
        "gradients against a float32 loop on the CPU": (
            ROUNDED[dtype],
            lambda: _farthest(_gradients(trainer, work.records, shape), expected),
        ),
        "gradients against the record alone in the same shape": (
            ALLOWED[dtype],
            lambda: _farthest(
                _gradients(trainer, work.records, shape), _alone(trainer, work.records, shape)
            ),
        ),
        f"a record's gradient in {BATCHES} batches, at each place": (
            0.0,
            lambda: max(_by_neighbours(trainer, work, shape)),
        ),
        "bytes of the gate that differ": (0.0, lambda: _other_bytes(trainer.adapter, work)),
    }
    trainer.adapter.write(work.start)
    return [_tried(name, *each) for name, each in tried.items()]


def states_apart(one: Adapter, other: Adapter) -> Check:
    """Check that a model that went through a folder has the states of the one built here."""
    ids, mask = pad([[1, 2, 3, 4, 5], [6, 7]])
    with torch.no_grad():
        states = [final_states(each.base, ids, mask) for each in (one, other)]
    gap = float((states[0] - states[1]).abs().max())
    return Check("states of the model after it was written and loaded", gap, 0.0)


def _tried(name: str, allowed: float, measure: Callable[[], float]) -> Check:
    try:
        return Check(name, measure(), allowed)
    except (PrivetError, RuntimeError) as error:  # memory, and kernels that are not there
        return Check(name, None, allowed, " ".join(str(error).split())[:300])


def _gradients(trainer: Trainer, records: Sequence[Tokenised], shape: Shape) -> Tensor:
    """Compute each record's gradient in one batch of the public shape, (n, d) on the CPU."""
    trained = trainer.adapter.train_only(1)
    trainer.hooked.train()
    trainer.hooked.hooks_enabled = True
    _losses(trainer.adapter, records, shape).sum().backward()
    rows: list[Tensor] = [parameter.grad_sample for _, parameter in trained]  # type: ignore[attr-defined]
    found = torch.cat([row[: len(records)].flatten(1) for row in rows], 1).cpu()
    for _, parameter in trained:
        parameter.grad = parameter.grad_sample = None  # type: ignore[attr-defined]
    return found


def _alone(trainer: Trainer, records: Sequence[Tokenised], shape: Shape) -> Tensor:
    """Compute each record's gradient in a batch without others, by autograd, (n, d)."""
    trained = [parameter for _, parameter in trainer.adapter.train_only(1)]
    trainer.hooked.hooks_enabled = False
    rows = []
    for record in records:
        loss = _losses(trainer.adapter, [record], shape)[0]
        rows.append(torch.cat([one.ravel() for one in torch.autograd.grad(loss, trained)]).cpu())
    return torch.stack(rows)


def _losses(adapter: Adapter, records: Sequence[Tokenised], shape: Shape) -> Tensor:
    rows = shape.filled(records)
    learnt = [row.learnt for row in rows]
    batch = collate([row.ids for row in rows], None, learnt, shape.tokens)
    return record_losses(adapter.base, batch, None)


def _by_neighbours(trainer: Trainer, work: Work, shape: Shape) -> Iterator[float]:
    """Yield how far a record's gradient moves in other company and at another place."""
    record, others = work.records[0], work.strangers(BATCHES * shape.rows)
    wanted = _gradients(trainer, [record], shape)[0]
    for number in range(BATCHES):
        company = others[number * shape.rows : (number + 1) * shape.rows]
        place = number % shape.rows
        company[place] = record
        found = _gradients(trainer, company, shape)[place]
        yield float((found - wanted).norm() / wanted.norm())


def _other_bytes(adapter: Adapter, work: Work) -> float:
    """Count the bytes in which two releases of one delta differ: it was on the device, or not."""
    delta = np.random.default_rng(3).normal(size=len(adapter.start)).astype(np.float32)
    adapter.write(delta)
    payloads = [_released(adapter, one, work) for one in (adapter.read(), delta)]
    adapter.write(work.start)
    one, other = (np.frombuffer(payload, np.uint8) for payload in payloads)
    return float(np.count_nonzero(one != other))


def _released(adapter: Adapter, delta: Vector, work: Work) -> bytes:
    layout, source = adapter.layout.digest, TestSource(1, "gate")
    with work.ledger() as ledger:
        return release(delta, layout, work.plan, "device", ledger, work.config.privacy, source)


def _farthest(found: Tensor, expected: Tensor) -> float:
    gaps = (found.double() - expected.double()).norm(dim=1) / expected.double().norm(dim=1)
    return float(gaps.max())
