"""Identities, agreement, derivation, directory."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privet.common.errors import ProtocolError, StateError
from privet.common.secure_aggregation import keys
from privet.common.secure_aggregation.keys import (
    Directory,
    Identity,
    Purpose,
    RoundKey,
    Secret,
    derive,
    digest,
)

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "primitives.json").read_text())
PARTS = st.lists(st.binary(max_size=4), max_size=4)


def vector(name: str) -> dict[str, bytes]:
    return {key: bytes.fromhex(v) for key, v in VECTORS[name].items() if key != "source"}


def test_identities_sign_as_in_rfc_8032():
    known = vector("ed25519")
    identity = Identity.of(known["seed"])
    assert identity.public == known["public"]
    assert identity.sign(known["message"]) == known["signature"]
    assert keys.verify(identity.public, known["message"], known["signature"])


@pytest.mark.parametrize("part", ["public", "message", "signature"])
def test_a_changed_or_cut_part_does_not_verify(part):
    known = vector("ed25519")
    assert keys.verify(known["public"], known["message"], known["signature"])
    for wrong in (known[part][:-1], bytes([known[part][0] ^ 1]) + known[part][1:], b""):
        changed = {**known, part: wrong}
        assert not keys.verify(changed["public"], changed["message"], changed["signature"])


def test_round_keys_agree_as_in_rfc_7748():
    known = vector("x25519")
    mine, peer = RoundKey.of(known["private"]), RoundKey.of(known["peer_private"])
    assert (mine.public, peer.public) == (known["public"], known["peer_public"])
    assert mine.agree(peer.public).value == peer.agree(mine.public).value == known["shared"]


# The points of order 1, 2, 4 and 8 on the curve and its twist; Bernstein's list at
# https://cr.yp.to/ecdh.html ("May I validate?"), those in canonical encoding.
LOW_ORDER = [
    0,
    1,
    2**255 - 20,
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
]


@pytest.mark.parametrize("point", LOW_ORDER)
def test_a_low_order_point_is_refused(point):
    with pytest.raises(ProtocolError, match="low order"):
        RoundKey.create(os.urandom).agree(point.to_bytes(32, "little"))


def test_a_second_encoding_of_a_key_is_refused():
    key = RoundKey.create(os.urandom)
    twin = key.public[:-1] + bytes([key.public[-1] | 0x80])
    for wrong in (twin, (2**255 - 19).to_bytes(32, "little"), key.public[:-1], key.public + b"0"):
        with pytest.raises(ProtocolError, match="canonical"):
            key.agree(wrong)


def test_derivation_is_hkdf_of_rfc_5869():
    known = vector("hkdf")
    assert keys._hkdf(known["secret"], b"", len(known["derived"])) == known["derived"]


@given(PARTS, PARTS, st.sampled_from(Purpose), st.sampled_from(Purpose))
def test_derivations_agree_only_for_the_same_purpose_and_context(one, two, purpose, other):
    secret = Secret(bytes(32))
    same = (one, purpose) == (two, other)
    assert (derive(secret, purpose, *one).value == derive(secret, other, *two).value) == same
    assert (digest(purpose, *one) == digest(other, *two)) == same


def test_joining_the_parts_without_lengths_would_confuse_contexts():
    faulty = [b"".join(parts) for parts in ((b"ab", b"c"), (b"a", b"bc"))]
    assert faulty[0] == faulty[1]
    assert digest(Purpose.TERMS, b"ab", b"c") != digest(Purpose.TERMS, b"a", b"bc")


def test_secrets_do_not_show():
    seed = b"\x5a" * 32
    for thing in (Secret(seed), Identity.of(seed), RoundKey.of(seed)):
        for text in (repr(thing), str(thing), f"{thing}"):
            assert "ZZ" not in text
            assert seed.hex() not in text


A, B, C = (bytes([number]) * 32 for number in (1, 2, 3))


def test_an_open_directory_pins_on_first_use_and_refuses_a_change():
    directory = Directory({}, closed=False).admit({1: A, 2: B})
    assert directory.known == {1: A, 2: B}
    assert directory.admit({2: B, 1: A}) is directory
    with pytest.raises(ProtocolError, match="client 2 shows another identity"):
        directory.admit({2: C})


def test_a_closed_directory_refuses_an_unknown_client():
    with pytest.raises(ProtocolError, match="client 2 is not in"):
        Directory({1: A}, closed=True).admit({1: A, 2: B})


@pytest.mark.parametrize("known", [{}, {1: A}])
def test_one_identity_belongs_to_one_client(known):
    with pytest.raises(ProtocolError, match="clients 1 and 2 have the same identity"):
        Directory(known, closed=False).admit({1: A, 2: A})


def test_a_directory_file_comes_back(tmp_path):
    path = tmp_path / "directory"
    keys.write_directory(path, Directory({7: A, 1: B}, closed=True))
    assert keys.read_directory(path) == Directory({1: B, 7: A}, closed=True)


@pytest.mark.parametrize(
    "line", ["1", "x " + "0" * 64, "-1 " + "0" * 64, "1 abcd", "1 " + "00" * 32 + " more", "1 zz"]
)
def test_a_wrong_line_of_a_directory_file_is_named(tmp_path, line):
    path = tmp_path / "directory"
    path.write_text(f"# comment\n{line}\n")
    with pytest.raises(StateError, match="line 2"):
        keys.read_directory(path)


def test_a_repeated_client_or_identity_in_a_directory_file_is_refused(tmp_path):
    path = tmp_path / "directory"
    for second in (f"1 {B.hex()}", f"2 {A.hex()}"):
        path.write_text(f"1 {A.hex()}\n{second}\n")
        with pytest.raises(StateError, match="line 2"):
            keys.read_directory(path)
