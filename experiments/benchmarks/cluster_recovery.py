"""How well private choices find three made dialects: adjusted Rand index, seed by seed.

    python -m privet.experiments.benchmarks.cluster_recovery --seeds 21,22,23 [--set
    clusters.extra=0]

Each seed is a run of `privet simulate groups` with that `data.seed`, up to its last round: other
people, other cohorts, other noise. What the clusters are worth is measured by `privet clusters`.
A run that is there in `--runs` goes on, so an interrupted command is given again.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ...common.settings import config as settings
from .. import engine
from ..evaluation import cluster_evaluation
from ..progress import say
from ..reports.privacy_facts import privacy_facts
from ..simulate import prepare
from .harness import command

CONFIG = Path(__file__).parent.parent / "configs" / "groups.toml"
FLOOR = 0.8


class RecoveredRun(cluster_evaluation.Recovered):
    """How well one run's choices fit the dialects, and the worst client's epsilon."""

    epsilon: float


def measure(
    seeds: str = "21,22,23,24,25,26",
    runs: Path = Path("runs"),
    settings_: Annotated[list[str] | None, typer.Option("--set")] = None,
) -> dict[str, object]:
    """Every seed's index, and how many of them reach the floor."""
    rows: dict[str, RecoveredRun] = {}
    for seed in map(int, seeds.split(",")):
        rows[str(seed)] = recovered(seed, runs, settings_ or [])
        print(json.dumps({"seed": seed, **rows[str(seed)]}), flush=True)
    reached = sum(row["ari"] >= FLOOR for row in rows.values())
    return {"seeds": rows, "floor": FLOOR, "reach the floor": reached}


def recovered(seed: int, runs: Path, changed: Sequence[str]) -> RecoveredRun:
    """Run one experiment to its end, and compare its choices with the dialects.

    Returns its index, the choices by dialect and the worst client's epsilon.
    """
    name = f"groups-{seed}"
    wanted = settings.read(CONFIG, [f"data.seed={seed}", f"name={name}", *changed])
    folder = runs / name
    resolved = prepare(wanted, folder, resume=True)
    say(f"{folder}: {resolved.rounds.count} rounds of {resolved.rounds.cohort}")
    engine.run("local", folder, resolved)
    worst = max(line["epsilon"] for line in privacy_facts(folder)["lines"])
    return {**cluster_evaluation.recovered(folder), "epsilon": round(worst, 2)}


if __name__ == "__main__":
    command(measure)
