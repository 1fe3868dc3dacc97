"""Conformance and speed on a GPU, in 8 minutes: random weights of published shapes, no downloads.

    python -m privet.experiments.benchmarks.gpu --out FOLDER
    python -m privet.experiments.benchmarks.gpu --out FOLDER --device cpu --tiny    # a rehearsal

Writes `gpu.json` and `gpu.md` into the folder, after each model anew, so that a run that is cut off
leaves what it has. docs/gpu.md says how it gets to a machine that has no network. The last line is
one JSON object: `ran` (on a GPU), `passed` (all checks), versions, figures.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ....client.training.local_training import Trainer
from ....common.errors import ConfigError
from ....common.files import write_atomic
from ....common.model.adapter import attach
from ....common.model.base_model import BaseModel
from ....common.model.compute import Compute, chosen
from ....common.settings.sections import ComputeSettings
from ..client_step import matrix_ceiling
from ..harness import command
from .conformance import Check, checks, loop_over_records, states_apart
from .page import page
from .published import PUBLISHED, Published, built, copied, loaded
from .throughput import clients_per_s, step_figures
from .workload import Work, adapter_settings, public_shape

DTYPES = ("float32", "bfloat16")
PACKAGES = ("torch", "transformers", "peft", "opacus", "numpy")
EXACT = 1_000_000_000
"""Parameters up to which float32 is tried on the device as well; the CPU's loop is in float32."""


@dataclass(frozen=True)
class Extent:
    """How much is measured.

    Attributes:
        rank: of LoRA.
        checked: rows and tokens of the batches that are checked.
        steps: rows and tokens of the steps that are timed.
        repeats: of each.
        clients_s: how long clients are counted.
        ceiling: side of the matrices of the ceiling.
    """

    rank: int
    checked: tuple[int, int]
    steps: tuple[tuple[int, int], ...]
    repeats: int
    clients_s: float
    ceiling: int


FULL = Extent(16, (8, 48), ((8, 64), (16, 256), (8, 1024), (4, 2048)), 5, 4.0, 8192)
TINY = Extent(2, (4, 12), ((4, 12),), 1, 0.1, 128)


def measure(
    out: Path = Path("runs/gpu"),
    device: str = "cuda",
    tiny: bool = False,
    models: str = "",
    minutes: float = 7.0,
) -> dict[str, Any]:
    """Try and time the models, the smallest first, and begin nothing when the time is up.

    Args:
        out: folder of `gpu.json` and `gpu.md`.
        device: as `compute.device`.
        tiny: the same architectures, tiny.
        models: names, comma-separated; empty: all.
        minutes: after which nothing is begun.
    """
    until = time.monotonic() + 60 * minutes
    out.mkdir(parents=True, exist_ok=True)
    try:
        where = {dtype: chosen(_asked(device, dtype), 4096) for dtype in DTYPES}
    except ConfigError as absent:
        return _written(out, {"ran": False, "why": str(absent), "models": []})
    extent, wanted = TINY if tiny else FULL, models.split(",") if models else []
    card = where["bfloat16"].device
    figures: dict[str, Any] = {
        "ran": card.type == "cuda",
        "date": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name(card) if card.type == "cuda" else str(card),
        "versions": {name: version(name) for name in PACKAGES},
        "rank": extent.rank,
        "ceiling_tflop_per_s": {
            dtype: matrix_ceiling(where[dtype].dtype, extent.ceiling, device=card) / 1e12
            for dtype in DTYPES
        },
        "models": [],
    }
    for shape in (one for one in PUBLISHED if not wanted or one.name in wanted):
        found = _model(shape.tiny if tiny else shape, where, extent, figures, until)
        figures["models"].append(found)
        _written(out, figures)
    return _written(out, figures)


def _asked(device: str, dtype: str) -> ComputeSettings:
    return ComputeSettings.model_validate({"device": device, "dtype": dtype})


def _written(out: Path, figures: dict[str, Any]) -> dict[str, Any]:
    """Write the figures and their page, and return them with whether all checks passed."""
    tried = [check["passed"] for model in figures["models"] for check in model["conformance"]]
    figures = {**figures, "passed": bool(tried) and all(tried)}
    write_atomic(out / "gpu.json", json.dumps(figures, indent=2).encode())
    write_atomic(out / "gpu.md", page(figures).encode())
    return figures


def _model(
    shape: Published,
    where: dict[str, Compute],
    extent: Extent,
    figures: dict[str, Any],
    until: float,
) -> dict[str, Any]:
    """Try and time one model; what there was no time for is named under `left_out`."""
    found: dict[str, Any] = {
        "name": shape.name, "conformance": [], "throughput": [], "clients_per_s": None,
        "left_out": [],
    }  # fmt: skip

    def time_for(what: str) -> bool:
        late = time.monotonic() > until
        found["left_out"] += [what] if late else []
        return not late

    if not time_for("all of it"):
        return found
    base = built(shape, where["bfloat16"])
    found["parameters"] = base.network.num_parameters()
    if time_for("conformance"):
        for dtype, check in _conformance(base, where, extent):
            found["conformance"].append({"dtype": dtype, **check.as_dict()})
    trainer = Trainer.of(attach(base, adapter_settings(extent.rank)))
    found["adapter_numbers"] = trainer.adapter.layout.dimension
    ceiling = 1e12 * figures["ceiling_tflop_per_s"]["bfloat16"]
    for rows, tokens in extent.steps:
        if time_for(f"steps of {rows} x {tokens}"):
            timed = step_figures(trainer, rows, tokens, ceiling, extent.repeats)
            found["throughput"].append(timed)
    if time_for("clients"):
        found["clients_per_s"] = clients_per_s(trainer, *extent.steps[0], extent.clients_s)
    return found


def _conformance(
    base: BaseModel, where: dict[str, Compute], extent: Extent
) -> Iterator[tuple[str, Check]]:
    """Yield the checks of one model, in each dtype, against one float32 loop on the CPU."""
    (rows, tokens), settings = extent.checked, adapter_settings(extent.rank)
    small, shape = base.network.num_parameters() < EXACT, public_shape(rows, tokens)
    written = loaded(base) if small else None
    exact = attach(copied(base, chosen(_asked("cpu", "float32"), 4096)), settings)
    work = Work.of(exact, rows, tokens, shortest=4)
    exact.write(work.start)
    expected = loop_over_records(exact, work.records)
    del exact
    if small:
        trainer = Trainer.of(attach(copied(base, where["float32"]), settings))
        for check in checks(trainer, expected, work, shape):
            yield "float32", check
    adapter = attach(base, settings)
    for check in checks(Trainer.of(adapter), expected, work, shape):
        yield "bfloat16", check
    if written is not None:
        other = attach(written, settings)
        other.write(work.start)
        yield "bfloat16", states_apart(adapter, other)


if __name__ == "__main__":
    command(measure)
