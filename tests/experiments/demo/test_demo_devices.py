"""experiments/demo/demo_devices.py: the demo on real processes, and what it may touch."""

import io
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from privet import commands as main
from privet.client.consent.policy import DEFAULT, Policy, read, reasons
from privet.common.errors import RunExists, StateError
from privet.common.files import read_lines
from privet.common.settings import config as configs
from privet.experiments.demo import demo_devices
from privet.experiments.demo.demo_devices import MARK, POLICY_CHANGES, adapted, claimed

from ...nginx import find_or_fetch_nginx


def test_a_folder_that_no_demo_made_is_refused_and_left_alone(tmp_path):
    (tmp_path / "letters.txt").write_text("dear")
    said = "holds something that no `privet demo-devices` made"
    with pytest.raises(RunExists, match=said), claimed(tmp_path):
        raise AssertionError
    assert (tmp_path / "letters.txt").read_text() == "dear"
    with pytest.raises(RunExists), claimed(tmp_path / "letters.txt"):
        raise AssertionError


def test_the_folder_of_an_earlier_demo_is_made_anew(tmp_path):
    folder, outside = tmp_path / "demo", tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    with claimed(folder):
        (folder / "device-1").mkdir()
        (folder / "device-1" / "passphrase").touch()
        (folder / "link").symlink_to(outside)
    with claimed(folder):
        assert [one.name for one in folder.iterdir()] == [MARK]
    assert (outside / "kept").exists()


def test_two_demos_do_not_share_a_folder(tmp_path):
    with claimed(tmp_path / "demo"):
        (tmp_path / "demo" / "server").mkdir()
        said = "another `privet demo-devices` is running"
        with pytest.raises(StateError, match=said), claimed(tmp_path / "demo"):
            raise AssertionError
        assert (tmp_path / "demo" / "server").is_dir()


def test_the_adapted_policy_differs_in_those_keys_only_and_says_why(tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text(adapted(DEFAULT))
    found, default = read(path), Policy()
    for section in Policy.model_fields:
        for key in type(getattr(default, section)).model_fields:
            mine, theirs = (getattr(getattr(one, section), key) for one in (found, default))
            assert (mine != theirs) == (key in POLICY_CHANGES), key
    for key, (value, why) in POLICY_CHANGES.items():
        assert f"# changed by `make demo-devices`: {why}\n{key} = {value}\n" in path.read_text()


def test_a_policy_without_a_key_is_an_error_not_a_policy_left_as_it_was():
    with pytest.raises(StateError, match="0 lines 'nice'"):
        adapted(DEFAULT.replace("nice = ", "kind = "))


def test_the_demos_run_is_within_the_adapted_policy_and_outside_the_default_one(tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text(adapted(DEFAULT))
    config = configs.read(demo_devices.CONFIG)
    assert not reasons(read(path), config, "localhost:1")
    assert any("min_cohort" in why for why in reasons(Policy(), config, "localhost:1"))


def test_four_of_six_devices_are_enough_and_three_are_not():
    config = configs.read(demo_devices.CONFIG)
    assert config.min_sum == demo_devices.DEVICES - 2


def test_equal_figures_share_a_column_and_a_device_without_one_has_none():
    def line(unit: str, against: str, value: float) -> dict[str, object]:
        return {"unit": unit, "against": against, "budget": 10.0, "epsilon": value}

    first = {"lines": [line("client", "analyst", 1.0), line("client", "server", 1.0),
                       line("example", "unmasked server", 9.0)]}  # fmt: skip
    found = demo_devices._columns([first, {"lines": []}])
    assert list(found.values()) == [(1.0, None), (9.0, None)]
    assert [head.splitlines()[-1] for head in found] == ["analyst, server", "unmasked server"]


def test_a_command_gives_what_it_prints_and_its_refusal_in_its_own_words(tmp_path):
    assert demo_devices.call("--version").startswith("privet ")
    with pytest.raises(StateError, match="privet client status: there is no home in"):
        demo_devices.call("client", "status", "--home", tmp_path / "none")


def of_this_demo(folder: Path) -> list[str]:
    listed = subprocess.run(["ps", "-A", "-o", "pid=,args="], capture_output=True, text=True)
    return [line for line in listed.stdout.splitlines() if str(folder) in line]


@pytest.mark.heavy
@pytest.mark.real
def test_the_demo_ends_with_four_of_six_devices_and_nothing_left_running(tmp_path, monkeypatch):
    if nginx := find_or_fetch_nginx():
        monkeypatch.setenv("PATH", f"{nginx.parent}:{os.environ['PATH']}")
    said = io.StringIO()
    demo_devices.demo(tmp_path / "demo", Console(file=said, width=100, color_system=None))
    text = said.getvalue()
    rounds = read_lines(tmp_path / "demo/server/runs/devices/rounds.jsonl")
    assert [record["answered"] for record in rounds] == [6, 5, 4]
    assert not any(record["void"] for record in rounds)
    assert text.count("opens again: identity") == 2
    assert "What was spent (at most)" in text
    assert of_this_demo(tmp_path) == []


@pytest.mark.heavy
@pytest.mark.real
def test_a_demo_that_is_stopped_leaves_nothing_running(tmp_path, monkeypatch):
    def stop() -> None:
        limit = time.monotonic() + 300
        while not list((tmp_path / "runs").glob("demo-devices/logs/device-6.log")):
            assert time.monotonic() < limit
            time.sleep(0.1)
        time.sleep(2)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.chdir(tmp_path)
    watcher = threading.Thread(target=stop)
    watcher.start()
    assert main.run(["demo-devices"]) == 130
    watcher.join()
    assert of_this_demo(tmp_path) == []
