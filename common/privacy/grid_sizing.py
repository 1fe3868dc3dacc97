"""How contributions of a round are encoded: grid, modulus, noise of one adder, rotation or not.

From public numbers only: cohort, clip, noise, dimension.
"""

import math
from dataclasses import dataclass

from ..errors import ConfigError
from ..settings.sections import ClientPrivacySettings
from .encoding import (
    NOISE_DEVIATIONS,
    NOISE_EXTRA,
    Grid,
    cannot_wrap,
    choose_grid,
    rounded_sensitivity,
)
from .mechanism import mechanism_of
from .rotation import flat_bound
from .statistics_blocks import Block

__all__ = ["Sizing", "size", "sized", "sized_block"]

FINE_ROUNDING = 1.002


@dataclass(frozen=True)
class Sizing:
    """How contributions are encoded: the grid, one adder's noise in its steps, flattened or not."""

    grid: Grid
    deviation: float
    rotated: bool


def size(client: ClientPrivacySettings, cohort: int, shares: int, dimension: int) -> Sizing:
    """Choose the grid of a round, where `shares` adders together carry the full noise.

    With `privacy.client.bits = 0` the smallest modulus is taken on which rounding lengthens a
    contribution by at most 0.2 % and the noise is as fine as its mechanism wants it
    (`Mechanism.fine_variance`); with a rotation where that saves bits.

    Raises:
        ConfigError: the modulus is too small for this cohort, clip and noise.
    """
    refused = ConfigError("no modulus was tried")
    for bits in [client.bits] if client.bits else range(16, 33):
        fitting = []
        for rotated in (False, True):
            try:
                fitting.append(sized(client, cohort, shares, dimension, bits, rotated))
            except ConfigError as error:
                refused = error
        # a rotation must earn its place with a finer grid
        fitting.sort(key=lambda sizing: (sizing.grid.step, sizing.rotated))
        if fitting and (client.bits or bits == 32):
            return fitting[0]
        fine = [sizing for sizing in fitting if _fine(client, shares, dimension, sizing)]
        if fine:
            return min(fine, key=lambda sizing: sizing.rotated)
    raise refused


def _fine(client: ClientPrivacySettings, shares: int, dimension: int, sizing: Sizing) -> bool:
    longer = rounded_sensitivity(client.clip, sizing.grid.step, dimension)[0] * sizing.grid.step
    mechanism = mechanism_of(client)
    noise = mechanism.counted_variance(sizing.deviation**2, shares)
    noise_is_fine = not noise or noise >= mechanism.fine_variance
    return longer <= FINE_ROUNDING * client.clip and noise_is_fine


def sized(
    client: ClientPrivacySettings,
    cohort: int,
    shares: int,
    dimension: int,
    bits: int,
    rotated: bool,
) -> Sizing:
    """The finest grid mod 2**bits on which the noised sum cannot wrap.

    One client's noise is measured against its norm after rounding, which is larger than the clip
    by up to sqrt(dimension) steps; so a coarser grid needs more noise, and more room for it.
    """
    whole = client.noise_multiplier if client.enabled else 0.0
    multiplier = mechanism_of(client).share(whole, shares)
    adders = 1 if client.noise_at == "server" else cohort
    largest = flat_bound(client.clip, dimension) if rotated else client.clip
    norm = client.clip
    while True:
        total = multiplier * norm * adders**0.5
        grid = choose_grid(client.clip, total, cohort, dimension, bits, largest)
        l2 = rounded_sensitivity(client.clip, grid.step, dimension)[0]
        noisiest = adders * math.ceil(NOISE_DEVIATIONS * multiplier * l2 + NOISE_EXTRA)
        if cannot_wrap(grid, largest, noisiest, cohort):
            return Sizing(grid, multiplier * l2, rotated)
        norm = l2 * grid.step


def sized_block(
    client: ClientPrivacySettings,
    cohort: int,
    shares: int,
    bits: int,
    block: Block,
    multiplier: float,
) -> Sizing:
    """The grid of a block of statistics: its own bound and noise, the adapter's modulus.

    Raises:
        ConfigError: that modulus is too small for the block's noise: its sum could wrap.
    """
    own = client.model_copy(update={"clip": block.bound, "noise_multiplier": multiplier})
    return sized(own, cohort, shares, block.size, bits, rotated=False)
