"""Flower's edge at the server: `run_rounds` with a `Grid` for its wire. No logic."""

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp
from numpy.typing import NDArray

from ..common import config as settings
from ..common.adapter import shared
from ..common.errors import ConfigError, ProtocolError, StateError
from ..common.plan import Plan
from .rounds import Reply, Show, run_rounds

app = ServerApp()

POLL_S = 0.1
WITH_ADAPTER = ("round", "vector")

logger = logging.getLogger(__name__)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """The run that `flwr run` or `privet simulate --engine ray` started."""
    folder = context.run_config.get("run") or os.environ.get("PRIVET_RUN")
    if not folder:
        raise ConfigError(
            "this run has no folder: make one with `privet simulate CONFIG --prepare-only`, and "
            "name it with --run-config 'run=\"/absolute/path\"'"
        )
    serve(grid, Path(str(folder)), print)


def serve(grid: Grid, folder: Path, show: Show) -> None:
    """All rounds of the run in `folder`; at the end the adapter is there as a PEFT folder."""
    config = settings.read(folder / "config.toml")
    adapter = shared(config)
    nodes = enrolled(grid, config.data.clients, config.rounds.timeout_s)
    numbers = {node: number for number, node in nodes.items()}

    def ask(
        phase: str, messages: Mapping[int, bytes], plan: Plan, start: NDArray[np.float32]
    ) -> Iterator[Reply]:
        common = {"plan": ConfigRecord(plan.to_dict())}
        if phase in WITH_ADAPTER:
            common["adapter"] = ArrayRecord({"vector": Array(start)})
        outgoing = [
            _message(
                RecordDict({**common, "protocol": ConfigRecord({"message": message})}),
                f"train.{phase}",
                nodes[number],
            )
            for number, message in messages.items()
        ]
        for message in exchange(grid, outgoing, config.rounds.timeout_s):
            yield _reply(message, numbers[message.metadata.src_node_id])

    run = (folder / "run-id").read_text().strip()
    final = run_rounds(ask, config, run, adapter.layout.digest, adapter.start, folder, show)
    adapter.write(final)
    adapter.save(folder / "adapter")


def enrolled(grid: Grid, clients: int, timeout_s: float) -> Mapping[int, int]:
    """The clients' own numbers -> node ids; all must run this version of privet.

    Raises:
        StateError: not everybody came before the timeout.
        ProtocolError: a node runs another version.
    """
    limit, nodes = time.monotonic() + timeout_s, dict[int, int]()
    while len(ids := list(grid.get_node_ids())) < clients and time.monotonic() < limit:
        time.sleep(POLL_S)
    mine = version("privet")
    for message in exchange(
        grid, [_message(RecordDict(), "query.hello", i) for i in ids], timeout_s
    ):
        hello, node = message.content["hello"], message.metadata.src_node_id
        if hello["version"] != mine:
            raise ProtocolError(f"node {node} runs privet {hello['version']}, this server {mine}")
        nodes[int(hello["client"])] = node
    if sorted(nodes) != list(range(clients)):
        raise StateError(f"expected {clients} clients, {len(nodes)} answered in {timeout_s:g} s")
    return nodes


def exchange(grid: Grid, messages: Sequence[Message], timeout_s: float) -> Iterator[Message]:
    """Send all, yield replies as they arrive; failed and late clients are counted and left out."""
    limit = time.monotonic() + timeout_s
    waiting = set(grid.push_messages(messages))
    failed: list[str] = []
    while waiting and time.monotonic() < limit:
        arrived = 0
        for message in grid.pull_messages(waiting):
            arrived += 1
            waiting.discard(message.metadata.reply_to_message_id)
            if message.has_error():
                failed.append(message.error.reason)
            else:
                yield message
        if not arrived:
            time.sleep(POLL_S)
    if failed:
        logger.warning("%d nodes failed and are left out; the first: %s", len(failed), failed[0])
    if waiting:
        logger.warning("%d nodes did not answer within %g s", len(waiting), timeout_s)


def _reply(message: Message, number: int) -> Reply:
    """Whose it is says the node it came from; a reply of another shape is an empty vector."""
    reply = message.content.get("reply")
    if not isinstance(reply, ConfigRecord) or not isinstance(reply.get("vector"), bytes):
        return Reply(number, b"")
    return Reply(number, reply["vector"] if reply.get("released") else None)


def _message(content: RecordDict, kind: str, node: int) -> Message:
    return Message(content, node, kind)
