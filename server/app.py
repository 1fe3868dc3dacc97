"""Flower's edge at the server: a run with a `Grid` for its wire. No logic."""

import os
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message
from flwr.serverapp import Grid, ServerApp
from numpy.typing import NDArray

from ..common.errors import ConfigError
from ..common.privacy.round_plan import Plan
from ..common.settings import config as settings
from ..common.settings.sections import DEVICES
from .operations.attendance import of_run
from .operations.directory_listing import Listing
from .participants import Participants
from .replies import addressed, enough_s, replies
from .rounds import Reply, Show
from .run_folder.run import whole
from .run_folder.run_lock import alone

app = ServerApp()

HELLO_S = 5.0  # a later answer counts too
SIMULATED_S = 30 * 86400.0
WITH_ADAPTER = ("round", "vector")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Serve the run that `flwr run` or `privet simulate --engine ray` started."""
    folder = context.run_config.get("run") or os.environ.get("PRIVET_RUN")
    if not folder:
        raise ConfigError(
            "this run has no folder: make one with `privet simulate CONFIG --prepare-only`, and "
            "name it with --run-config 'run=\"/absolute/path\"'"
        )
    with alone(Path(str(folder)), context.run_id):
        serve(grid, Path(str(folder)), print)


def serve(grid: Grid, folder: Path, show: Show) -> None:
    """Run all rounds of the run in `folder`.

    At the end the adapter is there as a PEFT folder.
    """
    config = settings.of_run(folder)
    run = (folder / "run-id").read_text().strip()
    text = (folder / "config.toml").read_text("utf-8")
    offer = {"version": version("privet"), "run": run, "config": text}

    real = config.data.source == DEVICES
    unheard: set[str] = set()

    def within(seconds: float) -> float:
        """Return the time limit for real devices, or the long one for simulated ones.

        Simulated devices answer when they are computed, on a busy machine late, and a run's results
        do not hang on how busy it is.
        """
        return seconds if real else SIMULATED_S

    def hello(nodes: Iterable[int], nonce: bytes) -> Iterator[tuple[int, Mapping[str, Any]]]:
        nodes = list(nodes)
        limit = within(enough_s(len(nodes), HELLO_S))
        said = {n: ConfigRecord({**offer, **listing.offer(n), "nonce": nonce}) for n in nodes}
        outgoing = [addressed({"offer": said[n]}, n, "query.hello", limit) for n in nodes]
        for message in replies(grid, outgoing, limit, unheard):
            node, reply = message.metadata.src_node_id, dict(message.content.get("hello") or {})
            listing.heard(node, reply)
            yield node, reply

    listing = Listing(folder)
    crowd = Participants(
        grid.get_node_ids,
        hello,
        listing.directory(),
        config,
        run,
        attendance=of_run(folder),
        newest=listing.directory,
    )

    def ask(
        phase: str, messages: Mapping[int, bytes], plan: Plan, start: NDArray[np.float32]
    ) -> Iterator[Reply]:
        common = {"plan": ConfigRecord(plan.to_dict())}
        if phase in WITH_ADAPTER:
            common["adapter"] = ArrayRecord({"vector": Array(start)})
        limit = config.rounds.timeout_s
        if phase not in WITH_ADAPTER or config.ab_run is not None:  # which trains nothing
            limit = min(limit, config.rounds.answer_timeout_s)
        limit = within(limit)
        outgoing = []
        for number, message in messages.items():
            content = {**common, "protocol": ConfigRecord({"message": message, "client": number})}
            outgoing.append(addressed(content, crowd.accepted[number], f"train.{phase}", limit))
        numbers = {node: number for number, node in crowd.accepted.items()}
        for message in replies(grid, outgoing, limit):
            yield _reply(message, numbers[message.metadata.src_node_id])

    final = whole(ask, config, run, folder, show, crowd.present, crowd.greet)
    if real:
        content = {"offer": ConfigRecord(offer), "adapter": ArrayRecord({"vector": Array(final)})}
        nodes = set(grid.get_node_ids()) & set(crowd.accepted.values())
        limit = config.rounds.timeout_s if config.ab_run is None else config.rounds.answer_timeout_s
        ends = [addressed(content, node, "query.keep", limit) for node in nodes]
        for _ in replies(grid, ends, limit):
            pass


def _reply(message: Message, number: int) -> Reply:
    """Read a device's reply. One of another shape is an empty vector.

    Whose it is says the node it came from.
    """
    reply = message.content.get("reply")
    if not isinstance(reply, ConfigRecord) or not isinstance(reply.get("vector"), bytes):
        return Reply(number, b"")
    return Reply(number, reply["vector"] if reply.get("released") else None)
