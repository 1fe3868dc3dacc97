"""Children of a supervisor that runs in a thread of the tests."""

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

import psutil

from privet.common.child_processes import Spec, supervise


def python(name: str, code: str, **options: Any) -> Spec:
    return Spec(name, (sys.executable, "-c", code), **options)


@contextlib.contextmanager
def supervised(*specs: Spec, **options: Any) -> Iterator[list[str]]:
    """Runs the supervisor in a thread; gives its lines."""
    stop, lines = threading.Event(), list[str]()
    options = {"say": lines.append, "backoff": lambda *_: 0.05, "grace_s": 120.0} | options
    thread = threading.Thread(target=supervise, args=(specs, stop), kwargs=options)
    thread.start()
    try:
        yield lines
    finally:
        stop.set()
        thread.join(300)
        assert not thread.is_alive()


def pids(lines: list[str], name: str) -> list[int]:
    started = [line for line in lines if line.startswith(f"{name} started")]
    return [int(line.rpartition(" ")[2]) for line in started]


def alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
