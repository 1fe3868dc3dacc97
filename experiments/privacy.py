"""What a run spent: the facts of `privacy.json`, computed from the ledgers.

The ledgers say what happened; the configuration is read for what was promised and for where noise
was added, never for how often somebody took part. One line is one (unit, adversary, adjacency):
the two units are never mixed, and every epsilon stands beside its delta.

**Guarantee**: a line's epsilon is the largest over all clients of the composition of everything
that client's ledger holds for the line, by `common.accounting`; the worst client's is computed a
second time by an independent accountant, and a difference above 2 % is said first of all. A ledger
that does not verify gives no facts at all.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..client.ledger import Declined, Ledger, verify
from ..common.accounting import Charge, epsilon
from ..common.config import Config, read
from ..common.errors import PrivacyError, StateError
from .accountants import cross_check

__all__ = ["History", "facts_of", "headline", "line_name", "privacy_facts"]

AGREEMENT = 0.02  # two accountants may differ by this fraction
ADVERSARIES = (
    "analyst",
    "colluding clients",
    "server, honest but curious",
    "server, malicious",
    "colluding clients with the server",
    "network",
    "thief",
)
ADJACENCY = {
    "client": {
        "add_remove": "all records of one person added or removed",
        "zero_out": "one person's contribution replaced by zero",
        "replace_one": "all records of one person replaced by others",
    },
    "example": {
        "add_remove": "one record of one person added or removed",
        "zero_out": "one record's share replaced by zero",
        "replace_one": "one record of one person replaced by another",
    },
}
NOT_COVERED = (
    "Hyper-parameter tuning: the figures are those of this run alone. Choosing the best of several "
    "runs on the same people costs more.",
    "The personal model's own output: it stays on the device, and what it says may repeat the "
    "person's own text.",
    "The evaluation figures below: in a simulation the experimenter reads them off the simulated "
    "people, without noise. They are no part of what the server sees.",
    "Whether a device took part: who was asked and how many answered is not hidden.",
    "Anything a person pastes elsewhere.",
    "Timing and other side channels.",
    "A thief with the device's disk: these figures say nothing about what is stored.",
)
NO_AMPLIFICATION = (
    "none is claimed: the server chooses who takes part, so every participation counts in full"
)


@dataclass(frozen=True)
class History:
    """What one client released, oldest first: `releases` are (round, charges)."""

    client: str
    releases: tuple[tuple[int, tuple[Charge, ...]], ...]


@dataclass(frozen=True)
class _Line:
    unit: str
    against: str
    adjacency: str

    @property
    def key(self) -> str:
        return f"{self.unit}/{self.against}"

    def of(self, charges: Iterable[Charge]) -> tuple[Charge, ...]:
        wanted = (self.unit, self.against, self.adjacency)
        return tuple(c for c in charges if (c.unit, c.against, c.adjacency) == wanted)


def privacy_facts(run_folder: Path) -> dict[str, Any]:
    """The content of `privacy.json`, from a run folder's ledgers; the run may still be under way.

    Raises:
        StateError: the folder has no settings or no ledgers; says which command makes them.
        LedgerCorrupt: a ledger does not verify; no figure is given.
    """
    settings, ledgers, run_id = (
        run_folder / name for name in ("config.toml", "ledgers.sqlite", "run-id")
    )
    for path in (settings, ledgers, run_id):
        if not path.is_file():
            raise StateError(
                f"{path} is missing, so there is nothing to report; `privet simulate` makes a run "
                "folder, and `privet report` takes its path"
            )
    config = read(settings)
    histories, declined = _read_ledgers(ledgers, run_id.read_text("utf-8").strip())
    return facts_of(config, histories, declined)


def facts_of(
    config: Config, histories: Sequence[History], declined: Sequence[Declined] = ()
) -> dict[str, Any]:
    """The facts of a run from what its clients released and declined.

    Args:
        config: the run's settings, for what was promised and where noise was added.
        histories: one for each client that released something.
        declined: the rounds in which a client released nothing.
    """
    delta = config.privacy.delta
    spent = {history.client: history for history in histories}
    names = sorted({*spent, *(one.client for one in declined)})
    totals = {name: _charges(spent.get(name)) for name in names}
    lines, unbounded = _split_lines(histories, delta)
    at = _noise_at(lines)
    described = [_describe(line, at, config, spent, totals) for line in lines]
    return {
        "schema": 1,
        "run": config.name,
        "private": config.insecure_test_seed is None,
        "noise_at": at,
        "delta": delta,
        "problems": _problems(config, described),
        "warnings": [text for text in config.warnings() if "insecure_test_seed" not in text],
        "promised": _promised(config),
        "lines": described,
        "no_claim": _no_claims(config, lines, unbounded, bool(histories)),
        "clients": _clients(names, spent, totals, lines, declined, delta),
        "histories": _distinct(totals, spent, lines, delta),
        "rounds": _rounds(histories, lines, delta),
        "mechanisms": _mechanisms(config, totals, delta),
        "declined": _reasons(declined),
        "not_covered": list(NOT_COVERED),
        "adversaries": list(ADVERSARIES),
    }


def headline(facts: Mapping[str, Any]) -> str:
    """The one sentence a privacy officer asks for; of the strongest client-level line if any."""
    line = main_line(facts)
    if not facts["private"]:
        return "Not private: a test seed was set; the figures say what real noise would have cost."
    if line is None:
        return "No privacy claim is made for this run."
    subject = "Each person" if line["unit"] == "client" else "Each record"
    return (
        f"{subject} is protected with epsilon = {line['epsilon']:.2f} at delta = "
        f"{line['delta']:g} ({line['unit']}-level, {line['adjacency']}: "
        f"{line['adjacency_means']}; noise added by the {line['noise_at']}) against "
        f"{_spoken(line['holds_against'])}."
    )


def main_line(facts: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The line that a report shows first: client-level, then whichever holds against most."""
    lines: Sequence[Mapping[str, Any]] = facts["lines"]
    if not lines:
        return None
    return max(
        lines,
        key=lambda line: (
            line["unit"] == "client",
            len(line["holds_against"]),
            line["against"] == "server",
        ),
    )


def line_name(line: Mapping[str, Any]) -> str:
    """What a line is about, in a few words: `client-level, against the analyst`."""
    return f"{line['unit']}-level, against the {line['against']}"


def _read_ledgers(path: Path, owner: str) -> tuple[list[History], list[Declined]]:
    verify(path, owner)
    with Ledger.open(path, owner=owner) as ledger:
        histories = [
            History(name, tuple((row.round, row.charges) for row in ledger.rows(name)))
            for name in ledger.clients()
        ]
        return histories, ledger.declined()


def _charges(history: History | None) -> tuple[Charge, ...]:
    releases = history.releases if history else ()
    return tuple(charge for _, charges in releases for charge in charges)


def _split_lines(histories: Sequence[History], delta: float) -> tuple[list[_Line], list[_Line]]:
    """All lines of the ledgers: those that are claims, and those that are not.

    A line is a claim when its epsilon is finite and every release of every client was charged on
    it: a release that was not counted against somebody does not hold against them.
    """
    charged = {charges for history in histories for _, charges in history.releases}
    found = {_Line(c.unit, c.against, c.adjacency) for charges in charged for c in charges}
    claims = {
        line
        for line in found
        if all(line.of(charges) for charges in charged)
        and all(math.isfinite(_epsilon(line.of(charges), delta)) for charges in charged)
    }
    ordered = sorted(found, key=lambda line: (line.unit, line.against, line.adjacency))
    return [x for x in ordered if x in claims], [x for x in ordered if x not in claims]


def _epsilon(charges: tuple[Charge, ...], delta: float) -> float:
    return epsilon(charges, delta) if charges else 0.0


def _noise_at(lines: Sequence[_Line]) -> str | None:
    """Who added the release's noise, as the ledgers say it; None where there is no such noise."""
    against = {line.against for line in lines if line.unit == "client"}
    if not against:
        return None
    return "device" if "server" in against else "server"


def _describe(
    line: _Line,
    at: str | None,
    config: Config,
    spent: Mapping[str, History],
    totals: Mapping[str, tuple[Charge, ...]],
) -> dict[str, Any]:
    delta = config.privacy.delta
    worst = max(spent, key=lambda name: (_epsilon(line.of(totals[name]), delta), _backwards(name)))
    charges = line.of(totals[worst])
    value = _epsilon(charges, delta)
    by_device = at == "device" or all(map(_from_training, charges))
    holds = _holds_against(config, by_device)
    return {
        "key": line.key,
        "unit": line.unit,
        "against": line.against,
        "epsilon": value,
        "delta": delta,
        "adjacency": line.adjacency,
        "adjacency_means": ADJACENCY[line.unit][line.adjacency],
        "noise_at": "device" if by_device else "server",
        "client": worst,
        "participations_max": max(_participations(line, history) for history in spent.values()),
        "holds_against": list(holds),
        "does_not_hold_against": [who for who in ADVERSARIES if who not in holds],
        "assumptions": _assumptions(config, charges, by_device),
        "noise_counted": _noise_counted(at, charges),
        "amplified": None,
        "amplified_note": NO_AMPLIFICATION,
        "cross_check": _checked(value, charges, delta),
    }


def _holds_against(config: Config, by_device: bool) -> tuple[str, ...]:
    """Noise from the device keeps everybody out but a thief; the server's only who is outside."""
    if config.insecure_test_seed is not None:
        return ()
    return ADVERSARIES[:-1] if by_device else ADVERSARIES[:2]


def _backwards(name: str) -> tuple[int, ...]:
    """Orders names downwards, so that of equals the first is the worst client."""
    return tuple(-ord(letter) for letter in name)


def _participations(line: _Line, history: History) -> int:
    return sum(bool(line.of(charges)) for _, charges in history.releases)


def _checked(value: float, charges: Sequence[Charge], delta: float) -> dict[str, Any]:
    """The second opinion; without one, `epsilon` is None and nothing agrees."""
    try:
        accountant, second = cross_check(charges, delta)
    except PrivacyError as reason:
        return {"accountant": str(reason), "epsilon": None, "difference": None, "agrees": False}
    difference = abs(second - value) / max(value, 1e-12)
    agrees = difference <= AGREEMENT
    return {"accountant": accountant, "epsilon": second, "difference": difference, "agrees": agrees}


def _from_training(charge: Charge) -> bool:
    """Whether a charge counts the noise inside training; a release's integer noise has a distance
    from the Gaussian one that its epsilon is computed with, training's has none."""
    return charge.unit == "example" and charge.distance == 0 == charge.ratio


def _noise_counted(at: str | None, charges: Sequence[Charge]) -> str:
    """A sentence on which noise a line rests on, from what the ledger says of it."""
    said = []
    for charge, times in Counter(charges).items():
        often = f"in {times} releases" if times > 1 else "in one release"
        steps = f", {charge.steps} steps each" if charge.steps > 1 else ""
        if _from_training(charge):
            what = (
                f"the Gaussian noise in each training step (DP-SGD, Opacus), {charge.noise_multiplier:.3g} "
                f"times the clip of one record, batches at the public rate {charge.sampling_rate:g}"
            )
        else:
            subject = "person" if charge.unit == "client" else "record"
            rate = f", record drawn at the public rate {charge.sampling_rate:g}"
            what = (
                f"the Skellam noise {_adder(at)}, {charge.noise_multiplier:.3g} times the most that one "
                f"{subject} can move it{rate if charge.sampling_rate < 1 else ''}"
            )
        said.append(f"{what} ({often}{steps})")
    return "; ".join(said)


def _adder(at: str | None) -> str:
    if at == "device":
        return "that each device adds in full to its own contribution"
    return "that the server adds to the sum"


def _assumptions(config: Config, charges: Sequence[Charge], by_device: bool) -> list[str]:
    training = [charge for charge in charges if _from_training(charge)]
    release = len(training) < len(charges)
    sampled = any(charge.sampling_rate < 1 for charge in charges)
    said = ["the person's device runs the privet that was installed, unchanged"]
    if not by_device:
        said.append("the server runs as written: it adds the noise, and publishes nothing else")
    if release:
        said.append("rounding and integer noise come from the operating system's CSPRNG")
    if training:
        said.append(
            "the noise inside training is floating-point Gaussian, seeded by the operating system: "
            "four draws for one (Holohan and Braghin 2021) make an attack on the low-order bits of "
            "floats (Mironov 2012) costly, and do not rule it out"
        )
    if sampled:
        said.append(
            f"records enter a batch independently, at the rate q = {config.sampling_rate:g}, a "
            "public constant, with draws that nobody else learns"
        )
    if release and any(charge.unit == "example" for charge in charges):
        said.append("one local step a round, so that one record moves the contribution by at most "
                    "learning rate x clip / batch size")  # fmt: skip
    said.append("clips and denominators are public constants; no count of records leaves a device")
    return said


def _promised(config: Config) -> dict[str, Any]:
    privacy = config.privacy
    budgets = {}
    if privacy.client.enabled:
        budgets["client"] = privacy.budget.client
    if privacy.example.enabled:
        budgets["example"] = privacy.budget.example
    return {"budgets": budgets, "delta": privacy.delta, "sentences": _promises(config, budgets)}


def _promises(config: Config, budgets: Mapping[str, float]) -> list[str]:
    client, example = config.privacy.client, config.privacy.example
    said = ["To each person: text, profile and personal head stay on the device."]
    if client.enabled:
        said.append(
            f"To each person: whatever leaves the device is clipped to norm {client.clip:g} first, "
            f"and Skellam noise of {client.noise_multiplier:g} times that clip is added "
            + ("by the device itself." if client.noise_at == "device" else "by the server, to "
               "the sum.")
        )  # fmt: skip
    if example.enabled:
        said.append(
            f"To each record: in training its gradient is clipped to norm {example.clip:g}, and "
            f"Gaussian noise of {example.noise_multiplier:g} times that clip is added in every "
            f"step (DP-SGD, Opacus), in random batches at the public rate {config.sampling_rate:g}."
        )
    if budgets:
        limits = " and ".join(f"{value:g} ({unit}-level)" for unit, value in budgets.items())
        said.append(
            f"Of each device: it writes down what it spends before it answers, and declines a "
            f"round that would bring its total above epsilon {limits}, at delta "
            f"{config.privacy.delta:g}."
        )
    return said


def _no_claims(
    config: Config, lines: Sequence[_Line], unbounded: Sequence[_Line], released: bool
) -> list[str]:
    said = []
    if not released:
        said.append("Nothing has been released yet, so nothing has been spent.")
    have = {line.unit for line in lines}
    for unit, what in (("client", "all records of a person"), ("example", "a single record")):
        if released and unit not in have:
            said.append(f"No {unit}-level claim is made: {what} is not protected by noise.")
    for line in unbounded:
        if line.unit in have:
            said.append(
                f"No {line.unit}-level claim is made against the {line.against}: the noise that "
                "party faces is zero."
            )
    seen_by_server = {line.unit for line in lines if line.against == "server"}
    if config.privacy.client.noise_at == "server" and "client" in have - seen_by_server:
        said.append(
            "No client-level claim is made against the server: noise is added by the server, so it "
            "reads each person's clipped contribution before the noise (masking is not built yet)."
        )
    return said


def _problems(config: Config, lines: Sequence[Mapping[str, Any]]) -> list[str]:
    said = []
    if config.insecure_test_seed is not None:
        said.append(
            "NOT PRIVATE: insecure_test_seed is set, so anybody can compute the noise again and "
            "take it away. The figures below hold for nobody."
        )
    said += [_disagreement(line) for line in lines if not line["cross_check"]["agrees"]]
    return said


def _disagreement(line: Mapping[str, Any]) -> str:
    check = line["cross_check"]
    if check["epsilon"] is None:
        return f"NOT CROSS-CHECKED, {line_name(line)}: {check['accountant']}"
    return (
        f"THE ACCOUNTANTS DISAGREE on {line_name(line)}: {line['epsilon']:.4g} and "
        f"{check['epsilon']:.4g} ({check['accountant']}), {check['difference']:.1%} apart; at most "
        f"{AGREEMENT:.0%} is allowed. Do not quote this figure."
    )


def _clients(
    names: Sequence[str],
    spent: Mapping[str, History],
    totals: Mapping[str, tuple[Charge, ...]],
    lines: Sequence[_Line],
    declined: Sequence[Declined],
    delta: float,
) -> list[dict[str, Any]]:
    refusals = Counter(one.client for one in declined)
    return [
        {
            "client": name,
            "participations": len(spent[name].releases) if name in spent else 0,
            "declined": refusals[name],
            "epsilon": {line.key: _epsilon(line.of(totals[name]), delta) for line in lines},
        }
        for name in names
    ]


def _distinct(
    totals: Mapping[str, tuple[Charge, ...]],
    spent: Mapping[str, History],
    lines: Sequence[_Line],
    delta: float,
) -> list[dict[str, Any]]:
    """Clients with equal charges together, most spent first: a table that stays short."""
    groups: dict[tuple[Charge, ...], list[str]] = defaultdict(list)
    for name, charges in totals.items():
        groups[charges].append(name)
    rows = [
        {
            "participations": len(spent[names[0]].releases) if names[0] in spent else 0,
            "clients": len(names),
            "epsilon": {line.key: _epsilon(line.of(charges), delta) for line in lines},
        }
        for charges, names in groups.items()
    ]
    return sorted(rows, key=lambda row: [-value for value in row["epsilon"].values()])


def _rounds(
    histories: Sequence[History], lines: Sequence[_Line], delta: float
) -> list[dict[str, Any]]:
    """The worst client's epsilon after each round that somebody released in."""
    by_round: dict[int, list[tuple[str, tuple[Charge, ...]]]] = defaultdict(list)
    for history in histories:
        for number, charges in history.releases:
            by_round[number].append((history.client, charges))
    so_far: dict[str, tuple[Charge, ...]] = defaultdict(tuple)
    worst = {line.key: 0.0 for line in lines}
    rows = []
    for number in sorted(by_round):
        for client, charges in by_round[number]:
            so_far[client] += charges
        fresh = {so_far[client] for client, _ in by_round[number]}
        for line in lines:
            most = max(_epsilon(line.of(charges), delta) for charges in fresh)
            worst[line.key] = max(worst[line.key], most)
        released = len(by_round[number])
        rows.append({"round": number, "released": released, "epsilon": dict(worst)})
    return rows


def _mechanisms(
    config: Config, totals: Mapping[str, Sequence[Charge]], delta: float
) -> list[dict[str, Any]]:
    every = Counter(charge for charges in totals.values() for charge in charges)
    most = Counter[Charge]()
    for charges in set(totals.values()):
        most |= Counter(charges)
    ordered = sorted(every, key=lambda c: (c.unit, c.against, c.noise_multiplier))
    return [
        {
            "mechanism": "DP-SGD steps (Opacus)"
            if _from_training(charge)
            else "Skellam noise on the release",
            "unit": charge.unit,
            "against": charge.against,
            "adjacency": charge.adjacency,
            "noise_multiplier": charge.noise_multiplier,
            "sampling_rate": charge.sampling_rate,
            "steps": charge.steps,
            "releases": every[charge],
            "per_client_max": most[charge],
            "epsilon_once": _finite(_epsilon((charge,), delta)),
        }
        for charge in ordered
    ]


def _finite(value: float) -> float | None:
    """JSON has no infinity; None says that there is no bound."""
    return value if math.isfinite(value) else None


def _reasons(declined: Sequence[Declined]) -> dict[str, int]:
    """Reasons with their counts; names of clients taken out, so that equal reasons are one."""
    texts = (one.reason.replace(repr(one.client), "a device") for one in declined)
    return dict(Counter(" ".join(text.split()) for text in texts).most_common())


def _spoken(names: Sequence[str]) -> str:
    known = {
        "analyst": "an analyst who sees everything published",
        "server, honest but curious": "an honest but curious server",
        "server, malicious": "a malicious server",
        "network": "whoever reads the network",
    }
    said = [known.get(name, name) for name in names]
    return said[0] if len(said) == 1 else f"{', '.join(said[:-1])} and {said[-1]}"
