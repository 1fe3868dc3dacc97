"""What the noised sums of a round's blocks say: means, and how well they are known.

**Guarantee**: a function of the noised sums and of public numbers only, so it costs no privacy.

Standard deviations beside losses and gains are those of the noise. Standard errors of arms count
sampling too: a comparison is about people in general, not about the cohort. Sampling variance is
taken from the noised squares, at the upper end of what their noise allows, and never above the
public range, 1 - mean^2 for an outcome in [-1, 1]. Where the noise is a third of the count or more,
quotients say nothing and are None.

Sources: the delta method for quotients of noised sums; the range bound on a variance, Bhatia and
Davis 2000.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..common.privacy.round_plan import Plan
from ..common.privacy.statistics_blocks import ENTRIES, Block, arm_names

__all__ = ["told"]

NORMAL_95 = 1.96
FEWEST = 2  # devices; below it a sample has no spread


def told(sums: dict[str, NDArray[np.float64]], plan: Plan, answered: int) -> dict[str, Any]:
    """The content of `statistics` in a round's record.

    Args:
        sums: noised, real units, by the names of `plan.blocks`.
        plan: the round.
        answered: contributions in the sums, each with its share of noise where devices add it.
    """
    adders = {"none": 0, "server": 1}.get(plan.noise_at, answered)
    found: dict[str, Any] = {}
    for block in plan.blocks:
        each, spread = sums[block.name], _spread(block, adders)
        if block.name == "losses":
            found |= _losses(each, spread, plan, answered)
        elif block.name == "gains":
            found |= _gains(each, spread, plan.gains_bound)
        else:
            found["arms"] = _arms(each, spread, plan)
    return found


def _spread(block: Block, adders: int) -> float:
    """Standard deviation of the noise in one entry of a block's sum, real units."""
    return float((adders * block.variance) ** 0.5 * block.step)


def _losses(
    sums: NDArray[np.float64], spread: float, plan: Plan, answered: int
) -> dict[str, float | None]:
    losses, records = map(float, sums)
    mean, deviation = _quotient(losses, records, spread)
    return {
        "train_loss": _times(plan.losses_bound, mean),
        "train_loss_std": _times(plan.losses_bound, deviation),
        "records_per_client": records * plan.batch_size / answered,
        "records_per_client_std": spread * plan.batch_size / answered,
    }


def _gains(sums: NDArray[np.float64], spread: float, bound: float) -> dict[str, float | None]:
    """Means over those who measured: above zero is better."""
    shared, personal, count = map(float, sums)
    found: dict[str, float | None] = {}
    for name, total in (("gain_shared", shared), ("gain_personal", personal)):
        mean, deviation = _quotient(total, count, spread)
        found |= {name: _times(bound, mean), f"{name}_std": _times(bound, deviation)}
    return found | {"measured": count, "measured_std": spread}


def _quotient(total: float, count: float, spread: float) -> tuple[float | None, float | None]:
    """Return total / count and the standard deviation of its noise, to first order.

    Both are None where the noise leaves nothing to say.
    """
    if count <= 3 * spread or count <= 0:
        return None, None
    mean = total / count
    return mean, spread * math.hypot(1, mean) / count


def _times(factor: float, value: float | None) -> float | None:
    return None if value is None else factor * value


def _arms(sums: NDArray[np.float64], spread: float, plan: Plan) -> list[dict[str, Any]]:
    """Return each arm's mean loss and standard error, and its difference to the first arm."""
    half = plan.arms_bound / 2
    found: list[dict[str, Any]] = []
    for name, row in zip(arm_names(plan.arms), sums.reshape(-1, ENTRIES["arms"]), strict=True):
        count, total, squares = map(float, row)
        mean, error = _outcome(count, total, squares, spread)
        loss = None if mean is None else half * (mean + 1)
        found.append(
            {"arm": name, "loss": loss, "loss_std": _times(half, error),
             "devices": count, "devices_std": spread}
        )  # fmt: skip
    first = found[0]
    for other in found[1:]:
        other |= {"difference": None, "ci95": None}
        if first["loss"] is not None and other["loss"] is not None:
            difference = other["loss"] - first["loss"]
            reach = NORMAL_95 * math.hypot(first["loss_std"], other["loss_std"])
            other |= {"difference": difference, "ci95": [difference - reach, difference + reach]}
    return found


def _outcome(
    count: float, total: float, squares: float, spread: float
) -> tuple[float | None, float | None]:
    """Mean outcome of an arm and its standard error: noise and sampling."""
    mean, noise = _quotient(total, count, spread)
    if mean is None or noise is None or count < FEWEST - 0.5:
        return None, None
    square = squares / count
    variance = square - mean**2
    slack = spread / count * math.hypot(1, 2 * mean, 2 * mean**2 - square)
    widest = max(0.0, 1 - min(1.0, abs(mean)) ** 2)
    likely = min(widest, max(0.0, variance + NORMAL_95 * slack))
    return mean, math.hypot(noise, (likely / max(count - 1, 1)) ** 0.5)
