"""The moment when a device's answers leave, which is public and does not depend on the records.

Before it touches a record a device rehearses the work on dummies. How long that takes says how
long the answer waits, from the moment the real work begins: the same for every answer, also for a
decline and a failure. The work itself is the same each time (`client/training/constant_work.py`).

Loads nothing but the standard library: an idle worker is small.
"""

import math
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

__all__ = ["COARSE", "MARGIN", "Pace"]

MARGIN = 2.0
"""The wait over the rehearsal; and one tick more, for what is not rehearsed."""

COARSE = 4
"""Moments are the tick times a power of this. Two devices of one kind whose rehearsals differ a
little should find the same moment: with powers of two they often did not on a busy machine, and an
answer that was late doubled the next ones of one of them only."""


@dataclass
class Pace:
    """The times at which the answers of one device leave.

    Attributes:
        clock, pause: seconds that only go forward, and a wait of so many; others in tests.

    **Guarantee**: the times waited for follow from rehearsals, which see no record, and from how
    often an answer was late. Being late takes every later answer of the same work to the next
    moment, so that all of them together tell the logarithm of one time, not a time each.
    """

    clock: Callable[[], float] = time.monotonic
    pause: Callable[[float], None] = time.sleep
    _spans: dict[Hashable, float] = field(default_factory=dict, init=False)
    _began: float = field(default=0.0, init=False)
    _work: Hashable = field(default=None, init=False)

    def begin(self) -> None:
        """Note that a message has come.

        As long as no work is rehearsed, nothing private is touched, and the answer leaves at once.
        """
        self._began, self._work = self.clock(), None

    def rehearse(self, work: Hashable, tick_s: float, once: Callable[[], object]) -> None:
        """Rehearse private work, so that its answer waits for a public moment.

        Args:
            work: what kind of work; it is rehearsed the first time only.
            tick_s: moments are this times a power of four: so coarse that it says little of a
                machine how long it took, and next to nothing of how that varied.
            once: does the work once, on dummies.

        The first answer's time counts from the end of the rehearsal.
        """
        if work not in self._spans:
            once()  # what is loaded and made ready the first time is not part of the work
            began = self.clock()
            once()
            self._began = self.clock()
            needed = MARGIN * (self._began - began) / tick_s + 1
            self._spans[work] = tick_s * COARSE ** math.ceil(math.log(needed, COARSE) - 1e-9)
        self._work = work

    def settle(self) -> None:
        """Wait until the answer may leave, also that of a decline or a failure."""
        if self._work is None:
            return
        work, self._work = self._work, None
        passed = self.clock() - self._began
        while passed > self._spans[work]:
            self._spans[work] *= COARSE
        self.pause(self._spans[work] - passed)
