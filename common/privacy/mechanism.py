"""The noise mechanism of a release: how it is drawn, what a claim may count, what it costs.

The gate, the server, the plans, A/B tests and all texts reach the noise through a `Mechanism`, and
get it from the plan of a round or, where there is no plan yet, from the settings. A second one is
its arithmetic in a file of its own, an instance here, a setting that `mechanism_of` reads, and a
field of the plan that `Plan.mechanism` reads. The plan maker fills the field; `Plan.from_dict`
refuses unknown names, and `refuse_if_laxer` a mechanism the device did not agree to. The field is
left out of `to_dict` and the digest while it is Skellam's, or the plans of old ledgers no longer
verify. A/B tests need the setting in `common/ab_test.py` too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..settings.sections import ClientPrivacySettings
from .encoding import rounded_sensitivity
from .noise import Closeness, Source, gaussian_closeness, skellam, skellam_table
from .statistics_blocks import Block

if TYPE_CHECKING:  # scipy: only where a cost is asked for
    from .accounting import Adjacency, Against, Charge, Unit

__all__ = ["SKELLAM", "Mechanism", "mechanism_of"]


@dataclass(frozen=True)
class Mechanism:
    """One kind of integer noise, and what a release under it costs.

    Attributes:
        name: the noise, as sentences name it.
        sample: variance of a coordinate in squared grid units, how many, source of random words ->
            independent integers, int64, shape (how many,).
        closeness: variance of the sum of all shares in a coordinate, number of coordinates, number
            of shares -> how close that sum is to a rounded Gaussian of this variance.
        fine_variance: from this variance of the sum on, the noise is as good as Gaussian; a grid
            that is chosen freely is made that fine.
        min_variance: of the sum, where a device agreed to the largest modulus, and so to a fine
            grid. What a release then costs beyond Gaussian noise of the same size is about a tenth
            of an epsilon; with few steps of noise it is a multiple.

    **Guarantee**: what an instance must keep. Variance 0 is no noise. No draw is beyond
    `encoding.NOISE_DEVIATIONS` standard deviations plus `NOISE_EXTRA`, so that no sum wraps. Shares
    of several adders add up, in the sense of `closeness`, which counts the sampler's errors too and
    is never zero: reports tell a release's noise from that inside training by it.
    """

    name: str
    sample: Callable[[float, int, Source], NDArray[np.int64]]
    closeness: Callable[[float, int, int], Closeness]
    fine_variance: float
    min_variance: float

    def counted_variance(self, variance: float, shares: int) -> float:
        """Variance that a claim may count of `shares` adders, each of whom adds `variance`."""
        return variance * shares

    def share(self, multiplier: float, shares: int) -> float:
        """Noise multiplier of one adder, where `shares` of them together have `multiplier`."""
        return float(multiplier / shares**0.5)

    def charge(
        self, part: Block, unit: "Unit", against: "Against", adjacency: "Adjacency", shares: int
    ) -> "Charge":
        """Return the cost of releasing one part of a contribution, without sampling.

        Args:
            part: what is released, on which grid, with which noise of one adder.
            unit: a client, which moves the part by its bound, or an example, by `part.moved`.
            against: who sees it.
            adjacency: what neighbouring data sets are.
            shares: adders whose noise that adversary does not know; 0: nothing is hidden.
        """
        from .accounting import Charge

        variance = self.counted_variance(part.variance, shares)
        if not variance:
            return Charge(unit, against, adjacency, 0.0)
        moved = part.bound if unit == "client" else part.moved
        longest = rounded_sensitivity(moved, part.step, part.size)[0]
        near = self.closeness(variance, part.size, shares)
        return Charge(
            unit, against, adjacency, float(variance**0.5 / longest),
            distance=near.slack, ratio=near.ratio,
        )  # fmt: skip


def _skellam(variance: float, count: int, source: Source) -> NDArray[np.int64]:
    return skellam(skellam_table(variance), count, source)


SKELLAM = Mechanism(
    "Skellam noise", _skellam, gaussian_closeness, fine_variance=2.0**21, min_variance=2.0**18
)
"""Exact integer Skellam noise (`noise.py`): from 2^21 on a log-likelihood ratio below 0.01 tells
it from Gaussian noise."""


def mechanism_of(_client: ClientPrivacySettings) -> Mechanism:
    """Return the noise mechanism that a run's settings ask for. There is one so far."""
    return SKELLAM
