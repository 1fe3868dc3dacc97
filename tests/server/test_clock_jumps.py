"""A wall clock that jumps, forwards or backwards, moves no deadline of a phase, look or restart."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from privet.client.runtime.answer_pace import Pace
from privet.common.child_processes import Children, Spec
from privet.common.files import read_lines
from privet.server import ab_rounds, replies

JUMPS = [-1e6, 1e6]
Patch = pytest.MonkeyPatch


class Clocks:
    """Time that passes by waiting alone, and a wall clock that is wrong from the second look on."""

    def __init__(self, jump: float) -> None:
        self.passed, self.jump, self.looked = 0.0, jump, 0

    def monotonic(self) -> float:
        return 50.0 + self.passed

    def time(self) -> float:
        self.looked += 1
        return 1.7e9 + self.passed + (self.jump if self.looked > 1 else 0.0)

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.passed += seconds


@pytest.fixture(params=JUMPS, ids=["back", "ahead"])
def clocks(request: pytest.FixtureRequest, monkeypatch: Patch) -> Clocks:
    found = Clocks(request.param)
    for name in ("monotonic", "time", "sleep"):
        monkeypatch.setattr(time, name, getattr(found, name))
    found.time()
    return found


class Silent:
    """A grid on which nobody answers, and every look at it jumps the clock."""

    def push_messages(self, messages: Sequence[Any]) -> list[str]:
        return [str(at) for at, _ in enumerate(messages)]

    def pull_messages(self, _: Any) -> list[Any]:
        time.time()
        return []


def test_a_phase_ends_after_its_seconds(clocks: Clocks):
    grid: Any = Silent()
    messages: Any = [object()] * 3
    assert list(replies.replies(grid, messages, 60.0)) == []
    assert 60.0 <= clocks.passed < 62.0


def test_an_answer_leaves_at_the_moment_of_the_rehearsal(clocks: Clocks):
    pace = Pace(clock=time.monotonic, pause=time.sleep)
    spans = []
    for work_s in (0.0, 0.3, 2.0):
        pace.begin()
        began = clocks.passed
        pace.rehearse("round", 0.5, lambda: clocks.sleep(1.0))
        clocks.sleep(work_s)
        time.time()
        pace.settle()
        spans.append(clocks.passed - began)
    assert spans[1:] == pytest.approx([spans[0] - 2.0] * 2)  # two rehearsals before the first


def test_a_child_is_started_again_when_its_pause_is_over(clocks: Clocks, monkeypatch: Patch):
    started: list[float] = []
    monkeypatch.setattr(Children, "_start", lambda *_: started.append(clocks.passed))
    children = Children(lambda _: None)
    children.add(Spec("node", ("true",)))
    children._children["node"].due = time.monotonic() + 8.0
    for _ in range(10):
        children.tend()
        clocks.sleep(1.0)
        time.time()
    assert started == [8.0, 9.0]


@pytest.mark.parametrize("again", [False, True], ids=["first", "started again"])
def test_a_look_is_waited_for_as_long_as_was_said(clocks: Clocks, tmp_path: Path, again: bool):
    greet: Callable[[], object] = clocks.time
    clocks.looked = 0
    if again:  # an hour is left of two
        line = {"look": 1, "time": 1.7e9 + 3600.0}
        (tmp_path / ab_rounds.DUE).write_text(json.dumps(line) + "\n")
    ab_rounds._wait(tmp_path, 1, 2.0, greet)
    if again:
        assert clocks.passed == pytest.approx(3600.0)
    else:
        (line,) = read_lines(tmp_path / ab_rounds.DUE)
        assert line["time"] == pytest.approx(1.7e9 + 7200.0)
        assert clocks.passed == pytest.approx(7200.0)


def test_a_server_started_again_with_a_clock_far_back_waits_no_longer_than_between_looks(
    clocks: Clocks, tmp_path: Path
):
    line = {"look": 1, "time": 1.7e9 + 1e8}
    (tmp_path / ab_rounds.DUE).write_text(json.dumps(line) + "\n")
    ab_rounds._wait(tmp_path, 1, 2.0, lambda: None)
    assert clocks.passed <= 7200.0 + 1e-6
