"""contexts.py, comparisons.py, tables.py: the same tokens for all, nothing peeked at."""

import dataclasses
import random

import numpy as np
import pytest
import torch

from privet.client.assistant.retrieval import TextIndex
from privet.client.personal.scored_text import Row, asked, scored_texts
from privet.client.personal.text_evaluator import TextEvaluator, alone
from privet.client.training.records import Tokenised
from privet.common.model.adapter import attach
from privet.common.settings.sections import AdapterSettings
from privet.experiments.comparison import comparisons, tables
from privet.experiments.comparison.comparisons import (
    ComparisonEvaluator,
    OwnSide,
    choice,
    evaluate_text,
    surest,
)
from privet.experiments.evaluation import contexts
from privet.experiments.evaluation.contexts import History

from ...tiny import WORDS

SETTINGS = AdapterSettings(rank=2, last_blocks=2)


@pytest.fixture(scope="module")
def adapter(llama):
    return attach(llama, SETTINGS)


@pytest.fixture(scope="module")
def shared(adapter):
    drawn = np.random.default_rng(3).normal(size=adapter.layout.dimension)
    return (0.2 * drawn).astype(np.float32)


@pytest.fixture(scope="module")
def evaluator(adapter, shared):
    return ComparisonEvaluator(TextEvaluator(adapter, shared, opening=2), budget=24)


def records(adapter, seed, count, length=10):
    """Texts with one person's twelve words, start and end marks included."""
    rng = random.Random(seed)
    words = rng.sample(WORDS, 12)
    tokenizer = adapter.base.tokenizer
    texts = [" ".join(rng.choices(words, k=length)) for _ in range(count)]
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return [Tokenised((tokenizer.bos_token_id, *row, tokenizer.eos_token_id)) for row in rows]


def evaluated(*given):
    found = evaluate_text(*given)
    assert found is not None
    return found


# --- what is given, what is scored --------------------------------------------------------------


def test_every_model_is_scored_on_the_same_tokens_with_and_without_texts_in_front(
    adapter, evaluator
):
    own, later = records(adapter, 0, 6), records(adapter, 0, 3)
    side = OwnSide.of(evaluator, own)
    text = evaluator.text
    questions = text.asked(later)
    (plain,) = text.scored(alone(questions))
    (fronted,) = text.scored([Row(side.history.context("", 24), one) for one in questions])
    assert torch.equal(plain.states.targets[plain.scored], fronted.states.targets[fronted.scored])
    assert int(plain.scored.sum()) == 3 * 10 - 3  # start and one word given, the end has no bytes


def test_losses_are_the_models_own(adapter, shared):
    """Against the network's own log probabilities, context and all, two vectors in one call."""
    first, second = (one.ids for one in records(adapter, 1, 2))
    rows = [Row(first, asked(second, 4)), Row((), asked(first, 4))]
    vectors = ((shared, None), (adapter.start, None))
    for (vector, _), found in zip(vectors, scored_texts(adapter, rows, vectors), strict=True):
        adapter.write(vector)
        for row, said in zip(rows, found.sums(), strict=True):
            ids = torch.tensor([row.context + row.asked.ids])
            with torch.no_grad():
                log_p = adapter.base.network(ids).logits[0].log_softmax(-1)
            start = len(row.context) + row.asked.given
            wanted = [-float(log_p[t - 1, ids[0, t]]) for t in range(start, ids.shape[1] - 1)]
            assert said == pytest.approx(sum(wanted), rel=1e-4)


def test_an_opening_is_at_most_half_a_record():
    assert [asked(range(n), 8).given for n in (2, 3, 10, 40)] == [1, 1, 5, 8]


# --- retrieval does not peek --------------------------------------------------------------------


def changed_end(adapter, one):
    """The same opening, and every later word another one."""
    other = adapter.base.tokenizer("gatato", add_special_tokens=False)["input_ids"]
    ids = one.ids[: one.given] + tuple(other * (len(one.ids) - one.given))
    return dataclasses.replace(one, ids=ids)


def contexts_of(adapter, evaluator, query):
    own = OwnSide.of(evaluator, records(adapter, 5, 12))
    one = evaluator.text.asked(records(adapter, 5, 14))[-1]
    return [own.history.context(query(each), 24) for each in (one, changed_end(adapter, one))]


def test_what_stands_in_front_depends_on_the_opening_only(adapter, evaluator):
    tokenizer = adapter.base.tokenizer
    first, second = contexts_of(adapter, evaluator, lambda one: one.query(tokenizer))
    assert first == second


def test_a_query_that_peeks_is_caught_by_the_test_above(adapter, evaluator):
    tokenizer = adapter.base.tokenizer
    first, second = contexts_of(adapter, evaluator, lambda one: tokenizer.decode(one.ids))
    assert first != second


def test_measure_text_searches_with_openings_and_never_finds_held_out_texts(
    adapter, evaluator, monkeypatch
):
    own, other, later = (records(adapter, seed, 8) for seed in (6, 7, 8))
    asked_for, right = [], TextIndex.search

    def search(self, query, *rest):
        asked_for.append(query)
        return right(self, query, *rest)

    monkeypatch.setattr(TextIndex, "search", search)
    sides = OwnSide.of(evaluator, own), OwnSide.of(evaluator, other)
    asked_for.clear()
    evaluated(evaluator, *sides, later)
    tokenizer = adapter.base.tokenizer
    assert set(asked_for) == {one.query(tokenizer) for one in evaluator.text.asked(later)}
    ends = [one.scored_text(tokenizer) for one in evaluator.text.asked(later)]
    assert not any(end in query for end in ends for query in asked_for)
    assert set(sides[0].history.ids) == {one.ids for one in own}


def test_a_record_of_the_own_history_sees_earlier_ones_only(adapter):
    own = [one.ids for one in records(adapter, 9, 6)]
    history = History.of(own, adapter.base.tokenizer, None)
    texts = [adapter.base.tokenizer.decode(ids, skip_special_tokens=True) for ids in own]
    for place, text in enumerate(texts):
        found = history.context(text, 200, before=place)
        blocks = {found[i : i + 12] for i in range(0, len(found), 12)}
        assert blocks <= set(own[:place])
    assert history.context(texts[3], 200, before=0) == ()


def test_a_context_is_whole_records_within_its_budget(adapter):
    own = [one.ids for one in records(adapter, 10, 6)]
    history = History.of(own, adapter.base.tokenizer, None)
    found = history.context(adapter.base.tokenizer.decode(own[2]), 30)
    assert len(found) == 24
    assert own[2] in (found[:12], found[12:])
    assert history.context("bata", 11) == ()


# --- the choice is made on validation records ---------------------------------------------------


def test_the_surest_model_wins_and_nothing_sure_falls_back():
    shared = [10.0, 12.0, 11.0, 9.0]
    better = [8.0, 10.1, 9.0, 7.1]
    lucky = [1.0, 14.0, 13.0, 11.0]
    assert surest({"global": shared, "head": better, "hybrid": lucky}) == "head"
    assert surest({"global": shared, "head": lucky}) == "global"
    assert surest({"global": shared, "head": shared}) == "global"
    assert surest({"global": [3.0], "head": [1.0]}) == "global"  # one record is no evidence


def test_a_few_records_keep_the_own_texts_while_they_do_better_on_average():
    unsure = {"global": [10.0, 12.0], "retrieval": [10.5, 9.0], "head": [10.5, 11.4]}
    assert surest(unsure) == "global"
    assert choice(unsure) == "retrieval"
    assert choice({**unsure, "retrieval": [10.5, 12.0]}) == "global"
    assert choice({name: 2 * nats for name, nats in unsure.items()}) == "global"  # four records
    assert choice({**unsure, "hybrid": [8.0, 10.1]}) == "hybrid"  # which is sure


def test_the_choice_does_not_see_the_test_records(adapter, evaluator):
    """The same person with quite other test records: the same choice, the same validation."""
    own, other = (
        OwnSide.of(evaluator, records(adapter, 0, 12)),
        OwnSide.of(evaluator, records(adapter, 1, 12)),
    )
    found = [
        evaluated(evaluator, own, other, later)
        for later in (records(adapter, 0, 4), records(adapter, 1, 4))
    ]  # fmt: skip
    assert found[0]["chosen"] == found[1]["chosen"]
    assert found[0]["validation"] == found[1]["validation"]
    assert found[0]["nats"] != found[1]["nats"]


def test_a_choice_on_test_records_would_flatter_and_is_told_apart(adapter, evaluator):
    """Own words make the head sure; on a stranger's records it hurts, and it is still chosen."""
    own, other = (
        OwnSide.of(evaluator, records(adapter, 0, 16)),
        OwnSide.of(evaluator, records(adapter, 1, 16)),
    )
    found = evaluated(evaluator, own, other, records(adapter, 1, 6))
    losses = {name: sum(found["nats"][name]) for name in ("global", "retrieval", "head", "hybrid")}
    assert own.chosen != "global"
    assert losses[found["chosen"]] > losses["global"]  # hurt, and said so
    assert found["nats"]["personal"] == found["nats"][found["chosen"]]
    on_test = surest({name: found["nats"][name] for name in losses})  # the faulty version
    assert own.chosen != on_test
    assert losses[on_test] < losses[own.chosen]


def test_validation_records_take_no_part_in_the_heads_that_choose(adapter, evaluator):
    own = records(adapter, 0, 12)
    strange = records(adapter, 1, 12)
    cut = 12 - max(2, round(12 * evaluator.validation))
    one = OwnSide.of(evaluator, own).validation
    two = OwnSide.of(evaluator, [*own[:cut], own[cut], *strange[cut + 1 :]]).validation
    assert one["head"][0] == pytest.approx(two["head"][0], rel=1e-5)


def test_with_too_few_records_to_choose_texts_go_in_front_and_with_none_nothing(adapter, evaluator):
    few, none = OwnSide.of(evaluator, records(adapter, 0, 3)), OwnSide.of(evaluator, [])
    assert (few.chosen, none.chosen) == ("retrieval", "global")
    assert few.head.is_shared
    assert none.hybrid.is_shared
    found = evaluated(evaluator, none, few, records(adapter, 0, 3))
    assert found["nats"]["personal"] == found["nats"]["global"] == found["nats"]["retrieval"]


# --- models and controls ------------------------------------------------------------------------


def test_all_models_and_controls_are_there_and_own_words_help(adapter, evaluator):
    own, other = (
        OwnSide.of(evaluator, records(adapter, 0, 20)),
        OwnSide.of(evaluator, records(adapter, 1, 20)),
    )
    found = evaluated(evaluator, own, other, records(adapter, 0, 25)[20:])
    assert set(found["nats"]) == {
        "base", "prompt", "global", "retrieval", "head", "hybrid", "personal",
        *comparisons.CONTROLS,
    }  # fmt: skip
    total = {name: sum(values) for name, values in found["nats"].items()}
    assert total["head"] < total["global"] - 5
    assert total["head_swapped"] > total["head"] + 5
    assert {len(values) for values in found["nats"].values()} == {5}
    assert found["bytes"] == [len(t.encode()) for t in _ends(adapter, evaluator)]


def _ends(adapter, evaluator):
    return [
        one.scored_text(adapter.base.tokenizer)
        for one in evaluator.text.asked(records(adapter, 0, 25)[20:])
    ]


def test_without_a_trained_adapter_the_base_model_is_the_shared_one(adapter):
    evaluator = ComparisonEvaluator(
        TextEvaluator(adapter, adapter.start, opening=2), trained=False, budget=24
    )
    own = OwnSide.of(evaluator, records(adapter, 0, 8))
    found = evaluated(evaluator, own, own, records(adapter, 0, 3))
    assert set(found["nats"]) & {"global", "retrieval"} == set()
    assert found["chosen"] in {"base", "prompt", "head", "hybrid"}


def test_an_adapter_of_another_run_is_measured_and_of_several_own_records_choose(adapter, shared):
    worse = (shared + 1.0).astype(np.float32)
    evaluator = ComparisonEvaluator(
        TextEvaluator(adapter, shared, opening=2), others={"group": (worse, shared)}, budget=24
    )
    mine = records(adapter, 0, 8)
    own = OwnSide.of(evaluator, mine)
    rows = alone(evaluator.text.asked(mine))
    sums = [sum(one.sums()) for one in evaluator.text.scored(rows, worse, shared)]
    assert own.others == {"group": int(np.argmin(sums))}
    found = evaluated(evaluator, own, own, records(adapter, 0, 3))
    same = found["nats"]["group"] == pytest.approx(found["nats"]["global"], rel=1e-5)
    assert same == (own.others["group"] == 1)


# --- tables -------------------------------------------------------------------------------------


def line(user, shared, hybrid, **more):
    nats = {"base": [9.0] * 4, "global": shared, "hybrid": hybrid, "personal": hybrid}
    return {
        "user": user, "time": [0.0, 0.3, 0.6, 0.9], "own": 8, "all_own": 8, "tokens": [3] * 4,
        "bytes": [10] * 4, "nats": {**nats, **more}, "chosen": "hybrid", "validation": {},
    }  # fmt: skip


def test_the_summary_counts_who_is_hurt_and_who_is_better():
    rows = [line(str(n), [8.0] * 4, [7.0 if n else 9.0] * 4) for n in range(10)]
    found = tables.summarised(rows, 200)
    hybrid = next(one for one in found["models"] if one["model"] == "hybrid")
    assert (hybrid["hurt"], hybrid["win_rate"], hybrid["ties"]) == (0.1, 0.9, 0.0)
    assert hybrid["gain"]["mean"] == pytest.approx(0.8 * 4 / 40 / np.log(2))
    assert hybrid["deciles"][0] < 0 < hybrid["deciles"][2]
    assert found["chosen"] == {"hybrid": 10}
    assert [one["decile"] for one in found["over_time"]] == [1, 4, 7, 10]


def test_a_control_says_how_much_of_the_gain_it_keeps():
    rows = [line(str(n), [8.0] * 4, [6.0] * 4, hybrid_swapped=[7.5] * 4) for n in range(4)]
    found = {one["worse"]: one for one in tables.summarised(rows, 200)["comparisons"]}
    assert found["hybrid_swapped"]["gain_kept"] == pytest.approx(0.25)
    assert found["hybrid_swapped"]["ci95"][0] > 0


def test_the_module_that_makes_states_knows_the_marks_of_the_tokenizer(adapter):
    ids = records(adapter, 0, 1)[0].ids
    (found,) = scored_texts(adapter, [Row((), asked(ids, 1))], [(adapter.start, None)])
    assert found.scored.tolist() == [True] * 10 + [False]
    assert contexts._HITS >= 2


def test_over_time_one_short_record_does_not_outweigh_the_text():
    rows = [line(str(n), [8.0] * 4, [7.0] * 4) for n in range(10)]
    for row in rows[:5]:
        row["bytes"] = [1, 10, 10, 10]
        row["nats"]["personal"] = [2.0, 7.0, 7.0, 7.0]
    first = tables.summarised(rows, 200)["over_time"][0]
    assert first["mean"] == pytest.approx((5 * 6 + 5 * 1) / (5 * 1 + 5 * 10) / np.log(2))
    assert first["ci95"][0] < first["mean"] < first["ci95"][1]
