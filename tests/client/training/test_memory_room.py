"""memory_room.py: less at once where memory runs out, by what is public, and said once."""

import logging
from collections.abc import Callable

import numpy as np
import pytest
import torch

from privet.client.training import local_training
from privet.client.training.constant_work import Shape
from privet.client.training.kernel_trial import refuse_coupling
from privet.client.training.local_training import Trainer
from privet.client.training.memory_room import Room, fitting, ran_out
from privet.client.training.records import Tokenised
from privet.common.errors import ConfigError
from privet.common.model.base_model import load_anew
from privet.common.settings.sections import ComputeSettings

from ...tiny import fresh
from .test_local_training import plan, records, run, trainer_of

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")
SHAPE = Shape(2, 9, 13)


@pytest.fixture
def trainer(llama_folder) -> Trainer:
    found: Trainer = trainer_of(fresh(llama_folder))
    return found


def full_above(
    monkeypatch: pytest.MonkeyPatch, rows: int, error: Callable[[], Exception]
) -> list[list[Tokenised]]:
    """Memory is full after the way there of more rows; returns the records of each such pass."""
    honest, broken = local_training.losses_of, list[list[Tokenised]]()

    def losses_of(trainer, some, shape=None):
        losses = honest(trainer, some, shape)
        if len(losses) > rows:
            broken.append(list(some))
            raise error()
        return losses

    monkeypatch.setattr(local_training, "losses_of", losses_of)
    return broken


def cuda() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def allocator() -> Exception:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(1 << 60, dtype=torch.uint8)
    return refused.value


def test_what_the_machine_says_when_memory_runs_out_is_known():
    assert ran_out(cuda())
    assert ran_out(allocator())
    with pytest.raises(MemoryError) as refused:
        np.empty(1 << 60, np.uint8)
    assert ran_out(refused.value)
    assert not ran_out(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.parametrize("error", [cuda, allocator, MemoryError])
@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_a_simulated_device_goes_on_with_fewer_records_at_once_and_says_so_once(
    trainer, monkeypatch, caplog, error, clip
):
    own, public = records(12), plan(local_steps=2, record_clip=clip, record_noise=clip / 2)
    wanted = run(trainer, own, public)
    assert trainer.room.records == 16
    broken = full_above(monkeypatch, 4, error)
    with caplog.at_level(logging.WARNING):
        found = [run(trainer, own, public) for _ in range(2)]
    assert trainer.room.records == 4
    assert len(broken) == 2  # of 16, then 8; never again
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "16 records at once; from now on 4 pass" in caplog.text
    for one in found:
        assert np.allclose(one, wanted, rtol=1e-4, atol=1e-6)


def test_a_public_shape_is_made_smaller_before_any_record_is_touched(trainer, monkeypatch, caplog):
    own, public = records(14), plan(local_steps=2)
    wanted = run(trainer, own, public, shape=SHAPE)
    trainer.tried.clear()
    broken = full_above(monkeypatch, 5, cuda)
    with caplog.at_level(logging.WARNING):
        found = [run(trainer, own, public, shape=SHAPE) for _ in range(2)]
        run(trainer, [], public, shape=SHAPE)
    assert broken == [SHAPE.made_up()]
    assert {record.ids for record in broken[0]} == {(0,) * 13}
    assert [*trainer.tried.values()] == [Shape(4, 5, 13)]
    assert len(caplog.records) == 1
    assert "8 records at once; from now on 4 pass" in caplog.text
    for one in found:
        assert np.allclose(one, wanted, rtol=1e-4, atol=1e-6)


def test_below_float32_the_kernels_are_tried_in_the_smaller_shape(llama_folder, monkeypatch):
    base = load_anew(str(llama_folder), ComputeSettings(device="cpu", dtype="bfloat16"))
    trainer, own, shape = trainer_of(base), records(6), Shape(1, 8, 13, spare=0)
    full_above(monkeypatch, 4, cuda)
    tried = list[Shape]()

    def noted(adapter, some, gradients):
        tried.append(some)
        refuse_coupling(adapter, some, gradients)

    monkeypatch.setattr(local_training, "refuse_coupling", noted)
    found = run(trainer, own, plan(), shape=shape)
    assert tried == [Shape(2, 4, 13, spare=0)]
    assert np.array_equal(found, run(trainer, own, plan(), shape=tried[0]))


def test_memory_that_runs_out_on_records_of_a_public_shape_ends_the_round(trainer, monkeypatch):
    """It would depend on the records, for all that anybody knows."""
    run(trainer, [], plan(), shape=SHAPE)
    full_above(monkeypatch, 0, cuda)
    with pytest.raises(torch.OutOfMemoryError):
        run(trainer, records(3), plan(), shape=SHAPE)


def test_no_room_for_one_record_is_one_sentence(trainer, monkeypatch):
    full_above(monkeypatch, 0, cuda)
    for shape, what in ((None, "one record"), (SHAPE, "one record of 13 tokens")):
        with pytest.raises(ConfigError, match=f"not enough memory for {what}: make data.max_tok"):
            run(trainer, records(3), plan(), shape=shape)


def test_other_errors_are_nobodys_memory():
    def wrong(*_: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        Room(16).taken(wrong)
    with pytest.raises(RuntimeError, match="mat1"):
        fitting(SHAPE, wrong)


@pytest.mark.parametrize("spare", [0, 1])
def test_a_smaller_shape_holds_as_many_records(spare):
    shape = Shape(3, 11 + spare, 20, spare)
    own = [Tokenised((n,)) for n in range(33)]
    half = shape.of_half()
    assert half == Shape(7, 5 + spare, 20, spare)
    assert max(map(len, half.dealt(own))) <= 5
    assert len(half.dealt(own)) == len(half.dealt([])) == 7
