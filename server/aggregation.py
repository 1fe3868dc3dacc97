"""Sum -> mean -> new global adapter. Everything here is post-processing of the noised sum.

Weights are uniform and the denominator is the public cohort size, so no record count is needed
and removing a client moves the mean by at most clip / cohort.

Source: FedAvg (McMahan et al. 2017), FedAvgM (Hsu et al. 2019), FedAdam (Reddi et al. 2021).
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ..common.settings.sections import RoundSettings

__all__ = ["apply", "begin"]

Vector = NDArray[np.float32]
State = Mapping[str, Vector]


def begin(settings: RoundSettings, dimension: int) -> dict[str, Vector]:
    """The optimiser's state before the first round: zeros, by name."""
    names = {"fedavg": (), "fedavgm": ("momentum",), "fedadam": ("momentum", "second")}
    return {name: np.zeros(dimension, np.float32) for name in names[settings.optimizer]}


def apply(
    settings: RoundSettings, state: State, adapter: Vector, mean: NDArray[np.float64]
) -> tuple[Vector, dict[str, Vector]]:
    """One server step.

    Args:
        settings: optimiser and its constants.
        state: from `begin` or the round before.
        adapter: global adapter, shape (d,).
        mean: noised mean of the deltas, shape (d,).

    Returns:
        The new adapter and the new state; the arguments are left as they were.
    """
    if settings.optimizer == "fedavg":
        step, new = settings.learning_rate * mean, {}
    elif settings.optimizer == "fedavgm":
        momentum = settings.momentum * state["momentum"] + mean
        step, new = settings.learning_rate * momentum, {"momentum": momentum}
    else:
        momentum = settings.momentum * state["momentum"] + (1 - settings.momentum) * mean
        keep = settings.second_momentum
        second = keep * state["second"] + (1 - keep) * mean**2
        step = settings.learning_rate * momentum / (np.sqrt(second) + settings.adaptivity)
        new = {"momentum": momentum, "second": second}
    moved = (adapter + step).astype(np.float32)
    return moved, {name: value.astype(np.float32) for name, value in new.items()}
