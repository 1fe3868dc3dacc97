"""Simulated devices agree as real ones do, and each pair is computed once."""

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from privet.client.privacy import simulated_agreements
from privet.client.privacy.simulated_agreements import SimulatedAgreements
from privet.common.errors import ProtocolError
from privet.common.secure_aggregation import keys
from privet.common.secure_aggregation.keys import RoundKey, Secret

from ...masking_party import stream

KEYS = [RoundKey.create(stream(f"key {number}")) for number in range(4)]


def test_both_ends_get_what_the_two_keys_agree_on():
    agreements = SimulatedAgreements()
    for own in KEYS:
        for peer in KEYS:
            if peer is not own:
                assert agreements.of(own)(peer.public) == own.agree(peer.public)
    assert len({own.agree(peer.public).value for own in KEYS for peer in KEYS if own != peer}) == 6


def test_a_pair_is_computed_once_for_its_two_ends_and_not_kept_for_a_third(monkeypatch):
    computed = list[bytes]()
    exchange = keys._exchange

    def counted(private: X25519PrivateKey, public: bytes) -> Secret:
        computed.append(public)
        return exchange(private, public)

    monkeypatch.setattr(keys, "_exchange", counted)
    agreements, (one, two, *_) = SimulatedAgreements(), KEYS
    found = [agreements.of(one)(two.public), agreements.of(two)(one.public)]
    assert found[0] == found[1]
    assert computed == [two.public]
    agreements.of(one)(two.public)
    assert computed == [two.public, two.public]


def test_a_key_of_low_order_is_refused_at_every_end():
    agreements = SimulatedAgreements()
    for own in KEYS:
        with pytest.raises(ProtocolError, match="low order"):
            agreements.of(own)(bytes(32))


def test_ends_that_never_ask_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(simulated_agreements, "MAX_KEPT", 2)
    agreements = SimulatedAgreements()
    for peer in KEYS[1:]:
        agreements.of(KEYS[0])(peer.public)
    assert len(agreements._kept) == 2
    assert agreements.of(KEYS[1])(KEYS[0].public) == KEYS[0].agree(KEYS[1].public)
