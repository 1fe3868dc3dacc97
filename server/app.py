"""Flower's edge at the server: a run with a `Grid` for its wire. No logic."""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message
from flwr.serverapp import Grid, ServerApp
from numpy.typing import NDArray

from ..common.errors import ConfigError
from ..common.privacy.round_plan import Plan
from ..common.settings import config as settings
from ..common.settings.config import Config
from ..common.settings.sections import DEVICES
from .directory_listing import Listing
from .participants import Participants
from .replies import addressed, enough_s, replies
from .rounds import Reply, ServedRun, Show
from .run_folder.run import run_to_completion

if TYPE_CHECKING:
    from .operations.attendance import Attendance

app = ServerApp()

HELLO_S = 5.0  # a later answer counts too
SIMULATED_S = 30 * 86400.0
WITH_ADAPTER = ("round", "vector")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Serve the run that `flwr run` or `privet simulate --engine ray` started."""
    from .run_folder.run_lock import locked  # a local simulation is one process anyway

    folder = context.run_config.get("run") or os.environ.get("PRIVET_RUN")
    if not folder:
        raise ConfigError(
            "this run has no folder: make one with `privet simulate CONFIG --prepare-only`, and "
            "name it with --run-config 'run=\"/absolute/path\"'"
        )
    with locked(Path(str(folder)), context.run_id):
        serve(grid, Path(str(folder)), print)


def serve(grid: Grid, folder: Path, show: Show) -> None:
    """Run all rounds of the run in `folder`.

    At the end the adapter is there as a PEFT folder.
    """
    wire = _Wire.of(grid, folder)
    config, run, listing = wire.config, wire.run, wire.listing
    attendance, now = _attendance(folder) if wire.real else None, listing.directory
    participants = Participants(
        grid.get_node_ids, wire.hello, now(), config, run, attendance=attendance, newest=now
    )
    ask = partial(wire.ask, participants)
    final = run_to_completion(
        ServedRun(config, run, folder, ask, participants.present, show, participants.greet)
    )
    if wire.real:
        wire.end(set(grid.get_node_ids()) & set(participants.accepted.values()), final)


def _attendance(folder: Path) -> "Attendance | None":
    from .operations.attendance import of_run  # the operator's side, which a simulation has not

    return of_run(folder)


@dataclass(frozen=True, eq=False)
class _Wire:
    """The messages of one run to its devices, and what is known of their replies.

    Attributes:
        grid: Flower's.
        config: of the run.
        run: its id.
        offer: what a greeting says of it.
        listing: the directory, and what each device lacks of it.
        unheard: ids of greetings whose late answers are still welcome.
    """

    grid: Grid
    config: Config
    run: str
    offer: Mapping[str, str]
    listing: Listing
    unheard: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, grid: Grid, folder: Path) -> "_Wire":
        """The wire of the run in `folder`."""
        run = (folder / "run-id").read_text().strip()
        text = (folder / "config.toml").read_text("utf-8")
        offer = {"version": version("privet"), "run": run, "config": text}
        return cls(grid, settings.of_run(folder), run, offer, Listing(folder))

    @property
    def real(self) -> bool:
        """Whether the devices are people's own."""
        return self.config.data.source == DEVICES

    def _within(self, seconds: float) -> float:
        """Return the time limit for real devices, or the long one for simulated ones.

        Simulated devices answer when they are computed, on a busy machine late, and a run's results
        do not hang on how busy it is.
        """
        return seconds if self.real else SIMULATED_S

    def hello(
        self, nodes: Iterable[int], nonce: bytes
    ) -> Iterator[tuple[int, Mapping[str, object]]]:
        """Greet nodes, and yield which one answers what."""
        nodes = list(nodes)
        limit, outgoing = self._within(enough_s(len(nodes), HELLO_S)), []
        for node in nodes:
            offer = ConfigRecord({**self.offer, **self.listing.offer(node), "nonce": nonce})
            outgoing.append(addressed({"offer": offer}, node, "query.hello", limit))
        for message in replies(self.grid, outgoing, limit, self.unheard):
            node, reply = message.metadata.src_node_id, dict(message.content.get("hello") or {})
            self.listing.heard(node, reply)
            yield node, reply

    def ask(
        self,
        participants: Participants,
        phase: str,
        messages: Mapping[int, bytes],
        plan: Plan,
        start: NDArray[np.float32],
    ) -> Iterator[Reply]:
        """Send a phase's messages to the devices of a round, and yield the replies."""
        common = {"plan": ConfigRecord(plan.to_dict())}
        if phase in WITH_ADAPTER:
            common["adapter"] = ArrayRecord({"vector": Array(start)})
        rounds = self.config.rounds
        limit = rounds.timeout_s
        if phase not in WITH_ADAPTER or self.config.ab_run is not None:  # which trains nothing
            limit = min(limit, rounds.answer_timeout_s)
        limit, outgoing = self._within(limit), []
        for number, message in messages.items():
            content = {**common, "protocol": ConfigRecord({"message": message, "client": number})}
            outgoing.append(
                addressed(content, participants.accepted[number], f"train.{phase}", limit)
            )
        numbers = {node: number for number, node in participants.accepted.items()}
        for message in replies(self.grid, outgoing, limit):
            yield _reply(message, numbers[message.metadata.src_node_id])

    def end(self, nodes: Iterable[int], final: NDArray[np.float32]) -> None:
        """Tell devices that the run is over, and what it came to."""
        content = {"offer": ConfigRecord(dict(self.offer))}
        content["adapter"] = ArrayRecord({"vector": Array(final)})
        rounds = self.config.rounds
        limit = rounds.timeout_s if self.config.ab_run is None else rounds.answer_timeout_s
        ends = [addressed(content, node, "query.keep", limit) for node in nodes]
        for _ in replies(self.grid, ends, limit):
            pass


def _reply(message: Message, number: int) -> Reply:
    """Read a device's reply. One of another shape is an empty vector.

    Whose it is says the node it came from.
    """
    reply = message.content.get("reply")
    if not isinstance(reply, ConfigRecord) or not isinstance(reply.get("vector"), bytes):
        return Reply(number, b"")
    return Reply(number, reply["vector"] if reply.get("released") else None)
