"""What is left of a person's protection when devices collude with the server, or masks break.

    0 colluding              the noise of the smallest sum that may be opened
    m, the agreed number     what is charged against the server, if masking holds
    ...
    all others, or no masks  the device's own share: what is charged against the unmasked server

**Guarantee**: computed from the plans of the releases that happened and by the code that charges
them (`client/privacy/gate.py`), so that the rows at the agreed number and at the end are the
ledger's. Up to the agreed number the masks hold by construction. Beyond it they may break, and then
the last row is what is left; the rows between say what the noise alone would still hide.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

from ...common.privacy.accounting import Adjacency, Charge, epsilon
from ...common.privacy.release_facts import Asked, restored
from .gate import colluding

__all__ = ["Release", "completed", "conditions", "epsilon_or_estimate", "known", "points", "table"]

MAX_ROWS = 9


@dataclass(frozen=True, eq=False)
class Release:
    """One release: what it cost, and the plan it was asked with.

    The plan is None where an older privet wrote the release.

    Equal releases may share one object: a table then counts them once.
    """

    charges: tuple[Charge, ...]
    asked: Asked | None


def known(plans: Mapping[str, str]) -> dict[str, Asked]:
    """Return the plans of a ledger that this privet can read, by digest."""
    found = {digest: restored(digest, text) for digest, text in plans.items()}
    return {digest: asked for digest, asked in found.items() if asked is not None}


def completed(charges: tuple[Charge, ...], asked: Asked | None) -> tuple[Charge, ...]:
    """Add the client-level charge against the unmasked server to a release's charges, if it lacks.

    An older privet did not charge it: it is computed from the plan, where that is known.
    """
    person = [c for c in charges if c.unit == "client" and c.against == "server"]
    has = any(c.unit == "client" and c.against == "unmasked server" for c in charges)
    if has or not person or asked is None or not asked.plan.masked:
        return charges
    plan, adjacency = asked.plan, person[0].adjacency
    own = colluding(plan, asked.dimension, adjacency, plan.survivors)
    return (*charges, replace(own, against="unmasked server"))


def epsilon_or_estimate(charges: Sequence[Charge], delta: float) -> tuple[float | None, bool]:
    """Return an epsilon, and whether it is a bound.

    One share hides so little that epsilon is beyond what integer noise has a bound for: its tables
    end at a chance of 2^-60, and exp(epsilon) times that is more than delta from epsilon 25 or so
    on. Then the figure is that of Gaussian noise of this size, so that somebody can see how little
    is left; nothing is promised. None: there is no noise at all.
    """
    value = epsilon(charges, delta)
    if math.isfinite(value):
        return value, True
    value = epsilon([replace(charge, distance=0.0) for charge in charges], delta)
    return (value if math.isfinite(value) else None), False


def conditions(colluders: int | None, enrolled: int | None) -> list[str]:
    """Return what every figure against the server rests on where contributions are masked."""
    how_many = (
        "no more devices than the plans reckon with"
        if colluders is None
        else f"at most {colluders}"
    )
    of = "" if enrolled is None else f" of the {enrolled:,} enrolled devices"
    if colluders is not None and enrolled is None:
        of = " of all enrolled devices"
    return ["closed directory", f"{how_many}{of} collude with the server"]


def points(agreed: int, last: int) -> list[int]:
    """Return the numbers of colluding devices that are worth a row of the table.

    They are 0, the agreed one, doublings, and the last.
    """
    steps, step = [], max(agreed, 1)
    while step < last:
        steps.append(step)
        step *= 2
    near = [last - 1] if last > 1 else []
    while len(steps) + len(near) > MAX_ROWS - 2:
        steps = steps[::2]
    return sorted({0, min(agreed, last), *steps, *near, last})


class ColludingRow(TypedDict):
    """A row of `table`."""

    colluding: int
    epsilon: float | None
    bound: bool


def table(
    histories: Iterable[Sequence[Release]], adjacency: Adjacency, delta: float, agreed: int
) -> list[ColludingRow]:
    """Tabulate client-level epsilon against the server by the number of colluding devices.

    It is that of the worst history.

    Args:
        histories: the releases of each client.
        adjacency: of the line; releases with another one are no part of it.
        delta: of every row.
        agreed: how many devices may collude, a row of its own.

    Returns:
        `colluding`, `epsilon` and whether it is a `bound` (as `epsilon_or_estimate`), from 0 until
        only the own share is left; empty where nothing was masked, or where some release's plan is
        not known.
    """
    mine = {tuple(one for one in every if _person(one, adjacency)) for every in histories}
    every = {one for releases in mine for one in releases}
    survivors = [one.asked.plan.survivors for one in every if one.asked and one.asked.plan.masked]
    if not survivors or any(one.asked is None for one in every):
        return []
    rows: list[ColludingRow] = []
    for devices in points(agreed, max(survivors) - 1):
        costs = {one: _cost(one, adjacency, devices) for one in every}
        epsilons = [
            epsilon_or_estimate([costs[one] for one in releases], delta) for releases in mine
        ]
        value, bound = max(epsilons, key=lambda one: math.inf if one[0] is None else one[0])
        rows.append({"colluding": devices, "epsilon": value, "bound": bound})
    return rows


def _person(release: Release, adjacency: Adjacency) -> Charge | None:
    wanted = ("client", "server", adjacency)
    found = [c for c in release.charges if c.line == wanted]
    return found[0] if found else None


def _cost(release: Release, adjacency: Adjacency, devices: int) -> Charge:
    """Return what a release costs at that many colluding devices.

    Without masks it costs what it did, because nobody has a share.
    """
    charge = _person(release, adjacency)
    if release.asked is not None and release.asked.plan.masked:
        return colluding(release.asked.plan, release.asked.dimension, adjacency, devices)
    if charge is None:
        raise ValueError("a release without a charge against the server is no part of the table")
    return charge
