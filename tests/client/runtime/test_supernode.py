"""The SuperNode's two sleeps, and nothing else of it, are privet's."""

import inspect
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from privet.client.runtime.supernode import (
    GROWTH,
    NO_MESSAGE_S,
    PARTS,
    PROGRAM,
    ROWS,
    Waits,
    taking_over,
)


def still(slept: list[float]) -> Waits:
    """Waits of a node whose questions take no time."""
    return Waits(pause=slept.append, clock=lambda: 0.0)


def row(seconds: float, count: int, waits: "Waits | None" = None) -> list[float]:
    """The first sleeps of a row."""
    slept: list[float] = []
    waits = waits or still(slept)
    for _ in range(count):
        waits.sleep(seconds)
    return slept


@pytest.mark.parametrize("stock", list(ROWS))
def test_a_wait_is_never_prolonged_by_more_than_a_twentieth_and_the_first_sleep(stock):
    slept, (first, longest) = row(stock, 200), ROWS[stock]
    assert slept[0] == first
    for number, pause in enumerate(slept):
        assert pause <= first * GROWTH + sum(slept[:number]) * (GROWTH - 1) + 1e-9
        assert pause <= longest


def test_a_device_that_nobody_asks_is_quieter_than_flower_makes_it_after_four_minutes():
    slept, (_, longest) = row(NO_MESSAGE_S, 200), ROWS[NO_MESSAGE_S]
    assert sum(pause for pause in slept if pause < NO_MESSAGE_S) < 65
    assert sum(pause for pause in slept if pause < longest) < 240
    assert slept[-1] == longest > NO_MESSAGE_S


def test_a_message_in_hand_makes_the_node_quick_again():
    slept: list[float] = []
    waits = still(slept)
    row(NO_MESSAGE_S, 200, waits)
    waits.sleep(0.5)
    waits.sleep(NO_MESSAGE_S)
    assert slept[-3:] == [10.0, 0.02, 0.1]


def test_a_superlink_that_answers_slowly_is_asked_less():
    moments = iter([0.0, 0.02, 0.1, 0.15, 1.0, 1.2, 2.0, 9.0, 9.5])
    slept: list[float] = []
    waits = Waits(pause=slept.append, clock=lambda: next(moments))
    row(NO_MESSAGE_S, 5, waits)
    assert slept == pytest.approx([0.1, 0.2, 0.5, 2.0, 10.0])


def test_the_time_a_message_took_is_not_taken_for_a_slow_superlink():
    now, slept = [0.0], list[float]()
    waits = Waits(pause=slept.append, clock=lambda: now[0])
    waits.sleep(NO_MESSAGE_S)
    now[0] += 0.6  # a message was pulled, its reply was there at once, and was sent
    waits.anew_after(lambda: None)()
    waits.sleep(NO_MESSAGE_S)
    assert slept == [0.1, 0.1]


def test_other_sleeps_and_the_rest_of_the_module_are_left_alone():
    slept: list[float] = []
    waits = still(slept)
    waits.sleep(7.0)
    assert slept == [7.0]
    assert waits.monotonic is time.monotonic


def test_flower_still_sleeps_where_this_was_written_for():
    """A new minor version that waits elsewhere would silently be slow again."""
    from flwr.supernode import start_client_internal as node

    assert node.time is time
    assert re.findall(r"time\.(\w+\(.*?\))", inspect.getsource(node)) == [
        "sleep(3)", "sleep(0.5)", "sleep(0.5)"
    ]  # fmt: skip
    assert "_push_messages(" in inspect.getsource(node.start_client_internal)
    assert set(PARTS) < set(inspect.signature(node.pull_objects).parameters)


def test_it_is_flowers_supernode_that_starts():
    command = [sys.executable, "-P", "-m", "privet.client.runtime.supernode", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {PROGRAM}")
    assert "--auth-supernode-private-key" in done.stdout


STUBBORN = """
import threading, time
import flwr.supernode.cli as cli
def gives_up():
    threading.Thread(target=time.sleep, args=(600,)).start()  # as the runtime API's, not a daemon
    {}
cli.flower_supernode = gives_up
from privet.client.runtime.supernode import main
main()
"""


@pytest.mark.parametrize(
    ("how", "status"), [("", 1), ("raise OSError('broken')", 1), ("time.sleep(600)", None)]
)
def test_a_supernode_that_gives_up_ends_its_process(how: str, status: int | None):
    command = [sys.executable, "-P", "-c", STUBBORN.format(how)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        if status is None:  # the contrast: one that has not given up goes on
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(3)
        else:
            said = process.communicate(timeout=600)[1]
            assert process.returncode == status
            assert "lost its server" in said or "broken" in said
    finally:
        process.kill()
        process.communicate()


class Refused(Exception):
    """As httpx's, of a request that was answered."""

    response = "403"


class Link:
    """A SuperLink that knows one key: nobody is activated while the place is taken."""

    def __init__(self, *, taken: bool) -> None:
        self.taken, self.ended = taken, list[int]()

    def activate(self, _: object, request: str) -> SimpleNamespace:
        if request == "no network":
            raise OSError(request)
        if self.taken:
            raise Refused
        self.taken = True
        return SimpleNamespace(node_id=77)

    def deactivate(self, _: object, node: int) -> None:
        self.ended.append(node)
        self.taken = False

    def taking_over(self, place: int) -> Any:
        return taking_over(cast(Any, self.activate), self.deactivate, place)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path / "place", os.O_RDWR | os.O_CREAT)
    yield descriptor
    os.close(descriptor)


def test_a_node_takes_the_place_of_the_one_that_was_killed(place: int):
    link = Link(taken=False)
    activate = link.taking_over(place)
    assert activate(None, "first").node_id == 77
    assert link.ended == []
    assert activate(None, "second").node_id == 77  # the first was killed
    assert link.ended == [77]


def test_a_node_without_one_before_it_ends_nobodys_place(place: int):
    link = Link(taken=True)
    with pytest.raises(Refused):
        link.taking_over(place)(None, "first")
    assert link.ended == []


def test_a_network_that_is_away_is_no_refusal(place: int):
    os.pwrite(place, b"77", 0)
    link = Link(taken=True)
    with pytest.raises(OSError, match="no network"):
        link.taking_over(place)(None, "no network")
    assert link.ended == []
