"""The report as one HTML file: opens offline, pictures inside, no script, light and dark.

The order is that of the questions a privacy officer asks: what was promised to whom, what was
spent, against whom it holds, what the people got for it. Whatever comes from data or settings is
escaped; the only raw markup is written in this file and in `pictures.svg`.
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from . import pictures
from .claims import (
    ADDERS,
    COLLUDING,
    NO_EVALUATION,
    OWN_SHARE,
    condition,
    headline,
    line_name,
    main_line,
    spoken,
)
from .figures import (
    COUNTS,
    budget_text,
    colluding_rows,
    counts,
    interval_text,
    statistics_series,
    verdict,
)
from .style import style

__all__ = ["page"]

Facts = Mapping[str, Any]


def page(facts: Facts) -> str:
    """The whole page from `report.report_facts`.

    Args:
        facts: `{"summary": ..., "privacy": ...}`.

    Raises:
        ConfigError: Matplotlib, which draws the pictures, is not installed.
    """
    summary, privacy = facts["summary"], facts["privacy"]
    body = [
        _opening(summary, privacy),
        _section("1. What was promised, and to whom", _promised(privacy)),
        _section("2. What was spent", _spent(privacy)),
        _section("3. Against whom it holds, and what it does not cover", _holds(privacy)),
        _section("4. What the people got for it", _gained(summary, privacy)),
        *_of_rounds(facts.get("statistics", [])),
        _section("How this was made", _made(summary, privacy)),
    ]
    title = escape(f"privet report: {privacy['run']}")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{title}</title>\n<style>\n{style()}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def _opening(summary: Facts, privacy: Facts) -> str:
    line = main_line(privacy)
    about = f"{summary['base_model']} on {summary['dataset']}"
    parts = [f'<p class="kicker">privet report · {escape(privacy["run"])} · {escape(about)}</p>']
    problems = [
        f'<div class="banner" role="alert"><strong>{escape(text)}</strong></div>'
        for text in privacy["problems"]
    ]
    parts += problems
    if not privacy["private"]:
        parts.append("<h1>Not private</h1>")
    elif line is not None:
        who = "person" if line["unit"] == "client" else "record"
        outside = "everybody who sees what is published"
        seen = "everybody who sees what leaves the device"
        parts.append(
            f'<h1><span class="big">ε = {line["epsilon"]:.2f}</span> for each {who}, against '
            f"{outside if line['noise_at'] == 'server' else seen}{_if(line)}</h1>"
        )
    else:
        parts.append("<h1>No privacy claim</h1>")
    parts.append(f'<p class="lead">{escape(headline(privacy))}</p>')
    if line is not None and privacy["private"]:
        against = spoken(line["does_not_hold_against"])
        parts.append(f'<p class="not">It does not hold against {escape(against)}.</p>')
    parts.append(_list(privacy["warnings"], "not"))
    parts.append(_cards(privacy))
    return f"<header>{''.join(parts)}</header>"


def _if(line: Facts) -> str:
    return f", if: {escape(condition(line))}" if condition(line) else ""


def _cards(privacy: Facts) -> str:
    cards = [
        f'<div class="card {line["unit"]}"><p>{escape(line_name(line))}</p>'
        f'<p class="figure">ε {line["epsilon"]:.2f}</p>'
        f"<p>δ {line['delta']:g} · {escape(line['adjacency'])} · noise by the "
        f"{escape(ADDERS[line['noise_at']])}</p></div>"
        for line in privacy["lines"]
    ]
    return f'<div class="cards">{"".join(cards)}</div>'


def _promised(privacy: Facts) -> str:
    rows = [
        [
            line_name(line),
            f"{line['adjacency']}: {line['adjacency_means']}",
            line["noise_at"],
            f"{line['epsilon']:.2f}",
            budget_text(line),
            f"{line['delta']:g}",
        ]
        for line in privacy["lines"]
    ]
    most = "at most" if privacy["devices"] else "worst client"
    head = ["line", "adjacency", "noise added by", f"ε spent, {most}", "budget ε", "δ"]
    return (
        _list(privacy["promised"]["sentences"])
        + _table(head, rows, "One line for each unit and adversary; units are never mixed.")
        + _list(privacy["no_claim"], "plain strong")
    )


def _spent(privacy: Facts) -> str:
    lines = privacy["lines"]
    if not lines:
        return _list(privacy["no_claim"])
    devices = privacy["devices"]
    clients = "".join(
        f"<p>{escape(line_name(line))}: worst client <code>{escape(line['client'])}</code>, "
        f"ε {line['epsilon']:.2f}; at most {_count(line['participations_max'], 'release')} by one "
        "client.</p>"
        for line in lines
    )
    # if masking is broken, a person's figure is that large that no other could be read beside it
    drawn = [line for line in lines if (line["unit"], line["against"]) != OWN_SHARE]
    per_client = pictures.svg(
        pictures.spent_per_client(drawn, privacy["clients"], privacy["promised"]["budgets"]),
        "clients",
        "How many clients spent which epsilon, one panel a line: "
        + "; ".join(f"{line_name(x)}, worst client {x['epsilon']:.2f}" for x in drawn),
    )
    per_round = pictures.svg(
        pictures.spent_per_round(
            drawn, privacy["rounds"], "at most" if devices else "worst client"
        ),
        "rounds",
        "The worst client's epsilon after each round; at the end: "
        + "; ".join(f"{line_name(x)} {x['epsilon']:.2f}" for x in drawn),
    )
    return (
        _list(devices["sentences"] if devices else ())
        + "<h3>By each client</h3>"
        + _beside(per_client, clients + _histories(privacy))
        + "<h3>By each round</h3>"
        + _beside(per_round, _rounds(privacy))
        + "<h3>By each mechanism</h3>"
        + _mechanisms(privacy)
    )


def _histories(privacy: Facts) -> str:
    keys = [line["key"] for line in privacy["lines"]]
    shown = privacy["histories"][:12]
    rows = [
        [
            f"{row['clients']:,}",
            f"{row['participations']}",
            *(f"{row['epsilon'][key]:.2f}" for key in keys),
        ]
        for row in shown
    ]
    left = len(privacy["histories"]) - len(shown)
    note = f"; {left} more kinds in privacy.json" if left else ""
    table = _table(
        ["clients", "releases", *(_short(key) for key in keys)],
        rows,
        f"Clients with equal histories together, most spent first{note}.",
    )
    declined = [[reason, f"{count:,}"] for reason, count in privacy["declined"].items()]
    if not declined:
        return table + "<p>No client declined a round.</p>"
    return table + _table(["declined, because", "times"], declined, "Rounds that were declined.")


def _rounds(privacy: Facts) -> str:
    keys = [line["key"] for line in privacy["lines"]]
    devices = privacy["devices"]
    rows = [
        [
            *(counts(row) if devices else (str(row["round"]), f"{row['released']:,}")),
            *(f"{row['epsilon'][key]:.2f}" for key in keys),
        ]
        for row in _thinned(privacy["rounds"], 12)
    ]
    head = [*(COUNTS if devices else ("round", "released")), *(_short(key) for key in keys)]
    return _table(head, rows, "The worst client's epsilon so far, after the round.")


def _mechanisms(privacy: Facts) -> str:
    rows = [
        [
            row["mechanism"],
            f"{row['unit']}-level, {row['against']}",
            row["adjacency"],
            f"{row['noise_multiplier']:.3g}",
            f"{row['sampling_rate']:g}",
            f"{row['steps']}",
            "unknown" if row["releases"] is None else f"{row['releases']:,}",
            f"{row['per_client_max']}",
            "none" if row["epsilon_once"] is None else f"{row['epsilon_once']:.2f}",
        ]
        for row in privacy["mechanisms"]
    ]
    head = ["mechanism", "line", "adjacency", "noise / bound", "record rate", "steps", "releases",
            "most by one client", "ε of one"]  # fmt: skip
    return _table(
        head, rows, "Noise is its standard deviation over the most that one unit can change."
    )


def _holds(privacy: Facts) -> str:
    lines = privacy["lines"]
    marks = {True: "holds", False: "does not hold"}
    rows = [
        [who, *(marks[who in line["holds_against"]] for line in lines)]
        for who in privacy["adversaries"]
    ]
    grid = _table(["against", *(line_name(line) for line in lines)], rows, "Who is kept out.")
    return (
        (grid if lines else "")
        + _list(privacy["no_claim"], "plain strong")
        + "".join(_colluding(line) for line in lines if line.get("colluding"))
        + "".join(_rests_on(line) for line in lines)
        + "<h3>Not covered</h3>"
        + _list(privacy["not_covered"])
    )


def _colluding(line: Facts) -> str:
    found, rows = line["colluding"], colluding_rows(line["colluding"])
    alt = "Epsilon of a person against the server by the number of colluding devices: " + "; ".join(
        f"{devices} {value}" for devices, value, _ in rows
    )
    drawn = pictures.svg(pictures.by_colluding(found), "colluding", alt)
    cells = [[devices, value, note] for devices, value, note in rows]
    table = _table(["colluding devices", "ε", ""], cells, line_name(line))
    return "<h3>If devices collude with the server, or masking is broken</h3>" + _beside(
        drawn, f"{table}<p>{escape(COLLUDING)}</p>"
    )


def _rests_on(line: Facts) -> str:
    return (
        f"<h3>{escape(line_name(line).capitalize())}: ε {line['epsilon']:.2f} at δ "
        f"{line['delta']:g}</h3>"
        f"<p>Noise counted: {escape(line['noise_counted'])}. Amplification by sampling of "
        f"clients: {escape(line['amplified_note'])}. Second accountant: "
        f"{escape(_second(line['cross_check']))}</p><p>It rests on:</p>"
        + _list(line["assumptions"])
    )


def _second(check: Facts) -> str:
    if check["epsilon"] is None:
        return str(check["accountant"])
    verdict = "they agree" if check["agrees"] else "THEY DISAGREE"
    return (
        f"{check['accountant']}, ε {check['epsilon']:.3f}, {check['difference']:.2%} apart; "
        f"{verdict}."
    )


def _gained(summary: Facts, privacy: Facts) -> str:
    metrics = summary["metrics"]
    if metrics is None and privacy["devices"]:
        return f"<p>{escape(NO_EVALUATION)}</p>"
    if metrics is None:
        return "<p>No evaluation was done; <code>privet evaluate RUN</code> does it.</p>"
    parts = [f"<p>{escape(verdict(metrics))}</p>"]
    for gain in summary["gains"]:
        drawn = pictures.gains_per_user(gain["gains"], gain["mean"], gain["ci95"], metrics["name"])
        alt = (
            f"{gain['title']}: gain of each of {len(gain['gains'])} people, sorted; mean "
            f"{gain['mean']:+.3f}, 95 % interval {interval_text(gain['ci95'], '+.3f')}, "
            f"{gain['hurt']} hurt"
        )
        parts.append(f"<h3>{escape(gain['title'])}</h3>")
        parts.append(_beside(pictures.svg(drawn, gain["name"], alt), _gain_table(gain)))
    parts.append("<h3>Is it real, and is it personal?</h3>")
    rows = [(row["title"], row["mean"], row["ci95"]) for row in summary["comparisons"]]
    alt = "Differences of mean losses with 95 % intervals: " + "; ".join(
        f"{title} {mean:+.3f}" for title, mean, _ in rows
    )
    drawn = pictures.differences(rows, metrics["name"])
    parts.append(_beside(pictures.svg(drawn, "differences", alt), _comparisons(summary)))
    parts.append("<h3>The losses themselves</h3>" + _losses(summary))
    return "".join(parts)


def _of_rounds(rows: Sequence[Facts]) -> list[str]:
    """Write the section on noised statistics. There is none where no round has any."""
    if not rows:
        return []
    series = statistics_series(rows)
    ends = [(f"{name}, {panel}", points[-1]) for panel, name, points in series if points]
    alt = (
        "Noised statistics of each round with bands of two standard deviations; last: "
        + "; ".join(f"{name} {mean:.3g} ± {std:.2g}" for name, (_, mean, std) in ends)
    )
    drawn = pictures.svg(pictures.over_rounds(series), "statistics", alt)
    cells = [[name, f"{number}", f"{mean:.4g}", f"{std:.2g}"] for name, (number, mean, std) in ends]
    text = "The last round that says it; ± is one standard deviation."
    table = _table(["statistic", "round", "mean", "±"], cells, text)
    about = (
        "<p>Means over a round's devices, decoded from the same noised sum as the adapter: what "
        "they cost is part of every epsilon above. Bands are two standard deviations of the noise. "
        "Gains above zero are good, losses are better low.</p>"
    )
    body = about + _beside(drawn, table)
    return [_section("5. What the rounds' noised sums say", body)]


def _gain_table(gain: Facts) -> str:
    rows = [
        ["people", f"{len(gain['gains'])}"],
        ["mean gain", f"{gain['mean']:+.4f}"],
        ["95 % interval", interval_text(gain["ci95"])],
        ["better off", f"{gain['better']}"],
        ["equal", f"{gain['equal']}"],
        ["hurt", f"{gain['hurt']}"],
        ["10th percentile", f"{gain['p10']:+.4f}"],
    ]
    return _table(["gain", ""], rows, "Gain: how much the loss falls; above zero is better.")


def _comparisons(summary: Facts) -> str:
    rows = [
        [row["title"], f"{row['mean']:+.4f}", interval_text(row["ci95"])]
        for row in summary["comparisons"]
    ]
    text = "Above zero: the first does better. An interval that holds zero shows nothing."
    return _table(["difference", "mean", "95 % interval"], rows, text)


def _losses(summary: Facts) -> str:
    metrics = summary["metrics"]
    rows = []
    for group, values in (("seen", summary["seen"]), ("unseen", summary["unseen"])):
        for name, value in values.items():
            if isinstance(value, Mapping):
                label = f"{name.replace('_', ' ')}, {group}"
                rows.append([label, f"{value['mean']:.4f}", interval_text(value["ci95"], ".4f")])
    text = f"{metrics['name']}; seen: took part; unseen: never did."
    return _table([f"loss, {metrics['name']}", "mean", "95 % interval"], rows, text)


def _made(summary: Facts, privacy: Facts) -> str:
    adapter = summary["adapter"]
    seconds = summary["seconds"] or {}
    rows = [
        ["base model", summary["base_model"]],
        ["data", summary["dataset"]],
        ["adapter", f"{adapter['family']}, {_number(adapter['dimension'])} numbers"],
        ["clients", f"{summary['clients']:,}, {summary['cohort']:,} asked in a round"],
        ["rounds", f"{summary['rounds']} of {summary['rounds_planned']}"],
        ["upload", _upload(summary)],
        ["time", ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())],
        ["peak memory", _megabytes(summary["peak_rss_bytes"])],
        ["versions", ", ".join(f"{k} {v}" for k, v in (summary["versions"] or {}).items())],
    ]
    known = [row for row in rows if row[1]]
    whence = "the devices' ledgers, whose chains verify"
    if privacy["devices"]:
        whence = "the plans of the rounds; the ledgers are on the devices"
    note = f"<p>Every epsilon was computed from {escape(whence)}.</p>"
    return note + _table(["", ""], known, "")


def _upload(summary: Facts) -> str:
    total, numbers = summary["upload_bytes_per_client_round"], summary["adapter"]["dimension"]
    said = f"{_number(total)} bytes a client and round"
    return f"{said}, {total / numbers:.3g} a number" if total and numbers else said


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.0f}"


def _megabytes(value: float | None) -> str:
    return "" if value is None else f"{value / 1e6:,.0f} MB"


def _short(key: str) -> str:
    """A line's key as a column's head, with room to break."""
    unit, _, against = key.partition("/")
    return f"ε {unit}, {against}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _thinned(rows: Sequence[Facts], most: int) -> list[Facts]:
    """At most `most` rows, evenly spread, the last one always among them."""
    if len(rows) <= most:
        return list(rows)
    picked = {round(place * (len(rows) - 1) / (most - 1)) for place in range(most)}
    return [row for place, row in enumerate(rows) if place in picked]


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _beside(picture: str, words: str) -> str:
    return f'<div class="beside"><figure>{picture}</figure><div>{words}</div></div>'


def _list(items: Iterable[str], kind: str = "") -> str:
    inner = "".join(f"<li>{escape(item)}</li>" for item in items)
    return f'<ul class="{kind}">{inner}</ul>' if inner else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> str:
    """Write an HTML table of plain text, which is escaped here.

    A cell that starts like a number is set to the right.
    """
    top = "".join(f'<th scope="col">{escape(text)}</th>' for text in head)
    body = "".join(f"<tr>{''.join(_cell(text) for text in row)}</tr>" for row in rows)
    under = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll"><table>{under}<thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(text: str) -> str:
    kinds = {"holds": "yes", "does not hold": "no"}
    start = text.lstrip("+-[")
    kind = kinds.get(text, "number" if start[:1].isdigit() and len(text) < 24 else "")
    return f'<td class="{kind}">{escape(text)}</td>' if kind else f"<td>{escape(text)}</td>"
