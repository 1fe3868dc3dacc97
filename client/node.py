"""Starts the installed SuperNode as it is, with its two fixed sleeps shortened where it matters.

    python -m privet.client.node --superlink HOST:PORT ...    the arguments of flower-supernode

Flower 1.41's SuperNode sleeps 3 s whenever no message waits for it, and looks for a reply every
0.5 s. A masked round has five exchanges, so a round in which nothing is computed would last 15 s,
on any hardware, and Flower has no setting for it. Here both sleeps begin short and grow by a
twentieth each time, up to Flower's own length: a wait is prolonged by about a twentieth of what it
lasted, and a device that nobody asks is as quiet as Flower makes it, after one minute.

And where Flower's SuperNode gives up, its process ends here. Flower's own goes on for ever, deaf:
it gives up for good at a TLS handshake that was cut short (a network that breaks, a server that
restarts), while its runtime API keeps the process alive, and no supervisor sees it.

Nothing else is changed: Flower's code, protocol, keys and arguments. Should a later 1.41 hold its
sleeps elsewhere, they stay as long as Flower made them; `tests/test_node.py` notices.
"""

import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["PROGRAM", "Waits", "main"]

PROGRAM = "flower-supernode"
NO_MESSAGE_S = 3.0
GROWTH = 1.05
FIRST_S = {NO_MESSAGE_S: 0.1, 0.5: 0.02}
"""Flower's sleep -> the first of a row in its place, seconds."""


@dataclass
class Waits:
    """Stands for the module `time` in Flower's SuperNode: `sleep` is its own, the rest is `time`'s.

    A row of sleeps for one reason ends with the first sleep for another.
    """

    pause: Callable[[float], None] = time.sleep
    _reason: float = field(default=0.0, init=False)
    _next: float = field(default=0.0, init=False)

    def __getattr__(self, name: str) -> object:
        return getattr(time, name)

    def sleep(self, seconds: float) -> None:
        """Instead of so many seconds: a short while, a twentieth longer than the time before."""
        if seconds not in FIRST_S:
            self.pause(seconds)
            return
        if seconds != self._reason:
            self._reason, self._next = seconds, FIRST_S[seconds]
        self.pause(min(self._next, seconds))
        self._next = min(self._next * GROWTH, seconds)


def main() -> None:
    """`flower-supernode`, with these waits; ends the process when the SuperNode has ended."""
    from flwr.supernode import start_client_internal as node
    from flwr.supernode.cli import flower_supernode

    if getattr(node, "time", None) is time:
        node.time = Waits()
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


if __name__ == "__main__":
    main()
