"""How many rounds of a run a limit pays for, known before it starts and before an owner agrees.

A limit is the owner's, over all runs, or the run's own cap, of this run alone
(`client/privacy/gate.py` names whose it is). What is counted is the device that is asked in every
round.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ...common.errors import ConfigError
from ...common.privacy.accounting import Charge, epsilon, payable
from ...common.privacy.round_plan import Plan
from ...common.settings.config import Config
from ...common.settings.sections import DEVICES, PrivacySettings
from .gate import budgets, caps, charges
from .ledger import Limit, budget_of, without_directory

__all__ = ["Paid", "needed", "paid", "refuse_unpaid", "tightest_limit"]

RECKONED = 0.01


@dataclass(frozen=True)
class Paid:
    """The number of releases that one limit pays for, on one line of the ledger.

    Attributes:
        rounds: so many releases more.
        of: so many are asked for.
        limit: the largest epsilon, and whose it is.
        unit, against: the line.
        spent: what was spent of the limit before.
        total: what it would be if all were released; may be infinite.
        without: what helps where the device has no closed directory, and that is why; or empty.
    """

    rounds: int
    of: int
    limit: Limit
    unit: str
    against: str
    spent: float
    total: float
    without: str = ""


def paid(
    cost: Sequence[Charge],
    limits: Mapping[str, Limit],
    delta: float,
    count: int,
    past: Sequence[Charge] = (),
    slack: float = 0.0,
) -> Iterator[Paid]:
    """Yield each limit that pays for fewer than `count` releases of `cost`, after `past`.

    There may be one on each line of the ledger.

    `slack`: by how much of a limit `cost` may be reckoned too dear, where it is no plan's own.
    """
    for line in dict.fromkeys(charge.line for charge in cost):
        limit = budget_of(limits, *line[:2])
        if limit is None or math.isinf(limit):
            continue
        once, before = ([one for one in some if one.line == line] for some in (cost, past))
        rounds = payable(once, before, delta, limit * (1 + slack), count)
        if rounds < count:
            spent = epsilon(before, delta) if before else 0.0
            total = epsilon([*before, *[*once] * count], delta)
            mend = without_directory(cost, *line[:2])
            yield Paid(rounds, count, limit, line[0], line[1], spent, total, mend)


def tightest_limit(
    cost: Sequence[Charge],
    privacy: PrivacySettings,
    count: int,
    past: Sequence[Charge] = (),
    in_run: Sequence[Charge] = (),
) -> Paid | None:
    """Return the limit of a device that pays for the fewest of `count` releases.

    None where all of them are paid for.

    A cost reckoned from an offer is that of an adapter of a usual size, and may be above that of
    the rounds' own plans; a limit that is passed by less than 1 % pays, and the ledger has the last
    word.

    Args:
        cost: of one release.
        privacy: the device's own settings (`own_config`), or a simulated client's.
        count: releases asked for.
        past: everything the device has spent.
        in_run: what of it in this run.
    """
    unpaid = [
        *paid(cost, caps(privacy), privacy.delta, count, in_run, RECKONED),
        *paid(cost, budgets(privacy), privacy.delta, count, past, RECKONED),
    ]
    return min(unpaid, key=lambda paid: paid.rounds, default=None)


def refuse_unpaid(config: Config, plan: Plan, dimension: int, warn: Callable[[str], None]) -> None:
    """Refuse to start a run whose rounds nobody could pay for.

    Of a run on devices its own cap counts, since what owners allow is known to them alone; of a
    simulation what its clients have. A fleet larger than the cohort shares the rounds: where each
    client pays for some and together they pay for all, it is a warning.

    Args:
        config: the run's, resolved.
        plan: of its first round.
        dimension: numbers in a contribution.
        warn: gets the sentence where the rounds can still be paid for.

    Raises:
        ConfigError: the limit, how many of the rounds it pays for, and what to set.
    """
    own, rounds, clients = config.privacy, config.rounds, config.data.clients
    cost = charges(plan, dimension, own)
    unpaid = min(
        paid(cost, _counting(config), own.delta, rounds.count),
        key=lambda paid: paid.rounds,
        default=None,
    )
    if unpaid is None:
        return
    mend = "a part of it has no noise: give it some, or make no such claim (enabled = false)"
    if math.isfinite(unpaid.total):
        mend = f"set {unpaid.limit.setting} = {needed(unpaid.total)} or more"
        mend += ", or leave it out" if config.data.source == DEVICES else ""
    sentence = (
        f"{unpaid.limit.whose}, and pays for {unpaid.rounds} of rounds.count = {rounds.count} "
        f"rounds of each participant at worst ({unpaid.unit}-level, against the {unpaid.against}, "
        f"epsilon {unpaid.total:.4g} for all of them at delta {own.delta:g})"
    )
    if unpaid.rounds * clients >= rounds.count * rounds.cohort:
        warn(f"{sentence}: who is asked more often declines; to have nobody decline, {mend}")
        return
    fewer = f", or rounds.count = {unpaid.rounds}" if unpaid.rounds else ""
    raise ConfigError(f"{sentence}: every device would decline the rest; {mend}{fewer}")


def _counting(config: Config) -> Mapping[str, Limit]:
    """Return the limits that count at the start: of a run on devices, its own and no owner's."""
    limits = budgets(config.privacy)
    if config.data.source != DEVICES:
        return limits
    return {name: limit for name, limit in limits.items() if limit.of_run or math.isinf(limit)}


def needed(epsilon: float) -> str:
    """Return a budget that is enough for an epsilon, with a margin of 1 %.

    So it is enough for an adapter of the size that owners reckon with, too.
    """
    return f"{math.ceil(101 * epsilon - 1e-9) / 100:g}"
