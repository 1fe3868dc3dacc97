"""One server process a run folder, and whether it is still there.

The process holds a lock that ends with it, however it ends, and writes down which of Flower's runs
it serves. So `privet server run` sees at once that a run was lost; Flower itself waits for a sign
of life for a minute.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ...common.errors import PrivetError, StateError
from ...common.files import explain_os_errors

__all__ = ["LOCK", "held", "locked", "lost", "refusal"]

LOCK = "serving.lock"
PATIENCE_S = 20.0  # a process that Flower has given up ends by itself, a moment later


@contextmanager
def locked(folder: Path, run: int, patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Serve Flower's run `run` in `folder`, where nobody else does.

    **Guarantee**: two processes never write checkpoints and log of one folder at the same time.
    What privet refuses inside the block is written down for `refusal`.

    Raises:
        StateError: another process still serves this folder after `patience_s`, or the disk.
    """
    with explain_os_errors(folder / LOCK, "lock"):
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _lock(handle, folder, patience_s)
        _write(handle, folder, run, "")
        try:
            yield
        except PrivetError as error:
            _write(handle, folder, run, str(error))
            raise
    finally:
        os.close(handle)


def lost(folder: Path, run: int) -> bool:
    """Return whether the process that served Flower's run `run` has ended.

    It is False before that process began.
    """
    return _kept(folder)[0] == run and not held(folder)


def refusal(folder: Path, run: int) -> str:
    """Say why the process of this run gave up by itself. It is empty where it did not."""
    kept, sentence = _kept(folder)
    return sentence if kept == run else ""


def _lock(handle: int, folder: Path, patience_s: float) -> None:
    until = time.monotonic() + patience_s
    while True:
        with suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        if time.monotonic() > until:
            raise StateError(
                f"another process serves the run in {folder}; wait until it ends, or end it, and "
                "go on with --resume"
            )
        time.sleep(0.1)


def held(folder: Path) -> bool:
    """Whether a process serves the run in `folder`."""
    with suppress(FileNotFoundError):
        handle = os.open(folder / LOCK, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(handle)
    return False


def _write(handle: int, folder: Path, run: int, refused: str) -> None:
    """Write the lock file in place, as the lock is on this very file.

    A torn one is nobody's.
    """
    with explain_os_errors(folder / LOCK, "write"):
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps({"run": run, "refused": refused}).encode(), 0)


def _kept(folder: Path) -> tuple[int, str]:
    try:
        found = json.loads((folder / LOCK).read_bytes())
        return int(found["run"]), str(found["refused"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0, ""
