"""harm.py, answers.py, memory.py, cold_start.py: who is served worse, and what is said."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from privet.client.personal.scored_text import Asked
from privet.client.personal.text_evaluator import TextEvaluator, alone
from privet.client.training.records import Tokenised
from privet.common.model.adapter import attach
from privet.common.settings.sections import AdapterSettings
from privet.experiments.comparison import comparison_page, harm, tables
from privet.experiments.comparison.comparisons import ComparisonEvaluator, OwnSide
from privet.experiments.comparison.scenario import Scenario
from privet.experiments.evaluation import answers, cold_start, memorisation
from privet.experiments.evaluation.memorisation import exposure, rare_runs

from .test_comparisons import line, records

SCENARIO = Scenario(run="x", bootstrap=200)


@pytest.fixture(scope="module")
def adapter(llama):
    return attach(llama, AdapterSettings(rank=2, last_blocks=2))


@pytest.fixture(scope="module")
def evaluator(adapter):
    return ComparisonEvaluator(TextEvaluator(adapter, adapter.start, opening=2), budget=24)


def found(rows, scenario=SCENARIO, **more):
    summary = {**tables.summarised(rows, scenario.bootstrap), **more}
    return harm.findings(rows, summary, scenario)


def people(count, gain):
    """`gain(n)` nats a record for person n; the first half has 4 own records, the rest 40."""
    made = []
    for n in range(count):
        one = line(f"secret name {n}", [8.0] * 4, [8.0 - gain(n)] * 4)
        made.append({**one, "all_own": 4 if n < count // 2 else 40})
    return made


# --- findings -----------------------------------------------------------------------------------


def test_who_is_hurt_beyond_the_threshold_is_a_finding_with_its_share_and_no_name():
    rows = people(20, lambda n: -1.0 if n < 3 else 1.0)
    listed = found(rows)["findings"]
    assert [(one["kind"], one["touched"]) for one in listed] == [("hurt", 0.15)]
    assert "secret" not in str(found(rows))


def test_within_the_threshold_nothing_is_found():
    assert found(people(20, lambda n: -1.0 if n < 1 else 1.0))["findings"] == []


def test_a_gap_that_personalisation_widens_is_found_and_an_old_one_is_not():
    widened = found(people(20, lambda n: 0.0 if n < 10 else 4.0))
    kinds = [one["kind"] for one in widened["findings"]]
    assert kinds == ["segment"]
    assert widened["findings"][0]["touched"] == 0.5
    assert "at most 4" in widened["findings"][0]["text"]
    rows = people(20, lambda _: 1.0)
    for row in rows[:10]:  # worse served before, and no worse after
        row["nats"] = {name: [value + 3 for value in row["nats"][name]] for name in row["nats"]}
    assert found(rows)["findings"] == []


def test_declared_groups_are_segments_too():
    rows = [
        {**row, "group": "ab"[n % 2]} for n, row in enumerate(people(20, lambda n: float(n % 2)))
    ]
    parts = [one for one in found(rows)["segments"] if one["kind"] == "group"]
    assert [(one["segment"], one["people"]) for one in parts] == [("a", 10), ("b", 10)]
    assert parts[0]["gain"]["mean"] == 0 < parts[1]["gain"]["mean"]


def test_people_who_write_of_the_same_have_the_same_topic():
    about = [
        "sea ship sail wave harbour",
        "wheat field plough corn barn",
        "law court judge crime jury",
    ]
    texts = [f"{about[n % 3]} {about[n % 3]} word{n}" for n in range(12)]
    found = harm.topics(texts, 3)
    assert len(set(found)) == 3
    assert all(found[n] == found[n % 3] for n in range(12))
    assert harm.topics(texts[:5], 3) == ["none"] * 5


def test_a_segment_of_few_people_is_not_shown():
    rows = people(20, lambda _: 1.0)
    for n, row in enumerate(rows):
        row["group"] = "rare" if n < 4 else "many"
    assert {one["segment"] for one in found(rows)["segments"]} & {"rare"} == set()


def test_a_control_that_keeps_the_gain_is_a_finding():
    rows = people(10, lambda _: 2.0)
    for row in rows:
        row["nats"]["hybrid_swapped"] = [6.4] * 4
    assert [one["kind"] for one in found(rows)["findings"]] == ["control"]
    for row in rows:
        row["nats"]["hybrid_swapped"] = [7.9] * 4
    assert found(rows)["findings"] == []


def answer_line(hybrid, swapped, again=0.3):
    return {
        "user": "u", "distinct2_shared": 0.9, "distinct2_hybrid": hybrid, "style_shared": 0.8,
        "style_hybrid": 0.5, "rougeL_shared": 0.1, "rougeL_hybrid": 0.2,
        "swapped_from_hybrid": swapped, "again_from_hybrid": again,
    }  # fmt: skip


def test_narrowed_answers_and_a_profile_that_changes_them_are_found():
    rows = people(10, lambda _: 1.0)
    lines = [answer_line(0.5 if n < 5 else 0.88, 0.9) for n in range(10)]
    listed = found(rows, answers=answers.summarised(lines, 200))["findings"]
    assert {one["kind"]: one["touched"] for one in listed} == {"narrowing": 0.5, "persona": 1.0}
    calm = [answer_line(0.9, 0.3) for _ in range(10)]
    assert found(rows, answers=answers.summarised(calm, 200))["findings"] == []


def test_memory_above_the_base_model_is_found_and_a_leak_is_called_one():
    rows = people(10, lambda _: 1.0)
    line = {"user": "u", "strings": 2, "base": 1.0, "shared": 3.5, "head": 1.2}
    lines: list[Any] = [line] * len(rows)
    listed = found(rows, memory=memorisation.summarised(lines, 200))["findings"]
    assert [one["kind"] for one in listed] == ["memory"]
    assert "LEAK" in listed[0]["text"]
    assert found(rows, memory=memorisation.summarised([], 200))["findings"] == []


# --- memory -------------------------------------------------------------------------------------


def test_exposure_is_the_log_of_the_rank():
    assert exposure([0.0] + [1.0] * 15) == 4.0
    assert exposure([2.0] + [1.0] * 15) == 0.0
    assert exposure([1.0] * 3) == pytest.approx(np.log2(3) - 1)


def test_rare_runs_are_those_nobody_else_used():
    common = tuple(range(10, 26))
    own = [common, (*common[:9], 90, 91, 92, 93, *common[13:])]
    others = Counter(dict.fromkeys(common, 3))
    ((prefix, run),) = rare_runs(own, others, 2)
    assert (prefix, run) == (common[5:9], (90, 91, 92, 93))
    assert rare_runs([common], others, 2) == []


def test_a_planted_string_is_exposed_by_texts_in_front_and_head_and_not_by_the_base(
    adapter, evaluator
):
    """The canary: said often by the person, so whoever holds the personal model can ask for it."""
    own = records(adapter, 0, 12)
    word = adapter.base.tokenizer("gato gato gato kito kito kito kito", add_special_tokens=False)
    prefix, run = tuple(word["input_ids"][-8:-4]) or (), tuple(word["input_ids"][-4:])
    canary = Tokenised((4, *own[0].ids[1:3], *prefix, *run, 5))
    side = OwnSide.of(evaluator, [*own, *[canary] * 6])
    rest = records(adapter, 1, 15)
    runs = [run, *(one.ids[2:6] for one in rest)]
    questions = [Asked(prefix + each, len(prefix)) for each in runs]
    (plain,) = evaluator.text.scored(alone(questions))
    assert exposure(plain.sums(side.head)) == 4.0 > exposure(plain.sums())


# --- cold start ---------------------------------------------------------------------------------


def test_the_curve_says_gain_and_harm_at_each_number_of_records():
    lines = [
        {"user": str(n), "group": str(n), "counts": [0, 4], "global": 2.0,
         "personal": [2.0, 2.2 if n < 2 else 1.5], "chosen": ["base", "head"]}
        for n in range(10)
    ]  # fmt: skip
    none, four = cold_start.curve(lines, 200)["rows"]
    assert (none["records"], none["people"], none["hurt"], none["step"]) == (0, 10, 0.0, None)
    assert (four["hurt"], four["chosen"]) == (0.2, {"head": 10})
    assert four["personal_minus_global"]["mean"] == pytest.approx(-0.36)
    (_, gain) = comparison_page._gains({"cold_start": {"rows": [none, four]}})
    assert gain["mean"] == pytest.approx(0.36)
    assert gain["ci95"][0] < 0.36 < gain["ci95"][1]
    worse = cold_start.curve([{**one, "personal": [2.0, 2.5]} for one in lines], 200)
    assert (worse["monotone"], worse["beats_from"]) == (False, None)
