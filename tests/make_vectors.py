"""Writes tests/vectors/masking_negative.json: messages with one fault each, and the refusal.

    python -m tests.make_vectors

Everything comes from `masking_party`'s fixed randomness, so the file is the same on every machine.
`deliver` gives a case's bytes to the function they are meant for; the test uses it as well.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from privet.client.privacy import masked_upload as client
from privet.common.errors import ProtocolError
from privet.common.secure_aggregation import messages
from privet.common.secure_aggregation.keys import Directory, RoundKey
from privet.common.secure_aggregation.messages import Entry, Opened, Package, Survivors
from privet.common.secure_aggregation.terms import Graph, MaskingPolicy, Terms
from privet.server import unmasking as server

from .masking_party import POLICY, Party, identity, stream, terms

PATH = Path(__file__).parent / "vectors" / "masking_negative.json"
TERMS, ME = terms(), 10
"""Client 10 at position 0 is the one that is sent wrong bytes, or sends them."""

SETUPS: dict[str, dict[str, Any]] = {
    "plain": {"silent": (14,)},
    "undealt": {"undealt": (14,)},
    "closed": {
        "directory": Directory({n: identity(n).public for n in (10, 11, 12, 13, 14)}, closed=True)
    },
    "laxer threshold": {
        "silent": (14,),
        "policy": dataclasses.replace(POLICY, colluders=0),
        "terms": terms(colluders=0),
        "graph": Graph(4, 3),
    },
    "earlier round": {"terms": terms(round=6), "silent": (14,), "last_round": 5},
    "seven": {"numbers": (10, 11, 12, 13, 14, 15, 16), "silent": (16,)},
}


@lru_cache(maxsize=len(SETUPS))
def party(setup: str = "plain") -> Party:
    """An honest round; nobody may change it."""
    found = Party(**SETUPS[setup]).until("unmask")
    found._unmask()
    return found


@dataclasses.dataclass(frozen=True)
class Case:
    """One fault.

    Attributes:
        name: what is wrong.
        step: the function that must refuse.
        message: the bytes.
        setup: the honest round around it, in `SETUPS`.
        sender: for the server's functions, whose reply it is.
    """

    name: str
    step: str
    message: bytes
    setup: str = "plain"
    sender: int = ME


def deliver(case: Case) -> str:
    """The refusal's sentence; empty when nothing refuses."""
    round_ = party(case.setup)
    try:
        refused = _steps(round_, case)[case.step]()
    except ProtocolError as refusal:
        return f"{type(refusal).__name__}: {refusal}"
    if isinstance(refused, dict):
        return f"ProtocolError: {refused[case.sender]}" if case.sender in refused else ""
    return ""


def _steps(round_: Party, case: Case) -> dict[str, Callable[[], Any]]:
    data, states, served = case.message, round_.states, round_.served

    def with_reply(phase: str) -> dict[int, bytes]:
        return {**round_.sent[phase], case.sender: data}

    def running() -> server.Sum:
        return server.begin_sum(served["shares"])

    def second_vector() -> None:
        begun = running()
        server.add_vector(begun, case.sender, round_.sent["mask"][case.sender])
        server.add_vector(begun, case.sender, data)

    return {
        "announce": lambda: client.announce(
            ME, identity(ME), *_announced(case.name), stream("announce")
        ),
        "share": lambda: client.share(
            states["keys"][ME], data, round_.directory, stream(f"deal {ME}")
        ),
        "share again": lambda: client.share(
            states["shares"][ME], data, round_.directory, stream(f"deal {ME}")
        ),
        "receive": lambda: client.receive(states["shares"][ME], data),
        "confirm": lambda: client.confirm(states["mask"][ME], data),
        "confirm again": lambda: client.confirm(states["confirm"][ME], data),
        "unmask": lambda: client.unmask(states["confirm"][ME], data),
        "unmask unconfirmed": lambda: client.unmask(states["mask"][ME], data),
        "unmask again": lambda: client.unmask(states["unmask"][ME], data),
        "server gather": lambda: server.gather(TERMS, with_reply("keys"))[2],
        "server relay": lambda: server.relay(served["keys"], with_reply("shares"))[2],
        "server add": lambda: server.add_vector(running(), case.sender, data),
        "server add again": second_vector,
        "server add late": lambda: server.add_vector(served["sum"], case.sender, data),
        "server exchange": lambda: server.exchange(served["mask"], with_reply("confirm"))[2],
        "server unmask": lambda: server.unmask(served["confirm"], with_reply("unmask")).refused,
    }  # fmt: skip


LAXER: dict[str, tuple[Terms, MaskingPolicy, int]] = {
    "a round that has been": (TERMS, POLICY, 7),
    "a round before the last": (TERMS, POLICY, 9),
    "too few survivors accepted": (terms(survivors=2), POLICY, 6),
    "fewer colluders than the policy reckons with": (terms(colluders=0), POLICY, 6),
    "a modulus below the policy": (TERMS, dataclasses.replace(POLICY, min_bits=24), 6),
}


def _announced(name: str) -> tuple[Terms, MaskingPolicy, int]:
    return LAXER.get(name, (TERMS, POLICY, 6))


def cases() -> Iterator[Case]:
    """All of them, in the order of a round."""
    for name in LAXER:
        yield Case(name, "announce", b"")
    yield from _headers()
    yield from _rosters()
    yield from _inboxes()
    yield from _survivor_lists()
    yield from _confirmations()
    yield from _replies()


def _headers() -> Iterator[Case]:
    good = party().got["shares"][ME]

    def at(place: int, new: bytes) -> bytes:
        return good[:place] + new + good[place + len(new) :]

    yield Case("truncated message", "share", good[:-1])
    yield Case("truncated header", "share", good[:50])
    yield Case("empty message", "share", b"")
    yield Case("a byte after the end", "share", good + b"\0")
    yield Case("another protocol", "share", at(0, b"http"))
    yield Case("a later protocol version", "share", at(4, b"\3"))
    yield Case("another kind of message", "share", party().got["receive"][ME])
    yield Case("from a client, not the server", "share", at(6, (11).to_bytes(4, "big")))
    yield Case("replayed from another round", "share", party("earlier round").got["shares"][ME])
    yield Case("of another run", "share", at(14, terms(run="other").run_digest))
    yield Case("of another plan", "share", at(46, terms(plan=b"q" * 32).plan_digest))
    yield Case("of another modulus", "share", at(46, terms(bits=19).plan_digest))
    yield Case("of another dimension", "share", at(46, terms(dimension=5).plan_digest))
    yield Case("a length of four gigabytes", "share", at(78, b"\xff" * 4))


def _rosters() -> Iterator[Case]:
    good = messages.decode_roster(party().got["shares"][ME], TERMS)
    entries, signatures = good.entries, good.signatures

    def case(name: str, setup: str = "plain", **changes: Any) -> Case:
        roster = dataclasses.replace(good, **changes)
        return Case(name, "share", messages.encode_roster(TERMS, roster), setup)

    def entry(position: int, **changes: Any) -> tuple[Entry, ...]:
        changed = dataclasses.replace(entries[position], **changes)
        return (*entries[:position], changed, *entries[position + 1 :])

    def signed(position: int, under: Terms = TERMS, **keys: Any) -> dict[str, Any]:
        changed = dataclasses.replace(entries[position], **keys)
        mine = identity(changed.client).sign(messages.announced(under, changed))
        beside = (*signatures[: position - 1], mine, *signatures[position:])
        return {"entries": entry(position, **keys), "signatures": beside}

    yield case("a cohort below the policy", entries=entries[:4], graph=Graph(3, 3))
    yield case("threshold 1", graph=Graph(4, 1))
    yield case("threshold 0", graph=Graph(4, 0))
    yield case("threshold that colluders and half the others reach", graph=Graph(4, 3))
    yield case("threshold above the holders", graph=Graph(4, 6))
    yield case("too few neighbours", graph=Graph(2, 3))
    yield case("more neighbours than participants", graph=Graph(5, 4))
    yield case("a participant twice", entries=(*entries[:2], entries[1], *entries[3:]))
    yield case("participants out of order", entries=(entries[1], entries[0], *entries[2:]))
    yield case(
        "the server as a participant",
        entries=(*entries[:4], dataclasses.replace(entries[4], client=messages.SERVER)),
    )
    yield case("two participants with one identity", entries=entry(2, identity=entries[1].identity))
    yield case("two participants with one mask key", entries=entry(2, mask_key=entries[1].mask_key))
    yield case(
        "two participants with one sealing key",
        entries=entry(2, sealing_key=entries[1].sealing_key),
    )
    yield case(
        "a participant with this device's mask key", entries=entry(2, mask_key=entries[0].mask_key)
    )
    yield case("a client the directory does not list", "closed", entries=entry(4, client=15))
    yield case(
        "another identity than the known one",
        "closed",
        entries=entry(2, identity=identity(99).public),
    )
    yield case("this device left out", entries=entry(0, client=9))
    yield case("this device with another key", entries=entry(0, mask_key=bytes([9]) + bytes(31)))
    yield case("a wrong signature", signatures=(bytes(64), *signatures[1:]))
    yield case("two signatures swapped", signatures=(signatures[1], signatures[0], *signatures[2:]))
    yield case("a signature missing", signatures=signatures[1:])
    yield case(
        "a neighbour's mask key exchanged",
        entries=entry(1, mask_key=RoundKey.create(stream("server")).public),
    )
    yield case(
        "a neighbour's sealing key exchanged",
        entries=entry(1, sealing_key=RoundKey.create(stream("server")).public),
    )
    yield case("keys signed for another round", **signed(2, terms(round=6)))
    yield case("keys signed for another run", **signed(2, terms(run="other")))
    yield case("keys signed for another plan", **signed(2, terms(plan=b"q" * 32)))
    yield case("a mask key of low order", **signed(2, mask_key=bytes(32)))
    yield case("a sealing key of low order", **signed(2, sealing_key=b"\1" + bytes(31)))
    yield case("a key in a second encoding", **signed(2, mask_key=b"\xff" * 32))
    yield Case("asked to share twice", "share again", party().got["shares"][ME])


def _inboxes() -> Iterator[Case]:
    good = dict(messages.decode_inbox(party().got["receive"][ME], TERMS, 5).packages)

    def case(name: str, packages: dict[int, Package], dealt: set[int] | None = None) -> Case:
        listed = frozenset({0, *packages} & set(range(5)) if dealt is None else dealt)
        message = messages.encode_inbox(TERMS, messages.Inbox(packages, listed), 5)
        return Case(name, "receive", message)

    def changed(position: int, **changes: bytes) -> dict[int, Package]:
        return {**good, position: dataclasses.replace(good[position], **changes)}

    sealed = good[1].sealed
    without = {at: package for at, package in good.items() if at != 4}
    others = messages.decode_inbox(party().got["receive"][11], TERMS, 5).packages
    earlier = messages.decode_inbox(
        party("earlier round").got["receive"][ME], terms(round=6), 5
    ).packages
    yield case(
        "a tampered share",
        changed(1, sealed=sealed[:-20] + bytes([sealed[-20] ^ 1]) + sealed[-19:]),
    )
    yield case("senders swapped", {**good, 1: good[2], 2: good[1]})
    yield case("shares for another receiver", {**good, 2: others[2]})
    yield case("shares of another round", {**good, 2: earlier[2]})
    yield case("own shares sent back", {**good, 1: others[0]})
    yield case("a share that is not the one committed to", changed(1, self_commitment=bytes(32)))
    yield case("a key share that is not the one committed to", changed(1, key_commitment=bytes(32)))
    yield case("shares from this device itself", {**good, 0: good[1]})
    yield case("shares from beyond the roster", {**good, 9: good[1]})
    yield case("fewer holders than the threshold", {1: good[1], 2: good[2]})
    yield case("no holders", {})
    yield case("a neighbour withheld that is said to have dealt", without, {0, 1, 2, 3, 4})
    yield case("a neighbour passed on that is said not to have dealt", good, {0, 1, 2, 3})
    yield case("this device said not to have dealt", good, {1, 2, 3, 4})


def _survivor_lists() -> Iterator[Case]:
    def case(
        name: str,
        alive: set[int],
        dropped: set[int],
        setup: str = "plain",
        size: int = 5,
        signatures: Sequence[bytes] | None = None,
    ) -> Case:
        lists = Survivors(frozenset(alive), frozenset(dropped))
        vectors = party(setup).sent["mask"]
        found = [
            messages.decode_vector(vectors[ME + at], TERMS, ME + at).signature
            for at in sorted(alive - {0})
            if ME + at in vectors
        ]
        given = found if signatures is None else signatures
        message = messages.encode_survivors(TERMS, lists, size, given)
        return Case(name, "confirm", message, setup)

    _, good = messages.decode_survivors(party().got["confirm"][ME], TERMS, 5)
    fewer = messages.dealt_list(TERMS, party().served["keys"].digest, frozenset({0, 1, 2}), 5)

    yield case("overlapping lists", {0, 1, 2, 3, 4}, {4})
    yield case("this device not among the survivors", {1, 2, 3}, {0, 4})
    yield case("this device on neither list", {1, 2, 3}, {4})
    yield case("fewer survivors than the smallest", {0, 1}, {2, 3, 4})
    yield case("fewer living holders than the threshold", {0, 1, 2}, {3, 4})
    yield case("a survivor whose shares never came", {0, 1, 2, 3, 4}, set(), "undealt")
    yield case("one dropped whose shares never came", {0, 1, 2, 3}, {4}, "undealt")
    yield case("one whose shares came is on neither list", {0, 1, 2, 3}, set())
    yield case(
        "a survivor that signed no list of dealers",
        {0, 1, 2, 3},
        {4},
        signatures=(bytes(64), *good[1:]),
    )
    yield case(
        "a survivor that was shown another list of dealers",
        {0, 1, 2, 3},
        {4},
        signatures=(identity(11).sign(fewer), *good[1:]),
    )
    yield case(
        "two survivors' signatures swapped",
        {0, 1, 2, 3},
        {4},
        signatures=(good[1], good[0], *good[2:]),
    )
    yield case("a survivor's signature missing", {0, 1, 2, 3}, {4}, signatures=good[1:])
    yield case("a list for a larger roster", {0, 1, 2, 3}, {4}, size=9)
    yield case("a position beyond the roster", {0, 1, 2, 3, 6}, {4})
    yield Case("a second survivor list", "confirm again", party().got["confirm"][ME])


def _confirmations() -> Iterator[Case]:
    good = dict(messages.decode_confirmations(party().got["unmask"][ME], TERMS).signatures)
    roster = party().served["keys"].digest
    other = Survivors(frozenset({0, 1, 3, 4}), frozenset({2}))
    elsewhere = identity(11).sign(other.signed(TERMS, roster, 5))
    its = Survivors(frozenset({0, 1, 2, 3}), frozenset({4}))
    ghost = identity(14).sign(its.signed(TERMS, roster, 5))

    def case(name: str, signatures: dict[int, bytes], step: str = "unmask") -> Case:
        confirmations = messages.Confirmations(signatures)
        return Case(name, step, messages.encode_confirmations(TERMS, confirmations))

    yield case("a wrong signature of the survivor list", {**good, 1: bytes(64)})
    yield case("a signature of another survivor list", {**good, 1: elsewhere})
    yield case("two confirmations swapped", {**good, 1: good[2], 2: good[1]})
    yield case("a confirmation of one that dropped", {**good, 4: ghost})
    yield case("a confirmation from beyond the roster", {**good, 9: good[1]})
    yield case(
        "this device's own confirmation counted twice",
        {0: party().sent["confirm"][ME][-64:], 1: good[1], 2: good[2]},
    )
    yield case("too few confirmations", {1: good[1], 2: good[2]})
    yield case("no confirmation", {})
    yield case("unmasking before the list is confirmed", good, "unmask unconfirmed")
    yield case("a second unmask request in a round", good, "unmask again")


def _replies() -> Iterator[Case]:
    sent = {phase: replies[ME] for phase, replies in party().sent.items()}
    others = {phase: replies.get(11, b"") for phase, replies in party().sent.items()}
    mine = messages.decode_announcement(sent["keys"], TERMS, ME)

    def announced(name: str, **keys: bytes) -> Case:
        changed = dataclasses.replace(mine, **keys)
        signature = identity(ME).sign(messages.announced(TERMS, changed.entry(ME)))
        full = dataclasses.replace(changed, signature=signature)
        return Case(name, "server gather", messages.encode_announcement(TERMS, ME, full))

    unsigned = dataclasses.replace(mine, signature=bytes(64))
    yield Case(
        "announced with a wrong signature",
        "server gather",
        messages.encode_announcement(TERMS, ME, unsigned),
    )
    yield Case("another client's announcement", "server gather", others["keys"])
    yield Case(
        "announced for another round", "server gather", party("earlier round").sent["keys"][ME]
    )
    yield announced("announced a mask key of low order", mask_key=bytes(32))
    yield announced("announced one key twice", sealing_key=mine.mask_key)
    taken = messages.decode_announcement(others["keys"], TERMS, 11)
    stolen = dataclasses.replace(
        taken, signature=identity(11).sign(messages.announced(TERMS, taken.entry(12)))
    )
    yield Case(
        "announced another client's identity",
        "server gather",
        messages.encode_announcement(TERMS, 12, stolen),
        sender=12,
    )
    copied = dataclasses.replace(
        messages.decode_announcement(party().sent["keys"][12], TERMS, 12), mask_key=taken.mask_key
    )
    copied = dataclasses.replace(
        copied, signature=identity(12).sign(messages.announced(TERMS, copied.entry(12)))
    )
    yield Case(
        "announced another client's key",
        "server gather",
        messages.encode_announcement(TERMS, 12, copied),
        sender=12,
    )

    deal = messages.decode_deal(sent["shares"], TERMS, ME)
    fewer = dict(deal.packages)
    del fewer[4]
    yield Case(
        "dealt to too few",
        "server relay",
        messages.encode_deal(TERMS, ME, dataclasses.replace(deal, packages=fewer)),
    )
    yield Case("another client's shares", "server relay", others["shares"])
    yield Case("shares from nobody on the roster", "server relay", sent["shares"], sender=99)

    yield Case(
        "a vector of another length",
        "server add",
        messages.encode_vector(TERMS, ME, messages.Vector(bytes(11), bytes(64))),
    )
    yield Case("another client's vector", "server add", others["mask"])
    mine_masked = messages.decode_vector(sent["mask"], TERMS, ME)
    unsigned_vector = dataclasses.replace(mine_masked, signature=bytes(64))
    yield Case(
        "a vector without a signature of who dealt",
        "server add",
        messages.encode_vector(TERMS, ME, unsigned_vector),
    )
    yield Case(
        "a vector from one that dealt no shares",
        "server add",
        messages.encode_vector(TERMS, 14, messages.Vector(bytes(10), bytes(64))),
        "undealt",
        14,
    )
    yield Case("a second vector", "server add again", sent["mask"])
    yield Case(
        "a late vector, its key may be opened",
        "server add late",
        messages.encode_vector(TERMS, 14, messages.Vector(bytes(10), bytes(64))),
        sender=14,
    )

    yield Case(
        "a survivor list not signed",
        "server exchange",
        messages.encode_confirmation(TERMS, ME, bytes(64)),
        "seven",
    )
    yield Case(
        "a confirmation from one that dropped",
        "server exchange",
        messages.encode_confirmation(TERMS, 14, bytes(64)),
        sender=14,
    )

    # six survivors of seven: one wrong reply is one dropout
    seven = party("seven")
    opening = dict(messages.decode_opening(seven.sent["unmask"][ME], TERMS, ME).shares)

    def opened(name: str, shares: dict[int, Any], who: int = ME) -> Case:
        message = messages.encode_opening(TERMS, who, messages.Opening(shares))
        return Case(name, "server unmask", message, "seven", who)

    theirs_opening = messages.decode_opening(seven.sent["unmask"][11], TERMS, 11).shares
    kind, share = opening[1]
    wrong = dataclasses.replace(share, value=share.value[:-1] + bytes([share.value[-1] ^ 1]))
    missing = dict(opening)
    del missing[1]
    yield opened("a tampered share given", {**opening, 1: (kind, wrong)})
    yield opened("the share of the other secret given", {**opening, 1: (Opened.KEY, share)})
    yield opened("another holder's share given", {**opening, 1: theirs_opening[1]})
    yield opened("shares of two owners swapped", {**opening, 1: opening[2], 2: opening[1]})
    yield opened("a share not given", missing)
    yield opened("a share nobody dealt", {**opening, 9: opening[1]})
    yield opened("shares from one that confirmed no list", opening, 16)


def build() -> list[dict[str, Any]]:
    """The file's content."""
    return [
        {
            "name": case.name, "step": case.step, "setup": case.setup, "sender": case.sender,
            "message": case.message.hex(), "expected": deliver(case),
        }
        for case in cases()
    ]  # fmt: skip


def main() -> None:
    """Write the file."""
    PATH.write_text(json.dumps(build(), indent=1) + "\n")


if __name__ == "__main__":
    main()
