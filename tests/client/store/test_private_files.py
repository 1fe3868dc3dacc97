"""What names people or has secrets is its owner's alone from its first byte, whatever the umask."""

import os
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from privet.client.privacy.run_ledger import LEDGERS
from privet.client.simulated import AT_HOME, DEVICE_SECRET, DIRECTORY
from privet.client.store import key_file
from privet.client.store.device_store import DeviceStore
from privet.client.store.key_file import Passphrase
from privet.client.training.records import RECORDS_FILE
from privet.common.child_processes import Children, Spec
from privet.common.files import append_line, write_atomic, write_json_atomic
from privet.common.secure_aggregation.keys import Directory, write_directory
from privet.experiments import engine
from privet.experiments.simulate import prepare
from privet.server.operations import device_runs, setup

from ...tiny import population, tiny_config

pytestmark = pytest.mark.skipif(os.name == "nt", reason="no file modes there")


@pytest.fixture(autouse=True)
def careless() -> Iterator[None]:
    """The umask of a shell that takes nothing away."""
    before = os.umask(0)
    yield
    os.umask(before)


def readable_by_others(folder: Path, *published: str) -> list[str]:
    """Files and folders that group or world may touch, but for what a run publishes."""
    found = [folder, *(path for path in folder.rglob("*") if not path.is_symlink())]
    return sorted(
        str(path.relative_to(folder))
        for path in found
        if stat.S_IMODE(path.stat().st_mode) & 0o077
        and not any(path.is_relative_to(folder / name) for name in published)
    )


def test_the_files_of_a_simulated_run_are_its_owners_alone(llama_folder, tmp_path):
    config = tiny_config(
        llama_folder, population(tmp_path / "people", 10, 10), adapter={"family": "fedsa"},
        training={"steps": 2}, privacy={"example": {"enabled": False}}, rounds={"count": 1},
    )  # fmt: skip
    run = tmp_path / "runs" / "run"
    prepare(config, run, resume=False)
    assert readable_by_others(run) == []
    engine.run("local", run, config)
    names = {path.name for path in run.rglob("*")}
    assert {DEVICE_SECRET, DIRECTORY, LEDGERS, RECORDS_FILE, AT_HOME, "rounds.jsonl"} <= names
    assert len(list((run / AT_HOME).iterdir())) == 3
    assert readable_by_others(run, "adapter") == []


def test_the_walk_finds_a_file_that_others_could_read(tmp_path):
    tmp_path.chmod(0o700)
    (tmp_path / "secret").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    assert readable_by_others(tmp_path) == ["folder", "secret"]


def test_the_files_of_a_server_are_its_owners_alone(llama_folder, tmp_path):
    server = setup.init(tmp_path / "server", ["privet.example.org"])
    known = {number: bytes([number]) * 32 for number in range(6)}
    write_directory(server.folder / "directory", Directory(known, closed=True))
    write_json_atomic(server.folder / "devices.json", [])
    device_runs.prepare(server, tiny_config(llama_folder, "devices", name="first"), resume=False)
    names = {path.name for path in server.folder.rglob("*")}
    assert {"ca.key", "superexec.secret", "directory", "run-id"} <= names
    assert readable_by_others(server.folder) == []


def test_a_programs_own_files_such_as_the_state_database_are_its_owners_alone(tmp_path):
    """As the SuperLink makes them, in Python, with the mode that its umask leaves."""
    code = "import os, sys; open(sys.argv[1], 'w').close(); os.rename(sys.argv[1], sys.argv[2])"
    made = tmp_path / "made"
    command = (sys.executable, "-c", code, f"{made}.part", str(made))
    with Children() as processes:
        processes.start(Spec("program", command, log=tmp_path / "logs" / "program.log"))
        while processes.status("program") is None:
            time.sleep(0.02)
    assert readable_by_others(tmp_path / "logs") == []
    assert stat.S_IMODE(made.stat().st_mode) == 0o600


def test_the_files_of_a_devices_home_are_its_owners_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(key_file, "_ARGON2ID", {"iterations": 1, "lanes": 1, "memory_kib": 1024})
    folder = tmp_path / "home"
    with DeviceStore.create(folder, Passphrase("own"), "Ann's laptop") as home:
        home.note("something")
        assert readable_by_others(folder) == []
    assert {"vault.sqlite", "key.json", "policy.toml"} <= {p.name for p in folder.iterdir()}
    assert readable_by_others(folder) == []


def test_a_file_that_others_may_read_already_is_replaced_by_one_that_they_may_not(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_bytes(b"old")
    assert stat.S_IMODE(path.stat().st_mode) == 0o666
    write_atomic(path, b"new")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    append_line(tmp_path / "log.jsonl", {"user": "ann"})
    assert stat.S_IMODE((tmp_path / "log.jsonl").stat().st_mode) == 0o600
