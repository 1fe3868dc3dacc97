"""Local training: global adapter + own records -> delta. The only user of Opacus.

**Guarantee** (example level, one record added or removed): each local step draws a Poisson batch
with the public rate, clips every record's gradient to the plan's `record_clip` C, adds Gaussian
noise of standard deviation `record_noise` * C to the sum and divides by the public batch size.
What that costs is not decided here but carried by the release (`client/release.py`).

The noise is Opacus's mechanism with another source: Opacus seeds torch's generator with 32 bits,
which a server could search; here it comes from the operating system. It is still floating-point
noise; drawing it four times over makes the known attack costly (Holohan and Braghin 2021).

Edge cases: an empty batch (also of a client without records) still steps, with noise. A record
whose gradient is not finite makes the delta non-finite; the gate refuses it.

Source: Abadi et al. 2016 (DP-SGD).
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import nn

from ..common.adapter import Adapter
from ..common.noise import Source
from ..common.objective import collate, record_losses
from ..common.plan import Plan
from .data import Tokenised, poisson_indices

__all__ = ["Trainer", "train"]

_CHUNK = 16  # records in memory at once; a large Poisson batch is taken in several


@dataclass(frozen=True, eq=False)
class Trainer:
    """An adapter with Opacus's hooks on its trained layers; made once per process."""

    adapter: Adapter
    hooked: Any

    @classmethod
    @lru_cache(maxsize=1)
    def of(cls, adapter: Adapter) -> "Trainer":
        """Hook the trained layers only: the frozen model pays nothing for DP.

        One trainer an adapter: layers hooked twice count every gradient twice, which would break
        the bound of one record without a sound.
        """
        # below the first adapted block no input wants a gradient; torch warns, Opacus needs none
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        layers = nn.ModuleList(adapter.trainable.values())
        return cls(adapter, GradSampleModule(layers, loss_reduction="sum", strict=True))


def train(
    trainer: Trainer,
    start: NDArray[np.float32],
    records: Sequence[Tokenised],
    plan: Plan,
    *,
    batches: np.random.Generator,
    source: Source,
) -> NDArray[np.float32]:
    """Local steps from the global adapter on one client's own records.

    Args:
        trainer: the model with hooks; its adapter is overwritten.
        start: the global adapter, shape (d,), float32.
        records: the client's own tokenised records, at most the public cap; may be empty.
        plan: steps, public batch size and rate, learning rate, clip and noise of a record.
        batches: which records are drawn; secret, from the operating system outside tests.
        source: the noise.

    Returns:
        Local adapter minus global adapter, shape (d,), float32.
    """
    adapter, private = trainer.adapter, plan.record_clip > 0
    adapter.write(start)
    optimizer = _optimizer([parameter for _, parameter in adapter.parameters], plan, source)
    trainer.hooked.train()
    trainer.hooked.hooks_enabled = private
    step = _private_step if private else _plain_step
    for _ in range(plan.local_steps):
        batch = [records[i] for i in poisson_indices(len(records), plan.rate, batches)]
        step(adapter, optimizer, sorted(batch, key=lambda record: len(record.ids)), plan)
    return adapter.read() - start


class _SystemNoiseOptimizer(DPOptimizer):
    """Opacus's optimiser, with its Gaussian noise drawn from `source`."""

    def __init__(self, *given: Any, source: Source, **named: Any) -> None:
        super().__init__(*given, **named)
        self.source = source

    def add_noise(self) -> None:
        for parameter in self.params:
            total = parameter.summed_grad
            scale = self.noise_multiplier * self.max_grad_norm
            noise = sum(_gaussian(total.numel(), self.source) for _ in range(4)) / 2
            drawn = torch.from_numpy(noise).view_as(total)
            parameter.grad = (total.double() + scale * drawn).to(total.dtype).view_as(parameter)


def _gaussian(count: int, source: Source) -> NDArray[np.float64]:
    """Standard normal numbers from random words: Box and Muller 1958."""
    words = source.words(2 * count)
    uniform = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    radius, angle = uniform[:count], uniform[count:]
    normal: NDArray[np.float64] = np.sqrt(-2 * np.log(radius)) * np.cos(2 * np.pi * angle)
    return normal


def _optimizer(parameters: list[nn.Parameter], plan: Plan, source: Source) -> Any:
    plain = torch.optim.SGD(parameters, lr=plan.learning_rate)
    if plan.record_clip == 0:
        return plain
    return _SystemNoiseOptimizer(
        plain,
        noise_multiplier=plan.record_noise,
        max_grad_norm=plan.record_clip,
        expected_batch_size=plan.batch_size,
        source=source,
    )


def _private_step(adapter: Adapter, optimizer: Any, batch: list[Tokenised], _: Plan) -> None:
    chunks = _chunks(batch) or [[]]
    for number, chunk in enumerate(chunks):
        if chunk:
            _losses(adapter, chunk).sum().backward()
        else:
            for _name, parameter in adapter.parameters:
                parameter.grad_sample = torch.zeros(0, *parameter.shape)  # type: ignore[attr-defined]
        optimizer.signal_skip_step(do_skip=number < len(chunks) - 1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _plain_step(adapter: Adapter, optimizer: Any, batch: list[Tokenised], plan: Plan) -> None:
    for chunk in _chunks(batch):
        (_losses(adapter, chunk).sum() / plan.batch_size).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _losses(adapter: Adapter, records: list[Tokenised]) -> torch.Tensor:
    labels = None if adapter.head is None else [float(record.label or 0.0) for record in records]
    batch = collate([record.ids for record in records], labels)
    return record_losses(adapter.base, batch, adapter.head)


def _chunks(batch: list[Tokenised]) -> list[list[Tokenised]]:
    return [batch[i : i + _CHUNK] for i in range(0, len(batch), _CHUNK)]
