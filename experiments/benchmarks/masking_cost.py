"""What masking costs: every party of a round, and Flower's SecAgg+ primitives beside it.

    python -m privet.experiments.benchmarks.masking_cost --clients 1000 --dimension 100000 --dropout
    0.05 python -m privet.experiments.benchmarks.masking_cost --flower python -m
    privet.experiments.benchmarks.masking_cost --table

All parties run one after another in this process, on one core, without training and without
noise; clients are lost after training, which is the dearest moment for the server. `--flower` times
Flower's own functions in the same run (`flower_masking.py`). Seconds are processor seconds.
"""

import argparse
import json
import math
import os
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ...client.privacy import masked_upload as client
from ...common.privacy.encoding import round_randomly, wrap
from ...common.privacy.noise import SystemSource
from ...common.secure_aggregation.keys import Directory, Identity
from ...common.secure_aggregation.terms import Graph, MaskingPolicy, Terms
from ...server import unmasking as server
from .processor_time import Clock

BITS, TABLE = 20, (10, 20, 50, 100, 200, 500, 1000)


def main() -> None:
    """Print what was asked for as JSON or as a table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--clients", type=int)
    options.add_argument("--dimension", type=int)
    options.add_argument("--dropout", type=float, default=0.0)
    options.add_argument("--flower", action="store_true", help="beside Flower's own, in one run")
    options.add_argument("--measured", type=int, default=5, help="Flower's clients that are timed")
    options.add_argument("--table", action="store_true", help="cost per client for 10 to 1,000")
    given = options.parse_args()
    if given.table:
        table(given.dimension or 10_000)
    elif given.flower:
        found = beside_flower(given.clients or 50, given.dimension or 1_000_000, given.measured)
        print(json.dumps(found, indent=2))
    else:
        costs = measure(given.clients or 100, given.dimension or 100_000, given.dropout)
        print(json.dumps(costs, indent=2))


def measure(
    clients: int,
    dimension: int,
    dropout: float,
    sized: Callable[[int], Graph] | None = None,
) -> dict[str, Any]:
    """Run one masked round with every party, and measure what it costs.

    Without `sized` it takes the default graph.

    Returns:
        Seconds of a mean client by phase and of the server by phase, bytes up and down, peak
        memory of the process (all clients together), and whether the sum was right.
    """
    survivors = max(2, math.ceil(clients * 2 / 3))
    colluders = min(clients // 10, survivors - 2)
    terms = Terms("benchmark", 1, bytes(32), dimension, BITS, survivors, colluders)
    policy = MaskingPolicy(max(3, clients), survivors, colluders=colluders)
    identities = [Identity.create(os.urandom) for _ in range(clients)]
    listed = Directory({n: one.public for n, one in enumerate(identities)}, closed=True)
    lost = set(range(round(clients * dropout)))
    mine, theirs, up, down = Clock(), Clock(), [0] * clients, [0] * clients
    rng = np.random.default_rng(0)
    expected = np.zeros(dimension, dtype=np.uint32)

    states: dict[int, Any] = {}
    replies: dict[int, bytes] = {}

    def each(name: str, out: dict[int, bytes], call: Callable[[int, bytes], Any]) -> None:
        replies.clear()
        for n, message in out.items():
            if n in lost and name in ("mask", "confirm", "unmask"):
                continue
            down[n] += len(message)
            with mine(name):
                states[n], reply = call(n, message)
            up[n] += len(reply)
            replies[n] = reply

    def announce(n: int, _: bytes) -> Any:
        return client.announce(n, identities[n], terms, policy, 0, os.urandom)

    each("announce", dict.fromkeys(range(clients), b""), announce)
    with theirs("gather"):
        cohort, out, _ = server.gather(terms, replies, listed, sized)
    each("share", out, lambda n, m: client.share(states[n], m, listed, os.urandom))
    with theirs("relay"):
        dealt, out, _ = server.relay(cohort, replies)
    each("receive", out, lambda n, m: (client.receive(states[n], m), b""))
    running = server.begin_sum(dealt)
    for n in sorted(out.keys() - lost):
        vector = rng.integers(0, 1 << BITS, dimension, dtype=np.uint32)
        expected += vector
        with mine("mask"):
            states[n], reply = client.mask(states[n], vector)
        up[n] += len(reply)
        with theirs("add"):
            server.add_vector(running, n, reply)
    with theirs("close"):
        listed_, out = server.close_sum(running)
    each("confirm", out, lambda n, m: client.confirm(states[n], m))
    with theirs("exchange"):
        agreed, out, _ = server.exchange(listed_, replies)
    each("unmask", out, lambda n, m: client.unmask(states[n], m))
    with theirs("unmask"):
        outcome = server.unmask(agreed, replies)
    right = bool(np.array_equal(outcome.total, expected & np.uint32((1 << BITS) - 1)))
    per_client = {name: value / clients for name, value in mine.seconds.items()}
    return {
        "clients": clients,
        "dimension": dimension,
        "dropped": len(outcome.dropped),
        "degree": cohort.roster.graph.degree,
        "threshold": cohort.roster.graph.threshold,
        "the sum is right": right,
        "client seconds": {**per_client, "all": sum(per_client.values())},
        "server seconds": {**theirs.seconds, "all": sum(theirs.seconds.values())},
        "bytes up": max(up),
        "bytes down": max(down),
        "bytes up per coordinate": max(up) / dimension,
        "peak process MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def table(dimension: int) -> None:
    """Cost per client against n: everything but the roster grows with the number of neighbours.

    The exact failure bounds ask for at most 13 log2 n neighbours at every n, and for fewer in
    small cohorts, where a tenth of the participants is few people.
    """
    print(f"dimension {dimension}, no dropout; processor ms of one client; bytes of one client")
    heads = ("n", "degree", "per log2 n", "client ms", "per degree", "up", "down", "server ms/n")
    print("".join(f"{head:>12}" for head in heads))
    for clients in TABLE:
        cost = measure(clients, dimension, 0.0)
        ms, degree = 1e3 * cost["client seconds"]["all"], cost["degree"]
        server_ms = 1e3 * cost["server seconds"]["all"] / clients
        print(
            f"{clients:>12}{degree:>12}{degree / math.log2(clients):>12.1f}{ms:>12.2f}"
            f"{ms / degree:>12.3f}{cost['bytes up']:>12}{cost['bytes down']:>12}{server_ms:>12.2f}",
            flush=True,
        )


def beside_flower(clients: int, dimension: int, measured: int) -> dict[str, Any]:
    """Both protocols on the same machine in one run: seconds, bytes, ratios."""
    from .flower_masking import flower_round

    flower = flower_round(clients, dimension, measured)
    own = measure(clients, dimension, 0.0)
    with_loss = measure(clients, dimension, 1 / clients)
    complete = own
    rounding = _rounding_seconds(dimension)
    client_s = own["client seconds"]["all"]
    unmask_s = own["server seconds"]["unmask"]
    per_dropped = max(
        with_loss["server seconds"]["unmask"] - unmask_s * (clients - 1) / clients, 1e-9
    )
    return {
        "flower": flower,
        "privet": {
            "client": client_s,
            "client, everybody a neighbour": complete["client seconds"]["all"],
            "neighbours": own["degree"],
            "rounding, not in it": rounding,
            "server unmasking": unmask_s,
            "server, per dropped client": per_dropped,
            "bytes up": own["bytes up"],
            "the sum is right": own["the sum is right"] and with_loss["the sum is right"],
        },
        "flower / privet": {
            "client": flower["client"] / client_s,
            "client, everybody a neighbour": flower["client"] / complete["client seconds"]["all"],
            "client, rounding in both": flower["client"] / (client_s + rounding),
            "client, rounding in neither": (flower["client"] - flower["quantising"]) / client_s,
            "server unmasking": flower["server unmasking"] / unmask_s,
            "server, per dropped client": flower["server, per dropped client"] / per_dropped,
            "bytes up": flower["bytes up"] / own["bytes up"],
        },
    }


def _rounding_seconds(dimension: int) -> float:
    vector, source = np.random.default_rng(0).normal(size=dimension), SystemSource()
    seconds = []
    for _ in range(5):
        began = time.process_time()
        wrap(round_randomly(vector, 2.0**-10, source.words), BITS)
        seconds.append(time.process_time() - began)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
