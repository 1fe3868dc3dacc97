"""Programs that one command starts and surely ends: a server and devices on this machine.

**Guarantee**: what `Processes` started, and everything that those started, is dead when its block
is left, whatever ended it; on Linux also when this process is killed.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from ...common.errors import StateError
from ...common.files import explain_os_errors, owners_own

__all__ = ["ENTRY", "Processes", "below", "call", "memory_mb", "privet", "stopped_by_signals"]

ENTRY = "from privet.commands import main; main()"
"""What the command `privet` calls."""
GRACE_S = 25.0  # a SuperNode is given 1.5 s for its last replies, a worker finishes its message
PR_SET_PDEATHSIG = 1


def privet(*words: str | Path) -> list[str]:
    """Return the command line of `privet WORDS`, with this Python, wherever it is installed."""
    return [sys.executable, "-P", "-c", ENTRY, *map(str, words)]


def call(*words: str | Path, environment: Mapping[str, str] | None = None) -> str:
    """Run `privet WORDS`, and return what it prints.

    Raises:
        StateError: it failed; in its own words.
    """
    done = subprocess.run(
        privet(*words),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **(environment or {})},
    )
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise StateError(f"privet {' '.join(map(str, words[:2]))}: {said.removeprefix('privet: ')}")
    return done.stdout


class Processes:
    """Long-lived programs, each with a log `LOGS/NAME.log`.

    Use it as a context.
    """

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        with explain_os_errors(logs, "make the folder"):
            logs.mkdir(mode=0o700, parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()

    def log(self, name: str) -> Path:
        """Where a program's output goes."""
        return self._logs / f"{name}.log"

    def start(self, name: str, command: list[str]) -> None:
        """Start a program, from the main thread.

        It is not started again when it ends.
        """
        path = self.log(name)
        with explain_os_errors(path, "write"), open(path, "ab", opener=owners_own) as log:
            self._running[name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
                umask=0o077,
                start_new_session=True,  # Ctrl-C is for this process, which ends them in order
                preexec_fn=_ended_with(os.getpid()),
            )

    def code(self, name: str) -> int | None:
        """Return a program's exit code. None: it runs still."""
        return self._running[name].poll()

    def kill(self, name: str) -> None:
        """Send SIGKILL to a program and to everything below it."""
        process = self._running.pop(name)
        _kill([process.pid, *below(process.pid)])
        process.wait()

    def end(self, *names: str) -> None:
        """End programs by SIGTERM, and what is left of them by SIGKILL.

        Where none is named, it is all of them.
        """
        with _uninterrupted():
            chosen = {name: self._running.pop(name) for name in names or tuple(self._running)}
            born = {pid: _born(pid) for one in chosen.values() for pid in below(one.pid)}
            for process in chosen.values():
                process.terminate()
            limit = time.monotonic() + GRACE_S
            for process in chosen.values():
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, limit - time.monotonic()))
                _kill([process.pid] if process.poll() is None else [])
                process.wait()
            _kill([pid for pid, when in born.items() if when and _born(pid) == when])

    def memory_mb(self) -> float | None:
        """Return the memory of all programs and their children together, MB. None: not known."""
        pids = [process.pid for process in self._running.values()]
        return memory_mb([*pids, *(pid for parent in pids for pid in below(parent))])


def below(pid: int) -> list[int]:
    """All descendants of a process, parents before their children."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True)
    children: dict[int, list[int]] = {}
    for line in listed.stdout.splitlines():
        child, parent = map(int, line.split())
        children.setdefault(parent, []).append(child)
    found = list(children.get(pid, ()))
    for one in found:  # grows while it is walked
        found += children.get(one, ())
    return found


def memory_mb(pids: list[int]) -> float | None:
    """Memory of processes in MB, what they share counted once (Linux: PSS)."""
    total = 0
    for pid in pids:
        with suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1])
    return total / 1024 or None


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block as Ctrl-C does, so that its clean-up runs."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ignore further signals, so that no second Ctrl-C leaves half of the programs running."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _kill(pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _born(pid: int) -> str:
    """Return when a process began, empty if it has ended.

    A process's number may be another program's later.
    """
    listed = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True)
    return listed.stdout.strip()


def _ended_with(parent: int) -> Callable[[], None]:
    """Make the function by which a child has Linux end it when this process dies.

    It runs before the child becomes its program.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def before() -> None:
        if libc is not None:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
            if os.getppid() != parent:
                os._exit(1)

    return before
