"""For processes of a test: their wall clock is wrong by the seconds that a file holds.

Python imports a module of this name at its start where it finds one on `PYTHONPATH`. The file is
named by `TEST_CLOCK` and is read with every look at the clock, so a clock can jump.
"""

import datetime
import os
import time
from contextlib import suppress
from pathlib import Path

FILE = os.environ.get("TEST_CLOCK")
now = time.time


def wrong() -> float:
    """So many seconds is this clock ahead of the right one."""
    with suppress(OSError, ValueError):
        return float(Path(FILE or "").read_text())
    return 0.0


class Datetime(datetime.datetime):
    """`datetime`, whose now is that of the wrong clock."""

    @classmethod
    def now(cls, tz=None):
        """The wrong time."""
        return cls.fromtimestamp(now() + wrong(), tz)

    @classmethod
    def utcnow(cls):
        """The wrong time, without a zone."""
        return cls.now(datetime.UTC).replace(tzinfo=None)


if FILE:
    time.time = lambda: now() + wrong()
    setattr(datetime, "datetime", Datetime)  # noqa: B010  (mypy forbids it otherwise)
