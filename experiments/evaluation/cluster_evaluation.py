"""Runs with several clusters, as the experimenter reads them off the simulated devices.

Which cluster a device has is private. On a simulation the experimenter may read it, as everything
else of a simulated device; nothing of it passes the server, and no epsilon covers it.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from ...client.device import Device, cluster_of, exchange_at, local_factor_of
from ...client.personal.person_losses import evaluator_of
from ...client.simulated import SimulatedContext
from ...common.errors import ConfigError, StateError
from ...common.model.exchange_layout import Vector
from ...common.settings.config import Config
from ...server.run_folder import checkpoint
from ...server.run_folder.run import index_of_largest_cluster
from .. import progress
from ..data.dialects import dialect_of
from .people import reported, unit_of
from .user_statistics import Mean, bootstrap_mean

__all__ = [
    "Recovered",
    "adapter_of",
    "choices",
    "compared",
    "evaluate_people",
    "kept_state",
    "largest_cluster",
    "recovered",
    "state_of",
]


LossesByModel = dict[str, list[Any]]
"""Under `users` who was evaluated, under each model's name their losses."""


class Recovered(TypedDict):
    """How well private choices fit the true groups.

    Attributes:
        ari: adjusted Rand index over everybody who was trained on.
        people: how many these are.
        choices: of each true group, how many picked each cluster.
    """

    ari: float
    people: int
    choices: dict[str, list[int]]


class Gains(TypedDict):
    """Mean losses and mean gains of each model over another, over people."""

    people: int
    losses: dict[str, float]
    base_minus_global: Mean
    base_minus_group: Mean
    global_minus_group: Mean
    share_better: float


class Compared(Recovered):
    """A run with clusters beside one without: the losses' unit, and the gains of people."""

    unit: str
    seen: Gains
    unseen: Gains


def state_of(folder: Path) -> Vector:
    """The state after a run's last finished round: one adapter vector a cluster, in a row.

    Raises:
        StateError: no round was finished.
    """
    bench = SimulatedContext.open(folder.resolve())
    layout = exchange_at(bench).state.digest
    kept = kept_state(folder, bench.run, bench.config, layout)
    if kept is None:
        raise StateError(f"{folder} has no finished round yet; go on with privet simulate --resume")
    return kept


def kept_state(folder: Path, run: str, config: Config, layout: str) -> Vector | None:
    """Read the state in a run's checkpoint. It is None before the first round.

    Damage is warned of.
    """
    kept = checkpoint.load(folder, run=run, config_hash=config.digest, layout=layout)
    if kept is None:
        return None
    if kept.note:
        progress.warn(kept.note)
    return kept.adapter


def adapter_of(bench: SimulatedContext, user: str, state: Vector) -> Vector:
    """Return the adapter vector of a person's own cluster, shape (d,).

    With one cluster it is everybody's.
    """
    return cluster_of(Device(user, bench), state)[1]


def largest_cluster(bench: SimulatedContext, state: Vector) -> Vector:
    """The adapter vector for somebody without records: of the cluster with most members."""
    return np.asarray(
        exchange_at(bench).cluster_vectors(state)[
            index_of_largest_cluster(bench.folder, bench.config.clusters.count)
        ]
    )


def choices(bench: SimulatedContext, users: Sequence[str], state: Vector) -> list[int]:
    """Return the cluster that each person chooses."""
    with progress.counting("choosing", len(users), "people") as one:
        found = []
        for user in users:
            found.append(cluster_of(Device(user, bench), state)[0])
            one()
    return found


def evaluate_people(
    bench: SimulatedContext, users: Sequence[str], state: Vector, heads: bool
) -> LossesByModel:
    """Compute losses on held-out records as in `run_evaluation.py`, and those of one's own adapter.

    `global` is what somebody without records would get: the cluster with most members, of fedsa A
    without any B. `group` is the own cluster, of fedsa `own_half` A with the own device's B;
    `personal` the same with the head fitted on it.
    """
    mine = "group" if bench.config.clusters.count > 1 else "own_half"
    device = {user: Device(user, bench) for user in users}
    cluster_vectors = exchange_at(bench).cluster_vectors(state)
    everybody = evaluator_of(bench.trainer.adapter, largest_cluster(bench, state))
    losses: dict[str, dict[str, float]] = {}
    for user in users:
        person = everybody.person(*device[user].measured_on(), False)
        if person is not None:
            losses[user] = {
                "base": reported(person, person.base),
                "global": reported(person, person.loss(None)),
            }
    own = dict(zip(losses, choices(bench, list(losses), state), strict=True))
    for user in losses:
        vector = cluster_vectors[own[user]]
        evaluator = evaluator_of(bench.trainer.adapter, vector, local_factor_of(device[user]))
        person = evaluator.person(*device[user].measured_on(), heads)
        if person is not None:
            losses[user][mine] = reported(person, person.loss(None))
        if person is not None and heads:
            losses[user]["personal"] = reported(person, person.loss(person.head))
    names = ("base", "global", mine, *(("personal",) if heads else ()))
    return {"users": list(losses), **{n: [one[n] for one in losses.values()] for n in names}}


def recovered(folder: Path) -> Recovered:
    """How well the private choices of a run fit the true groups, after its last finished round.

    Args:
        folder: of a run with clusters, of a source whose users' names begin with their group.
    """
    return _recovered(SimulatedContext.open(folder.resolve()), state_of(folder))


def _recovered(bench: SimulatedContext, state: Vector) -> Recovered:
    from sklearn.metrics import adjusted_rand_score

    count, train = bench.config.clusters.count, bench.index.train_users
    if count == 1:
        raise ConfigError(
            f"{bench.folder} has one adapter for everybody; name a run with clusters.count > 1"
        )
    chosen = choices(bench, train, state)
    truth = [dialect_of(user) for user in train]
    pairs = Counter(zip(truth, chosen, strict=True))
    table = {name: [pairs[name, index] for index in range(count)] for name in sorted(set(truth))}
    ari = float(adjusted_rand_score(truth, chosen))
    return {"ari": ari, "people": len(train), "choices": table}


def compared(folder: Path, other: Path) -> Compared:
    """Compare a run with clusters to one without, on the same people's later records.

    Args:
        folder: of the run with clusters, of a source whose users' names begin with their group.
        other: of a run with one adapter, of the same people and base model.
    """
    bench, state = SimulatedContext.open(folder.resolve()), state_of(folder)
    fit, train = _recovered(bench, state), bench.index.train_users
    limit = bench.config.evaluation.users
    people = {"seen": train[:limit], "unseen": bench.index.test_users[:limit]}
    grouped = {name: evaluate_people(bench, users, state, False) for name, users in people.items()}
    alone, single = SimulatedContext.open(other.resolve()), state_of(other)
    if alone.config.clusters.count != 1 or alone.index.sha256 != bench.index.sha256:
        raise ConfigError(f"{other} must have clusters.count = 1 and the same people as {folder}")
    shared = {name: evaluate_people(alone, users, single, False) for name, users in people.items()}
    if any(shared[name]["users"] != grouped[name]["users"] for name in people):
        raise StateError("the two runs measured different people; run `privet clusters` again")
    return {
        **fit,
        "unit": unit_of(bench.config),
        "seen": _gains(grouped["seen"], shared["seen"]),
        "unseen": _gains(grouped["unseen"], shared["unseen"]),
    }


def _gains(grouped: LossesByModel, shared: LossesByModel) -> Gains:
    lost = {
        "base": np.array(grouped["base"]),
        "global": np.array(shared["global"]),
        "group": np.array(grouped["group"]),
    }

    def gain(worse: str, better: str) -> Mean:
        return bootstrap_mean((lost[worse] - lost[better]).tolist()).as_dict()

    return {
        "people": len(lost["base"]),
        "losses": {name: float(values.mean()) for name, values in lost.items()},
        "base_minus_global": gain("base", "global"),
        "base_minus_group": gain("base", "group"),
        "global_minus_group": gain("global", "group"),
        "share_better": float(np.mean(lost["group"] < lost["global"])),
    }
