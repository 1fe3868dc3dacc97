"""The one maker of round plans: for server, simulation, A/B tests and the owner's consent text.

**Guarantee**: a plan is a function of the run's settings and of public numbers only. Whoever makes
it from the same settings makes the same grid and the same noise, so that what an owner is shown
before a run is what the ledger charges for its first release.
"""

import dataclasses
import hashlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError
from ..model.exchange_layout import Exchange
from ..settings.config import Config
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
from .round_plan import Plan
from .statistics_blocks import Block

__all__ = ["Sizing", "make_plan", "size"]

FINE_ROUNDING = 1.002


def make_plan(
    config: Config,
    run: str,
    number: int,
    layout: str,
    adapter: NDArray[np.float32],
    exchange: Exchange | None = None,
) -> Plan:
    """The public constants of one round, from the configuration and the state only.

    Args:
        config: the run's settings.
        run: its id.
        number: of the round, from 1.
        layout: digest of what a contribution holds, where `exchange` does not say it.
        adapter: the state that the round starts from.
        exchange: what of it a contribution to this round holds; None: all of it.

    Raises:
        ConfigError: `privacy.client.bits` is too small for this cohort, clip and noise.
    """
    client = config.privacy.client
    cohort = config.rounds.cohort
    noise_at = client.noise_at if client.enabled else "none"
    masked = noise_at == "distributed"
    survivors = config.min_sum if masked else 0
    colluders = config.colluders if masked else 0
    shares = survivors - colluders if masked else 1
    released = None if exchange is None else exchange.released(number)
    dimension = len(adapter) if released is None else released.dimension
    sizing = size(client, cohort, shares, dimension)
    plan = Plan(
        run=run,
        round=number,
        layout=layout if released is None else released.digest,
        start=hashlib.sha256(adapter.tobytes()).hexdigest(),
        cohort=cohort,
        clip=client.clip,
        step=sizing.grid.step,
        bits=sizing.grid.bits,
        rotated=sizing.rotated,
        noise_at=noise_at,
        variance=sizing.deviation**2,
        survivors=survivors,
        colluders=colluders,
        **_work(config),
    )
    return dataclasses.replace(plan, **_block_grids(config, plan))


def _block_grids(config: Config, plan: Plan) -> dict[str, Any]:
    """The fields of a plan for the grid and noise of each of its blocks."""
    grids: dict[str, Any] = {}
    for block in plan.blocks:
        multiplier = config.statistics.multiplier(block.name)
        sizing = _sized_block(config.privacy.client, plan, block, multiplier)
        grids[f"{block.name}_step"] = sizing.grid.step
        grids[f"{block.name}_variance"] = sizing.deviation**2
    return grids


def _work(config: Config) -> dict[str, Any]:
    """The fields of a plan that say how a device trains: straight from the run's settings."""
    training, example = config.training, config.privacy.example
    return {
        "learning_rate": training.learning_rate,
        "local_steps": training.steps,
        "batch_size": training.batch_size,
        "rate": config.sampling_rate,
        "record_clip": example.clip if example.enabled else 0.0,
        "record_noise": example.noise_multiplier if example.enabled else 0.0,
        **config.statistics.asked(),
    }


# --- how contributions are encoded: from public numbers only -----------------------------------


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
                fitting.append(_sized(client, cohort, shares, dimension, bits, rotated))
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


def _sized(
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
    noise = client.noise_multiplier if client.enabled else 0.0
    multiplier = mechanism_of(client).share(noise, shares)
    adders = 1 if client.noise_at == "server" else cohort
    max_coordinate = flat_bound(client.clip, dimension) if rotated else client.clip
    norm = client.clip
    while True:
        total = multiplier * norm * adders**0.5
        grid = choose_grid(client.clip, total, cohort, dimension, bits, max_coordinate)
        l2 = rounded_sensitivity(client.clip, grid.step, dimension)[0]
        noisiest = adders * math.ceil(NOISE_DEVIATIONS * multiplier * l2 + NOISE_EXTRA)
        if cannot_wrap(grid, max_coordinate, noisiest, cohort):
            return Sizing(grid, multiplier * l2, rotated)
        norm = l2 * grid.step


def _sized_block(
    client: ClientPrivacySettings, plan: Plan, block: Block, multiplier: float
) -> Sizing:
    """The grid of a block of statistics: its own bound and noise, the adapter's modulus.

    Raises:
        ConfigError: that modulus is too small for the block's noise: its sum could wrap.
    """
    own = client.model_copy(update={"clip": block.bound, "noise_multiplier": multiplier})
    return _sized(own, plan.cohort, plan.adders, block.size, plan.bits, rotated=False)
