"""Local training, which makes a delta from the global adapter and the own records.

This file is the only user of Opacus.

**Guarantee** (example level, one record added or removed): each local step draws a Poisson batch
with the public rate, clips every record's gradient to the plan's `record_clip` C, adds Gaussian
noise of standard deviation `record_noise` * C to the sum and divides by the public batch size.
After one step a record has moved the delta by at most learning_rate * C / batch_size.
What that costs is not decided here but carried by the release (`client/privacy/gate.py`).

The noise is Opacus's mechanism with another source: Opacus seeds torch's generator with 32 bits,
which a server could search; here it comes from the operating system. It is still floating-point
noise; drawing it four times over makes the known attack costly (Holohan and Braghin 2021).

The losses of the step itself are kept as well, where the plan asks for statistics: with the
gradients they are one function of one batch, and one record adds at most sqrt(2) / batch size to
them. They leave through the gate only, which bounds and noises them.

With a `Work` (`client/training/constant_work.py`) every step has the same chunks of the same shape:
dummies fill what was not drawn. Each row's gradient is its own, a dummy's is set to zero before it
is clipped, and the noised sum is the one without dummies, up to the order of its additions.

Edge cases: an empty batch still steps, with noise. So does that of a client without records, which
contributes nothing of it (`client/device.py`). What is not finite counts as nothing: see `train`.

Source: Abadi et al. 2016 (DP-SGD).
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from opacus import GradSampleModule
from opacus.grad_sample import register_grad_sampler
from opacus.grad_sample.linear import compute_linear_grad_sample
from opacus.optimizers import DPOptimizer
from torch import nn

from ...common.errors import AdapterError
from ...common.model.adapter import Adapter, modules_by_record
from ...common.model.base_model import PrefixCache, final_states, pad, recomputed, resumed_at
from ...common.model.compute import in_double
from ...common.model.dpo import answer_scores, margins, preference_losses
from ...common.model.objective import SharedHead, collate, record_losses
from ...common.privacy.noise import Source
from ...common.privacy.round_plan import Plan
from ...common.settings.sections import PreferenceSettings
from .constant_work import Shape
from .kernel_trial import of_nobody, refuse_coupling
from .memory_room import Room, fitting
from .records import Tokenised, poisson_indices

__all__ = [
    "Named",
    "PrivateOptimizer",
    "Randomness",
    "Trained",
    "Trainer",
    "backward",
    "batch_of",
    "begin",
    "chunked",
    "clear",
    "finite_delta",
    "losses_of",
    "optimizer_of",
    "statistics_of",
    "step_gradient",
    "taken_gradients",
    "train",
]

register_grad_sampler(SharedHead)(compute_linear_grad_sample)

# Records are clipped to a little less than C, so that no rounding of floats carries one past C:
# another record in the batch changes the order of sums, and with it each gradient by 1e-5 at most
# (measured on SmolLM2; in float64 by 1e-15).
_SHRINK = 1 - 2.0**-10
Named = tuple[tuple[str, nn.Parameter], ...]
T = TypeVar("T")

_CHUNK = 16  # records in memory at once; a large Poisson batch is taken in several


@dataclass(frozen=True, eq=False)
class Trainer:
    """An adapter with Opacus's hooks on its trained layers.

    It is made once per process. `tried`: the shape that there was room for and in which records
    were seen to be apart, by the shape that was asked for and what was trained. `room`: how many
    records pass the model at once without a shape.
    """

    adapter: Adapter
    hooked: "_Hooked"
    prefix: PrefixCache | None = None
    pairs: PreferenceSettings | None = None
    tried: dict[tuple[object, ...], Shape] = field(default_factory=dict, repr=False)
    room: Room = field(default_factory=lambda: Room(_CHUNK), repr=False)

    @classmethod
    @lru_cache(maxsize=1)
    def of(
        cls, adapter: Adapter, cache_mb: int = 0, pairs: PreferenceSettings | None = None
    ) -> "Trainer":
        """Hook the trained layers only, so that the frozen model pays nothing for DP.

        `cache_mb`: memory for what enters the first adapted block, by record; 0: nothing is kept.
        `pairs`: how to learn where a record is a pair of answers; None: it is none.

        One trainer an adapter: layers hooked twice would count every gradient twice.

        Raises:
            AdapterError: the model's output is the same with the adapter and without.
        """
        _refuse_unheard(adapter)
        for hook in vars(adapter.trainable).pop("autograd_grad_sample_hooks", ()):
            hook.remove()  # of a trainer of this adapter that the cache has forgotten
        adapter.train_only(None)
        hooked = _Hooked(adapter.trainable, loss_reduction="sum", strict=True)
        first = adapter.first_block
        kept = PrefixCache(adapter.base, first, cache_mb << 20) if cache_mb and first else None
        return cls(adapter, hooked, kept, pairs)


class _Hooked(GradSampleModule):
    """Opacus's hooks, silent on layers that the round does not train (rolora's other half)."""

    hooks_enabled: bool

    @contextlib.contextmanager
    def silenced(self) -> Iterator[None]:
        """Record nothing of a pass that will be computed again."""
        before, self.hooks_enabled = self.hooks_enabled, False
        try:
            yield
        finally:
            self.hooks_enabled = before

    def capture_backprops_hook(self, module: nn.Module, *given: Any, **named: Any) -> None:
        if any(parameter.requires_grad for parameter in module.parameters()):
            super().capture_backprops_hook(module, *given, **named)


@dataclass(frozen=True, eq=False)
class Trained:
    """The results of local training that go to the gate.

    They are sensitive, so `repr` hides them.

    Attributes:
        delta: local adapter minus global adapter, of what the round releases, shape (d,), float32.
        statistics: of the batch, over the public batch size: the records' losses, each clipped to
            [0, 1] of the plan's loss bound, and the number of records; float64, shape (2,), or
            (0,) where the plan asks for none.
        local_factor: what stays on the device (fedsa's B), as it is after training; empty for the
            other families.
    """

    delta: NDArray[np.float32] = field(repr=False)
    statistics: NDArray[np.float64] = field(repr=False)
    local_factor: NDArray[np.float32] = field(
        default_factory=lambda: np.zeros(0, np.float32), repr=False, kw_only=True
    )


@dataclass(frozen=True, eq=False)
class Randomness:
    """The sources of a training's random numbers.

    Attributes:
        batches: which records are drawn; secret, from the operating system outside tests.
        noise: of the noise on the records' gradients.
    """

    batches: np.random.Generator = field(repr=False)
    noise: Source = field(repr=False)

    def drawn(self, records: int, plan: Plan) -> list[list[int]]:
        """Draw the batch of each local step, as indices of the records."""
        return [poisson_indices(records, plan.rate, self.batches) for _ in range(plan.local_steps)]


def train(
    trainer: Trainer,
    start: NDArray[np.float32],
    records: Sequence[Tokenised],
    plan: Plan,
    randomness: Randomness,
    *,
    local_factor: NDArray[np.float32] | None = None,
    shape: Shape | None = None,
) -> Trained:
    """Train local steps from the global adapter on one client's own records.

    Args:
        trainer: the model with hooks; its adapter is overwritten.
        start: the global adapter, shape (d,), float32.
        records: the client's own tokenised records, at most the public cap; may be empty.
        plan: steps, public batch size and rate, learning rate, clip and noise of a record.
        randomness: of the draws and of the noise.
        local_factor: what stays on the device, from the last time; None: the first time.
        shape: of every step, whatever is drawn; the prefix cache, whose time tells which records
            it has met, then rests. None: as little work as the batch needs.

    Returns:
        The delta as the sum of the steps, because the difference of two rounded adapters would be
        off by more than a small step allows; and the statistics of the first step's batch.

    **Guarantee**: both are finite, whatever adapter a server sends. It could choose one that
    overflows with some words and not with others, and a device that declined for that would tell
    its words, at no cost and as often as it is asked. So a record whose gradient is not finite
    counts as none, a loss that is not as the largest, a delta that still is not as zero.

    Raises:
        AdapterError: an adapted layer does not see records one by one.
        ConfigError: memory has no room for one record.
    """
    with _on_one_thread(shape):
        trained, shape = begin(trainer, start, plan, shape, local_factor)
        delta = np.zeros(sum(parameter.numel() for _, parameter in trained))
        losses: list[NDArray[np.float64]] = []
        drawn = randomness.drawn(len(records), plan)
        for number, indices in enumerate(drawn):
            if number == 1 and trainer.pairs is not None:
                records = _with_references(trainer, start, records, drawn[1:], shape)
            batch = batch_of(records, indices)
            seen = _stepped(trainer, trained, batch, plan, randomness.noise, shape)
            losses.append(np.array(seen, np.float64))
            delta -= plan.learning_rate * step_gradient(trained)
        clear(trainer, trained)
        kept = len(delta) - trainer.adapter.local_factor.dimension
        released, moved = np.split(finite_delta(delta), [kept])
        return Trained(
            released, statistics_of(losses[0], plan), local_factor=_moved(local_factor, moved)
        )


def batch_of(records: Sequence[Tokenised], drawn: Sequence[int]) -> list[Tokenised]:
    """Return the records that were drawn, shortest first."""
    return sorted((records[i] for i in drawn), key=lambda record: len(record.ids))


@contextlib.contextmanager
def _on_one_thread(shape: Shape | None) -> Iterator[None]:
    """Compute on one thread, where a record's gradient must be its own to the bit.

    With several, torch divides a batch's numbers among them wherever that falls, and the last of
    each part are computed by other instructions, which may round otherwise: a record's result would
    hang on its place.
    """
    before = torch.get_num_threads()
    if shape is not None and shape.constant:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def begin(
    trainer: Trainer,
    start: NDArray[np.float32],
    plan: Plan,
    shape: Shape | None,
    local_factor: NDArray[np.float32] | None = None,
) -> tuple[Named, Shape | None]:
    """Load an adapter for a round.

    Returns:
        The parameters that the round trains; and the shape, smaller if memory has no room for it.

    Raises:
        AdapterError: what is asked cannot be trained with a clip for each record.
        ConfigError: memory has no room for one record.
    """
    adapter, private = trainer.adapter, plan.record_clip > 0
    if private:
        _refuse_unsound(adapter, shape)
    # below the first adapted block no input wants a gradient; torch warns, Opacus needs none
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    _forget(trainer.hooked)
    trained = adapter.train_only(plan.round)
    trainer.hooked.train()
    trainer.hooked.hooks_enabled = private
    shape = None if shape is None else _tried(trainer, trained, shape, private)
    adapter.write(start, local_factor)
    return trained, shape


def _moved(before: NDArray[np.float32] | None, by: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return what stays on the device after training; as it was where the sum is not finite."""
    before = np.zeros_like(by) if before is None else before
    return before + by if np.isfinite(before + by).all() else before


def _refuse_unsound(adapter: Adapter, shape: Shape | None) -> None:
    """Refuse what cannot be trained with a clip for each record."""
    base, where = adapter.base, adapter.base.compute
    if adapter.local_factor.pieces:
        raise AdapterError(
            f"adapter.family = {adapter.settings.family!r} keeps numbers fitted without DP on the "
            "device, so it cannot be trained under example-level DP"
        )
    if base.by_shape and shape is None:
        raise AdapterError(
            f"a base model in {where.numbers} needs batches of one public shape: in others a "
            "record's gradient depends on its neighbours"
        )
    if base.by_shape and adapter.head is not None:
        raise AdapterError(
            f"a shared head is trained under example-level DP in float32 alone: in {where.numbers} "
            "a server could choose one that makes of rounding a record's whole gradient; set "
            f"{where.mend}"
        )
    if base.by_shape and base.routed:
        raise AdapterError(
            f"{base.name} is a mixture of experts: which rows an expert multiplies depends on all "
            f"records of a batch, and so, in {where.numbers}, does a record's gradient; set "
            f"{where.mend}"
        )


def _tried(trainer: Trainer, trained: Named, shape: Shape, private: bool) -> Shape:
    """Return the shape, or a smaller one if there is no room, once tried without real records."""
    which = (shape, private, *(name for name, _ in trained))

    def attempt(some: Shape) -> None:
        clear(trainer, trained)
        losses_of(trainer, some.made_up(), some).sum().backward()
        clear(trainer, trained)
        if private:
            refuse_coupling(
                trainer.adapter, some, lambda chunk: _gradient_of(trainer, trained, chunk, some)
            )

    if which not in trainer.tried:
        trainer.tried[which] = fitting(shape, attempt)
    return trainer.tried[which]


def _stepped(
    trainer: Trainer,
    trained: Named,
    batch: list[Tokenised],
    plan: Plan,
    source: Source,
    shape: Shape | None,
) -> list[float]:
    """Take a local step, and return the losses of its records before it."""

    def once() -> list[float]:
        clear(trainer, trained)
        chunks = chunked(batch, shape, trainer.room.records)
        if plan.record_clip > 0:
            optimizer = optimizer_of(trained, plan, source)
            return _private_step(trainer, trained, optimizer, chunks, plan, shape)
        plain = torch.optim.SGD([parameter for _, parameter in trained], lr=plan.learning_rate)
        return _plain_step(trainer, trained, plain, chunks, plan, shape)

    return trainer.room.taken(once) if shape is None else once()


def clear(trainer: Trainer, trained: Named) -> None:
    """Let go of gradients, and of what passes that broke off have left."""
    _forget(trainer.hooked)
    for _, parameter in trained:
        parameter.grad = parameter.grad_sample = parameter.summed_grad = None  # type: ignore[attr-defined]


@torch.no_grad()
def _refuse_unheard(adapter: Adapter) -> None:
    """Refuse an adapter that does not move the model's output, before anything is spent on it."""
    ids, mask = pad([[1, 2, 3, 4, 5]])
    adapter.write(*of_nobody(adapter))
    moved = final_states(adapter.base, ids, mask)
    adapter.write(adapter.start)
    if torch.equal(moved, final_states(adapter.base, ids, mask)):
        raise AdapterError(
            f"the adapter ({', '.join(adapter.modules)}) does not move the output of "
            f"{adapter.base.name}, so nothing could be learnt: its layers are not used; set "
            "adapter.modules to others"
        )


def _gradient_of(
    trainer: Trainer, trained: Named, chunk: list[Tokenised], shape: Shape
) -> torch.Tensor:
    """Return the gradient of each record of a chunk, shape (records, d)."""
    losses = losses_of(trainer, chunk, shape)
    losses.sum().backward()
    _one_row_a_record(trainer, trained, len(losses))
    return taken_gradients(trained, len(chunk))


def taken_gradients(trained: Named, records: int) -> torch.Tensor:
    """Take the gradients by record from the parameters, shape (records, d)."""
    found = [parameter.grad_sample[:records].flatten(1) for _, parameter in trained]  # type: ignore[attr-defined]
    for _, parameter in trained:
        parameter.grad = parameter.grad_sample = None  # type: ignore[attr-defined]
    return torch.cat(found, 1)


def finite_delta(delta: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return the delta in float32, or zeros where a number of it is not finite there."""
    with np.errstate(over="ignore"):
        rounded = delta.astype(np.float32)
    return rounded if np.isfinite(rounded).all() else np.zeros_like(rounded)


def _forget(hooked: GradSampleModule) -> None:
    """Drop what a forward pass left whose backward pass never came, because the round broke off.

    Opacus would count those rows as records of the next batch.
    """
    for module in hooked.modules():
        if hasattr(module, "activations"):
            module.activations = []
        if hasattr(module, "max_batch_len"):
            del module.max_batch_len
    for parameter in hooked.parameters():
        if hasattr(parameter, "_forward_counter"):
            parameter._forward_counter = 0
        if hasattr(parameter, "_current_grad_sample"):
            del parameter._current_grad_sample


def _with_references(
    trainer: Trainer,
    start: NDArray[np.float32],
    records: Sequence[Tokenised],
    drawn: Sequence[Sequence[int]],
    shape: Shape | None,
) -> list[Tokenised]:
    """Add the global adapter's margin to pairs, for the steps in which the model has left it.

    Each is computed alone, or as a row of one fixed shape, so that no record's gradient hangs on
    what else was drawn.
    """
    adapter, with_references = trainer.adapter, list(records)
    now = adapter.read()
    adapter.write(start)
    if shape is None:
        chunks = [[i] for i in sorted({i for batch in drawn for i in batch})]
    else:
        chunks = [chunk for batch in drawn for chunk in shape.dealt(batch)]
    with torch.no_grad():
        for chunk in chunks:
            margin = _margins(trainer, [records[i] for i in chunk], shape)
            for i, each in zip(chunk, margin.tolist(), strict=False):
                with_references[i] = replace(with_references[i], reference=each)
    adapter.write(now)
    return with_references


def statistics_of(losses: NDArray[np.float64], plan: Plan) -> NDArray[np.float64]:
    """Turn losses under the start adapter, shape (records,), into the block of losses."""
    if not plan.losses_bound:
        return np.zeros(0)
    bounded = np.clip(np.nan_to_num(losses / plan.losses_bound, nan=1.0), 0.0, 1.0)
    return np.array([bounded.sum(), len(losses)]) / plan.batch_size


class PrivateOptimizer(DPOptimizer):
    """Opacus's optimiser with its Gaussian noise drawn from `source`."""

    def __init__(self, *given: Any, source: Source, noise: float, **named: Any) -> None:
        super().__init__(*given, noise_multiplier=noise / named["max_grad_norm"], **named)
        self.source, self.noise = source, noise

    def take(self, chunks: Sequence[T], give: Callable[[T], None]) -> None:
        """Take one step along all chunks.

        `give` sets `grad_sample` of each parameter for a chunk.
        """
        for number, chunk in enumerate(chunks):
            self.zero_grad(set_to_none=True)  # keeps the sum of the chunks before
            give(chunk)
            self.signal_skip_step(do_skip=number < len(chunks) - 1)
            self.step()

    def clip_and_accumulate(self) -> None:
        """Clip and sum in float64: in float32 small squares are lost beside large ones."""
        rows = [parameter.grad_sample.flatten(1) for parameter in self.params]
        norms = torch.stack([in_double(one).norm(2, dim=1) for one in rows], 1).norm(2, dim=1)
        factors = (self.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
        for parameter, one in zip(self.params, rows, strict=True):
            total = (factors @ in_double(one)).view_as(parameter)
            before = parameter.summed_grad
            parameter.summed_grad = total if before is None else before + total

    def add_noise(self) -> None:
        totals: list[torch.Tensor] = [parameter.summed_grad for parameter in self.params]
        flat = torch.cat([total.flatten() for total in totals]).cpu().double()
        noise = sum(_gaussian(len(flat), self.source) for _ in range(4)) / 2
        noised = (flat + self.noise * torch.from_numpy(noise)).float()
        pieces = noised.split([total.numel() for total in totals])
        for parameter, piece in zip(self.params, pieces, strict=True):
            parameter.grad = piece.view_as(parameter).to(parameter)


def _gaussian(count: int, source: Source) -> NDArray[np.float64]:
    """Return standard normal numbers from random words (Box and Muller 1958)."""
    words = source.words(2 * count)
    uniform = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    radius, angle = uniform[:count], uniform[count:]
    normal: NDArray[np.float64] = np.sqrt(-2 * np.log(radius)) * np.cos(2 * np.pi * angle)
    return normal


def optimizer_of(trained: Named, plan: Plan, source: Source) -> PrivateOptimizer:
    """Return a device's optimiser, with a clip for each record and the plan's noise."""
    return PrivateOptimizer(
        torch.optim.SGD([parameter for _, parameter in trained], lr=plan.learning_rate),
        max_grad_norm=plan.record_clip * _SHRINK,
        expected_batch_size=plan.batch_size,
        source=source,
        noise=plan.record_noise * plan.record_clip,
    )


def _private_step(
    trainer: Trainer,
    trained: Named,
    optimizer: PrivateOptimizer,
    chunks: list[list[Tokenised]],
    _: Plan,
    shape: Shape | None,
) -> list[float]:
    seen = list[float]()

    def give(chunk: list[Tokenised]) -> None:
        if chunk or shape is not None:
            seen.extend(backward(trainer, trained, chunk, shape))
        else:
            for _name, parameter in trained:
                parameter.grad_sample = parameter.new_zeros(0, *parameter.shape)  # type: ignore[attr-defined]

    optimizer.take(chunks or [[]], give)
    return seen


def backward(
    trainer: Trainer, trained: Named, chunk: list[Tokenised], shape: Shape | None
) -> list[float]:
    """Give each trained parameter its gradients by record, and return the records' losses."""
    losses = losses_of(trainer, chunk, shape)
    _sum(losses, len(chunk)).backward()
    _one_row_a_record(trainer, trained, len(losses))
    _silence(trained, len(chunk))
    seen: list[float] = losses.tolist()[: len(chunk)]
    return seen


def _one_row_a_record(trainer: Trainer, trained: Named, records: int) -> None:
    """Make gradients one row a record, or refuse them.

    The two answers of a pair are one record's two rows.
    """
    if trainer.pairs is None:
        _refuse_mixed(trainer.adapter, trained, records)
        return
    _refuse_mixed(trainer.adapter, trained, 2 * records)
    for _, parameter in trained:
        rows: torch.Tensor = parameter.grad_sample  # type: ignore[attr-defined]
        parameter.grad_sample = rows[:records] + rows[records:]  # type: ignore[attr-defined]


def _refuse_mixed(adapter: Adapter, trained: Named, records: int) -> None:
    """Refuse a layer that did not see one row for each record.

    Some blocks give a layer tokens for records, and each token would be clipped for itself; or call
    it again with rows that belong to all, which Opacus would add to the first records.
    """
    for name in adapter.mixing:
        _refuse_layer(adapter, name, "other rows than one for each record")
    for name, parameter in trained:
        seen = getattr(parameter, "grad_sample", None)
        if not isinstance(seen, torch.Tensor) or len(seen) != records:
            rows = len(seen) if isinstance(seen, torch.Tensor) else "no"
            _refuse_layer(adapter, name, f"{rows} rows for {records} records")


def _refuse_layer(adapter: Adapter, name: str, saw: str) -> None:
    others = ", ".join(modules_by_record(adapter.base)) or "there is none"
    raise AdapterError(
        f"{name}: this layer saw {saw}, so a record's gradient cannot be clipped; set "
        f"adapter.modules to layers that would do ({others}), or privacy.example.enabled = false"
    )


def _sum(losses: torch.Tensor, records: int) -> torch.Tensor:
    """Sum the losses of the records alone.

    The dummies behind them get a gradient of zero.
    """
    if len(losses) == records:
        return losses.sum()
    real = torch.arange(len(losses), device=losses.device) < records
    return torch.where(real, losses, losses.new_zeros(())).sum()


def _silence(trained: Named, records: int) -> None:
    """Set the gradients of a record to zero if one of them is not finite.

    It takes no other record's with it. A dummy's are set to zero too, whatever they are: dummies
    are the rows behind the records.
    """
    gradients: list[torch.Tensor] = [
        parameter.grad_sample  # type: ignore[attr-defined]
        for _, parameter in trained
    ]
    finite = torch.stack([rows.flatten(1).isfinite().all(1) for rows in gradients]).all(0)
    finite &= torch.arange(len(finite), device=finite.device) < records
    if not finite.all():  # never where there are dummies, and there always are with a fixed shape
        for rows in gradients:
            rows.masked_fill_(~finite.view(-1, *[1] * (rows.ndim - 1)), 0.0)


def _plain_step(
    trainer: Trainer,
    _: Named,
    optimizer: torch.optim.Optimizer,
    chunks: list[list[Tokenised]],
    plan: Plan,
    shape: Shape | None,
) -> list[float]:
    seen = list[float]()
    optimizer.zero_grad(set_to_none=True)
    for chunk in chunks:
        losses = losses_of(trainer, chunk, shape)
        (_sum(losses, len(chunk)) / plan.batch_size).backward()
        seen += losses.tolist()[: len(chunk)]
    optimizer.step()
    return seen


def step_gradient(trained: Named) -> NDArray[np.float64]:
    """Return the gradient that the step just taken went along, shape (d,)."""
    pieces = [p.new_zeros(p.numel()) if p.grad is None else p.grad.ravel() for _, p in trained]
    return torch.cat(pieces).cpu().double().numpy()


def losses_of(
    trainer: Trainer, records: list[Tokenised], shape: Shape | None = None
) -> torch.Tensor:
    """Return the loss of each record, shape (n,).

    With dummies behind the records it is (rows,). The loss of a pair is against its reference.
    """
    base = trainer.adapter.base
    if not base.compute.gradient_checkpointing:
        return _losses_in_one_pass(trainer, records, shape)
    with recomputed(base, trainer.adapter.first_block, trainer.hooked.silenced):
        return _losses_in_one_pass(trainer, records, shape)


def _losses_in_one_pass(
    trainer: Trainer, records: list[Tokenised], shape: Shape | None
) -> torch.Tensor:
    adapter = trainer.adapter
    if shape is not None:
        records = shape.filled(records)
    if trainer.pairs is not None:
        margin = _margins(trainer, records, shape)
        known = torch.tensor([np.nan if r.reference is None else r.reference for r in records])
        known = known.to(margin)
        reference = torch.where(known.isnan(), margin.detach(), known)
        return preference_losses(margin, reference, trainer.pairs.beta)
    labels = None if adapter.head is None else [float(record.label or 0.0) for record in records]
    ids = [record.ids for record in records]
    tokens, everywhere = (0, False) if shape is None else (shape.tokens, shape.constant)
    batch = collate(ids, labels, [record.learnt for record in records], tokens, everywhere)
    if trainer.prefix is None or shape is not None:
        return record_losses(adapter.base, batch, adapter.head)
    with resumed_at(adapter.base, adapter.first_block, trainer.prefix.padded(ids)):
        return record_losses(adapter.base, batch, adapter.head)


def _margins(
    trainer: Trainer, records: list[Tokenised], shape: Shape | None = None
) -> torch.Tensor:
    """Return by how much the model prefers each pair's chosen answer, shape (n,).

    One pass of 2n rows, the chosen answers first; `_one_row_a_record` counts on that.
    """
    adapter, pairs = trainer.adapter, trainer.pairs
    if pairs is None:
        raise ValueError("margins of records that are no pairs")
    if shape is not None:
        records = shape.filled(records)
    ids = [record.ids for record in records] + [record.rejected for record in records]
    prompts = [r.prompts[0] for r in records] + [r.prompts[1] for r in records]
    tokens = 0 if shape is None else shape.tokens
    asked = adapter.base, ids, prompts, adapter.head, pairs.length_normalised, tokens
    if trainer.prefix is None or shape is not None:
        return margins(answer_scores(*asked))
    with resumed_at(adapter.base, adapter.first_block, trainer.prefix.padded(ids)):
        return margins(answer_scores(*asked))


def chunked(batch: list[T], shape: Shape | None = None, records: int = _CHUNK) -> list[list[T]]:
    """Divide a batch, shortest records first, into what is in memory at once.

    `records`: in a chunk, where there is no shape.
    """
    if shape is not None:
        return shape.dealt(batch)
    return [batch[i : i + records] for i in range(0, len(batch), records)]
