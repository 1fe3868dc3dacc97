"""Statistics over users."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privet.common.errors import PrivetError
from privet.experiments.evaluation.user_statistics import (
    Interval,
    bootstrap_mean,
    fraction_hurt,
    gini,
    paired_difference,
    percentile,
    win_rate,
)

numbers = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30)
fast = settings(max_examples=30, deadline=None)


def test_the_interval_covers_the_true_mean_about_95_times_in_100() -> None:
    generator = np.random.default_rng(0)
    trials = 400
    inside = 0
    for seed in range(trials):
        interval = bootstrap_mean(generator.normal(3.0, 2.0, size=60), draws=400, seed=seed)
        inside += interval.low <= 3.0 <= interval.high
    assert 0.90 <= inside / trials <= 0.98


def test_the_interval_agrees_with_the_normal_one_on_many_users() -> None:
    values = np.random.default_rng(1).exponential(size=2000)
    interval = bootstrap_mean(values, draws=4000, seed=3)
    half = 1.96 * values.std() / math.sqrt(2000)
    assert interval.low == pytest.approx(values.mean() - half, abs=half / 10)
    assert interval.high == pytest.approx(values.mean() + half, abs=half / 10)


@fast
@given(numbers)
def test_the_mean_lies_in_its_interval_and_the_same_seed_gives_the_same_one(
    values: list[float],
) -> None:
    interval = bootstrap_mean(values, draws=100, seed=5)
    assert interval == bootstrap_mean(values, draws=100, seed=5)
    assert min(values) - 1e-6 <= interval.mean <= max(values) + 1e-6
    assert interval.low <= interval.high


def test_many_draws_of_many_users_are_made_in_pieces_and_all_used() -> None:
    interval = bootstrap_mean(np.arange(30_000.0), draws=300, seed=0)
    assert interval.low < interval.mean < interval.high
    assert interval.high - interval.low < 300


def test_one_user_gives_a_mean_and_no_interval() -> None:
    interval = bootstrap_mean([2.5])
    assert interval == Interval(2.5, -math.inf, math.inf)
    assert not interval.excludes_zero
    assert interval.as_dict() == {"mean": 2.5, "ci95": None}


def test_equal_values_give_an_interval_of_width_zero() -> None:
    assert bootstrap_mean([0.5] * 8) == Interval(0.5, 0.5, 0.5)


def test_an_interval_that_touches_zero_does_not_exclude_it() -> None:
    assert not Interval(1.0, 0.0, 2.0).excludes_zero
    assert Interval(1.0, 0.1, 2.0).excludes_zero
    assert Interval(-1.0, -2.0, -0.1).excludes_zero


def test_the_paired_difference_is_far_sharper_than_the_faulty_unpaired_one() -> None:
    generator = np.random.default_rng(2)
    hardness = generator.normal(5.0, 1.0, size=80)  # users differ far more than the models
    personal = hardness - 0.05 + generator.normal(0, 0.02, size=80)
    paired = paired_difference(hardness, personal)

    def unpaired_faulty() -> Interval:
        first, second = bootstrap_mean(hardness, seed=0), bootstrap_mean(personal, seed=1)
        return Interval(first.mean - second.mean, first.low - second.high, first.high - second.low)

    assert paired.excludes_zero
    assert not unpaired_faulty().excludes_zero


def test_a_paired_difference_of_different_users_is_refused() -> None:
    with pytest.raises(PrivetError, match="same users on both sides, got 2 and 3"):
        paired_difference([1.0, 2.0], [1.0, 2.0, 3.0])


@fast
@given(numbers, st.floats(0, 10))
def test_winning_and_losing_sum_to_one_when_sides_are_swapped(
    gains: list[float], tolerance: float
) -> None:
    swapped = [-gain for gain in gains]
    total = win_rate(gains, tolerance=tolerance) + win_rate(swapped, tolerance=tolerance)
    assert total == pytest.approx(1.0)


def test_all_ties_are_half_wins_and_nobody_is_hurt() -> None:
    assert win_rate([0.0] * 5) == 0.5
    assert fraction_hurt([0.0] * 5) == 0.0


def test_a_user_who_lost_exactly_the_tolerance_is_not_hurt() -> None:
    assert fraction_hurt([-0.5, -0.25, 1.0], tolerance=0.25) == pytest.approx(1 / 3)


def test_percentiles_of_one_user_are_that_user() -> None:
    assert percentile([4.0], 10) == percentile([4.0], 90) == 4.0
    assert percentile([0.0, 10.0], 10) == pytest.approx(1.0)


@fast
@given(st.lists(st.floats(0, 1e300), min_size=1, max_size=30), st.floats(1e-3, 1e3))
def test_gini_is_between_0_and_1_and_blind_to_the_unit(values: list[float], unit: float) -> None:
    assert 0 <= gini(values) < 1
    assert gini([value * unit for value in values]) == pytest.approx(gini(values), abs=1e-6)


@fast
@given(st.lists(st.floats(0, 100), min_size=1, max_size=12))
def test_gini_is_the_mean_difference_of_pairs(values: list[float]) -> None:
    array = np.array(values)
    if array.sum() < 1e-6:
        return
    pairs = np.abs(array[:, None] - array[None]).mean() / (2 * array.mean())
    assert gini(values) == pytest.approx(pairs, abs=1e-9)


def test_gini_of_nothing_to_share_is_zero() -> None:
    assert gini([0.0, 0.0]) == 0.0
    assert gini([7.0]) == 0.0


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused_and_counted(wrong: float) -> None:
    values = [1.0, wrong, 2.0]
    for function in (bootstrap_mean, win_rate, fraction_hurt, gini):
        with pytest.raises(PrivetError, match="1 of the 3 users"):
            function(values)
    with pytest.raises(PrivetError, match="1 of the 3 users"):
        percentile(values, 10)


def test_no_user_is_refused() -> None:
    with pytest.raises(PrivetError, match="at least one user"):
        bootstrap_mean([])


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: bootstrap_mean([1.0, 2.0], draws=10), "at least 100 draws, got draws = 10"),
        (lambda: percentile([1.0], 101), "from 0 to 100, got 101"),
        (lambda: gini([1.0, -2.0]), "at least 0, got -2"),
        (lambda: win_rate([1.0], tolerance=-1), "tolerance must be a number of at least 0"),
        (lambda: fraction_hurt([1.0], tolerance=math.nan), "tolerance must be a number"),
    ],
)
def test_a_wrong_argument_is_named(call, sentence) -> None:
    with pytest.raises(PrivetError, match=sentence):
        call()
