"""What the noised sums of a round's blocks say: means, and how well they are known.

**Guarantee**: a function of the noised sums and of public numbers only, so it costs no privacy.

Standard deviations beside losses and gains are those of the noise. Where the noise is a third of
the count or more, quotients say nothing and are None. Source: the delta method for quotients of
noised sums.
"""

import math

import numpy as np
from numpy.typing import NDArray

from ..common.privacy.round_plan import Plan
from ..common.privacy.statistics_blocks import Block

__all__ = ["statistics_of"]


def statistics_of(
    sums: dict[str, NDArray[np.float64]], plan: Plan, answered: int
) -> dict[str, float | None]:
    """The content of `statistics` in a round's record.

    Args:
        sums: noised, real units, by the names of `plan.blocks`.
        plan: the round.
        answered: contributions in the sums, each with its share of noise where devices add it.
    """
    adders = {"none": 0, "server": 1}.get(plan.noise_at, answered)
    statistics: dict[str, float | None] = {}
    for block in plan.blocks:
        each, spread = sums[block.name], _spread(block, adders)
        if block.name == "losses":
            statistics |= _losses(each, spread, plan, answered)
        else:
            statistics |= _gains(each, spread, plan.gains_bound)
    return statistics


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
    gains: dict[str, float | None] = {}
    for name, total in (("gain_shared", shared), ("gain_personal", personal)):
        mean, deviation = _quotient(total, count, spread)
        gains |= {name: _times(bound, mean), f"{name}_std": _times(bound, deviation)}
    return gains | {"measured": count, "measured_std": spread}


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
