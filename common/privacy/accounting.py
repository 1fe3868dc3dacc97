"""DpEvents to epsilon, and back.

Releases are recorded as `Charge`s; an epsilon is computed from the charges that happened. Plain
Gaussian releases compose exactly: k of them with multipliers z_i are one with
z = (sum z_i^-2)^(-1/2), whose privacy loss distribution (PLD) has a closed form (Balle, Wang 2018).
With Poisson sampling, dp_accounting's PLD accountant composes numerically, rounding upwards
(Doroshenko et al. 2022).

Integer noise is (ratio, slack)-close to the Gaussian noise that is accounted (see noise.py); then

    delta(eps) <= exp(R) delta_gauss(eps - 2 R) + (1 + exp(eps - R)) S,

R and S being the sums of the charges' `ratio` and `distance`.
"""

import functools
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, NoReturn, get_args

import dp_accounting
import numpy as np
from dp_accounting import dp_event, pld, rdp
from numpy.typing import NDArray
from scipy.special import log_ndtr

from ..errors import ConfigError, LedgerCorrupt, PrivacyError

__all__ = [
    "Adjacency",
    "Against",
    "Charge",
    "Unit",
    "calibrate",
    "delta",
    "epsilon",
    "payable",
    "within",
]

Unit = Literal["client", "example"]
Against = Literal["analyst", "server", "unmasked server"]
Adjacency = Literal["add_remove", "zero_out", "replace_one"]

_RELATIONS = {
    "add_remove": dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
    "zero_out": dp_accounting.NeighboringRelation.REPLACE_SPECIAL,
    "replace_one": dp_accounting.NeighboringRelation.REPLACE_ONE,
}
_INTERVAL = 1e-4
_FEW_ORDERS = (*range(2, 33), 40, 48, 64, 96, 128, 256, 512)


@dataclass(frozen=True)
class Charge:
    """What one recorded step cost: never less than what was released.

    Attributes:
        unit: whose presence is hidden, all of a client or one example.
        against: who sees the output that this noise protects; "unmasked server": one that reads
            this client's contribution alone, because masking is off or broken.
        adjacency: what neighbouring data sets are; required, there is no default.
        noise_multiplier: standard deviation over l2 sensitivity to adding or removing one unit
            (after rounding). 0: no privacy.
        sampling_rate: Poisson inclusion probability of the unit in a step; 1: always in.
        steps: identical releases in this charge.
        distance: total-variation slack of integer noise, for each step.
        ratio: log-likelihood ratio bound of integer noise outside that slack, for each step.

    Raises:
        ConfigError: a value is out of range or of the wrong type.
    """

    unit: Unit
    against: Against
    adjacency: Adjacency
    noise_multiplier: float
    sampling_rate: float = 1.0
    steps: int = 1
    distance: float = 0.0
    ratio: float = 0.0

    def __post_init__(self) -> None:
        for name, allowed in (("unit", Unit), ("against", Against), ("adjacency", Adjacency)):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in get_args(allowed):
                _refuse(name, f"one of {', '.join(get_args(allowed))}", value)
        for name in ("noise_multiplier", "sampling_rate", "distance", "ratio"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value < 0:
                _refuse(name, "a finite number of at least 0", value)
            object.__setattr__(self, name, float(value))
        if not 0 < self.sampling_rate <= 1:
            _refuse("sampling_rate", "above 0 and at most 1", self.sampling_rate)
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 1:
            _refuse("steps", "a whole number of at least 1", self.steps)

    @property
    def line(self) -> tuple[Unit, Against, Adjacency]:
        """What the charge is counted with: charges of two lines are never added up."""
        return self.unit, self.against, self.adjacency

    @property
    def event(self) -> dp_event.DpEvent:
        """The charge as a dp_accounting `DpEvent` (Gaussian, sampled, self-composed)."""
        event: dp_event.DpEvent = dp_event.GaussianDpEvent(self.noise_multiplier)
        if self.sampling_rate < 1:
            event = dp_event.PoissonSampledDpEvent(self.sampling_rate, event)
        return dp_event.SelfComposedDpEvent(event, self.steps) if self.steps > 1 else event

    def to_json(self) -> str:
        """Write the charge as canonical JSON: sorted keys, no spaces.

        The same charge gives the same bytes.
        """
        return json.dumps(vars(self), sort_keys=True, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Charge":
        """Exact inverse of `to_json`.

        Raises:
            LedgerCorrupt: not JSON, a field unknown, repeated, missing, of the wrong type or out
                of range (NaN, infinity, negative).
        """
        try:
            table = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
        except (ValueError, TypeError, RecursionError) as error:
            raise LedgerCorrupt(f"A charge must be one JSON object: {error}.") from error
        names = {field.name for field in fields(cls)}
        if not isinstance(table, dict) or set(table) != names:
            raise LedgerCorrupt(f"A charge must have exactly the fields {sorted(names)}.")
        try:
            return cls(**table)
        except ConfigError as error:
            raise LedgerCorrupt(str(error)) from error


def epsilon(charges: Iterable[Charge], delta: float) -> float:
    """Total epsilon of releases about one unit, composed.

    Args:
        charges: all of one unit, adversary and adjacency, in any order; none: 0.
        delta: 0 < delta < 1.

    Returns:
        The smallest epsilon found; infinite without noise, or when the slack exceeds delta.

    Raises:
        PrivacyError: units, adversaries or adjacencies are mixed.
        ConfigError: delta is out of range.

    **Guarantee**: an upper bound: the PLD is rounded upwards, slacks are added as at the top of
    this file, and the fixed point is approached in upward steps of at least 1e-6.
    """
    if not 0 < delta < 1:
        raise ConfigError(f"delta must be between 0 and 1, got {delta}; 1 / clients is too large.")
    total = _total(charges)
    return 0.0 if total is None else _epsilon(total, float(delta))


def within(charges: Iterable[Charge], delta: float, budget: float) -> bool:
    """Return whether `epsilon(charges, delta)` is at most `budget`.

    A device asks this before each release.

    A Renyi bound (Mironov 2017) answers in microseconds where there is room to spare; only near
    the budget is the exact figure computed, which takes up to a second for a history not met yet.

    **Guarantee**: True only where an upper bound on epsilon is within the budget.
    """
    total = _total(charges)
    if total is None:
        return True
    return _renyi_epsilon(total, delta) <= budget or _epsilon(total, delta) <= budget


def payable(
    release: Sequence[Charge],
    past: Sequence[Charge],
    delta: float,
    budget: float,
    count: int,
) -> int:
    """Return how many releases of this cost fit into the budget, at most `count`.

    Args:
        release: what one costs, all of one unit, adversary and adjacency.
        past: what was spent on that line already.
        delta, budget: as for `within`.
        count: how many are asked for, at least 1.

    **Guarantee**: what the ledger allows one after the other is at least this.
    """
    low, high = 0, count + 1
    while high - low > 1:
        middle = count if high > count else (low + high) // 2
        fits = within([*past, *[*release] * middle], delta, budget)
        low, high = (middle, high) if fits else (low, middle)
    return low


def delta(charges: Iterable[Charge], epsilon: float) -> float:
    """Return the smallest delta at a given epsilon of at least 0. Without charges it is 0.

    See `epsilon`.
    """
    if not epsilon >= 0:
        raise ConfigError(f"epsilon must be at least 0, got {epsilon}; correct it.")
    total = _total(charges)
    return 0.0 if total is None else _delta(total, epsilon)


def calibrate(
    target_epsilon: float,
    delta: float,
    participations: int,
    adjacency: Adjacency,
    distance: float = 0.0,
    ratio: float = 0.0,
) -> float:
    """Smallest noise multiplier for a number of unsampled releases, to a relative 1e-9.

    Args:
        target_epsilon: above 0.
        delta: 0 < delta < 1.
        participations: releases about one unit, at least 1.
        adjacency: as for `Charge`.
        distance: slack of each release.
        ratio: ratio of each release.

    Raises:
        ConfigError: an argument is out of range, or no noise reaches the target because of the
            slack: choose a finer grid.

    **Guarantee**: `epsilon` of the charges with the returned multiplier is at most the target.
    """
    if not (math.isfinite(target_epsilon) and target_epsilon > 0 and 0 < delta < 1):
        raise ConfigError(
            f"calibrate needs an epsilon above 0 and a delta between 0 and 1, got "
            f"{target_epsilon} and {delta}; correct them."
        )

    def enough(multiplier: float) -> bool:
        charge = Charge(
            "client", "analyst", adjacency, multiplier, 1.0, participations, distance, ratio
        )
        return epsilon([charge], delta) <= target_epsilon

    low, high = 1e-4, 1e7
    if not enough(high):
        raise ConfigError(
            f"No noise reaches epsilon {target_epsilon} at delta {delta} with {participations} "
            "releases, because of the integer noise's slack; choose a finer grid."
        )
    while high / low > 1 + 1e-9:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


class _Total(NamedTuple):
    """A canonical composition of charges.

    It is hashable, so equal histories share one computation.
    """

    adjacency: Adjacency
    # Sorted (noise multiplier, sampling rate, releases).
    parts: tuple[tuple[float, float, int], ...]
    distance: float
    ratio: float


def _total(charges: Iterable[Charge]) -> _Total | None:
    counts = Counter(charges)
    kinds = {charge.line for charge in counts}
    if len(kinds) > 1:
        raise PrivacyError(
            f"One epsilon is about one unit, adversary and adjacency, got {sorted(kinds)}; compute "
            "one for each."
        )
    if not kinds:
        return None
    releases: Counter[tuple[float, float]] = Counter()
    for charge, count in counts.items():
        releases[charge.noise_multiplier, charge.sampling_rate] += count * charge.steps
    distance = math.fsum(c.distance * c.steps * n for c, n in counts.items())
    ratio = math.fsum(c.ratio * c.steps * n for c, n in counts.items())
    parts = tuple(sorted((z, q, n) for (z, q), n in releases.items()))
    return _Total(kinds.pop()[2], parts, distance, ratio)


@functools.lru_cache(maxsize=4096)
def _epsilon(total: _Total, delta: float) -> float:
    # From below: each step feeds the slack that the last epsilon implies; it can only grow. The
    # upward step doubles, so that the search ends soon where it converges slowly.
    bound, step = -1.0, 1e-6
    while True:
        left = (delta - _slack(total, bound)) * _exp(-total.ratio)
        if not left > 0:
            return math.inf
        grown = _pure_epsilon(total, left) + 2.0 * total.ratio
        if grown <= bound or math.isinf(grown):
            return max(bound, grown)
        if total.distance:
            grown, step = grown + step, 2.0 * step
        bound = grown


@functools.lru_cache(maxsize=4096)
def _renyi_epsilon(total: _Total, delta: float) -> float:
    """Upper bound on the total: half of delta for the Renyi bound, half for the noise's slack."""
    if total.adjacency == "replace_one" or _one_gaussian(total) == 0:
        return math.inf
    curves = [n * _renyi(z, rate) for z, rate, n in total.parts]
    half = delta / 2 * _exp(-total.ratio)
    bound = float(rdp.compute_epsilon(_FEW_ORDERS, np.sum(curves, axis=0), half)[0])
    bound += 2.0 * total.ratio
    return bound if _slack(total, bound) <= delta / 2 else math.inf


@functools.lru_cache(maxsize=256)
def _renyi(multiplier: float, rate: float) -> NDArray[np.float64]:
    """Compute the Renyi divergence of one release at each of `_FEW_ORDERS`.

    It is that of add_remove. The one of zero_out is the same.
    """
    event: dp_event.DpEvent = dp_event.GaussianDpEvent(multiplier)
    if rate < 1:
        event = dp_event.PoissonSampledDpEvent(rate, event)
    accountant = rdp.RdpAccountant(_FEW_ORDERS, _RELATIONS["add_remove"])
    accountant.compose(event)
    return np.asarray(accountant._rdp, dtype=np.float64)


def _delta(total: _Total, epsilon: float) -> float:
    pure = _pure_delta(total, epsilon - 2.0 * total.ratio)
    return min(1.0, _exp(total.ratio) * pure + _slack(total, epsilon))


def _slack(total: _Total, epsilon: float) -> float:
    return (1.0 + _exp(epsilon - total.ratio)) * total.distance if total.distance else 0.0


def _pure_epsilon(total: _Total, delta: float) -> float:
    multiplier = _one_gaussian(total)
    if multiplier == 0:
        return math.inf
    if _sampled(total):
        return float(_accountant(total.adjacency, total.parts).get_epsilon(delta))
    return float(dp_accounting.get_epsilon_gaussian(multiplier, min(delta, 1.0)))


def _pure_delta(total: _Total, epsilon: float) -> float:
    multiplier = _one_gaussian(total)
    if multiplier == 0 or epsilon < 0:
        return 1.0
    if _sampled(total):
        return float(_accountant(total.adjacency, total.parts).get_delta(epsilon))
    # Balle, Wang 2018, theorem 8.
    shift, half = epsilon * multiplier, 0.5 / multiplier
    gain, loss = float(log_ndtr(half - shift)), epsilon + float(log_ndtr(-half - shift))
    return -math.exp(gain) * math.expm1(min(0.0, loss - gain))


def _sampled(total: _Total) -> bool:
    return any(rate < 1 for _, rate, _ in total.parts)


def _one_gaussian(total: _Total) -> float:
    """Return the noise multiplier of the one Gaussian that equals all unsampled releases.

    It is 0 if any release has no noise.
    """
    if any(multiplier == 0 for multiplier, _, _ in total.parts):
        return 0.0
    plain = math.fsum(n / z**2 for z, rate, n in total.parts if rate == 1)
    sensitivity = 2.0 if total.adjacency == "replace_one" else 1.0
    return 1.0 / (sensitivity * math.sqrt(plain)) if plain else math.inf


@functools.lru_cache(maxsize=64)
def _accountant(
    adjacency: Adjacency, parts: tuple[tuple[float, float, int], ...]
) -> pld.PLDAccountant:
    """dp_accounting's PLD accountant with everything composed into it."""
    plain = math.fsum(n / z**2 for z, rate, n in parts if rate == 1)
    # A tiny loss needs a finer grid; a very large one a coarser, upwards, to bound the table.
    spread = math.sqrt(math.fsum(n * (rate / z) ** 2 for z, rate, n in parts))
    interval = min(_INTERVAL, spread / 100)
    interval = max(interval, (plain / 2 + 10 * math.sqrt(plain)) / 1e6)
    accountant = pld.PLDAccountant(_RELATIONS[adjacency], interval)
    for multiplier, rate, releases in parts:
        if rate < 1:
            one = _sampled_once(adjacency, multiplier, rate, interval)
            accountant._pld = accountant._pld.compose(one.self_compose(releases))
    if plain:
        accountant.compose(dp_event.GaussianDpEvent(1.0 / math.sqrt(plain)))
    return accountant


@functools.lru_cache(maxsize=16)
def _sampled_once(adjacency: Adjacency, multiplier: float, rate: float, interval: float) -> Any:
    """PLD of one sampled release, as the accountant makes it: slow, and the same in every total."""
    return pld.privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=multiplier,
        value_discretization_interval=interval,
        sampling_prob=rate,
        neighboring_relation=_RELATIONS[adjacency],
    )


def _exp(exponent: float) -> float:
    """exp, infinite instead of an overflow."""
    return math.exp(exponent) if exponent < 700 else math.inf


def _refuse(name: str, expected: str, value: object) -> NoReturn:
    raise ConfigError(f"A charge's {name} must be {expected}, got {value!r}; correct it.")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a field occurs twice")
    return table


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number a charge may have")
