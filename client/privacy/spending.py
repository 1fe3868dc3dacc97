"""What a device has spent of its privacy budget, from its own ledger.

There is a line for each unit, adversary and adjacency.

**Guarantee**: a figure against the server is given with what it rests on. What was released under
masks rests on a closed directory and on a number of colluding devices. What was released without a
closed directory counts with this device's own share of the noise; what the masks would give is
shown beside it, and is no claim.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

from ...common.privacy.accounting import Adjacency, epsilon
from ...common.privacy.release_facts import Asked
from ..store.device_store import ME, DeviceStore
from .collusion import (
    ColludingRow,
    Release,
    completed,
    conditions,
    epsilon_or_estimate,
    known,
    table,
)
from .ledger import Row

__all__ = ["Spending", "SpentLine", "WithMasks", "spending"]

Line = tuple[str, str, Adjacency]
OWN_SHARE = ("client", "unmasked server")
INVENTED = "nobody on the roster was invented"


class WithMasks(TypedDict):
    """What masks would give for a claim that counts the own share only."""

    epsilon: float | None
    conditions: list[str]


class Colluding(TypedDict):
    """Epsilon by the number of devices that work with the server."""

    agreed: int | None
    enrolled: int | None
    rows: list[ColludingRow]


class Figure(TypedDict):
    """A line's figure, and what it rests on, as `spending` says."""

    unit: str
    against: str
    adjacency: Adjacency
    delta: float
    epsilon: float | None
    bound: bool
    known: bool
    releases: int
    conditions: list[str]
    alone: int
    with_masks: WithMasks | None
    colluding: Colluding | None


class SpentLine(Figure):
    """A line of the ledger with its limit."""

    budget: float | None


class Spending(TypedDict):
    """The content of `privet client budget --json`."""

    delta: float
    budget: dict[str, float]
    releases: int
    directory: str | None
    enrolled: int | None
    older: int
    lines: list[SpentLine]


def spending(home: DeviceStore) -> Spending:
    """Return the content of `privet client budget --json`.

    `lines` have `epsilon` (None: no bound, or not known; of the own share also where it is no
    `bound`, as `client/privacy/collusion.py` reckons it), `budget` (None: not limited), what the
    figure rests on (`conditions`), how many of its releases counted the own share only (`alone`),
    what the masks would give for these (`with_masks`), and epsilon by colluding devices
    (`colluding`). Delta is the smallest of the policy's and of the agreed runs', as the ledger
    itself reckons. `older`: releases that an older privet wrote down, without the own share.
    """
    owner, joined = home.policy.budget, home.joined
    agreed = [offer.config for offer, consent in home.runs() if consent is not None]
    delta = min([owner.delta, *(config.privacy.delta for config in agreed)])
    plain = {
        offer.run
        for offer, _ in home.runs()
        if offer.config.privacy.client.noise_at != "distributed"
    }
    rows, plans = home.ledger.rows(ME), known(home.ledger.plans())
    releases = [_release(row, plans.get(row.plan)) for row in rows]
    older = {
        one
        for one, row in zip(releases, rows, strict=True)
        if one.asked is None and row.run not in plain and not _has(one, OWN_SHARE)
        and _has(one, ("client", "server"))
    }  # fmt: skip
    feared = [x.asked.plan.colluders for x in releases if x.asked and x.asked.plan.masked]
    feared = feared or [config.colluders for config in agreed]
    closed = joined is not None and joined.closed
    page = _Page(
        releases,
        frozenset(older),
        delta,
        min(feared) if feared else None,
        len(home.directory.known) if closed else None,
        joined is not None and not closed,
    )
    limits = {"client": owner.client, "example": owner.example}
    most = {**limits, "client/server": max(owner.client, owner.open_directory)}
    lines = sorted({charge.line for one in releases for charge in one.charges})
    return {
        "delta": delta,
        "budget": limits,
        "releases": len(rows),
        "directory": None if joined is None else "closed" if closed else "open",
        "enrolled": page.enrolled,
        "older": len(older),
        "lines": [
            {
                **page.line(line),
                "budget": None
                if line[:2] == OWN_SHARE
                else most.get(f"{line[0]}/{line[1]}", most[line[0]]),
            }
            for line in lines
        ],
    }


@dataclass(frozen=True)
class _Page:
    """The facts that all lines of one device share.

    Attributes:
        releases: oldest first.
        older: those of which the own share is not known.
        delta: of every figure.
        colluders: the smallest number that the plans reckoned with; None: not known.
        enrolled: devices in the closed directory; None: there is none.
        without: whether the device belongs to a server without a closed directory.
    """

    releases: Sequence[Release]
    older: frozenset[Release]
    delta: float
    colluders: int | None
    enrolled: int | None
    without: bool

    def line(self, line: Line) -> Figure:
        """Return one line: its figure, and what the figure rests on."""
        unit, against, adjacency = line
        mine = [one for one in self.releases if any(c.line == line for c in one.charges)]
        server = against == "server"
        alone = [one for one in mine if server and _alone(one, line)]
        masked = [one for one in mine if server and one not in alone and self._rests(one, line)]
        unknown = self.without and any(one in self.older for one in masked)
        charges = [c for one in mine for c in one.charges if c.line == line]
        spent, bound = epsilon_or_estimate(charges, self.delta)
        if not bound and line[:2] != OWN_SHARE and not alone:
            spent = None
        with_masks: WithMasks | None = None
        if server and (alone or unknown):
            seen = [
                replace(c, against="server")
                for one in mine
                for c in one.charges
                if c.line == (unit, "analyst", adjacency)
            ]
            with_masks = {
                "epsilon": _finite(epsilon(seen, self.delta)),
                "conditions": [INVENTED, *conditions(self.colluders, self.enrolled)[1:]],
            }
        colluding: Colluding | None = None
        if line[:2] == ("client", "server") and self.colluders is not None:
            rows = table([mine], adjacency, self.delta, self.colluders)
            if rows:
                colluding = {"agreed": self.colluders, "enrolled": self.enrolled, "rows": rows}
        return {
            "unit": unit,
            "against": against,
            "adjacency": adjacency,
            "delta": self.delta,
            "epsilon": None if unknown else spent,
            "bound": bound,
            "known": not unknown,
            "releases": len(mine),
            "conditions": conditions(self.colluders, self.enrolled) if masked else [],
            "alone": len(alone),
            "with_masks": with_masks,
            "colluding": colluding,
        }

    def _rests(self, one: Release, line: Line) -> bool:
        """Return whether a figure on a line counts noise that only masks keep in the sum."""
        masks = _has(one, OWN_SHARE) or one in self.older
        return masks and any(
            line[0] == "client" or c.distance > 0 for c in one.charges if c.line == line
        )


def _release(row: Row, asked: Asked | None) -> Release:
    return Release(completed(row.charges, asked), asked)


def _has(one: Release, line: tuple[str, str]) -> bool:
    return any((c.unit, c.against) == line for c in one.charges)


def _alone(one: Release, line: Line) -> bool:
    """Return whether a person's figure counts no more noise than if the mask broke."""
    if line[0] != "client":
        return False
    broken = [replace(c, against="server") for c in one.charges if (c.unit, c.against) == OWN_SHARE]
    return broken != [] and broken == [c for c in one.charges if c.line == line]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
