"""Exact integer Skellam noise, and how close it is to a rounded Gaussian.

A Skellam variable is the difference of two Poisson variables of equal mean. Sums of independent
Skellam variables are Skellam, so shares drawn by many devices add up to the declared noise
(Agarwal, Kairouz, Liu 2021, "The Skellam mechanism for differentially private federated
learning").

**Why Gaussian accounting is allowed.** Let f(D) be an integer vector with l2 sensitivity D2.
Rounding commutes with integer shifts: round(f + z) = f + round(z). So f plus *rounded* Gaussian
noise of variance v is a post-processing of the Gaussian mechanism with noise multiplier
sqrt(v) / D2. Let the Skellam noise and the rounded Gaussian noise be (ratio, slack)-close: for
every event S, P(S) <= exp(ratio) Q(S) + slack, and the same with P and Q exchanged. Then

    delta_skellam(eps) <= exp(ratio) delta_gauss(eps - 2 ratio) + (1 + exp(eps - ratio)) slack,

and over several releases the ratios and the slacks add up. Total variation is the case ratio = 0,
slack = `gaussian_distance`. Because slack is multiplied by exp(eps), `gaussian_closeness` is the
better currency: it puts almost all of the difference into the ratio.
"""

import bisect
import functools
import hashlib
import math
import os
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError
from ..secure_aggregation.keys import Secret
from ..secure_aggregation.keystream import keystream

__all__ = [
    "Closeness",
    "SkellamTable",
    "Source",
    "SystemSource",
    "TestSource",
    "gaussian_closeness",
    "gaussian_distance",
    "skellam",
    "skellam_table",
    "source",
]

MAX_VARIANCE = 2.0**38
"""Largest variance of one draw, in grid units: a table of about 80 MB."""

# Values less likely than this are cut off; each side then loses at most 2^-61.
_CUTOFF = 2.0**-84
# Bound on the relative error of every tabulated probability. Measured against mpmath with 50
# digits at 16 variances from 0.1 to 2^38: below 2^-45.
_RELATIVE_ERROR = 2.0**-42
# Bound on the error of a log ratio to the rounded Gaussian (measured: below 2^-44).
_LOG_ERROR = 2.0**-41
_DEBYE_FROM = 2.0**10
_CHUNK = 1 << 16
_LOG_SLACK = 80 * math.log(2)


class Source(Protocol):
    """Where random words come from. Noise for release takes `SystemSource`, nothing else."""

    def words(self, count: int) -> NDArray[np.uint64]:
        """Draw `count` independent uniform 64-bit words, shape (count,)."""
        ...


class SystemSource:
    """The operating system's cryptographic generator, stretched by AES-256-CTR.

    A fresh key from `os.urandom` for each call; a tenth of the time of drawing every word there.
    """

    def words(self, count: int) -> NDArray[np.uint64]:
        """Draw words: the keystream of a key that is forgotten at once."""
        key = Secret(os.urandom(32))
        return keystream(key, 2 * count).astype("<u4", copy=False).view("<u8")

    def __repr__(self) -> str:
        return "SystemSource()"


class TestSource:
    """A repeatable stream for tests. **Not private**: who knows the seed can remove the noise.

    Args:
        seed: any integer.
        label: what the stream is for; different labels give unrelated streams.
    """

    __test__ = False  # pytest would collect it for its name

    def __init__(self, seed: int, label: str) -> None:
        self._key = f"privet test source\0{seed}\0{label}\0"
        self._calls = 0

    def words(self, count: int) -> NDArray[np.uint64]:
        """Draw the next words of the stream: SHAKE-256 of seed, label and call number."""
        self._calls += 1
        digest = hashlib.shake_256(f"{self._key}{self._calls}".encode()).digest(8 * count)
        return np.frombuffer(digest, dtype="<u8").astype(np.uint64, copy=False)

    def __repr__(self) -> str:
        return "TestSource(seed=***, label=***)"


def source(test_seed: int | None, label: str) -> Source:
    """The operating system's randomness, or a repeatable stream where a test seed is set."""
    return SystemSource() if test_seed is None else TestSource(test_seed, label)


@dataclass(frozen=True, eq=False)
class SkellamTable:
    """Cumulative probabilities of |X|, X Skellam, as 127-bit integers.

    Attributes:
        variance: of X, in grid units squared.
        bound: largest |X| that can be drawn.
        distance: upper bound on the total variation distance of one draw to the true Skellam.
        high: upper 63 bits of the thresholds, uint64, shape (bound + 1,), non-decreasing.
        low: lower 64 bits of the thresholds, uint64, same shape.
    """

    variance: float
    bound: int
    distance: float
    high: NDArray[np.uint64] = field(repr=False)
    low: NDArray[np.uint64] = field(repr=False)


@functools.lru_cache(maxsize=4)
def skellam_table(variance: float) -> SkellamTable:
    """Tabulate the Skellam distribution of a variance (both Poisson means are variance / 2).

    Probabilities come from the uniform asymptotic expansion of the Bessel function I (DLMF
    10.41.3, five terms) from variance 2^10 on, and from its backward recurrence below.

    Args:
        variance: grid units squared, 0 <= variance <= 2^38. Zero gives the constant 0.

    Raises:
        ConfigError: the variance is out of range.

    **Guarantee**: each value up to `bound` is drawn with its true probability up to a factor
    1 +- 2^-42; values beyond `bound`, of total probability below 2^-60, are never drawn.
    `distance` adds up both.
    """
    if not 0.0 <= variance <= MAX_VARIANCE:
        raise ConfigError(
            f"The Skellam variance must be between 0 and 2^38 grid units, got {variance}; "
            "choose a coarser grid."
        )
    _, masses = _pmf(variance)
    high, low = _thresholds(masses)
    bound = masses.size - 1
    return SkellamTable(variance, bound, _RELATIVE_ERROR + _tail(variance, bound), high, low)


def skellam(table: SkellamTable, count: int, source: Source) -> NDArray[np.int64]:
    """Draw independent Skellam integers.

    Args:
        table: from `skellam_table`.
        count: how many, 0 is allowed.
        source: the random words; the system's for anything that is released.

    Returns:
        int64, shape (count,), each at most `table.bound` in absolute value.

    **Guarantee**: decisions compare integers only. One bit is the sign; 63 bits are searched in
    the table; when they tie with a threshold (about once in 10^13 draws) 64 more bits decide.
    """
    drawn = np.empty(count, dtype=np.int64)
    for start in range(0, count, _CHUNK):
        part = drawn[start : start + _CHUNK]
        part[:] = _draw(table, source.words(part.size), source)
    return drawn


def _draw(table: SkellamTable, words: NDArray[np.uint64], source: Source) -> NDArray[np.int64]:
    searched = words >> np.uint64(1)
    # Sorted queries walk the table in order: three times faster than cache misses.
    order = np.argsort(searched)
    magnitude = np.empty(words.size, dtype=np.int64)
    magnitude[order] = np.searchsorted(table.high, searched[order], side="left")
    # The threshold found is at least the word, unless the word lies beyond the last one.
    unsettled = np.take(table.high, magnitude, mode="clip") <= searched
    for position in np.flatnonzero(unsettled):
        magnitude[position] = _settle(table, searched[position], source)
    sign = 1 - 2 * (words & np.uint64(1)).astype(np.int64)
    return sign * magnitude


def _settle(table: SkellamTable, word: np.uint64, source: Source) -> int:
    """Decide a tie of the upper words with 64 more bits.

    A draw beyond the last threshold is drawn again.
    """
    while True:
        left = int(np.searchsorted(table.high, word, side="left"))
        right = int(np.searchsorted(table.high, word, side="right"))
        low = source.words(1)[0]
        magnitude = left + int(np.searchsorted(table.low[left:right], low, side="right"))
        if magnitude < table.high.size:
            return magnitude
        word = source.words(1)[0] >> np.uint64(1)


def _thresholds(masses: NDArray[np.float64]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Cumulative weights of |X| in 127 bits: exact integer sums, each weight rounded once."""
    # P(|X| = k) = 2 p_k in units of 2^-63; the factor keeps the total below one.
    weights = masses * (2.0**64 * (1.0 - 2.0**-48))
    weights[0] /= 2.0
    whole = np.floor(weights)
    high = whole.astype(np.uint64)
    low = ((weights - whole) * 2.0**64).astype(np.uint64)
    low_sum = np.cumsum(low)
    carries = low_sum < low
    high_sum = np.cumsum(high) + np.cumsum(carries, dtype=np.uint64)
    high_sum.flags.writeable = low_sum.flags.writeable = False
    return high_sum, low_sum


def _pmf(variance: float, points: int | None = None) -> tuple[NDArray[np.float64], ...]:
    """Values k >= 0 and their probabilities, down to the cut-off.

    With `points`, from variance 2^10 on, only about that many equidistant values.
    """
    if variance < _DEBYE_FROM:
        masses = _recurrence(variance)
        masses = masses[masses >= _CUTOFF]
        return np.arange(masses.size, dtype=np.float64), masses
    limit, cutoff = _widest(variance), math.log(_CUTOFF)
    size = bisect.bisect_left(
        range(limit), True, key=lambda k: bool(_log_pmf(np.array([float(k)]), variance)[0] < cutoff)
    )
    stride = max(1, size // points) if points else 1
    values = np.arange(0, size, stride, dtype=np.float64)
    return values, np.exp(_log_pmf(values, variance))


def _widest(variance: float) -> int:
    """A value that is surely beyond the cut-off."""
    return math.ceil(12.0 * math.sqrt(variance)) + 40


def _recurrence(variance: float) -> NDArray[np.float64]:
    """Probabilities by I_(k+1)/I_k = x / (2 (k + 1) + x I_(k+2)/I_(k+1)), downwards: stable."""
    if variance == 0.0:
        return np.ones(1)
    size = _widest(variance)
    ratios = np.empty(size)
    ratio = 0.0
    for k in range(size + 100, 0, -1):
        ratio = variance / (2.0 * k + variance * ratio)
        if k <= size:
            ratios[k - 1] = ratio
    masses = np.concatenate(([1.0], np.cumprod(ratios)))
    return masses / (1.0 + 2.0 * math.fsum(masses[1:]))


def _log_pmf(values: NDArray[np.float64], variance: float) -> NDArray[np.float64]:
    """log P(X = k) = log(exp(-x) I_k(x)), x = variance >= 2^10, from Debye's expansion."""
    root = np.hypot(values, variance)
    y = (values / root) ** 2
    # One line a term: u_j(p) / k^j of DLMF 10.41.10 with p = k / root, so that k = 0 is regular.
    series = 1.0 + (3.0 - 5.0 * y) / (24.0 * root)
    series += (81.0 + y * (-462.0 + y * 385.0)) / (1152.0 * root**2)
    series += (30375.0 + y * (-369603.0 + y * (765765.0 - y * 425425.0))) / (414720.0 * root**3)
    fourth = 349922430.0 + y * (-446185740.0 + y * 185910725.0)
    series += (4465125.0 + y * (-94121676.0 + y * fourth)) / (39813120.0 * root**4)
    result: NDArray[np.float64] = (
        _exponent(values, variance) - 0.5 * np.log(2.0 * math.pi * root) + np.log(series)
    )
    return result


def _exponent(values: NDArray[np.float64], variance: float) -> NDArray[np.float64]:
    """sqrt(k^2 + x^2) - x - k asinh(k / x), without cancellation: the Chernoff exponent too."""
    slope = values / variance
    rise = slope * slope / (np.sqrt(1.0 + slope * slope) + 1.0)
    result: NDArray[np.float64] = variance * (rise - slope * np.arcsinh(slope))
    return result


def _tail(variance: float, bound: int) -> float:
    """Chernoff bound on P(|X| > bound)."""
    if variance == 0.0:
        return 0.0
    return 2.0 * math.exp(float(_exponent(np.array([bound + 1.0]), variance)[0]))


@dataclass(frozen=True)
class Closeness:
    """How close released noise is to rounded Gaussian noise.

    The top of this file has the definition.

    Attributes:
        ratio: bound on the absolute log-likelihood ratio, outside an event of small probability.
        slack: bound on the probability of that event, under either distribution.
    """

    ratio: float
    slack: float


@functools.lru_cache(maxsize=16)
def gaussian_closeness(variance: float, dimension: int, shares: int = 1) -> Closeness:
    """Closeness of what `skellam` draws to N(0, variance) rounded to integers.

    The log ratio of the two laws is computed value by value; over the coordinates it is a sum of
    independent bounded terms, and Bernstein's inequality bounds it up to probability 2^-80.
    About (2.3 sqrt(dimension) + 15,000) / variance: 8e-7 at variance 2^34.

    Args:
        variance: of the total noise in one coordinate, grid units squared.
        dimension: number of coordinates.
        shares: independent draws that add up to one coordinate's noise (each of variance
            `variance / shares`); sampler errors are counted for each.

    Returns:
        ratio and slack for one release of the whole vector. For a variance below 1 no useful
        statement is made: ratio 0, slack 1.

    **Guarantee**: an upper bound, given the error bounds stated at `skellam_table` and a float64
    error of a log ratio below 2^-41, which is added. From variance 2^10 on the ratio, a smooth
    function of k, is evaluated at 2^14 equidistant values.
    """
    if variance < 1.0:
        return Closeness(0.0, 1.0)
    skellam_mass, gauss_mass, log_ratio = _compare(variance)
    max_ratio = float(np.abs(log_ratio).max()) + _LOG_ERROR
    ratio = 0.0
    for mass in (skellam_mass, gauss_mass):
        mean = abs(float(mass @ log_ratio)) + _LOG_ERROR
        spread = math.sqrt(float(mass @ log_ratio**2)) + _LOG_ERROR
        bernstein = spread * math.sqrt(2.0 * dimension * _LOG_SLACK)
        bernstein += 2.0 / 3.0 * (max_ratio + mean) * _LOG_SLACK
        ratio = max(ratio, dimension * mean + bernstein)
    draws = dimension * shares
    # Either law puts at most 2^-60 outside the table's support.
    return Closeness(ratio + draws * _RELATIVE_ERROR, math.exp(-_LOG_SLACK) + draws * 2.0**-59)


def gaussian_distance(variance: float, dimension: int) -> float:
    """Upper bound on the total variation distance of the two noise laws.

    Between `dimension` independent Skellam(variance) integers and as many N(0, variance) rounded
    to the nearest integer: the smaller of `dimension` times the distance of one coordinate, and
    sqrt(2 H^2) where H^2 <= dimension times the squared Hellinger distance of one coordinate.
    For large variances it is about 0.11 sqrt(dimension) / variance: the excess kurtosis of a
    Skellam is 1 / variance, and rounding adds 1/12 to the Gaussian's variance.

    Args:
        variance: grid units squared; below 1 the answer is the trivial bound 1.
        dimension: number of coordinates.

    Returns:
        A number in [0, 1]. The sampler's own error, `SkellamTable.distance` a draw, is not in it.

    **Guarantee**: as for `gaussian_closeness`.
    """
    if variance < 1.0:
        return 1.0
    mass, _, log_ratio = _compare(variance)
    one = 0.5 * float(mass @ np.abs(np.expm1(-log_ratio))) + _LOG_ERROR
    hellinger = math.sqrt(0.5 * float(mass @ np.expm1(-0.5 * log_ratio) ** 2)) + _LOG_ERROR
    # Inside the table's support; cutting each law to it moves it by at most 2^-60 a coordinate.
    inside = min(dimension * one, math.sqrt(2.0 * dimension) * hellinger)
    return min(1.0, inside + dimension * 2.0**-59)


@functools.lru_cache(maxsize=16)
def _compare(variance: float) -> tuple[NDArray[np.float64], ...]:
    """Weights under Skellam and rounded Gaussian, and log of their ratio, by |k|."""
    values, masses = _pmf(variance, points=1 << 14)
    # P(round(Z) = k) by Gauss-Legendre quadrature of the density over [k - 1/2, k + 1/2].
    nodes, weights = np.polynomial.legendre.leggauss(24)
    nodes, weights = nodes / 2.0, weights / 2.0
    log_gauss = np.log(
        np.exp((-np.multiply.outer(values, nodes) - nodes**2 / 2.0) / variance) @ weights
    )
    log_gauss -= values**2 / (2.0 * variance) + 0.5 * math.log(2.0 * math.pi * variance)
    log_ratio = np.log(masses) - log_gauss
    stride = float(values[1] - values[0])
    counted = np.where(values == 0.0, stride, 2.0 * stride)
    return masses * counted, np.exp(log_gauss) * counted, log_ratio
