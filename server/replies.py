"""Messages out to the devices and their replies back, over Flower's grid, until a time is over."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.superlink.grid import http_grid

__all__ = ["addressed", "enough_s", "replies"]

POLL_S, SLOWEST_S = 0.1, 1.0
AT_ONCE, UNANSWERED, PACE_S = 16, 32, 5.0
"""Messages that are sent together; so many devices may be busy with their SuperLink before the
next ones are asked; unless they take more than so many seconds, and so compute rather than speak.

Flower 1.41's SuperLink needs about 0.35 processor seconds for one message and its reply, on
one core: asked all at once, 250 devices wait so long that they give up and connect anew, which
costs more than their questions."""
SPARE_S = 900.0
PARTS = {"initial_backoff": 0.05, "backoff_cap": 1.0}
PARTS_S = 60.0
"""Seconds until the next question for a part that is not stored yet; Flower doubles the first. And
how long a reply's parts may take, at most."""

logger = logging.getLogger(__name__)

_pull_objects: Any = getattr(http_grid, "pull_objects", None)
"""Flower's own."""


def addressed(content: Mapping[str, Any], node: int, kind: str, limit_s: float) -> Message:
    """Make a message that expires, so that a device long away is not given it any more.

    A reply is refused where the device's clock is past the message's end. The SuperLink bears
    clocks that differ by 305 s; the spare time is more.
    """
    return Message(RecordDict(dict(content)), node, kind, ttl=limit_s + SPARE_S)


def enough_s(count: int, answer_s: float) -> float:
    """Return the seconds in which all are asked, though nobody answers.

    The last still has `answer_s` then.
    """
    return answer_s + PACE_S * ((count - 1) // AT_ONCE)


def replies(
    grid: Grid, messages: Sequence[Message], timeout_s: float, unheard: set[str] | None = None
) -> Iterator[Message]:
    """Send all messages and yield the replies as they arrive.

    Failed and late clients are counted and left out.

    Not everybody is asked at the same moment (see `UNANSWERED`), so a short `timeout_s` may leave
    some unasked: see `enough_s`.

    `unheard`: ids of earlier messages whose late replies are still welcome; those of these messages
    that are not answered in time are added.
    """
    began = time.monotonic()
    _wait_for_parts(began + timeout_s)
    sent, due, waiting = 0, began, set[str]()
    earlier = set() if unheard is None else unheard
    failed: list[str] = []
    while sent < len(messages) or waiting or earlier:
        if sent < len(messages) and (len(waiting) <= UNANSWERED or time.monotonic() >= due):
            waiting |= set(grid.push_messages(messages[sent : sent + AT_ONCE]))
            sent, due = sent + AT_ONCE, time.monotonic() + PACE_S
        arrived = 0
        for message in grid.pull_messages(waiting | earlier):
            arrived += 1
            waiting.discard(message.metadata.reply_to_message_id)
            earlier.discard(message.metadata.reply_to_message_id)
            if message.has_error():
                failed.append(message.error.reason)
            else:
                yield message
        passed = time.monotonic() - began
        if (sent >= len(messages) and not waiting) or passed >= timeout_s:
            break
        if not arrived and (sent >= len(messages) or len(waiting) > UNANSWERED):
            # asking for many replies is work for the SuperLink, which has the devices to answer
            time.sleep(min(max(POLL_S, passed / 20), SLOWEST_S))
    if failed:
        logger.warning("%d nodes failed and are left out; the first: %s", len(failed), failed[0])
    if unheard is not None:
        unheard |= waiting
    elif waiting:
        logger.warning("%d nodes did not answer within %g s", len(waiting), timeout_s)


def _wait_for_parts(until: float) -> None:
    """Limit the wait for a reply that is listed but not stored in whole, which has then failed.

    A device that dies while it answers leaves such a reply for ever. Flower 1.41 asks 500 times
    for each of its parts, and hands out no other reply meanwhile. So it has a third of the time
    that is left: the others, whose replies are not listed yet, need some of it too.
    """

    def pulled(*args: Any, **named: Any) -> Any:
        left = min(max(until - time.monotonic(), 0.0) / 3, PARTS_S)
        return _pull_objects(*args, **named, **PARTS, max_time=left, max_tries_per_object=None)

    if _pull_objects is not None:
        setattr(http_grid, "pull_objects", pulled)  # noqa: B010  (mypy knows it as a function)
