"""A device's part in an A/B experiment: its arm, its outcome, and the gate.

**Guarantee**: the outcome goes into one vector, the vector into `client/privacy/gate.py`, and what
that returns is all that leaves. The arm is a keyed hash (`arm_of`) and is not sent.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..common.ab_test import AbTestSettings, layout, run_settings
from ..common.errors import DataError, PrivacyError, ProtocolError
from ..common.privacy import noise
from ..common.privacy.round_plan import Plan
from ..common.settings.config import Config
from ..common.settings.sections import AbRunSettings
from .privacy.gate import refuse_more, release
from .privacy.ledger import Ledger

__all__ = ["ArmOutcome", "answered", "outcome_vector", "take_part"]


@dataclass(frozen=True)
class ArmOutcome:
    """What one device has to release at a look.

    It is sensitive, so `repr` hides it.

    Attributes:
        client: whose ledger pays.
        arm: the place of the device's arm.
        outcome: of the person, from `low` to `high` of the settings; None where there is none yet.
    """

    client: str
    arm: int = field(repr=False)
    outcome: float | None = field(repr=False)


def outcome_vector(settings: AbRunSettings, arm: int, outcome: float | None) -> NDArray[np.float32]:
    """Return a vector that holds the outcome in the entries of the device's own arm.

    With y the outcome scaled to -1 .. 1, these entries are (1, y) or, where the settings have three
    entries an arm, (1, y, y^2). All others are zero, and all of them are where the outcome is None.

    Args:
        settings: the experiment the owner has accepted.
        arm: the place of the device's arm.
        outcome: of the person, from `low` to `high`; None where there is none yet.

    Raises:
        DataError: not a finite number, or a binary outcome that is neither 0 nor 1. A bounded one
            beyond its bounds is clipped to them.
    """
    vector = np.zeros((len(settings.arms), settings.entries), np.float32)
    if outcome is None:
        return vector.ravel()
    wrong = outcome not in (0, 1) if settings.outcome == "binary" else not np.isfinite(outcome)
    if wrong:
        kind = "0 or 1" if settings.outcome == "binary" else "a finite number"
        raise DataError(f"an outcome must be {kind}; nothing was released")
    inside = min(max(outcome, settings.low), settings.high)
    y = 2 * (inside - settings.low) / (settings.high - settings.low) - 1
    vector[arm] = (1, y, y * y)[: settings.entries]
    return vector.ravel()


def take_part(
    settings: AbTestSettings,
    plan: Plan,
    given: ArmOutcome,
    ledger: Ledger,
    source: noise.Source,
) -> bytes | None:
    """Answer one look of an A/B experiment, or decline it.

    Args:
        settings: the device's own: a plan may be stricter, never laxer.
        plan: the server's, of this look.
        given: the arm and its outcome.
        ledger: what this device has spent.
        source: operating system randomness; a seeded one in tests only.

    Returns:
        What leaves, to be masked where the plan has masks; None where the device declines, with
        the reason in its ledger. A look asked again gets the same bytes again and costs nothing.
    """
    try:
        return answered(settings, run_settings(settings), plan, given, ledger, source)
    except (PrivacyError, ProtocolError) as refusal:
        ledger.decline(given.client, plan.run, plan.round, str(refusal))
        return None


def answered(
    settings: AbRunSettings,
    own: Config,
    plan: Plan,
    given: ArmOutcome,
    ledger: Ledger,
    source: noise.Source,
) -> bytes:
    """Answer one look of an A/B experiment, or raise the reason to decline it.

    Run by the device, from `take_part`. `own` are the settings that the plan is held against.

    Raises:
        PrivacyError, ProtocolError: why this device declines; nothing was spent.
    """
    plan.refuse_if_laxer(own, layout(settings).dimension)
    if plan.blocks or plan.record_clip:
        raise ProtocolError(f"look {plan.round}: an A/B experiment trains and measures nothing")
    kept = ledger.resend(given.client, plan.run, plan.round, plan.digest)
    if kept is not None:
        return kept
    refuse_more(ledger, given.client, plan, own)
    vector = outcome_vector(settings, given.arm, given.outcome)
    return release(vector, layout(settings).digest, plan, given.client, ledger, own.privacy, source)
