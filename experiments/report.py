"""The report of a run: the facts, the summary, and the terminal's picture of both.

`report_facts` reads a run folder; `experiments/html.py` draws the page from the same facts, and
`--json` prints them, so that the three cannot differ. The privacy part is computed from the ledgers
each time; `summary.json` only gives what was measured while the run was going on.
"""

import json
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..common.config import Config, read
from ..common.errors import StateError
from ..common.files import write_atomic, write_json_atomic
from .privacy import headline, line_name, main_line, privacy_facts
from .statistics import bootstrap_mean

__all__ = ["build_summary", "report_facts", "show", "write"]

MEASURED = ("seconds", "peak_rss_bytes", "upload_bytes_per_client_round", "dimension", "versions")
NAMES = {
    "base": "base model",
    "global": "shared model",
    "personal": "personal head",
    "swapped_head": "another person's head",
}


def report_facts(run_folder: Path, measured: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What `privet report --json` prints: `{"summary": ..., "privacy": ...}`.

    A run without an evaluation has `summary["metrics"]` = None.

    Args:
        run_folder: the run, finished or under way.
        measured: as for `build_summary`; None: what the run's `summary.json` says.

    Raises:
        StateError: a file is missing or cannot be read; says which command makes it.
        LedgerCorrupt: a ledger does not verify.
    """
    privacy = privacy_facts(run_folder)
    config = read(run_folder / "config.toml")
    evaluation = _json(run_folder / "evaluation.json")
    known = _measured(run_folder) if measured is None else measured
    return {
        "summary": build_summary(config, privacy, evaluation, known),
        "privacy": privacy,
    }


def write(run_folder: Path, measured: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Writes `privacy.json`, `report.html` and `summary.json`, each whole or not at all.

    Args:
        run_folder: the run.
        measured: as for `build_summary`; None: what the run's `summary.json` says.

    Returns:
        The facts that were written.

    Raises:
        StateError, LedgerCorrupt: as for `report_facts`; nothing was written.
        ConfigError: Matplotlib is not installed.
    """
    from .html import page

    facts = report_facts(run_folder, measured)
    drawn = page(facts)
    write_json_atomic(run_folder / "privacy.json", facts["privacy"])
    write_atomic(run_folder / "report.html", drawn.encode())
    write_json_atomic(run_folder / "summary.json", facts["summary"])
    return facts


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
        "base_model": config.model.base,
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
        nothing = {"metrics": None, "unseen": None, "differences": None}
        return {**nothing, "gains": [], "comparisons": []}
    seen = _losses(evaluation, "seen")
    unseen = _losses(evaluation, "unseen")
    name = str(evaluation["name"])
    return {
        "metrics": {
            "name": name,
            "unit": str(evaluation.get("unit", name)),
            **{key: _mean(values, draws) for key, values in seen.items()},
            **_personal_over_global(seen),
        },
        "unseen": {key: _mean(values, draws) for key, values in unseen.items()},
        "differences": _differences(seen, unseen, draws),
        "gains": _gains(evaluation, seen, unseen, draws),
        "comparisons": _comparisons(seen, unseen, draws),
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
    mean, low, high = bootstrap_mean(values, draws=draws)
    return {"mean": mean, "ci95": [low, high]}


def _minus(left: Sequence[float], right: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(left, right, strict=True)]


def _pairs(
    seen: Mapping[str, list[float]], unseen: Mapping[str, list[float]]
) -> dict[str, list[float]]:
    """Loss differences per user, positive where the second is better, as far as measured."""
    wanted = [("base", "global", "unseen", unseen)]
    wanted += [("global", "personal", "seen", seen), ("swapped_head", "personal", "seen", seen)]
    wanted += [("base", "global", "seen", seen)]
    wanted += [("global", "personal", "unseen", unseen)]
    controls = [key for key in seen | unseen if key not in NAMES]
    wanted += [(key, "personal", "seen", seen) for key in controls]
    wanted += [(key, "personal", "unseen", unseen) for key in ("swapped_head", *controls)]
    return {
        f"{worse.removesuffix('_head')}_minus_{better}_{group}": _minus(losses[worse], losses[better])
        for worse, better, group, losses in wanted
        if worse in losses and better in losses
    }


def _differences(
    seen: Mapping[str, list[float]], unseen: Mapping[str, list[float]], draws: int
) -> dict[str, Any]:
    return {name: _mean(values, draws) for name, values in _pairs(seen, unseen).items()}


def _personal_over_global(seen: Mapping[str, list[float]]) -> dict[str, Any]:
    if not {"personal", "global"} <= set(seen):
        return dict.fromkeys(("win_rate_personal_over_global", "ties", "fraction_hurt", "p10_gain"))
    gains = _minus(seen["global"], seen["personal"])
    return {
        "win_rate_personal_over_global": sum(gain > 0 for gain in gains) / len(gains),
        "ties": sum(gain == 0 for gain in gains) / len(gains),
        "fraction_hurt": sum(gain < 0 for gain in gains) / len(gains),
        "p10_gain": _tenth(gains),
    }


def _tenth(values: Sequence[float]) -> float:
    """The 10th percentile, linear between neighbours."""
    ordered = sorted(values)
    place = 0.1 * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def _gains(
    evaluation: Mapping[str, Any],
    seen: Mapping[str, list[float]],
    unseen: Mapping[str, list[float]],
    draws: int,
) -> list[dict[str, Any]]:
    """Gain of each user, for the two bar pictures."""
    pairs = _pairs(seen, unseen)
    shown = (
        ("global_minus_personal_seen", "seen", "Personal head over shared model, people who took part"),
        ("base_minus_global_unseen", "unseen", "Shared model over base model, people never trained on"),
    )  # fmt: skip
    return [
        {
            "name": name,
            "title": title,
            "users": list(evaluation[group]["users"]),
            "gains": pairs[name],
            **_mean(pairs[name], draws),
            "better": sum(gain > 0 for gain in pairs[name]),
            "equal": sum(gain == 0 for gain in pairs[name]),
            "hurt": sum(gain < 0 for gain in pairs[name]),
            "p10": _tenth(pairs[name]),
        }
        for name, group, title in shown
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
    """`swapped_minus_personal_seen` -> what a reader calls it."""
    pair, _, group = name.rpartition("_")
    worse, better = pair.split("_minus_")
    names = {**NAMES, "swapped": NAMES["swapped_head"]}
    left, right = (names.get(key, key.replace("_", " ")) for key in (better, worse))
    return f"{left} over {right}, {group} people"


def _json(path: Path) -> dict[str, Any]:
    """A JSON object, or {} where there is no file."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise StateError(
            f"{path} cannot be read as JSON ({error}); `privet evaluate RUN` makes it again"
        ) from None
    if not isinstance(found, dict):
        raise StateError(f"{path} holds no JSON object; `privet evaluate RUN` makes it again")
    return found


def _measured(run_folder: Path) -> dict[str, Any]:
    """What only the run itself could measure, from its `summary.json`."""
    summary = _json(run_folder / "summary.json")
    adapter = summary.get("adapter") or {}
    known = {name: summary.get(name) for name in MEASURED}
    versions = known["versions"] or {"python": platform.python_version()}
    return {**known, "versions": versions, "dimension": adapter.get("dimension")}


def show(facts: Mapping[str, Any], console: Console) -> None:
    """Prints the report, compact; the same facts as the page, in the same order.

    Args:
        facts: from `report_facts`.
        console: where to; its width is kept to.
    """
    summary, privacy = facts["summary"], facts["privacy"]
    for text in privacy["problems"]:
        console.print(Panel(Text(text, style="bold white on red"), border_style="red"))
    for text in privacy["warnings"]:
        console.print(Text(f"! {text}", style="yellow"))
    about = f"{summary['base_model']} on {summary['dataset']}"
    console.print(Text(f"{privacy['run']}: {about}", style="dim"))
    console.print(Text(headline(privacy), style="bold"))
    _print_promises(privacy, console)
    _print_spent(privacy, console)
    _print_holds(privacy, console)
    _print_gained(summary, console)


def _print_promises(privacy: Mapping[str, Any], console: Console) -> None:
    _heading("What was promised", console)
    _bullets(privacy["promised"]["sentences"], console)


def _print_spent(privacy: Mapping[str, Any], console: Console) -> None:
    _heading("What was spent (worst client)", console)
    table = _table("line", "ε", "δ", "adjacency", "noise at", "releases", "budget", "second ε")
    budgets = privacy["promised"]["budgets"]
    for line in privacy["lines"]:
        table.add_row(
            Text(line_name(line), style=_colour(line)),
            f"{line['epsilon']:.2f}",
            f"{line['delta']:g}",
            line["adjacency"],
            line["noise_at"],
            f"{line['participations_max']}",
            f"{budgets[line['unit']]:g}" if line["unit"] in budgets else "none",
            _second(line["cross_check"]),
        )
    if privacy["lines"]:
        console.print(table)
        _print_clients(privacy, console)
    _bullets(privacy["no_claim"], console)
    for reason, count in privacy["declined"].items():
        console.print(Text(f"declined {count} times: {reason}"))


def _print_clients(privacy: Mapping[str, Any], console: Console) -> None:
    line = main_line(privacy)
    if line is None:
        return
    most = max(row["clients"] for row in privacy["histories"])
    for row in privacy["histories"][:6]:
        value, clients = row["epsilon"][line["key"]], row["clients"]
        text = Text(f"  ε {value:6.2f} ")
        text.append(_bar(clients / most, 24), style=_colour(line))
        text.append(f" {clients:,} clients, {row['participations']} releases each")
        console.print(text)
    curve = "  ".join(
        f"{row['round']}: {row['epsilon'][line['key']]:.2f}" for row in _last(privacy["rounds"], 8)
    )
    console.print(Text(f"  ε after round  {curve}", style="dim"))


def _print_holds(privacy: Mapping[str, Any], console: Console) -> None:
    _heading("Against whom it holds", console)
    for line in privacy["lines"]:
        console.print(Text(line_name(line), style=f"bold {_colour(line)}"))
        console.print(Text("  holds: " + "; ".join(line["holds_against"])))
        console.print(Text("  does not: " + "; ".join(line["does_not_hold_against"])))
        console.print(Text(f"  counts {line['noise_counted']}", style="dim"))
    _heading("Not covered", console)
    _bullets(privacy["not_covered"], console)


def _print_gained(summary: Mapping[str, Any], console: Console) -> None:
    _heading("What the people got for it", console)
    metrics = summary["metrics"]
    if metrics is None:
        console.print(Text("No evaluation was done; `privet evaluate RUN` does it."))
        return
    for gain in summary["gains"]:
        console.print(_gain_bars(gain))
    table = _table("difference", f"mean, {metrics['unit']}", "95 % interval")
    for row in summary["comparisons"]:
        low, high = row["ci95"]
        table.add_row(row["title"], f"{row['mean']:+.4f}", f"[{low:+.4f}, {high:+.4f}]")
    console.print(table)
    console.print(
        Text(
            f"Personal better than shared for {metrics['win_rate_personal_over_global']:.0%}, equal "
            f"for {metrics['ties']:.0%}, hurt {metrics['fraction_hurt']:.0%}; 10th percentile of "
            f"the gain {metrics['p10_gain']:+.4f}"
        )
    )


def _gain_bars(gain: Mapping[str, Any]) -> Text:
    """People sorted by gain as one line of bars, the hurt ones in their own colour."""
    ordered = sorted(gain["gains"], reverse=True)
    most = max(max(map(abs, ordered)), 1e-12)
    steps = " ▁▂▃▄▅▆▇█"
    text = Text(f"{gain['title']}: {gain['better']} better, {gain['hurt']} hurt\n  ")
    for value in _spread(ordered, 64):
        mark = steps[max(1, round(8 * abs(value) / most))]
        text.append(mark, style="dark_orange" if value < 0 else "green")
    return text


def _spread(values: Sequence[float], most: int) -> list[float]:
    if len(values) <= most:
        return list(values)
    return [values[round(place * (len(values) - 1) / (most - 1))] for place in range(most)]


def _second(check: Mapping[str, Any]) -> str:
    if check["epsilon"] is None:
        return "none"
    return f"{check['epsilon']:.2f}" + ("" if check["agrees"] else " !!")


def _last(rows: Sequence[Any], most: int) -> Sequence[Any]:
    return rows[-most:]


def _bar(share: float, width: int) -> str:
    eighths = round(share * width * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _colour(line: Mapping[str, Any]) -> str:
    return "blue" if line["unit"] == "client" else "magenta"


def _heading(text: str, console: Console) -> None:
    console.print(Text(f"\n{text}", style="bold underline"))


def _bullets(sentences: Sequence[str], console: Console) -> None:
    for sentence in sentences:
        console.print(Text(f"• {sentence}"))


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    return table
