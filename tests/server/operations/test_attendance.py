"""server/operations/attendance.py: what was heard of each device, and what is missing."""

import stat
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from privet.server.operations.attendance import FILE, Attendance, Heard, of_run, read, table
from privet.server.operations.control import Node
from privet.server.operations.enrolment import Card, Device
from privet.server.participants import Participants

from ..test_participants import DIRECTORY, RUN, Fleet, settings

MINE = version("privet")
NOW = 1_700_000_000.0


def device(number: int) -> Device:
    return Device(number, Card(f"{number:064x}", f"key {number}", f"name {number}"))


def node(number: int, status: str = "online") -> Node:
    return Node(number, f"key {number}", status, NOW + number)


def rows(heard: dict[int, Heard], nodes: list[Node] | None, count: int = 1) -> list[dict[str, Any]]:
    return table([device(number) for number in range(count)], heard, nodes, RUN)


def test_a_run_keeps_what_each_device_said_signed(tmp_path: Path):
    fleet = Fleet()
    fleet.changed = {
        11: lambda reply, _: {**reply, "version": "0.0.9"},
        12: lambda reply, _: {**reply, "accepted": False},
        13: lambda reply, _: {**reply, "signature": b"\0" * 64},
    }
    kept = Attendance(tmp_path / FILE, RUN, lambda: NOW)
    here = Participants(lambda: fleet.nodes, fleet.hello, DIRECTORY, settings(), RUN, kept)
    assert here.greet() == [0]
    assert read(tmp_path / FILE) == {
        0: Heard(MINE, RUN, True, NOW),
        1: Heard("0.0.9", RUN, False, NOW),
        2: Heard(MINE, RUN, False, NOW),
    }
    assert stat.S_IMODE((tmp_path / FILE).stat().st_mode) == 0o600


def test_a_device_that_is_still_there_is_seen_again_and_the_file_written_seldom(tmp_path: Path):
    now = [NOW]
    kept = Attendance(tmp_path / FILE, RUN, lambda: now[0])
    kept.heard(0, MINE, True)
    for _ in range(12):
        kept.present([0])
        now[0] += 1
    assert read(tmp_path / FILE)[0].time == NOW + 10
    again = Attendance(tmp_path / FILE, "run-2", lambda: now[0])  # of the next process
    again.heard(1, MINE, False)
    again.present([])
    assert read(tmp_path / FILE).keys() == {0, 1}


@pytest.mark.parametrize(
    ("said", "nodes", "missing"),
    [
        (Heard(MINE, RUN, True, NOW), [node(0)], ""),
        (Heard(MINE, RUN, True, NOW), None, ""),
        (Heard(MINE, RUN, False, NOW), [node(0)], "has not accepted the run"),
        (Heard("0.0.9", RUN, False, NOW), [node(0)], f"runs privet 0.0.9, this server {MINE}"),
        (Heard(MINE, "run-0", True, NOW), [node(0)], "no answer to this run yet"),
        (Heard(MINE, RUN, True, NOW), [node(0, "offline")], "offline: `privet client start`"),
        (Heard(MINE, RUN, True, NOW), [], "its node key: enrol its card again"),
        (None, [node(0)], "has not been asked in a run yet"),
    ],
)
def test_the_first_thing_that_is_missing_is_named(said: Heard, nodes: Any, missing: str):
    (row,) = rows({0: said} if said else {}, nodes)
    assert row["missing"].startswith(missing)
    assert bool(row["missing"]) == bool(missing)


def test_each_device_has_number_name_version_and_when_it_was_seen():
    first, second = rows({1: Heard("0.0.9", RUN, False, NOW)}, [node(0)], count=2)
    assert (first["number"], first["name"], first["version"]) == (0, "name 0", None)
    assert (first["online"], first["last_seen"]) == (True, "2023-11-14T22:13:20+00:00")
    assert (second["number"], second["version"], second["online"]) == (1, "0.0.9", False)
    assert second["accepted"] is False


def test_a_simulations_run_keeps_nothing_and_a_damaged_file_says_nothing(tmp_path: Path):
    assert of_run(tmp_path / "runs" / "mine") is None
    (tmp_path / "server.json").write_text("{}")
    found = of_run(tmp_path / "runs" / "mine")
    assert found is not None
    assert (found.path, found.run) == (tmp_path / FILE, "mine")
    for content in ("", "[]", '{"0": {"version": 1}}', '{"x": 1}'):
        (tmp_path / FILE).write_text(content)
        assert read(tmp_path / FILE) == {}
