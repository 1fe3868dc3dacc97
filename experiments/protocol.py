"""The whole masking protocol, every party in one process: read this first.

The two Flower apps are this function cut at the wire.
"""

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..client.privacy import masked_upload as client
from ..common.errors import ConfigError
from ..common.secure_aggregation.keys import Directory, Identity, Random
from ..common.secure_aggregation.terms import Graph, MaskingPolicy, Terms
from ..server import unmasking as server

__all__ = ["DROPOUT_PHASES", "Device", "run"]

DROPOUT_PHASES = ("keys", "shares", "training", "vector", "confirming")
"""After which step a client may be lost: "confirming" is while the masks are being removed."""


@dataclass
class Device:
    """What one client keeps: for a long time its identity and directory, for a round its state."""

    client: int
    identity: Identity
    policy: MaskingPolicy
    directory: Directory = field(default_factory=lambda: Directory({}, closed=False))
    last_round: int = 0


def run(
    terms: Terms,
    devices: Mapping[int, Device],
    vectors: Mapping[int, NDArray[np.uint32]],
    lost: Mapping[str, Collection[int]] | None = None,
    random: Random = os.urandom,
    sized: Callable[[int], Graph] | None = None,
) -> server.Outcome:
    """One round, from the terms to the sum.

    Args:
        terms: of the round.
        devices: by client number; their directory and last round are brought up to date.
        vectors: by client number: uint32, shape (terms.dimension,), residues mod 2^terms.bits.
        lost: which clients are never heard of again after each of `DROPOUT_PHASES`.
        random: the operating system's; a seeded stream in tests only.
        sized: the graph for so many participants; None for the default one.

    Returns:
        The sum over the survivors.

    Raises:
        RoundVoid: too few are left.
        ProtocolError: a device refuses (with honest parties: its policy does).
    """
    lost = lost or {}
    if not lost.keys() <= set(DROPOUT_PHASES):
        raise ConfigError(f"expected phases of {DROPOUT_PHASES}, got {sorted(lost)}")
    gone: set[int] = set()

    def lose(phase: str) -> None:
        gone.update(lost.get(phase, ()))

    # 1. keys: every device makes fresh keys and signs them with its identity
    announced, replies = {}, {}
    for number, device in devices.items():
        announced[number], replies[number] = client.announce(
            number, device.identity, terms, device.policy, device.last_round, random
        )
        device.last_round = terms.round
    lose("keys")
    cohort, out, _ = server.gather(terms, replies, sized=sized)

    # 2. shares: each checks the roster and shares its two secrets among its holders
    shared, replies = {}, {}
    for number in sorted(out.keys() - gone):
        device = devices[number]
        shared[number], replies[number], device.directory = client.share(
            announced.pop(number), out[number], device.directory, random
        )
    lose("shares")
    dealt, out, _ = server.relay(cohort, replies)

    # 3. vectors: open the neighbours' shares, train, mask; the server adds as they arrive
    running = server.begin_sum(dealt)
    received = {
        number: client.receive(shared.pop(number), out[number])
        for number in out
        if number not in gone
    }
    lose("training")
    masked = {}
    for number in sorted(received.keys() - gone):
        masked[number], reply = client.mask(received.pop(number), vectors[number])
        server.add_vector(running, number, reply)
    lose("vector")

    # 4. survivors: all who sent a vector sign the same list
    listed, out = server.close_sum(running)
    confirmed, replies = {}, {}
    for number in sorted(out.keys() - gone):
        confirmed[number], replies[number] = client.confirm(masked.pop(number), out[number])
    lose("confirming")
    agreed, out, _ = server.exchange(listed, replies)

    # 5. unmasking: one share for each owner, and the masks come off
    replies = {}
    for number in sorted(out.keys() - gone):
        _, replies[number] = client.unmask(confirmed.pop(number), out[number])
    return server.unmask(agreed, replies)
