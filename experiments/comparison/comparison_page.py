"""A comparison as one HTML page with pictures, and as tables in the terminal, findings first."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup
from rich.console import Console
from rich.text import Text

from ..reports import pictures, terminal
from ..reports.figures import Table, interval_text
from ..reports.rendering import render

__all__ = ["page", "show"]

Facts = Mapping[str, Any]
"""The content of a comparison's `summary.json`, or a part of it."""

GAINS = "What each model gains"
PAIRS = "Better than each alone, and lost with another person's"
NOTE = (
    "Read by the experimenter off simulated devices: nothing of it passed a server, and no epsilon "
    "covers it."
)


def show(found: Facts, console: Console) -> None:
    """Show the content of `summary.json` in the terminal."""
    console.print(Text(f"{found['title']}: {_about(found)}", style="bold"))
    terminal.print_bullets(_findings(found), console, "!", "yellow")
    for title, table in _tables(found).items():
        console.print(Text(f"\n{title}", style="italic"))
        terminal.print_table(table, console)
    console.print(Text(NOTE, style="dim"))


def page(found: Facts) -> str:
    """Write the whole HTML page of a comparison.

    Raises:
        ConfigError: Matplotlib, which draws the pictures, is not installed.
    """
    return render(
        "comparison.html",
        title=f"privet evaluate: {found['title']}",
        found=found,
        about=_about(found),
        findings=_findings(found),
        tables=_tables(found),
        drawn=_drawn(found),
        note=NOTE,
    )


def _drawn(found: Facts) -> dict[str, Markup]:
    """The pictures, by the title of the table beside which they stand."""
    unit = found["unit"]
    bars = [
        (model["name"], model["gain"]["mean"], model["gain"]["ci95"])
        for model in found["models"]
        if model["model"] != found["shared"]
    ]
    pairs = [(pair["title"], pair["mean"], pair["ci95"]) for pair in found["comparisons"]]
    drawn = {
        GAINS: _differences(bars, unit, "gains", "Gain over the shared model with 95 % intervals"),
        PAIRS: _differences(pairs, unit, "pairs", "Differences"),
    }
    curves = (
        ("Over time", "over_time", "decile", found["over_time"]),
        ("Cold start", "cold_start", "records", _gains(found)),
    )
    for title, key, along, rows in curves:
        if rows:
            points = [(row[along], row["mean"], _spread(row["ci95"])) for row in rows]
            picture = pictures.over_rounds([(f"gain, {unit}", "personal", points)], along)
            alt = f"{title}: " + "; ".join(f"{n}: {mean:+.3f}" for n, mean, _ in points)
            drawn[title] = pictures.svg(picture, key, alt)
    return drawn


def _differences(
    rows: Sequence[tuple[str, float, Sequence[float] | None]], unit: str, name: str, what: str
) -> Markup:
    alt = f"{what}: " + "; ".join(f"{title} {mean:+.3f}" for title, mean, _ in rows)
    return pictures.svg(pictures.differences(rows, unit), name, alt)


def _about(found: Facts) -> str:
    return (
        f"{found['people']} people, {found['records']} held-out later records, {found['dataset']}, "
        f"{found['base_model']}{'' if found['trained'] else ', no shared adapter'}"
    )


def _findings(found: Facts) -> list[str]:
    return [f"{one['touched']:.0%} of people: {one['text']}" for one in found["harm"]["findings"]]


def _tables(found: Facts) -> dict[str, Table]:
    """The tables by their titles, the same for the page and the terminal."""
    unit = found["unit"]
    tables = {
        GAINS: Table(
            ["model", unit, "gain", "95 %", "wins", "hurt", "p10", "Gini"],
            [
                [
                    row["name"], f"{row['loss']['mean']:.4f}", *_mean(row["gain"]),
                    f"{row['win_rate']:.0%}", f"{row['hurt']:.0%}", f"{row['deciles'][1]:+.3f}",
                    "" if row["gini_of_losses"] is None else f"{row['gini_of_losses']:.3f}",
                ]
                for row in found["models"]
            ],
        ),
        PAIRS: Table(
            ["difference", unit, "95 %", "gain kept"],
            [
                [
                    row["title"], *_mean(row),
                    "" if row["gain_kept"] is None else f"{row['gain_kept']:.0%}",
                ]
                for row in found["comparisons"]
            ],
        ),
    }  # fmt: skip
    labelled = [row for row in found["models"] if "metrics" in row]  # accuracy, F1; MAE, RMSE
    if labelled:
        names = list(labelled[0]["metrics"])
        rows = [[row["name"], *(f"{row['metrics'][n]:.4f}" for n in names)] for row in labelled]
        tables["Metrics of labels"] = Table(["model", *names], rows)
    rows = [[str(row["decile"]), str(row["people"]), *_mean(row)] for row in found["over_time"]]
    head = ["tenth of the held-out time", "people", "gain", "95 %"]
    tables["Over time"] = Table(head, rows)
    tables["Segments"] = _segments(found["harm"]["segments"])
    return tables | _further(found)


def _segments(found: Sequence[Facts]) -> Table:
    rows = [
        [
            f"{row['kind']}: {row['segment']}", str(row["people"]),
            f"{row['without']['mean']:.3f}", f"{row['with']['mean']:.3f}",
            f"{row['gain']['mean']:+.3f}", f"{row['hurt']:.0%}",
        ]
        for row in found
    ]  # fmt: skip
    return Table(["segment", "people", "without", "with", "gain", "hurt"], rows)


def _further(found: Facts) -> dict[str, Table]:
    """The tables of the stages that not every scenario has."""
    tables = {}
    if found.get("cold_start"):
        rows = [
            [str(row["records"]), str(row["people"]), *_mean(row), f"{row['hurt']:.0%}",
             ", ".join(f"{name} {number}" for name, number in row["chosen"].items())]
            for row in _gains(found)
        ]  # fmt: skip
        head = ["own records", "people", "gain", "95 %", "hurt", "chosen"]
        tables["Cold start"] = Table(head, rows)
    if found.get("answers"):
        means = found["answers"]["means"].items()
        rows = [[name.replace("_", " "), *_mean(mean)] for name, mean in means]
        tables["Answers"] = Table(["measure", "mean", "95 %"], rows)
    if found.get("memory", {}).get("exposure"):
        rows = [[name, *_mean(mean)] for name, mean in found["memory"]["exposure"].items()]
        head = ["model", f"bits of {found['memory']['most']:g}", "95 %"]
        tables["Rare own strings"] = Table(head, rows)
    return tables


def _gains(found: Facts) -> list[Facts]:
    """The rows of the cold start, with the gain over the shared model as their mean."""
    gains: list[Facts] = []
    for row in found.get("cold_start", {}).get("rows", []):
        more = row["personal_minus_global"]
        interval = more["ci95"] and [-bound for bound in reversed(more["ci95"])]
        gains.append({**row, "mean": -more["mean"], "ci95": interval})
    return gains


def _mean(found: Facts) -> list[str]:
    return [f"{found['mean']:+.4f}", interval_text(found["ci95"])]


def _spread(interval: Sequence[float] | None) -> float:
    """Return an interval's standard deviation as `over_rounds` draws it: a quarter of its width."""
    return 0.0 if interval is None else (interval[1] - interval[0]) / 4
