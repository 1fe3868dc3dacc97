"""The same epsilon by an independent accountant: Opacus instead of dp_accounting."""

import math
import warnings
from collections.abc import Iterable

import numpy as np
from opacus.accountants import PRVAccountant, RDPAccountant

from ...common.errors import PrivacyError
from ...common.privacy.accounting import Charge, epsilon

__all__ = ["cross_check"]

# Fractional orders above 11 overflow in Opacus.
_ORDERS = [1 + x / 10 for x in range(1, 100)] + list(range(11, 64)) + [80, 128, 256, 512]
# PRV takes exponentials of losses up to about this.
_LARGEST = 500.0
_MESH_POINTS = 1e6


def cross_check(charges: Iterable[Charge], delta: float) -> tuple[str, float]:
    """Compute the total of some charges with Opacus.

    Gopi, Lee, Wutschitz 2021 (PRV); where it fails numerically, Mironov et al. 2019 (RDP), which
    is looser by up to some 15 %.

    Args:
        charges: as for `common.accounting.epsilon`; none: 0.
        delta: 0 < delta < 1.

    Returns:
        ("opacus.prv" or "opacus.rdp", epsilon). PRV's own upper error bound is not added, because
        the figure is for comparison; it is 0.5 % of epsilon, more only for epsilons below 0.01.

    Raises:
        PrivacyError: Opacus has no accountant for this (replace_one with Poisson sampling), or
            units are mixed.
    """
    found = list(charges)
    total = epsilon(found, delta)
    if not found or math.isinf(total):
        return "opacus.prv", total
    # The slack of integer noise enters as in common/privacy/accounting.py, the divergence does not.
    ratio = math.fsum(charge.ratio * charge.steps for charge in found)
    distance = math.fsum(charge.distance * charge.steps for charge in found)
    slack = (1.0 + math.exp(total - ratio)) * distance if distance else 0.0
    left = (delta - slack) * math.exp(-ratio)
    history = _history(found)
    loose = _rdp(history, left)
    try:
        tight = _prv(history, left, loose) if loose < _LARGEST else math.nan
    except (ArithmeticError, IndexError, MemoryError, RuntimeError, ValueError):
        tight = math.nan
    # RDP is an upper bound; a PRV figure above it, or NaN, is a numerical failure.
    if tight <= 1.01 * loose:
        return "opacus.prv", tight + 2.0 * ratio
    return "opacus.rdp", loose + 2.0 * ratio


def _history(charges: list[Charge]) -> list[tuple[float, float, int]]:
    """Opacus's (noise multiplier, sampling rate, steps), equal steps merged."""
    merged: dict[tuple[float, float], int] = {}
    for charge in charges:
        multiplier = charge.noise_multiplier
        if charge.adjacency == "replace_one":
            if charge.sampling_rate < 1:
                raise PrivacyError(
                    "Opacus has no accountant for replace_one adjacency with Poisson sampling; "
                    "cross-check under add_remove."
                )
            multiplier /= 2.0
        key = (multiplier, charge.sampling_rate)
        merged[key] = merged.get(key, 0) + charge.steps
    return [(multiplier, rate, steps) for (multiplier, rate), steps in merged.items()]


def _rdp(history: list[tuple[float, float, int]], delta: float) -> float:
    accountant = RDPAccountant()
    accountant.history = list(history)
    with warnings.catch_warnings():
        # It warns when the best order is the largest or smallest; the bound holds anyway.
        warnings.filterwarnings("ignore", message="Optimal order is the", category=UserWarning)
        return float(accountant.get_epsilon(delta, alphas=_ORDERS))


def _prv(history: list[tuple[float, float, int]], delta: float, loose: float) -> float:
    """PRV's estimate, on a mesh of 0.5 % of the RDP bound."""
    accountant = PRVAccountant()
    accountant.history = list(history)
    delta_error = delta / 1000
    steps = sum(count for _, _, count in history)
    finest = (loose + 3.0) / _MESH_POINTS * math.sqrt(steps * math.log(12 / delta_error) / 2)
    eps_error = min(0.5, max(finest, loose / 200))
    with np.errstate(divide="ignore"), warnings.catch_warnings():
        # log(1 - q) at q = 1; domains of one step are deliberately wide.
        warnings.filterwarnings("ignore", category=UserWarning)
        discrete = accountant._get_dprv(eps_error=eps_error, delta_error=delta_error)
        return float(discrete.compute_epsilon(delta, delta_error, eps_error)[1])
