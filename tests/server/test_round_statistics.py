"""Statistics in the released vector: bounded, noised, counted with the adapter as one release."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from privet.client.app import app
from privet.client.privacy.gate import charges, release
from privet.client.privacy.ledger import Ledger
from privet.client.training import local_training
from privet.client.training.local_training import Randomness, Trainer, train
from privet.common.errors import ConfigError, GateRefused, ProtocolError, RunUnfinished
from privet.common.files import read_lines
from privet.common.model.adapter import attach
from privet.common.privacy.accounting import Charge, epsilon
from privet.common.privacy.clipping import clip
from privet.common.privacy.encoding import (
    Grid,
    cannot_wrap,
    decode,
    pack,
    round_randomly,
    rounded_sensitivity,
    unpack,
    unwrap,
    wrap,
)
from privet.common.privacy.noise import TestSource, skellam, skellam_table
from privet.common.privacy.plan_maker import make_plan
from privet.common.privacy.round_plan import Plan
from privet.common.privacy.statistics_blocks import BOUNDS
from privet.common.settings.config import Config, parse
from privet.common.settings.sections import AdapterSettings
from privet.experiments import engine, progress
from privet.experiments.reports.privacy_facts import History, facts_of
from privet.experiments.simulate import prepare
from privet.server import round_statistics as statistics
from privet.server import rounds
from privet.server.cohort import draw
from privet.server.rounds import Reply, run_rounds

from ..client.test_gate_of_a_device import leaves_the_same, records
from ..served import RUN, exchange_of, served
from ..tiny import fresh, population, tiny_config

SIZE, COHORT = 30, 12
LAYOUT = exchange_of(SIZE).state.digest
BOUND = BOUNDS["losses"]
OFF: dict[str, Any] = {"enabled": False}
FREE: Any = SimpleNamespace(check=lambda *_: None, commit=lambda *_: None)
"""A ledger that allows everything and keeps nothing."""


def configured(noise_at: str = "device", example: bool = True, **statistics: Any) -> Config:
    """`noise_at` none: nothing is private and nothing noised."""
    client = OFF if noise_at == "none" else {"noise_at": noise_at, "noise_multiplier": 2.0}
    return parse(
        {
            "data": {"clients": 20},
            "rounds": {"count": 1, "cohort": COHORT, "optimizer": "fedavg"},
            "privacy": {"client": {"bits": 32, **client}, "example": {"enabled": example}},
            "statistics": {"enabled": True, "noise_multiplier": 4.0} | statistics,
            "insecure_test_seed": 1,
        }
    )


def planned(config: Config, number: int = 1) -> Plan:
    return make_plan(config, RUN, number, LAYOUT, np.zeros(SIZE, np.float32))


def vector(seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=SIZE).astype(np.float32)


def released(
    config: Config, plan: Plan, block: Any, seed: int = 1, ledger: Ledger = FREE
) -> NDArray[np.int64]:
    """The integers that leave, the block's last."""
    given = None if block is None else {"losses": np.array(block, np.float64)}
    source = TestSource(seed, "release")
    payload = release(vector(), LAYOUT, plan, "ann", ledger, config.privacy, source, given)
    return unwrap(unpack(payload, plan.length(SIZE), plan.bits), plan.bits)


# --- what is released --------------------------------------------------------------------------


def ask_with(config: Config, blocks: Mapping[int, Any], answering: float = 1.0) -> Any:
    """Devices that release these blocks through the gate."""

    def ask(_: str, messages: Mapping[int, bytes], plan: Plan, __: Any) -> Iterator[Reply]:
        for place, client in enumerate(messages):
            found = released(config, plan, blocks[client], seed=client)
            payload = pack(wrap(found, plan.bits), plan.bits)
            yield Reply(client, payload if place < answering * len(messages) else None)

    return ask


def the_round(
    folder: Path, config: Config, blocks: Mapping[int, Any], answering: float = 1.0
) -> Any:
    shown: list[Any] = []
    ask = ask_with(config, blocks, answering)
    run_rounds(served(folder, config, ask, shown.append), exchange_of(SIZE))
    (kept,) = read_lines(folder / "rounds.jsonl")
    assert kept == shown[0]
    return kept


def test_without_noise_the_statistics_are_the_true_ones_to_the_rounding(tmp_path):
    config = configured("none", example=False, loss_bound=10.0)
    blocks = {client: (client / 40, 0.5 + client / 40) for client in range(20)}
    kept = the_round(tmp_path, config, blocks)
    asked = draw(20, COHORT, 1, config.data.seed)
    losses, counts = np.sum([blocks[client] for client in asked], axis=0)
    step = planned(config).losses_step
    assert kept["statistics"] == {
        "train_loss": pytest.approx(10 * losses / counts, abs=20 * step * COHORT),
        "train_loss_std": 0.0,
        "records_per_client": pytest.approx(8 * counts / COHORT, abs=8 * step),
        "records_per_client_std": 0.0,
    }


def test_a_void_round_has_no_statistics(tmp_path):
    config = configured("none", example=False)
    once = config.rounds.model_copy(update={"patience": 1})
    config = config.model_copy(update={"rounds": once})
    with pytest.raises(RunUnfinished, match=r"^0 of 1 rounds"):
        the_round(tmp_path, config, dict.fromkeys(range(20), (0.5, 1.0)), answering=0.2)
    (kept,) = read_lines(tmp_path / "rounds.jsonl")
    assert kept["void"]
    assert "statistics" not in kept


def fits(values: NDArray[np.float64], variance: float) -> bool:
    """Whether the values' variance is the declared one; 5 deviations of that estimate."""
    return bool(abs(np.var(values) / variance - 1) < 5 * (2 / values.size) ** 0.5)


def noise_of(config: Config, plan: Plan, seed: int) -> NDArray[np.float64]:
    """Of the block of an empty batch, where the noise is added; real units."""
    if plan.noise_at == "server":
        total = np.zeros(plan.length(SIZE), np.uint32)
        return rounds._noised_mean(total, dataclasses.replace(plan, round=seed), 1)[1]["losses"]
    return decode(released(config, plan, (0, 0), seed)[-2:], plan.losses_step)


@pytest.mark.parametrize("noise_at", ["device", "distributed", "server"])
def test_the_noise_of_the_block_has_the_declared_variance(noise_at):
    config = configured(noise_at, example=False)
    plan = planned(config)
    found = np.array([noise_of(config, plan, seed) for seed in range(1, 1501)])
    declared = plan.losses_variance * plan.losses_step**2
    assert declared * plan.adders == pytest.approx((4.0 * BOUND) ** 2, rel=1e-3)
    assert fits(found, declared)
    assert not fits(found, declared * 2 / 3)
    assert not fits(found, declared * 3 / 2)


def test_disabled_statistics_leave_the_bytes_as_they_were_and_enabled_ones_the_adapters():
    off, on = configured(enabled=False), configured()
    plan = planned(off)
    source = TestSource(1, "release")
    before = round_randomly(clip(vector(), plan.clip).vector, plan.step, source.words)
    before += skellam(skellam_table(plan.variance), SIZE, source)
    payload = release(vector(), LAYOUT, plan, "ann", FREE, off.privacy, TestSource(1, "release"))
    assert payload == pack(wrap(before, plan.bits), plan.bits)
    assert plan.length(SIZE) == SIZE
    assert (released(on, planned(on), (0.3, 1.0))[:SIZE] == before).all()


def test_no_block_can_wrap_where_the_adapter_cannot():
    config = configured("distributed")
    plan = planned(config)
    noise = COHORT * skellam_table(plan.losses_variance).bound
    grid = Grid(plan.losses_step, plan.bits)
    assert cannot_wrap(grid, BOUND, noise, COHORT)


# --- bounds ------------------------------------------------------------------------------------


def test_a_client_with_a_hundred_times_the_losses_moves_the_block_by_at_most_the_bound():
    config = configured("none", example=False, loss_bound=5.0)
    plan = planned(config)
    wild = local_training.statistics_of(np.full(8, 500.0), plan)
    assert wild.tolist() == [1.0, 1.0]

    def faulty(losses: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.array([losses.sum() / plan.losses_bound, len(losses)]) / plan.batch_size

    assert np.linalg.norm(faulty(np.full(8, 500.0))) > 60 * BOUND
    # a device with broken training: the gate bounds it all the same
    found = released(config, plan, faulty(np.full(800, 500.0)))[-2:]
    limit = rounded_sensitivity(BOUND, plan.losses_step, 2)[0]
    assert np.linalg.norm(found) <= limit
    assert (released(config, plan, wild * 1e9)[-2:] <= limit).all()


@given(
    st.lists(st.floats(-1e3, 1e3), max_size=30),
    st.floats(-1e9, 1e9) | st.just(math.inf),
    st.integers(1, 12),
)
def test_one_record_moves_the_block_by_at_most_root_two_over_the_batch_size(losses, one, size):
    plan = dataclasses.replace(planned(configured()), batch_size=size)
    blocks = [local_training.statistics_of(np.array(x), plan) for x in (losses, [*losses, one])]
    moved = clip(blocks[1], BOUND).vector - clip(blocks[0], BOUND).vector
    assert np.linalg.norm(moved) <= math.sqrt(2) / size * (1 + 1e-9)


@pytest.mark.parametrize("block", [None, (0.1,), (0.1, 0.2, 0.3), (np.nan, 1.0), (0.1, np.inf)])
def test_a_block_of_another_shape_or_not_finite_is_refused_and_costs_nothing(tmp_path, block):
    config = configured()
    with Ledger.open(tmp_path / "ledger", owner=RUN) as ledger:
        with pytest.raises(GateRefused):
            released(config, planned(config), block, ledger=ledger)
        assert ledger.clients() == []


@pytest.fixture(scope="module")
def trainer(llama_folder: Path) -> Trainer:
    return Trainer.of(attach(fresh(llama_folder), AdapterSettings(rank=2, last_blocks=2), 0))


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("private", [True, False])
def test_the_losses_are_the_steps_own_under_the_start_adapter(trainer, private, monkeypatch):
    own, calls = records(20), list[int]()
    trainer.adapter.write(trainer.adapter.start)
    wanted = sum(float(local_training.losses_of(trainer, [one])[0].detach()) for one in own)
    plain = local_training.losses_of

    def counted(trainer: Trainer, chunk: Any, *shape: Any) -> Any:
        calls.append(len(chunk))
        return plain(trainer, chunk, *shape)

    monkeypatch.setattr(local_training, "losses_of", counted)
    plan = planned(configured(loss_bound=100.0))
    changes: dict[str, Any] = {"rate": 1.0, "learning_rate": 1.0}
    plan = dataclasses.replace(plan, **changes if private else changes | {"record_clip": 0.0})
    rng, source = np.random.default_rng(1), TestSource(1, "noise")
    found = train(trainer, trainer.adapter.start, own, plan, Randomness(rng, source))
    assert sum(calls) == 20  # no second forward pass
    assert found.statistics == pytest.approx([wanted / 100 / 8, 20 / 8], rel=1e-3)
    assert "statistics" not in repr(found)


# --- what it costs -----------------------------------------------------------------------------


def both(*multipliers: float) -> float:
    return 1 / math.hypot(*(1 / z for z in multipliers))


def cost(noise_at: str, **statistics: Any) -> dict[tuple[str, str], Charge]:
    config = configured("device" if noise_at == "server" else noise_at, **statistics)
    plan = dataclasses.replace(planned(config), noise_at=noise_at)
    found = charges(plan, SIZE, config.privacy)
    assert len({(c.unit, c.against) for c in found}) == len(found)
    return {(c.unit, c.against): c for c in found}


@pytest.mark.parametrize("noise_at", ["device", "distributed", "server"])
def test_every_line_counts_adapter_and_block_as_one_release(noise_at):
    with_it, without = cost(noise_at), cost(noise_at, enabled=False)
    assert with_it.keys() == without.keys()
    # noise of 4 times the block's bound, a record moves it by sqrt(2) / 8
    block = 4.0 * BOUND / (math.sqrt(2) / 8)
    assert with_it["client", "analyst"].noise_multiplier == pytest.approx(both(2.0, 4.0))
    expected = {"analyst": block, "server": block}
    if noise_at == "server":
        expected["server"] = 0.0
    if noise_at == "distributed":
        survivors, colluders = math.ceil(0.6 * COHORT), math.ceil(0.1 * COHORT)
        expected["unmasked server"] = block / (survivors - colluders) ** 0.5
    for against, its in expected.items():
        before, now = without["example", against], with_it["example", against]
        if its:
            added = now.noise_multiplier**-2 - before.noise_multiplier**-2
            assert added == pytest.approx(its**-2, rel=1e-2)
        else:
            assert now.noise_multiplier == 0
        assert (now.sampling_rate, now.steps) == (0.25, 1)
        if its:
            assert now.ratio > before.ratio
            assert now.distance > before.distance


def test_where_the_block_has_no_noise_there_is_no_bound_on_that_line():
    assert epsilon([cost("server")["example", "server"]], 1e-5) == math.inf
    assert epsilon([cost("server")["example", "analyst"]], 1e-5) < 1


def test_two_charges_with_the_rate_each_would_claim_less_than_is_true():
    rate, parts, delta = 0.25, (1.0, 1.5), 0.01

    def charge(multiplier: float) -> Charge:
        return Charge("example", "analyst", "add_remove", multiplier, rate)

    def faulty() -> float:
        return epsilon([charge(z) for z in parts], delta)

    joint = epsilon([charge(both(*parts))], delta)
    assert faulty() < 0.8 * joint
    # the real thing, drawn: one batch, both outputs; the record is in it or not
    noise = np.random.default_rng(0).normal(size=(1_000_000, 2))
    shift = 1 / np.array(parts)
    ratio = 1 - rate + rate * np.exp(noise @ shift - shift @ shift / 2)
    removed = {eps: np.mean(np.maximum(ratio - np.exp(eps), 0)) for eps in (faulty(), joint)}
    assert removed[faulty()] > 1.15 * delta
    assert removed[joint] == pytest.approx(delta, rel=0.03)


def test_the_facts_say_that_the_statistics_are_counted():
    config = configured("distributed")
    facts = facts_of(config, [History("a", ((1, charges(planned(config), SIZE, config.privacy)),))])
    lines = {line["key"]: line for line in facts["lines"]}
    assert {"client/server", "example/server", "example/unmasked server"} <= lines.keys()
    for line in facts["lines"]:
        assert "on the statistics, as one release" in line["noise_counted"]
        assert any("but in the noised statistics" in said for said in line["assumptions"])
    assert "own share" in lines["example/unmasked server"]["noise_counted"]
    assert any("batch's losses" in said for said in facts["promised"]["sentences"])


# --- plan and settings -------------------------------------------------------------------------


def test_a_device_takes_part_in_statistics_only_if_its_own_settings_say_so():
    on, off = configured(), configured(enabled=False)
    planned(on).refuse_if_laxer(on)
    planned(off).refuse_if_laxer(on)  # none asked is stricter
    with pytest.raises(ProtocolError, match="laxer than this device allows: losses "):
        planned(on).refuse_if_laxer(off)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("losses_variance", lambda plan: plan.losses_variance * 0.99),
        ("losses_variance", lambda _: 0.0),
        ("losses_step", lambda plan: plan.losses_step * 0.9),
    ],
)
@pytest.mark.parametrize("noise_at", ["device", "distributed"])
def test_a_plan_with_less_noise_on_the_block_is_refused_by_name(noise_at, field, change):
    config = configured(noise_at)
    plan = planned(config)
    laxer = dataclasses.replace(plan, **{field: change(plan)})
    with pytest.raises(ProtocolError, match="losses_noise"):
        laxer.refuse_if_laxer(config)
    stricter = dataclasses.replace(plan, losses_variance=plan.losses_variance * 2)
    stricter.refuse_if_laxer(config)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"losses_step": 0.0}, "losses_step"),
        ({"losses_variance": math.nan}, "losses_variance"),
        ({"losses_bound": -1.0}, "losses_bound"),
        ({"local_steps": 2}, "expected 1 where statistics"),
    ],
)
def test_a_number_that_no_honest_server_sends_is_refused_by_name(changes, named):
    given = planned(configured()).to_dict() | changes
    with pytest.raises(ProtocolError, match=named):
        Plan.from_dict(given)


def test_the_masking_terms_count_the_block():
    config = configured("distributed")
    assert planned(config).terms(SIZE).dimension == SIZE + 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"training": {"steps": 2}}, "needs one local step"),
        ({"privacy": {"client": {"noise_at": "server"}}}, "needs noise from the devices"),
        ({"privacy": {"client": OFF}}, "needs noise from the devices"),
        ({"statistics": {"enabled": True, "noise_multiplier": 0}}, "noise_multiplier"),
    ],
)
def test_settings_under_which_statistics_could_not_be_counted_are_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        parse({"statistics": {"enabled": True}, **changes})


# --- what is shown -----------------------------------------------------------------------------


def test_the_noise_said_beside_the_loss_is_that_of_the_loss():
    plan = dataclasses.replace(planned(configured()), losses_bound=10.0)
    answered, truth = 900, np.array([4000.0, 8000.0])
    spread = (answered * plan.losses_variance) ** 0.5 * plan.losses_step
    rng = np.random.default_rng(0)
    drawn = (truth + rng.normal(0, spread, 2) for _ in range(4000))
    losses = [
        statistics.statistics_of({"losses": sums}, plan, answered)["train_loss"] for sums in drawn
    ]
    said = statistics.statistics_of({"losses": truth}, plan, answered)
    assert said["train_loss"] == pytest.approx(5.0)
    assert np.std(np.array(losses, float)) == pytest.approx(said["train_loss_std"], rel=0.05)


def test_where_the_noise_outweighs_the_records_no_loss_is_told():
    plan = planned(configured())
    assert (
        statistics.statistics_of({"losses": np.array([0.1, 0.2])}, plan, 12)["train_loss"] is None
    )


def test_the_line_of_a_round_says_the_loss_and_its_noise():
    record: Any = {"round": 1, "asked": 4, "answered": 4, "declined": 0, "void": False}
    record |= {"mean_norm": 0.1, "update_norm": 0.2, "seconds": 1.0}
    assert "loss" not in progress.line(record, 2)
    noised = {"train_loss": 3.2104, "train_loss_std": 0.4131}
    assert "noised loss 3.21 +- 0.41 " in progress.line(record | {"statistics": noised}, 2)
    lost = {"train_loss": None, "train_loss_std": None}
    assert "loss lost in the noise" in progress.line(record | {"statistics": lost}, 2)


# --- whole runs --------------------------------------------------------------------------------


def test_with_statistics_too_replies_differ_in_nothing_but_the_vector(
    llama_folder, tmp_path, monkeypatch
):
    people = population(tmp_path / "people", 10, 10)
    client = {"client": {"noise_at": "device"}}
    config = tiny_config(llama_folder, people, privacy=client, statistics={"enabled": True})
    prepare(config, tmp_path / "run", resume=False)
    assert leaves_the_same(tmp_path / "run", tmp_path, monkeypatch, app)


def test_a_masked_round_tells_the_loss_of_the_cohort(llama_folder, tmp_path):
    people = population(tmp_path / "people", 16, 12)
    config = tiny_config(
        llama_folder,
        people,
        data={"clients": 12},
        rounds={"count": 1, "cohort": 12},
        privacy={"client": {"noise_at": "distributed"}},
        statistics={"enabled": True, "noise_multiplier": 0.5},
    )
    config = prepare(config, tmp_path / "run", resume=False)
    engine.run("local", tmp_path / "run", config)
    (kept,) = read_lines(tmp_path / "run" / "rounds.jsonl")
    found = kept["statistics"]
    assert kept["answered"] == 12
    # a random model over 186 words knows about log(186) = 5.2 nats
    assert abs(found["train_loss"] - 5.4) < 3 * found["train_loss_std"] + 0.5
    assert abs(found["records_per_client"] - 4) < 3 * found["records_per_client_std"] + 1
