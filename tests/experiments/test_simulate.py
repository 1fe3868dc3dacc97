"""experiments/simulate.py: stopped anywhere by anything, a run goes on to the same end.

One child process imports everything and does the first run, which fills its caches; each run after
that is a fork of it, so that it can be killed.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from privet.client.privacy.ledger import Ledger, verify
from privet.client.privacy.run_ledger import LEDGERS
from privet.common.errors import ConfigError
from privet.common.files import read_lines
from privet.common.settings.config import Config, read, to_toml
from privet.experiments import simulate
from privet.server.run_folder.checkpoint import CURRENT, PREVIOUS

from ..tiny import population, tiny_config

NURSERY = """
import json, os, resource, sys, time
from privet import commands as main
os.chdir(sys.argv[1])
said = os.dup(1)
os.dup2(2, 1)
sys.exit(1) if main.run(["simulate", "tiny.toml"]) else os.dup2(said, 1)
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        os.chdir(job["folder"])
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)
        if job["limit"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], -1))
        code = main.run(job["arguments"])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    began = time.monotonic()
    print(child, flush=True)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), time.monotonic() - began, flush=True)
"""


@dataclass(frozen=True)
class Ended:
    """How a run ended: exit code (minus the signal), what it said, and the seconds it took."""

    code: int
    out: str
    err: str
    seconds: float


@dataclass(frozen=True)
class Nursery:
    process: "subprocess.Popen[str]"

    def run(
        self,
        folder: Path,
        *arguments: str,
        limit: int = 0,
        meanwhile: Callable[[int], None] = lambda _: None,
    ) -> Ended:
        """`privet ARGUMENTS` in `folder`; `meanwhile` is given its process id."""
        pipe_in, pipe_out = self.process.stdin, self.process.stdout
        assert pipe_in is not None
        assert pipe_out is not None
        job = {"folder": str(folder), "arguments": arguments, "limit": limit}
        pipe_in.write(json.dumps(job) + "\n")
        pipe_in.flush()
        meanwhile(int(pipe_out.readline()))
        code, seconds = pipe_out.readline().split()
        said = [(folder / name).read_text() for name in ("out", "err")]
        return Ended(int(code), said[0], said[1], float(seconds))


@pytest.fixture(scope="module")
def nursery(whole_folder: Path) -> Iterator[Nursery]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with subprocess.Popen(
        [sys.executable, "-c", NURSERY, str(whole_folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    ) as process:  # fmt: skip
        yield Nursery(process)
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture(scope="module")
def config(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    people = population(tmp_path_factory.mktemp("people"), 14, 10)
    return tiny_config(llama_folder, people, data={"clients": 8}, rounds={"count": 6, "cohort": 4})


@dataclass(frozen=True)
class Whole:
    """A run that nothing interrupted, in a folder that tests copy."""

    folder: Path
    seconds: float

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "tiny"


def placed(config: Config, folder: Path) -> Path:
    (folder / "tiny.toml").write_text(to_toml(config))
    return folder


@pytest.fixture(scope="module")
def whole_folder(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return placed(config, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def whole(nursery: Nursery, config: Config, whole_folder: Path, tmp_path_factory: Any) -> Whole:
    """The nursery's own run; a second one, by a fork, tells how long one takes and is the same."""
    again = placed(config, tmp_path_factory.mktemp("again"))
    ended = nursery.run(again, "simulate", "tiny.toml")
    assert ended.code == 0, ended.err
    found = Whole(whole_folder, ended.seconds)
    assert outcome(again / "runs" / "tiny") == outcome(found.run)
    return found


def outcome(run: Path) -> dict[str, Any]:
    """All that must not depend on interruptions."""
    owner = (run / "run-id").read_text().strip()
    lines = read_lines(run / "rounds.jsonl")
    with Ledger.open(run / LEDGERS, owner=owner) as ledger:
        spent = {name: ledger.charges(name) for name in ledger.clients()}
    summary = json.loads((run / "summary.json").read_text())
    times = ("run", "seconds", "peak_rss_bytes")
    return {
        "checkpoint": {k: v.tobytes() for k, v in load_file(run / CURRENT).items()},
        "adapter": (run / "adapter" / "adapter_model.safetensors").read_bytes(),
        "rounds": [
            {k: v for k, v in line.items() if k not in ("seconds", "phases")} for line in lines
        ],
        "spent": spent,
        "evaluation": json.loads((run / "evaluation.json").read_text()),
        "summary": {key: value for key, value in summary.items() if key not in times},
    }


def one_sentence(ended: Ended) -> str:
    """What was said besides progress; exit code 2, and no traceback."""
    assert ended.code == 2, (ended.code, ended.err)
    assert "Traceback" not in ended.err
    said = [line for line in ended.err.splitlines() if line.startswith("privet: ")]
    assert len(said) == 1, ended.err
    assert ended.err.splitlines()[-1] == said[0]
    return said[0]


def test_of_a_run_that_an_earlier_privet_began_it_is_not_said_where_it_computes(tmp_path, whole):
    assert simulate._computed(tmp_path) is None
    assert (
        simulate._computed(whole.run)
        == "float32 on cpu: a model 32 wide gains nothing from bfloat16"
    )


def test_a_run_goes_on_with_the_weights_and_the_checkpointing_that_it_began_with(
    llama_folder, tmp_path
):
    people = population(tmp_path / "people", 10, 8)
    config = tiny_config(llama_folder, people, compute={"gradient_checkpointing": True})
    run = tmp_path / "run"
    begun = simulate.prepare(config, run, resume=False)
    assert begun.compute.gradient_checkpointing
    assert read(run / "config.toml").compute == begun.compute
    assert str(simulate._computed(run)).startswith("float32 on cpu, each block computed twice: ")
    assert simulate.prepare(config, run, resume=True).compute == begun.compute
    for key, value in (("quantization", "nf4"), ("gradient_checkpointing", False)):
        other = config.model_copy(
            update={"compute": config.compute.model_copy(update={key: value})}
        )
        with pytest.raises(ConfigError, match=rf"other settings \(compute\.{key} was"):
            simulate.prepare(other, run, resume=True)


# --- killed and stopped ------------------------------------------------------------------------


def test_killed_at_eight_random_moments_a_run_ends_in_the_same_bits(
    nursery, config, whole, tmp_path
):
    placed(config, tmp_path)
    draw, killed, run = random.Random(4), 0, tmp_path / "runs" / "tiny"

    def kill(process: int) -> None:
        if number % 2:  # soon after one more round, so that some are sure to fall between rounds
            after_round(run, min(done(run) + 1, 6))
        time.sleep(draw.uniform(0.0, 0.1 if number % 2 else 0.5) * whole.seconds)
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)

    for number in range(8):  # noqa: B007 - `kill` reads it
        ended = nursery.run(tmp_path, "simulate", "tiny.toml", "--resume", meanwhile=kill)
        killed += ended.code == -signal.SIGKILL
        assert ended.code in (0, -signal.SIGKILL), ended.err
    assert killed >= 4
    assert nursery.run(tmp_path, "simulate", "tiny.toml", "--resume").code == 0
    assert outcome(tmp_path / "runs" / "tiny") == outcome(whole.run)
    assert verify(tmp_path / "runs" / "tiny" / LEDGERS) == 6 * 4


def done(run: Path) -> int:
    return len(read_lines(run / "rounds.jsonl"))


def after_round(run: Path, number: int) -> None:
    while done(run) < number:
        time.sleep(0.005)


def test_ctrl_c_exits_130_with_the_command_that_goes_on(nursery, config, whole, tmp_path):
    placed(config, tmp_path)
    run = tmp_path / "runs" / "tiny"

    def interrupt(process: int) -> None:
        after_round(run, 2)
        os.kill(process, signal.SIGINT)

    command = ("simulate", "tiny.toml", "--set", "speed.threads=1")
    ended = nursery.run(tmp_path, *command, meanwhile=interrupt)
    assert ended.code == 130, ended.err
    *_, last = ended.err.splitlines()
    said = "privet: stopped; finished rounds are kept. To go on: privet "
    assert last == said + " ".join((*command, "--resume"))
    assert nursery.run(tmp_path, *command, "--resume").code == 0
    assert outcome(run) == outcome(whole.run)


def test_a_finished_run_is_not_run_again(nursery, whole):
    before = outcome(whole.run)
    ended = nursery.run(whole.folder, "simulate", "tiny.toml", "--resume")
    assert ended.code == 0
    assert "round " not in ended.err
    assert outcome(whole.run) == before


# --- what belongs to another run ---------------------------------------------------------------


def test_a_run_folder_that_exists_is_left_alone(nursery, whole):
    before = sorted((p.name, p.stat().st_mtime_ns) for p in whole.run.iterdir())
    ended = nursery.run(whole.folder, "simulate", "tiny.toml")
    assert "holds a run already; go on with --resume" in one_sentence(ended)
    assert sorted((p.name, p.stat().st_mtime_ns) for p in whole.run.iterdir()) == before


def test_another_folder_of_that_name_is_left_alone(nursery, config, tmp_path):
    placed(config, tmp_path)
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "novel.txt").write_text("mine")
    ended = nursery.run(tmp_path, "simulate", "tiny.toml", "--resume")
    assert "holds no run of privet; choose another name" in one_sentence(ended)
    assert [path.name for path in (tmp_path / "runs" / "tiny").iterdir()] == ["novel.txt"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("rounds.cohort=3", "rounds.cohort was 4, is now 3"),
        ("rounds.count=5", "rounds.count = 5, but 6 rounds"),
        ("privacy.client.clip=0.5", "privacy.client.clip was 1.0, is now 0.5"),
        ("insecure_test_seed=2", "insecure_test_seed was 1, is now 2"),
    ],
)
def test_going_on_with_other_settings_is_refused_by_the_first_that_differs(
    nursery, whole, change, named
):
    ended = nursery.run(whole.folder, "simulate", "tiny.toml", "--resume", "--set", change)
    assert named in one_sentence(ended)


def test_a_finished_run_is_extended_to_the_bits_of_one_that_was_as_long_from_the_start(
    nursery, config, whole, tmp_path
):
    longer = nursery.run(placed(config, tmp_path), "simulate", "tiny.toml", *SHORT)
    assert longer.code == 0, longer.err
    run = tmp_path / "runs" / "tiny"
    first = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    ended = nursery.run(tmp_path, "simulate", "runs/tiny", "--resume", "--set", "rounds.count=6")
    assert ended.code == 0, ended.err
    assert outcome(run) == outcome(whole.run)
    kept = run / "adapter-after-4" / "adapter_model.safetensors"
    assert kept.read_bytes() == first


SHORT = ("--set", "rounds.count=4")


def test_a_run_whose_devices_all_stay_away_ends_with_1_and_can_be_gone_on_with(
    nursery, config, tmp_path
):
    placed(config, tmp_path)
    change = ("--set", "simulation.dropout=0.99", "--set", "rounds.patience=2")
    ended = nursery.run(tmp_path, "simulate", "tiny.toml", *change)
    assert ended.code == 1
    last = [line for line in ended.err.splitlines() if line][-1]
    assert last.startswith("privet: 0 of 6 rounds of tiny are done, and the last 2 attempts")
    assert "report.html" not in ended.out
    again = nursery.run(tmp_path, "simulate", "runs/tiny", "--resume", "--set", "rounds.patience=1")
    assert again.code == 1
    assert len(read_lines(tmp_path / "runs" / "tiny" / "rounds.jsonl")) == 3


def test_a_run_starts_from_another_runs_adapter_and_its_report_says_what_that_covers(
    nursery, whole
):
    small = ("--set", "name=second", "--set", "rounds.count=1", "--start-from", "tiny")
    ended = nursery.run(whole.folder, "simulate", "tiny.toml", *small)
    assert ended.code == 0, ended.err
    second = whole.folder / "runs" / "second"
    before, after = (json.loads((one / "summary.json").read_text()) for one in (whole.run, second))
    fingerprint = hashlib.sha256(load_file(whole.run / CURRENT)["adapter"].tobytes()).hexdigest()
    assert read(second / "config.toml").adapter.start == fingerprint
    assert read_lines(second / "plans.jsonl")[0]["plan"]["start"] == fingerprint
    assert (after["start"]["sha256"], after["start"]["rounds"]) == (fingerprint, 6)
    assert [line["epsilon"] for line in after["start"]["lines"]] == [
        line["epsilon"] for line in before["privacy"]
    ]
    said = json.loads((second / "privacy.json").read_text())["not_covered"][0]
    assert "no ledger of this simulation adds the two" in said
    assert nursery.run(whole.folder, "simulate", "tiny.toml", "--resume", *small).code == 0
    wrong = (*small, "--set", "adapter.rank=1", "--set", "name=third")
    refused = nursery.run(whole.folder, "simulate", "tiny.toml", *wrong)
    assert "has adapter.rank = 2, and a run that starts from" in one_sentence(refused)
    (second / "start.safetensors").write_bytes(b"cut")
    shutil.rmtree(second / "adapter")
    refused = nursery.run(whole.folder, "simulate", "second", "--resume")
    assert "the adapter that this run starts from, cannot be read" in one_sentence(refused)


@pytest.fixture
def half(whole: Whole, tmp_path: Path) -> Path:
    """A copy of the whole run as it was before its adapter was laid down, for damage."""
    folder = Path(shutil.copytree(whole.folder, tmp_path / "half"))
    run = folder / "runs" / "tiny"
    shutil.rmtree(run / "adapter")
    for name in ("evaluation.json", "summary.json", "privacy.json", "report.html"):
        (run / name).unlink()
    return folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, edit])
def test_a_damaged_checkpoint_is_kept_aside_and_the_previous_one_is_taken_and_said(
    nursery, half, damage
):
    run = half / "runs" / "tiny"
    damage(run / CURRENT)
    bad = (run / CURRENT).read_bytes()
    ended = nursery.run(half, "simulate", "tiny.toml", "--resume")
    assert ended.code == 0, ended.err
    assert "Going on from the previous one" in ended.err
    assert (run / f"{CURRENT}.damaged-1").read_bytes() == bad


@pytest.mark.parametrize("damage", [cut, edit])
def test_two_damaged_checkpoints_end_the_run_with_both_kept(nursery, half, damage):
    run = half / "runs" / "tiny"
    damage(run / CURRENT)
    damage(run / PREVIOUS)
    bad = (run / CURRENT).read_bytes(), (run / PREVIOUS).read_bytes()
    ended = nursery.run(half, "simulate", "tiny.toml", "--resume")
    assert "Restore one of them from a copy" in one_sentence(ended)
    assert ((run / f"{CURRENT}.damaged-1").read_bytes(), (run / PREVIOUS).read_bytes()) == bad


def of_another_run(nursery: Nursery, config: Config, folder: Path, name: str) -> bytes:
    """The same file of a run with the same settings."""
    folder.mkdir()
    placed(config, folder)
    small = ("--set", "rounds.count=1")
    assert nursery.run(folder, "simulate", "tiny.toml", *small).code == 0
    return (folder / "runs" / "tiny" / name).read_bytes()


@pytest.mark.parametrize(
    ("name", "said"),
    [(CURRENT, r"has run 'tiny-"), (LEDGERS, r"belongs to 'tiny-")],
    ids=["checkpoint", "ledger"],
)
def test_a_file_of_another_run_is_refused_and_left(nursery, config, half, tmp_path, name, said):
    other = of_another_run(nursery, config, tmp_path / "other", name)
    (half / "runs" / "tiny" / name).write_bytes(other)
    ended = nursery.run(half, "simulate", "tiny.toml", "--resume")
    assert said in one_sentence(ended)
    assert (half / "runs" / "tiny" / name).read_bytes() == other


def edit_row(path: Path) -> None:
    """One charge made cheaper, as somebody with an editor would."""
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE release SET charges = replace(charges, '\"steps\":1', '\"steps\":2')")


@pytest.mark.parametrize("damage", [cut, edit_row, Path.unlink])
def test_a_damaged_or_missing_ledger_ends_the_run_and_is_left(nursery, half, damage):
    path = half / "runs" / "tiny" / LEDGERS
    (half / "runs" / "tiny" / CURRENT).unlink()  # so that there is a round left to run
    (half / "runs" / "tiny" / PREVIOUS).unlink()
    (half / "runs" / "tiny" / "rounds.jsonl").unlink()
    damage(path)
    before = path.read_bytes() if path.exists() else None
    ended = nursery.run(half, "simulate", "tiny.toml", "--resume")
    said = one_sentence(ended)
    assert "ledgers.sqlite" in said
    assert any(word in said for word in ("damaged", "does not verify", "is missing"))
    assert (path.read_bytes() if path.exists() else None) == before


def emptied(path: Path) -> None:
    """As one that was made anew, or whose journal was left behind."""
    owner = (path.parent / "run-id").read_text().strip()
    path.unlink()
    Ledger.open(path, owner=owner).close()


@pytest.mark.parametrize("command", ["report tiny", "evaluate tiny", "simulate tiny.toml --resume"])
@pytest.mark.parametrize("lose", [Path.unlink, emptied])
def test_no_command_takes_a_lost_ledger_for_a_run_that_spent_nothing(nursery, half, command, lose):
    path = half / "runs" / "tiny" / LEDGERS
    lose(path)
    before = path.read_bytes() if path.exists() else None
    said = one_sentence(nursery.run(half, *command.split()))
    assert "ledgers.sqlite" in said
    assert "is missing" in said or "releases of round 1, in whose sum are" in said
    assert (path.read_bytes() if path.exists() else None) == before
    assert not (half / "runs" / "tiny" / "privacy.json").exists()


# --- no room, no right to write ----------------------------------------------------------------


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[Callable[[str], bool]]:
    """A small file system of its own, where this user may mount one."""
    folder.mkdir(exist_ok=True)

    def mount(*arguments: str) -> bool:
        return subprocess.run(["mount", *arguments], capture_output=True).returncode == 0

    if shutil.which("mount") is None or not mount("-t", "tmpfs", *options, "tmpfs", str(folder)):
        pytest.skip("needs the right to mount a file system")
    try:
        yield lambda change: mount("-o", f"remount,{change}", str(folder))
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_on_a_full_disk_a_run_ends_with_a_sentence_and_goes_on_when_there_is_room(
    nursery, config, whole, tmp_path
):
    with mounted(tmp_path / "disk", "-o", "size=1m") as remount:
        folder = placed(config, tmp_path / "disk")
        filler = folder / "filler"
        for left in (60_000, 130_000, 200_000):
            filler.write_bytes(b"\0" * (1_000_000 - left))
            ended = nursery.run(folder, "simulate", "tiny.toml", "--resume")
            assert "the disk is full" in one_sentence(ended), left
            assert not list((folder / "runs").glob(".*"))
            filler.unlink()
        remount("size=20m")
        ended = nursery.run(folder, "simulate", "tiny.toml", "--resume")
        assert ended.code == 0, ended.err
        assert outcome(folder / "runs" / "tiny") == outcome(whole.run)


@pytest.mark.parametrize("limit", [1_000, 40_000, 80_000])
def test_past_a_limit_of_file_sizes_too(nursery, config, whole, tmp_path, limit):
    placed(config, tmp_path)
    ended = nursery.run(tmp_path, "simulate", "tiny.toml", limit=limit)
    one_sentence(ended)
    ended = nursery.run(tmp_path, "simulate", "tiny.toml", "--resume")
    assert ended.code == 0, ended.err
    assert outcome(tmp_path / "runs" / "tiny") == outcome(whole.run)


def test_a_read_only_run_folder_ends_with_a_sentence_and_nothing_half_written(
    nursery, config, half, whole, tmp_path
):
    with mounted(tmp_path / "disk", "-o", "size=20m") as remount:
        folder = placed(config, tmp_path / "disk")
        shutil.copytree(half / "runs", folder / "runs")
        before = sorted(path.name for path in (folder / "runs" / "tiny").iterdir())
        (tmp_path / "elsewhere").mkdir()
        placed(config, tmp_path / "elsewhere")
        (tmp_path / "elsewhere" / "runs").symlink_to(folder / "runs")
        remount("ro")
        ended = nursery.run(tmp_path / "elsewhere", "simulate", "tiny.toml", "--resume")
        assert "read-only" in one_sentence(ended)
        assert sorted(path.name for path in (folder / "runs" / "tiny").iterdir()) == before
        remount("rw")
        ended = nursery.run(tmp_path / "elsewhere", "simulate", "tiny.toml", "--resume")
        assert ended.code == 0, ended.err
        assert outcome(folder / "runs" / "tiny") == outcome(whole.run)
