"""run_evaluation.py and generation.py: everybody's loss under four models, aligned."""

import json
from typing import Any

import numpy as np
import pytest
import torch

from privet.client.device import Device
from privet.client.personal.person_losses import evaluator_of
from privet.client.personal.scored_text import OPENING
from privet.client.simulated import SimulatedContext
from privet.client.training import records as data
from privet.common.errors import ConfigError, DataError, StateError
from privet.experiments.evaluation import generation, run_evaluation
from privet.experiments.evaluation.people import drawn, partner, reported
from privet.experiments.evaluation.run_evaluation import MODELS, evaluate, global_adapter
from privet.experiments.simulate import prepare

from ...tiny import population, tiny_bert, tiny_config, tiny_llama

LISTS = {"users", *MODELS}


def opened(folder, base, labels, **changes):
    """A run folder before its first round, with one user whose only record cannot be held out."""
    source = population(folder, 8, 10, labels)
    lone = {"user": "user lone", "text": "ba be bi", "time": 0}
    if labels:
        lone["label"] = "good" if labels == "names" else 1.0
    with source.open("a") as file:
        file.write(json.dumps(lone) + "\n")
    config = tiny_config(base, source, **{"data": {"clients": 6}} | changes)
    prepare(config, folder / "run", resume=False)
    return SimulatedContext.open(folder / "run")


def vector(bench, seed=0):
    """Some shared adapter away from the start."""
    drawn = np.random.default_rng(seed).normal(size=bench.trainer.adapter.layout.dimension)
    return (0.2 * drawn).astype(np.float32)


def everybody(bench):
    return [*bench.index.train_users, *bench.index.test_users]


def evaluator(bench, final):
    return evaluator_of(bench.trainer.adapter, final)


def person(one, bench, user):
    return one.person(*Device(user, bench).measured_on(), True)


def losses_of(bench, final, users=None):
    users = everybody(bench) if users is None else users
    heads = run_evaluation._heads_for(bench.config, "seen")
    one = evaluator(bench, final)
    people = run_evaluation._people(one, bench, users, heads, lambda: None)
    return run_evaluation._losses(bench, people, heads)


@pytest.fixture(scope="module")
def llama_base(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("evaluation") / "llama")


@pytest.fixture(scope="module")
def bert_base(tmp_path_factory):
    return tiny_bert(tmp_path_factory.mktemp("evaluation") / "bert")


@pytest.fixture
def texts(tmp_path, llama_base):
    return opened(tmp_path, llama_base, False)


@pytest.fixture
def ratings(tmp_path, bert_base):
    return opened(tmp_path, bert_base, True)


@pytest.fixture
def names(tmp_path, bert_base):
    return opened(tmp_path, bert_base, "names")


@pytest.fixture(params=["texts", "ratings", "names"])
def bench(request):
    return request.getfixturevalue(request.param)


# --- everybody, aligned -------------------------------------------------------------------------


def test_the_lists_are_aligned_and_whoever_has_nothing_held_out_is_left_out(bench):
    assert "user lone" in everybody(bench)
    losses = losses_of(bench, vector(bench))
    assert set(losses) == LISTS
    assert losses["users"] == [user for user in everybody(bench) if user != "user lone"]
    assert {len(values) for values in losses.values()} == {8}
    assert all(np.isfinite(losses[model]).all() for model in MODELS)
    assert json.dumps(losses)


def test_a_persons_losses_do_not_depend_on_who_else_is_measured(bench):
    final = vector(bench)
    together = losses_of(bench, final)
    for number, user in enumerate(together["users"][:3]):
        alone = losses_of(bench, final, [user])
        for model in ("base", "global", "personal"):
            assert alone[model][0] == pytest.approx(together[model][number], rel=1e-5)
        assert "swapped_head" not in alone  # there is nobody else


def test_the_head_swapped_in_is_the_next_persons(bench):
    final = vector(bench)
    losses = losses_of(bench, final)
    one = evaluator(bench, final)
    first, second = (person(one, bench, user) for user in losses["users"][:2])
    swapped = reported(first, first.loss(second.head))
    assert swapped == pytest.approx(losses["swapped_head"][0], rel=1e-6)
    last, start = (person(one, bench, losses["users"][place]) for place in (-1, 0))
    swapped = reported(last, last.loss(start.head))
    assert swapped == pytest.approx(losses["swapped_head"][-1], rel=1e-6)


def test_within_groups_the_head_swapped_in_is_of_the_same_group():
    blocks = {user: data.Block(0, 0, group) for user, group in zip("abcde", "xyxyz", strict=True)}
    index = data.Index("n", "generation", None, (), (), blocks, "", 0)
    partners = [partner(index, list("abcde"), number) for number in range(5)]
    assert partners == ["c", "d", "a", "b", "a"]  # nobody else is in e's group


# --- the four models ----------------------------------------------------------------------------


def held_out(bench, user):
    records = data.read_user(bench.folder, user, bench.index)
    _, later = data.split(records, bench.config.data.holdout)
    places = data.spread(len(later), bench.config.evaluation.records)
    return bench.tokenised([later[place] for place in places])


def test_base_is_the_model_without_any_adapter_on_what_is_neither_opening_nor_mark(texts):
    losses = losses_of(texts, vector(texts))
    adapter, tokenizer = texts.trainer.adapter, texts.trainer.adapter.base.tokenizer
    adapter.write(adapter.start)
    for user, loss in zip(losses["users"], losses["base"], strict=True):
        nats, count = 0.0, 0
        for record in held_out(texts, user):
            assert record.ids[-1] == tokenizer.eos_token_id
            given = max(1, min(OPENING, len(record.ids) // 2))
            with torch.no_grad():
                log_p = adapter.base.network(torch.tensor([record.ids])).logits[0].log_softmax(-1)
            for place in range(given, len(record.ids) - 1):
                nats -= float(log_p[place - 1, record.ids[place]])
            whole, opening = (
                tokenizer.decode(ids, skip_special_tokens=True)
                for ids in (record.ids, record.ids[:given])
            )
            count += len(whole.encode()) - len(opening.encode())
        assert loss == pytest.approx(nats / np.log(2) / count, rel=1e-4)


def test_base_does_not_depend_on_the_shared_adapter_and_global_does(bench):
    first, second = losses_of(bench, vector(bench)), losses_of(bench, vector(bench, 1))
    assert first["base"] == second["base"]
    assert first["global"] != second["global"]


def test_with_the_starting_adapter_global_is_base(bench):
    losses = losses_of(bench, bench.trainer.adapter.start)
    assert losses["global"] == pytest.approx(losses["base"], rel=1e-5)


def test_for_labels_base_predicts_nothing(ratings):
    losses = losses_of(ratings, vector(ratings))
    for user, loss in zip(losses["users"], losses["base"], strict=True):
        labels = [float(record.label) for record in held_out(ratings, user)]
        assert loss == pytest.approx(np.mean(np.square(labels)), rel=1e-5)


def test_favourite_words_make_the_personal_model_better_and_the_swapped_one_worse(texts):
    losses = losses_of(texts, texts.trainer.adapter.start)
    personal, shared, swapped = (
        np.mean(losses[model]) for model in ("personal", "global", "swapped_head")
    )
    assert personal < shared - 0.02
    assert swapped > personal + 0.02


def test_the_held_out_records_take_no_part_in_fitting_a_head(bench):
    """A head fitted where other records were held out is the same head."""
    one = evaluator(bench, vector(bench))
    user = next(user for user in everybody(bench) if user != "user lone")
    before = person(one, bench, user)
    own, later = Device(user, bench).measured_on()
    assert (len(own), len(later)) == (7, 3)
    other = one.person(own, own[:1], True)
    assert before.loss(other.head) == pytest.approx(before.loss(before.head), rel=1e-6)


def test_whoever_has_nothing_to_fit_on_falls_back_to_the_shared_model(bench, monkeypatch):
    right = Device.measured_on
    nobody = next(user for user in everybody(bench) if user != "user lone")
    monkeypatch.setattr(
        Device,
        "measured_on",
        lambda self: ([] if self.name == nobody else right(self)[0], right(self)[1]),
    )
    losses = losses_of(bench, vector(bench))
    place = losses["users"].index(nobody)
    assert losses["personal"][place] == losses["global"][place]
    assert losses["swapped_head"][place - 1] == losses["global"][place - 1]


def test_with_heads_off_everybody_has_the_shared_model(tmp_path, llama_base):
    bench = opened(tmp_path, llama_base, False, head={"enabled": False})
    assert set(losses_of(bench, vector(bench))) == {"users", "base", "global"}


# --- whole runs ---------------------------------------------------------------------------------


def test_a_run_without_a_finished_round_is_not_evaluated(texts):
    with pytest.raises(StateError, match="no finished round"):
        global_adapter(texts.folder)
    with pytest.raises(StateError, match="no finished round"):
        evaluate(texts.folder, texts.config)


def test_seen_people_are_those_who_took_part(texts, monkeypatch):
    final = vector(texts)
    monkeypatch.setattr(run_evaluation, "global_adapter", lambda _: final)
    asked = [user for user in texts.index.train_users if user != "user lone"][:2]
    monkeypatch.setattr(type(texts.ledger), "participations", lambda _, user: int(user in asked))
    found = evaluate(texts.folder, texts.config)
    assert (found["name"], found["metrics_of"]) == ("bits per byte", "seen")
    assert sorted(found["seen"]["users"]) == sorted(asked)
    assert set(found["unseen"]["users"]) <= set(texts.index.test_users)
    assert set(found["seen"]) == LISTS
    assert set(found["unseen"]) == {"users", "base", "global"}  # heads for texts cost too much
    assert json.dumps(found)


@pytest.mark.parametrize(
    ("fixture", "unit"),
    [("texts", "bits per byte"), ("ratings", "squared error"), ("names", "nats per record")],
)
def test_the_unit_of_the_loss_is_named(request, monkeypatch, fixture, unit):
    bench = request.getfixturevalue(fixture)
    monkeypatch.setattr(run_evaluation, "global_adapter", lambda _: vector(bench))
    assert evaluate(bench.folder, bench.config)["name"] == unit


def test_nobody_measured_twice_and_no_more_than_asked_for(texts):
    users = drawn(everybody(texts), texts)
    assert len(users) == len(set(users)) == texts.config.evaluation.users == 3
    assert users == drawn(everybody(texts), texts)


# --- generation ---------------------------------------------------------------------------------


def continued(bench, user="user 000", **changes):
    given: dict[str, Any] = {"tokens": 5, "seed": 1, "temperature": 0.0} | changes
    return generation.side_by_side(bench.folder, user, given.pop("prompt", "ba be"), **given)


@pytest.fixture
def finished(texts, monkeypatch):
    monkeypatch.setattr(generation, "state_of", lambda _: vector(texts))
    return texts


def test_three_models_continue_one_prompt(finished):
    found = continued(finished)
    assert set(found) == {"base", "shared", "personal"}
    assert all(text.startswith("ba be") for text in found.values())
    assert continued(finished) == found


def test_without_an_adapter_the_words_are_those_of_transformers(finished):
    base = finished.trainer.adapter.base
    text = continued(finished, tokens=4)["base"]
    finished.trainer.adapter.write(finished.trainer.adapter.start)
    ids = base.tokenizer("ba be", return_tensors="pt").input_ids
    told = base.network.generate(ids, max_new_tokens=4, do_sample=False)
    assert text == base.tokenizer.decode(told[0], skip_special_tokens=True)


def test_the_seed_decides_what_is_drawn(finished):
    hot = {"temperature": 2.0, "tokens": 8}
    first = continued(finished, seed=1, **hot)
    assert continued(finished, seed=1, **hot) == first
    assert continued(finished, seed=2, **hot) != first


def test_labels_are_not_continued(ratings):
    with pytest.raises(ConfigError, match="predicts labels"):
        continued(ratings)


def test_what_cannot_be_continued_is_said(finished):
    with pytest.raises(DataError, match="no user 'user 00'; did you mean user 000"):
        continued(finished, "user 00")
    with pytest.raises(ConfigError, match="--prompt is empty"):
        continued(finished, prompt="")


def test_what_is_learnt_of_texts_changes_training_and_nothing_else(llama_folder, tmp_path):
    """What is measured, and what a head is fitted on, is the same whatever is learnt."""
    whole = opened(tmp_path / "whole", llama_folder, False)
    changes: dict[str, Any] = {
        "training": {"ends": False, "opening": 2, "packed": 40},
        "privacy": {"example": {"enabled": False}},
    }
    texts = opened(tmp_path / "texts", llama_folder, False, **changes)
    end = texts.trainer.adapter.base.tokenizer.eos_token_id
    for user in texts.index.train_users:
        plain, learnt = (Device(user, bench).records() for bench in (whole, texts))
        assert [i for one in plain for i in one.ids] == [i for one in learnt for i in one.ids]
        assert {one.learnt for one in plain} == {None}
        assert len(learnt) < len(plain)
        assert end not in {one.ids[place] for one in learnt for place in one.learnt or ()}
        assert Device(user, whole).measured_on() == Device(user, texts).measured_on()
