"""The looks of an A/B experiment on devices: announce, sum, tell. Nothing is trained.

A look is a round without a model: same wire, same masks, same counting (`server/rounds.py`).

**Guarantee**: as of `run_rounds`: what is stored or shown is a function of the noised sum and of
who answered. A look that a crash cut short is asked again, of those who had not answered it: nobody
releases a look twice, and a sum that too few are in is not opened.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..common.ab import layout
from ..common.config import Config, TrialSettings
from ..common.files import append_line, read_lines
from . import ab
from .cohort import draw
from .rounds import LOG, Ask, Present, Show, Vector, summed

__all__ = ["DUE", "run_looks"]

DUE = "due.jsonl"
GREET_S = 30.0
"""Between two greetings of those who have not agreed yet, while a look is waited for."""


def run_looks(
    ask: Ask,
    config: Config,
    trial: TrialSettings,
    run: str,
    folder: Path,
    show: Show,
    present: Present,
    greet: Callable[[], object],
) -> Vector:
    """All looks that are still missing in `folder`.

    Args:
        ask, config, run, folder, show, present: as of `run_rounds`.
        trial: the experiment.
        greet: says hello to who has not agreed yet: an arm is in use from the owner's yes.

    Returns:
        What devices are told at the end: zeros, for there is no adapter.
    """
    start = np.zeros(layout(trial).dimension, np.float32)
    for look in range(len(read_lines(folder / LOG)) + 1, trial.looks + 1):
        if trial.stop and _found(folder):
            break
        _wait(folder, look, trial.hours, greet)
        there, began = present(), time.perf_counter()
        drawn = draw(len(there), min(config.rounds.cohort, len(there)), look, config.data.seed)
        cohort = [there[place] for place in drawn]
        plan = ab.plan_of(config, trial, run, look)
        total, record, phases = summed(ask, config, cohort, plan, start, folder, len(start))
        if total is not None:
            record["look"] = ab.told(ab.sums_of(total, plan), plan, record["answered"], trial)
        record |= {"seconds": time.perf_counter() - began, "phases": phases}
        append_line(folder / LOG, record)
        show(record)
    return start


def _found(folder: Path) -> bool:
    """Whether a look has found a difference."""
    told: list[Mapping[str, Any]] = [
        one["look"] for one in read_lines(folder / LOG) if "look" in one
    ]
    return any(each["found"] for look in told for each in look["differences"])


def _wait(folder: Path, look: int, hours: float, greet: Callable[[], object]) -> None:
    """Until it is time for a look; a server that was started again waits for what is left."""
    if not hours:
        return
    due = next((one["time"] for one in read_lines(folder / DUE) if one["look"] == look), None)
    if due is None:
        due = time.time() + 3600 * hours
        append_line(folder / DUE, {"look": look, "time": due})
    while (left := due - time.time()) > 0:
        greet()
        time.sleep(min(left, GREET_S))
