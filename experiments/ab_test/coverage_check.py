"""Does an A/B experiment keep its word? The same experiment many times, with and without an effect.

    power      how often the made difference is found, at any look
    null       how often a difference is called where there is none: all arms as the first
    coverage   how often the last look's interval holds the made difference; all looks' at once
    uncorrected   null calls if every look used the whole alpha: what peeking would do

The devices' part is vectorised: the gate's own rounding and its own noise on all contributions of a
look at once (`tests/server/test_ab_estimates.py` holds the sum against the gate's, bit for bit).
Arms are drawn by the devices' keyed hash. What a repetition costs is read from the ledgers of one
run through the gate.
"""

import dataclasses
import secrets
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...client.ab_arm import arm_of
from ...client.ab_outcome import outcome_vector
from ...common.ab_test import AbTestSettings
from ...common.errors import ConfigError
from ...common.privacy import noise
from ...common.privacy.encoding import round_randomly, wrap
from ...common.privacy.round_plan import Plan
from ...common.secure_aggregation.keys import Secret
from ...server.ab_estimates import estimated, look_plan, sums_of
from .. import progress
from . import simulated_ab_test

__all__ = ["check", "contributions", "summed"]


def summed(vectors: NDArray[np.float64], plan: Plan, source: noise.Source) -> NDArray[np.uint32]:
    """Sum contributions within the clip mod 2**bits, each with its share of the noise.

    Args:
        vectors: shape (devices, d), none longer than the clip.
        plan: of the look; not rotated.
        source: the words of all devices.
    """
    if plan.rotated or np.linalg.norm(vectors, axis=1).max(initial=0) > plan.clip * (1 + 1e-9):
        raise ConfigError("a look that is rotated, or a contribution above its clip: not this way")
    integers = round_randomly(vectors.ravel(), plan.step, source.words)
    integers += plan.mechanism.sample(plan.variance, len(integers), source)
    return wrap(integers.reshape(vectors.shape).sum(axis=0), plan.bits)


def contributions(
    settings: AbTestSettings, arms: NDArray[np.int64], outcomes: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Compute everybody's `outcome_vector`, shape (devices, d).

    NaN stands for no outcome.
    """
    rows = [
        outcome_vector(settings, int(arm), None if np.isnan(outcome) else float(outcome))
        for arm, outcome in zip(arms, outcomes, strict=True)
    ]
    return np.array(rows, dtype=np.float64)


def check(settings: AbTestSettings, repetitions: int, folder: Path) -> dict[str, Any]:
    """Run the experiment `repetitions` times with its made truth, and as often without any effect.

    Args:
        settings: the experiment.
        repetitions: of each kind, at least 1.
        folder: where the one run through the gate goes.
    """
    if repetitions < 1:
        raise ConfigError(f"--check {repetitions}: expected at least 1 repetition")
    through_the_gate = simulated_ab_test.run(settings, folder)
    null = settings.model_copy(
        update={
            "simulated": settings.simulated.model_copy(
                update={"means": settings.simulated.means[:1] * len(settings.arms)}
            )
        }
    )
    keys = [Secret(secrets.token_bytes(32)) for _ in range(settings.clients)]
    rng = np.random.default_rng()
    tally = _Tally()
    with progress.counting("repetitions", 2 * repetitions, "experiments") as one:
        for number in range(repetitions):
            for truth in (settings, null):
                tally.add(truth is null, _repetition(truth, f"{number}", keys, rng), truth)
                one()
    return {
        "repetitions": repetitions,
        **dataclasses.asdict(tally),
        "privacy": through_the_gate["privacy"],
        "run": str(folder),
    }


@dataclasses.dataclass
class _Tally:
    """Counts of repetitions, by what they found and which intervals held."""

    found: int = 0
    null_called: int = 0
    null_called_uncorrected: int = 0
    covered_last: int = 0
    covered_at_every_look: int = 0
    null_covered_last: int = 0

    def add(self, null: bool, looks: list[dict[str, Any]], settings: AbTestSettings) -> None:
        truth = [mean - settings.simulated.means[0] for mean in settings.simulated.means[1:]]
        covered = [
            all(
                one["interval"] is None or one["interval"][0] <= true <= one["interval"][1]
                for one, true in zip(look["differences"], truth, strict=True)
            )
            for look in looks
        ]
        called = any(one["found"] for look in looks for one in look["differences"])
        if null:
            self.null_called += called
            self.null_called_uncorrected += any(look["uncorrected"] for look in looks)
            self.null_covered_last += covered[-1]
        else:
            self.found += called
            self.covered_last += covered[-1]
            self.covered_at_every_look += all(covered)


def _repetition(
    settings: AbTestSettings, run_id: str, keys: list[Secret], rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Run all planned looks of one experiment.

    Each look also says what the whole alpha would have called.
    """
    run_id = f"{run_id} {secrets.token_hex(4)}"
    arms = np.array([arm_of(key, run_id, len(settings.arms)) for key in keys])
    everybody = simulated_ab_test.outcomes(settings, arms, rng)
    vectors = contributions(settings, arms, everybody)
    since = 1 + np.arange(settings.clients) * settings.looks // settings.clients
    plan = look_plan(settings, settings.name, 1)
    looks: list[dict[str, Any]] = []
    for look in range(1, settings.looks + 1):
        there = rng.random(settings.clients) >= settings.simulated.dropout
        now = np.where((since <= look)[:, None], vectors, 0.0)[there]
        plan = dataclasses.replace(plan, round=look)
        sums = sums_of(summed(now, plan, noise.SystemSource()), plan)
        record = estimated(sums, plan, len(now), settings)
        peeked = estimated(sums, plan, len(now), settings, settings.alpha)
        uncorrected = any(one["found"] for one in peeked["differences"])
        looks.append({**record, "uncorrected": uncorrected})
    return looks
