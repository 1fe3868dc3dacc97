"""Server half of the masking protocol: one function a phase, replies in, messages out.

    gather -> relay -> begin_sum, add_vector, close_sum -> exchange -> unmask

Each takes the replies of the phase by client number, and returns the next state, the messages to
send by client number, and why replies were refused. A client that is missing, or whose reply is
refused, has dropped out; the round goes on without it. The sum is streaming: a vector is added when
it arrives and not kept, so memory is O(dimension) and, beside it, O(participants x neighbours) for
commitments.

**Guarantee** (of an honest server): `unmask` returns the exact sum mod 2^bits of the vectors of at
least `terms.survivors` clients, or raises `RoundVoid` and has revealed nothing: whether the masks
can be removed is checked before the survivor list is sent. Every opened secret is compared with
what its owner announced.
"""

from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..common.errors import ProtocolError, RoundVoid
from ..common.privacy.encoding import unpack
from ..common.secure_aggregation import messages
from ..common.secure_aggregation.keys import (
    KEY_BYTES,
    Directory,
    Purpose,
    RoundKey,
    Secret,
    derive,
    digest,
    verify,
)
from ..common.secure_aggregation.keystream import add_masks
from ..common.secure_aggregation.messages import (
    Announcement,
    Confirmations,
    Deal,
    Inbox,
    Opened,
    Package,
    Roster,
    Survivors,
    fault,
    share_commitment,
)
from ..common.secure_aggregation.shamir import combine
from ..common.secure_aggregation.terms import (
    Graph,
    Terms,
    default_graph,
    gap,
    neighbours,
    pair_seed,
    quorum,
)

__all__ = [
    "Cohort",
    "Confirmed",
    "Dealt",
    "Listed",
    "Outcome",
    "Sum",
    "add_vector",
    "begin_sum",
    "close_sum",
    "exchange",
    "gather",
    "relay",
    "unmask",
]

Replies = Mapping[int, bytes]
Outgoing = dict[int, bytes]
Refused = dict[int, str]


@dataclass(frozen=True)
class Cohort:
    """The roster, its neighbour graph, and each participant's place."""

    terms: Terms
    roster: Roster
    digest: bytes
    beside: tuple[tuple[int, ...], ...] = field(repr=False)

    @property
    def places(self) -> dict[int, int]:
        """Each participant's position, by client number."""
        return {entry.client: place for place, entry in enumerate(self.roster.entries)}

    def holders(self, position: int) -> set[int]:
        """Positions of who holds shares of a participant's secrets."""
        return {*self.beside[position], position}

    def client(self, position: int) -> int:
        """Client number at a position."""
        return self.roster.entries[position].client


# 1. keys


def gather(
    terms: Terms,
    replies: Replies,
    directory: Directory | None = None,
    sized: Callable[[int], Graph] | None = None,
) -> tuple[Cohort, Outgoing, Refused]:
    """Announcements -> the roster, with each participant's neighbours' signatures.

    Args:
        terms: of the round.
        replies: announcements by client number.
        directory: where an operator lists identities; None: any.
        sized: the graph for so many participants; None for the default one of the terms'
            colluders, which a device's policy accepts.

    Raises:
        RoundVoid: fewer usable announcements than `terms.survivors`.
    """
    known = directory or Directory({}, closed=False)
    probe = RoundKey.of(bytes(KEY_BYTES)).agreement()
    taken: set[bytes] = set()
    announcements: dict[int, Announcement] = {}
    refused: Refused = {}
    for client, reply in sorted(replies.items()):
        try:
            announcement = messages.decode_announcement(reply, terms, client)
            _refuse_announcement(terms, client, announcement, taken, probe)
            known = known.admit({client: announcement.identity})
        except ProtocolError as refusal:
            refused[client] = str(refusal)
            continue
        taken |= {announcement.identity, announcement.mask_key, announcement.sealing_key}
        announcements[client] = announcement
    entries = tuple(announcement.entry(client) for client, announcement in announcements.items())
    count = len(entries)
    _refuse_few(terms, count, "announced keys")
    graph = default_graph(count, terms.colluders) if sized is None else sized(count)
    roster = Roster(entries, graph, ())
    its_digest = roster.digest(terms)
    beside = tuple(tuple(neighbours(its_digest, count, graph.degree, at)) for at in range(count))
    signatures = [announcement.signature for announcement in announcements.values()]
    outgoing = {
        entries[at].client: messages.encode_roster(
            terms,
            Roster(entries, graph, tuple(signatures[announcement] for announcement in beside[at])),
        )
        for at in range(count)
    }
    return Cohort(terms, roster, its_digest, beside), outgoing, refused


def _refuse_few(terms: Terms, count: int, doing: str) -> None:
    if count < terms.survivors:
        raise RoundVoid(
            f"round {terms.round}: {count} clients {doing}, fewer than the {terms.survivors} a sum "
            "needs; the round is void and nothing is revealed"
        )


def _refuse_announcement(
    terms: Terms,
    client: int,
    announcement: Announcement,
    taken: set[bytes],
    probe: Callable[[bytes], Secret],
) -> None:
    if not verify(
        announcement.identity,
        messages.announced(terms, announcement.entry(client)),
        announcement.signature,
    ):
        raise fault(terms, client, "the signature of its keys is not that of its identity")
    if taken & {announcement.identity, announcement.mask_key, announcement.sealing_key}:
        raise fault(terms, client, "its identity or one of its keys is another client's")
    if announcement.mask_key == announcement.sealing_key:
        raise fault(terms, client, "its two keys are the same")
    for key in (announcement.mask_key, announcement.sealing_key):
        try:
            probe(key)
        except ProtocolError as refusal:
            raise fault(terms, client, str(refusal)) from None


# 2. shares


@dataclass(frozen=True)
class Dealt:
    """The clients that dealt shares, with the commitments to them, by the owner's position."""

    cohort: Cohort
    deals: Mapping[int, Deal] = field(repr=False)


def relay(cohort: Cohort, replies: Replies) -> tuple[Dealt, Outgoing, Refused]:
    """Pass sealed shares on to each participant's inbox.

    Raises:
        RoundVoid: fewer usable deals than `terms.survivors`.
    """
    terms, places = cohort.terms, cohort.places
    deals: dict[int, Deal] = {}
    refused: Refused = {}
    for client, reply in sorted(replies.items()):
        try:
            position = _position(cohort, places, client)
            deal = messages.decode_deal(reply, terms, client)
            if deal.packages.keys() != set(cohort.beside[position]):
                raise fault(terms, client, "its shares are not for its neighbours, each once")
            deals[position] = deal
        except ProtocolError as refusal:
            refused[client] = str(refusal)
    _leave_out_the_lonely(cohort, deals, refused)
    _refuse_few(terms, len(deals), "dealt shares")
    outgoing = {
        cohort.client(at): messages.encode_inbox(
            terms,
            Inbox(
                {one: deals[one].packages[at] for one in cohort.beside[at] if one in deals},
                frozenset(deals),
            ),
            len(cohort.roster.entries),
        )
        for at in deals
    }
    return Dealt(cohort, {at: _unsealed(deal) for at, deal in deals.items()}), outgoing, refused


def _position(cohort: Cohort, places: Mapping[int, int], client: int) -> int:
    if client not in places:
        raise fault(cohort.terms, client, "is not on the roster")
    return places[client]


def _leave_out_the_lonely(cohort: Cohort, deals: dict[int, Deal], refused: Refused) -> None:
    """Leave out clients with fewer holders that dealt than the threshold.

    Nobody could ever open their secrets.
    """
    while lonely := [
        at for at in deals if len(cohort.holders(at) & deals.keys()) < cohort.roster.graph.threshold
    ]:
        for at in lonely:
            del deals[at]
            refused[cohort.client(at)] = str(
                fault(cohort.terms, cohort.client(at), "too few of its holders have dealt shares")
            )


def _unsealed(deal: Deal) -> Deal:
    """Keep the commitments of a deal only, as what was sealed has been passed on."""
    kept = {
        at: Package(b"", one.self_commitment, one.key_commitment)
        for at, one in deal.packages.items()
    }
    return Deal(deal.commitment, deal.own, kept)


# 3. vectors


@dataclass(eq=False)
class Sum:
    """A running sum mod 2^32 of masked vectors.

    It is the one state that is changed in place.
    """

    dealt: Dealt
    places: Mapping[int, int] = field(repr=False)
    signed: bytes = field(repr=False)
    total: NDArray[np.uint32] = field(repr=False)
    signatures: dict[int, bytes] = field(repr=False)
    closed: bool = False

    @property
    def alive(self) -> Set[int]:
        """Positions whose vectors are in the sum."""
        return self.signatures.keys()


def begin_sum(dealt: Dealt) -> Sum:
    """An empty sum: zeros, shape (dimension,)."""
    total = np.zeros(dealt.cohort.terms.dimension, dtype=np.uint32)
    terms, size = dealt.cohort.terms, len(dealt.cohort.roster.entries)
    signed = messages.dealt_list(terms, dealt.cohort.digest, frozenset(dealt.deals), size)
    return Sum(dealt, dealt.cohort.places, signed, total, {})


def add_vector(running: Sum, client: int, reply: bytes) -> None:
    """Add one client's masked vector when it arrives.

    Raises:
        ProtocolError: malformed, a second one, from somebody who dealt no shares, or late: once
            the survivor list is made this client's mask key may be opened, and its vector would
            be hidden by its self mask alone. The sum is unchanged.
    """
    terms = running.dealt.cohort.terms
    position = _position(running.dealt.cohort, running.places, client)
    if running.closed:
        raise fault(terms, client, "its vector came after the survivor list was made; refused")
    if position not in running.dealt.deals:
        raise fault(terms, client, "sent a vector, but had dealt no shares")
    if position in running.alive:
        raise fault(terms, client, "sent a second vector")
    vector = messages.decode_vector(reply, terms, client)
    identity = running.dealt.cohort.roster.entries[position].identity
    if not verify(identity, running.signed, vector.signature):
        raise fault(terms, client, "did not sign the list of who dealt shares")
    try:
        running.total += unpack(vector.packed, terms.dimension, terms.bits)
    except ProtocolError as refusal:
        raise fault(terms, client, str(refusal)) from None
    running.signatures[position] = vector.signature


# 4. survivors


@dataclass(frozen=True)
class Listed:
    """The server's state after the survivor list was made."""

    dealt: Dealt
    survivors: Survivors
    total: NDArray[np.uint32] = field(repr=False)


def close_sum(running: Sum) -> tuple[Listed, Outgoing]:
    """Take no further vectors, and send every survivor the list of survivors.

    Raises:
        RoundVoid: fewer vectors than `terms.survivors` or the quorum, a secret that will be needed
            has fewer living holders than the threshold, or every device would refuse the list for
            a gap in the ring. Nothing has been revealed.
    """
    running.closed = True
    dealt, cohort = running.dealt, running.dealt.cohort
    _refuse_few(cohort.terms, len(running.alive), "sent a vector")
    dropped = frozenset(dealt.deals.keys() - running.alive)
    survivors = Survivors(frozenset(running.alive), dropped)
    for owner in _needed(cohort, survivors):
        _refuse_few_holders(cohort, owner, len(cohort.holders(owner) & running.alive))
    _refuse_few_signers(cohort, len(running.alive))
    _refuse_gap(cohort, survivors)
    outgoing = {
        cohort.client(at): messages.encode_survivors(
            cohort.terms,
            survivors,
            len(cohort.roster.entries),
            [running.signatures[one] for one in cohort.beside[at] if one in running.alive],
        )
        for at in sorted(running.alive)
    }
    return Listed(dealt, survivors, running.total), outgoing


def _needed(cohort: Cohort, survivors: Survivors) -> Iterable[int]:
    """Owners whose secrets must be opened: survivors, and those dropped beside a survivor."""
    beside = (at for at in survivors.dropped if survivors.alive & set(cohort.beside[at]))
    return sorted({*survivors.alive, *beside})


def _refuse_few_signers(cohort: Cohort, count: int) -> None:
    least = quorum(len(cohort.roster.entries), cohort.terms.colluders)
    if count < least:
        raise RoundVoid(
            f"round {cohort.terms.round}: {count} of {len(cohort.roster.entries)} participants are "
            f"left, fewer than the quorum of {least} that must sign the survivor list; the round "
            "is void and nothing is revealed"
        )


def _refuse_gap(cohort: Cohort, survivors: Survivors) -> None:
    terms, graph = cohort.terms, cohort.roster.graph
    size = len(cohort.roster.entries)
    living = gap(cohort.digest, size, terms.colluders, graph.degree, survivors.alive)
    if living is not None:
        raise RoundVoid(
            f"round {terms.round}: only {living} of {graph.degree // 2} successive places in the "
            "neighbour ring are left; the round is void and nothing is revealed"
        )


def _refuse_few_holders(cohort: Cohort, owner: int, count: int) -> None:
    if count < cohort.roster.graph.threshold:
        raise RoundVoid(
            f"round {cohort.terms.round}: {count} holders of client {cohort.client(owner)}'s "
            f"shares are left, fewer than the threshold of {cohort.roster.graph.threshold}; the "
            "round is void and nothing is revealed"
        )


# 5. confirmations


@dataclass(frozen=True)
class Confirmed:
    """The server's state after the survivors signed the list."""

    listed: Listed
    confirmed: frozenset[int]


def exchange(listed: Listed, replies: Replies) -> tuple[Confirmed, Outgoing, Refused]:
    """Collect signatures of the survivor list, and send a quorum of them to everybody who signed.

    Raises:
        RoundVoid: too few signed for the holders to give their shares.
    """
    cohort, survivors = listed.dealt.cohort, listed.survivors
    terms, places = cohort.terms, cohort.places
    signed = survivors.signed(terms, cohort.digest, len(cohort.roster.entries))
    signatures: dict[int, bytes] = {}
    refused: Refused = {}
    for client, reply in sorted(replies.items()):
        try:
            position = _position(cohort, places, client)
            if position not in survivors.alive:
                raise fault(terms, client, "confirms a survivor list it is not on")
            signature = messages.decode_confirmation(reply, terms, client)
            if not verify(cohort.roster.entries[position].identity, signed, signature):
                raise fault(terms, client, "its signature is not of this survivor list")
            signatures[position] = signature
        except ProtocolError as refusal:
            refused[client] = str(refusal)
    _refuse_few_signers(cohort, len(signatures))
    for owner in _needed(cohort, survivors):
        _refuse_few_holders(cohort, owner, len(cohort.holders(owner) & signatures.keys()))
    enough = sorted(signatures)[: quorum(len(cohort.roster.entries), terms.colluders)]
    message = messages.encode_confirmations(
        terms, Confirmations({at: signatures[at] for at in enough})
    )
    outgoing = {cohort.client(at): message for at in signatures}
    return Confirmed(listed, frozenset(signatures)), outgoing, refused


# 6. unmasking


@dataclass(frozen=True)
class Outcome:
    """The unmasked sum, and whose vectors are in it.

    Attributes:
        total: uint32, shape (dimension,), residues mod 2^bits.
        survivors: client numbers in the sum.
        dropped: client numbers that dealt shares and sent no vector.
        refused: replies of the last phase that were refused, with the reason.
    """

    total: NDArray[np.uint32] = field(repr=False)
    survivors: tuple[int, ...]
    dropped: tuple[int, ...]
    refused: Refused


def unmask(state: Confirmed, replies: Replies) -> Outcome:
    """Open the survivors' self masks and the dropped ones' mask keys, and remove the masks.

    Raises:
        RoundVoid: fewer shares of a secret than the threshold, or an owner dealt shares of another
            secret than it announced (it is named).
    """
    listed, cohort = state.listed, state.listed.dealt.cohort
    terms, survivors = cohort.terms, listed.survivors
    opened, refused = _collect(state, replies)
    owners = list(_needed(cohort, survivors))
    for owner in owners:
        _refuse_few_holders(cohort, owner, len(opened.get(owner, {})))
    total = listed.total.copy()
    for owner in owners:
        secret = _open(listed.dealt, owner, opened.pop(owner), owner in survivors.alive)
        if owner in survivors.alive:
            add_masks(total, [], [derive(secret, Purpose.SELF_MASK, cohort.digest)])
        else:
            _remove_pairwise(cohort, survivors, owner, secret, total)
    total &= np.uint32((1 << terms.bits) - 1)
    return Outcome(
        total,
        tuple(cohort.client(at) for at in sorted(survivors.alive)),
        tuple(cohort.client(at) for at in sorted(survivors.dropped)),
        refused,
    )


def _collect(state: Confirmed, replies: Replies) -> tuple[dict[int, dict[int, Secret]], Refused]:
    """Collect the shares that fit their commitments, by owner and point.

    A sender with a wrong one is named.
    """
    cohort = state.listed.dealt.cohort
    places = cohort.places
    opened: dict[int, dict[int, Secret]] = {}
    refused: Refused = {}
    for client, reply in sorted(replies.items()):
        try:
            holder = _position(cohort, places, client)
            shares = _checked_opening(state, holder, client, reply)
        except ProtocolError as refusal:
            refused[client] = str(refusal)
            continue
        for owner, share in shares.items():
            opened.setdefault(owner, {})[holder + 1] = share
    return opened, refused


def _checked_opening(state: Confirmed, holder: int, client: int, reply: bytes) -> dict[int, Secret]:
    dealt, survivors = state.listed.dealt, state.listed.survivors
    cohort, terms = dealt.cohort, dealt.cohort.terms
    if holder not in state.confirmed:
        raise fault(terms, client, "gives shares, but has confirmed no survivor list")
    opening = messages.decode_opening(reply, terms, client)
    if opening.shares.keys() != cohort.holders(holder) & dealt.deals.keys():
        raise fault(terms, client, "its shares are not of the owners it holds, each once")
    for owner, (which, share) in opening.shares.items():
        wanted = Opened.SELF if owner in survivors.alive else Opened.KEY
        deal = dealt.deals[owner]
        package = deal.own if owner == holder else deal.packages[holder]
        promised = package.self_commitment if wanted is Opened.SELF else package.key_commitment
        if (
            which is not wanted
            or share_commitment(cohort.digest, owner, holder, which, share) != promised
        ):
            raise fault(terms, client, f"a wrong share of client {cohort.client(owner)}'s secret")
    return {owner: share for owner, (_, share) in opening.shares.items()}


def _open(dealt: Dealt, owner: int, shares: Mapping[int, Secret], alive: bool) -> Secret:
    cohort = dealt.cohort
    try:
        secret = combine(shares, cohort.roster.graph.threshold)
        if alive:
            found = digest(Purpose.SELF_COMMITMENT, cohort.digest, secret.value)
            fits = found == dealt.deals[owner].commitment
        else:
            fits = RoundKey.of(secret.value).public == cohort.roster.entries[owner].mask_key
    except ProtocolError:
        fits = False
    if not fits:
        raise RoundVoid(
            str(
                fault(
                    cohort.terms,
                    cohort.client(owner),
                    "dealt shares of another secret than it announced; the round is void, leave "
                    "this client out of the next",
                )
            )
        )
    return secret


def _remove_pairwise(
    cohort: Cohort, survivors: Survivors, owner: int, secret: Secret, total: NDArray[np.uint32]
) -> None:
    """Remove the pairwise masks that survivors added for a neighbour that dropped."""
    agree = RoundKey.of(secret.value).agreement()
    added: list[Secret] = []
    removed: list[Secret] = []
    for other in cohort.beside[owner]:
        if other not in survivors.alive:
            continue
        shared = agree(cohort.roster.entries[other].mask_key)
        seed = pair_seed(shared, cohort.digest, owner, other)
        (removed if other < owner else added).append(seed)
    add_masks(total, added, removed)
