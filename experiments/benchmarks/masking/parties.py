"""What masking costs: every party of a round, and Flower's SecAgg+ primitives beside it.

    python -m privet.experiments.benchmarks.masking.parties --clients 1000 --dimension 100000
    python -m privet.experiments.benchmarks.masking.parties --flower
    python -m privet.experiments.benchmarks.masking.parties --table

All parties run one after another in this process, on one core, without training and without
noise; clients are lost after training, which is the dearest moment for the server. `--flower` times
Flower's own functions in the same run (`flower.py`). Seconds are processor seconds.
"""

import math
import os
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from ....client.privacy import masked_upload as client
from ....common.privacy.encoding import round_randomly, wrap
from ....common.privacy.noise import SystemSource
from ....common.secure_aggregation.keys import Directory, Identity
from ....common.secure_aggregation.terms import MaskingPolicy, Terms
from ....server import unmasking as server
from ..harness import Clock, command, median_s

BITS, TABLE = 20, (10, 20, 50, 100, 200, 500, 1000)

Answer = Callable[[int, bytes], tuple[client.State, bytes]]

Cost = TypedDict(
    "Cost",
    {
        "clients": int,
        "dimension": int,
        "dropped": int,
        "degree": int,
        "threshold": int,
        "the sum is right": bool,
        "client seconds": dict[str, float],
        "server seconds": dict[str, float],
        "bytes up": int,
        "bytes down": int,
        "bytes up per coordinate": float,
        "peak process MB": float,
    },
)
"""A mean client's and the server's seconds by phase, and the largest client's bytes."""


def main(
    clients: int | None = None,
    dimension: int | None = None,
    dropout: float = 0.0,
    flower: bool = False,
    measured: int = 5,
    table: bool = False,
) -> Mapping[str, object]:
    """The cost of a round.

    Args:
        clients, dimension: of the round.
        dropout: the share of clients that are lost.
        flower: beside Flower's own, of whose clients so many are `measured`.
        table: for 10 to 1,000 clients.
    """
    if table:
        return {"rounds": [by_degree(measure(n, dimension or 10_000, 0.0)) for n in TABLE]}
    if flower:
        return beside_flower(clients or 50, dimension or 1_000_000, measured)
    return measure(clients or 100, dimension or 100_000, dropout)


@dataclass
class _Devices:
    """All clients of one round, their states, clock and bytes."""

    lost: frozenset[int]
    states: dict[int, client.State] = field(default_factory=dict)
    clock: Clock = field(default_factory=Clock)
    up: dict[int, int] = field(default_factory=dict)
    down: dict[int, int] = field(default_factory=dict)

    def each(self, phase: str, sent: Mapping[int, bytes], answer: Answer) -> dict[int, bytes]:
        """Let every client that is still there answer its message, and return the replies."""
        return {
            n: self.one(phase, n, message, answer)
            for n, message in sent.items()
            if n not in self.lost or phase in ("announce", "share", "receive")
        }

    def one(self, phase: str, n: int, message: bytes, answer: Answer) -> bytes:
        """Let one client answer its message."""
        with self.clock(phase):
            self.states[n], reply = answer(n, message)
        self.down[n] = self.down.get(n, 0) + len(message)
        self.up[n] = self.up.get(n, 0) + len(reply)
        return reply


def measure(clients: int, dimension: int, dropout: float) -> Cost:
    """Run one masked round with every party, and measure what it costs."""
    survivors = max(2, math.ceil(clients * 2 / 3))
    colluders = min(clients // 10, survivors - 2)
    terms = Terms("benchmark", 1, bytes(32), dimension, BITS, survivors, colluders)
    policy = MaskingPolicy(max(3, clients), survivors, colluders=colluders)
    devices, theirs = _Devices(frozenset(range(round(clients * dropout)))), Clock()
    cohort, outcome, expected = _round(terms, policy, clients, devices, theirs)
    up = max(devices.up.values())
    return {
        "clients": clients,
        "dimension": dimension,
        "dropped": len(outcome.dropped),
        "degree": cohort.roster.graph.degree,
        "threshold": cohort.roster.graph.threshold,
        "the sum is right": bool(np.array_equal(outcome.total, expected)),
        "client seconds": _with_sum(devices.clock, clients),
        "server seconds": _with_sum(theirs, 1),
        "bytes up": up,
        "bytes down": max(devices.down.values()),
        "bytes up per coordinate": up / dimension,
        "peak process MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def _round(
    terms: Terms, policy: MaskingPolicy, clients: int, devices: _Devices, theirs: Clock
) -> tuple[server.Cohort, server.Outcome, NDArray[np.uint32]]:
    """Run all phases; return who took part, what came of it, and what the sum has to be."""
    identities = [Identity.create(os.urandom) for _ in range(clients)]
    listed = Directory({n: one.public for n, one in enumerate(identities)}, closed=True)
    states = devices.states

    def announce(n: int, _: bytes) -> tuple[client.State, bytes]:
        return client.announce(n, identities[n], terms, policy, 0, os.urandom)

    replies = devices.each("announce", dict.fromkeys(range(clients), b""), announce)
    with theirs("gather"):
        cohort, out, _ = server.gather(terms, replies, listed)
    replies = devices.each(
        "share", out, lambda n, m: client.share(states[n], m, listed, os.urandom)[:2]
    )
    with theirs("relay"):
        dealt, out, _ = server.relay(cohort, replies)
    devices.each("receive", out, lambda n, m: (client.receive(states[n], m), b""))
    running = server.begin_sum(dealt)
    expected = _sent(devices, sorted(out), running, theirs, terms.dimension)
    with theirs("close"):
        summed, out = server.close_sum(running)
    replies = devices.each("confirm", out, lambda n, m: client.confirm(states[n], m))
    with theirs("exchange"):
        agreed, out, _ = server.exchange(summed, replies)
    replies = devices.each("unmask", out, lambda n, m: client.unmask(states[n], m))
    with theirs("unmask"):
        outcome = server.unmask(agreed, replies)
    return cohort, outcome, expected


def _sent(
    devices: _Devices, clients: Sequence[int], running: server.Sum, theirs: Clock, dimension: int
) -> NDArray[np.uint32]:
    """Let the clients that are not lost send a vector each; return what the sum has to be."""
    rng, expected = np.random.default_rng(0), np.zeros(dimension, dtype=np.uint32)
    for n in clients:
        if n in devices.lost:
            continue
        vector = rng.integers(0, 1 << BITS, dimension, dtype=np.uint32)
        expected += vector

        def masked(
            n: int, _: bytes, own: NDArray[np.uint32] = vector
        ) -> tuple[client.State, bytes]:
            return client.mask(devices.states[n], own)

        reply = devices.one("mask", n, b"", masked)
        with theirs("add"):
            server.add_vector(running, n, reply)
    return expected & np.uint32((1 << BITS) - 1)


def _with_sum(clock: Clock, clients: int) -> dict[str, float]:
    each = {name: value / clients for name, value in clock.seconds.items()}
    return {**each, "all": sum(each.values())}


def by_degree(cost: Cost) -> dict[str, float]:
    """Cost per client against n: everything but the roster grows with the number of neighbours.

    The exact failure bounds ask for at most 13 log2 n neighbours at every n, and for fewer in
    small cohorts, where a tenth of the participants is few people.
    """
    clients, degree, ms = cost["clients"], cost["degree"], 1e3 * cost["client seconds"]["all"]
    return {
        "clients": clients,
        "degree": degree,
        "degree per log2 n": degree / math.log2(clients),
        "client ms": ms,
        "client ms per degree": ms / degree,
        "bytes up": cost["bytes up"],
        "bytes down": cost["bytes down"],
        "server ms per client": 1e3 * cost["server seconds"]["all"] / clients,
    }


def beside_flower(clients: int, dimension: int, measured: int) -> dict[str, object]:
    """Both protocols on the same machine in one run: seconds, bytes, ratios."""
    from .flower import flower_round

    flower = flower_round(clients, dimension, measured)
    own = measure(clients, dimension, 0.0)
    with_loss = measure(clients, dimension, 1 / clients)
    rounding = _rounding_seconds(dimension)
    client_s, unmask_s = own["client seconds"]["all"], own["server seconds"]["unmask"]
    per_dropped = with_loss["server seconds"]["unmask"] - unmask_s * (clients - 1) / clients
    privet = {
        "client": client_s,
        "server unmasking": unmask_s,
        "server, per dropped client": max(per_dropped, 1e-9),
        "bytes up": float(own["bytes up"]),
    }
    return {
        "flower": flower,
        "privet": {
            **privet,
            "neighbours": own["degree"],
            "rounding, not in it": rounding,
            "the sum is right": own["the sum is right"] and with_loss["the sum is right"],
        },
        "flower / privet": {
            **{name: flower[name] / value for name, value in privet.items()},
            "client, rounding in both": flower["client"] / (client_s + rounding),
            "client, rounding in neither": (flower["client"] - flower["quantising"]) / client_s,
        },
    }


def _rounding_seconds(dimension: int) -> float:
    vector, source = np.random.default_rng(0).normal(size=dimension), SystemSource()
    return median_s(
        lambda: wrap(round_randomly(vector, 2.0**-10, source.words), BITS), 5, time.process_time
    )


if __name__ == "__main__":
    command(main)
