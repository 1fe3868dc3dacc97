"""What a run asks for, in plain words, and what it would cost: for the owner, before round one.

Everything here is computed from the offered configuration: no model, no server, no network.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from ...common.errors import ConfigError, PrivacyError
from ...common.model.families import FAMILIES
from ...common.settings.config import Config
from ...common.settings.sections import AbRunSettings
from .policy import own_config, reasons, shown
from .policy_settings import Policy

if TYPE_CHECKING:
    from ...common.privacy.accounting import Charge
    from ..privacy.affordable_rounds import Paid
    from .run_offers import Offer

__all__ = ["DeviceState", "describe", "limiting_budget", "refuse_partial_run", "release_cost"]

TYPICAL_DIMENSIONS = (4096, 512, 64, 8, 1)
"""Numbers in an adapter whose model has not been loaded yet, the first that the run's modulus has
room for; epsilon hardly depends on it."""

UNIT_WORDS = {"client": "all your records together", "example": "any one of your records"}
ADVERSARY_WORDS = {
    "analyst": "whoever sees what is published",
    "server": "the server",
    "unmasked server": "the server, should the masks fail",
}
ADJACENCY_WORDS = {
    "add_remove": "whether it was there at all",
    "zero_out": "whether its share was replaced by zero",
    "replace_one": "whether it was this or something else",
}
BUDGET_OF = (
    "this home on this device, for its life: another device with your records, or a home begun "
    "after `privet client forget`, has a budget of its own, and what is learnt of you adds up"
)
NOISE_WORDS = {
    "device": "this device adds all of it before anything leaves; it holds against the server too",
    "distributed": "each device adds a share, and masks show the server the sum alone",
    "server": "the server adds it, and reads your clipped contribution before that",
}


@dataclass(frozen=True)
class DeviceState:
    """What of a device an offer is weighed with: what it has released, and its directory.

    Attributes:
        spent: what its ledger holds already.
        in_run: what of it belongs to the offered run, release by release.
        closed: whether it has a closed directory; without one only its own share of masked noise
            counts against the server.
        enrolled: how many devices the directory has, if known.
    """

    spent: Sequence["Charge"] = ()
    in_run: Sequence[Sequence["Charge"]] = ()
    closed: bool = True
    enrolled: int | None = None


UNUSED = DeviceState()


def describe(
    offer: "Offer", policy: Policy, device: DeviceState = UNUSED, *, dimension: int | None = None
) -> list[tuple[str, str]]:
    """Describe what a run asks for before its first round, as (label, text).

    Args:
        offer: the run.
        policy: the owner's.
        device: what it has released, and whom it knows.
        dimension: numbers in its adapter, if known.

    Epsilons are what the ledger will charge for the plan of the first round, made here as the
    server makes it, and rounded up to two digits; without `dimension`, for an adapter of a usual
    size. Of names that the server chose, what a terminal would obey is replaced.
    """
    config, ab_run = offer.config, offer.config.ab_run
    rows = [
        ("run", shown(offer.run)),
        ("server", shown(offer.server)),
        ("received", f"{datetime.fromtimestamp(offer.received, UTC):%Y-%m-%d %H:%M} UTC"),
    ]
    if ab_run is None:
        rows += _training(config, dimension)
    else:
        dimension = ab_run.entries * len(ab_run.arms)
        rows += [("experiment", _experiment(ab_run)), ("looks", _rounds(config))]
    refusals, own = reasons(policy, config, offer.server), own_config(policy, config, device.closed)
    rows.append(("noise", _noise(config)))
    try:
        rows += _epsilons(config, own, dimension, device)
    except PrivacyError as unplanned:
        refusals = (*refusals, str(unplanned))
    rows += [("budget of", BUDGET_OF), ("statistics", _statistics(config))]
    if config.insecure_test_seed is not None:
        rows.insert(0, ("NOT PRIVATE", "a test: anybody can compute its noise and take it away"))
    rows += [("refused", reason) for reason in refusals]
    return rows if refusals else [*rows, ("policy", "inside the limits of policy.toml")]


def _training(config: Config, dimension: int | None) -> list[tuple[str, str]]:
    return [
        ("base model", shown(config.model.base)),
        ("adapter", _adapter(config, dimension)),
        ("rounds", _rounds(config)),
        ("work", _work(config)),
    ]


def release_cost(config: Config, dimension: int | None = None) -> tuple["Charge", ...]:
    """Return what one release of a run costs, as the gate will charge its first round's plan.

    Args:
        config: the run's.
        dimension: numbers in its adapter; None: not known before the model is loaded.

    Raises:
        PrivacyError: no plan can be made from it, so that no server could run it.
    """
    import numpy as np

    from ...common.privacy.plan_maker import make_plan
    from ..privacy.gate import charges

    unplanned = ""
    for size in TYPICAL_DIMENSIONS if dimension is None else (dimension,):
        try:
            plan = make_plan(config, "", 1, "", np.zeros(size, np.float32))
        except ConfigError as error:
            unplanned = str(error)
        else:
            return charges(plan, size, config.privacy)
    raise PrivacyError(f"no round of this run can be planned: {unplanned}")


def limiting_budget(offer: "Offer", policy: Policy, device: DeviceState = UNUSED) -> "Paid | None":
    """Return the limit that ends this device's part in the run early.

    None where it takes part in all rounds.

    Args: as for `describe`. Rounds are those that are left, were this device asked in each.

    Raises:
        PrivacyError: no round of it can be planned.
    """
    from ..privacy.affordable_rounds import tightest_limit

    config, ab_run = offer.config, offer.config.ab_run
    dimension = None if ab_run is None else ab_run.entries * len(ab_run.arms)
    left = config.rounds.count - len(device.in_run)
    mine = [charge for release in device.in_run for charge in release]
    own = own_config(policy, config, device.closed)
    cost = _counted(config, own, dimension)
    return tightest_limit(cost, own.privacy, left, device.spent, mine) if left > 0 else None


def _counted(config: Config, own: Config, dimension: int | None) -> tuple["Charge", ...]:
    """Return what one release costs as this device counts it, with its own share if it must."""
    privacy = config.privacy.model_copy(update={"directory": own.privacy.directory})
    return release_cost(config.model_copy(update={"privacy": privacy}), dimension)


def _epsilons(
    config: Config, own: Config, dimension: int | None, device: DeviceState
) -> list[tuple[str, str]]:
    """Write a row for each epsilon, shared by adversaries against whom it is the same.

    What is left of all records together should the masks fail stands in the sentence of what the
    masks give, and has no budget of its own.
    """
    cost = _counted(config, own, dimension)
    adversaries: dict[tuple[str, str], list[str]] = {}
    for line in dict.fromkeys(charge.line for charge in cost):
        if line[:2] == ("client", "unmasked server"):
            continue
        once = [charge for charge in cost if charge.line == line]
        text = _epsilon(config, own, once, device)
        if _by_masks(once, config, own):
            left = _person(cost, "unmasked server")
            text += _if_they_fail(config, own, line[0], left, device.enrolled)
        elif line[:2] == ("client", "server") and _masked(config):
            text += _if_nobody_was_invented(config, own, cost)
        adversaries.setdefault((line[0], text), []).append(ADVERSARY_WORDS[line[1]])
    return [
        (f"epsilon, {unit}-level", f"{UNIT_WORDS[unit]}, against {' and '.join(against)}: {text}")
        for (unit, text), against in adversaries.items()
    ]


def _masked(config: Config) -> bool:
    return config.privacy.client.enabled and config.privacy.client.noise_at == "distributed"


def _by_masks(once: Sequence["Charge"], config: Config, own: Config) -> bool:
    """Return whether a figure against the server counts what masks keep in the sum."""
    if not _masked(config) or own.privacy.directory != "closed":
        return False
    return any(charge.distance > 0 and charge.against == "server" for charge in once)


def _if_they_fail(
    config: Config,
    own: Config,
    unit: str,
    left: Sequence["Charge"],
    enrolled: int | None,
) -> str:
    """State the conditions that a figure against the server rests on.

    For all records together, it also says what is left without masks.
    """
    of = "all" if enrolled is None else f"the {enrolled:,}"
    rests_on = (
        f"; that is if the masks hold: closed directory, at most {config.colluders} of {of} "
        "enrolled devices collude with the server"
    )
    if unit != "client" or not left:
        return rests_on
    alone = _growing(config, own, left)
    return f"{rests_on}; should they fail, {alone}, from this device's own share"


def _if_nobody_was_invented(config: Config, own: Config, cost: Sequence["Charge"]) -> str:
    """State what the masks would give without a closed directory, which is no claim."""
    seen, alone = _person(cost, "analyst"), _person(cost, "unmasked server")
    if not seen:
        return ""
    return (
        "; this device joined without a closed directory, so that of the noise only its own share "
        f"counts, {_growing(config, own, alone) if alone else 'nothing'} "
        "(budget.open_directory in policy.toml is the limit); only if nobody on the roster "
        f"was invented and at most {config.colluders} of all enrolled devices collude with the "
        f"server, it would be {_growing(config, own, seen)}"
    )


def _person(every: Iterable["Charge"], against: str) -> list["Charge"]:
    return [c for c in every if (c.unit, c.against) == ("client", against)]


def _growing(config: Config, own: Config, once: Sequence["Charge"]) -> str:
    """State a figure after one release, after all of the run, and with all that may be repeated."""
    from ..privacy.collusion import epsilon_or_estimate

    count, max_releases, delta = config.rounds.count, config.max_releases, own.privacy.delta
    shown = once[0].against == "unmasked server"  # else without a bound there is no figure
    figures = [epsilon_or_estimate([*once] * n, delta) for n in (1, count, max_releases)]
    first, always, worst = (
        _about(math.inf if x is None or not (ok or shown) else x) for x, ok in figures
    )
    after = f", {always} after {count}" if count > 1 else ""
    after += f", {worst} after {max_releases}" if max_releases > count else ""
    less = " (as Gaussian noise: so little has no bound)" if shown and not figures[0][1] else ""
    return f"{first} after 1 release{after}{less}"


def _epsilon(config: Config, own: Config, once: Sequence["Charge"], device: DeviceState) -> str:
    """State what releases cost on one line, the owner's budget for it, and the run's own cap."""
    from ...common.privacy.accounting import epsilon
    from ..privacy.affordable_rounds import tightest_limit
    from ..privacy.gate import budgets, caps
    from ..privacy.ledger import budget_of

    privacy, count, charge = own.privacy, config.rounds.count, once[0]
    delta, name = privacy.delta, (charge.unit, charge.against)
    if math.isinf(epsilon(once, delta)):
        why = (
            "too little of the noise is its own"
            if charge.unit == "client" and _masked(config)
            else "some part of it has no noise"
        )
        return f"no bound at all: {why}, so this device declines every round"
    budget = budget_of(budgets(privacy), *name) or 0.0
    line = [c for c in device.spent if c.line == charge.line]
    mine = [c for release in device.in_run for c in release if c.line == charge.line]
    cap = budget_of(caps(privacy), *name)
    cap = None if cap is None or math.isinf(cap) else cap
    return (
        f"{_growing(config, own, once)}" + f", at delta = {delta:g} ({charge.adjacency}: hidden is "
        f"{ADJACENCY_WORDS[charge.adjacency]}); your budget over all runs {budget:g}"
        + (f", of which {_about(epsilon(line, delta))} is spent" if line else "")
        + (f"; the run's own cap {cap:g}" if cap is not None else "")
        + (f", of which {_about(epsilon(mine, delta))} is spent" if cap and mine else "")
        + _ends(tightest_limit(once, privacy, max(count - len(device.in_run), 1), line, mine))
    )


def _ends(paid: "Paid | None") -> str:
    """State how many of the rounds that are left are paid for, if not all are."""
    if paid is None:
        return ""
    whose = "the run's own cap" if paid.limit.of_run else "your budget"
    if not paid.rounds:
        return f"; {whose} does not allow a single one"
    return f"; {whose} ends it after about {paid.rounds}"


def refuse_partial_run(run: str, paid: "Paid | None", partly: bool) -> None:
    """Refuse consent to a run that the budget, or the run's own cap, ends early.

    Raises:
        PrivacyError: how many of the rounds are allowed, by whose limit, and what to do. With
            `partly`: not a single one is.
    """
    if paid is None or (partly and paid.rounds):
        return
    line = f"the {paid.unit}-level epsilon against {ADVERSARY_WORDS[paid.against]}"
    spent = f", of which {paid.spent:.4g} is spent," if paid.spent else ""
    after = f"{paid.total:.4g}" if math.isfinite(paid.total) else "without a bound"
    mend = f"raise {paid.limit.setting} in policy.toml, which is for life"
    whose = f"your {paid.limit.setting} = {paid.limit:g} in policy.toml"
    if paid.limit.of_run:
        mend = "nothing that you could set changes it: the operator sets the run's cap"
        whose = f"the run's own cap {paid.limit.setting} = {paid.limit:g}"
    because = f". {paid.without.rstrip('. ')}" if paid.without else ""
    take = "take part in those and decline the rest with --agree --partly, or "
    raise PrivacyError(
        f"{shown(run)}: {whose}{spent} allows {paid.rounds} of {paid.of} rounds ({line} would be "
        f"{after}); {take if paid.rounds else ''}{mend}{because}"
    )


def _adapter(config: Config, dimension: int | None) -> str:
    own = config.adapter
    text = f"{own.family}, rank {own.rank}, in the last {own.last_blocks} blocks"
    text += "" if dimension is None else f", {dimension:,} numbers"
    if config.clusters.count > 1:
        text += (
            f"; {config.clusters.count} clusters, of which this device trains the one that fits "
            "your records; which one that is leaves in noised sums only"
        )
    if own.start:
        text += f"; it starts from what another run released (SHA-256 {shown(own.start[:16])})"
    if FAMILIES[own.family].local:
        text += "; B is fitted to your records and stays on this device"
    return text


def _experiment(ab_run: AbRunSettings) -> str:
    text = (
        f"A/B: for at most {ab_run.days:g} days `privet chat --device` answers with one of "
        f"{', '.join(map(shown, ab_run.arms))}, which of them is drawn on this device and not "
        "sent; what may leave is the share of those answers that you took"
    )
    if ab_run.outcome == "binary":
        text += ", as more than half or not"
    return f"{text}, in a noised, masked sum; nothing is trained"


def _rounds(config: Config) -> str:
    own = config.rounds
    text = (
        f"{own.count}, of {own.cohort} devices each{_before(config)}; this device may be asked for "
        f"one release in each, {config.max_releases} at most"
        + ("" if config.max_releases == own.count else ", should rounds come to nothing")
        + ", and what it sends cannot be taken back"
    )
    if _masked(config):
        text += (
            f"; a sum is opened from {config.min_sum} devices on, and holds if at most "
            f"{config.colluders} of all enrolled devices work for the server"
        )
    return text


def _before(config: Config) -> str:
    hours = config.ab_test.hours
    return f", {hours:g} hours or more before each" if config.ab_run is not None and hours else ""


def _work(config: Config) -> str:
    own, data = config.training, config.data
    max_tokens = own.packed or data.max_tokens
    total = own.steps * own.batch_size * max_tokens
    texts = "rows of records" if own.packed else "records"
    if config.pairs is not None:  # two answers each, and another source than the own texts
        total, texts = 2 * total, "pairs of answers from your verdicts (privet client feedback)"
    return (
        f"in each round {own.steps} training steps of about {own.batch_size} {texts}, at most "
        f"{max_tokens} tokens of each (about {total:,} tokens); of your records at most "
        f"{data.records_per_client}"
    )


def _noise(config: Config) -> str:
    client, example = config.privacy.client, config.privacy.example
    parts = ["no client-level noise"]
    if client.enabled:
        parts = [
            f"client-level: contribution clipped to {client.clip:g}, noise of "
            f"{client.noise_multiplier:g} times that; {NOISE_WORDS[client.noise_at]}"
        ]
    if config.ab_run is not None:
        masked = client.noise_at == "distributed"
        parts += ["should the masks fail, only this device's share of it is left"] if masked else []
        return "; ".join(parts)
    parts.append(
        f"example-level: each record's gradient clipped to {example.clip:g}, noise of "
        f"{example.noise_multiplier:g} times that in each step (DP-SGD)"
        if example.enabled
        else "no example-level noise"
    )
    if config.privacy.clip_chosen == "looked":
        parts.append(
            "the clip was chosen by looking at norms of some of the "
            f"{config.data.clients:,} people of this run, which no epsilon here covers"
        )
    return "; ".join(parts)


def _statistics(config: Config) -> str:
    if not config.statistics.enabled:
        return "none"
    own = config.statistics
    parts = [
        f"a batch's training loss and its size (noise {own.noise_multiplier:g} times the bound)"
    ]
    if own.gains:
        parts.append(
            "what adapter and personal head gain on records of yours that are held out (noise "
            f"{own.gain_noise_multiplier:g} times the bound)"
        )
    return f"leave too, in the same noised vector: {'; '.join(parts)}"


def _about(epsilon: float) -> str:
    if math.isinf(epsilon):
        return "no bound"
    return f"about {math.ceil(100 * epsilon - 1e-9) / 100:.2f}"
