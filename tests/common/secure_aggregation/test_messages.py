"""Decoders accept what encoders write and nothing else."""

import os
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privet.common.errors import ProtocolError
from privet.common.secure_aggregation import messages
from privet.common.secure_aggregation.keys import Secret
from privet.common.secure_aggregation.messages import Kind

from ...masking_party import Party, terms

TERMS = terms()
PARTY = Party(silent=(14,))
PARTY.outcome()

Decoder = Callable[[bytes], Any]

DECODERS: dict[Kind, Decoder] = {
    Kind.ANNOUNCEMENT: lambda data: messages.decode_announcement(data, TERMS, 10),
    Kind.ROSTER: lambda data: messages.decode_roster(data, TERMS),
    Kind.DEAL: lambda data: messages.decode_deal(data, TERMS, 10),
    Kind.INBOX: lambda data: messages.decode_inbox(data, TERMS, 5),
    Kind.VECTOR: lambda data: messages.decode_vector(data, TERMS, 10),
    Kind.SURVIVORS: lambda data: messages.decode_survivors(data, TERMS, 5),
    Kind.CONFIRMATION: lambda data: messages.decode_confirmation(data, TERMS, 10),
    Kind.CONFIRMATIONS: lambda data: messages.decode_confirmations(data, TERMS),
    Kind.OPENING: lambda data: messages.decode_opening(data, TERMS, 10),
}

ENCODERS: dict[Kind, Callable[[Any], bytes]] = {
    Kind.ANNOUNCEMENT: lambda one: messages.encode_announcement(TERMS, 10, one),
    Kind.ROSTER: lambda one: messages.encode_roster(TERMS, one),
    Kind.DEAL: lambda one: messages.encode_deal(TERMS, 10, one),
    Kind.INBOX: lambda one: messages.encode_inbox(TERMS, one, 5),
    Kind.VECTOR: lambda one: messages.encode_vector(TERMS, 10, one),
    Kind.SURVIVORS: lambda one: messages.encode_survivors(TERMS, one[0], 5, one[1]),
    Kind.CONFIRMATION: lambda one: messages.encode_confirmation(TERMS, 10, one),
    Kind.CONFIRMATIONS: lambda one: messages.encode_confirmations(TERMS, one),
    Kind.OPENING: lambda one: messages.encode_opening(TERMS, 10, one),
}

VALID: dict[Kind, bytes] = {
    Kind.ANNOUNCEMENT: PARTY.sent["keys"][10],
    Kind.ROSTER: PARTY.got["shares"][10],
    Kind.DEAL: PARTY.sent["shares"][10],
    Kind.INBOX: PARTY.got["receive"][10],
    Kind.VECTOR: PARTY.sent["mask"][10],
    Kind.SURVIVORS: PARTY.got["confirm"][10],
    Kind.CONFIRMATION: PARTY.sent["confirm"][10],
    Kind.CONFIRMATIONS: PARTY.got["unmask"][10],
    Kind.OPENING: PARTY.sent["unmask"][10],
}

KINDS = st.sampled_from(Kind)
HEADER = 78


@pytest.mark.parametrize("kind", Kind)
def test_a_message_comes_back_from_its_bytes(kind):
    assert ENCODERS[kind](DECODERS[kind](VALID[kind])) == VALID[kind]


@pytest.mark.parametrize("kind", Kind)
def test_every_prefix_and_every_longer_message_is_refused(kind):
    for cut in range(len(VALID[kind])):
        with pytest.raises(ProtocolError, match=r"^round 7: (client 10|the server): "):
            DECODERS[kind](VALID[kind][:cut])
    with pytest.raises(ProtocolError, match="1 bytes after its end"):
        DECODERS[kind](VALID[kind] + b"\0")


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize(
    ("at", "words"),
    [(0, "magic"), (4, "version"), (5, "message kind"), (9, "sender"), (13, "round"),
     (14, "another run"), (46, "another plan"), (HEADER, "a field of")],
)  # fmt: skip
def test_each_part_of_the_header_is_checked(kind, at, words):
    data = bytearray(VALID[kind])
    data[at] ^= 0x40
    with pytest.raises(ProtocolError, match=words):
        DECODERS[kind](bytes(data))


@pytest.mark.parametrize("kind", Kind)
def test_no_kind_is_taken_for_another(kind):
    for other in Kind:
        if other is not kind:
            with pytest.raises(ProtocolError):
                DECODERS[kind](VALID[other])


@given(KINDS, st.data())
def test_what_a_decoder_accepts_is_what_an_encoder_writes(kind, data):
    """So no two messages mean the same, and nothing can be hidden in one."""
    changed = bytearray(VALID[kind])
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    _decodes_strictly(kind, bytes(changed))


def _decodes_strictly(kind: Kind, data: bytes) -> None:
    try:
        again = ENCODERS[kind](DECODERS[kind](data))
    except ProtocolError as refusal:
        again, sentence = data, str(refusal)
    else:
        sentence = "round 7: the server: "
    assert again == data
    assert sentence.startswith(("round 7: client 10: ", "round 7: the server: "))


@st.composite
def wrecks(draw: st.DrawFn, kind: Kind) -> bytes:
    """A valid message, cut, spliced, with random bytes and lengths put in; or noise."""
    data = bytearray(VALID[kind])
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        action = draw(st.sampled_from(["cut", "insert", "replace", "length", "repeat"]))
        if action == "cut":
            del data[at:]
        elif action == "insert":
            data[at:at] = draw(st.binary(max_size=40))
        elif action == "replace":
            some = draw(st.binary(max_size=40))
            data[at : at + len(some)] = some
        elif action == "repeat":
            data[at:at] = data[at : at + draw(st.integers(0, 400))]
        else:
            data[at : at + 4] = draw(st.integers(0, 2**32 - 1)).to_bytes(4, "big")
    return bytes(data)


def fuzz(kind: Kind, data: st.DataObject) -> None:
    header = VALID[kind][:HEADER]
    body = st.binary(max_size=400)
    noise = st.one_of(body, body.map(lambda rest: header + rest), wrecks(kind))
    _decodes_strictly(kind, data.draw(noise))


@settings(max_examples=300, deadline=2000)
@given(KINDS, st.data())
def test_a_fuzzed_decoder_raises_nothing_but_a_protocol_error(kind, data):
    fuzz(kind, data)


@pytest.mark.heavy
@pytest.mark.parametrize("kind", Kind)
def test_a_decoder_fuzzed_for_half_a_minute_raises_nothing_but_a_protocol_error(kind):
    """Nine decoders, five minutes together; a hang fails by the deadline."""

    @settings(max_examples=3_000, deadline=2000, database=None)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        fuzz(kind, data)

    end = time.monotonic() + 34
    while time.monotonic() < end:
        run()


@pytest.mark.parametrize("kind", Kind)
def test_a_hundred_megabytes_are_refused_without_a_copy(kind):
    huge = VALID[kind][:HEADER] + (10**8).to_bytes(4, "big") + bytes(10**8)
    tracemalloc.start()
    with pytest.raises(ProtocolError):
        DECODERS[kind](huge)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_an_announced_length_of_four_gigabytes_is_refused_before_it_is_read():
    short = VALID[Kind.VECTOR][:HEADER] + b"\xff\xff\xff\xff" + b"abc"
    with pytest.raises(ProtocolError, match="a field of 4294967295 bytes"):
        DECODERS[Kind.VECTOR](short)


@pytest.mark.parametrize(
    ("numbers", "words"), [([1, 1], "number 1 is listed twice"), ([2, 1], "1 follows 2")]
)
def test_a_list_that_does_not_ascend_is_refused(numbers, words):
    record = b"".join(n.to_bytes(4, "big") + bytes(64) for n in numbers)
    data = VALID[Kind.CONFIRMATIONS][:HEADER] + len(record).to_bytes(4, "big") + record
    with pytest.raises(ProtocolError, match=words):
        DECODERS[Kind.CONFIRMATIONS](data)


def test_a_survivor_beyond_the_roster_is_refused():
    data = bytearray(VALID[Kind.SURVIVORS])
    data[HEADER + 4] |= 0x20
    with pytest.raises(ProtocolError, match="beyond the roster"):
        DECODERS[Kind.SURVIVORS](bytes(data))


def test_an_opening_has_no_place_for_both_shares_of_an_owner():
    share = (messages.Opened.SELF, Secret(os.urandom(33)))
    one = messages.encode_opening(TERMS, 10, messages.Opening({3: share}))
    record = one[HEADER + 4 :]
    both = record + record[:4] + b"\x01" + record[5:]
    with pytest.raises(ProtocolError, match="listed twice"):
        DECODERS[Kind.OPENING](one[:HEADER] + len(both).to_bytes(4, "big") + both)


def test_shares_do_not_show():
    opening = messages.Opening({3: (messages.Opened.SELF, Secret(b"Z" * 33))})
    assert "ZZ" not in repr(opening)
