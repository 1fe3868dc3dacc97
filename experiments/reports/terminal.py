"""The report of a run in the terminal, from the facts of `report.py`."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from .claims import COLLUDING, NO_EVALUATION, headline, line_name, main_line
from .figures import (
    COUNTS,
    budget_text,
    colluding_rows,
    counts,
    interval_text,
    statistics_series,
    verdict,
)

__all__ = ["show"]


def show(facts: Mapping[str, Any], console: Console) -> None:
    """Print the report, compact, with the page's facts in the same order.

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
