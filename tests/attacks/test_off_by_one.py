"""Every field of every message a server sends, one off in either direction, against real devices.

A row says what becomes of it: refused in a sentence, or taken because it is no weaker than what the
device's owner agreed to. A field that is added later and has no row here fails.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from privet.client.device import masked_phase
from privet.client.privacy import masked_upload as client
from privet.client.privacy.ledger import Ledger
from privet.client.simulated import SimulatedContext
from privet.common.errors import ConfigError, ProtocolError
from privet.common.privacy.plan_maker import make_plan
from privet.common.privacy.round_plan import Plan
from privet.common.secure_aggregation import messages
from privet.common.secure_aggregation.messages import (
    Confirmations,
    Entry,
    Inbox,
    Package,
    Roster,
    Survivors,
)
from privet.common.secure_aggregation.terms import Graph, MaskingPolicy, Terms, default_graph
from privet.experiments.simulate import prepare
from privet.server.rounds import masked_sum

from ..masking_party import Party, stream, terms
from ..server.test_masked_rounds import EVERYBODY, Devices
from ..tiny import population, tiny_config

NO = "refused: "
"""... and a part of the sentence that the device keeps; no key, share or vector leaves."""
LATER = "later: "
"""Refused before its vector: the keys and shares of such a round open nothing."""
OK = "taken: "
"""... and why that is no harm; the round is played to its sum."""

Row = tuple[str, str]
"""What becomes of a value one below, and of one above."""


def one_off(value: Any, up: bool) -> Any:
    """The nearest other value in a direction; a text with a letter more or less, a number of bytes
    as a whole one; of what is on or off the other."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + (1 if up else -1)
    if isinstance(value, float):
        return value * (1.0001 if up else 0.9999)
    if isinstance(value, bytes):
        number = int.from_bytes(value, "big") + (1 if up else -1)
        return (number % (1 << 8 * len(value))).to_bytes(len(value), "big")
    return f"{value}0" if up else value[:-1]


# --- the plan -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> SimulatedContext:
    """Twelve devices of a run with masks, DP-SGD and all statistics."""
    folder = tmp_path_factory.mktemp("one-off")
    people = population(folder / "people", 15, 8)
    config = tiny_config(
        llama_folder,
        people,
        data={"clients": 12},
        training={"steps": 1},
        rounds={"count": 2, "cohort": 12},
        privacy={"client": {"noise_at": "distributed", "bits": 20}},
        statistics={"enabled": True, "gains": True},
    )
    prepare(config, folder / "run", resume=False)
    return SimulatedContext.open(folder / "run")


LAST = 120
"""A hundred and ten times the rounds of the run: the last number of a round and of an attempt."""

UNIT = OK + "a statistic is clipped to it and divided by it; its noise is of the quotient"

PLAN: Mapping[str, Row] = {
    "run": (OK + "one run a folder; a person's device looks its consent up by it (test_seat)",) * 2,
    "round": (OK + "the last but one", NO + "round (own limit 120)"),
    "layout": (LATER + "this device's adapter has layout",) * 2,
    "start": (LATER + "the adapter received is not the one announced",) * 2,
    "cohort": (NO + "cohort (own limit 12)", OK + "the sum is divided by more"),
    "clip": (OK + "a shorter contribution", NO + "clip (own limit 1.0)"),
    "step": (NO + "noise over a rounded contribution (own", OK + "more noise"),
    "bits": (NO + "bits (own limit 20)", OK + "the sum wraps later"),
    "rotated": (OK + "a rotation is public and changes no length",) * 2,
    "noise_at": (NO + "noise_at = 'distribute': expected one of",
                 NO + "noise_at = 'distributed0': expected one of"),
    "variance": (NO + "noise over a rounded contribution (own limit 1.0)", OK + "more noise"),
    "survivors": (NO + "noise (own limit 1.0)", OK + "no smaller sum is opened, with more noise"),
    "colluders": (NO + "colluders (own limit 2)", NO + "noise (own limit 1.0)"),
    "learning_rate": (OK + "one record moves less", NO + "learning_rate (own limit 1.0)"),
    "local_steps": (NO + "local_steps = 0 is out of range", NO + "local_steps = 2: expected 1"),
    "batch_size": (NO + "batch_size (own limit 4)", OK + "one record moves less"),
    "rate": (OK + "one record is drawn less often", NO + "rate (own limit 0.5)"),
    "record_clip": (OK + "one record moves less", NO + "record_clip (own limit 1.0)"),
    "record_noise": (NO + "record_noise (own limit 0.5)", OK + "more noise"),
    "attempt": (OK + "the last but one", NO + "attempt (own limit 120)"),
    "losses_bound": (UNIT, UNIT),
    "losses_step": (NO + "losses_noise (own limit 3", OK + "more noise"),
    "losses_variance": (NO + "losses_noise (own limit 3", OK + "more noise"),
    "gains_bound": (UNIT, UNIT),
    "gains_step": (NO + "gains_noise (own limit 4", OK + "more noise"),
    "gains_variance": (NO + "gains_noise (own limit 4", OK + "more noise"),
    "version": (NO + "plan version 3, this device 4; install the same",
                NO + "plan version 5, this device 4; install the same"),
}  # fmt: skip


def plan_of(bench: SimulatedContext) -> Plan:
    adapter = bench.trainer.adapter
    return make_plan(bench.config, bench.run, 1, adapter.layout.digest, adapter.start)


def other_plan(plan: Plan, name: str, up: bool) -> Plan:
    value = LAST if name in ("round", "attempt") else getattr(plan, name)
    return Plan.from_dict({**plan.to_dict(), name: one_off(value, up)})


@pytest.mark.parametrize("up", [False, True], ids=["below", "above"])
@pytest.mark.parametrize("name", PLAN)
def test_a_plan_one_off_is_refused_by_name_or_no_weaker(bench, tmp_path, name, up):
    row = PLAN[name][up]
    with Ledger.open(tmp_path / "ledger", owner=bench.run) as ledger:
        context = dataclasses.replace(bench, ledger=ledger)
        plan = plan_of(bench)
        if row.startswith(NO):
            said = refusal_of(functools.partial(first_phase, context, plan, name, up))
            assert row.removeprefix(NO) in said
            assert ledger.clients() == []
            return
        other = other_plan(plan, name, up)
        start = bench.trainer.adapter.start
        total, *_ = masked_sum(Devices(context).ask, EVERYBODY, other, start)
        if row.startswith(OK):
            assert total is not None
            assert ledger.declined() == []
            return
        assert total is None
        reasons = {one.reason for one in ledger.declined()}
        assert len(reasons) == 1
        assert row.removeprefix(LATER) in reasons.pop()
        assert ledger.clients() == []  # no vector was released


def first_phase(context: SimulatedContext, plan: Plan, name: str, up: bool) -> None:
    """Keys, as `client/app.py` has them made; the refusal is what the device's ledger has."""
    other, device = other_plan(plan, name, up), context.device(0)
    state, sent = masked_phase(device, "keys", other, b"", None, None)
    assert state is None
    assert sent is None
    (found,) = context.ledger.declined(device.name)
    raise ProtocolError(found.reason)


def refusal_of(step: Callable[[], object]) -> str:
    """What the device says; anything but a refusal fails the test, and so does an answer."""
    with pytest.raises(ProtocolError) as refusal:
        step()
    said = str(refusal.value)
    assert re.match(r"round \d+: |the (round plan|server)", said)
    return said


# --- the terms ----------------------------------------------------------------------------------

SPACED = tuple(range(10, 130, 10))
"""Twelve clients, whose numbers are not next to each other."""

POLICY = MaskingPolicy(min_cohort=11, min_survivors=8, min_bits=20, colluders=2)
TERMS = terms(survivors=8, colluders=2)
ANOTHER = NO + "made for another plan"

SAID: Mapping[str, Row] = {
    "run": (NO + "made for another run",) * 2,
    "round": (NO + "round",) * 2,
    "plan": (ANOTHER, ANOTHER),
    "dimension": (ANOTHER, ANOTHER),
    "bits": (ANOTHER, ANOTHER),
    "survivors": (ANOTHER, ANOTHER),
    "colluders": (ANOTHER, ANOTHER),
}
"""Of every message under terms that are one off."""

ANNOUNCED: Mapping[str, Row] = {
    "run": (OK + "keys of another run sign for that run alone",) * 2,
    "round": (NO + "has taken part in round 6 already", OK + "a later round"),
    "plan": (OK + "keys of another plan sign for that plan alone",) * 2,
    "dimension": (OK + "the gate holds a vector to its length",) * 2,
    "bits": (NO + "bits = 19, this device asks for at least 20", OK + "the sum wraps later"),
    "survivors": (NO + "survivors = 7, this device asks for at least 8", OK + "a larger sum"),
    "colluders": (NO + "colluders = 1, this device asks for at least 2", OK + "a larger quorum"),
}
"""Before anything is sent: what the device's own policy says of terms that are one off."""


def play(**changes: Any) -> Party:
    """Twelve participants; eight must be left, two may collude."""
    return Party(terms=TERMS, numbers=SPACED, policy=POLICY, **changes)


@functools.cache
def played() -> Party:
    """The honest round, with one that sends no vector."""
    party = play(silent=(120,))
    party.outcome()
    return party


def other_terms(name: str, up: bool) -> Terms:
    value = getattr(TERMS, name)
    return dataclasses.replace(TERMS, **{name: one_off(value, up)})


@pytest.mark.parametrize("up", [False, True], ids=["below", "above"])
@pytest.mark.parametrize("name", ANNOUNCED)
def test_terms_one_off_are_refused_before_keys_are_announced_or_are_no_weaker(name, up):
    row, other = ANNOUNCED[name][up], other_terms(name, up)
    me = functools.partial(
        client.announce, 10, play().identities(10), other, POLICY, 6, stream("keys")
    )
    if row.startswith(NO):
        assert row.removeprefix(NO) in refusal_of(me)
        return
    _, sent = me()
    assert messages.decode_announcement(sent, other, 10)
    with pytest.raises(ProtocolError):  # and these keys are good for no other terms
        messages.decode_announcement(sent, TERMS, 10)


STEPS: Mapping[str, tuple[Callable[..., Any], str, str]] = {
    "roster": (client.share, "keys", "shares"),
    "inbox": (client.receive, "shares", "receive"),
    "survivors": (client.confirm, "mask", "confirm"),
    "confirmations": (client.unmask, "confirm", "unmask"),
}
"""What a device does with each of the server's messages: its state's phase, the message's."""


def given(kind: str, message: bytes) -> Any:
    """The first device gets this in place of what an honest server sent it."""
    step, state, _ = STEPS[kind]
    party = played()
    more = (party.directory, stream("deal")) if kind == "roster" else ()
    return step(party.states[state][10], message, *more)


def reencoded(kind: str, its: Terms) -> bytes:
    """The honest message of a kind, as a server with other terms would write it."""
    data, size = played().got[STEPS[kind][2]][10], len(SPACED)
    if kind == "roster":
        return messages.encode_roster(its, messages.decode_roster(data, TERMS))
    if kind == "inbox":
        return messages.encode_inbox(its, messages.decode_inbox(data, TERMS, size), size)
    if kind == "survivors":
        lists, signatures = messages.decode_survivors(data, TERMS, size)
        return messages.encode_survivors(its, lists, size, signatures)
    return messages.encode_confirmations(its, messages.decode_confirmations(data, TERMS))


@pytest.mark.parametrize("kind", STEPS)
def test_the_honest_messages_are_taken(kind):
    given(kind, reencoded(kind, TERMS))


@pytest.mark.parametrize("up", [False, True], ids=["below", "above"])
@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("name", SAID)
def test_no_message_of_terms_one_off_is_taken(kind, name, up):
    message = reencoded(kind, other_terms(name, up))
    said = refusal_of(functools.partial(given, kind, message))
    assert SAID[name][up].removeprefix(NO) in said


def test_terms_beyond_their_range_are_no_terms():
    for name, least, most in (("bits", 8, 32), ("survivors", 1, 1 << 14), ("colluders", 0, 1 << 14),
                              ("round", 1, 2**32 - 1), ("dimension", 1, 1 << 28)):  # fmt: skip
        for value, up in ((least, False), (most, True)):
            terms(**{name: value})
            with pytest.raises(ConfigError, match=f"masking terms: {name} must be between"):
                terms(**{name: one_off(value, up)})


# --- the roster ---------------------------------------------------------------------------------

UNSIGNED = NO + "the signature of its keys is not that of its identity"

ENTRY: Mapping[str, Row] = {
    "client": (UNSIGNED, UNSIGNED),
    "identity": (UNSIGNED, UNSIGNED),
    "mask_key": (UNSIGNED, UNSIGNED),
    "sealing_key": (UNSIGNED, UNSIGNED),
}
"""Of another participant's entry."""

OWN: Mapping[str, Row] = dict.fromkeys(
    ENTRY, (NO + "the roster lacks this device, or lists it with other keys",) * 2
)
"""Of the device's own."""

GRAPH: Mapping[str, Row] = {
    "degree": (NO + "10 neighbours, expected 11 (everybody)", NO + "12 neighbours, expected 11"),
    "threshold": (NO + "threshold 7 for 12 holders", OK + "more holders must open a secret"),
}

ROSTER: Mapping[str, Row] = {
    "entries": (OK + "somebody was not there: 11 are enough", NO + "neighbours"),
    "graph": ("see GRAPH", "see GRAPH"),
    "signatures": (NO + "expected the signatures of 11 neighbours, got 10",
                   NO + "expected the signatures of 11 neighbours, got 12"),
}  # fmt: skip


def roster() -> Roster:
    return messages.decode_roster(played().got["shares"][10], TERMS)


def shown(changed: Roster) -> Any:
    return given("roster", messages.encode_roster(TERMS, changed))


@pytest.mark.parametrize("up", [False, True], ids=["below", "above"])
@pytest.mark.parametrize("name", ENTRY)
@pytest.mark.parametrize("place", [0, 1, 11], ids=["own", "next", "last"])
def test_a_roster_with_an_entry_one_off_is_refused(place, name, up):
    row = (ENTRY if place else OWN)[name][up]
    entries = list(roster().entries)
    changed = {name: one_off(getattr(entries[place], name), up)}
    entries[place] = dataclasses.replace(entries[place], **changed)
    said = refusal_of(lambda: shown(dataclasses.replace(roster(), entries=tuple(entries))))
    assert row.removeprefix(NO) in said


@pytest.mark.parametrize("up", [False, True], ids=["below", "above"])
@pytest.mark.parametrize("name", GRAPH)
def test_a_roster_with_a_graph_one_off_is_refused_or_no_weaker(name, up):
    row, graph = GRAPH[name][up], roster().graph
    assert graph == Graph(11, 8) == default_graph(12, 2)
    changed = dataclasses.replace(graph, **{name: one_off(getattr(graph, name), up)})
    if row.startswith(NO):
        said = refusal_of(lambda: shown(dataclasses.replace(roster(), graph=changed)))
        assert row.removeprefix(NO) in said
        return
    assert play(graph=changed).outcome().survivors == SPACED


@pytest.mark.parametrize("own", [True, False], ids=["own", "other"])
@pytest.mark.parametrize("at", [0, 8, 31])
def test_a_roster_with_a_signature_one_off_is_refused(at, own):
    """Not told from a forged one; of the own neighbours only, which here are all others."""
    signatures = list(roster().signatures)
    place = 0 if own else 10
    changed = bytearray(signatures[place])
    changed[at] ^= 1
    signatures[place] = bytes(changed)
    said = refusal_of(lambda: shown(dataclasses.replace(roster(), signatures=tuple(signatures))))
    assert UNSIGNED.removeprefix(NO) in said


def test_a_roster_of_one_more_or_one_less_is_refused_unless_it_is_an_honest_smaller_one():
    whole = roster()
    for entries, signatures, words in (
        # one less, with the graph of before
        (whole.entries[:-1], whole.signatures[:-1], "11 neighbours, expected 10"),
        # the device itself is what is missing
        (whole.entries[1:], whole.signatures, "11 neighbours, expected 10"),
        # one more, that nobody has heard of
        ((*whole.entries, dataclasses.replace(whole.entries[-1], client=130)),
         (*whole.signatures, whole.signatures[-1]), "11 neighbours, expected 12"),
    ):  # fmt: skip
        said = refusal_of(lambda: shown(Roster(entries, whole.graph, signatures)))  # noqa: B023
        assert words in said
    fewer = Roster(whole.entries[1:], default_graph(11, 2), whole.signatures[1:])
    assert "the roster lacks this device" in refusal_of(lambda: shown(fewer))
    twice = (*whole.entries, dataclasses.replace(whole.entries[-1], client=130))
    more = Roster(twice, default_graph(13, 2), (*whole.signatures, whole.signatures[-1]))
    assert "clients 120 and 130 have the same identity" in refusal_of(lambda: shown(more))
    again = (*whole.entries, whole.entries[-1])
    same = Roster(again, default_graph(13, 2), (*whole.signatures, whole.signatures[-1]))
    assert "number 120 is listed twice" in refusal_of(lambda: shown(same))
    # eleven that announced are a round; ten are below the owner's smallest cohort
    smaller = Party(terms=TERMS, numbers=SPACED[:-1], policy=POLICY)
    assert smaller.outcome().survivors == SPACED[:-1]
    with pytest.raises(ProtocolError, match="10 participants, this device asks for at least 11"):
        Party(terms=TERMS, numbers=SPACED[:-2], policy=POLICY).until("receive")
    for count, signed in ((10, whole.signatures[:-1]), (12, (*whole.signatures, bytes(64)))):
        said = refusal_of(lambda: shown(dataclasses.replace(whole, signatures=signed)))  # noqa: B023
        assert ROSTER["signatures"][count > 11].removeprefix(NO) in said


# --- the inbox ----------------------------------------------------------------------------------

PACKAGE: Mapping[str, Row] = {
    "sealed": (NO + "client 20: ", NO + "client 20: "),
    "self_commitment": (NO + "its shares are not those it committed to",) * 2,
    "key_commitment": (NO + "its shares are not those it committed to",) * 2,
}

INBOX: Mapping[str, Row] = {
    "packages": (NO + "client 20 is listed as having dealt shares, and they did not come",
                 NO + "who is not a neighbour"),
    "dealt": (NO + "the list of who dealt shares lacks client 20, whose shares came",
              NO + "lists a position beyond the roster"),
}  # fmt: skip


def inbox() -> Inbox:
    return messages.decode_inbox(played().got["receive"][10], TERMS, len(SPACED))


def received(changed: Inbox, size: int = len(SPACED)) -> Any:
    return given("inbox", messages.encode_inbox(TERMS, changed, size))


@pytest.mark.parametrize("up", [False, True], ids=["below", "above"])
@pytest.mark.parametrize("name", PACKAGE)
def test_an_inbox_with_a_package_one_off_is_refused_with_its_sender(name, up):
    found = inbox()
    package = dataclasses.replace(
        found.packages[1], **{name: one_off(getattr(found.packages[1], name), up)}
    )
    said = refusal_of(lambda: received(Inbox({**found.packages, 1: package}, found.dealt)))
    assert said.startswith("round 7: client 20: ")
    assert PACKAGE[name][up].removeprefix(NO) in said


@pytest.mark.parametrize("up", [False, True], ids=["below", "above"])
@pytest.mark.parametrize("name", INBOX)
def test_an_inbox_one_off_is_refused(name, up):
    found = inbox()
    packages, dealt, size = dict(found.packages), set(found.dealt), len(SPACED)
    if name == "packages" and up:
        packages[0] = packages[1]  # the device's own position
    elif name == "packages":
        del packages[1]
    elif up:
        dealt, size = dealt | {12}, 13
    else:
        dealt -= {1}
    said = refusal_of(lambda: received(Inbox(packages, frozenset(dealt)), size))
    assert INBOX[name][up].removeprefix(NO) in said


@pytest.mark.parametrize("by", [-1, 1])
def test_a_package_under_the_position_beside_its_own_is_refused(by):
    """All moved by one: one is then the own, or beyond the roster, the others open for nobody."""
    found = inbox()
    moved = {position + by: package for position, package in found.packages.items()}
    said = refusal_of(lambda: received(Inbox(moved, found.dealt)))
    assert "who is not a neighbour" in said
    within = {at: found.packages[min(max(at + by, 1), 11)] for at in found.packages}
    assert "sealed shares do not open" in refusal_of(lambda: received(Inbox(within, found.dealt)))


def test_an_inbox_of_just_the_threshold_is_taken_and_of_one_less_is_refused():
    found = inbox()
    for left, taken in ((7, True), (6, False)):  # and the device itself: 8
        packages = {at: found.packages[at] for at in range(1, left + 1)}
        short = Inbox(packages, frozenset(range(left + 1)))
        if taken:
            assert received(short).held.keys() == set(range(8))
        else:
            said = refusal_of(lambda: received(short))  # noqa: B023
            assert "7 holders have dealt, fewer than the threshold of 8" in said


# --- the survivor list --------------------------------------------------------------------------

SURVIVORS: Mapping[str, Row] = {
    "alive": (NO + "the survivor list lacks position 1, who had dealt shares",
              NO + "position 11 is listed as alive and as dropped"),
    "dropped": (NO + "the survivor list lacks position 11, who had dealt shares",
                NO + "position 1 is listed as alive and as dropped"),
}  # fmt: skip


def listed() -> tuple[Survivors, tuple[bytes, ...]]:
    return messages.decode_survivors(played().got["confirm"][10], TERMS, len(SPACED))


def confirmed(changed: Survivors, signatures: tuple[bytes, ...], size: int = len(SPACED)) -> Any:
    return given("survivors", messages.encode_survivors(TERMS, changed, size, signatures))


@pytest.mark.parametrize("up", [False, True], ids=["below", "above"])
@pytest.mark.parametrize("name", SURVIVORS)
def test_a_survivor_list_one_off_is_refused(name, up):
    lists, signatures = listed()
    assert (lists.alive, lists.dropped) == (frozenset(range(11)), frozenset({11}))
    changed = getattr(lists, name)
    if name == "alive":
        changed = changed | {11} if up else changed - {1}
    else:
        changed = changed | {1} if up else changed - {11}
    other = dataclasses.replace(lists, **{name: changed})
    said = refusal_of(lambda: confirmed(other, signatures))
    assert SURVIVORS[name][up].removeprefix(NO) in said
    beyond = dataclasses.replace(lists, **{name: getattr(lists, name) | {12}})
    said = refusal_of(lambda: confirmed(beyond, signatures, 13))
    assert "lists a position beyond the roster" in said


def test_a_survivor_list_with_its_signatures_one_off_is_refused():
    lists, signatures = listed()
    for count, changed in ((9, signatures[:-1]), (11, (*signatures, signatures[-1]))):
        said = refusal_of(lambda: confirmed(lists, changed))  # noqa: B023
        assert f"expected the signatures of 10 living neighbours, got {count}" in said
    for up in (False, True):
        said = refusal_of(
            lambda: confirmed(lists, (one_off(signatures[0], up), *signatures[1:]))  # noqa: B023
        )
        assert "did not sign the list of who dealt shares" in said


def test_a_list_that_moves_one_from_the_living_to_the_dropped_is_taken_down_to_the_smallest_sum():
    _lists, signatures = listed()
    for left, taken in ((10, True), (8, True), (7, False)):
        alive = frozenset(range(left))
        moved = Survivors(alive, frozenset(range(left, 12)))
        if taken:
            assert confirmed(moved, signatures[: left - 1])
        else:
            said = refusal_of(lambda: confirmed(moved, signatures[: left - 1]))  # noqa: B023
            assert "7 survivors, fewer than the smallest, 8" in said


# --- the confirmations --------------------------------------------------------------------------

CONFIRMATIONS: Mapping[str, Row] = {
    "signatures": (NO + "7 of the 12 on the roster confirmed the survivor list, fewer than the "
                   "quorum of 8", NO + "a confirmation from position 11, which is not alive"),
}  # fmt: skip


def confirmations() -> Mapping[int, bytes]:
    return messages.decode_confirmations(played().got["unmask"][10], TERMS).signatures


def opened(signatures: Mapping[int, bytes]) -> Any:
    return given("confirmations", messages.encode_confirmations(TERMS, Confirmations(signatures)))


def test_a_quorum_is_taken_and_one_less_or_one_who_is_not_alive_is_refused():
    found = confirmations()
    assert len(found) == 8
    below, above = CONFIRMATIONS["signatures"]
    last = max(found)
    fewer = {at: one for at, one in found.items() if at != last}
    assert below.removeprefix(NO) in refusal_of(lambda: opened(fewer))
    more = {**found, 11: found[last]}
    assert above.removeprefix(NO) in refusal_of(lambda: opened(more))
    said = refusal_of(lambda: opened({**found, 12: found[last]}))
    assert "a confirmation from position 12, which is not alive" in said


@pytest.mark.parametrize("by", [-1, 1])
def test_confirmations_one_off_in_position_or_number_are_refused(by):
    found = confirmations()
    moved = {(at + by) % 11: one for at, one in found.items()}
    assert "did not sign the survivor list" in refusal_of(lambda: opened(moved))
    changed = {**found, 1: one_off(found[1], by > 0)}
    assert "position 1 did not sign the survivor list" in refusal_of(lambda: opened(changed))


# --- nothing is left out ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        (Plan, PLAN), (Terms, SAID), (Terms, ANNOUNCED), (Entry, ENTRY), (Entry, OWN),
        (Graph, GRAPH), (Roster, ROSTER), (Package, PACKAGE), (Inbox, INBOX),
        (Survivors, SURVIVORS), (Confirmations, CONFIRMATIONS),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)  # fmt: skip
def test_every_field_has_a_row(kind, rows):
    assert {field.name for field in dataclasses.fields(kind)} == set(rows)
    assert all(len(row) == 2 and all(row) for row in rows.values())
