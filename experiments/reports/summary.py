"""What people got, summarised: the content of `summary.json`, from losses per user.

All differences are paired: each user is compared with itself, and intervals come from a bootstrap
over users. A loss: lower is better; a gain or difference here: above zero is better.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, cast

from ...common.errors import StateError
from ...common.settings.config import Config
from ..evaluation.user_statistics import (
    Mean,
    bootstrap_mean,
    fraction_hurt,
    gini,
    percentile,
    win_rate,
)
from .facts import (
    Evaluation,
    Gain,
    Measured,
    Metrics,
    NamedMean,
    PrivacyFacts,
    Summary,
)

__all__ = ["build_summary"]

Losses = Mapping[str, list[float]]
Group = Literal["seen", "unseen"]
NAMES = {
    "base": "base model",
    "global": "shared model",
    "group": "own cluster",
    "own_half": "own B with the shared A",
    "personal": "personal head",
    "swapped_head": "another person's head",
}


def build_summary(
    config: Config, facts: PrivacyFacts, evaluation: Evaluation, measured: Measured
) -> Summary:
    """The content of `summary.json`.

    Args:
        config, facts: the run's settings, and what `privacy_facts` says of it.
        evaluation: losses per user, lower is better; empty where no evaluation was done.
        measured: what is missing becomes None.

    Raises:
        StateError: the evaluation's lists do not fit each other or hold something not finite.
    """
    draws, ab_run = config.evaluation.bootstrap, config.ab_run
    seen, unseen = _losses(evaluation, "seen"), _losses(evaluation, "unseen")
    pairs = _pairs(seen, unseen)
    means = _means(pairs, draws)
    return {
        "schema": 1,
        "run": config.name,
        "private": facts["private"],
        "dataset": config.data.source,
        "base_model": config.model.base if ab_run is None else f"A/B of {', '.join(ab_run.arms)}",
        "adapter": {"family": config.adapter.family, "dimension": measured.get("dimension")},
        "clients": config.data.clients,
        "rounds": len(facts["rounds"]),
        "rounds_planned": config.rounds.count,
        "cohort": config.rounds.cohort,
        "metrics": _metrics(evaluation, seen, unseen, draws) if evaluation else None,
        "seen": _means(seen, draws) if evaluation else None,
        "unseen": _means(unseen, draws) if evaluation else None,
        "differences": means if evaluation else None,
        "gains": _gains(evaluation, pairs, means),
        "comparisons": [*map(_compared, means, means.values()), *evaluation.get("more", [])],
        "privacy": facts["lines"],
        "seconds": measured.get("seconds"),
        "peak_rss_bytes": measured.get("peak_rss_bytes"),
        "upload_bytes_per_client_round": measured.get("upload_bytes_per_client_round"),
        "compute": measured.get("compute"),
        "versions": measured.get("versions"),
    }


def _losses(evaluation: Evaluation, group: Group) -> Losses:
    """The lists of one group, checked: all as long as `users`, all finite."""
    given = evaluation.get(group) or {}
    users = given.get("users", [])
    lists = {key: values for key, values in given.items() if key != "users"}
    for key, values in lists.items():
        if len(values) != len(users):
            raise StateError(
                f"evaluation.json: {group}.{key} has {len(values)} values for {len(users)} users; "
                "`privet evaluate RUN` makes the file again"
            )
        for user, value in zip(users, values, strict=True):
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise StateError(
                    f"evaluation.json: {group}.{key} of user {user!r} is {value!r}; expected a "
                    "finite number. `privet evaluate RUN` makes the file again"
                )
    return cast("Losses", lists) if users else {}


def _metrics(evaluation: Evaluation, seen: Losses, unseen: Losses, draws: int) -> Metrics:
    of = _shown(evaluation)
    losses = unseen if of == "unseen" else seen
    name = str(evaluation["name"])
    unit = str(evaluation.get("unit", name))
    metrics = {"name": name, "unit": unit, "of": f"{of} people", **_means(losses, draws)}
    return cast("Metrics", metrics | _personal_over_global(losses))


def _shown(evaluation: Evaluation) -> Group:
    return evaluation.get("metrics_of", "seen")


def _means(losses: Losses, draws: int) -> dict[str, Mean]:
    return {name: bootstrap_mean(each, draws=draws).as_dict() for name, each in losses.items()}


def _pairs(seen: Losses, unseen: Losses) -> dict[str, list[float]]:
    """Return loss differences per user, as far as measured.

    They are positive where the second model is better.
    """
    wanted = [("base", "global", "unseen", unseen)]
    for mine in ("group", "own_half"):
        wanted += [("global", mine, "seen", seen), ("global", mine, "unseen", unseen)]
    wanted += [("global", "personal", "seen", seen), ("swapped_head", "personal", "seen", seen)]
    wanted += [("base", "global", "seen", seen)]
    wanted += [("global", "personal", "unseen", unseen)]
    controls = [key for key in {**seen, **unseen} if key not in NAMES]
    wanted += [(key, "personal", "seen", seen) for key in controls]
    wanted += [(key, "personal", "unseen", unseen) for key in ("swapped_head", *controls)]
    return {
        f"{worse.removesuffix('_head')}_minus_{better}_{group}": _minus(
            losses[worse], losses[better]
        )
        for worse, better, group, losses in wanted
        if worse in losses and better in losses
    }


def _minus(left: Sequence[float], right: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(left, right, strict=True)]


def _personal_over_global(losses: Losses) -> dict[str, float | None]:
    if not {"personal", "global"} <= set(losses):
        return dict.fromkeys(
            ("win_rate_personal_over_global", "ties", "fraction_hurt", "p10_gain", "gini_personal")
        )
    gains = _minus(losses["global"], losses["personal"])
    return {
        "win_rate_personal_over_global": win_rate(gains),
        "ties": sum(gain == 0 for gain in gains) / len(gains),
        "fraction_hurt": fraction_hurt(gains),
        "p10_gain": percentile(gains, 10),
        "gini_personal": gini(losses["personal"]) if min(losses["personal"]) >= 0 else None,
    }


def _gains(evaluation: Evaluation, pairs: Losses, means: Mapping[str, Mean]) -> list[Gain]:
    """Return the gain of each user, for the two bar pictures."""
    of = _shown(evaluation)
    whom = "people who took part" if of == "seen" else "people never trained on"
    shown: tuple[tuple[str, Group, str], ...] = (
        (f"global_minus_personal_{of}", of, f"Personal head over shared model, {whom}"),
        (
            "base_minus_global_unseen",
            "unseen",
            "Shared model over base model, people never trained on",
        ),
    )
    return [
        {
            "name": name,
            "title": title,
            "users": cast("list[str]", evaluation[group]["users"]),
            "gains": pairs[name],
            **means[name],
            "better": sum(gain > 0 for gain in pairs[name]),
            "equal": sum(gain == 0 for gain in pairs[name]),
            "hurt": sum(gain < 0 for gain in pairs[name]),
            "p10": percentile(pairs[name], 10),
        }
        for name, group, title in shown
        if name in pairs
    ]


def _compared(name: str, mean: Mean) -> NamedMean:
    """Translate a name such as `swapped_minus_personal_seen` to what a reader calls it."""
    pair, _, group = name.rpartition("_")
    worse, better = pair.split("_minus_")
    names = {**NAMES, "swapped": NAMES["swapped_head"]}
    left, right = (names.get(key, key.replace("_", " ")) for key in (better, worse))
    return {"name": name, "title": f"{left} over {right}, {group} people", **mean}
