"""Who is measured, whose head the control takes, and the unit of a person's loss in reports.

A run's evaluation, a scenario and the cold start all take these from here, so that they print the
same figure for the same thing.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from ...client.personal.evaluator import EvaluatedPerson
from ...client.personal.text_evaluator import TextPerson
from ...client.simulated import SimulatedContext
from ...client.training.records import Index
from ...common.settings.config import Config
from .metrics import bits_per_byte

__all__ = ["drawn", "partner", "reported", "unit_of"]


def drawn(users: Iterable[str], bench: SimulatedContext, seed: int | None = None) -> list[str]:
    """Draw `evaluation.users` of the users by public seed, whole groups where there are groups.

    Args:
        users: to draw from.
        bench: the run, with its settings.
        seed: another one than the run's `data.seed`.
    """
    users, blocks = list(users), bench.index.blocks
    rng = np.random.default_rng(bench.config.data.seed if seed is None else seed)
    groups = [blocks[user].group or user for user in users]
    rank = {group: i for i, group in enumerate(rng.permutation(sorted(set(groups))))}
    order = sorted(range(len(users)), key=lambda i: (rank[groups[i]], i))
    return [users[i] for i in order[: bench.config.evaluation.users]]


def partner(index: Index, users: Sequence[str], number: int) -> str:
    """Return the next other person, of the same group where somebody is.

    There must be another person.
    """
    group = index.blocks[users[number]].group
    following = [users[(number + step) % len(users)] for step in range(1, len(users))]
    same = [user for user in following if index.blocks[user].group == group]
    return (same or following)[0]


def reported(person: EvaluatedPerson, loss: float) -> float:
    """Return a person's loss in the unit of reports (`unit_of`).

    A text whose scored tokens have no bytes counts as one byte.
    """
    if not isinstance(person, TextPerson):
        return loss
    return bits_per_byte(loss * sum(person.text.counts()), max(1, sum(person.bytes)))


def unit_of(config: Config) -> str:
    """Return the unit of losses in reports."""
    if config.pairs is not None:
        return "share of pairs in the wrong order"
    if config.outputs == 0:
        return "bits per byte"
    return "nats per record" if config.data.task == "classification" else "squared error"
