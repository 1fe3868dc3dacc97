"""What both halves of the masking protocol agree on: terms, neighbours, thresholds, policy.

The protocol is SecAgg+ (Bell, Bonawitz, Gascon, Lepoint, Raykova 2020, "Secure single-server
aggregation with (poly)logarithmic overhead") over double masking (Bonawitz et al. 2017, "Practical
secure aggregation for privacy-preserving machine learning"). `experiments/protocol.py` shows it
with every party; `docs/masking.md` says what it is trusted with.

Words: *participants* announced keys and are on the roster, in the order of their client numbers;
their place there is their *position*. *Holders* of a participant are its neighbours and itself:
each holds one share of its two secrets. *Threshold*: how many holders together can open one.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigError, ProtocolError
from .keys import Purpose, Secret, digest
from .keystream import keystream

__all__ = [
    "MOST_PARTICIPANTS",
    "SECRECY",
    "MaskingPolicy",
    "Terms",
    "default_degree",
    "default_threshold",
    "neighbours",
    "secrecy_bits",
]

MOST_PARTICIPANTS = 1 << 14
"""Largest roster; it bounds every message but the vector."""

MOST_DIMENSION = 1 << 28

SECRECY = 40.0
"""Bits: a graph with more than a 2^-40 chance of failing is refused by every policy."""

_FEWEST_NEIGHBOURS = 16


@dataclass(frozen=True)
class Terms:
    """Public constants of one masked sum; every signature and every key is bound to them.

    Attributes:
        run: which run, 1 to 64 characters.
        round: from 1, growing.
        plan: SHA-256 of the round's plan, 32 bytes.
        dimension: numbers in a vector.
        bits: of the modulus 2^bits, 8 to 32.
        survivors: smallest number of vectors a sum may have; the noise shares are sized for it.
    """

    run: str
    round: int
    plan: bytes
    dimension: int
    bits: int
    survivors: int

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("run (its length)", len(self.run), 1, 64),
            ("round", self.round, 1, 2**32 - 1),
            ("plan (its length)", len(self.plan), 32, 32),
            ("dimension", self.dimension, 1, MOST_DIMENSION),
            ("bits", self.bits, 8, 32),
            ("survivors", self.survivors, 1, MOST_PARTICIPANTS),
        ):
            if not low <= value <= high:
                raise ConfigError(
                    f"masking terms: {name} must be between {low} and {high}, got {value}"
                )

    @property
    def run_digest(self) -> bytes:
        """32 bytes that stand for the run in a message."""
        return digest(Purpose.TERMS, self.run.encode())

    @property
    def plan_digest(self) -> bytes:
        """32 bytes that stand for the plan and the numbers here in a message."""
        numbers = (self.dimension, self.bits, self.survivors)
        return digest(Purpose.TERMS, self.plan, *(n.to_bytes(8, "big") for n in numbers))

    @property
    def binding(self) -> bytes:
        """32 bytes for run, round and plan together."""
        return digest(
            Purpose.TERMS, self.run_digest, self.round.to_bytes(4, "big"), self.plan_digest
        )

    @property
    def vector_bytes(self) -> int:
        """Length of a packed vector."""
        return -(-self.dimension * self.bits // 8)


def default_threshold(degree: int) -> int:
    """Two thirds of the holders, rounded up."""
    return -(-2 * (degree + 1) // 3)


@functools.lru_cache(maxsize=256)
def default_degree(participants: int, colluding: float = 0.1, dropping: float = 0.1) -> int:
    """Neighbours of each participant: the fewest, even, that keep both failures rare.

    Everybody up to 17 participants, 16 at 50, 30 at 100, 124 at 1,000; from there it grows with
    the logarithm. Never fewer than 16, so that a third of the holders is more than a handful.

    Args:
        participants: on the roster.
        colluding: largest fraction of them that works with the server.
        dropping: largest fraction of them that may be lost.

    **Guarantee**: with `default_threshold`, `secrecy_bits` is at least 40, and the chance that
    losses void the round is below 2^-20.
    """
    most = participants - 1
    for degree in range(_FEWEST_NEIGHBOURS, most, 2):
        threshold = default_threshold(degree)
        few = degree + 1 - threshold + 1
        lost = _bits(participants, int(dropping * participants), degree, few)
        if lost >= 20.0 and secrecy_bits(participants, degree, threshold, colluding) >= SECRECY:
            return degree
    return most


def secrecy_bits(participants: int, degree: int, threshold: int, colluding: float) -> float:
    """-log2 of the chance that a server could open both secrets of any honest participant.

    It can when, of some participant's holders, at least twice the threshold less the number of
    holders collude: then honest holders who believe that it lives, and others who believe that it
    dropped, are enough with them for each threshold.

    Args:
        participants: on the roster; `colluding` times as many, rounded down, collude.
        degree: neighbours, drawn without the server's influence (see `docs/masking.md`).
        threshold: of the degree + 1 holders.
        colluding: a fraction.

    Returns:
        Infinity where it is impossible. A union bound over the participants.
    """
    needed = max(2 * threshold - (degree + 1), 0)
    return _bits(participants, int(colluding * participants), degree, needed)


def _bits(participants: int, marked: int, drawn: int, least: int) -> float:
    """-log2 of participants times P[at least `least` marked among the `drawn` neighbours]."""
    others = participants - 1
    marked = min(marked, others)
    low, high = max(least, drawn - (others - marked)), min(marked, drawn)
    if low > high:
        return math.inf
    every = _log_choose(others, drawn)
    total = math.fsum(
        math.exp(_log_choose(marked, i) + _log_choose(others - marked, drawn - i) - every)
        for i in range(low, high + 1)
    )
    return -math.log2(total * participants) if total > 0.0 else math.inf


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


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
    order, place = _ring(roster_digest, participants)
    here, half = int(place[position]), degree // 2
    steps = [step for step in range(-half, half + 1) if step]
    return sorted(int(order[(here + step) % participants]) for step in steps)


@functools.lru_cache(maxsize=4)
def _ring(roster_digest: bytes, participants: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Position by place in the ring, and place by position."""
    seed = Secret(digest(Purpose.GRAPH, roster_digest))
    words = keystream(seed, 2 * participants).astype("<u4").view("<u8")
    order = np.argsort(words, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(participants)
    return order, place


@dataclass(frozen=True)
class MaskingPolicy:
    """What a device's owner insists on, whatever a server asks for.

    Attributes:
        smallest_cohort, largest_cohort: participants on a roster.
        smallest_survivors: vectors in a sum.
        smallest_threshold: as a fraction of the holders, above one half.
        smallest_bits: of the modulus.
        colluding: fraction of the participants that may work with the server; the neighbour graph
            must be dense enough for it.
    """

    smallest_cohort: int = 10
    smallest_survivors: int = 7
    smallest_threshold: float = 2 / 3
    smallest_bits: int = 8
    colluding: float = 0.1
    largest_cohort: int = MOST_PARTICIPANTS

    def __post_init__(self) -> None:
        if self.smallest_cohort < 3 or self.smallest_survivors < 2:
            raise ConfigError(
                "masking policy: a cohort has at least 3 participants and a sum at least 2 "
                f"vectors, got {self.smallest_cohort} and {self.smallest_survivors}: with fewer "
                "the sum shows one person's numbers"
            )
        if not 0.5 < self.smallest_threshold <= 1.0:
            raise ConfigError(
                "masking policy: smallest_threshold must be above 0.5 and at most 1, got "
                f"{self.smallest_threshold}: at one half a server opens both secrets of a client"
            )
        if not 0.0 <= self.colluding < 1.0:
            raise ConfigError(
                f"masking policy: colluding must be at least 0 and below 1, got {self.colluding}"
            )

    def refuse_terms(self, terms: Terms) -> None:
        """Before anything is sent.

        Raises:
            ProtocolError: names the field that is weaker than the policy. The caller adds round
                and sender.
        """
        if terms.survivors < self.smallest_survivors:
            raise ProtocolError(
                f"the terms accept a sum of {terms.survivors} vectors, this device asks for "
                f"survivors >= {self.smallest_survivors}"
            )
        if terms.bits < self.smallest_bits:
            raise ProtocolError(
                f"the terms have a modulus of {terms.bits} bits, this device asks for bits >= "
                f"{self.smallest_bits}"
            )

    def refuse_cohort(self, participants: int, degree: int, threshold: int) -> None:
        """Before any share is made.

        Raises:
            ProtocolError: the cohort, the degree or the threshold is too small, or impossible; or
                the cohort is larger than the one that colluders were counted in.
        """
        self._refuse_small(participants)
        self._refuse_large(participants)
        self._refuse_threshold(participants, degree, threshold)
        self._refuse_sparse(participants, degree, threshold)

    def _refuse_small(self, participants: int) -> None:
        if participants < self.smallest_cohort:
            raise ProtocolError(
                f"the roster has {participants} participants, this device asks for at least "
                f"{self.smallest_cohort}"
            )

    def _refuse_large(self, participants: int) -> None:
        if participants > self.largest_cohort:
            raise ProtocolError(
                f"the roster has {participants} participants, the plan's cohort is "
                f"{self.largest_cohort}"
            )

    def _refuse_sparse(self, participants: int, degree: int, threshold: int) -> None:
        everybody = degree == participants - 1
        if not (everybody or (_FEWEST_NEIGHBOURS <= degree < participants and degree % 2 == 0)):
            raise ProtocolError(
                f"the roster gives each of {participants} participants {degree} neighbours, "
                f"expected {participants - 1} (everybody) or an even number from "
                f"{_FEWEST_NEIGHBOURS}"
            )
        bits = secrecy_bits(participants, degree, threshold, self.colluding)
        if bits < SECRECY:
            raise ProtocolError(
                f"{degree} neighbours and threshold {threshold} among {participants} participants, "
                f"of whom {self.colluding:.0%} collude, give {bits:.0f} bits of secrecy, this "
                f"device asks for {SECRECY:.0f}"
            )

    def _refuse_threshold(self, participants: int, degree: int, threshold: int) -> None:
        least = math.ceil(self.smallest_threshold * (degree + 1) - 1e-9)
        if not 0 < least <= threshold <= degree + 1 <= participants:
            raise ProtocolError(
                f"the roster has threshold {threshold} for {degree + 1} holders out of "
                f"{participants}, this device asks for {least} to {degree + 1}"
            )
