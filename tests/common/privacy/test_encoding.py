import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from privet.common.errors import ConfigError, GateRefused, PrivacyError, ProtocolError
from privet.common.privacy.encoding import (
    DEFAULT_BETA,
    Grid,
    cannot_wrap,
    choose_grid,
    decode,
    pack,
    round_randomly,
    rounded_sensitivity,
    unpack,
    unwrap,
    wrap,
)
from privet.common.privacy.noise import MAX_VARIANCE, TestSource, skellam_table

bits_strategy = st.integers(8, 32)


def words(label: str = "rounding") -> Callable[[int], NDArray[np.uint64]]:
    return TestSource(3, label).words


@given(st.data(), bits_strategy)
def test_unwrapping_undoes_wrapping_in_range(data, bits):
    inside = st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    values = data.draw(hnp.arrays(np.int64, st.integers(0, 20), elements=inside))
    wrapped = wrap(values, bits)
    assert wrapped.dtype == np.uint32
    np.testing.assert_array_equal(unwrap(wrapped, bits), values)


@given(hnp.arrays(np.int64, (4, 9), elements=st.integers(-(2**61), 2**61)), bits_strategy)
def test_the_sum_of_the_wrapped_is_the_wrapped_sum(values, bits):
    added = np.add.reduce(wrap(values, bits), axis=0, dtype=np.uint32)
    np.testing.assert_array_equal(unwrap(added, bits), unwrap(wrap(values.sum(0), bits), bits))


@given(st.data(), bits_strategy)
def test_unpacking_undoes_packing(data, bits):
    residues = data.draw(
        hnp.arrays(np.uint32, st.integers(0, 50), elements=st.integers(0, 2**bits - 1))
    )
    packed = pack(residues, bits)
    assert len(packed) == math.ceil(residues.size * bits / 8)
    unpacked = unpack(packed, residues.size, bits)
    assert unpacked.dtype == np.uint32
    np.testing.assert_array_equal(unpacked, residues)
    unpacked[:] = 0


@pytest.mark.parametrize("bits", [11, 20, 24, 32])
def test_packing_across_chunks_is_exact(bits):
    residues = (words()(150_001) & np.uint64(2**bits - 1)).astype(np.uint32)
    np.testing.assert_array_equal(unpack(pack(residues, bits), residues.size, bits), residues)


def test_packing_is_little_endian_with_the_lowest_bit_first():
    assert pack(np.array([0x123, 0xABC], dtype=np.uint32), 12) == bytes([0x23, 0xC1, 0xAB])
    assert pack(np.array([1], dtype=np.uint32), 32) == bytes([1, 0, 0, 0])


def test_packed_bytes_of_the_wrong_length_or_with_padding_set_are_refused():
    packed = pack(np.array([1, 2, 3], dtype=np.uint32), 10)
    for wrong in (packed[:-1], packed + b"\0", packed[:-1] + bytes([packed[-1] | 0x80])):
        with pytest.raises(ProtocolError):
            unpack(wrong, 3, 10)
    with pytest.raises(ProtocolError, match="wrap"):
        pack(np.array([1024], dtype=np.uint32), 10)


def test_rounding_is_unbiased():
    vector, step = np.tile([0.3, -0.3, 1.75, -2.5, 4.0, 0.0], 40_000), 0.5
    rounded = round_randomly(vector, step, words())
    means = decode(rounded, step).reshape(-1, 6).mean(axis=0)
    np.testing.assert_allclose(means, vector[:6], atol=0.006)
    assert np.abs(rounded - vector / step).max() < 1


def test_trap_rounding_to_the_nearest_is_biased():
    vector = np.full(10_000, 0.3)
    assert abs(decode(np.rint(vector / 1.0).astype(np.int64), 1.0).mean() - 0.3) > 0.25
    assert abs(decode(round_randomly(vector, 1.0, words()), 1.0).mean() - 0.3) < 0.03


@given(hnp.arrays(np.float64, 30, elements=st.floats(-1e-3, 1e-3)))
def test_rounded_values_are_neighbours_on_the_grid(vector):
    scaled = vector / 1e-4
    rounded = round_randomly(vector, 1e-4, words())
    assert ((np.floor(scaled) <= rounded) & (rounded <= np.ceil(scaled) + (scaled == 0))).all()


@settings(max_examples=50)
@given(
    hnp.arrays(np.float64, 64, elements=st.floats(-1, 1)),
    st.floats(0.01, 1.0),
    st.sampled_from([None, 0.0, DEFAULT_BETA]),
)
def test_the_norm_of_a_rounded_vector_is_within_the_stated_sensitivity(vector, step, beta):
    vector = vector / max(1.0, np.linalg.norm(vector) * (1 + 1e-12))
    l2, l1 = rounded_sensitivity(1.0, step, 64, beta)
    rounded = round_randomly(vector, step, words(), limit=l2)
    assert np.linalg.norm(rounded) <= l2
    assert np.abs(rounded).sum() <= l1 * (1 + 1e-12)


def test_the_sensitivity_is_the_published_formula():
    l2, l1 = rounded_sensitivity(1.0, 0.01, 10_000)
    assert l2 == pytest.approx(200.0)
    assert l1 == pytest.approx(20_000.0)
    conditional, _ = rounded_sensitivity(1.0, 0.01, 10_000, DEFAULT_BETA)
    assert conditional == pytest.approx(math.sqrt(100**2 + 2500 + 100 + 50))
    assert rounded_sensitivity(1.0, 0.01, 10_000, 0) == (l2, l1)


def test_trap_the_clip_alone_is_not_the_sensitivity_of_the_rounded_vector():
    vector = np.full(10_000, 0.01)
    clip_in_steps = np.linalg.norm(vector) / 0.1
    rounded = round_randomly(vector, 0.1, words())
    assert np.linalg.norm(rounded) > 2 * clip_in_steps
    assert np.linalg.norm(rounded) <= rounded_sensitivity(1.0, 0.1, 10_000)[0]


def test_a_limit_of_another_clip_ends_with_a_reason():
    with pytest.raises(PrivacyError, match="draws"):
        round_randomly(np.full(4, 3.0), 1.0, words(), limit=5.0)
    with pytest.raises(PrivacyError, match="limit"):
        round_randomly(np.full(4, 3.0), 1.0, words(), limit=2.0**31)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 2.0**31])
def test_entries_that_do_not_fit_are_refused(bad):
    with pytest.raises(GateRefused):
        round_randomly(np.array([0.0, bad]), 1.0, words())


def test_tiny_negative_numbers_round_to_zero_or_minus_one():
    assert set(round_randomly(np.full(1000, -1e-30), 1.0, words()).tolist()) <= {0, -1}


@pytest.mark.parametrize(("step", "bits"), [(0.0, 16), (math.nan, 16), (1.0, 7), (1.0, 33)])
def test_a_grid_out_of_range_is_refused(step, bits):
    with pytest.raises(ConfigError):
        Grid(step, bits)


@settings(max_examples=200)
@given(
    st.floats(1e-6, 1e3),
    st.floats(0, 1e4),
    st.integers(1, 5000),
    st.sampled_from([20, 24, 32]),
)
def test_the_chosen_grid_cannot_wrap_and_its_noise_fits_the_sampler(clip, ratio, summands, bits):
    noise_std = clip * ratio
    try:
        grid = choose_grid(clip, noise_std, summands, 100, bits)
    except ConfigError:
        assert bits < 32 or ratio > 100 or summands > 1000
        return
    share = noise_std**2 / summands / grid.step**2
    worst_noise = summands * math.floor(12 * math.sqrt(share) + 40)
    assert cannot_wrap(grid, clip, worst_noise, summands)
    assert (noise_std / grid.step) ** 2 <= 2**34 < MAX_VARIANCE


@pytest.mark.parametrize("variance", [0.01, 0.1, 1.0, 7.0, 50.0, 200.0, 1023.0, 5000.0, 2.0**24])
def test_the_sampler_never_exceeds_the_noise_bound_the_grid_was_chosen_for(variance):
    assert skellam_table(variance).bound <= 12 * math.sqrt(variance) + 40


def test_cannot_wrap_is_exact_at_the_edge():
    grid = Grid(1.0, 8)
    assert cannot_wrap(grid, 10.0, 127 - 110, 10)
    assert not cannot_wrap(grid, 10.0, 128 - 110, 10)


def test_without_noise_the_grid_is_fine_but_bounded():
    grid = choose_grid(1.0, 0.0, 10, 768, 32)
    assert 2.0**-25 < grid.step < 1e-7 * 2
    assert cannot_wrap(grid, 1.0, 0, 10)


def test_a_modulus_too_small_for_the_cohort_says_so():
    with pytest.raises(ConfigError, match="bits"):
        choose_grid(1.0, 1.0, 100, 768, 8)
    with pytest.raises(ConfigError, match="bits"):
        choose_grid(1.0, 1.0, 100, 1 << 22, 14)
