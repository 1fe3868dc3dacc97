"""Masked rounds of a simulated run, measured in a process of its own.

    python simulated_round.py '{"cohort": 1000, "people": 49000, "rounds": 1, "processes": 1}'

A file that is run by its path: what it imports as `privet` may be another commit's
(`__main__.py`). All is real, `experiments/engine.py` with its grid, both apps, ledgers, gate and
noise, but that training a device costs nothing: its delta is zero.
"""

import json
import os
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, TypedDict
from unittest import mock

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from privet.client import device
from privet.client.training.local_training import Trained
from privet.common.settings import config as settings
from privet.common.settings.config import Config
from privet.experiments import engine, simulate
from privet.experiments.data.made_model import save_made_model
from privet.server import rounds as server_rounds
from privet.server.round_record import read_records

WORDS = tuple(a + b for a in "bdgklm" for b in ("an", "er", "ir", "os", "uta"))
RECORDS = 4


class Measured(TypedDict):
    """What was measured: medians over the rounds, seconds by the clock but for `processor`.

    `peak_mb` counts what processes share once, `prepare_mb` is the peak of the first process before
    its rounds; both 2**20 bytes. `greeting_s` is all outside the rounds: greeting everybody, once.
    """

    seconds_per_round: float
    processor_s_per_round: float
    phases_s: dict[str, float]
    greeting_s: float
    peak_mb: float
    prepare_mb: float
    answered: list[int]
    threads: int
    load: float


def measured(cohort: int, people: int, rounds: int, processes: int) -> Measured:
    """Run masked rounds of a fresh run in this process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = _prepared(folder, cohort, people, rounds, processes)
        prepare_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        used: list[float] = []
        attempt = server_rounds.attempt

        def timed(*given: Any) -> Any:
            before = _processor_s()
            result = attempt(*given)
            used.append(_processor_s() - before)
            return result

        with (
            mock.patch.object(device, "train", _untrained),
            mock.patch.object(server_rounds, "attempt", timed),
            _memory() as peak,
        ):
            began = time.perf_counter()
            engine.run("local", folder / "run", config)
            whole_s = time.perf_counter() - began
        records = read_records(folder / "run")
    if any(record["void"] for record in records):
        raise RuntimeError("a round was void, and its seconds are not those of a round")
    return {
        "seconds_per_round": median(record["seconds"] for record in records),
        "processor_s_per_round": median(used),
        "phases_s": {
            phase: median(record["phases"][phase] for record in records)
            for phase in records[0]["phases"]
        },
        "greeting_s": whole_s - sum(record["seconds"] for record in records),
        "peak_mb": peak(),
        "prepare_mb": prepare_mb,
        "answered": [record["answered"] for record in records],
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
    }


def _prepared(folder: Path, cohort: int, people: int, rounds: int, processes: int) -> Config:
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 128}  # fmt: skip
    save_made_model(folder / "model", WORDS, size, seed=1)
    source = folder / "people.jsonl"
    with source.open("w") as file:
        for number in range(people):
            for k in range(RECORDS):
                text = " ".join(WORDS[(number + k * n) % len(WORDS)] for n in range(1, 9))
                print(json.dumps({"user": f"person {number}", "text": text}), file=file)
    config = settings.parse(
        {
            "name": "masking",
            "data": {"source": str(source), "clients": people, "test_clients": 0,
                     "min_records": 1, "records_per_client": RECORDS, "max_tokens": 16},
            "model": {"base": str(folder / "model")},
            "adapter": {"rank": 4, "last_blocks": 2},
            "training": {"batch_size": 4},
            "rounds": {"count": rounds, "cohort": cohort},
            "privacy": {"budget": {"client": 1e4, "example": 1e4}},
            "secure_aggregation": {"colluding": 0.1},
            "head": {"enabled": False},
            "speed": {"threads": 1} | ({"processes": processes} if processes > 1 else {}),
        }
    )  # fmt: skip
    return simulate.prepare(config, folder / "run", resume=False)


def _untrained(_trainer: object, start: NDArray[np.float32], *_: object, **__: object) -> Trained:
    return Trained(np.zeros(len(start), np.float32), np.zeros(0))


def _processor_s() -> float:
    """Processor seconds so far of this process and of those it has forked."""
    here = psutil.Process()
    return sum(sum(one.cpu_times()[:2]) for one in (here, *here.children(recursive=True)))


@contextmanager
def _memory() -> Iterator[Callable[[], float]]:
    """Watch the memory of this process and of those it forks, what they share counted once, MB."""
    most, over = 0.0, threading.Event()

    def watch() -> None:
        nonlocal most
        here = psutil.Process()
        while not over.wait(0.5):
            found = 0.0
            for one in (here, *here.children(recursive=True)):
                try:
                    found += one.memory_full_info().pss / 2**20
                except psutil.Error:
                    continue
            most = max(most, found)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield lambda: most
    finally:
        over.set()
        watcher.join()


if __name__ == "__main__":
    print(json.dumps(measured(**json.loads(sys.argv[1]))))
