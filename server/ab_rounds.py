"""The looks of an A/B experiment on devices: announce, sum, tell. Nothing is trained.

A look is a round without a model: same wire, same masks, same counting (`server/rounds.py`).

**Guarantee**: as of `run_rounds`: what is stored or shown is a function of the noised sum and of
who answered. A look that a crash cut short is asked again, of those who had not answered it: nobody
releases a look twice, and a sum that too few are in is not opened.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..common.ab_test import layout
from ..common.files import append_line, read_lines
from ..common.settings.sections import AbRunSettings
from . import ab_estimates, void_rounds
from .round_record import LOG, read_records
from .rounds import ServedRun, Vector, ask_again, attempt, begun_before, wait_or_end

__all__ = ["DUE", "run_looks"]

DUE = "due.jsonl"
GREET_S = 30.0
"""Between two greetings of those who have not agreed yet, while a look is waited for."""


def run_looks(run: ServedRun, ab_run: AbRunSettings) -> Vector:
    """All looks that are still missing in the run's folder.

    Who has not agreed yet is greeted while a look is waited for: an arm is in use from the owner's
    yes.

    Returns:
        What devices are told at the end: zeros, for there is no adapter.

    Raises:
        RunUnfinished: `rounds.patience` attempts in a row were void.
    """
    config, folder = run.config, run.folder
    start = np.zeros(layout(ab_run).dimension, np.float32)
    voids, unsure = 0, begun_before(folder)
    while (look := void_rounds.trained(records := read_records(folder)) + 1) <= ab_run.looks:
        if ab_run.stop and _difference_found(folder):
            break
        _wait(folder, look, ab_run.hours, run.greet)
        there, began = run.present(), time.perf_counter()
        # a void look is none; where somebody may have released in it, its number is used up
        number = 1 + max(
            (record["round"] for record in records if not record.get("again")), default=0
        )
        plan = ab_estimates.plan_of(config, ab_run, run.id, number)
        total, record = attempt(run, there, plan, start, len(start), number == unsure)
        voids = 0 if total is not None else voids + 1
        if total is None:
            record |= ask_again(config, voids)
        else:
            shown = dataclasses.replace(plan, round=look)
            record["look"] = ab_estimates.estimated(
                ab_estimates.sums_of(total, plan), shown, record["answered"], ab_run
            )
        record["seconds"] = time.perf_counter() - began
        append_line(folder / LOG, record)
        run.show(record)
        wait_or_end(config, record, folder)
    return start


def _difference_found(folder: Path) -> bool:
    """Whether a look has found a difference."""
    looks = [record["look"] for record in read_records(folder) if "look" in record]
    return any(each["found"] for look in looks for each in look["differences"])


def _wait(folder: Path, look: int, hours: float, greet: Callable[[], object]) -> None:
    """Wait until it is time for a look.

    A server that was started again waits for what is left.

    What is left is read off the wall clock once: one that jumps meanwhile moves no look.
    """
    if not hours:
        return
    left = pause_s = 3600 * hours
    due = next((entry["time"] for entry in read_lines(folder / DUE) if entry["look"] == look), None)
    if due is None:
        append_line(folder / DUE, {"look": look, "time": time.time() + pause_s})
    else:
        left = min(due - time.time(), pause_s)
    until = time.monotonic() + left
    while (left := until - time.monotonic()) > 0:
        greet()
        time.sleep(min(left, GREET_S))
