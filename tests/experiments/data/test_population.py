"""population.py and its sources: who takes part, and bad input told by file and line."""

import hashlib
import json
import statistics
import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privet.client.training.records import INDEX_FILE, RECORDS_FILE, Record, read_index, read_user
from privet.common.errors import ConfigError, DataError, StateError
from privet.experiments.data.population import choose, load, open_source, write
from privet.experiments.data.ratings import read_batches
from privet.experiments.data.record_sources import DataSource, SourceUser
from privet.experiments.data.shakespeare import read_plays, speeches

ALL: dict[str, Any] = {"clients": None, "test_clients": 0, "min_records": 1, "seed": 0}
Fields = dict[str, object]


def jsonl(path: Path, *lines: Fields | bytes) -> Path:
    """Write dicts (or raw bytes) as lines; returns the path."""
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join(raw) + b"\n")
    return path


def line(user: object = "ann", text: object = "hello", **more: object) -> Fields:
    return {"user": user, "text": text, **more}


def crowd(count: int, width: int = 0, rising: bool = False) -> DataSource:
    """`count` people in groups of `width`; 9 records each, or as many as their number."""
    people = tuple(
        SourceUser(f"u{n:04d}", f"g{n // width}" if width else None, n if rising else 9)
        for n in range(count)
    )
    return DataSource("crowd", people, "generation", None, lambda user: (Record(user),))


# --- drawing ------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.integers(1, 80), st.integers(1, 12), st.data())
def test_train_and_test_are_disjoint_in_users_and_in_groups(count, width, data):
    test = data.draw(st.integers(0, count))
    clients = data.draw(st.integers(1, count))
    source = crowd(count, width)
    try:
        drawn = choose(source, clients=clients, test_clients=test, min_records=1, seed=3)
    except DataError:
        # a draw with the one small group in it is too small, and the next is a group larger
        assert clients + test > count - 2 * width
        return
    assert (len(drawn.train_users), len(drawn.test_users)) == (clients, test)
    assert len(set(drawn.users)) == clients + test
    groups = [{drawn.groups[u] for u in users} for users in (drawn.train_users, drawn.test_users)]
    assert not groups[0] & groups[1]


def test_the_seed_decides_who_takes_part():
    first, again, other = (
        choose(crowd(200), clients=50, test_clients=20, min_records=1, seed=seed)
        for seed in (1, 1, 2)
    )
    assert (first.train_users, first.test_users) == (again.train_users, again.test_users)
    assert first.test_users != other.test_users


def test_a_group_named_like_a_user_is_not_that_user():
    people = (SourceUser("x", None, 5), SourceUser("y", "x", 5), SourceUser("z", None, 5))
    source = DataSource("s", people, "generation", None, crowd(1).read)
    for seed in range(20):
        drawn = choose(source, clients=2, test_clients=1, min_records=1, seed=seed)
        assert len(drawn.users) == 3


def test_people_with_too_few_records_are_left_out_and_none_for_clients_means_all_the_rest():
    source = crowd(30, rising=True)
    drawn = choose(source, clients=None, test_clients=5, min_records=10, seed=0)
    assert len(drawn.users) == 20
    assert min(drawn.users) == "u0010"


def test_more_clients_than_people_names_the_numbers():
    with pytest.raises(DataError) as caught:
        choose(crowd(30), clients=28, test_clients=5, min_records=2, seed=0)
    for part in ("30 of 30 users", "at least 2", "25 left", "28 were asked"):
        assert part in str(caught.value)


@pytest.mark.parametrize("wrong", [{"clients": 0}, {"test_clients": -1}, {"min_records": 0}])
def test_numbers_out_of_range_are_refused(wrong):
    numbers = {"clients": 1, "test_clients": 1, "min_records": 1, "seed": 0} | wrong
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        choose(crowd(9), **numbers)


# --- files --------------------------------------------------------------------------------------


def test_a_jsonl_file_is_read_by_user_and_in_time_order(tmp_path):
    path = jsonl(
        tmp_path / "notes.jsonl",
        b"\xef\xbb\xbf" + json.dumps(line(text="later", time=2, group="g")).encode(),
        line("bob", "b", group="h"),
        b"",
        line(text="earlier", time=1.5, group="g"),
    )
    drawn = load(path, **ALL)
    assert drawn.users == ("ann", "bob")
    assert drawn.groups == {"ann": "g", "bob": "h"}
    assert [record.text for record in drawn.read("ann")] == ["earlier", "later"]
    assert (drawn.name, drawn.task, drawn.classes) == ("notes", "generation", None)


@pytest.mark.parametrize(
    ("labels", "task", "classes"),
    [((1, 2.5), "regression", None), (("no", "yes"), "classification", ("no", "yes"))],
)
def test_labels_decide_the_task(tmp_path, labels, task, classes):
    path = jsonl(tmp_path / "f.jsonl", *(line(label=label) for label in labels))
    drawn = load(path, **ALL)
    assert (drawn.task, drawn.classes) == (task, classes)


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([line(), b"{oops"], "line 2: expected one JSON object"),
        ([line(), {"text": "x"}], 'line 2: expected "user"'),
        ([{"user": "ann"}], 'line 1: expected "text"'),
        ([line(text=3)], 'line 1: "text" must be a text'),
        ([line(), b"\n", b'{"user": "a\xe9"}'], "line 4: expected UTF-8, found byte 0xe9"),
        ([line(label=1), line(label=float("nan"))], "line 2: .*NaN"),
        ([line(label=1), line("bob", label="one")], "line 2: the label is a text, but a number in"),
        ([line(label=1), line("bob")], "line 2: the label is absent, but a number in .*line 1"),
        ([line(time=1), line(time="2020")], "line 2: user 'ann' has another kind of time"),
        ([line(time=1), line()], "line 2: user 'ann' has another kind of time"),
        ([line(group="a"), line(group="b")], "line 2: user 'ann' has another group"),
        ([line(text=" "), line("bob", "")], "2 users, 2 empty records"),
        ([b""], "no records"),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(tmp_path, lines, reason):
    path = jsonl(tmp_path / "f.jsonl", *lines)
    with pytest.raises(DataError, match=f"f.*{reason}"):
        load(path, **ALL)


@pytest.mark.parametrize("name", ["f.jsonl", "ann.txt"])
def test_ten_megabytes_on_one_line_are_refused_at_once_without_reading_them(tmp_path, name):
    folder = tmp_path / "people"
    folder.mkdir()
    (folder / name).write_bytes(b'{"user": "ann", "text": "' + b"x" * 10_000_000)
    tracemalloc.start()
    with pytest.raises(DataError, match=r"line 1.* longer than 1,000,000 bytes"):
        load(folder / name if name.endswith("jsonl") else folder, **ALL)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


def test_a_paragraph_of_many_short_lines_has_the_same_limit(tmp_path):
    (tmp_path / "ann.txt").write_bytes(b"word\n" * 300_000)
    with pytest.raises(DataError, match="line 1: this paragraph is longer"):
        load(tmp_path, **ALL)


def test_empty_texts_are_dropped_and_counted(tmp_path):
    path = jsonl(tmp_path / "f.jsonl", line(), line(text="  \n"), line("bob", ""))
    with pytest.warns(UserWarning, match="f: ") as warned:
        drawn = load(path, **ALL)
    assert [str(w.message) for w in warned] == [
        "f: 2 empty records were dropped.",
        "f: 1 users have no records.",
    ]
    assert drawn.users == ("ann",)
    assert len(drawn.read("ann")) == 1


@pytest.mark.parametrize("name", ["nothing", "nothing.jsonl", "nothing/below"])
def test_data_that_is_not_there_is_named(tmp_path, name):
    with pytest.raises(DataError, match="nothing"):
        load(tmp_path / name, **ALL)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "ann.jsonl").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=r"ann\.jsonl cannot be read \(No such file"):
        load(tmp_path / "ann.jsonl", **ALL)
    with pytest.raises(DataError, match=r"ann\.jsonl cannot be read \(No such file"):
        load(tmp_path, **ALL)


# --- folders ------------------------------------------------------------------------------------


def test_a_folder_has_a_file_or_a_sub_folder_per_user(tmp_path):
    (tmp_path / "ann.txt").write_text("first\nstill first\r\n\n \n\nsecond — end", newline="")
    (tmp_path / "bob" / "deep").mkdir(parents=True)
    (tmp_path / "bob" / "a.md").write_text("# from a file\n")
    jsonl(tmp_path / "bob" / "deep" / "b.jsonl", {"text": "no user"}, line("bob", "own name"))
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "picture.png").write_bytes(b"\x89")
    drawn = load(tmp_path, **ALL)
    assert drawn.users == ("ann", "bob")
    assert [r.text for r in drawn.read("ann")] == ["first\nstill first", "second — end"]
    assert [r.text for r in drawn.read("bob")] == ["# from a file", "no user", "own name"]


def test_two_entries_for_one_user_are_refused_with_both_names(tmp_path):
    (tmp_path / "ann.txt").write_text("x")
    jsonl(tmp_path / "ann.jsonl", line())
    with pytest.raises(DataError, match=r"ann\.jsonl and .*ann\.txt are two entries .*'ann'"):
        load(tmp_path, **ALL)


def test_a_file_of_one_user_with_a_record_of_another_is_refused(tmp_path):
    jsonl(tmp_path / "ann.jsonl", line(), line("eve"))
    with pytest.raises(DataError, match=r"line 2: expected a record of 'ann'.*'eve'"):
        load(tmp_path, **ALL)


def test_a_folder_with_nobody_says_what_was_expected(tmp_path):
    (tmp_path / "readme.pdf").write_bytes(b"")
    with pytest.raises(DataError, match="no users: expected a sub-folder per user"):
        load(tmp_path, **ALL)


def test_a_user_with_no_one_or_only_empty_records_does_not_stop_the_others(tmp_path):
    (tmp_path / "none.txt").write_text("\n\n")
    (tmp_path / "dir").mkdir()
    (tmp_path / "one.txt").write_text("just one")
    (tmp_path / "two.txt").write_text("one\n\ntwo")
    with pytest.warns(UserWarning, match="2 users have no records"):
        assert load(tmp_path, **ALL).users == ("one", "two")
    with pytest.warns(UserWarning, match="2 users"):
        assert load(tmp_path, **(ALL | {"min_records": 2})).users == ("two",)


def test_invalid_utf8_in_a_text_file_names_the_line_and_the_byte(tmp_path):
    (tmp_path / "ann.txt").write_bytes(b"fine\n\nnot \xff fine")
    with pytest.raises(DataError, match=r"ann\.txt, line 3: .* byte 0xff at position 5"):
        load(tmp_path, **ALL)


# --- writing ------------------------------------------------------------------------------------


def test_what_is_written_is_read_back_by_the_device(tmp_path):
    rows = [
        line(user, f"{user} {n} \u2028 é", label=n / 4, time=-n, group=user[0])
        for n in range(4)
        for user in ("cay", "ann", "abe")
    ]
    drawn = load(jsonl(tmp_path / "f.jsonl", *rows), **(ALL | {"test_clients": 1}))
    write(drawn, tmp_path / "out")
    index = read_index(tmp_path / "out")
    content = (tmp_path / "out" / RECORDS_FILE).read_bytes()
    assert (index.size, index.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert (index.train_users, index.test_users) == (drawn.train_users, drawn.test_users)
    assert list(index.blocks) == list(drawn.users)
    for user in drawn.users:
        assert read_user(tmp_path / "out", user) == drawn.read(user)
        assert [record.time for record in drawn.read(user)] == [-3, -2, -1, 0]
        assert index.blocks[user].group == user[0]
    again = load(tmp_path / "out" / RECORDS_FILE, **ALL)
    assert [again.read(u) for u in again.users] == [drawn.read(u) for u in again.users]


def test_a_write_that_fails_leaves_no_index_and_no_temporary_file(tmp_path):
    source = jsonl(tmp_path / "f.jsonl", line(), line("bob"))
    drawn = load(source, **ALL)
    write(drawn, tmp_path / "out")
    jsonl(source, line("eve"), line("bob"))
    with pytest.raises(DataError, match="changed while it was read"):
        write(drawn, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [RECORDS_FILE]


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path):
    drawn = load(jsonl(tmp_path / "f.jsonl", line()), **ALL)
    with pytest.raises(StateError, match="Cannot write"):
        write(drawn, tmp_path / "f.jsonl" / "out")


# --- the built-in sources -----------------------------------------------------------------------

PLAY = r"""# The Play

## ACT I

### SCENE I. A room.

_Enter ANN and
BOB_

**ANN**
Who's there,
[Aside] and why?

_Exit BOB_

Gone.\--

**BOB**
_\[Within]_
Nobody.  __\[Sings]_ *Exit Ann.* La la,
[*[Drawing his.]* one \[ ] two

_Burthen _\[within_

## ACT II

_A sennet_

**ANN**
_Exeunt_
"""


def test_a_play_is_cut_into_speeches_without_directions(tmp_path):
    assert list(speeches(PLAY)) == [
        ("ANN", "Who's there,\nand why?\nGone.--"),
        ("BOB", "Nobody. La la,\none two"),
        ("ANN", ""),
    ]
    (tmp_path / "plays").mkdir()
    (tmp_path / "plays" / "play.md").write_text(PLAY)
    roles = read_plays(tmp_path)
    assert {user: len(records) for user, records in roles.items()} == {"play/ANN": 1, "play/BOB": 1}
    assert roles["play/BOB"][0].time == 1
    with pytest.raises(DataError, match="Expected plays"):
        read_plays(tmp_path / "plays")


def ratings_folder(
    folder: Path,
    texts: str = "1\t1.0\tGood\r\n2\t-1\tBad\r\n",
    ratings: str = "1\t1\t0\t[1, 2]\n2\t-1\t0\t[-1, 0]",
) -> Path:
    (folder / "movieReviewSnippets_GroundTruth.txt").write_text(texts, newline="")
    (folder / "movieReviewSnippets_anonDataRatings.txt").write_text(ratings, newline="")
    return folder


def test_a_column_of_a_batch_is_one_rater(tmp_path):
    (batch,) = read_batches(ratings_folder(tmp_path))
    assert (batch.texts, batch.ratings) == (("Good", "Bad"), ((1.0, -1.0), (2.0, 0.0)))


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ({"texts": "1\tGood\n"}, "GroundTruth.txt, line 1: expected 3 cells, found 2"),
        ({"ratings": "9\t1\t0\t[1]"}, "anonDataRatings.txt, line 1: expected an id"),
        ({"ratings": "1\t1\t0\tthree"}, "line 1: expected an id .* list of numbers"),
        ({"ratings": "1\t1\t0\t[1]\n2\t1\t0\t[1, 2]"}, "same number of raters"),
    ],
)
def test_a_damaged_table_of_ratings_is_named_by_file_and_line(tmp_path, table, reason):
    with pytest.raises(DataError, match=reason):
        read_batches(ratings_folder(tmp_path, **table))


@pytest.mark.real
def test_shakespeare_has_1426_roles_and_31354_speeches_without_markup():
    source = open_source("shakespeare", seed=0)
    assert len(source.people) == 1_426
    assert sum(person.records for person in source.people) == 31_354
    assert not any(
        set(record.text) & set("_*\\[#") for p in source.people for record in source.read(p.user)
    )
    drawn = load("shakespeare", clients=250, test_clients=50, min_records=20, seed=0)
    for user in drawn.users:
        records = drawn.read(user)
        assert len(records) >= 20
        times = [record.time for record in records if isinstance(record.time, float | int)]
        assert len(times) == len(records)
        assert all(earlier < later for earlier, later in pairwise(times))
    assert "hamlet/HAMLET" in {person.user for person in source.people}


@pytest.mark.real
def test_ratings_has_6635_raters_and_198810_labels_and_splits_by_batch(tmp_path):
    source = open_source("ratings", seed=0)
    assert len(source.people) == 6_635
    assert sum(person.records for person in source.people) == 198_810
    drawn = load("ratings", clients=5_000, test_clients=1_000, min_records=30, seed=0)
    tested = {drawn.groups[user] for user in drawn.test_users}
    assert not tested & {drawn.groups[user] for user in drawn.train_users}
    means = [
        statistics.fmean(float(r.label or 0) for user in users for r in drawn.read(user))
        for users in (drawn.train_users, drawn.test_users)
    ]
    assert abs(means[0] - means[1]) < 0.3
    per_batch: dict[str, list[str]] = {}
    for user in drawn.test_users:
        per_batch.setdefault(drawn.groups[user], []).append(user)
    assert min(map(len, per_batch.values())) >= 2
    for first, second, *_ in per_batch.values():
        assert [r.text for r in drawn.read(first)] == [r.text for r in drawn.read(second)]
    write(drawn, tmp_path)
    assert read_user(tmp_path, drawn.test_users[0]) == drawn.read(drawn.test_users[0])
    assert (tmp_path / INDEX_FILE).stat().st_size < 1_000_000
