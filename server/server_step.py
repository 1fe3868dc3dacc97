"""What the server does with a round's mean, by family and by cluster. All of it post-processing.

    lora_xs, ffa, lora, fedsa  a step of the optimiser (`common/model/server_optimizers.py`)
    rolora                     the same, of the half that was trained
    fedsvd                     the same, of B; then B A = U S V' is split anew: A = V', B = U S
    clusters                   a step for each cluster, over its own members; at published rounds
                               the one there is is split, or the closest two are merged

**Guarantee**: everything here is a function of public settings, of the state, and of the noised
mean. So it costs no privacy, and the numbers of members it shows are the noised ones.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ..common.model.exchange_layout import MEMBERS, Exchange, Vector
from ..common.model.families import family_named
from ..common.model.server_optimizers import MOMENTUM, optimizer_named
from ..common.settings.config import Config
from .round_record import RoundRecord

__all__ = ["step", "turned"]

Memory = Mapping[str, Vector]
Stepped = tuple[Vector, dict[str, Vector], RoundRecord]


def step(
    config: Config,
    exchange: Exchange,
    number: int,
    state: Vector,
    memory: Memory,
    mean: NDArray[np.float64],
) -> Stepped:
    """Return state and optimiser's memory after round `number`, and facts for the round's record.

    Args:
        mean: noised mean over the public cohort, as `exchange.released(number)` has it.
    """
    if exchange.clusters.count > 1:
        return _grouped(config, exchange, number, state, memory, mean)
    places = exchange.adapter.places(exchange.released(number))
    part = {name: values[places] for name, values in memory.items()}
    optimizer = optimizer_named(config.rounds.optimizer)
    moved, stepped = optimizer.apply(config.rounds, part, state[places], mean)
    new, kept = state.copy(), {name: values.copy() for name, values in memory.items()}
    new[places] = moved
    for name, values in stepped.items():
        kept[name][places] = values
    after_step = family_named(exchange.adapter.family).after_step
    if after_step is not None:
        after_step(exchange.adapter, new, kept)
    return new, kept, {}


# --- clusters -----------------------------------------------------------------------------------


def turned(
    config: Config, exchange: Exchange, number: int, state: Vector, memory: Memory
) -> Stepped:
    """Split or merge clusters if that is due after round `number`, even after a void one.

    When it is due hangs on public settings alone (`active_clusters`); which two are merged, on
    the state and on the noised numbers of members since the last time.
    """
    settings = exchange.clusters
    active_clusters, after = settings.active_clusters(number), settings.active_clusters(number + 1)
    if after == active_clusters:
        return state, dict(memory), {}
    new = exchange.cluster_vectors(state).copy()
    kept = {name: v.reshape(len(new), -1).copy() for name, v in memory.items() if name != MEMBERS}
    done: RoundRecord = {"split": after}
    if after > active_clusters:
        _split(exchange, number, new, kept)
    else:
        done = {"merged": _merge(exchange, new, kept, _usual(config, exchange, number, memory))}
    return new.ravel(), {name: values.ravel() for name, values in kept.items()}, done


def _grouped(
    config: Config,
    exchange: Exchange,
    number: int,
    state: Vector,
    memory: Memory,
    mean: NDArray[np.float64],
) -> Stepped:
    """Take a step for each cluster over its own members, then the split or merger that is due."""
    max_clusters, cohort = exchange.clusters.max_clusters, config.rounds.cohort
    active_clusters = exchange.clusters.active_clusters(number)
    sums = (mean[:-max_clusters] * cohort).reshape(max_clusters, -1)
    members = mean[-max_clusters:] * cohort / exchange.mark(config.privacy.client.clip)
    total_members = memory.get(MEMBERS, np.zeros(max_clusters + 1)) + np.append(members, 1.0)
    new = exchange.cluster_vectors(state).copy()
    kept = {
        name: v.reshape(max_clusters, -1).copy() for name, v in memory.items() if name != MEMBERS
    }
    usual = _usual(config, exchange, number, {MEMBERS: total_members})
    optimizer = optimizer_named(config.rounds.optimizer)
    for index in range(active_clusters):
        own = {name: values[index] for name, values in kept.items()}
        share = sums[index] / usual[index]
        new[index], stepped = optimizer.apply(config.rounds, own, new[index], share)
        for name, values in stepped.items():
            kept[name][index] = values
    flat = {name: values.ravel() for name, values in kept.items()}
    flat[MEMBERS] = total_members.astype(np.float32)
    state, memory, turn = turned(config, exchange, number, new.ravel(), flat)
    shown = [round(float(m), 2) for m in members[:active_clusters]]
    return state, dict(memory), {"members": shown, **turn}


def _usual(config: Config, exchange: Exchange, number: int, memory: Memory) -> NDArray[np.float64]:
    """Estimate the members of each cluster in round `number`, by which the server divides.

    It is a mean over the rounds since the last turn: the noise of one round is as large as a small
    cluster. Where it is below the public floor, `clusters.min_share` of the cohort, it is the
    floor.
    """
    total_members = memory.get(MEMBERS, np.zeros(exchange.clusters.max_clusters + 1)).astype(
        np.float64
    )
    usual = total_members[: exchange.clusters.active_clusters(number)] / max(total_members[-1], 1.0)
    return np.asarray(np.maximum(usual, exchange.clusters.min_share * config.rounds.cohort))


def _split(
    exchange: Exchange, number: int, cluster_vectors: Vector, memory: Mapping[str, Vector]
) -> None:
    """Replace the first adapter by `most` around it, each a step in a public random direction.

    Its members, each by its own loss, take the side their own gradients point to. The step is
    about `clusters.spread` of how far the adapter has come. Momentum begins anew.
    """
    middle, first = cluster_vectors[0].astype(np.float64), exchange.first
    way = float(np.linalg.norm(middle - first)) or 1e-2
    drawn = np.random.default_rng([exchange.clusters.seed, number]).normal(
        size=cluster_vectors.shape
    )
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    cluster_vectors[:] = middle + exchange.clusters.spread * way * (drawn - drawn.mean(0))
    for name, values in memory.items():
        values[:] = 0.0 if name == MOMENTUM else values[0]


def _merge(
    exchange: Exchange,
    cluster_vectors: Vector,
    memory: Mapping[str, Vector],
    members: NDArray[np.float64],
) -> list[int]:
    """Merge the two closest clusters into one, their mean weighted by members.

    Returns which two they were, by place.

    Closest: the pair that costs least to merge by Ward's criterion (1963), a b / (a + b) times the
    squared distance, for a and b members. So two that share one group out between them go
    together, and so does one that almost nobody picks with its neighbour. Who comes after takes
    the place that is left, and the last place is empty.
    """
    active_clusters = len(members)
    pairs = [
        (first, second)
        for first in range(active_clusters)
        for second in range(first + 1, active_clusters)
    ]

    def cost(pair: tuple[int, int]) -> float:
        apart = cluster_vectors[pair[0]].astype(np.float64) - cluster_vectors[pair[1]]
        a, b = members[list(pair)]
        return float(a * b / (a + b) * (apart @ apart))

    first, second = min(pairs, key=cost)
    share = members[[first, second]] / members[[first, second]].sum()
    for name, values in {"": cluster_vectors, **memory}.items():
        values[first] = share @ values[[first, second]]
        values[second : active_clusters - 1] = values[second + 1 : active_clusters].copy()
        values[active_clusters - 1] = 0.0 if name else exchange.first
    return [first, second]
