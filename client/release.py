"""The gate: the only code that makes bytes for the server out of private data.

**Guarantee**: what `release` returns is the contribution refused when not finite, wrongly shaped or
wrongly hashed; clipped as one vector; allowed by the ledger; rounded at random to a public grid;
noised with exact integer noise (for `noise_at = device`); reduced mod 2**bits; and written to the
ledger, durably, before it is returned. Masks will only be added to these integers.

Sources: clip and integer noise, Agarwal, Kairouz, Liu 2021 (Skellam); randomised rounding,
Kairouz, Liu, Steinke 2021; the two levels from one noise, PRIVACY.md.
"""

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..common import noise
from ..common.accounting import Charge
from ..common.clipping import clip
from ..common.config import PrivacySettings
from ..common.encoding import pack, round_randomly, rounded_sensitivity, wrap
from ..common.errors import GateRefused
from ..common.plan import Plan
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

    Returns:
        Integers mod 2**bits, bit-packed, d * bits / 8 bytes.

    Raises:
        GateRefused: the input must not be released; nothing was spent.
        BudgetExceeded: it would cost more than the device allows; nothing was spent.
    """
    _refuse(delta, layout, plan)
    clipped = clip(_flattened(delta, plan), plan.clip)
    cost = charges(plan, len(delta), privacy)
    ledger.check(client, cost, budgets(privacy), privacy.delta)
    integers = round_randomly(_clamped(clipped.vector, plan), plan.step, source.words)
    if plan.noise_at in ("device", "distributed"):
        integers += noise.skellam(noise.skellam_table(plan.variance), len(integers), source)
    payload = pack(wrap(integers, plan.bits), plan.bits)
    ledger.commit(client, plan.run, plan.round, plan.digest, cost, payload)
    return payload


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
    return tuple(found)


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
