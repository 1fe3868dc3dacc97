"""The one maker of round plans: for server, simulation, A/B tests and the owner's consent text.

**Guarantee**: a plan is a function of the run's settings and of public numbers only. Whoever makes
it from the same settings makes the same grid and the same noise, so that what an owner is shown
before a run is what the ledger charges for its first release.
"""

import dataclasses
import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..model.exchange_layout import Exchange
from ..settings.config import Config
from .grid_sizing import size, sized_block
from .round_plan import Plan

__all__ = ["make_plan"]


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
    grids: dict[str, Any] = {}
    for block in plan.blocks:
        multiplier = config.statistics.multiplier(block.name)
        fine = sized_block(client, cohort, shares, plan.bits, block, multiplier)
        grids[f"{block.name}_step"] = fine.grid.step
        grids[f"{block.name}_variance"] = fine.deviation**2
    return dataclasses.replace(plan, **grids)


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
