"""A server that lies at random, with the allowed colluders, and the sums that it then knows.

`schedule` plays some attempts of one round against the real functions of
`client/privacy/masked_upload.py`. The server shows devices rosters, inboxes and survivor lists of
its own making, and passes on every signature and share; colluders check nothing, sign everything
and hide nothing. `found` then takes all masks whose seeds it can derive off the masked vectors, and
looks for every combination of what is left in which no mask is left over, modulo 2 and modulo a
large prime.
"""

import contextlib
import hashlib
import itertools
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from privet.client.privacy import masked_upload as client
from privet.common.errors import ProtocolError
from privet.common.secure_aggregation import messages
from privet.common.secure_aggregation import terms as secure_aggregation
from privet.common.secure_aggregation.keys import (
    Directory,
    Identity,
    Purpose,
    RoundKey,
    Secret,
    derive,
)
from privet.common.secure_aggregation.messages import (
    Confirmations,
    Entry,
    Inbox,
    Opened,
    Package,
    Roster,
    Survivors,
)
from privet.common.secure_aggregation.shamir import combine
from privet.common.secure_aggregation.terms import Graph, MaskingPolicy, Terms, quorum
from privet.server import unmasking as server

__all__ = [
    "CHECKS",
    "Fleet",
    "Row",
    "Seen",
    "found",
    "ideal_twin",
    "masked",
    "schedule",
    "twin",
    "unpromised",
    "without",
]

_PRIME = 2**31 - 1
LIES = (
    "rosters", "shrunk", "twin keys", "copied keys", "two numbers", "never announced", "invented",
    "threshold", "degree", "dealt lists", "two worlds", "withheld", "silent", "survivor lists",
    "named alive", "asked again", "overlap", "attempts",
)  # fmt: skip
"""What a server may do; a schedule takes some of them."""

_TEMPTS = {
    "names of a pair": frozenset({"twin keys"}),
    "repeated keys": frozenset({"copied keys", "two numbers"}),
    "directory": frozenset({"invented"}),
    "threshold": frozenset({"threshold"}),
    "phases": frozenset({"asked again", "survivor lists"}),
    "quorum": frozenset({"survivor lists"}),
    "signatures of who dealt": frozenset({"two worlds"}),
    "own inbox": frozenset({"withheld"}),
    "once a round": frozenset({"attempts"}),
    "alive and dropped": frozenset({"overlap"}),
    "degree": frozenset({"degree"}),
    "signatures of keys": frozenset({"never announced", "shrunk"}),
}
"""Lies that a server does not leave out where a check is missing."""

_INVENTED = 100
"""Client numbers from here on belong to nobody."""


# What the server knows


@dataclass(frozen=True)
class Row:
    """A masked vector of an honest device: its own numbers, and masks by their seeds."""

    device: int
    added: tuple[bytes, ...]
    removed: tuple[bytes, ...]


@dataclass
class Seen:
    """Everything that came to the server and to its colluders."""

    rows: list[Row] = field(default_factory=list)
    rosters: dict[bytes, Roster] = field(default_factory=dict)
    shares: dict[tuple[bytes, int, Opened], dict[int, Secret]] = field(default_factory=dict)
    """By roster, owner's position and secret: shares by point."""
    keys: dict[bytes, Secret] = field(default_factory=dict)
    """Private mask keys of colluders, by the public one."""
    hidden: dict[bytes, str] = field(default_factory=dict)

    def give(self, digest: bytes, owner: int, holder: int, which: Opened, share: Secret) -> None:
        self.shares.setdefault((digest, owner, which), {})[holder + 1] = share

    def seeds(self) -> set[bytes]:
        """Of every mask that can be computed from shares and colluders' keys."""
        found: set[bytes] = set()
        for (digest, owner, which), shares in self.shares.items():
            threshold = self.rosters[digest].graph.threshold
            if len(shares) < threshold:
                continue
            secret = combine(shares, threshold)
            if which is Opened.SELF:
                found.add(derive(secret, Purpose.SELF_MASK, digest).value)
            else:
                found |= self._pairs(digest, owner, secret)
        for digest, roster in self.rosters.items():
            for at, entry in enumerate(roster.entries):
                if entry.mask_key in self.keys:
                    found |= self._pairs(digest, at, self.keys[entry.mask_key])
        return found

    def _pairs(self, digest: bytes, owner: int, private: Secret) -> set[bytes]:
        agree = RoundKey.of(private.value).agreement()
        return {
            client.pair_seed(  # type: ignore[attr-defined]  # where `without` replaces it
                agree(entry.mask_key), digest, owner, other
            ).value
            for other, entry in enumerate(self.rosters[digest].entries)
            if other != owner
        }


def masked(state: Any, device: int) -> tuple[Any, bytes, Row]:
    """A device's `mask`, and the seeds of the masks that it added and took away."""
    seeds: list[tuple[bytes, ...]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            client,
            "add_masks",
            lambda _, *given: seeds.extend(tuple(one.value for one in some) for some in given),
        )
        after, sent = client.mask(state, np.zeros(state.party.terms.dimension, np.uint32))
    return after, sent, Row(device, seeds[0], seeds[1])


def found(rows: Sequence[Row], known: Collection[bytes]) -> list[dict[int, int]]:
    """The sums of devices' numbers in which no unknown mask is left: factors by device.

    In reduced form, so that disjoint plain sums, where there are only such, are themselves listed;
    modulo 2 and modulo a large prime, one after the other.
    """
    return [one for modulus in (2, _PRIME) for one in _sums(rows, set(known), modulus)]


def _sums(rows: Sequence[Row], known: set[bytes], modulus: int) -> list[dict[int, int]]:
    seeds = sorted({s for r in rows for s in (*r.added, *r.removed)} - known)
    column = {seed: at for at, seed in enumerate(seeds)}
    devices = sorted({row.device for row in rows})
    wide = len(seeds) + len(devices)
    table = np.zeros((len(rows), wide), np.int64)
    for at, row in enumerate(rows):
        for sign, its in ((1, row.added), (-1, row.removed)):
            for seed in its:
                if seed in column:
                    table[at, column[seed]] += sign
        table[at, len(seeds) + devices.index(row.device)] = 1
    table = _reduced(table % modulus, modulus)
    left = [row[len(seeds) :] for row in table if not row[: len(seeds)].any()]
    return [{devices[at]: int(row[at]) for at in np.flatnonzero(row)} for row in left if row.any()]


def _reduced(table: np.ndarray, modulus: int) -> np.ndarray:
    """Reduced row echelon form."""
    done = 0
    for column in range(table.shape[1]):
        pivots = np.flatnonzero(table[done:, column])
        if not pivots.size:
            continue
        pivot = done + int(pivots[0])
        table[[done, pivot]] = table[[pivot, done]]
        table[done] = table[done] * pow(int(table[done, column]), -1, modulus) % modulus
        for other in np.flatnonzero(table[:, column]):
            if other != done:
                table[other] = (table[other] - table[other, column] * table[done]) % modulus
        done += 1
        if done == table.shape[0]:
            break
    return table


def unpromised(sums: Sequence[Mapping[int, int]], least: int) -> str | None:
    """What is wrong with these sums: they may only be plain ones over enough honest devices."""
    for one in sums:
        if set(one.values()) != {1}:
            return f"a weighted sum is known: {one}"
        if len(one) < least:
            return f"a sum over {sorted(one)} is known, expected {least} honest devices or more"
    return None


# Checks that can be taken away


def _nothing(*_: Any, **__: Any) -> None:
    return None


CHECKS: Mapping[str, tuple[Any, str, Any]] = {
    "names of a pair": (
        client,
        "pair_seed",
        lambda shared, digest, *_: derive(shared, Purpose.PAIR_MASK, digest),
    ),
    "repeated keys": (client, "_refuse_repeated_keys", _nothing),
    "directory": (Directory, "admit", lambda self, _: self),
    "signatures of keys": (client, "_refuse_unsigned", _nothing),
    "degree": (MaskingPolicy, "_refuse_degree", _nothing),
    "threshold": (MaskingPolicy, "_refuse_threshold", _nothing),
    "bits of secrecy": (MaskingPolicy, "_refuse_sparse", _nothing),
    "small roster": (MaskingPolicy, "_refuse_small", _nothing),
    "large roster": (MaskingPolicy, "_refuse_large", _nothing),
    "own inbox": (client, "_refuse_other_packages", _nothing),
    "holders that dealt": (client, "_refuse_few_holders", _nothing),
    "alive and dropped": (client, "_refuse_overlap", _nothing),
    "own absence": (client, "_refuse_own_absence", _nothing),
    "survivors": (client, "_refuse_few_survivors", _nothing),
    "who dealt": (client, "_refuse_other_dealers", _nothing),
    "signatures of who dealt": (client, "_refuse_otherwise_masked", _nothing),
    "living holders": (client, "_refuse_few_alive_holders", _nothing),
    "gap": (client, "_refuse_gap", _nothing),
    "quorum": (client, "_refuse_unconfirmed", _nothing),
    "once an attempt": (client, "_refuse_old_round", _nothing),
    "phases": (client, "_in_phase", lambda state, *_: state),
    "once a round": (None, "", None),
}
"""By the name of a check: where it is, and what stands there without it."""


@contextlib.contextmanager
def without(*checks: str, sparse: bool = False, ideal: bool = True) -> Iterator[None]:
    """The client without some checks; `sparse`: tiny rosters may have a ring; `ideal`: below."""
    with pytest.MonkeyPatch.context() as patch:
        for name in checks:
            owner, attribute, instead = CHECKS[name]
            if owner is not None:
                patch.setattr(owner, attribute, instead)
        if sparse:
            patch.setattr(secure_aggregation, "COMPLETE", 4)
            patch.setattr(secure_aggregation, "_MIN_NEIGHBOURS", 6)
            patch.setattr(secure_aggregation, "SECRECY", 1.0)
            patch.setattr(secure_aggregation, "MAX_PARTICIPANTS", 1 << 14)
        if ideal:
            idealise(patch)
        secure_aggregation.window_colluders.cache_clear()
        secure_aggregation.default_graph.cache_clear()
        yield
    secure_aggregation.window_colluders.cache_clear()
    secure_aggregation.default_graph.cache_clear()


# Ideal signatures and exchanges: a hash for each curve operation, a hundred times as fast. Nothing
# here forges a signature or finds a key, so what a server does with them is the same.


def _hash(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()


def _plain(public: bytes) -> bytes:
    return bytes([public[0] & 0xFE]) + public[1:]


def ideal_twin(public: bytes) -> bytes:
    """`twin` among the ideal keys: the last bit says nothing."""
    return bytes([public[0] ^ 1]) + public[1:]


def idealise(patch: pytest.MonkeyPatch) -> None:
    signed: set[tuple[bytes, bytes, bytes]] = set()

    def sign(self: Identity, message: bytes) -> bytes:
        found = _hash(b"signature", self.seed.value, message) * 2
        signed.add((self.public, message, found))
        return found

    def agreement(self: RoundKey) -> Callable[[bytes], Secret]:
        mine = _plain(_hash(b"key", self.private.value))
        return lambda theirs: Secret(_hash(*sorted((mine, _plain(theirs)))))

    patch.setattr(Identity, "of", lambda seed: Identity(Secret(seed), _hash(b"identity", seed)))
    patch.setattr(Identity, "sign", sign)
    patch.setattr(RoundKey, "of", lambda key: RoundKey(Secret(key), _plain(_hash(b"key", key))))
    patch.setattr(RoundKey, "agreement", agreement)
    for half in (client, server):
        patch.setattr(half, "verify", lambda *what: what in signed)


# The server


def twin(public: bytes) -> bytes:
    """Another X25519 key that agrees with everybody on what this one does: plus a 2-torsion point.

    On the curve, (u, v) + (0, 0) has the coordinate 1/u, and scalars are multiples of 8.
    """
    prime = 2**255 - 19
    return pow(int.from_bytes(public, "little"), -1, prime).to_bytes(32, "little")


@dataclass(frozen=True)
class Fleet:
    """Honest devices and colluders, and what the honest ones agreed to."""

    honest: tuple[int, ...]
    bad: tuple[int, ...]
    identities: Mapping[int, Identity]
    policy: MaskingPolicy
    directory: Directory

    @classmethod
    def drawn(cls, draw: random.Random, sparse: bool) -> "Fleet":
        size = draw.randint(9, 13) if sparse else draw.randint(5, 12)
        most = next(m for m in itertools.count(1) if quorum(size, m + 1) > min(size, size - 1))
        m = draw.randint(1, min(2, most)) if sparse else draw.randint(0, min(4, most))
        cohort = draw.randint(max(m + 3, size - 2), size)
        least = max(m + 2, quorum(cohort, m))
        survivors = draw.randint(min(least, cohort), min(cohort, least + 2))
        numbers = draw.sample(range(1, 40), size)
        identities = {n: Identity.create(draw.randbytes) for n in numbers}
        bad = tuple(sorted(numbers[:m]))
        return cls(
            tuple(sorted(numbers[m:])),
            bad,
            identities,
            MaskingPolicy(
                min_cohort=3,
                min_survivors=survivors,
                colluders=m,
                max_cohort=cohort,
            ),
            Directory({n: i.public for n, i in identities.items()}, closed=True),
        )


@dataclass
class View:
    """A roster as the server shows it to some devices, and what came of it."""

    roster: Roster
    digest: bytes
    beside: tuple[tuple[int, ...], ...]
    its: dict[int, Any]
    """Colluders' states by position."""
    devices: set[int] = field(default_factory=set)
    """Honest ones that are shown it."""
    packages: dict[int, Mapping[int, Package]] = field(default_factory=dict)
    """What was dealt, by the owner's position."""
    dealt: dict[int, frozenset[int]] = field(default_factory=dict)
    """The list that each device was shown, by its position."""
    signed: dict[int, bytes] = field(default_factory=dict)
    """The list that came with each vector."""

    @property
    def places(self) -> dict[int, int]:
        return {entry.client: at for at, entry in enumerate(self.roster.entries)}


@dataclass
class Server:
    """One lying server and one fleet, through the attempts of a round."""

    draw: random.Random
    fleet: Fleet
    lacking: frozenset[str]
    sparse: bool
    seen: Seen = field(default_factory=Seen)
    last: dict[int, int] = field(default_factory=dict)
    answered: set[int] = field(default_factory=set)
    states: dict[int, Any] = field(default_factory=dict)
    kinds: frozenset[str] = frozenset(LIES)
    steps: int = 0

    def lies(self, kind: str, chance: float = 0.5) -> bool:
        return kind in self.kinds and self.draw.random() < chance

    def some(self, numbers: Collection[int], chance: float) -> list[int]:
        return [n for n in sorted(numbers) if self.draw.random() < chance]

    def call(self, n: int, phase: Callable[..., Any], *given: Any, old: Any = None) -> Any:
        """A phase of a device, which keeps its newest state only; None where it refuses.

        Where a test says that it keeps old ones, `old` is taken.
        """
        state = self.states.get(n)
        if "phases" in self.lacking and old is not None:
            state = old
        if state is None:
            return None
        try:
            done = phase(state, *given)
        except ProtocolError:
            self.states[n] = None
            return None
        self.steps += 1
        self.states[n], sent, *_ = done if isinstance(done, tuple) else (done, b"")
        return sent

    def attempt(self, terms: Terms) -> None:
        asked = self.some(self.fleet.honest, 0.9 if self.lies("shrunk") else 1.0)
        entries: dict[int, tuple[Entry, bytes]] = {}
        for n in asked:
            try:
                state, sent = client.announce(
                    n, self.fleet.identities[n], terms, self.fleet.policy,
                    self.last.get(n, 0), self.draw.randbytes,
                )  # fmt: skip
            except ProtocolError:
                continue
            self.last[n] = terms.round
            self.states[n] = state
            one = messages.decode_announcement(sent, terms, n)
            entries[n] = (one.entry(n), one.signature)
        if not entries:
            return
        drawn = [self.view(terms, entries) for _ in range(1 + self.lies("rosters", 0.9))]
        views = [view for view in drawn if view is not None]
        for n in entries:
            mine = [view for view in views if n in view.places]
            if mine:
                self.draw.choice(mine).devices.add(n)
        first = dict(self.states)
        for view in views:
            self.shares(terms, view, entries, first, views)
        for view in views:
            self.vectors(terms, view)
        for view in views:
            self.lists(terms, view)

    def view(self, terms: Terms, entries: Mapping[int, tuple[Entry, bytes]]) -> View | None:
        """A roster: some honest devices, colluders with keys of any kind, and worse."""
        draw = self.draw
        many = draw.randint(1, 8) if self.lies("invented", 0.9) else 0
        room = max(1, self.fleet.policy.max_cohort - len(self.fleet.bad) - many)
        chosen = draw.sample(sorted(entries), min(room, len(entries)))
        chosen = self.some(chosen, 0.8) if self.lies("shrunk") else sorted(chosen)
        listed = {n: entries[n][0] for n in chosen}
        its: dict[int, Any] = {}
        mine = [*self.fleet.bad, *range(_INVENTED, _INVENTED + many)]
        for b in mine:
            identity = self.fleet.identities.get(b) or Identity.create(draw.randbytes)
            own = RoundKey.create(draw.randbytes)
            twins, copies = self.lies("twin keys", 0.9), self.lies("copied keys")
            honest = [n for n in listed if n in entries]
            if (twins or copies) and honest:
                theirs = listed[draw.choice(honest)].mask_key
                own = RoundKey(own.private, ideal_twin(theirs) if twins else theirs)
            else:
                self.seen.keys[own.public] = own.private
            its[b] = client.Announced(
                client.Party(b, identity, terms, self.fleet.policy),
                own, RoundKey.create(draw.randbytes), Secret(draw.randbytes(32)),
            )  # fmt: skip
        if mine and self.lies("two numbers"):  # one identity, two clients
            double = its[draw.choice(mine)]
            other = draw.randint(1, 60)
            if other not in self.fleet.identities:
                party = client.Party(other, double.party.identity, terms, self.fleet.policy)
                key = RoundKey.create(draw.randbytes)
                self.seen.keys[key.public] = key.private
                its[other] = client.Announced(
                    party, key, RoundKey.create(draw.randbytes), Secret(draw.randbytes(32))
                )
        for n in self.some(
            set(self.fleet.honest) - listed.keys(), 0.5 * self.lies("never announced")
        ):  # who never announced
            keys = [RoundKey.create(draw.randbytes) for _ in range(2)]
            self.seen.keys[keys[0].public] = keys[0].private
            listed[n] = Entry(n, self.fleet.identities[n].public, *(key.public for key in keys))
        for b, state in its.items():
            listed[b] = Entry(
                b, state.party.identity.public, state.mask_key.public, state.sealing_key.public
            )
        order = tuple(listed[n] for n in sorted(listed))
        roster = Roster(order, self.graph(len(order), terms.colluders), ())
        digest = roster.digest(terms)
        beside = tuple(
            tuple(secure_aggregation.neighbours(digest, len(order), roster.graph.degree, at))
            for at in range(len(order))
        )
        places = {entry.client: at for at, entry in enumerate(order)}
        self.seen.rosters[digest] = roster
        return View(roster, digest, beside, {places[b]: state for b, state in its.items()})

    def graph(self, size: int, m: int) -> Graph:
        degree = size - 1
        if self.sparse and size > 8 and self.draw.random() < 0.9:
            degree = self.draw.choice((6, 8)) if size > 9 else 6
        threshold = secure_aggregation.default_threshold(size, m, degree)
        if self.lies("threshold"):
            threshold = self.draw.randint(1, threshold)
        if self.lies("degree"):
            degree = min(self.draw.choice((2, 4, 6)), size - 1)
            threshold = min(threshold, degree + 1)
        return Graph(degree, min(threshold, degree + 1))

    def shares(
        self,
        terms: Terms,
        view: View,
        entries: Mapping[int, tuple[Entry, bytes]],
        first: Mapping[int, Any],
        views: Sequence[View],
    ) -> None:
        places, order = view.places, view.roster.entries
        signatures = []
        for at, entry in enumerate(order):
            if at in view.its:
                sign = view.its[at].party.identity.sign
                signatures.append(sign(messages.announced(terms, entry)))
            else:
                signatures.append(entries.get(entry.client, (None, bytes(64)))[1])
        for n in sorted(view.devices | ({*entries} & {*places} if self.again() else set())):
            beside = view.beside[places[n]]
            seen = Roster(order, view.roster.graph, tuple(signatures[at] for at in beside))
            sent = self.call(
                n, client.share, messages.encode_roster(terms, seen), self.fleet.directory,
                self.draw.randbytes, old=first.get(n),
            )  # fmt: skip
            if sent:
                view.packages[places[n]] = messages.decode_deal(sent, terms, n).packages
                view.devices.add(n)
                for other in views:
                    if other is not view:
                        other.devices.discard(n)
        for at, state in view.its.items():  # colluders check nothing
            cohort = client._find_self(state, view.roster)
            with contextlib.suppress(ProtocolError):
                shared, sent = client._deal(state, cohort, self.draw.randbytes)
                view.its[at] = shared
                dealt = messages.decode_deal(sent, terms, state.party.client)
                view.packages[at] = dealt.packages
        for at, state in view.its.items():
            if not isinstance(state, client.Shared):
                continue
            for owner in view.beside[at]:
                package = view.packages.get(owner, {}).get(at)
                if package is None or owner in view.its:
                    continue
                one, two = client._open_package(state, owner, package)
                self.seen.give(view.digest, owner, at, Opened.SELF, one)
                self.seen.give(view.digest, owner, at, Opened.KEY, two)

    def again(self) -> bool:
        """Whether a phase is asked again of those who had it."""
        return self.lies("asked again")

    def vectors(self, terms: Terms, view: View) -> None:
        dealt = frozenset(view.packages)
        choices = [dealt]
        if self.lies("dealt lists", 0.9):
            choices.append(frozenset(self.some(dealt, self.draw.choice((0.5, 0.9)))))
        if self.lies("two worlds", 0.9):  # two worlds that know nothing of each other
            one = frozenset(self.some(dealt - view.its.keys(), 0.5)) | (dealt & view.its.keys())
            choices += [one, (dealt - one) | (dealt & view.its.keys())]
        if self.lies("dealt lists", 0.1):
            choices.append(dealt | frozenset(range(len(view.roster.entries))))
        late = self.draw.choice((0.0, 0.1, 0.3)) if self.lies("silent", 0.9) else 0.0
        for n in sorted(view.devices):
            at = view.places[n]
            fitting = [one for one in choices if at in one]
            if not fitting:
                continue
            told = self.draw.choice(fitting)
            packages = {
                owner: view.packages[owner][at]
                for owner in view.beside[at]
                if owner in told and owner in view.packages and at in view.packages[owner]
            }
            if self.lies("withheld"):
                packages = {owner: packages[owner] for owner in self.some(packages, 0.6)}
            inbox = Inbox(packages, told)
            size = len(view.roster.entries)
            if not isinstance(self.states.get(n), client.Shared):
                continue
            self.call(n, client.receive, messages.encode_inbox(terms, inbox, size))
            if not isinstance(self.states.get(n), client.Received):
                continue
            if self.draw.random() < late:
                continue  # its vector never comes, and a dead one may be named alive
            if n in self.answered and "once a round" not in self.lacking:
                self.states[n] = None
                continue
            state, sent, row = masked(self.states[n], n)
            self.states[n] = state
            self.answered.add(n)
            self.seen.rows.append(row)
            view.dealt[at] = told
            view.signed[at] = messages.decode_vector(sent, terms, n).signature

    def lists(self, terms: Terms, view: View) -> None:
        draw = self.draw
        lists: list[Survivors] = []
        told = sorted({*view.dealt.values()}, key=sorted)
        if not told:
            return
        for _ in range(draw.choice((2, 3)) if self.lies("survivor lists", 0.9) else 1):
            every = draw.choice(told)
            room = max(0, len(every) - terms.survivors + 3 * self.lies("shrunk", 0.1))
            if "survivors" in self.lacking:
                room = len(every)
            silent = sorted(every - view.dealt.keys() - view.its.keys())
            lost = set([] if self.lies("named alive") else silent)
            candidates = sorted(every - view.its.keys() if draw.random() < 0.8 else every)
            if draw.random() < 0.6 and self.sparse:  # successive places of the ring
                candidates = self.window(view, every)
            elif draw.random() < 0.5:
                draw.shuffle(candidates)
            lost |= set(candidates[: draw.randint(0, room)])
            alive, dropped = every - lost, frozenset(lost)
            if self.lies("dealt lists", 0.2):
                dropped -= set(self.some(dropped, 0.5))
            if self.lies("overlap"):
                dropped |= frozenset(self.some(alive, 0.3))
            lists.append(Survivors(alive, dropped))
        before = dict(self.states)
        signed: dict[int, dict[int, bytes]] = {k: {} for k in range(len(lists))}
        after: dict[int, tuple[int, Any]] = {}
        for n in sorted(view.devices):
            at = view.places[n]
            if at not in view.dealt or not isinstance(self.states.get(n), client.Masked):
                continue
            fitting = [
                k for k, one in enumerate(lists)
                if at in one.alive or "own absence" in self.lacking
            ]  # fmt: skip
            if not fitting:
                continue
            draw.shuffle(fitting)
            for k in fitting if self.again() else fitting[:1]:
                self.confirm(terms, view, n, k, lists[k], before.get(n), signed)
                after[n] = (k, self.states.get(n))
                if "phases" in self.lacking:
                    self.open(terms, view, n, k, lists[k], signed)
        if "phases" in self.lacking:
            return
        for n in sorted(after):
            self.open(terms, view, n, after[n][0], lists[after[n][0]], signed)

    def window(self, view: View, every: Collection[int]) -> list[int]:
        order, _ = secure_aggregation._ring(view.digest, len(view.roster.entries))
        start = self.draw.randrange(len(order))
        around = [int(order[(start + i) % len(order)]) for i in range(len(order))]
        half = view.roster.graph.degree // 2
        opposite = around[len(order) // 2 :]
        mixed = [*around[:half], *opposite[:half], *around[half : len(order) // 2]]
        return [at for at in mixed if at in every and at not in view.its]

    def confirm(
        self,
        terms: Terms,
        view: View,
        n: int,
        k: int,
        one: Survivors,
        old: Any,
        signed: dict[int, dict[int, bytes]],
    ) -> None:
        at, size = view.places[n], len(view.roster.entries)
        mine = messages.dealt_list(terms, view.digest, view.dealt[at], size)
        given = [
            view.its[other].party.identity.sign(mine)
            if other in view.its
            else view.signed.get(other, bytes(64))
            for other in view.beside[at]
            if other in one.alive
        ]
        message = messages.encode_survivors(terms, one, size, given)
        sent = self.call(n, client.confirm, message, old=old)
        if sent:
            signed[k][at] = messages.decode_confirmation(sent, terms, n)

    def open(
        self,
        terms: Terms,
        view: View,
        n: int,
        k: int,
        one: Survivors,
        signed: Mapping[int, Mapping[int, bytes]],
    ) -> None:
        what = one.signed(terms, view.digest, len(view.roster.entries))
        given = dict(signed[k]) | {
            at: state.party.identity.sign(what) for at, state in view.its.items() if at in one.alive
        }
        sent = self.call(
            n, client.unmask, messages.encode_confirmations(terms, Confirmations(given))
        )
        if not sent:
            return
        opened = messages.decode_opening(sent, terms, n)
        for owner, (which, share) in opened.shares.items():
            if owner not in view.its:
                self.seen.give(view.digest, owner, view.places[n], which, share)

    def unlucky(self) -> bool:
        """Whether a ring was drawn that the (tiny) bits of secrecy do not speak of."""
        honest = {*self.fleet.honest}
        for digest, roster in self.seen.rosters.items():
            size, degree = len(roster.entries), roster.graph.degree
            if degree >= size - 1:
                continue
            bad = {at for at, one in enumerate(roster.entries) if one.client not in honest}
            order, _ = secure_aggregation._ring(digest, size)
            window = degree // 2
            most = secure_aggregation.window_colluders(size, self.fleet.policy.colluders, window)
            around = [int(order[at % size]) for at in range(size + window)]
            if any(len(bad & {*around[at : at + window]}) > most for at in range(size)):
                return True
            beside = (secure_aggregation.neighbours(digest, size, degree, at) for at in range(size))
            if any(len(bad & {*one}) >= roster.graph.threshold for one in beside):
                return True
        return False


@dataclass(frozen=True)
class Played:
    """How a schedule went: what the server knows that it may not, and how much it was told."""

    wrong: str | None
    vectors: int
    sums: int
    steps: int


def schedule(seed: int, *lacking: str, sparse: bool = False) -> Played:
    """One schedule of lies, from a seed, against a client that is `lacking` these checks."""
    draw = random.Random(seed)
    with without(*lacking, sparse=sparse):
        fleet = Fleet.drawn(draw, sparse)
        kinds = frozenset(draw.sample(LIES, draw.choice((1, 2, 2, 3, 4, 6))))
        for check in lacking:
            kinds |= _TEMPTS.get(check, frozenset())
        lying = Server(draw, fleet, frozenset(lacking), sparse, kinds=kinds)
        least = fleet.policy.min_survivors
        for attempt in range(1, 2 + lying.lies("attempts", 0.9)):
            again = "once an attempt" in lacking
            terms = Terms(
                "run", 1 if again else attempt, b"p" * 32, 1, 20, least, fleet.policy.colluders
            )
            lying.attempt(terms)
        if sparse and lying.unlucky():
            return Played(None, 0, 0, lying.steps)
        sums = found(lying.seen.rows, lying.seen.seeds())
        wrong = unpromised(sums, least - fleet.policy.colluders)
        return Played(wrong, len(lying.seen.rows), len(sums), lying.steps)
