"""common/privacy/rotation.py"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from privet.common.privacy.rotation import flat_bound, rotate, unrotate


@given(size=st.integers(1, 300), seed=st.text(max_size=5), number=st.integers(0, 99))
def test_a_rotation_keeps_the_norm_and_is_undone_exactly_enough(size, seed, number):
    vector = np.random.default_rng(number).normal(size=size)
    turned = rotate(vector, seed)
    assert np.linalg.norm(turned) == pytest.approx(np.linalg.norm(vector), rel=1e-12)
    assert unrotate(turned, seed) == pytest.approx(vector, abs=1e-12)


def test_it_is_linear_so_a_sum_can_be_turned_back():
    one, two = np.random.default_rng(0).normal(size=(2, 50))
    both = rotate(one, "s") + rotate(two, "s")
    assert unrotate(both, "s") == pytest.approx(one + two, abs=1e-12)


def test_the_worst_vector_without_rotation_is_flat_after_it():
    size = 4096
    spike = np.zeros(size)
    spike[17] = 1.0
    bound = flat_bound(1.0, size)
    assert bound < 0.25
    for seed in "abcdef":
        assert np.abs(rotate(spike, seed)).max() <= bound
    assert np.abs(spike).max() > bound  # what a modulus sized for the bound would let wrap


def test_without_secret_signs_an_adversarial_vector_would_not_be_flat():
    size = 4096
    wave = unrotate(np.eye(size)[5], "known")
    assert np.abs(rotate(wave, "known")).max() == pytest.approx(1.0)
    assert np.abs(rotate(wave, "other")).max() <= flat_bound(1.0, size)


def test_the_bound_is_never_above_the_norm():
    assert flat_bound(2.0, 1) == 2.0
    assert flat_bound(1.0, 1 << 20) < 0.02
