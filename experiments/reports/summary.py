"""What people got, summarised: the content of `summary.json`, from losses per user.

All differences are paired: each user is compared with itself, and intervals come from a bootstrap
over users. A loss: lower is better; a gain or difference here: above zero is better.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ...common.errors import StateError
from ...common.settings.config import Config
from ...common.settings.sections import AbRunSettings
from ..evaluation.user_statistics import bootstrap_mean, fraction_hurt, gini, percentile, win_rate

__all__ = ["MEASURED", "build_summary"]

MEASURED = ("seconds", "peak_rss_bytes", "upload_bytes_per_client_round", "dimension", "versions")
NAMES = {
    "base": "base model",
    "global": "shared model",
    "group": "own cluster",
    "own_half": "own B with the shared A",
    "personal": "personal head",
    "swapped_head": "another person's head",
}


def build_summary(
    config: Config,
    facts: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    measured: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of `summary.json`.

    Args:
        config: the run's settings.
        facts: from `privacy_facts`.
        evaluation: the content of `evaluation.json`: losses per user, lower is better; empty
            where no evaluation was done.
        measured: `seconds`, `peak_rss_bytes`, `upload_bytes_per_client_round`, `dimension`,
            `versions`; what is missing becomes None.

    Raises:
        StateError: the evaluation's lists do not fit each other or hold something not finite.
    """
    known = {name: measured.get(name) for name in MEASURED}
    return {
        "schema": 1,
        "run": config.name,
        "private": facts["private"],
        "dataset": config.data.source,
        "base_model": config.model.base if config.ab_run is None else _arms(config.ab_run),
        "adapter": {"family": config.adapter.family, "dimension": known.pop("dimension")},
        "clients": config.data.clients,
        "rounds": len(facts["rounds"]),
        "rounds_planned": config.rounds.count,
        "cohort": config.rounds.cohort,
        **_evaluated(evaluation, config.evaluation.bootstrap),
        "privacy": facts["lines"],
        **known,
    }


def _evaluated(evaluation: Mapping[str, Any], draws: int) -> dict[str, Any]:
    if not evaluation:
        nothing = {"metrics": None, "seen": None, "unseen": None, "differences": None}
        return {**nothing, "gains": [], "comparisons": []}
    seen = _losses(evaluation, "seen")
    unseen = _losses(evaluation, "unseen")
    name = str(evaluation["name"])
    of = str(evaluation.get("metrics_of", "seen"))
    first = unseen if of == "unseen" else seen
    return {
        "metrics": {
            "name": name,
            "unit": str(evaluation.get("unit", name)),
            "of": f"{of} people",
            **{key: _mean(values, draws) for key, values in first.items()},
            **_personal_over_global(first),
        },
        "seen": {key: _mean(values, draws) for key, values in seen.items()},
        "unseen": {key: _mean(values, draws) for key, values in unseen.items()},
        "differences": _differences(seen, unseen, draws),
        "gains": _gains(evaluation, seen, unseen, draws),
        "comparisons": _comparisons(seen, unseen, draws) + list(evaluation.get("more", [])),
    }


def _losses(evaluation: Mapping[str, Any], group: str) -> dict[str, list[float]]:
    """The lists of one group, checked: all as long as `users`, all finite."""
    given: Mapping[str, Any] = evaluation.get(group) or {}
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
    return lists if users else {}


def _mean(values: Sequence[float], draws: int) -> dict[str, Any]:
    return bootstrap_mean(values, draws=draws).as_dict()


def _minus(left: Sequence[float], right: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(left, right, strict=True)]


def _pairs(
    seen: Mapping[str, list[float]], unseen: Mapping[str, list[float]]
) -> dict[str, list[float]]:
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
        _name(worse, better, group): _minus(losses[worse], losses[better])
        for worse, better, group, losses in wanted
        if worse in losses and better in losses
    }


def _name(worse: str, better: str, group: str) -> str:
    return f"{worse.removesuffix('_head')}_minus_{better}_{group}"


def _differences(
    seen: Mapping[str, list[float]], unseen: Mapping[str, list[float]], draws: int
) -> dict[str, Any]:
    return {name: _mean(values, draws) for name, values in _pairs(seen, unseen).items()}


def _personal_over_global(seen: Mapping[str, list[float]]) -> dict[str, Any]:
    if not {"personal", "global"} <= set(seen):
        return dict.fromkeys(
            ("win_rate_personal_over_global", "ties", "fraction_hurt", "p10_gain", "gini_personal")
        )
    gains = _minus(seen["global"], seen["personal"])
    return {
        "win_rate_personal_over_global": win_rate(gains),
        "ties": sum(gain == 0 for gain in gains) / len(gains),
        "fraction_hurt": fraction_hurt(gains),
        "p10_gain": percentile(gains, 10),
        "gini_personal": gini(seen["personal"]) if min(seen["personal"]) >= 0 else None,
    }


def _gains(
    evaluation: Mapping[str, Any],
    seen: Mapping[str, list[float]],
    unseen: Mapping[str, list[float]],
    draws: int,
) -> list[dict[str, Any]]:
    """Return the gain of each user, for the two bar pictures."""
    pairs = _pairs(seen, unseen)
    of = str(evaluation.get("metrics_of", "seen"))
    whom = "people who took part" if of == "seen" else "people never trained on"
    shown = (
        (f"global_minus_personal_{of}", f"Personal head over shared model, {whom}"),
        ("base_minus_global_unseen", "Shared model over base model, people never trained on"),
    )
    return [
        {
            "name": name,
            "title": title,
            "users": list(evaluation[name.rpartition("_")[2]]["users"]),
            "gains": pairs[name],
            **_mean(pairs[name], draws),
            "better": sum(gain > 0 for gain in pairs[name]),
            "equal": sum(gain == 0 for gain in pairs[name]),
            "hurt": sum(gain < 0 for gain in pairs[name]),
            "p10": percentile(pairs[name], 10),
        }
        for name, title in shown
        if name in pairs
    ]


def _comparisons(
    seen: Mapping[str, list[float]], unseen: Mapping[str, list[float]], draws: int
) -> list[dict[str, Any]]:
    return [
        {"name": name, "title": _spoken(name), **_mean(values, draws)}
        for name, values in _pairs(seen, unseen).items()
    ]


def _spoken(name: str) -> str:
    """Translate a name such as `swapped_minus_personal_seen` to what a reader calls it."""
    pair, _, group = name.rpartition("_")
    worse, better = pair.split("_minus_")
    names = {**NAMES, "swapped": NAMES["swapped_head"]}
    left, right = (names.get(key, key.replace("_", " ")) for key in (better, worse))
    return f"{left} over {right}, {group} people"


def _arms(ab_run: AbRunSettings) -> str:
    return f"A/B of {', '.join(ab_run.arms)}"
