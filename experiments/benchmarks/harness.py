"""What the benchmarks share: options, clocks, other programs, and one JSON object at the end."""

import json
import os
import signal
import socket
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import IO, ParamSpec

import psutil
import typer
from rich.pretty import pprint

__all__ = [
    "Clock",
    "Program",
    "command",
    "listening",
    "median_s",
    "process_memory_mb",
    "processor_s",
    "program",
    "seconds",
    "wait_for",
]


P = ParamSpec("P")


def command(measure: Callable[P, Mapping[str, object]]) -> None:
    """Run a benchmark, whose parameters are the options of its command line.

    Its figures are shown for a reader, and are the last line as one JSON object.
    """

    @wraps(measure)
    def run(*given: P.args, **named: P.kwargs) -> None:
        figures = measure(*given, **named)
        pprint(figures, expand_all=True)
        print(json.dumps(figures))

    typer.run(run)


def seconds(
    work: Callable[[], object], times: int, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Time some work again and again, after a first time that does not count."""
    work()
    found = []
    for _ in range(times):
        began = clock()
        work()
        found.append(clock() - began)
    return found


def median_s(
    work: Callable[[], object], times: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Return the median of `seconds`."""
    return statistics.median(seconds(work, times, clock))


@dataclass
class Clock:
    """Processor seconds of this process, by name.

    Other processes on the machine do not count.
    """

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the block's seconds to those of a name."""
        began = time.process_time()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - began


# --- other programs ------------------------------------------------------------------------------


@dataclass
class Program:
    """A started program and its lines, each with the second it was read."""

    process: "subprocess.Popen[str]"
    lines: list[tuple[float, str]] = field(default_factory=list)

    def times(self, words: str) -> list[float]:
        """When lines with these words came."""
        return [when for when, line in list(self.lines) if words in line]

    def wait_for(self, words: str, timeout_s: float) -> None:
        """Wait until the program has printed a line with these words.

        The TimeoutError names them.
        """
        wait_for(lambda: self.times(words), timeout_s, repr(words))


@contextmanager
def program(command: list[str], env: Mapping[str, str]) -> Iterator[Program]:
    """Starts a program in a group of its own, reads its lines, ends the whole group."""
    process = subprocess.Popen(
        command,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    running = Program(process)
    assert process.stdout is not None
    reader = threading.Thread(target=_read, args=(process.stdout, running.lines), daemon=True)
    reader.start()
    try:
        yield running
    finally:
        process.terminate()
        try:
            process.wait(8)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it started itself
        reader.join(5)
        process.stdout.close()


def _read(stream: IO[str], lines: list[tuple[float, str]]) -> None:
    for line in stream:
        lines.append((time.time(), line))


def wait_for(condition: Callable[[], object], timeout_s: float, what: str) -> None:
    """Wait until the condition holds. The TimeoutError names what was waited for."""
    until = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError(f"waited {timeout_s:.0f} s for {what}")
        time.sleep(0.02)


def listening(address: str) -> bool:
    """Return whether something listens at this address."""
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def processor_s(pid: int) -> float:
    """Return the processor seconds that a process has used so far, in all its threads.

    It is 0 for one that is gone.
    """
    with suppress(psutil.NoSuchProcess):
        return float(sum(psutil.Process(pid).cpu_times()[:2]))
    return 0.0


def process_memory_mb(pid: int) -> dict[str, float]:
    """Memory of a process, MB (2**20 bytes): resident, proportional, and the most so far."""
    now = psutil.Process(pid).memory_full_info()
    status = Path(f"/proc/{pid}/status").read_text()  # psutil does not say the most
    most = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    return {"rss": now.rss / 2**20, "pss": now.pss / 2**20, "most": int(most) / 1024}
