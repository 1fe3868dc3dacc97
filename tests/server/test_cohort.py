"""server/cohort.py"""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privet.common.errors import ConfigError
from privet.server.cohort import draw


@given(
    clients=st.integers(1, 40), rounds=st.integers(1, 30), seed=st.integers(0, 9), data=st.data()
)
def test_nobody_is_asked_twice_before_everybody_was_asked_once(clients, rounds, seed, data):
    cohort = data.draw(st.integers(1, clients))
    counts: Counter[int] = Counter()
    for number in range(1, rounds + 1):
        chosen = draw(clients, cohort, number, seed)
        assert len(set(chosen)) == len(chosen) == cohort
        counts.update(chosen)
        least = min(counts.get(i, 0) for i in range(clients))
        # a cohort that spans two passes may meet somebody again one round early at most
        assert max(counts.values()) - least <= 1 + (clients % cohort != 0)


def test_independent_draws_would_ask_somebody_too_often():
    import numpy as np

    rng = np.random.default_rng(0)
    faulty = Counter(int(i) for _ in range(4) for i in rng.choice(256, 64, replace=False))
    ours = Counter(i for r in range(1, 5) for i in draw(256, 64, r, seed=0))
    assert max(faulty.values()) > 1
    assert set(ours.values()) == {1}


def test_a_cohort_larger_than_the_population_is_refused():
    with pytest.raises(ConfigError, match=r"rounds.cohort = 5 .* 4 clients"):
        draw(4, 5, 1, 0)
