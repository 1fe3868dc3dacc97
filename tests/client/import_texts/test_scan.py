"""scan.py: a person's folders, walked without harm, within limits, and cheaply again."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privet.client.import_texts import formats
from privet.client.import_texts import scan as import_texts
from privet.client.import_texts.scan import (
    Found,
    Ignored,
    Limits,
    Unchanged,
    key_of,
    path_of,
    scan,
)
from privet.client.training.records import Record
from privet.common.errors import ConfigError

Result = Found | Ignored | Unchanged


def found(results: Iterable[Result]) -> dict[str, list[str]]:
    return {
        result.path.name: [record.text for record in result.records]
        for result in results
        if isinstance(result, Found)
    }


def ignored(results: Iterable[Result]) -> dict[str, str]:
    return {r.path.name: r.reason for r in results if isinstance(r, Ignored)}


def fingerprints(results: Iterable[Result]) -> dict[str, str]:
    return {key_of(r.path): r.fingerprint for r in results if isinstance(r, Found)}


def write(path: Path, text: str, mtime: float = 1_000.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    os.utime(path, (mtime, mtime))
    return path


# --- walking ------------------------------------------------------------------------------------


def test_files_of_known_kinds_are_read_and_the_others_are_ignored_with_a_reason(tmp_path):
    write(tmp_path / "a.txt", "alpha")
    write(tmp_path / "sub/b.MD", "beta")
    write(tmp_path / "sub/README", "gamma")
    write(tmp_path / "sub/Letter to Dr. Smith", "delta")
    write(tmp_path / "c.jsonl", '{"text": "epsilon"}')
    write(tmp_path / "x.py", "SECRET")
    write(tmp_path / "empty.txt", "")
    write(tmp_path / "blank.txt", " \n ")
    write(tmp_path / "binary.txt", "SECRET\0")
    results = list(scan([tmp_path]))
    assert found(results) == {
        "a.txt": ["alpha"],
        "b.MD": ["beta"],
        "README": ["gamma"],
        "Letter to Dr. Smith": ["delta"],
        "c.jsonl": ["epsilon"],
    }
    reasons = ignored(results)
    assert sorted(reasons) == ["binary.txt", "blank.txt", "empty.txt", "x.py"]
    assert reasons["empty.txt"] == "empty"
    assert reasons["blank.txt"] == "no text of yours in it"
    assert "the suffix .py" in reasons["x.py"]
    assert "SECRET" not in str(results)


def test_hidden_files_and_caches_take_one_line_a_folder(tmp_path):
    for name in (".git/a.txt", "node_modules/a.txt", "Cache/a.txt", ".x", ".y", "venv/a.txt"):
        write(tmp_path / name, "no")
    write(tmp_path / "venv/pyvenv.cfg", "")
    results = list(scan([tmp_path]))
    assert found(results) == {}
    assert len(results) == 5
    assert ignored(results)[tmp_path.name].startswith("2 hidden files")


def test_a_file_or_folder_that_is_named_outright_is_read_whatever_its_name(tmp_path):
    write(tmp_path / "x.py", "x = 1")
    write(tmp_path / ".notes/a.txt", "mine")
    write(tmp_path / "b.txt", "also")
    roots = [tmp_path, tmp_path / "x.py", tmp_path / ".notes", tmp_path / "b.txt", tmp_path]
    results = list(scan(roots))
    assert found(results) == {"x.py": ["x = 1"], "a.txt": ["mine"], "b.txt": ["also"]}
    assert len(results) == 3


def test_links_are_not_followed_and_loops_end_but_a_root_may_be_a_link(tmp_path):
    write(tmp_path / "outside/secret.txt", "no")
    home = tmp_path / "home"
    write(home / "a.txt", "yes")
    (home / "loop").symlink_to(home)
    (home / "out").symlink_to(tmp_path / "outside")
    (home / "file.txt").symlink_to(tmp_path / "outside/secret.txt")
    (home / "broken.txt").symlink_to(tmp_path / "nothing")
    (tmp_path / "root").symlink_to(home)
    results = list(scan([tmp_path / "root", home]))
    assert found(results) == {"a.txt": ["yes"]}
    assert sorted(ignored(results)) == ["broken.txt", "file.txt", "loop", "out"]


def test_pipes_sockets_and_devices_are_never_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    os.mkfifo("pipe.txt")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.txt")
        results = list(scan([tmp_path, Path("/dev/null"), tmp_path / "pipe.txt"]))
    assert found(results) == {}
    assert ignored(results) == dict.fromkeys(
        ["pipe.txt", "socket.txt", "null"], "not a file: a pipe, a socket or a device"
    )


def test_a_pipe_that_takes_a_files_place_after_the_walk_does_not_block(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", "text")

    def swap():
        path.unlink()
        os.mkfifo(path)

    swap_after_walk(monkeypatch, swap)
    assert ignored(scan([tmp_path])) == {"a.txt": "not a file: a pipe, a socket or a device"}


def test_a_link_that_takes_a_files_place_after_the_walk_is_not_followed(tmp_path, monkeypatch):
    secret = write(tmp_path / "secret.txt", "no")
    path = write(tmp_path / "in/a.txt", "text")

    def swap():
        path.unlink()
        path.symlink_to(secret)

    swap_after_walk(monkeypatch, swap)
    assert ignored(scan([tmp_path / "in"])) == {"a.txt": "a link"}


def test_a_file_that_vanishes_after_the_walk_is_ignored(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", "text")
    swap_after_walk(monkeypatch, path.unlink)
    assert ignored(scan([tmp_path])) == {"a.txt": "not there (any more)"}


def swap_after_walk(monkeypatch, swap):
    real = import_texts._is_same

    def late(*args):
        swap()
        return real(*args)

    monkeypatch.setattr(import_texts, "_is_same", late)


def test_a_missing_root_is_ignored_with_its_path(tmp_path):
    assert list(scan([tmp_path / "no"])) == [Ignored(tmp_path / "no", "not there (any more)")]


def test_files_and_folders_without_permission_are_ignored(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", "text")
    write(tmp_path / "sub/b.txt", "text")
    path.chmod(0)
    (tmp_path / "sub").chmod(0)
    if os.geteuid() == 0:  # root may read everything: refuse in its place
        real_open, real_list = os.open, os.scandir

        def refusing_open(name, *args):
            return _refuse() if str(name).endswith("a.txt") else real_open(name, *args)

        monkeypatch.setattr(os, "open", refusing_open)
        monkeypatch.setattr(
            os, "scandir", lambda p: _refuse() if p.endswith("sub") else real_list(p)
        )
    assert ignored(scan([tmp_path])) == dict.fromkeys(["a.txt", "sub"], "permission denied")
    (tmp_path / "sub").chmod(0o700)


def _refuse():
    raise PermissionError(13, "Permission denied")


def test_a_deep_tree_ends_without_recursion(tmp_path):
    folder = tmp_path
    for _ in range(300):
        folder = folder / "d"
    write(folder / "a.txt", "deep")
    assert found(scan([tmp_path])) == {"a.txt": ["deep"]}


def test_names_that_are_not_utf8_are_read_print_and_can_be_stored(tmp_path):
    path = os.path.join(os.fsencode(tmp_path), b"caf\xe9\n.txt")
    Path(os.fsdecode(path)).write_text("text")
    (result,) = scan([tmp_path])
    assert isinstance(result, Found)
    key = key_of(result.path)
    assert key.endswith("caf\\xe9\\x0a.txt")
    assert json.loads(json.dumps(key, ensure_ascii=False).encode()) == key
    assert path_of(key) == result.path


@given(st.binary(max_size=30).filter(lambda raw: b"\0" not in raw))
def test_keys_print_and_lead_back_to_their_path(raw):
    path = Path(os.fsdecode(b"/x" + raw))
    assert key_of(path).isprintable()
    assert key_of(path).encode()
    assert path_of(key_of(path)) == path


# --- watching -----------------------------------------------------------------------------------


def test_an_unchanged_file_is_not_read_again_and_a_changed_one_is(tmp_path):
    for name in ("a", "b", "c"):
        write(tmp_path / f"{name}.txt", name)
    known = fingerprints(scan([tmp_path]))
    assert [type(r) for r in scan([tmp_path], known=known)] == [Unchanged] * 3
    write(tmp_path / "b.txt", "new", mtime=2_000)
    write(tmp_path / "d.txt", "d")
    (tmp_path / "c.txt").unlink()
    results = list(scan([tmp_path], known=known))
    assert found(results) == {"b.txt": ["new"], "d.txt": ["d"]}


def test_a_change_that_keeps_size_and_time_is_seen_in_the_first_bytes(tmp_path):
    path = write(tmp_path / "a.txt", "one")
    known = fingerprints(scan([tmp_path]))
    write(path, "two")
    assert found(scan([tmp_path], known=known)) == {"a.txt": ["two"]}


def test_other_settings_make_every_file_read_again(tmp_path):
    write(tmp_path / "a.txt", "one")
    known = fingerprints(scan([tmp_path]))
    assert found(scan([tmp_path], known=known, me=["Ann"])) == {"a.txt": ["one"]}
    assert found(scan([tmp_path], known=known, limits=Limits(records=9))) == {"a.txt": ["one"]}


def test_an_ignored_file_need_not_be_read_again_either(tmp_path):
    write(tmp_path / "a.txt", "1/2/24, 10:00 - Bob: text\n")
    (result,) = scan([tmp_path])
    assert isinstance(result, Ignored)
    assert "--me NAME" in result.reason
    known = {key_of(result.path): result.fingerprint}
    assert list(scan([tmp_path], known=known)) == [Unchanged(result.path)]
    assert found(scan([tmp_path], known=known, me=["bob"])) == {"a.txt": ["text"]}


@pytest.mark.parametrize(("changes", "outcome"), [(1, "new text"), (9, "")])
def test_a_file_that_changes_while_it_is_read_is_read_once_more(
    tmp_path, monkeypatch, changes, outcome
):
    path = write(tmp_path / "a.txt", "old")
    real, times = formats.read, iter(range(1, changes + 1))

    def changing(*args):
        if (number := next(times, None)) is not None:
            write(path, "new text", mtime=number)
        return real(*args)

    monkeypatch.setattr(import_texts, "read", changing)
    (result,) = scan([tmp_path])
    if outcome:
        assert found([result]) == {"a.txt": [outcome]}
        assert list(scan([tmp_path], known=fingerprints([result]))) == [Unchanged(path)]
    else:
        assert isinstance(result, Ignored)
        assert "changed while it was read, twice" in result.reason
        assert result.fingerprint == ""


def test_ten_thousand_unchanged_files_take_less_than_a_second(tmp_path):
    for number in range(10_000):
        if number % 500 == 0:
            (tmp_path / str(number // 500)).mkdir()
        (tmp_path / str(number // 500) / f"{number}.txt").write_text(f"text {number}")
    known = fingerprints(scan([tmp_path]))
    assert len(known) == 10_000
    start = time.process_time()
    assert sum(isinstance(r, Unchanged) for r in scan([tmp_path], known=known)) == 10_000
    assert time.process_time() - start < 1.0


# --- one text once ------------------------------------------------------------------------------


def test_a_text_is_kept_once_in_the_newest_file_that_has_it(tmp_path):
    write(tmp_path / "old.txt", "same", mtime=1)
    write(tmp_path / "new.txt", "same", mtime=2)
    write(tmp_path / "twice.jsonl", '{"text": "x"}\n' * 3 + '{"text": "x", "label": 1}', mtime=3)
    results = list(scan([tmp_path]))
    assert found(results) == {"twice.jsonl": ["x", "x"], "new.txt": ["same"], "old.txt": []}
    notes = [r.notes for r in results if isinstance(r, Found)]
    assert notes == [
        ("2 texts are held already: each is kept once",),
        (),
        ("1 texts are held already: each is kept once",),
    ]


def test_a_text_of_an_unchanged_file_is_not_taken_again(tmp_path):
    write(tmp_path / "old.txt", "same")
    first = list(scan([tmp_path]))
    held = {r.path: r.records for r in first if isinstance(r, Found)}
    write(tmp_path / "new.txt", "same", mtime=9_000)
    results = list(scan([tmp_path], known=fingerprints(first), kept=held.__getitem__))
    assert found(results) == {"new.txt": []}
    assert found(scan([tmp_path], known=fingerprints(first))) == {"new.txt": ["same"]}  # untold


def test_records_come_earliest_first_with_a_time_each(tmp_path):
    lines = ['{"text": "b", "time": 9}', '{"text": "a", "time": "1970-01-01"}', '{"text": "c"}']
    write(tmp_path / "a.jsonl", "\n".join(lines), mtime=1_000)
    (result,) = scan([tmp_path])
    assert isinstance(result, Found)
    assert [(r.text, r.time) for r in result.records] == [("a", 0.0), ("b", 9.0), ("c", 1000.0)]


def test_broken_lines_are_summed_up_in_a_sentence_for_each_reason(tmp_path):
    write(tmp_path / "a.jsonl", '{"text": "a"}\n' + "SECRET\n" * 7 + '{"text": 1}')
    (result,) = scan([tmp_path])
    assert isinstance(result, Found)
    assert result.notes == (
        "7 lines (2, 3, 4, …): not one JSON object in UTF-8",
        '1 line (9): "text" must be a text, found a int',
    )


def test_results_do_not_show_the_text(tmp_path):
    write(tmp_path / "a.txt", "SECRET")
    assert "SECRET" not in repr(list(scan([tmp_path])))


# --- limits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{"files": 0}, {"piece_chars": 15}, {"piece_chars": 100_001}])
def test_limits_that_make_no_sense_are_refused(change: Mapping[str, int]):
    with pytest.raises(ConfigError, match=next(iter(change))):
        Limits(**change)


def test_over_the_number_of_files_the_newest_are_kept_and_one_line_tells_of_the_others(tmp_path):
    for number in range(10):
        write(tmp_path / f"{number}.txt", f"text {number}", mtime=number)
    results = list(scan([tmp_path], limits=Limits(files=3)))
    assert list(found(results)) == ["9.txt", "8.txt", "7.txt"]
    assert ignored(results) == {
        "6.txt": "this and 6 older files are left out (0.0 MB): the limit is 3 files, and the "
        "newest are kept"
    }


def test_over_the_total_size_the_newest_files_are_kept_and_the_others_never_opened(
    tmp_path, monkeypatch
):
    for number in range(4):
        path = write(tmp_path / f"{number}.txt", f"text {number}")
        os.truncate(path, 600_000)  # zeros: not text
        os.utime(path, (number, number))
    opened: list[str] = []
    real = import_texts._open

    def noting(path):
        opened.append(path)
        return real(path)

    monkeypatch.setattr(import_texts, "_open", noting)
    results = list(scan([tmp_path], limits=Limits(total_mb=2)))
    assert sorted(ignored(results)) == ["0.txt", "1.txt", "2.txt", "3.txt"]
    assert ignored(results)["0.txt"].startswith("this file is left out (0.6 MB): the limit is 2 MB")
    assert [Path(path).name for path in opened] == ["3.txt", "2.txt", "1.txt"]


def test_over_the_number_of_records_the_last_ones_of_the_newest_files_are_kept(tmp_path):
    for number in range(3):
        lines = "".join(f'{{"text": "{number} {n}"}}\n' for n in range(4))
        write(tmp_path / f"{number}.jsonl", lines, mtime=number)
    results = list(scan([tmp_path], limits=Limits(records=6)))
    assert found(results) == {
        "2.jsonl": ["2 0", "2 1", "2 2", "2 3"],
        "1.jsonl": ["1 2", "1 3"],
    }
    assert "the first 2 records" in str(results[1])
    assert "0.jsonl" in ignored(results)


def test_a_new_file_takes_the_place_of_the_oldest_records(tmp_path):
    limits = Limits(records=4)
    for number in range(2):
        lines = "".join(f'{{"text": "{number} {n}"}}\n' for n in range(2))
        write(tmp_path / f"{number}.jsonl", lines, mtime=number)
    first = list(scan([tmp_path], limits=limits))
    held: dict[Path, tuple[Record, ...]] = {
        r.path: r.records for r in first if isinstance(r, Found)
    }
    write(tmp_path / "2.txt", "new", mtime=2)
    known = fingerprints(first)
    again = list(scan([tmp_path], known=known, kept=held.__getitem__, limits=limits))
    assert found(again) == {"2.txt": ["new"], "0.jsonl": ["0 1"]}
    assert Unchanged(tmp_path / "1.jsonl") in again
    fresh = list(scan([tmp_path], limits=limits))
    assert found(fresh) == {"2.txt": ["new"], "1.jsonl": ["1 0", "1 1"], "0.jsonl": ["0 1"]}


def test_what_is_kept_does_not_depend_on_the_order_of_the_roots(tmp_path):
    for number in range(6):
        write(tmp_path / str(number % 2) / f"{number}.txt", "same" if number < 4 else str(number))
    roots = [tmp_path / "0", tmp_path / "1"]
    limits = Limits(files=5)
    assert list(scan(roots, limits=limits)) == list(scan(roots[::-1], limits=limits))


# Not ru_maxrss: a child starts with its parent's, here that of pytest with torch.
MEASURE = """
import json, re, sys
from pathlib import Path
from privet.client.import_texts.scan import scan, Limits, Found
results = scan([Path(sys.argv[1])], limits=Limits(file_mb=int(sys.argv[2])))
told = [(len(r.records), r.notes) if isinstance(r, Found) else (0, r.reason) for r in results]
peak = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]
print(json.dumps([int(peak) // 1024, sum(count for count, _ in told), str(told)]))
"""


def measured(path: Path, file_mb: int = 64) -> tuple[int, int, str]:
    """Peak memory of a process that scans, in MiB; records; what was left out."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path), str(file_mb)],
        capture_output=True,
        text=True,
        check=True,
    )
    peak, records, told = json.loads(done.stdout)
    return peak, records, told


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["paragraphs", "mail", "jsonl", "one line", "one word", "zeros"])
def test_two_hundred_megabytes_take_less_than_200_megabytes_of_memory(tmp_path, kind):
    suffix = {"mail": ".mbox", "jsonl": ".jsonl"}.get(kind, ".txt")
    path = tmp_path / f"big{suffix}"
    frame = {
        "paragraphs": "Paragraph {} has some words of its own, as real ones have.\n\n",
        "mail": "From a Sat Jan 01 12:00:00 2022\nFrom: a@x.org\n\n" + "Mail {0}. " * 300 + "\n\n",
        "jsonl": '{{"text": "Line {} has some words of its own."}}\n',
        "one line": "Sentence {} of a single line has some words. ",
        "one word": "word{}",
        "zeros": "",
    }[kind]
    with path.open("w") as file:
        while frame and file.tell() < 200_000_000:
            start = file.tell()
            file.write("".join(frame.format(start + n) for n in range(2_000)))
    if not frame:
        os.truncate(path, 200_000_000)
    peak, records, told = measured(path, 500 if kind == "paragraphs" else 64)
    print(kind, peak, records, told)
    assert peak < 200
    assert (records == 0) == (kind == "zeros")


@pytest.mark.heavy
def test_five_gigabytes_are_taken_within_the_limits_and_the_older_ones_never_read(tmp_path):
    text = "".join(f"Paragraph {n} has some words of its own.\n\n" for n in range(100_000))
    for number in range(80):
        os.truncate(write(tmp_path / f"{number:02}.txt", "old"), 63_000_000)  # sparse
    big = tmp_path / "big.txt"
    with big.open("wb") as file:
        file.write(text.encode())
        file.truncate(5_000_000_000 - 66_000_000)
        file.seek(0, os.SEEK_END)
        for number in range(15):
            file.write(text.replace("own", f"own {number}").encode())
    start = time.perf_counter()
    peak, records, told = measured(tmp_path)
    print(peak, records, round(time.perf_counter() - start, 1), told)
    assert peak < 200
    assert records == 200_000
    assert "older files are left out" in told
