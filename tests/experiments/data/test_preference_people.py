"""preference_people.py and pair_evaluation.py: pairs without a leak, and a known oracle."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from privet.client.device import Device
from privet.client.personal.preference_head import length_bias
from privet.client.simulated import SimulatedContext
from privet.client.training.records import Record, parse_line, read_index, read_user, split
from privet.common.errors import ConfigError, DataError
from privet.common.settings.config import parse
from privet.experiments.data import population
from privet.experiments.data.preference_people import (
    DISHES,
    FIRMNESS,
    HELD_OUT,
    OWN,
    _others,
    _pairs,
    refuse_other_cut,
    reward,
    tastes,
)
from privet.experiments.data.ratings import Batch
from privet.experiments.evaluation import pair_evaluation
from privet.experiments.evaluation.pair_evaluation import _regret, gap_closed
from privet.experiments.reports import report
from privet.experiments.simulate import prepare, simulate

from ...tiny import WORDS, tiny_bert, tiny_config, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

# --- pairs of ratings ---------------------------------------------------------------------------


def batch(raters=3, rows=30, seed=0):
    rng = np.random.default_rng(seed)
    ratings = rng.integers(-4, 5, size=(raters, rows)).astype(float)
    return Batch("007", tuple(f"sentence {row}" for row in range(rows)), tuple(map(tuple, ratings)))


def test_a_rater_prefers_the_sentence_rated_higher():
    made = batch()
    rated = dict(zip(made.texts, made.ratings[1], strict=True))
    records = _pairs(made, 1, 7)
    assert len(records) == OWN + HELD_OUT
    assert all(rated[r.text] > rated[r.rejected or ""] for r in records)


def test_no_sentence_is_in_own_and_in_held_out_pairs():
    own, held_out = split(_pairs(batch(), 0, 7), 0.3333)
    assert (len(own), len(held_out)) == (OWN, HELD_OUT)
    texts = [{t for r in part for t in (r.text, r.rejected)} for part in (own, held_out)]
    assert not texts[0] & texts[1]


def test_the_crowd_is_everybody_else_of_the_batch():
    made = batch()
    said = _others(made, 1, made.texts[4])
    assert said == np.mean([made.ratings[0][4], made.ratings[2][4]])


def test_raters_of_a_batch_meet_the_same_sentences_in_the_same_order():
    both = [{t for r in _pairs(batch(), rater, 7)[:OWN] for t in (r.text, r.rejected)}
            for rater in (0, 1)]  # fmt: skip
    assert len(both[0] & both[1]) > 15


def test_a_rater_who_rates_all_alike_has_no_pairs():
    same = Batch("001", tuple(map(str, range(30))), ((1.0,) * 30,))
    assert _pairs(same, 0, 7) == ()


def test_another_cut_than_the_sources_own_is_refused():
    for source in ("preferences", "tastes"):
        data = {"source": source, "min_records": 75, "holdout": 0.3333}
        refuse_other_cut(parse({"data": data}))
        for wrong in ({"holdout": 0.3}, {"holdout": 0.4}, {"min_records": 60}):
            with pytest.raises(ConfigError, match=r"holdout = 0\.3333"):
                refuse_other_cut(parse({"data": data | wrong}))
    refuse_other_cut(parse({"data": {"source": "ratings", "holdout": 0.4}}))


@pytest.mark.real
def test_the_raters_own_pairs_are_read_from_the_catalogue():
    people = population.load("preferences", clients=50, test_clients=20, min_records=75, seed=7)
    assert people.task == "preference"
    trained = {people.groups[user] for user in people.train_users}
    assert not trained & {people.groups[user] for user in people.test_users}
    assert len(people.read(people.train_users[0])) == OWN + HELD_OUT


# --- made people --------------------------------------------------------------------------------


def test_made_people_are_the_same_for_the_same_seed_only():
    one, again, other = tastes(7), tastes(7), tastes(8)
    assert one.read("0003") == again.read("0003")
    assert one.read("0003") != other.read("0003")
    assert one.read("0003") != one.read("0004")


def test_made_people_choose_as_their_taste_says():
    """The oracle's error is that of Bradley and Terry's coin, and nobody can do better."""
    expected, wrong = 0.0, 0
    for user in (f"{n:04d}" for n in range(200)):
        for record in tastes(7).read(user)[OWN:]:
            lead = reward(7, user, record.text) - reward(7, user, record.rejected or "")
            expected += 1 / (1 + np.exp(FIRMNESS * abs(lead)))
            wrong += lead < 0
    assert wrong == pytest.approx(expected, abs=4 * expected**0.5)


def test_dishes_of_held_out_pairs_are_new_and_length_says_nothing():
    lengths, pairs = [], tastes(7)
    for user in (f"{n:04d}" for n in range(60)):
        records = pairs.read(user)
        for record in records[:OWN]:
            assert not any(f"Make {dish} " in record.text for dish in DISHES[1])
        lengths += [len(r.text) - len(r.rejected or "") for r in records]
    assert abs(length_bias(torch.ones(len(lengths)), torch.tensor(lengths)).model) < 0.1


# --- measures -----------------------------------------------------------------------------------


def test_the_gap_closed_is_the_share_of_the_way_to_the_oracle():
    found = gap_closed([0.5, 0.4], [0.2, 0.2], [0.1, 0.1], 200)
    assert found["mean"] == pytest.approx(0.25 / 0.35)
    low, high = found["ci95"] or (1.0, 0.0)
    assert low <= found["mean"] <= high
    assert gap_closed([0.5] * 3, [0.5] * 3, [0.1] * 3, 100) == {"mean": 0.0, "ci95": [0.0, 0.0]}


@pytest.mark.parametrize("source", ["tastes", "preferences"])
def test_the_gap_to_who_knows_best_is_reported(source, monkeypatch):
    """A personal model that says what they say closes all of it; the shared one is a coin."""
    users, read = ["0001", "0002"], tastes(7).read
    monkeypatch.setattr(pair_evaluation, "fetch", lambda name: name)
    monkeypatch.setattr(
        pair_evaluation, "crowd", lambda _: lambda user, text: reward(7, user, text)
    )
    bench: Any = SimpleNamespace(
        records=read,
        config=parse({"data": {"source": source, "min_records": 75, "holdout": 0.3333}}),
    )
    worth = pair_evaluation._worth(bench)
    best = pair_evaluation.best_losses(bench, users)
    said = [torch.tensor([one - other for one, other in worth(user)]) for user in users]
    coin = [0 * one for one in said]
    margins = {"shared model": coin, "another person's head": coin, "personal head": said}
    losses = {"global": [0.5, 0.5], "personal": best, pair_evaluation.BEST[source]: best}
    found = pair_evaluation._gap_rows(bench, "unseen", users, losses, margins)
    assert [row["mean"] for row in found] == ([1.0, 1.0, 0.0] if source == "tastes" else [1.0])


def test_regret_is_the_reward_missed():
    worth = [(3.0, 1.0), (0.0, 2.0), (1.0, 1.5)]
    assert _regret(worth, torch.tensor([1.0, -1.0, -1.0])) == 0.0
    assert _regret(worth, torch.tensor([-1.0, -1.0, 0.0])) == pytest.approx((2.0 + 0.25) / 3)


# --- the native format --------------------------------------------------------------------------


def test_a_pair_is_a_line_of_the_native_format():
    line = json.dumps({"user": "ann", "text": "yes", "rejected": "no", "prompt": "well?"}).encode()
    assert parse_line(line, "here").record == Record("yes", rejected="no", prompt="well?")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rejected": "yes"}, "another text"),
        ({"rejected": " "}, "another text"),
        ({"rejected": "no", "label": 1}, "not both"),
        ({"rejected": 3}, "must be a text"),
        ({"rejected": "no", "prompt": 3}, "must be a text"),
    ],
)
def test_half_a_pair_is_refused(fields, said):
    with pytest.raises(DataError, match=said):
        parse_line(json.dumps({"user": "ann", "text": "yes", **fields}).encode(), "here")


def test_other_formats_may_use_the_word_prompt():
    assert parse_line(b'{"user": "ann", "text": "yes", "prompt": {"a": 1}}', "here").record == (
        Record("yes")
    )


# --- a whole run --------------------------------------------------------------------------------


def people_who_love_words(folder, users=9, pairs=24):
    """Everybody loves two common words and one of their own; the chosen answer has more of them."""
    rng = np.random.default_rng(0)
    lines = []
    for user in range(users):
        loved = [WORDS[0], WORDS[1], WORDS[10 + user]]
        for time in range(pairs):
            both = [list(rng.choice(WORDS[40:], 5)) for _ in range(2)]
            both[0][int(rng.integers(5))] = str(rng.choice(loved))
            chosen, rejected = (" ".join(map(str, words)) for words in both)
            lines.append({"user": f"user {user}", "text": chosen, "rejected": rejected,
                          "prompt": WORDS[30], "time": time})  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("score", ["head", "likelihood"])
def test_a_run_on_pairs_trains_measures_and_reports(tmp_path, score):
    base = (tiny_bert if score == "head" else tiny_llama)(tmp_path / "base")
    config = tiny_config(
        base,
        people_who_love_words(tmp_path),
        data={"records_per_client": 16, "max_tokens": 24},
        preference={"score": score, "beta": 0.5},
        evaluation={"fit_records": 16},
    )
    summary: Any = simulate(config, tmp_path / "run")
    assert summary["metrics"]["name"] == "share of pairs in the wrong order"
    assert 0 <= summary["metrics"]["personal"]["mean"] <= 1
    assert {line["unit"] for line in summary["privacy"]} == {"client", "example"}
    names = {row["name"] for row in summary["comparisons"]}
    assert {"swapped_minus_personal_seen", "length_bias_personal_head_seen"} <= names
    assert report.report_facts(tmp_path / "run")["summary"]["comparisons"]


def test_pairs_of_a_run_are_laid_down_whole_and_read_back(tmp_path):
    config = tiny_config(
        tiny_bert(tmp_path / "base"), people_who_love_words(tmp_path),
        preference={"score": "head"},
    )  # fmt: skip
    prepare(config, tmp_path / "run", resume=False)
    index = read_index(tmp_path / "run")
    assert index.task == "preference"
    records = read_user(tmp_path / "run", "user 0", index)
    assert len(records) == 24
    assert records[0].prompt == WORDS[30]
    bench = SimulatedContext.open(tmp_path / "run")
    assert all(one.rejected for one in Device("user 0", bench).records())


def test_settings_of_preferences_are_part_of_a_runs_digest():
    changed = {"preference": {"beta": 0.7}}
    pairs = {"data": {"task": "preference"}}
    assert parse(pairs).digest != parse(pairs | changed).digest
    assert parse(pairs | {"preference": {"score": "head"}}).outputs == 1
    assert parse(pairs).outputs == 0


def test_a_head_has_no_likelihood_to_normalise():
    wrong = {"score": "head", "length_normalised": True}
    with pytest.raises(ConfigError, match="length_normalised"):
        parse({"data": {"task": "preference"}, "preference": wrong})
