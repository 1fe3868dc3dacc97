"""The state of a device between two phases of a masked round, as bytes of a fixed form.

A person's own device keeps the state in its memory (`client/enrolled/participant.py`); a simulated
one has to hand it to Flower, whose engines move a device between processes (`client/app.py`).
Layout, all numbers big-endian:

    magic "pvts" | version u8 | kind u8
    then, for each field the kind has:  length u32 | bytes

Numbers are u64; a table has its positions, or client numbers, ascending. A decoder accepts exactly
what the encoder writes, so bytes of another version or of another origin never become a state, and
no bytes become anything but one of the six states of `client/privacy/masked_upload.py`.

**The bytes hold the secrets of a round**: they stay in memory, or in a file of mode 0600.
"""

import dataclasses
import struct
from collections.abc import Iterable, Mapping
from typing import Any

from ...common.errors import ConfigError, StateError
from ...common.secure_aggregation.keys import KEY_BYTES, Identity, RoundKey, Secret
from ...common.secure_aggregation.messages import DIGEST_BYTES, Entry, Survivors
from ...common.secure_aggregation.shamir import SHARE_BYTES
from ...common.secure_aggregation.terms import MAX_PARTICIPANTS, Graph, MaskingPolicy, Terms
from .masked_upload import (
    Announced,
    Cohort,
    Confirmed,
    Finished,
    Held,
    Masked,
    Party,
    Received,
    Shared,
    State,
)

__all__ = ["decode", "encode"]

_MAGIC, _VERSION = b"pvts", 2
_HEADER = struct.Struct(">4sBB")
_LENGTH = struct.Struct(">I")
_KINDS = (Announced, Shared, Received, Masked, Confirmed, Finished)

# who and where: client, blamed; of the terms: round, dimension, bits, survivors, colluders; and
# the policy's numbers in their order
_PARTY = struct.Struct(f">{7 + len(dataclasses.fields(MaskingPolicy))}Q")
_COHORT = struct.Struct(">3Q")  # degree, threshold, own position
_ENTRY = struct.Struct(f">QQ{KEY_BYTES}s{KEY_BYTES}s{KEY_BYTES}s")
_SEED = struct.Struct(f">Q{KEY_BYTES}s")
_HELD = struct.Struct(f">Q{SHARE_BYTES}s{SHARE_BYTES}s")
_POSITION = struct.Struct(">Q")


def encode(state: State) -> bytes:
    """Return a state as bytes.

    About 0.5 kB a neighbour after `share`, less in the other phases.
    """
    fields = list(_party_fields(state.party))
    if not isinstance(state, Announced | Finished):
        fields += _cohort_fields(state.cohort)
    match state:
        case Announced():
            for key in (state.mask_key, state.sealing_key):
                fields.append(key.private.value + key.public)
            fields.append(state.seed.value)
        case Shared():
            fields += [state.seed.value, _seeds(state.pairs), _seeds(state.sealing)]
            fields.append(b"".join(field.value for field in state.own))
        case Received():
            fields += [state.seed.value, _seeds(state.pairs), _shares(state.held)]
            fields.append(_positions(state.dealt))
        case Masked():
            fields += [_shares(state.held), _positions(state.dealt)]
        case Confirmed():
            survivors = state.survivors
            fields += [
                _shares(state.held),
                _positions(survivors.alive),
                _positions(survivors.dropped),
            ]
    head = _HEADER.pack(_MAGIC, _VERSION, _KINDS.index(type(state)) + 1)
    return head + b"".join(_LENGTH.pack(len(field)) + field for field in fields)


def decode(data: bytes) -> State:
    """Read a state from the bytes that `encode` made of it.

    Raises:
        StateError: any other bytes; says what is wrong, and shows none of them.
    """
    fields = _Fields(data)
    try:
        party = _read_party(fields)
        if fields.kind is Announced:
            mask_key, sealing_key = _key(fields, "mask key"), _key(fields, "sealing key")
            state: State = Announced(party, mask_key, sealing_key, fields.seed())
        elif fields.kind is Finished:
            state = Finished(party)
        else:
            state = _read_later(fields, party, _read_cohort(fields))
    except (ConfigError, UnicodeDecodeError) as wrong:
        raise _refusal(f"a number or name in them is impossible: {wrong}") from None
    fields.end()
    return state


def _refusal(sentence: str) -> StateError:
    return StateError(
        f"the {len(_KINDS)} states of a masked round have one form as bytes, and these are not of "
        f"it: {sentence}; the device takes part again in the next round"
    )


class _Fields:
    """The fields of a state, read one after the other."""

    def __init__(self, data: bytes) -> None:
        if len(data) < _HEADER.size:
            raise _refusal(f"expected at least {_HEADER.size} bytes, got {len(data)}")
        magic, version, kind = _HEADER.unpack_from(data)
        if magic != _MAGIC:
            raise _refusal("they do not start with the magic bytes")
        if version != _VERSION:
            raise _refusal(f"expected version {_VERSION}, got {version}")
        if not 1 <= kind <= len(_KINDS):
            raise _refusal(f"expected a kind from 1 to {len(_KINDS)}, got {kind}")
        self.kind = _KINDS[kind - 1]
        self._data, self._at = data, _HEADER.size

    def take(self, name: str, size: int, min_count: int = 1, max_count: int = 1) -> bytes:
        """Read the next field: `min_count` to `max_count` records of `size` bytes."""
        start = self._at + _LENGTH.size
        if start > len(self._data):
            raise _refusal(f"they are cut before the {name}")
        (length,) = _LENGTH.unpack_from(self._data, self._at)
        if length % size or not min_count * size <= length <= max_count * size:
            raise _refusal(
                f"the {name} has {length} bytes, expected {min_count} to {max_count} times {size}"
            )
        if start + length > len(self._data):
            raise _refusal(f"they are cut in the {name}")
        self._at = start + length
        return bytes(self._data[start : self._at])

    def seed(self) -> Secret:
        """Read the seed of the self mask."""
        return Secret(self.take("seed", KEY_BYTES))

    def table(self, name: str, form: struct.Struct, below: int) -> list[tuple[Any, ...]]:
        """Read records that start with an ascending number, all of them smaller than `below`."""
        records = list(form.iter_unpack(self.take(name, form.size, 0, MAX_PARTICIPANTS)))
        numbers = [record[0] for record in records]
        if numbers and numbers != sorted(set(numbers)):
            raise _refusal(f"the numbers in the {name} do not ascend")
        if numbers and numbers[-1] >= below:
            raise _refusal(f"the {name} has number {numbers[-1]}, expected numbers below {below}")
        return records

    def end(self) -> None:
        """Refuse bytes that follow the last field."""
        if self._at != len(self._data):
            raise _refusal(f"{len(self._data) - self._at} bytes follow their end")


def _party_fields(party: Party) -> Iterable[bytes]:
    terms, identity = party.terms, party.identity
    yield _PARTY.pack(
        party.client,
        party.blamed,
        terms.round,
        terms.dimension,
        terms.bits,
        terms.survivors,
        terms.colluders,
        *(getattr(party.policy, field.name) for field in dataclasses.fields(MaskingPolicy)),
    )
    yield terms.run.encode()
    yield terms.plan
    yield identity.seed.value + identity.public


def _read_party(fields: _Fields) -> Party:
    numbers = _PARTY.unpack(fields.take("party", _PARTY.size))
    client, blamed, number, dimension, bits, survivors, colluders, *policy = numbers
    run = fields.take("run", 1, 1, 4 * 64).decode()
    terms = Terms(run, number, fields.take("plan", 32), dimension, bits, survivors, colluders)
    both = fields.take("identity", 2 * KEY_BYTES)
    identity = Identity(Secret(both[:KEY_BYTES]), both[KEY_BYTES:])
    return Party(client, identity, terms, MaskingPolicy(*policy), blamed)


def _cohort_fields(cohort: Cohort) -> Iterable[bytes]:
    yield _COHORT.pack(cohort.graph.degree, cohort.graph.threshold, cohort.position)
    yield cohort.digest
    yield b"".join(cohort.identities)
    yield b"".join(
        _ENTRY.pack(at, entry.client, entry.identity, entry.mask_key, entry.sealing_key)
        for at, entry in sorted(cohort.entries.items())
    )


def _read_cohort(fields: _Fields) -> Cohort:
    """Read the cohort, whose neighbours are those of whom there is an entry.

    That is every holder but the device itself.
    """
    degree, threshold, position = _COHORT.unpack(fields.take("cohort", _COHORT.size))
    digest = fields.take("roster's digest", DIGEST_BYTES)
    joined = fields.take("identities", KEY_BYTES, 1, MAX_PARTICIPANTS)
    identities = tuple(joined[at : at + KEY_BYTES] for at in range(0, len(joined), KEY_BYTES))
    listed = fields.table("entries", _ENTRY, len(identities))
    entries = {at: Entry(*rest) for at, *rest in listed}
    if position not in entries:
        raise _refusal("the entries lack this device's own")
    beside = tuple(at for at in entries if at != position)
    return Cohort(entries, identities, digest, Graph(degree, threshold), position, beside)


def _read_later(fields: _Fields, party: Party, cohort: Cohort) -> State:
    participants = cohort.participants
    if fields.kind is Shared:
        seed, pairs = fields.seed(), _read_seeds(fields, "pairs", participants)
        sealing, own = (
            _read_seeds(fields, "sealing keys", participants),
            fields.take("own", 2 * SHARE_BYTES),
        )
        kept = Secret(own[:SHARE_BYTES]), Secret(own[SHARE_BYTES:])
        return Shared(party, cohort, seed, pairs, sealing, kept)
    if fields.kind is Received:
        seed, pairs = fields.seed(), _read_seeds(fields, "pairs", participants)
        held = _read_shares(fields, participants)
        return Received(
            party, cohort, seed, pairs, held, _read_positions(fields, "dealt", participants)
        )
    held = _read_shares(fields, participants)
    if fields.kind is Masked:
        return Masked(party, cohort, held, _read_positions(fields, "dealt", participants))
    alive, dropped = (_read_positions(fields, name, participants) for name in ("alive", "dropped"))
    return Confirmed(party, cohort, held, Survivors(alive, dropped))


def _key(fields: _Fields, name: str) -> RoundKey:
    both = fields.take(name, 2 * KEY_BYTES)
    return RoundKey(Secret(both[:KEY_BYTES]), both[KEY_BYTES:])


def _seeds(table: Mapping[int, Secret]) -> bytes:
    return b"".join(_SEED.pack(at, one.value) for at, one in sorted(table.items()))


def _read_seeds(fields: _Fields, name: str, participants: int) -> dict[int, Secret]:
    found = fields.table(name, _SEED, participants)
    return {at: Secret(one) for at, one in found}


def _shares(table: Mapping[int, Held]) -> bytes:
    return b"".join(
        _HELD.pack(at, one.value, two.value) for at, (one, two) in sorted(table.items())
    )


def _read_shares(fields: _Fields, participants: int) -> dict[int, Held]:
    found = fields.table("shares", _HELD, participants)
    return {at: (Secret(one), Secret(two)) for at, one, two in found}


def _positions(positions: Iterable[int]) -> bytes:
    return b"".join(map(_POSITION.pack, sorted(positions)))


def _read_positions(fields: _Fields, name: str, participants: int) -> frozenset[int]:
    return frozenset(at for (at,) in fields.table(name, _POSITION, participants))
