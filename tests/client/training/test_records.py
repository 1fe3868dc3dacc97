"""records.py: one person's records, read alone, cut by time, drawn by public constants."""

import json
from collections import Counter
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, chisquare

from privet.client.training.records import (
    CHARACTERS,
    INDEX_FILE,
    RECORDS_FILE,
    Record,
    Tokenised,
    capped,
    check_fields,
    lessons,
    parse_line,
    poisson_indices,
    rate_from,
    read_index,
    read_user,
    split,
    spread,
    tokenize,
)
from privet.common.errors import ConfigError, DataError
from privet.common.settings.sections import TrainingSettings


@pytest.fixture
def folder(tmp_path):
    """A population folder of two people, written by hand."""
    blocks: dict[str, list[dict[str, object]]] = {
        "ann": [{"user": "ann", "text": "one", "label": 1}, {"user": "ann", "text": "two"}],
        "bob": [{"user": "bob", "text": "drei — \u2028 vier", "time": "2024-05-01", "group": "g"}],
    }
    content = b""
    users: dict[str, list[object]] = {}
    for user, lines in blocks.items():
        block = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
        users[user] = [len(content), len(block), lines[0].get("group")]
        content += block
    (tmp_path / RECORDS_FILE).write_bytes(content)
    index: dict[str, object] = {
        "schema": 1,
        "name": "two",
        "task": "generation",
        "classes": None,
        "users": users,
    }
    index |= {"train_users": ["ann"], "test_users": ["bob"], "sha256": "", "bytes": len(content)}
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    return tmp_path


# --- reading ------------------------------------------------------------------------------------


def test_each_user_gets_their_own_records_and_nothing_else(folder):
    assert read_user(folder, "ann") == (Record("one", 1.0), Record("two"))
    assert read_user(folder, "bob", read_index(folder)) == (
        Record("drei — \u2028 vier", None, "2024-05-01"),
    )
    assert read_index(folder).blocks["bob"].group == "g"


def test_a_user_who_is_not_there_is_named(folder):
    with pytest.raises(DataError, match="no user 'eve'"):
        read_user(folder, "eve")


def test_a_file_cut_at_its_end_is_found_even_where_the_block_is_whole(folder):
    path = folder / RECORDS_FILE
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match="cut or changed"):
        read_user(folder, "ann")


def test_a_block_of_somebody_else_is_refused(folder):
    path = folder / RECORDS_FILE
    path.write_bytes(
        path.read_bytes().replace(b'"user": "ann", "text": "two"', b'"user": "eve", "text": "two"')
    )
    with pytest.raises(DataError, match="line 2 of the block of 'ann' belongs to 'eve'"):
        read_user(folder, "ann")


@pytest.mark.parametrize("content", ["", "[]", '{"schema": 2}', '{"schema": 1}', "\udcff"])
def test_an_index_that_is_none_is_refused(folder, content):
    (folder / INDEX_FILE).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match="not an index"):
        read_index(folder)


def test_a_missing_index_is_named(tmp_path):
    with pytest.raises(DataError, match=r"population\.json"):
        read_user(tmp_path, "ann")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "does not parse"),
        (b"[1]", "found a list"),
        (b'{"text": "x"}', 'expected "user"'),
        (b'{"user": "", "text": "x"}', "empty"),
        (b'{"user": 7, "text": "x"}', '"user" must be a text, found a int'),
        (b'{"user": "a"}', 'expected "text"'),
        (b'{"user": "a", "text": ["x"]}', '"text" must be a text, found a list'),
        (b'{"user": "a", "text": "\xff"}', "byte 0xff at position 24"),
        (b'{"user": "a", "text": "\\ud800"}', "surrogate"),
        (b'{"user": "a", "text": "x", "label": NaN}', "NaN is not a finite number"),
        (b'{"user": "a", "text": "x", "label": 1e999}', "must be finite"),
        (b'{"user": "a", "text": "x", "label": 1' + b"0" * 400 + b"}", "must be finite"),
        (b'{"user": "a", "text": "x", "label": 1' + b"0" * 5000 + b"}", "does not parse"),
        (b'{"user": "a", "text": "x", "label": true}', "number or a text, found a bool"),
        (b'{"user": "a", "text": "x", "time": -Infinity}', "-Infinity"),
        (b"[" * 100_000, "does not parse"),
    ],
)
def test_a_line_that_is_no_record_is_refused_with_its_place_and_reason(line, reason):
    with pytest.raises(DataError, match=f"f.jsonl, line 3.*{reason}"):
        parse_line(line, "f.jsonl, line 3")


def test_null_is_absent_and_other_fields_are_ignored():
    fields = {"user": "a", "text": "x", "label": None, "time": None, "group": None, "mood": [1]}
    line = check_fields(fields, "here")
    assert (line.user, line.group, line.record) == ("a", None, Record("x"))


def test_texts_and_labels_do_not_show_in_repr():
    record = Record("my secret diary", "ill")
    assert "secret" not in repr(record)
    assert "ill" not in repr(record)


# --- cutting ------------------------------------------------------------------------------------


@given(st.integers(0, 200), st.floats(0, 1, exclude_max=True))
def test_the_last_records_are_held_out_and_none_is_lost_or_doubled(count, holdout):
    records = tuple(Record(str(n)) for n in range(count))
    own, held_out = split(records, holdout)
    assert own + held_out == records
    if count >= 2 and holdout > 0:
        assert own
        assert held_out
        assert abs(len(held_out) - count * holdout) <= 1
    else:
        assert held_out == ()


@pytest.mark.parametrize("holdout", [-0.1, 1.0, float("nan")])
def test_a_holdout_outside_its_range_is_refused(holdout):
    with pytest.raises(ConfigError, match="holdout"):
        split((), holdout)


def test_capped_keeps_the_first_records():
    records = tuple(Record(str(n)) for n in range(5))
    assert capped(records, 3) == records[:3]
    assert capped(records, 9) == records
    with pytest.raises(ConfigError, match="records_per_client"):
        capped(records, 0)


# --- drawing ------------------------------------------------------------------------------------

COUNT, RATE, DRAWS = 20, 0.1, 2_000


def p_value(sizes: list[int]) -> float:
    """Chi-square of the sizes against Binomial(COUNT, RATE), the tail in one cell."""
    seen = Counter(min(size, 6) for size in sizes)
    expected = [binom.pmf(size, COUNT, RATE) for size in range(6)] + [binom.sf(5, COUNT, RATE)]
    observed = [seen[size] for size in range(7)]
    return float(chisquare(observed, [len(sizes) * chance for chance in expected]).pvalue)


def shuffled_batches(rng: np.random.Generator) -> list[int]:
    """The trap: batches of a fixed size from a shuffled epoch."""
    return [len(batch) for batch in np.array_split(rng.permutation(COUNT), round(1 / RATE))]


@pytest.mark.parametrize(
    "rng", [np.random.default_rng(7), torch.Generator().manual_seed(7)], ids=["numpy", "torch"]
)
def test_batch_sizes_are_binomial_and_an_empty_batch_occurs(rng):
    draws = [poisson_indices(COUNT, RATE, rng) for _ in range(DRAWS)]
    sizes = [len(draw) for draw in draws]
    assert p_value(sizes) > 0.001
    assert 0 in sizes
    each = np.bincount(np.concatenate([np.array(d, dtype=int) for d in draws]), minlength=COUNT)
    assert chisquare(each).pvalue > 0.001
    assert all(draw == sorted(set(draw)) for draw in draws)


def test_shuffled_batches_of_a_fixed_size_are_caught_by_the_same_test():
    rng = np.random.default_rng(7)
    sizes = [size for _ in range(DRAWS // 10) for size in shuffled_batches(rng)]
    assert p_value(sizes) < 1e-9
    assert 0 not in sizes


def test_one_record_more_leaves_the_rate_as_it_is_and_the_faulty_rate_is_caught():
    def from_length_of_loader(records: int, batch_size: int) -> float:
        return 1 / -(-records // batch_size)

    def ours(records: int, batch_size: int) -> float:
        own = capped([Record("x")] * records, 128)
        assert len(own) == records
        return rate_from(batch_size, 128)

    assert ours(64, 64) == ours(65, 64) == 0.5
    assert (from_length_of_loader(64, 64), from_length_of_loader(65, 64)) == (1.0, 0.5)


def test_one_record_more_leaves_the_draws_of_the_others_as_they_were():
    for seed in range(50):
        fewer = poisson_indices(30, 0.3, np.random.default_rng(seed))
        more = poisson_indices(31, 0.3, np.random.default_rng(seed))
        assert [index for index in more if index < 30] == fewer


def test_edges_of_drawing():
    rng = np.random.default_rng(0)
    assert poisson_indices(0, 0.5, rng) == []
    assert poisson_indices(4, 1.0, rng) == [0, 1, 2, 3]
    for rate in (0.0, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="rate"):
            poisson_indices(4, rate, rng)
    for batch_size in (0, 129):
        with pytest.raises(ConfigError, match="batch_size"):
            rate_from(batch_size, 128)


# --- tokens -------------------------------------------------------------------------------------


class Letters:
    """A tokenizer of one id a letter; 0 begins, 1 ends."""

    def __init__(self, bos: int | None = 0, eos: int | None = 1) -> None:
        self.bos_token_id, self.eos_token_id = bos, eos

    def __call__(self, texts, *, add_special_tokens=True, truncation=False, max_length=0, **_):
        rows = [[ord(letter) for letter in text] for text in texts]
        if add_special_tokens:
            rows = [[0, *row[: max_length - 2 if truncation else None], 1] for row in rows]
        return {"input_ids": rows}


def test_generation_tokens_begin_end_and_are_cut():
    rows = tokenize([Record("ab", 3.0), Record("abcdef")], Letters(), 4, "generation")
    assert [row.ids for row in rows] == [(0, 97, 98, 1), (0, 97, 98, 99)]
    assert rows[0].label == 3.0


def test_generation_skips_records_that_have_no_loss():
    records = [Record("a"), Record("bc")]
    rows = tokenize(records, Letters(bos=None, eos=None), 8, "generation")
    assert [row.ids for row in rows] == [(98, 99)]
    assert tokenize([], Letters(), 8, "generation") == []


def test_encoders_keep_their_special_tokens_when_cut():
    (row,) = tokenize([Record("abcdef", "x")], Letters(), 4, "classification")
    assert (row.ids, row.label) == ((0, 97, 98, 1), "x")


def test_max_tokens_below_two_is_refused():
    with pytest.raises(ConfigError, match="max_tokens"):
        tokenize([Record("a")], Letters(), 1, "generation")


def learning(**changes: Any) -> TrainingSettings:
    return TrainingSettings.model_validate(changes)


def test_what_is_learnt_of_a_text_may_leave_out_its_end_and_its_opening():
    rows = tokenize(
        [Record("abcdef"), Record("a"), Record("abcdefghi")], Letters(), 8, "generation"
    )
    assert lessons(rows, 1, learning()) == rows
    texts = lessons(rows, 1, learning(ends=False, opening=3))
    assert [row.ids for row in texts] == [row.ids for row in rows]
    assert [row.learnt for row in texts] == [(3, 4, 5, 6), (1,), (3, 4, 5, 6, 7)]


def test_a_text_of_which_nothing_is_left_to_learn_is_left_out():
    rows = tokenize([Record("a"), Record("bc")], Letters(bos=None), 8, "generation")
    assert [row.ids for row in rows] == [(97, 1), (98, 99, 1)]
    (left,) = lessons(rows, 1, learning(ends=False))
    assert (left.ids, left.learnt) == (rows[1].ids, (1,))
    assert [row.learnt for row in lessons(rows, None, learning(ends=False))] == [(1,), (1, 2)]


def test_packed_records_stand_whole_in_rows_and_their_own_tokens_are_learnt():
    texts = [Record("abc"), Record("de"), Record("fghij"), Record("k")]
    rows = tokenize(texts, Letters(), 8, "generation")
    packed = lessons(rows, 1, learning(ends=False, opening=2, packed=10))
    assert [row.ids for row in packed] == [rows[0].ids + rows[1].ids, rows[2].ids + rows[3].ids]
    assert [row.learnt for row in packed] == [(2, 3, 7), (2, 3, 4, 5, 8)]


@given(
    st.lists(st.lists(st.integers(2, 9), min_size=1, max_size=9), max_size=9),
    st.booleans(),
    st.integers(0, 12),
    st.sampled_from([0, 10, 25]),
)
def test_whatever_is_learnt_is_a_text_of_the_person_and_never_its_first_token(
    texts, ends, opening, packed
):
    rows = [Tokenised((0, *text, 1)) for text in texts]
    found = lessons(rows, 1, learning(ends=ends, opening=opening, packed=packed))
    assert [i for row in found for i in row.ids] == [i for row in rows for i in row.ids]
    for row in found:
        places = range(1, len(row.ids)) if row.learnt is None else row.learnt
        assert places
        assert all(row.ids[place] not in ((0,) if ends else (0, 1)) for place in places)


@pytest.mark.real
def test_real_tokenizers_give_their_special_tokens():
    from transformers import AutoTokenizer

    from privet.common.model.assets import fetch

    decoder = AutoTokenizer.from_pretrained(fetch("smollm2-135m-instruct"))
    encoder = AutoTokenizer.from_pretrained(fetch("minilm"))
    records = [Record("To be, or not to be"), Record("word " * 9_000)]
    rows = tokenize(records, decoder, 64, "generation")
    assert rows[0].ids[0] == decoder.bos_token_id
    assert rows[0].ids[-1] == decoder.eos_token_id
    assert decoder.decode(rows[0].ids[1:-1]) == "To be, or not to be"
    assert len(rows[1].ids) == 64
    rows = tokenize(records, encoder, 64, "regression")
    assert [encoder.decode(row.ids[0]) for row in rows] == ["[CLS]"] * 2
    assert [encoder.decode(row.ids[-1]) for row in rows] == ["[SEP]"] * 2
    assert len(rows[1].ids) == 64


@given(count=st.integers(1, 40), place=st.integers(0, 40), cap=st.integers(1, 20))
def test_trap_a_record_put_in_moves_another_one_out_of_training(count, place, cap):
    def trained_on(records):
        return {record.text for record in capped(split(records, 0.25)[0], cap)}

    records = [Record(text=f"record {number}") for number in range(count)]
    place = min(place, count - 1)
    before = trained_on(records)
    left_out = records[:place] + records[place + 1 :]
    faulty = before ^ trained_on(left_out)  # add_remove: up to two records, where one is counted
    assert len(faulty) <= 2
    nothing = [*records[:place], Record(text="nothing"), *records[place + 1 :]]
    assert (before ^ trained_on(nothing)) - {"nothing"} <= {f"record {place}"}  # zero_out: one


def test_trap_a_record_put_in_front_of_a_full_cap_changes_two_records():
    records = [Record(text=f"record {number}") for number in range(8)]
    with_one_more = [Record(text="new"), *records]
    first = {record.text for record in capped(records, 4)}
    second = {record.text for record in capped(with_one_more, 4)}
    assert first ^ second == {"new", "record 3"}


def test_held_out_records_are_spread_over_their_time():
    assert spread(100, 4) == [0, 25, 50, 75]
    assert spread(3, 8) == [0, 1, 2]
    assert spread(0, 8) == []


def test_a_long_text_is_cut_before_it_is_tokenised(llama):
    """Tokenising takes 150 times a text's size, and ends the process of a small device."""
    seen, tokenizer = list[int](), llama.tokenizer

    class Watched:
        bos_token_id = eos_token_id = None

        def __call__(self, texts, **how):
            seen.extend(len(text) for text in texts)
            return tokenizer(texts, **how)

    long = Record("ban " * 100_000)
    for task in ("generation", "regression"):
        rows = tokenize([long], cast(Any, Watched()), 8, task)
        assert len(rows[0].ids) == 8
    assert max(seen) == 8 * CHARACTERS
