"""Simulated clients a second: privet, pfl-research and Flower's simulation, side by side.

    python -m privet.experiments.benchmarks.simulators --pfl PYTHON [--cohort 64] [--rounds 3]

All do the work of `work.py` on the same cores with one thread a process: a small Llama, LoRA by
PEFT, two local steps of DP-SGD by Opacus, and noise of the server's. They take turns, and the
medians are compared. Flower and pfl run it with what is theirs: their own strategies, data sets and
central mechanisms; privet with its gate, ledgers and integer sums.

PYTHON is an interpreter of an environment of its own, made so; it is given the torch, transformers,
PEFT and Opacus of this environment, so that these are the same for all:

    python3.11 -m venv --without-pip /tmp/pfl
    python3.11 -m pip --python /tmp/pfl install --no-deps pfl==0.6.0 prv_accountant==0.2.0

Its last line has `over_pfl`, against pfl's single process, with which its documentation begins, and
`over_pfl_workers`, against a worker of pfl for each core; `over_flower`, against clients that load
the model when they are asked, as in Flower's FlowerTune, and `over_flower_kept`, against clients
that keep it.
"""

import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from ....common.errors import ConfigError
from ..harness import command
from . import work

HERE = Path(__file__).parent


def measure(
    pfl: str = "", cohort: int = 64, rounds: int = 3, cores: int = 2, turns: int = 3
) -> dict[str, object]:
    """Clients a second of each simulator, and privet's over each of the others'."""
    if pfl and not Path(pfl).is_file():
        raise ConfigError(f"--pfl {pfl}: no such interpreter; see --help for how to make one")
    found: dict[str, list[float]] = {}
    versions = {name: version(name) for name in ("privet", "flwr", "torch", "opacus", "peft")}
    with tempfile.TemporaryDirectory() as place:
        work.save_model(Path(place))
        for _ in range(turns):
            for name, (words, more) in _commands(pfl, cores).items():
                said = _run([*words, place, str(cohort), str(rounds), str(cores), *more])
                found.setdefault(name, []).append(float(str(said["clients_per_s"])))
                if name == "pfl":
                    versions["pfl"] = str(said["version"])
    medians = {name: statistics.median(values) for name, values in found.items()}
    others = [name for name in medians if name != "privet"]
    return {
        "cohort": cohort,
        "cores": cores,
        "clients_per_s": found,
        **{f"over_{name}": medians["privet"] / medians[name] for name in others},
        "versions": versions,
    }


def _commands(pfl: str, cores: int) -> dict[str, tuple[list[str], list[str]]]:
    """Return each simulator's command, before and after model, cohort, rounds and cores."""
    peer, flower = str(HERE / "pfl_peer.py"), [sys.executable, str(HERE / "flower_peer.py")]
    workers = ["-m", "torch.distributed.run", "--nproc_per_node", str(cores)]
    found = {"privet": ([sys.executable, "-m", f"{__package__}.privet_peer"], list[str]())}
    if pfl:
        found |= {"pfl": ([pfl, peer], []), "pfl_workers": ([pfl, *workers, peer], [])}
    return found | {"flower": (flower, []), "flower_kept": (flower, ["kept"])}


def _run(words: Sequence[str]) -> Mapping[str, object]:
    """Run a simulator to its end, and return what its last line says."""
    places = [sysconfig.get_paths()["purelib"], str(HERE)]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(places),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "FLWR_TELEMETRY_ENABLED": "0",
    }
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"clients_per_s"')]
    if done.returncode or not lines:
        raise ConfigError(f"{' '.join(words)} failed:\n{done.stderr[-2000:]}")
    said: Mapping[str, object] = json.loads(lines[-1])
    return said


if __name__ == "__main__":
    command(measure)
