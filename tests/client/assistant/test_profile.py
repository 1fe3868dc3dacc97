"""client/assistant/profile.py: the summary, and the text that is put before a prompt."""

import ast
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privet.client.assistant import profile as profiles
from privet.client.assistant.profile import context, describe, profile_of, public_chances
from privet.client.assistant.retrieval import TextIndex
from privet.client.assistant.templates import builtins, unsigned
from privet.client.training.records import Record
from privet.common.errors import ConfigError

from ...tiny import fresh

PUBLIC = {word: 1 / (n + 3) for n, word in enumerate(["the", "and", *map(str, range(300))])}
PUBLIC = {word: chance / sum(PUBLIC.values()) for word, chance in PUBLIC.items()}


def said(*texts: str, label: float | str | None = None) -> list[Record]:
    return [Record(text, label) for text in texts]


def words(text: str) -> int:
    return len(text.split())


# --- the summary ---------------------------------------------------------------------------------


def test_favourites_are_used_more_than_people_do_and_in_more_than_one_record():
    mine = said(*["the zebra and the zebra"] * 4, "once once once once once once")
    found = profile_of(mine, PUBLIC)
    assert found.favourites == ("zebra",)  # neither "the", as everybody, nor "once", in one record


def test_a_word_that_everybody_uses_as_much_is_no_favourite_however_often_it_is_said():
    often = {**PUBLIC, "rain": 0.2}
    mine = said(*["rain one two three four"] * 10)
    assert "rain" not in profile_of(mine, often).favourites
    assert "rain" in profile_of(mine, PUBLIC).favourites


def test_the_summary_tells_length_and_habits():
    found = profile_of(said("who goes there? you?", "where? here", "no way!", "Ah well"), PUBLIC)
    assert (found.records, found.words, found.sentence) == (4, 2, 1.5)
    assert (found.asks, found.exclaims, found.lower) == (0.5, 0.25, 0.75)
    told = describe(found)
    assert "about 2 words" in told
    assert "asks questions and begins in lower case" in told
    assert "exclaims" not in told


def test_labels_are_summed_up_as_a_mean_or_the_most_frequent():
    assert profile_of([Record("a", 1.0), Record("b", 2.0)], PUBLIC).label == 1.5
    mixed = [Record("a", "good"), Record("b", "bad"), Record("c", "good")]
    assert "Mostly says: good." in describe(profile_of(mixed, PUBLIC))


@pytest.mark.parametrize("texts", [(), ("",), ("?!",), ("a",)])
def test_somebody_with_little_history_gets_a_summary_without_an_error(texts):
    found = profile_of(said(*texts), {})
    assert found.favourites == ()
    assert (describe(found) == "") is (not texts)


def test_a_profile_shows_no_words_in_its_repr():
    found = profile_of(said(*["the zebra and the zebra"] * 4, label="x"), PUBLIC)
    assert "zebra" not in repr(found)


def test_public_chances_follow_the_order_of_the_vocabulary_and_sum_to_one(llama_folder):
    found = public_chances(fresh(llama_folder).tokenizer)
    assert sum(found.values()) == pytest.approx(1)
    in_order = list(found.values())
    assert all(first > then for first, then in pairwise(in_order))


@pytest.mark.real
def test_a_frequent_word_is_likelier_than_a_rare_one_in_the_real_vocabularies():
    from transformers import AutoTokenizer

    from privet.common.model.assets import fetch

    for name in ("smollm2-135m-instruct", "minilm"):
        found = public_chances(AutoTokenizer.from_pretrained(fetch(name)))
        assert found["the"] > found["house"] > found.get("pomegranate", min(found.values()))


# --- the context ---------------------------------------------------------------------------------

HISTORY = [f"{word} " * n for n, word in enumerate(("rain", "sun", "snow", "wind", "fog"), 2)]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["memory", "portrait"]),
    st.lists(st.sampled_from(HISTORY), max_size=6),
    st.sampled_from(["rain and sun", "nothing", "snow"]),
    st.integers(0, 40),
)
def test_a_context_is_never_longer_than_its_budget(name, history, prompt, budget):
    mine = profile_of(said(*history), PUBLIC)
    found = context(builtins()[name], prompt, TextIndex.build(history), words, budget, profile=mine)
    assert found.tokens == words(found.text) <= budget + words(prompt)
    assert found.text.endswith(prompt)
    assert all(history[hit.index].strip() in found.text for hit in found.hits)
    assert found.with_profile == (describe(mine) != "" and describe(mine) in found.text)


def test_a_count_that_is_more_than_the_sum_of_its_parts_is_kept_too():
    def greedy(text: str) -> int:  # each line costs as much as all lines before it
        lines = text.count("\n\n") + 1
        return words(text) + lines * lines

    index = TextIndex.build(HISTORY)
    for budget in range(0, 60, 3):
        found = context(builtins()["memory"], "rain sun snow", index, greedy, budget)
        assert greedy(found.text) <= budget + greedy("rain sun snow")


def test_what_fits_best_stands_nearest_to_the_prompt():
    history = ["rain rain rain", "rain and then a lot of other things about nothing at all"]
    found = context(builtins()["memory"], "rain", TextIndex.build(history), words, 50)
    assert found.text == f"{history[1]}\n\n{history[0]}\n\nrain"


def test_a_template_that_does_not_fit_is_told_and_one_without_a_place_shows_nothing():
    long = unsigned(
        b'name="l"\nversion="1.0.0"\nabout="a"\ntext="' + b"word " * 20 + b'{prompt}"', "f"
    )
    index = TextIndex.build(HISTORY)
    with pytest.raises(ConfigError, match="20 tokens more than the budget of 0"):
        context(long, "rain", index, words, 0)
    mine = profile_of(said(*HISTORY), PUBLIC)
    found = context(long, "rain", index, words, 25, profile=mine)
    assert found.hits == ()
    assert not found.with_profile


def test_a_context_shows_no_text_in_its_repr():
    found = context(builtins()["memory"], "secret rain", TextIndex.build(HISTORY), words, 50)
    assert "rain" not in repr(found)


# --- there is no path ----------------------------------------------------------------------------


def test_the_profile_opens_no_file_and_no_connection():
    allowed = {"heapq", "json", "math", "re", "statistics", "collections", "dataclasses",
               "itertools", "typing", "common.errors", "training.records", "templates", "retrieval",
               "collections.abc"}  # fmt: skip
    tree = ast.parse(Path(profiles.__file__).read_text())
    found = {
        name
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert found <= allowed
    calls = {getattr(n.func, "id", "") for n in ast.walk(tree) if isinstance(n, ast.Call)}
    assert not calls & {"open", "print", "exec", "eval", "compile", "__import__"}
