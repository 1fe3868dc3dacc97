"""Terms, neighbour graph and policy."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privet.common.errors import ConfigError, ProtocolError
from privet.common.secure_aggregation.terms import (
    COMPLETE,
    MAX_PARTICIPANTS,
    SECRECY,
    Graph,
    MaskingPolicy,
    Terms,
    _ring,
    default_graph,
    gap,
    neighbours,
    quorum,
    secrecy_bits,
    sized_graph,
    window_colluders,
)
from privet.common.settings.config import parse
from privet.common.settings.sections import SecureAggregationSettings

from ...masking_party import terms


def test_every_term_changes_the_binding():
    changes = ({"run": "other"}, {"round": 8}, {"plan": b"q" * 32}, {"dimension": 5}, {"bits": 19},
               {"survivors": 4}, {"colluders": 2})  # fmt: skip
    assert len({terms(**change).binding for change in ({}, *changes)}) == len(changes) + 1


@pytest.mark.parametrize(
    "change",
    [{"run": ""}, {"run": "r" * 65}, {"round": 0}, {"round": 2**32}, {"plan": b"short"},
     {"dimension": 0}, {"dimension": 2**28 + 1}, {"bits": 7}, {"bits": 33}, {"survivors": 0},
     {"survivors": MAX_PARTICIPANTS + 1}, {"colluders": -1}],
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


@given(st.integers(1, 2000), st.integers(0, 2000))
def test_two_quorums_share_more_participants_than_collude(participants, colluders):
    least = quorum(participants, colluders)
    assert 2 * least - participants > colluders
    assert 2 * (least - 1) - participants <= colluders


@pytest.mark.parametrize("participants", [2, 3, 10, 64, 104, 256, COMPLETE])
def test_up_to_several_hundred_everybody_is_a_neighbour_and_nothing_is_drawn(participants):
    colluders = participants // 10
    graph = default_graph(participants, colluders)
    assert graph == Graph(participants - 1, quorum(participants, colluders))
    assert secrecy_bits(participants, colluders, graph) == math.inf
    assert gap(b"r" * 32, participants, colluders, graph.degree, range(participants)) is None


@pytest.mark.parametrize("participants", [401, 500, 1000, 4000, 16384])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.2])
def test_the_sparse_graph_fails_2_to_the_60_rosters_with_2_to_the_minus_100(participants, share):
    colluders = int(share * participants)
    graph = default_graph(participants, colluders)
    assert graph.degree < participants - 1
    opened = log2_tail(participants - 1, colluders, graph.degree, graph.threshold)
    assert opened + math.log2(participants) + 60 <= -100
    window = graph.degree // 2
    most = window_colluders(participants, colluders, window)
    crowded = log2_tail(participants, colluders, window, most + 1)
    assert crowded + math.log2(participants) + 60 <= -100
    # and a tenth may be lost
    lost = participants // 10
    lonely = log2_tail(participants - 1, lost, graph.degree, graph.degree + 2 - graph.threshold)
    empty = log2_tail(participants, lost, window, window - most)
    assert max(lonely, empty) + math.log2(participants) <= -20


def test_where_no_sparse_graph_will_do_everybody_is_a_neighbour():
    assert default_graph(500, 300) == Graph(499, 401)


def test_the_default_graph_of_large_cohorts_grows_slowly():
    assert [default_graph(n, n // 10).degree for n in (500, 1000, 4000, 16384)] == [
        150,
        186,
        220,
        236,
    ]


def test_a_denser_graph_and_a_higher_threshold_can_be_asked_for():
    assert sized_graph(SecureAggregationSettings(), 7, 64) == Graph(63, 36)
    assert sized_graph(SecureAggregationSettings(threshold=40), 7, 64) == Graph(63, 40)
    assert sized_graph(SecureAggregationSettings(threshold=64), 7, 20) == Graph(19, 20)
    plain = sized_graph(SecureAggregationSettings(), 100, 1000)
    assert sized_graph(SecureAggregationSettings(degree=301), 100, 1000) == Graph(302, 152)
    assert sized_graph(SecureAggregationSettings(degree=20), 100, 1000) == plain
    assert sized_graph(SecureAggregationSettings(degree=1000), 100, 1000) == Graph(999, 551)


@given(st.integers(3, 400), st.integers(2, 40), st.floats(0.0, 0.9), st.data())
def test_the_bits_of_secrecy_are_the_hypergeometric_tail(participants, degree, share, data):
    degree = min(degree, participants - 1)
    threshold = data.draw(st.integers(degree // 2 + 1, degree + 1))
    colluders = int(share * participants)
    found = secrecy_bits(participants, colluders, Graph(degree, threshold))
    if degree == participants - 1:
        assert found == (math.inf if colluders < threshold else 0.0)
        return
    exact = log2_tail(participants - 1, min(colluders, participants - 1), degree, threshold)
    assert found == pytest.approx(-exact - math.log2(participants), abs=1e-6)


@given(st.integers(20, 300), st.integers(0, 60), st.integers(1, 40))
def test_a_window_has_at_most_as_many_colluders_but_with_a_negligible_chance(n, m, window):
    window, m = min(window, n), min(m, n)
    most = window_colluders(n, m, window)
    over = log2_tail(n, m, window, most + 1) + math.log2(n)
    assert over <= -SECRECY + 1e-6
    assert not most or log2_tail(n, m, window, most) + math.log2(n) > -SECRECY - 1e-6


@given(st.integers(30, 120), st.integers(0, 20), st.binary(min_size=32, max_size=32), st.data())
def test_a_list_without_a_gap_leaves_the_living_honest_connected(n, m, roster, data):
    """Whoever colludes, as long as no window has more colluders than the bound."""
    degree = data.draw(st.sampled_from(range(16, 28, 2)))
    colluding = set(data.draw(st.permutations(range(n)))[:m])
    dropped = set(data.draw(st.permutations(range(n)))[: data.draw(st.integers(0, n // 2))])
    alive = frozenset(range(n)) - dropped
    if gap(roster, n, m, degree, alive) is not None:
        return
    order, _ = _ring(roster, n)
    window, most = degree // 2, window_colluders(n, m, degree // 2)
    around = [*order, *order[:window]]
    if any(len(colluding & {*map(int, around[at : at + window])}) > most for at in range(n)):
        return
    honest = alive - colluding
    beside = {at: set(neighbours(roster, n, degree, at)) & honest for at in honest}
    reached, todo = set(), [min(honest)]
    while todo:
        at = todo.pop()
        if at not in reached:
            reached.add(at)
            todo += beside[at]
    assert reached == honest


def test_two_windows_that_only_colluders_survive_are_a_gap():
    n, degree, roster = 1000, 200, b"r" * 32
    order, _ = _ring(roster, n)
    most = window_colluders(n, 100, 100)
    everybody = frozenset(range(n))
    for left, found in ((most, most), (most + 1, None)):
        dropped = {int(at) for at in order[300 : 400 - left]}
        assert gap(roster, n, 100, degree, everybody - dropped) == found


def test_policies_that_show_one_person_are_refused():
    for wrong in ({"min_cohort": 2}, {"min_survivors": 1}, {"colluders": -1},
                  {"min_survivors": 7, "colluders": 6}):  # fmt: skip
        with pytest.raises(ConfigError, match="masking policy"):
            MaskingPolicy(**wrong)


@pytest.mark.parametrize(
    ("name", "least", "given_"),
    [("survivors", 9, 8), ("bits", 20, 19), ("colluders", 4, 3)],
)
def test_terms_below_the_policy_are_refused_with_the_field_named(name, least, given_):
    policy = MaskingPolicy(min_survivors=9, min_bits=20, colluders=4)
    good = {"survivors": 9, "bits": 20, "colluders": 4}
    policy.refuse_terms(terms(**good))
    with pytest.raises(ProtocolError, match=f"{name} = {given_}, .* at least {least}"):
        policy.refuse_terms(terms(**{**good, name: given_}))


def test_a_device_insists_on_the_cohort_its_owner_set():
    own = parse(
        {
            "data": {"clients": 64},
            "rounds": {"cohort": 64},
            "secure_aggregation": {"min_cohort": 40},
            "privacy": {"client": {"noise_at": "distributed"}},
        }
    )
    policy = MaskingPolicy.agreed(own)
    policy.refuse_cohort(40, 7, Graph(39, quorum(40, 7)))
    with pytest.raises(ProtocolError, match="39 participants, this device asks for at least 40"):
        policy.refuse_cohort(39, 7, Graph(38, quorum(39, 7)))


def test_terms_that_leave_fewer_than_two_honest_devices_are_refused():
    policy = MaskingPolicy(min_survivors=9, colluders=4)
    policy.refuse_terms(terms(survivors=9, colluders=7))
    with pytest.raises(ProtocolError, match="survivors less colluders = 1"):
        policy.refuse_terms(terms(survivors=9, colluders=8))


@pytest.mark.parametrize(
    ("participants", "degree", "threshold", "word"),
    [
        (9, 8, 6, "9 participants"),
        (2, 1, 1, "2 participants"),
        (101, 100, 57, "101 participants, the plan's cohort is 100"),
        (100, 14, 8, "14 neighbours, expected 99 .everybody.$"),
        (100, 98, 50, "98 neighbours"),
        (100, 100, 56, "100 neighbours"),
        (10, 9, 7, "threshold 7 for 10 holders out of 10, this device asks for 9 to 10"),
        (10, 9, 1, "threshold 1 "),
        (10, 9, 0, "threshold 0 "),
        (10, 9, 11, "threshold 11"),
    ],
)
def test_cohorts_below_the_policy_are_refused(participants, degree, threshold, word):
    policy = MaskingPolicy(min_survivors=9, colluders=6, max_cohort=100)
    with pytest.raises(ProtocolError, match=word):
        policy.refuse_cohort(participants, 6, Graph(degree, threshold))


@pytest.mark.parametrize(
    ("degree", "threshold", "word"),
    [
        (14, 8, "14 neighbours, expected 999 .everybody. or an even number from 16"),
        (201, 101, "201 neighbours"),
        (1000, 551, "1000 neighbours"),
        (200, 100, "threshold 100 for 201 holders out of 1000, this device asks for 101 to 201"),
        (80, 41, "80 neighbours and threshold 41 among 1000 .* 100 collude, give 66 bits"),
        (999, 550, "threshold 550 for 1000 holders out of 1000, this device asks for 551 to 1000"),
    ],
)
def test_sparse_graphs_below_the_policy_are_refused(degree, threshold, word):
    policy = MaskingPolicy(min_survivors=600, colluders=100)
    with pytest.raises(ProtocolError, match=word):
        policy.refuse_cohort(1000, 100, Graph(degree, threshold))


def test_a_graph_sparser_than_the_one_agreed_to_is_refused():
    policy = MaskingPolicy(min_survivors=600, colluders=100, min_degree=300,
                           min_threshold=200)  # fmt: skip
    policy.refuse_cohort(1000, 100, Graph(300, 200))
    policy.refuse_cohort(20, 2, Graph(19, 20))  # of a smaller roster everybody
    with pytest.raises(ProtocolError, match="298 neighbours, this device agreed to 300"):
        policy.refuse_cohort(1000, 100, Graph(298, 200))
    with pytest.raises(ProtocolError, match="threshold 199"):
        policy.refuse_cohort(1000, 100, Graph(300, 199))


@given(st.integers(12, 5000), st.floats(0.0, 0.3))
def test_the_default_graphs_pass_the_policy_that_reckons_with_as_many(participants, share):
    colluders = int(share * participants)
    policy = MaskingPolicy(min_survivors=colluders + 2, colluders=colluders)
    policy.refuse_cohort(participants, colluders, default_graph(participants, colluders))


def test_terms_are_a_value():
    assert terms() == Terms("test", 7, b"p" * 32, 4, 20, 3, 1)
