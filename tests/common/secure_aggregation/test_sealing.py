"""Sealed shares open for their receiver only."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privet.common.errors import ProtocolError
from privet.common.secure_aggregation import sealing
from privet.common.secure_aggregation.keys import Secret
from privet.common.secure_aggregation.sealing import SEALING_OVERHEAD, open_sealed, seal

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "primitives.json").read_text())
SHARED, PLAIN = Secret(b"k" * 32), Secret(b"two shares")


def test_encryption_is_aes_256_gcm_of_the_published_test_case():
    known = {k: v if k == "source" else bytes.fromhex(v) for k, v in VECTORS["gcm"].items()}
    key, plain = Secret(known["key"]), Secret(known["plain"])
    found = sealing._encrypt(key, known["nonce"], plain, known["names"])
    assert found == known["cipher"] + known["tag"]


def test_what_was_sealed_opens():
    sealed = seal(SHARED, b"binding", 3, 4, PLAIN, os.urandom)
    assert len(sealed) == len(PLAIN.value) + SEALING_OVERHEAD
    assert open_sealed(SHARED, b"binding", 3, 4, sealed) == PLAIN


@pytest.mark.parametrize(
    ("shared", "binding", "sender", "receiver"),
    [
        (Secret(b"x" * 32), b"binding", 3, 4),
        (SHARED, b"another", 3, 4),
        (SHARED, b"binding", 5, 4),
        (SHARED, b"binding", 3, 5),
        (SHARED, b"binding", 4, 3),
    ],
)
def test_another_key_round_sender_or_receiver_does_not_open(shared, binding, sender, receiver):
    sealed = seal(SHARED, b"binding", 3, 4, PLAIN, os.urandom)
    with pytest.raises(ProtocolError, match="do not open"):
        open_sealed(shared, binding, sender, receiver, sealed)


@given(st.data())
def test_a_changed_or_cut_byte_does_not_open(data):
    sealed = seal(SHARED, b"binding", 3, 4, PLAIN, os.urandom)
    at = data.draw(st.integers(0, len(sealed) - 1))
    flipped = bytes([sealed[at] ^ data.draw(st.integers(1, 255))])
    for wrong in (sealed[:at], sealed[:at] + flipped + sealed[at + 1 :]):
        with pytest.raises(ProtocolError, match="do not open"):
            open_sealed(SHARED, b"binding", 3, 4, wrong)


def test_sealing_twice_never_repeats_a_nonce():
    nonces = {seal(SHARED, b"binding", 3, 4, PLAIN, os.urandom)[:12] for _ in range(100)}
    assert len(nonces) == 100
