"""The report of a run in the terminal, from the facts of `report.py`."""

from collections.abc import Iterable, Sequence
from typing import Literal

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from . import figures
from .claims import COLLUDING, NO_EVALUATION, headline, line_name, main_line
from .facts import Facts, Gain, LineFacts, PrivacyFacts, Statistics, Summary

__all__ = ["print_bullets", "print_table", "show"]

MOST_FIGURE = 24  # characters of a cell that is never folded


def show(facts: Facts, console: Console) -> None:
    """Print the report, compact, with the page's facts in the same order.

    Args:
        facts: from `report_facts`.
        console: where to; its width is kept to.
    """
    summary, privacy = facts["summary"], facts["privacy"]
    for text in privacy["problems"]:
        console.print(Panel(Text(text, style="bold white on red"), border_style="red"))
    print_bullets(privacy["warnings"], console, "!", "yellow")
    about = f"{summary['base_model']} on {summary['dataset']}"
    console.print(Text(f"{privacy['run']}: {about}", style="dim"))
    console.print(Text(headline(privacy), style="bold"))
    _heading("What was promised", console)
    print_bullets(privacy["promised"]["sentences"], console)
    _print_spent(privacy, console)
    _print_holds(privacy, console)
    for line in privacy["lines"]:
        if line["colluding"]:
            _heading("If devices collude with the server, or masking is broken", console)
            print_table(figures.colluding(line), console)
            console.print(Text(COLLUDING))
    _print_gained(summary, privacy["devices"] is not None, console)
    _print_statistics(facts["statistics"], console)
    if facts.get("looks"):
        from ...server.ab_estimates import lines

        _heading("What the looks say", console)
        for text in (text for look in facts["looks"] for text in lines(look)):
            console.print(Text(text))


def print_table(found: figures.Table, console: Console) -> None:
    """Print a table; where there is little room its words fold, and no figure does."""
    drawn = Table(box=None, pad_edge=False, collapse_padding=True, header_style="dim")
    for number, name in enumerate(found.head):
        longest = max((len(row[number]) for row in found.rows), default=0)
        fits = number > 0 and longest <= MOST_FIGURE
        side: Literal["left", "right"] = "right" if number else "left"
        drawn.add_column(name, justify=side, overflow="fold", min_width=longest if fits else None)
    for row in found.rows:
        drawn.add_row(*map(Text, row))
    console.print(drawn)
    console.print(Text(found.caption, style="dim"), end="\n" if found.caption else "")


def print_bullets(
    sentences: Iterable[str], console: Console, mark: str = "•", style: str = ""
) -> None:
    """Print sentences below each other, each behind a mark."""
    grid = Table.grid(padding=(0, 1))
    for sentence in sentences:
        grid.add_row(Text(mark, style), Text(sentence, style))
    if grid.rows:
        console.print(grid)


def _print_spent(privacy: PrivacyFacts, console: Console) -> None:
    devices = privacy["devices"]
    _heading(f"What was spent ({'at most' if devices else 'worst client'})", console)
    if privacy["lines"]:
        print_table(figures.spent(privacy), console)
        print_bullets(figures.conditions(privacy), console)
        (_print_devices if devices else _print_clients)(privacy, console)
    print_bullets(privacy["no_claim"], console)
    for reason, count in privacy["declined"].items():
        console.print(Text(f"declined {count} times: {reason}"))


def _print_devices(privacy: PrivacyFacts, console: Console) -> None:
    devices, line = privacy["devices"], main_line(privacy)
    if devices is None or line is None:
        return
    print_bullets(devices["sentences"], console)
    for row in privacy["histories"][:6]:
        times = "once" if row["participations"] == 1 else f"{row['participations']} times"
        many = f"{row['clients']:,} device{'' if row['clients'] == 1 else 's'} asked {times}"
        console.print(Text(f"  ε {row['epsilon'][line['key']]:6.2f} at most: {many}"))
    print_table(figures.rounds({**privacy, "lines": [line]}), console)


def _print_clients(privacy: PrivacyFacts, console: Console) -> None:
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
        f"{row['round']}: {row['epsilon'][line['key']]:.2f}" for row in privacy["rounds"][-8:]
    )
    console.print(Text(f"  ε after round  {curve}", style="dim"))


def _print_holds(privacy: PrivacyFacts, console: Console) -> None:
    _heading("Against whom it holds", console)
    for line in privacy["lines"]:
        console.print(Text(line_name(line), style=f"bold {_colour(line)}"))
        grid = Table.grid(padding=(0, 2))
        holds = "; ".join(line["holds_against"]) or "nobody is kept out"
        grid.add_row("  holds", Text(holds))
        grid.add_row("  does not", Text("; ".join(line["does_not_hold_against"])))
        grid.add_row(Text("  counts", "dim"), Text(line["noise_counted"], "dim"))
        console.print(grid)
    _heading("Not covered", console)
    print_bullets(privacy["not_covered"], console)


def _print_gained(summary: Summary, devices: bool, console: Console) -> None:
    _heading("What the people got for it", console)
    metrics = summary["metrics"]
    if metrics is None:
        nothing = "No evaluation was done; `privet evaluate RUN` does it."
        console.print(Text(NO_EVALUATION if devices else nothing))
        return
    for gain in summary["gains"]:
        console.print(_gain_bars(gain))
    print_table(figures.comparisons(summary), console)
    console.print(Text(figures.verdict(metrics)))


def _print_statistics(rows: Sequence[Statistics], console: Console) -> None:
    if not rows:
        return
    _heading("What the rounds' noised sums say", console)
    print_table(figures.statistics_by_round(rows), console)


def _gain_bars(gain: Gain) -> Text:
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
    return [values[round(index * (len(values) - 1) / (most - 1))] for index in range(most)]


def _bar(share: float, width: int) -> str:
    eighths = round(share * width * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _colour(line: LineFacts) -> str:
    return "blue" if line["unit"] == "client" else "magenta"


def _heading(text: str, console: Console) -> None:
    console.print(Text(f"\n{text}", style="bold underline"))
