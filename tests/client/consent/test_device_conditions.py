"""device_conditions.py: whether this device takes part now, and what its worker may take."""

import os
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privet.client.consent.device_conditions import (
    Reading,
    not_now,
    read_conditions,
    threads,
)
from privet.client.consent.policy import own_config
from privet.client.consent.policy_settings import Policy, Resources
from privet.client.privacy.gate import budgets
from privet.client.privacy.ledger import Ledger
from privet.common.errors import BudgetExceeded
from privet.common.privacy.accounting import Charge
from privet.common.settings.config import Config

NOON = datetime(2026, 3, 1, 12, 0)
FINE = Reading(on_battery=False, battery=80.0, load=0.1)


def during(hours: str, **when: object) -> Policy:
    return Policy.model_validate({"when": {"hours": hours, **when}})


def supply(folder: Path, name: str, **files: str) -> None:
    (folder / name).mkdir(parents=True)
    for file, content in files.items():
        (folder / name / file).write_text(content + "\n")


# --- hours --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hours", "inside", "outside"),
    [
        ("", ["00:00", "12:00", "23:59"], []),
        ("22:00-07:00", ["22:00", "23:59", "00:00", "06:59"], ["07:00", "12:00", "21:59"]),
        ("09:00-17:00", ["09:00", "16:59"], ["08:59", "17:00", "00:00"]),
        ("22:00-24:00", ["22:00", "23:59"], ["00:00", "21:59"]),
        ("22:00-0:00", ["22:00", "23:59"], ["00:00", "21:59"]),
        ("00:00-24:00", ["00:00", "23:59"], []),
        ("1:00 - 2:00, 12:30-13:00", ["01:30", "12:59"], ["02:00", "12:29", "13:00"]),
    ],
)
def test_hours_are_open_from_their_first_minute_and_closed_at_their_last(hours, inside, outside):
    for minute in inside + outside:
        now = datetime.strptime(minute, "%H:%M")
        assert (not_now(during(hours), now, FINE) is None) == (minute in inside), minute


@given(st.integers(0, 1439), st.integers(0, 1439), st.datetimes())
def test_a_range_and_its_reverse_are_never_open_together(start, end, now):
    if start == end:
        return
    one, other = (f"{a // 60:02}:{a % 60:02}" for a in (start, end))
    answers = [not_now(during(f"{a}-{b}"), now, FINE) for a, b in ((one, other), (other, one))]
    assert sum(answer is None for answer in answers) == 1


def test_the_reason_names_the_time_and_the_key():
    said = not_now(during("22:00-07:00"), NOON, FINE)
    assert said == "it is 12:00, outside when.hours = '22:00-07:00'"


# --- the machine --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reading", "when", "said"),
    [
        (Reading(), {}, None),  # an unknown machine takes part
        (FINE, {}, None),
        (Reading(paused=True), {}, "paused"),
        (Reading(on_battery=True, battery=90.0), {}, "on_battery = false"),
        (Reading(on_battery=True, battery=90.0), {"on_battery": True}, None),
        (Reading(on_battery=True, battery=29.0), {"on_battery": True}, "has 29 %, below"),
        (Reading(on_battery=False, battery=29.0), {}, "below when.min_battery = 30"),
        (
            Reading(on_battery=True, battery=0.0),
            {"on_battery": True, "min_battery": 0.0},
            None,
        ),
        (Reading(load=2.1), {}, "the load is 2.1 for each core, above when.max_load = 2"),
        (Reading(load=2.0), {}, None),
    ],
)
def test_each_condition_has_its_sentence(reading, when, said):
    found = not_now(during("", **when), NOON, reading)
    assert found is None if said is None else said in str(found)


def test_a_laptop_is_on_battery_when_no_supply_is_online(tmp_path):
    supply(tmp_path, "AC", type="Mains", online="0")
    supply(tmp_path, "BAT0", type="Battery", status="Discharging", capacity="40")
    supply(tmp_path, "BAT1", type="Battery", status="Unknown", capacity="60")
    found = read_conditions(supplies=tmp_path)
    assert (found.on_battery, found.battery) == (True, 50.0)
    (tmp_path / "AC" / "online").write_text("1\n")
    assert read_conditions(supplies=tmp_path).on_battery is False


def test_without_a_supply_to_ask_the_batteries_say_it(tmp_path):
    supply(tmp_path, "BAT0", type="Battery", status="Discharging", capacity="40")
    assert read_conditions(supplies=tmp_path).on_battery is True
    (tmp_path / "BAT0" / "status").write_text("Charging\n")
    assert read_conditions(supplies=tmp_path).on_battery is False


def test_a_mouse_and_a_broken_driver_are_no_battery_of_this_machine(tmp_path):
    supply(tmp_path, "mouse", type="Battery", scope="Device", status="Discharging", capacity="3")
    supply(tmp_path, "AC", type="Mains", online="1")
    assert read_conditions(supplies=tmp_path).battery is None
    assert read_conditions(supplies=tmp_path).on_battery is None
    supply(tmp_path, "BAT0", type="Battery", status="\xff", capacity="-1")
    assert read_conditions(supplies=tmp_path) == read_conditions(supplies=tmp_path)
    assert read_conditions(supplies=tmp_path).battery is None


def test_a_machine_without_these_files_has_no_battery_and_takes_part(tmp_path):
    found = read_conditions(supplies=tmp_path / "nowhere")
    assert (found.on_battery, found.battery, found.paused) == (None, None, False)
    assert not_now(during(""), NOON, Reading(None, None, None)) is None
    assert read_conditions(paused=True, supplies=tmp_path).paused


def test_the_load_is_for_each_core(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "getloadavg", lambda: (6.0, 1.0, 1.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert read_conditions(supplies=tmp_path).load == 1.5

    def unknown():
        raise OSError

    monkeypatch.setattr(os, "getloadavg", unknown)
    assert read_conditions(supplies=tmp_path).load is None


# --- clocks -------------------------------------------------------------------------------------


def test_a_clock_that_jumps_back_opens_hours_and_never_a_budget(monkeypatch, tmp_path):
    policy = during("22:00-07:00")
    privacy = own_config(policy, Config()).privacy
    cost = [Charge("client", "server", "add_remove", 1.0)]
    with Ledger.open(tmp_path / "ledger", owner="me") as ledger:
        for number in range(1, 5):
            ledger.check("me", cost, budgets(privacy), privacy.delta)
            ledger.commit("me", "run", number, "0" * 64, cost, b"")
        monkeypatch.setattr(time, "time", lambda: 0.0)
        monkeypatch.setattr(time, "monotonic", lambda: 0.0)
        assert not_now(policy, datetime.fromtimestamp(0).replace(hour=23), FINE) is None
        with pytest.raises(BudgetExceeded):
            ledger.check("me", cost, budgets(privacy), privacy.delta)


# --- what the worker may take -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "cores", "expected"),
    [(0.5, 1, 1), (0.5, 3, 1), (0.5, 8, 4), (1.0, 8, 8), (0.01, 64, 1), (0.3, 10, 3), (0.7, 10, 7)],
)
def test_threads_are_the_share_rounded_down_but_one_at_least(share, cores, expected):
    assert threads(Resources(cpu_share=share), cores) == expected
    assert threads(Resources()) >= 1


LIMITED = """
import os
from privet.client.consent.device_conditions import limit_process
from privet.client.consent.policy_settings import Resources
limit_process(Resources(memory_mb=400, nice=7))
limit_process(Resources(memory_mb=400, nice=7))
print(os.nice(0))
kept = bytearray(200 * 2**20)
try:
    bytearray(300 * 2**20)
except MemoryError:
    print("refused")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA is Linux's")
def test_a_limited_process_gives_way_and_is_refused_memory_above_its_limit():
    done = subprocess.run(
        [sys.executable, "-c", LIMITED], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["7", "refused"]
