"""Seconds a masked round of a simulated run takes, by phase, and the memory it needs.

    python -m privet.experiments.benchmarks.masking [--cohort 1000] [--people 49000]
    python -m privet.experiments.benchmarks.masking --against e007bb9      # the same, by both

Real rounds through `experiments/engine.py`, in which training a device costs nothing
(`simulated_round.py`). `--against` runs the same file under the code of another commit, taken
from this clone, between this code with one process and with two, and gives the ratios. Everything
computes with one thread a process. Seconds by the clock count what else the machine does; those of
the processor less.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import privet

from ..harness import command
from .simulated_round import Measured

SCRIPT = Path(__file__).with_name("simulated_round.py")
HERE = Path(privet.__path__[0])
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "TOKENIZERS_PARALLELISM": "false"}
LIBRARIES = ("cryptography", "flwr", "numpy", "torch")


def main(
    cohort: int = 1000,
    people: int = 49_000,
    rounds: int = 1,
    processes: str = "1,2",
    against: str = "",
) -> dict[str, object]:
    """Measure masked rounds.

    Args:
        cohort: devices in a round.
        people: devices in the run, all of which are greeted before its first round.
        rounds: of a run.
        processes: values of `speed.processes`, one after the other.
        against: a commit to be measured in the same run, with one process; empty: none.
    """
    work = {"cohort": cohort, "people": people, "rounds": rounds}
    figures: dict[str, object] = {
        **work,
        "commit": _commit(),
        "versions": {"python": sys.version.split()[0], **{one: version(one) for one in LIBRARIES}},
    }
    counts = [int(one) for one in processes.split(",")]
    own = {n: _run(None, {**work, "processes": n}) for n in counts[:1]}
    with _package(against) as package:
        other = None if package is None else _run(package, {**work, "processes": 1})
    own |= {n: _run(None, {**work, "processes": n}) for n in counts[1:]}
    figures |= {"runs": {str(n): run for n, run in own.items()}}
    if other is not None:
        figures |= {"against": {"commit": against, **other}}
        for name in ("seconds_per_round", "processor_s_per_round", "peak_mb"):
            figures[f"{name}, over"] = {str(n): run[name] / other[name] for n, run in own.items()}
    figures |= {"seconds_per_round": {str(n): run["seconds_per_round"] for n, run in own.items()}}
    return figures


@contextmanager
def _package(commit: str) -> Iterator[Path | None]:
    """Yield a folder whose `privet` is the code of another commit; None where none is asked for."""
    if not commit:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder) / "privet"
        _git("worktree", "add", "--quiet", "--detach", str(code), commit)
        try:
            yield Path(folder)
        finally:
            _git("worktree", "remove", "--force", str(code))


def _git(*words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(HERE), *words], check=True, text=True, stdout=subprocess.PIPE
    )
    return done.stdout.strip()


def _commit() -> str:
    """Return the commit of this code, with a plus where it was changed since."""
    return _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain") else "")


def _run(package: Path | None, work: Mapping[str, int]) -> Measured:
    """Run `simulated_round.py`, with the `privet` in a folder where one is given."""
    env = {**os.environ, **ONE_THREAD, **QUIET}
    if package is not None:
        env["PYTHONPATH"] = str(package)
    line = [sys.executable, "-P", str(SCRIPT), json.dumps(dict(work))]
    done = subprocess.run(line, env=env, check=True, text=True, stdout=subprocess.PIPE)
    measured: Measured = json.loads(done.stdout.splitlines()[-1])
    return measured


if __name__ == "__main__":
    command(main)
