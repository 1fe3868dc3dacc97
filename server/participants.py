"""Who is there: nodes say hello, show their identity, and have accepted the run or not."""

import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING

from ..common.errors import ProtocolError, StateError
from ..common.secure_aggregation.keys import Directory, greeting, verify
from ..common.settings.config import Config
from ..common.settings.sections import DEVICES

if TYPE_CHECKING:  # the operator's side, which a simulation has not
    from .operations.attendance import Attendance

__all__ = ["Participants"]

POLL_S = 0.1
AGAIN_S = 2.0  # a device that has not accepted yet is asked again after
PASSES = 3  # of a greeting: a newer directory's head, its new entries, and where they differ all
SILENT_S = 10.0  # one that has not answered: a model may be loading, and late answers count

Hello = Callable[[Iterable[int], bytes], Iterator[tuple[int, Mapping[str, object]]]]
"""Node ids and a nonce -> (node id, its reply) as they arrive, late ones of earlier calls too."""


@dataclass(eq=False)
class Participants:
    """The devices of a run: number in the directory -> Flower's node id.

    Args:
        online: the node ids connected now.
        hello: says hello to some of them.
        directory: the identities the operator enrolled.
        config: of the run.
        run: its id.
        attendance: keeps what devices said, for `privet server status`; None: nowhere.
        newest: the directory now; None: it does not change.

    **Guarantee**: a number is given to a node that has signed for its identity in this run only.
    """

    online: Callable[[], Iterable[int]]
    hello: Hello
    directory: Directory
    config: Config
    run: str
    attendance: "Attendance | None" = None
    newest: Callable[[], Directory] | None = None
    accepted: dict[int, int] = field(default_factory=dict)
    _stale: set[int] = field(default_factory=set)
    _due: dict[int, float] = field(default_factory=dict)
    _nonces: dict[int, list[bytes]] = field(default_factory=dict)
    _begun: bool = False

    def present(self) -> list[int]:
        """Numbers of the devices that are online and have accepted, ascending.

        Waits until there are enough for a round: all of a simulation, and of real devices as many
        as the smallest sum that may be opened, and before the first round up to `rounds.gather_s`
        for a whole cohort.

        Raises:
            StateError: not enough came before `rounds.timeout_s` and `rounds.gather_s`.
            ProtocolError: a node runs another version (simulations: a mixed installation).
        """
        config, began = self.config, time.monotonic()
        real = config.data.source == DEVICES
        wanted = config.rounds.cohort if real else config.data.clients
        least = max(2, config.min_sum) if real else wanted
        gather_s = config.rounds.gather_s
        limit_s = max(gather_s, config.rounds.timeout_s)
        while True:
            numbers = self.greet()
            waited = time.monotonic() - began
            # a device that was here a round ago is not waited for again
            if len(numbers) >= wanted or (
                len(numbers) >= least and (self._begun or waited > gather_s)
            ):
                self._begun = True
                return numbers
            if waited > limit_s:
                raise StateError(
                    f"a round needs {least} devices that are online and have accepted the run, and "
                    f"{len(numbers)} of {len(self.directory.known)} enrolled ones are; {limit_s:g} "
                    "s have passed (the larger of rounds.timeout_s and rounds.gather_s)"
                )
            time.sleep(POLL_S)

    def greet(self) -> list[int]:
        """Greet the devices that have not accepted yet.

        Where the directory has changed, everybody is greeted: a device takes no part beside one
        that it does not know.

        Returns:
            The numbers of the devices that are online and have accepted, ascending.
        """
        self._look_up()
        online = set(self.online())
        for _ in range(PASSES):
            if not self._pass(online):
                break
        numbers = sorted(number for number, node in self.accepted.items() if node in online)
        if self.attendance is not None:
            self.attendance.present(numbers)
        return numbers

    def _look_up(self) -> None:
        directory = self.directory if self.newest is None else self.newest()
        if directory != self.directory:
            self.directory = directory
            self.accepted = {n: node for n, node in self.accepted.items() if n in directory.known}
            self._stale = set(self.accepted.values())
            for node in self._stale:
                self._due.pop(node, None)

    def _pass(self, online: set[int]) -> bool:
        """Greet all devices that are due, once.

        Returns whether some of them lack entries of the directory.
        """
        lacking = False
        known = set(self.accepted.values()) - self._stale
        owners = {identity: number for number, identity in self.directory.known.items()}
        mine = version("privet")
        now, nonce = time.monotonic(), secrets.token_bytes(32)
        new = sorted(node for node in online - known if self._due.get(node, now) <= now)
        for node in new:
            self._due[node] = now + SILENT_S
            self._nonces.setdefault(node, []).append(nonce)
        for node, reply in self.hello(new, nonce):
            lacks = reply.get("lacks")
            behind = isinstance(lacks, int) and lacks >= 0
            lacking |= behind
            self._due[node] = time.monotonic() + (0 if behind else AGAIN_S)
            if not behind:
                self._stale.discard(node)
            identity, signature = (_bytes(reply.get(name)) for name in ("identity", "signature"))
            signed = any(
                verify(identity, greeting(self.run, one, node), signature)
                for one in self._nonces.pop(node, ())
            )
            if self.attendance is not None and signed and identity in owners:
                took = reply.get("accepted") is True and reply.get("version") == mine
                self.attendance.heard(owners[identity], str(reply.get("version")), took)
            if reply.get("version") != mine:
                if self.config.data.source != DEVICES:
                    raise ProtocolError(
                        f"node {node} runs privet {reply.get('version')}, this server {mine}; "
                        "install the same on both"
                    )
                continue
            if signed and identity in owners and reply.get("accepted") is True:
                self.accepted[owners[identity]] = node
        return lacking


def _bytes(value: object) -> bytes:
    return value if isinstance(value, bytes) else b""
