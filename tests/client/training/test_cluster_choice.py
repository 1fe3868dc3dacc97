"""Several clusters: the choice is made at home, leaves in noised sums only, and is evaluated."""

import dataclasses
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from privet.client.app import app
from privet.client.device import Device, cluster_of, exchange_at, take_part
from privet.client.privacy.gate import charges
from privet.client.simulated import SimulatedContext
from privet.client.training import cluster_choice
from privet.client.training.cluster_choice import choose, mean_losses
from privet.client.training.local_training import Randomness, train
from privet.client.training.records import Tokenised
from privet.common.errors import ConfigError
from privet.common.files import read_lines
from privet.common.model.objective import collate, record_losses
from privet.common.privacy.noise import TestSource
from privet.common.privacy.plan_maker import make_plan
from privet.common.settings.config import Config, parse
from privet.experiments import engine
from privet.experiments.benchmarks.cluster_recovery import FLOOR, recovered
from privet.experiments.evaluation import cluster_evaluation, run_evaluation
from privet.experiments.simulate import prepare
from privet.server.run_folder.run import index_of_largest_cluster

from ...common.model.test_adapter import READER
from ...tiny import population, tiny_config
from ..test_gate_of_a_device import leaves_the_same, masked_leave_the_same, plan_of, records

GROUPS = {"count": 2, "extra": 0, "warmup": 1, "spread": 0.9}
Run = tuple[Path, Config]


def configured(base: Path, people: Path, **changes: Any) -> Config:
    client = {"noise_at": "server", **changes.pop("client", {})}
    return tiny_config(
        base, people, clusters=changes.pop("clusters", GROUPS),
        privacy={"example": {"enabled": False}, "client": client}, **changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return population(tmp_path_factory.mktemp("clusters"), 16, 10)


@pytest.fixture(scope="module")
def prepared(llama_folder: Path, people: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    config = configured(llama_folder, people, rounds={"count": 4})
    folder = tmp_path_factory.mktemp("clusters") / "run"
    return folder, prepare(config, folder, resume=False)


@pytest.fixture(scope="module")
def finished(prepared: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(prepared[0], tmp_path_factory.mktemp("finished") / "run"))
    engine.run("local", folder, prepared[1])
    return folder


@pytest.fixture
def bench(prepared: Run, tmp_path: Path) -> SimulatedContext:
    return SimulatedContext.open(Path(shutil.copytree(prepared[0], tmp_path / "run")))


def apart(bench: SimulatedContext, seed: int = 0) -> Any:
    """A state whose clusters differ."""
    sent = exchange_at(bench)
    drawn = 0.5 * np.random.default_rng(seed).normal(size=sent.state.dimension)
    return (sent.start + drawn).astype(np.float32)


# --- the choice ---------------------------------------------------------------------------------


def test_a_device_picks_the_persona_with_the_smallest_loss_on_its_own_records(bench):
    adapter, state = bench.trainer.adapter, exchange_at(bench).cluster_vectors(apart(bench))
    picked = set()
    for seed in range(12):
        own = records(4, seed)
        losses = mean_losses(adapter, state, own)
        assert choose(adapter, state, 2, own) == int(losses.argmin())
        picked.add(int(losses.argmin()))
        for place in range(2):
            adapter.write(state[place])
            with torch.no_grad():
                plain = [float(record_losses(adapter.base, collate([r.ids], None),
                                                     None)) for r in own]  # fmt: skip
            assert losses[place] == pytest.approx(np.mean(plain), rel=1e-5)
    assert picked == {0, 1}


def test_with_one_persona_without_records_or_without_finite_losses_it_is_the_first(bench):
    adapter, state = bench.trainer.adapter, exchange_at(bench).cluster_vectors(apart(bench)).copy()
    assert choose(adapter, state, 1, records(4)) == 0
    assert choose(adapter, state, 2, ()) == 0
    state[0] = 1e30
    assert choose(adapter, state, 2, records(4)) == 1
    state[1] = 1e30
    assert choose(adapter, state, 2, records(4)) == 0


def test_a_persona_that_is_not_there_yet_is_not_picked(bench):
    adapter, state = bench.trainer.adapter, exchange_at(bench).cluster_vectors(apart(bench))
    picks = {choose(adapter, np.concatenate([state, state + 1])[:3], 1, records(4, seed))
             for seed in range(6)}  # fmt: skip
    assert picks == {0}


# --- the privacy of the choice ------------------------------------------------------------------


def contribution(bench: SimulatedContext, state: Any, own: tuple[Tokenised, ...]) -> Any:
    """What the gate is given, before clip and noise, with the same randomness in every call."""
    sent, adapter = exchange_at(bench), bench.trainer.adapter
    plan = make_plan(bench.config, bench.run, 2, sent.state.digest, state, sent)
    plan = dataclasses.replace(plan, rate=1.0, learning_rate=100.0)  # past the clip
    all_clusters = sent.cluster_vectors(state)
    place = choose(adapter, all_clusters, sent.clusters.active_clusters(2), own)
    batches, source = np.random.default_rng(5), TestSource(1, "training")
    found = train(bench.trainer, all_clusters[place], own, plan, Randomness(batches, source))
    return place, sent.contribution(found.delta, place, plan.clip).astype(np.float64), plan


def test_a_client_moves_the_sum_by_no_more_than_the_clip_whichever_persona_it_picks(bench):
    for seed in range(8):
        _, found, plan = contribution(bench, apart(bench, seed), records(6, seed))
        assert 0 < np.linalg.norm(found) <= plan.clip * (1 + 1e-6)


def test_the_charge_of_a_release_is_that_of_one_adapter(bench, llama_folder, people):
    """The choice costs nothing more: same clip, same noise, whatever the number of clusters."""
    sent = exchange_at(bench)
    plan = plan_of(bench)
    (cost,) = charges(plan, sent.released(1).dimension, bench.config.privacy)
    alone = configured(llama_folder, people, clusters={"count": 1})
    size = sent.adapter.dimension
    other = make_plan(alone, "run", 1, "0" * 64, np.zeros(size, np.float32))
    (plain,) = charges(other, size, alone.privacy)
    assert cost.noise_multiplier == pytest.approx(plain.noise_multiplier, rel=0.003)
    assert (cost.unit, cost.against) == (plain.unit, plain.against)


def test_one_record_that_changes_the_pick_moves_the_contribution_by_more_than_the_clip(bench):
    """The trap. A batch's bound for one record would be 2 lr C / B, and never more than 2 clips;
    a flip moves sqrt(2) clips, however small the gradients are clipped."""
    state, found = apart(bench, 3), list[float]()
    for seed in range(40):
        own = records(3, seed)
        place, one, plan = contribution(bench, state, own)
        for removed in range(3):
            fewer = own[:removed] + own[removed + 1 :]
            other, two, _ = contribution(bench, state, fewer)
            if other != place:
                found.append(float(np.linalg.norm(one - two)) / plan.clip)
    assert found, "no record flipped the pick: the test shows nothing"
    assert max(found) == pytest.approx(2**0.5, rel=1e-3)

    def faulty(record_clip: float) -> float:
        """What one record is charged for without clusters, in clips."""
        return float(plan.learning_rate * record_clip / plan.batch_size / plan.clip)

    assert max(found) > 10 * faulty(record_clip=1e-3)


def test_so_no_example_level_claim_can_be_configured():
    clusters = {"clusters": {"count": 3}, "rounds": {"count": 12}}
    with pytest.raises(ConfigError, match="no example-level claim can be made"):
        parse(clusters)
    parse({**clusters, "privacy": {"example": {"enabled": False}}})


@pytest.mark.parametrize("family", ["fedsvd", "rolora", "fedsa"])
def test_personas_of_a_family_with_halves_are_refused(family):
    table = {
        "clusters": {"count": 2},
        "adapter": {"family": family},
        "training": {"steps": 2},
        "rounds": {"count": 12},
        "privacy": {"example": {"enabled": False}},
    }
    with pytest.raises(ConfigError, match="clusters are built for lora_xs, ffa, lora"):
        parse(table)


def test_more_spare_personas_than_the_rounds_can_merge_are_refused():
    off = {"privacy": {"example": {"enabled": False}}}
    clusters = {"count": 3, "extra": 2, "warmup": 1, "merge_every": 3}
    with pytest.raises(ConfigError, match="take at least 8"):
        parse({"clusters": clusters, "rounds": {"count": 7}, **off})
    enough = parse({"clusters": clusters, "rounds": {"count": 8}, **off})
    assert [enough.clusters.active_clusters(number) for number in range(1, 10)] == [
        1,
        5,
        5,
        5,
        4,
        4,
        4,
        3,
        3,
    ]


def test_the_number_of_clusters_is_part_of_a_configurations_digest():
    off = {"privacy": {"example": {"enabled": False}}, "rounds": {"count": 20}}
    two, three = (parse({"clusters": {"count": count}, **off}).digest for count in (2, 3))
    assert len({parse(off).digest, two, three}) == 3


# --- the gate -----------------------------------------------------------------------------------


def test_replies_on_different_records_differ_in_nothing_but_the_vector(
    llama_folder, people, tmp_path, monkeypatch
):
    config = configured(llama_folder, people, client={"noise_at": "device"}, rounds={"count": 4})
    prepare(config, tmp_path / "run", resume=False)
    assert leaves_the_same(tmp_path / "run", tmp_path / "same", monkeypatch, app)


def test_in_a_masked_round_only_the_masked_vector_depends_on_the_pick(
    llama_folder, people, tmp_path, monkeypatch
):
    """In a round where devices do pick, from clusters that differ."""
    config = configured(
        llama_folder, people, data={"clients": 12}, rounds={"count": 4, "cohort": 12},
        client={"noise_at": "distributed"},
    )  # fmt: skip
    prepare(config, tmp_path / "run", resume=False)
    right, picks = cluster_choice.choose, []

    def picking(adapter: Any, all_clusters: Any, _: int, own: Any, shape: Any) -> int:
        differing = all_clusters + np.arange(2, dtype=np.float32)[:, None] * 0.3
        picks.append(right(adapter, differing, 2, own, shape))
        return picks[-1]

    monkeypatch.setattr("privet.client.device.choose", picking)
    assert masked_leave_the_same(tmp_path / "run", tmp_path / "same", monkeypatch, app)
    assert set(picks) == {0, 1}


# --- whole runs ---------------------------------------------------------------------------------


def test_a_run_says_noised_members_and_splits_and_saves_a_folder_for_each_persona(finished):
    log = read_lines(finished / "rounds.jsonl")
    assert [len(line["members"]) for line in log] == [1, 2, 2, 2]
    assert log[0]["split"] == 2
    bench, state = SimulatedContext.open(finished.resolve()), cluster_evaluation.state_of(finished)
    one, two = exchange_at(bench).cluster_vectors(state)
    assert not np.array_equal(one, two)
    base = bench.config.model.base
    folders = [finished / "adapter" / name for name in ("cluster-0", "cluster-1", ".")]
    subprocess.run([sys.executable, "-c", READER, *(f"{base}={f}" for f in folders)], check=True)
    first, second, top = (torch.load(folder / "found.pt") for folder in folders)
    assert not torch.allclose(first, second)
    assert torch.equal(top, (first, second)[index_of_largest_cluster(finished, 2)])


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(prepared, finished, tmp_path):
    from privet.experiments.grid import LocalGrid
    from privet.server.app import serve

    folder = Path(shutil.copytree(prepared[0], tmp_path / "run"))

    def stop(_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        serve(LocalGrid(app, 6, str(folder)), folder, stop)
    engine.run("local", folder, prepared[1])
    assert (
        cluster_evaluation.state_of(folder).tobytes()
        == cluster_evaluation.state_of(finished).tobytes()
    )


@pytest.mark.heavy
def test_the_local_and_the_ray_engine_agree(prepared, finished, tmp_path):
    folder = Path(shutil.copytree(prepared[0], tmp_path / "run"))
    engine.run("ray", folder, prepared[1])
    assert (
        cluster_evaluation.state_of(folder).tobytes()
        == cluster_evaluation.state_of(finished).tobytes()
    )


def test_masked_rounds_of_personas_go_through_and_the_spare_ones_are_merged(
    llama_folder, people, tmp_path
):
    config = configured(
        llama_folder, people, data={"clients": 12}, rounds={"count": 3, "cohort": 12},
        clusters={**GROUPS, "extra": 1, "merge_every": 1},
        client={"noise_at": "distributed", "noise_multiplier": 0.5},
    )  # fmt: skip
    folder = tmp_path / "run"
    engine.run("local", folder, prepare(config, folder, resume=False))
    log = read_lines(folder / "rounds.jsonl")
    assert [line["answered"] for line in log] == [12, 12, 12]
    assert [len(line["members"]) for line in log] == [1, 3, 2]
    # as many numbers, each with noise of 0.5 / 0.35 times sqrt(12 / 6)
    assert abs(sum(log[1]["members"]) - 12) < 20
    assert [len(line.get("merged", ())) for line in log] == [0, 2, 0]
    saved = sorted(path.name for path in (folder / "adapter").glob("cluster-*"))
    assert saved == ["cluster-0", "cluster-1"]
    bench, state = SimulatedContext.open(folder.resolve()), cluster_evaluation.state_of(folder)
    assert set(cluster_evaluation.choices(bench, bench.index.train_users, state)) <= {0, 1}


def test_losses_are_measured_under_the_own_persona_and_the_largest_one(finished):
    bench, state = SimulatedContext.open(finished.resolve()), cluster_evaluation.state_of(finished)
    users = list(bench.index.train_users)
    found = cluster_evaluation.evaluate_people(bench, users, state, True)
    chosen = cluster_evaluation.choices(bench, users, state)
    assert found["users"] == users
    assert set(found) == {"users", "base", "global", "group", "personal"}
    top = index_of_largest_cluster(finished, 2)
    for number, place in enumerate(chosen):
        same = found["group"][number] == pytest.approx(found["global"][number], abs=1e-9)
        assert same == (place == top)
    said = run_evaluation.evaluate(finished, bench.config)
    assert set(said["unseen"]) >= {"base", "global", "group"}
    assert np.array_equal(
        run_evaluation.global_adapter(finished), exchange_at(bench).cluster_vectors(state)[top]
    )


def test_a_persons_own_adapter_is_that_of_the_persona_it_picks(finished):
    bench, state = SimulatedContext.open(finished.resolve()), cluster_evaluation.state_of(finished)
    for user in bench.index.train_users:
        place, vector = cluster_of(Device(user, bench), state)
        assert np.array_equal(vector, exchange_at(bench).cluster_vectors(state)[place])
        assert np.array_equal(cluster_evaluation.adapter_of(bench, user, state), vector)


def test_a_device_declines_a_state_of_another_number_of_personas(bench):
    sent = exchange_at(bench)
    digest = hashlib.sha256(sent.first.tobytes()).hexdigest()
    plan = dataclasses.replace(plan_of(bench), start=digest)
    assert take_part(bench.device(0), plan, sent.first) is None
    (declined,) = bench.ledger.declined(bench.device(0).name)
    assert "both sides need the same clusters.count" in declined.reason


@pytest.mark.heavy
def test_three_made_dialects_are_found_at_epsilon_8(tmp_path, monkeypatch):
    """The floor of the clusters: 500 devices, client level, an adjusted Rand index of 0.8."""
    monkeypatch.chdir(tmp_path)
    found = recovered(21, tmp_path / "runs", [])
    assert found["people"] == 500
    assert found["epsilon"] <= 8
    assert found["ari"] >= FLOOR
