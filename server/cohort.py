"""Who is asked in a round: nobody twice before everybody once.

What a client pays for is the number of rounds it takes part in, so participation counts are kept
as even and as small as they can be. The draw is a function of public numbers only; no secrecy of
it is claimed anywhere.
"""

import numpy as np

from ..common.errors import ConfigError

__all__ = ["draw"]


def draw(clients: int, cohort: int, round: int, seed: int) -> list[int]:
    """Members of one cohort, as indices below `clients`, ascending.

    Args:
        clients: population size.
        cohort: how many are asked, at most `clients`.
        round: from 1.
        seed: public.

    Edge case: a cohort that spans two passes never holds a client twice; the one met again waits
    for the next round.

    Raises:
        ConfigError: a cohort larger than the population.
    """
    if cohort > clients:
        raise ConfigError(
            f"rounds.cohort = {cohort} is larger than the {clients} clients that are there; lower "
            "the cohort or wait for more clients"
        )
    waiting: list[int] = []
    passes = 0
    chosen: list[int] = []
    for _ in range(round):
        chosen, waiting = waiting[:cohort], waiting[cohort:]
        while len(chosen) < cohort:
            order = np.random.default_rng([seed, passes]).permutation(clients)
            passes += 1
            taken = set(chosen)
            fresh = [int(i) for i in order if int(i) not in taken]
            again = [int(i) for i in order if int(i) in taken]
            missing = cohort - len(chosen)
            chosen, waiting = chosen + fresh[:missing], fresh[missing:] + again
    return sorted(chosen)
