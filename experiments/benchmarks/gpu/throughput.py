"""How fast a private step is on a device, how much memory it takes, and what privacy costs."""

import resource
import statistics
import time

import numpy as np
import torch

from ....client.privacy.gate import release
from ....client.training.constant_work import Shape
from ....client.training.local_training import Randomness, Trainer, train
from ....common.errors import PrivetError
from ....common.model.exchange_layout import Vector
from ....common.privacy.noise import SystemSource
from ....common.privacy.round_plan import Plan
from ..client_step import step_flop
from .workload import Work, public_shape

__all__ = ["clients_per_s", "peak_mb", "step_figures"]


def step_figures(
    trainer: Trainer, rows: int, tokens: int, ceiling: float, repeats: int
) -> dict[str, object]:
    """Time a step with privacy and without, in turns, on one chunk of so many rows of tokens.

    Args:
        ceiling: of a matrix product on the device in the base model's dtype, FLOP/s.

    Where memory has no room for all rows, `rows_at_once` is what was timed; where it has for none,
    or the kernels are refused, `failed` says so.
    """
    adapter, size = trainer.adapter, {"rows": rows, "tokens": tokens}
    work, shape = Work.of(adapter, rows, tokens), public_shape(rows, tokens)
    _forget_peak(adapter.base.compute.device)
    try:
        spent = _in_turns(trainer, work, shape, repeats)
    except (PrivetError, RuntimeError) as error:
        return {**size, "failed": " ".join(str(error).split())[:300]}
    private, plain = (statistics.median(spent[plan]) for plan in (work.plan, work.plain))
    fitting = [fit.rows for which, fit in trainer.tried.items() if which[0] == shape]
    return {
        **size,
        "rows_at_once": min(fitting),
        "step_s": private,
        "tokens_per_s": rows * tokens / private,
        "share_of_ceiling": step_flop(adapter, rows * (tokens - 1)) / private / ceiling,
        "dp_over_plain": private / plain,
        "peak_mb": peak_mb(adapter.base.compute.device),
    }


def clients_per_s(trainer: Trainer, records: int, tokens: int, enough_s: float) -> float:
    """Count simulated clients a second: a private step, the gate and its ledger, one by one."""
    work, shape = Work.of(trainer.adapter, records, tokens), public_shape(records, tokens)
    layout, source = trainer.adapter.layout.digest, SystemSource()
    with work.ledger() as ledger:

        def client(name: str) -> None:
            delta = _step(trainer, work, shape, work.plan)
            release(delta, layout, work.plan, name, ledger, work.config.privacy, source)

        client("warm")
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < enough_s or not count:
            client(f"client {count}")
            count += 1
        return count / (time.perf_counter() - began)


def peak_mb(device: torch.device) -> float:
    """The most memory so far: of the card since `_forget_peak`, or of this whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _in_turns(trainer: Trainer, work: Work, shape: Shape, repeats: int) -> dict[Plan, list[float]]:
    spent: dict[Plan, list[float]] = {work.plan: [], work.plain: []}
    for turn in range(repeats + 2):
        for plan, times in spent.items():
            began = time.perf_counter()
            _step(trainer, work, shape, plan)  # ends with the delta in main memory
            if turn >= 2:
                times.append(time.perf_counter() - began)
    return spent


def _step(trainer: Trainer, work: Work, shape: Shape, plan: Plan) -> Vector:
    randomness = Randomness(np.random.default_rng(1), SystemSource())
    return train(trainer, work.start, work.records, plan, randomness, shape=shape).delta
