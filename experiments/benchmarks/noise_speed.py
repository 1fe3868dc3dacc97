"""How fast a contribution is rounded to the grid and noised, on one core, beside NumPy's own.

    python -m privet.experiments.benchmarks.noise_speed [--coordinates 4000000] [--repeats 7]

Rounding: reals to integers at random, with bits of the operating system's source. Noise: exact
Skellam integers, no float in what decides. Beside them, in the same run: NumPy's Gaussian from its
own generator, which is neither exact nor secret.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ...common.privacy.encoding import round_randomly
from ...common.privacy.noise import SystemSource, skellam, skellam_table

VARIANCES = (1e2, 1e5, 1e8)


def main() -> None:
    """Print millions of coordinates a second."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--coordinates", type=int, default=4_000_000)
    options.add_argument("--repeats", type=int, default=7)
    given = options.parse_args()
    print(json.dumps(measure(given.coordinates, given.repeats), indent=2))


def measure(count: int, repeats: int) -> dict[str, Any]:
    """Medians over `repeats` runs, in millions of coordinates a second."""
    rng, source = np.random.default_rng(0), SystemSource()
    vector = rng.normal(size=count)
    tables = {variance: skellam_table(variance) for variance in VARIANCES}

    def rate(work: Callable[[], object]) -> float:
        work()  # the first touches memory
        seconds = []
        for _ in range(repeats):
            began = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - began)
        return round(count / statistics.median(seconds) / 1e6, 1)

    return {
        "coordinates": count,
        "rounding": rate(lambda: round_randomly(vector, 1e-3, source.words)),
        "skellam": {
            f"variance {variance:g}": rate(lambda table=table: skellam(table, count, source))  # type: ignore[misc]
            for variance, table in tables.items()
        },
        "numpy_gaussian": rate(lambda: rng.normal(size=count)),
    }


if __name__ == "__main__":
    main()
