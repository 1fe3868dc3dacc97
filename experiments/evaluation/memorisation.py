"""Rare strings of a person's own records: would a model say them to somebody who begins them?

A rare string is a short run of tokens of an own record, some of which nobody else who is measured
ever used. Its *rank* is its place by likelihood after its true beginning among runs of the same
length drawn from other people's records; its *exposure* is log2(runs) - log2(rank) in bits
(Carlini et al. 2019): 0 nothing remembered, log2(runs) said first. The base model never saw the
person, so the shared model's exposure above the base model's is what training left in it; that of
the personal models stays on the device, and shows when somebody else sees its screen.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from ...client.personal.scored_text import Asked, Row
from ...client.personal.text_evaluator import alone
from .user_statistics import Mean, bootstrap_mean

if TYPE_CHECKING:
    from ..comparison.study import Study

__all__ = ["evaluate_user", "exposure", "rare_runs", "summarised"]


class MemorySummary(TypedDict):
    """Mean exposure of each model in bits, and everybody's above the base model's."""

    people: int
    most: float
    exposure: dict[str, Mean]
    above_base: dict[str, list[float]]


PREFIX, LENGTH = 4, 4  # tokens given, tokens ranked
RUNS = 16  # the true one among them
STRINGS = 2  # of each person


def exposure(losses: Sequence[float]) -> float:
    """Compute the exposure of the first run among all, in bits.

    It is log2 of how many runs there are, less log2 of the rank of the first. Ties count half.

    >>> exposure([1.0, 2.0, 3.0, 4.0]), exposure([4.0, 1.0, 2.0, 3.0])
    (2.0, 0.0)
    """
    true, others = losses[0], losses[1:]
    before = sum(other < true for other in others) + sum(other == true for other in others) / 2
    return math.log2(len(losses)) - math.log2(1 + before)


def rare_runs(
    own: Sequence[Sequence[int]], others: Counter[int], count: int
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(beginning, run) of the own records with the most tokens that nobody else used.

    At most one of a record, `count` in all; only runs with at least one such token.
    """
    runs = []
    for ids in own:
        body = tuple(ids)
        scored = [
            (sum(not others[token] for token in body[at + PREFIX : at + PREFIX + LENGTH]), at)
            for at in range(1, len(body) - PREFIX - LENGTH)
        ]
        if scored:
            rare, start = max(scored)
            middle = start + PREFIX
            runs.append((rare, body[start:middle], body[middle : middle + LENGTH]))
    runs.sort(key=lambda scored_run: -scored_run[0])
    return [(prefix, run) for rare, prefix, run in runs[:count] if rare]


def evaluate_user(study: "Study", user: str) -> dict[str, float] | None:
    """Mean exposure of a person's rare strings under base, shared and personal models.

    None: the person has none, or nobody else has texts to compare them with.
    """
    text = study.evaluator.text
    own = [one.ids for one in study.own(user)]
    rest = [one.ids for other in study.users if other != user for one in study.own(other)]
    strings = rare_runs(own, Counter(token for ids in rest for token in ids), STRINGS)
    if not strings or not rest:
        return None
    side = study.side(user)
    rng = np.random.default_rng([study.seed, study.users.index(user)])
    exposures: dict[str, list[float]] = {}
    for prefix, run in strings:
        runs = [run, *(_drawn(rest, rng) for _ in range(RUNS - 1))]
        questions = [Asked(prefix + each, PREFIX) for each in runs]
        query = questions[0].query(text.adapter.base.tokenizer)
        context = side.history.context(query, study.evaluator.budget)
        base, shared = text.scored(alone(questions), text.adapter.start, text.shared)
        (fronted,) = text.scored([Row(context, q) for q in questions])
        models = {
            "base": (base, None), "shared": (shared, None), "head": (shared, side.head),
            "retrieval": (fronted, None), "hybrid": (fronted, side.hybrid),
        }  # fmt: skip
        for name, (scored, head) in models.items():
            exposures.setdefault(name, []).append(exposure(scored.sums(head)))
    means = {name: float(np.mean(bits)) for name, bits in exposures.items()}
    return {"strings": len(strings), **means}


def summarised(lines: Sequence[Mapping[str, float]], draws: int) -> MemorySummary:
    """Mean exposure of each model, in bits, and above the base model's."""
    if not lines:
        return {"people": 0, "most": math.log2(RUNS), "exposure": {}, "above_base": {}}
    names = [name for name in lines[0] if name not in ("user", "strings")]
    return {
        "people": len(lines),
        "most": math.log2(RUNS),
        "exposure": {
            name: bootstrap_mean([line[name] for line in lines], draws=draws).as_dict()
            for name in names
        },
        "above_base": {name: [line[name] - line["base"] for line in lines] for name in names[1:]},
    }


def _drawn(records: Sequence[Sequence[int]], rng: np.random.Generator) -> tuple[int, ...]:
    """A run of `LENGTH` tokens from anybody's record, marks at the ends left out."""
    while True:
        ids = records[int(rng.integers(len(records)))]
        if len(ids) > LENGTH + 2:
            start = int(rng.integers(1, len(ids) - LENGTH))
            return tuple(ids[start : start + LENGTH])
