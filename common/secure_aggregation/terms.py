"""What both halves of the masking protocol agree on: terms, neighbours, thresholds, policy.

The protocol is SecAgg+ (Bell, Bonawitz, Gascon, Lepoint, Raykova 2020, "Secure single-server
aggregation with (poly)logarithmic overhead") over double masking (Bonawitz et al. 2017, "Practical
secure aggregation for privacy-preserving machine learning"). `experiments/protocol.py` shows it
with every party; `docs/secure-aggregation.md` says what it is trusted with.

Words: *participants* announced keys and are on the roster, in the order of their client numbers;
their place there is their *position*. *Holders* of a participant are its neighbours and itself:
each holds one share of its two secrets. *Threshold*: how many holders together can open one.
"""

import functools
import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, ProtocolError
from ..settings.config import Config
from ..settings.sections import MAX_PARTICIPANTS, SecureAggregationSettings, quorum
from .keys import Purpose, Secret, derive, digest
from .keystream import keystream

__all__ = [
    "COMPLETE",
    "MAX_PARTICIPANTS",
    "SECRECY",
    "Graph",
    "MaskingPolicy",
    "Terms",
    "default_graph",
    "default_threshold",
    "gap",
    "neighbours",
    "pair_seed",
    "quorum",
    "secrecy_bits",
    "sized_graph",
    "window_colluders",
]

MAX_DIMENSION = 1 << 28

COMPLETE = 400
"""Up to so many participants everybody is everybody's neighbour, and nothing is drawn."""

SECRECY = 160.0
"""Bits: a server tries rosters for the cost of a hash; of 2^60, none fails but with 2^-100."""

_MIN_NEIGHBOURS = 16


@dataclass(frozen=True)
class Terms:
    """Public constants of one masked sum, to which every signature and every key is bound.

    Attributes:
        run: which run, 1 to 64 characters.
        round: from 1, growing.
        plan: SHA-256 of the round's plan, 32 bytes.
        dimension: numbers in a vector.
        bits: of the modulus 2^bits, 8 to 32.
        survivors: smallest number of vectors a sum may have; the noise shares are sized for it.
        colluders: devices of the whole fleet that may work with the server.
    """

    run: str
    round: int
    plan: bytes
    dimension: int
    bits: int
    survivors: int
    colluders: int = 0

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("run (its length)", len(self.run), 1, 64),
            ("round", self.round, 1, 2**32 - 1),
            ("plan (its length)", len(self.plan), 32, 32),
            ("dimension", self.dimension, 1, MAX_DIMENSION),
            ("bits", self.bits, 8, 32),
            ("survivors", self.survivors, 1, MAX_PARTICIPANTS),
            ("colluders", self.colluders, 0, MAX_PARTICIPANTS),
        ):
            if not low <= value <= high:
                raise ConfigError(
                    f"masking terms: {name} must be between {low} and {high}, got {value}"
                )

    @functools.cached_property
    def run_digest(self) -> bytes:
        """32 bytes that stand for the run in a message."""
        return digest(Purpose.TERMS, self.run.encode())

    @functools.cached_property
    def plan_digest(self) -> bytes:
        """32 bytes that stand for the plan and the numbers here in a message."""
        numbers = (self.dimension, self.bits, self.survivors, self.colluders)
        return digest(Purpose.TERMS, self.plan, *(n.to_bytes(8, "big") for n in numbers))

    @functools.cached_property
    def binding(self) -> bytes:
        """32 bytes for run, round and plan together."""
        return digest(
            Purpose.TERMS, self.run_digest, self.round.to_bytes(4, "big"), self.plan_digest
        )

    @property
    def vector_bytes(self) -> int:
        """Length of a packed vector."""
        return -(-self.dimension * self.bits // 8)


@dataclass(frozen=True)
class Graph:
    """Who holds shares of whose secrets.

    Attributes:
        degree: neighbours of each participant: participants - 1 (everybody), or even.
        threshold: of the degree + 1 holders, who together open a secret.
    """

    degree: int
    threshold: int


def default_threshold(participants: int, colluders: int, degree: int) -> int:
    """The quorum where everybody is a neighbour, a bare majority of the holders elsewhere."""
    if degree >= participants - 1:
        return quorum(participants, colluders)
    return (degree + 1) // 2 + 1


@functools.lru_cache(maxsize=256)
def default_graph(participants: int, colluders: int, dropping: float = 0.1) -> Graph:
    """Choose the graph of neighbours: all up to `COMPLETE` participants, above as few as are safe.

    Args:
        participants: on the roster.
        colluders: of the whole fleet; all of them may be on the roster.
        dropping: largest fraction of the participants that may be lost.

    **Guarantee**: a graph of everybody, or one with at least `SECRECY` bits in `secrecy_bits` on
    which those losses void the round with a chance below 2^-20.
    """
    complete = participants - 1
    if participants > COMPLETE:
        for degree in range(_MIN_NEIGHBOURS, complete, 2):
            graph = Graph(degree, default_threshold(participants, colluders, degree))
            if secrecy_bits(participants, colluders, graph) < SECRECY:
                continue
            if _loss_bits(participants, colluders, graph, int(dropping * participants)) >= 20.0:
                return graph
    return Graph(complete, default_threshold(participants, colluders, complete))


def sized_graph(settings: SecureAggregationSettings, colluders: int, participants: int) -> Graph:
    """The graph a server takes: the default one, or a denser one that the settings ask for."""
    found = default_graph(participants, colluders)
    degree = max(found.degree, min(settings.degree, participants - 1))
    if degree < participants - 1:
        degree += degree % 2
    least = default_threshold(participants, colluders, degree)
    return Graph(degree, max(least, min(settings.threshold, degree + 1)))


def secrecy_bits(participants: int, colluders: int, graph: Graph) -> float:
    """-log2 of the chance that some honest participant's holders include a threshold of colluders.

    The order of the ring is drawn anew for every roster, so colluders beside a participant are
    hypergeometric, and the participants are added up (a union bound). Where everybody is a
    neighbour nothing is drawn.

    Returns:
        Infinity where it is impossible.
    """
    if colluders < graph.threshold:
        return math.inf
    if graph.degree >= participants - 1:
        return 0.0
    return _bits(participants - 1, colluders, graph.degree, graph.threshold, participants)


@functools.lru_cache(maxsize=256)
def window_colluders(participants: int, colluders: int, window: int) -> int:
    """The most colluders that any `window` successive places of the ring have.

    **Guarantee**: over the draw of the ring, more stand in some window with a chance below
    2^-SECRECY only. So a window with more living places than this has an honest living one.
    """
    max_colluders = min(colluders, window)
    for colluding in range(max_colluders):
        if _bits(participants, colluders, window, colluding + 1, participants) >= SECRECY:
            return colluding
    return max_colluders


def _loss_bits(participants: int, colluders: int, graph: Graph, lost: int) -> float:
    """-log2 of the chance that the loss of `lost` participants voids a round on a sparse graph."""
    window = graph.degree // 2
    needed = window_colluders(participants, colluders, window) + 1
    if needed > window:
        return 0.0
    holders = _bits(
        participants - 1, lost, graph.degree, graph.degree + 2 - graph.threshold, participants
    )
    windows = _bits(participants, lost, window, window - needed + 1, participants)
    return min(holders, windows)


def _bits(population: int, marked: int, drawn: int, least: int, times: int) -> float:
    """-log2 of `times` P[at least `least` marked among `drawn` of a population]."""
    marked = min(marked, population)
    low, high = max(least, drawn - (population - marked), 0), min(marked, drawn)
    if low > high:
        return math.inf
    every = _log_choose(population, drawn)
    total = math.fsum(
        math.exp(_log_choose(marked, i) + _log_choose(population - marked, drawn - i) - every)
        for i in range(low, high + 1)
    )
    return -math.log2(total * times) if total > 0.0 else math.inf


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def gap(
    roster_digest: bytes,
    participants: int,
    colluders: int,
    degree: int,
    alive: Collection[int],
) -> int | None:
    """Where the living participants' graph could be cut by colluders, if anywhere.

    Two honest living participants with fewer than degree / 2 places between them are neighbours,
    so where each window of degree / 2 places has an honest living one, all of them hang together.

    Args:
        roster_digest, participants, degree: as in `neighbours`.
        colluders: of the whole fleet.
        alive: positions the survivor list calls alive.

    Returns:
        How many live in the emptiest window, where these could all be colluders; None where every
        window has an honest living participant, or everybody is a neighbour.
    """
    if degree >= participants - 1:
        return None
    window = degree // 2
    order, _ = _ring(roster_digest, participants)
    living = np.isin(order, np.fromiter(alive, np.int64, len(alive))).astype(np.int64)
    counts = np.cumsum(np.concatenate([[0], living, living[: window - 1]]))
    least = int((counts[window:] - counts[:-window]).min())
    return least if least <= window_colluders(participants, colluders, window) else None


def neighbours(roster_digest: bytes, participants: int, degree: int, position: int) -> list[int]:
    """Positions of a participant's neighbours, ascending.

    The participants stand in a ring in an order drawn from the roster's digest; each is a
    neighbour of the degree / 2 before and after it. The relation is symmetric.

    Args:
        roster_digest: 32 bytes, covers every key.
        participants: of the roster.
        degree: even, or participants - 1 for everybody.
        position: whose neighbours.
    """
    if degree >= participants - 1:
        return [other for other in range(participants) if other != position]
    order, places = _ring(roster_digest, participants)
    here, half = int(places[position]), degree // 2
    steps = [step for step in range(-half, half + 1) if step]
    return sorted(int(order[(here + step) % participants]) for step in steps)


def pair_seed(shared: Secret, roster_digest: bytes, position: int, other: int) -> Secret:
    """The seed of the mask that two neighbours share.

    **Guarantee**: no two pairs of a roster have the same one, even where they agree on the same
    secret. They can: a point of low order added to a key (as little as 1/u for u) changes its bytes
    and not what it agrees on, so a colluder could announce an honest device's key in other bytes,
    and the masks that a third device shares with the two would cancel.

    Args:
        shared: what the two mask keys agree on.
        roster_digest: 32 bytes.
        position, other: those of the two, in either order.
    """
    low, high = sorted((position, other))
    names = low.to_bytes(4, "big") + high.to_bytes(4, "big")
    return derive(shared, Purpose.PAIR_MASK, roster_digest, names)


@functools.lru_cache(maxsize=4)
def _ring(roster_digest: bytes, participants: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Position by place in the ring, and place by position."""
    seed = Secret(digest(Purpose.GRAPH, roster_digest))
    words = keystream(seed, 2 * participants).astype("<u4").view("<u8")
    order = np.argsort(words, kind="stable")
    places = np.empty_like(order)
    places[order] = np.arange(participants)
    return order, places


@dataclass(frozen=True)
class MaskingPolicy:
    """What a device's owner insists on, whatever a server asks for.

    Attributes:
        min_cohort, max_cohort: participants on a roster.
        min_survivors: vectors in a sum.
        min_bits: of the modulus.
        colluders: devices of the whole fleet that may work with the server; an absolute number,
            whatever the size of the roster.
        min_degree, min_threshold: of the graph, where the run that the owner agreed to
            names them; 0: what `secrecy_bits` and `quorum` ask for.
    """

    min_cohort: int = 10
    min_survivors: int = 7
    min_bits: int = 8
    colluders: int = 1
    max_cohort: int = MAX_PARTICIPANTS
    min_degree: int = 0
    min_threshold: int = 0

    def __post_init__(self) -> None:
        if self.min_cohort < 3 or self.min_survivors < 2:
            raise ConfigError(
                "masking policy: a cohort has at least 3 participants and a sum at least 2 "
                f"vectors, got {self.min_cohort} and {self.min_survivors}: with fewer "
                "the sum shows one person's numbers"
            )
        if not 0 <= self.colluders <= self.min_survivors - 2:
            raise ConfigError(
                f"masking policy: colluders must be from 0 to min_survivors - 2 = "
                f"{self.min_survivors - 2}, got {self.colluders}: a sum needs at least two "
                "honest devices"
            )

    @classmethod
    def agreed(cls, config: Config, max_cohort: int = MAX_PARTICIPANTS) -> "MaskingPolicy":
        """Return what a device with these settings insists on.

        `max_cohort` is that of the plan.
        """
        own = config.secure_aggregation
        return cls(
            min_cohort=own.min_cohort,
            min_survivors=max(config.min_sum, config.colluders + 2),
            min_bits=max(8, config.privacy.client.bits),
            colluders=config.colluders,
            max_cohort=max_cohort,
            min_degree=own.degree,
            min_threshold=own.threshold,
        )

    def refuse_terms(self, terms: Terms) -> None:
        """Refuse terms that are weaker than this policy, before anything is sent.

        Raises:
            ProtocolError: names the field that is weaker than the policy. The caller adds round
                and sender.
        """
        for name, value, least in (
            ("survivors", terms.survivors, self.min_survivors),
            ("bits", terms.bits, self.min_bits),
            ("colluders", terms.colluders, self.colluders),
            ("survivors less colluders", terms.survivors - terms.colluders, 2),
        ):
            if value < least:
                raise ProtocolError(
                    f"the terms have {name} = {value}, this device asks for at least {least}"
                )

    def refuse_cohort(self, participants: int, colluders: int, graph: Graph) -> None:
        """Refuse a cohort or graph that is weaker than this policy, before any share is made.

        Args:
            participants: on the roster.
            colluders: of the terms.
            graph: of the roster.

        Raises:
            ProtocolError: the cohort, the degree or the threshold is too small, or impossible.
        """
        self._refuse_small(participants)
        self._refuse_large(participants)
        self._refuse_degree(participants, graph)
        self._refuse_threshold(participants, colluders, graph)
        self._refuse_sparse(participants, colluders, graph)

    def _refuse_small(self, participants: int) -> None:
        if participants < self.min_cohort:
            raise ProtocolError(
                f"the roster has {participants} participants, this device asks for at least "
                f"{self.min_cohort}"
            )

    def _refuse_large(self, participants: int) -> None:
        if participants > self.max_cohort:
            raise ProtocolError(
                f"the roster has {participants} participants, the plan's cohort is "
                f"{self.max_cohort}"
            )

    def _refuse_degree(self, participants: int, graph: Graph) -> None:
        everybody, degree = participants - 1, graph.degree
        sparse = _MIN_NEIGHBOURS <= degree < everybody and degree % 2 == 0
        if not (degree == everybody or (sparse and participants > COMPLETE)):
            expected = f"{everybody} (everybody)"
            if participants > COMPLETE:
                expected += f" or an even number from {_MIN_NEIGHBOURS}"
            raise ProtocolError(
                f"the roster gives each of {participants} participants {degree} neighbours, "
                f"expected {expected}"
            )
        if degree < min(self.min_degree, everybody):
            raise ProtocolError(
                f"the roster gives each participant {degree} neighbours, this device agreed to "
                f"{self.min_degree}"
            )

    def _refuse_threshold(self, participants: int, colluders: int, graph: Graph) -> None:
        holders = graph.degree + 1
        least = max(
            default_threshold(participants, colluders, graph.degree),
            min(self.min_threshold, holders),
        )
        if not least <= graph.threshold <= holders:
            raise ProtocolError(
                f"the roster has threshold {graph.threshold} for {holders} holders out of "
                f"{participants}, this device asks for {least} to {holders}"
            )

    def _refuse_sparse(self, participants: int, colluders: int, graph: Graph) -> None:
        bits = secrecy_bits(participants, colluders, graph)
        if bits < SECRECY:
            raise ProtocolError(
                f"{graph.degree} neighbours and threshold {graph.threshold} among {participants} "
                f"participants, of whom {colluders} collude, give {bits:.0f} bits of secrecy, this "
                f"device asks for {SECRECY:.0f}"
            )
