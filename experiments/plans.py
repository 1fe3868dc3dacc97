"""A run on real devices, seen from its server: what its rounds cost a device at most.

The ledgers are on the devices, and stay there. The server has the public plan of every round,
written down before anybody was asked (`plans.jsonl`), and counts of who was asked, who came and
who declined (`rounds.jsonl`).

**Guarantee**: what a device's own ledger holds of this run composes, line by line, to at most the
figure here. A device answers a plan only if it is in no way laxer than its owner allows, at most
once a round, and charges it as `client/release.py` does, which is what is composed here over all
rounds, void and unfinished ones too.
"""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..client.release import charges
from ..common.accounting import Charge
from ..common.config import Config, read
from ..common.errors import ProtocolError, StateError
from ..common.files import read_lines
from ..common.plan import Plan
from ..server.rounds import LOG, PLANS
from . import claims
from .privacy import History, facts_of

__all__ = ["device_facts", "device_measured"]

ANY = "a device that released in every round"


def device_facts(run_folder: Path) -> dict[str, Any]:
    """The content of `privacy.json` of a run on real devices; it may still be under way.

    As of a simulation, but of one device that released in every round; `devices` says so in
    sentences, `clients` and `histories` are empty, and `rounds` has the counts.

    Raises:
        StateError: a file is missing, damaged, of another run, or lacks a round's plan.
    """
    config = read(run_folder / "config.toml")
    plans, records = _plans(run_folder), read_lines(run_folder / LOG)
    _refuse_gaps(run_folder, plans, records)
    costs = [(plan.round, charges(plan, size, config.privacy)) for plan, size in plans]
    facts = _of(config, costs)
    void = {record["round"] for record in records if record["void"]}
    fewer = _of(config, [cost for cost in costs if cost[0] not in void]) if void else None
    declined = sum(record["declined"] for record in records)
    return {
        **facts,
        "clients": [],
        "histories": [],
        "rounds": _rounds(facts["rounds"], records),
        "mechanisms": [{**row, "releases": None} for row in facts["mechanisms"]],
        "declined": {"a reason that stays on the device": declined} if declined else {},
        "devices": {
            "enrolled": config.data.clients,
            "sentences": _sentences(len(facts["rounds"]), len(void), fewer),
        },
    }


def device_measured(run_folder: Path) -> dict[str, Any]:
    """What the server can know of `summary.MEASURED`; the devices' time and memory are theirs."""
    plans = _plans(run_folder)
    plan, dimension = plans[-1] if plans else (None, None)
    upload = None
    if plan is not None and dimension is not None:
        upload = -(-plan.length(dimension) * plan.bits // 8)
    seconds = sum(record.get("seconds", 0.0) for record in read_lines(run_folder / LOG))
    return {
        "seconds": {"rounds": seconds},
        "upload_bytes_per_client_round": upload,
        "dimension": dimension,
        "versions": {"python": platform.python_version(), "privet": version("privet")},
    }


def _of(config: Config, costs: Sequence[tuple[int, tuple[Charge, ...]]]) -> dict[str, Any]:
    return facts_of(config, [History(ANY, tuple(costs))] if costs else [])


def _plans(run_folder: Path) -> list[tuple[Plan, int]]:
    """Plans with the adapter's dimension, in the order of their announcement."""
    path = run_folder / PLANS
    run = (run_folder / "run-id").read_text("utf-8").strip()
    found = []
    for number, line in enumerate(read_lines(path), 1):
        try:
            plan, size = Plan.from_dict(line["plan"]), line["dimension"]
        except (ProtocolError, TypeError, KeyError) as error:
            raise StateError(
                f"line {number} of {path} holds no plan ({error}); restore it from a copy, or read "
                "the report that this run's privet wrote"
            ) from None
        if plan.run != run or not isinstance(size, int):
            raise StateError(
                f"line {number} of {path} is of the run {plan.run!r}, expected {run!r}; restore "
                "the file from a copy"
            )
        found.append((plan, size))
    return found


def _refuse_gaps(
    run_folder: Path, plans: Sequence[tuple[Plan, int]], records: Sequence[Mapping[str, Any]]
) -> None:
    """A figure over fewer rounds than there were would be too small."""
    missing = sorted({record["round"] for record in records} - {plan.round for plan, _ in plans})
    if missing:
        raise StateError(
            f"{run_folder / PLANS} lacks the plan of round {missing[0]}, so what it cost is not "
            "known; restore the file from a copy"
        )


def _rounds(
    rows: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Each announced round: who was asked, who came, who declined, in numbers."""
    ended = {record["round"]: record for record in records}
    counts = ("asked", "answered", "declined", "refused", "void")
    return [
        {
            **row,
            "released": ended.get(row["round"], {}).get("answered", 0),
            **{name: ended.get(row["round"], {}).get(name) for name in counts},
        }
        for row in rows
    ]


def _sentences(rounds: int, void: int, fewer: Mapping[str, Any] | None) -> list[str]:
    said = [
        "The largest epsilon that a device can have spent on this run, had it released in "
        f"{'the one round' if rounds == 1 else f'every one of {rounds} rounds'}: from the rounds' "
        "public plans, which were written down before anybody was asked.",
        "What a device has really spent, over all runs, is in its own ledger, which never leaves "
        "it: `privet client budget` shows it there.",
    ]
    if fewer is not None:
        without = ", ".join(
            f"{line['epsilon']:.2f} ({claims.line_name(line)})" for line in fewer["lines"]
        )
        said.insert(
            1,
            f"{void} of the rounds {'was' if void == 1 else 'were'} void: no sum was opened, but "
            "what a device had released by then stays spent, and is counted. A device that "
            f"released in the others only has spent at most {without or 'nothing'}.",
        )
    return said if rounds else said[-1:]
