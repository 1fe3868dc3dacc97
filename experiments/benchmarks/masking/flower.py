"""Flower's own SecAgg+ (flwr 1.41), timed without its transport: the yardstick of `parties.py`.

The client's four stages are Flower's functions, called as its mod calls them; the server's
unmasking is the loop of `SecAggPlusWorkflow.unmask_stage`, written out here because Flower has it
only in one piece with the messages.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from flwr.client.mod.secure_aggregation.secaggplus_mod import (
    SecAggPlusState,
    _collect_masked_vectors,
    _setup,
    _share_keys,
    _unmask,
    create_shares,
)
from flwr.common import ConfigRecord, ndarrays_to_parameters
from flwr.common.secure_aggregation import ndarrays_arithmetic as arithmetic
from flwr.common.secure_aggregation.crypto.shamir import combine_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
from flwr.common.secure_aggregation.quantization import quantize
from flwr.common.secure_aggregation.secaggplus_constants import Key
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from flwr.supercore.primitives.asymmetric import bytes_to_private_key, bytes_to_public_key
from numpy.typing import NDArray

from ..harness import Clock

__all__ = ["flower_round"]

CLIPPING, TARGET, MODULUS = 8.0, 1 << 22, 1 << 32


def flower_round(clients: int, dimension: int, measured: int) -> dict[str, float]:
    """Time a round of SecAgg+ with Flower's defaults, everybody a neighbour of everybody.

    `measured` clients are timed and their mean is one client; the server's unmasking is timed over
    as many survivors and one dropped client, and scaled to the cohort.

    Returns:
        Processor seconds of one client, of the quantising in it, of the server's unmasking and of
        one dropped client; bytes of a masked vector.
    """
    logging.getLogger("flwr").setLevel(logging.ERROR)
    clock = Clock()
    own = np.random.default_rng(0).normal(size=dimension).astype(np.float32)
    setup = {
        Key.SAMPLE_NUMBER: clients, Key.SHARE_NUMBER: clients,
        Key.THRESHOLD: math.ceil(clients * 2 / 3), Key.CLIPPING_RANGE: CLIPPING,
        Key.TARGET_RANGE: TARGET, Key.MOD_RANGE: MODULUS, Key.MAX_WEIGHT: 1000.0,
    }  # fmt: skip
    states = [SecAggPlusState(nid=n, current_stage="") for n in range(clients)]

    first_keys, masked = _mask(clock, states, setup, own, measured)
    with clock("quantising"):
        quantize([own], CLIPPING, TARGET)
    _serve(clock, states, first_keys, dimension, measured)
    return {
        "client": clock.seconds["client"] / measured,
        "quantising": clock.seconds["quantising"],
        "server unmasking": clock.seconds["survivor"] / measured * clients,
        "server, per dropped client": clock.seconds["dropped"],
        "bytes up": float(sum(map(len, masked))),
    }


def _mask(
    clock: Clock,
    states: Sequence[SecAggPlusState],
    setup: Mapping[str, int | float],
    own: NDArray[np.float32],
    measured: int,
) -> tuple[list[bytes], list[bytes]]:
    """Run the clients' four stages; return everybody's first key, and one masked vector."""

    def timed(n: int, stage: Callable[..., ConfigRecord], *given: object) -> ConfigRecord:
        with clock("client" if n < measured else "others"):
            return stage(states[n], *given)

    clients = range(len(states))
    keys = [timed(n, _setup, ConfigRecord(setup)) for n in clients]
    known = {
        str(n): [sent[Key.PUBLIC_KEY_1], sent[Key.PUBLIC_KEY_2]] for n, sent in enumerate(keys)
    }
    dealt = [timed(n, _share_keys, ConfigRecord(known)) for n in clients]
    masked: list[bytes] = []
    for n in range(measured):
        senders = [other for other in clients if other != n]
        sealed = [
            dealt[s][Key.CIPHERTEXT_LIST][dealt[s][Key.DESTINATION_LIST].index(n)] for s in senders
        ]
        inbox = ConfigRecord({Key.CIPHERTEXT_LIST: sealed, Key.SOURCE_LIST: senders})
        sent = timed(n, _collect_masked_vectors, inbox, 1, ndarrays_to_parameters([own]))
        lists = {Key.ACTIVE_NODE_ID_LIST: list(clients), Key.DEAD_NODE_ID_LIST: []}
        timed(n, _unmask, ConfigRecord(lists))
        masked = sent[Key.MASKED_PARAMETERS]
    return [sent[Key.PUBLIC_KEY_1] for sent in keys], masked


def _serve(
    clock: Clock,
    states: Sequence[SecAggPlusState],
    first_keys: Sequence[bytes],
    dimension: int,
    measured: int,
) -> None:
    """Unmask as the server does: each measured survivor, and one dropped client."""
    clients = len(states)
    shapes: list[tuple[int, ...]] = [(1,), (dimension,)]
    total = [np.zeros(shape, dtype=np.int64) for shape in shapes]
    threshold = states[0].threshold
    for n in range(measured):
        every = create_shares(states[n].rd_seed, threshold, clients)
        with clock("survivor"):
            secret = combine_shares(every[:threshold])
            mask = pseudo_rand_gen(secret, MODULUS, shapes)
            total = arithmetic.parameters_subtraction(total, mask)
    every = create_shares(states[0].sk1, threshold, clients)
    with clock("dropped"):
        secret = combine_shares(every[:threshold])
        for key in first_keys[1:]:
            shared = generate_shared_key(bytes_to_private_key(secret), bytes_to_public_key(key))
            mask = pseudo_rand_gen(shared, MODULUS, shapes)
            total = arithmetic.parameters_addition(total, mask)
