"""What a release was asked with, kept beside its charges: the plan and the adapter's dimension.

A charge says what one adversary may learn. What a server with any number of colluding devices may
learn follows from the plan: how many shares of noise the smallest sum had, and how large each was.
"""

import json
from dataclasses import dataclass, replace

from ..errors import ProtocolError
from .round_plan import Plan

__all__ = ["Asked", "restored"]


@dataclass(frozen=True)
class Asked:
    """A round's plan, and how many numbers of a contribution are the adapter's.

    Both are public.
    """

    plan: Plan
    dimension: int

    @property
    def text(self) -> str:
        """One line, the same for every attempt of a round, as the plan's digest is."""
        plan = replace(self.plan, attempt=1).to_dict()
        return json.dumps({"dimension": self.dimension, "plan": plan}, sort_keys=True)


def restored(digest: str, text: str) -> Asked | None:
    """Read back what was kept of a release, if it is the plan with this digest.

    None: it is damaged, or of a privet whose plans this one cannot read. The dimension is no part
    of the digest; whoever computes with it compares with the charges of the release.
    """
    try:
        found = json.loads(text)
        plan, dimension = Plan.from_dict(found["plan"]), found["dimension"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, ProtocolError):
        return None
    if plan.digest != digest or type(dimension) is not int or dimension < 1:
        return None
    return Asked(plan, dimension)
