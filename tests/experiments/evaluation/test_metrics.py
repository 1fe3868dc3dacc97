"""experiments/evaluation/metrics.py: known values, and metrics that tell better from worse."""

import math

import pytest

from privet.common.errors import ConfigError, DataError
from privet.experiments.evaluation import metrics
from privet.experiments.evaluation.metrics import (
    bits_per_byte,
    deciles,
    distinct_n,
    label_metrics,
    style_distance,
    text_overlap,
)


def test_bits_per_byte_of_a_uniform_byte_is_eight():
    assert bits_per_byte(100 * math.log(256), 100) == pytest.approx(8.0)


@pytest.mark.parametrize(("nats", "count"), [(1.0, 0), (math.nan, 3), (math.inf, 3)])
def test_bits_per_byte_refuses_what_has_none(nats, count):
    with pytest.raises(DataError, match="at least one byte"):
        bits_per_byte(nats, count)


def test_the_same_text_scores_full_marks_and_another_one_none():
    text = "the quick brown fox jumps over the lazy dog"
    same = text_overlap([text], [text])
    assert (same["rouge1"], same["rougeL"]) == (1.0, 1.0)
    assert same["bleu"] == pytest.approx(100.0)
    other = text_overlap(["nothing of this"], [text])
    assert (other["rouge1"], other["rougeL"], other["bleu"]) == (0.0, 0.0, 0.0)


def test_rouge_l_wants_the_order_and_rouge_1_does_not():
    found = text_overlap(["dog lazy the over jumps fox"], ["fox jumps over the lazy dog"])
    assert found["rouge1"] == 1.0
    assert found["rougeL"] < 0.5


def test_an_empty_text_is_scored_and_none_at_all_is_refused():
    assert text_overlap([""], ["a word"])["rougeL"] == 0.0
    with pytest.raises(DataError, match="as many"):
        text_overlap([], [])
    with pytest.raises(DataError, match="as many"):
        text_overlap(["a"], ["a", "b"])


def test_distinct_n_falls_when_texts_repeat_each_other():
    assert distinct_n(["a b c", "d e f"], 2) == 1.0
    assert distinct_n(["a b c", "a b c"], 2) == 0.5
    with pytest.raises(DataError, match="n of at least 1"):
        distinct_n(["a"], 0)


def test_style_is_nearer_to_the_own_texts_than_to_somebody_elses():
    mine = ["THOU art late, good sir!", "THOU hast slept, good sir!"]
    other = ["* New upstream release (Closes: #123)", "* Bump Standards-Version"]
    text = ["THOU wilt wake, good sir!"]
    assert style_distance(text, mine) < 0.7 < style_distance(text, other)
    assert style_distance(mine, mine) == pytest.approx(0.0, abs=1e-9)
    with pytest.raises(DataError, match="both sides"):
        style_distance([" "], mine)


def test_regression_and_classification_have_their_metrics():
    assert label_metrics([1.0, 3.0], [0.0, 0.0], "regression") == {
        "mae": 2.0,
        "rmse": pytest.approx(math.sqrt(5)),
    }
    found = label_metrics([0, 0, 1, 1], [0, 0, 0, 1], "classification")
    assert found["accuracy"] == 0.75
    assert found["f1"] == pytest.approx((0.8 + 2 / 3) / 2)
    with pytest.raises(DataError, match="not of 'ranking'"):
        label_metrics([1], [1], "ranking")


def test_macro_f1_sees_a_class_that_is_never_named_and_accuracy_does_not():
    found = label_metrics([0] * 10, [0] * 9 + [1], "classification")
    assert found["accuracy"] == 0.9
    assert found["f1"] < 0.5


def test_deciles_are_eleven_and_refuse_what_is_not_finite():
    assert deciles([float(n) for n in range(11)]) == [float(n) for n in range(11)]
    with pytest.raises(DataError, match="finite"):
        deciles([1.0, math.nan])


def test_a_missing_library_is_a_sentence():
    with pytest.raises(ConfigError, match=r"needs nowhere_to_be.*privet\[experiments\]"):
        metrics._library("nowhere_to_be.found")
