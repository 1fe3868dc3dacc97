"""A server that lies, to learn one device's vector; each script works once a check is removed.

Every script is run twice: against the protocol, where a named device refuses with the reason, and
against the protocol without the one check it is up against, where it prints the victim's numbers.
The server's own checks are off: it is the attacker. Colluding clients show it their states.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pytest

from privet.client.privacy import masked_upload as client
from privet.common.errors import ProtocolError
from privet.common.privacy.encoding import unpack
from privet.common.secure_aggregation import messages
from privet.common.secure_aggregation.keys import (
    Directory,
    Identity,
    Purpose,
    RoundKey,
    Secret,
    derive,
)
from privet.common.secure_aggregation.keystream import add_masks
from privet.common.secure_aggregation.messages import Confirmations, Opened, Survivors
from privet.common.secure_aggregation.shamir import combine
from privet.common.secure_aggregation.terms import Graph, MaskingPolicy, _ring, pair_seed
from privet.server import unmasking as server

from ..masking_party import Party, identity, terms, vector

VICTIM, U = 10, 0
"""Client number and position of the device whose vector the server wants."""

TEN = tuple(range(10, 20))
STRICT = MaskingPolicy(min_cohort=5, min_survivors=3)
Learned = np.ndarray
Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def _the_server_checks_nothing(monkeypatch: Patch) -> None:
    class Anybody(Directory):
        def admit(self, claimed: Mapping[int, bytes]) -> Directory:
            del claimed
            return self

    monkeypatch.setattr(server, "Directory", Anybody)
    monkeypatch.setattr(server, "verify", lambda *_: True)
    for name in ("announcement", "few", "few_holders", "few_signers", "gap"):
        monkeypatch.setattr(server, f"_refuse_{name}", lambda *_: None)


# What a server does with secrets it has


def pair_seeds(party: Party, key: Secret, mine: int, theirs: Iterable[int]) -> dict[int, Secret]:
    """Masks between `mine`, whose private mask key is known, and others, by position."""
    cohort = party.served["keys"]
    agree = RoundKey.of(key.value).agreement()
    return {
        other: pair_seed(agree(cohort.roster.entries[other].mask_key), cohort.digest, mine, other)
        for other in theirs
        if other != mine
    }


def strip(party: Party, seed: Secret, pairs: Mapping[int, Secret]) -> Learned:
    """The victim's vector from its masked one, its self mask's seed and its pairwise masks."""
    its = party.terms
    found = unpack(
        messages.decode_vector(party.sent["mask"][VICTIM], its, VICTIM).packed,
        its.dimension,
        its.bits,
    )
    own = derive(seed, Purpose.SELF_MASK, party.served["keys"].digest)
    add_masks(found, [], [own, *pairs.values()])  # position 0 added all of them
    return found & np.uint32((1 << its.bits) - 1)


def rest(party: Party, outcome: server.Outcome) -> Learned:
    """The victim's vector from a sum in which all others are the server's own."""
    others = sum(vector(n, party.terms).astype(np.int64) for n in outcome.survivors if n != VICTIM)
    left: Learned = (outcome.total - others) % (1 << party.terms.bits)
    return left.astype(np.uint32)


def opened(
    replies: Mapping[int, bytes], party: Party, owner: int, which: Opened
) -> dict[int, Secret]:
    """Shares of one of an owner's secrets that were given, by point."""
    places, found = party.served["keys"].places, {}
    for number, reply in replies.items():
        shares = messages.decode_opening(reply, party.terms, number).shares
        if owner in shares and shares[owner][0] is which:
            found[places[number] + 1] = shares[owner][1]
    return found


def signatures_of_dealers(party: Party) -> dict[int, bytes]:
    """Of who dealt shares, by position, as they came with the vectors."""
    places = party.served["keys"].places
    return {
        places[n]: messages.decode_vector(sent, party.terms, n).signature
        for n, sent in party.sent["mask"].items()
    }


def ask(party: Party, lists: Mapping[int, Survivors], answering: Iterable[int]) -> dict[int, bytes]:
    """Show each client a survivor list, pass on the signatures each should see, get its shares."""
    cohort, states, signatures, replies = party.served["keys"], {}, {}, {}
    size = len(cohort.roster.entries)
    dealt = signatures_of_dealers(party)
    for n in answering:
        beside = sorted(lists[n].alive & set(cohort.beside[cohort.places[n]]))
        given = [dealt.get(at, bytes(64)) for at in beside]
        message = messages.encode_survivors(party.terms, lists[n], size, given)
        states[n], sent = client.confirm(party.states["mask"][n], message)
        signatures[n] = messages.decode_confirmation(sent, party.terms, n)
    for n, state in states.items():
        fitting = {
            cohort.places[other]: signature
            for other, signature in signatures.items()
            if lists[other] == lists[n]
        }
        message = messages.encode_confirmations(party.terms, Confirmations(fitting))
        _, replies[n] = client.unmask(state, message)
    return replies


# The scripts


def small_cohort() -> Learned:
    """Ask the victim and one colluding client only."""
    policy = MaskingPolicy(min_cohort=5, min_survivors=2, colluders=0)
    party = Party(numbers=(10, 11), terms=terms(survivors=2, colluders=0), policy=policy)
    return rest(party, party.outcome())


def _all_of(party: Party, colluders: Iterable[int]) -> tuple[Secret, dict[int, Secret]]:
    """The victim's secrets from what colluding holders have in their hands."""
    cohort = party.served["keys"]
    held = {at + 1: party.states["mask"][cohort.client(at)].held[U] for at in colluders}
    seed, key = (
        combine(
            {at: pair[which] for at, pair in held.items()},
            min(cohort.roster.graph.threshold, len(held)),
        )
        for which in (0, 1)
    )
    return seed, pair_seeds(party, key, U, cohort.beside[U])


def threshold_of_one() -> Learned:
    """With threshold 1 a share is the secret: one colluding client holds both."""
    party = Party(numbers=TEN, policy=STRICT, graph=Graph(9, 1)).until("confirm")
    return strip(party, *_all_of(party, colluders=(4,)))


def threshold_of_half() -> Learned:
    """Tell one half that the victim lives, the other half that it dropped; each half agrees."""
    party = Party(numbers=TEN, policy=STRICT, graph=Graph(9, 5)).until("confirm")
    halves = (frozenset(range(5)), frozenset(range(5, 10)))
    lists = {n: Survivors(halves[n >= 15], halves[n < 15]) for n in TEN}
    replies = ask(party, lists, TEN)
    seed = combine(opened(replies, party, U, Opened.SELF), 5)
    key = combine(opened(replies, party, U, Opened.KEY), 5)
    return strip(party, seed, pair_seeds(party, key, U, range(10)))


def sparse_graph() -> Learned:
    """Two neighbours each, and the victim's two are colluding."""
    party = Party(numbers=TEN, policy=STRICT, graph=Graph(2, 2)).until("confirm")
    return strip(party, *_all_of(party, colluders=party.served["keys"].beside[U]))


def invented_clients() -> Learned:
    """All clients but the victim are the server's own; the operator lists ten others."""
    listed = Directory({n: identity(n).public for n in TEN}, closed=True)
    party = Party(numbers=(VICTIM, *range(101, 110)), policy=STRICT, directory=listed)
    return rest(party, party.outcome())


def one_identity_for_all() -> Learned:
    """One colluding client, registered once, is shown as nine."""
    party = Party(numbers=TEN, policy=STRICT, identities=lambda n: identity(min(n, 11)))
    return rest(party, party.outcome())


def exchanged_keys() -> Learned:
    """The roster has the known identities, with keys that the server made."""

    def forged(n: int) -> Identity:
        return identity(n) if n == VICTIM else Identity(identity(n + 100).seed, identity(n).public)

    party = Party(numbers=TEN, policy=STRICT, identities=forged).until("confirm")
    return strip(party, *_all_of(party, colluders=range(1, 10)))


def split_survivor_lists() -> Learned:
    """Nine clients, four neighbours each, nobody colludes: every device is shown its own list.

    By place in the ring, the victim at 0: whom each list calls dropped. Every list has its reader
    and three of its five holders alive, so it looks well; together they open the victim's self
    mask, and the mask keys of all its neighbours.
    """
    dropped = {0: (1, -1), 1: (2, -1), -1: (-2, 1), 2: (), -2: (), 3: (1, 2), -3: (-1, -2),
               4: (2,), -4: (-2,)}  # fmt: skip
    party = Party(numbers=TEN[:9], policy=STRICT, graph=Graph(4, 3)).until("confirm")
    order, place = _ring(party.served["keys"].digest, 9)

    def at(step: int) -> int:
        return int(order[(place[U] + step) % 9])

    everybody = frozenset(range(9))
    lists = {}
    for reader, steps in dropped.items():
        gone = frozenset(map(at, steps))
        lists[TEN[at(reader)]] = Survivors(everybody - gone, gone)
    replies = ask(party, lists, TEN[:9])
    seed = combine(opened(replies, party, U, Opened.SELF), 3)
    pairs = {}
    for beside in party.served["keys"].beside[U]:
        key = combine(opened(replies, party, beside, Opened.KEY), 3)
        pairs[beside] = pair_seeds(party, key, beside, [U])[U]
    return strip(party, seed, pairs)


def few_survivors() -> Learned:
    """Only the victim and six colluding clients are called alive, below the announced eight."""
    party = Party(numbers=TEN, policy=STRICT, terms=terms(survivors=8)).until("confirm")
    alive = frozenset(range(7))
    one = Survivors(alive, frozenset(range(10)) - alive)
    given = ask(party, dict.fromkeys(TEN, one), TEN[:7])
    seed = combine(opened(given, party, U, Opened.SELF), 7)
    pairs = {at: party.states["shares"][TEN[at]].pairs[U] for at in range(1, 7)}
    for at in range(7, 10):
        key = combine(opened(given, party, at, Opened.KEY), 7)
        pairs[at] = pair_seeds(party, key, at, [U])[U]
    return strip(party, seed, pairs)


def second_unmask() -> Learned:
    """Say that the victim dropped, get its mask key; then that it lives, get its self mask."""
    party = Party(numbers=TEN, policy=STRICT).until("confirm")
    everybody = frozenset(range(10))
    without = Survivors(everybody - {U}, frozenset({U}))
    first = ask(party, dict.fromkeys(TEN, without), TEN[1:])
    # a device keeps the state the last call returned
    for n in TEN[1:]:
        party.states["mask"][n] = client.Finished(party.states["mask"][n].party)
    second = ask(party, dict.fromkeys(TEN, Survivors(everybody, frozenset())), TEN[1:])
    seed = combine(opened(second, party, U, Opened.SELF), 7)
    key = combine(opened(first, party, U, Opened.KEY), 7)
    return strip(party, seed, pair_seeds(party, key, U, range(10)))


def replayed_round() -> Learned:
    """The same round again without the victim: devices send the same numbers, the sums differ."""
    with_all = Party(numbers=TEN, policy=STRICT).outcome()
    without = Party(numbers=TEN[1:], policy=STRICT, last_round=7).outcome()
    difference: Learned = (with_all.total - without.total) & np.uint32((1 << 20) - 1)
    return difference


# The checks they are up against


def nothing(*_: Any) -> None:
    """In place of a check."""


def no_check(owner: Any, *names: str) -> Callable[[Patch], None]:
    def remove(patch: Patch) -> None:
        for name in names:
            patch.setattr(owner, name, nothing)

    return remove


def open_directory(patch: Patch) -> None:
    patch.setattr(Directory, "admit", lambda self, _: self)


def no_identity_check(patch: Patch) -> None:
    open_directory(patch)
    patch.setattr(client, "_refuse_repeated_keys", nothing)


def agreeing_with_half(patch: Patch) -> None:
    patch.setattr(MaskingPolicy, "_refuse_threshold", nothing)
    patch.setattr(client, "_refuse_unconfirmed", nothing)


def states_kept(patch: Patch) -> None:
    """A device that can be set back to any phase."""
    kept: dict[tuple[int, type], Any] = {}

    def in_phase(state: Any, expected: type, asked: str) -> Any:
        del asked
        kept[state.party.client, type(state)] = state
        return kept[state.party.client, expected]

    patch.setattr(client, "_in_phase", in_phase)


SCRIPTS: list[tuple[Callable[[], Learned], str, Callable[[Patch], None]]] = [
    (small_cohort, "the server: the roster has 2 participants, this device asks for at least 5",
     no_check(MaskingPolicy, "_refuse_small")),
    (threshold_of_one, "the server: the roster has threshold 1 for 10 holders",
     no_check(MaskingPolicy, "_refuse_threshold", "_refuse_sparse")),
    (threshold_of_half, "the server: the roster has threshold 5 for 10 holders",
     agreeing_with_half),
    (sparse_graph, "the server: the roster gives each of 10 participants 2 neighbours",
     no_check(MaskingPolicy, "_refuse_degree")),
    (invented_clients, "the server: client 101 is not in this device's directory", open_directory),
    (one_identity_for_all, "the server: clients 11 and 12 have the same identity",
     no_identity_check),
    (exchanged_keys, "client 11: the signature of its keys is not that of its identity",
     no_check(client, "_refuse_unsigned")),
    (split_survivor_lists, "the server: . of the 9 on the roster confirmed the survivor list",
     no_check(client, "_refuse_unconfirmed")),
    (few_survivors, "the server: 7 survivors, fewer than the smallest, 8",
     no_check(client, "_refuse_few_survivors")),
    (second_unmask, "when it was finished, not masked; each phase happens once a round",
     states_kept),
    (replayed_round, "the server: this device has taken part in round 7 already",
     no_check(client, "_refuse_old_round")),
]  # fmt: skip

IDS = [script.__name__ for script, _, _ in SCRIPTS]


@pytest.fixture
def small_graphs(monkeypatch: Patch, request: pytest.FixtureRequest) -> None:
    """A few clients stand for a sparse graph, where that is not the point of the script."""
    if "split_survivor_lists" in request.node.name:
        monkeypatch.setattr(MaskingPolicy, "_refuse_degree", nothing)
        monkeypatch.setattr(client, "_refuse_gap", nothing)


@pytest.mark.usefixtures("small_graphs")
@pytest.mark.parametrize(("script", "reason", "remove"), SCRIPTS, ids=IDS)
def test_a_hostile_server_is_refused_with_the_reason(script, reason, remove):
    del remove
    with pytest.raises(ProtocolError, match=f"^round 7: .*{reason}"):
        script()


@pytest.mark.usefixtures("small_graphs")
@pytest.mark.parametrize(("script", "reason", "remove"), SCRIPTS, ids=IDS)
def test_without_the_check_the_same_server_reads_the_vector(script, reason, remove, monkeypatch):
    del reason
    remove(monkeypatch)
    assert np.array_equal(script(), vector(VICTIM, terms()))


def test_without_any_lie_the_masked_vector_and_the_sum_do_not_show_it():
    party = Party(numbers=TEN, policy=STRICT)
    outcome = party.outcome()
    assert not np.array_equal(outcome.total, vector(VICTIM, terms()))
    packed = messages.decode_vector(party.sent["mask"][VICTIM], party.terms, VICTIM).packed
    assert not np.array_equal(unpack(packed, 4, 20), vector(VICTIM, terms()))


def test_a_masked_vector_is_uniform_whatever_it_hides():
    its = terms(dimension=20_000, bits=8)
    for fill in (0, 255):
        party = Party(terms=its).until("mask")
        state = party.states["receive"][VICTIM]
        _, sent = client.mask(state, np.full(its.dimension, fill, dtype=np.uint32))
        packed = messages.decode_vector(sent, its, VICTIM).packed
        seen = np.bincount(np.frombuffer(packed, np.uint8), minlength=256)
        expected = its.dimension / 256
        assert abs(float(((seen - expected) ** 2 / expected).sum()) - 255) < 6 * np.sqrt(2 * 255)


def test_secrets_do_not_show_in_any_state():
    party = Party().until("unmask")
    states = [state for phase in party.states.values() for state in phase.values()]
    secrets = [
        party.states["keys"][VICTIM].seed.value,
        party.states["keys"][VICTIM].mask_key.private.value,
    ]
    for text in map(repr, states):
        assert "Secret(b" not in text
        assert not any(repr(secret)[2:-1] in text for secret in secrets)
    # what is not needed any more is not kept
    for phase in ("mask", "confirm"):
        assert not {"seed", "pairs", "mask_key"} & set(vars(party.states[phase][VICTIM]))
