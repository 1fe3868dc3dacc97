"""The report of a run: the facts, the summary, and the terminal's picture of both.

`report_facts` reads a run folder; `experiments/reports/html_page.py` draws the page from the same
facts, and `--json` prints them, so that the three cannot differ. The privacy part is computed from
the ledgers each time; `summary.json` only gives what was measured while the run was going on.
"""

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ...common.errors import StateError
from ...common.files import keep_aside, read_lines, write_atomic, write_json_atomic
from ...common.settings.config import DEVICES, read
from ...server.run_folder import starting
from .. import progress
from .claims import COLLUDING, NO_EVALUATION, headline, line_name, main_line
from .device_run_facts import device_facts, device_measured
from .privacy_facts import privacy_facts
from .summary import MEASURED, build_summary

__all__ = [
    "COUNTS",
    "budget_text",
    "build_summary",
    "colluding_rows",
    "counts",
    "differences",
    "interval_text",
    "report_facts",
    "show",
    "statistics_series",
    "verdict",
    "write",
    "written",
]


COUNTS = ("round", "asked", "came", "declined", "did not fit", "")
"""What `counts` gives of a round."""


def report_facts(run_folder: Path, measured: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What `privet report --json` prints: `{"summary": ..., "privacy": ..., "statistics": [...]}`.

    A run without an evaluation has `summary["metrics"]` = None; `statistics` has what the noised
    sums of each round said, and is empty where rounds have none.

    Args:
        run_folder: the run, finished or under way.
        measured: as for `build_summary`; None: what the run's `summary.json` says.

    Raises:
        StateError: a file is missing or cannot be read; says which command makes it.
        LedgerCorrupt: a ledger does not verify.
    """
    if _of_devices(run_folder):
        privacy, known = device_facts(run_folder), device_measured(run_folder)
    else:
        privacy = privacy_facts(run_folder)
        known = _measured(run_folder)
    config = read(run_folder / "config.toml")
    start = starting.facts(run_folder)
    if start is not None:
        said = starting.said(start, config.data.source == DEVICES)
        privacy = {**privacy, "start": start, "not_covered": [said, *privacy["not_covered"]]}
    evaluation = _json(run_folder / "evaluation.json")
    records = read_lines(run_folder / "rounds.jsonl")
    opened = {one["round"] for one in records if not one.get("void")}
    void = {one["round"] for one in records} - opened
    return {
        "summary": {
            **build_summary(config, privacy, evaluation, known if measured is None else measured),
            "rounds": sum(row["round"] not in void for row in privacy["rounds"]),
            **({} if start is None else {"start": start}),
        },
        "privacy": privacy,
        "statistics": _statistics(run_folder),
        **_looks(run_folder),
    }


def _looks(run_folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What each look of an A/B experiment on devices said; nothing of another run."""
    found = [one["look"] for one in read_lines(run_folder / "rounds.jsonl") if "look" in one]
    return {"looks": found} if found else {}


def _of_devices(run_folder: Path) -> bool:
    """Whether people were real devices, whose ledgers are not here."""
    settings = run_folder / "config.toml"
    return settings.is_file() and read(settings).data.source == DEVICES


def _statistics(run_folder: Path) -> list[dict[str, Any]]:
    return [
        {"round": record["round"], **record["statistics"]}
        for record in read_lines(run_folder / "rounds.jsonl")
        if record.get("statistics")
    ]


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
    from .html_page import page

    facts = report_facts(run_folder, measured)
    drawn = page(facts)
    write_json_atomic(run_folder / "privacy.json", facts["privacy"])
    write_atomic(run_folder / "report.html", drawn.encode())
    write_json_atomic(run_folder / "summary.json", facts["summary"])
    return facts


def written(run_folder: Path) -> dict[str, Any]:
    """The facts that `write` has written, without computing them again.

    Raises:
        StateError: a file is missing or cannot be read.
    """
    found = {name: _json(run_folder / f"{name}.json") for name in ("summary", "privacy")}
    if not all(found.values()):
        raise StateError(f"{run_folder} has no report yet; `privet report RUN --html` writes one")
    return {**found, "statistics": _statistics(run_folder)}


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
    path = run_folder / "summary.json"
    try:
        summary = _json(path)
    except StateError as error:
        summary = {}
        progress.warn(f"{error}; kept aside as {keep_aside(path).name}, the run's times are lost")
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
    _print_colluding(privacy, console)
    _print_gained(summary, privacy["devices"] is not None, console)
    _print_statistics(facts["statistics"], console)
    if facts.get("looks"):
        from ...server.ab_estimates import lines

        _heading("What the looks say", console)
        for line in (line for look in facts["looks"] for line in lines(look)):
            console.print(Text(line))


def _print_promises(privacy: Mapping[str, Any], console: Console) -> None:
    _heading("What was promised", console)
    _bullets(privacy["promised"]["sentences"], console)


def _print_spent(privacy: Mapping[str, Any], console: Console) -> None:
    devices = privacy["devices"]
    _heading(f"What was spent ({'at most' if devices else 'worst client'})", console)
    table = _table("line", "ε", "δ", "adjacency", "noise at", "releases", "budget", "second ε")
    for line in privacy["lines"]:
        table.add_row(
            Text(line_name(line), style=_colour(line)),
            f"{line['epsilon']:.2f}",
            f"{line['delta']:g}",
            line["adjacency"],
            line["noise_at"],
            f"{line['participations_max']}",
            budget_text(line),
            _second(line["cross_check"]),
        )
    if privacy["lines"]:
        console.print(table)
        (_print_devices if devices else _print_clients)(privacy, console)
    _bullets(privacy["no_claim"], console)
    for reason, count in privacy["declined"].items():
        console.print(Text(f"declined {count} times: {reason}"))


def _print_devices(privacy: Mapping[str, Any], console: Console) -> None:
    _bullets(privacy["devices"]["sentences"], console)
    line = main_line(privacy)
    if line is None:
        return
    for row in privacy["histories"][:6]:
        times = "once" if row["participations"] == 1 else f"{row['participations']} times"
        devices = f"{row['clients']:,} device{'' if row['clients'] == 1 else 's'} asked {times}"
        console.print(Text(f"  ε {row['epsilon'][line['key']]:6.2f} at most: {devices}"))
    table = _table(*COUNTS, f"ε so far, {line_name(line)}")
    for row in _last(privacy["rounds"], 12):
        table.add_row(*counts(row), f"{row['epsilon'][line['key']]:.2f}")
    console.print(table)


def counts(row: Mapping[str, Any]) -> list[str]:
    """A round of real devices under `COUNTS`: who was asked, who came, who declined."""
    if row["asked"] is None:
        return [str(row["round"]), "–", "–", "–", "–", "not ended"]
    numbers = [str(row[name]) for name in ("round", "asked", "answered", "declined", "refused")]
    return [*numbers, "void" if row["void"] else "summed"]


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
        console.print(
            Text("  holds: " + ("; ".join(line["holds_against"]) or "nobody is kept out"))
        )
        console.print(Text("  does not: " + "; ".join(line["does_not_hold_against"])))
        console.print(Text(f"  counts {line['noise_counted']}", style="dim"))
    _heading("Not covered", console)
    _bullets(privacy["not_covered"], console)


def _print_colluding(privacy: Mapping[str, Any], console: Console) -> None:
    for line in privacy["lines"]:
        found = line.get("colluding")
        if not found:
            continue
        _heading("If devices collude with the server, or masking is broken", console)
        console.print(Text(line_name(line)))
        table = _table("colluding devices", "ε, client-level", "")
        for row in colluding_rows(found):
            table.add_row(*row)
        console.print(table)
        console.print(Text(COLLUDING))


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
    """What a line may spend; what is left if masking is broken is limited by nothing."""
    return "none" if line["budget"] is None else f"{line['budget']:g}"


def _print_gained(summary: Mapping[str, Any], devices: bool, console: Console) -> None:
    _heading("What the people got for it", console)
    metrics = summary["metrics"]
    if metrics is None:
        nothing = "No evaluation was done; `privet evaluate RUN` does it."
        console.print(Text(NO_EVALUATION if devices else nothing))
        return
    for gain in summary["gains"]:
        console.print(_gain_bars(gain))
    table = _table("difference", f"mean, {metrics['name']}", "95 % interval")
    for row in summary["comparisons"]:
        table.add_row(row["title"], f"{row['mean']:+.4f}", interval_text(row["ci95"]))
    console.print(table)
    console.print(Text(verdict(metrics)))


def _print_statistics(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    if not rows:
        return
    _heading("What the rounds' noised sums say", console)
    series = statistics_series(rows)
    table = _table("round", *(f"{name}, {panel}" for panel, name, _ in series))
    for row in _last(rows, 6):
        cells = []
        for _, _, points in series:
            found = [(mean, std) for number, mean, std in points if number == row["round"]]
            cells.append("–" if not found else f"{found[0][0]:.3g} ± {found[0][1]:.2g}")
        table.add_row(str(row["round"]), *cells)
    console.print(table)
    for text in differences(rows[-1]):
        console.print(Text(text))


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
            found.append((panel, name, _points(rows, rows, key)))
    for place, arm in enumerate(rows[0].get("arms", ()) if rows else ()):
        found.append(("loss by arm", arm["arm"],
                      _points(rows, [row["arms"][place] for row in rows], "loss")))  # fmt: skip
    return found


def _points(rows: Sequence[Any], values: Sequence[Any], key: str) -> Points:
    return [
        (row["round"], value[key], value[f"{key}_std"])
        for row, value in zip(rows, values, strict=True)
        if value.get(key) is not None
    ]


def differences(row: Mapping[str, Any]) -> list[str]:
    """A sentence for each arm that a round compares with the first."""
    arms = row.get("arms", ())
    said = []
    for arm in arms[1:]:
        what = f"Round {row['round']}, loss of the arm {arm['arm']} less that of {arms[0]['arm']}: "
        known = "lost in the noise"
        if arm["ci95"] is not None:
            known = f"{arm['difference']:+.3g}, 95 % interval {interval_text(arm['ci95'], '+.3g')}"
        said.append(f"{what}{known}")
    return said


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
