"""The server optimisers: how a round's noised mean moves the shared adapter. One entry is one.

    fedavg   a step along the mean (McMahan et al. 2017)
    fedavgm  the mean with momentum (Hsu et al. 2019)
    fedadam  the same, each coordinate by the size that its means have had (Reddi et al. 2021)

Weights are uniform and the denominator is the public cohort size, so no record count is needed
and removing a client moves the mean by at most clip / cohort.

**Guarantee**: everything here is a function of public settings and of noised means, so it costs no
privacy.

Settings know the optimisers, so NumPy is loaded only where one steps.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vector = NDArray[np.float32]
    Mean = NDArray[np.float64]
    Memory = Mapping[str, Vector]
    Step = Callable[["Constants", Memory, Mean], tuple[Mean, Mapping[str, Mean]]]

__all__ = ["MOMENTUM", "OPTIMIZERS", "SQUARES", "Constants", "ServerOptimizer", "optimizer_named"]

MOMENTUM, SQUARES = "momentum", "second"
"""What an optimiser remembers of each coordinate, by name: a mean of steps, a mean of squares."""


class Constants(Protocol):
    """What a configuration says of the optimiser, in its section `rounds`."""

    @property
    def learning_rate(self) -> float:
        """Of the server's step."""

    @property
    def momentum(self) -> float:
        """What is kept of the momentum."""

    @property
    def second_momentum(self) -> float:
        """What is kept of the squares."""

    @property
    def adaptivity(self) -> float:
        """Adam's tau, in units of the mean delta."""


@dataclass(frozen=True)
class ServerOptimizer:
    """One way to move the shared adapter by a round's mean.

    Attributes:
        name: as in `rounds.optimizer`.
        step: from constants, memory and mean, what is added to the adapter and the new memory.
        remembers: what is in its memory; zeros before the first round.
    """

    name: str
    step: "Step"
    remembers: tuple[str, ...] = ()

    def begin(self, dimension: int) -> "dict[str, Vector]":
        """The memory before the first round: zeros, by name."""
        import numpy as np

        return {name: np.zeros(dimension, np.float32) for name in self.remembers}

    def apply(
        self, constants: Constants, memory: "Memory", adapter: "Vector", mean: "Mean"
    ) -> "tuple[Vector, dict[str, Vector]]":
        """Take one step.

        Args:
            constants: of the run.
            memory: from `begin` or the round before.
            adapter: the shared adapter, shape (d,).
            mean: noised mean of the deltas, shape (d,).

        Returns:
            The new adapter and the new memory; the arguments are left as they were.
        """
        import numpy as np

        step, new = self.step(constants, memory, mean)
        moved = (adapter + step).astype(np.float32)
        return moved, {name: value.astype(np.float32) for name, value in new.items()}


def _average(constants: Constants, _: "Memory", mean: "Mean") -> "tuple[Mean, Mapping[str, Mean]]":
    return constants.learning_rate * mean, {}


def _momentum(
    constants: Constants, memory: "Memory", mean: "Mean"
) -> "tuple[Mean, Mapping[str, Mean]]":
    momentum = constants.momentum * memory[MOMENTUM] + mean
    return constants.learning_rate * momentum, {MOMENTUM: momentum}


def _adam(
    constants: Constants, memory: "Memory", mean: "Mean"
) -> "tuple[Mean, Mapping[str, Mean]]":
    import numpy as np

    momentum = constants.momentum * memory[MOMENTUM] + (1 - constants.momentum) * mean
    keep = constants.second_momentum
    second = keep * memory[SQUARES] + (1 - keep) * mean**2
    step = constants.learning_rate * momentum / (np.sqrt(second) + constants.adaptivity)
    return step, {MOMENTUM: momentum, SQUARES: second}


OPTIMIZERS = {
    optimizer.name: optimizer
    for optimizer in (
        ServerOptimizer("fedavg", _average),
        ServerOptimizer("fedavgm", _momentum, remembers=(MOMENTUM,)),
        ServerOptimizer("fedadam", _adam, remembers=(MOMENTUM, SQUARES)),
    )
}
"""By name."""


def optimizer_named(name: str) -> ServerOptimizer:
    """The optimiser of this name.

    Raises:
        ValueError: there is none; names those there are.
    """
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    *others, last = map(repr, OPTIMIZERS)
    raise ValueError(f"{name!r}: expected {', '.join(others)} or {last}")
