"""What a client does with its model on a device beside the CPU: no tensor is on the wrong side.

The device is a fake (`tests/fake_device.py`), so this runs where there is no GPU. Each piece of
work runs there and on the CPU, and gives the same. Faults are planted too: without one of its
`.cpu()` a piece of work must fail, or nothing would be shown.
"""

import inspect
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from privet.client.assistant import text_generation
from privet.client.assistant.text_generation import Sampling, completed
from privet.client.personal import label_evaluator, label_head, pair_evaluator, scored_text
from privet.client.personal.person_losses import evaluator_of
from privet.client.personal.text_evaluator import TextEvaluator
from privet.client.training import local_training
from privet.client.training.cluster_choice import mean_losses
from privet.client.training.constant_work import Shape
from privet.client.training.local_training import Randomness, Trainer
from privet.client.training.records import Tokenised
from privet.client.training.side_by_side import Task, train_side_by_side
from privet.common.model import adapter as adapters
from privet.common.model.adapter import Adapter, attach
from privet.common.model.base_model import BaseModel, load_anew
from privet.common.model.families import FAMILIES
from privet.common.privacy.noise import TestSource
from privet.common.settings.sections import AdapterSettings, ComputeSettings, PreferenceSettings
from privet.experiments.lamp.answering import _likely

from ..fake_device import DEVICE, OnDevice, fake_device
from .training.test_local_training import plan, records, run

Numbers = NDArray[np.float64]
Piece = Callable[[Path, str], Numbers]

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")
SHAPE = Shape(1, 5, 13, spare=0)
LIKELIHOOD, HEAD = PreferenceSettings(), PreferenceSettings(score="head")


def opened(folder: Path, dtype: str) -> BaseModel:
    return load_anew(str(folder), ComputeSettings(device="cpu", dtype=dtype))


def adapted(folder: Path, dtype: str, outputs: int = 0, family: str = "lora_xs") -> Adapter:
    return attach(opened(folder, dtype), AdapterSettings(family=family, last_blocks=2), outputs)


def away(adapter: Adapter) -> NDArray[np.float32]:
    noise = np.random.default_rng(5).normal(size=len(adapter.start))
    return (adapter.start + 0.3 * noise).astype(np.float32)


def labelled() -> list[Tokenised]:
    return [Tokenised(record.ids, float(n % 3)) for n, record in enumerate(records(5))]


def pairs() -> list[Tokenised]:
    return [
        Tokenised(one.ids, 0.0, rejected=other.ids, prompts=(1, 1))
        for one, other in zip(records(5), records(5, seed=9), strict=True)
    ]


def trained(private: bool, shape: Shape | None, **more: object) -> Piece:
    """Two steps, of which the second has moved from the start."""

    def piece(folder: Path, dtype: str) -> Numbers:
        settings = more.get("pairs")
        outputs = 1 if settings is HEAD else 3 if "labels" in more else 0
        own = pairs() if settings else labelled() if outputs else records(5)
        trainer = Trainer.of(adapted(folder, dtype, outputs), more.get("cache_mb", 0), settings)
        changes = {} if private else {"record_clip": 0.0}
        start, public = away(trainer.adapter), plan(local_steps=2, **changes)
        return np.asarray(run(trainer, own, public, start, shape=shape), np.float64)

    return piece


def evaluated(outputs: int, own: list[Tokenised], settings: PreferenceSettings | None) -> Piece:
    def piece(folder: Path, dtype: str) -> Numbers:
        adapter = adapted(folder, dtype, outputs)
        evaluator = evaluator_of(adapter, away(adapter), pairs=settings)
        person = evaluator.person(own[:3], own[3:], fit=True)
        assert person is not None
        if person.head is not None:
            person.head.to_bytes()
        return np.array([person.base, person.loss(None), person.loss(person.head)])

    return piece


def in_one_batch(shape: Shape | None) -> Piece:
    """Two devices of a simulation, side by side."""

    def piece(folder: Path, dtype: str) -> Numbers:
        trainer = Trainer.of(adapted(folder, dtype))
        tasks = [
            Task(records(4, seed=n), Randomness(np.random.default_rng(n), TestSource(n, "noise")))
            for n in (1, 2)
        ]
        public = plan(local_steps=1 if shape else 2, record_noise=0.5)
        done = train_side_by_side(trainer, away(trainer.adapter), tasks, public, shape)
        return np.concatenate([one.delta for one in done]).astype(float)

    return piece


def written(folder: Path, dtype: str) -> Numbers:
    """Each family is attached, written, saved and read."""
    found = list[NDArray[np.float32]]()
    for family in FAMILIES:
        adapter = adapted(folder, dtype, family=family)
        vector = away(adapter)
        adapter.write(vector)
        adapter.save(folder.parent / f"saved {family}")
        assert np.array_equal(adapter.read(), vector)
        found += [adapter.start, adapter.read_local_factor()]
    return np.concatenate(found).astype(float)


def chosen_cluster(folder: Path, dtype: str) -> Numbers:
    adapter = adapted(folder, dtype)
    return mean_losses(adapter, np.stack([adapter.start, away(adapter)]), records(5), SHAPE)


def generated(folder: Path, dtype: str) -> Numbers:
    adapter = adapted(folder, dtype)
    person = TextEvaluator(adapter, away(adapter)).person(records(3), records(2, seed=4), fit=True)
    assert person is not None
    starts = [[7, 8, 9], [10]]
    rows = [
        row
        for head in (None, person.head)
        for row in completed(adapter.base, starts, head, Sampling(4, temperature=0))
    ]
    return np.array([len(row) for row in rows] + [token for row in rows for token in row], float)


def answered(folder: Path, dtype: str) -> Numbers:
    return np.array(_likely(opened(folder, dtype), [7, 8, 9], ["ba ben", "dor"]))


PIECES: dict[str, Piece] = {
    "private steps": trained(True, None),
    "private steps of a public shape": trained(True, SHAPE),
    "plain steps": trained(False, None),
    "private steps with a cache": trained(True, None, cache_mb=1),
    "plain steps of a public shape": trained(False, SHAPE),
    "private steps with labels": trained(True, None, labels=True),
    "plain steps with labels": trained(False, None, labels=True),
    "private steps on pairs": trained(True, SHAPE, pairs=LIKELIHOOD),
    "plain steps on pairs": trained(False, None, pairs=LIKELIHOOD),
    "private steps on scored pairs": trained(True, None, pairs=HEAD),
    "devices in one batch": in_one_batch(None),
    "devices in one batch of a public shape": in_one_batch(SHAPE),
    "texts evaluated": evaluated(0, records(6), None),
    "labels evaluated": evaluated(3, labelled(), None),
    "pairs evaluated": evaluated(0, pairs(), LIKELIHOOD),
    "scored pairs evaluated": evaluated(1, pairs(), HEAD),
    "adapters of all families": written,
    "choice of a cluster": chosen_cluster,
    "text generated": generated,
    "labels ranked": answered,
}
OF_AN_ENCODER = ("private steps with labels", "plain steps with labels", "labels evaluated")
IN_BFLOAT16 = (
    "devices in one batch of a public shape",
    "private steps of a public shape",
    "plain steps",
    "private steps on pairs",
    "texts evaluated",
    "pairs evaluated",
    "adapters of all families",
    "text generated",
    "labels ranked",
)


def on_both_sides(piece: Piece, folder: Path, dtype: str) -> tuple[Numbers, Numbers]:
    with pytest.MonkeyPatch.context() as patch, fake_device(patch, getattr(torch, dtype)):
        there = piece(folder, dtype)
    return there, piece(folder, dtype)


@pytest.mark.parametrize("name", PIECES)
def test_a_client_does_the_same_on_another_device(name, llama_folder):
    there, here = on_both_sides(PIECES[name], llama_folder, "float32")
    assert np.isfinite(here).all()
    assert np.allclose(there, here, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", OF_AN_ENCODER)
def test_so_it_does_with_an_encoder(name, bert_folder):
    there, here = on_both_sides(PIECES[name], bert_folder, "float32")
    assert np.allclose(there, here, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", IN_BFLOAT16)
def test_so_it_does_in_bfloat16(name, llama_folder):
    """Its attention has another kernel, so only the sides are tested here, not the numbers."""
    with pytest.MonkeyPatch.context() as patch, fake_device(patch, torch.bfloat16):
        assert np.isfinite(PIECES[name](llama_folder, "bfloat16")).all()


@pytest.mark.parametrize("name", [name for name in PIECES if "plain" not in name])
def test_so_it_does_where_there_is_no_float64(name, llama_folder):
    with pytest.MonkeyPatch.context() as patch, fake_device(patch, torch.float32, no_double=True):
        assert np.isfinite(PIECES[name](llama_folder, "float32")).all()


PLANTED: list[tuple[str, object, str]] = [
    ("adapters of all families", adapters, "_numbers"),
    ("plain steps", local_training, "step_gradient"),
    ("private steps", local_training.PrivateOptimizer, "add_noise"),
    ("texts evaluated", scored_text, "_under"),
    ("labels evaluated", label_evaluator.LabelEvaluator, "features"),
    ("labels evaluated", label_head.LabelHead, "of"),
    ("pairs evaluated", pair_evaluator.LikelihoodEvaluator, "_answers"),
    ("scored pairs evaluated", pair_evaluator.ScoreEvaluator, "_views"),
    ("text generated", text_generation, "sampled"),
]


@pytest.mark.parametrize(
    ("name", "owner", "function"), PLANTED, ids=lambda one: getattr(one, "__name__", one)
)
def test_without_its_way_back_to_the_cpu_a_piece_of_work_fails(
    name, owner, function, llama_folder, monkeypatch
):
    source = textwrap.dedent(inspect.getsource(getattr(owner, function)))
    assert ".cpu()" in source
    module = owner if isinstance(owner, ModuleType) else inspect.getmodule(owner)
    made = dict(vars(module))
    exec(source.replace(".cpu()", ""), made)
    monkeypatch.setattr(owner, function, made[function])
    with (
        pytest.MonkeyPatch.context() as patch,
        fake_device(patch, torch.float32),
        pytest.raises(RuntimeError, match=r"one device|numpy|tensor subclasses"),
    ):
        PIECES[name](llama_folder, "float32")


def test_the_fake_refuses_what_a_gpu_refuses_and_nothing_else(monkeypatch):
    with fake_device(monkeypatch, torch.float32):
        there, here = torch.arange(3.0, device=DEVICE), torch.ones(3)
        assert isinstance(there, OnDevice)
        assert there.tolist() == [0.0, 1.0, 2.0]
        assert float((there.cpu() + here).sum()) == 6
        assert (there * torch.tensor(2.0)).cpu().numpy().tolist() == [0.0, 2.0, 4.0]
        assert float(there[torch.tensor([2])]) == 2
        assert float(there.copy_(here).sum()) == 3
        assert torch.tensor([1, 2], device=DEVICE).device == DEVICE
        with pytest.raises(RuntimeError, match="one device"):
            there + here
        with pytest.raises(RuntimeError, match="one device"):
            here[there.long()]
        with pytest.raises(RuntimeError, match="numpy"):
            there.numpy()
    assert torch.arange(3.0, device=DEVICE).is_meta
    with fake_device(monkeypatch, torch.float32, no_double=True):
        there = torch.ones(3, device=DEVICE)
        assert there.cpu().double().sum() == 3
        with pytest.raises(TypeError, match="no float64"):
            there.double()
