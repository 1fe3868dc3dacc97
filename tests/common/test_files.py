"""Files: whole or not there, a log without torn lines, nothing overwritten when kept aside."""

import errno
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privet.common.errors import StateError
from privet.common.files import append_line, keep_aside, read_lines, write_atomic, write_json_atomic


@pytest.fixture
def read_only_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder nobody may write to; mode bits do not stop root, so it steps down meanwhile."""
    is_root = os.geteuid() == 0
    tmp_path.chmod(0o555)
    closed = [parent for parent in tmp_path.parents if is_root and not parent.stat().st_mode & 1]
    modes = {parent: parent.stat().st_mode for parent in closed}
    try:
        if is_root:
            for parent in closed:
                parent.chmod(modes[parent] | 0o111)
            os.seteuid(65534)
        yield tmp_path
    finally:
        if is_root:
            os.seteuid(0)
            for parent in closed:
                parent.chmod(modes[parent])
        tmp_path.chmod(0o755)


def test_a_write_replaces_the_old_content_and_leaves_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_atomic(path, b"old")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["state"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_failed_write_keeps_the_old_content_and_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    path = tmp_path / "state"
    write_atomic(path, b"old")

    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, step, fails)
    with pytest.raises(StateError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["state"]
    if isinstance(error, OSError):
        assert str(path) in str(caught.value)
        assert "free some space" in str(caught.value)


def test_a_read_only_folder_is_a_sentence_with_the_path(read_only_folder: Path) -> None:
    path = read_only_folder / "state"
    writes: list[Callable[[], None]] = [
        lambda: write_atomic(path, b""),
        lambda: append_line(path, 1),
    ]
    for write in writes:
        with pytest.raises(StateError, match="writable for you") as caught:
            write()
        assert str(path) in str(caught.value)


def test_a_missing_folder_is_a_sentence_with_the_path(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="make the folder") as caught:
        write_atomic(tmp_path / "absent" / "state", b"")
    assert str(tmp_path / "absent" / "state") in str(caught.value)


@pytest.mark.skipif(os.name == "nt", reason="needs a file size limit")
def test_a_disk_that_fills_up_in_the_middle_of_a_write_keeps_the_old_content(
    tmp_path: Path,
) -> None:
    path = tmp_path / "state"
    write_atomic(path, b"old")
    child = f"""
import resource
from privet.common.files import write_atomic
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
write_atomic({str(path)!r}, bytes(100_000))
"""
    done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True)
    assert "StateError" in done.stderr
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["state"]


def test_a_process_killed_while_writing_leaves_the_old_or_the_new_content(tmp_path: Path) -> None:
    path = tmp_path / "state"
    child = f"""
from privet.common.files import write_atomic
number = 0
while True:
    write_atomic({str(path)!r}, bytes([number % 256]) * 300_000)
    print(number, flush=True)
    number += 1
"""
    for lines in (1, 2, 5):
        with subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            for _ in range(lines):
                last = int(process.stdout.readline())
            process.send_signal(signal.SIGKILL)
        content = path.read_bytes()
        assert len(content) == 300_000
        assert len(set(content)) == 1
        assert content[0] >= last


def test_json_that_cannot_hold_a_number_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    for write in (write_json_atomic, append_line):
        with pytest.raises(StateError, match="null"):
            write(tmp_path / "summary.json", {"loss": float("nan")})
    assert os.listdir(tmp_path) == []


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    # A lone surrogate has no UTF-8 form.
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=5,
)


@settings(max_examples=30, deadline=None)
@given(lines=st.lists(values, min_size=1, max_size=4), cut=st.integers(0, 40))
def test_after_a_crash_in_an_append_every_earlier_line_and_the_next_one_are_there(
    lines: list[object], cut: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rounds.jsonl"
        for value in lines:
            append_line(path, value)
        whole = path.read_bytes()
        last_line = whole[whole[:-1].rfind(b"\n") + 1 :]
        kept = cut % len(last_line)
        path.write_bytes(whole[: len(whole) - len(last_line) + kept])  # the crash

        assert read_lines(path) == lines[:-1]
        append_line(path, {"next": 1})
        assert read_lines(path) == [*lines[:-1], {"next": 1}]
        torn = Path(f"{path}.torn")
        assert (torn.read_bytes() if torn.exists() else b"") == (
            last_line[:kept] + b"\n" if kept else b""
        )


def test_an_append_that_ignores_a_torn_line_loses_the_next_one(tmp_path: Path) -> None:
    """The trap: `open(path, "a")` alone."""
    path = tmp_path / "rounds.jsonl"
    path.write_bytes(b'{"round": 1}\n{"rou')
    with open(path, "a") as file:  # the faulty version
        file.write('{"round": 2}\n')
    with pytest.raises(StateError, match="Line 2"):
        read_lines(path)


def test_a_torn_line_longer_than_one_read_is_cut_whole(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    path.write_bytes(b"1\n" + b"x" * 200_000)
    append_line(path, 2)
    assert read_lines(path) == [1, 2]
    assert Path(f"{path}.torn").stat().st_size == 200_001


def test_a_missing_log_is_empty(tmp_path: Path) -> None:
    assert read_lines(tmp_path / "rounds.jsonl") == []


def test_a_file_kept_aside_never_overwrites_another(tmp_path: Path) -> None:
    path = tmp_path / "state"
    for number in (1, 2, 3):
        path.write_text(str(number))
        assert keep_aside(path) == tmp_path / f"state.damaged-{number}"
        assert not path.exists()
    assert [(tmp_path / f"state.damaged-{n}").read_text() for n in (1, 2, 3)] == ["1", "2", "3"]


def test_keeping_aside_a_missing_file_says_so_and_makes_none(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="does not exist"):
        keep_aside(tmp_path / "state")
    assert os.listdir(tmp_path) == []
