"""How many own labels does a person need? The personal head after 0, 1, 2, ... of them.

People never trained on. Each head is fitted on the person's first n own records and measured on the
same held-out later ones:

    global     the shared head alone
    personal   the head fitted on n own labels (`client/personal/label_head.py`)
    other      the head fitted on the n labels of somebody else, of the same group on the same items
               where people come in groups (raters of one batch)

The head's constants are public and were set on training raters; nothing is fitted to the people
measured here but their own heads. The experimenter reads these figures off simulated devices; no
epsilon covers them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ...client.device import SimulatedContext
from ...client.personal.label_evaluator import LabelEvaluator
from ...client.personal.label_head import LabelHead, fit_label_head, label_losses
from ...client.personal.person_losses import evaluator_of
from ...client.training import records
from ...common.errors import ConfigError, DataError
from ...common.settings.config import Config
from .. import progress
from ..reports import pictures
from .run_evaluation import global_adapter
from .user_statistics import bootstrap_mean, fraction_hurt

__all__ = ["COUNTS", "Newcomer", "cold_start", "curve", "picture"]

COUNTS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 20)
DRAWS = 2000


@dataclass(frozen=True, eq=False)
class Newcomer:
    """A person's material: features and labels, the own ones earliest first, and the held-out."""

    name: str
    group: str | None
    own: tuple[Tensor, Tensor] = field(repr=False)
    held_out: tuple[Tensor, Tensor] = field(repr=False)


def cold_start(folder: Path, config: Config, counts: Sequence[int] = COUNTS) -> dict[str, Any]:
    """The curve for the people of a finished run that were never trained on.

    Raises:
        ConfigError: the run makes text, or `counts` is not ascending from 0.
        DataError: nobody has so many own records.
        StateError: no round was finished.
    """
    if not config.outputs:
        raise ConfigError(f"{folder} makes text; a cold start by labels needs a run with labels")
    bench = SimulatedContext.open(folder.resolve())
    evaluator = evaluator_of(bench.trainer.adapter, global_adapter(folder))
    if not isinstance(evaluator, LabelEvaluator):
        raise ConfigError(f"{folder} has no shared head; a cold start by labels needs one")
    people = []
    with progress.counting("reading", len(bench.index.test_users), "people") as one:
        for user in bench.index.test_users:
            newcomer = _newcomer(user, bench, evaluator, config)
            if newcomer is not None:
                people.append(newcomer)
            one()
    found = curve(people, evaluator.shared, counts)
    return {"run": config.name, "unit": "squared error" if config.outputs == 1 else "nats", **found}


def _newcomer(
    user: str, bench: SimulatedContext, evaluator: LabelEvaluator, config: Config
) -> Newcomer | None:
    """Prepare a person's material. None for somebody without own or held-out records."""
    own, held = records.split(bench.records(user), config.data.holdout)
    mine, rest = bench.tokenised(own), bench.tokenised(held[: config.evaluation.records])
    if not mine or not rest:
        return None
    group = bench.index.blocks[user].group
    return Newcomer(user, group, evaluator.features(mine), evaluator.features(rest))


def curve(
    people: Sequence[Newcomer], shared: LabelHead, counts: Sequence[int] = COUNTS
) -> dict[str, Any]:
    """Losses by the number of own labels.

    Args:
        people: those with fewer than the largest count own records are left out, and so is who
            has nobody else to be compared with: the same people at every count.
        shared: the head everybody starts from.
        counts: ascending, from 0.

    Returns:
        `rows`, one a count: mean losses, `personal_minus_global` and `personal_minus_other` with
        95 % intervals, by a bootstrap over people and (`ci95_groups`) over whole groups, and the
        share of people hurt; `step`, the loss against the count before, with its interval.
        `monotone`: no step's interval lies above zero. `beats_from`: the smallest count from which
        on, and at all larger ones, personal beats global and other, intervals below zero.

    Raises:
        ConfigError: counts that are not ascending from 0.
        DataError: fewer than 2 people are left.
    """
    if not counts or list(counts) != sorted(set(counts)) or counts[0] != 0:
        raise ConfigError(f"counts = {list(counts)}: expected ascending numbers from 0")
    enough = [one for one in people if len(one.own[1]) >= counts[-1]]
    pairs = _paired(enough)
    if len(pairs) < 2:
        raise DataError(
            f"{len(pairs)} of {len(people)} people have {counts[-1]} own records and somebody to "
            "be compared with; expected at least 2: take smaller counts or more people"
        )
    groups = [one.group or one.name for one, _ in pairs]
    together = np.array([_loss(shared, one) for one, _ in pairs])
    rows: list[dict[str, Any]] = []
    before = None
    for count in counts:
        heads = {one.name: _head(one, shared, count) for one in enough}
        own = np.array([_loss(heads[one.name], one) for one, _ in pairs])
        other = np.array([_loss(heads[partner.name], one) for one, partner in pairs])
        rows.append(
            {
                "labels": count,
                "global": bootstrap_mean(together, draws=DRAWS).as_dict(),
                "personal": bootstrap_mean(own, draws=DRAWS).as_dict(),
                "other": bootstrap_mean(other, draws=DRAWS).as_dict(),
                "personal_minus_global": _difference(own - together, groups),
                "personal_minus_other": _difference(own - other, groups),
                "hurt": fraction_hurt(together - own, tolerance=1e-9),
                "kept_shared": float(np.mean([heads[one.name].is_shared for one, _ in pairs])),
                "step": None if before is None else _difference(own - before, groups),
            }
        )
        before = own
    return {
        "people": len(pairs),
        "left_out": len(people) - len(pairs),
        "groups": len(set(groups)),
        "rows": rows,
        "monotone": all(row["step"] is None or row["step"]["ci95"][0] <= 0 for row in rows),
        "beats_from": _beats_from(rows),
    }


def picture(found: dict[str, Any]) -> str:
    """The curve as SVG: mean losses with 95 % bands over people."""
    drawn, (panel,) = pictures.figure(2.9)
    counts = [row["labels"] for row in found["rows"]]
    shown = (("global", "muted"), ("other", "hurt"), ("personal", "gain"))
    ends = []
    for name, colour in shown:
        means = [row[name]["mean"] for row in found["rows"]]
        low, high = zip(*(row[name]["ci95"] for row in found["rows"]), strict=True)
        ink = pictures.LIGHT[colour]
        panel.fill_between(counts, low, high, color=ink, alpha=0.18, linewidth=0)
        panel.plot(counts, means, "o-", markersize=3.5, linewidth=1.3, color=ink)
        ends.append((name, means[-1], ink))
    for name, height, ink in ends:
        panel.text(counts[-1] + 0.02 * counts[-1], height, name, fontsize=8.5, va="center",
                   color=ink)  # fmt: skip
    panel.set_xlim(-0.3, 1.22 * counts[-1])
    panel.set_xlabel("own labels", color=pictures.LIGHT["ink"])
    panel.set_ylabel(found["unit"], color=pictures.LIGHT["ink"])
    alt = ", ".join(f"{name} {height:.2f}" for name, height, _ in ends)
    text = pictures.svg(drawn, "cold-start", f"after {counts[-1]} own labels: {alt}")
    for name, code in pictures.LIGHT.items():  # a picture alone has no style sheet
        text = text.replace(f"var(--{name})", code)
    return text + "\n"


def _paired(people: Sequence[Newcomer]) -> list[tuple[Newcomer, Newcomer]]:
    """Pair everybody with the next one of the same group.

    Where nobody has a group, it is the next one of all people.
    """
    groups: dict[str | None, list[Newcomer]] = {}
    for one in people:
        groups.setdefault(one.group, []).append(one)
    return [
        (one, members[(place + 1) % len(members)])
        for members in groups.values()
        if len(members) > 1
        for place, one in enumerate(members)
    ]


def _head(one: Newcomer, shared: LabelHead, count: int) -> LabelHead:
    features, labels = one.own
    return fit_label_head(features[:count], labels[:count], shared)


def _loss(head: LabelHead, one: Newcomer) -> float:
    return float(label_losses(head, *one.held_out).mean())


def _difference(values: NDArray[np.float64], groups: Sequence[str]) -> dict[str, Any]:
    """Return the mean with its intervals over people and over whole groups.

    Below zero is better.
    """
    found = bootstrap_mean(values, draws=DRAWS).as_dict()
    return {**found, "ci95_groups": _over_groups(values, groups)}


def _over_groups(values: NDArray[np.float64], groups: Sequence[str]) -> list[float] | None:
    """Compute the 95 % interval of the mean when groups are drawn anew. None for a single one."""
    names, places = np.unique(groups, return_inverse=True)
    if len(names) < 2:
        return None
    sums, sizes = np.bincount(places, values), np.bincount(places)
    drawn = np.random.default_rng(0).integers(len(names), size=(DRAWS, len(names)))
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return [float(low), float(high)]


def _beats_from(rows: Sequence[dict[str, Any]]) -> int | None:
    first = None
    for row in reversed(rows):
        both = (row["personal_minus_global"], row["personal_minus_other"])
        if not all(one["ci95"][1] < 0 for one in both):
            break
        first = row["labels"]
    return first
