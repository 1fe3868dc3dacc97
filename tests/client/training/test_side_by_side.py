"""side_by_side.py: devices in one batch learn what each would alone."""

import dataclasses

import numpy as np
import pytest
import torch

from privet.client.training.constant_work import Shape
from privet.client.training.local_training import Randomness, Trainer, train
from privet.client.training.records import Tokenised
from privet.client.training.side_by_side import Task, can_share, train_side_by_side
from privet.common.model.adapter import attach
from privet.common.model.base_model import load_anew
from privet.common.privacy.noise import TestSource
from privet.common.settings.sections import AdapterSettings, ComputeSettings, PreferenceSettings

from ...tiny import fresh
from .test_local_training import labelled, moved_start, plan, records, trainer_of

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


def randomness(number):
    return Randomness(np.random.default_rng(number), TestSource(number, "noise"))


def alone(trainer, start, people, of_round):
    return [
        train(trainer, start, own, of_round, randomness(number))
        for number, own in enumerate(people)
    ]


def together(trainer, start, people, of_round):
    tasks = [Task(own, randomness(number)) for number, own in enumerate(people)]
    return train_side_by_side(trainer, start, tasks, of_round)


def the_same(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one.delta, other.delta, rtol=1e-4, atol=2e-6)
        np.testing.assert_allclose(one.statistics, other.statistics, rtol=1e-6)


@pytest.fixture(params=["lora_xs", "lora", "ffa", "rolora", "regression", "classes"])
def trainer(request, llama_folder, bert_folder):
    outputs = {"regression": 1, "classes": 3}.get(request.param, 0)
    base = fresh(bert_folder if outputs else llama_folder)
    return trainer_of(base, "lora_xs" if outputs else request.param, outputs)


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("steps", [1, 3])
def test_devices_in_one_batch_learn_what_each_would_alone(trainer, steps, number):
    of_round = plan(
        round=number, local_steps=steps, rate=0.5, record_noise=0.7, losses_bound=10.0,
        learning_rate=0.3,
    )  # fmt: skip
    people = [labelled(trainer, records(count, count)) for count in (9, 1, 0, 25, 70)]
    start = moved_start(trainer)
    wanted = alone(trainer, start, people, of_round)
    assert can_share(trainer, of_round)
    the_same(together(trainer, start, people, of_round), wanted)
    the_same(alone(trainer, start, people, of_round), wanted)  # nothing is left in the model


def test_nobodys_records_reach_another_device(trainer):
    of_round, start = plan(record_noise=0.5), moved_start(trainer)
    people = [labelled(trainer, records(6, seed)) for seed in range(3)]
    found = together(trainer, start, people, of_round)
    people[1] = labelled(trainer, records(11, 99, longest=30))
    again = together(trainer, start, people, of_round)
    the_same([again[0], again[2]], [found[0], found[2]])
    assert not np.allclose(again[1].delta, found[1].delta, atol=1e-3)


def test_a_record_that_is_not_finite_counts_as_none_and_takes_no_other_with_it(llama_folder):
    trainer, of_round = trainer_of(fresh(llama_folder), "lora"), plan()
    own, start = records(4, 1), moved_start(trainer)
    embedding = trainer.adapter.base.network.get_input_embeddings().weight
    with torch.no_grad():
        embedding[6] = torch.nan  # a word that overflows
    whole = [r for r in own if 6 not in r.ids]
    spoilt = [*whole, Tokenised((7, 6, 8))]
    found = together(trainer, start, [spoilt, whole], of_round)
    the_same([found[0]], [found[1]])


def test_what_cannot_share_a_batch_is_known(llama_folder):
    trainer = trainer_of(fresh(llama_folder), "lora")
    assert can_share(trainer, plan())
    assert not can_share(trainer, plan(record_clip=0.0))
    assert not can_share(dataclasses.replace(trainer, pairs=PreferenceSettings()), plan())
    assert not can_share(trainer_of(fresh(llama_folder), "fedsa"), plan())
    rounded = rounded_trainer(llama_folder)
    assert can_share(rounded, plan())
    assert not can_share(rounded, plan(local_steps=2))


def rounded_trainer(folder):
    settings = ComputeSettings(device="cpu", dtype="bfloat16")
    base = load_anew(str(folder), settings)
    return Trainer.of(attach(base, AdapterSettings(family="lora", rank=2, last_blocks=2)))


@pytest.mark.parametrize("shape", [Shape(1, 4, 40, spare=0, constant=False), Shape(1, 6, 39)])
def test_below_float32_devices_in_one_batch_learn_to_the_bit_what_each_would_alone(
    llama_folder, shape
):
    trainer = rounded_trainer(llama_folder)
    people = [records(count, count, longest=38) for count in (9, 1, 0, 25)]
    start, of_round = moved_start(trainer), plan(rate=0.5, record_noise=0.7, losses_bound=10.0)
    wanted = [
        train(trainer, start, own, of_round, randomness(number), shape=shape)
        for number, own in enumerate(people)
    ]
    tasks = [Task(own, randomness(number)) for number, own in enumerate(people)]
    found = train_side_by_side(trainer, start, tasks, of_round, shape)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one.delta, other.delta)
        np.testing.assert_array_equal(one.statistics, other.statistics)
