"""How well private choices find three made dialects: adjusted Rand index, seed by seed.

    python -m privet.experiments.benchmarks.cluster_recovery --seeds 21,22,23 [--set
    clusters.extra=0]

Each seed is a run of `privet simulate groups` with that `data.seed`, up to its last round: other
people, other cohorts, other noise. What the clusters are worth is measured by `privet clusters`.
A run that is there in `--runs` goes on, so an interrupted command is given again.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...common.settings import config as settings
from .. import engine
from ..evaluation import cluster_evaluation
from ..progress import say
from ..reports.privacy_facts import privacy_facts
from ..simulate import prepare

CONFIG = Path(__file__).parent.parent / "configs" / "groups.toml"
FLOOR = 0.8


def main() -> None:
    """Print a line for each seed, then how many reach the floor."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seeds", type=_seeds, default=(21, 22, 23, 24, 25, 26))
    options.add_argument("--runs", type=Path, default=Path("runs"))
    options.add_argument("--set", dest="settings", action="append", default=[])
    given = options.parse_args()
    found = []
    for seed in given.seeds:
        found.append(recovered(seed, given.runs, given.settings))
        print(json.dumps({"seed": seed, **found[-1]}), flush=True)
    reached = sum(one["ari"] >= FLOOR for one in found)
    print(f"{reached} of {len(found)} seeds reach {FLOOR}")


def recovered(seed: int, runs: Path, changed: Sequence[str]) -> dict[str, Any]:
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


def _seeds(text: str) -> tuple[int, ...]:
    return tuple(int(one) for one in text.split(","))


if __name__ == "__main__":
    main()
