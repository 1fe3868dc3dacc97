"""A run on real devices, seen from its server: what its rounds cost each device at most.

The ledgers are on the devices, and stay there. The server has the public plan of every round and
who was asked, written down beforehand (`plans.jsonl`), and counts of who came and who declined
(`rounds.jsonl`).

**Guarantee**: what a device's own ledger holds of this run composes, line by line, to at most the
figure here; against the server that of a device without a closed directory, which counts its own
share of the noise alone, to at most the figure against the unmasked server. A device answers a plan
only if it is in no way laxer than its owner allows, at most once a round, and charges it as
`client/privacy/gate.py` does; that is composed here over all rounds it was asked in, void and
unfinished ones too.
"""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ...client.privacy.gate import charges
from ...common.errors import ProtocolError, StateError
from ...common.files import read_lines
from ...common.privacy.release_facts import Asked
from ...common.privacy.round_plan import Plan
from ...common.settings.config import Config, of_run
from ...server.round_record import read_records
from ...server.rounds import PLANS
from . import claims
from .facts import Measured, PrivacyFacts, RoundFacts
from .privacy_facts import History, facts_of

__all__ = ["Announced", "device_facts", "device_measured", "histories"]


@dataclass(frozen=True)
class Announced:
    """A round's plan, the adapter's dimension, and the numbers of the devices that were asked."""

    plan: Plan
    dimension: int
    asked: tuple[int, ...]


def device_facts(run_folder: Path) -> PrivacyFacts:
    """Compute the content of `privacy.json` of a run on real devices.

    The run may still be under way.

    As of a simulation, for devices that released in every round they were asked in; `devices` says
    so in sentences, and `rounds` has the counts.

    Raises:
        StateError: a file is missing, damaged, of another run, or lacks a round's plan.
    """
    config = of_run(run_folder)
    rounds, records = _announced(run_folder), read_records(run_folder)
    _refuse_gaps(run_folder, rounds, records)
    facts = facts_of(config, histories(config, rounds))
    opened = {record["round"] for record in records if not record["void"]}
    void = {record["round"] for record in records} - opened  # asked again and opened: not void
    summed = histories(config, [one for one in rounds if one.plan.round not in void])
    declined = sum(record["declined"] for record in records)
    return {
        **facts,
        "rounds": _rounds(facts["rounds"], records),
        "mechanisms": [{**row, "releases": None} for row in facts["mechanisms"]],
        "declined": {"a reason that stays on the device": declined} if declined else {},
        "devices": {
            "enrolled": config.data.clients,
            "sentences": _sentences(len(void), facts_of(config, summed) if void else facts),
        },
    }


def histories(config: Config, rounds: Sequence[Announced]) -> list[History]:
    """What each device's ledger would hold, had it released in every round it was asked in."""
    plans = {(one.plan.round, one.plan.digest): one for one in rounds}
    costs = {key: charges(one.plan, one.dimension, config.privacy) for key, one in plans.items()}
    kept = {key: Asked(one.plan, one.dimension) for key, one in plans.items()}
    asked: dict[int, dict[tuple[int, str], None]] = {}
    for one in rounds:
        for number in one.asked:
            asked.setdefault(number, {})[one.plan.round, one.plan.digest] = None
    return [
        History(
            f"client {number}",
            tuple((key[0], costs[key]) for key in keys),
            tuple(kept[key] for key in keys),
        )
        for number, keys in sorted(asked.items())
    ]


def device_measured(run_folder: Path) -> Measured:
    """Return what the server can know of `summary.MEASURED`.

    The devices' time and memory are theirs.
    """
    rounds = _announced(run_folder)
    upload = dimension = None
    if rounds:
        plan, dimension = rounds[-1].plan, rounds[-1].dimension
        upload = -(-plan.length(dimension) * plan.bits // 8)
    seconds = sum(record.get("seconds", 0.0) for record in read_records(run_folder))
    return {
        "seconds": {"rounds": seconds},
        "upload_bytes_per_client_round": upload,
        "dimension": dimension,
        "versions": {"python": platform.python_version(), "privet": version("privet")},
    }


def _announced(run_folder: Path) -> list[Announced]:
    path = run_folder / PLANS
    run = (run_folder / "run-id").read_text("utf-8").strip()
    found = []
    for number, line in enumerate(read_lines(path), 1):
        try:
            one = Announced(Plan.from_dict(line["plan"]), line["dimension"], tuple(line["asked"]))
        except (ProtocolError, TypeError, KeyError) as error:
            raise StateError(
                f"line {number} of {path} holds no plan ({error}); restore it from a copy, or read "
                "the report that this run's privet wrote"
            ) from None
        if one.plan.run != run or not all(type(n) is int for n in (one.dimension, *one.asked)):
            raise StateError(
                f"line {number} of {path} is of the run {one.plan.run!r} or damaged, expected "
                f"{run!r}; restore the file from a copy"
            )
        found.append(one)
    return found


def _refuse_gaps(
    run_folder: Path, rounds: Sequence[Announced], records: Sequence[Mapping[str, Any]]
) -> None:
    """Refuse a run with rounds whose plan is missing.

    A figure over fewer rounds than there were would be too small.
    """
    missing = sorted({record["round"] for record in records} - {one.plan.round for one in rounds})
    if missing:
        raise StateError(
            f"{run_folder / PLANS} lacks the plan of round {missing[0]}, so what it cost is not "
            "known; restore the file from a copy"
        )


def _rounds(rows: Sequence[RoundFacts], records: Sequence[Mapping[str, Any]]) -> list[RoundFacts]:
    """Each announced round: who was asked, who came, who declined, in numbers."""
    ended = {record["round"]: record for record in records}
    found: list[RoundFacts] = []
    for row in rows:
        record = ended.get(row["round"], {})
        found.append(
            {
                **row,
                "released": record.get("answered", 0),
                "asked": record.get("asked"),
                "answered": record.get("answered"),
                "declined": record.get("declined"),
                "refused": record.get("refused"),
                "void": record.get("void"),
            }
        )
    return found


def _sentences(void: int, summed: PrivacyFacts) -> list[str]:
    said = [
        "The largest epsilon that a device can have spent on this run, had it released in every "
        "round it was asked in: from the rounds' public plans, which were written down beforehand."
    ]
    if any(line["conditions"] for line in summed["lines"]):
        said.append(
            "That is of devices that joined with the operator's closed directory. One that did not "
            "claims, against the server, its own share of the noise only: the figures against the "
            "unmasked server."
        )
    if void:
        figures = (f"{line['epsilon']:.2f} ({claims.line_name(line)})" for line in summed["lines"])
        said.append(
            f"{void} of the rounds {'was' if void == 1 else 'were'} void: no sum was opened, but "
            "what a device had released by then stays spent, and is counted. A device that "
            f"released in the others only has spent at most {', '.join(figures) or 'nothing'}."
        )
    return [
        *said,
        "What a device has really spent, over all runs, is in its own ledger, which never leaves "
        "it: `privet client budget` shows it there.",
    ]
