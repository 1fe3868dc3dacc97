"""Gains and A/B outcomes in the released vector: measured by the device, bounded, noised, counted.

Masks, phases and dropouts run at the end; before it the gate alone, and what it is charged.
"""

import dataclasses
import math
import re
import shutil
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting import dp_event, pld
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from privet.client.ab_arm import arm_of
from privet.client.app import app
from privet.client.device import Device, take_part
from privet.client.personal.person_losses import (
    Losses,
    evaluate_person,
    evaluator_of,
    gains_block,
)
from privet.client.privacy.gate import charges, release
from privet.client.simulated import SimulatedContext
from privet.client.training.local_training import train
from privet.client.training.records import Tokenised
from privet.common.errors import ConfigError, DataError, GateRefused, ProtocolError
from privet.common.files import read_lines
from privet.common.privacy.accounting import Charge, epsilon
from privet.common.privacy.encoding import Grid, cannot_wrap, decode, pack, unpack, unwrap, wrap
from privet.common.privacy.noise import TestSource, skellam_table
from privet.common.privacy.plan_maker import make_plan
from privet.common.privacy.round_plan import Plan
from privet.common.privacy.statistics_blocks import BOUNDS, DIAMETERS, Block
from privet.common.secure_aggregation.keys import Secret
from privet.common.settings.config import Config, parse
from privet.experiments import engine
from privet.experiments.reports.privacy_facts import History, facts_of
from privet.experiments.simulate import prepare
from privet.server.round_statistics import statistics_of

from ...tiny import population, tiny_config
from ..test_gate_of_a_device import DATA_SETS, leaves_the_same, masked_leave_the_same

PLAN_DIGEST = "5b4f57d7a2a81d93b737cc68e871c20db0538f912f502497879affe9626faad6"
LAYOUT, RUN, SIZE, COHORT = "0" * 64, "run-1", 30, 12
FREE: Any = SimpleNamespace(check=lambda *_: None, commit=lambda *_: None)
"""A ledger that allows everything and keeps nothing."""
ON: dict[str, Any] = {"enabled": True, "gains": True}


def configured(noise_at: str = "device", example: bool = True, **statistics: Any) -> Config:
    """`noise_at` none: nothing is private and nothing noised."""
    off = {"enabled": False}
    client = off if noise_at == "none" else {"noise_at": noise_at, "noise_multiplier": 2.0}
    return parse(
        {
            "data": {"clients": 20},
            "rounds": {"count": 1, "cohort": COHORT, "optimizer": "fedavg"},
            "privacy": {"client": {"bits": 32, **client}, "example": {"enabled": example}},
            "statistics": ON | statistics,
            "insecure_test_seed": 1,
        }
    )


def planned(config: Config, number: int = 1, **changes: Any) -> Plan:
    plan = make_plan(config, RUN, number, LAYOUT, np.zeros(SIZE, np.float32))
    return dataclasses.replace(plan, **changes)


def blocks_of(plan: Plan) -> dict[str, Block]:
    return {block.name: block for block in plan.blocks}


def vector(seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=SIZE).astype(np.float32)


EMPTY = {"losses": np.zeros(2), "gains": np.zeros(3)}


def released(
    config: Config, plan: Plan, given: dict[str, NDArray[np.float64]], seed: int = 1
) -> dict[str, NDArray[np.int64]]:
    """The integers that leave, by block; the adapter's too."""
    asked = {name: values for name, values in given.items() if name in blocks_of(plan)}
    source = TestSource(seed, "release")
    payload = release(vector(), LAYOUT, plan, "ann", FREE, config.privacy, source, asked)
    integers = unwrap(unpack(payload, plan.length(SIZE), plan.bits), plan.bits)
    ends = np.cumsum([SIZE, *(block.size for block in plan.blocks)])[:-1]
    pieces = np.split(integers, ends)
    return dict(zip(("adapter", *blocks_of(plan)), pieces, strict=True))


# --- what a device measures --------------------------------------------------------------------

losses = st.floats(-1e3, 1e3)
people = st.builds(Losses, losses, losses, losses) | st.none()


@given(people, people, st.floats(1e-3, 1e3))
def test_a_block_passes_the_gate_within_its_bound_and_no_record_moves_it_further_than_declared(
    one, other, bound
):
    """Whatever a record changes, the losses are some losses."""
    block = blocks_of(planned(configured()))["gains"]
    found = [gains_block(each, bound) for each in (one, other)]
    assert all(block.fits(values) for values in found)
    assert max(np.linalg.norm(values) for values in found) <= block.bound * (1 + 1e-12)
    assert np.linalg.norm(found[0] - found[1]) <= block.moved * (1 + 1e-12)


def test_the_declared_distances_are_reached_so_that_less_would_be_too_little():
    worst, best = Losses(0.0, 9.0, 99.0), Losses(99.0, 9.0, 0.0)
    moved = gains_block(best, 1.0) - gains_block(worst, 1.0)
    assert np.linalg.norm(moved) == pytest.approx(DIAMETERS["gains"])
    assert np.linalg.norm(gains_block(best, 1.0)) == pytest.approx(BOUNDS["gains"])


def test_gains_are_clipped_in_units_of_their_bound():
    found = Losses(base=5.0, shared=4.9, personal=6.0)
    assert gains_block(found, 0.5) == pytest.approx([0.2, -1.0, 1.0])
    assert gains_block(None, 0.5).tolist() == [0.0] * 3
    assert "5.0" not in repr(found)


def test_arms_are_balanced_stable_over_rounds_and_others_in_another_run():
    keys = [Secret(number.to_bytes(32)) for number in range(4000)]
    arms = [arm_of(key, RUN, 4) for key in keys]
    counts = Counter(arms)
    assert all(abs(counts[arm] - 1000) < 5 * (4000 * 0.25 * 0.75) ** 0.5 for arm in range(4))
    assert arms == [arm_of(key, RUN, 4) for key in keys]
    again = sum(a == arm_of(key, "run-2", 4) for a, key in zip(arms, keys, strict=True))
    assert abs(again - 1000) < 5 * (4000 * 0.25 * 0.75) ** 0.5


def test_where_losses_are_not_finite_a_device_counts_as_one_that_measured_nothing():
    own = [Tokenised((1, 2))]

    def broken() -> Any:
        raise DataError("states hold NaN or infinity")

    assert evaluate_person(broken, own, own, True) is None
    one = SimpleNamespace(base=math.nan, head=None, loss=lambda _: 1.0)
    fake: Any = SimpleNamespace(person=lambda *_: one)
    assert evaluate_person(lambda: fake, own, own, True) is None
    one.base = 1.0
    assert evaluate_person(lambda: fake, own, own, True) == Losses(1.0, 1.0, 1.0)


# --- the gate ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("gains", (0.1, 0.1, 0.0)),  # measured or not, nothing between
        ("gains", (0.1, 0.1, 0.5)),
        ("gains", (1.1, 0.0, 1.0)),
        ("gains", (math.nan, 0.0, 1.0)),
        ("gains", (0.0, 1.0)),
        ("losses", (1.0, math.inf)),
    ],
)
def test_a_block_that_no_correct_measurement_gives_is_refused(name, values):
    config = configured()
    with pytest.raises(GateRefused, match=name):
        released(config, planned(config), EMPTY | {name: np.array(values, np.float64)})


def test_a_block_that_is_missing_or_not_asked_for_is_refused():
    config = configured()
    plan, source = planned(config), TestSource(1, "release")
    for given_ in (None, {**EMPTY, "more": np.zeros(1)}, {"gains": np.zeros(3)}):
        with pytest.raises(GateRefused, match="the plan asks for"):
            release(vector(), LAYOUT, plan, "ann", FREE, config.privacy, source, given_)


def test_the_adapters_integers_are_the_same_whatever_rides_behind_it():
    full = EMPTY | {"gains": np.ones(3)}
    plans = [configured(enabled=False, gains=False), configured(gains=False), configured()]
    seen = [released(c, planned(c), full)["adapter"].tobytes() for c in plans]
    assert len(set(seen)) == 1


@pytest.mark.parametrize("noise_at", ["device", "distributed"])
@pytest.mark.parametrize(("name", "noise"), [("losses", 3.0 * 1.5), ("gains", 4.0 * math.sqrt(3))])
def test_the_noise_of_each_block_has_the_declared_variance(noise_at, name, noise):
    config = configured(noise_at, example=False)
    plan = planned(config)
    block = blocks_of(plan)[name]
    drawn = [released(config, plan, EMPTY, seed)[name] for seed in range(1, 1001)]
    found = np.concatenate([decode(each, block.step) for each in drawn])
    declared = block.variance * block.step**2
    assert declared * plan.adders == pytest.approx(noise**2, rel=1e-3)

    def fits(variance: float) -> bool:
        return bool(abs(np.var(found) / variance - 1) < 5 * (2 / found.size) ** 0.5)

    assert fits(declared)
    assert not fits(declared * 2 / 3)
    assert not fits(declared * 3 / 2)


def test_no_block_can_wrap_in_the_modulus_of_the_adapter():
    for noise_of_gains in (4.0, 50.0):
        plan = planned(configured("distributed", gain_noise_multiplier=noise_of_gains))
        for block in plan.blocks:
            noise = COHORT * skellam_table(block.variance).bound
            assert cannot_wrap(Grid(block.step, plan.bits), block.bound, noise, COHORT)


# --- what it costs -----------------------------------------------------------------------------

GAINS = 4.0 * math.sqrt(3) / math.sqrt(8)
RATE, ADDERS = 0.25, math.ceil(0.6 * COHORT) - math.ceil(0.1 * COHORT)


def both(*multipliers: float) -> float:
    return 1 / math.hypot(*(1 / z for z in multipliers))


def cost(noise_at: str, **statistics: Any) -> dict[tuple[str, str], list[Charge]]:
    config = configured("device" if noise_at == "server" else noise_at, **statistics)
    found = charges(planned(config, noise_at=noise_at), SIZE, config.privacy)
    lines = {(c.unit, c.against) for c in found}
    return {line: [c for c in found if (c.unit, c.against) == line] for line in lines}


@pytest.mark.parametrize("noise_at", ["device", "distributed", "server"])
def test_a_person_moves_adapter_and_all_blocks_as_one_release(noise_at):
    with_it = cost(noise_at)
    for (unit, against), found in with_it.items():
        if unit == "client":
            (charge,) = found
            share = ADDERS**-0.5 if against == "unmasked server" else 1.0
            wanted = share * both(2.0, 3.0, 4.0)
            assert charge.noise_multiplier == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("noise_at", ["device", "distributed", "server"])
def test_a_record_pays_for_gains_in_full_whatever_the_batch(noise_at):
    plain = cost(noise_at, gains=False)
    expected = {"analyst": 1.0, "server": 1.0}
    if noise_at == "server":
        expected["server"] = 0.0
    if noise_at == "distributed":
        expected["unmasked server"] = ADDERS**-0.5
    assert {against for unit, against in plain if unit == "example"} == set(expected)
    with_it = cost(noise_at)
    assert with_it.keys() == plain.keys()
    for against, share in expected.items():
        sampled, whole = with_it["example", against]
        assert [sampled] == plain["example", against]
        assert (whole.sampling_rate, whole.steps) == (1.0, 1)
        assert whole.noise_multiplier == pytest.approx(share * GAINS, rel=1e-3)
        assert (whole.distance > 0) == (share > 0)


def exact(*events: Any) -> float:
    """Epsilon of a release by dp_accounting alone, from events written by hand."""
    accountant = pld.PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    for event in events:
        accountant.compose(event)
    return float(accountant.get_epsilon(1e-5))


@pytest.mark.parametrize("against", ["analyst", "server", "unmasked server"])
def test_a_records_epsilon_is_that_of_an_independent_calculation_and_the_batchs_rate_is_caught(
    against,
):
    config = configured("distributed")
    line = cost("distributed")["example", against]
    claimed = epsilon(line, 1e-5)
    # by hand: delta and losses of one batch; then gains of everything
    share = ADDERS**-0.5 if against == "unmasked server" else 1.0
    training = config.privacy.example
    own = config.training.learning_rate * training.clip / config.training.batch_size
    delta = training.noise_multiplier if against == "unmasked server" else 2.0 / own
    losses_ = share * 3.0 * 1.5 / (math.sqrt(2) / config.training.batch_size)
    truth = exact(
        dp_event.PoissonSampledDpEvent(RATE, dp_event.GaussianDpEvent(both(delta, losses_))),
        dp_event.GaussianDpEvent(share * GAINS),
    )
    assert claimed == pytest.approx(truth, rel=5e-3)

    def faulty() -> float:
        """Gains charged as if the batch's draw hid a record from them."""
        return epsilon([dataclasses.replace(c, sampling_rate=RATE) for c in line], 1e-5)

    assert faulty() < 0.9 * truth


def test_where_every_record_is_in_the_batch_there_is_one_release():
    config = configured()
    plan = planned(config, rate=1.0)
    found = [c for c in charges(plan, SIZE, config.privacy) if c.unit == "example"]
    assert len(found) == 2
    apart = cost("device")["example", "analyst"]
    together = [dataclasses.replace(c, sampling_rate=1.0) for c in apart]
    assert epsilon(found[:1], 1e-5) == pytest.approx(epsilon(together, 1e-5), rel=1e-6)


def test_several_local_steps_and_gains_are_charged_apart():
    config = configured()
    plan = planned(config, losses_bound=0.0, local_steps=3, rate=1.0)
    found = charges(plan, SIZE, config.privacy)
    steps, whole = (c for c in found if (c.unit, c.against) == ("example", "server"))
    assert (steps.steps, steps.noise_multiplier) == (3, plan.record_noise)
    assert whole.steps == 1
    assert whole.noise_multiplier == pytest.approx(GAINS, 1e-3)


def test_the_facts_tell_gains_apart_from_the_batch():
    config = configured("distributed")
    facts = facts_of(config, [History("a", ((1, charges(planned(config), SIZE, config.privacy)),))])
    lines = {line["key"]: line for line in facts["lines"]}
    for key in ("example/analyst", "example/server", "example/unmasked server"):
        said = lines[key]["noise_counted"]
        assert "which every record of a person enters in every round" in said
        assert ("own share of the Skellam noise on gains" in said) == ("unmasked" in key)
        assert lines[key]["cross_check"]["agrees"]
    assert "which every record" not in lines["client/server"]["noise_counted"]
    names = {row["mechanism"] for row in facts["mechanisms"]}
    assert names == {"gains and A/B outcomes", "adapter and statistics as one"}
    promised = " ".join(facts["promised"]["sentences"])
    assert "each gain clipped to 0.5" in promised


# --- plan and settings -------------------------------------------------------------------------


def test_a_device_measures_only_what_its_own_settings_allow():
    asking, own = configured(), configured(gains=False)
    planned(asking).refuse_if_laxer(asking)
    planned(own).refuse_if_laxer(asking)  # less asked is stricter
    with pytest.raises(ProtocolError, match="laxer than this device allows: gains "):
        planned(asking).refuse_if_laxer(own)


@pytest.mark.parametrize("name", ["losses", "gains"])
@pytest.mark.parametrize("noise_at", ["device", "distributed"])
def test_less_noise_on_a_block_is_refused_by_its_name(name, noise_at):
    config = configured(noise_at)
    plan = planned(config)
    variance = blocks_of(plan)[name].variance
    for factor, step in ((0.99, 1.0), (0.0, 1.0), (1.0, 0.99)):
        changes: dict[str, Any] = {
            f"{name}_variance": variance * factor,
            f"{name}_step": blocks_of(plan)[name].step * step,
        }
        with pytest.raises(ProtocolError, match=f"{name}_noise"):
            dataclasses.replace(plan, **changes).refuse_if_laxer(config)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"gains_bound": -1.0}, "gains_bound"),
        ({"gains_step": 0.0}, "gains_step"),
        ({"gains_variance": math.nan}, "gains_variance"),
        ({"arms_variance": 1e300}, r"arms_variance = 1e\+300: expected 0\.0"),
        ({"arms_bound": 0}, "arms_bound = 0: expected 0.0"),
        ({"arms": "shared,personal"}, r"by an A/B run of its own \(\[ab_test\]\)"),
    ],
)
def test_a_plan_that_no_honest_server_sends_is_refused_by_name(changes, named):
    with pytest.raises(ProtocolError, match=named):
        Plan.from_dict(planned(configured()).to_dict() | changes)


def test_a_plan_is_the_same_after_the_wire_and_counts_its_blocks():
    plan = planned(configured("distributed"))
    assert Plan.from_dict(plan.to_dict()) == plan
    assert {type(value) for value in plan.to_dict().values()} <= {str, int, float, bool}
    assert plan.length(SIZE) == plan.terms(SIZE).dimension == SIZE + 2 + 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"enabled": False}, "needs statistics.enabled = true"),
        (
            {"arms": ["shared", "personal"]},
            r"statistics.arms is no more: models are compared by an A/B test",
        ),
        ({"gain_bound": 0}, "gain_bound"),
    ],
)
def test_settings_that_say_nothing_are_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        configured(**changes)


def test_a_run_that_left_arms_empty_opens_and_its_plans_keep_their_digest():
    """Settings and plans of before: the keys of a comparison, empty, and the digest they had."""
    config = configured(arms=[], arm_noise_multiplier=4.0)
    assert config == configured()
    plan = planned(config, start=LAYOUT)
    assert plan.digest == PLAN_DIGEST
    kept = plan.to_dict()
    assert {name: kept[name] for name in ("arms", "arms_bound", "arms_step", "arms_variance")} == {
        "arms": "", "arms_bound": 0.0, "arms_step": 1.0, "arms_variance": 0.0,
    }  # fmt: skip


# --- what the server says ----------------------------------------------------------------------


def test_the_noise_said_beside_a_gain_is_that_of_the_gain():
    config = configured("server", example=False)
    plan = dataclasses.replace(planned(config), losses_bound=0.0)
    block = blocks_of(plan)["gains"]
    people_, truth = 900, np.array([180.0, 45.0, 900.0])
    spread = block.variance**0.5 * block.step
    rng = np.random.default_rng(0)
    drawn: list[Any] = [
        statistics_of({"gains": truth + rng.normal(0, spread, 3)}, plan, people_)
        for _ in range(3000)
    ]
    said = statistics_of({"gains": truth}, plan, people_)
    assert (said["gain_shared"], said["gain_personal"]) == pytest.approx((0.1, 0.025))
    for name in ("gain_shared", "gain_personal"):
        spread_of = np.std([each[name] for each in drawn])
        assert spread_of == pytest.approx(said[f"{name}_std"], rel=0.05)


def test_where_the_noise_outweighs_the_count_no_mean_is_told():
    plan = planned(configured())
    said: Any = statistics_of({"losses": np.ones(2), "gains": np.ones(3)}, plan, 12)
    named = ("gain_shared", "gain_shared_std", "gain_personal", "gain_personal_std", "train_loss")
    assert {said[name] for name in named} == {None}
    assert said["measured_std"] > 0


# --- whole runs --------------------------------------------------------------------------------


def a_run(llama_folder: Path, folder: Path, noise_at: str, **changes: Any) -> Config:
    people_ = population(folder / "people", 16, 10)
    config = tiny_config(
        llama_folder,
        people_,
        data={"clients": 12},
        rounds={"count": 1, "cohort": 12},
        **{
            "privacy": {"client": {"noise_at": noise_at}},
            "statistics": ON,
            **changes,
        },
    )
    return prepare(config, folder / "run", resume=False)


@pytest.fixture(scope="module")
def device_run(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measured")
    a_run(llama_folder, folder, "device")
    return folder / "run"


def shifted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices hold out the second half of what `Device.records` gives, as the gate test sets it."""

    def halves(device: Device) -> Any:
        own = list(device.records())
        return own[: len(own) // 2], own[len(own) // 2 :]

    monkeypatch.setattr(Device, "measured_on", halves)


def test_with_gains_replies_differ_in_nothing_but_the_vector(device_run, tmp_path, monkeypatch):
    shifted(monkeypatch)
    assert leaves_the_same(device_run, tmp_path, monkeypatch, app)


@pytest.mark.heavy
def test_under_masks_too_only_the_masked_vector_depends_on_what_was_measured(
    llama_folder, tmp_path, monkeypatch
):
    a_run(llama_folder, tmp_path, "distributed")
    shifted(monkeypatch)
    assert masked_leave_the_same(tmp_path / "run", tmp_path, monkeypatch, app)


def adapter_part(folder: Path, private: Any = None, **changes: Any) -> bytes:
    """What device 0 releases of its adapter in the first round."""
    bench = SimulatedContext.open(folder)
    config = bench.config.model_copy(
        update={"statistics": bench.config.statistics.model_copy(update=changes)}
    )
    bench = dataclasses.replace(bench, config=config)
    start, layout = bench.trainer.adapter.start, bench.trainer.adapter.layout.digest
    plan = make_plan(config, bench.run, 1, layout, start)
    device = bench.device(0)
    with pytest.MonkeyPatch.context() as patch:
        if private is not None:
            patch.setattr(Device, "measured_on", lambda _: private)
        payload = take_part(device, plan, start)
    assert payload is not None
    found = unpack(payload, plan.length(len(start)), plan.bits)
    return bytes(pack(wrap(found[: len(start)].astype(np.int64), plan.bits), plan.bits))


def test_what_is_measured_and_the_head_never_touch_the_adapter(device_run, tmp_path):
    """Contract 7: byte for byte the same with gains on or off, and on other records."""
    others = list(DATA_SETS["fifty"])
    cases: dict[str, tuple[Any, dict[str, Any]]] = {
        "on": (None, {}),
        "gains off": (None, {"gains": False}),
        "all off": (None, {"enabled": False, "gains": False}),
        "a head of other records": ((others[:25], others[25:]), {}),
        "nothing held out": (([], []), {}),
    }
    seen = set()
    for name, (private, changes) in cases.items():
        copy = Path(shutil.copytree(device_run, tmp_path / name))
        seen.add(adapter_part(copy, private, **changes))
    assert len(seen) == 1


def test_a_head_fitted_before_training_that_takes_part_in_it_is_caught(
    device_run, tmp_path, monkeypatch
):
    """The same comparison with the fault: training starts where a head's loss says."""
    right = train

    def faulty(trainer: Any, start: Any, records: Any, plan: Plan, *more: Any, **named: Any) -> Any:
        if plan.gains_bound:
            bench = SimulatedContext.open(tmp_path / "on")
            mine, held_out = bench.device(0).measured_on()
            evaluator = partial(evaluator_of, trainer.adapter, start)
            said = evaluate_person(evaluator, mine, held_out, True)
            assert said is not None
            start = start + np.float32(said.personal)
        return right(trainer, start, records, plan, *more, **named)

    monkeypatch.setattr("privet.client.device.train", faulty)
    seen = []
    for name, changes in {"on": {}, "off": {"gains": False}}.items():
        copy = Path(shutil.copytree(device_run, tmp_path / name))
        seen.append(adapter_part(copy, None, **changes))
    assert seen[0] != seen[1]


def truly(folder: Path) -> dict[str, dict[str, float]]:
    """Every device's nats per token under the adapter of the first round, as it is evaluated."""
    bench = SimulatedContext.open(folder)
    users, start = bench.index.train_users, bench.trainer.adapter.start
    evaluator = evaluator_of(bench.trainer.adapter, start)
    found = {
        user: evaluate_person(lambda: evaluator, *Device(user, bench).measured_on(), True)
        for user in users
    }
    return {user: dataclasses.asdict(losses) for user, losses in found.items() if losses}


def in_the_sum(config: Config, users: Any) -> list[str]:
    """Those whose vector came before they died."""

    def died(client: int, kind: str) -> bool:
        kind_of = SimpleNamespace(message_type=f"train.{kind}")
        message: Any = SimpleNamespace(metadata=kind_of, content={"plan": {"round": 1}})
        return engine._lost(config, message, client) is not None

    return [
        user
        for number, user in enumerate(users)
        if not any(died(number, kind) for kind in ("keys", "shares", "vector"))
    ]


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_with_next_to_no_noise_a_masked_round_tells_what_evaluation_computes(
    llama_folder, tmp_path, monkeypatch, dropout
):
    """Over those whose vector came, whoever died at whichever phase."""
    for module in (
        "device",
        "privacy.affordable_rounds",
        "privacy.gate",
    ):  # no budget allows so little noise
        monkeypatch.setattr(f"privet.client.{module}.budgets", lambda _: {"client": math.inf})
    noise = {f"{name}noise_multiplier": 1e-4 for name in ("", "gain_")}
    config = a_run(
        llama_folder,
        tmp_path,
        "distributed",
        privacy={
            "client": {"noise_at": "distributed", "bits": 32},
            "example": {"enabled": False},
        },
        simulation={"dropout": dropout},
        statistics=ON | noise | {"gain_bound": 2.0},
    )
    folder = tmp_path / "run"
    engine.run("local", folder, config)
    (kept,) = read_lines(folder / "rounds.jsonl")
    truth, bench = truly(folder), SimulatedContext.open(folder)
    said, whose = kept["statistics"], in_the_sum(config, bench.index.train_users)
    assert not kept["void"]
    assert (kept["answered"] < 12) == (dropout > 0)
    assert kept["answered"] == len(whose)
    found = [truth[u] for u in whose]
    gains = [(x["base"] - x["shared"], x["shared"] - x["personal"]) for x in found]
    wanted = np.clip(gains, -2, 2).mean(axis=0)
    assert (said["gain_shared"], said["gain_personal"]) == pytest.approx(tuple(wanted), abs=0.01)
    assert wanted[1] > 0.05  # the personal gain is there to be seen


def test_a_budget_that_one_release_would_exceed_is_said_before_the_run(
    llama_folder, tmp_path, capsys
):
    """A record's gains under one device's share of noise, should masking fail."""

    def begun(name: str, budget: float) -> None:
        budgets = {"client": 1000.0, "example": budget}
        privacy = {"client": {"noise_at": "distributed"}, "budget": budgets}
        a_run(llama_folder, tmp_path / name, "distributed", privacy=privacy)

    with pytest.raises(
        ConfigError, match=r"pays for 0 .*\(example-level, against the unmasked server.* decline"
    ) as refused:
        begun("small", 10.0)
    assert not (tmp_path / "small" / "run").exists()
    enough = re.search(r"set privacy\.budget\.example = ([\d.]+) or more", str(refused.value))
    assert enough
    capsys.readouterr()
    begun("enough", float(enough[1]))
    assert "decline" not in capsys.readouterr().err
