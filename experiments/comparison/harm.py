"""Whom personalisation serves worse, and what it does besides: findings above a threshold, first.

    hurt          share of people worse off than with the shared model, after fall-back
    segment       difference of mean loss between groups of people, without and with it: parts by
                  amount of own data, by topic, and the groups that records or a file declare
    control       another person's texts and head keep most of the gain: it is not personal
    persona       the same question, another profile: answers differ more than two draws do
    narrowing     a person's answers repeat themselves more than the shared model's
    memory        rare own strings come out first: of the shared model more than of the base model
                  (a leak), of the personal one (whoever sees its screen)

Every finding names the share of people it touches and nobody's name.
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from ..evaluation.answers import AnswerSummary
from ..evaluation.memorisation import MemorySummary
from ..evaluation.user_statistics import Mean, bootstrap_mean
from .scenario import Scenario
from .tables import loss_per_user

__all__ = ["findings", "segments", "topics"]

Row = Mapping[str, Any]


class Finding(TypedDict):
    """What a comparison found that a reader should know, and the share of people it touches."""

    kind: str
    touched: float
    text: str


Segment = TypedDict(
    "Segment",
    {
        "kind": str,
        "segment": str,
        "people": int,
        "share": float,
        "without": Mean,
        "with": Mean,
        "gain": Mean,
        "hurt": float,
    },
)
"""People who are alike: their mean losses without and with personalisation."""


class Findings(TypedDict):
    """Findings above their thresholds, worst first, and all segments."""

    findings: list[Finding]
    segments: list[Segment]


FEWEST = 5  # people in a segment that is compared


def findings(rows: Sequence[Row], summary: Row, scenario: Scenario) -> Findings:
    """Compare what people got with the scenario's thresholds.

    Args:
        rows: one line a person.
        summary: so far: models, answers, memory.
        scenario: the thresholds.
    """
    shared, wanted = summary["shared"], scenario.harm
    parts = segments(rows, shared, wanted.segments, scenario.bootstrap)
    listed = [
        *_hurt(rows, shared, wanted.touched),
        *_gaps(parts, wanted.gap),
        *_controls(summary["comparisons"]),
        *_of_answers(summary.get("answers"), wanted.diversity),
        *_of_memory(summary.get("memory"), wanted.exposure),
    ]
    listed.sort(key=lambda finding: -finding["touched"])
    return {"findings": listed, "segments": parts}


def topics(texts: Sequence[str], count: int) -> list[str]:
    """A topic for each person's words: k-means over TF-IDF, the same every time.

    Topics have numbers and no words, for words of few people's private texts would name them.

    Args:
        texts: all own words of each person.
        count: of topics; fewer people than twice as many have one topic.
    """
    if count < 2 or len(texts) < 2 * count or not any(text.strip() for text in texts):
        return ["none"] * len(texts)
    words = import_module("sklearn.feature_extraction.text").TfidfVectorizer(
        sublinear_tf=True, token_pattern=r"(?u)\b\w+\b"
    )
    clusters = import_module("sklearn.cluster").KMeans(count, n_init=10, random_state=0)
    return [f"topic {cluster + 1}" for cluster in clusters.fit_predict(words.fit_transform(texts))]


def segments(rows: Sequence[Row], shared: str, count: int, draws: int) -> list[Segment]:
    """Mean loss without and with personalisation for each segment of at least five people."""
    amounts = np.array([row["all_own"] for row in rows], dtype=float)
    edges = np.quantile(amounts, [i / count for i in range(1, count)])
    part = np.searchsorted(edges, amounts, side="left")
    kinds = [
        ("own records", [f"{_named(p, edges)}" for p in part]),
        ("topic", [row.get("topic") or "none" for row in rows]),
        ("group", [row.get("group") or "none" for row in rows]),
    ]
    without, having = np.array(loss_per_user(rows, shared)), loss_per_user(rows, "personal")
    gains = without - np.array(having)
    parts: list[Segment] = []
    for kind, names in kinds:
        for name in dict.fromkeys(sorted(names)):
            mine = np.array([one == name for one in names])
            if FEWEST <= mine.sum() < len(rows):
                parts.append(
                    {
                        "kind": kind,
                        "segment": name,
                        "people": int(mine.sum()),
                        "share": float(mine.mean()),
                        "without": bootstrap_mean(without[mine], draws=draws).as_dict(),
                        "with": bootstrap_mean(np.array(having)[mine], draws=draws).as_dict(),
                        "gain": bootstrap_mean(gains[mine], draws=draws).as_dict(),
                        "hurt": float(np.mean(gains[mine] < 0)),
                    }
                )
    return parts


def _named(part: int, edges: NDArray[np.float64]) -> str:
    if part == 0:
        return f"at most {edges[0]:.0f}"
    above = f"more than {edges[part - 1]:.0f}"
    return f"{above}, at most {edges[part]:.0f}" if part < len(edges) else above


def _hurt(rows: Sequence[Row], shared: str, most: float) -> list[Finding]:
    gains = np.subtract(loss_per_user(rows, shared), loss_per_user(rows, "personal"))
    share = float(np.mean(gains < 0))
    if share <= most:
        return []
    worst = -float(gains.min())
    text = f"worse off than with the shared model after fall-back, the worst by {worst:.3f}"
    return [_finding("hurt", share, text)]


def _gaps(parts: Sequence[Segment], most: float) -> list[Finding]:
    """Kinds whose gap, largest less smallest mean loss, personalisation widens beyond `most`."""
    widened_gaps = []
    for kind in dict.fromkeys(part["kind"] for part in parts):
        mine = [part for part in parts if part["kind"] == kind]
        without = [part["without"]["mean"] for part in mine]
        having = [part["with"]["mean"] for part in mine]
        gap = {"without": max(without) - min(without), "with": max(having) - min(having)}
        worst = max(mine, key=lambda part: part["with"]["mean"])
        widened = gap["with"] - gap["without"]
        if len(mine) > 1 and widened > most * worst["with"]["mean"]:
            text = (
                f"the gap between segments by {kind} grows from {gap['without']:.3f} to "
                f"{gap['with']:.3f} with personalisation; worst served: {worst['segment']}"
            )
            widened_gaps.append(_finding("segment", worst["share"], text))
    return widened_gaps


def _controls(comparisons: Sequence[Row]) -> list[Finding]:
    """Controls that keep more than half of the gain."""
    return [
        _finding(
            "control",
            1.0,
            f"{one['title']}: the control keeps {one['gain_kept']:.0%} of the gain, so as much of "
            "it is not personal",
        )
        for one in comparisons
        if one["worse"] in ("retrieval_swapped", "head_swapped", "hybrid_swapped")
        and one["gain_kept"] is not None
        and one["gain_kept"] > 0.5
    ]


def _of_answers(answers: AnswerSummary | None, most: float) -> list[Finding]:
    if answers is None:
        return []
    found, means = [], answers["means"]
    touched = float(np.mean([lost > most for lost in answers["narrowed"]]))
    lost = means["diversity_lost"]
    if lost["ci95"] is not None and lost["ci95"][0] > 0 and touched:
        text = f"answers narrow: distinct-2 falls by {lost['mean']:.3f} in the mean"
        found.append(_finding("narrowing", touched, text))
    effect = means["persona_effect"]
    if effect["ci95"] is not None and effect["ci95"][0] > 0:
        text = (
            "another person's profile changes the answer to the same question: distance "
            f"{means['swapped_from_hybrid']['mean']:.3f}, two draws of one profile "
            f"{means['again_from_hybrid']['mean']:.3f} (1 - ROUGE-L)"
        )
        found.append(_finding("persona", 1.0, text))
    return found


def _of_memory(memory: MemorySummary | None, most: float) -> list[Finding]:
    found = []
    for name, bits in memory["above_base"].items() if memory else ():
        touched = float(np.mean([above > most for above in bits]))
        mean = float(np.mean(bits))
        if mean > most:
            where = "LEAK from training" if name == "shared" else "on the device only"
            text = (
                f"rare own strings are remembered by {name}: {mean:.1f} bits above the base model "
                f"({where})"
            )
            found.append(_finding("memory", touched, text))
    return found


def _finding(kind: str, touched: float, text: str) -> Finding:
    return {"kind": kind, "touched": touched, "text": text}
