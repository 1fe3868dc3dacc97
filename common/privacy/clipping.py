"""A vector becomes a bounded vector: the clip every client-level claim rests on."""

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ConfigError, GateRefused

__all__ = ["Clipped", "clip"]

# Relative margin that covers the rounding of a float64 dot product in any summation order.
_MARGIN = 2.0**-40


@dataclass(frozen=True, eq=False)
class Clipped:
    """A contribution whose l2 norm is known to be at most `bound`.

    Attributes:
        vector: float64, shape (d,), read-only. Sensitive until noised, so `repr` hides it.
        bound: the public l2 bound that the vector respects.
    """

    vector: NDArray[np.float64] = field(repr=False)
    bound: float


def clip(vector: ArrayLike, bound: float) -> Clipped:
    """Scale a contribution down to the l2 ball of radius `bound`.

    Args:
        vector: real numbers of any shape; flattened in C order. All tensors of a contribution
            belong into this one vector: clipping them one by one bounds nothing.
        bound: largest l2 norm, finite and above zero.

    Returns:
        The flattened copy. A vector inside the ball comes back unchanged, zero stays zero, an
        empty vector stays empty.

    Raises:
        GateRefused: some entry is NaN or infinite.
        ConfigError: the bound is not a finite positive number.

    **Guarantee**: the norm, computed in float64, is at most `bound`, for every input that is not
    refused. The map is the projection on a ball, so it moves no two inputs further apart, up to
    a relative 2^-40 (the margin by which a clipped vector stays inside).
    """
    if not (math.isfinite(bound) and bound > 0):
        raise ConfigError(f"The clip bound must be finite and above 0, got {bound}; correct it.")
    flat = np.array(vector, dtype=np.float64).reshape(-1)
    if not np.isfinite(flat).all():
        raise GateRefused(
            "The contribution must be finite before clipping, but it has NaN or infinite entries; "
            "nothing was released. Lower the learning rate or check the records."
        )
    norm = _norm(flat)
    while norm > bound:  # a second time where the first quotient was too small to have its digits
        factor = bound / norm * (1.0 - _MARGIN)
        # Two factors, because bound / norm alone may underflow for huge entries.
        peak = float(np.abs(flat).max())
        flat = (flat / peak) * min(peak * factor, bound)
        norm = _norm(flat)
    flat.flags.writeable = False
    return Clipped(flat, float(bound))


def _norm(flat: NDArray[np.float64]) -> float:
    """Compute the l2 norm without overflow or underflow of the squares.

    Empty vectors have norm 0.
    """
    peak = float(np.abs(flat).max(initial=0.0))
    if peak == 0.0:
        return 0.0
    scaled = flat / peak
    return peak * math.sqrt(float(scaled @ scaled))
