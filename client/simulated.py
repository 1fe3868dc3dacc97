"""Simulated devices: what all of them in one process share, and what only they can do together.

A simulated device answers a round as a person's own does (`client/device.py`); this is what it
works with, a run's folder. Nothing here serves a person's own device.
"""

import gc
import hashlib
import multiprocessing
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ..common.files import explain_os_errors, write_atomic
from ..common.model.adapter import shared
from ..common.privacy.round_plan import Plan
from ..common.secure_aggregation.keys import (
    Directory,
    Identity,
    Purpose,
    RoundKey,
    Secret,
    derive,
    read_directory,
)
from ..common.settings import config as settings
from ..common.settings.config import Config
from .device import (
    Device,
    Learnt,
    chosen_cluster,
    exchange_at,
    randomness_of,
    step_shape,
    tokenised,
)
from .privacy.ledger import Ledger
from .privacy.run_ledger import run_id, run_ledger
from .privacy.simulated_agreements import SimulatedAgreements
from .training import records as data
from .training.constant_work import work_of
from .training.local_training import Trainer
from .training.side_by_side import Task, can_share, train_side_by_side

__all__ = [
    "AT_HOME",
    "DEVICE_SECRET",
    "DIRECTORY",
    "SimulatedContext",
    "learn_together",
    "simulated_identity",
]

DEVICE_SECRET = "device-secret"
AT_HOME = "at-home"
DIRECTORY = "directory"


def simulated_identity(secret: Secret, name: str) -> Identity:
    """Derive the identity of a simulated device from the run's secret.

    A real device keeps its own in its vault.
    """
    return Identity.of(derive(secret, Purpose.SIMULATED_IDENTITY, name.encode()).value)


@dataclass(frozen=True, eq=False)
class SimulatedContext:
    """A run folder opened by one process, which all simulated devices in it share."""

    folder: Path
    run: str
    config: Config
    index: data.Index
    trainer: Trainer
    ledger: Ledger
    secret: Secret
    directory: Directory
    learnt: dict[tuple[str, str], Learnt] = field(default_factory=dict, repr=False)

    @classmethod
    @lru_cache(maxsize=1)
    def open(cls, folder: Path) -> "SimulatedContext":
        """Load what a run folder names, once per process."""
        config = settings.of_run(folder)
        if multiprocessing.parent_process() is None:  # a forked one keeps to its one thread
            torch.set_num_threads(config.speed.threads)
        index = data.read_index(folder)
        run = run_id(folder)
        ledger = run_ledger(folder, run)
        trainer = Trainer.of(shared(config), config.speed.cache_mb, config.pairs)
        # the model lives as long as the process: no collection needs to walk through it again
        gc.collect()
        gc.freeze()
        secret = Secret((folder / DEVICE_SECRET).read_bytes())
        directory = read_directory(folder / DIRECTORY)
        return cls(folder, run, config, index, trainer, ledger, secret, directory)

    def records(self, name: str) -> Sequence[data.Record]:
        """Read one person's records from the run folder."""
        return data.read_user(self.folder, name, self.index)

    def tokenised(self, records: Sequence[data.Record]) -> list[data.Tokenised]:
        """Return records as token ids, for the run's task."""
        return tokenised(records, self.config, self.trainer, self.index.task)

    def outcome(self, _: str) -> None:
        """Return None, because `privet ab` simulates experiments without Flower."""

    def local_factor(self, name: str) -> bytes | None:
        """Read the part of the adapter that stays with the device from its file."""
        path = self._home_of(name)
        with explain_os_errors(path, "read"):
            return path.read_bytes() if path.exists() else None

    def keep_local_factor(self, name: str, kept: bytes) -> None:
        """Write the part of the adapter that stays with the device into its file."""
        path = self._home_of(name)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        write_atomic(path, kept)

    def taught(self, name: str, plan: Plan) -> "Learnt | None":
        """Return what `learn_together` has trained for this device, once."""
        return self.learnt.pop((name, plan.digest), None)

    @property
    def pace(self) -> None:
        """None, because a simulated device answers when it has done its work."""

    def _home_of(self, name: str) -> Path:
        return (
            self.folder / AT_HOME / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.safetensors"
        )

    def number(self, name: str) -> int:
        """Return the person's place among the train users."""
        return self._numbers[name]

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.index.train_users)}

    def pin(self, directory: Directory) -> None:
        """Keep nothing, because the directory of a simulation is whole."""

    def agreement(self, key: RoundKey) -> Callable[[bytes], Secret]:
        """Agree with other simulated devices, each pair once for its two ends."""
        return self._agreements.of(key)

    @cached_property
    def _agreements(self) -> SimulatedAgreements:
        return SimulatedAgreements()

    def identity(self, name: str) -> Identity:
        """Derive a simulated device's long-lived key pair from the secret of the run's devices."""
        return simulated_identity(self.secret, name)

    def device(self, number: int) -> Device:
        """Return the simulated device of train user `number`."""
        return Device(self.index.train_users[number], self)


def learn_together(
    context: SimulatedContext, devices: Sequence[Device], plan: Plan, start: NDArray[np.float32]
) -> None:
    """Train simulated devices of a round in one batch, before each of them is asked for it.

    What a device does with it is the same as ever (`take_part`): it checks the plan, its budget and
    passes the gate. Where they cannot share a batch, nothing is done here.
    """
    trainer = context.trainer
    if work_of(context.config, plan) is not None or not can_share(trainer, plan):
        return
    shape = step_shape(context, None)
    context.learnt.clear()  # of devices that died before they were asked
    cluster_vectors = exchange_at(context).cluster_vectors(start)
    groups = defaultdict[int, list[tuple[Device, Sequence[data.Tokenised]]]](list)
    for device in devices:
        records = device.records()
        groups[chosen_cluster(device, plan, cluster_vectors, records, None)].append(
            (device, records)
        )
    for cluster, members in groups.items():
        tasks = [Task(records, randomness_of(device, plan)) for device, records in members]
        found = train_side_by_side(trainer, cluster_vectors[cluster], tasks, plan, shape)
        for (device, _), trained in zip(members, found, strict=True):
            context.learnt[device.name, plan.digest] = Learnt(cluster, None, trained)
