"""The blocks of statistics that may ride behind the adapter, in the same vector and modulus.

    losses  of the round's Poisson batch: sum of the losses, number of records
    gains   of one person's held-out records: base - shared, shared - personal, and a 1

A block has its own public l2 bound, grid and noise. `bound` is the most that a person can add,
`moved` the furthest that one record can move what a person adds. A record of a batch moves its
losses by its own share. Gains are computed from all of a person's records, and from a head fitted
on them, so that one record may change every number: `moved` is the diameter of what the gate lets
through (`Block.fits`), the same for every batch. Gains are in [-1, 1] of their public bound.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # every command reads settings, and few need numpy
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["BOUNDS", "DIAMETERS", "ENTRIES", "Block"]

ENTRIES = {"losses": 2, "gains": 3}
"""Numbers in a block."""

BOUNDS = {"losses": 1.5, "gains": math.sqrt(3)}
"""l2 bounds. Gains never pass theirs: three entries of at most 1. A record adds at most 1 to each
share of losses, so a batch of the public size, its losses at half their bound, has norm 1.12; where
the bound is passed, losses over records stays."""

# (-1, -1, 1) to (1, 1, 1). Nothing measured, is nearer to both
DIAMETERS = {"gains": math.sqrt(8)}


@dataclass(frozen=True)
class Block:
    """One block of one round, or the adapter as the first part of a contribution.

    Attributes:
        name: `losses`, `gains` or `adapter`.
        size: how many numbers.
        bound: l2 bound of one client's block.
        moved: the furthest one record moves it, l2.
        sampled: whether it is made from the round's Poisson batch, like the adapter's delta;
            otherwise from all of the person's records, in every round.
        step: of its grid.
        variance: of the noise one adder adds, in squared grid units.
    """

    name: str
    size: int
    bound: float
    moved: float
    sampled: bool
    step: float
    variance: float

    def fits(self, values: "NDArray[np.float64]") -> bool:
        """Return whether `bound` and `moved` hold for these values.

        The gate asks this.

        Args:
            values: shape (size,), finite. Losses are bounded by their clip and always fit.
        """
        if self.sampled or not values.any():
            return True
        return bool(values[2] == 1 and abs(values).max() <= 1)
