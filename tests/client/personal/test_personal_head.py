"""Personal heads: text, labels, and their files."""

import math

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from privet.client.personal import label_head, text_head
from privet.client.personal.head import PersonalHead
from privet.client.personal.label_head import LabelHead, fit_label_head, label_losses, predict
from privet.client.personal.scored_text import ScoredText
from privet.client.personal.text_evaluator import TextPerson
from privet.client.personal.text_head import (
    TextHead,
    TokenStates,
    adjusted_logits,
    fit_text_head,
    no_text_head,
    shared_scores,
    token_losses,
)
from privet.common.errors import DataError, StateError
from privet.common.model.output_layer import OutputLayer

WIDTH, VOCABULARY = 16, 300
fast = settings(max_examples=20, deadline=None)


def _output(dtype: torch.dtype = torch.float32) -> OutputLayer:
    generator = torch.Generator().manual_seed(0)
    return OutputLayer((torch.randn(VOCABULARY, WIDTH, generator=generator) / 2).to(dtype))


def _person(
    seed: int, records: int = 16, length: int = 20, taste: float = 3.0, start: int = 0
) -> TokenStates:
    """A person who likes twelve tokens; `taste` 0 talks exactly as the shared model predicts."""
    likes = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(seed))[:12]
    generator = torch.Generator().manual_seed(1000 * seed + start + 1)
    states = 2 * torch.randn(records * length, WIDTH, generator=generator)
    logits = _output().scores(states)
    logits[:, likes] += taste
    targets = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    return TokenStates(states, targets, start + torch.arange(records).repeat_interleave(length))


def _mean_loss(head: TextHead | None, data: TokenStates) -> float:
    return float(token_losses(head, data, _output(), shared_scores(data, _output())).mean())


def _forced(seed: int = 1, *, memory: bool = True) -> TextHead:
    """A head with both parts, whatever the evidence says."""
    own = _person(seed)
    tokens, slots = torch.unique(own.targets, return_inverse=True)
    keys = torch.nn.functional.normalize(own.states - own.states.mean(0), dim=1)
    bias = torch.rand(len(tokens), generator=torch.Generator().manual_seed(seed))
    kept = len(keys) if memory else 0
    return TextHead(tokens, bias, keys[:kept], slots[:kept], own.states.mean(0), 0.5, -2.0)


# --- text ---------------------------------------------------------------------------------------


def test_a_person_with_own_words_gains_on_later_records_and_a_strangers_head_does_not_help() -> (
    None
):
    gains, swapped = [], []
    heads = [fit_text_head(_person(seed), _output()) for seed in range(8)]
    for seed in range(8):
        later = _person(seed, start=100)
        base = _mean_loss(None, later)
        gains.append(base - _mean_loss(heads[seed], later))
        swapped.append(base - _mean_loss(heads[(seed + 1) % 8], later))
    assert min(gains) > 0.02
    assert sum(swapped) / 8 < 0


def test_somebody_who_talks_as_the_shared_model_predicts_is_not_hurt() -> None:
    losses = []
    for seed in range(12):
        head = fit_text_head(_person(seed, taste=0.0), _output())
        later = _person(seed, taste=0.0, start=100)
        losses.append(_mean_loss(head, later) - _mean_loss(None, later))
    assert sum(loss > 0.005 for loss in losses) <= 1


def test_weights_chosen_on_the_fitted_records_themselves_would_hurt_and_held_out_ones_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own, later = _person(3, taste=0.0), _person(3, taste=0.0, start=100)
    assert fit_text_head(own, _output()).is_shared

    def faulty_in_sample(_own, _shared, slots, log_own):  # no block is left out
        evidence = text_head._evidence(slots, log_own)
        return {
            (weight, None): text_head._bias_gain(log_own, weight * evidence[None], slots)
            for weight in text_head.BIAS_WEIGHTS
        }

    monkeypatch.setattr(text_head, "_held_out_gains", faulty_in_sample)
    faulty = fit_text_head(own, _output())
    assert not faulty.is_shared
    assert _mean_loss(faulty, later) > _mean_loss(None, later) + 0.001


@fast
@given(st.integers(0, 50), st.booleans())
def test_losses_from_the_persons_own_columns_equal_those_from_the_full_vocabulary(
    seed: int, memory: bool
) -> None:
    head, data = _forced(seed, memory=memory), _person(seed + 1, records=3, length=5)
    fast_losses = token_losses(head, data, _output(), shared_scores(data, _output()))
    full = adjusted_logits(head, data.states, _output().scores(data.states))
    assert torch.allclose(full.exp().sum(1), torch.ones(len(data)), atol=1e-5)
    slow_losses = -full.gather(1, data.targets[:, None])[:, 0]
    assert torch.allclose(fast_losses, slow_losses, atol=1e-4)


def test_forgetting_the_normaliser_is_caught_by_the_full_vocabulary() -> None:
    head, data = _forced(memory=False), _person(2, records=3, length=5)
    scores = shared_scores(data, _output())

    def faulty() -> Tensor:  # a bonus for own tokens that nobody pays for
        bonus = torch.zeros(VOCABULARY).index_add_(0, head.tokens, head.bias)
        return scores.log_z - scores.target_logit - bonus[data.targets]

    full = adjusted_logits(head, data.states, _output().scores(data.states))
    slow = -full.gather(1, data.targets[:, None])[:, 0]
    assert (faulty() - slow).abs().max() > 0.1
    assert (token_losses(head, data, _output(), scores) - slow).abs().max() < 1e-4


def test_shared_scores_in_chunks_equal_log_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    data = _person(4)
    whole = torch.log_softmax(_output().scores(data.states), dim=1)
    for size in (4 * VOCABULARY * 7, 1, 24 * 2**20):
        monkeypatch.setattr(text_head, "_LOGIT_BYTES", size)
        scores = shared_scores(data, _output())
        log_p = scores.target_logit - scores.log_z
        assert torch.allclose(log_p, whole.gather(1, data.targets[:, None])[:, 0], atol=1e-5)


def test_losses_in_chunks_equal_losses_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    head, data = _forced(), _person(5)
    scores = shared_scores(data, _output())
    whole = token_losses(head, data, _output(), scores)
    monkeypatch.setattr(text_head, "_ROWS", 7)
    assert torch.allclose(token_losses(head, data, _output(), scores), whole, atol=1e-5)


def test_the_empty_head_is_the_shared_model_to_the_bit() -> None:
    data = _person(6)
    scores = shared_scores(data, _output())
    base = token_losses(None, data, _output(), scores)
    assert torch.equal(token_losses(no_text_head(WIDTH), data, _output(), scores), base)
    logits = _output().scores(data.states[0])
    empty = adjusted_logits(no_text_head(WIDTH), data.states[0], logits)
    assert torch.equal(empty, torch.log_softmax(logits, dim=0))


@pytest.mark.parametrize("records", [0, 1, 2, 3])
def test_too_few_records_are_no_evidence(records: int) -> None:
    own = _person(7, records=records)
    head = fit_text_head(own, _output())
    assert head.is_shared
    assert len(token_losses(head, own, _output(), shared_scores(own, _output()))) == len(own)


def test_a_fit_reads_nothing_but_its_own_records_and_is_the_same_each_time() -> None:
    first, second = (fit_text_head(_person(8), _output()) for _ in range(2))
    assert torch.equal(first.bias, second.bias)
    assert torch.equal(first.keys, second.keys)


def test_blocks_are_contiguous_in_the_order_of_the_records() -> None:
    record = torch.tensor([30, 30, 5, 7, 90, 91, 92, 93, 94])
    assert text_head._blocks(record).tolist() == [1, 1, 0, 0, 1, 2, 2, 3, 3]


def test_one_state_and_one_token_repeated_for_ever_stays_finite() -> None:
    states = torch.ones(40, WIDTH)
    own = TokenStates(states, torch.full((40,), 3), torch.arange(40) // 5)
    head = fit_text_head(own, _output())
    assert not head.is_shared
    other = TokenStates(states, torch.full((40,), 4), torch.arange(40) // 5)
    losses = token_losses(head, other, _output(), shared_scores(other, _output()))
    assert torch.isfinite(losses).all()


def test_a_generation_step_takes_one_state_or_many() -> None:
    head, data = _forced(), _person(9, records=1, length=3)
    logits = _output().scores(data.states)
    many = adjusted_logits(head, data.states, logits)
    one = adjusted_logits(head, data.states[1], logits[1])
    assert one.shape == (VOCABULARY,)
    assert torch.allclose(many[1], one, atol=1e-5)


def test_half_precision_states_are_taken() -> None:
    own = _person(10)
    half = TokenStates(own.states.bfloat16(), own.targets, own.record)
    scores = shared_scores(half, _output(torch.bfloat16))
    head = fit_text_head(half, _output(torch.bfloat16), scores)
    assert torch.isfinite(token_losses(head, half, _output(torch.bfloat16), scores)).all()


def test_a_repr_shows_no_private_number() -> None:
    assert "tensor" not in repr(_forced()) + repr(_person(1))
    assert "tensor" not in repr(shared_scores(_person(1), _output()))


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: TokenStates(torch.zeros(3, 4), torch.zeros(2).long(), torch.zeros(2).long()),
         "3 states for 2 targets"),
        (lambda: TokenStates(torch.zeros(2), torch.zeros(2).long(), torch.zeros(2).long()),
         "states \\(n, w\\)"),
        (lambda: TokenStates(torch.zeros(2, 4), torch.zeros(2), torch.zeros(2).long()),
         "must be int64"),
        (lambda: TokenStates(
            torch.full((2, 4), math.nan), torch.zeros(2).long(), torch.zeros(2).long()),
         "NaN or infinity"),
        (lambda: shared_scores(_person(1), OutputLayer(torch.zeros(9, WIDTH + 1))),
         "output layer"),
        (lambda: fit_text_head(_person(1), OutputLayer(torch.zeros(2, WIDTH))),
         "outside the vocabulary of 2"),
    ],
)  # fmt: skip
def test_wrong_states_are_refused_with_a_sentence(build, sentence) -> None:
    with pytest.raises(DataError, match=sentence):
        build()


# --- labels -------------------------------------------------------------------------------------


def _shared_rating() -> LabelHead:
    weight = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(5))
    return LabelHead(weight, torch.tensor([0.5]), "regression")


def _rater(
    seed: int, count: int, scale: float, offset: float, noise: float = 1.0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, WIDTH, generator=generator)
    features = torch.nn.functional.normalize(features, dim=1)
    clean = scale * predict(_shared_rating(), features) + offset
    return features, clean + noise * torch.randn(count, generator=generator)


def test_a_rater_with_an_own_offset_and_scale_gains_and_another_raters_head_loses() -> None:
    shared, gains, control = _shared_rating(), [], []
    for seed in range(30):
        sign = 1.0 if seed % 2 else -1.0
        features, labels = _rater(seed, 20, 1.0, 1.5 * sign)
        mine = fit_label_head(features, labels, shared)
        other = fit_label_head(*_rater(seed + 100, 20, 1.0, -1.5 * sign), shared)
        test = _rater(seed + 200, 50, 1.0, 1.5 * sign)
        base = float(label_losses(shared, *test).mean())
        gains.append(base - float(label_losses(mine, *test).mean()))
        control.append(base - float(label_losses(other, *test).mean()))
    assert sum(gains) / 30 > 1.5
    assert sum(control) / 30 < -1


def test_the_closed_form_leave_one_out_equals_fitting_without_each_record(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (features, labels), shared = _rater(1, 12, 2.0, 1.0), _shared_rating()
    errors: list[float] = []

    def listening(_choices, held_out, _shared):
        errors.append(held_out(1.0))
        return 1.0

    monkeypatch.setattr(label_head, "best_choice", listening)
    fit_label_head(features, labels, shared)
    explicit = [
        _ridge_in_the_open(features, labels, torch.arange(12) != out, shared, features[out])
        for out in range(12)
    ]
    squares = (torch.stack(explicit) - labels.double()).square().mean()
    assert errors[0] == pytest.approx(float(squares), rel=1e-4)


def _ridge_in_the_open(
    features: Tensor, labels: Tensor, rest: Tensor, shared: LabelHead, at: Tensor
) -> Tensor:
    """The same MAP estimate from `rest`, as penalised least squares in the weights; at `at`."""
    length = features.double().square().sum(1).mean().sqrt()
    along = torch.nn.functional.normalize(shared.weight[0].double(), dim=0)
    covariance = label_head.WEIGHT_VARIANCE * torch.eye(WIDTH).double()
    covariance += label_head.SCALE_VARIANCE * torch.outer(along, along)
    bias = torch.tensor([[label_head.BIAS_VARIANCE]]).double()
    design = torch.cat([features.double() / length, torch.ones(len(labels), 1).double()], 1)
    residual = (labels - predict(shared, features)).double()
    gram = design[rest].T @ design[rest] + torch.linalg.inv(torch.block_diag(covariance, bias))
    change = torch.linalg.solve(gram, design[rest].T @ residual[rest])
    row = torch.cat([at.double() / length, torch.ones(1).double()])
    guess: Tensor = predict(shared, at[None])[0].double() + row @ change
    return guess


def test_the_fitted_head_is_the_map_estimate_from_all_labels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (features, labels), shared = _rater(2, 12, 2.0, 1.0), _shared_rating()
    monkeypatch.setattr(label_head, "best_choice", lambda *_: 1.0)
    head = fit_label_head(features, labels, shared)
    at = torch.randn(WIDTH, generator=torch.Generator().manual_seed(9))
    everybody = torch.ones(12, dtype=torch.bool)
    expected = _ridge_in_the_open(features, labels, everybody, shared, at)
    assert float(predict(head, at[None])) == pytest.approx(float(expected), rel=1e-4)


def test_leave_one_out_protects_somebody_who_rates_as_the_shared_head_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shared = _shared_rating()

    def harm() -> list[float]:
        losses = []
        for seed in range(40):
            head = fit_label_head(*_rater(seed, 20, 1.0, 0.0), shared)
            test = _rater(seed + 500, 200, 1.0, 0.0)
            losses.append(float((label_losses(head, *test) - label_losses(shared, *test)).mean()))
        return losses

    kept = harm()
    # The faulty version: adopt the personal part whatever the held-out labels say.
    monkeypatch.setattr(label_head, "best_choice", lambda *_: 1.0)
    faulty = harm()
    assert sum(loss == 0 for loss in kept) >= 15
    assert sum(kept) < 0.6 * sum(faulty)


@pytest.mark.parametrize("count", [0, 1])
def test_no_or_one_label_gives_the_shared_head(count: int) -> None:
    shared = _shared_rating()
    assert fit_label_head(torch.ones(count, WIDTH), torch.full((count,), 9.0), shared) is shared


@fast
@given(
    st.integers(2, 12),
    st.sampled_from([0.0, 1.0, 1e-30, 1e6]),
    st.sampled_from([0.0, -4.0, 1e6]),
    st.sampled_from([0.0, 1.0]),
)
def test_constant_features_and_equal_labels_never_give_nan(
    count: int, feature: float, label: float, weight: float
) -> None:
    shared = LabelHead(torch.full((1, WIDTH), weight), torch.zeros(1), "regression")
    features, labels = torch.full((count, WIDTH), feature), torch.full((count,), label)
    head = fit_label_head(features, labels, shared)
    assert torch.isfinite(predict(head, features)).all()
    before = label_losses(shared, features, labels).mean()
    assert label_losses(head, features, labels).mean() <= before * 1.001 + 1e-6


@fast
@given(st.floats(0.01, 100), st.floats(0.01, 100))
def test_the_unit_of_labels_and_features_changes_nothing(unit: float, length: float) -> None:
    features, labels = _rater(3, 15, 1.5, 1.0)
    plain = fit_label_head(features, labels, _shared_rating())
    scaled = LabelHead(
        _shared_rating().weight * unit / length, _shared_rating().bias * unit, "regression"
    )
    other = fit_label_head(features * length, labels * unit, scaled)
    expected = predict(plain, features) * unit
    assert torch.allclose(predict(other, features * length), expected, rtol=1e-3, atol=1e-3 * unit)


def _shared_classes() -> LabelHead:
    weight = 3 * torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(6))
    return LabelHead(weight, torch.zeros(3), "classification")


def _chooser(seed: int, count: int, push: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, WIDTH, generator=generator)
    features = torch.nn.functional.normalize(features, dim=1)
    logits = predict(_shared_classes(), features) + push * torch.tensor([1.0, 0.0, -1.0])
    return features, torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]


def test_somebody_who_prefers_a_class_gains_and_an_opposite_head_hurts() -> None:
    shared, gains, control = _shared_classes(), 0.0, 0.0
    for seed in range(6):
        mine = fit_label_head(*_chooser(seed, 30, 2.0), shared)
        other = fit_label_head(*_chooser(seed, 30, -2.0), shared)
        test = _chooser(seed + 100, 100, 2.0)
        base = float(label_losses(shared, *test).mean())
        gains += base - float(label_losses(mine, *test).mean())
        control += base - float(label_losses(other, *test).mean())
    assert gains / 6 > 0.2
    assert control / 6 < -0.2


@pytest.mark.parametrize("feature", [0.0, 1.0])
def test_classes_that_are_all_the_same_give_finite_scores(feature: float) -> None:
    for shared in (
        _shared_classes(),
        LabelHead(torch.zeros(3, WIDTH), torch.zeros(3), "classification"),
    ):
        features, labels = torch.full((6, WIDTH), feature), torch.full((6,), 2)
        head = fit_label_head(features, labels, shared)
        assert torch.isfinite(label_losses(head, features, labels)).all()
        assert (
            label_losses(head, features, labels).mean()
            <= label_losses(shared, features, labels).mean()
        )


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: fit_label_head(torch.zeros(3, 2), torch.zeros(3), _shared_rating()),
         "Features \\(n, 16\\)"),
        (lambda: fit_label_head(
            torch.zeros(2, WIDTH), torch.tensor([1.0, math.nan]), _shared_rating()),
         "NaN or infinity"),
        (lambda: fit_label_head(torch.zeros(2, WIDTH), torch.tensor([0, 3]), _shared_classes()),
         "class number from 0 to 2"),
        (lambda: LabelHead(torch.zeros(2, 4), torch.zeros(2), "regression"), "regression needs 1"),
        (lambda: LabelHead(torch.zeros(4), torch.zeros(1), "regression"), "weight \\(o, w\\)"),
    ],
)  # fmt: skip
def test_wrong_labels_are_refused_with_a_sentence(build, sentence) -> None:
    with pytest.raises(DataError, match=sentence):
        build()


# --- bytes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [_forced(), _forced(memory=False), no_text_head(WIDTH)])
def test_a_text_head_survives_its_bytes(head: TextHead) -> None:
    loaded = TextHead.from_bytes(head.to_bytes(), "heads/run")
    data = _person(3)
    scores = shared_scores(data, _output())
    before, after = (token_losses(kept, data, _output(), scores) for kept in (head, loaded))
    assert torch.equal(before, after)
    assert loaded.memory_offset == head.memory_offset


@pytest.mark.parametrize("shared", [_shared_rating(), _shared_classes()])
def test_a_label_head_survives_its_bytes(shared: LabelHead) -> None:
    loaded = LabelHead.from_bytes(shared.to_bytes(), "heads/run")
    assert loaded.task == shared.task
    assert torch.equal(loaded.weight, shared.weight)


def test_the_bytes_that_devices_have_kept_so_far_still_open() -> None:
    """Written here by hand: tensors and facts as a vault has them."""
    text, label = _forced(), _shared_rating()
    names = ("tokens", "bias", "keys", "slots", "centre")
    kept = safetensors.torch.save(
        {name: getattr(text, name) for name in names},
        {"privet": "text head 1", "bias_weight": "0.5", "memory_offset": "-2.0"},
    )
    assert TextHead.from_bytes(kept, "heads/run").memory_offset == -2.0
    assert len(text.to_bytes()) == len(kept)
    kept = safetensors.torch.save(
        {"weight": label.weight, "bias": label.bias},
        {"privet": "label head 1", "task": "regression", "strength": "0.1"},
    )
    assert LabelHead.from_bytes(kept, "heads/run").strength == 0.1


def test_cut_and_empty_bytes_and_those_of_another_kind_are_named() -> None:
    whole = _forced().to_bytes()
    for cut in (0, 4, len(whole) // 2, len(whole) - 1):
        with pytest.raises(StateError, match="heads/run is not a usable personal head"):
            TextHead.from_bytes(whole[:cut], "heads/run")
    with pytest.raises(StateError, match="not a text head"):
        TextHead.from_bytes(_shared_rating().to_bytes(), "heads/run")
    with pytest.raises(StateError, match="not a label head"):
        LabelHead.from_bytes(whole, "heads/run")


@pytest.mark.parametrize("change", [{"slots": [0, -1]}, {"slots": [0, 2]}, {"bias": [1.0]}])
def test_a_text_head_whose_tensors_do_not_fit_together_is_named(change) -> None:
    tensors = {
        "tokens": torch.tensor([3, 5]), "bias": torch.ones(2), "keys": torch.zeros(2, WIDTH),
        "slots": torch.tensor([0, 1]), "centre": torch.zeros(WIDTH),
    }  # fmt: skip
    tensors |= {name: torch.tensor(values) for name, values in change.items()}
    with pytest.raises(StateError, match="do not fit together"):
        TextHead.from_bytes(TextHead(**tensors, bias_weight=1.0, memory_offset=0.0).to_bytes(), "h")


def test_a_head_of_another_kind_is_refused_with_a_sentence() -> None:
    data = _person(1)
    scores, scored = shared_scores(data, _output()), torch.ones(len(data), dtype=torch.bool)
    text = ScoredText(data, scored, scores, _output(), 0, int(data.record.max()) + 1)
    person = TextPerson([0.0], None, text, [1])
    other: PersonalHead = _shared_rating()
    with pytest.raises(TypeError, match="expected a TextHead or None, got a LabelHead"):
        person.loss(other)
