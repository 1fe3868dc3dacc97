"""DPO: the loss, its gradients by record under DP-SGD, and the personal part from cached states."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from privet.client.personal.pair_evaluator import LikelihoodEvaluator, PairPerson, pair_error
from privet.client.personal.person_losses import evaluator_of
from privet.client.personal.preference_head import (
    _folds,
    fit_token_bias,
    length_bias,
    token_margins,
)
from privet.client.personal.text_head import shared_scores
from privet.client.training import local_training
from privet.client.training.local_training import Randomness, Trainer, train
from privet.client.training.preference_pairs import tokenize_pairs
from privet.client.training.records import Record, Tokenised
from privet.common.errors import ConfigError
from privet.common.model import dpo
from privet.common.model.adapter import attach
from privet.common.model.dpo import answer_scores, margins, preference_losses
from privet.common.model.objective import SharedHead
from privet.common.privacy.noise import TestSource
from privet.common.settings.sections import AdapterSettings, PreferenceSettings

from ...client.training.test_local_training import clipped, moved_start, plan
from ...tiny import VOCABULARY, WORDS, fresh

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

LIKELIHOOD = PreferenceSettings(beta=0.5)
HEAD = PreferenceSettings(score="head", beta=1.0)


def pairs_of(count, seed=0, longest=12):
    """Pairs of random answers of different lengths behind prompts of their own."""
    rng = np.random.default_rng(seed)

    def ids(least, most):
        return tuple(int(i) for i in rng.integers(6, VOCABULARY, rng.integers(least, most + 1)))

    found = []
    for _ in range(count):
        prompt = ids(1, 4)
        both = [prompt + ids(2, longest) for _ in range(2)]
        found.append(Tokenised(both[0], rejected=both[1], prompts=(len(prompt), len(prompt))))
    return found  # fmt: skip


def trainer_of(base, settings, outputs, cache_mb=0):
    attached = attach(base, AdapterSettings(rank=2, last_blocks=2), outputs)
    return Trainer.of(attached, cache_mb, settings)


@pytest.fixture(scope="module")
def texts(llama_folder):
    return trainer_of(fresh(llama_folder), LIKELIHOOD, 0)


@pytest.fixture(scope="module")
def per_token(llama_folder):
    settings = LIKELIHOOD.model_copy(update={"length_normalised": True})
    return trainer_of(fresh(llama_folder), settings, 0, cache_mb=8)


@pytest.fixture(scope="module")
def scored(bert_folder):
    return trainer_of(fresh(bert_folder), HEAD, 1)


@pytest.fixture(params=["texts", "per_token", "scored"])
def trainer(request):
    return request.getfixturevalue(request.param)


# --- the loss -----------------------------------------------------------------------------------


def test_the_loss_is_what_a_hand_computes():
    # beta (margin - reference) = 0.5 * (3 - 1) = 1, and 0.5 * (-1 - 1) = -1
    found = preference_losses(torch.tensor([3.0, -1.0]), torch.tensor([1.0, 1.0]), 0.5)
    assert found.tolist() == pytest.approx([math.log(1 + math.exp(-1)), math.log(1 + math.e)])


def test_a_model_that_is_its_own_reference_has_loss_log_2_and_half_of_betas_gradient():
    margin = torch.tensor([3.0, -40.0], requires_grad=True)
    losses = preference_losses(margin, margin, 0.2)
    assert losses.tolist() == pytest.approx([math.log(2)] * 2)
    losses.sum().backward()
    assert margin.grad is not None
    assert margin.grad.tolist() == pytest.approx([-0.1, -0.1])


def test_no_gradient_goes_through_the_reference():
    margin, reference = torch.tensor([1.0], requires_grad=True), torch.ones(1, requires_grad=True)
    preference_losses(margin, reference, 1.0).sum().backward()
    assert reference.grad is None


def test_huge_margins_overflow_nothing():
    margin = torch.tensor([1e30, -1e4], requires_grad=True)
    losses = preference_losses(margin, torch.zeros(2), 1.0)
    losses.sum().backward()
    assert losses.tolist() == [0.0, 1e4]
    assert margin.grad is not None
    assert bool(margin.grad.isfinite().all())


def test_likelihood_is_the_sum_over_the_answers_tokens_alone(llama):
    ids, start = (7, 8, 9, 10, 11), 2
    logits = llama.network(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    by_hand = sum(float(logits[place - 1, ids[place]]) for place in range(start, len(ids)))
    padded = [ids, tuple(range(6, 20))]
    with torch.no_grad():
        alone = answer_scores(llama, [ids], [start], None)
        beside = answer_scores(llama, padded, [start, 3], None)
        per_token = answer_scores(llama, [ids], [start], None, length_normalised=True)
        empty = answer_scores(llama, [ids], [len(ids)], None, length_normalised=True)
    assert float(alone) == pytest.approx(by_hand, abs=1e-4)
    assert float(beside[0]) == pytest.approx(by_hand, abs=1e-4)
    assert float(per_token) == pytest.approx(by_hand / 3, abs=1e-4)
    assert float(empty) == 0.0


def test_a_head_scores_the_pooled_state(bert):
    head = SharedHead(bert.width, 1)
    with torch.no_grad():
        found = answer_scores(bert, [(7, 8), (9, 10, 11)], [0, 0], head)
        states = bert.network(input_ids=torch.tensor([[9, 10, 11]])).last_hidden_state[0].mean(0)
        by_hand = head(functional.normalize(states, dim=0))
    assert float(found[1]) == pytest.approx(float(by_hand), abs=1e-5)
    assert margins(torch.tensor([5.0, 1.0, 2.0, 3.0])).tolist() == [3.0, -2.0]


# --- training: the reference --------------------------------------------------------------------


def loss_at(trainer, vector, record, reference):
    """The pair's loss with these adapter weights, float64 as far as it goes."""
    trainer.adapter.write(vector.astype(np.float32))
    with torch.no_grad():
        margin = local_training._margins(trainer, [record]).double()
    return float(preference_losses(margin, torch.tensor([reference]), trainer.pairs.beta))


def margin_at(trainer, vector, record):
    trainer.adapter.write(vector)
    with torch.no_grad():
        return float(local_training._margins(trainer, [record]))


def one_gradient(trainer, record):
    """A record's gradient by autograd, without Opacus, shape (d,)."""
    trainer.hooked.hooks_enabled = False
    parameters = [parameter for _, parameter in trainer.adapter.parameters]
    pieces = torch.autograd.grad(local_training.losses_of(trainer, [record]).sum(), parameters)
    trainer.hooked.hooks_enabled = True
    return torch.cat([piece.ravel() for piece in pieces]).double()


def test_the_gradient_is_that_of_finite_differences(trainer):
    for module in (trainer.adapter.base.network, trainer.adapter.trainable):
        module.double()
    try:
        start = moved_start(trainer)
        record = pairs_of(1, 3)[0]
        reference = margin_at(trainer, trainer.adapter.start, record)
        trainer.adapter.write(start)
        mine = one_gradient(trainer, dataclasses.replace(record, reference=reference))
        rng = np.random.default_rng(0)
        for _ in range(3):
            way = rng.normal(size=len(start))
            way /= np.linalg.norm(way)
            ahead, behind = (loss_at(trainer, start + e * way, record, reference)
                             for e in (1e-3, -1e-3))  # fmt: skip
            assert (ahead - behind) / 2e-3 == pytest.approx(
                float(mine @ torch.from_numpy(way)), rel=0.02, abs=2e-4
            )
    finally:
        for module in (trainer.adapter.base.network, trainer.adapter.trainable):
            module.float()


def stepped(trainer, own, public, start, noise=1):
    return train(
        trainer, start, own, public,
        Randomness(np.random.default_rng(1), TestSource(noise, "noise")),
    )  # fmt: skip


def by_hand(trainer, own, public, start, moving_reference=False):
    """Full batches of DPO without DP, one record at a time."""
    weights = start.astype(np.float64)
    references = [margin_at(trainer, start, record) for record in own]
    for _ in range(public.local_steps):
        if moving_reference:
            references = [margin_at(trainer, weights.astype(np.float32), r) for r in own]
        trainer.adapter.write(weights.astype(np.float32))
        told = [dataclasses.replace(r, reference=m) for r, m in zip(own, references, strict=True)]
        total = sum(one_gradient(trainer, record) for record in told)
        assert isinstance(total, torch.Tensor)
        weights -= public.learning_rate * total.numpy() / public.batch_size
    return weights - start


@pytest.mark.parametrize("record_clip", [0.0, 1e6])
def test_the_reference_is_the_shared_model_of_the_round_in_every_step(trainer, record_clip):
    """A reference that moves along has a gradient that never fades: the faulty version."""
    start, own = moved_start(trainer), pairs_of(5)
    rate = 20.0 if trainer.pairs.length_normalised else 2.0
    public = plan(local_steps=4, batch_size=4, learning_rate=rate, record_clip=record_clip)
    found = stepped(trainer, own, public, start).delta.astype(np.float64)
    right = by_hand(trainer, own, public, start)
    wrong = by_hand(trainer, own, public, start, moving_reference=True)
    size = np.linalg.norm(right)
    assert np.linalg.norm(found - right) < 2e-3 * size
    assert np.linalg.norm(found - wrong) > 0.02 * size


def test_training_leaves_the_reference_frozen(trainer, monkeypatch):
    """It is computed under the start adapter, whatever the steps before have done."""
    start, own = moved_start(trainer), pairs_of(4)
    seen: list[float | None] = []
    losses = local_training.losses_of

    def watched(one: Any, records: Any, shape: Any) -> Any:
        seen.extend(record.reference for record in records)
        return losses(one, records, shape)

    monkeypatch.setattr(local_training, "losses_of", watched)
    stepped(trainer, own, plan(local_steps=3, learning_rate=5.0), start)
    known = {id(r): margin_at(trainer, start, r) for r in own}
    assert seen[: len(own)] == [None] * len(own)
    later = sorted(one for one in seen[len(own) :] if one is not None)
    assert later == pytest.approx(sorted([*known.values()] * 2), abs=1e-4)


# --- training: one record's gradient, and the bound ---------------------------------------------


def opacus_gradients(trainer, own):
    """Every pair's gradient inside one batch, as the private step sees it, shape (n, d)."""
    trainer.hooked.train()
    trainer.hooked.hooks_enabled = True
    parameters = [parameter for _, parameter in trainer.adapter.parameters]
    for parameter in parameters:
        parameter.grad_sample = None
    local_training.losses_of(trainer, own).sum().backward()
    local_training._one_row_a_record(trainer, trainer.adapter.parameters, len(own))
    found = torch.cat([p.grad_sample.flatten(1) for p in parameters], 1).double()
    for parameter in parameters:
        parameter.grad = parameter.grad_sample = None
    return found


def with_references(trainer, own):
    trainer.adapter.write(moved_start(trainer, seed=9))
    told = [dataclasses.replace(r, reference=margin_at(trainer, trainer.adapter.read(), r))
            for r in own]  # fmt: skip
    trainer.adapter.write(moved_start(trainer))
    return told


def largest_difference(trainer, own):
    together = clipped(opacus_gradients(trainer, own))
    alone = clipped(torch.stack([one_gradient(trainer, record) for record in own]))
    return float((together - alone).norm(dim=1).max())


def test_opacus_gradients_of_pairs_are_the_gradients_one_by_one(trainer):
    for seed in range(3):
        assert largest_difference(trainer, with_references(trainer, pairs_of(7, seed))) < 5e-5


def answers_for_records(trainer, trained, records):
    """Faulty: each answer is clipped for itself, as if it were a record."""
    local_training._refuse_mixed(trainer.adapter, trained, 2 * records)
    for _, parameter in trained:
        parameter.grad_sample = parameter.grad_sample[:records]


def pairs_mixed_up(_, trained, records):
    """Faulty: the chosen answer of one pair with the rejected one of another."""
    for _, parameter in trained:
        rows = parameter.grad_sample
        parameter.grad_sample = rows[:records] + rows[records:].flip(0)


def rejected_answers_in_the_batch(margin, reference, beta):
    """Faulty: a loss over the whole batch (in-batch negatives) couples the pairs."""
    del reference
    return functional.softplus(-beta * (margin - margin.mean().detach() + margin.flip(0)))


@pytest.mark.parametrize("faulty", [answers_for_records, pairs_mixed_up])
def test_rows_put_together_wrongly_are_caught_by_the_same_check(texts, monkeypatch, faulty):
    own = with_references(texts, pairs_of(7))
    monkeypatch.setattr(local_training, "_one_row_a_record", faulty)
    assert largest_difference(texts, own) > 1e-2


def test_a_loss_that_couples_pairs_is_caught_by_the_same_check(texts, monkeypatch):
    own = with_references(texts, pairs_of(7))
    monkeypatch.setattr(local_training, "preference_losses", rejected_answers_in_the_batch)
    assert largest_difference(texts, own) > 1e-2


def moved_by_one_more(trainer, own, extra, public):
    """How far one more pair moves a step's sum before noise, over the clip."""
    start = moved_start(trainer)
    one, other = (stepped(trainer, some, public, start).delta for some in (own, [*own, extra]))
    moved = np.linalg.norm(other.astype(np.float64) - one)
    return moved * public.batch_size / (public.learning_rate * public.record_clip)


@pytest.mark.parametrize("clip", [1e-3, 0.1, 10.0])
def test_one_more_pair_moves_the_sum_by_at_most_the_clip(trainer, clip):
    for seed in range(4):
        own, extra = pairs_of(seed * 6, seed), pairs_of(1, 50 + seed, longest=30)[0]
        assert moved_by_one_more(trainer, own, extra, plan(record_clip=clip)) <= 1.0


def test_a_pair_whose_answers_are_clipped_apart_moves_it_by_more(texts, monkeypatch):
    """Faulty: 2n rows for n records, so a pair may move the sum by twice the clip."""

    silence = local_training._silence

    def apart(trainer, trained, records):
        local_training._refuse_mixed(trainer.adapter, trained, 2 * records)

    def silence_apart(trained, records):
        silence(trained, 2 * records)  # or the rejected answers would pass for dummies

    own, extra, public = pairs_of(4), pairs_of(1, 51)[0], plan(record_clip=1e-3)
    assert 0.99 < moved_by_one_more(texts, own, extra, public) <= 1.0
    monkeypatch.setattr(local_training, "_one_row_a_record", apart)
    monkeypatch.setattr(local_training, "_silence", silence_apart)
    assert moved_by_one_more(texts, own, extra, public) > 1.05


def test_a_pair_without_a_finite_gradient_counts_as_none(texts, monkeypatch):
    own, bad = pairs_of(4), pairs_of(1, 8, longest=30)[0]
    start, public = moved_start(texts), plan(record_clip=0.1)
    without = stepped(texts, own, public, start).delta
    losses = local_training.losses_of

    def overflowing(trainer, records, shape):
        factor = torch.tensor([math.inf if record is bad else 1.0 for record in records])
        return losses(trainer, records, shape) * factor

    monkeypatch.setattr(local_training, "losses_of", overflowing)
    with_bad = stepped(texts, [*own, bad], public, start).delta
    assert np.isfinite(with_bad).all()
    assert np.allclose(with_bad, without, atol=1e-6)


def test_no_pairs_still_step_with_noise(trainer):
    start = moved_start(trainer)
    noisy = stepped(trainer, [], plan(record_noise=1.0), start).delta
    assert np.linalg.norm(noisy) > 0
    assert not stepped(trainer, [], plan(), start).delta.any()


def test_training_on_pairs_raises_their_margins(trainer):
    start, own = moved_start(trainer), pairs_of(6)
    delta = stepped(trainer, own, plan(local_steps=5, record_clip=0.0), start).delta
    before = [margin_at(trainer, start, record) for record in own]
    after = [margin_at(trainer, start + delta, record) for record in own]
    assert np.mean(after) > np.mean(before)


# --- pairs as ids -------------------------------------------------------------------------------


def test_answers_stand_behind_their_prompt(llama):
    record = Record(f"{WORDS[3]} {WORDS[4]}", rejected=WORDS[5], prompt=f"{WORDS[0]} {WORDS[1]}")
    (one,) = tokenize_pairs([record], llama.tokenizer, 16, "likelihood")
    assert one.ids == (4, 6, 7, 9, 10, 5)
    assert one.rejected == (4, 6, 7, 11, 5)
    assert one.prompts == (3, 3)


def test_a_long_prompt_keeps_its_end_and_an_answer_its_beginning(llama):
    record = Record(" ".join(WORDS[20:40]), rejected=WORDS[5], prompt=" ".join(WORDS[:20]))
    (one,) = tokenize_pairs([record], llama.tokenizer, 8, "likelihood")
    assert len(one.ids) == 8
    assert one.ids[:5] == (4, 22, 23, 24, 25)
    assert one.ids[5] == 26


def test_pairs_that_are_cut_to_the_same_and_records_without_a_pair_are_left_out(llama, bert):
    same = Record(" ".join(WORDS[:9]), rejected=" ".join([*WORDS[:8], WORDS[20]]))
    for base, score in ((llama, "likelihood"), (bert, "head")):
        assert tokenize_pairs([same, Record("plain")], base.tokenizer, 8, score) == []
    with pytest.raises(ConfigError, match="at least 4"):
        tokenize_pairs([same], llama.tokenizer, 3, "likelihood")


def test_an_encoder_reads_prompt_and_answer_together(bert):
    record = Record(WORDS[3], rejected=WORDS[5], prompt=WORDS[0])
    (one,) = tokenize_pairs([record], bert.tokenizer, 16, "head")
    assert 6 in one.ids
    assert 9 in one.ids
    (alone,) = tokenize_pairs([Record(WORDS[3], rejected=WORDS[5])], bert.tokenizer, 16, "head")
    assert alone.ids == (2, 9, 3)


# --- length and folds ---------------------------------------------------------------------------


def test_length_bias_does_not_depend_on_which_answer_is_called_first():
    margin, longer = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([2.0, 1.0, 4.0])
    turned = torch.tensor([1.0, -1.0, -1.0])
    assert length_bias(margin, longer).model == pytest.approx(
        length_bias(margin * turned, longer * turned).model
    )
    assert length_bias(longer, longer).model == pytest.approx(1.0)
    assert length_bias(torch.zeros(3), longer).model == 0.0
    assert length_bias(torch.zeros(0), torch.zeros(0)).choices == 0.0


def test_no_answer_is_left_out_and_fitted_on_at_once():
    rng = np.random.default_rng(0)
    few = torch.from_numpy(rng.integers(0, 20, size=(50, 2)))
    for answers, count in ((torch.arange(100).view(50, 2), 5), (few, 2)):
        folds = _folds(answers)
        assert len(folds) == count
        for out, rest in folds:
            assert not {*answers[out].flatten().tolist()} & {*answers[rest].flatten().tolist()}
        assert sum(int(out.sum()) for out, _ in folds) >= 20


# --- the personal part: bias on tokens ----------------------------------------------------------


def word_lovers(count, seed, loved=(7, 8, 9)):
    """Pairs of equal length; the chosen answer has a loved word more than the other."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        both = rng.integers(20, VOCABULARY, size=(2, 5))
        both[0, rng.integers(0, 5)] = rng.choice(loved)
        texts = [tuple(int(i) for i in (4, 6, *row)) for row in both]
        found.append(Tokenised(texts[0], rejected=texts[1], prompts=(2, 2)))
    return found


def test_words_that_are_preferred_get_a_bias_and_later_pairs_are_ordered_by_it(texts):
    start = moved_start(texts)
    evaluator = LikelihoodEvaluator(texts.adapter, start, LIKELIHOOD)
    own, later = word_lovers(50, 0), word_lovers(100, 1)
    person = evaluator.person(own, later, True)
    assert person is not None
    assert person.head is not None
    assert not person.head.is_shared
    bias = dict(zip(person.head.tokens.tolist(), person.head.bias.tolist(), strict=True))
    assert min(bias[token] for token in (7, 8, 9)) > 0
    assert person.loss(person.head) < person.loss(None) - 0.1
    other = evaluator.person(word_lovers(50, 2, loved=(100, 101, 102)), later, True)
    assert other is not None
    assert person.loss(other.head) > person.loss(person.head) + 0.1


def test_margins_are_the_same_in_training_and_in_measuring(trainer):
    start, own = moved_start(trainer), pairs_of(6)
    person = evaluator_of(trainer.adapter, start, pairs=trainer.pairs).person([], own, False)
    assert isinstance(person, PairPerson)
    assert person.head is None
    expected = [margin_at(trainer, start, record) for record in own]
    assert person.margins(None).tolist() == pytest.approx(expected, abs=1e-3)
    assert person.loss(None) == pair_error(torch.tensor(expected))


def test_a_bias_moves_margins_as_its_likelihoods_say(texts):
    start = moved_start(texts)
    person = LikelihoodEvaluator(texts.adapter, start, LIKELIHOOD).person(
        [], word_lovers(20, 0), False
    )
    assert person is not None
    answers, scores, output = person.answers, person.scores, person.output
    head = fit_token_bias(answers, output, LIKELIHOOD)
    logits = output.scores(answers.tokens.states)
    logits[:, head.tokens] += head.bias
    losses = functional.cross_entropy(logits, answers.tokens.targets, reduction="none")
    assert torch.allclose(
        token_margins(answers, head, scores, output), answers.summed(-losses), atol=1e-3
    )
    assert shared_scores(answers.tokens, output).log_z.shape == scores.log_z.shape


def test_the_module_names_what_it_computes():
    assert set(dpo.__all__) == {"answer_scores", "margins", "preference_losses"}
