"""A comparison as one HTML page with pictures, and as tables in the terminal, findings first."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..reports import pictures
from ..reports.figures import interval_text
from ..reports.html_page import _beside, _list, _section, _table
from ..reports.style import style

__all__ = ["page", "show"]

Facts = Mapping[str, Any]
TextTable = tuple[str, list[str], list[list[str]]]

NOTE = (
    "Read by the experimenter off simulated devices: nothing of it passed a server, and no epsilon "
    "covers it."
)


def show(found: Facts, console: Console) -> None:
    """Show the content of `summary.json` in the terminal."""
    console.print(Text(f"{found['title']}: {_about(found)}", style="bold"))
    for text in _findings(found):
        console.print(Text(f"! {text}", style="yellow"))
    for title, head, rows in _tables(found):
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for number, name in enumerate(head):
            table.add_column(name, justify="left" if number == 0 else "right", overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)
    console.print(Text(NOTE, style="dim"))


def page(found: Facts) -> str:
    """Write the whole HTML page of a comparison.

    Raises:
        ConfigError: Matplotlib, which draws the pictures, is not installed.
    """
    unit = found["unit"]
    bars = [(m["name"], m["gain"]["mean"], m["gain"]["ci95"]) for m in _shown(found)]
    drawn = pictures.differences(bars, unit)
    alt = "Gain over the shared model with 95 % intervals: " + "; ".join(
        f"{name} {mean:+.3f}" for name, mean, _ in bars
    )
    pictured = {"What each model gains": pictures.svg(drawn, "gains", alt)}
    rows = [(one["title"], one["mean"], one["ci95"]) for one in found["comparisons"]]
    alt = "Differences: " + "; ".join(f"{title} {mean:+.3f}" for title, mean, _ in rows)
    drawing = pictures.differences(rows, unit)
    pictured["Better than each alone, and lost with another person's"] = pictures.svg(
        drawing, "pairs", alt
    )
    curves = (
        ("Over time", "over_time", "decile", found["over_time"]),
        ("Cold start", "cold_start", "records", _gains(found)),
    )
    for title, key, place, lines in curves:
        if lines:
            points = [(one[place], one["mean"], _spread(one["ci95"])) for one in lines]
            picture = pictures.over_rounds([(f"gain, {unit}", "personal", points)], place)
            alt = f"{title}: " + "; ".join(f"{n}: {mean:+.3f}" for n, mean, _ in points)
            pictured[title] = pictures.svg(picture, key, alt)
    body = [
        f'<header><p class="kicker">privet evaluate · {escape(found["scenario"])}</p>'
        f"<h1>{escape(found['title'])}</h1><p class='lead'>{escape(_about(found))}</p></header>",
        _section("Findings", _list(_findings(found), "not") or "<p>None above its threshold.</p>"),
    ]
    for title, head, cells in _tables(found):
        table = _table(head, cells, "")
        inner = _beside(pictured[title], table) if title in pictured else table
        body.append(_section(title, inner))
    body.append(f"<p>{escape(NOTE)}</p>")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape('privet evaluate: ' + found['title'])}</title>\n"
        f"<style>\n{style()}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def _about(found: Facts) -> str:
    return (
        f"{found['people']} people, {found['records']} held-out later records, {found['dataset']}, "
        f"{found['base_model']}{'' if found['trained'] else ', no shared adapter'}"
    )


def _findings(found: Facts) -> list[str]:
    return [f"{one['touched']:.0%} of people: {one['text']}" for one in found["harm"]["findings"]]


def _shown(found: Facts) -> list[Facts]:
    return [one for one in found["models"] if one["model"] != found["shared"]]


def _tables(found: Facts) -> list[TextTable]:
    """(title, head, rows), the same for the page and the terminal."""
    unit = found["unit"]
    over_time = [
        [str(one["decile"]), str(one["people"]), *_mean(one)] for one in found["over_time"]
    ]
    return [
        ("What each model gains",
         ["model", unit, "gain", "95 %", "wins", "hurt", "p10", "Gini"], _models(found)),
        ("Better than each alone, and lost with another person's",
         ["difference", unit, "95 %", "gain kept"], _pairs(found)),
        *_metrics(found),
        ("Over time", ["tenth of the held-out time", "people", "gain", "95 %"], over_time),
        ("Segments", ["segment", "people", "without", "with", "gain", "hurt"], _segments(found)),
        *_further(found),
    ]  # fmt: skip


def _models(found: Facts) -> list[list[str]]:
    return [
        [
            one["name"], f"{one['loss']['mean']:.4f}", f"{one['gain']['mean']:+.4f}",
            interval_text(one["gain"]["ci95"], "+.4f"), f"{one['win_rate']:.0%}",
            f"{one['hurt']:.0%}", f"{one['deciles'][1]:+.3f}", _number(one["gini_of_losses"]),
        ]
        for one in found["models"]
    ]  # fmt: skip


def _pairs(found: Facts) -> list[list[str]]:
    return [
        [
            one["title"], f"{one['mean']:+.4f}", interval_text(one["ci95"], "+.4f"),
            "" if one["gain_kept"] is None else f"{one['gain_kept']:.0%}",
        ]
        for one in found["comparisons"]
    ]  # fmt: skip


def _segments(found: Facts) -> list[list[str]]:
    return [
        [
            f"{one['kind']}: {one['segment']}", str(one["people"]),
            f"{one['without']['mean']:.3f}", f"{one['with']['mean']:.3f}",
            f"{one['gain']['mean']:+.3f}", f"{one['hurt']:.0%}",
        ]
        for one in found["harm"]["segments"]
    ]  # fmt: skip


def _metrics(found: Facts) -> list[TextTable]:
    """Make the table of label metrics: accuracy and F1, or MAE and RMSE."""
    having = [one for one in found["models"] if "metrics" in one]
    if not having:
        return []
    names = list(having[0]["metrics"])
    rows = [[one["name"], *(f"{one['metrics'][name]:.4f}" for name in names)] for one in having]
    return [("Metrics of labels", ["model", *names], rows)]


def _further(found: Facts) -> list[TextTable]:
    tables = []
    if found.get("cold_start"):
        rows = [
            [str(one["records"]), str(one["people"]), *_mean(one), f"{one['hurt']:.0%}",
             ", ".join(f"{name} {number}" for name, number in one["chosen"].items())]
            for one in _gains(found)
        ]  # fmt: skip
        head = ["own records", "people", "gain", "95 %", "hurt", "chosen"]
        tables.append(("Cold start", head, rows))
    if found.get("answers"):
        means = found["answers"]["means"].items()
        rows = [[name.replace("_", " "), *_mean(mean)] for name, mean in means]
        tables.append(("Answers", ["measure", "mean", "95 %"], rows))
    if found.get("memory", {}).get("exposure"):
        bits = found["memory"]["exposure"].items()
        rows = [[name, *_mean(mean)] for name, mean in bits]
        most = found["memory"]["most"]
        tables.append(("Rare own strings", ["model", f"bits of {most:g}", "95 %"], rows))
    return tables


def _gains(found: Facts) -> list[dict[str, Any]]:
    """Return the rows of the cold start with the gain over the shared model as their mean."""
    gains = []
    for row in found.get("cold_start", {}).get("rows", []):
        more = row["personal_minus_global"]
        interval = more["ci95"] and [-bound for bound in reversed(more["ci95"])]
        gains.append({**row, "mean": -more["mean"], "ci95": interval})
    return gains


def _mean(one: Facts) -> list[str]:
    return [f"{one['mean']:+.4f}", interval_text(one["ci95"], "+.4f")]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _spread(interval: Sequence[float] | None) -> float:
    """Return an interval's standard deviation as `over_rounds` draws it: a quarter of its width."""
    return 0.0 if interval is None else (interval[1] - interval[0]) / 4
