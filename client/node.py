"""Starts the installed SuperNode as it is, with its two fixed sleeps shortened where it matters.

    python -m privet.client.node --superlink HOST:PORT ...    the arguments of flower-supernode

Flower 1.41's SuperNode sleeps 3 s whenever no message waits for it, and looks for a reply every
0.5 s. A masked round has five exchanges, so a round in which nothing is computed would last 15 s,
on any hardware, and Flower has no setting for it. Here both sleeps begin short and grow by a
twentieth each time, up to Flower's own length: a wait is prolonged by about a twentieth of what it
lasted, and a device that nobody asks is as quiet as Flower makes it, after one minute. A SuperLink
that takes long to answer is asked less: at most an eleventh of the time, for each device.

And where Flower's SuperNode gives up, its process ends here. Flower's own goes on for ever, deaf:
it gives up for good at a TLS handshake that was cut short (a network that breaks, a server that
restarts), while its runtime API keeps the process alive, and no supervisor sees it.

A SuperNode that is killed cannot say so, the SuperLink takes it for online for 60 s more, and
refuses the next one with the same key. So a node writes down its id, in memory that the supervisor
holds, and the next one, which the supervisor starts only when it is dead, ends its place.

Nothing else is changed: Flower's code, protocol, keys and arguments. Should a later 1.41 hold its
sleeps elsewhere, they stay as long as Flower made them; `tests/test_node.py` notices.
"""

import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

__all__ = ["PROGRAM", "Waits", "main", "taking_over"]

PROGRAM = "flower-supernode"
NO_MESSAGE_S = 3.0
GROWTH = 1.05
PATIENCE = 10
FIRST_S = {NO_MESSAGE_S: 0.1, 0.5: 0.02}
"""Flower's sleep -> the first of a row in its place, seconds."""
DIGITS = 20
"""Of a node's id, 64 bits; always all of them, so that a shorter id leaves no rest of another."""

Activate = Callable[[Any, Any], Any]
Deactivate = Callable[[Any, int], None]


@dataclass
class Waits:
    """Stands for the module `time` in Flower's SuperNode: `sleep` is its own, the rest is `time`'s.

    A row of sleeps for one reason ends with the first sleep for another. Within a row the time
    between two sleeps is what one question took.
    """

    pause: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic
    _reason: float = field(default=0.0, init=False)
    _next: float = field(default=0.0, init=False)
    _woke: float = field(default=0.0, init=False)

    def __getattr__(self, name: str) -> object:
        return getattr(time, name)

    def sleep(self, seconds: float) -> None:
        """Instead of so many seconds: a short while, a twentieth longer than the time before."""
        if seconds not in FIRST_S:
            self.pause(seconds)
            return
        asked = 0.0
        if seconds == self._reason:
            asked = self.clock() - self._woke
        else:
            self._reason, self._next = seconds, FIRST_S[seconds]
        self.pause(min(max(self._next, PATIENCE * asked), seconds))
        self._next = min(self._next * GROWTH, seconds)
        self._woke = self.clock()


def taking_over(activate: Activate, deactivate: Deactivate, place: int) -> Activate:
    """`activate`, but where it is refused it ends the place of the node before, and tries again.

    Args:
        activate: a request's client and the request -> the response, with the node's id.
        deactivate: by client and node id.
        place: descriptor of the id of the node before this one, which is dead; nothing: none.
    """

    def activated(client: Any, request: Any) -> Any:
        before = os.pread(place, DIGITS, 0)
        try:
            found = activate(client, request)
        except Exception as refused:
            if not before.isdigit() or not hasattr(refused, "response"):
                raise
            deactivate(client, int(before))
            found = activate(client, request)
        os.pwrite(place, str(found.node_id).zfill(DIGITS).encode(), 0)
        return found

    return activated


def main(place: int | None = None) -> None:
    """`flower-supernode`, with these waits; ends the process when the SuperNode has ended.

    `place`: an open descriptor that the supervisor keeps, of an empty file at first.
    """
    from flwr.supernode import start_client_internal as node
    from flwr.supernode.cli import flower_supernode

    if getattr(node, "time", None) is time:
        node.time = Waits()
    if place is not None:
        _take_over(place)
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


def _take_over(place: int) -> None:
    from flwr.proto.fleet_pb2 import DeactivateNodeRequest
    from flwr.supernode.fleet_http_client import FleetHttpClient as Fleet

    def deactivate(client: Any, node: int) -> None:
        client.DeactivateNode(DeactivateNodeRequest(node_id=node))

    activate: Any = taking_over(Fleet.ActivateNode, deactivate, place)
    setattr(Fleet, "ActivateNode", activate)  # noqa: B010  (mypy knows it as a method)


if __name__ == "__main__":
    main()
