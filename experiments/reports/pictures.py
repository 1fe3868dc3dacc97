"""Pictures of a report: figures drawn with Matplotlib, turned into SVG that sits inside HTML.

Every picture uses one small palette that is safe for colour-blind readers (after Okabe and Ito,
2008), says with a direct label what a legend would say, and takes its colours from the page's
style sheet, so that it is readable on light and on dark ground. Matplotlib is imported when the
first picture is drawn: the terminal report does not need it.
"""

import io
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

from ...common.errors import ConfigError
from .claims import condition
from .facts import ClientFacts, Colluding, LineFacts, RoundFacts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LIGHT = {
    "ground": "#ffffff",
    "ink": "#1b1f24",
    "muted": "#5c6570",
    "grid": "#dce1e6",
    "client": "#0072b2",
    "example": "#a8478c",
    "gain": "#00806a",
    "hurt": "#d55e00",
}
DARK = {
    "ground": "#14171b",
    "ink": "#e9ecef",
    "muted": "#a3adb8",
    "grid": "#39414a",
    "client": "#5bb8ee",
    "example": "#e08cc6",
    "gain": "#3cc4a2",
    "hurt": "#ff8f47",
}
WIDTH = 4.9  # inches; at phone width the page still shows letters of about 7 pt
MANY = 12  # distinct values above which a histogram gets bins


def figure(height: float, rows: int = 1) -> tuple["Figure", list["Axes"]]:
    """An empty figure, `WIDTH` x `height` inches, with `rows` panels that share the x axis.

    Raises:
        ConfigError: Matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "the pictures need matplotlib; install privet[experiments], or read the report in "
            "the terminal or with --json"
        ) from None
    drawn = Figure(figsize=(WIDTH, height), layout="constrained")
    panels = drawn.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    for panel in panels:
        _plain(panel)
    return drawn, list(panels)


def spent_per_client(
    lines: Sequence[LineFacts],
    clients: Sequence[ClientFacts],
    budgets: Mapping[str, float],
) -> "Figure":
    """How many clients spent how much: one panel a line, the worst client and the budget marked.

    Args:
        lines, clients: the report's.
        budgets: largest epsilon per unit; a unit without one gets no mark.
    """
    more = 0.15 * sum(bool(line["conditions"]) for line in lines)
    drawn, panels = figure(0.55 + more + 1.05 * max(1, len(lines)), max(1, len(lines)))
    ends = [line["epsilon"] for line in lines] + [budgets.get(line["unit"], 0) for line in lines]
    right = 1.04 * max([*ends, 1e-9])
    for panel, line in zip(panels, lines, strict=False):
        values = [client["epsilon"].get(line["key"], 0.0) for client in clients]
        positions, heights, width = _histogram(values, right)
        panel.bar(positions, heights, width=width, color=LIGHT[line["unit"]], linewidth=0)
        top = max(heights, default=1)
        panel.set_ylim(0, 1.5 * top)
        panel.set_xlim(0, right)
        panel.set_title(_line_label(line), loc="left", fontsize=9, color=LIGHT["ink"])
        panel.locator_params(axis="y", nbins=3, integer=True)
        _mark(panel, line["epsilon"], f"worst client {line['epsilon']:.2f}", "ink", right)
        if line["unit"] in budgets:
            limit = budgets[line["unit"]]
            _mark(panel, limit, f"budget {limit:g}", "muted", right, low=True)
    panels[-1].set_xlabel("epsilon of one client")
    drawn.supylabel("clients", fontsize=9, color=LIGHT["ink"])
    return drawn


def spent_per_round(
    lines: Sequence[LineFacts],
    rounds: Sequence[RoundFacts],
    whose: str = "worst client",
) -> "Figure":
    """The worst client's epsilon after each round, one curve a line, named at its end.

    Args:
        lines, rounds: the report's.
        whose: epsilon, for the axis.
    """
    drawn, (panel,) = figure(2.7)
    numbers = [row["round"] for row in rounds]
    ends = []
    for line in lines:
        values = [row["epsilon"].get(line["key"], 0.0) for row in rounds]
        dashes = "-" if line["against"] == "analyst" else (0, (4, 2))
        (curve,) = panel.plot(numbers, values, color=LIGHT[line["unit"]], linestyle=dashes)
        curve.set(marker="o", markersize=3.5, drawstyle="steps-post")
        ends.append((values[-1] if values else 0.0, line))
    first, last = min(numbers, default=0), max(numbers, default=1)
    width = max(1, last - first)
    panel.set_xlim(first - 0.03 * width, last + 0.55 * width)
    _name_lines(panel, ends, last, last + 0.04 * width)
    panel.locator_params(axis="x", integer=True)
    panel.set_xticks([tick for tick in panel.get_xticks() if first <= tick <= last])
    panel.set_xlabel("round")
    panel.set_ylabel(f"epsilon, {whose} so far")
    return drawn


def _name_lines(
    panel: "Axes", ends: Sequence[tuple[float, LineFacts]], last: float, beside: float
) -> None:
    """Write each line's epsilon and name at the end of its curve, none over another."""
    high = max([end for end, _ in ends] + [1e-9])
    heights = _apart([max(end, 0.1 * high) for end, _ in ends], 0.24 * high)
    panel.set_ylim(0, max([1.25 * high, *(height + 0.15 * high for height in heights)]))
    for height, (end, line) in zip(heights, ends, strict=True):
        given = " (if …)" if line["conditions"] else ""
        text = f"{end:.2f}  {line['unit']}-level,\nagainst the {line['against']}{given}"
        panel.annotate(
            text, (last, end), xytext=(beside, height), textcoords="data", fontsize=8, va="center",
            color=LIGHT[line["unit"]],
        )  # fmt: skip


def by_colluding(found: Colluding) -> "Figure":
    """A person's epsilon by the number of devices that collude with the server.

    Args:
        found: `rows` of `colluding` and `epsilon` (None: no bound, not drawn), and `agreed`.
    """
    drawn, (panel,) = figure(2.4)
    known = {
        row["colluding"]: row["epsilon"] for row in found["rows"] if row["epsilon"] is not None
    }
    numbers, values = list(known), list(known.values())
    panel.plot(numbers, values, "o-", color=LIGHT["client"], markersize=3.5, linewidth=1.3)
    top, right = max([*values, 1e-9]), max([*numbers, 1])
    panel.set_ylim(0, 1.18 * top)
    panel.set_xlim(-0.03 * right, 1.04 * right)
    if (agreed := found["agreed"]) in known:
        _mark(panel, agreed, f"agreed: {known[agreed]:.2f}", "ink", right)
    if found["rows"][-1]["colluding"] in known:
        panel.text(numbers[-1], 1.05 * values[-1], f"own share: {values[-1]:.2f}", ha="right",
                   fontsize=8, color=LIGHT["client"])  # fmt: skip
    panel.locator_params(axis="x", integer=True)
    panel.set_xlabel("devices that collude with the server")
    panel.set_ylabel("epsilon of a person")
    return drawn


def gains_per_user(
    gains: Sequence[float], mean: float, interval: Sequence[float] | None, unit: str
) -> "Figure":
    """Draw one bar a user, sorted, with the mean and its interval.

    The hurt ones have their own colour.

    Args:
        gains: positive where the person is better off, in `unit`; any order, at least one.
        mean, interval: the mean gain and its [low, high]; None: one user cannot give one.
        unit: what a gain is counted in.
    """
    drawn, (panel,) = figure(2.7)
    ordered = sorted(gains, reverse=True)
    colours = [LIGHT["hurt"] if gain < 0 else LIGHT["gain"] for gain in ordered]
    panel.bar(range(1, len(ordered) + 1), ordered, width=0.86, color=colours, linewidth=0)
    ends = interval or (mean, mean)
    panel.axhspan(ends[0], ends[1], color=LIGHT["ink"], alpha=0.16, linewidth=0)
    panel.axhline(mean, color=LIGHT["ink"], linewidth=1)
    panel.axhline(0, color=LIGHT["muted"], linewidth=0.8)
    hurt = sum(gain < 0 for gain in ordered)
    room = max(abs(max(ordered)), abs(min(ordered)), abs(ends[1]), 1e-12)
    panel.text(
        len(ordered) + 0.6, max(mean, ends[1]) + 0.04 * room,
        f"mean {mean:+.3f} [{ends[0]:+.3f}, {ends[1]:+.3f}]",
        ha="right", fontsize=8.5, color=LIGHT["ink"],
    )  # fmt: skip
    if hurt:
        height = ordered[-1] if ordered[-1] < -0.3 * room else -0.09 * room
        panel.text(
            len(ordered) - hurt, height, f"{hurt} of {len(ordered)} hurt ", ha="right",
            va="top" if height > ordered[-1] else "bottom", fontsize=8.5, color=LIGHT["hurt"],
        )  # fmt: skip
    panel.set_xlim(0.3, len(ordered) + 0.7)
    panel.set_xlabel("people, sorted by gain")
    panel.set_ylabel(f"gain, {unit}")
    panel.locator_params(axis="x", integer=True)
    return drawn


def differences(rows: Sequence[tuple[str, float, Sequence[float] | None]], unit: str) -> "Figure":
    """Means with their intervals around zero: right of the line is an effect that exists.

    Args:
        rows: (what is compared, mean, [low, high]), drawn from top to bottom.
        unit: what the differences are counted in.
    """
    drawn, (panel,) = figure(0.75 + 0.52 * max(1, len(rows)))
    panel.axvline(0, color=LIGHT["muted"], linewidth=0.8)
    for row, (name, mean, interval) in enumerate(rows):
        low, high = interval or (mean, mean)
        colour = LIGHT["hurt"] if mean < 0 else LIGHT["gain"]
        panel.plot([low, high], [-row, -row], color=colour, linewidth=2.2)
        panel.plot([mean], [-row], "o", color=colour, markersize=6)
        label = panel.text(
            0.0, -row + 0.24, f"{name}: {mean:+.3f}", fontsize=8.5, color=LIGHT["ink"],
            transform=panel.get_yaxis_transform(),
            bbox={"facecolor": LIGHT["ground"], "edgecolor": "none", "pad": 0.8},
        )  # fmt: skip
        label.set_in_layout(False)
    panel.set_ylim(-len(rows) + 0.6, 0.7)
    panel.set_yticks([])
    panel.spines["left"].set_visible(False)
    panel.set_xlabel(f"difference, {unit}")
    return drawn


def over_rounds(
    series: Sequence[tuple[str, str, Sequence[tuple[int, float, float]]]], along: str = "round"
) -> "Figure":
    """Draw means over rounds with bands of two standard deviations, one panel for each kind.

    Args:
        series: (panel, name, [(round, mean, standard deviation)]); names stand at the curve's end.
        along: what the numbers count.
    """
    kinds = list(dict.fromkeys(panel for panel, _, _ in series))
    drawn, panels = figure(0.5 + 1.35 * len(kinds), len(kinds))
    rounds = [number for _, _, points in series for number, _, _ in points] or [1]
    first, last = min(rounds), max(rounds)
    width = max(1, last - first)
    for panel, kind in zip(panels, kinds, strict=True):
        curves = [(name, points) for each, name, points in series if each == kind and points]
        ends = [_band(panel, index, points) for index, (_, points) in enumerate(curves)]
        bottom, top = panel.get_ylim()
        order = sorted(range(len(ends)), key=lambda index: ends[index][0])
        heights = _apart([ends[index][0] for index in order], 0.2 * (top - bottom))
        for index, height in zip(order, heights, strict=True):
            panel.text(last + 0.06 * width, height, curves[index][0], fontsize=8, va="center",
                       color=ends[index][1])  # fmt: skip
        panel.set_xlim(first - 0.08 * width, last + 0.75 * width)
        panel.set_title(kind, loc="left", fontsize=9, color=LIGHT["ink"])
        if not curves:
            panel.text(0.02, 0.5, "lost in the noise", fontsize=8.5, color=LIGHT["muted"],
                       transform=panel.transAxes)  # fmt: skip
    panels[-1].set_xticks(sorted({first, last, *_middle(first, last)}))
    panels[-1].set_xlabel(along)
    return drawn


def _band(
    panel: "Axes", index: int, points: Sequence[tuple[int, float, float]]
) -> tuple[float, str]:
    """Draw one curve with its band, and return the height and the colour of its end."""
    numbers, means, spreads = (list(column) for column in zip(*points, strict=True))
    colour = LIGHT[("client", "gain", "hurt", "example")[index % 4]]
    low, high = ([m + side * s for m, s in zip(means, spreads, strict=True)] for side in (-2, 2))
    if len(numbers) > 1:
        panel.fill_between(numbers, low, high, color=colour, alpha=0.18, linewidth=0)
    panel.errorbar(numbers, means, [2 * s for s in spreads], fmt="o-", markersize=3.5,
                   color=colour, linewidth=1.3, elinewidth=0.8)  # fmt: skip
    return means[-1], colour


def _middle(first: int, last: int) -> list[int]:
    return [(first + last) // 2] if last - first > 1 else []


def _line_label(line: LineFacts) -> str:
    """What a line is about, its conditions below it: `client-level, against the analyst`."""
    name = f"{line['unit']}-level, against the {line['against']}"
    return f"{name}\n(if: {condition(line)})" if condition(line) else name


def svg(drawn: "Figure", name: str, alt: str) -> Markup:
    """A figure as an `<svg>` element to put into HTML, coloured by the page's style sheet.

    Args:
        drawn: the figure.
        name: prefix of all ids, so that pictures of one page do not share any.
        alt: what the picture shows, for people who do not see it; escaped here.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        drawn.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r"(font: [^;\"]*?px) [^;\"]*", r"\1 system-ui, sans-serif", text)
    for colour, code in LIGHT.items():
        text = text.replace(code, f"var(--{colour})")
    opening = (
        f'role="img" aria-label="{escape(alt)}" xmlns="http://www.w3.org/2000/svg" '
        'xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    tag = re.compile(r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>")
    return Markup(tag.sub(lambda found: f"<svg {found[1]} {opening}", text, count=1))


def alone(drawn: "Figure", name: str, alt: str) -> str:
    """A figure as the text of an SVG file, which has no style sheet to take colours from.

    Args: as for `svg`.
    """
    text = str(svg(drawn, name, alt))
    for colour, code in LIGHT.items():
        text = text.replace(f"var(--{colour})", code)
    return text + "\n"


def _plain(panel: "Axes") -> None:
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        panel.spines[side].set_color(LIGHT["grid"])
    panel.tick_params(labelsize=8.5, colors=LIGHT["muted"], length=3, color=LIGHT["grid"])
    for axis in (panel.xaxis, panel.yaxis):
        axis.label.set(fontsize=9, color=LIGHT["ink"])


def _histogram(values: Sequence[float], right: float) -> tuple[list[float], list[int], float]:
    """One bar for each distinct value where they are few, else bins: (positions, counts, width)."""
    distinct = sorted({round(value, 6) for value in values})
    if len(distinct) <= MANY:
        rounded = [round(value, 6) for value in values]
        return distinct, [rounded.count(value) for value in distinct], 0.018 * right
    bins = 40
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, int(value / right * bins))] += 1
    return [(index + 0.5) * right / bins for index in range(bins)], counts, 0.9 * right / bins


def _mark(
    panel: "Axes", where: float, text: str, colour: str, right: float, low: bool = False
) -> None:
    """A vertical mark with its label on the side that has room."""
    style = (0, (1, 2)) if low else "-"
    panel.axvline(where, color=LIGHT[colour], linewidth=0.9, linestyle=style)
    side = "right" if where > 0.6 * right else "left"
    height = 0.62 if low else 0.86
    shift = -0.008 * right if side == "right" else 0.008 * right
    panel.text(
        where + shift, height, text, ha=side, fontsize=8, color=LIGHT[colour],
        transform=panel.get_xaxis_transform(),
    )  # fmt: skip


def _apart(values: Sequence[float], gap: float) -> list[float]:
    """Move values up as little as needed so that labels at them do not overlap."""
    apart = list(values)
    for below, above in itertools.pairwise(sorted(range(len(apart)), key=apart.__getitem__)):
        apart[above] = max(apart[above], apart[below] + gap)
    return apart
