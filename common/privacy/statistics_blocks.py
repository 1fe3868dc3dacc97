"""The blocks of statistics that may ride behind the adapter, in the same vector and modulus.

    losses  of the round's Poisson batch: sum of the losses, number of records
    gains   of one person's held-out records: base - shared, shared - personal, and a 1
    arms    of a comparison (A/B): for each arm a 1, an outcome, its square; only the own arm's

A block has its own public l2 bound, grid and noise. `bound` is the most that a person can add,
`moved` the furthest that one record can move what a person adds. A record of a batch moves its
losses by its own share. Gains and arms are computed from all of a person's records, and from a head
fitted on them, so that one record may change every number: `moved` is the diameter of what the gate
lets through (`Block.fits`), the same for every batch.

Gains are in [-1, 1] of their public bound. A loss is an outcome in [-1, 1], 2 loss / bound - 1: the
same l2 bound as for [0, 1] carries twice the resolution. The square is worth its place: without it
a sampling error must assume the public range. With noise of 3 times the bound, losses spread like
0.06 of the range and 32 / 100 / 500 devices an arm, an arm's standard error is 0.19 / 0.06 / 0.012
with the square and 0.22 / 0.11 / 0.046 without.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # every command reads settings, and few need numpy
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["ARMS", "BOUNDS", "ENTRIES", "MAX_ARMS", "Block", "arm_names"]

ARMS = ("base", "shared", "personal")
"""The models that a comparison may compare."""

MAX_ARMS = 8
ENTRIES = {"losses": 2, "gains": 3, "arms": 3}
"""Numbers in a block; of arms, for each arm."""

BOUNDS = {"losses": 1.5, "gains": math.sqrt(3), "arms": math.sqrt(3)}
"""l2 bounds. Gains and arms never pass theirs: three entries of at most 1. A record adds at most 1
to each share of losses, so a batch of the public size, its losses at half their bound, has norm
1.12; where the bound is passed, losses over records stays."""

# of gains: (-1, -1, 1) to (1, 1, 1); of arms: (1, -1, 1) to (1, 1, 1). Nothing measured, all zero,
# is nearer to each of these than they are to each other.
DIAMETERS = {"gains": math.sqrt(8), "arms": 2.0}


@dataclass(frozen=True)
class Block:
    """One block of one round, or the adapter as the first part of a contribution.

    Attributes:
        name: `losses`, `gains`, `arms` or `adapter`.
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
        if self.name == "gains":
            return bool(values[2] == 1 and abs(values).max() <= 1)
        rows = values.reshape(-1, ENTRIES["arms"])
        used = rows[rows.any(axis=1)]
        one, outcome, square = used[0]
        return bool(
            len(used) == 1 and one == 1 and abs(outcome) <= 1 and square == outcome * outcome
        )


def arm_names(text: str) -> tuple[str, ...]:
    """Parse `shared,personal` into its arms. An empty text has none.

    Raises:
        ValueError: an unknown arm, fewer than 2, more than 8, or all the same.
    """
    names = tuple(text.split(",")) if text else ()
    if names and not (set(names) <= {*ARMS} and len(names) <= MAX_ARMS and len({*names}) > 1):
        raise ValueError(
            f"expected 2 to {MAX_ARMS} of {', '.join(ARMS)}, at least two of them different"
        )
    return names
