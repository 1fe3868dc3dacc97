"""local_training.py: one record moves a step by at most C, whatever is around it."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from opacus import GradSampleModule
from torch import nn
from torch.nn import functional

from privet.client.privacy.gate import charges
from privet.client.training import kernel_trial, local_training
from privet.client.training.constant_work import Shape
from privet.client.training.local_training import Randomness, Trainer, train
from privet.client.training.records import Tokenised, poisson_indices
from privet.common.errors import AdapterError
from privet.common.model.adapter import attach
from privet.common.model.base_model import final_states, load_anew
from privet.common.model.objective import SharedHead, collate, label_losses, pooled, record_losses
from privet.common.privacy.noise import TestSource
from privet.common.privacy.round_plan import Plan
from privet.common.settings.sections import AdapterSettings, ComputeSettings, PrivacySettings

from ...tiny import VOCABULARY, fresh, needs_bitsandbytes, tiny_config

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


def plan(**changes):
    public: dict[str, Any] = {
        "run": "run", "round": 1, "layout": "", "start": "", "cohort": 4, "clip": 1.0,
        "step": 1e-6, "bits": 32, "rotated": False, "noise_at": "server",
        "variance": 1e12, "survivors": 0,
        "colluders": 0, "learning_rate": 1.0,
        "local_steps": 1, "batch_size": 8, "rate": 1.0, "record_clip": 1.0, "record_noise": 0.0,
    }  # fmt: skip
    return Plan(**public | changes)


def records(count, seed=0, shortest=3, longest=12):
    rng = np.random.default_rng(seed)
    return [
        Tokenised(
            tuple(int(i) for i in rng.integers(6, VOCABULARY, rng.integers(shortest, longest + 1))),
            float(rng.normal()),
        )
        for _ in range(count)
    ]


def run(trainer, own, plan, start=None, *, draws=1, noise=1, shape=None):
    """One `train` with repeatable randomness."""
    start = trainer.adapter.start if start is None else start
    batches, source = np.random.default_rng(draws), TestSource(noise, "noise")
    return train(trainer, start, own, plan, Randomness(batches, source), shape=shape).delta


def trainer_of(base, family="tiny", outputs=0, **changes):
    settings = AdapterSettings(family=family, **{"rank": 2, "last_blocks": 2} | changes)
    return Trainer.of(attach(base, settings, outputs))


def moved_start(trainer, seed=5, scale=0.3):
    """A vector away from the start, so that every gradient is alive."""
    drawn = np.random.default_rng(seed).normal(size=trainer.adapter.layout.dimension)
    return (trainer.adapter.start + scale * drawn).astype(np.float32)


@pytest.fixture(scope="module")
def texts(llama_folder):
    return trainer_of(fresh(llama_folder), rank=4)


@pytest.fixture(scope="module")
def labels(bert_folder):
    return trainer_of(fresh(bert_folder), outputs=1)


@pytest.fixture(scope="module")
def classes(bert_folder):
    return trainer_of(fresh(bert_folder), outputs=3)


@pytest.fixture(scope="module")
def last_state_labels(llama_folder):
    return trainer_of(fresh(llama_folder), family="lora", outputs=1)


@pytest.fixture(params=["texts", "labels", "classes", "last_state_labels"])
def trainer(request):
    return request.getfixturevalue(request.param)


def labelled(trainer, own):
    """Labels that fit the head: numbers, or classes."""
    if trainer.adapter.head is None or trainer.adapter.head.out_features == 1:
        return own
    return [Tokenised(record.ids, float(i % 3)) for i, record in enumerate(own)]


# --- a record's gradient is its own -------------------------------------------------------------


def gradients(trainer, own, shape=None):
    """Every record's gradient inside one batch, shape (n, d), or (rows, d) with dummies."""
    trainer.hooked.train()
    trainer.hooked.hooks_enabled = True
    parameters = [parameter for _, parameter in trainer.adapter.parameters]
    for parameter in parameters:
        parameter.grad_sample = None
    local_training.losses_of(trainer, own, shape).sum().backward()
    found = torch.cat([p.grad_sample.flatten(1) for p in parameters], 1).double()
    for parameter in parameters:
        parameter.grad = parameter.grad_sample = None
    return found


def clipped(gradient, clip=1.0):
    return gradient * (clip / gradient.norm(dim=1, keepdim=True)).clamp(max=1.0)


def largest_coupling(trainer, own):
    """How far a record's clipped gradient moves when the others are taken away."""
    together = clipped(gradients(trainer, own))
    alone = torch.cat([clipped(gradients(trainer, [record])) for record in own])
    return float((together - alone).norm(dim=1).max())


def test_a_records_gradient_alone_is_its_gradient_inside_any_batch(trainer):
    trainer.adapter.write(moved_start(trainer))
    for seed in range(3):
        own = labelled(trainer, records(7, seed))
        assert largest_coupling(trainer, own) < 2e-6


def test_a_records_gradient_is_what_autograd_says(trainer):
    trainer.adapter.write(moved_start(trainer))
    own = labelled(trainer, records(3))
    mine = gradients(trainer, own)
    parameters = [parameter for _, parameter in trainer.adapter.parameters]
    for row, record in enumerate(own):
        found = torch.autograd.grad(local_training.losses_of(trainer, [record]).sum(), parameters)
        for parameter in parameters:
            parameter.grad_sample = None
        flat = torch.cat([piece.ravel() for piece in found]).double()
        assert float((flat - mine[row]).norm()) < 1e-5 * float(flat.norm())


def mean_over_all_tokens(base, batch, _):
    """Faulty: long records take weight from short ones."""
    states = final_states(base, batch.ids, batch.mask)[:, :-1]
    wanted = batch.mask[:, 1:].bool()
    scores = base.output.scores(states[wanted])
    loss = functional.cross_entropy(scores, batch.ids[:, 1:][wanted], reduction="sum")
    return (loss / wanted.sum()).expand(len(batch.ids)) / len(batch.ids)


def features_normalised_over_the_batch(base, batch, head):
    """Faulty: batch norm."""
    features = pooled(base, final_states(base, batch.ids, batch.mask), batch.mask)
    features = (features - features.mean(0)) / (features.std(0, correction=0) + 1e-3)
    return label_losses(head(features), batch.labels)


def a_head_fitted_on_the_same_records(base, batch, head):
    """Faulty: a head fitted without DP takes part in the forward pass."""
    features = pooled(base, final_states(base, batch.ids, batch.mask), batch.mask)
    gram = features.T @ features + 0.01 * torch.eye(base.width)
    weight = torch.linalg.solve(gram, features.T @ batch.labels).detach()
    return label_losses(head(features) + (features @ weight)[:, None], batch.labels)


@pytest.mark.parametrize(
    ("which", "faulty"),
    [
        ("texts", mean_over_all_tokens),
        ("labels", features_normalised_over_the_batch),
        ("labels", a_head_fitted_on_the_same_records),
    ],
)
def test_a_loss_that_couples_records_is_caught_by_the_same_check(
    request, monkeypatch, which, faulty
):
    trainer = request.getfixturevalue(which)
    trainer.adapter.write(moved_start(trainer))
    own = records(7)
    assert largest_coupling(trainer, own) < 2e-6
    monkeypatch.setattr(local_training, "record_losses", faulty)
    assert largest_coupling(trainer, own) > 1e-2


@pytest.mark.real
@pytest.mark.parametrize("outputs", [0, 1])
def test_on_smollm2_a_records_gradient_is_its_own(outputs):
    base = load_anew("smollm2-135m-instruct", ComputeSettings(device="cpu", dtype="float32"))
    trainer = trainer_of(base, rank=4, last_blocks=3, outputs=outputs)
    trainer.adapter.write(moved_start(trainer, scale=0.05))
    lines = ("Who's there?", "Nay, answer me: stand, and unfold yourself.", "Long live the king!")
    own = [
        Tokenised(tuple(base.tokenizer(line)["input_ids"]), float(i))
        for i, line in enumerate(lines)
    ]
    assert largest_coupling(trainer, own) < 2e-5
    base.network.double()
    if trainer.adapter.head is not None:
        trainer.adapter.head.double()
    assert largest_coupling(trainer, own) < 1e-10  # what was left was rounding


MARGIN = 1 - local_training._SHRINK
BATCHES, ROWS, LONGEST = 50, 8, 16


@pytest.mark.real
@pytest.mark.parametrize(
    ("dtype", "quantization"),
    [
        ("float32", "none"),
        ("bfloat16", "none"),
        pytest.param("bfloat16", "int8", marks=[needs_bitsandbytes, pytest.mark.heavy]),
        pytest.param("bfloat16", "nf4", marks=[needs_bitsandbytes, pytest.mark.heavy]),
    ],
)
def test_on_smollm2_a_record_in_a_public_shape_has_the_same_gradient_to_the_bit(
    dtype, quantization
):
    compute = ComputeSettings(device="cpu", dtype=dtype, quantization=quantization)
    base = load_anew("smollm2-135m-instruct", compute)
    trainer = trainer_of(base, rank=4, last_blocks=4, modules=("up_proj", "down_proj"))
    trainer.adapter.write(moved_start(trainer, scale=0.05))
    rng = np.random.default_rng(4)

    def drawn(longest):
        length = int(rng.integers(3, longest + 1))
        return Tokenised(tuple(map(int, rng.integers(3, 40_000, size=length))))

    mine, shape, seen, padded = drawn(LONGEST), Shape(1, ROWS, LONGEST + 1, spare=0), [], []
    for number in range(BATCHES):
        batch = [drawn(LONGEST) for _ in range(int(rng.integers(ROWS)))]
        place = number % (len(batch) + 1)  # at every place, dummies behind
        batch.insert(place, mine)
        seen.append(clipped(gradients(trainer, batch, shape)[place : place + 1]))
        if number < 10:  # faulty: as long as the longest neighbour
            padded.append(clipped(gradients(trainer, batch)[place : place + 1]))
    assert max(float((one - seen[0]).norm()) for one in seen) == 0
    coupled = max(float((one - padded[0]).norm()) for one in padded)
    assert coupled > MARGIN if dtype == "bfloat16" else coupled < MARGIN / ROWS


def test_below_float32_a_private_step_needs_a_public_shape(llama_folder):
    base = load_anew(str(llama_folder), ComputeSettings(device="cpu", dtype="bfloat16"))
    trainer = trainer_of(base)
    with pytest.raises(AdapterError, match="needs batches of one public shape"):
        run(trainer, records(4), plan())
    assert np.isfinite(run(trainer, records(4), plan(record_clip=0.0))).all()


def test_below_float32_no_shared_head_is_trained_privately(llama_folder):
    base = load_anew(str(llama_folder), ComputeSettings(device="cpu", dtype="bfloat16"))
    trainer = trainer_of(base, outputs=1)
    with pytest.raises(AdapterError, match="shared head is trained under example-level DP"):
        run(trainer, records(4), plan(), shape=Shape(1, 4, 40, spare=0))


def cancelling(trainer, record):
    """A server's vector with a huge head that takes from this record's output all but rounding."""
    adapter, base = trainer.adapter, trainer.adapter.base
    adapter.write(adapter.start)
    batch = collate([record.ids], [0.0])
    with torch.no_grad():
        state = pooled(base, final_states(base, batch.ids, batch.mask), batch.mask)[0].double()
    head = torch.from_numpy(np.random.default_rng(0).normal(size=len(state)))
    head = (1e12 * (head - state * (head @ state) / (state @ state))).float()
    vector = adapter.start.copy()
    vector[-1 - len(state) : -1], vector[-1] = head.numpy(), -float(head.double() @ state)
    return vector


def test_a_head_that_cancels_an_output_turns_a_record_over_but_in_a_public_shape(bert_folder):
    """In float32: what is left is rounding, which hangs on neighbours that set the padding."""
    trainer, rng = trainer_of(fresh(bert_folder), outputs=1), np.random.default_rng(1)

    def one():
        return Tokenised(
            tuple(map(int, rng.integers(6, VOCABULARY, int(rng.integers(3, 19))))), 0.0
        )

    mine, shape, loose, fixed = one(), Shape(1, 6, 20), [], []
    trainer.adapter.write(cancelling(trainer, mine))
    for _ in range(40):
        batch = [one() for _ in range(int(rng.integers(5)))]
        place = int(rng.integers(len(batch) + 1))
        batch.insert(place, mine)
        loose.append(clipped(gradients(trainer, batch)[place : place + 1]))
        fixed.append(clipped(gradients(trainer, batch, shape)[place : place + 1]))
    assert max(float((found - fixed[0]).norm()) for found in fixed) == 0
    assert max(float((found - loose[0]).norm()) for found in loose) > 1


def test_a_head_by_matrix_product_hangs_on_a_records_place_and_is_refused(bert_folder):
    """Faulty: few columns, so that the last rows are added up in another order."""
    trainer = trainer_of(fresh(bert_folder), outputs=1)
    head = trainer.adapter.head
    head.forward = lambda vectors: functional.linear(vectors, head.weight, head.bias)
    with pytest.raises(AdapterError, match="depends on its neighbours"):
        run(trainer, records(4), plan(), shape=Shape(2, 6, 14))
    del head.forward
    assert np.isfinite(run(trainer, records(4), plan(), shape=Shape(2, 6, 14))).all()


def test_kernels_are_tried_in_float32_too(llama_folder):
    trainer = trainer_of(fresh(llama_folder))
    rounded_by_the_largest(trainer.adapter.base.network.model.layers[2].mlp)
    with pytest.raises(AdapterError, match="depends on its neighbours"):
        run(trainer, records(4), plan(), shape=Shape(1, 4, 40, spare=0))


def test_made_up_records_of_the_trial_are_of_many_lengths_and_words():
    for tokens in (3, 9, 17, 65):
        for spare in (0, 1):
            longest = tokens - 1 + spare
            made = kernel_trial._drawn_records(16, Shape(1, 9, tokens, spare), 1000)
            lengths = {len(record.ids) for record in made}
            assert min(lengths) >= 2
            assert len(made[0].ids) == max(lengths) == longest
            assert len(lengths) >= min(5, longest - 1)


def test_a_device_trains_on_one_thread_as_several_divide_a_batch_within_a_record(
    llama_folder, monkeypatch
):
    """Faulty: three threads, whose parts of a batch end in the middle of some record's numbers."""
    states = torch.randn(1, 25, 152, generator=torch.Generator().manual_seed(0)).repeat(12, 1, 1)

    def apart(threads):
        torch.set_num_threads(threads)
        rows = functional.silu(4 * states)
        return all(torch.equal(row, rows[0]) for row in rows[:-1])  # the last is always a dummy

    trainer, seen, right = trainer_of(fresh(llama_folder)), set(), local_training.losses_of
    before = torch.get_num_threads()

    def watched(*given):
        seen.add(torch.get_num_threads())
        return right(*given)

    monkeypatch.setattr(local_training, "losses_of", watched)
    try:
        assert apart(1)
        assert not apart(3)
        torch.set_num_threads(3)
        run(trainer, records(4), plan(), shape=Shape(1, 8, 20))
        assert torch.get_num_threads() == 3
        assert seen == {1}
    finally:
        torch.set_num_threads(before)


def test_a_clip_holds_in_rows_whose_small_numbers_are_many():
    """Faulty: a norm in float32 loses small squares beside large ones, and is too small."""
    wide = torch.nn.Parameter(torch.zeros(1, 1 << 24))
    row = torch.full((1, 1, 1 << 24), 2.0**-14)
    row[..., 0] = 1.0
    optimizer = local_training.optimizer_of(
        (("wide", wide),), plan(record_clip=0.5, batch_size=1), TestSource(1, "noise")
    )
    wide.grad_sample = row  # type: ignore[attr-defined]
    optimizer.step()
    assert wide.grad is not None
    moved = float(wide.grad.double().norm())
    assert 0.498 < moved <= 0.5


def rounded_by_the_largest(module):
    """Faulty: activations rounded on a grid that the largest one of the batch sets.

    Returns the module's own forward.
    """
    right = module.forward

    def coarse(hidden):
        step = hidden.detach().abs().max() / 8
        return right(hidden + ((hidden / step).round() * step - hidden).detach())

    module.forward = coarse
    return right


@pytest.mark.parametrize("rows", [5, 6])
@pytest.mark.parametrize("tokens", [9, 17])
def test_kernels_that_couple_by_the_largest_number_of_a_batch_are_refused(
    llama_folder, rows, tokens
):
    """In the last adapted layer, in small batches of short records."""
    base = load_anew(str(llama_folder), ComputeSettings(device="cpu", dtype="bfloat16"))
    trainer = trainer_of(base)
    rounded_by_the_largest(base.network.model.layers[3].mlp)
    with pytest.raises(AdapterError, match="depends on its neighbours"):
        run(trainer, records(4, longest=8), plan(), shape=Shape(1, rows, tokens, spare=0))


def test_kernels_that_let_neighbours_into_a_records_gradient_are_refused(llama_folder):
    base = load_anew(str(llama_folder), ComputeSettings(device="cpu", dtype="bfloat16"))
    trainer, shape = trainer_of(base), Shape(1, 4, 40, spare=0)
    inside = base.network.model.layers[2].mlp
    right = rounded_by_the_largest(inside)
    with pytest.raises(AdapterError, match="depends on its neighbours"):
        run(trainer, records(4), plan(), shape=shape)
    inside.forward = right
    assert np.isfinite(run(trainer, records(4), plan(), shape=shape)).all()


def test_a_trial_whose_gradients_are_no_numbers_is_not_passed(llama_folder):
    """Faulty: `max(0.0, nan)` is 0.0, so that no gap at all would be found."""
    base = load_anew(str(llama_folder), ComputeSettings(device="cpu", dtype="bfloat16"))
    trainer, shape = trainer_of(base), Shape(1, 4, 40, spare=0)
    inside = base.network.model.layers[3].mlp
    right = inside.forward
    inside.forward = lambda hidden: right(hidden) * torch.nan
    with pytest.raises(AdapterError, match="depends on its neighbours, by nan"):
        run(trainer, records(4), plan(), shape=shape)
    assert not trainer.tried


@pytest.mark.parametrize("poison", [np.nan, 1e30])
def test_no_adapter_of_a_server_hides_coupled_kernels(llama_folder, poison):
    """Faulty kernels as above, in the way back, under an adapter that makes every gradient NaN."""
    base = load_anew(str(llama_folder), ComputeSettings(device="cpu", dtype="bfloat16"))
    trainer, shape = trainer_of(base), Shape(1, 4, 40, spare=0)
    start = np.full_like(trainer.adapter.start, poison)
    inside = base.network.model.layers[3].mlp
    right = inside.forward

    def coarse(hidden):
        out = right(hidden)
        if out.requires_grad:
            out.register_hook(
                lambda slope: (slope / slope.abs().max() * 8).round() * slope.abs().max() / 8
            )
        return out

    inside.forward = coarse
    for vector in (start, trainer.adapter.start):
        with pytest.raises(AdapterError, match="depends on its neighbours"):
            run(trainer, records(4), plan(), vector, shape=shape)
    inside.forward = right
    assert np.isfinite(run(trainer, records(4), plan(), shape=shape)).all()


# --- one record moves a step by at most C -------------------------------------------------------


def neighbours_differ(trainer, own, extra, plan, steps=1):
    """Record and replay: how far one more record moves each step's sum before noise, over C.

    Both data sets go through the same randomness, and each step starts from what the smaller one
    released before.
    """
    start, quiet = moved_start(trainer), replace(plan, record_noise=0.0)
    found = []
    for step in range(steps):
        one = run(trainer, own, quiet, start, draws=step)
        other = run(trainer, [*own, extra], quiet, start, draws=step)
        moved = np.linalg.norm(other.astype(np.float64) - one)
        found.append(moved * plan.batch_size / (plan.learning_rate * plan.record_clip))
        start = start + run(trainer, own, plan, start, draws=step, noise=step)
    return max(found)


def replace(plan, **changes):
    return dataclasses.replace(plan, **changes)


@hypothesis_settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    count=st.integers(0, 20),
    length=st.integers(2, 30),
    seed=st.integers(0, 1000),
    clip=st.sampled_from([1e-3, 0.1, 1.0, 10.0]),
    rate=st.sampled_from([0.3, 1.0]),
    learning_rate=st.sampled_from([1e-3, 1.0, 30.0]),
)
def test_one_more_record_moves_the_sum_by_at_most_the_clip(
    trainer, count, length, seed, clip, rate, learning_rate
):
    own = labelled(trainer, records(count, seed))
    extra = Tokenised(records(1, seed + 1, length, length)[0].ids, 2.0)
    public = plan(record_clip=clip, rate=rate, learning_rate=learning_rate, record_noise=0.5)
    assert neighbours_differ(trainer, own, extra, public, steps=2) <= 1.0


def test_a_record_that_is_clipped_moves_the_sum_by_nearly_the_clip(trainer):
    """Not by all of it: the rest is what keeps rounding from carrying a record past the clip."""
    own = labelled(trainer, records(5))
    public = plan(record_clip=1e-3)
    moved = neighbours_differ(trainer, own, labelled(trainer, records(1, 9))[0], public)
    assert 0.99 < moved <= 1 - 2.0**-11


def test_a_tiny_learning_rate_does_not_let_rounding_pass_the_bound(texts):
    """The difference of two rounded adapters would: it is the faulty version."""
    public = plan(record_clip=1e-3, learning_rate=0.01)
    own, extra, start = records(5), records(1, 9)[0], moved_start(texts)
    assert neighbours_differ(texts, own, extra, public) <= 1
    one, other = (
        (start + run(texts, some, public, start)) - start for some in (own, [*own, extra])
    )
    assert np.linalg.norm(other.astype(np.float64) - one) * 8 / 1e-5 > 1.001


def test_a_head_fitted_on_the_same_records_breaks_the_bound_and_is_caught(labels, monkeypatch):
    own = [Tokenised(record.ids, 0.1) for record in records(10)]
    extra = Tokenised(own[0].ids, 30.0)
    public = plan(record_clip=0.1)
    assert neighbours_differ(labels, own, extra, public) <= 1
    monkeypatch.setattr(local_training, "record_losses", a_head_fitted_on_the_same_records)
    assert neighbours_differ(labels, own, extra, public) > 2


def test_clipping_each_tensor_for_itself_would_break_the_bound(texts, monkeypatch):
    own, extra, public = records(5), records(1, 9)[0], plan(record_clip=1e-3)

    def one_by_one(self):
        for parameter in self.params:
            norms = parameter.grad_sample.flatten(1).norm(dim=1)
            factor = (self.max_grad_norm / norms).clamp(max=1.0)
            parameter.summed_grad = torch.einsum("i,i...", factor, parameter.grad_sample)

    monkeypatch.setattr(local_training.PrivateOptimizer, "clip_and_accumulate", one_by_one)
    assert neighbours_differ(texts, own, extra, public) > 2


def test_an_adapter_that_the_models_output_does_not_hear_is_refused(llama_folder):
    adapter = attach(fresh(llama_folder), AdapterSettings(rank=2, last_blocks=1))
    for name in adapter.modules:
        layer = adapter.base.network.get_submodule(name)
        layer.forward = layer.base_layer.forward
    with pytest.raises(AdapterError, match="does not move the output"):
        Trainer.of(adapter)


def test_a_layer_that_sees_tokens_instead_of_records_is_refused(llama_folder):
    base = fresh(llama_folder)
    mlp = base.network.model.layers[3].mlp
    right = mlp.forward
    mlp.forward = lambda hidden: right(hidden.flatten(0, 1)).view_as(hidden)
    trainer = trainer_of(base, modules=("down_proj",), last_blocks=1)
    own = records(4)
    with pytest.raises(AdapterError, match=r"down_proj.*other rows than one for each record"):
        run(trainer, own, plan())
    without_privacy = run(trainer, own, plan(record_clip=0.0))
    mlp.forward = right
    trainer = trainer_of(base, modules=("down_proj",), last_blocks=1)
    assert np.allclose(run(trainer, own, plan(record_clip=0.0)), without_privacy, atol=1e-6)
    assert neighbours_differ(trainer, own, records(1, 9)[0], plan(record_clip=1e-3)) <= 1


# --- chunks and denominators --------------------------------------------------------------------


def test_a_round_that_broke_off_between_its_passes_leaves_nothing_to_the_next(trainer):
    own = labelled(trainer, records(5))
    right = run(trainer, own, plan())
    trainer.hooked.train()
    trainer.hooked.hooks_enabled = True
    local_training.losses_of(
        trainer, labelled(trainer, records(12, seed=3))
    )  # no backward pass: memory ran out, or the like
    np.testing.assert_array_equal(run(trainer, own, plan()), right)


def test_several_chunks_are_one_batch(trainer, monkeypatch):
    own = labelled(trainer, records(40))
    public, start = plan(record_noise=0.3, record_clip=0.5), moved_start(trainer)
    monkeypatch.setattr(local_training, "_CHUNK", 1000)
    whole = run(trainer, own, public, start)
    for size in (16, 20, 1):
        monkeypatch.setattr(local_training, "_CHUNK", size)
        assert np.allclose(run(trainer, own, public, start), whole, atol=2e-6)


def test_the_sum_of_the_parts_is_the_whole_so_the_denominator_is_public(trainer):
    own, start = labelled(trainer, records(7)), moved_start(trainer)
    for clip in (0.5, 0.0):
        public = plan(record_clip=clip)
        whole = run(trainer, own, public, start)
        parts = sum(run(trainer, [record], public, start).astype(np.float64) for record in own)
        assert np.allclose(whole, parts, atol=2e-6)
        assert np.abs(whole).max() > 1e-3


def test_the_plan_does_not_change_with_the_size_of_somebodys_data(llama_folder):
    """Opacus takes 1 / batches for the rate and rate * records for the denominator: the trap."""

    def faulty(count, batch=64):
        batches = math.ceil(count / batch)
        return 1 / batches, count // batches

    assert faulty(64) == (1.0, 64)
    assert faulty(65) == (0.5, 32)
    config = tiny_config(llama_folder)
    assert (config.sampling_rate, config.training.batch_size) == (0.5, 4)

    asked = []

    class Told(np.random.Generator):
        def random(self, size):  # type: ignore[override]
            asked.append(size)
            return super().random(size)

    for count in (64, 65):
        sizes = [
            len(poisson_indices(count, 0.25, Told(np.random.PCG64(seed)))) for seed in range(400)
        ]
        assert abs(np.mean(sizes) - count / 4) < 1
        assert 0.7 < np.var(sizes) / (count * 0.25 * 0.75) < 1.4
    assert set(asked) == {64, 65}


# --- noise --------------------------------------------------------------------------------------


def fits(noise, expected):
    """Whether the sample's spread is the expected one, within 6 standard errors."""
    return abs(noise.std() / expected - 1) < 6 / (2 * len(noise)) ** 0.5


@pytest.fixture(scope="module")
def wide(llama_folder):
    return trainer_of(fresh(llama_folder), "ffa", rank=16, last_blocks=4)


def test_an_empty_batch_steps_with_the_declared_noise(wide):
    public = plan(record_noise=0.7, record_clip=0.2, learning_rate=3.0, batch_size=5)
    delta = run(wide, [], public).astype(np.float64)
    expected = 0.7 * 0.2 * 3.0 / 5
    assert len(delta) > 5000
    assert fits(delta, expected)
    assert not fits(delta, expected * 2 / 3)
    assert not fits(delta, expected * 3 / 2)
    assert abs(delta.mean()) < 5 * expected / len(delta) ** 0.5
    kurtosis = float((delta**4).mean() / (delta**2).mean() ** 2)
    assert abs(kurtosis - 3) < 6 * (24 / len(delta)) ** 0.5


def test_the_noise_is_the_same_whatever_the_records_are_and_comes_once_a_step(wide):
    own = records(40)
    loud, quiet = plan(record_noise=0.7), plan()
    noise = run(wide, [], loud).astype(np.float64)
    found = run(wide, own, loud).astype(np.float64) - run(wide, own, quiet)
    assert len(local_training.chunked(own)) == 3
    assert np.allclose(found, noise, atol=2e-6)
    once_per_chunk = sum(run(wide, [], loud, noise=seed).astype(np.float64) for seed in range(3))
    assert not fits(once_per_chunk, 0.7 / 8)


def test_several_steps_draw_noise_of_their_own(wide):
    delta = run(wide, [], plan(record_noise=0.7, local_steps=4)).astype(np.float64)
    assert fits(delta, 2 * 0.7 / 8)
    assert not fits(4 * run(wide, [], plan(record_noise=0.7)).astype(np.float64), 2 * 0.7 / 8)


def test_the_noise_comes_from_the_source_and_from_nowhere_else(texts):
    public = plan(record_noise=0.7, rate=0.5, local_steps=3)
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state()
    first = run(texts, records(6), public)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    np.random.seed(2)
    assert np.array_equal(run(texts, records(6), public), first)
    assert not np.allclose(run(texts, records(6), public, noise=2), first, atol=1e-2)
    assert not np.array_equal(run(texts, records(6), public, draws=2), first)


def test_the_draws_are_standard_normal_also_at_the_ends():
    class Words:
        def __init__(self, *words):
            self.given = np.array(words, np.uint64)

        def words(self, count):
            assert count == len(self.given)
            return self.given

    for word in (0, 2**64 - 1):
        assert np.isfinite(local_training._gaussian(1, Words(word, 0))).all()
    assert local_training._gaussian(1, Words(0, 0))[0] > 8


# --- off, broken, several -----------------------------------------------------------------------


def test_without_example_level_privacy_it_is_plain_sgd(trainer):
    own, start = labelled(trainer, records(20)), moved_start(trainer)
    delta = run(trainer, own, plan(record_clip=0.0, batch_size=10, learning_rate=0.5), start)
    trainer.adapter.write(start)
    trainer.hooked.hooks_enabled = False
    parameters = [parameter for _, parameter in trainer.adapter.parameters]
    losses = local_training.losses_of(trainer, own)
    found = torch.autograd.grad(losses.sum(), parameters)
    expected = -0.5 / 10 * torch.cat([piece.ravel() for piece in found]).numpy()
    assert np.allclose(delta, expected, atol=1e-5 * np.abs(expected).max())
    assert np.linalg.norm(delta) > 0.01
    assert not run(trainer, [], plan(record_clip=0.0), start).any()
    assert all(parameter.grad is None for parameter in parameters)


def test_privacy_on_and_off_can_follow_each_other(texts):
    own = records(5)
    private, plain = plan(record_noise=0.2), plan(record_clip=0.0)
    first = run(texts, own, private), run(texts, own, plain)
    for _ in range(2):
        assert np.array_equal(run(texts, own, private), first[0])
        assert np.array_equal(run(texts, own, plain), first[1])


def test_a_clip_that_never_binds_gives_plain_sgd(texts):
    own, start = records(5), moved_start(texts)
    plain = run(texts, own, plan(record_clip=0.0), start)
    assert np.allclose(run(texts, own, plan(record_clip=1e4), start), plain, rtol=1e-3, atol=1e-5)


def test_a_record_whose_gradient_is_not_finite_counts_as_none_and_spares_the_others(labels):
    settings = plan(record_noise=0.0, rate=1.0)
    wanted = run(labels, records(20), settings)
    for label in (float("nan"), float("inf")):
        own = [*records(20), Tokenised((6, 7, 8), label)]
        assert np.allclose(run(labels, own, settings), wanted, atol=1e-6)
    assert np.linalg.norm(wanted) > 0.01


def test_no_adapter_that_a_server_sends_makes_a_device_decline_for_its_words(texts):
    """From 1e18 on squares overflow, with some words and not with others: a decline would tell."""
    direction = np.random.default_rng(0).normal(size=len(texts.adapter.start))
    words = [Tokenised((4, word, 5)) for word in range(6, 26)]
    parameters = [parameter for _, parameter in texts.adapter.parameters]
    told = []
    for size in np.geomspace(2e18, 2e19, 25):
        start = (size * direction).astype(np.float32)
        texts.adapter.write(start)
        texts.hooked.hooks_enabled = False
        finite = [_is_finite(local_training.losses_of(texts, [word]), parameters) for word in words]
        told.append(sum(finite))
        if not 0 < told[-1] < len(words):
            continue
        for settings in (plan(record_clip=0.0), plan(losses_bound=1.0)):
            for word in (words[finite.index(True)], words[finite.index(False)]):
                drawn = Randomness(np.random.default_rng(1), TestSource(1, "noise"))
                made = train(texts, start, [word], settings, drawn)
                assert np.isfinite(made.delta).all()
                assert np.isfinite(made.statistics).all()
    assert any(0 < count < len(words) for count in told)


def _is_finite(losses, parameters):
    found = torch.autograd.grad(losses.sum(), parameters)
    return all(bool(piece.isfinite().all()) for piece in found)


def test_an_interrupted_step_leaves_nothing_to_the_next_client(texts, monkeypatch):
    own, right = records(4), local_training.losses_of
    wanted = run(texts, own, plan())

    def interrupted(trainer, chunk, shape):
        right(trainer, chunk, shape).sum().backward()
        raise KeyboardInterrupt

    monkeypatch.setattr(local_training, "losses_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(texts, records(4, seed=3), plan())
    monkeypatch.setattr(local_training, "losses_of", right)
    assert np.array_equal(run(texts, own, plan()), wanted)


@pytest.mark.parametrize("family", ["tiny", "ffa", "lora"])
def test_every_family_learns_and_steps_compose(llama_folder, family):
    trainer = trainer_of(fresh(llama_folder), family)
    own = records(8)
    public = plan(local_steps=20, learning_rate=0.5, record_clip=5.0)

    def loss(vector):
        trainer.adapter.write(vector)
        with torch.no_grad():
            return float(local_training.losses_of(trainer, own).mean())

    start = trainer.adapter.start
    delta = run(trainer, own, public)
    assert loss(start + delta) < loss(start) - 0.03
    one_by_one = start
    for _ in range(20):
        one_by_one = one_by_one + run(trainer, own, plan(learning_rate=0.5, record_clip=5.0),
                                      one_by_one)  # fmt: skip
    assert np.allclose(one_by_one, start + delta, atol=1e-4)


def test_lora_starts_with_a_dead_gradient_on_a_and_moves_it_later(llama_folder):
    trainer = trainer_of(fresh(llama_folder), "lora")
    adapter, own = trainer.adapter, records(8)
    names = np.repeat(
        [name for name, _ in adapter.layout.pieces],
        [math.prod(shape) for _, shape in adapter.layout.pieces],
    )
    down = np.char.find(names, "lora_A") >= 0
    first = run(trainer, own, plan())
    assert not first[down].any()
    assert first[~down].any()
    assert run(trainer, own, plan(local_steps=2))[down].any()


def test_a_release_of_several_steps_says_how_many():
    steps = {charge.steps for charge in charges(plan(local_steps=3), 100, PrivacySettings())
             if charge.unit == "example"}  # fmt: skip
    assert steps == {3}


def test_hooks_are_set_once_however_often_a_trainer_is_asked_for(llama_folder):
    """The faulty version hooks the layers again, and every gradient counts twice."""
    adapter = attach(fresh(llama_folder), AdapterSettings(rank=2, last_blocks=2))
    other = attach(fresh(llama_folder), AdapterSettings(rank=2, last_blocks=2))
    public = plan(record_clip=1e3)
    wanted = run(Trainer.of(adapter), records(4), public)
    assert np.array_equal(run(Trainer.of(adapter), records(4), public), wanted)
    Trainer.of(other)
    assert np.array_equal(run(Trainer.of(adapter), records(4), public), wanted)
    assert np.allclose(run(Trainer.of(adapter, 8), records(4), public), wanted, atol=1e-5)
    GradSampleModule(nn.ModuleList(adapter.trainable.values()), loss_reduction="sum")
    twice = run(Trainer(adapter, Trainer.of(adapter).hooked), records(4), public)
    assert np.allclose(twice, 2 * wanted, atol=1e-5)


def test_a_cached_prefix_changes_only_the_rounding(llama_folder, bert_folder):
    for folder, outputs in ((llama_folder, 0), (bert_folder, 1)):
        adapter = attach(fresh(folder), AdapterSettings(rank=2, last_blocks=2), outputs)
        plain, cached = Trainer(adapter, Trainer.of(adapter).hooked), Trainer.of(adapter, 8)
        assert cached.prefix is not None
        start, public = moved_start(plain), plan(local_steps=2)
        wanted = run(plain, records(20), public, start)
        for _ in range(2):
            assert np.allclose(run(cached, records(20), public, start), wanted, atol=5e-6)
        assert largest_coupling(cached, records(7)) < 2e-6


def test_the_losses_are_those_of_the_objective(labels):
    own = records(3)
    batch = collate([r.ids for r in own], [float(r.label or 0) for r in own])
    head = labels.adapter.head
    assert isinstance(head, SharedHead)
    with torch.no_grad():
        expected = record_losses(labels.adapter.base, batch, head)
        assert torch.equal(local_training.losses_of(labels, own), expected)
