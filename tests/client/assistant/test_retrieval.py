"""Retrieval over one's own history: what is found, what is picked, what is kept."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from privet.client.assistant.retrieval import Hit, Ranking, TextIndex, pick, words_of
from privet.client.assistant.sentence_encoder import (
    embed,
    embed_new,
    kept_bytes,
    read_kept,
    sentence_encoder,
)
from privet.common.errors import ConfigError, DataError, ModelError, StateError

from ...tiny import fresh

TEXTS = (
    "the cat sat on the mat",
    "a dog chased the cat",
    "rain in the hills all day",
    "the cat sat on the mat again",
    "the dog slept in the rain",
)
WORDS_ONLY = Ranking(meaning=0, recency=0)


def first_letters(texts: Sequence[str]) -> NDArray[np.float32]:
    """A made-up encoder: counts of letters."""
    rows = np.zeros((len(texts), 26), np.float32)
    for row, text in zip(rows, texts, strict=True):
        for letter in text.lower():
            if letter.isascii() and letter.isalpha():
                row[ord(letter) - 97] += 1
        row /= max(1e-9, float(np.linalg.norm(row)))
    return rows


def places(hits: Sequence[Hit]) -> list[int]:
    return [hit.index for hit in hits]


def test_words_that_are_rare_in_the_history_count_more_than_common_ones():
    index = TextIndex.build(TEXTS)
    assert places(index.search("the hills", 1, WORDS_ONLY)) == [2]
    assert set(places(index.search("cat", 9, WORDS_ONLY))) == {0, 1, 3}


def test_meaning_finds_what_shares_no_word_and_both_are_told_apart():
    index = TextIndex.build(("tacos", "xyz www", "coats"), first_letters)
    found = index.search("scoat", 3, Ranking(recency=0, pool=2))
    assert set(places(found)) == {0, 2}
    assert all(hit.words is None and hit.meaning is not None for hit in found)
    (alone,) = TextIndex.build(("red", "blue")).search("red", 1)
    assert (alone.words, alone.meaning) == (1, None)


def test_between_equals_the_later_text_is_first_and_recency_can_be_left_out():
    same = TextIndex.build(["old rain", "sun", "new rain"])
    assert places(same.search("rain", 2)) == [2, 0]
    long_ago_better = TextIndex.build(["rain rain", *["sun"] * 5, "rain and a lot of other words"])
    assert places(long_ago_better.search("rain", 1, WORDS_ONLY)) == [0]
    assert places(long_ago_better.search("rain", 1, Ranking(recency=5))) == [6]


def test_a_prompt_that_matches_nothing_gets_the_latest_texts_or_none_without_recency():
    index = TextIndex.build(TEXTS)
    assert places(index.search("zebra", 2)) == [4, 3]
    assert index.search("zebra", 2, WORDS_ONLY) == []
    assert index.search("", 2, WORDS_ONLY) == []


def test_nothing_at_or_after_before_is_found():
    index = TextIndex.build(TEXTS, first_letters)
    for before in range(len(TEXTS) + 2):
        found = places(index.search("the cat sat on the mat again", 9, before=before))
        assert all(place < before for place in found)
        assert len(found) == min(before, len(TEXTS))


@pytest.mark.parametrize("texts", [(), ("",), ("?!", "..."), ("one",)])
@pytest.mark.parametrize("encoder", [None, first_letters])
def test_histories_with_little_in_them_are_searched_without_an_error(texts, encoder):
    index = TextIndex.build(texts, encoder)
    found = index.search("one", 3)
    assert len(found) <= len(texts)
    assert len(pick(index, found, [1] * len(found), 10)) == len(set(texts))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.text("ab c", max_size=8), max_size=12),
    st.text("ab c", max_size=8),
    st.integers(1, 14),
)
def test_a_search_gives_distinct_places_at_most_k_with_falling_scores(texts, query, k):
    index = TextIndex.build(texts, first_letters)
    found = index.search(query, k)
    assert len(found) <= min(k, len(texts))
    assert len(set(places(found))) == len(found)
    assert all(first.score >= then.score for first, then in pairwise(found))


def test_building_an_index_says_nothing(capfd):
    TextIndex.build(TEXTS)
    assert capfd.readouterr() == ("", "")


# --- what is picked ------------------------------------------------------------------------------


def test_what_is_picked_fits_the_budget_and_leaves_room_to_shorter_hits():
    index = TextIndex.build(TEXTS)
    hits = index.search("the cat and the dog in the rain", 5)
    lengths = [len(words_of(TEXTS[hit.index])) for hit in hits]
    for budget in range(30):
        picked = pick(index, hits, lengths, budget)
        used = sum(len(words_of(TEXTS[hit.index])) for hit in picked)
        assert used <= budget
        left_out = [n for hit, n in zip(hits, lengths, strict=True) if hit not in picked]
        assert not left_out or min(left_out) > budget - used


def test_a_text_is_picked_once_and_diversity_prefers_another_thing_to_the_same_again():
    texts = ("red red wine", "red red wine", "red wine red", "red cheese and bread")
    index = TextIndex.build(texts)
    hits = index.search("red wine", 4, WORDS_ONLY)
    lengths = [3] * len(hits)
    assert len(pick(index, hits, lengths, 100)) == 3
    plain = pick(index, hits, lengths, 6, diversity=0)
    diverse = pick(index, hits, lengths, 6, diversity=0.8)
    assert {texts[hit.index] for hit in plain} == {"red red wine", "red wine red"}
    assert texts[diverse[1].index] == "red cheese and bread"


def test_no_hits_no_room_and_no_text_twice_are_no_errors():
    index = TextIndex.build(TEXTS)
    assert pick(index, [], [], 10) == []
    hits = index.search("cat", 2)
    assert pick(index, hits, [5, 5], 4) == []


def test_wrong_settings_and_wrong_lengths_are_told_in_a_sentence():
    index = TextIndex.build(TEXTS)
    hits = index.search("cat", 2)
    with pytest.raises(ConfigError, match="diversity must lie"):
        pick(index, hits, [1, 1], 5, diversity=1.5)
    with pytest.raises(DataError, match="length of at least 1"):
        pick(index, hits, [1], 5)
    with pytest.raises(DataError, match="length of at least 1"):
        pick(index, hits, [1, 0], 5)
    with pytest.raises(ConfigError, match="k must be"):
        index.search("cat", 0)
    for wrong in ({"words": -1.0}, {"recency": float("nan")}, {"pool": 0}):
        with pytest.raises(ConfigError, match="weights of retrieval"):
            Ranking(**wrong)
    with pytest.raises(DataError, match="one finite vector"):
        TextIndex.build(TEXTS, first_letters, first_letters(TEXTS[:2]))
    with pytest.raises(DataError, match="one finite vector"):
        TextIndex.build(("a",), first_letters, np.array([[np.nan]], np.float32))


def test_an_index_and_its_hits_show_no_text():
    index = TextIndex.build(TEXTS, first_letters)
    shown = f"{index!r} {index.search('cat', 2)!r}"
    assert not any(word in shown for word in ("cat", "dog", "rain", "hills"))


# --- sentence vectors ----------------------------------------------------------------------------


def test_a_text_has_one_vector_whatever_stands_beside_it_and_its_length_is_one(bert_folder):
    base = fresh(bert_folder)
    texts = ["ba da ga", "ka", "", "la ma ba da ga ka la ma"]
    together = embed(base, texts)
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    for text, row in zip(texts, together, strict=True):
        assert np.allclose(embed(base, [text])[0], row, atol=1e-4)
    assert embed(base, []).shape == (0, 32)


def test_a_decoder_is_no_sentence_encoder(llama_folder):
    with pytest.raises(ModelError, match="take an encoder"):
        sentence_encoder(str(llama_folder))


def test_kept_vectors_are_not_made_again_and_hold_no_text():
    kept = kept_bytes(TEXTS, first_letters(TEXTS))
    assert not any(word.encode() in kept for text in TEXTS for word in ("hills", "chased"))
    asked: list[str] = []

    def counting(texts: Sequence[str]) -> NDArray[np.float32]:
        asked.extend(texts)
        return first_letters(texts)

    found = embed_new([*TEXTS, "new", "new"], counting, read_kept(kept, 26))
    assert asked == ["new"]
    assert np.allclose(found[:5], first_letters(TEXTS), atol=1e-3)
    assert np.array_equal(found[5], found[6])
    assert embed_new([], counting, {}).shape == (0, 0)


def test_vectors_of_another_encoder_are_made_again_and_damaged_ones_are_told():
    kept = kept_bytes(TEXTS, first_letters(TEXTS))
    assert read_kept(kept, 384) == {}
    assert read_kept(None, 26) == {}
    with pytest.raises(StateError, match="retrieval/"):
        read_kept(kept[:-7], 26)


@pytest.mark.real
def test_minilm_finds_a_line_by_its_meaning():
    lines = (
        "To be, or not to be, that is the question",
        "A horse, a horse, my kingdom for a horse!",
        "If music be the food of love, play on",
        "Out, damned spot! out, I say!",
    )
    index = TextIndex.build(lines, sentence_encoder())
    for query, place in (
        ("trading a realm to get a steed", 1),
        ("songs nourish romance", 2),
        ("should one live or die?", 0),
    ):
        assert index.search(query, 1, Ranking(words=0, recency=0))[0].index == place
