"""The server half: honest, but its clients need not be."""

import dataclasses
import tracemalloc

import numpy as np
import pytest

from privet.client.privacy import masked_upload as client
from privet.common.errors import ProtocolError, RoundVoid
from privet.common.secure_aggregation import messages
from privet.common.secure_aggregation.keys import Directory, RoundKey, Secret
from privet.common.secure_aggregation.messages import Opened
from privet.common.secure_aggregation.shamir import combine, split
from privet.common.secure_aggregation.terms import Graph, MaskingPolicy
from privet.server import unmasking as server

from ..masking_party import Party, identity, terms, vector

SEVEN = tuple(range(10, 17))


def test_the_server_lists_only_clients_the_operator_knows():
    party = Party(numbers=SEVEN).until("shares")
    known = Directory({n: identity(n).public for n in SEVEN[:-1]}, closed=True)
    cohort, _, refused = server.gather(party.terms, party.sent["keys"], known)
    assert [entry.client for entry in cohort.roster.entries] == list(SEVEN[:-1])
    assert refused == {16: "client 16 is not in this device's directory"}


def test_a_tampered_opening_is_named_and_the_sum_comes_out_without_it():
    party = Party(numbers=SEVEN, silent=(16,))
    party.outcome()
    shares = dict(messages.decode_opening(party.sent["unmask"][11], party.terms, 11).shares)
    which, share = shares[0]
    shares[0] = (which, Secret(bytes(33 - 8) + share.value[-8:]))
    wrong = messages.encode_opening(party.terms, 11, messages.Opening(shares))
    replies = {**party.sent["unmask"], 11: wrong}
    found = server.unmask(party.served["confirm"], replies)
    assert found.refused == {11: "round 7: client 11: a wrong share of client 10's secret"}
    expected = np.sum([vector(n, party.terms) for n in SEVEN[:-1]], axis=0, dtype=np.uint32)
    assert np.array_equal(found.total, expected & 0xFFFFF)
    assert found.dropped == (16,)


def test_without_commitments_a_tampered_share_would_spoil_the_sum_unseen():
    party = Party(numbers=SEVEN)
    party.outcome()
    _, share = messages.decode_opening(party.sent["unmask"][11], party.terms, 11).shares[0]
    given = {at + 1: share for at in range(1, 6)}
    assert combine(given, 5) != party.states["keys"][10].seed  # no error: only a wrong seed


def cheating_dealer(silent: tuple[int, ...]) -> Party:
    """Client 10 deals shares of other secrets than those it uses and announces."""
    party = Party(numbers=SEVEN, silent=silent).until("shares")
    honest = party.states["keys"][10]

    def wrong_split(secret, *given):
        return (
            split(Secret(bytes(31) + b"\1"), *given) if secret in wrong else split(secret, *given)
        )

    wrong = (honest.seed, honest.mask_key.private)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client, "split", wrong_split)
        party._shares()
    for phase in ("_receive", "_mask", "_confirm", "_unmask"):
        getattr(party, phase)()
    return party


@pytest.mark.parametrize("silent", [(), (10,)], ids=["self mask", "mask key"])
def test_a_dealer_of_other_secrets_voids_the_round_and_is_named(silent):
    party = cheating_dealer(silent)
    with pytest.raises(RoundVoid, match="client 10: dealt shares of another secret"):
        server.unmask(party.served["confirm"], party.sent["unmask"])


def test_a_round_that_is_void_reveals_no_survivor_list():
    party = Party(numbers=SEVEN, silent=SEVEN[:3]).until("mask")
    with pytest.raises(RoundVoid, match="nothing is revealed"):
        party._mask()
    assert "confirm" not in party.got


def test_a_client_with_too_few_dealing_holders_is_left_out_by_name(monkeypatch):
    monkeypatch.setattr(MaskingPolicy, "refuse_cohort", lambda *_: None)
    party = Party(numbers=tuple(range(10, 21)), graph=Graph(2, 2)).until("receive")
    replies = dict(party.sent["shares"])
    for lost in party.served["keys"].beside[0]:  # client 10 is left with its own share
        del replies[10 + lost]
    dealt, out, refused = server.relay(party.served["keys"], replies)
    assert refused == {10: "round 7: client 10: too few of its holders have dealt shares"}
    assert len(dealt.deals) == len(out) == 8


def test_too_few_deals_void_the_round():
    party = Party(numbers=SEVEN).until("receive")
    few = {n: party.sent["shares"][n] for n in SEVEN[:4]}
    with pytest.raises(RoundVoid, match="0 clients dealt shares"):
        server.relay(party.served["keys"], few)


def test_a_refused_vector_leaves_the_sum_unchanged():
    party = Party().until("mask")
    running = server.begin_sum(party.served["shares"])
    for reply in (b"", bytes(1000)):
        with pytest.raises(ProtocolError, match="round 7: client 10"):
            server.add_vector(running, 10, reply)
    assert not running.total.any()
    assert not running.alive


def test_the_sum_streams_in_memory_of_the_dimension():
    its = terms(dimension=200_000)
    party = Party(numbers=tuple(range(10, 30)), terms=its).until("mask")
    running = server.begin_sum(party.served["shares"])
    states, zeros = party.states["receive"], np.zeros(its.dimension, np.uint32)
    tracemalloc.start()
    for n, state in states.items():
        server.add_vector(running, n, client.mask(state, zeros)[1])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # a vector's copies on its way, not twenty vectors
    assert peak < 6 * zeros.nbytes
    assert sum(running.alive) == sum(range(20))


def test_a_mask_key_is_opened_only_for_those_that_dropped():
    party = Party(numbers=SEVEN, silent=(16,))
    party.outcome()
    for n in SEVEN[:-1]:
        shares = messages.decode_opening(party.sent["unmask"][n], party.terms, n).shares
        assert [owner for owner, (which, _) in shares.items() if which is Opened.KEY] == [6]
    opened = server._open(
        party.served["shares"],
        6,
        {p + 1: party.states["mask"][10 + p].held[6][1] for p in range(6)},
        alive=False,
    )
    assert RoundKey.of(opened.value).public == party.states["keys"][16].mask_key.public


def test_announcements_of_one_key_by_two_clients_keep_the_first():
    party = Party().until("shares")
    first = messages.decode_announcement(party.sent["keys"][10], party.terms, 10)
    copy = dataclasses.replace(first, identity=identity(11).public)
    signature = identity(11).sign(messages.announced(party.terms, copy.entry(11)))
    reply = messages.encode_announcement(
        party.terms, 11, dataclasses.replace(copy, signature=signature)
    )
    _, _, refused = server.gather(party.terms, {**party.sent["keys"], 11: reply})
    assert list(refused) == [11]


def test_states_of_the_server_do_not_show_vectors_or_shares():
    party = Party(numbers=SEVEN)
    outcome = party.outcome()
    for state in (*party.served.values(), outcome):
        assert "array" not in repr(state)
        assert "Secret(b" not in repr(state)
