"""What the client half does with its own side's values; messages are in test_masking_vectors."""

import numpy as np
import pytest

from privet.client.privacy import masked_upload as client
from privet.common.errors import GateRefused, ProtocolError
from privet.common.privacy.encoding import unpack
from privet.common.secure_aggregation import messages
from privet.common.secure_aggregation.keys import Purpose, derive
from privet.common.secure_aggregation.keystream import keystream
from privet.common.secure_aggregation.terms import Graph, MaskingPolicy
from privet.server import unmasking as server

from ...masking_party import Party, identity, terms, vector


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        (np.zeros(3, np.uint32), "shape"),
        (np.zeros((4, 1), np.uint32), "shape"),
        (np.zeros(4, np.int64), "int64"),
        (np.full(4, 1 << 20, np.uint32), "below 2\\^20"),
    ],
)
def test_a_vector_that_is_not_what_the_terms_say_does_not_leave(wrong, word):
    party = Party().until("mask")
    with pytest.raises(GateRefused, match=f"round 7: .*{word}.*nothing leaves"):
        client.mask(party.states["receive"][10], wrong)


def test_masking_does_not_change_the_callers_vector():
    party, own = Party().until("mask"), vector(10, terms())
    before = own.copy()
    client.mask(party.states["receive"][10], own)
    assert np.array_equal(own, before)


def test_two_neighbours_masks_cancel_and_the_self_masks_are_left():
    its = terms(dimension=9)
    party = Party(terms=its).until("confirm")
    total = np.zeros(9, dtype=np.uint32)
    for n, message in party.sent["mask"].items():
        total += unpack(messages.decode_vector(message, its, n).packed, 9, 20)
        seed = party.states["receive"][n].seed
        own = derive(seed, Purpose.SELF_MASK, party.served["keys"].digest)
        total -= keystream(own, 9)
    plain = np.sum([vector(n, its) for n in party.numbers], axis=0, dtype=np.uint32)
    assert np.array_equal(total & 0xFFFFF, plain & 0xFFFFF)


def test_the_same_round_with_other_randomness_shares_no_byte_of_the_vector():
    its, sent = terms(dimension=64, bits=8), []
    for shift in (0, 100):
        party = Party(terms=its, identities=lambda n, shift=shift: identity(n + shift))  # type: ignore[misc]
        party.until("confirm")
        vector = messages.decode_vector(party.sent["mask"][10], its, 10)
        sent.append(np.frombuffer(vector.packed, np.uint8))
    # the identity alone changes the roster, and with it every mask
    assert int((sent[0] == sent[1]).sum()) < 8


def test_an_opening_gives_one_share_for_each_owner_and_never_both():
    party = Party(silent=(14,)).until("unmask")
    party._unmask()
    opening = messages.decode_opening(party.sent["unmask"][10], party.terms, 10)
    kinds = {owner: which.name for owner, (which, _) in opening.shares.items()}
    assert kinds == {0: "SELF", 1: "SELF", 2: "SELF", 3: "SELF", 4: "KEY"}


def test_a_participant_that_dealt_nothing_gets_no_mask_and_no_share():
    party = Party(undealt=(14,)).until("unmask")
    assert 4 not in party.states["receive"][10].held
    outcome = party.outcome()
    assert outcome.dropped == ()
    assert outcome.survivors == (10, 11, 12, 13)


def test_a_device_signs_no_survivor_list_by_which_the_sum_could_be_taken_apart(monkeypatch):
    """Of two successive places in the ring one lives, and it could be the colluder."""
    for name in ("_refuse_degree", "_refuse_threshold", "_refuse_sparse"):
        monkeypatch.setattr(MaskingPolicy, name, lambda *_: None)
    monkeypatch.setattr(server, "_refuse_gap", lambda *_: None)
    party = Party(numbers=tuple(range(10, 22)), graph=Graph(4, 3), silent=(14,)).until("confirm")
    with pytest.raises(ProtocolError, match="only 1 of 2 successive places in the neighbour ring"):
        client.confirm(party.states["mask"][10], party.got["confirm"][10])
