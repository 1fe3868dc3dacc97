"""The SuperNode's two sleeps, and nothing else of it, are privet's."""

import inspect
import re
import subprocess
import sys
import time

import pytest

from privet.client.node import GROWTH, NO_MESSAGE_S, PROGRAM, Waits


def row(seconds: float, count: int, waits: "Waits | None" = None) -> list[float]:
    """The first sleeps of a row."""
    slept: list[float] = []
    waits = waits or Waits(pause=slept.append)
    for _ in range(count):
        waits.sleep(seconds)
    return slept


@pytest.mark.parametrize(("stock", "first"), [(NO_MESSAGE_S, 0.1), (0.5, 0.02)])
def test_a_wait_is_never_prolonged_by_more_than_a_twentieth_and_the_first_sleep(stock, first):
    slept = row(stock, 200)
    assert slept[0] == first
    for number, pause in enumerate(slept):
        assert pause <= first * GROWTH + sum(slept[:number]) * (GROWTH - 1) + 1e-9
        assert pause <= stock


def test_a_device_that_nobody_asks_is_as_quiet_as_flower_makes_it_after_a_minute():
    slept = row(NO_MESSAGE_S, 100)
    quick = [pause for pause in slept if pause < NO_MESSAGE_S]
    assert sum(quick) < 65
    assert slept[-1] == NO_MESSAGE_S


def test_a_message_in_hand_makes_the_node_quick_again():
    slept: list[float] = []
    waits = Waits(pause=slept.append)
    row(NO_MESSAGE_S, 100, waits)
    waits.sleep(0.5)
    waits.sleep(NO_MESSAGE_S)
    assert slept[-3:] == [NO_MESSAGE_S, 0.02, 0.1]


def test_other_sleeps_and_the_rest_of_the_module_are_left_alone():
    slept: list[float] = []
    waits = Waits(pause=slept.append)
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


def test_it_is_flowers_supernode_that_starts():
    command = [sys.executable, "-P", "-m", "privet.client.node", "--help"]
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
from privet.client.node import main
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
            said = process.communicate(timeout=60)[1]
            assert process.returncode == status
            assert "lost its server" in said or "broken" in said
    finally:
        process.kill()
        process.communicate()
