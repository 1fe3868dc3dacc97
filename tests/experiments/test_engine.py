"""experiments/engine.py: two wires, the same two apps, the same bits; failures are told."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message

from privet.client import simulated
from privet.client.privacy.ledger import verify
from privet.client.privacy.run_ledger import LEDGERS
from privet.client.simulated import SimulatedContext
from privet.client.training.side_by_side import train_side_by_side
from privet.common.errors import ConfigError, LedgerCorrupt, StateError
from privet.common.files import read_lines
from privet.common.settings.config import Config, read, to_toml
from privet.experiments import engine
from privet.experiments.simulate import prepare
from privet.server.run_folder import checkpoint

from ..tiny import patiently, population, tiny_config


@pytest.fixture(scope="module")
def prepared(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config]:
    folder = tmp_path_factory.mktemp("engine")
    people = population(folder / "people", 10, 8)
    return folder / "run", prepare(tiny_config(llama_folder, people), folder / "run", resume=False)


def copied(prepared: tuple[Path, Config], folder: Path) -> Path:
    return Path(shutil.copytree(prepared[0], folder))


def adapter(folder: Path) -> bytes:
    bench = SimulatedContext.open(folder.resolve())
    kept = checkpoint.load(
        folder,
        run=bench.run,
        config_hash=bench.config.digest,
        layout=bench.trainer.adapter.layout.digest,
    )
    assert kept is not None
    return kept.adapter.tobytes()


def spent(folder: Path) -> dict[str, Any]:
    ledger = SimulatedContext.open(folder.resolve()).ledger
    return {name: ledger.charges(name) for name in ledger.clients()}


@pytest.mark.heavy  # tests/server/test_masked_rounds.py compares the engines under masking
def test_the_local_grid_and_flowers_ray_engine_give_the_same_adapter_and_ledgers(
    prepared, tmp_path, capfd
):
    local, ray = copied(prepared, tmp_path / "local"), copied(prepared, tmp_path / "ray")
    engine.run("local", local, prepared[1])
    capfd.readouterr()
    patiently(lambda: engine.run("ray", ray, prepared[1]), capfd.readouterr)
    told = capfd.readouterr().err.splitlines()
    assert adapter(local) == adapter(ray)
    assert spent(local) == spent(ray)
    assert (local / "adapter" / "adapter_model.safetensors").read_bytes() == (
        ray / "adapter" / "adapter_model.safetensors"
    ).read_bytes()
    assert [line[:9] for line in told] == ["round 1/2", "round 2/2"]  # and no word of Ray's


def side_by_side(folder: Path, processes: int) -> Config:
    """The run's settings, with so many processes; speed settings are nobody else's."""
    config = read(folder / "config.toml")
    speed = config.speed.model_copy(update={"processes": processes})
    config = config.model_copy(update={"speed": speed})
    (folder / "config.toml").write_text(to_toml(config))
    return config


@pytest.mark.parametrize("masked", [False, True])
def test_devices_side_by_side_give_the_same_adapter_and_ledgers(llama_folder, tmp_path, masked):
    place = {"client": {"noise_at": "distributed" if masked else "server"}}
    people = population(tmp_path / "people", 16, 8)
    sizes = {"data": {"clients": 12}, "rounds": {"count": 2, "cohort": 12}}
    config = tiny_config(llama_folder, people, privacy=place, **sizes)
    one, many = tmp_path / "one", tmp_path / "many"
    prepared = prepare(config, one, resume=False)
    shutil.copytree(one, many)
    engine.run("local", one, prepared)
    engine.run("local", many, side_by_side(many, 3))
    assert adapter(one) == adapter(many)
    assert spent(one) == spent(many)
    assert verify(one / LEDGERS) == verify(many / LEDGERS) == 2 * 12


def together(folder: Path, devices: int, processes: int = 1) -> Config:
    """The run's settings, with so many devices in one batch."""
    config = side_by_side(folder, processes)
    speed = config.speed.model_copy(update={"together": devices})
    config = config.model_copy(update={"speed": speed})
    (folder / "config.toml").write_text(to_toml(config))
    return config


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("steps", [1, 2])
def test_devices_trained_in_one_batch_give_the_same_adapter_and_spend_the_same(
    llama_folder, tmp_path, monkeypatch, masked, steps
):
    batches = []

    def watched(trainer, start, tasks, plan, shape):
        batches.append(len(tasks))
        return train_side_by_side(trainer, start, tasks, plan, shape)

    monkeypatch.setattr(simulated, "train_side_by_side", watched)
    place = {"client": {"noise_at": "distributed" if masked else "server"}}
    people = population(tmp_path / "people", 16, 8)
    sizes = {"data": {"clients": 12}, "rounds": {"count": 2, "cohort": 12}}
    config = tiny_config(llama_folder, people, privacy=place, training={"steps": steps}, **sizes)
    one, many, forked = (tmp_path / name for name in ("one", "many", "forked"))
    prepared = prepare(config, one, resume=False)
    for folder in (many, forked):
        shutil.copytree(one, folder)
    engine.run("local", one, prepared)
    assert not batches
    engine.run("local", many, together(many, 5))
    assert batches == [5, 5, 2] * 2
    engine.run("local", forked, together(forked, 5, processes=2))
    apart = np.frombuffer(adapter(one), np.float32)
    for folder in (many, forked):
        found = np.frombuffer(adapter(folder), np.float32)
        np.testing.assert_allclose(found, apart, rtol=1e-4, atol=1e-5)
        assert spent(folder) == spent(one)
        assert verify(folder / LEDGERS) == 2 * 12


def test_a_process_that_dies_ends_the_run_with_a_sentence_and_the_run_goes_on(
    prepared, tmp_path, monkeypatch
):
    folder = copied(prepared, tmp_path / "run")
    config, told = side_by_side(folder, 2), engine.told

    def killed(message: Message, context: Context) -> Message:
        if int(context.node_config["partition-id"]) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return told(message, context)

    monkeypatch.setattr(engine, "told", killed)
    with pytest.raises(StateError, match=r"speed.processes = 2 has ended.*--resume"):
        engine.run("local", folder, config)
    monkeypatch.setattr(engine, "told", told)
    engine.run("local", folder, config)
    whole = copied(prepared, tmp_path / "whole")
    engine.run("local", whole, prepared[1])
    assert adapter(folder) == adapter(whole)


def test_what_a_device_raises_in_its_process_the_run_raises(prepared, tmp_path):
    folder = copied(prepared, tmp_path / "run")
    config = side_by_side(folder, 2)
    damage(folder / LEDGERS)
    with pytest.raises(LedgerCorrupt, match=r"ledgers.sqlite"):
        engine.run("local", folder, config)
    assert multiprocessing.active_children() == []


@pytest.mark.heavy
def test_devices_die_at_the_same_phases_in_both_engines(llama_folder, tmp_path):
    people = population(tmp_path / "people", 16, 8)
    config = prepare(
        tiny_config(
            llama_folder,
            people,
            data={"clients": 12},
            rounds={"count": 1, "cohort": 12},
            privacy={"client": {"noise_at": "distributed"}},
            simulation={"dropout": 0.25},
        ),
        tmp_path / "local",
        resume=False,
    )
    ray = Path(shutil.copytree(tmp_path / "local", tmp_path / "ray"))
    for name in ("local", "ray"):
        engine.run(name, tmp_path / name, config)
    (one,), (other,) = (read_lines(tmp_path / name / "rounds.jsonl") for name in ("local", "ray"))
    assert one["answered"] == other["answered"] < 12
    assert not one["void"]
    assert adapter(tmp_path / "local") == adapter(ray)
    assert spent(tmp_path / "local") == spent(ray)


def test_a_simulated_device_is_never_too_late_however_busy_the_machine(
    llama_folder, tmp_path, monkeypatch
):
    """Each message takes longer than the limits of real devices, and more of them than at once."""
    monkeypatch.setattr("privet.server.replies.AT_ONCE", 2)
    limits = {"timeout_s": 1e-6, "answer_timeout_s": 1e-6, "count": 1}
    people = population(tmp_path / "people", 10, 8)
    config = tiny_config(llama_folder, people, rounds=limits)
    engine.run("local", tmp_path / "run", prepare(config, tmp_path / "run", resume=False))
    (only,) = read_lines(tmp_path / "run" / "rounds.jsonl")
    assert (only["void"], only["answered"]) == (False, only["asked"])


def damage(ledger: Path) -> None:
    ledger.write_bytes(ledger.read_bytes()[: 4096 + 100])


def test_a_damaged_ledger_ends_a_local_run_with_its_sentence_and_is_left_alone(prepared, tmp_path):
    folder = copied(prepared, tmp_path / "run")
    damage(folder / LEDGERS)
    before = (folder / LEDGERS).read_bytes()
    with pytest.raises(LedgerCorrupt, match=r"ledgers.sqlite"):
        engine.run("local", folder, prepared[1])
    assert (folder / LEDGERS).read_bytes() == before
    assert read_lines(folder / "rounds.jsonl") == []


@pytest.mark.heavy
def test_a_damaged_ledger_ends_a_ray_run_with_its_sentence_too(prepared, tmp_path):
    folder = copied(prepared, tmp_path / "run")
    damage(folder / LEDGERS)
    with pytest.raises(StateError, match=r"ledgers.sqlite .*damaged") as told:
        engine.run("ray", folder, prepared[1])
    assert "\n" not in str(told.value)
    assert read_lines(folder / "rounds.jsonl") == []


class Failing:
    """A grid whose one reply is Flower's report of an exception."""

    name = "grid"

    def pull_messages(self, _: Iterable[str]) -> Iterator[Any]:
        reason = "<class 'E'>:<'trace\nException E occurred. Message: The ledger 'x' is damaged.'>"
        yield SimpleNamespace(has_error=lambda: True, error=SimpleNamespace(reason=reason))


def test_a_device_that_failed_elsewhere_is_quoted_not_skipped():
    strict = engine._Strict(Failing(), threading.Event())
    assert strict.name == "grid"
    with pytest.raises(StateError, match=r"^The ledger 'x' is damaged\.$"):
        list(strict.pull_messages(["1"]))


def test_a_stopped_run_waits_for_nobody():
    stopped = threading.Event()
    stopped.set()
    with pytest.raises(KeyboardInterrupt):
        list(engine._Strict(Failing(), stopped).pull_messages(["1"]))


def test_an_unknown_engine_is_refused_with_the_known_ones(prepared):
    with pytest.raises(ConfigError, match="--engine spark: expected one of local, ray"):
        engine.run("spark", *prepared)


# --- graphics cards ----------------------------------------------------------------------------


def on_a_card(monkeypatch, device: str) -> None:
    """The base model says that it is on a card of 24 GB that nobody has."""
    weights = [torch.empty(1 << 28, device="meta")]  # 1 GB in float32
    network = SimpleNamespace(parameters=lambda: weights)
    base = SimpleNamespace(compute=SimpleNamespace(device=torch.device(device)), network=network)
    monkeypatch.setattr(engine, "shared", lambda _: SimpleNamespace(base=base))
    card = SimpleNamespace(total_memory=24 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)


def test_rays_actors_get_their_share_of_a_card(prepared, monkeypatch):
    assert engine._share_of_a_card(prepared[1]) == 0
    on_a_card(monkeypatch, "cuda:0")
    assert engine._share_of_a_card(prepared[1]) == 0.2


@pytest.mark.parametrize("cores", [1, 3, 49, 1000])
def test_so_many_actors_fit_on_a_card_with_the_servers_process(cores):
    share = engine.share_of_a_card(1 << 28, 80 << 30, cores)
    actors = int(1 // share)  # as Flower counts them
    assert actors == min(cores, 80 * 4 // 7 - 1)
    assert actors * share <= 1


def test_another_card_than_the_first_is_rays_to_deal_out(prepared, monkeypatch):
    on_a_card(monkeypatch, "cuda:1")
    with pytest.raises(ConfigError, match=r'compute\.device = "cuda:1" cannot be had'):
        engine.run("ray", *prepared)


def test_forked_processes_do_not_share_a_card(prepared, monkeypatch, tmp_path):
    folder = copied(prepared, tmp_path / "run")
    config = side_by_side(folder, 2)
    on_a_card(monkeypatch, "cuda:0")
    with pytest.raises(ConfigError, match=r"speed\.processes = 2: forked processes cannot share"):
        engine.run("local", folder, config)


# --- flwr run ----------------------------------------------------------------------------------

PORTS = {"FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": "41591", "FLWR_LOCAL_CONTROL_API_PORT": "41593"}


def stop_superlink(home: Path) -> None:
    """The detached SuperLink that `flwr run` started, found by its own folder; by process id."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if b"flower-superlink" in command and str(home).encode() in command:
            os.kill(int(process.name), signal.SIGTERM)


@pytest.mark.heavy
def test_flwr_run_gives_the_same_adapter_with_the_commands_of_the_docs(prepared, tmp_path):
    local, run = copied(prepared, tmp_path / "local"), tmp_path / "runs" / "tiny"
    engine.run("local", local, prepared[1])
    (tmp_path / "tiny.toml").write_text(to_toml(prepared[1]))
    home, scripts = tmp_path / "flwr", Path(sys.executable).parent
    home.mkdir()
    environment = {
        **os.environ,
        **PORTS,
        "PATH": f"{scripts}:{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }

    def call(*command: str) -> str:
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=1200
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    printed = call("privet", "simulate", "tiny.toml", "--prepare-only")
    assert Path(printed.strip()) == run.resolve()
    try:
        call(
            "flwr", "run", str(Path(__file__).parents[2]), "--stream",
            "--run-config", f'run="{run.resolve()}"',
            "--federation-config", "num-supernodes=6 client-resources-num-cpus=1",
        )  # fmt: skip
    finally:
        stop_superlink(home)
    call("privet", "simulate", "tiny.toml", "--resume")
    assert adapter(local) == adapter(run)
    assert (run / "report.html").exists()
