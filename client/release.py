"""The gate: the only code that makes bytes for the server out of private data.

**Guarantee**: what `release` returns is the contribution refused when not finite, wrongly shaped or
wrongly hashed; clipped as one vector; allowed by the ledger; rounded at random to a public grid;
noised with exact integer noise (for `noise_at = device`); reduced mod 2**bits; and written to the
ledger, durably, before it is returned. Masks will only be added to these integers. Statistics ride
behind the adapter in the same vector: a block with its own public bound, grid and noise.

Sources: clip and integer noise, Agarwal, Kairouz, Liu 2021 (Skellam); randomised rounding,
Kairouz, Liu, Steinke 2021; the two levels from one noise, PRIVACY.md.
"""

import dataclasses
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..common import noise
from ..common.accounting import Charge
from ..common.clipping import clip
from ..common.config import PrivacySettings
from ..common.encoding import pack, round_randomly, rounded_sensitivity, wrap
from ..common.errors import GateRefused
from ..common.plan import STATISTICS_BOUND, Plan
from ..common.rotation import flat_bound, rotate
from .ledger import Ledger

__all__ = ["budgets", "charges", "release"]


def release(
    delta: NDArray[np.float32],
    layout: str,
    plan: Plan,
    client: str,
    ledger: Ledger,
    privacy: PrivacySettings,
    source: noise.Source,
    statistics: NDArray[np.float64] | None = None,
) -> bytes:
    """One contribution -> the bytes that leave.

    Args:
        delta: local minus global adapter, shape (d,), float32.
        layout: digest of the layout `delta` really has.
        plan: the round, checked against the device's own settings before.
        client: whose ledger.
        ledger: what this device has spent.
        privacy: the device's own settings: adjacency, delta, budgets.
        source: operating system randomness; a seeded one in tests only.
        statistics: of the batch `delta` was computed from, shape (plan.statistics_size,).

    Returns:
        Integers mod 2**bits, bit-packed, (d + statistics_size) * bits / 8 bytes.

    Raises:
        GateRefused: the input must not be released; nothing was spent.
        BudgetExceeded: it would cost more than the device allows; nothing was spent.
    """
    _refuse(delta, layout, plan)
    block = np.zeros(0) if statistics is None else statistics
    _refuse_statistics(block, plan)
    clipped = clip(_flattened(delta, plan), plan.clip)
    bounded = clip(block, STATISTICS_BOUND)
    cost = charges(plan, len(delta), privacy)
    ledger.check(client, cost, budgets(privacy), privacy.delta)
    integers = _noised(_clamped(clipped.vector, plan), plan.step, plan.variance, plan, source)
    if plan.statistics_size:
        step, variance = plan.statistics_step, plan.statistics_variance
        behind = _noised(bounded.vector, step, variance, plan, source)
        integers = np.concatenate([integers, behind])
    payload = pack(wrap(integers, plan.bits), plan.bits)
    ledger.commit(client, plan.run, plan.round, plan.digest, cost, payload)
    return payload


def _noised(
    vector: NDArray[np.float64], step: float, variance: float, plan: Plan, source: noise.Source
) -> NDArray[np.int64]:
    """Bounded reals -> integers on their grid, with the noise that is the device's to add."""
    integers = round_randomly(vector, step, source.words)
    if plan.noise_at in ("device", "distributed"):
        integers += noise.skellam(noise.skellam_table(variance), len(integers), source)
    return integers


def charges(plan: Plan, dimension: int, privacy: PrivacySettings) -> tuple[Charge, ...]:
    """What one release under `plan` costs: one charge per unit and adversary.

    Client level: the noise of `noise_at` against the clip. With `device` it holds against the
    server too; with `distributed` as well, if masking holds, and what counts are the shares of
    the smallest accepted sum less the colluders; with `server` it holds only against whoever sees
    what is published.

    Example level against the server: Opacus's noise in each local step. Against the analyst the
    release noise counts as well: after one local step a record moves the delta by at most
    learning_rate * record_clip / batch_size, clipping is a projection, so one record's
    sensitivity is that, not the clip. With several steps later gradients depend on earlier ones
    and only Opacus's noise is counted.

    Statistics add no charge of their own: each charge is that of both parts (`_with_statistics`).
    """
    found: list[Charge] = []
    released = plan.noise_at != "none" and plan.variance > 0
    everywhere = released and plan.noise_at != "server"
    near = noise.gaussian_closeness(plan.counted_variance, dimension, plan.adders)
    integer: dict[str, Any] = {"distance": near.slack, "ratio": near.ratio} if released else {}
    if released:
        adjacency = privacy.client.adjacency
        multiplier = _multiplier(plan, plan.clip, dimension)
        against_analyst = Charge("client", "analyst", adjacency, multiplier, **integer)
        found.append(against_analyst)
        if everywhere:
            found.append(dataclasses.replace(against_analyst, against="server"))
    if plan.record_clip > 0:
        inside = Charge(
            "example", "server", privacy.example.adjacency, plan.record_noise,
            sampling_rate=plan.rate, steps=plan.local_steps,
        )  # fmt: skip
        outside = inside
        if released and plan.local_steps == 1:
            moved = min(plan.learning_rate * plan.record_clip / plan.batch_size, 2 * plan.clip)
            multiplier = _multiplier(plan, moved, dimension)
            if multiplier > plan.record_noise:
                outside = dataclasses.replace(inside, noise_multiplier=multiplier, **integer)
        found.append(dataclasses.replace(outside, against="analyst"))
        found.append(outside if everywhere else inside)
        if plan.masked:
            found.append(dataclasses.replace(inside, against="unmasked server"))
    if not found:  # a non-private baseline: the ledger still says so, with infinite epsilon
        found.append(Charge("client", "analyst", privacy.client.adjacency, 0.0))
    return tuple(_with_statistics(charge, plan) for charge in found)


def _with_statistics(charge: Charge, plan: Plan) -> Charge:
    """The adapter's charge -> that of adapter and statistics, released together.

    Adapter part and block have independent Gaussian noise. With each divided by its own noise,
    their concatenation is one Gaussian mechanism with noise 1, which one unit moves by at most
    sqrt(z_adapter^-2 + z_block^-2): that is the multiplier's inverse. Two charges instead, each
    with the sampling rate, would be wrong: both parts are computed from one Poisson batch, and
    composing two sampled charges stands for a batch drawn anew for each, which hides more.

    The block's noise is what the adversary sees: all of it in the sum; one share where a server
    reads this contribution alone; none where the server adds it later, and then nothing is hidden.
    """
    if not plan.statistics_size:
        return charge
    alone = charge.against == "unmasked server"
    before = charge.against == "server" and plan.noise_at == "server"
    adders = 1 if alone else plan.adders
    variance = 0.0 if before else plan.statistics_variance * adders
    moved = STATISTICS_BOUND if charge.unit == "client" else math.sqrt(2) / plan.batch_size
    size, step = plan.statistics_size, plan.statistics_step
    block = float(variance**0.5 / rounded_sensitivity(moved, step, size)[0])
    if min(block, charge.noise_multiplier) == 0:
        return dataclasses.replace(charge, noise_multiplier=0.0)
    near = noise.gaussian_closeness(variance, size, adders)
    return dataclasses.replace(
        charge,
        noise_multiplier=1 / math.hypot(1 / block, 1 / charge.noise_multiplier),
        distance=charge.distance + near.slack,
        ratio=charge.ratio + near.ratio,
    )


def budgets(privacy: PrivacySettings) -> dict[str, float]:
    """The device's largest epsilon per unit; without limit only where no claim is made at all."""
    if not privacy.client.enabled and not privacy.example.enabled:
        return {"client": np.inf, "example": np.inf}
    return {"client": privacy.budget.client, "example": privacy.budget.example}


def _flattened(delta: NDArray[np.float32], plan: Plan) -> NDArray[np.float64]:
    vector = delta.astype(np.float64)
    return rotate(vector, plan.start) if plan.rotated else vector


def _clamped(vector: NDArray[np.float64], plan: Plan) -> NDArray[np.float64]:
    """After a rotation no coordinate is above its bound, but with chance 2^-60; this one is cut,
    which shortens the vector and moves no two of them further apart."""
    if not plan.rotated:
        return vector
    most = flat_bound(plan.clip, len(vector))
    return np.clip(vector, -most, most)


def _multiplier(plan: Plan, moved: float, dimension: int) -> float:
    """Noise over what one unit can move the rounded sum, l2."""
    return float(plan.counted_variance**0.5 / rounded_sensitivity(moved, plan.step, dimension)[0])


def _refuse(delta: NDArray[np.float32], layout: str, plan: Plan) -> None:
    if layout != plan.layout:
        raise GateRefused(
            f"round {plan.round}: this device's adapter has layout {layout[:12]}, the plan asks "
            f"for {plan.layout[:12]}; both sides need the same base model and adapter settings"
        )
    if delta.ndim != 1 or delta.dtype != np.float32:
        raise GateRefused(
            f"round {plan.round}: expected a flat float32 delta, got {delta.dtype} of shape "
            f"{delta.shape}"
        )
    if not np.isfinite(delta).all():
        raise GateRefused(
            f"round {plan.round}: the delta has {np.count_nonzero(~np.isfinite(delta))} values "
            "that are not finite; it stays here"
        )


def _refuse_statistics(block: NDArray[np.float64], plan: Plan) -> None:
    if block.shape != (plan.statistics_size,):
        raise GateRefused(
            f"round {plan.round}: the plan asks for {plan.statistics_size} statistics, training "
            f"gave shape {block.shape}; nothing was released"
        )
