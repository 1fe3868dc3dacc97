"""common/model/objective.py: what a record's loss is, and that it is the record's own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from privet.common.model.base_model import final_states
from privet.common.model.objective import (
    SharedHead,
    collate,
    label_losses,
    pooled,
    record_losses,
    token_losses,
)

from ...tiny import VOCABULARY, fresh

RECORDS = ((6, 7, 8, 9, 10), (12, 13), (15, 16, 17))


def test_a_record_is_padded_on_the_right_and_keeps_its_label():
    batch = collate(RECORDS, [1.0, -2.0, 0.5])
    assert batch.ids.tolist() == [[6, 7, 8, 9, 10], [12, 13, 0, 0, 0], [15, 16, 17, 0, 0]]
    assert batch.mask.sum(1).tolist() == [5, 2, 3]
    assert batch.labels is not None
    assert batch.labels.tolist() == [1.0, -2.0, 0.5]


def test_generation_is_the_mean_loss_of_transformers_itself(llama):
    with torch.no_grad():
        losses = record_losses(llama, collate(RECORDS, None), None)
        for loss, record in zip(losses, RECORDS, strict=True):
            ids = torch.tensor([record])
            assert float(loss) == pytest.approx(float(llama.network(ids, labels=ids).loss), 1e-5)


def test_tokens_that_are_not_learnt_have_no_loss_and_are_seen_all_the_same(llama):
    places = [(2, 4), None, (0, 2)]
    with torch.no_grad():
        losses = record_losses(llama, collate(RECORDS, None, places), None)
        for loss, record, learnt in zip(losses, RECORDS, places, strict=True):
            ids = torch.tensor([record])
            known = range(len(record)) if learnt is None else learnt
            wanted = torch.tensor([[i if k in known else -100 for k, i in enumerate(record)]])
            assert float(loss) == pytest.approx(float(llama.network(ids, labels=wanted).loss), 1e-5)


@settings(deadline=None)
@given(
    st.lists(
        st.lists(st.integers(6, VOCABULARY - 1), min_size=2, max_size=12), min_size=1, max_size=6
    )
)
def test_a_records_loss_does_not_depend_on_the_batch_around_it(llama_folder, records):
    base = llama_of(llama_folder)
    with torch.no_grad():
        together = record_losses(base, collate(records, None), None)
        alone = [record_losses(base, collate([record], None), None)[0] for record in records]
    assert together.tolist() == pytest.approx([float(loss) for loss in alone], abs=2e-5)


def llama_of(folder, kept={}):  # noqa: B006 - loaded once for all examples
    if folder not in kept:
        kept[folder] = fresh(folder)
    return kept[folder]


def test_the_loss_of_a_token_is_its_negative_log_probability(llama):
    states, targets = torch.randn(3, llama.width), torch.tensor([6, 7, 8])
    with torch.no_grad():
        chances = llama.output.scores(states).softmax(1)
        expected = -chances[torch.arange(3), targets].log()
        assert torch.allclose(token_losses(llama, states, targets), expected, atol=1e-5)


def test_one_output_is_squared_error_and_several_are_cross_entropy():
    outputs = torch.tensor([[0.5], [-1.0]])
    assert label_losses(outputs, torch.tensor([1.5, 1.0])).tolist() == [1.0, 4.0]
    outputs = torch.randn(4, 3)
    labels = torch.tensor([0.0, 1.0, 2.0, 1.0])
    expected = functional.cross_entropy(outputs, labels.long(), reduction="none")
    assert torch.equal(label_losses(outputs, labels), expected)


def test_a_text_becomes_one_vector_of_norm_one_whatever_surrounds_it(base):
    with torch.no_grad():
        batch = collate(RECORDS, None)
        together = pooled(base, final_states(base, batch.ids, batch.mask), batch.mask)
        assert together.norm(dim=1).tolist() == pytest.approx([1.0] * 3)
        for row, record in enumerate(RECORDS):
            one = collate([record], None)
            states = final_states(base, one.ids, one.mask)
            assert torch.allclose(pooled(base, states, one.mask)[0], together[row], atol=1e-5)
            by_hand = states[0].mean(0) if base.kind == "encoder" else states[0, -1]
            assert torch.allclose(by_hand / by_hand.norm(), together[row], atol=1e-5)


def test_a_labelled_batch_without_a_head_is_refused(bert):
    with pytest.raises(ValueError, match="needs a head"):
        record_losses(bert, collate(RECORDS, [1.0, 2.0, 3.0]), None)


@pytest.mark.parametrize("outputs", [1, 3])
def test_a_head_of_zeros_predicts_nothing(base, outputs):
    head = SharedHead(base.width, outputs)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    with torch.no_grad():
        losses = record_losses(base, collate(RECORDS, [2.0, 0.0, 1.0]), head).tolist()
    expected = [4.0, 0.0, 1.0] if outputs == 1 else [1.0986123] * 3
    assert losses == pytest.approx(expected)
