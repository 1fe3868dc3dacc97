"""What happens when memory runs out: fewer records pass the model at once, and it is said once.

**Guarantee**: where the work has a public shape, how many records there is room for is found out on
made-up records, before a real one is touched. So it follows from the machine and from the shape,
and a round with fewer rows in more chunks tells nothing about the records. Memory that still runs
out in the middle of such a round ends it, as any failure does. Without a public shape, which is for
simulated devices, the step is begun again from its start.

Smaller chunks add the gradients in another order, and a record's gradient depends on the shape of
its batch by rounding: little in float32, by percents below. So a round is rounded otherwise than
with more memory, and the trial of kernels (`kernel_trial.py`) is for the smaller shape.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from ...common.errors import ConfigError
from .constant_work import Shape

__all__ = ["Room", "fitting", "ran_out"]

_T = TypeVar("_T")
logger = logging.getLogger(__name__)


def ran_out(error: BaseException) -> bool:
    """Return whether an error says that there is no memory left, of a card or of the machine."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def fitting(shape: Shape, attempt: Callable[[Shape], None]) -> Shape:
    """Return the shape, or the first with half the records in a chunk that there is room for.

    Args:
        shape: of the work; public.
        attempt: does what a chunk of a shape takes, on no real record.

    Raises:
        ConfigError: there is no room for one record.
    """
    tried = shape
    while not _has_room(partial(attempt, tried)):
        if tried.records == 1:
            raise _full(f"one record of {shape.tokens} tokens")
        tried = tried.of_half()
    if tried != shape:
        _say(shape.records, tried.records)
    return tried


@dataclass
class Room:
    """How many records pass the model at once where no public shape says it.

    Attributes:
        records: at most so many; half of it whenever memory has run out.
        said: whether it was said that there are fewer.
    """

    records: int
    said: bool = False

    def taken(self, work: Callable[[], _T]) -> _T:
        """Do the work, from its start again with half the records where memory runs out.

        Raises:
            ConfigError: there is no room for one record.
        """
        before, done = self.records, list[_T]()
        while not _has_room(lambda: done.append(work())):
            if self.records == 1:
                raise _full("one record")
            self.records //= 2
        if self.records < before and not self.said:
            _say(before, self.records)
            self.said = True
        return done[0]


def _has_room(work: Callable[[], object]) -> bool:
    try:
        work()
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
    else:
        return True
    if torch.cuda.is_available():  # after the error, which holds what was being computed
        torch.cuda.empty_cache()
    return False


def _say(before: int, now: int) -> None:
    logger.warning(
        "memory ran out with %d records at once; from now on %d pass the model, and a round takes "
        "longer",
        before,
        now,
    )


def _full(what: str) -> ConfigError:
    return ConfigError(
        f"there is not enough memory for {what}: make data.max_tokens smaller, adapt fewer blocks "
        "(adapter.last_blocks), or take a smaller model.base"
    )
