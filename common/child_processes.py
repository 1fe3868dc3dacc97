"""Child processes: started, watched, started again when they end, and surely ended.

    supervise([Spec("superlink", ("flower-superlink", ...))], stop_on_signals())

    with Children(say) as children:  # the same without a loop: nothing is started again
        children.start(Spec("server", privet_command("server", "up", folder), log=folder / "log"))

A device, a server and the demo on one machine all run their programs with this module.

**Guarantee**: what was started, and everything that those started, is dead when `supervise` returns
or the block is left, whatever ended it. On Linux the children also end when this process is killed.
"""

import contextlib
import ctypes
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from .errors import ConfigError
from .files import explain_os_errors, owners_own

__all__ = [
    "Children",
    "Spec",
    "backoff_s",
    "below",
    "memory_mb",
    "print_line",
    "privet_command",
    "stop_on_signals",
    "stopped_by_signals",
    "supervise",
]

ENTRY = "from privet.commands import main; main()"
"""What the command `privet` calls."""
LIVED_S = 60.0  # a child that lived so long starts afresh with the shortest pause
GRACE_S = 20.0
TICK_S = 0.1
PR_SET_PDEATHSIG = 1
PRIVATE = ("PRIVET_PASS", "CREDENTIALS_DIRECTORY")

Say = Callable[[str], None]


def print_line(line: str) -> None:
    """Print a line of the supervisor, at once."""
    with contextlib.suppress(OSError):  # a log on a full disk stops nobody
        print(f"supervisor: {line}", flush=True)


def privet_command(*words: str | Path) -> tuple[str, ...]:
    """Return the command line of `privet WORDS`, with this Python, wherever it is installed."""
    # -P: what lies in the folder this was started from is not imported
    return (sys.executable, "-P", "-c", ENTRY, *map(str, words))


@dataclass(frozen=True)
class Spec:
    """One child process: how it is started, restarted and ended.

    Attributes:
        name: as in the lines that are printed.
        command: program and arguments; visible to everybody on the machine, so never a secret.
        env: variables on top of this process's own; privet's secrets among those are left out.
        pass_fds: descriptors it inherits under the same numbers, rewound before each start.
        log: file that its output is added to; that of the time before is kept as `LOG.1`. None: its
            output is this process's.
        orphaned: the signal it gets when this process dies (Linux). A program with children of its
            own ends them on SIGTERM.
        takes_down: children to restart when this one dies (ends with another status than 0). A
            SuperNode whose worker died in the middle of a reply waits for the rest without an end.
        longest_s: the longest pause before a restart, seconds.
        linger_s: at the end, seconds between the end of the children after it and its own.
        why: asked when it has ended: what its owner is told of it; "" where its status says more.
    """

    name: str
    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    pass_fds: tuple[int, ...] = ()
    log: Path | None = None
    orphaned: signal.Signals = signal.SIGTERM
    takes_down: tuple[str, ...] = ()
    longest_s: float = 60.0
    linger_s: float = 0.0
    why: Callable[[], str] = field(default=lambda: "", repr=False, compare=False)


@dataclass
class _Child:
    """A child's process (None while it waits for its next start), and when that is due."""

    spec: Spec
    process: "subprocess.Popen[bytes] | None" = None
    began: float = 0.0
    due: float = 0.0
    failures: int = 0

    @property
    def running(self) -> "subprocess.Popen[bytes] | None":
        return self.process if self.process is not None and self.process.poll() is None else None


def backoff_s(failures: int, longest_s: float = 60.0) -> float:
    """Return the pause before a restart, which doubles with each failure in a row.

    After `failures` (at least 1) it is 1, 2, 4 s ... `longest_s`.

    Of each pause a random half to whole is taken, so that devices do not come back together.
    """
    return min(longest_s, float(2 ** min(failures - 1, 10))) * random.uniform(0.5, 1.0)


class Children(contextlib.AbstractContextManager["Children"]):
    """The child processes of this process, by name.

    Use it as a context, from the main thread: Linux ties the children to the thread that started
    them. No child dumps core: a core file holds records and keys.

    Args:
        say: gets one line per event, without private data.
        grace_s: how long a child may take to end after SIGTERM, before SIGKILL.
        backoff: (failures in a row, longest) -> seconds.
    """

    def __init__(
        self,
        say: Say = print_line,
        grace_s: float = GRACE_S,
        backoff: Callable[[int, float], float] = backoff_s,
    ) -> None:
        self._say, self._grace_s, self._backoff = say, grace_s, backoff
        self._children: dict[str, _Child] = {}

    def __exit__(self, *_: object) -> None:
        self.end()

    def add(self, spec: Spec) -> None:
        """Take a program into care; `tend` starts it."""
        if spec.log is not None:
            with explain_os_errors(spec.log, "write"):
                spec.log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                if spec.log.exists():
                    os.replace(spec.log, f"{spec.log}.1")
        self._children[spec.name] = _Child(spec)

    def start(self, spec: Spec) -> None:
        """Start a program now.

        Raises:
            StateError: it cannot be started.
        """
        self.add(spec)
        with explain_os_errors(spec.command[0], "start"):
            self._start(self._children[spec.name])

    def pid(self, name: str) -> int | None:
        """Return the number of a child's process. None: it does not run."""
        running = self._children[name].running
        return None if running is None else running.pid

    def status(self, name: str) -> int | None:
        """Return how a child has ended: its status, or minus a signal. None: it runs still."""
        process = self._children[name].process
        return None if process is None else process.poll()

    def memory_mb(self) -> float | None:
        """Return the memory of all children and what they started, MB. None: not known."""
        pids = [self.pid(name) for name in self._children]
        return memory_mb([pid for pid in pids if pid is not None])

    def tend(self) -> None:
        """Start what is due, and see to what has ended since the last time."""
        for child in self._children.values():
            if child.process is None:
                if time.monotonic() >= child.due:
                    self._try_to_start(child)
            elif (status := child.process.poll()) is not None:
                self._ended(child, status)

    def kill(self, name: str) -> None:
        """Send SIGKILL to a child and to everything below it, and forget it."""
        child = self._children.pop(name)
        if child.process is not None:
            _kill(child.process, _family(child.process))

    def end(self, *names: str) -> None:
        """End children by SIGTERM, and what is left of them by SIGKILL; forget them.

        Where none is named, it is all of them. Ctrl-C meanwhile kills at once what is left.
        """
        self._stop([self._children.pop(name) for name in names or tuple(self._children)])

    def _stop(self, children: Sequence[_Child]) -> None:
        running = [process for child in children if (process := child.running) is not None]
        families = [_family(process) for process in running]
        try:
            for process in running:
                process.terminate()
            limit = time.monotonic() + self._grace_s
            for process in running:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, limit - time.monotonic()))
        finally:
            for process, family in zip(running, families, strict=True):
                _kill(process, family + _family(process))

    def _try_to_start(self, child: _Child) -> None:
        try:
            self._start(child)
        except OSError as error:
            pause = self._postpone(child)
            why = error.strerror
            self._say(f"{child.spec.name} could not be started ({why}); again in {pause:.1f} s")

    def _start(self, child: _Child) -> None:
        spec = child.spec
        for descriptor in spec.pass_fds:
            with contextlib.suppress(OSError):  # a pipe has no start to go back to
                os.lseek(descriptor, 0, os.SEEK_SET)
        inherited = {name: one for name, one in os.environ.items() if not name.startswith(PRIVATE)}
        child.began = time.monotonic()
        with contextlib.ExitStack() as stack:
            log = None
            if spec.log is not None:
                log = stack.enter_context(open(spec.log, "ab", opener=owners_own))
            child.process = subprocess.Popen(
                spec.command,
                env=inherited | dict(spec.env),
                pass_fds=spec.pass_fds,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                umask=0o077,
                start_new_session=True,  # Ctrl-C is for this process, which ends them in order
                preexec_fn=_tied_to(os.getpid(), spec.orphaned),
            )
        self._say(f"{spec.name} started, process {child.process.pid}")

    def _ended(self, child: _Child, status: int) -> None:
        spec, lived = child.spec, time.monotonic() - child.began
        child.process = None
        child.failures = 0 if lived >= LIVED_S else child.failures
        pause = self._postpone(child)
        how = f"signal {-status}" if status < 0 else f"status {status}"
        why = spec.why() if status > 0 else ""
        ended = f"ended: {why}" if why else f"ended with {how} after {lived:.0f} s"
        ended += "" if spec.log is None else f" ({spec.log} says more)"
        self._say(f"{spec.name} {ended}; restart {child.failures} in {pause:.1f} s")
        for name in spec.takes_down if status else ():
            taken = self._children[name]
            if taken.process is not None:
                self._say(f"{name} is restarted with {spec.name}")
                self._stop([taken])
                taken.process, taken.due = None, 0.0

    def _postpone(self, child: _Child) -> float:
        """Set when a child that has failed is due again, and return in how many seconds."""
        child.failures += 1
        pause = self._backoff(child.failures, child.spec.longest_s)
        child.due = time.monotonic() + pause
        return pause


def supervise(
    specs: Sequence[Spec],
    stop: threading.Event,
    *,
    say: Say = print_line,
    grace_s: float = GRACE_S,
    backoff: Callable[[int, float], float] = backoff_s,
) -> None:
    """Start every child, restart those that end, and end them all when `stop` is set.

    It never gives up, and says so with every restart. The end comes in the reverse order of
    `specs`, one after the other. Arguments as `Children`; `stop`: see `stop_on_signals`.

    Raises:
        ConfigError: two children with one name, or one that takes down a stranger.
        StateError: a log cannot be written.
    """
    names = [spec.name for spec in specs]
    strangers = {name for spec in specs for name in spec.takes_down} - set(names)
    if len(set(names)) < len(names) or strangers:
        raise ConfigError(
            f"children need names of their own and may take down only each other, got {names} "
            f"and {sorted(strangers)}."
        )
    children = Children(say, grace_s, backoff)
    for spec in specs:
        children.add(spec)
    try:
        while not stop.is_set():
            children.tend()
            stop.wait(TICK_S)
    finally:
        for spec in reversed(specs):
            if children.pid(spec.name) is not None:
                time.sleep(spec.linger_s)
            children.end(spec.name)
        say("all children ended")


def stop_on_signals() -> threading.Event:
    """Return an event that SIGTERM and SIGINT set.

    Call it once, in the main thread.
    """
    stop = threading.Event()

    def asked(*_: object) -> None:
        # Not `stop.set()` here: the main thread may be inside `stop.wait`, holding its lock.
        threading.Thread(target=stop.set, daemon=True).start()

    signal.signal(signal.SIGTERM, asked)
    signal.signal(signal.SIGINT, asked)
    return stop


@contextlib.contextmanager
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


def below(pid: int) -> list[psutil.Process]:
    """All descendants of a process; none where it has ended."""
    try:
        return list(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def memory_mb(roots: Sequence[int]) -> float | None:
    """Memory of processes and all below them in MB, what they share counted once (Linux: PSS).

    None: not known.
    """
    total = 0
    for pid in [*roots, *(child.pid for root in roots for child in below(root))]:
        with contextlib.suppress(psutil.Error):
            total += getattr(psutil.Process(pid).memory_full_info(), "pss", 0)
    return total / 2**20 or None


def _family(process: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    """All descendants of a child that runs: once it has ended, its number may be another's."""
    return below(process.pid) if process.poll() is None else []


def _kill(process: "subprocess.Popen[bytes]", family: Sequence[psutil.Process]) -> None:
    """Kill a child, and then its descendants, so that it starts no new ones meanwhile."""
    process.kill()
    for descendant in family:
        with contextlib.suppress(psutil.NoSuchProcess):  # or its number is another program's now
            descendant.kill()
    process.wait()


def _tied_to(parent: int, orphaned: signal.Signals) -> Callable[[], None]:
    """Make what a child runs before its program: no core files, and it ends with this process."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def before() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if libc is not None:
            libc.prctl(PR_SET_PDEATHSIG, int(orphaned), 0, 0, 0)
            if os.getppid() != parent:  # it died before the line above
                os._exit(1)

    return before
