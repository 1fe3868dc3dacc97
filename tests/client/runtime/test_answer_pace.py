"""client/runtime/answer_pace.py: answers leave at moments that the rehearsal alone decides."""

import math
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from privet.client.runtime.answer_pace import COARSE, MARGIN, Pace
from privet.client.runtime.processes import handler
from privet.common.errors import StateError


class Clock:
    """Time that passes only where a test lets it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def answered(clock: Clock) -> Callable[..., float]:
    """Seconds from a request to its answer, by what the work takes."""
    pace = Pace(clock=clock, pause=clock.pass_)

    def answer(work_s: float, rehearsal_s: float = 2.0, kind: str = "round") -> float:
        pace.begin()
        began = clock.now
        pace.rehearse(kind, 0.5, lambda: clock.pass_(rehearsal_s))
        clock.pass_(work_s)
        pace.settle()
        return clock.now - began

    return answer


def test_after_the_first_every_answer_takes_the_same_time_whatever_its_work_took(
    answered: Callable[..., float],
):
    first = answered(0.3)
    wait = 8.0  # MARGIN * 2 s and a tick are 4.5 s, and sixteen ticks the next power of four
    assert first == pytest.approx(2 * 2.0 + wait)
    assert {round(answered(work_s), 9) for work_s in (0.0, 0.009, 1.59, 2.47, 7.9)} == {wait}


def test_the_moment_is_the_tick_times_a_power_of_four(answered: Callable[..., float]):
    for number in range(20):
        answered(0.0, 0.1 * number, kind=str(number))
        wait = answered(0.0, kind=str(number))
        assert math.log2(wait / 0.5) % 2 == pytest.approx(0)
        needed = MARGIN * 0.1 * number + 0.5
        assert needed - 1e-6 <= wait < COARSE * needed


def test_a_late_answer_takes_all_later_ones_to_the_next_moment(answered: Callable[..., float]):
    answered(0.0)
    late = answered(8.1)
    assert late == pytest.approx(32.0)
    assert [answered(work_s) for work_s in (0.0, 31.9)] == pytest.approx([32.0, 32.0])
    assert answered(140.0) == pytest.approx(512.0)


def test_one_kind_of_work_tells_nothing_of_the_time_of_another(answered: Callable[..., float]):
    answered(20.0)
    answered(0.0, 0.0, kind="look")
    assert answered(0.1, kind="look") == pytest.approx(0.5)


def test_what_ends_before_anything_private_is_answered_at_once(clock: Clock):
    pace = Pace(clock=clock, pause=clock.pass_)
    for _ in range(2):
        pace.begin()
        began = clock.now
        pace.settle()
        assert clock.now == began
        pace.begin()
        pace.rehearse("round", 0.5, lambda: clock.pass_(1.0))
        pace.settle()


@pytest.mark.parametrize("fails", [False, True])
def test_a_failure_behind_private_work_leaves_at_the_moment_of_an_answer(
    fails: bool, clock: Clock, monkeypatch: pytest.MonkeyPatch
):
    pace = Pace(clock=clock, pause=clock.pass_)
    left: list[float] = []

    def answer(_: Any, seat: Any) -> str:
        seat.pace.rehearse("round", 0.5, lambda: clock.pass_(2.0))
        clock.pass_(0.1 if fails else 3.0)
        if fails:
            raise StateError("a record could not be read")
        return "answer"

    monkeypatch.setattr("privet.client.app.answer", answer)
    monkeypatch.setattr("privet.client.app.nothing", lambda _: "nothing")
    handle = handler(cast(Any, SimpleNamespace(pace=pace)), threading.Lock(), lambda _: None)
    message = SimpleNamespace(metadata=SimpleNamespace(message_type="train.vector"))
    for _ in range(3):
        began = clock.now
        assert handle(message, None) == ("nothing" if fails else "answer")
        left.append(clock.now - began)
    assert left == pytest.approx([12.0, 8.0, 8.0])
