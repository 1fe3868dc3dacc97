"""What DP-SGD costs a client: the step with it over the step without it, measured in one run.

    python -m privet.experiments.benchmarks.client_step [--config demo] [--repeats 15]

Both steps are `client/training/local_training.py` on the same records and the same adapter; with DP
each record's gradient is taken, clipped and noised by Opacus, without DP the batch's mean gradient
is taken. The two alternate, so that a busy machine slows both. The step's share of the ceiling is
its counted floating-point work over its time, against the best matrix product measured here.
"""

import dataclasses
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from ...client.training.local_training import Randomness, Trainer, train
from ...client.training.records import Tokenised
from ...common.model.adapter import Adapter, attach
from ...common.model.base_model import load
from ...common.privacy.noise import SystemSource
from ...common.privacy.plan_maker import make_plan
from ...common.settings import config as settings
from .harness import command, seconds

RECORDS, TOKENS = 8, 64


def measure(config: str = "demo", repeats: int = 15, threads: int = 2) -> dict[str, object]:
    """A step's seconds with and without privacy, their ratio, and the share of the ceiling."""
    torch.set_num_threads(threads)
    folder = Path(__file__).parent.parent / "configs"
    read = settings.read(folder / f"{config}.toml")
    adapter = attach(load(read.model.base), read.adapter)
    plan = make_plan(read, "benchmark", 1, adapter.layout.digest, adapter.start)
    private = dataclasses.replace(plan, rate=1.0, batch_size=RECORDS)
    plain = dataclasses.replace(private, record_clip=0.0, record_noise=0.0)
    rng = np.random.default_rng(0)
    vocabulary = len(adapter.base.tokenizer)
    records = [Tokenised(tuple(map(int, rng.integers(vocabulary, size=TOKENS)))) for _ in range(8)]
    trainer, spent = Trainer.of(adapter), {"private": [0.0], "plain": [0.0]}
    for turn in range(repeats + 2):
        for name, step in (("private", private), ("plain", plain)):
            began = time.perf_counter()
            train(trainer, adapter.start, records, step, Randomness(rng, SystemSource()))
            if turn >= 2:  # the first two warm up
                spent[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values[1:]) for name, values in spent.items()}
    ratios = [a / b for a, b in zip(spent["private"][1:], spent["plain"][1:], strict=True)]
    work, ceiling = step_flop(adapter), matrix_ceiling()
    return {
        "base_model": read.model.base,
        "adapter": {"family": read.adapter.family, "dimension": adapter.layout.dimension},
        "records": RECORDS,
        "tokens": TOKENS,
        "threads": torch.get_num_threads(),
        "step_s": medians["private"],
        "step_without_privacy_s": medians["plain"],
        "ratio_of_medians": medians["private"] / medians["plain"],
        "median_of_paired_ratios": statistics.median(ratios),
        "counted_gflop": work / 1e9,
        "step_gflop_per_s": work / 1e9 / medians["private"],
        "ceiling_gflop_per_s": ceiling / 1e9,
        "share_of_ceiling": work / medians["private"] / ceiling,
    }


def step_flop(adapter: Adapter) -> float:
    """Count the floating-point operations of one step, two for a multiply-add.

    All linear layers run forward. The output embedding and the adapted blocks also run backward,
    towards their inputs only (their weights are frozen).
    """
    blocks = adapter.base.blocks
    sizes = [sum(p.numel() for p in block.parameters() if p.ndim == 2) for _, block in blocks]
    forward = sum(sizes) + adapter.base.output.numel()
    backward = sum(sizes[adapter.first_block :]) + adapter.base.output.numel()
    return 2.0 * (forward + backward) * RECORDS * (TOKENS - 1)


def matrix_ceiling(size: int = 1536, repeats: int = 12) -> float:
    """Best float32 matrix product seen, FLOP/s."""
    left, right = torch.randn(size, size), torch.randn(size, size)
    best = min(seconds(lambda: torch.mm(left, right), repeats))
    return 2.0 * size**3 / best


if __name__ == "__main__":
    command(measure)
