"""What a client's step costs: with DP over without it, and in bfloat16 over float32, in one run.

    python -m privet.experiments.benchmarks.client_step [--config demo] [--repeats 15]

All steps are `client/training/local_training.py` on the same records and the same adapter; with DP
each record's gradient is taken, clipped and noised by Opacus, without DP the batch's mean gradient
is taken. They alternate, so that a busy machine slows all. The float32 step is as it was before
there was another: batches as long as their longest record. In bfloat16 both steps, with and without
DP, have the public shape that makes it sound. The step's share of the ceiling is its counted
floating-point work over its time, against the best matrix product measured here.

Its last line has `bf16_over_float32` (with DP) and `dp_over_plain` (in bfloat16).
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from ...client.training.constant_work import chunks_of
from ...client.training.local_training import Randomness, Trainer, train
from ...client.training.records import Tokenised
from ...common.model.adapter import Adapter, attach
from ...common.model.base_model import load_anew
from ...common.privacy.noise import SystemSource
from ...common.privacy.plan_maker import make_plan
from ...common.settings import config as settings
from ...common.settings.config import Config
from ...common.settings.sections import ComputeSettings
from .harness import command, seconds

Which = tuple[str, bool]
Seconds = list[float]
RECORDS, TOKENS = 8, 64
DTYPES = ("float32", "bfloat16")


def measure(config: str = "demo", repeats: int = 15, threads: int = 2) -> dict[str, object]:
    """Seconds of a step with and without privacy, in both dtypes, and their ratios."""
    torch.set_num_threads(threads)
    folder = Path(__file__).parent.parent / "configs"
    read = settings.read(folder / f"{config}.toml", [f"data.max_tokens={TOKENS}"])
    adapters = {
        dtype: attach(
            load_anew(read.model.base, ComputeSettings(device="cpu", dtype=dtype)), read.adapter
        )
        for dtype in DTYPES
    }
    trainers = {dtype: Trainer.of(adapter) for dtype, adapter in adapters.items()}
    steps = {
        (dtype, private): _step(trainer, read, private)
        for dtype, trainer in trainers.items()
        for private in (True, False)
    }
    spent = _alternating(steps, repeats)
    medians = {which: statistics.median(values) for which, values in spent.items()}
    dp = {dtype: _ratio(spent[dtype, True], spent[dtype, False]) for dtype in DTYPES}
    adapter = adapters["float32"]
    work = step_flop(adapter, RECORDS * (TOKENS - 1))
    ceiling = {dtype: matrix_ceiling(getattr(torch, dtype)) for dtype in DTYPES}
    return {
        "base_model": read.model.base,
        "adapter": {"family": read.adapter.family, "dimension": adapter.layout.dimension},
        "records": RECORDS,
        "tokens": TOKENS,
        "threads": torch.get_num_threads(),
        "step_s": {dtype: medians[dtype, True] for dtype in DTYPES},
        "step_without_privacy_s": {dtype: medians[dtype, False] for dtype in DTYPES},
        "bf16_over_float32": _ratio(spent["bfloat16", True], spent["float32", True]),
        "dp_over_plain": dp["bfloat16"],
        "dp_over_plain_float32": dp["float32"],
        "counted_gflop": work / 1e9,
        "ceiling_gflop_per_s": {dtype: ceiling[dtype] / 1e9 for dtype in DTYPES},
        "share_of_ceiling": {d: work / medians[d, True] / ceiling[d] for d in DTYPES},
    }


def _alternating(steps: Mapping[Which, Callable[[], object]], repeats: int) -> dict[Which, Seconds]:
    """Time the steps in turns, after two turns that warm up."""
    spent: dict[Which, Seconds] = {which: [] for which in steps}
    for turn in range(repeats + 2):
        for which, step in steps.items():
            began = time.perf_counter()
            step()
            if turn >= 2:
                spent[which].append(time.perf_counter() - began)
    return spent


def _step(trainer: Trainer, config: Config, private: bool) -> Callable[[], object]:
    adapter = trainer.adapter
    plan = make_plan(config, "benchmark", 1, adapter.layout.digest, adapter.start)
    plan = dataclasses.replace(plan, rate=1.0, batch_size=RECORDS)
    if not private:
        plan = dataclasses.replace(plan, record_clip=0.0, record_noise=0.0)
    rng = np.random.default_rng(0)
    words = len(adapter.base.tokenizer)
    records = [Tokenised(tuple(map(int, rng.integers(words, size=TOKENS)))) for _ in range(RECORDS)]
    shape = chunks_of(config, adapter.base.positions) if adapter.base.by_shape else None
    randomness = Randomness(rng, SystemSource())

    def step() -> None:
        train(trainer, adapter.start, records, plan, randomness, shape=shape)

    return step


def _ratio(over: list[float], under: list[float]) -> float:
    return float(statistics.median([a / b for a, b in zip(over, under, strict=True)]))


def step_flop(adapter: Adapter, places: int) -> float:
    """Count the floating-point operations of one step, two for a multiply-add.

    `places`: tokens that are read and predicted, of all records.

    All linear layers run forward. The output embedding and the adapted blocks also run backward,
    towards their inputs only (their weights are frozen).
    """
    blocks = adapter.base.blocks
    sizes = [sum(p.numel() for p in block.parameters() if p.ndim == 2) for _, block in blocks]
    forward = sum(sizes) + adapter.base.output.weight.numel()
    backward = sum(sizes[adapter.first_block :]) + adapter.base.output.weight.numel()
    return 2.0 * (forward + backward) * places


def matrix_ceiling(
    dtype: torch.dtype, size: int = 1536, repeats: int = 12, device: torch.device | None = None
) -> float:
    """Best matrix product seen, FLOP/s; `device`: None for the processor."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def product() -> None:
        torch.mm(left, right)
        if left.is_cuda:
            torch.cuda.synchronize(device)

    return 2.0 * size**3 / min(seconds(product, repeats))


if __name__ == "__main__":
    command(measure)
