"""What a message costs beyond training, in the in-process grid, at 10 and at 1,000 clients.

    python -m privet.experiments.benchmarks.message_cost [--clients 10,1000] [--rank 4]

The real ServerApp and ClientApp exchange real messages through `LocalGrid`: plan and adapter out,
`take_part` on the device (plan check, ledger, gate, noise, commit to disk), packed vector back,
sum at the server. Only local training is replaced, by a random delta of the same shape: it is the
cost beyond training that is measured. Beside it, in the same run: the bare ClientApp call with an
empty message.
"""

import json
import os
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from numpy.typing import NDArray

from ...client import app as client_app
from ...client import device, simulated
from ...client.training.local_training import Trained
from ...common.settings import config as settings
from ...common.settings.config import Config
from ...server import app as server_app
from ...server.replies import replies
from .. import simulate
from ..grid import LocalGrid
from .harness import command


def main(
    clients: str = "10,1000", rounds: int = 3, base: str = "smollm2-135m-instruct", rank: int = 4
) -> dict[str, object]:
    """Milliseconds a message for each number of clients."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # as the privet command sets it
    torch.set_num_threads(2)
    return {"runs": [measure(int(n), rounds, base, rank) for n in clients.split(",")]}


def measure(clients: int, rounds: int, base: str, rank: int) -> dict[str, float]:
    """Measure milliseconds a message, training excluded, with all clients in every round."""
    with tempfile.TemporaryDirectory() as folder:
        config = _prepare(Path(folder), clients, rounds, base, rank)
        run = Path(folder) / "run"
        config = simulate.prepare(config, run, resume=False)
        simulated.SimulatedContext.open(run)  # loading the model is not a message
        grid = LocalGrid(client_app.app, clients, str(run))
        rng = np.random.default_rng(0)

        def random_delta(
            _trainer: object, start: NDArray[np.float32], *_: object, **__: object
        ) -> Trained:
            delta = rng.normal(size=len(start)).astype(np.float32)
            return Trained(delta, np.zeros(0))

        with mock.patch.object(device, "train", random_delta):
            began = time.perf_counter()
            nodes = list(grid.get_node_ids())
            offer = RecordDict({"offer": ConfigRecord({"run": "benchmark", "nonce": bytes(32)})})
            greetings = [Message(offer, node, "query.hello") for node in nodes]
            list(replies(grid, greetings, 60.0))
            hello = time.perf_counter() - began
            began, ends = time.perf_counter(), []
            server_app.serve(grid, run, lambda _: ends.append(time.perf_counter()))
    # the first round makes the tables of the noise and of the accountant: start-up, shown apart
    messages = clients * rounds
    return {
        "clients": clients,
        "rounds": rounds,
        "messages": messages,
        "first_round_s": ends[0] - began,
        "ms_per_message": 1e3 * (ends[-1] - ends[0]) / messages,
        "ms_per_empty_message": 1e3 * hello / len(nodes),
    }


def _prepare(folder: Path, clients: int, rounds: int, base: str, rank: int) -> Config:
    people = folder / "people.jsonl"
    lines = (
        json.dumps({"user": f"u{i}", "text": f"record {k} of somebody"})
        for i in range(clients)
        for k in range(4)
    )
    people.write_text("\n".join(lines) + "\n")
    return settings.parse(
        {
            "name": "benchmark",
            "data": {"source": str(people), "clients": clients, "test_clients": 0, "min_records": 1,
                     "records_per_client": 16},
            "model": {"base": base},
            "adapter": {"rank": rank},
            "rounds": {"count": rounds + 1, "cohort": clients},
            "privacy": {
                "client": {"noise_at": "server"},
                "budget": {"client": 1000.0, "example": 1000.0},
            },
        }
    )  # fmt: skip


if __name__ == "__main__":
    command(main)
