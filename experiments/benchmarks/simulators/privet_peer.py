"""privet's simulation of the work: see `__main__.py`.

python -m privet.experiments.benchmarks.simulators.privet_peer MODEL COHORT ROUNDS PROCESSES
"""

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from ....common.settings.config import Config, parse
from ....server.round_record import read_records
from ... import engine, simulate
from . import work


def config_of(model: Path, people: Path, cohort: int, rounds: int, processes: int) -> Config:
    """Return the work as privet's settings."""
    return parse(
        {
            "name": "simulators",
            "data": {
                "source": str(people),
                "clients": cohort,
                "test_clients": 0,
                "records_per_client": work.RECORDS,
                "max_tokens": work.TOKENS,
                "task": "generation",
            },
            "model": {"base": str(model)},
            "adapter": {
                "family": "lora",
                "rank": work.RANK,
                "last_blocks": work.BLOCKS,
                "modules": list(work.MODULES),
            },
            "training": {"batch_size": work.BATCH, "steps": work.STEPS},
            "rounds": {"count": rounds, "cohort": cohort},
            "privacy": {
                "client": {"noise_at": "server", "noise_multiplier": 1.0},
                "budget": {"client": 1e6, "example": 1e6},
            },
            "speed": {"threads": 1, "processes": processes, "together": 16},
        }
    )


def main(model: Path, cohort: int, rounds: int, processes: int) -> None:
    """Run the rounds; the first, in which the model is loaded, is not timed."""
    with tempfile.TemporaryDirectory() as place:
        people = Path(place) / "people.jsonl"
        with people.open("w") as out:
            for client in range(cohort):
                for ids in work.records_of(client, 3 * work.RECORDS // 2):
                    text = " ".join(f"w{number}" for number in ids)
                    out.write(json.dumps({"user": str(client), "text": text}) + "\n")
        config = config_of(model, people, cohort, rounds + 1, processes)
        folder = Path(place) / "run"
        config = simulate.prepare(config, folder, resume=False)
        engine.run("local", folder, config)
        seconds = sum(float(record["seconds"]) for record in read_records(folder)[1:])
    work.said(clients_per_s=cohort * rounds / seconds, version=version("privet"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:5]))
