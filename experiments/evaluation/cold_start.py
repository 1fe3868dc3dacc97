"""Cold start: what does a newcomer gain after 0, 1, 2, ... own records?

    global     the shared model
    personal   what the person's device makes of so many own records
    other      the head of somebody else with as many, of the same group on the same items where
               people come in groups (raters of one batch)

*Labels* (`privet coldstart RUN`): people never trained on, and the head fitted on the first n own
labels (`client/personal/label_head.py`). The head's constants are public and were set on training
raters; nothing is fitted to the people measured here but their own heads.

*Texts* (a stage of `privet evaluate SCENARIO`): the latest n own records. With no record the shared
model; up to three, texts in front; from four on the own records choose between texts in front, head
and both, and the shared model if nothing is sure to be better (`comparisons.choice`). There is no
other: the scenario has the controls.

The held-out records are the same at every number, so that a person is compared with itself, and
those of a run's evaluation, in its unit. The experimenter reads these figures off simulated
devices; no epsilon covers them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ...client.device import Device
from ...client.personal.label_evaluator import LabelEvaluator
from ...client.personal.label_head import LabelHead, fit_label_head, label_losses
from ...client.personal.person_losses import evaluator_of
from ...client.simulated import SimulatedContext
from ...client.training import records
from ...common.errors import ConfigError, DataError
from ...common.settings.config import Config
from .. import progress
from ..reports import pictures
from .people import unit_of
from .run_evaluation import global_adapter
from .user_statistics import Mean, bootstrap, bootstrap_mean, fraction_hurt, ratio

if TYPE_CHECKING:
    from ..comparison.study import Study

__all__ = [
    "COUNTS",
    "Curve",
    "LabelCurve",
    "Newcomer",
    "cold_start",
    "curve",
    "evaluate_user",
    "label_lines",
    "picture",
]

COUNTS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 20)
DRAWS = 2000

Line = dict[str, Any]


class GroupedMean(Mean):
    """A mean with its interval over whole groups of people too."""

    ci95_groups: list[float] | None


class Curve(TypedDict):
    """Losses by the number of own records.

    Attributes:
        people, groups: how many there are.
        rows: one a count: mean losses, `personal_minus_global` and, where there is another,
            `personal_minus_other` with 95 % intervals, by a bootstrap over people and
            (`ci95_groups`) over whole groups; the share of people hurt; what was `chosen`; and
            `step`, the loss against the count before, with its interval.
        monotone: no step's interval lies above zero.
        beats_from: the smallest count from which on, and at all larger ones, personal beats global
            and any other, intervals below zero.
    """

    people: int
    groups: int
    rows: list[Line]
    monotone: bool
    beats_from: int | None


class LabelCurve(Curve):
    """The curve of a run's people, the losses' unit, and how many people were left out."""

    run: str
    unit: str
    left_out: int


@dataclass(frozen=True, eq=False)
class Newcomer:
    """A person's material: features and labels, the own ones earliest first, and the held-out."""

    name: str
    group: str | None
    own: tuple[Tensor, Tensor] = field(repr=False)
    held_out: tuple[Tensor, Tensor] = field(repr=False)


def cold_start(folder: Path, config: Config, counts: Sequence[int] = COUNTS) -> LabelCurve:
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
            newcomer = _newcomer(user, bench, evaluator)
            if newcomer is not None:
                people.append(newcomer)
            one()
    lines = label_lines(people, evaluator.shared, counts)
    left_out = len(people) - len(lines)
    return {"run": config.name, "unit": unit_of(config), "left_out": left_out, **curve(lines)}


def _newcomer(user: str, bench: SimulatedContext, evaluator: LabelEvaluator) -> Newcomer | None:
    """Prepare a person's material. None for somebody without own or held-out records."""
    own, _ = records.split(bench.records(user), bench.config.data.holdout)
    mine, (_, rest) = bench.tokenised(own), Device(user, bench).measured_on()
    if not mine or not rest:
        return None
    group = bench.index.blocks[user].group
    return Newcomer(user, group, evaluator.features(mine), evaluator.features(rest))


def label_lines(
    people: Sequence[Newcomer], shared: LabelHead, counts: Sequence[int] = COUNTS
) -> list[Line]:
    """One line a person: the losses with each number of own labels.

    Args:
        people: those with fewer than the largest count own records are left out, and so is who
            has nobody else to be compared with: the same people at every count.
        shared: the head everybody starts from.
        counts: ascending, from 0.

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
    heads = {
        one.name: [fit_label_head(one.own[0][:n], one.own[1][:n], shared) for n in counts]
        for one in enough
    }
    return [
        {
            "user": one.name,
            "group": one.group or one.name,
            "counts": list(counts),
            "global": _loss(shared, one),
            "personal": [_loss(head, one) for head in heads[one.name]],
            "other": [_loss(head, one) for head in heads[other.name]],
            "chosen": ["global" if head.is_shared else "head" for head in heads[one.name]],
        }
        for one, other in pairs
    ]


def evaluate_user(study: "Study", user: str) -> Line | None:
    """One person's line of texts: bits per byte with each number of own records."""
    from ..comparison.comparisons import OwnSide, evaluate_text
    from ..comparison.tables import loss_per_user

    held_out, own = study.held_out(user), study.own(user)
    counts = [count for count in study.scenario.cold_start.counts if count <= len(own)]
    group = study.bench.index.blocks[user].group or user
    line: Line = {"group": group, "counts": counts, "personal": [], "chosen": []}
    for count in counts:
        side = OwnSide.of(study.evaluator, own[len(own) - count :])
        losses = evaluate_text(study.evaluator, side, None, held_out)
        if losses is None:
            return None
        (line["global"],) = loss_per_user([losses], study.evaluator.name("global"))
        line["personal"] += loss_per_user([losses], "personal")
        line["chosen"].append(losses["chosen"])
    return line if counts else None


def curve(lines: Sequence[Line], draws: int = DRAWS) -> Curve:
    """Losses by the number of own records.

    Args:
        lines: of people; with few records a line ends at a smaller count than others.
        draws: of the bootstrap.
    """
    rows = []
    for count in sorted({count for line in lines for count in line["counts"]}):
        have = [line for line in lines if count in line["counts"]]
        rows.append(_row(count, have, draws))
    return {
        "people": len(lines),
        "groups": len({line["group"] for line in lines}),
        "rows": rows,
        "monotone": not any(row["step"] and _rises(row["step"]) for row in rows),
        "beats_from": _beats_from(rows),
    }


def _row(count: int, lines: Sequence[Line], draws: int) -> Line:
    """Return the row of people who all have so many own records."""
    groups, index = [line["group"] for line in lines], lines[0]["counts"].index(count)
    losses = {"global": np.array([line["global"] for line in lines])}
    for name in ("personal", "other"):
        if name in lines[0]:
            losses[name] = np.array([line[name][index] for line in lines])
    own, chosen = losses["personal"], [line["chosen"][index] for line in lines]
    row: Line = {"records": count, "people": len(lines)}
    row |= {name: bootstrap_mean(loss, draws=draws).as_dict() for name, loss in losses.items()}
    for name in losses.keys() - {"personal"}:
        row[f"personal_minus_{name}"] = _difference(own - losses[name], groups, draws)
    step = None
    if index:
        before = np.array([line["personal"][index - 1] for line in lines])
        step = _difference(own - before, groups, draws)
    return row | {
        "hurt": fraction_hurt(losses["global"] - own, tolerance=1e-9),
        "chosen": {name: chosen.count(name) for name in sorted(set(chosen))},
        "step": step,
    }


def picture(curve: LabelCurve) -> str:
    """The curve as SVG: mean losses with 95 % bands over people."""
    drawn, (panel,) = pictures.figure(2.9)
    counts = [row["records"] for row in curve["rows"]]
    shown = (("global", "muted"), ("other", "hurt"), ("personal", "gain"))
    ends = []
    for name, colour in shown:
        means = [row[name]["mean"] for row in curve["rows"]]
        low, high = zip(*(row[name]["ci95"] for row in curve["rows"]), strict=True)
        ink = pictures.LIGHT[colour]
        panel.fill_between(counts, low, high, color=ink, alpha=0.18, linewidth=0)
        panel.plot(counts, means, "o-", markersize=3.5, linewidth=1.3, color=ink)
        ends.append((name, means[-1], ink))
    for name, height, ink in ends:
        panel.text(counts[-1] + 0.02 * counts[-1], height, name, fontsize=8.5, va="center",
                   color=ink)  # fmt: skip
    panel.set_xlim(-0.3, 1.22 * counts[-1])
    panel.set_xlabel("own labels", color=pictures.LIGHT["ink"])
    panel.set_ylabel(curve["unit"], color=pictures.LIGHT["ink"])
    alt = ", ".join(f"{name} {height:.2f}" for name, height, _ in ends)
    return pictures.alone(drawn, "cold-start", f"after {counts[-1]} own labels: {alt}")


def _paired(people: Sequence[Newcomer]) -> list[tuple[Newcomer, Newcomer]]:
    """Pair everybody with the next one of the same group.

    Where nobody has a group, it is the next one of all people.
    """
    groups: dict[str | None, list[Newcomer]] = {}
    for one in people:
        groups.setdefault(one.group, []).append(one)
    return [
        (one, members[(index + 1) % len(members)])
        for members in groups.values()
        if len(members) > 1
        for index, one in enumerate(members)
    ]


def _loss(head: LabelHead, one: Newcomer) -> float:
    return float(label_losses(head, *one.held_out).double().mean())


def _difference(values: NDArray[np.float64], groups: Sequence[str], draws: int) -> GroupedMean:
    """Return the mean with its intervals over people and over whole groups.

    Below zero is better.
    """
    _, indices = np.unique(groups, return_inverse=True)
    sums, sizes = (
        np.bincount(indices, each).astype(np.float64) for each in (values, np.ones_like(values))
    )
    over_groups = bootstrap(ratio, sums, sizes, draws=draws).as_dict()["ci95"]
    return {**bootstrap_mean(values, draws=draws).as_dict(), "ci95_groups": over_groups}


def _rises(step: Mean) -> bool:
    """Whether a difference is above zero beyond its interval."""
    return step["ci95"] is not None and step["ci95"][0] > 0


def _beats_from(rows: Sequence[Line]) -> int | None:
    first = None
    for row in reversed(rows):
        both = [one for name, one in row.items() if name.startswith("personal_minus")]
        if not all(one["ci95"] is not None and one["ci95"][1] < 0 for one in both):
            break
        first = row["records"]
    return first
