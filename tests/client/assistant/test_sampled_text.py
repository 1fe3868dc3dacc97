"""text_generation.py: the one way to draw tokens, with a cache, for one text or for many."""

import pytest
import torch

from privet.client.assistant.text_generation import Sampling, completed
from privet.client.personal.text_evaluator import TextEvaluator, alone
from privet.common.model.adapter import attach
from privet.common.model.base_model import final_states
from privet.common.settings.sections import AdapterSettings

from ...experiments.comparison.test_comparisons import records

STARTS = [[7, 9, 12, 30], [8], [40, 41]]


@pytest.fixture(scope="module")
def adapter(llama):
    return attach(llama, AdapterSettings(rank=2, last_blocks=2))


def test_texts_drawn_with_a_cache_are_those_without_one(adapter):
    """Rows of different length in one batch, against one forward pass a token."""
    base = adapter.base
    for start, said in zip(
        STARTS, completed(base, STARTS, None, Sampling(5, temperature=0)), strict=True
    ):
        ids = list(start)
        with torch.no_grad():
            for token in said:
                mask = torch.ones(1, len(ids), dtype=torch.int64)
                state = final_states(base, torch.tensor([ids]), mask)
                assert token == int(base.output.scores(state[0, -1]).argmax())
                ids.append(token)


def test_a_head_and_a_seed_change_what_is_drawn(adapter):
    text = TextEvaluator(adapter, adapter.start)
    head = text.scored(alone(text.asked(records(adapter, 0, 20))))[0].fitted()
    assert not head.is_shared
    starts = [list(one.ids[:4]) for one in records(adapter, 0, 4)]

    def drawn(head, seed):
        return completed(adapter.base, starts, head, Sampling(12, 0.8, seed))

    shared = drawn(None, 1)
    assert shared == drawn(None, 1)
    assert shared != drawn(None, 2)
    own = set(head.tokens.tolist())
    used = [sum(token in own for row in rows for token in row) for rows in (drawn(head, 1), shared)]
    assert used[0] > used[1]
