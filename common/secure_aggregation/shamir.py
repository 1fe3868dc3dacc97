"""Shamir's secret sharing of 32-byte secrets (Shamir 1979, "How to share a secret").

Over the integers mod 2^256 + 297, the smallest prime above 2^256: every 32-byte string is an
element, and a share is 33 bytes. All shares of a secret are one matrix product of 16-bit digits in
float64, which holds every sum exactly: a digit's product is below 2^32, and there are fewer than
2^14 terms of 17 digits.
"""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, ProtocolError
from .keys import Random, Secret

__all__ = ["PRIME", "SHARE_BYTES", "combine", "split"]

PRIME = 2**256 + 297
SHARE_BYTES = 33
_MAX_POINTS = 1 << 16
_DIGITS = 17  # of 16 bits: 272 are enough for 257


def split(secret: Secret, threshold: int, points: Sequence[int], random: Random) -> list[Secret]:
    """One share for each point: the value there of a random polynomial through the secret at 0.

    Args:
        secret: 32 bytes.
        threshold: shares that are needed; fewer say nothing about the secret.
        points: distinct positive numbers below 2^16, the holders' positions plus 1.
        random: draws the polynomial's other coefficients.

    Returns:
        33 bytes each, big-endian, below `PRIME`.

    Raises:
        ConfigError: the threshold is not between 1 and the number of points, or a point is wrong.
    """
    if not 1 <= threshold <= len(points) or len(set(points)) != len(points):
        raise ConfigError(
            f"a threshold must be between 1 and the number of distinct holders, got {threshold} "
            f"for {len(points)}"
        )
    if len(secret.value) != 32 or not all(0 < point < _MAX_POINTS for point in points):
        raise ConfigError("a shared secret has 32 bytes, and a point is between 1 and 65,535")
    # 16 bytes more than the prime has: the reduction is uniform up to 2^-127.
    drawn = random(49 * (threshold - 1))
    terms = [int.from_bytes(secret.value, "big")]
    terms += [
        int.from_bytes(drawn[start : start + 49], "big") % PRIME
        for start in reversed(range(0, len(drawn), 49))  # drawn highest first
    ]
    return [Secret(value.to_bytes(SHARE_BYTES, "big")) for value in _values(terms, points)]


def _values(terms: Sequence[int], points: Sequence[int]) -> list[int]:
    """Return the values of a polynomial, its constant term first, at the points."""
    # (points, digits, terms) @ (terms, digits): the sum for each pair of digits. Many small
    # products, not one large one, for which BLAS would wake its threads
    pairs = _all_powers(tuple(points), len(terms)) @ _digits(terms).astype(np.float64)
    sums = np.zeros((len(points), 2 * _DIGITS + 2), np.int64)
    for digit in range(_DIGITS):
        sums[:, digit : digit + _DIGITS] += pairs[:, digit].astype(np.int64)
    for digit in range(2 * _DIGITS + 1):
        sums[:, digit + 1] += sums[:, digit] >> 16
        sums[:, digit] &= 0xFFFF
    rows = sums.astype("<u2")
    return [int.from_bytes(row.tobytes(), "little") % PRIME for row in rows]


@functools.lru_cache(maxsize=2)
def _all_powers(points: tuple[int, ...], count: int) -> NDArray[np.float64]:
    """Return all powers of some points. A device shares two secrets among the same holders."""
    return np.array([_powers(point, count) for point in points], dtype=np.float64)


@functools.lru_cache(maxsize=2048)
def _powers(point: int, count: int) -> NDArray[np.uint16]:
    """Return 1, point, point^2 and so on, as digits, shape (digits, count). Points are public."""
    powers, power = list[int](), 1
    for _ in range(count):
        powers.append(power)
        power = power * point % PRIME
    return np.ascontiguousarray(_digits(powers).T)


def _digits(numbers: Sequence[int]) -> NDArray[np.uint16]:
    """Return numbers below `PRIME` in 16-bit digits, the lowest first, shape (n, digits)."""
    together = b"".join(number.to_bytes(2 * _DIGITS, "little") for number in numbers)
    return np.frombuffer(together, "<u2").reshape(-1, _DIGITS)


def combine(shares: Mapping[int, Secret], threshold: int) -> Secret:
    """Recover the secret from shares by point.

    Exactly `threshold` of them are used, those of the lowest points.

    Raises:
        ProtocolError: too few shares, a share in another format, or a value at 0 that no 32-byte
            secret has. The caller checks the secret against its commitment and names the sender.
    """
    points = tuple(sorted(shares)[:threshold])
    if threshold < 1 or len(points) < threshold:
        raise ProtocolError(f"{threshold} shares are needed, {len(shares)} are there")
    values = [_element(shares[point]) for point in points]
    result = sum(v * w for v, w in zip(values, _weights(points), strict=True)) % PRIME
    if result >> 256:
        raise ProtocolError("shares do not belong together: their secret is above 32 bytes")
    return Secret(result.to_bytes(32, "big"))


def _element(share: Secret) -> int:
    value = int.from_bytes(share.value, "big")
    if len(share.value) != SHARE_BYTES or value >= PRIME:
        raise ProtocolError("a share is not 33 bytes below the prime")
    return value


@functools.lru_cache(maxsize=64)
def _weights(points: tuple[int, ...]) -> tuple[int, ...]:
    """Compute Lagrange's weights at 0. The points are public, so the result may be cached."""
    product = 1
    for point in points:
        product = product * point % PRIME
    below = [
        point * math.prod([other - point for other in points if other != point]) % PRIME
        for point in points
    ]
    return tuple(product * inverse % PRIME for inverse in _inverses(below))


def _inverses(numbers: Sequence[int]) -> list[int]:
    """Invert numbers mod `PRIME`, with one inversion for all of them (Montgomery 1987)."""
    products = list(itertools.accumulate(numbers, lambda one, two: one * two % PRIME, initial=1))
    rest, found = pow(products[-1], -1, PRIME), []
    for number, before in zip(reversed(numbers), reversed(products[:-1]), strict=True):
        found.append(rest * before % PRIME)
        rest = rest * number % PRIME
    return found[::-1]
