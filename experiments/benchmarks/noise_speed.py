"""How fast a contribution is rounded to the grid and noised, on one core, beside NumPy's own.

    python -m privet.experiments.benchmarks.noise_speed [--coordinates 4000000] [--repeats 7]

Rounding: reals to integers at random, with bits of the operating system's source. Noise: exact
Skellam integers, no float in what decides. Beside them, in the same run: NumPy's Gaussian from its
own generator, which is neither exact nor secret.
"""

from collections.abc import Callable

import numpy as np

from ...common.privacy.encoding import round_randomly
from ...common.privacy.noise import SystemSource, skellam, skellam_table
from .harness import command, median_s

VARIANCES = (1e2, 1e5, 1e8)


def measure(coordinates: int = 4_000_000, repeats: int = 7) -> dict[str, object]:
    """Rounding and noise in millions of coordinates a second, medians over `repeats` runs."""
    rng, source = np.random.default_rng(0), SystemSource()
    vector = rng.normal(size=coordinates)

    def rate(work: Callable[[], object]) -> float:
        return round(coordinates / median_s(work, repeats) / 1e6, 1)

    def noise(variance: float) -> float:
        table = skellam_table(variance)
        return rate(lambda: skellam(table, coordinates, source))

    return {
        "coordinates": coordinates,
        "rounding": rate(lambda: round_randomly(vector, 1e-3, source.words)),
        "skellam": {f"variance {variance:g}": noise(variance) for variance in VARIANCES},
        "numpy_gaussian": rate(lambda: rng.normal(size=coordinates)),
    }


if __name__ == "__main__":
    command(measure)
