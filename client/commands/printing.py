"""How the commands of `client/commands/client.py` print: tables, JSON, sentences.

**Guarantee**: names that come from a server or a disk are printed as text that a terminal does not
obey.
"""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from ...common.privacy.accounting import Charge
    from ..enrolled.pinned_directory import DirectoryFacts
    from ..import_texts.watched_folders import Scanned
    from ..privacy.collusion import ColludingRow
    from ..privacy.ledger import Row
    from ..privacy.spending import Colluding, Spending, SpentLine, WithMasks
    from ..store.device_store import Sent
    from .device_status import DeviceFacts, RunFacts

__all__ = [
    "OfferFacts",
    "budget",
    "directory",
    "dump",
    "line",
    "offer",
    "outbox",
    "progress",
    "runs",
    "say",
    "scan",
    "sent",
    "status",
    "table",
]

FEW = 12
"""Lines of a list that are shown without --all."""


def scan(scanned: "Scanned", every: bool, as_json: bool) -> None:
    """Print what a scan took and what it left out, with the reasons.

    `every`: all lines, however many there are.
    """
    if as_json:
        files = [{"path": p, "records": n, "notes": notes} for p, n, notes in scanned.found]
        ignored = [{"path": path, "reason": reason} for path, reason in scanned.ignored]
        counts = {name: getattr(scanned, name) for name in ("unchanged", "gone", "records")}
        dump({"files": files, "ignored": ignored, **counts})
        return
    shown = scanned.found if every else scanned.found[:FEW]
    if shown:
        table(("file", "records"), [(path, count) for path, count, _ in shown])
    if len(shown) < len(scanned.found):
        rest = scanned.found[len(shown) :]
        records = sum(count for _, count, _ in rest)
        print(f"… and {len(rest):,} more files with {records:,} records (--all shows them)")
    left_out = [(path, note) for path, _, notes in scanned.found for note in notes]
    _reasons("left out of a file", left_out, every)
    _reasons("ignored", scanned.ignored, every)
    print(
        f"{scanned.unchanged:,} files as they were; {scanned.gone:,} taken out; "
        f"{scanned.records:,} records in all"
    )


def _reasons(title: str, lines: Sequence[tuple[str, str]], every: bool) -> None:
    """Print a line for each path where they are few, else one for each reason."""
    if not lines:
        return
    if every or len(lines) <= FEW:
        table((title, "why"), lines)
        return
    groups: dict[str, list[str]] = {}
    for path, reason in lines:
        groups.setdefault(reason, []).append(path)
    largest = sorted(groups.items(), key=lambda group: -len(group[1]))
    rows = [(f"{len(paths):,}, such as {paths[0]}", why) for why, paths in largest[:FEW]]
    table((title, "why"), rows)
    if len(largest) > FEW:
        print(f"… and {len(largest) - FEW:,} more reasons (--all shows every line)")


@contextmanager
def progress() -> Iterator[Callable[[object], None]]:
    """Show how many files were looked at, where there is a terminal to see it."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console

    files = records = 0
    with Console(stderr=True).status("looking") as shown:

        def step(item: object) -> None:
            nonlocal files, records
            files, records = files + 1, records + len(getattr(item, "records", ()))
            shown.update(f"{files:,} files, {records:,} new records")

        yield step


def runs(every: "Sequence[RunFacts]", as_json: bool) -> None:
    """Print the runs that were offered, a line each."""
    if as_json:
        dump({"runs": every})
    elif not every:
        print("No run was offered to this device yet.")
    else:
        rows = [(run["run"], run["server"], _when(run["received"]), _word(run)) for run in every]
        table(("run", "server", "offered", ""), rows)
        print("In full, before you decide: privet client runs RUN")


def _word(run: "RunFacts") -> str:
    words = {"waits": "waits for your yes", "changed": "was changed: waits for another yes"}
    if run["agreed"] is None:
        return words.get(run["state"], run["state"])
    by = "you" if run["by"] == "owner" else "policy.toml"
    return f"agreed by {by}, {_when(run['agreed'])}"


class OfferFacts(TypedDict):
    """What a run asks for, what was changed in it since the yes, and the rounds left out."""

    asks: list[tuple[str, str]]
    changed: list[str]
    declined_rounds: list[tuple[int, str]]


def offer(facts: OfferFacts) -> None:
    """Print one run in full."""
    table(("", "what it asks for"), facts["asks"])
    if facts["changed"]:
        table(("changed since you agreed",), [(change,) for change in facts["changed"]])
    if facts["declined_rounds"]:
        table(("round", "not taken part in, because"), facts["declined_rounds"])


def status(facts: "DeviceFacts", as_json: bool) -> None:
    """Print the state of the device, a line for each thing."""
    if as_json:
        dump(facts)
        return
    for label, text in _lines(facts):
        print(f"{label:<9}{text}")


def _lines(facts: "DeviceFacts") -> Iterator[tuple[str, str]]:
    yield "home", facts["home"]
    insecure = " (WITHOUT TLS: a test)" if facts["insecure"] else ""
    yield "server", f"{facts['server']}{insecure}" if facts["server"] else "none joined"
    if facts["server"]:
        for text in _fleet(facts["directory"]):
            yield "fleet", text
    running = facts["worker"]
    yield (
        "worker",
        "not running (`privet client start`)" if running is None else f"process {running}",
    )
    link = facts["connection"]
    if link is not None:
        yield "link", link["sentence"]
        able = "takes part when it is asked" if link["ok"] else "cannot be asked: see above"
        yield "now", facts["not_now"] or able
    if not facts["sources"]:
        yield "records", "none (`privet client add PATH...`)"
    else:
        yield "records", f"{facts['records']:,} of {len(facts['sources'])} sources"
    for run in facts["runs"]:
        yield "run", f"{run['run']}: {_word(run)}"
    if not facts["runs"]:
        yield "run", "none was offered yet"
    yield "spent", f"{facts['releases']} releases; `privet client budget` has the epsilons"
    if facts["note"] is not None:
        yield "note", f"{_when(facts['note']['time'])}: {_plain(facts['note']['sentence'])}"


def _fleet(facts: "DirectoryFacts | None") -> Iterator[str]:
    """Say who the other devices are, who vouches for them, and what came last."""
    if facts is None:
        yield (
            "open: any device that the server shows may exist; against a server that invents some "
            "only this device's own share of the noise holds"
        )
        return
    if not facts["signed"]:
        yield f"{facts['enrolled']} devices, a list that nobody signed and that stays as it is"
        return
    if not facts["fleet"]:
        yield f"no directory has come yet; the first one under the key {facts['key']} is taken"
        return
    yield (
        f"{facts['fleet']}: {facts['enrolled']} devices, version {facts['version']}, signed by "
        f"{facts['key']}"
    )
    yield f"head {facts['head']}, to compare with other owners"
    if not facts["listed"]:
        yield "this device is not in it: send the operator its card (`privet client card`)"
    if facts["last"] is not None:
        yield f"{_when(facts['last'][0])}: {_plain(facts['last'][3])}"


def directory(facts: "DirectoryFacts", history: Sequence[tuple[float, int, str, str]]) -> None:
    """Print the signed directory and its history on this device."""
    for text in _fleet({**facts, "last": None}):
        print(text)
    if history:
        rows = [(_when(t), version, _plain(event)) for t, version, _, event in history]
        table(("when", "version held", "what"), rows)


def budget(facts: "Spending", as_json: bool) -> None:
    """Print what was spent, a line for each unit, adversary and adjacency, and what it rests on."""
    from ..consent.offer_description import ADJACENCY_WORDS, UNIT_WORDS

    if as_json:
        dump(facts)
        return
    rows = [
        (UNIT_WORDS[line["unit"]], against, epsilon, limit, line["releases"],
         f"{line['adjacency']}: {ADJACENCY_WORDS[line['adjacency']]}")
        for line in facts["lines"]
        for against, epsilon, limit in _figures(line)
    ]  # fmt: skip
    if not rows:
        allowed = ", ".join(
            f"{value:g} for {UNIT_WORDS[u]}" for u, value in facts["budget"].items()
        )
        print(f"Nothing was released, so nothing was spent. Allowed (epsilon): {allowed}.")
        return
    table(("hidden", "against", "epsilon", "of", "releases", "hidden is"), rows)
    print(
        f"delta = {facts['delta']:g}. However sure somebody was before that something hidden here "
        "is so, all that this device has released changes the odds by at most e to the power of "
        "epsilon, but for a chance of delta. A budget is for life; a release that would pass it "
        "is declined. It is that of this home: another device with your records, or a home begun "
        "after `forget`, has its own, and what is learnt of you adds up. What is left if the masks "
        "fail is limited by none for all your records together."
    )
    for sentence in _rests(facts):
        print(sentence)
    for line in facts["lines"]:
        if line["colluding"] is not None:
            _colluding(line["colluding"], line["with_masks"] is not None)


def _figures(line: "SpentLine") -> Iterator[tuple[str, str, str]]:
    """Yield the adversary, epsilon and limit of a claim, and of what masks would give beside it."""
    from ..consent.offer_description import ADVERSARY_WORDS

    against = ADVERSARY_WORDS[line["against"]]
    if line["with_masks"] is not None:
        counted = "this device's own share of the noise: no closed directory"
        if line["conditions"]:
            counted += f"; {line['alone']} of {line['releases']} releases"
        against += f" ({counted})"
    if line["conditions"]:
        against += f" (if: {'; '.join(line['conditions'])})"
    limit = "no limit" if line["budget"] is None else f"{line['budget']:g}"
    yield against, _bound(line) if line["known"] else "not known", limit
    if line["with_masks"] is not None:
        conditions = "; ".join(line["with_masks"]["conditions"])
        against = f"{ADVERSARY_WORDS[line['against']]}, only if: {conditions}"
        yield against, _bound(line["with_masks"]), "no claim"


def _rests(facts: "Spending") -> Iterator[str]:
    if any(line["with_masks"] for line in facts["lines"]):
        yield (
            "Without a closed directory a server may invent the other devices of a round; then the "
            "own share of the noise alone hides you, and that is what is counted. `privet "
            "client join --directory FILE`, with the operator's list, changes it for what comes."
        )
    if facts["older"]:
        yield (
            f"Of {facts['older']} releases, which an older privet wrote down without their plans, "
            "it is not known what is left if the masks fail."
        )


def _colluding(colluding: "Colluding", open_directory: bool) -> None:
    """Print epsilon by the number of devices that work with the server."""
    rows = colluding["rows"]
    notes = {
        rows[-1]["colluding"]: "this device's own share: the masks failed",
        colluding["agreed"]: "the number agreed to",
    }
    print(
        "\nIf devices work with the server, all your records together, epsilon against the server"
        + (" (only if nobody on the roster was invented):" if open_directory else ":")
    )
    table(
        ("devices", "epsilon", ""),
        [(row["colluding"], _bound(row), notes.get(row["colluding"], ""))
         for row in rows],
    )  # fmt: skip
    print(
        "The masks are built for at most the number agreed to; with more they may fail, and then "
        "the last row is what is left."
    )


def _bound(figure: "SpentLine | WithMasks | ColludingRow") -> str:
    """Write out an epsilon, and whether it is a bound.

    A share that hides too little for a bound is given what Gaussian noise would hide.
    """
    if figure["epsilon"] is None:
        return "no bound"
    epsilon = f"{figure['epsilon']:.3f}"
    return epsilon if figure.get("bound", True) else f"no bound (as Gaussian noise {epsilon})"


def outbox(every: "Sequence[tuple[Sent, int | None]]", as_json: bool) -> None:
    """Print what has left, a line each, with the number of its release."""
    if as_json:
        dump({"outbox": [{**asdict(sent), "release": release} for sent, release in every]})
    elif not every:
        print("Nothing has left this device.")
    else:
        rows = [
            (sent.seq, _when(sent.time), sent.server, sent.run, sent.round, sent.phase,
             f"{sent.bytes:,}", sent.sha256[:16], "" if release is None else release)
            for sent, release in every
        ]  # fmt: skip
        heads = ("no", "when", "to", "run", "round", "phase", "bytes", "SHA-256", "release")
        table(heads, rows)
        print("Without a release: keys, shares of masks and signatures, which say nothing of you.")


def sent(entry: "Sent", row: "Row | None", path: Path | None, as_json: bool) -> None:
    """Print one byte-string that left in full, with the release it belongs to."""
    charges = [] if row is None else [json.loads(charge.to_json()) for charge in row.charges]
    release = None if row is None else {"number": row.seq, "plan": row.plan, "charges": charges}
    if as_json:
        dump({**asdict(entry), "release": release, "payload": path and str(path)})
        return
    rows = [
        (name, _when(value) if name == "time" else value) for name, value in asdict(entry).items()
    ]
    if row is not None:
        rows += [("release", row.seq), ("plan", row.plan)]
        rows += [("cost", _cost(charge)) for charge in row.charges]
    table(("", ""), rows)
    if path is not None:
        print(f"{path} has its bytes")


def _cost(charge: "Charge") -> str:
    return (
        f"{charge.unit}-level, against the {charge.against} ({charge.adjacency}): noise multiplier "
        f"{charge.noise_multiplier:g}, sampling rate {charge.sampling_rate:g}, steps {charge.steps}"
    )


def say(as_json: bool, facts: Mapping[str, object], sentence: str) -> None:
    """Print a sentence, or the facts as JSON."""
    if as_json:
        dump(facts)
    else:
        print(sentence)


def dump(value: object) -> None:
    """Print a value as JSON on standard output."""
    print(json.dumps(value, indent=2, allow_nan=False))


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows in columns under `heads`.

    There is no box around them, so that they can be copied as text.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    columns = Table(box=None, pad_edge=False, show_header=any(heads))
    for head in heads:
        columns.add_column(head, overflow="fold")
    for row in rows:
        columns.add_row(*(Text(_plain(cell)) for cell in row))
    Console().print(columns)


def _plain(value: object) -> str:
    """Replace what a terminal would obey, because names may come from a server or a disk."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in str(value))


def _when(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M}"


def line(text: str) -> None:
    """Print one line at once, without waiting for a buffer.

    A full disk, where standard output is a file, does not stop the program.
    """
    with suppress(OSError):
        print(text, flush=True)
