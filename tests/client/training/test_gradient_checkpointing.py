"""Blocks that are computed twice, so that little of them is kept: same gradients, less memory."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from privet.client.training.local_training import (
    Randomness,
    Trained,
    Trainer,
    _Hooked,
    losses_of,
    train,
)
from privet.client.training.records import Tokenised
from privet.common.model import base_model
from privet.common.model.adapter import Adapter, attach
from privet.common.model.base_model import load_anew
from privet.common.privacy.noise import TestSource
from privet.common.settings.sections import AdapterSettings, ComputeSettings, PreferenceSettings

from ...common.model.test_architectures import MORE, RECORDS, SHAPE, made, moved
from .test_local_training import plan

PAIRS = [
    Tokenised((6, 7, 8, 9), 0.0, rejected=(6, 7, 12), prompts=(2, 2)),
    Tokenised((20, 21, 22), 0.0, rejected=(20, 21, 30, 31), prompts=(1, 1)),
]


def attached(folder: Path, twice: bool, dtype: str = "float32", **changes: Any) -> Adapter:
    compute = ComputeSettings(device="cpu", dtype=dtype, gradient_checkpointing=twice)
    settings = AdapterSettings(**{"family": "lora", "rank": 2, "last_blocks": 2, **changes})
    base = load_anew(str(folder), compute)
    adapter = attach(base, settings, 3 if base.kind == "encoder" else 0)
    adapter.write(moved(adapter))
    return adapter


def trained(trainer: Trainer, records: list[Tokenised] = RECORDS, **changes: Any) -> Trained:
    adapter, shape = trainer.adapter, changes.pop("shape", None)
    public = plan(**{"rate": 1.0, "batch_size": 3, "record_clip": 0.5, **changes})
    randomness = Randomness(np.random.default_rng(1), TestSource(1, "noise"))
    return train(trainer, moved(adapter), records, public, randomness, shape=shape)


def same(one: Trained, other: Trained) -> bool:
    return bool(np.array_equal(one.delta, other.delta) and np.abs(one.delta).sum() > 0)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("kind", sorted(MORE))
def test_a_private_step_is_the_same_to_the_bit(kind, tmp_path):
    folder = made(kind, tmp_path)
    once, twice = (Trainer.of(attached(folder, each)) for each in (False, True))
    assert same(trained(twice), trained(once))


@pytest.mark.parametrize("family", ["lora_xs", "ffa", "fedsvd", "rolora", "lora"])
@pytest.mark.parametrize("number", [1, 2])
def test_so_it_is_for_every_family_and_turn_where_the_last_layer_of_a_block_alone_is_adapted(
    llama, family, number
):
    """Its slope arrives before anything of the block has been asked for."""
    how = {"family": family, "modules": ("down_proj",)}
    once, twice = (Trainer.of(attached(llama, each, **how)) for each in (False, True))
    assert same(trained(twice, round=number), trained(once, round=number))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_so_it_is_in_constant_shapes_whose_trial_runs_too(llama, dtype):
    once, twice = (Trainer.of(attached(llama, each, dtype)) for each in (False, True))
    assert same(trained(twice, shape=SHAPE), trained(once, shape=SHAPE))
    assert twice.tried


def test_so_it_is_over_a_cached_prefix_and_without_privacy_and_for_pairs(llama):
    for cache_mb, pairs, records, clip in (
        (1, None, RECORDS, 0.5),
        (0, None, RECORDS, 0.0),
        (0, PreferenceSettings(), PAIRS, 0.5),
        (1, PreferenceSettings(), PAIRS, 0.5),
    ):
        once, twice = (
            trained(Trainer.of(attached(llama, each), cache_mb, pairs), records, record_clip=clip)
            for each in (False, True)
        )
        assert same(twice, once)


def test_several_chunks_and_steps_follow_each_other(llama):
    many = [Tokenised((6 + n, 7, 8 + n), 0.0) for n in range(40)]
    once, twice = (
        trained(Trainer.of(attached(llama, each)), many, local_steps=2) for each in (False, True)
    )
    assert same(twice, once)


def test_hooks_that_record_both_passes_are_refused(llama, monkeypatch):
    @contextlib.contextmanager
    def loud(_: _Hooked) -> Iterator[None]:
        yield

    monkeypatch.setattr(_Hooked, "silenced", loud)
    with pytest.raises(Exception, match="saw no rows for 3 records"):
        trained(Trainer.of(attached(llama, True)))


def test_a_block_is_itself_again_after_the_pass_and_after_an_exception(llama, monkeypatch):
    adapter = attached(llama, True)
    trainer = Trainer.of(adapter)
    trained(trainer)

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("in the middle")

    monkeypatch.setattr(base_model, "checkpoint", fails)
    with pytest.raises(RuntimeError, match="in the middle"):
        trained(trainer)
    assert not any("forward" in vars(block) for _, block in adapter.base.blocks)
    monkeypatch.undo()
    assert same(trained(trainer), trained(Trainer.of(attached(llama, False))))


def test_a_pass_keeps_the_inputs_of_the_blocks_alone(llama):
    """Counted, not timed: bytes that are held between a pass and its way back."""
    once, twice = (_held(attached(llama, each, last_blocks=3)) for each in (False, True))
    assert twice < once / 4


def _held(adapter: Adapter) -> int:
    trainer, kept = Trainer.of(adapter), dict[int, int]()
    frozen = {p.untyped_storage().data_ptr() for p in adapter.base.network.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in frozen:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    adapter.train_only(1)
    trainer.hooked.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = losses_of(trainer, RECORDS * 4)
    for module in trainer.hooked.modules():
        for recorded in getattr(module, "activations", []):
            for tensor in recorded:
                keep(tensor)
    del losses
    return sum(kept.values())


GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "1048576"}
"""With it glibc gives large tensors back to the system, so that peaks are of what is in use."""

STEP = """
import json, resource, sys
from pathlib import Path
from tests.client.training.test_gradient_checkpointing import attached, trained
from privet.client.training.constant_work import Shape
from privet.client.training.local_training import Trainer
from privet.client.training.records import Tokenised

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

modules = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
folder, twice = Path(sys.argv[1]), sys.argv[2] == "twice"
adapter = attached(folder, twice, rank=16, last_blocks=8, modules=modules)
records = [Tokenised(tuple(6 + (31 * n + k) % 180 for n in range(2048)), 0.0) for k in (1, 2)]
before = peak()
done = trained(Trainer.of(adapter), records, batch_size=2, shape=Shape(1, 2, 2049, spare=0))
print(json.dumps([len(done.delta), peak() - before, float(done.delta[0])]))
"""


@pytest.mark.heavy
def test_2048_tokens_train_lora_of_all_layers_at_rank_16_in_a_fraction_of_the_memory(tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8}
    folder = made("llama", tmp_path, **sizes, max_position_embeddings=4096)
    once, twice = (
        json.loads(
            subprocess.run(
                [sys.executable, "-c", STEP, str(folder), how], capture_output=True, check=True,
                cwd=Path(__file__).parents[3], env=os.environ | GIVEN_BACK,
            ).stdout
        )
        for how in ("once", "twice")
    )  # fmt: skip
    assert once[0] == twice[0] > 0.5e6
    assert once[2] == twice[2] != 0
    assert twice[1] < 0.4 * once[1]
