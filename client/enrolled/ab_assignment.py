"""The A/B experiment that this device's chat is part of: its arm, and the owner's outcome.

    agreed   the arm is in use from the owner's yes to the experiment's end, `ab_test.days` at most
    arm      a template (memory, memory@1.0.0), or the usual one with the personal head or without
             it (personal, shared)
    outcome  the share of the arm's answers that the owner took, of those with a verdict

**Guarantee**: which arm it is and what the outcome was stay on this device; `client/device.py`
hands the outcome to the gate, and nothing else reads it.
"""

import time
from dataclasses import dataclass

from ...common.settings.sections import AbRunSettings
from ..ab_arm import arm_of
from ..consent.run_offers import Offer
from ..store import verdicts
from ..store.device_store import DeviceStore

__all__ = ["HEADS", "AbAssignment", "current", "of", "outcome"]

HEADS = ("personal", "shared")
"""Arms that are no templates: with the personal head, and without it."""

DAY_S = 86400.0


@dataclass(frozen=True)
class AbAssignment:
    """One experiment and this device's arm in it."""

    run: str
    settings: AbRunSettings
    arm: str

    @property
    def template(self) -> tuple[str, str | None] | None:
        """The name and version of the arm's template.

        Version None is the one in use. None for an arm of `HEADS`.
        """
        name, _, version = self.arm.partition("@")
        return None if self.arm in HEADS else (name, version or None)


def current(home: DeviceStore) -> AbAssignment | None:
    """Return the experiment agreed to last that has not ended.

    None where this device is in none.
    """
    agreed = [(one.time, offer) for offer, one in home.runs()
              if one is not None and one.digest == offer.digest]  # fmt: skip
    for since, offer in sorted(agreed, key=lambda each: each[0], reverse=True):
        assignment = of(home, offer)
        if assignment is None or home.vault.get(f"kept/{offer.run}") is not None:
            continue
        if time.time() - since <= assignment.settings.days * DAY_S:
            return assignment
    return None


def of(home: DeviceStore, offer: Offer) -> AbAssignment | None:
    """Return this device's part in an offered A/B experiment.

    None where the offer is no experiment.
    """
    ab_run = offer.config.ab_run
    if ab_run is None:
        return None
    arm = arm_of(home.identity.seed, offer.run, len(ab_run.arms))
    return AbAssignment(offer.run, ab_run, ab_run.arms[arm])


def outcome(home: DeviceStore, run: str, ab_run: AbRunSettings) -> float | None:
    """Return the share of the arm's answers that the owner took, 0 to 1.

    For a binary outcome it is 1 for more than half, and else 0. None without a verdict.
    """
    taken = [one.taken for one in verdicts.kept(home).values() if one.run == run]
    if not taken:
        return None
    share = sum(taken) / len(taken)
    return float(share > 0.5) if ab_run.outcome == "binary" else share
