"""An A/B experiment on people's own devices: offered, agreed to, answered, paid for, told.

The server is `server/app.py` over a grid in memory, the devices are four homes with their vaults.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from privet.client.ab_arm import arm_of
from privet.client.enrolled import ab_assignment
from privet.client.enrolled.participant import EnrolledParticipant
from privet.client.privacy.gate import release
from privet.client.store import verdicts
from privet.client.store.device_store import ME, DeviceStore, Joined
from privet.client.store.key_file import Passphrase
from privet.common.ab_test import AbTestSettings, layout
from privet.common.errors import ConfigError, PrivacyError, ProtocolError, RunUnfinished, StateError
from privet.common.files import read_lines
from privet.common.privacy.accounting import epsilon
from privet.common.privacy.encoding import decode, rounded_sensitivity, unpack, unwrap
from privet.common.privacy.round_plan import Plan
from privet.common.secure_aggregation.keys import Directory
from privet.common.secure_aggregation.terms import MaskingPolicy, default_graph
from privet.common.settings.config import Config, to_toml
from privet.experiments.reports import report, terminal
from privet.server import ab_estimates, ab_rounds

from .test_participant import (
    PEOPLE,
    PHASES,
    RUN,
    SERVER,
    World,
    agree,
    allow,
    cheap,
    declined,
    everything_sent,
    hello,
    homes_of_four,
    keys,
    released_and_opened,
)

__all__ = ["cheap", "homes_of_four"]

EPSILON = 8.0


def experiment(**changes: Any) -> AbTestSettings:
    table: dict[str, Any] = {
        "name": "templates",
        "arms": ["memory", "notes"],
        "outcome": "bounded",
        "clients": PEOPLE,
        "privacy": {"epsilon": EPSILON},
        "secure_aggregation": {"min_cohort": 3, "colluding": 0.0},
        "devices": {
            "timeout_s": 0.5,
            "gather_s": 0.1,
            "answer_s": 30.0,
            "patience": 2,
            "wait_s": 0.01,
        },
    }
    return AbTestSettings.model_validate({**table, **changes})


def config_of(**changes: Any) -> Config:
    return ab_estimates.device_settings(experiment(**changes), PEOPLE)


def owners_who_agree(world: World, homes: list[DeviceStore]) -> None:
    for home in homes:
        allow(home, "min_noise = 1.0", "min_noise = 0.5")
        agree(home, world.config)


@pytest.fixture
def world(tmp_path: Path, homes_of_four: list[DeviceStore]) -> World:
    """Four devices whose owners have agreed to an experiment with two looks."""
    made = World(
        tmp_path / "run", config_of(looks=2), [EnrolledParticipant(home) for home in homes_of_four]
    )
    owners_who_agree(made, homes_of_four)
    return made


def judged(home: DeviceStore, *taken: bool, run: str = RUN) -> None:
    """Verdicts on answers of the arm."""
    verdicts.add(
        home,
        [verdicts.Verdict("accept" if one else "reject", "ba", "be", time=1.0, run=run, taken=one)
         for one in taken],
    )  # fmt: skip


def plan_of(config: Config, look: int = 1, **changes: Any) -> Plan:
    return dataclasses.replace(ab_estimates.plan_of(config, config.ab_test, RUN, look), **changes)


# --- a whole experiment --------------------------------------------------------------------------


def test_an_experiment_of_own_devices_gives_the_sum_of_what_their_gates_released(
    world: World, homes_of_four: list[DeviceStore], monkeypatch: pytest.MonkeyPatch
):
    judged(homes_of_four[0], True, True, True, False)
    judged(homes_of_four[1], False)
    judged(homes_of_four[2], True, run="another experiment")
    dimension = layout(world.config.ab_test).dimension
    shown, plan, total = released_and_opened(world, homes_of_four, dimension, monkeypatch)
    assert plan.length(dimension) == dimension
    sums = ab_estimates.sums_of(total, plan)
    assert shown[1]["look"] == ab_estimates.estimated(sums, plan, 4, world.config.ab_test)
    for home in homes_of_four:
        assert home.vault.names("adapters/") == home.vault.names("heads/") == []
        assert ab_assignment.current(home) is None  # it has ended, and so has the arm


def test_the_outcome_is_in_the_slots_of_the_own_arm_and_leaves_with_noise_only(
    world: World, homes_of_four: list[DeviceStore], monkeypatch: pytest.MonkeyPatch
):
    for home in homes_of_four:
        judged(home, True, True, True, False)
    homes_of_four[3].vault.put_all(dict.fromkeys(homes_of_four[3].vault.names("feedback/")))
    given: list[Any] = []

    def gate(vector: Any, *more: Any) -> bytes:
        left = release(vector, *more)
        given.append((vector, more[1], left))
        return left

    monkeypatch.setattr("privet.client.ab_outcome.release", gate)
    world.serve()
    assert len(given) == 2 * PEOPLE
    for home, (vector, plan, left) in zip(homes_of_four, given[:PEOPLE], strict=True):
        place = arm_of(home.identity.seed, RUN, 2)
        wanted = np.zeros((2, 3))
        if home is not homes_of_four[3]:
            wanted[place] = 1, 0.5, 0.25
        assert np.array_equal(vector.reshape(2, 3), wanted)
        noise = decode(unwrap(unpack(left, 6, plan.bits), plan.bits), plan.step) - vector
        assert np.abs(noise).min() > 0
        assert np.abs(noise).max() > plan.step


def test_every_look_is_in_the_ledger_and_all_together_cost_the_epsilon(
    world: World, homes_of_four: list[DeviceStore]
):
    world.serve()
    for home in homes_of_four:
        rows = home.ledger.rows(ME)
        assert [(row.run, row.round) for row in rows] == [(RUN, 1), (RUN, 2)]
        for against in ("analyst", "server"):
            spent = [one for row in rows for one in row.charges if one.against == against]
            assert {one.unit for one in spent} == {"client"}
            assert 0.95 * EPSILON < epsilon(spent, 1e-5) <= EPSILON


def test_the_server_finds_what_is_true_of_the_people(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    people = 16
    homes = [DeviceStore.create(tmp_path / f"home-{n}", Passphrase("own")) for n in range(people)]
    places = {home.identity.seed: n % 2 for n, home in enumerate(homes)}
    monkeypatch.setattr("privet.client.ab_arm.arm_of", lambda seed, *_: places[seed])
    known = {n: home.identity.public for n, home in enumerate(homes)}
    settings = experiment(outcome="binary", clients=people, privacy={"epsilon": 16.0},
                          secure_aggregation={"survivors": 1.0, "colluding": 0.0})  # fmt: skip
    config = ab_estimates.device_settings(settings, people)
    world = World(tmp_path / "run", config, [EnrolledParticipant(home) for home in homes])
    for number, home in enumerate(homes):
        home.join(Joined(SERVER, "PEM", closed=True), Directory(known, closed=True))
        allow(home, "colluding = 0.1", "colluding = 0.0")
        allow(home, "min_noise = 1.0", "min_noise = 0.3")
        allow(home, "client = 10.0", "client = 16.0")
        allow(home, "max_load = 2.0", "max_load = 1000.0")
        agree(home, config)
        judged(home, number // 2 < (2 if number % 2 == 0 else 6))
    (shown,) = world.serve()
    first, second = shown["look"]["arms"]
    # of 8 people in each arm 2 took the first one's answers, 6 the other's; noise is 0.06 of a mean
    assert (first["mean"], second["mean"]) == pytest.approx((0.25, 0.75), abs=0.35)
    assert second["mean"] - first["mean"] > 0.1
    assert (first["devices"], second["devices"]) == pytest.approx((8, 8), abs=3)
    for home in homes:
        assert home.ledger.participations(ME) == 1
        home.close()


def test_the_report_of_an_experiment_has_what_its_looks_said_and_the_most_they_cost(
    world: World, capsys: pytest.CaptureFixture[str]
):
    shown = world.serve()
    facts = report.report_facts(world.folder)
    assert facts["looks"] == [one["look"] for one in shown]
    lines = {one["against"]: one["epsilon"] for one in facts["privacy"]["lines"]}
    assert lines.keys() == {"analyst", "server", "unmasked server"}
    assert all(0.95 * EPSILON < lines[against] <= EPSILON for against in ("analyst", "server"))
    assert not facts["privacy"]["problems"] + facts["privacy"]["warnings"]
    terminal.show(facts, Console())
    said = " ".join(capsys.readouterr().out.split())
    assert "A/B of memory, notes on devices" in said
    assert "answers each of 2 looks once at most, which cost epsilon 8 (client-level)" in said
    assert "look 2: 4 devices answered; 97.5 % intervals" in said


def test_an_experiment_that_has_found_a_difference_takes_no_further_look(
    tmp_path: Path, homes_of_four: list[DeviceStore], monkeypatch: pytest.MonkeyPatch
):
    config = config_of(looks=3, stop=True)
    world = World(tmp_path / "run", config, [EnrolledParticipant(home) for home in homes_of_four])
    owners_who_agree(world, homes_of_four)
    real = ab_estimates.estimated

    def found(*given: Any) -> Any:
        said = real(*given)
        said["differences"][0]["found"] = said["look"] == 2
        return said

    monkeypatch.setattr("privet.server.ab_estimates.estimated", found)
    assert [one["round"] for one in world.serve()] == [1, 2]
    assert world.serve() == []
    assert [home.ledger.participations(ME) for home in homes_of_four] == [2] * PEOPLE


def test_a_look_waits_for_its_time_also_when_the_server_was_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    now, greeted = [1000.0], [0]
    for clock in ("time", "monotonic"):
        monkeypatch.setattr(f"privet.server.ab_rounds.time.{clock}", lambda: now[0])

    def sleep(seconds: float) -> None:
        now[0] += seconds
        if now[0] > 1100 and greeted[0] == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr("privet.server.ab_rounds.time.sleep", sleep)

    def greet() -> None:
        greeted[0] += 1

    with pytest.raises(KeyboardInterrupt):
        ab_rounds._wait(tmp_path, 1, 0.1, greet)
    ab_rounds._wait(tmp_path, 1, 0.1, greet)
    assert now[0] == 1000 + 360
    ab_rounds._wait(tmp_path, 2, 0.1, greet)
    assert now[0] == 1000 + 720
    assert [one["look"] for one in read_lines(tmp_path / ab_rounds.DUE)] == [1, 2]


# --- what the owner allows -----------------------------------------------------------------------


def test_without_an_owners_yes_nothing_leaves(tmp_path: Path, homes_of_four: list[DeviceStore]):
    world = World(
        tmp_path / "run", config_of(), [EnrolledParticipant(home) for home in homes_of_four]
    )
    for home in homes_of_four:
        allow(home, "min_noise = 1.0", "min_noise = 0.5")
    with pytest.raises(StateError, match="have accepted the run, and 0 of 4"):
        world.serve()
    for home in homes_of_four:
        assert home.outbox() == []
        assert "waits for your yes" in str(home.last_note)
        assert ab_assignment.current(home) is None


def test_a_budget_that_is_spent_declines_the_look_and_the_owners_no_ends_it(
    world: World, homes_of_four: list[DeviceStore]
):
    allow(homes_of_four[0], "client = 10.0", f"client = {0.7 * EPSILON}")
    shown = world.serve()
    assert [(one["answered"], one["declined"]) for one in shown] == [(4, 0), (3, 1)]
    first = homes_of_four[0]
    assert first.ledger.participations(ME) == 1
    assert everything_sent(first) == [f"1 {phase}" for phase in PHASES]
    (left_out,) = first.ledger.declined(ME)
    assert (left_out.round, "budget" in left_out.reason) == (2, True)


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ("min_noise = 0.5", "min_noise = 5.0", "limits.min_noise"),
        ("min_cohort = 3", "min_cohort = 5", "limits.min_cohort"),
        ("statistics = true", "statistics = false", "allowed.statistics"),
        ('client_adjacency = "add_remove"', 'client_adjacency = "zero_out"', "client_adjacency"),
        ("min_survivors = 0.6", "min_survivors = 0.9", "limits.min_survivors"),
        ("ask = false", "ask = true", ""),
    ],
)
def test_what_is_laxer_than_the_policy_is_not_even_begun(
    tmp_path: Path, homes_of_four: list[DeviceStore], before: str, after: str, reason: str
):
    config = config_of()
    world = World(tmp_path / "run", config, [EnrolledParticipant(home) for home in homes_of_four])
    home = homes_of_four[0]
    allow(home, "min_noise = 1.0", "min_noise = 0.5")
    allow(home, "ask = true", "ask = false")
    assert hello(world, 0, config)
    assert not declined(keys(world, 0, plan_of(config)))
    allow(home, before, after)
    if not reason:  # the yes stands
        assert hello(world, 0, config)
        return
    assert hello(world, 0, config) is False
    assert reason in str(home.last_note)
    assert declined(keys(world, 0, plan_of(config, attempt=2)))


def test_what_training_is_limited_by_is_no_reason_to_refuse_an_experiment(
    homes_of_four: list[DeviceStore],
):
    """No gradient, no clip in units of an adapter, no model: the default policy has all three."""
    home, config = homes_of_four[0], config_of(privacy={"epsilon": 1.0})
    allow(home, "min_example_noise = 0.0", "min_example_noise = 0.5")
    path = home.folder / "policy.toml"
    path.write_text(path.read_text().replace('"smollm2-135m-instruct"', '"nothing"'))
    agree(home, config)
    assert home.taking_part(RUN, begins=True).config == config


LAXER: tuple[dict[str, Any], ...] = (
    {"clip": 2.0}, {"variance": 0.0}, {"survivors": 2}, {"round": 10**6}, {"attempt": 10**6},
    {"noise_at": "server", "survivors": 0, "colluders": 0}, {"bits": 8}, {"run": "never offered"},
    {"record_clip": 1.0, "record_noise": 1.0}, {"cohort": 2, "survivors": 2},
    {"gains_bound": 1.0, "gains_variance": 1e6},
)  # fmt: skip


def test_a_plan_that_asks_for_more_than_the_owner_agreed_to_is_declined(
    world: World, homes_of_four: list[DeviceStore]
):
    for changes in LAXER:
        left = answered_alone(world, 0, plan_of(world.config, **changes))
        assert "vector" not in left, changes
    assert homes_of_four[0].ledger.participations(ME) == 0


def answered_alone(world: World, number: int, plan: Plan) -> list[str]:
    """The phases that a device answers to a server that has nobody else."""
    seat = world.seats[number]
    left = []
    if not declined(keys(world, number, plan)):
        left.append("keys")
        from privet.client import device as devices

        try:
            devices._contribution(seat.device(plan, number, False), plan, np.zeros(6, np.float32))
            left.append("vector")
        except (PrivacyError, ProtocolError):
            pass
    return left


AGREED = 2000
"""Devices at each look of an experiment whose promise, epsilon 1, rests on there being so many."""


def asking(clients: int) -> Config:
    secure_aggregation = {"min_cohort": 10, "colluding": 0.1}
    made = experiment(
        clients=clients, privacy={"epsilon": 1.0}, secure_aggregation=secure_aggregation
    )
    return ab_estimates.device_settings(made, AGREED)


@pytest.fixture
def among_many(tmp_path: Path, homes_of_four: list[DeviceStore]) -> World:
    """Four of two thousand devices, of which 200 may work with the server, by their owners' yes."""
    made = World(
        tmp_path / "run", asking(AGREED), [EnrolledParticipant(home) for home in homes_of_four]
    )
    known = {n: home.identity.public for n, home in enumerate(homes_of_four)}
    known |= {n: n.to_bytes(32, "big") for n in range(PEOPLE, AGREED)}
    for home in homes_of_four:
        home.join(Joined(SERVER, "PEM", closed=True), Directory(known, closed=True))
        agree(home, made.config)
    return made


def fewer(among_many: World, **changes: Any) -> Plan:
    """The agreed look with some numbers changed, and the noise of the sum as large as before."""
    right = plan_of(among_many.config)
    plan = dataclasses.replace(right, **changes)
    return dataclasses.replace(plan, variance=right.counted_variance / plan.adders)


@pytest.mark.parametrize("clients", [10, 200, AGREED - 1])
def test_a_look_agreed_to_for_many_devices_is_refused_by_name_among_fewer(
    among_many: World, homes_of_four: list[DeviceStore], clients: int
):
    plan = plan_of(asking(clients))
    assert answered_alone(among_many, 0, plan) == []
    (left_out,) = homes_of_four[0].ledger.declined(ME)
    assert "laxer than this device allows: cohort (own limit 2000)" in left_out.reason
    assert homes_of_four[0].outbox() == []
    assert homes_of_four[0].ledger.participations(ME) == 0


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"survivors": 1199}, "survivors (own limit 1200)"),
        ({"survivors": 202, "colluders": 200}, "survivors (own limit 1200)"),
        ({"colluders": 199}, "colluders (own limit 200)"),
        ({"colluders": 0}, "colluders (own limit 200)"),
        ({"colluders": 201}, "survivors less colluders (own limit 1000)"),
    ],
)
def test_a_look_with_a_smaller_sum_or_fewer_colluders_than_agreed_is_refused_by_name(
    among_many: World, homes_of_four: list[DeviceStore], changes: dict[str, Any], named: str
):
    assert answered_alone(among_many, 0, fewer(among_many, **changes)) == []
    (left_out,) = homes_of_four[0].ledger.declined(ME)
    assert f"laxer than this device allows: {named}" in left_out.reason
    assert homes_of_four[0].outbox() == []
    assert answered_alone(among_many, 0, plan_of(among_many.config, attempt=2)) == [
        "keys",
        "vector",
    ]


@pytest.mark.parametrize(("part", "epsilon_of"), [(0.01, 1.2), (0.03, 3.1), (0.05, 7.0)])
def test_a_look_on_a_coarser_grid_costs_more_than_agreed_and_is_refused_by_name(
    among_many: World,
    homes_of_four: list[DeviceStore],
    part: float,
    epsilon_of: float,
    monkeypatch: pytest.MonkeyPatch,
):
    """Everybody asked, the noise as agreed in real units: it was the rounding that cost more."""
    own, home = among_many.config.privacy.client, homes_of_four[0]
    step = part * own.clip
    plan = plan_of(among_many.config, step=step)
    longer = rounded_sensitivity(own.clip, step, layout(experiment()).dimension)[0]
    in_real_units, rounded = (own.noise_multiplier * one for one in (own.clip / step, longer))
    for steps, named in (
        (in_real_units, "noise over a rounded contribution"),
        (rounded, "squared steps of noise"),
    ):
        coarse = dataclasses.replace(plan, variance=steps**2 / plan.adders * (1 + 1e-6))
        assert answered_alone(among_many, 0, coarse) == []
        (left_out,) = home.ledger.declined(ME)
        assert f"laxer than this device allows: {named}" in left_out.reason
    assert home.outbox() == []
    monkeypatch.setattr(Plan, "refuse_if_laxer", lambda *_: None)
    coarse = dataclasses.replace(plan, variance=in_real_units**2 / plan.adders * (1 + 1e-6))
    assert answered_alone(among_many, 0, coarse) == ["keys", "vector"]
    (row,) = home.ledger.rows(ME)
    assert epsilon([one for one in row.charges if one.against == "server"], 1e-5) > epsilon_of


def test_by_the_old_rule_a_look_for_two_thousand_was_answered_among_ten(
    among_many: World, homes_of_four: list[DeviceStore], monkeypatch: pytest.MonkeyPatch
):
    """Of ten, six open a device's shares, and two hundred may work with the server."""
    policy, few = MaskingPolicy.agreed, asking(10)
    monkeypatch.setattr(Plan, "refuse_if_laxer", lambda *_: None)
    monkeypatch.setattr(MaskingPolicy, "agreed", lambda _, cohort: policy(few, cohort))
    plan = plan_of(few)
    assert answered_alone(among_many, 0, plan) == ["keys", "vector"]
    assert default_graph(plan.cohort, plan.colluders).threshold == 6
    (row,) = homes_of_four[0].ledger.rows(ME)
    left = {against: [one for one in row.charges if one.against == against]
            for against in ("server", "unmasked server")}  # fmt: skip
    assert epsilon(left["server"], 1e-5) <= 1.0
    assert epsilon(left["unmasked server"], 1e-5) > 2.0


def test_the_layout_of_another_experiment_is_refused_by_the_gate(
    world: World, homes_of_four: list[DeviceStore]
):
    other = layout(experiment(arms=["memory", "portrait"])).digest
    assert answered_alone(world, 0, plan_of(world.config, layout=other)) == ["keys"]
    assert answered_alone(world, 0, plan_of(world.config, attempt=2)) == ["keys", "vector"]
    assert homes_of_four[0].ledger.participations(ME) == 1


def ended_unfinished(world: World) -> list[dict[str, Any]]:
    """The records of a run whose looks are all void."""
    with pytest.raises(RunUnfinished, match=r"^0 of 2 looks .* last 2 attempts were void"):
        world.serve()
    return read_lines(world.folder / "rounds.jsonl")


def test_a_look_asked_again_is_not_paid_twice_and_the_ledger_says_it_was_asked(
    world: World, tmp_path: Path, homes_of_four: list[DeviceStore]
):
    world.serve()
    before = [everything_sent(home) for home in homes_of_four]
    again = World(tmp_path / "again", world.config, world.seats)  # a server without a memory
    (again.folder / "attempts").write_text("50")
    shown = ended_unfinished(again)
    assert [(one["answered"], one["declined"], one["void"]) for one in shown] == [(0, 4, True)] * 2
    assert all("look" not in one and one["round"] == 1 for one in shown)
    for home, sent in zip(homes_of_four, before, strict=True):
        assert everything_sent(home) == sent
        assert home.ledger.participations(ME) == 2
        reasons = [one.reason for one in home.ledger.declined(ME)]
        assert ["not kept any more" in one for one in reasons] == [True]


def test_too_few_devices_open_nothing_and_nothing_is_told(
    world: World, homes_of_four: list[DeviceStore]
):
    for home in homes_of_four[:2]:
        allow(home, "client = 10.0", "client = 0.01")
    shown = ended_unfinished(world)
    assert [(one["void"], "look" in one) for one in shown] == [(True, False)] * 2
    for home in homes_of_four[:2]:
        allow(home, "client = 0.01", "client = 10.0")
    (first, second) = world.serve()  # a void look was none: both are still to be taken
    assert [first["look"]["look"], second["look"]["look"]] == [1, 2]
    assert [home.ledger.participations(ME) for home in homes_of_four] == [2] * PEOPLE


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"arms": ["A", "B"]}, "an arm is a template"),
        ({"arms": ["memory@1", "notes"]}, "an arm is a template"),
        ({"low": 1.0, "high": 5.0, "simulated": {"means": (2.0, 3.0)}}, "ab_test.low"),
        ({"clients": 5}, "4 devices are enrolled"),
    ],
)
def test_what_devices_cannot_take_part_in_is_said(changes: dict[str, Any], sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        config_of(**changes)


def test_the_noise_of_the_offer_is_the_epsilons_and_not_a_share_less():
    config = config_of(looks=3)
    assert config.rounds.count == 3
    assert config.privacy.client.clip == math.sqrt(3)
    plan = plan_of(config)
    total = math.sqrt(plan.counted_variance) * plan.step
    assert total >= config.privacy.client.noise_multiplier * math.sqrt(3) * (1 - 1e-9)
    assert to_toml(config).count("memory") == 1


def test_hours_that_outlast_the_days_are_a_contradiction():
    with pytest.raises(ValueError, match="longer than days"):
        experiment(hours=24.0, looks=3, days=2.0)
