"""What people got: everybody's loss under four models, from the simulated devices' own files.

The experimenter reads this off the simulated devices; nothing of it passes the server, and no
epsilon covers it. On a real device the same functions run and the figures stay there.

    base          the base model, no adapter (labels: every prediction 0)
    global        the shared adapter of the run
    personal      the shared adapter and the head fitted on the person's own earlier records
    group         of several clusters the own one; global is then the one with most members
    own_half      fedsa: the shared A with the B of the own device; global is then A without B
    swapped_head  the shared adapter and somebody else's head: the gain must be lost

*seen* people took part in training and are measured on later records; *unseen* people were never
trained on. Both fit their head on their own earlier records. Where people come in groups (raters
of one batch), the other head is that of somebody of the same group, fitted on the same items.
A scenario of the same run (`experiments/comparison`) has the same people, records and unit, and so
the same figures for base, shared and personal head; texts are in bits per byte.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ...client.device import Device
from ...client.personal.evaluator import EvaluatedPerson, Evaluator
from ...client.personal.person_losses import evaluator_of
from ...client.simulated import SimulatedContext
from ...common.model.adapter import Vector
from ...common.settings.config import Config
from .. import progress
from . import cluster_evaluation
from .people import drawn, partner, reported, unit_of

__all__ = ["evaluate", "global_adapter"]

LossesByModel = dict[str, list[Any]]

MODELS = ("base", "global", "personal", "swapped_head")


def evaluate(folder: Path, config: Config) -> dict[str, Any]:
    """Losses per person: `{"name", "unit", "metrics_of", "seen": {...}, "unseen": {...}}`.

    Each group has the lists `users`, `base`, `global`, `personal` and `swapped_head`, aligned;
    lower is better. Everybody's loss is the mean over their own held-out tokens or records.
    """
    bench = replace(SimulatedContext.open(folder.resolve()), config=config)
    several = config.clusters.count > 1 or bool(bench.trainer.adapter.local_factor.pieces)
    final = None if several else global_adapter(folder)
    took_part = [u for u in bench.index.train_users if bench.ledger.participations(u)]
    groups = {
        "seen": drawn(took_part, bench),
        "unseen": drawn(bench.index.test_users, bench),
    }
    with progress.counting("measuring", sum(map(len, groups.values())), "people") as one:
        if final is None:
            state = cluster_evaluation.state_of(folder)
            found = {
                name: cluster_evaluation.evaluate_people(
                    bench, users, state, _heads_for(config, name)
                )
                for name, users in groups.items()
            }
        else:
            evaluator = evaluator_of(bench.trainer.adapter, final, pairs=config.pairs)
            people = {
                name: _people(evaluator, bench, users, _heads_for(config, name), one)
                for name, users in groups.items()
            }
            found = {
                name: _losses(bench, known, _heads_for(config, name))
                for name, known in people.items()
            }
    described: dict[str, Any] = {"name": unit_of(config), "unit": "a loss: lower is better"}
    if config.pairs is not None:
        described["more"] = _of_pairs(bench, people, found)
    return {**described, "metrics_of": config.evaluation.metrics_of, **found}


def _of_pairs(
    bench: SimulatedContext,
    people: dict[str, dict[str, EvaluatedPerson]],
    found: dict[str, LossesByModel],
) -> list[Any]:
    """Add the losses of oracle or crowd (`pair_evaluation.BEST`) to `found`.

    Returns length bias and gap as rows.
    """
    from ...client.personal.pair_evaluator import PairPerson
    from . import pair_evaluation

    rows = []
    for group, everybody in people.items():
        known = {name: one for name, one in everybody.items() if isinstance(one, PairPerson)}
        names = list(known)
        best = pair_evaluation.BEST.get(bench.config.data.source)
        if best:
            found[group][best] = pair_evaluation.best_losses(bench, names)
        if names:
            other = partial(partner, bench.index, names)
            rows += pair_evaluation.rows(bench, group, known, found[group], other)
    return rows


def global_adapter(folder: Path) -> Vector:
    """The shared adapter after the last finished round of the run in `folder`.

    Of several clusters the one with most members: what somebody without records would get.

    Raises:
        StateError: no round was finished.
    """
    return cluster_evaluation.largest_cluster(
        SimulatedContext.open(folder.resolve()), cluster_evaluation.state_of(folder)
    )


def _heads_for(config: Config, group: str) -> bool:
    """Return whether heads are evaluated for this group of people.

    Heads for texts cost as much as all the rest, so only the group that is asked about has them.
    """
    return config.head.enabled and (config.outputs > 0 or group == config.evaluation.metrics_of)


def _people(
    evaluator: Evaluator,
    bench: SimulatedContext,
    users: Sequence[str],
    heads: bool,
    counted: Callable[[], None],
) -> dict[str, EvaluatedPerson]:
    """Prepare the evaluation of everybody with held-out records.

    `counted` is called after each of the users.
    """
    people = {}
    for user in users:
        person = evaluator.person(*Device(user, bench).measured_on(), heads)
        if person is not None:
            people[user] = person
        counted()
    return people


def _losses(
    bench: SimulatedContext, people: dict[str, EvaluatedPerson], heads: bool
) -> LossesByModel:
    """Compute everybody's losses under each model."""
    names = list(people)
    models = (MODELS if len(names) > 1 else MODELS[:3]) if heads else MODELS[:2]
    losses: LossesByModel = {name: [] for name in ("users", *models)}
    for number, (user, person) in enumerate(people.items()):
        losses["users"].append(user)
        losses["base"].append(reported(person, person.base))
        losses["global"].append(reported(person, person.loss(None)))
        if not heads:
            continue
        losses["personal"].append(reported(person, person.loss(person.head)))
        if "swapped_head" in models:
            other = people[partner(bench.index, names, number)]
            losses["swapped_head"].append(reported(person, person.loss(other.head)))
    return losses
