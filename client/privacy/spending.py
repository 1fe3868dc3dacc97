"""What a device has spent of its privacy budget, from its own ledger.

There is a line for each unit, adversary and adjacency.

**Guarantee**: a figure against the server is given with what it rests on. What was released under
masks rests on a closed directory and on a number of colluding devices. What was released without a
closed directory counts with this device's own share of the noise; what the masks would give is
shown beside it, and is no claim.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

from ...common.privacy.accounting import Adjacency, Against, Charge, Unit, epsilon
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

Line = tuple[Unit, Against, Adjacency]
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
    rows, plans = home.ledger.rows(ME), known(home.ledger.plans())
    releases = [_release(row, plans.get(row.plan)) for row in rows]
    colluders = [x.asked.plan.colluders for x in releases if x.asked and x.asked.plan.masked]
    closed = joined is not None and joined.closed
    page = _Page(
        releases,
        _older(home, releases, rows),
        delta,
        min(colluders or [config.colluders for config in agreed], default=None),
        len(home.directory.known) if closed else None,
        joined is not None and not closed,
    )
    budgets = {"client": owner.client, "example": owner.example}
    limits = {**budgets, "client/server": max(owner.client, owner.open_directory)}
    lines = sorted({charge.line for release in releases for charge in release.charges})
    return {
        "delta": delta,
        "budget": budgets,
        "releases": len(rows),
        "directory": None if joined is None else "closed" if closed else "open",
        "enrolled": page.enrolled,
        "older": len(page.older),
        "lines": [{**page.line(line), "budget": _limit(limits, line)} for line in lines],
    }


def _older(
    home: DeviceStore, releases: Sequence[Release], rows: Sequence[Row]
) -> frozenset[Release]:
    """Return the masked releases that an older privet wrote down, without the own share."""
    unmasked = {
        offer.run
        for offer, _ in home.runs()
        if offer.config.privacy.client.noise_at != "distributed"
    }
    return frozenset(
        release
        for release, row in zip(releases, rows, strict=True)
        if release.asked is None and row.run not in unmasked
        and not _has(release, OWN_SHARE) and _has(release, ("client", "server"))
    )  # fmt: skip


def _limit(limits: Mapping[str, float], line: Line) -> float | None:
    """Return the budget of a line. None: it is not limited."""
    unit, against, _ = line
    return None if line[:2] == OWN_SHARE else limits.get(f"{unit}/{against}", limits[unit])


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
        mine = [release for release in self.releases if _charges(release, line)]
        server = against == "server"
        unmasked = [x for x in mine if server and _own_share_only(x, line)]
        masked = [x for x in mine if server and x not in unmasked and self._rests(x, line)]
        unknown = self.without and any(release in self.older for release in masked)
        spent, bound = epsilon_or_estimate([c for x in mine for c in _charges(x, line)], self.delta)
        if unknown or not (bound or line[:2] == OWN_SHARE or unmasked):
            spent = None
        return {
            "unit": unit,
            "against": against,
            "adjacency": adjacency,
            "delta": self.delta,
            "epsilon": spent,
            "bound": bound,
            "known": not unknown,
            "releases": len(mine),
            "conditions": conditions(self.colluders, self.enrolled) if masked else [],
            "alone": len(unmasked),
            "with_masks": self._with_masks(mine, line) if unmasked or unknown else None,
            "colluding": self._colluding(mine, line),
        }

    def _with_masks(self, releases: Sequence[Release], line: Line) -> WithMasks:
        """Return what the masks would give: the figure against the analyst, and its conditions."""
        seen: Line = (line[0], "analyst", line[2])
        charges = [replace(c, against="server") for x in releases for c in _charges(x, seen)]
        return {
            "epsilon": _finite(epsilon(charges, self.delta)),
            "conditions": [INVENTED, *conditions(self.colluders, self.enrolled)[1:]],
        }

    def _colluding(self, releases: Sequence[Release], line: Line) -> Colluding | None:
        """Return epsilon by the number of colluding devices, where there is such a table."""
        if line[:2] != ("client", "server") or self.colluders is None:
            return None
        rows = table([releases], line[2], self.delta, self.colluders)
        return {"agreed": self.colluders, "enrolled": self.enrolled, "rows": rows} if rows else None

    def _rests(self, release: Release, line: Line) -> bool:
        """Return whether a figure on a line counts noise that only masks keep in the sum."""
        masks = _has(release, OWN_SHARE) or release in self.older
        return masks and any(line[0] == "client" or c.distance > 0 for c in _charges(release, line))


def _release(row: Row, asked: Asked | None) -> Release:
    return Release(completed(row.charges, asked), asked)


def _charges(release: Release, line: Line) -> list[Charge]:
    return [charge for charge in release.charges if charge.line == line]


def _has(release: Release, line: tuple[str, str]) -> bool:
    return any((c.unit, c.against) == line for c in release.charges)


def _own_share_only(release: Release, line: Line) -> bool:
    """Return whether a person's figure counts no more noise than if the mask broke."""
    if line[0] != "client":
        return False
    own = [c for c in release.charges if (c.unit, c.against) == OWN_SHARE]
    broken = [replace(charge, against="server") for charge in own]
    return broken != [] and broken == _charges(release, line)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
