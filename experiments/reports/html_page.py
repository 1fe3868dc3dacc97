"""The report as one HTML file: opens offline, pictures inside, no script, light and dark.

The order is that of the questions a privacy officer asks: what was promised to whom, what was
spent, against whom it holds, what the people got for it. The page is `templates/run.html`; here are
its pictures, each with words for people who do not see it.
"""

from collections.abc import Sequence

from markupsafe import Markup

from . import claims, figures, pictures
from .claims import line_name
from .facts import Facts, LineFacts, PrivacyFacts, Statistics, Summary
from .rendering import render

__all__ = ["page"]


def page(facts: Facts) -> str:
    """The whole page from `report.report_facts`.

    Raises:
        ConfigError: Matplotlib, which draws the pictures, is not installed.
    """
    summary, privacy = facts["summary"], facts["privacy"]
    statistics = facts.get("statistics", [])
    return render(
        "run.html",
        title=f"privet report: {privacy['run']}",
        summary=summary,
        privacy=privacy,
        statistics=statistics,
        claims=claims,
        figures=figures,
        drawn=_spent(privacy)
        | _colluding(privacy["lines"])
        | _gained(summary)
        | _rounds(statistics),
    )


def _spent(privacy: PrivacyFacts) -> dict[str, Markup]:
    # if masking is broken, a person's figure is that large that no other could be read beside it
    lines = [x for x in privacy["lines"] if (x["unit"], x["against"]) != claims.OWN_SHARE]
    if not privacy["lines"]:
        return {}
    whose = "at most" if privacy["devices"] else "worst client"
    by_client = pictures.spent_per_client(lines, privacy["clients"], privacy["promised"]["budgets"])
    by_round = pictures.spent_per_round(lines, privacy["rounds"], whose)
    return {
        "clients": pictures.svg(
            by_client,
            "clients",
            "How many clients spent which epsilon, one panel a line: "
            + "; ".join(f"{line_name(x)}, worst client {x['epsilon']:.2f}" for x in lines),
        ),
        "rounds": pictures.svg(
            by_round,
            "rounds",
            "The worst client's epsilon after each round; at the end: "
            + "; ".join(f"{line_name(x)} {x['epsilon']:.2f}" for x in lines),
        ),
    }


def _colluding(lines: Sequence[LineFacts]) -> dict[str, Markup]:
    """Of the one line that has it: client-level, against the server."""
    for line in lines:
        if line["colluding"]:
            rows = figures.colluding(line).rows
            alt = "Epsilon of a person against the server by the number of colluding devices: "
            alt += "; ".join(f"{devices} {value}" for devices, value, _ in rows)
            drawn = pictures.by_colluding(line["colluding"])
            return {"colluding": pictures.svg(drawn, "colluding", alt)}
    return {}


def _gained(summary: Summary) -> dict[str, Markup]:
    metrics = summary["metrics"]
    if metrics is None:
        return {}
    found = {}
    for gain in summary["gains"]:
        drawn = pictures.gains_per_user(gain["gains"], gain["mean"], gain["ci95"], metrics["name"])
        alt = (
            f"{gain['title']}: gain of each of {len(gain['gains'])} people, sorted; mean "
            f"{gain['mean']:+.3f}, 95 % interval {figures.interval_text(gain['ci95'], '+.3f')}, "
            f"{gain['hurt']} hurt"
        )
        found[gain["name"]] = pictures.svg(drawn, gain["name"], alt)
    rows = [(row["title"], row["mean"], row["ci95"]) for row in summary["comparisons"]]
    alt = "Differences of mean losses with 95 % intervals: " + "; ".join(
        f"{title} {mean:+.3f}" for title, mean, _ in rows
    )
    drawn = pictures.differences(rows, metrics["name"])
    return found | {"differences": pictures.svg(drawn, "differences", alt)}


def _rounds(rows: Sequence[Statistics]) -> dict[str, Markup]:
    if not rows:
        return {}
    last = figures.last_statistics(rows).rows
    alt = "Noised statistics of each round with bands of two standard deviations; last: "
    alt += "; ".join(f"{name} {mean} ± {std}" for name, _, mean, std in last)
    drawn = pictures.over_rounds(figures.statistics_series(rows))
    return {"statistics": pictures.svg(drawn, "statistics", alt)}
