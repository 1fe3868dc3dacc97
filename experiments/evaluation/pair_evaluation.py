"""What only pairs of answers can be asked: length bias, and how far the oracle is.

Read by the experimenter off simulated devices, as everything in
`experiments/evaluation/run_evaluation.py`; no epsilon covers it.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch

from ...client.personal.head import PersonalHead
from ...client.personal.pair_evaluator import PairPerson, pair_error
from ...client.personal.preference_head import length_bias
from ...client.simulated import SimulatedContext
from ...client.training.records import split, spread
from ...common.model.assets import fetch
from ..data.preference_people import crowd, reward
from ..reports.facts import NamedMean
from .cluster_evaluation import LossesByModel
from .user_statistics import Mean, bootstrap, bootstrap_mean, ratio

__all__ = ["BEST", "best_losses", "gap_closed", "rows"]

Rows = list[NamedMean]
BEST = {"tastes": "oracle", "preferences": "crowd"}
"""Who knows more than any model: a made person's taste, or the other raters of the batch."""

SUSPICIOUS = 0.1
"""A correlation of margins with length this much beyond the people's own is a finding."""


def best_losses(bench: SimulatedContext, users: Sequence[str]) -> list[float]:
    """Return the share of each person's held-out pairs that oracle or crowd order wrongly."""
    worth = _worth(bench)
    return [
        pair_error(torch.tensor([chosen - rejected for chosen, rejected in worth(user)]))
        for user in users
    ]


def rows(
    bench: SimulatedContext,
    group: str,
    people: Mapping[str, PairPerson],
    losses: LossesByModel,
    partner: Callable[[int], str],
) -> Rows:
    """Lines of the report's table of differences: name, title, mean, 95 % interval over people."""
    names = list(people)
    heads: dict[str, Callable[[int], PersonalHead | None]] = {"shared model": lambda _: None}
    if "personal" in losses:
        heads["personal head"] = lambda number: people[names[number]].head
        if len(names) > 1:
            heads["another person's head"] = lambda number: people[partner(number)].head
    margins = {
        name: [people[user].margins(head(i)) for i, user in enumerate(names)]
        for name, head in heads.items()
    }
    lines: Rows = []
    for name, each in margins.items():
        lines += _length_rows(name, group, people, each)
    if bench.config.data.source in BEST and "personal" in losses:
        lines += _gap_rows(bench, group, names, losses, margins)
    return lines


def gap_closed(
    start: Sequence[float], reached: Sequence[float], best: Sequence[float], draws: int
) -> Mean:
    """Compute (start - reached) / (start - best) of means over people.

    Its interval is a bootstrap over people.

    Args:
        start, reached, best: a loss of each person under the shared, the personal and the best
            possible model.
    """
    first, last, goal = (np.array(each, dtype=np.float64) for each in (start, reached, best))
    return bootstrap(ratio, first - last, first - goal, draws=draws).as_dict()


def _length_rows(
    name: str, group: str, people: Mapping[str, PairPerson], margins: Sequence[torch.Tensor]
) -> Rows:
    """Correlation of margins with length beyond that of the people's choices."""
    excess = [
        length_bias(margin, person.longer).excess
        for margin, person in zip(margins, people.values(), strict=True)
    ]
    interval = bootstrap_mean(excess)
    finding = ": A FINDING" if abs(interval.mean) > SUSPICIOUS and interval.excludes_zero else ""
    return [
        {
            "name": f"length_bias_{name.replace(' ', '_')}_{group}",
            "title": f"length bias beyond the people's own, {name}, {group} people{finding}",
            **interval.as_dict(),
        }
    ]


def _gap_rows(
    bench: SimulatedContext,
    group: str,
    names: Sequence[str],
    losses: LossesByModel,
    margins: Mapping[str, Sequence[torch.Tensor]],
) -> Rows:
    """Return the share of the way from the shared model to oracle or crowd that is closed.

    It is given in pairs and in reward.
    """
    draws, best = bench.config.evaluation.bootstrap, BEST[bench.config.data.source]
    what = f"share of the {best}'s lead over the shared model that"
    pairs = gap_closed(losses["global"], losses["personal"], losses[best], draws)
    lines: Rows = [
        {"name": f"gap_closed_pairs_{group}",
         "title": f"{what} the personal head closes, pairs, {group} people", **pairs},
    ]  # fmt: skip
    if best == "crowd":  # how far apart ratings are is not a reward
        return lines
    of, nothing = _worth(bench), [0.0] * len(names)
    worth = [of(user) for user in names]
    missed = {
        name: [_regret(w, margin) for w, margin in zip(worth, each, strict=True)]
        for name, each in margins.items()
    }
    for name, kind, whose in (
        ("personal head", "reward", "the personal head"),
        ("another person's head", "reward_swapped", "another person's head"),
    ):
        closed = gap_closed(missed["shared model"], missed[name], nothing, draws)
        title = f"{what} {whose} closes, reward, {group} people"
        lines.append({"name": f"gap_closed_{kind}_{group}", "title": title, **closed})
    return lines


def _worth(bench: SimulatedContext) -> Callable[[str], list[tuple[float, float]]]:
    """Return the function that scores a person's held-out pairs by oracle or crowd.

    It gives the scores of chosen and rejected.
    """
    config = bench.config
    known, wanted = config.data.source == "tastes", config.evaluation.records
    score = partial(reward, config.data.seed) if known else crowd(fetch("ratings"))

    def of(user: str) -> list[tuple[float, float]]:
        _, held_out = split(bench.records(user), config.data.holdout)
        return [
            (score(user, record.text), score(user, record.rejected or ""))
            for record in map(held_out.__getitem__, spread(len(held_out), wanted))
        ]

    return of


def _regret(worth: Sequence[tuple[float, float]], margin: torch.Tensor) -> float:
    """Return the mean reward missed by taking the answer that the model scores higher.

    Of ties, half of each is taken.
    """
    lost = []
    for (chosen, rejected), ahead in zip(worth, margin.tolist(), strict=True):
        taken = chosen if ahead > 0 else rejected if ahead < 0 else (chosen + rejected) / 2
        lost.append(max(chosen, rejected) - taken)
    return float(np.mean(lost))
