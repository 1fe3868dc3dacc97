"""The client's half of the masking protocol, with one function a phase, state in, state out.

    announce -> share -> receive -> mask -> confirm -> unmask

Each takes the state the one before returned and the server's message, checks all that this device
can check, and returns the next state and the bytes to send. States are values that never show
their secrets and drop them after use; the caller keeps the newest one only, and stores the round
number before it sends an announcement. A `ProtocolError` ends the round for this device: keep no
state.

**Guarantee** (`docs/secure-aggregation.md` has the argument): the server learns of this device's
vector no more than the sum over the honest members of one survivor list that has at least
`terms.survivors` members and that a quorum of a roster signed which passed this device's directory
and policy; if at most `terms.colluders` devices of the whole fleet collude with the server. Where
everybody is a neighbour (up to `COMPLETE` participants) that is certain, on a sparse graph up to a
chance of 2^-100 for a server that tries 2^60 rosters. Source: Bonawitz et al. 2017 (section 6,
active adversary), Bell et al. 2020 (neighbour graph).
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from ...common.errors import GateRefused, ProtocolError
from ...common.privacy.encoding import pack
from ...common.secure_aggregation import messages
from ...common.secure_aggregation.keys import (
    Directory,
    Identity,
    Purpose,
    Random,
    RoundKey,
    Secret,
    derive,
    digest,
    verify,
)
from ...common.secure_aggregation.keystream import add_masks
from ...common.secure_aggregation.messages import (
    SERVER,
    Deal,
    Entry,
    Inbox,
    Opened,
    Opening,
    Package,
    Roster,
    Survivors,
    share_commitment,
)
from ...common.secure_aggregation.sealing import open_sealed, seal
from ...common.secure_aggregation.shamir import SHARE_BYTES, split
from ...common.secure_aggregation.terms import (
    Graph,
    MaskingPolicy,
    Terms,
    gap,
    neighbours,
    pair_seed,
    quorum,
)

__all__ = [
    "Announced",
    "Confirmed",
    "Finished",
    "Masked",
    "Received",
    "Shared",
    "announce",
    "confirm",
    "mask",
    "receive",
    "share",
    "unmask",
]

Held = tuple[Secret, Secret]
"""An owner's two shares in one holder's hands: of the self mask's seed, of the mask key."""

Agreement = Callable[[RoundKey], Callable[[bytes], Secret]]
"""Own key -> (peer's public key -> shared secret)."""


@dataclass(frozen=True)
class Party:
    """One device in one round: who it is, and what it insists on."""

    client: int
    identity: Identity
    terms: Terms
    policy: MaskingPolicy
    blamed: int = SERVER

    def about(self, client: int) -> "Party":
        """Return this party with another client to blame, whose bytes are looked at."""
        return replace(self, blamed=client)

    def refuse(self, sentence: str) -> ProtocolError:
        """Return the error for something the device does not accept.

        Its sentence is for the device's own ledger, and the server is not told it.
        """
        return messages.fault(self.terms, self.blamed, sentence)


@dataclass(frozen=True)
class Cohort:
    """The part of the roster that a device keeps once it is checked.

    Attributes:
        entries: of this device's holders, by position.
        identities: of all participants, by position.
        digest: of the roster.
        graph: neighbours and threshold of everybody.
        position: this device's own.
        neighbours: their positions, ascending.
    """

    entries: Mapping[int, Entry]
    identities: tuple[bytes, ...] = field(repr=False)
    digest: bytes
    graph: Graph
    position: int
    neighbours: tuple[int, ...]

    @property
    def participants(self) -> int:
        """The number of participants on the roster."""
        return len(self.identities)


@dataclass(frozen=True)
class Announced:
    """The state after `announce`."""

    party: Party
    mask_key: RoundKey
    sealing_key: RoundKey
    seed: Secret


@dataclass(frozen=True)
class Shared:
    """The state after `share`."""

    party: Party
    cohort: Cohort
    seed: Secret
    pairs: Mapping[int, Secret]
    sealing: Mapping[int, Secret]
    own: Held


@dataclass(frozen=True)
class Received:
    """The state after `receive`, with all that is needed to mask, whenever training is done."""

    party: Party
    cohort: Cohort
    seed: Secret
    pairs: Mapping[int, Secret]
    held: Mapping[int, Held]
    dealt: frozenset[int] = field(repr=False)


@dataclass(frozen=True)
class Masked:
    """The state after `mask`: the device's own secrets are gone, only shares are left."""

    party: Party
    cohort: Cohort
    held: Mapping[int, Held]
    dealt: frozenset[int] = field(repr=False)


@dataclass(frozen=True)
class Confirmed:
    """The state after `confirm`."""

    party: Party
    cohort: Cohort
    held: Mapping[int, Held]
    survivors: Survivors


@dataclass(frozen=True)
class Finished:
    """The state after `unmask`: nothing is left to give."""

    party: Party


State = Announced | Shared | Received | Masked | Confirmed | Finished
Phase = TypeVar("Phase", bound=State)
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def _in_phase(state: State, expected: type[Phase], asked: str) -> Phase:
    if not isinstance(state, expected):
        raise state.party.refuse(
            f"asked this device to {asked} when it was {type(state).__name__.lower()}, not "
            f"{expected.__name__.lower()}; each phase happens once a round"
        )
    return state


def _named(
    party: Party,
    check: Callable[Arguments, Result],
    *given: Arguments.args,
    **more: Arguments.kwargs,
) -> Result:
    """Call a check of `common`, and add round and sender to its refusal."""
    return _blaming(party, SERVER, check, *given, **more)


def _blaming(
    party: Party,
    client: int,
    check: Callable[Arguments, Result],
    *given: Arguments.args,
    **more: Arguments.kwargs,
) -> Result:
    """Call a check of `common` on another client's bytes, and blame that client in its refusal."""
    try:
        return check(*given, **more)
    except ProtocolError as refusal:
        raise party.about(client).refuse(str(refusal)) from None


# 1. keys


def announce(
    client: int,
    identity: Identity,
    terms: Terms,
    policy: MaskingPolicy,
    last_round: int,
    random: Random,
) -> tuple[Announced, bytes]:
    """Make fresh keys for one round, and sign them.

    Args:
        client: own client number.
        identity: own long-lived key.
        terms: the round, as the server announced it, checked against the plan by the caller.
        policy: what the owner insists on.
        last_round: largest round of this run this device ever announced keys for; 0: none.
        random: `os.urandom`; a seeded stream in tests only.

    Returns:
        The state, and the announcement.

    Raises:
        ProtocolError: the round is not above `last_round`, or the terms are below the policy.
    """
    party = Party(client, identity, terms, policy)
    _refuse_old_round(party, last_round)
    _named(party, policy.refuse_terms, terms)
    mask_key, sealing_key = RoundKey.create(random), RoundKey.create(random)
    entry = Entry(client, identity.public, mask_key.public, sealing_key.public)
    message = messages.Announcement(
        identity.public,
        mask_key.public,
        sealing_key.public,
        identity.sign(messages.announced(terms, entry)),
    )
    state = Announced(party, mask_key, sealing_key, Secret(random(32)))
    return state, messages.encode_announcement(terms, client, message)


def _refuse_old_round(party: Party, last_round: int) -> None:
    if party.terms.round <= last_round:
        raise party.refuse(f"this device has taken part in round {last_round} already")


# 2. shares


def share(
    state: State,
    message: bytes,
    directory: Directory,
    random: Random,
    agreement: Agreement | None = None,
) -> tuple[Shared, bytes, Directory]:
    """Check the roster, then share the two secrets of this round among the holders.

    Args:
        state: from `announce`.
        message: the server's roster.
        directory: identities this device knows.
        random: as in `announce`.
        agreement: how a key agrees with others; None: `RoundKey.agreement`.

    Returns:
        The state, the sealed shares, and the directory with the identities that were seen first,
        to be stored (`write_directory`).

    Raises:
        ProtocolError: see the `_refuse` functions, in order.
    """
    state = _in_phase(state, Announced, "share")
    party = state.party
    roster = messages.decode_roster(message, party.terms)
    _named(
        party,
        party.policy.refuse_cohort,
        len(roster.entries),
        party.terms.colluders,
        roster.graph,
    )
    _refuse_repeated_keys(party, roster)
    claimed = {entry.client: entry.identity for entry in roster.entries}
    directory = _named(party, directory.admit, claimed)
    cohort = _find_self(state, roster)
    _refuse_unsigned(party, cohort, roster)
    return *_deal(state, cohort, random, agreement), directory


def _refuse_repeated_keys(party: Party, roster: Roster) -> None:
    for name in ("identity", "mask_key", "sealing_key"):
        if len({getattr(entry, name) for entry in roster.entries}) == len(roster.entries):
            continue
        owners: dict[bytes, int] = {}
        for entry in roster.entries:
            first = owners.setdefault(getattr(entry, name), entry.client)
            if first != entry.client:
                raise party.refuse(f"clients {first} and {entry.client} have the same {name}")


def _find_self(state: Announced, roster: Roster) -> Cohort:
    party = state.party
    own = Entry(
        party.client, party.identity.public, state.mask_key.public, state.sealing_key.public
    )
    position = bisect_left(roster.entries, party.client, key=lambda entry: entry.client)
    if own not in roster.entries[position : position + 1]:
        raise party.refuse("the roster lacks this device, or lists it with other keys")
    roster_digest = roster.digest(party.terms)
    beside = neighbours(roster_digest, len(roster.entries), roster.graph.degree, position)
    holders = {at: roster.entries[at] for at in (*beside, position)}
    identities = tuple(entry.identity for entry in roster.entries)
    return Cohort(holders, identities, roster_digest, roster.graph, position, tuple(beside))


def _refuse_unsigned(party: Party, cohort: Cohort, roster: Roster) -> None:
    if len(roster.signatures) != len(cohort.neighbours):
        raise party.refuse(
            f"expected the signatures of {len(cohort.neighbours)} neighbours, got "
            f"{len(roster.signatures)}"
        )
    for position, signature in zip(cohort.neighbours, roster.signatures, strict=True):
        entry = cohort.entries[position]
        if not verify(entry.identity, messages.announced(party.terms, entry), signature):
            raise party.about(entry.client).refuse(
                "the signature of its keys is not that of its identity for this run, round and plan"
            )


def _pair_seeds(
    state: Announced, cohort: Cohort, agree: Callable[[bytes], Secret]
) -> dict[int, Secret]:
    """Derive the seeds of the masks shared with each neighbour.

    The private key is not needed any more afterwards.
    """
    seeds = {}
    for other in cohort.neighbours:
        entry = cohort.entries[other]
        shared = _blaming(state.party, entry.client, agree, entry.mask_key)
        seeds[other] = pair_seed(shared, cohort.digest, cohort.position, other)
    return seeds


def _deal(
    state: Announced, cohort: Cohort, random: Random, agreement: Agreement | None = None
) -> tuple[Shared, bytes]:
    party = state.party
    holders = sorted((*cohort.neighbours, cohort.position))
    points = [holder + 1 for holder in holders]
    shares = {
        holder: pair
        for holder, *pair in zip(
            holders,
            split(state.seed, cohort.graph.threshold, points, random),
            split(state.mask_key.private, cohort.graph.threshold, points, random),
            strict=True,
        )
    }
    agreement = agreement or RoundKey.agreement
    pairs = _pair_seeds(state, cohort, agreement(state.mask_key))
    sealing, packages, agree = {}, {}, agreement(state.sealing_key)
    for holder in cohort.neighbours:
        entry = cohort.entries[holder]
        sealing[holder] = _blaming(party, entry.client, agree, entry.sealing_key)
        one, two = shares[holder]
        both = Secret(one.value + two.value)
        names = (cohort.digest, party.client, entry.client)
        packages[holder] = Package(
            seal(sealing[holder], *names, both, random),
            *_commitments(cohort, cohort.position, holder, (one, two)),
        )
    first, second = shares[cohort.position]
    own = (first, second)
    kept = Package(b"", *_commitments(cohort, cohort.position, cohort.position, own))
    commitment = digest(Purpose.SELF_COMMITMENT, cohort.digest, state.seed.value)
    message = messages.encode_deal(party.terms, party.client, Deal(commitment, kept, packages))
    return Shared(party, cohort, state.seed, pairs, sealing, own), message


def _commitments(cohort: Cohort, owner: int, holder: int, shares: Held) -> tuple[bytes, bytes]:
    self_share, key_share = shares
    return (
        share_commitment(cohort.digest, owner, holder, Opened.SELF, self_share),
        share_commitment(cohort.digest, owner, holder, Opened.KEY, key_share),
    )


# 3. the neighbours' shares


def receive(state: State, message: bytes) -> Received:
    """Open the shares that the neighbours dealt.

    This comes before training, so that nothing is spent in vain.

    Args:
        state: from `share`.
        message: the server's inbox.

    Raises:
        ProtocolError: a package does not open, does not fit its commitments, or the packages are
            not those of the neighbours that are said to have dealt; or too few have.
    """
    state = _in_phase(state, Shared, "receive shares")
    party, cohort = state.party, state.cohort
    inbox = messages.decode_inbox(message, party.terms, cohort.participants)
    _refuse_other_packages(party, cohort, inbox)
    _refuse_few_holders(party, cohort, inbox)
    held = {cohort.position: state.own}
    for sender, package in inbox.packages.items():
        held[sender] = _open_package(state, sender, package)
    return Received(party, cohort, state.seed, state.pairs, held, inbox.dealt)


def _refuse_other_packages(party: Party, cohort: Cohort, inbox: Inbox) -> None:
    strangers = inbox.packages.keys() - set(cohort.neighbours)
    if strangers:
        raise party.refuse(f"shares from position {min(strangers)}, who is not a neighbour")
    listed = inbox.dealt & {*cohort.neighbours, cohort.position}
    for position in sorted(listed ^ {*inbox.packages, cohort.position}):
        client = cohort.entries[position].client
        raise party.refuse(
            f"client {client} is listed as having dealt shares, and they did not come"
            if position in listed
            else f"the list of who dealt shares lacks client {client}, whose shares came"
        )


def _refuse_few_holders(party: Party, cohort: Cohort, inbox: Inbox) -> None:
    if len(inbox.packages) + 1 < cohort.graph.threshold:
        raise party.refuse(
            f"{len(inbox.packages) + 1} holders have dealt, fewer than the threshold of "
            f"{cohort.graph.threshold}"
        )


def _open_package(state: Shared, sender: int, package: Package) -> Held:
    party, cohort = state.party, state.cohort
    client = cohort.entries[sender].client
    names = (cohort.digest, client, party.client)
    opened = _blaming(party, client, open_sealed, state.sealing[sender], *names, package.sealed)
    shares = Secret(opened.value[:SHARE_BYTES]), Secret(opened.value[SHARE_BYTES:])
    promised = (package.self_commitment, package.key_commitment)
    if _commitments(cohort, sender, cohort.position, shares) != promised:
        raise party.about(client).refuse("its shares are not those it committed to")
    return shares


# 4. the masked vector


def mask(state: State, vector: NDArray[np.uint32]) -> tuple[Masked, bytes]:
    """Add the self mask and the masks shared with each neighbour that dealt.

    The signature that goes with the vector says whose masks are in it: holders open this device's
    self mask only if their list of who dealt is the one it was masked by.

    Args:
        state: from `receive`.
        vector: uint32, shape (terms.dimension,), residues mod 2^terms.bits: the gate's output.

    Returns:
        The state, and the masked vector, packed: dimension * bits / 8 bytes and 150. To anybody
        who lacks one of the masks' seeds the numbers are uniform.

    Raises:
        GateRefused: the vector is not what the terms say; nothing leaves.
    """
    state = _in_phase(state, Received, "mask")
    party, cohort, terms = state.party, state.cohort, state.party.terms
    _refuse_vector(terms, vector)
    added = [derive(state.seed, Purpose.SELF_MASK, cohort.digest)]
    removed: list[Secret] = []
    for other in sorted(state.held.keys() - {cohort.position}):
        (added if cohort.position < other else removed).append(state.pairs[other])
    masked = vector.copy()
    add_masks(masked, added, removed)
    masked &= np.uint32((1 << terms.bits) - 1)
    signature = party.identity.sign(_dealt_list(party, cohort, state.dealt))
    vector_message = messages.Vector(pack(masked, terms.bits), signature)
    message = messages.encode_vector(terms, party.client, vector_message)
    return Masked(party, cohort, state.held, state.dealt), message


def _dealt_list(party: Party, cohort: Cohort, dealt: frozenset[int]) -> bytes:
    return messages.dealt_list(party.terms, cohort.digest, dealt, cohort.participants)


def _refuse_vector(terms: Terms, vector: NDArray[np.uint32]) -> None:
    if vector.dtype != np.uint32 or vector.shape != (terms.dimension,):
        raise GateRefused(
            f"round {terms.round}: expected a uint32 vector of {terms.dimension} numbers, got "
            f"{vector.dtype} of shape {vector.shape}; nothing leaves"
        )
    if int(vector.max()) >> terms.bits:
        raise GateRefused(
            f"round {terms.round}: every number must be below 2^{terms.bits}; nothing leaves"
        )


# 5. the survivor list


def confirm(state: State, message: bytes) -> tuple[Confirmed, bytes]:
    """Check the survivor list and sign it.

    No share is given before holders agree on one list.

    Args:
        state: from `mask`.
        message: the server's survivor list.

    Raises:
        ProtocolError: see the `_refuse` functions, in order.
    """
    state = _in_phase(state, Masked, "confirm survivors")
    party, cohort = state.party, state.cohort
    survivors, signatures = messages.decode_survivors(message, party.terms, cohort.participants)
    _refuse_overlap(party, survivors)
    _refuse_own_absence(party, cohort, survivors)
    _refuse_few_survivors(party, survivors)
    _refuse_other_dealers(party, state, survivors)
    _refuse_otherwise_masked(party, state, survivors, signatures)
    _refuse_few_alive_holders(party, cohort, survivors)
    _refuse_gap(party, cohort, survivors)
    signature = party.identity.sign(
        survivors.signed(party.terms, cohort.digest, cohort.participants)
    )
    answer = messages.encode_confirmation(party.terms, party.client, signature)
    return Confirmed(party, cohort, state.held, survivors), answer


def _refuse_overlap(party: Party, survivors: Survivors) -> None:
    both = survivors.alive & survivors.dropped
    if both:
        raise party.refuse(f"position {min(both)} is listed as alive and as dropped")


def _refuse_own_absence(party: Party, cohort: Cohort, survivors: Survivors) -> None:
    if cohort.position not in survivors.alive:
        raise party.refuse("the survivor list lacks this device, which has sent its vector")


def _refuse_few_survivors(party: Party, survivors: Survivors) -> None:
    least = max(party.terms.survivors, party.policy.min_survivors)
    if len(survivors.alive) < least:
        raise party.refuse(f"{len(survivors.alive)} survivors, fewer than the smallest, {least}")


def _refuse_other_dealers(party: Party, state: Masked, survivors: Survivors) -> None:
    """Refuse a survivor list that does not have the same dealers as were shown before.

    Alive and dropped together are who dealt shares, for everybody the same.
    """
    for position in sorted((survivors.alive | survivors.dropped) ^ state.dealt):
        shown = "lacks" if position in state.dealt else "lists"
        had = "had" if position in state.dealt else "had not"
        raise party.refuse(f"the survivor list {shown} position {position}, who {had} dealt shares")


def _refuse_otherwise_masked(
    party: Party, state: Masked, survivors: Survivors, signatures: tuple[bytes, ...]
) -> None:
    """Refuse a list unless each living neighbour signed that it was shown the same dealers."""
    cohort = state.cohort
    alive = [position for position in cohort.neighbours if position in survivors.alive]
    if len(signatures) != len(alive):
        raise party.refuse(
            f"expected the signatures of {len(alive)} living neighbours, got {len(signatures)}"
        )
    signed = _dealt_list(party, cohort, state.dealt)
    for position, signature in zip(alive, signatures, strict=True):
        entry = cohort.entries[position]
        if not verify(entry.identity, signed, signature):
            raise party.about(entry.client).refuse(
                "did not sign the list of who dealt shares that this device was shown"
            )


def _refuse_few_alive_holders(party: Party, cohort: Cohort, survivors: Survivors) -> None:
    alive = survivors.alive & {*cohort.neighbours, cohort.position}
    if len(alive) < cohort.graph.threshold:
        raise party.refuse(
            f"{len(alive)} of this device's holders survive, fewer than the threshold of "
            f"{cohort.graph.threshold}"
        )


def _refuse_gap(party: Party, cohort: Cohort, survivors: Survivors) -> None:
    colluders, degree = party.terms.colluders, cohort.graph.degree
    living = gap(cohort.digest, cohort.participants, colluders, degree, survivors.alive)
    if living is not None:
        raise party.refuse(
            f"only {living} of {degree // 2} successive places in the neighbour ring survive, and "
            "they could all be colluders: the sum could be taken apart there"
        )


# 6. unmasking


def unmask(state: State, message: bytes) -> tuple[Finished, bytes]:
    """Check that a quorum signed the same list, then give one share for each owner.

    For a survivor the share of its self mask's seed, for one that dropped the share of its mask
    key; an opening message has no place for both.

    Args:
        state: from `confirm`.
        message: signatures of the survivor list.

    Raises:
        ProtocolError: a signature is wrong, or too few of the roster signed this list.
    """
    state = _in_phase(state, Confirmed, "unmask")
    party, cohort = state.party, state.cohort
    confirmations = messages.decode_confirmations(message, party.terms)
    _refuse_unconfirmed(party, cohort, state.survivors, confirmations.signatures)
    shares = {}
    for owner, (self_share, key_share) in state.held.items():
        if owner in state.survivors.alive:
            shares[owner] = (Opened.SELF, self_share)
        else:
            shares[owner] = (Opened.KEY, key_share)
    return Finished(party), messages.encode_opening(party.terms, party.client, Opening(shares))


def _refuse_unconfirmed(
    party: Party, cohort: Cohort, survivors: Survivors, signatures: Mapping[int, bytes]
) -> None:
    signed = survivors.signed(party.terms, cohort.digest, cohort.participants)
    for position, signature in signatures.items():
        if position not in survivors.alive:
            raise party.refuse(f"a confirmation from position {position}, which is not alive")
        if not verify(cohort.identities[position], signed, signature):
            raise party.refuse(
                f"position {position} did not sign the survivor list this device was shown"
            )
    least = quorum(cohort.participants, party.terms.colluders)
    signers = len(signatures.keys() | {cohort.position})
    if signers < least:
        raise party.refuse(
            f"{signers} of the {cohort.participants} on the roster confirmed the survivor list, "
            f"fewer than the quorum of {least}"
        )
