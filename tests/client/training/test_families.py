"""Whole rounds with fedsvd, rolora and fedsa: what leaves, what stays, and that wrong ones fail."""

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privet.client import device
from privet.client.app import app
from privet.client.device import exchange_at, take_part
from privet.client.simulated import AT_HOME, SimulatedContext
from privet.client.training import local_factor
from privet.client.training import local_training as training
from privet.client.training.local_training import Trained
from privet.common.errors import ConfigError, GateRefused, StateError
from privet.common.files import read_lines
from privet.common.privacy.encoding import unpack
from privet.common.privacy.plan_maker import make_plan
from privet.common.settings.config import Config, parse
from privet.experiments import engine
from privet.experiments.evaluation.cluster_evaluation import state_of
from privet.experiments.simulate import prepare
from privet.server.run_folder import checkpoint

from ...tiny import population, tiny_config
from ..test_gate_of_a_device import leaves_the_same

FAMILIES = ("fedsvd", "rolora", "fedsa")


def configured(base: Path, people: Path, family: str, **changes: Any) -> Config:
    example = {"enabled": False} if family == "fedsa" else {"enabled": True}
    privacy = {"example": example, **changes.pop("privacy", {})}
    training = {"steps": 2 if family == "fedsa" else 1}
    return tiny_config(
        base, people, adapter={"family": family}, privacy=privacy, training=training, **changes
    )


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return population(tmp_path_factory.mktemp("families"), 10, 10)


@pytest.fixture(scope="module", params=FAMILIES)
def prepared(
    request: pytest.FixtureRequest, llama_folder: Path, people: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Config]:  # fmt: skip
    folder = tmp_path_factory.mktemp("families") / "run"
    config = configured(llama_folder, people, request.param, rounds={"count": 4})
    return folder, prepare(config, folder, resume=False)


def copied(prepared: tuple[Path, Config], folder: Path) -> Path:
    return Path(shutil.copytree(prepared[0], folder))


def plan_of(bench: SimulatedContext, number: int, state: Any = None) -> Any:
    sent = exchange_at(bench)
    start = sent.start if state is None else state
    return make_plan(bench.config, bench.run, number, sent.state.digest, start, sent)


# --- whole runs ---------------------------------------------------------------------------------


def test_a_run_ends_in_a_plain_peft_folder_and_is_the_same_after_a_pause(prepared, tmp_path):
    whole, broken = copied(prepared, tmp_path / "whole"), copied(prepared, tmp_path / "broken")
    engine.run("local", whole, prepared[1])
    seen = []

    def stop(record: Any) -> None:
        seen.append(record)
        if len(seen) == 2:
            raise KeyboardInterrupt

    from privet.experiments.grid import LocalGrid
    from privet.server.app import serve

    with pytest.raises(KeyboardInterrupt):
        serve(LocalGrid(app, 6, str(broken)), broken, stop)
    engine.run("local", broken, prepared[1])
    assert state_of(whole).tobytes() == state_of(broken).tobytes()
    names = ("adapter_model.safetensors", "adapter_config.json")
    for name in names:
        assert (whole / "adapter" / name).read_bytes() == (broken / "adapter" / name).read_bytes()


def test_masked_rounds_go_through_for_each_family(llama_folder, tmp_path):
    """No family's halves or turns meet the masks: one vector of the plan's length goes through."""
    people = population(tmp_path / "people", 16, 8)
    for family in FAMILIES:
        folder = tmp_path / family
        config = configured(
            llama_folder, people, family, data={"clients": 12}, rounds={"count": 2, "cohort": 12},
            privacy={"client": {"noise_at": "distributed"}},
        )  # fmt: skip
        config = prepare(config, folder, resume=False)
        engine.run("local", folder, config)
        records = read_lines(folder / "rounds.jsonl")
        assert [(one["answered"], one["void"]) for one in records] == [(12, False)] * 2
        assert all(one["update_norm"] > 0 for one in records)


@pytest.mark.heavy
def test_the_local_and_the_ray_engine_agree_for_each_family(prepared, tmp_path):
    local, ray = copied(prepared, tmp_path / "local"), copied(prepared, tmp_path / "ray")
    engine.run("local", local, prepared[1])
    engine.run("ray", ray, prepared[1])
    assert state_of(local).tobytes() == state_of(ray).tobytes()


def test_a_rounds_release_has_the_length_and_layout_of_what_it_trains(prepared, tmp_path):
    bench = SimulatedContext.open(copied(prepared, tmp_path / "run"))
    sent = exchange_at(bench)
    for number in (1, 2):
        plan = plan_of(bench, number)
        assert plan.layout == sent.released(number).digest
        payload = take_part(bench.device(number), plan, sent.start)
        assert payload is not None
        assert len(unpack(payload, sent.released(number).dimension, plan.bits))


def test_a_device_trains_exactly_the_half_of_the_round(prepared, tmp_path, monkeypatch):
    bench = SimulatedContext.open(copied(prepared, tmp_path / "run"))
    family, adapter, sent = bench.config.adapter.family, bench.trainer.adapter, exchange_at(bench)
    right, seen = training.train, []

    def watched(trainer: Any, start: Any, *given: Any, **named: Any) -> Trained:
        before = {n: p.detach().clone() for n, p in adapter.base.network.named_parameters()}
        found = right(trainer, start, *given, **named)
        after = dict(adapter.base.network.named_parameters())
        seen.append({n for n in before if not bool((before[n] == after[n]).all())})
        return found

    monkeypatch.setattr(device, "train", watched)
    adapter.write(sent.start)
    for number in (1, 2):
        assert take_part(bench.device(0), plan_of(bench, number), sent.start) is not None
        adapter.write(sent.start)
    wanted = {"fedsvd": ("B", "B"), "rolora": ("B", "A"), "fedsa": ("AB", "AB")}[family]
    for moved, halves in zip(seen, wanted, strict=True):
        letters = {name.split(".lora_")[1][0] for name in moved}
        assert letters <= set(halves)
        assert "B" in letters or halves == "A"


# --- versions that are wrong --------------------------------------------------------------------


def test_a_device_that_would_release_both_halves_is_stopped_before_anything_is_spent(
    prepared, tmp_path, monkeypatch
):
    """rolora with both halves, fedsvd with A, fedsa with B: longer than the round's layout."""
    bench = SimulatedContext.open(copied(prepared, tmp_path / "run"))
    adapter = bench.trainer.adapter

    def both(*_: Any, **__: Any) -> Trained:
        size = adapter.layout.dimension + adapter.local_factor.dimension
        return Trained(np.ones(size, np.float32), np.zeros(0))

    monkeypatch.setattr(device, "train", both)
    name = bench.device(0).name
    assert take_part(bench.device(0), plan_of(bench, 1), exchange_at(bench).start) is None
    assert bench.ledger.participations(name) == 0
    assert "the round's layout has" in bench.ledger.declined(name)[0].reason
    with pytest.raises(GateRefused):
        device._answer(bench.device(0), plan_of(bench, 1), exchange_at(bench).start)


def test_a_plan_of_the_other_half_is_declined(llama_folder, people, tmp_path):
    config = configured(llama_folder, people, "rolora", rounds={"count": 4})
    prepare(config, tmp_path / "run", resume=False)
    bench = SimulatedContext.open(tmp_path / "run")
    odd, even = plan_of(bench, 1), plan_of(bench, 2)
    swapped = dataclasses.replace(odd, layout=even.layout)
    assert take_part(bench.device(0), swapped, exchange_at(bench).start) is None
    assert bench.ledger.participations(bench.device(0).name) == 0


def test_a_of_fedsvd_is_covered_by_the_hash_of_the_plan(llama_folder, people, tmp_path):
    config = configured(llama_folder, people, "fedsvd", rounds={"count": 4})
    prepare(config, tmp_path / "run", resume=False)
    bench = SimulatedContext.open(tmp_path / "run")
    other = exchange_at(bench).start.copy()
    other[0] += 1  # a number of A
    assert take_part(bench.device(0), plan_of(bench, 1), other) is None
    (declined,) = bench.ledger.declined(bench.device(0).name)
    assert "is not the one announced" in declined.reason


# --- fedsa: B stays -----------------------------------------------------------------------------


def fedsa(base: Path, people: Path, folder: Path, **changes: Any) -> Path:
    config = configured(base, people, "fedsa", rounds={"count": 4}, **changes)
    prepare(config, folder, resume=False)
    return folder


def test_fedsa_makes_no_example_level_claim_and_wants_two_steps():
    table = {"adapter": {"family": "fedsa"}, "training": {"steps": 2}}
    with pytest.raises(ConfigError, match="B is fitted on the device's records without DP"):
        parse(table)
    off = {"privacy": {"example": {"enabled": False}}}
    parse({**table, **off})
    with pytest.raises(ConfigError, match="gradient of A exactly zero"):
        parse({**table, **off, "training": {"steps": 1}})


def test_b_is_kept_at_home_and_the_next_round_goes_on_from_it(llama_folder, people, tmp_path):
    bench = SimulatedContext.open(fedsa(llama_folder, people, tmp_path / "run"))
    one, sent = bench.device(0), exchange_at(bench)
    size = bench.trainer.adapter.local_factor.dimension
    assert take_part(one, plan_of(bench, 1), sent.start) is not None
    first = local_factor.before(bench.local_factor(one.name), 2, size)
    assert first is not None
    assert first.any()
    assert take_part(one, plan_of(bench, 2), sent.start) is not None
    second = local_factor.before(bench.local_factor(one.name), 3, size)
    assert second is not None
    assert not np.array_equal(first, second)
    assert len(list((tmp_path / "run" / AT_HOME).iterdir())) == 1


def test_no_reply_of_fedsa_but_the_vector_depends_on_records_or_on_b(
    llama_folder, people, tmp_path, monkeypatch
):
    prepared = fedsa(
        llama_folder, people, tmp_path / "run", privacy={"client": {"noise_at": "device"}}
    )
    assert leaves_the_same(prepared, tmp_path / "same", monkeypatch, app)


def test_the_vector_of_fedsa_has_room_for_a_only_and_b_is_in_no_file_of_the_server(
    llama_folder, people, tmp_path
):
    folder = fedsa(llama_folder, people, tmp_path / "run")
    bench = SimulatedContext.open(folder)
    engine.run("local", folder, bench.config)
    own = [
        local_factor.before(path.read_bytes(), 99, bench.trainer.adapter.local_factor.dimension)
        for path in (folder / AT_HOME).iterdir()
    ]
    assert len(own) >= 3
    written = [path.read_bytes() for path in folder.rglob("*")
               if path.is_file() and path.parent.name != AT_HOME]  # fmt: skip
    for values in own:
        assert values is not None
        piece = values[np.flatnonzero(values)[0] :][:4].tobytes()
        assert not any(piece in data for data in written)
    dimension = exchange_at(bench).released(1).dimension
    assert dimension == bench.trainer.adapter.layout.dimension
    kept = checkpoint.load(
        folder, run=bench.run, config_hash=bench.config.digest,
        layout=exchange_at(bench).state.digest,
    )  # fmt: skip
    assert kept is not None
    assert len(kept.adapter) == dimension


def test_what_is_kept_at_home_is_that_of_two_rounds_and_a_round_begun_again_starts_as_before():
    drawn = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    kept: bytes | None = None
    assert local_factor.before(kept, 1, 3) is None
    for number, values in enumerate(drawn, 1):
        kept = local_factor.added(kept, number, values)
    assert np.array_equal(local_factor.before(kept, 5, 3), drawn[3])  # type: ignore[arg-type]
    assert np.array_equal(local_factor.before(kept, 4, 3), drawn[2])  # type: ignore[arg-type]
    assert local_factor.before(kept, 3, 3) is None
    again = local_factor.added(kept, 4, drawn[0])
    assert np.array_equal(local_factor.before(again, 4, 3), drawn[2])  # type: ignore[arg-type]
    with pytest.raises(StateError, match="has \\(3,\\) numbers, expected 4"):
        local_factor.before(kept, 5, 4)
    with pytest.raises(StateError, match="damaged"):
        local_factor.before(os.urandom(40), 5, 3)
