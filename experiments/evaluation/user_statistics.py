"""Is it personal? Statistics over users: one number per user in, one figure out.

A *gain* is what a user got, larger is better (shared loss minus personal loss). Pure functions; a
value that is NaN or infinite is refused, never skipped.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from ...common.errors import DataError

__all__ = [
    "Interval",
    "Mean",
    "bootstrap",
    "bootstrap_mean",
    "fraction_hurt",
    "gini",
    "paired_difference",
    "percentile",
    "ratio",
    "win_rate",
]

Values = Sequence[float] | NDArray[np.floating]

_CELLS = 2**21  # resampled values held at once


class Mean(TypedDict):
    """A mean over people and its interval; None: one person cannot give one."""

    mean: float
    ci95: list[float] | None


@dataclass(frozen=True)
class Interval:
    """A mean over users and its 95 % interval.

    Both ends are infinite when there is only one user.
    """

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """True when the whole interval is on one side of zero."""
        return self.low > 0 or self.high < 0

    def as_dict(self) -> Mean:
        """Return the interval as in `summary.json`. One that a single user cannot give is null.

        >>> Interval(1.0, 0.5, 1.5).as_dict()
        {'mean': 1.0, 'ci95': [0.5, 1.5]}
        """
        known = math.isfinite(self.low) and math.isfinite(self.high)
        return {"mean": self.mean, "ci95": [self.low, self.high] if known else None}


def bootstrap_mean(values: Values, *, draws: int = 2000, seed: int = 0) -> Interval:
    """The mean over users with a percentile bootstrap over users (Efron 1979).

    Args:
        values: one number per user.
        draws: resamples, at least 100.
        seed: public; the same seed gives the same interval.

    Returns:
        95 % interval. One user: the mean, and an infinite interval, for one user says nothing
        about others. All values equal: an interval of width 0.

    Raises:
        DataError: no user, NaN or infinity, or fewer than 100 draws.
    """
    numbers = _numbers("values", values)
    if draws < 100:
        raise DataError(f"A bootstrap needs at least 100 draws, got draws = {draws}; take more.")
    return bootstrap(np.mean, numbers, draws=draws, seed=seed)


def bootstrap(
    statistic: Callable[..., np.floating],
    *samples: NDArray[np.float64],
    draws: int,
    seed: int = 0,
) -> Interval:
    """A statistic of samples with a 95 % percentile bootstrap over what they are of (SciPy's).

    Args:
        statistic: of the samples, over the given `axis`.
        samples: one number per user each, (users,), drawn together; or per group of users.
        draws, seed: as for `bootstrap_mean`.

    Returns:
        As `bootstrap_mean`.
    """
    from scipy import stats  # takes its time

    value = float(statistic(*samples))
    if len(samples[0]) == 1:
        return Interval(value, -math.inf, math.inf)
    found = stats.bootstrap(
        samples,
        statistic,
        n_resamples=draws,
        batch=max(1, _CELLS // len(samples[0])),
        vectorized=True,
        paired=True,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    low, high = found.confidence_interval
    return Interval(value, float(low), float(high))


def ratio(above: NDArray[np.float64], below: NDArray[np.float64], axis: int = -1) -> np.floating:
    """Return the sum of the first over the sum of the second, such as a weighted mean."""
    quotient: np.floating = above.sum(axis) / below.sum(axis)
    return quotient


def paired_difference(
    first: Values, second: Values, *, draws: int = 2000, seed: int = 0
) -> Interval:
    """The mean over users of `first - second`, each user compared with itself.

    Raises:
        DataError: different numbers of users, or as `bootstrap_mean`.
    """
    left, right = _numbers("first", first), _numbers("second", second)
    if len(left) != len(right):
        raise DataError(
            f"A paired difference needs the same users on both sides, got {len(left)} and "
            f"{len(right)}; give one number per user to each."
        )
    return bootstrap_mean(left - right, draws=draws, seed=seed)


def win_rate(gains: Values, *, tolerance: float = 0.0) -> float:
    """Return the share of users with a gain above `tolerance`.

    A gain within it is a tie and counts half.

    >>> win_rate([1.0, 0.0, -1.0, 2.0])
    0.625
    """
    numbers = _numbers("gains", gains)
    limit = _tolerance(tolerance)
    return float(np.mean(numbers > limit) + np.mean(np.abs(numbers) <= limit) / 2)


def fraction_hurt(gains: Values, *, tolerance: float = 0.0) -> float:
    """Share of users who lost more than `tolerance`.

    >>> fraction_hurt([0.2, -0.01, -0.2], tolerance=0.05)
    0.3333333333333333
    """
    return float(np.mean(_numbers("gains", gains) < -_tolerance(tolerance)))


def percentile(values: Values, percent: float) -> float:
    """The value that `percent` % of the users are at or below, interpolated.

    Raises:
        DataError: `percent` outside 0..100, no user, NaN or infinity.
    """
    if not 0 <= percent <= 100:
        raise DataError(f"percent must be from 0 to 100, got {percent}.")
    return float(np.percentile(_numbers("values", values), percent))


def gini(values: Values) -> float:
    """How unequal non-negative values are: 0 all equal, near 1 one user has all (Gini 1912).

    All zero is equal: 0.

    Raises:
        DataError: a negative value (a Gini coefficient has no meaning then: give losses, or gains
            cut at zero), no user, NaN or infinity.

    >>> gini([1.0, 1.0, 1.0]), gini([0.0, 0.0, 0.0, 4.0])
    (0.0, 0.75)
    """
    numbers = np.sort(_numbers("values", values))
    if numbers[0] < 0:
        raise DataError(
            f"A Gini coefficient needs values of at least 0, got {numbers[0]:g}; give losses, or "
            "gains cut at zero."
        )
    if numbers[-1] == 0:
        return 0.0
    shares = numbers / numbers[-1]  # keeps tiny and huge values from under- and overflow
    count = len(shares)
    ranks = 2 * np.arange(1, count + 1) - count - 1
    return max(0.0, float((ranks * shares).sum() / (count * shares.sum())))


def _numbers(name: str, values: Values) -> NDArray[np.float64]:
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or not len(numbers):
        raise DataError(
            f"{name} must be one number per user and at least one user, got shape {numbers.shape}."
        )
    wrong = int((~np.isfinite(numbers)).sum())
    if wrong:
        raise DataError(
            f"{wrong} of the {len(numbers)} users in {name} have NaN or infinity; find out why, "
            "leaving them out would flatter the figure."
        )
    return numbers


def _tolerance(tolerance: float) -> float:
    if not 0 <= tolerance < math.inf:
        raise DataError(f"tolerance must be a number of at least 0, got {tolerance}.")
    return tolerance
