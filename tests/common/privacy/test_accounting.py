import json
import math
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting import dp_event, pld, rdp
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from privet.common.errors import ConfigError, LedgerCorrupt, PrivacyError
from privet.common.privacy.accounting import (
    _RELATIONS,
    Adjacency,
    Charge,
    _accountant,
    calibrate,
    delta,
    epsilon,
    within,
)
from privet.experiments.reports.second_accountant import cross_check

DELTA = 1e-5
_ORDERS = np.concatenate((1 + np.geomspace(1e-3, 10, 200), np.geomspace(11.5, 1e5, 200)))


def charge(
    multiplier: float,
    steps: int = 1,
    rate: float = 1.0,
    adjacency: Adjacency = "add_remove",
    **more: float,
) -> Charge:
    return Charge("client", "analyst", adjacency, multiplier, rate, steps, **more)


def spent(*args: Any, **more: Any) -> float:
    return epsilon([charge(*args, **more)], DELTA)


def pld_epsilon(event: Any, relation: Any = None) -> float:
    relation = relation or dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    accountant = dp_accounting.pld.PLDAccountant(relation)
    accountant.compose(event)
    return float(accountant.get_epsilon(DELTA))


def test_the_check_values_of_zcdp_are_reproduced():
    for rho, expected in ((0.15, 3.416), (0.0144, 0.996), (0.2, 3.98), (2.0, 14.27)):
        assert epsilon([charge(math.sqrt(1 / (2 * rho)))], 1e-10) == pytest.approx(
            expected, abs=5e-3
        )


def test_participations_are_counted_without_amplification():
    assert spent(1.0, 100, 0.1) == pytest.approx(7.05, abs=0.01)
    assert spent(1.0, 10) == pytest.approx(17.9, abs=0.05)
    assert spent(1.0, 100) == pytest.approx(91.8, abs=0.05)


@pytest.mark.parametrize("adjacency", ["add_remove", "zero_out", "replace_one"])
def test_a_sampled_release_kept_from_another_total_changes_no_bit(adjacency):
    relation = _RELATIONS[adjacency]
    for releases in (3, 1, 7):  # the same release, in three totals
        event = dp_accounting.PoissonSampledDpEvent(0.25, dp_accounting.GaussianDpEvent(1.1))
        accountant = dp_accounting.pld.PLDAccountant(relation, 1e-4)
        accountant.compose(dp_accounting.SelfComposedDpEvent(event, releases))
        found = _accountant(adjacency, ((1.1, 0.25, releases),))
        assert found.get_epsilon(DELTA) == accountant.get_epsilon(DELTA)
        assert found.get_delta(0.5) == accountant.get_delta(0.5)


def test_trap_the_epsilon_of_a_round_is_not_the_total():
    one_round = calibrate(1.0, DELTA, 1, "add_remove")
    history = [charge(one_round) for _ in range(100)]
    faulty = max(epsilon([c], DELTA) for c in history)
    assert faulty == pytest.approx(1.0, abs=1e-3)
    assert epsilon(history, DELTA) == pytest.approx(14.4, abs=0.05)


def test_the_total_grows_with_every_round_and_equals_an_independent_pld_composition():
    totals = [spent(4.0, rounds) for rounds in range(1, 21)]
    assert totals == sorted(totals)
    assert totals[-1] == pytest.approx(4.983, abs=1e-3)
    event = dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(4.0), 20)
    assert totals[-1] == pytest.approx(pld_epsilon(event), rel=1e-3)


def test_trap_the_classical_gaussian_formula_is_wrong_above_one():
    sigma = math.sqrt(2 * math.log(1.25 / DELTA)) / 25
    assert spent(sigma) == pytest.approx(34.6, abs=0.1)


def test_trap_replace_one_read_as_add_remove():
    faulty, right = spent(4.0, 20), spent(4.0, 20, adjacency="replace_one")
    assert faulty == pytest.approx(4.98, abs=0.01)
    assert right == pytest.approx(11.5, abs=0.05)
    relation = dp_accounting.NeighboringRelation.REPLACE_ONE
    event = dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(4.0), 20)
    assert right == pytest.approx(pld_epsilon(event, relation=relation), rel=1e-3)
    assert spent(4.0, 20, adjacency="zero_out") == faulty


def test_trap_noise_for_one_of_48_tensors():
    assert spent(4.0) == pytest.approx(0.93, abs=0.005)
    assert spent(4.0 / math.sqrt(48)) == pytest.approx(8.39, abs=0.01)


def test_trap_weights_by_sample_count():
    for heaviest, expected in ((2, 11.5), (5, 38.7), (10, 109.0)):
        assert spent(4.0 / heaviest, 20) == pytest.approx(expected, rel=0.005)


def test_trap_shares_sized_by_the_cohort():
    for dropout, expected in ((0.1, 5.30), (0.3, 6.15), (0.5, 7.51)):
        assert spent(4.0 * math.sqrt(1 - dropout), 20) == pytest.approx(expected, abs=0.01)


def mixture_epsilon(
    noise_multiplier: float,
    sampling_rate: float,
    steps: int,
    records: int,
    delta: float,
    interval: float = 1e-3,
) -> float:
    """Epsilon of a whole client under example-level DP-SGD, add_remove.

    The client's `records` are Poisson-sampled independently, so a step's sensitivity is binomial:
    a mixture of Gaussians (Choquette-Choo et al. 2024). Multiplying one record's epsilon would
    give too little.

    Args:
        noise_multiplier: against one record's clip; 0 gives infinity.
        sampling_rate: of each record.
        steps: noised steps.
        records: of the client.
        delta: 0 < delta < 1.
        interval: of the PLD's grid; the result rounds upwards.
    """
    counts = np.arange(records + 1)
    event = dp_event.MixtureOfGaussiansDpEvent(
        noise_multiplier,
        tuple(counts.tolist()),
        tuple(binom.pmf(counts, records, sampling_rate).tolist()),
    )
    accountant = pld.PLDAccountant(_RELATIONS["add_remove"], interval)
    accountant.compose(dp_event.SelfComposedDpEvent(event, steps))
    return float(accountant.get_epsilon(delta))


def test_trap_a_clients_epsilon_is_not_its_records_times_one_records():
    one = epsilon([charge(1.0, 400, 0.005)], 1e-6)
    client = mixture_epsilon(1.0, 0.005, 400, 8, 1e-6, interval=5e-3)
    assert one == pytest.approx(0.72, abs=0.01)
    assert client == pytest.approx(6.63, abs=0.01)
    assert 8 * one < client


@pytest.mark.parametrize(
    "other",
    [
        Charge("example", "analyst", "add_remove", 1.0),
        Charge("client", "server", "add_remove", 1.0),
        Charge("client", "analyst", "replace_one", 1.0),
    ],
)
def test_units_adversaries_and_adjacencies_are_not_mixed(other):
    with pytest.raises(PrivacyError, match="one for each"):
        epsilon([charge(1.0), other], DELTA)


def test_adjacency_has_no_default():
    with pytest.raises(TypeError):
        Charge("client", "analyst", noise_multiplier=1.0)  # type: ignore[call-arg]


def test_no_release_costs_nothing_and_no_noise_costs_everything():
    assert epsilon([], DELTA) == 0.0
    assert delta([], 1.0) == 0.0
    assert spent(0.0) == math.inf
    assert epsilon([charge(1.0), charge(0.0)], DELTA) == math.inf
    assert delta([charge(0.0)], 3.0) == 1.0


def test_the_order_and_the_grouping_of_charges_do_not_matter():
    mixed = [charge(2.0), charge(3.0, 2), charge(1.0, 5, 0.1), charge(2.0)]
    expected = epsilon(mixed, DELTA)
    assert epsilon(reversed(mixed), DELTA) == expected
    assert epsilon([charge(2.0, 2), charge(3.0), charge(3.0), *mixed[2:3]], DELTA) == expected


def test_plain_and_sampled_charges_compose_as_in_the_pld_accountant():
    event = dp_accounting.ComposedDpEvent(
        [charge(3.0, 4).event, charge(5.0).event, charge(2.0, 20, 0.05).event]
    )
    total = epsilon([charge(3.0, 4), charge(5.0), charge(2.0, 20, 0.05)], DELTA)
    assert total == pytest.approx(pld_epsilon(event), rel=1e-3)


def test_events_use_dp_accountings_words():
    sampled = dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(2.0))
    assert charge(2.0).event == dp_accounting.GaussianDpEvent(2.0)
    assert charge(2.0, 7, 0.1).event == dp_accounting.SelfComposedDpEvent(sampled, 7)


@given(st.floats(0.3, 20), st.integers(1, 200), st.floats(1e-9, 1e-3))
def test_delta_undoes_epsilon(multiplier, steps, at):
    charges = [charge(multiplier, steps)]
    assert delta(charges, epsilon(charges, at)) <= at * (1 + 1e-6)


def test_delta_undoes_epsilon_with_sampling_and_slack():
    charges = [charge(1.0, 50, 0.05, distance=1e-9, ratio=1e-5)]
    found = epsilon(charges, DELTA)
    assert delta(charges, found) <= DELTA
    assert delta(charges, found - 0.01) > DELTA


def test_the_slack_of_integer_noise_is_charged():
    plain = spent(4.0, 20)
    slack = spent(4.0, 20, distance=1e-9)
    assert plain < slack < plain + 0.2
    solved = delta([charge(4.0, 20)], slack) + (1 + math.exp(slack)) * 20e-9
    assert DELTA * 0.9999 < solved <= DELTA
    assert spent(4.0, 20, distance=1e-6) == math.inf
    assert spent(4.0, 20, ratio=1e-3) == pytest.approx(plain + 2 * 20e-3, abs=0.02)


def test_trap_slack_added_to_delta_without_its_factor_understates():
    faulty = epsilon([charge(4.0, 20)], DELTA - 20e-9)
    assert delta([charge(4.0, 20, distance=1e-9)], faulty) > 1.2 * DELTA


@pytest.mark.parametrize("adjacency", ["add_remove", "zero_out", "replace_one"])
@pytest.mark.parametrize("target", [0.1, 1.0, 10.0, 100.0])
def test_calibrated_noise_meets_the_target_and_not_much_more(adjacency, target):
    multiplier = calibrate(target, DELTA, 12, adjacency)
    reached = spent(multiplier, 12, adjacency=adjacency)
    assert target * (1 - 1e-6) < reached <= target


def test_calibration_counts_the_slack_or_says_that_no_noise_reaches_the_target():
    assert calibrate(8.0, DELTA, 4, "add_remove", distance=1e-10) > calibrate(
        8.0, DELTA, 4, "add_remove"
    )
    with pytest.raises(ConfigError, match="finer grid"):
        calibrate(8.0, DELTA, 4, "add_remove", distance=2e-6)


def skellam_rdp_epsilon(
    variance: float, l2: float, l1: float, releases: int, delta: float
) -> float:
    """The published conservative bound for Skellam noise, as a second opinion.

    Theorem 3.5 of Agarwal, Kairouz, Liu 2021, for real orders above 1, and the conversion from
    Renyi to approximate DP of Canonne, Kamath, Steinke 2020 as in dp_accounting.

    Args:
        variance: of the total noise in a coordinate, grid units squared; 0 gives infinity.
        l2: sensitivity of the rounded vector, grid units.
        l1: the same in l1.
        releases: identical ones.
        delta: 0 < delta < 1.
    """
    if variance == 0:
        return math.inf
    second = ((2 * _ORDERS - 1) * l2**2 + 6 * l1) / (4 * variance**2)
    loss = _ORDERS * l2**2 / (2 * variance) + np.minimum(second, 3 * l1 / (2 * variance))
    return float(rdp.compute_epsilon(_ORDERS, releases * loss, delta)[0])


def test_the_published_skellam_bound_agrees_with_the_gaussian_figure():
    variance, l2 = 2.0**34, 2.0**17 / 4
    second = skellam_rdp_epsilon(variance, l2, l2 * math.sqrt(768), 20, DELTA)
    first = spent(4.0, 20)
    assert first <= second <= 1.08 * first
    coarse = skellam_rdp_epsilon(16.0, 1.0, 1.0, 20, DELTA)
    assert coarse > second
    assert skellam_rdp_epsilon(0.0, 1.0, 1.0, 1, DELTA) == math.inf


charges = st.builds(
    Charge,
    st.sampled_from(["client", "example"]),
    st.sampled_from(["analyst", "server"]),
    st.sampled_from(["add_remove", "zero_out", "replace_one"]),
    st.floats(0, 1e6),
    st.floats(1e-6, 1),
    st.integers(1, 10**6),
    st.floats(0, 1),
    st.floats(0, 10),
)


@given(charges)
def test_json_is_canonical_and_reads_back_exactly(one):
    text = one.to_json()
    assert Charge.from_json(text) == one
    assert Charge.from_json(text).to_json() == text


GOOD = json.loads(charge(2.0).to_json())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "nonsense",
        json.dumps({**GOOD, "extra": 1}),
        json.dumps({k: v for k, v in GOOD.items() if k != "adjacency"}),
        json.dumps({**GOOD, "adjacency": "other"}),
        json.dumps({**GOOD, "unit": ["client"]}),
        json.dumps({**GOOD, "noise_multiplier": "2"}),
        json.dumps({**GOOD, "noise_multiplier": True}),
        json.dumps({**GOOD, "noise_multiplier": math.nan}),
        json.dumps({**GOOD, "noise_multiplier": -1.0}),
        json.dumps({**GOOD, "sampling_rate": 1.5}),
        json.dumps({**GOOD, "steps": 1.0}),
        json.dumps({**GOOD, "steps": 0}),
        json.dumps({**GOOD, "distance": math.inf}),
        json.dumps(GOOD).replace('"distance": 0.0', '"distance": 1e999'),
        json.dumps(GOOD)[:-1] + ', "steps": 9}',
    ],
)
def test_a_damaged_charge_is_refused(text):
    with pytest.raises(LedgerCorrupt):
        Charge.from_json(text)


@pytest.mark.parametrize("bad", [0.0, 1.0, -1e-5, math.nan])
def test_a_delta_out_of_range_is_refused(bad):
    with pytest.raises(ConfigError, match="delta"):
        epsilon([charge(1.0)], bad)


@pytest.mark.parametrize(("rate", "multipliers"), [(1.0, (0.5, 2, 10)), (0.25, (1, 4, 10))])
def test_two_independent_accountants_agree(rate, multipliers):
    for multiplier in multipliers:
        for steps in (1, 100):
            history = [charge(multiplier, steps, rate)]
            name, other = cross_check(history, DELTA)
            assert name == "opacus.prv"
            assert other == pytest.approx(epsilon(history, DELTA), rel=0.005)


def test_the_accountants_agree_on_small_rates_and_on_mixed_histories_with_slack():
    for history in (
        [charge(2.0, 100, 0.01)],
        [charge(10.0, 4, 0.01)],
        [charge(50.0, 100, 0.01)],
        [charge(3.0, 4, ratio=1e-4, distance=1e-10), charge(5.0), charge(2.0, 20, 0.05)],
        [charge(4.0, 20, adjacency="replace_one")],
    ):
        name, other = cross_check(history, DELTA)
        assert name == "opacus.prv"
        assert other == pytest.approx(epsilon(history, DELTA), rel=0.01)


def test_the_cross_check_falls_back_and_says_so_or_says_that_it_cannot():
    name, other = cross_check([charge(1.0)], 1e-18)
    assert name == "opacus.rdp"
    assert 8.99 < epsilon([charge(1.0)], 1e-18) <= other < 9.3
    assert cross_check([charge(0.02)], DELTA)[0] == "opacus.rdp"
    assert spent(0.02) == pytest.approx(1459, rel=0.01)
    assert cross_check([], DELTA) == ("opacus.prv", 0.0)
    assert cross_check([charge(0.0)], DELTA)[1] == math.inf
    with pytest.raises(PrivacyError, match="replace_one"):
        cross_check([charge(1.0, 1, 0.5, adjacency="replace_one")], DELTA)


@pytest.mark.parametrize("rate", [1.0, 0.25])
@pytest.mark.parametrize("adjacency", ["add_remove", "replace_one"])
@pytest.mark.parametrize("releases", [1, 7])
def test_within_agrees_with_epsilon_on_both_sides_of_the_budget(rate, adjacency, releases):
    charges = [Charge("example", "server", adjacency, 1.2, rate, distance=1e-12)] * releases
    exact = epsilon(charges, 1e-5)
    if math.isinf(exact):  # no accountant for it: nothing is within any budget
        assert not within(charges, 1e-5, 1e9)
        return
    assert within(charges, 1e-5, exact * 1.0001)
    assert within(charges, 1e-5, exact * 3)
    assert not within(charges, 1e-5, exact * 0.9999)
    assert not within([*charges, Charge("example", "server", adjacency, 0.0)], 1e-5, 1e9)
