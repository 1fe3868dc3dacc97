"""Messages of the masking protocol: strict, versioned, with a length for every field.

Layout, all numbers big-endian:

    magic "pvtm" | version u8 | kind u8 | sender u32 | round u32 | run 32 | plan 32
    then, for each field the kind has:  length u32 | bytes

A decoder accepts exactly what the encoder writes: nothing before, between or after. A field's
length is compared with its bound before a byte of it is copied, so a decoder never holds more
than the message it was given, once.

**Guarantee**: whatever the bytes, a decoder returns a message or raises `ProtocolError` that
names sender and round.
"""

import functools
import itertools
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from ..errors import ProtocolError
from .keys import KEY_BYTES, SIGNATURE_BYTES, Purpose, Secret, digest
from .sealing import SEALING_OVERHEAD
from .shamir import SHARE_BYTES
from .terms import MAX_PARTICIPANTS, Graph, Terms

__all__ = [
    "SERVER",
    "Announcement",
    "Confirmations",
    "Deal",
    "Entry",
    "Inbox",
    "Kind",
    "Opened",
    "Opening",
    "Package",
    "Roster",
    "Survivors",
    "Vector",
    "announced",
    "dealt_list",
    "decode_announcement",
    "decode_confirmation",
    "decode_confirmations",
    "decode_deal",
    "decode_inbox",
    "decode_opening",
    "decode_roster",
    "decode_survivors",
    "decode_vector",
    "encode_announcement",
    "encode_confirmation",
    "encode_confirmations",
    "encode_deal",
    "encode_inbox",
    "encode_opening",
    "encode_roster",
    "encode_survivors",
    "encode_vector",
    "fault",
    "share_commitment",
]

SERVER = 0xFFFFFFFF
"""Sender number of the server; clients are below."""

DIGEST_BYTES = 32
SEALED_BYTES = 2 * SHARE_BYTES + SEALING_OVERHEAD

_MAGIC, _VERSION = b"pvtm", 2
_HEADER = struct.Struct(">4sBBII32s32s")
_LENGTH = struct.Struct(">I")
_NAMES = struct.Struct(">BII")


class Kind(IntEnum):
    """The kind of a message, in the order of a round."""

    ANNOUNCEMENT = 1
    ROSTER = 2
    DEAL = 3
    INBOX = 4
    VECTOR = 5
    SURVIVORS = 6
    CONFIRMATION = 7
    CONFIRMATIONS = 8
    OPENING = 9


def fault(terms: Terms, sender: int, sentence: str) -> ProtocolError:
    """The error for bytes from `sender` in this round."""
    who = "the server" if sender == SERVER else f"client {sender}"
    return ProtocolError(f"round {terms.round}: {who}: {sentence}")


def _encode(kind: Kind, terms: Terms, sender: int, *fields: bytes) -> bytes:
    head = _HEADER.pack(
        _MAGIC, _VERSION, kind, sender, terms.round, terms.run_digest, terms.plan_digest
    )
    return head + b"".join(_LENGTH.pack(len(one)) + one for one in fields)


def _decode(
    data: bytes, kind: Kind, terms: Terms, sender: int, bounds: Sequence[tuple[int, int, int]]
) -> list[bytes]:
    """Check a message's header and lengths, and return its fields.

    `bounds` has for each field (size of one record, fewest, most records).
    """

    def refuse(sentence: str) -> ProtocolError:
        return fault(terms, sender, f"{kind.name.lower()} message: {sentence}")

    _check_header(data, kind, terms, sender, refuse)
    fields, at = [], _HEADER.size
    for size, min_count, max_count in bounds:
        if len(data) - at < _LENGTH.size:
            raise refuse("is cut: a field is missing")
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        if length % size or not size * min_count <= length <= size * max_count:
            raise refuse(
                f"a field of {length} bytes, expected {min_count} to {max_count} times {size} bytes"
            )
        if len(data) - at < length:
            raise refuse(f"is cut: {length} bytes announced, {len(data) - at} left")
        fields.append(bytes(data[at : at + length]))
        at += length
    if at != len(data):
        raise refuse(f"{len(data) - at} bytes after its end")
    return fields


def _check_header(
    data: bytes, kind: Kind, terms: Terms, sender: int, refuse: Callable[[str], ProtocolError]
) -> None:
    """Refuse a message of another protocol, kind, sender, round, run or plan."""
    if len(data) < _HEADER.size:
        raise refuse(f"expected at least {_HEADER.size} bytes, got {len(data)}")
    magic, version, its_kind, its_sender, its_round, run, plan = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise refuse("does not start with the protocol's magic bytes")
    for name, value, expected in (
        ("protocol version", version, _VERSION),
        ("message kind", its_kind, int(kind)),
        ("sender", its_sender, sender),
        ("round", its_round, terms.round),
    ):
        if value != expected:
            raise refuse(f"another {name}: expected {expected}, got {value}")
    if run != terms.run_digest:
        raise refuse("made for another run")
    if plan != terms.plan_digest:
        raise refuse("made for another plan")


def _records(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


def _number(data: bytes) -> int:
    return int.from_bytes(data, "big")


# 1. keys: client -> server


@dataclass(frozen=True)
class Announcement:
    """A client's keys for one round."""

    identity: bytes
    mask_key: bytes
    sealing_key: bytes
    signature: bytes

    def entry(self, client: int) -> "Entry":
        """Return the roster's entry for the client that announced these keys."""
        return Entry(client, self.identity, self.mask_key, self.sealing_key)


def encode_announcement(terms: Terms, client: int, message: Announcement) -> bytes:
    """Encode a client's announcement of its keys: 274 bytes."""
    keys = (message.identity, message.mask_key, message.sealing_key)
    return _encode(Kind.ANNOUNCEMENT, terms, client, *keys, message.signature)


def decode_announcement(data: bytes, terms: Terms, client: int) -> Announcement:
    """Decode a client's announcement of its keys.

    Raises ProtocolError for any other bytes. The signature is not checked here.
    """
    key = (KEY_BYTES, 1, 1)
    fields = _decode(
        data, Kind.ANNOUNCEMENT, terms, client, (key, key, key, (SIGNATURE_BYTES, 1, 1))
    )
    return Announcement(*fields)


# 2. roster: server -> client


@dataclass(frozen=True)
class Entry:
    """One participant on the roster."""

    client: int
    identity: bytes
    mask_key: bytes
    sealing_key: bytes

    @functools.cached_property
    def encoded(self) -> bytes:
        """The entry in 100 bytes."""
        return self.client.to_bytes(4, "big") + self.identity + self.mask_key + self.sealing_key


_ENTRY_BYTES = 4 + 3 * KEY_BYTES


def announced(terms: Terms, entry: Entry) -> bytes:
    """What a participant signs when it announces its keys."""
    return digest(Purpose.ANNOUNCEMENT, terms.binding, entry.encoded)


@dataclass(frozen=True)
class Roster:
    """The participants, ascending by client number, and how shares are held.

    Attributes:
        entries: of all participants.
        graph: how many neighbours each has, and how many holders open a secret.
        signatures: of the receiving client's neighbours, ascending by position.
    """

    entries: tuple[Entry, ...]
    graph: Graph
    signatures: tuple[bytes, ...]

    def digest(self, terms: Terms) -> bytes:
        """32 bytes for all that the participants must see alike."""
        numbers = self.graph.degree.to_bytes(4, "big") + self.graph.threshold.to_bytes(4, "big")
        entries = b"".join([entry.encoded for entry in self.entries])
        return digest(Purpose.ROSTER, terms.binding, numbers, entries)


def encode_roster(terms: Terms, message: Roster) -> bytes:
    """Encode the roster for one client: 100 bytes a participant and 64 a neighbour."""
    return _encode(
        Kind.ROSTER,
        terms,
        SERVER,
        message.graph.degree.to_bytes(4, "big"),
        message.graph.threshold.to_bytes(4, "big"),
        b"".join([entry.encoded for entry in message.entries]),
        b"".join(message.signatures),
    )


def decode_roster(data: bytes, terms: Terms) -> Roster:
    """Decode the roster.

    Raises ProtocolError for any other bytes, and for client numbers that do not ascend.

    So nobody is on a roster twice. Keys and signatures are not checked here.
    """
    four, max_count = (4, 1, 1), MAX_PARTICIPANTS
    bounds = (four, four, (_ENTRY_BYTES, 1, max_count), (SIGNATURE_BYTES, 0, max_count))
    degree, threshold, listed, signatures = _decode(data, Kind.ROSTER, terms, SERVER, bounds)
    entries = _entries(listed)
    _refuse_disorder(terms, SERVER, [entry.client for entry in entries])
    if entries[-1].client == SERVER:
        raise fault(terms, SERVER, "roster message: the server is not a participant")
    graph = Graph(_number(degree), _number(threshold))
    return Roster(entries, graph, tuple(_records(signatures, SIGNATURE_BYTES)))


@functools.lru_cache(maxsize=2)
def _entries(listed: bytes) -> tuple[Entry, ...]:
    """Read the participants. They are public, and all devices of one process are shown the same."""
    return tuple(
        Entry(_number(record[:4]), record[4:36], record[36:68], record[68:])
        for record in _records(listed, _ENTRY_BYTES)
    )


def _refuse_disorder(terms: Terms, sender: int, numbers: Sequence[int]) -> None:
    for number, following in itertools.pairwise(numbers):
        if number == following:
            raise fault(terms, sender, f"number {number} is listed twice")
        if number > following:
            raise fault(terms, sender, f"numbers must ascend, but {following} follows {number}")


# 3. and 4. shares: client -> server -> holders


@dataclass(frozen=True, slots=True)
class Package:
    """One holder's two shares, sealed, with a commitment to each.

    Attributes:
        sealed: share of the self mask's seed and of the mask key, encrypted.
        self_commitment, key_commitment: SHA-256 of the one and of the other share; a share has
            256 random bits, so they say nothing.
    """

    sealed: bytes
    self_commitment: bytes
    key_commitment: bytes


_PACKAGE_BYTES = 4 + SEALED_BYTES + 2 * DIGEST_BYTES


@dataclass(frozen=True)
class Deal:
    """A client's shares for all its holders but itself.

    Attributes:
        commitment: of the self mask's seed.
        own: commitments to the two shares the client keeps (`sealed` is empty).
        packages: by the holder's position.
    """

    commitment: bytes
    own: Package
    packages: Mapping[int, Package]


def encode_deal(terms: Terms, client: int, message: Deal) -> bytes:
    """Encode a client's shares for its neighbours: 162 bytes a neighbour."""
    own = message.own.self_commitment + message.own.key_commitment
    packages = _encode_packages(message.packages)
    return _encode(Kind.DEAL, terms, client, message.commitment, own, packages)


def decode_deal(data: bytes, terms: Terms, client: int) -> Deal:
    """Decode a client's shares for its neighbours.

    Raises ProtocolError for any other bytes, and for holders that do not ascend.
    """
    bounds = (
        (DIGEST_BYTES, 1, 1),
        (2 * DIGEST_BYTES, 1, 1),
        (_PACKAGE_BYTES, 0, MAX_PARTICIPANTS),
    )
    commitment, own, packages = _decode(data, Kind.DEAL, terms, client, bounds)
    kept = Package(b"", own[:DIGEST_BYTES], own[DIGEST_BYTES:])
    return Deal(commitment, kept, _decode_packages(terms, client, packages))


@dataclass(frozen=True)
class Inbox:
    """What neighbours sent to one client, and who of all participants has dealt shares.

    Attributes:
        packages: by the sender's position.
        dealt: positions; the same for everybody, or the round ends without a sum.
    """

    packages: Mapping[int, Package]
    dealt: frozenset[int]


def encode_inbox(terms: Terms, message: Inbox, participants: int) -> bytes:
    """Encode the shares dealt to one client: 162 bytes a neighbour and a bit a participant."""
    dealt = _bitmap(message.dealt, participants)
    return _encode(Kind.INBOX, terms, SERVER, dealt, _encode_packages(message.packages))


def decode_inbox(data: bytes, terms: Terms, participants: int) -> Inbox:
    """Decode the shares that neighbours dealt to one client.

    Raises ProtocolError for any other bytes, and for senders that do not ascend.
    """
    bounds = ((-(-participants // 8), 1, 1), (_PACKAGE_BYTES, 0, MAX_PARTICIPANTS))
    dealt, packages = _decode(data, Kind.INBOX, terms, SERVER, bounds)
    return Inbox(
        _decode_packages(terms, SERVER, packages),
        _positions(terms, Kind.INBOX, dealt, participants),
    )


def dealt_list(
    terms: Terms, roster_digest: bytes, dealt: frozenset[int], participants: int
) -> bytes:
    """What a participant signs with its vector: whose masks are in it, of the whole roster."""
    return digest(Purpose.DEALT, terms.binding, roster_digest, _bitmap(dealt, participants))


def _encode_packages(packages: Mapping[int, Package]) -> bytes:
    return b"".join(
        position.to_bytes(4, "big")
        + package.sealed
        + package.self_commitment
        + package.key_commitment
        for position, package in sorted(packages.items())
    )


def _decode_packages(terms: Terms, sender: int, data: bytes) -> dict[int, Package]:
    records = _records(data, _PACKAGE_BYTES)
    positions = [_number(record[:4]) for record in records]
    _refuse_disorder(terms, sender, positions)
    end = 4 + SEALED_BYTES
    return {
        position: Package(
            record[4:end], record[end : end + DIGEST_BYTES], record[end + DIGEST_BYTES :]
        )
        for position, record in zip(positions, records, strict=True)
    }


# 5. vector: client -> server


@dataclass(frozen=True)
class Vector:
    """A masked vector, and its sender's signature of who had dealt shares (`dealt_list`)."""

    packed: bytes = field(repr=False)
    signature: bytes


def encode_vector(terms: Terms, client: int, message: Vector) -> bytes:
    """Encode a masked vector: the packed vector and 150 bytes."""
    return _encode(Kind.VECTOR, terms, client, message.packed, message.signature)


def decode_vector(data: bytes, terms: Terms, client: int) -> Vector:
    """Decode a client's masked vector.

    Raises ProtocolError for any other bytes. The signature is not checked here.
    """
    bounds = ((terms.vector_bytes, 1, 1), (SIGNATURE_BYTES, 1, 1))
    return Vector(*_decode(data, Kind.VECTOR, terms, client, bounds))


# 6. survivors: server -> client


@dataclass(frozen=True)
class Survivors:
    """The survivors, whose vectors are in the sum, and the dropped, who only dealt shares.

    Both are sets of positions.
    """

    alive: frozenset[int]
    dropped: frozenset[int]

    def signed(self, terms: Terms, roster_digest: bytes, participants: int) -> bytes:
        """Return the bytes that every survivor signs."""
        lists = (_bitmap(self.alive, participants), _bitmap(self.dropped, participants))
        return digest(Purpose.SURVIVORS, terms.binding, roster_digest, *lists)


def encode_survivors(
    terms: Terms, message: Survivors, participants: int, signatures: Sequence[bytes]
) -> bytes:
    """Encode the survivor list: two bits a participant, and 64 bytes a living neighbour.

    Args:
        signatures: of the list of who dealt shares, by the receiving client's living neighbours,
            ascending by position.
    """
    lists = (_bitmap(message.alive, participants), _bitmap(message.dropped, participants))
    return _encode(Kind.SURVIVORS, terms, SERVER, *lists, b"".join(signatures))


def decode_survivors(
    data: bytes, terms: Terms, participants: int
) -> tuple[Survivors, tuple[bytes, ...]]:
    """Decode the survivor list and the signatures with it.

    Raises ProtocolError for any other bytes. Neither the signatures are checked here, nor that the
    lists are disjoint.
    """
    one = (-(-participants // 8), 1, 1)
    bounds = (one, one, (SIGNATURE_BYTES, 0, MAX_PARTICIPANTS))
    alive, dropped, signatures = _decode(data, Kind.SURVIVORS, terms, SERVER, bounds)
    found = (_positions(terms, Kind.SURVIVORS, bits, participants) for bits in (alive, dropped))
    return Survivors(*found), tuple(_records(signatures, SIGNATURE_BYTES))


def _positions(terms: Terms, kind: Kind, bitmap: bytes, participants: int) -> frozenset[int]:
    if int.from_bytes(bitmap, "little") >> participants:
        sentence = f"{kind.name.lower()} message: lists a position beyond the roster"
        raise fault(terms, SERVER, sentence)
    bits = np.unpackbits(np.frombuffer(bitmap, np.uint8), bitorder="little")
    return frozenset(np.flatnonzero(bits).tolist())


def _bitmap(positions: frozenset[int], participants: int) -> bytes:
    bits = np.zeros(-(-participants // 8) * 8, np.uint8)
    bits[list(positions)] = 1
    return np.packbits(bits, bitorder="little").tobytes()


# 7. and 8. confirmations: client -> server -> everybody


def encode_confirmation(terms: Terms, client: int, signature: bytes) -> bytes:
    """Encode a survivor's signature of the survivor list."""
    return _encode(Kind.CONFIRMATION, terms, client, signature)


def decode_confirmation(data: bytes, terms: Terms, client: int) -> bytes:
    """Decode a survivor's signature of the survivor list, unchecked.

    Raises ProtocolError for any other bytes.
    """
    (signature,) = _decode(data, Kind.CONFIRMATION, terms, client, ((SIGNATURE_BYTES, 1, 1),))
    return signature


@dataclass(frozen=True)
class Confirmations:
    """Signatures of the survivor list, by position: a quorum of the roster's, or more."""

    signatures: Mapping[int, bytes]


def encode_confirmations(terms: Terms, message: Confirmations) -> bytes:
    """Encode signatures of the survivor list: 68 bytes each."""
    found = sorted(message.signatures.items())
    body = b"".join(position.to_bytes(4, "big") + signature for position, signature in found)
    return _encode(Kind.CONFIRMATIONS, terms, SERVER, body)


def decode_confirmations(data: bytes, terms: Terms) -> Confirmations:
    """Decode signatures of the survivor list.

    Raises ProtocolError for any other bytes, and for positions that do not ascend.
    """
    bounds = ((4 + SIGNATURE_BYTES, 0, MAX_PARTICIPANTS),)
    (body,) = _decode(data, Kind.CONFIRMATIONS, terms, SERVER, bounds)
    records = _records(body, 4 + SIGNATURE_BYTES)
    _refuse_disorder(terms, SERVER, [_number(one[:4]) for one in records])
    return Confirmations({_number(one[:4]): one[4:] for one in records})


# 9. opening: client -> server


class Opened(IntEnum):
    """Which of an owner's two secrets a share belongs to."""

    SELF = 0
    KEY = 1


_OPENED = {int(which): which for which in Opened}


@dataclass(frozen=True)
class Opening:
    """The shares a holder gives: for each owner the one or the other, never both.

    Attributes:
        shares: by the owner's position.
    """

    shares: Mapping[int, tuple[Opened, Secret]] = field(repr=False)


def share_commitment(
    roster_digest: bytes, owner: int, holder: int, which: Opened, share: Secret
) -> bytes:
    """Commit to a share with 32 bytes that tell a right share from a wrong one.

    A share is too random to be guessed from them.
    """
    names = _NAMES.pack(which, owner, holder)
    return digest(Purpose.SHARE_COMMITMENT, roster_digest, names, share.value)


_OPENED_BYTES = 4 + 1 + SHARE_BYTES


def encode_opening(terms: Terms, client: int, message: Opening) -> bytes:
    """Encode the shares that a holder gives: 38 bytes each."""
    body = b"".join(
        owner.to_bytes(4, "big") + bytes([which]) + share.value
        for owner, (which, share) in sorted(message.shares.items())
    )
    return _encode(Kind.OPENING, terms, client, body)


def decode_opening(data: bytes, terms: Terms, client: int) -> Opening:
    """Decode the shares that a holder gives.

    Raises ProtocolError for any other bytes, and for owners that do not ascend.
    """
    bounds = ((_OPENED_BYTES, 0, MAX_PARTICIPANTS),)
    (body,) = _decode(data, Kind.OPENING, terms, client, bounds)
    records = _records(body, _OPENED_BYTES)
    _refuse_disorder(terms, client, [_number(record[:4]) for record in records])
    if any(record[4] not in _OPENED for record in records):
        raise fault(terms, client, "opening message: a share of neither secret")
    return Opening(
        {_number(record[:4]): (_OPENED[record[4]], Secret(record[5:])) for record in records}
    )
