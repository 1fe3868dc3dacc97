"""The installed SuperNode, started as it is but for its fixed sleeps, which fit what is going on.

    python -m privet.client.runtime.supernode --superlink HOST:PORT ...

The arguments are those of flower-supernode.

Flower 1.41's SuperNode sleeps 3 s whenever no message waits for it, looks for a reply every 0.5 s,
and sleeps 1 s where the SuperLink has listed a part of a message and not yet stored it. A masked
round has five exchanges, so a round in which nothing is computed would last 15 s, on any hardware,
and Flower has no setting for it. And 270 devices that are in no round keep a SuperLink busy with
their questions, at 11 ms of processor time each.

Here every sleep begins short and grows by a twentieth each time: a wait is prolonged by about a
twentieth of what it lasted. A device that nobody asks is quieter than Flower makes it, after four
minutes. A SuperLink that takes long to answer is asked less: at most an eleventh of the time, for
each device.

A message of which a part never comes, because the server died while sending it, is given up after
a minute; Flower's SuperNode would hear no other for eight, or 80 with its own waits.

And where Flower's SuperNode gives up, its process ends here. Flower's own goes on for ever, deaf:
it gives up for good at a TLS handshake that was cut short (a network that breaks, a server that
restarts), while its runtime API keeps the process alive, and no supervisor sees it.

A SuperNode that is killed cannot say so, the SuperLink takes it for online for 60 s more, and
refuses the next one with the same key. So a node writes down its id, in memory that the supervisor
holds, and the next one, which the supervisor starts only when it is dead, ends its place.

Every request to the SuperLink is seen, and what became of it is kept for `privet client status`
(`client/runtime/connection.py`); the log has privet's sentence instead of Flower's exit code.

Nothing else is changed: Flower's code, protocol, keys and arguments. Should a later 1.41 hold its
sleeps elsewhere, they stay as long as Flower made them; `tests/client/runtime/test_supernode.py`
notices.
"""

import functools
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec

from .connection import FILE, Watch, expiries

if TYPE_CHECKING:
    from flwr.proto.fleet_pb2 import ActivateNodeRequest, ActivateNodeResponse
    from flwr.supernode.fleet_http_client import FleetHttpClient

__all__ = ["PROGRAM", "Waits", "main", "taking_over"]

PROGRAM = "flower-supernode"
NO_MESSAGE_S = 3.0
GROWTH = 1.05
PATIENCE = 10
ROWS = {NO_MESSAGE_S: (0.1, 10.0), 0.5: (0.02, 0.5)}
"""Flower's sleep -> the first and the longest of a row in its place, seconds."""
PARTS = {"initial_backoff": 0.05, "backoff_cap": 1.0, "max_time": 60.0}
"""Seconds until the next question for a part that is not stored yet, which Flower doubles, and
after which the message is given up: a server that dies while it sends leaves it so for ever."""
DIGITS = 20
"""Of a node's id, 64 bits; always all of them, so that a shorter id leaves no rest of another."""

Activate = Callable[["FleetHttpClient", "ActivateNodeRequest"], "ActivateNodeResponse"]
Deactivate = Callable[["FleetHttpClient", int], None]

_P = ParamSpec("_P")


@dataclass
class Waits:
    """A stand-in for the module `time` in Flower's SuperNode, with a `sleep` of its own.

    The rest is `time`'s.

    A row of sleeps for one reason ends with the first sleep for another, and with a message that
    was answered. Within a row the time between two sleeps is what one question took.
    """

    pause: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic
    _reason: float = field(default=0.0, init=False)
    _next: float = field(default=0.0, init=False)
    _woke: float = field(default=0.0, init=False)

    def __getattr__(self, name: str) -> object:
        return getattr(time, name)

    def sleep(self, seconds: float) -> None:
        """Sleep a short while instead of `seconds`, a twentieth longer than the time before."""
        if seconds not in ROWS:
            self.pause(seconds)
            return
        first, longest = ROWS[seconds]
        asked = 0.0
        if seconds == self._reason:
            asked = self.clock() - self._woke
        else:
            self._reason, self._next = seconds, first
        self.pause(min(max(self._next, PATIENCE * asked), longest))
        self._next = min(self._next * GROWTH, longest)
        self._woke = self.clock()

    def anew_after(self, answered: Callable[_P, None]) -> Callable[_P, None]:
        """Wrap a function so that a row of sleeps ends with each call of it.

        The function may have answered without a sleep of its own.
        """

        def answered_then_anew(*args: _P.args, **named: _P.kwargs) -> None:
            answered(*args, **named)
            self._reason = 0.0

        return answered_then_anew


def taking_over(activate: Activate, deactivate: Deactivate, descriptor: int) -> Activate:
    """Wrap `activate` so that, where it is refused, it ends the dead node's place and tries again.

    Args:
        activate: a request's client and the request -> the response, with the node's id.
        deactivate: by client and node id.
        descriptor: of a file with the id of the node before this one, which is dead; nothing: none.
    """

    def activated(
        client: "FleetHttpClient", request: "ActivateNodeRequest"
    ) -> "ActivateNodeResponse":
        before = os.pread(descriptor, DIGITS, 0)
        try:
            response = activate(client, request)
        except Exception as refused:
            if not before.isdigit() or not hasattr(refused, "response"):
                raise
            deactivate(client, int(before))
            response = activate(client, request)
        os.pwrite(descriptor, str(response.node_id).zfill(DIGITS).encode(), 0)
        return response

    return activated


def main(descriptor: int | None = None, home: str | None = None) -> None:
    """Run `flower-supernode` with these waits, and end the process when it has ended.

    Args:
        descriptor: an open descriptor that the supervisor keeps, of an empty file at first.
        home: the folder where the connection's state is kept; None: nowhere.
    """
    from flwr.supernode import start_client_internal as node
    from flwr.supernode.cli import flower_supernode

    if getattr(node, "time", None) is time:
        waits = Waits()
        node.time = waits
        if hasattr(node, "_push_messages"):
            node._push_messages = waits.anew_after(node._push_messages)
    if hasattr(node, "pull_objects"):
        node.pull_objects = functools.partial(node.pull_objects, **PARTS)
    if descriptor is not None:
        _take_over(descriptor)
    if home is not None:
        _watch(Path(home))
    sys.argv[0] = PROGRAM
    try:
        flower_supernode()
        print(f"{PROGRAM} has lost its server", file=sys.stderr)
    except Exception:
        traceback.print_exc()
    # not `sys.exit`, which waits for the thread of the runtime API
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _take_over(descriptor: int) -> None:
    from flwr.proto.fleet_pb2 import DeactivateNodeRequest
    from flwr.supernode.fleet_http_client import FleetHttpClient as Fleet

    def deactivate(client: "FleetHttpClient", node: int) -> None:
        client.DeactivateNode(DeactivateNodeRequest(node_id=node))

    activate = taking_over(Fleet.ActivateNode, deactivate, descriptor)
    setattr(Fleet, "ActivateNode", activate)  # noqa: B010  (mypy knows it as a method)


def _watch(home: Path) -> None:
    """Watch every request of this process to the SuperLink that its arguments name."""
    from flwr.supernode.fleet_http_client import FleetHttpClient as Fleet

    server, roots = _argument("--superlink"), _argument("--root-certificates")

    def dates() -> tuple[float, ...]:
        return expiries(server, Path(roots).read_bytes() if roots else None)

    def say(sentence: str) -> None:
        print(f"{PROGRAM}: {sentence}", file=sys.stderr, flush=True)

    watch = Watch(home / FILE, server, say, dates)
    setattr(Fleet, "_unary_unary", watch.watched(Fleet._unary_unary))  # noqa: B010

    def wanted(record: logging.LogRecord) -> bool:
        return not (watch.failure and record.getMessage().startswith("Exit Code"))

    logging.getLogger("flwr").addFilter(wanted)


def _argument(option: str) -> str:
    return sys.argv[sys.argv.index(option) + 1] if option in sys.argv[:-1] else ""


if __name__ == "__main__":
    main()
