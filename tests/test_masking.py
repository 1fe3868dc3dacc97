"""Terms, neighbour graph and policy."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privet.common.errors import ConfigError, ProtocolError
from privet.common.masking import (
    MOST_PARTICIPANTS,
    MaskingPolicy,
    Terms,
    default_degree,
    default_threshold,
    neighbours,
    secrecy_bits,
)

from .masking_party import terms


def test_every_term_changes_the_binding():
    changes = ({"run": "other"}, {"round": 8}, {"plan": b"q" * 32}, {"dimension": 5}, {"bits": 19},
               {"survivors": 4})  # fmt: skip
    assert len({terms(**change).binding for change in ({}, *changes)}) == len(changes) + 1


@pytest.mark.parametrize(
    "change",
    [{"run": ""}, {"run": "r" * 65}, {"round": 0}, {"round": 2**32}, {"plan": b"short"},
     {"dimension": 0}, {"dimension": 2**28 + 1}, {"bits": 7}, {"bits": 33}, {"survivors": 0},
     {"survivors": MOST_PARTICIPANTS + 1}],
)  # fmt: skip
def test_terms_out_of_range_are_refused(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        terms(**change)


@given(st.integers(2, 120), st.integers(1, 30), st.binary(min_size=32, max_size=32))
def test_neighbours_are_mutual_and_each_has_as_many(participants, half, roster):
    degree = min(2 * half, participants - 1)
    beside = [neighbours(roster, participants, degree, at) for at in range(participants)]
    for at, mine in enumerate(beside):
        assert len(mine) == len(set(mine)) == degree
        assert mine == sorted(mine)
        assert at not in mine
        assert all(at in beside[other] for other in mine)


def test_the_ring_depends_on_every_byte_of_the_roster():
    assert neighbours(b"a" * 32, 500, 4, 0) != neighbours(b"b" * 32, 500, 4, 0)


def log2_tail(population: int, marked: int, drawn: int, least: int) -> float:
    """log2 of P[at least `least` marked among `drawn`], without replacement."""
    ways = sum(
        math.comb(marked, i) * math.comb(population - marked, drawn - i)
        for i in range(least, min(marked, drawn) + 1)
    )
    return math.log2(ways) - math.log2(math.comb(population, drawn)) if ways else -math.inf


@pytest.mark.parametrize("participants", [3, 10, 21, 50, 77, 100, 300, 1000, 4000, 16384])
def test_the_default_graph_keeps_both_failures_below_their_bound(participants):
    degree = default_degree(participants)
    holders, threshold = degree + 1, default_threshold(degree)
    tenth = participants // 10
    both_secrets_open = log2_tail(participants - 1, tenth, degree, 2 * threshold - holders)
    too_few_left = log2_tail(participants - 1, tenth, degree, holders - threshold + 1)
    assert both_secrets_open + math.log2(participants) <= -40
    assert too_few_left + math.log2(participants) <= -20


@given(st.integers(3, 400), st.integers(2, 40), st.floats(0.0, 0.9), st.data())
def test_the_bits_of_secrecy_are_the_hypergeometric_tail(participants, degree, colluding, data):
    degree = min(degree, participants - 1)
    threshold = data.draw(st.integers(degree // 2 + 1, degree + 1))
    colluders = min(int(colluding * participants), participants - 1)
    exact = log2_tail(participants - 1, colluders, degree, 2 * threshold - degree - 1)
    found = secrecy_bits(participants, degree, threshold, colluding)
    assert found == pytest.approx(-exact - math.log2(participants), abs=1e-6)


def test_at_a_threshold_of_half_there_is_no_secrecy():
    assert secrecy_bits(100, 39, 20, 0.0) < 0


def test_small_cohorts_are_complete_and_large_ones_grow_slowly():
    assert [default_degree(n) for n in (2, 10, 17)] == [1, 9, 16]
    assert all(default_degree(n) <= 13 * math.log2(n) for n in range(2, 16385, 13))
    assert [default_degree(n) for n in (50, 100, 1000, 10000)] == [16, 30, 124, 160]


def test_policies_that_show_one_person_are_refused():
    for wrong in ({"smallest_cohort": 2}, {"smallest_survivors": 1}, {"smallest_threshold": 0.5},
                  {"smallest_threshold": 1.1}, {"colluding": 1.0}):  # fmt: skip
        with pytest.raises(ConfigError, match="masking policy"):
            MaskingPolicy(**wrong)


def test_terms_below_the_policy_are_refused_with_the_field_named():
    policy = MaskingPolicy(smallest_survivors=4, smallest_bits=20)
    policy.refuse_terms(terms(survivors=4))
    with pytest.raises(ProtocolError, match="survivors >= 4"):
        policy.refuse_terms(terms(survivors=3))
    with pytest.raises(ProtocolError, match="bits >= 20"):
        policy.refuse_terms(terms(survivors=4, bits=19))


@pytest.mark.parametrize(
    ("participants", "degree", "threshold", "word"),
    [
        (9, 8, 6, "9 participants"),
        (2, 1, 1, "2 participants"),
        (100, 14, 10, "14 neighbours"),
        (100, 31, 22, "31 neighbours"),
        (100, 22, 16, "22 neighbours and threshold 16 .* 12 bits"),
        (10, 8, 6, "8 neighbours"),
        (10, 10, 8, "threshold 8 for 11 holders out of 10"),
        (10, 9, 6, "threshold 6"),
        (10, 9, 1, "threshold 1 "),
        (10, 9, 0, "threshold 0 "),
        (10, 9, 11, "threshold 11"),
    ],
)
def test_cohorts_below_the_policy_are_refused(participants, degree, threshold, word):
    with pytest.raises(ProtocolError, match=word):
        MaskingPolicy().refuse_cohort(participants, degree, threshold)


@given(st.integers(10, 5000))
def test_the_defaults_pass_the_default_policy(participants):
    degree = default_degree(participants)
    MaskingPolicy().refuse_cohort(participants, degree, default_threshold(degree))


def test_terms_are_a_value():
    assert terms() == Terms("test", 7, b"p" * 32, 4, 20, 3)
