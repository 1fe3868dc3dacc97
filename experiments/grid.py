"""A Flower grid in this process: the ServerApp's messages go straight to the ClientApp.

No start-up, one process, deterministic, debuggable. A message is handled when its reply is
pulled, so a cohort of any size holds one contribution at a time, or those of `together`. What a
client raises, the run raises: in a simulation a broken device is a bug, not weather.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = ["App", "Done", "LocalGrid", "Together"]

App = Callable[[Message, Context], Message]
Done = Callable[[str, float], None]
T = TypeVar("T")

RUN_ID = 1
SERVER = 1
FIRST_NODE = 2


def _nothing(*_: object) -> None:
    pass


@dataclass(frozen=True)
class Together:
    """What is done for several messages at once, before each of them is handled.

    Attributes:
        count: how many messages.
        ahead: what is done, with each message's partition number.
    """

    count: int = 1
    ahead: Callable[[Sequence[tuple[int, Message]]], None] = _nothing

    def parts(self, messages: Sequence[T]) -> list[Sequence[T]]:
        """Divide messages, in their order, into those that are handled together."""
        return [messages[n : n + self.count] for n in range(0, len(messages), self.count)]


class LocalGrid(Grid):
    """`clients` nodes, each with its number as Flower's `partition-id`.

    Args:
        app: the ClientApp every node runs.
        clients: how many nodes there are.
        run: the run folder, given to the clients as run configuration.
        done: told of each reply what kind of message it answers, and the seconds it took.
        together: what is done for several messages at once.
    """

    def __init__(
        self,
        app: App,
        clients: int,
        run: str,
        done: Done = _nothing,
        together: Together = Together(),
    ) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN_ID, SERVER
        self._app, self._done, self._together = app, done, together
        self._clients = clients
        self._run_config = {"run": run}
        self._pending: dict[str, Message] = {}
        self._states: dict[int, RecordDict] = {}
        self._ids = itertools.count(1)

    def set_run(self, run: Run) -> None:
        """Do nothing, as there is one run."""

    @property
    def run(self) -> Run:
        """The one run of this grid."""
        return Run.create_empty(run_id=RUN_ID)

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Make a message the older way, which the base class still has."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return all nodes, which are always there."""
        return range(FIRST_NODE, FIRST_NODE + self._clients)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Keep the messages until their replies are pulled."""
        pushed = []
        for message in messages:
            name = str(next(self._ids))
            message.metadata.__dict__["_message_id"] = name
            self._pending[name] = message
            pushed.append(name)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """Handle the messages in the order they were sent, one reply at a time."""
        names = sorted(set(message_ids) & set(self._pending), key=int)
        for some in self._together.parts(names):
            messages = [self._pending.pop(name) for name in some]
            for message, (reply, seconds) in zip(messages, self._handled(messages), strict=True):
                self._done(message.metadata.message_type, seconds)
                yield reply

    def _handled(self, messages: Sequence[Message]) -> Iterator[tuple[Message, float]]:
        """Run the app on each message: its reply, and its share of the seconds."""
        began = time.perf_counter()
        self._together.ahead([(one.metadata.dst_node_id - FIRST_NODE, one) for one in messages])
        share = (time.perf_counter() - began) / len(messages)
        for message in messages:
            began, node = time.perf_counter(), message.metadata.dst_node_id
            state = self._states.setdefault(node, RecordDict())
            where = {"partition-id": node - FIRST_NODE, "num-partitions": self._clients}
            reply = self._app(message, Context(RUN_ID, node, where, state, self._run_config))
            yield reply, time.perf_counter() - began + share

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Push the messages, then pull their replies."""
        del timeout  # nothing is ever late here
        return self.pull_messages(self.push_messages(messages))
