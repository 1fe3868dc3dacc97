"""The figures of a report as words and tables, each made once: page and terminal only show them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .claims import condition, line_name
from .facts import (
    CrossCheck,
    Gain,
    LineFacts,
    Metrics,
    PrivacyFacts,
    RoundFacts,
    Statistics,
    Summary,
)

__all__ = [
    "Table",
    "colluding",
    "comparisons",
    "conditions",
    "declined",
    "gain",
    "histories",
    "interval_text",
    "kept_out",
    "last_statistics",
    "lines",
    "losses",
    "made",
    "mechanisms",
    "rounds",
    "second_opinion",
    "spent",
    "statistics_by_round",
    "statistics_series",
    "verdict",
]

MOST_ROWS = 12
Points = list[tuple[int, float, float]]
Series = Sequence[tuple[str, str, Points]]


@dataclass(frozen=True)
class Table:
    """A table of plain text, as page and terminal show it."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


# --- what was promised and spent -----------------------------------------------------------------


def lines(privacy: PrivacyFacts) -> Table:
    """Every line in full words, with what was spent on it."""
    rows = [
        [
            line_name(line),
            f"{line['adjacency']}: {line['adjacency_means']}",
            line["noise_at"],
            f"{line['epsilon']:.2f}",
            _budget(line),
            f"{line['delta']:g}",
        ]
        for line in privacy["lines"]
    ]
    most = "at most" if privacy["devices"] else "worst client"
    head = ["line", "adjacency", "noise added by", f"ε spent, {most}", "budget ε", "δ"]
    return Table(head, rows, "One line for each unit and adversary; units are never mixed.")


def spent(privacy: PrivacyFacts) -> Table:
    """Every line as short as it can be told, with what was spent on it; see `conditions`."""
    rows = [
        [
            _short(line["key"]) + (" (if …)" if condition(line) else ""),
            f"{line['epsilon']:.2f}",
            f"{line['delta']:g}",
            line["adjacency"],
            line["noise_at"],
            f"{line['participations_max']}",
            _budget(line),
            _second(line["cross_check"]),
        ]
        for line in privacy["lines"]
    ]
    return Table(["line", "ε", "δ", "adjacency", "noise at", "releases", "budget", "2nd ε"], rows)


def conditions(privacy: PrivacyFacts) -> list[str]:
    """The lines whose figures rest on something, with what that is."""
    broken = "unmasked server"
    return [line_name(x) for x in privacy["lines"] if condition(x) or x["against"] == broken]


def histories(privacy: PrivacyFacts) -> Table:
    """What clients spent, those with equal histories together."""
    shown = privacy["histories"][:MOST_ROWS]
    rows = [
        [f"{row['clients']:,}", f"{row['participations']}", *_epsilons(row["epsilon"], privacy)]
        for row in shown
    ]
    left = len(privacy["histories"]) - len(shown)
    note = f"; {left} more kinds in privacy.json" if left else ""
    caption = f"Clients with equal histories together, most spent first{note}."
    return Table(["clients", "releases", *_epsilon_heads(privacy)], rows, caption)


def declined(privacy: PrivacyFacts) -> Table:
    """How many rounds were declined, by reason."""
    rows = [[reason, f"{count:,}"] for reason, count in privacy["declined"].items()]
    return Table(["declined, because", "times"], rows, "Rounds that were declined.")


def rounds(privacy: PrivacyFacts) -> Table:
    """What the worst client had spent after a round; on devices also who came."""
    devices = privacy["devices"] is not None
    rows = [
        [
            *(_counts(row) if devices else (str(row["round"]), f"{row['released']:,}")),
            *_epsilons(row["epsilon"], privacy),
        ]
        for row in _thinned(privacy["rounds"])
    ]
    counts = ("round", "asked", "came", "declined", "did not fit", "")
    head = [*(counts if devices else ("round", "released")), *_epsilon_heads(privacy)]
    whose = "largest epsilon a device can have spent" if devices else "worst client's epsilon"
    return Table(head, rows, f"The {whose} so far, after the round.")


def _counts(row: RoundFacts) -> list[str]:
    """A round of real devices: who was asked, who came, who declined."""
    if row["asked"] is None:
        return [str(row["round"]), "–", "–", "–", "–", "not ended"]
    numbers = (row["round"], row["asked"], row["answered"], row["declined"], row["refused"])
    return [*map(str, numbers), "void" if row["void"] else "summed"]


def mechanisms(privacy: PrivacyFacts) -> Table:
    """Every kind of noise, how often it was used, and what one use costs."""
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
    caption = "Noise is its standard deviation over the most that one unit can change."
    return Table(head, rows, caption)


def kept_out(privacy: PrivacyFacts) -> Table:
    """Whom each line holds against."""
    marks = {True: "holds", False: "does not hold"}
    rows = [
        [who, *(marks[who in line["holds_against"]] for line in privacy["lines"])]
        for who in privacy["adversaries"]
    ]
    return Table(["against", *map(line_name, privacy["lines"])], rows, "Who is kept out.")


def colluding(line: LineFacts) -> Table:
    """A person's epsilon against the server, by the number of colluding devices."""
    head, found = ["colluding devices", "ε", ""], line["colluding"]
    if found is None:
        return Table(head, [])
    rows = found["rows"]
    notes = {
        rows[-1]["colluding"]: "the device's own share: if masking is broken",
        found["agreed"]: f"the agreed number, of {found['enrolled']:,} enrolled",
    }
    cells = []
    for row in rows:
        note = [notes.get(row["colluding"], ""), "" if row["bound"] else "no bound"]
        value = "none" if row["epsilon"] is None else f"{row['epsilon']:.2f}"
        cells.append([str(row["colluding"]), value, "; ".join(filter(None, note))])
    return Table(head, cells, line_name(line))


def second_opinion(check: CrossCheck) -> str:
    """What the second accountant says, in a sentence."""
    if check["epsilon"] is None or check["difference"] is None:
        return check["accountant"]
    verdict = "they agree" if check["agrees"] else "THEY DISAGREE"
    return (
        f"{check['accountant']}, ε {check['epsilon']:.3f}, {check['difference']:.2%} apart; "
        f"{verdict}."
    )


def _second(check: CrossCheck) -> str:
    if check["epsilon"] is None:
        return "none"
    return f"{check['epsilon']:.2f}" + ("" if check["agrees"] else " !!")


def _budget(line: LineFacts) -> str:
    """What a line may spend. What is left if masking is broken is limited by nothing."""
    return "none" if line["budget"] is None else f"{line['budget']:g}"


def _short(key: str) -> str:
    """A line's key with room to break: `client, analyst`."""
    return key.replace("/", ", ")


def _epsilon_heads(privacy: PrivacyFacts) -> list[str]:
    return [f"ε {_short(line['key'])}" for line in privacy["lines"]]


def _epsilons(values: Mapping[str, float], privacy: PrivacyFacts) -> list[str]:
    return [f"{values[line['key']]:.2f}" for line in privacy["lines"]]


def _thinned(rows: Sequence[RoundFacts]) -> list[RoundFacts]:
    """At most `MOST_ROWS` rows, evenly spread, the last one always among them."""
    if len(rows) <= MOST_ROWS:
        return list(rows)
    picked = {round(step * (len(rows) - 1) / (MOST_ROWS - 1)) for step in range(MOST_ROWS)}
    return [rows[index] for index in sorted(picked)]


# --- what people got -----------------------------------------------------------------------------


def verdict(metrics: Metrics) -> str:
    """What the people measured got from their personal heads, in a few sentences."""
    how = (
        f"Measured on each person's later records, in {metrics['name']}, lower is better; "
        "intervals are 95 %, from a bootstrap over people."
    )
    ties, hurt = metrics["ties"], metrics["fraction_hurt"]
    if ties is None or hurt is None:
        return f"No personal heads were measured. {how}"
    seen = metrics.get("of", "seen people") == "seen people"
    whom = "people whose devices took part" if seen else "people never trained on"
    return (
        f"{1 - ties - hurt:.0%} of the {whom} do better with their personal head "
        f"than with the shared model, {ties:.0%} do equally well, "
        f"{hurt:.0%} do worse. {how} The swapped head is another person's: if "
        "it did as well, the gain would not be personal."
    )


def gain(found: Gain) -> Table:
    """Who is better off, and by how much."""
    rows = [
        ["people", f"{len(found['gains'])}"],
        ["mean gain", f"{found['mean']:+.4f}"],
        ["95 % interval", interval_text(found["ci95"])],
        ["better off", f"{found['better']}"],
        ["equal", f"{found['equal']}"],
        ["hurt", f"{found['hurt']}"],
        ["10th percentile", f"{found['p10']:+.4f}"],
    ]
    return Table(["gain", ""], rows, "Gain: how much the loss falls; above zero is better.")


def comparisons(summary: Summary) -> Table:
    """Models against each other, person by person."""
    rows = [
        [row["title"], f"{row['mean']:+.4f}", interval_text(row["ci95"])]
        for row in summary["comparisons"]
    ]
    caption = "Above zero: the first does better. An interval that holds zero shows nothing."
    return Table(["difference", "mean", "95 % interval"], rows, caption)


def losses(summary: Summary) -> Table:
    """The mean losses of every model, of people who took part and of others."""
    name = summary["metrics"]["name"] if summary["metrics"] else ""
    rows = [
        [f"{key.replace('_', ' ')}, {group}", f"{value['mean']:.4f}",
         interval_text(value["ci95"], ".4f")]
        for group, values in (("seen", summary["seen"]), ("unseen", summary["unseen"]))
        for key, value in (values or {}).items()
    ]  # fmt: skip
    caption = f"{name}; seen: took part; unseen: never did."
    return Table([f"loss, {name}", "mean", "95 % interval"], rows, caption)


def interval_text(ends: Sequence[float] | None, form: str = "+.4f") -> str:
    """`[low, high]`, or a dash where one user cannot give an interval."""
    return "–" if ends is None else f"[{ends[0]:{form}}, {ends[1]:{form}}]"


# --- what the rounds' noised sums say ------------------------------------------------------------


def statistics_series(rows: Sequence[Statistics]) -> Series:
    """What can be drawn over the rounds: (panel, name, [(round, mean, standard deviation)]).

    A round in which the noise outweighed the count has no point.
    """
    named = (("loss", "train", "train_loss"), ("gain", "shared over base", "gain_shared"),
             ("gain", "personal over shared", "gain_personal"))  # fmt: skip
    return [
        (panel, name, [(row["round"], row[key], row[f"{key}_std"])
                       for row in rows if row.get(key) is not None])
        for panel, name, key in named
        if any(key in row for row in rows)
    ]  # fmt: skip


def last_statistics(rows: Sequence[Statistics]) -> Table:
    """The last value of each series."""
    cells = [
        [f"{name}, {panel}", f"{points[-1][0]}", f"{points[-1][1]:.4g}", f"{points[-1][2]:.2g}"]
        for panel, name, points in statistics_series(rows)
        if points
    ]
    caption = "The last round that says it; ± is one standard deviation."
    return Table(["statistic", "round", "mean", "±"], cells, caption)


def statistics_by_round(rows: Sequence[Statistics], most: int = 6) -> Table:
    """The values of the last rounds, a column for each series."""
    series = statistics_series(rows)
    known = [{number: f"{mean:.3g} ± {std:.2g}" for number, mean, std in p} for _, _, p in series]
    cells = [
        [str(row["round"]), *(values.get(row["round"], "–") for values in known)]
        for row in rows[-most:]
    ]
    return Table(["round", *(f"{name}, {panel}" for panel, name, _ in series)], cells)


# --- how it was made -----------------------------------------------------------------------------


def made(summary: Summary) -> Table:
    """Models, people, time and versions of the run, as far as known."""
    adapter, memory = summary["adapter"], summary["peak_rss_bytes"]
    seconds, versions = summary["seconds"] or {}, summary["versions"] or {}
    rows = [
        ["base model", summary["base_model"]],
        ["data", summary["dataset"]],
        ["adapter", f"{adapter['family']}, {_number(adapter['dimension'])} numbers"],
        ["clients", f"{summary['clients']:,}, {summary['cohort']:,} asked in a round"],
        ["rounds", f"{summary['rounds']} of {summary['rounds_planned']}"],
        ["upload", _upload(summary)],
        ["time", ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())],
        ["peak memory", "" if memory is None else f"{memory / 1e6:,.0f} MB"],
        ["base model computed in", summary.get("compute") or ""],
        ["versions", ", ".join(f"{name} {value}" for name, value in versions.items())],
    ]
    return Table(["", ""], [row for row in rows if row[1]])


def _upload(summary: Summary) -> str:
    total, numbers = summary["upload_bytes_per_client_round"], summary["adapter"]["dimension"]
    said = f"{_number(total)} bytes a client and round"
    return f"{said}, {total / numbers:.3g} a number" if total and numbers else said


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.0f}"
