"""`privet ab`: an A/B experiment on simulated devices, from outcomes to the server's intervals.

    people    a key, an outcome with a known truth, and a time from which there is one
    look      the server plans, each device passes the gate, the sum is decoded and told
    report    table, `ab.json`, `ab.svg`; what was spent is read from the devices' ledgers

Outcomes come in over the looks: at look k of K the first k / K of the devices have one, the others
release zeros. With `simulated.masks` the masking protocol runs; otherwise the vectors are added as
masks would have revealed them, and nothing else is used of them.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...client.ab_arm import arm_of
from ...client.ab_outcome import ArmOutcome, take_part
from ...client.privacy.collusion import known
from ...client.privacy.ledger import Ledger
from ...client.privacy.run_ledger import LEDGERS
from ...common.ab_test import AbTestSettings, run_settings
from ...common.errors import RoundVoid, RunExists, StateError
from ...common.files import append_line, explain_os_errors, read_lines, write_atomic
from ...common.files import write_json_atomic as write_json
from ...common.privacy import noise
from ...common.privacy.encoding import unpack
from ...common.privacy.round_plan import Plan
from ...common.secure_aggregation.keys import Directory, Identity
from ...common.secure_aggregation.terms import MaskingPolicy
from ...server.ab_estimates import estimated, look_plan, sums_of
from .. import progress, protocol
from ..reports import pictures
from ..reports.privacy_facts import facts_of, history_of

__all__ = ["People", "made_people", "outcomes", "run", "spent"]


@dataclass(frozen=True, eq=False)
class People:
    """Simulated people: their keys, their arms, their outcomes, and the look these came at."""

    identities: tuple[Identity, ...] = field(repr=False)
    arms: NDArray[np.int64]
    outcomes: NDArray[np.float64] = field(repr=False)
    since: NDArray[np.int64]

    def outcome(self, number: int, look: int) -> float | None:
        """What a person has to release at a look."""
        return float(self.outcomes[number]) if self.since[number] <= look else None


def made_people(settings: AbTestSettings, run_id: str, rng: np.random.Generator) -> People:
    """Make people with fresh keys.

    Their arms come from the keyed hash of the run, their outcomes from the made truth.
    """
    identities = tuple(Identity.create(secrets.token_bytes) for _ in range(settings.clients))
    arms = np.array([arm_of(one.seed, run_id, len(settings.arms)) for one in identities])
    places = np.arange(settings.clients)
    since = 1 + places * settings.looks // settings.clients
    return People(identities, arms, outcomes(settings, arms, rng), since)


def outcomes(
    settings: AbTestSettings, arms: NDArray[np.int64], rng: np.random.Generator
) -> NDArray[np.float64]:
    """Draw one outcome a person, shape (clients,), with the arm's made mean."""
    means = np.array(settings.simulated.means)[arms]
    if settings.outcome == "binary":
        return (rng.random(len(arms)) < means).astype(np.float64)
    # a two-sided Beta keeps both the mean and the bounds, which a clipped Gaussian would not
    width = settings.high - settings.low
    mean = np.clip((means - settings.low) / width, 1e-6, 1 - 1e-6)
    most = mean * (1 - mean)
    size = most / np.minimum((settings.simulated.spread / width) ** 2, 0.99 * most) - 1
    return settings.low + width * rng.beta(mean * size, (1 - mean) * size)


def run(settings: AbTestSettings, folder: Path) -> dict[str, Any]:
    """Run the experiment to its end, and return the content of `ab.json`.

    Raises:
        RunExists: the folder holds something.
        RoundVoid: too few devices answered a look: nothing is decoded, what was spent stays so.
    """
    if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        ended = (folder / "ab.json").exists() or not (folder / "run-id").exists()
        what = "a run already" if ended else "an experiment that did not end and cannot go on"
        raise RunExists(
            f"{folder} holds {what}; choose another `name`, or --out FOLDER, or remove it"
        )
    with explain_os_errors(folder, "make the run folder"):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    run_id = f"{settings.name}-{secrets.token_hex(8)}"
    write_atomic(folder / "run-id", f"{run_id}\n".encode())
    write_json(folder / "settings.json", settings.model_dump(mode="json"))
    rng = np.random.default_rng()
    people = made_people(settings, run_id, rng)
    with Ledger.open(folder / LEDGERS, owner=run_id) as ledger:
        for look in range(1, settings.looks + 1):
            plan = look_plan(settings, run_id, look)
            total, answered = _look(settings, plan, people, ledger, rng)
            record = estimated(sums_of(total, plan), plan, answered, settings)
            append_line(folder / "looks.jsonl", record)
            if settings.stop and any(one["found"] for one in record["differences"]):
                break
        privacy = spent(settings, ledger)
    facts = {
        "settings": settings.model_dump(mode="json"),
        "masks": "run"
        if settings.simulated.masks
        else "not run: vectors added as masks reveal them",
        "looks": read_lines(folder / "looks.jsonl"),
        "privacy": privacy,
    }
    write_json(folder / "ab.json", facts)
    write_atomic(folder / "ab.svg", _picture(facts).encode())
    return facts


def _look(
    settings: AbTestSettings, plan: Plan, people: People, ledger: Ledger, rng: np.random.Generator
) -> tuple[NDArray[np.uint32], int]:
    """Take one look: every device that is there passes the gate, and the results are summed.

    Returns the sum mod 2**bits, and of how many devices.

    The commit of each release is durable, so this takes some milliseconds a device.
    """
    length = len(settings.arms) * (2 if settings.outcome == "binary" else 3)
    there = rng.random(settings.clients) >= settings.simulated.dropout
    vectors: dict[int, NDArray[np.uint32]] = {}
    with progress.counting(f"look {plan.round}", int(there.sum()), "devices") as one:
        for number in map(int, np.flatnonzero(there)):
            given = ArmOutcome(
                f"device-{number}", int(people.arms[number]), people.outcome(number, plan.round)
            )
            payload = take_part(settings, plan, given, ledger, noise.SystemSource())
            if payload is not None:
                vectors[number] = unpack(payload, length, plan.bits)
            one()
    if settings.simulated.masks:
        return _unmasked(settings, plan, people, vectors)
    if len(vectors) < max(plan.survivors, 2):
        raise RoundVoid(
            f"look {plan.round}: {len(vectors)} devices answered, a sum needs {plan.survivors}; "
            "nothing is opened"
        )
    return np.sum(list(vectors.values()), axis=0, dtype=np.uint32), len(vectors)


def _unmasked(
    settings: AbTestSettings, plan: Plan, people: People, vectors: Mapping[int, NDArray[np.uint32]]
) -> tuple[NDArray[np.uint32], int]:
    """Run the masking protocol with every party (`experiments/protocol.py`)."""
    policy = MaskingPolicy.agreed(run_settings(settings), plan.cohort)
    known = {number: one.public for number, one in enumerate(people.identities)}
    devices = {
        number: protocol.Device(
            number, people.identities[number], policy, Directory(known, closed=True)
        )
        for number in vectors
    }
    dimension = len(next(iter(vectors.values()), ()))
    outcome = protocol.run(plan.terms(dimension), devices, vectors)
    return outcome.total, len(outcome.survivors)


def spent(settings: AbTestSettings, ledger: Ledger) -> list[dict[str, Any]]:
    """Return the worst device's epsilons, from the ledgers.

    Each has unit, adjacency, delta, where the noise is added, and against whom it holds.

    Raises:
        StateError: nothing was released.
    """
    asked = known(ledger.plans())
    histories = [history_of(name, ledger.rows(name), asked) for name in ledger.clients()]
    if not histories:
        raise StateError(
            f"no device released anything in {settings.name}; see its ledger's reasons"
        )
    lines: Sequence[Mapping[str, object]] = facts_of(run_settings(settings), histories)["lines"]
    shown = (
        "unit", "against", "adjacency", "adjacency_means", "epsilon", "delta", "noise_at",
        "participations_max", "noise_counted", "holds_against", "assumptions", "cross_check",
        "conditions", "colluding", "bound",
    )  # fmt: skip
    return [{name: line[name] for name in shown} for line in lines]


def _picture(facts: Mapping[str, Any]) -> str:
    """Draw the differences with the intervals that were printed, one row for each look and arm."""
    rows = [
        (
            f"look {look['look']}, {one['arm']} - {one['against']}",
            one["difference"],
            one["interval"],
        )
        for look in facts["looks"]
        for one in look["differences"]
        if one["difference"] is not None
    ]
    drawn = pictures.differences(rows, "outcome")
    alt = "; ".join(f"{name}: {value:+.3f}" for name, value, _ in rows) or "lost in the noise"
    return pictures.alone(drawn, "ab", alt)
