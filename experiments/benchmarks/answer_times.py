"""Do the times of answers tell who has records? Measured as a server would: from ask to answer.

    python -m privet.experiments.benchmarks.answer_times [--rounds 200] [--starts 3] [--real]

Two devices are asked in turn, in one process: one without records, one of whose records every
batch takes all. Each round is `client/device.py`'s `take_part`, from the check of the plan to the
bytes that leave, three times over: `off` as the records ask for, `work` with the same work for
everybody, `answer` with that and with the public moment, as real devices have it. `auc` is the
chance that an answer of the device with records took longer than one of the other; 0.5 is a coin.
`answer` is measured anew after each of some starts, since every start finds its moment anew.

`--real` takes SmolLM2; without it a random model of 4 blocks. The last line is one JSON object.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import torch

from ...client.device import Device, take_part, tokenised
from ...client.privacy.ledger import Ledger
from ...client.runtime.answer_pace import Pace
from ...client.training import records as data
from ...client.training.local_training import Trainer
from ...common.model.adapter import attach
from ...common.model.base_model import load
from ...common.privacy.plan_maker import make_plan
from ...common.privacy.round_plan import Plan
from ...common.secure_aggregation.keys import Directory, Identity, RoundKey, Secret
from ...common.settings.config import Config, parse
from .deployment import tiny_model
from .harness import command

WORDS = tuple(a + b + c for a in "bdgklmnprst" for b in "aeiou" for c in ("", "n", "r", "s"))
RECORDS = 8
ROLES = ("without records", "full batch")


class _Free:
    """A ledger that allows everything, as what is timed is the work."""

    def resend(self, *_: object) -> None:
        """Return nothing, as nothing was released."""

    check = commit = decline = resend

    def releases_of(self, *_: object) -> int:
        """Return 0, as nothing was released."""
        return 0


@dataclass(frozen=True, eq=False)
class FreeContext:
    """What a device works with in this benchmark, with its records in memory."""

    config: Config
    trainer: Trainer
    own: Sequence[data.Record] = field(repr=False)
    pace: Pace | None
    ledger: Ledger = field(default_factory=lambda: cast("Ledger", _Free()))
    directory: Directory = field(default_factory=lambda: Directory({}, closed=True))

    def pin(self, directory: Directory) -> None:
        """Do nothing, as no directory is kept."""

    def agreement(self, key: RoundKey) -> Callable[[bytes], Secret]:
        """Agree as a person's device does."""
        return key.agreement()

    def identity(self, _: str) -> Identity:
        """Return the same identity for every device."""
        return Identity.of(bytes(32))

    def number(self, _: str) -> int:
        """Return the same number for every device."""
        return 0

    def records(self, _: str) -> Sequence[data.Record]:
        """Return all records of this device."""
        return self.own

    def taught(self, _name: str, _plan: Plan) -> None:
        """Return None, as each device is trained when it is asked."""

    def tokenised(self, records: Sequence[data.Record]) -> list[data.Tokenised]:
        """Return the records as token ids."""
        return tokenised(records, self.config, self.trainer, "generation")

    def outcome(self, _: str) -> float | None:
        """Return None, as there is no A/B experiment."""

    def local_factor(self, _: str) -> bytes | None:
        """Return None, as no parameters stay on the device."""

    def keep_local_factor(self, _: str, kept: bytes) -> None:
        """Do nothing, as no parameters stay on the device."""


def main(
    rounds: int = 200, starts: int = 3, threads: int = 1, tick_s: float = 0.5, real: bool = False
) -> dict[str, object]:
    """AUC and medians of each mode, over so many rounds of each device in each of them."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        base = "smollm2-135m-instruct" if real else str(tiny_model(Path(folder)))
        found = measure(base, rounds, starts, tick_s)
    facts = {"base": "SmolLM2" if real else "random, tiny", "rounds": rounds}
    return {**facts, "threads": threads, "tick_s": tick_s, **found}


def measure(base: str, rounds: int, starts: int, tick_s: float) -> dict[str, object]:
    """Measure the AUC and each device's median seconds in each mode.

    The mode `answer` is measured after each of several starts.
    """
    trainer: Trainer | None = None
    measured: dict[str, object] = {}
    for mode in ("off", "work", *(f"answer {start}" for start in range(1, starts + 1))):
        config = _config(base, mode != "off", tick_s)
        trainer = trainer or Trainer.of(attach(load(base), config.adapter))
        seconds = _mode(config, trainer, rounds, paced=mode.startswith("answer"))
        none, full = (seconds[role] for role in ROLES)
        measured[mode] = {
            "auc": auc(none, full),
            "median_s": {role: statistics.median(seconds[role]) for role in ROLES},
        }
        print(f"{mode}: {measured[mode]}", flush=True)
    return measured


def auc(low: Sequence[float], high: Sequence[float]) -> float:
    """Return the chance that one of `high` is above one of `low`, where equal ones count half."""
    a, b = np.asarray(low)[:, None], np.asarray(high)[None]
    return float(np.mean((b > a) + 0.5 * (b == a)))


def _config(base: str, constant: bool, tick_s: float) -> Config:
    return parse(
        {
            "data": {"clients": 2, "test_clients": 0, "records_per_client": RECORDS,
                     "holdout": 0.01},
            "model": {"base": base},
            "adapter": {"last_blocks": 2 if "/" in base else 12},
            "training": {"batch_size": RECORDS, "constant": constant},
            "rounds": {"cohort": 2, "count": 1, "tick_s": tick_s},
            "privacy": {"client": {"noise_at": "device"}},
        }
    )  # fmt: skip


def _mode(config: Config, trainer: Trainer, rounds: int, paced: bool) -> dict[str, list[float]]:
    """Measure the seconds from ask to answer, by device.

    The two devices take turns, so that drift meets both.
    """
    drawn = np.random.default_rng(0)
    texts = [" ".join(drawn.choice(WORDS, 40)) for _ in range(RECORDS + 1)]  # one is held out
    people = {"without records": (), "full batch": tuple(map(data.Record, texts))}
    devices = {
        role: Device(role, FreeContext(config, trainer, own, Pace() if paced else None))
        for role, own in people.items()
    }
    adapter = trainer.adapter
    plan = make_plan(config, "benchmark", 1, adapter.layout.digest, adapter.start)
    seconds: dict[str, list[float]] = {role: [] for role in ROLES}
    for turn in range(rounds + 2):
        for role in ROLES if turn % 2 else reversed(ROLES):
            device, began = devices[role], time.perf_counter()
            pace = device.context.pace
            if pace is not None:
                pace.begin()
            payload = take_part(device, plan, adapter.start)
            if pace is not None:
                pace.settle()
            if payload is None:
                raise RuntimeError(f"the device {role} declined")
            if turn >= 2:  # the first two warm up, and have the rehearsal
                seconds[role].append(time.perf_counter() - began)
    return seconds


if __name__ == "__main__":
    command(main)
