"""The figures of a report as words and rows, which page and terminal share."""

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = [
    "COUNTS",
    "budget_text",
    "colluding_rows",
    "counts",
    "interval_text",
    "statistics_series",
    "verdict",
]

COUNTS = ("round", "asked", "came", "declined", "did not fit", "")
"""What `counts` gives of a round."""


def counts(row: Mapping[str, Any]) -> list[str]:
    """A round of real devices under `COUNTS`: who was asked, who came, who declined."""
    if row["asked"] is None:
        return [str(row["round"]), "–", "–", "–", "–", "not ended"]
    numbers = [str(row[name]) for name in ("round", "asked", "answered", "declined", "refused")]
    return [*numbers, "void" if row["void"] else "summed"]


def colluding_rows(found: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Colluding devices, epsilon and what that row is, from `line["colluding"]`."""
    rows = found["rows"]
    notes = {
        rows[-1]["colluding"]: "the device's own share: if masking is broken",
        found["agreed"]: f"the agreed number, of {found['enrolled']:,} enrolled",
    }
    return [
        (
            str(row["colluding"]),
            "none" if row["epsilon"] is None else f"{row['epsilon']:.2f}",
            "; ".join(
                filter(None, (notes.get(row["colluding"]), "" if row["bound"] else "no bound"))
            ),
        )
        for row in rows
    ]


def budget_text(line: Mapping[str, Any]) -> str:
    """Say what a line may spend.

    What is left if masking is broken is limited by nothing.
    """
    return "none" if line["budget"] is None else f"{line['budget']:g}"


Points = list[tuple[int, float, float]]


def statistics_series(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, Points]]:
    """What can be drawn over the rounds: (panel, name, [(round, mean, standard deviation)]).

    A round in which the noise outweighed the count has no point.
    """
    found: list[tuple[str, str, Points]] = []
    named = (("loss", "train", "train_loss"), ("gain", "shared over base", "gain_shared"),
             ("gain", "personal over shared", "gain_personal"))  # fmt: skip
    for panel, name, key in named:
        if any(key in row for row in rows):
            points = [
                (row["round"], row[key], row[f"{key}_std"])
                for row in rows
                if row.get(key) is not None
            ]
            found.append((panel, name, points))
    return found


def verdict(metrics: Mapping[str, Any]) -> str:
    """What the people measured got from their personal heads, in a few sentences."""
    how = (
        f"Measured on each person's later records, in {metrics['name']}, lower is better; "
        "intervals are 95 %, from a bootstrap over people."
    )
    if metrics["win_rate_personal_over_global"] is None:
        return f"No personal heads were measured. {how}"
    better = 1 - metrics["ties"] - metrics["fraction_hurt"]
    seen = metrics.get("of", "seen people") == "seen people"
    whom = "people whose devices took part" if seen else "people never trained on"
    return (
        f"{better:.0%} of the {whom} do better with their personal head "
        f"than with the shared model, {metrics['ties']:.0%} do equally well, "
        f"{metrics['fraction_hurt']:.0%} do worse. {how} The swapped head is another person's: if "
        "it did as well, the gain would not be personal."
    )


def interval_text(ends: Sequence[float] | None, form: str = "+.4f") -> str:
    """`[low, high]`, or a dash where one user cannot give an interval."""
    return "–" if ends is None else f"[{ends[0]:{form}}, {ends[1]:{form}}]"
