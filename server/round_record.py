"""The record of a round, or of a look at an A/B test: a line of `rounds.jsonl`.

A record is made by `server/rounds.py` and `server/ab_rounds.py`, and read by whoever shows a run,
goes on with it, or reports on it. It has only what the server may know: sums with their noise, and
what it saw of the wire.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict, cast

from ..common.files import read_lines

__all__ = [
    "LOG",
    "ArmEstimate",
    "Counts",
    "Difference",
    "Estimates",
    "Missing",
    "RoundRecord",
    "Who",
    "read_records",
]

LOG = "rounds.jsonl"


class Counts(TypedDict):
    """How many clients answered, declined, and sent bytes that do not fit."""

    answered: int
    declined: int
    refused: int


class Who(TypedDict):
    """The numbers of the clients that were asked, and of those whose answers are in the sum."""

    asked: list[int]
    came: list[int]


class Missing(TypedDict):
    """The clients whose answers are missing: by phase, or with the reason by number."""

    declined: dict[str, list[int]]
    silent: dict[str, list[int]]
    refused: dict[str, str]


class ArmEstimate(TypedDict):
    """What a look says of one arm. None where the noise leaves nothing to say."""

    arm: str
    mean: float | None
    error: float | None
    interval: list[float] | None
    devices: float
    devices_std: float


class Difference(TypedDict):
    """What a look says of two arms; `found`: whether the interval excludes 0."""

    arm: str
    against: str
    difference: float | None
    error: float | None
    interval: list[float] | None
    found: bool


class Estimates(TypedDict):
    """What a look at an A/B test says; `level`: of its intervals."""

    look: int
    answered: int
    level: float
    arms: list[ArmEstimate]
    differences: list[Difference]


class RoundRecord(TypedDict, total=False):
    """One attempt at a round. Always there: `round` to `phases` (those of an old run: to `void`).

    Attributes:
        round: its number.
        asked, answered, declined, refused: counts of clients.
        void: whether too few answered.
        who, phases: which clients; the seconds of each phase.
        needed, missing, spent, again, attempt, wait_s: of a void attempt: answers needed, who is
            missing, whether somebody may have released, whether its number is asked again, how
            many in a row were void, seconds until the next.
        mean_norm, update_norm, statistics, members, split, merged: of a round of training.
        look: of an A/B test.
        seconds: how long it took.
        why: a sentence in place of the facts, where another program shows the record.
    """

    round: int
    asked: int
    answered: int
    declined: int
    refused: int
    void: bool
    who: Who
    phases: dict[str, float]
    needed: int
    missing: Missing
    spent: bool
    again: bool
    attempt: int
    wait_s: float
    mean_norm: float
    update_norm: float
    statistics: Mapping[str, float | None]
    members: list[float]
    split: int
    merged: list[int]
    look: Estimates
    seconds: float
    why: str


def read_records(folder: str | os.PathLike[str]) -> list[RoundRecord]:
    """Return the records in a run's folder, oldest first; none where there is no round yet."""
    return cast(list[RoundRecord], read_lines(Path(folder) / LOG))
