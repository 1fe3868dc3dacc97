"""What a run cost this machine, in `measured.json`: seconds by stage, bytes, the peak of memory."""

import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..common.errors import StateError
from ..common.files import write_json_atomic

__all__ = ["MEASURED", "add", "measuring", "read"]

MEASURED = "measured.json"


@contextmanager
def measuring(folder: Path, stage: str) -> Iterator[None]:
    """Add the seconds within to `measured.json`, also when interrupted."""
    began = time.perf_counter()
    try:
        yield
    finally:
        add(folder, **{stage: time.perf_counter() - began})


def add(folder: Path, **numbers: float) -> None:
    """Add to the sums in `measured.json`. The peak of memory is a maximum."""
    kept = read(folder)
    for name, number in numbers.items():
        kept[name] = kept.get(name, 0.0) + number
    scale = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    kept["peak_rss_bytes"] = max(kept.get("peak_rss_bytes", 0.0), float(peak))
    write_json_atomic(folder / MEASURED, kept)


def read(folder: Path) -> dict[str, float]:
    """Read what was added so far. It is {} where nothing was.

    Raises:
        StateError: the file is damaged.
    """
    path = folder / MEASURED
    try:
        return dict(json.loads(path.read_text())) if path.exists() else {}
    except (OSError, ValueError, TypeError) as error:
        raise StateError(
            f"{path} cannot be read ({error}); remove it: only the run's times are lost"
        ) from None
