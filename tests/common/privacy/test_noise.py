import itertools
import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from privet.common.errors import ConfigError
from privet.common.privacy.noise import (
    SystemSource,
    TestSource,
    _pmf,
    gaussian_closeness,
    gaussian_distance,
    skellam,
    skellam_table,
)


def draw(variance: float, count: int, label: str = "draw") -> NDArray[np.int64]:
    return skellam(skellam_table(variance), count, TestSource(1, label))


def exact_pmf(variance: float, reach: int) -> NDArray[np.float64]:
    """Skellam by convolving two Poisson laws: nothing in common with the code under test."""
    poisson = stats.poisson.pmf(np.arange(reach + int(variance) + 60), variance / 2)
    return np.array([float(poisson[k:] @ poisson[: poisson.size - k]) for k in range(reach)])


def chi_square(values: NDArray[np.int64], variance: float) -> float:
    """p-value of the counts of |x| <= reach, and of both tails together."""
    reach = max(1, int(2.5 * math.sqrt(variance)))
    one_side = exact_pmf(variance, reach + 1)
    expected = np.concatenate((one_side[:0:-1], one_side))
    counts = np.array([(values == k).sum() for k in range(-reach, reach + 1)])
    observed = np.append(counts, values.size - counts.sum())
    predicted = np.append(expected, 1 - expected.sum()) * values.size
    return float(stats.chisquare(observed, predicted).pvalue)


@pytest.mark.parametrize("variance", [0.1, 0.7, 3.0, 40.0])
def test_the_counts_follow_the_exact_law(variance):
    values = draw(variance, 200_000)
    assert chi_square(values, variance) > 1e-3
    assert chi_square(values, variance * 1.1) < 1e-6


@pytest.mark.parametrize("variance", [0.1, 1.0, 37.0, 900.0, 1023.0, 1024.0, 3000.0])
def test_the_table_has_the_exact_probabilities(variance):
    _, masses = _pmf(variance)
    reach = min(masses.size, int(6 * math.sqrt(variance)) + 1)
    np.testing.assert_allclose(masses[:reach], exact_pmf(variance, reach), rtol=1e-9)


@pytest.mark.parametrize("variance", [0.1, 5.0, 1500.0, 2.0**20, 2.0**30])
def test_the_thresholds_are_the_law_up_to_the_stated_distance(variance):
    table = skellam_table(variance)
    _, masses = _pmf(variance)
    high = np.diff(table.high.astype(object), prepend=0) * 2**64
    drawn = high[:100] + np.diff(table.low.astype(object), prepend=0)[:100]
    expected = masses[:100] * np.where(np.arange(masses[:100].size) == 0, 1, 2)
    np.testing.assert_allclose([float(w) / 2**127 for w in drawn], expected, rtol=1e-11)
    assert table.bound == masses.size - 1
    assert 0 < table.distance < 1e-12
    assert (np.diff(table.high.astype(np.float64)) >= 0).all()


def accepted(values: NDArray[np.int64], variance: float) -> bool:
    """Whether the sample variance fits the declared one, at about 5 standard errors."""
    error = math.sqrt(2 / values.size)
    return bool(abs(np.var(values) / variance - 1) < 5 * error)


def test_the_variance_is_the_declared_one_and_two_thirds_or_three_halves_are_rejected():
    variance = 2.0**28
    assert accepted(draw(variance, 50_000), variance)
    assert not accepted(draw(variance * 2 / 3, 50_000), variance)
    assert not accepted(draw(variance * 3 / 2, 50_000), variance)


def test_mean_skewness_and_tails_of_a_large_variance_are_right():
    values = draw(2.0**28, 300_000) / 2.0**14
    assert abs(values.mean()) < 0.01
    assert stats.kstest(values, "norm").pvalue > 1e-3
    assert 4 < np.abs(values).max() < 7


def test_shares_add_up_to_the_declared_noise():
    total = np.sum([draw(2.0, 200_000, f"share {i}") for i in range(5)], axis=0)
    assert chi_square(total, 10.0) > 1e-3
    assert chi_square(total, 9.0) < 1e-6


def test_released_values_are_integers_within_the_bound():
    table = skellam_table(50.0)
    values = skellam(table, 10_000, SystemSource())
    assert values.dtype == np.int64
    assert np.abs(values).max() <= table.bound
    assert len(set(values.tolist())) > 20


def test_variance_zero_is_all_zeros_and_a_count_of_zero_is_empty():
    assert not draw(0.0, 1000).any()
    assert draw(3.0, 0).shape == (0,)


@pytest.mark.parametrize("variance", [-1.0, math.nan, math.inf, 2.0**39])
def test_a_variance_out_of_range_is_refused(variance):
    with pytest.raises(ConfigError, match="variance"):
        skellam_table(variance)


def test_a_test_source_repeats_itself_and_labels_separate_streams():
    first, again = TestSource(7, "a"), TestSource(7, "a")
    assert first.words(64).tolist() == again.words(64).tolist()
    assert first.words(64).tolist() == again.words(64).tolist()
    assert first.words(8).tolist() != first.words(8).tolist()
    streams = {tuple(TestSource(s, l).words(2)) for s, l in [(7, "a"), (7, "b"), (8, "a")]}
    assert len(streams) == 3


def test_a_source_does_not_print_its_seed():
    assert "12345" not in repr(TestSource(12345, "label")) + repr(SystemSource())
    assert "label=***" in repr(TestSource(12345, "noise"))


class Scripted:
    """Hands out the words it was given."""

    def __init__(self, *words: int) -> None:
        self.left = list(words)

    def words(self, count: int) -> NDArray[np.uint64]:
        taken, self.left = self.left[:count], self.left[count:]
        return np.array(taken, dtype=np.uint64)


def test_a_tie_is_decided_by_64_more_bits():
    table = skellam_table(50.0)
    tie, low = int(table.high[30]) << 1, int(table.low[30])
    assert low > 0
    assert skellam(table, 1, Scripted(tie, low - 1)).tolist() == [30]
    assert skellam(table, 1, Scripted(tie, low)).tolist() == [31]
    assert skellam(table, 1, Scripted(tie | 1, low)).tolist() == [-31]


def test_a_word_beyond_the_last_threshold_is_drawn_again():
    table = skellam_table(50.0)
    beyond, settled = 2**64 - 2, int(table.high[1]) * 2 + 2
    assert skellam(table, 1, Scripted(beyond, 0, settled, 0)).tolist() == [2]


def laws(variance: float) -> Any:
    """Both noise laws on the integers, by textbook formulas."""
    reach = int(9 * math.sqrt(variance)) + 12
    one_side = exact_pmf(variance, reach)
    edges = (np.arange(-reach + 1, reach + 1) - 0.5) / math.sqrt(variance)
    return np.concatenate((one_side[:0:-1], one_side)), np.diff(stats.norm.cdf(edges))


@pytest.mark.parametrize("variance", [1.0, 2.5, 10.0, 60.0])
def test_the_gaussian_distance_bounds_the_true_one_tightly(variance):
    p, g = laws(variance)
    p = p[: g.size]
    one = 0.5 * np.abs(p - g).sum()
    assert one <= gaussian_distance(variance, 1) * (1 + 1e-6) <= 1.01 * one
    two = 0.5 * np.abs(np.multiply.outer(p, p) - np.multiply.outer(g, g)).sum()
    assert two <= gaussian_distance(variance, 2) <= 2 * two


def test_the_gaussian_distance_falls_with_the_variance_and_grows_with_the_dimension():
    by_variance = [gaussian_distance(2.0**k, 768) for k in range(0, 35, 2)]
    assert all(a >= b for a, b in itertools.pairwise(by_variance))
    assert by_variance[-1] < 3e-10
    assert gaussian_distance(2.0**20, 10) < gaussian_distance(2.0**20, 1000)
    assert gaussian_distance(2.0**20, 768) == pytest.approx(0.1063 * 768**0.5 / 2**20, rel=1e-2)
    assert gaussian_distance(0.5, 1) == 1.0


@pytest.mark.parametrize("variance", [200.0, 2000.0])
def test_no_event_is_less_close_than_stated(variance):
    p, g = laws(variance)
    p = p[: g.size]
    stated = gaussian_closeness(variance, 1)
    for left, right in ((p, g), (g, p)):
        excess = np.maximum(left - math.exp(stated.ratio) * right, 0).sum()
        assert excess <= stated.slack + 1e-15


def test_the_log_ratio_of_many_coordinates_stays_below_its_bound():
    variance, dimension = 10_000.0, 500
    values, p = _pmf(variance)
    edges = (np.arange(0, values.size + 1) - 0.5) / 100
    ratio = np.log(p) - np.log(stats.norm.sf(edges[:-1]) - stats.norm.sf(edges[1:]))
    draws = np.abs(draw(variance, 200 * dimension)).reshape(200, dimension)
    sums = np.abs(ratio[draws].sum(axis=1))
    assert sums.max() < gaussian_closeness(variance, dimension).ratio
    assert sums.std() > 0


def test_closeness_at_the_working_point_is_free_and_below_variance_one_claims_nothing():
    close = gaussian_closeness(2.0**34, 3072, shares=32)
    assert close.ratio < 2e-6
    assert close.slack < 1e-12
    assert gaussian_closeness(0.9, 1).slack == 1.0
