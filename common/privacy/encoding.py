"""Reals to integers mod 2^bits and back.

A bounded vector is divided by the grid's step and rounded at random; noise is added as integers;
the result is taken mod 2^bits, where masks can be added to it. The formulas are those of
Kairouz, Liu, Steinke 2021, "The distributed discrete Gaussian mechanism for federated learning
with secure aggregation", section 4.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, GateRefused, PrivacyError, ProtocolError

__all__ = [
    "DEFAULT_BETA",
    "Grid",
    "cannot_wrap",
    "choose_grid",
    "decode",
    "pack",
    "round_randomly",
    "rounded_sensitivity",
    "unpack",
    "unwrap",
    "wrap",
]

DEFAULT_BETA = math.exp(-0.5)
"""Usual failure bound of conditional rounding: at most 61 % of the draws are repeated."""

NOISE_DEVIATIONS, NOISE_EXTRA = 12, 40
"""A truncated Skellam draw is at most 12 standard deviations plus 40, at every variance."""

# The noise sampler's table grows with the standard deviation in grid units.
_FINEST_NOISE = 2.0**17
_FINEST_CLIP = 2.0**24
_MAX_REDRAWS = 1000
_ROUND_CHUNK = 1 << 14  # stays in the cache: three times faster than the whole at once
# Numbers transposed at a time; a multiple of 64, small enough for the cache.
_PACK_CHUNK = 1 << 16


@dataclass(frozen=True)
class Grid:
    """The grid on which numbers are released: its step and its modulus.

    Attributes:
        step: distance of neighbouring grid points in real units, finite and above 0.
        bits: size of the modulus 2^bits, 8 to 32.
    """

    step: float
    bits: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.step) and self.step > 0):
            raise ConfigError(f"grid step must be finite and above 0, got {self.step}; correct it.")
        if not 8 <= self.bits <= 32:
            raise ConfigError(f"grid bits must be between 8 and 32, got {self.bits}; correct it.")


def rounded_sensitivity(
    bound: float, step: float, dimension: int, beta: float | None = None
) -> tuple[float, float]:
    """Largest norms of a clipped vector after randomised rounding, in grid units.

    Args:
        bound: l2 clip, real units.
        step: of the grid, real units.
        dimension: number of coordinates.
        beta: failure bound of conditional rounding, 0 < beta < 1; None or 0 for unconditional
            rounding, where only the worst case (c / g + sqrt(d)) holds.

    Returns:
        (l2, l1). The l2 norm is what `round_randomly` enforces when it is passed as `limit`.

    Raises:
        ConfigError: bound or step is not finite and above 0, or beta is out of range.
    """
    Grid(step, 32)
    if not (math.isfinite(bound) and bound > 0 and dimension >= 0):
        raise ConfigError(
            f"rounded_sensitivity needs a finite bound above 0 and dimension >= 0, got {bound} "
            f"and {dimension}; correct them."
        )
    if beta is not None and not 0 <= beta < 1:
        raise ConfigError(f"beta must be at least 0 and below 1, got {beta}; exp(-0.5) is usual.")
    ratio, root = bound / step, math.sqrt(dimension)
    l2 = ratio + root
    if beta:
        spread = math.sqrt(2.0 * math.log(1.0 / beta)) * (ratio + root / 2.0)
        l2 = min(l2, math.sqrt(ratio**2 + dimension / 4.0 + spread))
    return l2, l2 * min(root, l2)


def round_randomly(
    vector: NDArray[np.float64],
    step: float,
    source_words: Callable[[int], NDArray[np.uint64]],
    limit: float | None = None,
) -> NDArray[np.int64]:
    """Round each coordinate to one of its two grid neighbours, without bias.

    Args:
        vector: float64, shape (d,), clipped.
        step: of the grid.
        source_words: draws that many uniform 64-bit words (a source's `words`).
        limit: l2 bound in grid units from `rounded_sensitivity`; the whole vector is drawn again
            until it holds (conditional rounding). None: one draw, no check.

    Returns:
        int64, shape (d,); each entry has the expectation `vector / step`, up to 2^-53 of it.
        With a limit that redraws, the expectation is conditional.

    Raises:
        GateRefused: an entry is not finite or 2^31 grid steps or more.
        PrivacyError: the limit is too large to check in 64 bits, or 1,000 draws exceeded it, so
            it does not belong to this vector's clip.

    **Guarantee**: with a limit, the returned integers' norm is at most the limit, decided in
    integers. The coin compares 53 random bits with the fractional part.
    """
    flat = np.asarray(vector, dtype=np.float64)
    rounded = np.empty(flat.size, dtype=np.int64)
    for _ in range(_MAX_REDRAWS):
        for start in range(0, flat.size, _ROUND_CHUNK):
            part = flat[start : start + _ROUND_CHUNK]
            rounded[start : start + _ROUND_CHUNK] = _rounded(part / step, source_words)
        if limit is None or _within(rounded, limit):
            return rounded
    raise PrivacyError(
        f"Randomised rounding found no vector within the l2 limit of {limit} grid steps in "
        f"{_MAX_REDRAWS} draws; use the limit of the vector's own clip and grid."
    )


def _rounded(
    scaled: NDArray[np.float64], source_words: Callable[[int], NDArray[np.uint64]]
) -> NDArray[np.int64]:
    if not (np.abs(scaled) < 2.0**31).all():
        raise GateRefused(
            "Every entry must be finite and below 2^31 grid steps before rounding, but one is "
            "not; nothing was released. Choose a coarser grid."
        )
    floor = np.floor(scaled)
    # a fraction is a multiple of 2^-53 or closer to one than that: 53-bit coins are exact
    threshold = ((scaled - floor) * 2.0**53).astype(np.int64)
    coins = (source_words(scaled.size) >> np.uint64(11)).view(np.int64)
    result: NDArray[np.int64] = floor.astype(np.int64) + (coins < threshold)
    return result


def _within(rounded: NDArray[np.int64], limit: float) -> bool:
    if not limit < 2.0**31:
        raise PrivacyError(f"The l2 limit must be below 2^31 grid steps, got {limit}; coarsen.")
    real = rounded.astype(np.float64)
    # Far above the limit the integer sum could overflow; there the float sum is decisive.
    if float(real @ real) > 1.001 * limit * limit + 1.0:
        return False
    return int(rounded @ rounded) <= math.floor(limit * limit)


def wrap(integers: NDArray[np.int64], bits: int) -> NDArray[np.uint32]:
    """Reduce signed integers mod 2^bits, any int64 into uint32 of the same shape."""
    result: NDArray[np.uint32] = (integers & np.int64((1 << bits) - 1)).astype(np.uint32)
    return result


def unwrap(residues: NDArray[np.uint32], bits: int) -> NDArray[np.int64]:
    """Centred representatives, -2^(bits-1) to 2^(bits-1) - 1, of residues or wrapped sums.

    Bits above `bits` are ignored, so a sum taken mod 2^32 needs no reduction before.
    """
    reduced = residues.astype(np.int64) & np.int64((1 << bits) - 1)
    result: NDArray[np.int64] = reduced - ((reduced >> np.int64(bits - 1)) << np.int64(bits))
    return result


def decode(integers: NDArray[np.int64], step: float) -> NDArray[np.float64]:
    """Grid units to real units: float64, same shape."""
    return integers.astype(np.float64) * step


def choose_grid(
    clip: float,
    noise_std: float,
    summands: int,
    dimension: int,
    bits: int,
    max_coordinate: float | None = None,
) -> Grid:
    """The finest grid on which a sum provably cannot wrap.

    Never finer than 2^17 steps per standard deviation of the noise (the sampler's table), or,
    without noise, 2^24 steps per clip.

    Args:
        clip: l2 bound of a contribution, real units.
        noise_std: standard deviation of the total noise in one coordinate of the sum, real units;
            drawn at once or as up to `summands` equal shares. 0: no noise.
        summands: contributions in the sum.
        dimension: number of coordinates.
        bits: of the modulus.
        max_coordinate: bound on a coordinate of a contribution, where it is below the clip
            (rotation.py).

    Raises:
        ConfigError: a number is out of range, or the modulus is too small: the sum would wrap,
            or rounding would add more than the clip itself to the norm.
    """
    if not (math.isfinite(clip) and clip > 0 and math.isfinite(noise_std) and noise_std >= 0):
        raise ConfigError(
            f"choose_grid needs a finite clip above 0 and a finite noise_std of at least 0, got "
            f"{clip} and {noise_std}; correct them."
        )
    if summands < 1 or dimension < 1:
        raise ConfigError(
            f"choose_grid needs at least 1 summand and 1 dimension, got {summands} and {dimension}."
        )
    room = 2.0 ** (bits - 1) - 2.0 - summands * (NOISE_EXTRA + 2.0)
    reach = (
        summands * (clip if max_coordinate is None else max_coordinate)
        + NOISE_DEVIATIONS * math.sqrt(summands) * noise_std
    )
    coarsest = clip / math.sqrt(dimension)
    if room <= 0 or reach / room > coarsest:
        raise ConfigError(
            f"A modulus of {bits} bits is too small for {summands} contributions of {dimension} "
            "numbers with this clip and noise: the sum could wrap, or rounding would outweigh the "
            "clip; use more bits (at most 32) or a smaller cohort."
        )
    finest = noise_std / _FINEST_NOISE if noise_std else clip / _FINEST_CLIP
    # The factor keeps rounding of the divisions from mattering in `cannot_wrap`.
    return Grid(max(reach / room, finest) * (1.0 + 2.0**-40), bits)


def cannot_wrap(grid: Grid, clip: float, noise_bound: int, summands: int) -> bool:
    """Whether no sum of clipped, rounded, noised contributions can leave the centred range.

    Args:
        grid: step and modulus.
        clip: bound on each coordinate of a contribution (its l2 bound is one), real units.
        noise_bound: largest absolute value of the *total* noise in a coordinate, grid units: a
            draw's bound times the number of draws in the sum.
        summands: contributions in the sum.

    **Guarantee**: a coordinate of a rounded contribution is at most floor(clip / step) + 1 in
    absolute value, so the sum is at most `summands` times that plus `noise_bound`; True means
    that this is below 2^(bits-1). The comparison is between integers.
    """
    max_coordinate = math.floor(clip / grid.step) + 1
    return summands * max_coordinate + int(noise_bound) < 1 << (grid.bits - 1)


def pack(residues: NDArray[np.uint32], bits: int) -> bytes:
    """Residues to ceil(count * bits / 8) bytes: little-endian, lowest bit first, zero padding.

    Raises:
        ProtocolError: a residue is 2^bits or more.
    """
    if residues.size and int(residues.max()) >> bits:
        raise ProtocolError(f"Every residue must be below 2^{bits} to be packed; wrap them first.")
    per, words = 64 // math.gcd(bits, 64), bits // math.gcd(bits, 64)
    groups, step = -(-residues.size // per), _PACK_CHUNK // per
    packed = np.empty((groups, words), dtype="<u8")
    # one set of buffers: fresh ones would cost more than the work
    columns, lines = np.zeros((per, step), np.uint64), np.empty((words, step), np.uint64)
    moved = np.empty(step, np.uint64)
    for start in range(0, groups, step):
        part = residues[start * per :][:_PACK_CHUNK]
        size = -(-part.size // per)
        if part.size % per:
            part = np.concatenate((part, np.zeros(per - part.size % per, np.uint32)))
        np.copyto(columns[:, :size], part.reshape(size, per).T)
        lines[:] = 0
        for at, column in enumerate(columns):
            word, shift = divmod(at * bits, 64)
            lines[word] |= np.left_shift(column, np.uint64(shift), out=moved)
            if shift + bits > 64:
                lines[word + 1] |= np.right_shift(column, np.uint64(64 - shift), out=moved)
        packed[start : start + size] = lines[:, :size].T
    return packed.tobytes()[: -(-residues.size * bits // 8)]


def unpack(data: bytes, count: int, bits: int) -> NDArray[np.uint32]:
    """Exact inverse of `pack`: uint32, shape (count,), an own copy.

    Raises:
        ProtocolError: the length is not that of `count` residues, or padding bits are not zero.
            The caller knows the sender and the round and adds them.
    """
    expected = -(-count * bits // 8)
    if len(data) != expected:
        raise ProtocolError(
            f"{count} residues of {bits} bits take {expected} bytes, got {len(data)}; the message "
            "is cut or made for another layout."
        )
    padding = 8 * expected - count * bits
    if padding and data[-1] >> (8 - padding):
        raise ProtocolError(f"The last {padding} padding bits must be zero; the message is wrong.")
    per, words = 64 // math.gcd(bits, 64), bits // math.gcd(bits, 64)
    groups, mask = -(-count // per), np.uint64((1 << bits) - 1)
    padded = data + bytes(8 * groups * words - expected)
    packed = np.frombuffer(padded, dtype="<u8").reshape(groups, words)
    residues = np.empty((groups, per), dtype=np.uint32)
    for start in range(0, groups, _PACK_CHUNK // per):
        lines = np.ascontiguousarray(packed[start : start + _PACK_CHUNK // per].T)
        columns = np.empty((per, lines.shape[1]), dtype=np.uint32)
        for at in range(per):
            word, shift = divmod(at * bits, 64)
            value = lines[word] >> np.uint64(shift)
            if shift + bits > 64:
                value |= lines[word + 1] << np.uint64(64 - shift)
            columns[at] = value & mask
        residues[start : start + lines.shape[1]] = columns.T
    return residues.reshape(-1)[:count]
