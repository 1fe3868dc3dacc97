"""One device: what it owns, and what it does in a round.

`take_part` is a client's whole round, read downwards. `Bench` is what all devices simulated by
one process share: the loaded base model, the adapter in it, the data's index, the ledger file.
"""

import dataclasses
import gc
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ..common import config as settings
from ..common import noise
from ..common.adapter import shared
from ..common.config import Config
from ..common.errors import PrivacyError, ProtocolError
from ..common.plan import Plan
from . import data
from .ledger import Ledger
from .release import budgets, charges, release
from .training import Trainer, train

__all__ = ["Bench", "Device", "take_part"]

LEDGERS = "ledgers.sqlite"


@dataclass(frozen=True, eq=False)
class Bench:
    """A run folder, opened by one process."""

    folder: Path
    run: str
    config: Config
    index: data.Index
    trainer: Trainer
    ledger: Ledger

    @classmethod
    @lru_cache(maxsize=1)
    def open(cls, folder: Path) -> "Bench":
        """Load what a run folder names; once per process."""
        config = settings.read(folder / "config.toml")
        torch.set_num_threads(config.speed.threads)
        index = data.read_index(folder)
        run = (folder / "run-id").read_text().strip()
        trainer = Trainer.of(shared(config), config.speed.cache_mb)
        ledger = Ledger.open(folder / LEDGERS, owner=run)
        # the model lives as long as the process: no collection needs to walk through it again
        gc.collect()
        gc.freeze()
        return cls(folder, run, config, index, trainer, ledger)

    def tokenised(self, records: Sequence[data.Record]) -> list[data.Tokenised]:
        """Records as token ids; a class name becomes its number."""
        config, tokenizer = self.config, self.trainer.adapter.base.tokenizer
        found = data.tokenize(records, tokenizer, config.data.max_tokens, self.index.task)
        if not config.data.classes:
            return found
        numbers = {name: float(i) for i, name in enumerate(config.data.classes)}
        return [dataclasses.replace(one, label=numbers[str(one.label)]) for one in found]

    def device(self, number: int) -> "Device":
        """The simulated device of train user `number`."""
        return Device(self.index.train_users[number], self)


@dataclass(frozen=True, eq=False)
class Device:
    """One person's device."""

    name: str
    bench: Bench

    def records(self) -> Sequence[data.Tokenised]:
        """Own records for training: neither held out nor above the public cap."""
        bench, settings = self.bench, self.bench.config.data
        mine, _ = data.split(data.read_user(bench.folder, self.name, bench.index), settings.holdout)
        return bench.tokenised(data.capped(mine, settings.records_per_client))


def take_part(device: Device, plan: Plan, start: NDArray[np.float32]) -> bytes | None:
    """A client's round: check the plan, train, pass the gate.

    Returns:
        The bytes that leave, or None when the device declines. Why it declined stays in its own
        ledger. A round asked again gets the same bytes again and costs nothing.
    """
    bench, name = device.bench, device.name
    ledger, privacy = bench.ledger, bench.config.privacy
    try:
        plan.refuse_if_laxer(bench.config)
        _refuse_other_start(plan, start)
        kept = ledger.resend(name, plan.run, plan.round, plan.digest)
        if kept is not None:
            return kept
        # a device that may not release does not train either
        ledger.check(name, charges(plan, len(start), privacy), budgets(privacy), privacy.delta)
        seed = bench.config.insecure_test_seed
        label = f"{name} round {plan.round}"
        delta = train(
            bench.trainer,
            start,
            device.records(),
            plan,
            batches=_batches(seed, label),
            source=noise.source(seed, f"{label} training"),
        )
        layout = bench.trainer.adapter.layout.digest
        return release(
            delta, layout, plan, name, ledger, privacy, noise.source(seed, f"{label} release")
        )
    except (PrivacyError, ProtocolError) as refusal:
        ledger.decline(name, plan.run, plan.round, str(refusal))
        return None


def _refuse_other_start(plan: Plan, start: NDArray[np.float32]) -> None:
    if hashlib.sha256(start.tobytes()).hexdigest() != plan.start:
        raise ProtocolError(f"round {plan.round}: the adapter received is not the one announced")


def _batches(seed: int | None, label: str) -> np.random.Generator:
    """Which records are drawn: 128 bits of the operating system, or the test seed."""
    if seed is None:
        return np.random.default_rng(int.from_bytes(os.urandom(16)))
    return np.random.default_rng([seed, *label.encode()])
