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
    "MaskingPolicy",
    "Terms",
    "default_degree",
    "default_threshold",
    "neighbours",
]

MOST_PARTICIPANTS = 1 << 14
"""Largest roster; it bounds every message but the vector."""

MOST_DIMENSION = 1 << 28

_DEGREE_FACTOR = 12.0


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


def default_degree(participants: int) -> int:
    """Neighbours of each participant: everybody in a small cohort, then 12 log2 n, even.

    **Guarantee**: with a tenth of the participants colluding and thresholds of two thirds, the
    chance that any honest participant has so many colluding holders that the server could open
    both of its secrets (twice the threshold, less the holders) is below 2^-36 for every cohort up
    to 16,384; as large is the chance that a tenth dropping out voids the round. A test computes
    both from the hypergeometric law. The neighbours must not be the server's choice for this; see
    `docs/masking.md`.
    """
    most = participants - 1
    wanted = 2 * math.ceil(_DEGREE_FACTOR * math.log2(max(participants, 2)) / 2)
    return most if wanted >= most else wanted


def default_threshold(degree: int) -> int:
    """Two thirds of the holders, rounded up."""
    return -(-2 * (degree + 1) // 3)


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
    """

    smallest_cohort: int = 10
    smallest_survivors: int = 7
    smallest_threshold: float = 2 / 3
    smallest_bits: int = 8
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
        self._refuse_sparse(participants, degree)
        self._refuse_threshold(degree, threshold)

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

    def _refuse_sparse(self, participants: int, degree: int) -> None:
        least = default_degree(participants)
        if not least <= degree < participants or (degree % 2 and degree != participants - 1):
            raise ProtocolError(
                f"the roster gives each of {participants} participants {degree} neighbours, "
                f"expected an even number from {least}, or {participants - 1} (everybody)"
            )

    def _refuse_threshold(self, degree: int, threshold: int) -> None:
        least = math.ceil(self.smallest_threshold * (degree + 1) - 1e-9)
        if not least <= threshold <= degree + 1:
            raise ProtocolError(
                f"the roster has threshold {threshold} for {degree + 1} holders, this device asks "
                f"for {least} to {degree + 1}"
            )
