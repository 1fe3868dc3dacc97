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
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from ...client.privacy.collusion import Release, completed, epsilon_or_estimate, known, table
from ...client.privacy.ledger import Declined, Row, verify
from ...client.privacy.run_ledger import LEDGERS, run_id, run_ledger
from ...common.errors import PrivacyError, ProtocolError, StateError
from ...common.files import read_lines
from ...common.privacy.accounting import Charge, epsilon
from ...common.privacy.mechanism import mechanism_of
from ...common.privacy.release_facts import Asked
from ...common.privacy.round_plan import Plan
from ...common.settings.config import Config, read
from ...server.rounds import PLANS
from . import claims
from .facts import (
    ClientFacts,
    Colluding,
    ColludingRow,
    CrossCheck,
    HistoryFacts,
    LineFacts,
    MechanismFacts,
    PrivacyFacts,
    RoundFacts,
)
from .second_accountant import cross_check

__all__ = ["History", "facts_of", "history_of", "privacy_facts", "reasons"]


@dataclass(frozen=True)
class History:
    """What one client released, oldest first: `releases` are (round, charges).

    `asked` has what each was asked with; None, or nothing at all, where that is not known.
    """

    client: str
    releases: tuple[tuple[int, tuple[Charge, ...]], ...]
    asked: tuple[Asked | None, ...] = ()


def privacy_facts(run_folder: Path) -> PrivacyFacts:
    """Compute the content of `privacy.json` from a run folder's ledgers.

    The run may still be under way.

    Raises:
        StateError: the folder has no settings or no ledgers; says which command makes them.
        LedgerCorrupt: a ledger does not verify; no figure is given.
    """
    settings = run_folder / "config.toml"
    for path in (settings, run_folder / LEDGERS, run_folder / "run-id"):
        if not path.is_file():
            raise StateError(
                f"{path} is missing, so there is nothing to report; `privet simulate` makes a run "
                "folder, and `privet report` takes its path"
            )
    config = read(settings)
    histories, declined = _read_ledgers(run_folder)
    return facts_of(config, histories, declined)


def facts_of(
    config: Config, histories: Sequence[History], declined: Sequence[Declined] = ()
) -> PrivacyFacts:
    """The facts of a run: what was promised, what each client released, and where it declined."""
    histories = [_completed(history) for history in histories]
    spent = {history.client: history for history in histories}
    names = sorted({*spent, *(one.client for one in declined)})
    totals = {name: _charges(spent.get(name)) for name in names}
    delta = config.privacy.delta
    lines, unbounded = _split_lines(histories, totals.values(), delta)
    run = _Run(config, spent, totals, lines, claims.noise_at(config, lines))
    described = [_describe(line, run) for line in lines]
    uncounted = run.at == "distributed" and not _count_own_share(histories)
    if uncounted:
        unbounded = [line for line in unbounded if line[:2] != claims.OWN_SHARE]
    return {
        "schema": 1,
        "run": config.name,
        "private": config.insecure_test_seed is None,
        "noise_at": run.at,
        "delta": delta,
        "problems": claims.problems(config, described),
        "warnings": [text for text in config.warnings() if "insecure_test_seed" not in text],
        "promised": claims.promised(config),
        "lines": described,
        "no_claim": [
            *claims.no_claims(config, lines, unbounded, bool(histories)),
            *([claims.NOT_COUNTED] if uncounted else []),
        ],
        "clients": _clients(run, declined),
        "histories": _distinct(run),
        "rounds": _rounds(run),
        "mechanisms": _mechanisms(totals, config),
        "declined": reasons(declined),
        "not_covered": claims.not_covered(config),
        "adversaries": list(claims.ADVERSARIES),
        "devices": None,
    }


def _count_own_share(histories: Sequence[History]) -> bool:
    """Whether every release was charged for its own noise; an older privet did not do so."""
    return all(
        any(charge.line[:2] == claims.OWN_SHARE for charge in charges)
        for history in histories
        for _, charges in history.releases
    )


@dataclass(frozen=True)
class _Run:
    """What the clients of a run released, and on which lines that is a claim.

    Attributes:
        spent: the history of every client that released something.
        totals: all charges of every client, also of one that only declined.
        at: who added the release's noise.
    """

    config: Config
    spent: Mapping[str, History]
    totals: Mapping[str, tuple[Charge, ...]]
    lines: Sequence[claims.Line]
    at: str | None

    @property
    def delta(self) -> float:
        return self.config.privacy.delta

    def epsilon(self, line: claims.Line, charges: tuple[Charge, ...]) -> float:
        """Compute the epsilon of some charges on one line."""
        return _epsilon(line.of(charges), self.delta)

    def epsilons(self, charges: tuple[Charge, ...]) -> dict[str, float]:
        """Compute the epsilon of some charges on every line, by the line's key."""
        return {line.key: self.epsilon(line, charges) for line in self.lines}

    def participations(self, client: str) -> int:
        """Return how often a client released something."""
        return len(self.spent[client].releases) if client in self.spent else 0


def _read_ledgers(folder: Path) -> tuple[list[History], list[Declined]]:
    run = run_id(folder)
    verify(folder / LEDGERS, run)
    with run_ledger(folder, run) as ledger:
        asked = {**_announced(folder), **known(ledger.plans())}
        rows = {name: ledger.rows(name) for name in ledger.clients()}
        return [history_of(name, rows[name], asked) for name in rows], ledger.declined()


def history_of(client: str, rows: Sequence[Row], asked: Mapping[str, Asked]) -> History:
    """What a ledger says of a client, with the plans of its releases as far as they are known."""
    releases = tuple((row.round, row.charges) for row in rows)
    return History(client, releases, tuple(asked.get(row.plan) for row in rows))


def _announced(folder: Path) -> dict[str, Asked]:
    """Read the plans that the server wrote down.

    They are all there is beside a ledger of an older privet.
    """
    announced: dict[str, Asked] = {}
    for line in read_lines(folder / PLANS):
        with suppress(ProtocolError, TypeError, KeyError):
            plan = Plan.from_dict(line["plan"])
            announced[plan.digest] = Asked(plan, int(line["dimension"]))
    return announced


def _completed(history: History) -> History:
    """Add to a history what an older privet did not charge, where the plan is known."""
    asked = history.asked or (None,) * len(history.releases)
    releases = tuple(
        (number, completed(charges, one))
        for (number, charges), one in zip(history.releases, asked, strict=True)
    )
    return History(history.client, releases, asked)


def _colluding(line: claims.Line, run: _Run) -> Colluding | None:
    """Compute the epsilon by number of colluding devices.

    Only the client-level line against the server under masks has it.
    """
    if run.at != "distributed" or line[:2] != ("client", "server"):
        return None
    made: dict[tuple[tuple[Charge, ...], int], Release] = {}
    every = [
        [
            made.setdefault((charges, id(asked)), Release(charges, asked))
            for (_, charges), asked in zip(history.releases, history.asked, strict=True)
        ]
        for history in run.spent.values()
    ]
    agreed = run.config.colluders
    rows: list[ColludingRow] = [
        {"colluding": row["colluding"], "epsilon": row["epsilon"], "bound": row["bound"]}
        for row in table(every, line.adjacency, run.delta, agreed)
    ]
    return {"agreed": agreed, "enrolled": run.config.data.clients, "rows": rows} if rows else None


def _charges(history: History | None) -> tuple[Charge, ...]:
    releases = history.releases if history else ()
    return tuple(charge for _, charges in releases for charge in charges)


def _split_lines(
    histories: Sequence[History], totals: Iterable[tuple[Charge, ...]], delta: float
) -> tuple[list[claims.Line], list[claims.Line]]:
    """All lines of the ledgers: those that are claims, and those that are not.

    A line is a claim when every client's total is finite and every release of every client was
    charged on it: a release that was not counted against somebody does not hold against them.
    """
    charged = {charges for history in histories for _, charges in history.releases}
    distinct = set(totals)
    found = {claims.Line(*charge.line) for charges in charged for charge in charges}
    sound = {
        line
        for line in found
        if all(line.of(charges) for charges in charged)
        and all(math.isfinite(_epsilon(line.of(charges), delta)) for charges in distinct)
    }
    ordered = sorted(found)
    return [x for x in ordered if x in sound], [x for x in ordered if x not in sound]


def _epsilon(charges: tuple[Charge, ...], delta: float) -> float:
    """Compute the epsilon of one line.

    What is left if masking is broken is shown also where it is no bound.
    """
    if not charges:
        return 0.0
    if charges[0].line[:2] == claims.OWN_SHARE:
        found, _ = epsilon_or_estimate(charges, delta)
        return math.inf if found is None else found
    return epsilon(charges, delta)


def _describe(line: claims.Line, run: _Run) -> LineFacts:
    config, at, delta = run.config, run.at, run.delta
    worst = max(run.spent, key=lambda name: (run.epsilon(line, run.totals[name]), _backwards(name)))
    charges = line.of(run.totals[worst])
    value = _epsilon(charges, delta)
    by_device = at in ("device", "distributed") or all(map(claims.from_training, charges))
    bound = math.isfinite(epsilon(charges, delta))
    holds = claims.holds_against(config, by_device) if bound else ()
    return {
        "key": line.key,
        "unit": line.unit,
        "against": line.against,
        "epsilon": value,
        "bound": bound,
        "delta": delta,
        "adjacency": line.adjacency,
        "adjacency_means": claims.ADJACENCY[line.unit][line.adjacency],
        "noise_at": _place(at, by_device, charges),
        "conditions": claims.conditions_of(config, line, charges, at),
        "budget": claims.budget_of(config, line),
        "client": worst,
        "participations_max": max(
            sum(bool(line.of(charges)) for _, charges in history.releases)
            for history in run.spent.values()
        ),
        "holds_against": list(holds),
        "does_not_hold_against": [who for who in claims.ADVERSARIES if who not in holds],
        "assumptions": claims.assumptions(config, charges, by_device, at),
        "noise_counted": claims.noise_counted(config, at, charges, claims.alone(config, line, at)),
        "amplified": None,
        "amplified_note": claims.NO_AMPLIFICATION,
        "cross_check": _checked(
            value, charges if bound else [replace(c, distance=0.0) for c in charges], delta
        ),
        "colluding": _colluding(line, run),
    }


def _place(at: str | None, by_device: bool, charges: Sequence[Charge]) -> str:
    """Where the noise that a line counts is added."""
    if all(map(claims.from_training, charges)):
        return "device"
    return str(at) if by_device else "server"


def _backwards(name: str) -> tuple[int, ...]:
    """Return a key that orders names downwards, so that of equals the first is the worst client."""
    return tuple(-ord(letter) for letter in name)


def _checked(value: float, charges: Sequence[Charge], delta: float) -> CrossCheck:
    """Compare an epsilon with that of a second accountant.

    Without one, `epsilon` is None and nothing agrees.
    """
    try:
        accountant, second = cross_check(charges, delta)
    except PrivacyError as reason:
        return {"accountant": str(reason), "epsilon": None, "difference": None, "agrees": False}
    difference = abs(second - value) / max(value, 1e-12)
    agrees = difference <= claims.AGREEMENT
    return {"accountant": accountant, "epsilon": second, "difference": difference, "agrees": agrees}


def _clients(run: _Run, declined: Sequence[Declined]) -> list[ClientFacts]:
    refusals = Counter(one.client for one in declined)
    return [
        {
            "client": name,
            "participations": run.participations(name),
            "declined": refusals[name],
            "epsilon": run.epsilons(charges),
        }
        for name, charges in run.totals.items()
    ]


def _distinct(run: _Run) -> list[HistoryFacts]:
    """Group clients with equal charges, most spent first, so that the table stays short."""
    groups: dict[tuple[Charge, ...], list[str]] = defaultdict(list)
    for name, charges in run.totals.items():
        groups[charges].append(name)
    rows: list[HistoryFacts] = [
        {
            "participations": run.participations(names[0]),
            "clients": len(names),
            "epsilon": run.epsilons(charges),
        }
        for charges, names in groups.items()
    ]
    return sorted(rows, key=lambda row: [-value for value in row["epsilon"].values()])


def _rounds(run: _Run) -> list[RoundFacts]:
    """The worst client's epsilon after each round that somebody released in."""
    by_round: dict[int, list[tuple[str, tuple[Charge, ...]]]] = defaultdict(list)
    for history in run.spent.values():
        for number, charges in history.releases:
            by_round[number].append((history.client, charges))
    so_far: dict[str, tuple[Charge, ...]] = defaultdict(tuple)
    worst = {line.key: 0.0 for line in run.lines}
    rows: list[RoundFacts] = []
    for number, released in sorted(by_round.items()):
        for client, charges in released:
            so_far[client] += charges
        fresh = {so_far[client] for client, _ in released}
        for line in run.lines:
            worst[line.key] = max(worst[line.key], *(run.epsilon(line, one) for one in fresh))
        rows.append({"round": number, "released": len(released), "epsilon": dict(worst)})
    return rows


def _mechanisms(totals: Mapping[str, tuple[Charge, ...]], config: Config) -> list[MechanismFacts]:
    delta = config.privacy.delta
    release = f"{mechanism_of(config.privacy.client).name} on the release"
    if config.statistics.enabled:
        release = "adapter and statistics as one"

    def name(charge: Charge) -> str:
        if claims.from_training(charge):
            return "DP-SGD steps (Opacus)"
        return "gains and A/B outcomes" if claims.measured(charge, line_of(charge)) else release

    def line_of(charge: Charge) -> list[Charge]:
        return [other for other in every if other.against == charge.against]

    every = Counter(charge for charges in totals.values() for charge in charges)
    most = Counter[Charge]()
    for charges in set(totals.values()):
        most |= Counter(charges)
    ordered = sorted(every, key=lambda c: (c.unit, c.against, c.noise_multiplier))
    return [
        {
            "mechanism": name(charge),
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
    """Return None in place of infinity, which JSON lacks. None says that there is no bound."""
    return value if math.isfinite(value) else None


def reasons(declined: Sequence[Declined]) -> dict[str, int]:
    """Count the reasons for declining.

    Names of clients are taken out, so that equal reasons are one.
    """
    texts = (one.reason.replace(repr(one.client), "a device") for one in declined)
    return dict(Counter(" ".join(text.split()) for text in texts).most_common())
