import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from privet.common.errors import ConfigError, GateRefused
from privet.common.privacy.clipping import clip

finite = st.floats(allow_nan=False, allow_infinity=False)
vectors = hnp.arrays(np.float64, st.integers(0, 40), elements=finite)
bounds = st.floats(1e-150, 1e150)


@given(vectors, bounds)
@example(np.full(7, 9e172), 1e-150)  # their quotient is subnormal: few digits
def test_the_norm_is_at_most_the_bound_for_every_finite_input(vector, bound):
    clipped = clip(vector, bound)
    assert math.hypot(*clipped.vector) <= bound
    assert np.linalg.norm(clipped.vector) <= bound
    assert clipped.bound == bound


@given(hnp.arrays(np.float64, 12, elements=st.floats(-10, 10)), st.floats(0.1, 100))
def test_clipping_keeps_the_direction_and_changes_nothing_inside_the_ball(vector, bound):
    clipped, norm = clip(vector, bound).vector, float(np.linalg.norm(vector))
    if norm <= bound * (1 - 1e-9):
        np.testing.assert_array_equal(clipped, vector)
    else:
        np.testing.assert_allclose(clipped, vector * (bound / norm), rtol=1e-9, atol=1e-12)


@given(vectors, bounds)
def test_clipping_twice_is_clipping_once(vector, bound):
    once = clip(vector, bound)
    np.testing.assert_array_equal(clip(once.vector, bound).vector, once.vector)


@given(
    hnp.arrays(np.float64, 5, elements=st.floats(-9, 9)),
    hnp.arrays(np.float64, 5, elements=st.floats(-9, 9)),
)
def test_clipping_moves_no_two_vectors_further_apart(left, right):
    apart = np.linalg.norm(clip(left, 1.0).vector - clip(right, 1.0).vector)
    assert apart <= np.linalg.norm(left - right) + 1e-10


def test_the_norm_holds_in_a_million_dimensions():
    vector = np.random.default_rng(0).standard_normal(1_000_000).astype(np.float32)
    assert math.sqrt(math.fsum(clip(vector, 0.3).vector ** 2)) <= 0.3


def test_zero_and_empty_stay():
    assert clip(np.zeros((2, 3)), 1.0).vector.tolist() == [0.0] * 6
    assert clip([], 1.0).vector.shape == (0,)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_contribution_that_is_not_finite_is_refused(bad):
    with pytest.raises(GateRefused, match="finite"):
        clip([1.0, bad], 1.0)


@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan, math.inf])
def test_a_bound_that_is_not_positive_and_finite_is_refused(bound):
    with pytest.raises(ConfigError, match="bound"):
        clip([1.0], bound)


def test_the_input_is_not_touched_and_the_result_cannot_be():
    vector = np.array([3.0, 4.0])
    clipped = clip(vector, 1.0)
    assert vector.tolist() == [3.0, 4.0]
    with pytest.raises(ValueError, match="read-only"):
        clipped.vector[0] = 9.0


def test_a_printed_contribution_does_not_show_its_numbers():
    assert "0.123" not in repr(clip([0.123], 1.0))


def test_trap_clipping_per_tensor_exceeds_the_bound_on_the_concatenation():
    tensors = [np.full(16, 1.0) for _ in range(48)]
    faulty = np.concatenate([clip(tensor, 1.0).vector for tensor in tensors])
    assert np.linalg.norm(faulty) > 6.9
    assert np.linalg.norm(clip(np.concatenate(tensors), 1.0).vector) <= 1.0
