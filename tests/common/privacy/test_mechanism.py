"""mechanism.py: one seam for the noise; a second mechanism reaches every place through it."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from privet.client.consent.offer_description import release_cost
from privet.client.privacy.gate import charges, release
from privet.client.privacy.ledger import Ledger
from privet.common.privacy import plan_maker
from privet.common.privacy.encoding import (
    NOISE_DEVIATIONS,
    NOISE_EXTRA,
    round_randomly,
    rounded_sensitivity,
    unpack,
    unwrap,
)
from privet.common.privacy.mechanism import SKELLAM, Mechanism
from privet.common.privacy.noise import (
    Closeness,
    Source,
    TestSource,
    gaussian_closeness,
    skellam,
    skellam_table,
)
from privet.common.privacy.plan_maker import make_plan
from privet.common.privacy.round_plan import Plan
from privet.common.privacy.statistics_blocks import Block
from privet.common.settings.config import Config, parse
from privet.experiments.ab_test import coverage_check
from privet.experiments.reports import claims, privacy_facts
from privet.server.rounds import _noised_mean

DIMENSION = 200


def irwin_hall(variance: float, count: int, source: Source) -> NDArray[np.int64]:
    """A toy: twelve uniform numbers less their mean, rounded; never beyond 6 deviations."""
    words = source.words(12 * count).reshape(12, count)
    drawn = variance**0.5 * (words.astype(np.float64) / 2.0**64 - 0.5).sum(axis=0)
    return np.asarray(np.rint(drawn), np.int64)


TOY = Mechanism(
    "toy noise",
    irwin_hall,
    lambda *_: Closeness(0.01, 1e-9),
    fine_variance=2.0**24,
    min_variance=2.0**18,
)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The places that choose: from the plan of a round, and from the settings of a run."""
    monkeypatch.setattr(Plan, "mechanism", TOY)
    for module in (plan_maker, claims, privacy_facts):
        monkeypatch.setattr(module, "mechanism_of", lambda _: TOY)


def settings(noise_at: str, **statistics: object) -> Config:
    client = {"noise_at": noise_at, "clip": 0.5}
    privacy = {"client": client, "example": {"enabled": False}}
    table = {"data": {"clients": 16}, "rounds": {"cohort": 16}, "privacy": privacy}
    return parse({**table, "statistics": statistics})


def planned(config: Config) -> Plan:
    return make_plan(config, "run", 1, "0" * 64, np.zeros(DIMENSION, np.float32))


@pytest.mark.parametrize("mechanism", [SKELLAM, TOY])
@given(variance=st.just(0.0) | st.floats(0.01, 2.0**24), seed=st.integers(0, 100))
def test_no_draw_is_beyond_what_keeps_a_sum_from_wrapping(mechanism, variance, seed):
    drawn = mechanism.sample(variance, 300, TestSource(seed, "x"))
    assert drawn.dtype == np.int64
    assert np.abs(drawn).max() <= NOISE_DEVIATIONS * variance**0.5 + NOISE_EXTRA
    assert variance or not drawn.any()


@pytest.mark.parametrize("mechanism", [SKELLAM, TOY])
@given(multiplier=st.floats(0.1, 10), shares=st.integers(1, 1000))
def test_shares_of_a_multiplier_are_counted_as_the_whole(mechanism, multiplier, shares):
    one = mechanism.share(multiplier, shares)
    assert mechanism.counted_variance(one**2, shares) == pytest.approx(multiplier**2)


def test_skellam_draws_the_bits_of_its_table_and_is_charged_for_its_distance():
    drawn = SKELLAM.sample(1e6, 50, TestSource(3, "x"))
    assert drawn.tolist() == skellam(skellam_table(1e6), 50, TestSource(3, "x")).tolist()
    part = Block("gains", 3, 1.5, 0.5, False, 1e-3, 1e8)
    charge = SKELLAM.charge(part, "example", "server", "add_remove", 4)
    near = gaussian_closeness(4e8, 3, 4)
    assert (charge.distance, charge.ratio) == (near.slack, near.ratio)
    assert charge.noise_multiplier == 2e4 / rounded_sensitivity(0.5, 1e-3, 3)[0]
    of_all = SKELLAM.charge(part, "client", "server", "add_remove", 4)
    assert of_all.noise_multiplier == 2e4 / rounded_sensitivity(1.5, 1e-3, 3)[0]


def test_where_nobody_adds_noise_a_part_is_charged_as_not_hidden():
    part = Block("gains", 3, 1.5, 0.5, False, 1e-3, 1e8)
    for bare, shares in ((part, 0), (dataclasses.replace(part, variance=0.0), 4)):
        charge = SKELLAM.charge(bare, "client", "server", "add_remove", shares)
        assert (charge.noise_multiplier, charge.distance, charge.ratio) == (0.0, 0.0, 0.0)


# --- a second mechanism ---------------------------------------------------------------------------


@pytest.mark.usefixtures("toy")
def test_a_second_mechanism_makes_the_grid_as_fine_as_it_wants():
    plan = planned(settings("device"))
    assert plan.bits < 32
    assert plan.counted_variance >= TOY.fine_variance


@pytest.mark.usefixtures("toy")
def test_a_second_mechanism_draws_the_gates_noise_and_the_ledger_has_its_charges(tmp_path: Path):
    config = settings("device")
    plan = planned(config)
    delta = np.zeros(DIMENSION, np.float32)
    with Ledger.open(tmp_path / "ledger", owner="test") as ledger:
        sent = release(
            delta, "0" * 64, plan, "ann", ledger, config.privacy, TestSource(1, "release")
        )
        row = ledger.rows("ann")[0]
    again = TestSource(1, "release")
    round_randomly(delta.astype(np.float64), plan.step, again.words)
    noise = irwin_hall(plan.variance, DIMENSION, again)
    assert unwrap(unpack(sent, DIMENSION, plan.bits), plan.bits).tolist() == noise.tolist()
    assert {(charge.ratio, charge.distance) for charge in row.charges} == {(0.01, 1e-9)}
    assert row.charges == charges(plan, DIMENSION, config.privacy)
    assert row.charges == release_cost(config, DIMENSION)  # what the owner was shown


@pytest.mark.usefixtures("toy")
def test_a_second_mechanism_draws_the_servers_noise():
    plan = dataclasses.replace(planned(settings("server")), rotated=False)
    mean, _ = _noised_mean(np.zeros(DIMENSION, np.uint32), plan, 1)
    noise = irwin_hall(plan.variance, DIMENSION, TestSource(1, "server round 1"))
    assert mean.tolist() == (noise * plan.step / plan.cohort).tolist()


@pytest.mark.usefixtures("toy")
def test_a_second_mechanism_draws_the_noise_of_the_ab_tests_own_check():
    plan = dataclasses.replace(planned(settings("device")), rotated=False)
    total = coverage_check.summed(np.zeros((2, 4)), plan, TestSource(1, "x"))
    again = TestSource(1, "x")
    again.words(8)  # the coins of the rounding
    noise = irwin_hall(plan.variance, 8, again).reshape(2, 4).sum(axis=0)
    assert unwrap(total, plan.bits).tolist() == noise.tolist()


@pytest.mark.usefixtures("toy")
def test_a_second_mechanism_is_named_in_what_is_promised_and_counted():
    config = settings("device", enabled=False)
    promised = " ".join(claims.promised(config)["sentences"])
    counted = claims.noise_counted(config, "device", release_cost(config, DIMENSION)[:1])
    for said in (promised, counted):
        assert "toy noise" in said
        assert "Skellam" not in said
