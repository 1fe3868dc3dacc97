"""Rounds under masking: the sum is the unmasked one, over the survivors, once, or there is none.

The devices run in this process, each with the state it kept, as `client/app.py` keeps it.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from privet.client.consent.policy import own_config
from privet.client.consent.policy_settings import Policy
from privet.client.device import _answer, exchange_at, masked_phase, take_part
from privet.client.privacy import masked_upload
from privet.client.privacy.gate import charges, release
from privet.client.privacy.ledger import Ledger
from privet.client.privacy.run_ledger import LEDGERS
from privet.client.simulated import SimulatedContext
from privet.common.errors import RunUnfinished
from privet.common.files import read_lines
from privet.common.privacy.accounting import Charge
from privet.common.privacy.encoding import rounded_sensitivity, unpack, unwrap
from privet.common.privacy.noise import TestSource
from privet.common.privacy.plan_maker import make_plan
from privet.common.privacy.round_plan import Plan
from privet.common.secure_aggregation.keys import Identity, Purpose, RoundKey, derive
from privet.common.secure_aggregation.keystream import add_masks
from privet.common.secure_aggregation.messages import decode_vector
from privet.common.secure_aggregation.shamir import combine
from privet.common.secure_aggregation.terms import Graph, MaskingPolicy, pair_seed
from privet.common.settings.config import Config, parse, read, to_toml
from privet.common.settings.sections import SimulationSettings
from privet.experiments import engine, protocol
from privet.experiments.engine import Loss
from privet.experiments.simulate import prepare
from privet.server import rounds, unmasking
from privet.server.rounds import Reply, masked_sum, run_rounds
from privet.server.run_folder import checkpoint

from ..served import served
from ..tiny import patiently, population, tiny_config

PHASES = ("keys", "shares", "vector", "confirm", "unmask")
EVERYBODY = tuple(range(12))
SMALLEST = 8  # 0.6 of 12, rounded up
Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def prepared(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config]:
    """A run folder of 12 devices, all asked in each of two rounds, before the first."""
    folder = tmp_path_factory.mktemp("masked")
    people = population(folder / "people", 16, 8)
    config = tiny_config(
        llama_folder,
        people,
        data={"clients": 12},
        rounds={"count": 2, "cohort": 12},
        privacy={"client": {"noise_at": "distributed"}},
    )
    return folder / "run", prepare(config, folder / "run", resume=False)


@pytest.fixture
def folder(prepared: tuple[Path, Config], tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared[0], tmp_path / "run"))


@pytest.fixture
def bench(folder: Path) -> SimulatedContext:
    return SimulatedContext.open(folder)


def without_seed(bench: SimulatedContext) -> SimulatedContext:
    config = bench.config.model_copy(update={"insecure_test_seed": None})
    return dataclasses.replace(bench, config=config)


def plan_of(bench: SimulatedContext, number: int = 1, **changes: Any) -> Plan:
    adapter = bench.trainer.adapter
    plan = make_plan(bench.config, bench.run, number, adapter.layout.digest, adapter.start)
    return dataclasses.replace(plan, **changes)


Lost = Mapping[tuple[str, Loss], Collection[int]]


@dataclass
class Devices:
    """Twelve devices and what each keeps; `lost` die before or after a phase."""

    bench: SimulatedContext
    lost: Lost = field(default_factory=dict)
    states: dict[int, masked_upload.State | None] = field(default_factory=dict)

    def ask(
        self, phase: str, messages: Mapping[int, bytes], plan: Plan, start: NDArray[np.float32]
    ) -> Iterator[Reply]:
        for number, message in messages.items():
            if number in self.lost.get((phase, "before"), ()):
                continue
            answer = self.phase(number, phase, plan, message, start)
            if number not in self.lost.get((phase, "after"), ()):
                yield Reply(number, answer)

    def phase(
        self, number: int, phase: str, plan: Plan, message: bytes = b"", start: Any = None
    ) -> bytes | None:
        device, state = self.bench.device(number), self.states.get(number)
        given = start if phase == "vector" else None
        self.states[number], sent = masked_phase(device, phase, plan, message, given, state)
        return sent


def serve(
    bench: SimulatedContext, config: Config, devices: Devices, folder: Path
) -> NDArray[np.float32]:
    run = dataclasses.replace(served(folder, config, devices.ask), id=bench.run)
    return run_rounds(run, exchange_at(bench))


def round_of(devices: Devices, plan: Plan) -> NDArray[np.uint32] | None:
    total, _, counts = masked_sum(devices.ask, EVERYBODY, plan, devices.bench.trainer.adapter.start)
    assert counts["refused"] == 0
    return total


def same(left: NDArray[np.uint32] | None, right: NDArray[np.uint32]) -> bool:
    return left is not None and left.tobytes() == right.tobytes()


def payload(bench: SimulatedContext, number: int, plan: Plan) -> NDArray[np.uint32] | None:
    """What a device's ledger says it let out in this round."""
    name = bench.device(number).name
    kept = bench.ledger.resend(name, plan.run, plan.round, plan.digest)
    return None if kept is None else unpack(kept, bench.trainer.adapter.layout.dimension, plan.bits)


def sum_of(bench: SimulatedContext, numbers: Collection[int], plan: Plan) -> NDArray[np.uint32]:
    found = [payload(bench, number, plan) for number in numbers]
    assert all(one is not None for one in found)
    total = np.sum(np.array(found, np.uint64), axis=0) % (1 << plan.bits)
    return np.asarray(total, np.uint32)


def releasing(bench: SimulatedContext, plan: Plan) -> set[int]:
    return {number for number in EVERYBODY if payload(bench, number, plan) is not None}


def reason(bench: SimulatedContext, number: int) -> str:
    (found,) = bench.ledger.declined(bench.device(number).name)
    return found.reason


def kept(folder: Path) -> checkpoint.Checkpoint:
    bench = SimulatedContext.open(folder)
    found = checkpoint.load(
        folder,
        run=bench.run,
        config_hash=bench.config.digest,
        layout=bench.trainer.adapter.layout.digest,
    )
    assert found is not None
    return found


# --- the sum -----------------------------------------------------------------------------------


def plain_sum(bench: SimulatedContext) -> Any:
    """`rounds._sum` without masks: the same contributions, added as they are."""

    def found(
        _: Any, cohort: Any, plan: Plan, adapter: NDArray[np.float32], *__: Any
    ) -> rounds.Summed:
        replies = (Reply(n, _answer(bench.device(n), plan, adapter)) for n in cohort)
        return rounds._collect(replies, plan, len(adapter), cohort, {})

    return found


def test_the_adapter_after_masked_rounds_is_that_of_the_unmasked_sums_bit_for_bit(
    prepared, folder, tmp_path, monkeypatch
):
    plain = Path(shutil.copytree(prepared[0], tmp_path / "plain"))
    engine.run("local", folder, prepared[1])
    masked, bench = kept(folder), SimulatedContext.open(folder)
    spent = {name: bench.ledger.charges(name) for name in bench.ledger.clients()}
    bench = SimulatedContext.open(plain)
    monkeypatch.setattr(rounds, "_sum", plain_sum(bench))
    start = bench.trainer.adapter.start
    serve(bench, prepared[1], Devices(bench), plain)
    assert masked.adapter.tobytes() == kept(plain).adapter.tobytes()
    assert masked.adapter.tobytes() != start.tobytes()
    assert spent == {name: bench.ledger.charges(name) for name in bench.ledger.clients()}
    assert [line["answered"] for line in read_lines(folder / "rounds.jsonl")] == [12, 12]


@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("phase", PHASES)
def test_lost_at_any_phase_the_sum_is_over_exactly_those_whose_vector_came(bench, phase, side):
    lost, plan = (3, 9), plan_of(bench)
    total = round_of(Devices(bench, {(phase, side): lost}), plan)
    vector_sent = PHASES.index(phase) > PHASES.index("vector")
    survivors = EVERYBODY if vector_sent else [n for n in EVERYBODY if n not in lost]
    assert same(total, sum_of(bench, survivors, plan))
    # who was lost while its vector was on the way has spent, and is not in the sum
    spent = vector_sent or (phase, side) == ("vector", "after")
    assert releasing(bench, plan) == set(EVERYBODY if spent else survivors)


@pytest.mark.parametrize("seed", [1, 3, 5])
def test_with_simulated_dropout_the_sum_is_over_the_survivors(prepared, folder, monkeypatch, seed):
    changes = {"simulation": {"dropout": 0.25}, "rounds": {"count": 1}, "data": {"seed": seed}}
    config = changed(prepared[1], **changes)
    (folder / "config.toml").write_text(to_toml(config))
    seen: list[Any] = []
    unmask = unmasking.unmask

    def watched(*given: Any) -> Any:
        seen.append((given[0].listed.dealt.cohort.terms, unmask(*given)))
        return seen[-1][1]

    monkeypatch.setattr(unmasking, "unmask", watched)
    engine.run("local", folder, config)
    bench = SimulatedContext.open(folder)
    plan = plan_of(bench)
    ((terms, outcome),) = seen
    assert terms == plan.terms(terms.dimension)
    assert SMALLEST <= len(outcome.survivors) < 12
    assert same(outcome.total, sum_of(bench, outcome.survivors, plan))
    (line,) = read_lines(folder / "rounds.jsonl")
    assert (line["void"], line["answered"]) == (False, len(outcome.survivors))


def test_dropout_works_too_where_nobody_adds_noise(prepared, folder):
    client = {"enabled": False, "noise_at": "distributed"}
    config = changed(
        prepared[1],
        privacy={"client": client},
        simulation={"dropout": 0.3},
        rounds={"count": 1},
    )
    (folder / "config.toml").write_text(to_toml(config))
    engine.run("local", folder, config)
    (line,) = read_lines(folder / "rounds.jsonl")
    assert line["void"] is False
    assert 6 <= line["answered"] < 12


def changed(config: Config, **sections: Any) -> Config:
    table = config.model_dump(mode="json", exclude_none=True)
    for name, values in sections.items():
        table[name] = {**table[name], **values} if isinstance(values, dict) else values
    return parse(table)


def test_below_the_smallest_sum_nothing_is_opened_and_what_was_spent_stays_spent(
    prepared, folder, monkeypatch
):
    bench, config = SimulatedContext.open(folder), changed(prepared[1], rounds={"patience": 1})
    devices = Devices(bench, {("vector", "after"): range(5)})
    for name in ("_noised_mean", "decode"):
        monkeypatch.setattr(rounds, name, None)
    monkeypatch.setattr(unmasking, "unmask", None)
    start = bench.trainer.adapter.start
    with pytest.raises(RunUnfinished, match=r"0 came of 8 needed; 5 no answer \[vector\]"):
        serve(bench, config, devices, folder)
    assert kept(folder).adapter.tobytes() == start.tobytes()
    (line,) = read_lines(folder / "rounds.jsonl")
    assert (line["void"], line["answered"]) == (True, 0)
    assert (line["spent"], line["again"]) == (True, False)
    assert releasing(bench, plan_of(bench)) == set(EVERYBODY)
    # nobody can be brought to give a share: no list was shown
    assert all(isinstance(devices.states[n], masked_upload.Masked) for n in EVERYBODY)


def test_void_before_anybody_was_asked_for_a_vector_nothing_is_spent_and_the_number_is_kept(
    prepared, folder
):
    bench, config = SimulatedContext.open(folder), changed(prepared[1], rounds={"patience": 2})
    devices = Devices(bench, {("keys", "before"): range(6)})
    start = bench.trainer.adapter.start
    with pytest.raises(RunUnfinished, match=r"6 no answer \[keys\]: 0, 1, .*nothing was spent"):
        serve(bench, config, devices, folder)
    lines = read_lines(folder / "rounds.jsonl")
    assert [(one["round"], one["spent"], one["again"]) for one in lines] == [(1, False, True)] * 2
    assert not bench.ledger.clients()
    devices.lost = {}
    found = serve(bench, config, devices, folder)
    assert [one["round"] for one in read_lines(folder / "rounds.jsonl")] == [1, 1, 1, 2]
    assert (folder / "attempts").read_text() == "4\n"
    assert found.tobytes() == kept(folder).adapter.tobytes() != start.tobytes()


def test_a_server_that_goes_on_numbering_gets_no_more_releases_than_the_owner_agreed_to(bench):
    """Void rounds use numbers up; what a device counts is its own releases."""
    most = bench.config.max_releases
    assert most == bench.config.rounds.count + bench.config.rounds.extra_releases == 4
    answered = [
        round_of(Devices(bench), plan_of(bench, number, attempt=number)) is not None
        for number in range(3, 9)
    ]
    assert answered == [True] * most + [False] * 2
    assert {bench.ledger.participations(bench.device(n).name) for n in EVERYBODY} == {most}
    assert "has made the 4 releases" in bench.ledger.declined(bench.device(0).name)[0].reason


def test_the_smallest_sum_is_opened_and_one_less_is_not(bench):
    plan = plan_of(bench)
    assert plan.survivors == SMALLEST
    found = round_of(Devices(bench, {("vector", "before"): range(4)}), plan)
    assert same(found, sum_of(bench, range(4, 12), plan))
    later = plan_of(bench, 2, attempt=2)
    assert round_of(Devices(bench, {("vector", "before"): range(5)}), later) is None


@pytest.mark.parametrize(
    ("quorum", "survivors", "smallest"), [(0.5, 0.6, 8), (0.9, 0.6, 11), (11 / 12, 0.6, 11)]
)
def test_no_sum_is_opened_that_the_quorum_would_then_call_void(
    prepared, folder, quorum, survivors, smallest
):
    sections = {"rounds": {"quorum": quorum}, "secure_aggregation": {"survivors": survivors}}
    config = changed(prepared[1], **sections)
    bench = dataclasses.replace(SimulatedContext.open(folder), config=config)
    plan = plan_of(bench)
    assert plan.survivors == config.min_sum == smallest
    assert smallest >= quorum * 12 - 1e-9
    plan.refuse_if_laxer(config)


# --- the noise ---------------------------------------------------------------------------------

SIZE = 20_000


def noise_in_smallest_sum(plan: Plan, config: Config, folder: Path) -> NDArray[np.int64]:
    """Twelve devices release zeros, four are lost; colluders take their own noise away again."""
    terms, honest = plan.terms(SIZE), plan.survivors - plan.colluders
    with Ledger.open(folder / "ledger.sqlite", owner="run") as ledger:
        payloads = {
            number: unpack(
                release(
                    np.zeros(SIZE, np.float32), "0" * 64, plan, str(number), ledger,
                    config.privacy, TestSource(1, f"device {number}"),
                ),
                SIZE,
                plan.bits,
            )
            for number in EVERYBODY
        }  # fmt: skip
    policy = MaskingPolicy()
    devices = {
        number: protocol.Device(number, Identity.create(os.urandom), policy) for number in EVERYBODY
    }
    outcome = protocol.run(terms, devices, payloads, {"training": range(plan.survivors, 12)})
    assert outcome.survivors == EVERYBODY[: plan.survivors]
    left = outcome.total.copy()
    for colluder in range(honest, plan.survivors):
        left -= payloads[colluder]
    return unwrap(left & np.uint32((1 << plan.bits) - 1), plan.bits)


def carries(noise: NDArray[np.int64], variance: float) -> bool:
    """Whether the noise has at least this variance; 5 deviations of the estimate."""
    return bool(np.var(noise) >= variance * (1 - 5 * (2 / noise.size) ** 0.5))


def test_the_smallest_sum_carries_the_declared_noise_without_the_colluders_shares(tmp_path):
    client = {"noise_at": "distributed", "noise_multiplier": 1.3}
    config = parse(
        {
            "data": {"clients": 12},
            "rounds": {"cohort": 12},
            "privacy": {"client": client, "example": {"enabled": False}},
        }
    )
    plan = make_plan(config, "run", 1, "0" * 64, np.zeros(SIZE, np.float32))
    declared = (1.3 * rounded_sensitivity(plan.clip, plan.step, SIZE)[0]) ** 2
    assert plan.counted_variance == pytest.approx(declared)
    noise = noise_in_smallest_sum(plan, config, tmp_path)
    assert carries(noise, declared)
    assert not carries(noise, declared * 3 / 2)  # two thirds of what was declared is noticed

    # shares sized for the whole cohort: too little when somebody is lost or colludes
    faulty = dataclasses.replace(plan, variance=declared / plan.cohort)
    (tmp_path / "faulty").mkdir()
    generous = config.model_copy(
        update={
            "privacy": config.privacy.model_copy(
                update={"budget": config.privacy.budget.model_copy(update={"client": 1e6})}
            )
        }
    )
    assert not carries(noise_in_smallest_sum(faulty, generous, tmp_path / "faulty"), declared)


def test_what_a_masked_release_costs_counts_the_honest_shares_of_the_smallest_sum(bench):
    plan, privacy = plan_of(bench), bench.config.privacy
    dimension = bench.trainer.adapter.layout.dimension
    assert (plan.survivors, plan.colluders) == (SMALLEST, 2)
    lines: dict[tuple[str, str], Charge] = {
        (c.unit, c.against): c for c in charges(plan, dimension, privacy)
    }
    assert sorted(lines) == [
        ("client", "analyst"),
        ("client", "server"),
        ("client", "unmasked server"),
        ("example", "analyst"),
        ("example", "server"),
        ("example", "unmasked server"),
    ]
    shares = (SMALLEST - 2) * plan.variance
    moved = rounded_sensitivity(plan.clip, plan.step, dimension)[0]
    for against in ("analyst", "server"):
        assert lines["client", against].noise_multiplier == pytest.approx(shares**0.5 / moved)
    assert lines["client", "server"].noise_multiplier == pytest.approx(
        privacy.client.noise_multiplier
    )
    assert lines["client", "unmasked server"].noise_multiplier == pytest.approx(
        plan.variance**0.5 / moved
    )
    one = min(plan.learning_rate * plan.record_clip / plan.batch_size, 2 * plan.clip)
    moved = rounded_sensitivity(one, plan.step, dimension)[0]
    for against in ("analyst", "server"):
        found = lines["example", against].noise_multiplier
        assert found == pytest.approx(max(shares**0.5 / moved, plan.record_noise))
    assert lines["example", "unmasked server"].noise_multiplier == plan.record_noise


def test_a_device_that_releases_writes_down_those_lines(bench):
    plan = plan_of(bench)
    round_of(Devices(bench), plan)
    cost = charges(plan, bench.trainer.adapter.layout.dimension, bench.config.privacy)
    assert all(bench.ledger.charges(bench.device(n).name) == cost for n in EVERYBODY)


# --- a server that asks for less ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (lambda p: {"survivors": 7, "variance": 2 * p.variance}, r"survivors \(own limit 8\)"),
        (lambda _: {"colluders": 1}, r"colluders \(own limit 2\)"),
        (lambda p: {"variance": 0.99 * p.variance}, r"noise \(own limit 1"),
        (lambda _: {"survivors": 7}, r"noise \(own limit 1"),
        (lambda p: {"cohort": 6, "survivors": 5, "colluders": 1, "variance": 2 * p.variance},
         r"cohort \(own limit 12\)"),
        (lambda _: {"clip": 1.1}, r"clip \(own limit 1.0\)"),
        (lambda p: {"noise_at": "device", "survivors": 0, "colluders": 0,
                    "variance": 9 * p.variance}, "the plan has no masks, phase 'keys' does"),
    ],
)  # fmt: skip
def test_a_plan_weaker_than_the_devices_own_settings_is_refused_by_the_field(bench, changes, named):
    plan = plan_of(bench)
    weaker = dataclasses.replace(plan, **changes(plan))
    assert Devices(bench).phase(0, "keys", weaker) is None
    assert re.search(named, reason(bench, 0))
    assert bench.ledger.clients() == []


def test_a_server_that_would_add_the_noise_itself_gets_nothing(bench):
    plan = plan_of(bench, noise_at="server", survivors=0, colluders=0)
    plan = dataclasses.replace(plan, variance=9 * plan.variance)
    start = bench.trainer.adapter.start
    assert take_part(bench.device(0), plan, start) is None
    assert "noise_at (own limit distributed)" in reason(bench, 0)
    assert bench.ledger.clients() == []


def test_a_masked_plan_asked_for_without_masks_gets_nothing(bench):
    """Or the server would read contributions with a sixth of the noise each."""
    start = bench.trainer.adapter.start
    assert take_part(bench.device(0), plan_of(bench), start) is None
    assert "leaves under masks only; the server asked for it without" in reason(bench, 0)
    assert bench.ledger.clients() == []


def test_a_roster_below_the_devices_own_smallest_cohort_is_refused_by_the_devices_themselves(bench):
    """The server asked twelve and names ten: enough for every other rule, too few for her."""
    own = bench.config.model_copy(
        update={
            "secure_aggregation": bench.config.secure_aggregation.model_copy(
                update={"min_cohort": 11}
            )
        }
    )
    for context, declined in ((dataclasses.replace(bench, config=own), True), (bench, False)):
        devices = Devices(context)
        plan = plan_of(bench, attempt=2 if declined else 3)
        terms = plan.terms(bench.trainer.adapter.layout.dimension)
        replies = {number: devices.phase(number, "keys", plan) for number in EVERYBODY[:10]}
        announced = {number: reply for number, reply in replies.items() if reply is not None}
        assert len(announced) == 10
        _, rosters, refused = unmasking.gather(terms, announced)
        assert not refused
        shares = [devices.phase(number, "shares", plan, rosters[number]) for number in rosters]
        assert len(shares) == 10
        assert all((one is None) == declined for one in shares)
    assert "10 participants, this device asks for at least 11" in reason(bench, 0)


def test_a_roster_larger_than_the_plans_cohort_is_refused(bench):
    """Of more participants the sum could wrap, and the mean's denominator would be too small."""
    config = bench.config.model_copy(
        update={"rounds": bench.config.rounds.model_copy(update={"cohort": 11})}
    )
    fewer = dataclasses.replace(bench, config=config)
    variance = 9 * plan_of(bench).variance
    plan = plan_of(bench, cohort=11, survivors=SMALLEST, variance=variance)
    assert round_of(Devices(fewer), plan) is None
    for number in EVERYBODY:
        assert "12 participants, the plan's cohort is 11" in reason(bench, number)
    assert bench.ledger.clients() == []


# --- a cohort smaller than the agreed one --------------------------------------------------------

BAD = (0, 1, 2, 3)
"""As many as the owners of `wary` reckon with: three tenths of twelve, rounded up."""


def wary(bench: SimulatedContext, **sections: Any) -> SimulatedContext:
    """The devices of owners who agreed to a cohort of twelve with four colluders; no test seed."""
    agreed: dict[str, Any] = {
        "rounds": {"cohort": 12},
        "secure_aggregation": {"colluding": 0.3, "min_cohort": 3},
    }
    for name, values in sections.items():
        agreed[name] = {**agreed.get(name, {}), **values}
    return without_seed(dataclasses.replace(bench, config=changed(bench.config, **agreed)))


def offered(bench: SimulatedContext, cohort: int, attempt: int = 1) -> Plan:
    """A plan that is right for a smaller cohort, of which one device colludes: its noise is whole.

    Of the agreed settings nothing but the cohort, and what follows from it, is different.
    """
    return plan_of(
        wary(bench, rounds={"cohort": cohort}, secure_aggregation={"colluding": 1}), attempt=attempt
    )


@pytest.mark.parametrize("cohort", [11, 10, 6, 4])
def test_a_device_announces_no_keys_for_a_cohort_smaller_than_the_agreed_one(bench, cohort):
    devices = Devices(wary(bench))
    for number in EVERYBODY:
        assert devices.phase(number, "keys", offered(bench, cohort)) is None
        assert "laxer than this device allows: cohort (own limit 12)" in reason(bench, number)
    assert bench.ledger.clients() == []


def test_of_the_agreed_cohort_no_sum_is_smaller_and_no_fewer_colluders_are_reckoned_with(bench):
    """The cohort as agreed, its noise whole, and one number below it."""
    devices, plan = Devices(wary(bench)), plan_of(wary(bench))
    assert (plan.survivors, plan.colluders) == (9, 4)
    total = plan.counted_variance
    for number, (survivors, colluders, named) in enumerate(
        (
            (8, 4, r"survivors (own limit 9)"),
            (5, 3, r"survivors (own limit 9)"),
            (9, 3, r"colluders (own limit 4)"),
            (9, 0, r"colluders (own limit 4)"),
            (12, 0, r"colluders (own limit 4)"),
            (9, 5, r"survivors less colluders (own limit 5)"),
            (12, 11, r"survivors less colluders (own limit 5)"),
        )
    ):
        weaker = dataclasses.replace(
            plan,
            survivors=survivors,
            colluders=colluders,
            variance=total / (survivors - colluders),
        )
        assert devices.phase(number, "keys", weaker) is None
        assert named in reason(bench, number)
    assert bench.ledger.clients() == []
    assert devices.phase(11, "keys", plan) is not None


@contextlib.contextmanager
def servers_word() -> Iterator[None]:
    """The old rule: what a device insists on follows from the cohort that the plan names."""

    def of_the_plan(config: Config, max_cohort: int) -> MaskingPolicy:
        of = changed(config, rounds={"cohort": max_cohort}, secure_aggregation={"colluding": 1})
        return agreed(of, max_cohort)

    agreed = MaskingPolicy.agreed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plan, "refuse_if_laxer", lambda *_: None)
        patch.setattr(MaskingPolicy, "agreed", of_the_plan)
        yield


def read_alone(devices: Devices, plan: Plan, roster: tuple[int, ...]) -> dict[int, bool]:
    """Who is read by the server and the colluders on the roster, once the vectors have come.

    Whether what is read is what the gate let out, by honest client.
    """
    terms = plan.terms(devices.bench.trainer.adapter.layout.dimension)
    start = devices.bench.trainer.adapter.start

    def all_of(phase: str, messages: Mapping[int, bytes]) -> dict[int, bytes]:
        replies = devices.ask(phase, messages, plan, start)
        return {one.client: one.payload for one in replies if one.payload is not None}

    its, out, _ = unmasking.gather(terms, all_of("keys", dict.fromkeys(roster, b"")))
    _, inboxes, _ = unmasking.relay(its, all_of("shares", out))
    held = {}
    for n in BAD:  # what a colluder is dealt
        state = devices.states[n]
        assert state is not None
        held[n] = masked_upload.receive(state, inboxes[n]).held
    vectors = all_of("vector", inboxes)
    found, threshold = {}, its.roster.graph.threshold
    assert threshold <= len(BAD)
    for number in sorted({*roster} - {*BAD}):
        at = its.places[number]
        seed, key = (
            combine({its.places[n] + 1: held[n][at][which] for n in BAD}, threshold)
            for which in (0, 1)
        )
        left = unpack(
            decode_vector(vectors[number], terms, number).packed, terms.dimension, terms.bits
        )
        agree = RoundKey.of(key.value).agreement()
        add_masks(left, [], [derive(seed, Purpose.SELF_MASK, its.digest)])
        for other in its.beside[at]:
            shared = agree(its.roster.entries[other].mask_key)
            pair = [pair_seed(shared, its.digest, at, other)]
            add_masks(left, *(([], pair) if at < other else (pair, [])))
        found[number] = same(left & np.uint32((1 << terms.bits) - 1),
                             sum_of(devices.bench, [number], plan))  # fmt: skip
    return found


def test_by_the_old_rule_the_allowed_colluders_read_each_honest_device_of_a_small_cohort(bench):
    """Four of a roster of six are a threshold of its shares."""
    devices, roster = Devices(wary(bench)), (*BAD, 7, 9)
    with servers_word():
        assert read_alone(devices, offered(bench, 6), roster) == {7: True, 9: True}
    assert bench.ledger.participations(bench.device(7).name) == 1
    again = offered(bench, 6, attempt=2)
    for number in roster:
        assert devices.phase(number, "keys", again) is None
        assert "cohort (own limit 12)" in reason(bench, number)


def test_the_policy_alone_refuses_the_small_cohort_too(bench, monkeypatch):
    """Were a plan not held to the offer at all: the masks themselves ask for the agreed numbers."""
    monkeypatch.setattr(Plan, "refuse_if_laxer", lambda *_: None)
    devices = Devices(wary(bench))
    assert devices.phase(7, "keys", offered(bench, 6)) is None
    assert "the terms have survivors = 4, this device asks for at least 9" in reason(bench, 7)
    assert bench.ledger.clients() == []


def test_under_the_agreed_plan_a_roster_of_six_is_not_dealt_shares(bench, monkeypatch):
    """The server keeps its word until the keys have come, and then names six of the twelve."""
    devices, plan = Devices(wary(bench)), plan_of(wary(bench))
    monkeypatch.setattr(unmasking, "_refuse_few", lambda *_: None)
    terms = plan.terms(bench.trainer.adapter.layout.dimension)
    sent = {n: devices.phase(n, "keys", plan) or b"" for n in (*BAD, 7, 9)}
    _, rosters, refused = unmasking.gather(terms, sent, sized=lambda _: Graph(5, 4))
    assert not refused
    assert devices.phase(9, "shares", plan, rosters[9]) is None
    assert "threshold 4 for 6 holders out of 6, this device asks for 6 to 6" in reason(bench, 9)


# --- a server that asks again ------------------------------------------------------------------


def test_a_round_that_was_answered_is_not_answered_again_and_the_ledger_says_so(bench):
    real = without_seed(bench)
    plan = plan_of(real)
    first = round_of(Devices(real, {("vector", "before"): (10, 11)}), plan)
    assert first is not None
    before = releasing(real, plan)
    assert round_of(Devices(real), dataclasses.replace(plan, attempt=2)) is None
    assert releasing(real, plan) == before == set(range(10))
    assert all("answered before; it is not answered again" in reason(real, n) for n in range(10))
    assert real.ledger.declined(real.device(10).name) == []


def test_the_last_check_before_the_masks_refuses_too(bench):
    """A device that answers between its keys and its vector, in another process say."""
    real = without_seed(bench)
    plan, devices = plan_of(real), Devices(real)
    out: dict[str, Any] = {}

    def held(phase: str, messages: Any, plan: Plan, start: Any) -> Iterator[Reply]:
        if phase == "vector":
            out.update(messages=dict(messages))
            return iter(())
        return devices.ask(phase, messages, plan, start)

    start = real.trainer.adapter.start
    assert masked_sum(held, EVERYBODY, plan, start)[0] is None
    _answer(real.device(0), plan, start)
    assert devices.phase(0, "vector", plan, out["messages"][0], start) is None
    assert "answered before" in reason(real, 0)
    assert devices.phase(1, "vector", plan, out["messages"][1], start) is not None


def test_with_a_test_seed_a_round_asked_again_gives_the_same_bits(bench):
    plan = plan_of(bench)
    first = round_of(Devices(bench, {("confirm", "before"): range(5)}), plan)
    assert first is None
    for attempt in (2, 3):
        again = round_of(Devices(bench), dataclasses.replace(plan, attempt=attempt))
        assert same(again, sum_of(bench, EVERYBODY, plan))
    assert {bench.ledger.participations(bench.device(n).name) for n in EVERYBODY} == {1}


def test_an_attempt_not_larger_than_the_last_is_refused_also_by_a_new_process(folder):
    bench = SimulatedContext.open(folder)
    assert Devices(bench).phase(0, "keys", plan_of(bench, attempt=3)) is not None
    bench.ledger.close()
    SimulatedContext.open.cache_clear()
    bench = SimulatedContext.open(folder)
    for attempt in (3, 2):
        assert Devices(bench).phase(0, "keys", plan_of(bench, attempt=attempt)) is None
        assert "this device has taken part in round 3 already" in reason(bench, 0)
    assert Devices(bench).phase(0, "keys", plan_of(bench, 2, attempt=3)) is None
    assert Devices(bench).phase(0, "keys", plan_of(bench, attempt=4)) is not None


def test_attempts_are_remembered_for_every_run(bench):
    ledger = bench.ledger
    assert [ledger.announce("ann", run, 5) for run in ("one", "two", "one", "two")] == [0, 0, 5, 5]
    assert ledger.announce("ann", "one", 2) == 5
    assert ledger.announce("ann", "one", 6) == 5


def until(bench: SimulatedContext, last: str, plan: Plan) -> tuple[Devices, dict[int, bytes]]:
    """Everybody through the phases before `last`, and the messages of `last`."""
    devices, out = Devices(bench), dict[int, bytes]()

    def stopping(phase: str, messages: Any, plan: Plan, start: Any) -> Iterator[Reply]:
        if phase == last:
            out.update(messages)
            return iter(())
        return devices.ask(phase, messages, plan, start)

    masked_sum(stopping, EVERYBODY, plan, bench.trainer.adapter.start)
    return devices, out


@pytest.mark.parametrize(
    "change",
    [
        {"clip": 0.5},
        {"variance": 1e6},
        {"local_steps": 1, "learning_rate": 0.5},
        {"round": 2},
        {"attempt": 2},
        {"survivors": 9},
        {"start": "0" * 64},
    ],
)
def test_a_phase_of_another_plan_than_the_announced_one_is_refused(bench, change):
    plan = plan_of(bench)
    devices, out = until(bench, "vector", plan)
    other = dataclasses.replace(plan, **change)
    assert devices.phase(0, "vector", other, out[0], bench.trainer.adapter.start) is None
    assert "no phase before 'vector' of this plan" in reason(bench, 0)
    assert bench.ledger.clients() == []
    # and it keeps nothing to go on with
    assert devices.phase(0, "vector", plan, out[0], bench.trainer.adapter.start) is None


def test_another_adapter_than_the_announced_one_is_refused_with_its_own_reason(bench):
    plan = plan_of(bench)
    devices, out = until(bench, "vector", plan)
    start = bench.trainer.adapter.start + np.float32(1)
    assert devices.phase(0, "vector", plan, out[0], start) is None
    assert "the adapter received is not the one announced" in reason(bench, 0)
    assert bench.ledger.clients() == []


ORDER = [(at, asked) for at in PHASES for asked in PHASES[1:] if asked != at]


@pytest.mark.parametrize(("at", "asked"), ORDER, ids=lambda name: str(name))
def test_a_phase_out_of_order_is_refused(bench, at, asked):
    plan = plan_of(bench)
    devices, out = until(bench, at, plan)
    start = bench.trainer.adapter.start
    assert devices.phase(0, asked, plan, out[0], start) is None
    assert bench.ledger.declined(bench.device(0).name)
    assert bench.ledger.participations(bench.device(0).name) == (at in ("confirm", "unmask"))


@pytest.mark.parametrize("phase", PHASES[1:])
def test_a_phase_happens_once(bench, phase):
    plan = plan_of(bench)
    devices, out = until(bench, phase, plan)
    start = bench.trainer.adapter.start
    assert devices.phase(0, phase, plan, out[0], start) is not None
    assert devices.phase(0, phase, plan, out[0], start) is None
    assert bench.ledger.participations(bench.device(0).name) == (phase not in ("shares",))


# --- killed ------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from privet.common.settings.config import read
from privet.experiments import engine

def dying(message, context):
    global left
    reply = told(message, context)
    if message.metadata.message_type == "train.vector":
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    return reply

told, engine.told = engine.told, dying
for folder, left in zip(sys.argv[1::2], map(int, sys.argv[2::2])):
    child = os.fork()
    if child == 0:
        engine.run("local", Path(folder), read(Path(folder, "config.toml")))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.fixture(scope="module")
def killed(
    prepared: tuple[Path, Config], tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Path]:
    """Runs killed after some vectors: in the second round with the seed; in the first without."""
    base = tmp_path_factory.mktemp("killed")
    moments = {"seeded": 12 + 5, "two": 2, "five": 5}
    folders = {name: Path(shutil.copytree(prepared[0], base / name)) for name in moments}
    for name in ("two", "five"):
        config = prepared[1].model_copy(update={"insecure_test_seed": None})
        (folders[name] / "config.toml").write_text(to_toml(config))
    arguments = [part for name in moments for part in (str(folders[name]), str(moments[name]))]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments],
        capture_output=True, text=True, timeout=1200,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    )  # fmt: skip
    assert done.stdout.split() == [str(-signal.SIGKILL)] * 3, done.stderr
    return folders


def resumed(folder: Path) -> list[dict[str, Any]]:
    engine.run("local", folder, read(folder / "config.toml"))
    return read_lines(folder / "rounds.jsonl")


def test_killed_in_a_masked_round_with_the_seed_a_run_ends_in_the_same_bits(
    prepared, folder, killed
):
    engine.run("local", folder, prepared[1])
    whole = kept(folder)
    assert len(read_lines(killed["seeded"] / "rounds.jsonl")) == 1
    resumed(killed["seeded"])
    assert kept(killed["seeded"]).adapter.tobytes() == whole.adapter.tobytes()
    assert (killed["seeded"] / "adapter" / "adapter_model.safetensors").read_bytes() == (
        folder / "adapter" / "adapter_model.safetensors"
    ).read_bytes()
    assert (killed["seeded"] / "attempts").read_text() == "3\n"


@pytest.mark.parametrize(("name", "answered", "void"), [("two", 10, False), ("five", 0, True)])
def test_killed_without_a_seed_nobody_releases_twice_in_a_round(killed, name, answered, void):
    first, *others = resumed(killed[name])
    assert (first["answered"], first["void"]) == (answered, void)
    # a process that ended may have asked for vectors: the number is used up
    assert first.get("again", False) is False
    rounds = [2, 3] if void else [2]
    assert [(one["round"], one["answered"], one["void"]) for one in others] == [
        (number, 12, False) for number in rounds
    ]
    owner = (killed[name] / "run-id").read_text().strip()
    with Ledger.open(killed[name] / LEDGERS, owner=owner) as ledger:
        released = [[row.round for row in ledger.rows(one)] for one in ledger.clients()]
        asked_again = [one for one in ledger.declined() if "answered before" in one.reason]
    # of the seven that were left when five had answered, none got as far as its vector
    spent_once = {"two": 0, "five": 7}[name]
    assert sorted(released) == sorted([[1, *rounds]] * (12 - spent_once) + [rounds] * spent_once)
    assert len(asked_again) == {"two": 2, "five": 5}[name]


# --- the same sums without keys and masks --------------------------------------------------------


def test_ideal_masking_gives_the_same_bits_and_charges_and_says_what_was_not_run(
    prepared, folder, tmp_path
):
    simulation = prepared[1].simulation.model_copy(update={"masking": "ideal"})
    config = prepared[1].model_copy(update={"simulation": simulation})
    ideal = Path(shutil.copytree(prepared[0], tmp_path / "ideal"))
    (ideal / "config.toml").write_text(to_toml(config))
    engine.run("local", folder, prepared[1])
    engine.run("local", ideal, config)
    assert kept(folder).adapter.tobytes() == kept(ideal).adapter.tobytes()
    charges = []
    for one in (folder, ideal):
        bench = SimulatedContext.open(one)
        charges.append({name: bench.ledger.charges(name) for name in bench.ledger.clients()})
    assert charges[0] == charges[1]
    assert any("was not run" in sentence for sentence in config.warnings())
    assert not any("was not run" in sentence for sentence in prepared[1].warnings())


def test_ideal_sums_below_the_smallest_accepted_one_are_void(bench):
    plan = plan_of(bench)
    simulation = SimulationSettings(masking="ideal")
    config = bench.config.model_copy(update={"simulation": simulation})
    ideal = dataclasses.replace(bench, config=config)
    payload = take_part(ideal.device(0), plan, bench.trainer.adapter.start)
    assert payload is not None
    for count in (SMALLEST - 1, SMALLEST):
        replies = [Reply(number, payload if number < count else None) for number in range(12)]
        run: Any = SimpleNamespace(config=config, ask=lambda *_: iter(replies))  # noqa: B023
        dimension = len(payload) * 8 // plan.bits
        total, came, _ = rounds._sum(
            run, range(12), plan, bench.trainer.adapter.start, dimension, {}
        )
        assert len(came) == count
        assert (total is None) == (count < SMALLEST)


def test_a_real_device_reads_nothing_of_what_simulated_ones_leave_out(bench):
    simulation = SimulationSettings(masking="ideal", dropout=0.5)
    config = bench.config.model_copy(update={"simulation": simulation})
    assert own_config(Policy(), config).simulation == SimulationSettings()


# --- the other engine --------------------------------------------------------------------------


def test_flowers_ray_engine_gives_the_same_bits_under_masking(prepared, folder, tmp_path, capfd):
    ray = Path(shutil.copytree(prepared[0], tmp_path / "ray"))
    engine.run("local", folder, prepared[1])
    capfd.readouterr()
    patiently(lambda: engine.run("ray", ray, prepared[1]), capfd.readouterr)
    told = capfd.readouterr().err.splitlines()
    assert [line[:9] for line in told] == ["round 1/2", "round 2/2"]  # and no word of Ray's
    assert kept(folder).adapter.tobytes() == kept(ray).adapter.tobytes()
    trained = [one / "adapter" / "adapter_model.safetensors" for one in (folder, ray)]
    assert trained[0].read_bytes() == trained[1].read_bytes()
    lines = [json.loads(line) for line in (ray / "rounds.jsonl").read_text().splitlines()]
    assert [line["answered"] for line in lines] == [12, 12]
    ledgers = []
    for one in (folder, ray):
        bench = SimulatedContext.open(one)
        ledgers.append({name: bench.ledger.charges(name) for name in bench.ledger.clients()})
    assert ledgers[0] == ledgers[1]
