"""Flattening by a random rotation: no coordinate of a contribution stays large.

Random signs from a public seed, then the orthonormal discrete cosine transform, which works for
any length. Every entry of that matrix is at most sqrt(2 / d), so a coordinate of a rotated vector
of norm c is a sum of independent signs with variance proxy 2 c^2 / d. A sum of rotated vectors
needs a smaller modulus; norms, and with them all sensitivities, stay as they are.

Source: Suresh et al. 2017 (rotation for quantisation), with a cosine transform in the place of
Hadamard's, so that nothing is padded.
"""

import hashlib
import math

import numpy as np
from numpy.typing import NDArray
from scipy.fft import dct, idct

__all__ = ["flat_bound", "rotate", "unrotate"]

_LOG_FAILURE = 60 * math.log(2)


def rotate(vector: NDArray[np.float64], seed: str) -> NDArray[np.float64]:
    """Rotate a vector of shape (d,) by the public seed.

    The norm stays the same up to float64 rounding.
    """
    turned: NDArray[np.float64] = dct(vector * _signs(seed, len(vector)), norm="ortho")
    return turned


def unrotate(vector: NDArray[np.float64], seed: str) -> NDArray[np.float64]:
    """Undo `rotate`. It is linear, so it may be applied to a noised sum."""
    turned: NDArray[np.float64] = idct(vector, norm="ortho")
    return turned * _signs(seed, len(vector))


def flat_bound(norm: float, dimension: int) -> float:
    """What no coordinate of a rotated vector of this norm exceeds, but with chance 2^-60.

    A device clamps what does: that shortens the vector, so no guarantee depends on the chance.
    Never above the norm itself.
    """
    spread = 2 * norm * math.sqrt((math.log(2 * dimension) + _LOG_FAILURE) / dimension)
    return min(norm, spread)


def _signs(seed: str, count: int) -> NDArray[np.float64]:
    octets = hashlib.shake_256(f"privet rotation\0{seed}".encode()).digest(-(-count // 8))
    bits = np.unpackbits(np.frombuffer(octets, dtype=np.uint8))[:count]
    return 1.0 - 2.0 * bits.astype(np.float64)
