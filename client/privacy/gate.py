"""The gate: the only code that makes bytes for the server out of private data.

**Guarantee**: what `release` returns is the contribution refused when not finite, wrongly shaped or
wrongly hashed; clipped as one vector; allowed by the ledger; rounded at random to a public grid;
noised with exact integer noise (for `noise_at = device`); reduced mod 2**bits; and written to the
ledger, durably, before it is returned. Masks will only be added to these integers. Statistics ride
behind the adapter in the same vector: blocks with their own public bound, grid and noise each
(`common/privacy/statistics_blocks.py`), drawn after the adapter's, which they therefore leave as
it is.

Sources: clip and integer noise, Agarwal, Kairouz, Liu 2021 (Skellam); randomised rounding,
Kairouz, Liu, Steinke 2021; the two levels from one noise, docs/privacy.md.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ...common.errors import GateRefused, PrivacyError
from ...common.privacy.accounting import Adjacency, Against, Charge
from ...common.privacy.clipping import clip
from ...common.privacy.encoding import pack, round_randomly, wrap
from ...common.privacy.noise import Source
from ...common.privacy.release_facts import Asked
from ...common.privacy.rotation import flat_bound, rotate
from ...common.privacy.round_plan import Plan
from ...common.privacy.statistics_blocks import Block
from ...common.settings.config import Config
from ...common.settings.sections import PrivacySettings
from ..consent.policy_settings import OwnBudget
from .ledger import Ledger, Limit

__all__ = ["Statistics", "budgets", "caps", "charges", "colluding", "refuse_more", "release"]


UNITS = ("client", "example")

Statistics = Mapping[str, NDArray[np.float64]]
"""The numbers of each block, by its name; sensitive."""


def release(
    delta: NDArray[np.float32],
    layout: str,
    plan: Plan,
    client: str,
    ledger: Ledger,
    privacy: PrivacySettings,
    source: Source,
    statistics: Statistics | None = None,
) -> bytes:
    """Turn one contribution into the bytes that leave, and charge the ledger for them.

    Args:
        delta: local minus global adapter, shape (d,), float32.
        layout: digest of the layout `delta` really has.
        plan: the round, checked against the device's own settings before.
        client: whose ledger.
        ledger: what this device has spent.
        privacy: the device's own settings: adjacency, delta, budgets.
        source: operating system randomness; a seeded one in tests only.
        statistics: by the names of `plan.blocks`, each of its block's size.

    Returns:
        Integers mod 2**bits, bit-packed, `plan.length(d)` * bits / 8 bytes.

    Raises:
        GateRefused: the input must not be released; nothing was spent.
        BudgetExceeded: it would cost more than the owner or the run allows; nothing was spent.
    """
    _refuse(delta, layout, plan)
    behind = _refuse_statistics(statistics or {}, plan)
    clipped = clip(_flattened(delta, plan), plan.clip)
    bounded = [clip(values, block.bound) for block, values in zip(plan.blocks, behind, strict=True)]
    cost = charges(plan, len(delta), privacy)
    ledger.check(client, cost, budgets(privacy), privacy.delta, plan.run, caps(privacy))
    vectors = [_clamped(clipped.vector, plan), *(values.vector for values in bounded)]
    parts = zip(vectors, plan.parts(len(delta)), strict=True)
    integers = np.concatenate([_noised(vector, part, plan, source) for vector, part in parts])
    payload = pack(wrap(integers, plan.bits), plan.bits)
    asked = Asked(plan, len(delta)).text
    ledger.commit(client, plan.run, plan.round, plan.digest, cost, payload, asked)
    return payload


def _noised(
    vector: NDArray[np.float64], part: Block, plan: Plan, source: Source
) -> NDArray[np.int64]:
    """Round a bounded vector to integers on its grid, and add the device's part of the noise."""
    integers = round_randomly(vector, part.step, source.words)
    if plan.noise_at in ("device", "distributed"):
        integers += plan.mechanism.sample(part.variance, len(integers), source)
    return integers


def charges(plan: Plan, dimension: int, privacy: PrivacySettings) -> tuple[Charge, ...]:
    """Return what one release under `plan` costs: one charge per unit and adversary.

    Client level: the noise of `noise_at` against the clip. With `device` it holds against the
    server too; with `distributed` as well, if masking holds, and what counts are the shares of
    the smallest accepted sum less the colluders; with `server` it holds only against whoever sees
    what is published. Should masking not hold, the device's own share is left: the charge against
    the "unmasked server". It is the one against the server too where the device's directory is
    open, because a server that invents the other devices reads the share alone
    (docs/secure-aggregation.md).

    Example level against the server: Opacus's noise in each local step. Against the analyst the
    release noise counts as well: after one local step a record moves the delta by at most
    learning_rate * record_clip / batch_size, clipping is a projection, so one record's
    sensitivity is that, not the clip. With several steps later gradients depend on earlier ones
    and only Opacus's noise is counted.

    Statistics. A person moves adapter and blocks together, one Gaussian release (`_together`). A
    record is in the batch by a draw, and moves the adapter and the block of losses if it is:
    these too are one release, sampled. Gains are computed from every record in every round, the
    draw hides nothing of them: they are a second charge, unsampled. Their noise is
    independent of the batch and its noise, so the two charges compose.
    """
    shares = _shares(plan, privacy)
    costs = [
        _person(plan, dimension, privacy.client.adjacency, against, hiding)
        for against, hiding in shares.items()
        if _carries_noise(plan, against)
    ]
    for charge in _of_a_record(plan, dimension, privacy) if plan.record_clip > 0 else ():
        costs += _with_blocks(charge, plan, shares[charge.against])
    if not costs:  # a non-private baseline: the ledger still says so, with infinite epsilon
        none = Charge("client", "analyst", privacy.client.adjacency, 0.0)
        costs.append(_together([none, *(_of_block(b, none, plan, 1) for b in plan.blocks)]))
    return tuple(costs)


def _carries_noise(plan: Plan, against: Against) -> bool:
    """Return whether what an adversary sees of the release carries the release's noise."""
    released = plan.noise_at != "none" and plan.variance > 0
    return released and (against == "analyst" or plan.noise_at != "server")


def _shares(plan: Plan, privacy: PrivacySettings) -> dict[Against, int]:
    """Return the adders whose noise hides a contribution, by who looks at it."""
    shares: dict[Against, int] = {"analyst": plan.adders, "server": plan.adders}
    if plan.masked:
        shares |= {"unmasked server": 1}
        shares |= {"server": 1} if _may_be_surrounded(plan, privacy) else {}
    return shares


def _may_be_surrounded(plan: Plan, privacy: PrivacySettings) -> bool:
    """Return whether a server could have invented all the other devices of a masked round."""
    return plan.masked and privacy.directory == "open"


def _of_a_record(plan: Plan, dimension: int, privacy: PrivacySettings) -> list[Charge]:
    """Return what the adapter costs at example level, a charge per adversary, without blocks."""
    inside = Charge(
        "example", "server", privacy.example.adjacency, plan.record_noise,
        sampling_rate=plan.rate, steps=plan.local_steps,
    )  # fmt: skip
    outside = inside
    if _carries_noise(plan, "analyst") and plan.local_steps == 1:
        adapter = plan.parts(dimension)[0]
        noised = plan.mechanism.charge(
            adapter, "example", "server", privacy.example.adjacency, plan.adders
        )
        if noised.noise_multiplier > plan.record_noise:
            outside = dataclasses.replace(noised, sampling_rate=plan.rate)
    noised_for_server = _carries_noise(plan, "server") and not _may_be_surrounded(plan, privacy)
    return [
        dataclasses.replace(outside, against="analyst"),
        outside if noised_for_server else inside,
        *([dataclasses.replace(inside, against="unmasked server")] if plan.masked else []),
    ]


def _with_blocks(charge: Charge, plan: Plan, shares: int) -> Iterator[Charge]:
    """Yield a record's charge with the blocks of its draw, and that of the blocks drawn apart."""
    everything = charge.sampling_rate == charge.steps == 1
    joint = [block for block in plan.blocks if block.sampled or everything]
    apart = [block for block in plan.blocks if block not in joint]
    yield _together([charge, *(_of_block(block, charge, plan, shares) for block in joint)])
    if apart:
        yield _together([_of_block(block, charge, plan, shares) for block in apart])


def colluding(plan: Plan, dimension: int, adjacency: Adjacency, devices: int) -> Charge:
    """Return what one masked release costs a person if `devices` devices collude with the server.

    They know their own noise and take it away: what hides the person are the shares of the
    smallest sum that may be opened, less theirs. With 0 that is the noise of the whole sum, with
    `plan.colluders` what `charges` counts, and never less than the own share, which nobody knows.

    Raises:
        PrivacyError: the plan has no shares of noise.
    """
    if not plan.masked:
        raise PrivacyError(
            f"round {plan.round}: noise_at = {plan.noise_at!r}: expected distributed; only masked "
            "sums have shares of noise that devices could take away"
        )
    return _person(plan, dimension, adjacency, "server", max(plan.survivors - devices, 1))


def _person(
    plan: Plan, dimension: int, adjacency: Adjacency, against: Against, shares: int
) -> Charge:
    """Charge adapter and blocks as one release about a person, hidden by `shares` adders' noise."""
    return _together(
        [
            plan.mechanism.charge(part, "client", against, adjacency, shares)
            for part in plan.parts(dimension)
        ]
    )


def _together(parts: Sequence[Charge]) -> Charge:
    """Combine the charges of parts released together into one charge, with the draw of the first.

    The parts have independent Gaussian noise. With each divided by its own noise, their
    concatenation is one Gaussian mechanism with noise 1, which one unit moves by at most
    sqrt(z_1^-2 + z_2^-2 + ...): that is the multiplier's inverse. Two charges instead, each with
    the sampling rate, would be wrong: adapter and losses are computed from one Poisson batch, and
    composing two sampled charges stands for a batch drawn anew for each, which hides more.
    """
    noises = [part.noise_multiplier for part in parts]
    return dataclasses.replace(
        parts[0],
        noise_multiplier=1 / math.hypot(*(1 / one for one in noises)) if min(noises) else 0.0,
        distance=math.fsum(part.distance for part in parts),
        ratio=math.fsum(part.ratio for part in parts),
    )


def _of_block(block: Block, charge: Charge, plan: Plan, shares: int) -> Charge:
    """Return the charge of a block by itself, to the unit and adversary of `charge`, nothing drawn.

    Its noise is what the adversary sees: `shares` adders' of it; none where the server adds it
    later, and then nothing is hidden.
    """
    before = charge.against == "server" and plan.noise_at == "server"
    return plan.mechanism.charge(
        block, charge.unit, charge.against, charge.adjacency, 0 if before else shares
    )


def refuse_more(ledger: Ledger, client: str, plan: Plan, own: Config) -> None:
    """Refuse more releases in a run than the owner agreed to, whatever numbers its rounds have.

    Raises:
        PrivacyError: this client has made them in this run.
    """
    if ledger.releases_of(client, plan.run) >= own.max_releases:
        raise PrivacyError(
            f"round {plan.round}: this device has made the {own.max_releases} releases in run "
            f"{plan.run} that it may (rounds.count, and rounds.extra_releases for rounds that came "
            "to nothing); a server that wants more offers the run again with a larger rounds.count"
        )


def budgets(privacy: PrivacySettings) -> dict[str, Limit]:
    """Return the device's largest epsilons over all runs, its owner's or a simulated client's.

    By unit, or for one adversary by `unit/against`. Without limit only where no claim is made at
    all. What a person has spent should masking break is written down and shown, and limited by
    nothing: a share of the noise is never enough for a person, and a budget that counted it would
    refuse every masked round. A record is: Opacus's noise is there for that. What was released
    without a closed directory counts with one share *against the server*, up to `open_directory`.
    """
    if not privacy.client.enabled and not privacy.example.enabled:
        return {unit: Limit(np.inf) for unit in UNITS}
    own = privacy.budget
    if isinstance(own, OwnBudget):
        most = {"client": own.owner_client, "example": own.owner_example}
        limits = {unit: _of_owner(most[unit], unit) for unit in UNITS}
    else:
        limits = {
            unit: _of_run(most, unit) if getattr(own, unit) else _of_simulated(most, unit)
            for unit, most in own.simulated.items()
        }
    limits["client/unmasked server"] = Limit(np.inf)
    if own.open_directory > limits["client"]:
        of = _of_owner if isinstance(own, OwnBudget) else _of_run
        limits["client/server"] = of(own.open_directory, "open_directory")
    return limits


def caps(privacy: PrivacySettings) -> dict[str, Limit]:
    """Return the run's own caps, which limit what is spent in this run.

    By the names of `budgets`. Empty where the run has none.

    A simulated client's ledger has one run, so that the cap is its budget already. No cap counts a
    person's share of the noise by itself: neither should masking break, nor against the server
    where this device has no closed directory and its owner allows that (`open_directory`).
    """
    own = privacy.budget
    if not isinstance(own, OwnBudget):
        return {}
    own_caps = {"client": own.client, "example": own.example}
    limits = {unit: _of_run(cap, unit) for unit, cap in own_caps.items() if cap is not None}
    if "client" in limits:
        limits["client/unmasked server"] = Limit(np.inf)
        if privacy.directory == "open" and own.open_directory > own.owner_client:
            limits["client/server"] = Limit(np.inf)
    return limits


def _of_owner(cap: float, name: str) -> Limit:
    return Limit(
        cap,
        f"this device's owner allows {cap:.6g} over all runs (budget.{name} in policy.toml)",
        f"Stop here, or the owner raises budget.{name} in policy.toml, which is for life",
        setting=f"budget.{name}",
    )


def _of_run(cap: float, name: str) -> Limit:
    return Limit(
        cap,
        f"the run's own cap is {cap:.6g} (privacy.budget.{name} in its configuration)",
        f"No owner can change it: the operator starts a run with a larger privacy.budget.{name}, "
        "or with none",
        of_run=True,
        setting=f"privacy.budget.{name}",
    )


def _of_simulated(cap: float, name: str) -> Limit:
    return Limit(
        cap,
        f"a simulated client has what a new device allows, {cap:.6g}",
        f"Set privacy.budget.{name} in the run's configuration",
        setting=f"privacy.budget.{name}",
    )


def _flattened(delta: NDArray[np.float32], plan: Plan) -> NDArray[np.float64]:
    vector = delta.astype(np.float64)
    return rotate(vector, plan.start) if plan.rotated else vector


def _clamped(vector: NDArray[np.float64], plan: Plan) -> NDArray[np.float64]:
    """Cut the coordinates of a rotated vector that are above their bound.

    There are none but with chance 2^-60. The cut shortens the vector and moves no two of them
    further apart.
    """
    if not plan.rotated:
        return vector
    bound = flat_bound(plan.clip, len(vector))
    return np.clip(vector, -bound, bound)


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


def _refuse_statistics(given: Statistics, plan: Plan) -> list[NDArray[np.float64]]:
    """Refuse statistics that are not those of the plan, and return them in the plan's order."""
    asked = {block.name: (block.size,) for block in plan.blocks}
    if {name: values.shape for name, values in given.items()} != asked:
        raise GateRefused(
            f"round {plan.round}: the plan asks for the statistics {asked}, the device gave "
            f"{ {name: values.shape for name, values in given.items()} }; nothing was released"
        )
    for block in plan.blocks:
        if not (np.isfinite(given[block.name]).all() and block.fits(given[block.name])):
            raise GateRefused(
                f"round {plan.round}: the block {block.name} holds numbers that are not finite or "
                "outside their public range; it stays here"
            )
    return [given[block.name] for block in plan.blocks]
