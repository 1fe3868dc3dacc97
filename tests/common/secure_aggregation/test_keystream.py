"""Masks are the AES-256-CTR keystream, uniform, and added in place."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from privet.common.errors import ConfigError
from privet.common.secure_aggregation import keystream as module
from privet.common.secure_aggregation.keys import Secret
from privet.common.secure_aggregation.keystream import add_masks, keystream

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "primitives.json").read_text())
SEEDS = st.binary(min_size=32, max_size=32).map(Secret)


def test_the_stream_is_ctr_of_nist_sp_800_38a():
    known = {key: v if key == "source" else bytes.fromhex(v) for key, v in VECTORS["ctr"].items()}
    stream = module._stream(Secret(known["key"]), known["counter"])
    assert stream.update(known["plain"]) == known["cipher"]


def test_the_zero_seed_starts_with_the_published_block():
    block = bytes.fromhex(VECTORS["keystream"]["first_block_of_the_zero_seed"])
    assert keystream(Secret(bytes(32)), 4).astype("<u4").tobytes() == block


@given(SEEDS, st.integers(0, 40), st.integers(1, 16))
def test_a_chunk_boundary_changes_nothing(seed, count, chunk):
    whole = keystream(seed, count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK", 4 * chunk)
        assert np.array_equal(keystream(seed, count), whole)


@given(st.lists(SEEDS, max_size=4), st.lists(SEEDS, max_size=4), st.integers(0, 9))
def test_adding_and_removing_the_same_masks_changes_nothing(added, removed, count):
    vector = np.arange(count, dtype=np.uint32)
    add_masks(vector, added, removed)
    add_masks(vector, removed, added)
    assert np.array_equal(vector, np.arange(count, dtype=np.uint32))


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_masks_are_uniform_mod_two_to_the_bits_and_the_top_value_occurs(bits):
    count = 64 << bits
    seen = np.bincount(keystream(Secret(b"u" * 32), count) & ((1 << bits) - 1), minlength=1 << bits)
    assert seen.size == 1 << bits
    assert seen[-1] > 0
    freedom = (1 << bits) - 1
    chi_square = float(((seen - 64.0) ** 2 / 64.0).sum())
    assert abs(chi_square - freedom) < 6 * np.sqrt(2 * freedom)
    # a mask drawn from 0 .. 2^bits - 2, as in public code, fails the same test
    faulty = keystream(Secret(b"u" * 32), count) % np.uint32(freedom)
    seen = np.bincount(faulty, minlength=1 << bits)
    assert seen[-1] == 0


def test_the_top_32_bit_value_occurs_at_full_width():
    # 2^22 words: the largest is above 2^32 - 2^14 but for a chance of e^-16
    assert int(keystream(Secret(b"t" * 32), 1 << 22).max()) >= 2**32 - 2**14


def test_seeds_whose_32_bit_folds_agree_give_different_streams():
    def fold(seed: bytes) -> int:
        return int(np.bitwise_xor.reduce(np.frombuffer(seed, "<u4")))

    one, two = bytes(range(32)), bytes(range(4, 32)) + bytes(range(4))
    assert fold(one) == fold(two)  # a generator seeded by the fold would repeat
    assert not np.array_equal(keystream(Secret(one), 8), keystream(Secret(two), 8))


@pytest.mark.parametrize(
    "vector", [np.zeros(4), np.zeros((2, 2), np.uint32), np.zeros(8, np.uint32)[::2]]
)
def test_another_kind_of_vector_is_refused(vector):
    with pytest.raises(ConfigError, match="uint32"):
        add_masks(vector, [], [])
