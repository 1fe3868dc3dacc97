"""Cold start with texts: the latest 0, 1, 2, 4 … own records, nothing else known of the person.

With no record the shared model; up to three, texts in front; from four on the own records choose
between texts in front, head and both, and the shared model if nothing is sure to be better
(`comparisons.choice`). The held-out records are the same at
every number, so that a person is compared with itself.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..comparison.comparisons import OwnSide, evaluate_text
from .user_statistics import bootstrap_mean, fraction_hurt

if TYPE_CHECKING:
    from ..comparison.study import Study

__all__ = ["curve", "evaluate_user"]

Line = dict[str, Any]


def evaluate_user(study: "Study", user: str) -> Line | None:
    """One person's nats on the held-out records with each number of own records."""
    held_out, _ = study.held_out(user)
    own = [one.ids for one in study.own(user)]
    counts = [count for count in study.scenario.cold_start.counts if count <= len(own)]
    if not held_out or not counts:
        return None
    found: Line = {"counts": counts, "shared": None, "personal": [], "chosen": []}
    for count in counts:
        side = OwnSide.of(study.evaluator, own[len(own) - count :])
        line = evaluate_text(study.evaluator, side, None, held_out)
        found["shared"] = sum(line["nats"][study.evaluator.name("global")])
        found["bytes"] = sum(line["bytes"])
        found["personal"].append(sum(line["nats"]["personal"]))
        found["chosen"].append(line["chosen"])
    return found


def curve(lines: Sequence[Line], draws: int) -> list[Line]:
    """For each number of records: the gain over the shared model, bits per byte, and who is hurt.

    *worse* says whether the mean is below zero beyond its interval.
    """
    found = []
    for count in sorted({count for line in lines for count in line["counts"]}):
        have = [line for line in lines if count in line["counts"] and line["bytes"]]
        gains = [
            (line["shared"] - line["personal"][line["counts"].index(count)])
            / line["bytes"]
            / float(np.log(2))
            for line in have
        ]
        if not gains:
            continue
        mean = bootstrap_mean(gains, draws=draws)
        found.append(
            {
                "records": count,
                "people": len(have),
                **mean.as_dict(),
                "hurt": fraction_hurt(gains),
                "worse": mean.high < 0,
                "chosen": _counted([line["chosen"][line["counts"].index(count)] for line in have]),
            }
        )
    return found


def _counted(names: Sequence[str]) -> dict[str, int]:
    return {name: names.count(name) for name in sorted(set(names))}
