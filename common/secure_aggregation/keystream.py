"""Masks: the AES-256-CTR keystream as 32-bit words, added to a vector in place.

A word taken mod 2^bits is uniform, because 2^bits divides 2^32; so masks are added mod 2^32 and
the sum is reduced once. Each seed is used for one keystream only, so the counter starts at zero
(NIST SP 800-38A, section 6.5).
"""

from collections.abc import Sequence

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray

from ..errors import ConfigError
from .keys import Secret

__all__ = ["add_masks", "keystream"]

# 256 KiB of vector and as much of keystream stay in the cache while every mask is added: 0.62 ms a
# million words where 0.53 ms is the cipher's own; half and twice the size are slower.
_CHUNK = 1 << 16


def add_masks(
    vector: NDArray[np.uint32], added: Sequence[Secret], removed: Sequence[Secret]
) -> None:
    """Add the masks of some seeds and subtract those of others, mod 2^32, in place.

    Args:
        vector: uint32, shape (d,), contiguous; changed.
        added: 32-byte seeds.
        removed: 32-byte seeds.

    Memory beside the vector: one chunk, whatever d and the number of seeds.

    Raises:
        ConfigError: the vector is not a flat contiguous uint32 array.
    """
    if vector.dtype != np.uint32 or vector.ndim != 1 or not vector.flags.c_contiguous:
        raise ConfigError(f"masks need a flat contiguous uint32 vector, got {vector.dtype}")
    size = min(_CHUNK, vector.size)
    # little-endian words on every machine
    zeros, buffer = memoryview(bytes(4 * size)), bytearray(4 * size)
    words = np.frombuffer(buffer, dtype="<u4")
    streams: list[tuple[np.ufunc, CipherContext]] = [(np.add, _stream(seed)) for seed in added]
    streams += [(np.subtract, _stream(seed)) for seed in removed]
    for start in range(0, vector.size, _CHUNK):
        part = vector[start : start + _CHUNK]
        for operation, stream in streams:
            stream.update_into(zeros[: 4 * part.size], buffer)
            operation(part, words[: part.size], out=part)


def _stream(seed: Secret, counter: bytes = bytes(16)) -> CipherContext:
    return Cipher(algorithms.AES256(seed.value), modes.CTR(counter)).encryptor()


def keystream(seed: Secret, count: int) -> NDArray[np.uint32]:
    """The first `count` words of a seed's mask, shape (count,)."""
    vector = np.zeros(count, dtype=np.uint32)
    add_masks(vector, [seed], [])
    return vector
