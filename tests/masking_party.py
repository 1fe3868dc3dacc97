"""A small honest cohort, stopped after any phase; randomness is a seeded stream."""

import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from privet.client.privacy import masked_upload as client
from privet.common.secure_aggregation.keys import Directory, Identity
from privet.common.secure_aggregation.terms import Graph, MaskingPolicy, Terms, default_graph
from privet.server import unmasking as server

PHASES = ("keys", "shares", "receive", "mask", "confirm", "unmask")
POLICY = MaskingPolicy(min_cohort=5, min_survivors=3)


def stream(label: str) -> Callable[[int], bytes]:
    """A repeatable source of bytes. **Not private.**"""
    calls = 0

    def draw(count: int) -> bytes:
        nonlocal calls
        calls += 1
        return hashlib.shake_256(f"masking tests {label} {calls}".encode()).digest(count)

    return draw


def identity(number: int) -> Identity:
    return Identity.create(stream(f"identity {number}"))


def terms(**changes: Any) -> Terms:
    given = {"run": "test", "round": 7, "plan": b"p" * 32, "dimension": 4, "bits": 20}
    return Terms(**{**given, "survivors": 3, "colluders": 1, **changes})


def vector(number: int, its: Terms) -> np.ndarray:
    top = (1 << its.bits) - 1
    return np.array([(top - number * i) & top for i in range(its.dimension)], dtype=np.uint32)


@dataclass
class Party:
    """States and messages by client number, as far as `until`."""

    terms: Terms = field(default_factory=terms)
    numbers: tuple[int, ...] = (10, 11, 12, 13, 14)
    policy: MaskingPolicy = POLICY
    directory: Directory = field(default_factory=lambda: Directory({}, closed=False))
    silent: Collection[int] = ()
    """Clients that send no vector."""
    undealt: Collection[int] = ()
    """Clients that deal no shares."""
    identities: Callable[[int], Identity] = identity
    last_round: int = 6
    graph: Graph | None = None
    """Another one than the default."""
    states: dict[str, dict[int, Any]] = field(default_factory=dict)
    sent: dict[str, dict[int, bytes]] = field(default_factory=dict)
    """What clients sent in a phase."""
    got: dict[str, dict[int, bytes]] = field(default_factory=dict)
    """What the server sent for a phase."""
    # the server's states by phase
    served: dict[str, Any] = field(default_factory=dict)

    def until(self, phase: str) -> "Party":
        """Run the phases before `phase`; its incoming messages are in `got[phase]`."""
        for one in PHASES[: PHASES.index(phase)]:
            getattr(self, f"_{one}")()
        return self

    def outcome(self) -> server.Outcome:
        self.until("unmask")._unmask()
        return server.unmask(self.served["confirm"], self.sent["unmask"])

    def _each(self, phase: str, calls: dict[int, Any]) -> None:
        self.states[phase] = {number: state for number, (state, _) in calls.items()}
        self.sent[phase] = {number: sent for number, (_, sent) in calls.items()}

    def _keys(self) -> None:
        self._each(
            "keys",
            {
                n: client.announce(
                    n,
                    self.identities(n),
                    self.terms,
                    self.policy,
                    self.last_round,
                    stream(f"keys {n}"),
                )
                for n in self.numbers
            },
        )
        self.served["keys"], self.got["shares"], _ = server.gather(
            self.terms, self.sent["keys"], None, self._sized
        )

    def _sized(self, participants: int) -> Graph:
        return self.graph or default_graph(participants, self.terms.colluders)

    def _shares(self) -> None:
        got, states = self.got["shares"], self.states["keys"]
        self._each(
            "shares",
            {
                n: client.share(states[n], got[n], self.directory, stream(f"deal {n}"))[:2]
                for n in got
                if n not in self.undealt
            },
        )
        self.served["shares"], self.got["receive"], _ = server.relay(
            self.served["keys"], self.sent["shares"]
        )

    def _receive(self) -> None:
        got, states = self.got["receive"], self.states["shares"]
        self.states["receive"] = {n: client.receive(states[n], got[n]) for n in got}

    def _mask(self) -> None:
        states = self.states["receive"]
        self._each(
            "mask",
            {
                n: client.mask(states[n], vector(n, self.terms))
                for n in states
                if n not in self.silent
            },
        )
        running = server.begin_sum(self.served["shares"])
        for n, sent in self.sent["mask"].items():
            server.add_vector(running, n, sent)
        self.served["sum"] = running
        self.served["mask"], self.got["confirm"] = server.close_sum(running)

    def _confirm(self) -> None:
        got, states = self.got["confirm"], self.states["mask"]
        self._each("confirm", {n: client.confirm(states[n], got[n]) for n in got})
        self.served["confirm"], self.got["unmask"], _ = server.exchange(
            self.served["mask"], self.sent["confirm"]
        )

    def _unmask(self) -> None:
        got, states = self.got["unmask"], self.states["confirm"]
        self._each("unmask", {n: client.unmask(states[n], got[n]) for n in got})
