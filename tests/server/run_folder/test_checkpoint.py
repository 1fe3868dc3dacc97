"""Checkpoints: the same bits back, whole or refused, never another run's."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from privet.common.errors import CheckpointCorrupt, StateError
from privet.server.run_folder.checkpoint import CURRENT, PREVIOUS, Checkpoint, load, save


def checkpoint(round: int = 1, **changes: Any) -> Checkpoint:
    values: dict[str, Any] = {
        "run": "run-1",
        "round": round,
        "layout": "aa",
        "adapter": np.full(10, round, np.float32),
        "optimizer": {"m": np.full(10, round, np.float32), "step": np.array(round)},
        "config_hash": "cc",
        "extra": {"drawn": "0,1,2", "clip": 0.45},
    }
    return Checkpoint(**(values | changes))


def found(folder: Path, **changes: str) -> Checkpoint | None:
    wanted = {"run": "run-1", "config_hash": "cc", "layout": "aa"} | changes
    return load(folder, **wanted)


def round_of(folder: Path) -> tuple[int, str]:
    loaded = found(folder)
    assert loaded is not None
    assert (loaded.adapter == loaded.round).all()
    assert (loaded.optimizer["m"] == loaded.round).all()
    return loaded.round, loaded.note


def test_an_empty_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert found(tmp_path) is None


any_floats = npst.arrays(np.uint32, st.integers(0, 20)).map(lambda bits: bits.view(np.float32))
any_arrays = st.sampled_from([np.float32, np.float64, np.int64]).flatmap(
    lambda dtype: npst.arrays(dtype, npst.array_shapes(min_dims=0, max_dims=3, max_side=3))
)


@settings(max_examples=30, deadline=None)
@given(
    adapter=any_floats,
    optimizer=st.dictionaries(st.text("abc._", max_size=4), any_arrays, max_size=3),
    extra=st.dictionaries(st.text(max_size=3), st.text() | st.integers() | st.floats()),
)
def test_what_is_loaded_has_exactly_the_bits_that_were_saved(
    adapter: np.ndarray, optimizer: dict[str, np.ndarray], extra: dict[str, str | int | float]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save(folder, checkpoint(7, adapter=adapter, optimizer=optimizer, extra=extra))
        loaded = found(Path(folder))
    assert loaded is not None
    assert loaded.adapter.tobytes() == adapter.tobytes()
    assert loaded.optimizer.keys() == optimizer.keys()
    for name, array in optimizer.items():
        assert loaded.optimizer[name].tobytes() == array.tobytes()
        assert (loaded.optimizer[name].dtype, loaded.optimizer[name].shape) == (
            array.dtype,
            array.shape,
        )
    assert repr(dict(loaded.extra)) == repr(extra)
    assert (loaded.round, loaded.note) == (7, "")


def test_a_transposed_or_sliced_array_comes_back_in_order(tmp_path: Path) -> None:
    matrix = np.arange(12, dtype=np.float32).reshape(3, 4)
    save(tmp_path, checkpoint(adapter=matrix.ravel()[::3], optimizer={"t": matrix.T}))
    loaded = found(tmp_path)
    assert loaded is not None
    assert loaded.adapter.tolist() == [0, 3, 6, 9]
    assert loaded.optimizer["t"].tolist() == matrix.T.tolist()


def test_exactly_one_previous_checkpoint_is_kept(tmp_path: Path) -> None:
    for round in (1, 2, 3):
        save(tmp_path, checkpoint(round))
    assert sorted(os.listdir(tmp_path)) == [PREVIOUS, CURRENT]
    assert round_of(tmp_path) == (3, "")
    (tmp_path / CURRENT).unlink()
    round, note = round_of(tmp_path)
    assert round == 2
    assert "is missing. Going on from the previous one" in note


@pytest.mark.parametrize(
    "adapter", [np.zeros(3, np.float64), np.zeros((3, 1), np.float32)], ids=["type", "shape"]
)
def test_an_adapter_that_is_not_a_float32_vector_is_refused(adapter: np.ndarray) -> None:
    with pytest.raises(StateError, match=r"float32 with shape \(d,\)"):
        checkpoint(adapter=adapter)


def test_an_extra_that_json_would_change_is_refused() -> None:
    with pytest.raises(StateError, match="'order' must be a str, int or float, and is a list"):
        checkpoint(extra={"order": [1, 2]})


# Damage


def flipped(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut in half": lambda data: data[: len(data) // 2],
    "cut by a byte": lambda data: data[:-1],
    "cut to nothing": lambda _: b"",
    "garbage": lambda data: os.urandom(len(data)),
    "zeros": lambda data: bytes(len(data)),
    "longer": lambda data: data + b"x",
    "an edited number": lambda data: flipped(data, len(data) - 1),
    "an edited round": lambda data: data.replace(rb"\"round\": 2", rb"\"round\": 3"),
    "an edited extra": lambda data: data.replace(b"0.45", b"0.46"),
    "another hash": lambda data: data.replace(b'"sha256":"', b'"sha256":"0')[: len(data)],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_kept_aside_and_the_previous_one_is_given_with_a_note(
    tmp_path: Path, damage: str
) -> None:
    save(tmp_path, checkpoint(1))
    save(tmp_path, checkpoint(2))
    path = tmp_path / CURRENT
    damaged = DAMAGES[damage](path.read_bytes())
    assert damaged != path.read_bytes()
    path.write_bytes(damaged)

    round, note = round_of(tmp_path)
    assert round == 1
    for part in (str(path), str(tmp_path / PREVIOUS), f"{CURRENT}.damaged-1", "round 1"):
        assert part in note
    assert (tmp_path / f"{CURRENT}.damaged-1").read_bytes() == damaged
    save(tmp_path, checkpoint(2))
    assert round_of(tmp_path) == (2, "")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_without_a_whole_previous_one_is_refused(
    tmp_path: Path, damage: str
) -> None:
    save(tmp_path, checkpoint(2))
    path = tmp_path / CURRENT
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(CheckpointCorrupt, match="start the run anew") as caught:
        found(tmp_path)
    assert str(path) in str(caught.value)
    assert f"{CURRENT}.damaged-1" in str(caught.value)
    assert os.listdir(tmp_path) == [f"{CURRENT}.damaged-1"]


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 10_000))
def test_no_single_flipped_bit_is_loaded(position: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save(folder, checkpoint(2))
        path = Path(folder) / CURRENT
        data = path.read_bytes()
        path.write_bytes(flipped(data, position % len(data)))
        with pytest.raises(CheckpointCorrupt):
            found(Path(folder))


@pytest.mark.parametrize("name", ["run", "config_hash", "layout"])
def test_a_checkpoint_of_another_run_config_or_layout_is_refused_and_left_as_it_is(
    tmp_path: Path, name: str
) -> None:
    save(tmp_path, checkpoint(1))
    save(tmp_path, checkpoint(2))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointCorrupt, match=f"has {name} '.*', and 'other' is being run"):
        found(tmp_path, **{name: "other"})
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_checkpoint_of_a_newer_format_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    save(tmp_path, checkpoint(1))
    path = tmp_path / CURRENT
    path.write_bytes(path.read_bytes().replace(b'"format":"1"', b'"format":"2"'))
    with pytest.raises(CheckpointCorrupt, match="has format 2"):
        found(tmp_path)
    assert os.listdir(tmp_path) == [CURRENT]


def test_a_missing_folder_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="make the folder"):
        save(tmp_path / "absent", checkpoint())


def test_a_disk_that_fills_up_keeps_the_current_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, checkpoint(1))
    child = f"""
import resource
import numpy as np
from privet.server.run_folder.checkpoint import Checkpoint, save
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
adapter = np.zeros(100_000, np.float32)
save({str(tmp_path)!r}, Checkpoint("run-1", 2, "aa", adapter, {{}}, "cc", {{}}))
"""
    done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True)
    assert "StateError" in done.stderr
    assert round_of(tmp_path) == (1, "")


def test_a_process_killed_while_saving_leaves_a_complete_checkpoint(tmp_path: Path) -> None:
    child = f"""
import sys
import numpy as np
from privet.server.run_folder.checkpoint import Checkpoint, save
for round in range(int(sys.argv[1]), 1_000_000):
    state = np.full(20_000, round, np.float32)
    save({str(tmp_path)!r}, Checkpoint("run-1", round, "aa", state, {{"m": state}}, "cc", {{}}))
    print(round, flush=True)
"""
    start = 1
    for lines in (1, 2, 7, 4):
        command = [sys.executable, "-c", child, str(start)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            for _ in range(lines):
                last = int(process.stdout.readline())
            process.send_signal(signal.SIGKILL)
            last = max([last, *map(int, process.stdout.read().split())])
        round, note = round_of(tmp_path)
        assert last <= round <= last + 1
        assert note == ""
        start = round + 1
