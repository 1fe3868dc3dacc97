"""LaMP's files, prompts, baselines and metrics, on a small set of privet's own in their format."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from privet.commands import run as command
from privet.common.errors import ConfigError, DataError, ModelError
from privet.experiments.lamp import answering
from privet.experiments.lamp.answering import Settings, answers, compare, files_of, scored
from privet.experiments.lamp.scores import score
from privet.experiments.lamp.tasks import (
    MOVIE_TAGS,
    TASKS,
    Question,
    instruction,
    prompt,
    query,
    read_outputs,
    read_questions,
    retrieve,
    task_of,
)

OWN = Path(__file__).parents[2] / "lamp"
NAMES = tuple(TASKS)


def questions_of(name: str) -> list[Question]:
    return read_questions(files_of(OWN, TASKS[name], "dev")[0], TASKS[name])


def words(text: str, limit: int) -> tuple[str, int]:
    """Cuts at words, as a tokenizer does at tokens."""
    found = text.split()
    return (text, len(found)) if len(found) <= limit else (" ".join(found[:limit]), limit)


# --- the files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_each_task_is_read_and_every_question_has_its_output(name):
    task = TASKS[name]
    asked, right = files_of(OWN, task, "dev")
    questions, golds = read_questions(asked, task), read_outputs(right, task)
    assert {one.id for one in questions} == golds.keys()
    assert all(one.profile and {*task.fields} <= one.profile[0].keys() for one in questions)
    assert all(one.dates for one in questions) == (name != "LaMP-7")
    if task.labels:
        assert {*golds.values()} <= {*task.labels}
    assert "umbrella" not in repr(questions)


def test_files_are_found_in_a_task_folder_in_a_copy_of_all_and_with_splits_apart(tmp_path):
    task, want = TASKS["LaMP-4"], "dev_questions.json"
    for place in ("plain", "all/LaMP_4", "site/LaMP_4/dev", "one/dev"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / want).write_text("[]")
        assert files_of(tmp_path / place.split("/")[0], task, "dev")[0].name == want
    new, old = tmp_path / "site/LaMP_2/new/dev", tmp_path / "site/LaMP_2/dev"
    for place in (new, old):
        place.mkdir(parents=True)
        (place / want).write_text("[]")
    assert files_of(tmp_path / "site", TASKS["LaMP-2"], "dev")[0] == new / want
    with pytest.raises(DataError, match=r"no dev_questions.json of LaMP-5.*LaMP_5/dev"):
        files_of(tmp_path, TASKS["LaMP-5"], "dev")


@pytest.mark.parametrize("name", ["LaMP-2", "lamp_2", "LaMP2", "2"])
def test_a_task_has_one_name_in_several_spellings(name):
    assert task_of(name).name == "LaMP-2"


@pytest.mark.parametrize("name", ["LaMP-8", "", "movies", "LaMP-22"])
def test_another_task_is_refused_and_the_seven_are_named(name):
    with pytest.raises(ConfigError, match=r"LaMP-3 \(product rating\)"):
        task_of(name)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "is not JSON"),
        ("{}", "expected a list of questions"),
        ("[]", "found an empty list"),
        ("[3]", "question 1: expected an object, found a int"),
        ('[{"id": "1", "input": "x"}]', 'expected "profile" to be a list, found nothing'),
        ('[{"id": "1", "profile": []}]', 'expected "input" to be a text, found none'),
        ('[{"id": "1", "input": "a \\ud800 b", "profile": []}]', "half a surrogate pair"),
        ('[{"id": "1", "input": "x", "profile": [1]}]', "profile item 1: expected an object"),
        ('[{"id": "1", "input": "x", "profile": [{"text": "a"}]}]', 'item 1: expected "score"'),
        ('[{"id": "1", "input": "x", "profile": []}, {"id": "1", "input": "y", "profile": []}]',
         "the id '1' occurs twice"),
    ],
)  # fmt: skip
def test_a_wrong_file_of_questions_is_met_with_a_sentence(tmp_path, content, sentence):
    path = tmp_path / "dev_questions.json"
    path.write_text(content)
    with pytest.raises(DataError, match=re.escape(sentence)):
        read_questions(path, TASKS["LaMP-3"])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("[]", 'expected {"task": "LaMP_3"'),
        ('{"task": "LaMP_2", "golds": []}', "is of task 'LaMP_2', and 'LaMP_3' was asked for"),
        ('{"task": "LaMP_3", "golds": ["5"]}', "output 1: expected an object"),
        ('{"task": "LaMP_3", "golds": [{"id": "1"}]}', 'output 1: expected "output"'),
    ],
)
def test_a_wrong_file_of_outputs_is_met_with_a_sentence(tmp_path, content, sentence):
    path = tmp_path / "dev_outputs.json"
    path.write_text(content)
    with pytest.raises(DataError, match=re.escape(sentence)):
        read_outputs(path, TASKS["LaMP-3"])


# --- retrieval ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "starts"),
    [
        ("LaMP-1", "Mites that live on honey bees Concrete that heals"),
        ("LaMP-2", "A stationmaster of 1925"),
        ("LaMP-3", "A good pan"),
        ("LaMP-4", "The town's only cobbler"),
        ("LaMP-5", "We ask whether crows"),
        ("LaMP-6", "Hi all, the lift"),
        ("LaMP-7", "I forgot my umbrella"),
    ],
)
def test_a_profile_is_searched_with_the_question_and_not_with_its_instruction(name, starts):
    assert query(TASKS[name], questions_of(name)[0].text).startswith(starts)


def test_a_question_in_other_words_is_searched_with_as_a_whole():
    assert query(TASKS["LaMP-2"], "Which tag? A goat.") == "Which tag? A goat."
    assert query(TASKS["LaMP-1"], 'Only "one" title') == 'Only "one" title'


def test_bm25_finds_the_item_that_shares_words_recency_the_latest_random_is_repeatable():
    task, question = TASKS["LaMP-2"], questions_of("LaMP-2")[3]
    found = {
        how: retrieve(task, question, how, 2, 0, None)
        for how in ("none", "random", "recency", "bm25")
    }
    assert found["none"] == []
    assert found["bm25"][0]["tag"] == "romance"
    assert [item["tag"] for item in found["recency"]] == ["romance", "sci-fi"]
    assert found["random"] == retrieve(task, question, "random", 2, 0, None)
    assert len(found["random"]) == 2
    assert found["random"][0] != found["random"][1]
    draws = {str(retrieve(task, question, "random", 1, seed, None)) for seed in range(20)}
    assert len(draws) > 1


def test_recency_goes_by_date_where_there_are_dates_and_by_place_where_there_are_none():
    items = tuple({"text": text} for text in "abc")
    dated = Question("1", "x: y", items, ("2012-01-09", "2013-1-1", "2012-01-10"))
    order = [item["text"] for item in retrieve(TASKS["LaMP-7"], dated, "recency", 3, 0, None)]
    assert order == ["b", "c", "a"]
    plain = Question("1", "x: y", items)
    order = [item["text"] for item in retrieve(TASKS["LaMP-7"], plain, "recency", 2, 0, None)]
    assert order == ["c", "b"]


def test_the_label_of_an_item_is_not_searched():
    items = ({"tag": "comedy", "description": "x"}, {"tag": "x", "description": "comedy film"})
    question = Question("1", "description: a comedy", items)
    (found,) = retrieve(TASKS["LaMP-2"], question, "bm25", 1, 0, None)
    assert found["description"] == "comedy film"


def test_dense_retrieval_goes_by_the_encoders_vectors():
    def encoder(texts):
        return np.array([[1, 0] if "oven" in one or "hedge" in one else [0, 1] for one in texts],
                        np.float32)  # fmt: skip

    question = questions_of("LaMP-2")[3]
    (found,) = retrieve(TASKS["LaMP-2"], question, "dense", 1, 0, encoder)
    assert found["tag"] == "romance"
    with pytest.raises(ConfigError, match="encoder"):
        retrieve(TASKS["LaMP-2"], question, "dense", 1, 0, None)


# --- prompts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_holds_the_items_and_ends_with_the_question(name):
    task, question = TASKS[name], questions_of(name)[0]
    made = prompt(task, question, question.profile, 10_000, words)
    assert made.endswith(question.text)
    for item in question.profile:
        assert item[task.answer or task.text] in made
    assert prompt(task, question, [], 10_000, words) == question.text


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [12, 30, 60])
def test_a_prompt_keeps_to_its_tokens(name, tokens):
    task, question = TASKS[name], questions_of(name)[0]
    made = prompt(task, question, question.profile, tokens, words)
    assert len(made.split()) <= tokens


# --- metrics -----------------------------------------------------------------------------------


def test_accuracy_and_macro_f1_are_the_published_ones():
    found = score(TASKS["LaMP-1"], [" [1]", "[1]", "The first.", "[2]"], ["[1]", "[2]"] * 2).metrics
    assert found["accuracy"] == 0.5
    # [1]: 1 right, 1 too much, 1 missed: 1/2.  [2]: 1 right, 0 too much, 1 missed: 2/3
    assert found["f1"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    # all tags count, also those that do not occur
    tags = score(TASKS["LaMP-2"], ["comedy"], ["comedy"]).metrics
    assert tags["f1"] == pytest.approx(1 / len(MOVIE_TAGS))


def test_an_answer_that_is_no_score_counts_as_the_end_that_is_further_away():
    found = score(TASKS["LaMP-3"], ["4", "good", "nan", "3.5"], ["5", "2", "4", "3"]).metrics
    assert found["mae"] == pytest.approx((1 + 3 + 3 + 0.5) / 4)
    assert found["rmse"] == pytest.approx(math.sqrt((1 + 9 + 9 + 0.25) / 4))


def test_rouge_is_the_f_measure_without_stemming():
    found = score(TASKS["LaMP-4"], ["the cat sat", "dogs"], ["the cat slept", "dog"]).metrics
    assert found["rouge-1"] == pytest.approx(1 / 3)
    assert score(TASKS["LaMP-4"], ["b a"], ["a b"]).metrics["rouge-L"] == pytest.approx(0.5)


def test_outputs_of_another_task_are_not_scored():
    with pytest.raises(DataError, match="'comedy'"):
        score(TASKS["LaMP-3"], ["3"], ["comedy"])
    with pytest.raises(DataError, match="an answer to each"):
        score(TASKS["LaMP-4"], [], [])


# --- from end to end ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LaMP-2", "LaMP-3", "LaMP-4"])
def test_a_tiny_model_answers_and_every_way_is_scored_on_the_same_questions(llama_folder, name):
    settings = Settings(("none", "bm25"), k=2, tokens=60, new_tokens=4, base=str(llama_folder))
    facts = compare(OWN, TASKS[name], "dev", 3, settings)
    assert facts["questions"] == 3
    assert facts["answered_by"] == ("choose" if TASKS[name].labels else "generate")
    assert list(facts["ways"]) == ["none", "bm25"]
    for one in facts["ways"].values():
        assert len(one["predictions"]["golds"]) == 3
        assert {*TASKS[name].measured} <= one.keys()
        if TASKS[name].labels:
            assert {gold["output"] for gold in one["predictions"]["golds"]} <= {*TASKS[name].labels}
    assert facts["ways"]["none"]["against_first"] is None
    json.dumps(facts, allow_nan=False)


def test_a_labels_likelihood_with_one_reading_is_that_of_readings_one_by_one(llama):
    import torch

    ids = llama.tokenizer("ba bin go")["input_ids"]
    labels = ("ba", "go lu dan", "kosta", "mer mer", "la gito")
    means = []
    for label in labels:
        row = llama.tokenizer(label, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = llama.network(torch.tensor([[*ids, *row]])).logits[0].log_softmax(-1)
        picked = logits[len(ids) - 1 : -1].gather(1, torch.tensor(row)[:, None])
        means.append(float(picked.mean()))
    assert answering._likely(llama, ids, labels) == pytest.approx(means, abs=1e-4)


def test_a_label_the_model_always_prefers_is_chosen_only_where_the_question_speaks_for_it():
    labels, always = ("1", "2", "3"), [-0.1, -2.0, -3.0]
    assert answering._chosen(labels, [-0.1, -1.5, -2.9], always) == "2"
    assert answering._chosen(labels, [-0.05, -2.0, -3.1], always) == "1"


@pytest.mark.parametrize("name", ["LaMP-1", "LaMP-2", "LaMP-3"])
def test_all_questions_of_a_task_share_one_instruction(name):
    asked = {instruction(TASKS[name], question.text) for question in questions_of(name)}
    (shared,) = asked
    assert "N/A" in shared
    assert len(shared) > 60


def test_an_encoder_and_too_long_a_prompt_are_refused(llama, bert):
    questions = questions_of("LaMP-4")
    with pytest.raises(ModelError, match="encoder"):
        answers(bert, TASKS["LaMP-4"], questions, "none", Settings())
    with pytest.raises(ModelError, match="128 tokens"):
        answers(llama, TASKS["LaMP-4"], questions, "none", Settings(tokens=512))


def test_the_command_prints_a_table_keeps_answers_and_scores_them_again(
    llama_folder, tmp_path, capsys
):
    own = ["lamp", str(OWN), "--task", "LaMP-3"]
    model = ["--model", str(llama_folder), "--tokens", "60", "--new-tokens", "3"]
    out = tmp_path / "answers"
    assert command([*own, *model, "--retrieval", "none,recency", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "product rating" in said
    assert "recency" in said
    kept = out / "LaMP_3_dev_recency.json"
    assert command([*own, "--predictions", str(kept), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["questions"] == 4
    assert again == scored(OWN, TASKS["LaMP-3"], "dev", kept)
    assert f"{again['mae']:.3f}" in said


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--task", "9"], "--task '9'"),
        (["--task", "3", "--split", "test"], "no test_questions.json"),
        (["--task", "3", "--retrieval", "magic"], "--retrieval magic"),
        (["--task", "3", "--answer", "guess"], "--answer 'guess'"),
        (["--task", "3", "--predictions", str(OWN / "LaMP_2/dev_outputs.json")], "of task"),
    ],
)
def test_a_wrong_call_is_met_with_a_sentence(capsys, options, sentence):
    assert command(["lamp", str(OWN), *options]) == 2
    assert sentence in capsys.readouterr().err


def test_outputs_without_a_question_and_questions_without_an_output_are_told(tmp_path):
    task = TASKS["LaMP-3"]
    asked, right = files_of(OWN, task, "dev")
    (tmp_path / "dev_questions.json").write_bytes(asked.read_bytes())
    golds = json.loads(right.read_text())
    (tmp_path / "dev_outputs.json").write_text(json.dumps({**golds, "golds": golds["golds"][1:]}))
    with pytest.raises(DataError, match="no output for 1 of 4 questions"):
        compare(tmp_path, task, "dev", None, Settings())
    with pytest.raises(DataError, match="1 differ"):
        scored(tmp_path, task, "dev", right)
