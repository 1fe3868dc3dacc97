"""Flower's simulation (Ray) of the work: see `__main__.py`.

Flower's own FedAvg behind its wrapper for differential privacy (fixed clipping, central noise). The
model is loaded once in each of Ray's processes, as Flower's documentation advises.

    python flower_peer.py MODEL COHORT ROUNDS PROCESSES
"""

import functools
import os
import sys
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import torch
import work
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg
from flwr.simulation import run_simulation

FOLDER, KEPT = "PRIVET_SIMULATORS_MODEL", "PRIVET_SIMULATORS_KEPT"

client_app, server_app = ClientApp(), ServerApp()
times: list[float] = []


def loaded() -> work.Client:
    """Load the model."""
    return work.Client(Path(os.environ[FOLDER]))


kept = functools.lru_cache(maxsize=1)(loaded)


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Take a client's steps from the adapter in the message."""
    client = kept() if os.environ[KEPT] else loaded()
    client.start = list(message.content["arrays"].to_torch_state_dict().values())
    records = torch.tensor(work.records_of(int(context.node_config["partition-id"])))
    moved = zip(client.start, client.train(records), strict=True)
    arrays = ArrayRecord({str(number): start + by for number, (start, by) in enumerate(moved)})
    metrics = MetricRecord({"num-examples": work.RECORDS})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


class Timed(FedAvg):
    """FedAvg that notes when each round begins."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Note the time, and go on."""
        times.append(time.perf_counter())
        return super().configure_train(server_round, arrays, config, grid)


def main(cohort: int, rounds: int, processes: int) -> None:
    """Run the rounds; the first, in which Ray's processes load the model, is not timed."""

    @server_app.main()
    def serve(grid: Grid, _: Context) -> None:
        start = {str(number): one for number, one in enumerate(loaded().start)}
        strategy = DifferentialPrivacyServerSideFixedClipping(
            Timed(fraction_train=1.0, fraction_evaluate=0.0, min_available_nodes=cohort),
            noise_multiplier=1.0,
            clipping_norm=1.0,
            num_sampled_clients=cohort,
        )
        strategy.start(grid, ArrayRecord(start), num_rounds=rounds + 1)
        seconds = time.perf_counter() - times[1]
        work.said(clients_per_s=cohort * rounds / seconds, version=version("flwr"))

    run_simulation(
        server_app,
        client_app,
        num_supernodes=cohort,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": processes},
        },
    )


if __name__ == "__main__":
    import flower_peer  # by its name: Ray's processes find what is in it by that

    os.environ[FOLDER], os.environ[KEPT] = sys.argv[1], "".join(sys.argv[5:])
    flower_peer.main(*map(int, sys.argv[2:5]))
