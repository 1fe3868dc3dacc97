"""A lying server with exactly the colluders that the report allows, at 10 to 1,000 participants.

Each attack works against the rule of before, which is kept here as a few lines, and not against the
one of today. `hostile.found` says what a server can compute from all that it was given.
"""

import contextlib
import dataclasses
import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from privet.client.privacy import masked_upload as client
from privet.common.errors import ProtocolError
from privet.common.privacy.plan_maker import make_plan
from privet.common.privacy.round_plan import Plan
from privet.common.secure_aggregation import messages
from privet.common.secure_aggregation.keys import RoundKey
from privet.common.secure_aggregation.messages import Confirmations, Opened, Survivors
from privet.common.secure_aggregation.terms import (
    Graph,
    MaskingPolicy,
    _ring,
    default_graph,
    gap,
    quorum,
)
from privet.common.settings.config import Config, parse
from privet.server import unmasking as server

from ..masking_party import Party, identity, stream, terms
from .hostile import Seen, found, ideal_twin, idealise, masked, schedule, twin, without

Patch = pytest.MonkeyPatch

OLD_GRAPHS = {
    10: Graph(9, 7), 64: Graph(18, 13), 104: Graph(30, 21), 256: Graph(70, 48),
    1000: Graph(124, 84),
}  # fmt: skip
"""What `default_degree` and `default_threshold` gave for these cohorts."""


TEETH = [
    (("names of a pair",), 16, False),
    (("threshold", "bits of secrecy"), 11, False),
    (("directory",), 2, True),
    (("survivors",), 43, False),
    (("once a round",), 9, True),
]
"""Checks, and a schedule that their absence makes into an attack."""


def tenth(n: int) -> int:
    """The colluders that plan, noise and report count."""
    return math.ceil(0.1 * n)


@contextlib.contextmanager
def old_rule() -> Iterator[None]:
    """A threshold of a device's own holders sign its list; graphs are bounded by a tenth of them.

    The graphs used here all passed the old bound: 2 x threshold - holders above int(0.1 x n) on
    the average ring, never on each.
    """

    def unconfirmed(party: Any, cohort: Any, survivors: Any, signatures: Any) -> None:
        holders = {*cohort.neighbours, cohort.position}
        signed = survivors.signed(party.terms, cohort.digest, cohort.participants)
        confirmed = {at for at in signatures if at in holders} | {cohort.position}
        for at in confirmed - {cohort.position}:
            # the client's own name for it, which stand-ins for curves replace
            fits = client.verify  # type: ignore[attr-defined]
            assert fits(cohort.identities[at], signed, signatures[at])
        if len(confirmed) < cohort.graph.threshold:
            raise party.refuse("too few of its holders confirmed the survivor list")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("degree", "threshold", "sparse"):
            patch.setattr(MaskingPolicy, f"_refuse_{name}", lambda *_: None)
        for name in ("gap", "otherwise_masked"):
            patch.setattr(client, f"_refuse_{name}", lambda *_: None)
        patch.setattr(client, "_refuse_unconfirmed", unconfirmed)
        yield


@pytest.fixture(autouse=True)
def _the_server_checks_nothing(monkeypatch: Patch) -> None:
    for name in ("few", "few_holders", "few_signers", "gap"):
        monkeypatch.setattr(server, f"_refuse_{name}", lambda *_: None)


def cohort(n: int, m: int, survivors: int, graph: Graph | None = None, **more: Any) -> Party:
    its = terms(survivors=survivors, colluders=m, dimension=1)
    policy = MaskingPolicy(min_cohort=3, min_survivors=survivors, colluders=m)
    return Party(terms=its, numbers=tuple(range(1, n + 1)), policy=policy, graph=graph, **more)


def begun(party: Party, bad: Collection[int]) -> Seen:
    """After the vectors: what colluders (positions) hold, and the honest devices' vectors."""
    seen, its = Seen(), party.served["keys"]
    seen.rosters[its.digest] = its.roster
    for at in bad:
        state = party.states["receive"][its.client(at)]
        key = party.states["keys"][its.client(at)].mask_key
        if RoundKey.of(key.private.value).public == key.public:
            seen.keys[key.public] = key.private
        for owner, (one, two) in state.held.items():
            if owner not in bad:
                seen.give(its.digest, owner, at, Opened.SELF, one)
                seen.give(its.digest, owner, at, Opened.KEY, two)
    for n in party.sent["mask"]:
        if its.places[n] not in bad:
            seen.rows.append(masked(party.states["receive"][n], its.places[n])[2])
    return seen


def shown(
    party: Party, seen: Seen, its: Survivors, signing: Collection[int], bad: Collection[int]
) -> list[str]:
    """Show some honest devices a list, have them and the colluders sign, and ask for the shares.

    Returns:
        Why devices refused.
    """
    served, refused = party.served["keys"], list[str]()
    size, digest = len(served.roster.entries), served.digest
    dealt = {
        served.places[n]: messages.decode_vector(sent, party.terms, n).signature
        for n, sent in party.sent["mask"].items()
    }
    states, signatures = {}, {}
    for at in sorted({*signing} | (set(bad) & its.alive)):
        n = served.client(at)
        given = [dealt[one] for one in served.beside[at] if one in its.alive]
        message = messages.encode_survivors(party.terms, its, size, given)
        try:
            states[at], sent = client.confirm(party.states["mask"][n], message)
        except ProtocolError as refusal:
            refused.append(str(refusal))
            continue
        signatures[at] = messages.decode_confirmation(sent, party.terms, n)
    message = messages.encode_confirmations(party.terms, Confirmations(signatures))
    for at in sorted(states.keys() - set(bad)):
        try:
            _, sent = client.unmask(states[at], message)
        except ProtocolError as refusal:
            refused.append(str(refusal))
            continue
        opened = messages.decode_opening(sent, party.terms, served.client(at))
        for owner, (which, share) in opened.shares.items():
            if owner not in bad:
                seen.give(digest, owner, at, which, share)
    return refused


def smallest(seen: Seen) -> int | None:
    """Of how many devices the smallest sum that is known is; None: none is known."""
    return min((len(one) for one in found(seen.rows, seen.seeds())), default=None)


# --- S1: two survivor lists ---------------------------------------------------------------------


def two_sides(
    order: Sequence[int], degree: int, threshold: int, bad: set[int]
) -> tuple[int, set[int], set[int]] | None:
    """A device whose honest holders fall into two halves of the ring, each with enough signers."""
    n, half = len(order), degree // 2
    place = {at: where for where, at in enumerate(order)}
    for u in sorted(set(order) - bad):
        left = {order[(place[u] - step) % n] for step in range(n // 2)}
        sides = (left, set(order) - left)
        near = [order[(place[u] + step) % n] for step in range(-half, half + 1)]
        if len(bad & set(near)) < 2 * threshold - len(near):
            continue
        enough = []
        for side in sides:
            opening = [
                w for w in near
                if w in side - bad
                and sum(
                    order[(place[w] + step) % n] in side | bad for step in range(-half, half + 1)
                ) >= threshold
            ]  # fmt: skip
            enough.append(len(opening) + len(bad & set(near)) >= threshold)
        if all(enough):
            return u, left - bad, sides[1] - bad
    return None


def unlucky(n: int, m: int, order: Sequence[int], found_in: Any) -> tuple[set[int], Any]:
    """Colluders for whom the attack works: as good as a ring that was tried until it suits them."""
    draw = np.random.default_rng(n)
    for _ in range(100_000):
        bad = {int(at) for at in draw.permutation(n)[:m]}
        hit = found_in(order, bad)
        if hit is not None:
            return bad, hit
    raise AssertionError("no such ring was found")


def two_lists(party: Party, bad: set[int], u: int, one: set[int], two: set[int]) -> Any:
    """To one side the device lives, to the other it dropped."""
    seen, everybody = begun(party, bad), frozenset(range(len(party.numbers)))
    refused = shown(party, seen, Survivors(everybody, frozenset()), one, bad)
    refused += shown(party, seen, Survivors(everybody - {u}, frozenset({u})), two, bad)
    return smallest(seen), refused


HEAVY = tuple(pytest.param(n, marks=pytest.mark.heavy) for n in (104, 256, 1000))
"""Ten devices had no ring: 2 x threshold - holders was 4 and one colluded, whatever the order."""


@pytest.mark.parametrize("n", [64, *HEAVY])
def test_two_survivor_lists_read_one_device_under_the_old_rule(n, monkeypatch):
    idealise(monkeypatch)
    m, graph = tenth(n), OLD_GRAPHS[n]

    def suits(order: Sequence[int], bad: set[int]) -> Any:
        return two_sides(order, graph.degree, graph.threshold, bad)

    with old_rule():
        party = cohort(n, m, math.ceil(0.75 * n), graph).until("confirm")
        order = [int(at) for at in _ring(party.served["keys"].digest, n)[0]]
        if n <= 104:
            bad, (u, one, two) = unlucky(n, m, order, suits)
        else:  # too rare to be found by trying: they stand around one device
            bad = {order[at] for at in (*range(1, m - m // 2 + 1), *range(-(m // 2), 0))}
            u, one, two = suits(order, bad)
        assert two_lists(party, bad, u, one, two)[0] == 1


@pytest.mark.parametrize("n", [10, 64, 104, *HEAVY[1:]])
def test_of_two_survivor_lists_one_is_opened_at_most(n, monkeypatch):
    idealise(monkeypatch)
    m, survivors = tenth(n), math.ceil(0.75 * n)
    party = cohort(n, m, survivors).until("confirm")
    bad, honest = set(range(m)), [*range(m, n)]
    half = len(honest) // 2
    learned, refused = two_lists(party, bad, honest[0], {*honest[:half]}, {*honest[half:]})
    assert learned is None or learned >= survivors - m
    assert len(refused) >= half
    assert all("fewer than the quorum" in one for one in refused)


@pytest.mark.parametrize("n", [10, 64, 104, 256, 1000])
def test_no_two_lists_are_signed_by_a_quorum_each(n, monkeypatch):
    """The check itself, of every size: half of the honest devices and all colluders."""
    idealise(monkeypatch)
    m, digest = tenth(n), b"r" * 32
    its = terms(survivors=m + 2, colluders=m)
    party = client.Party(1, identity(0), its, MaskingPolicy(min_survivors=m + 2, colluders=m))
    known = [identity(at) for at in range(n)]
    public = tuple(one.public for one in known)
    cohort_ = client.Cohort({}, public, digest, default_graph(n, m), m, ())
    everybody = Survivors(frozenset(range(n)), frozenset())
    signed = everybody.signed(its, digest, n)
    for honest, enough in ((-(-(n - m) // 2), False), ((n - m) // 2 + 1, True)):
        signers = range(m + honest)  # the colluders stand first
        signatures = {at: known[at].sign(signed) for at in signers}
        refuses = pytest.raises(ProtocolError, match="fewer than the quorum")
        if 2 * honest > n - m and not enough:
            continue  # an odd number has no halves
        with contextlib.nullcontext() if enough else refuses:
            client._refuse_unconfirmed(party, cohort_, everybody, signatures)


# --- S2: a cohort of ten ------------------------------------------------------------------------

SIZES = [10, 64, 104, 256, 1000]


def agreed(n: int, **secure_aggregation: Any) -> Config:
    """Settings of a run with a cohort of n and, unless it says otherwise, a tenth colluding."""
    return parse(
        {
            "data": {"clients": max(n, 10)},
            "rounds": {"cohort": n},
            "secure_aggregation": {"min_cohort": min(n, 10), **secure_aggregation},
            "privacy": {"client": {"noise_at": "distributed"}, "example": {"enabled": False}},
        }
    )


def planned(config: Config) -> Plan:
    return make_plan(config, "run", 1, "0" * 64, np.zeros(8, np.float32))


@pytest.mark.parametrize("n", SIZES)
def test_a_whole_plan_for_fewer_than_agreed_is_refused_by_name_at_every_size(n):
    planned(agreed(n)).refuse_if_laxer(agreed(n))
    for fewer in {n - 1, max(n // 2, 4), 10, 4} - {n}:
        if fewer > n:
            continue
        named = rf"cohort \(own limit {n}\)"
        with pytest.raises(ProtocolError, match=named):
            planned(agreed(fewer, colluding=1)).refuse_if_laxer(agreed(n))
        terms_ = planned(agreed(fewer, colluding=1)).terms(8)
        if n > 10:
            with pytest.raises(ProtocolError, match=r"survivors|colluders"):
                MaskingPolicy.agreed(agreed(n), fewer).refuse_terms(terms_)


@pytest.mark.parametrize("n", SIZES[1:])  # of ten devices one colludes, who opens nothing alone
def test_ten_of_a_larger_fleet_were_read_by_its_colluders_under_the_old_rule(n, monkeypatch):
    """The colluders of the agreed cohort, as many as still leave three honest devices of ten."""
    idealise(monkeypatch)
    bad = set(range(min(tenth(n), 7)))
    old, few = MaskingPolicy.agreed(agreed(10), 10), planned(agreed(10))
    party = Party(few.terms(8), tuple(range(1, 11)), old, last_round=0)
    assert smallest(begun(party.until("confirm"), bad)) == 1
    new = MaskingPolicy.agreed(agreed(n), 10)
    with pytest.raises(ProtocolError, match="the terms have survivors = 6"):
        Party(few.terms(8), tuple(range(1, 11)), new, last_round=0).until("shares")


# --- S3: a ring that is cut ---------------------------------------------------------------------


def two_windows(
    order: Sequence[int], degree: int, threshold: int, bad: set[int]
) -> frozenset[int] | None:
    """The honest devices of two windows without whom the honest rest is in two parts."""
    n, half = len(order), degree // 2
    marked = np.array([at in bad for at in order])
    around = np.concatenate([marked, marked[:half]]).astype(int)
    inside = np.convolve(around, np.ones(half, int), "valid")[:n]
    least = threshold - (half + 1)
    starts = np.flatnonzero(inside >= least)
    for a in starts:
        for b in starts[starts >= a + half]:
            if b + half > n + a:
                continue
            gone = {*range(a, a + half), *(int(x) % n for x in range(b, b + half))}
            alive = np.array([at not in gone or bool(marked[at]) for at in range(n)])
            wide = np.concatenate([alive[-half:], alive, alive[:half]]).astype(int)
            holders = np.convolve(wide, np.ones(degree + 1, int), "valid")
            between = [at for at in range(a + half, b) if not marked[at]]
            beyond = [at % n for at in range(b + half, n + a) if not marked[at % n]]
            if (holders[alive & ~marked] >= threshold).all() and between and beyond:
                return frozenset(order[at] for at in gone if not marked[at])
    return None


def cut(n: int, order: Sequence[int]) -> tuple[set[int], frozenset[int]]:
    """Colluders and the dropped honest devices that cut the old ring in this order.

    From 256 on too rare to be found by trying: the colluders stand in two windows.
    """
    m, graph = tenth(n), OLD_GRAPHS[n]
    if n <= 104:
        return unlucky(
            n, m, order, lambda order, bad: two_windows(order, graph.degree, graph.threshold, bad)
        )
    least = graph.threshold - (graph.degree // 2 + 1)
    bad = {*order[:least], *order[n // 2 : n // 2 + least], *order[-(m - 2 * least) :]}
    dropped = two_windows(order, graph.degree, graph.threshold, bad)
    assert dropped is not None
    return bad, dropped


@pytest.mark.parametrize("n", [64, *HEAVY])
def test_one_list_that_cuts_the_ring_takes_the_sum_apart_under_the_old_rule(n, monkeypatch):
    idealise(monkeypatch)
    m, graph, survivors = tenth(n), OLD_GRAPHS[n], math.ceil(0.75 * n)
    with old_rule():
        party = cohort(n, m, survivors, graph).until("confirm")
        order = [int(at) for at in _ring(party.served["keys"].digest, n)[0]]
        bad, dropped = cut(n, order)
        learned, refused = one_list(party, bad, dropped)
    assert not refused
    assert learned is not None
    assert learned < survivors - m


def one_list(party: Party, bad: set[int], dropped: frozenset[int]) -> Any:
    seen, everybody = begun(party, bad), frozenset(range(len(party.numbers)))
    alive = everybody - dropped
    refused = shown(party, seen, Survivors(alive, dropped), alive - bad, bad)
    return smallest(seen), refused


@pytest.mark.parametrize("n", [64, *HEAVY[:2]])
def test_where_everybody_is_a_neighbour_the_same_list_gives_one_sum(n, monkeypatch):
    idealise(monkeypatch)
    m, survivors = tenth(n), math.ceil(0.75 * n)
    party = cohort(n, m, survivors).until("confirm")
    order = [int(at) for at in _ring(party.served["keys"].digest, n)[0]]
    bad, dropped = cut(n, order)
    learned, refused = one_list(party, bad, dropped)
    assert not refused
    assert learned == n - m - len(dropped) >= survivors - m


@pytest.mark.parametrize("n", [256, 1000])
def test_a_ring_cut_at_colluders_is_refused_or_no_ring(n):
    """Too rare to be found by trying, so the colluders are placed by hand."""
    m, old, digest = tenth(n), OLD_GRAPHS[n], b"r" * 32
    order = [int(at) for at in _ring(digest, n)[0]]
    half, least = old.degree // 2, old.threshold - (old.degree // 2 + 1)
    assert 2 * least <= m
    bad = {*order[:least], *order[n // 2 : n // 2 + least], *order[-(m - 2 * least) :]}
    dropped = two_windows(order, old.degree, old.threshold, bad)
    assert dropped is not None  # the old rule had no word against it
    alive = frozenset(range(n)) - dropped
    graph = default_graph(n, m)
    if n == 256:
        assert graph.degree == n - 1
        return
    # the same on the ring of today: windows are longer, and colluders may be all that is left
    half = graph.degree // 2
    for start in (0, n // 2):
        alive -= {at for at in order[start : start + half] if at not in bad}
    assert gap(digest, n, m, graph.degree, alive) is not None
    assert gap(digest, n, m, graph.degree, frozenset(range(n))) is None


# --- one key in two encodings -------------------------------------------------------------------


@dataclasses.dataclass
class Twins(Party):
    """The first colluders announce the last survivors' mask keys, plus a point of low order."""

    bad: int = 1
    alive: int = 5
    another: Any = ideal_twin

    def _keys(self) -> None:
        super()._keys()
        states, sent = self.states["keys"], self.sent["keys"]
        for at in range(self.bad):
            n, victim = self.numbers[at], self.numbers[self.alive - 1 - at]
            old = states[n]
            public = self.another(states[victim].mask_key.public)
            key = RoundKey(old.mask_key.private, public)
            states[n] = dataclasses.replace(old, mask_key=key)
            entry = messages.Entry(n, old.party.identity.public, public, old.sealing_key.public)
            signature = old.party.identity.sign(messages.announced(self.terms, entry))
            sent[n] = messages.encode_announcement(
                self.terms,
                n,
                messages.Announcement(entry.identity, public, entry.sealing_key, signature),
            )
        self.served["keys"], self.got["shares"], refused = server.gather(
            self.terms, sent, None, self._sized
        )
        assert not refused


def with_twins(n: int, m: int, another: Any = ideal_twin) -> tuple[int | None, int]:
    survivors = quorum(n, m)
    party = cohort(n, m, survivors)
    party = Twins(
        party.terms, party.numbers, party.policy, silent=party.numbers[survivors:],
        bad=m, alive=survivors, another=another,
    ).until("confirm")  # fmt: skip
    bad = set(range(m))
    seen, alive = begun(party, bad), frozenset(range(survivors))
    dropped = frozenset(range(survivors, n))
    assert not shown(party, seen, Survivors(alive, dropped), alive - bad, bad)
    return smallest(seen), survivors - m


@pytest.mark.parametrize(("n", "m", "left"), [(10, 1, 4), (12, 4, 1), (64, 7, 22), (104, 11, 36)])
def test_twins_of_honest_keys_took_masks_away_while_pairs_had_no_names(n, m, left, monkeypatch):
    idealise(monkeypatch)
    with without("names of a pair", ideal=False):
        assert with_twins(n, m) == (left, left + m)


@pytest.mark.parametrize(("n", "m"), [(10, 1), (12, 4), (64, 7), (104, 11)])
def test_twins_of_honest_keys_hide_the_sum_from_who_announces_them(n, m, monkeypatch):
    """Nobody knows what such a key agrees on with the others: their masks stay on the sum."""
    idealise(monkeypatch)
    assert with_twins(n, m)[0] is None


def test_the_same_with_real_keys():
    with without("names of a pair", ideal=False):
        assert with_twins(12, 4, twin) == (1, 5)
    assert with_twins(12, 4, twin) == (None, 5)


def test_a_key_and_its_twin_agree_with_everybody_on_the_same():
    one, other = (RoundKey.create(stream(label)) for label in ("one", "other"))
    assert twin(one.public) != one.public
    assert other.agree(twin(one.public)) == other.agree(one.public)


# --- all of it at random ------------------------------------------------------------------------


@pytest.mark.parametrize("sparse", [False, True])
def test_no_schedule_of_lies_gives_more_than_the_promised_sums(sparse):
    played = [schedule(seed, sparse=sparse) for seed in range(40)]
    assert [one.wrong for one in played if one.wrong] == []
    assert sum(one.vectors > 0 for one in played) >= 10
    assert sum(one.sums > 0 for one in played) >= 2


@pytest.mark.heavy
@pytest.mark.parametrize("start", range(0, 10_000, 1000))
def test_no_schedule_of_ten_thousand_does(start):
    seeds = range(start, start + 1000)
    wrong = {seed: schedule(seed, sparse=seed % 2 == 1).wrong for seed in seeds}
    assert {seed: one for seed, one in wrong.items() if one} == {}


@pytest.mark.parametrize(("check", "seed", "sparse"), TEETH)
def test_without_a_check_a_schedule_is_found_that_gives_more(check, seed, sparse):
    assert schedule(seed, *check, sparse=sparse).wrong
    assert schedule(seed, sparse=sparse).wrong is None
