"""Sharing: any t shares give the secret, t - 1 fit every secret."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privet.common.errors import ConfigError, ProtocolError
from privet.common.secure_aggregation import shamir
from privet.common.secure_aggregation.keys import Secret
from privet.common.secure_aggregation.shamir import PRIME, SHARE_BYTES, combine, split
from privet.common.secure_aggregation.terms import MAX_PARTICIPANTS

VECTOR = json.loads((Path(__file__).parents[2] / "vectors" / "primitives.json").read_text())[
    "shamir"
]


def number(value: int, size: int = SHARE_BYTES) -> Secret:
    return Secret(value.to_bytes(size, "big"))


def test_the_published_worked_example_comes_out():
    terms = b"".join(term.to_bytes(49, "big") for term in VECTOR["terms_highest_first"])
    points = [int(point) for point in VECTOR["shares"]]
    shares = split(number(VECTOR["secret"], 32), 3, points, lambda count: terms[:count])
    assert [int.from_bytes(one.value, "big") for one in shares] == list(VECTOR["shares"].values())
    for chosen in ([0, 1, 2], [1, 3, 5], [5, 0, 3]):
        some = {points[i]: shares[i] for i in chosen}
        assert combine(some, 3) == number(VECTOR["secret"], 32)


def test_the_field_is_the_smallest_prime_above_the_secrets():
    def is_prime(n: int) -> bool:  # Miller-Rabin, 20 bases
        odd, twos = n - 1, 0
        while odd % 2 == 0:
            odd, twos = odd // 2, twos + 1
        for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71):
            powers = [pow(base, odd << i, n) for i in range(twos)]
            if powers[0] != 1 and n - 1 not in powers:
                return False
        return True

    assert [n for n in range(2**256 + 1, PRIME + 1, 2) if is_prime(n)] == [PRIME]


@given(st.data(), st.binary(min_size=32, max_size=32).map(Secret))
def test_any_threshold_many_shares_give_the_secret(data, secret):
    points = data.draw(st.lists(st.integers(1, 65535), min_size=1, max_size=9, unique=True))
    threshold = data.draw(st.integers(1, len(points)))
    shares = dict(zip(points, split(secret, threshold, points, os.urandom), strict=True))
    chosen = data.draw(st.permutations(points))[:threshold]
    assert combine({point: shares[point] for point in chosen}, threshold) == secret
    assert combine(shares, threshold) == secret


@given(st.data(), st.integers(1, 80))
def test_shares_are_the_polynomials_values(data, count):
    largest = st.integers(PRIME - 3, PRIME - 1)  # every digit as large as it gets
    terms = data.draw(st.lists(st.integers(0, PRIME - 1) | largest, min_size=count, max_size=count))
    points = data.draw(st.lists(st.integers(1, 65535), min_size=1, max_size=9))
    for point, value in zip(points, shamir._values(terms, points), strict=True):
        assert value == sum(term * pow(point, i, PRIME) for i, term in enumerate(terms)) % PRIME


def test_sums_of_the_longest_polynomials_are_exact():
    terms = [PRIME - 1] * MAX_PARTICIPANTS
    (value,) = shamir._values(terms, [65535])
    assert value == sum(term * pow(65535, i, PRIME) for i, term in enumerate(terms)) % PRIME


def test_one_share_less_fits_every_secret():
    shares = split(Secret(b"s" * 32), 3, [1, 2, 3], os.urandom)
    two = {1: shares[0], 2: shares[1]}
    with pytest.raises(ProtocolError, match="3 shares are needed"):
        combine(two, 3)
    values = [int.from_bytes(share.value, "big") for share in shares]
    for other in (0, 12345, 2**256 - 1):
        # the third share that would make `other` the secret exists, and is unique
        third = (other - 3 * values[0] + 3 * values[1]) % PRIME
        assert combine({**two, 3: number(third)}, 3) == number(other, 32)


@pytest.mark.parametrize("wrong", [b"", b"\0" * 32, b"\0" * 34, PRIME.to_bytes(33, "big")])
def test_a_share_in_another_format_is_refused(wrong):
    with pytest.raises(ProtocolError, match="33 bytes"):
        combine({1: Secret(wrong)}, 1)


def test_shares_of_a_secret_no_seed_has_are_refused():
    with pytest.raises(ProtocolError, match="do not belong together"):
        combine({1: number(2**256)}, 1)


@pytest.mark.parametrize(
    ("threshold", "points"), [(0, [1]), (2, [1]), (2, [1, 1]), (1, [0]), (1, [65536]), (1, [])]
)
def test_impossible_sharings_are_refused(threshold, points):
    with pytest.raises(ConfigError):
        split(Secret(bytes(32)), threshold, points, os.urandom)


def test_a_secret_of_another_length_is_refused():
    with pytest.raises(ConfigError, match="32 bytes"):
        split(Secret(bytes(31)), 1, [1], os.urandom)
