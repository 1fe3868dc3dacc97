"""common/child_processes.py: real programs are watched, started again, and surely ended."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privet.common import child_processes
from privet.common.child_processes import (
    Children,
    Spec,
    backoff_s,
    below,
    memory_mb,
    stopped_by_signals,
    supervise,
)
from privet.common.errors import ConfigError
from privet.experiments.benchmarks.harness import wait_for

from ..supervised import alive, pids, python, supervised

SLEEP = "import time; time.sleep(600)"
linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux")
FAMILY = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"],
                         start_new_session=True)
open(sys.argv[1], "w").write(str(child.pid))
time.sleep(600)
"""
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);"


def family(processes: Children, folder: Path, program: str = FAMILY) -> int:
    """Start a parent with a child in a session of its own; the child's number."""
    told = folder / "child"
    processes.start(Spec("family", (sys.executable, "-c", program, str(told))))
    wait_for(lambda: told.exists() and told.read_text(), 300, "the child")
    return int(told.read_text())


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_children_and_their_children_are_dead_when_the_block_is_left(tmp_path, error):
    child = 0
    try:
        with Children() as processes:
            child = family(processes, tmp_path)
            assert alive(child)
            if error is not None:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        pass
    wait_for(lambda: not alive(child), 300, "its end")


def test_one_that_does_not_listen_is_killed_with_its_children(tmp_path):
    with Children(grace_s=0.3) as processes:
        child = family(processes, tmp_path, "import signal\n" + DEAF + FAMILY)
    wait_for(lambda: not alive(child), 300, "its end")


def test_killed_means_with_everything_below(tmp_path):
    with Children() as processes:
        child = family(processes, tmp_path)
        processes.kill("family")
        wait_for(lambda: not alive(child), 300, "its end")


def test_a_log_has_what_a_program_said_and_the_one_before_is_kept(tmp_path):
    for word in ("earlier", "now"):
        says = f"print({word!r}); raise SystemExit(3)"
        with Children() as processes:
            log = tmp_path / "logs" / "said.log"
            processes.start(Spec("said", (sys.executable, "-c", says), log=log))
            wait_for(lambda: processes.status("said") is not None, 300, "its end")
            assert processes.status("said") == 3
        assert log.read_text() == f"{word}\n"
    assert Path(f"{log}.1").read_text() == "earlier\n"


def test_memory_is_counted_over_the_whole_family(tmp_path):
    with Children() as processes:
        child = family(processes, tmp_path)
        assert child in [one.pid for one in below(os.getpid())]
        found = processes.memory_mb()
        if sys.platform == "linux":
            assert found is not None
            assert found > (memory_mb([child]) or 0) > 1


def test_a_ctrl_c_while_they_end_kills_what_is_left(tmp_path):
    owner = (
        "import os, signal, sys, threading, time\n"
        "from privet.common.child_processes import Children, Spec\n"
        "deaf = 'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); '"
        "       'open(\\'ready\\', \\'w\\'); time.sleep(600)'\n"
        "with Children(grace_s=600) as children:\n"
        "    children.start(Spec('deaf', (sys.executable, '-c', deaf)))\n"
        "    while not os.path.exists('ready'): time.sleep(0.02)\n"
        "    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", owner], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    assert not alive(pids(done.stdout.replace("supervisor: ", "").splitlines(), "deaf")[0])


def test_sigterm_ends_the_block_as_ctrl_c_does(tmp_path):
    children: list[int] = []

    def told() -> None:
        with stopped_by_signals(), Children() as processes:
            children.append(family(processes, tmp_path))
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        told()
    wait_for(lambda: not alive(children[0]), 300, "its end")
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_child_that_ends_is_started_again_and_every_end_is_told():
    with supervised(python("child", "raise SystemExit(3)")) as lines:
        wait_for(lambda: len(pids(lines, "child")) >= 3, 300, "three starts")
    ends = [line for line in lines if "ended with" in line]
    for number, line in enumerate(ends[:2], 1):  # how long it lived is the machine's
        assert re.match(rf"child ended with status 3 after \d+ s; restart {number} in ", line)
    assert lines[-1] == "all children ended"


def test_the_end_of_a_child_is_told_in_words_where_there_are_some():
    with supervised(python("child", "raise SystemExit(1)", why=lambda: "no server")) as lines:
        wait_for(lambda: len(pids(lines, "child")) >= 2, 60, "two starts")
    ends = [line for line in lines if "; restart" in line]
    assert ends[0].startswith("child ended: no server; restart 1 in ")


def test_a_child_that_lived_long_starts_with_the_shortest_pause_again(monkeypatch):
    monkeypatch.setattr(child_processes, "LIVED_S", 0.3)
    with supervised(python("child", "import time; time.sleep(0.4)")) as lines:
        wait_for(lambda: len(pids(lines, "child")) >= 3, 300, "three starts")
    assert not [line for line in lines if "restart 2" in line]


def test_a_program_that_does_not_exist_is_tried_again():
    with supervised(Spec("ghost", ("/does/not/exist",))) as lines:
        wait_for(lambda: len(lines) >= 2, 300, "two attempts")
    assert "ghost could not be started (No such file or directory)" in lines[0]


@given(st.integers(1, 10_000), st.floats(1, 60))
def test_pauses_double_up_to_the_longest_and_differ_between_devices(failures, longest):
    pauses = [backoff_s(failures, longest) for _ in range(8)]
    full = min(longest, 2.0 ** min(failures - 1, 10))
    assert all(full / 2 <= pause <= full for pause in pauses)
    assert len(set(pauses)) > 1


def test_children_end_in_the_reverse_order_of_their_start(tmp_path):
    code = (
        "import signal, sys, time, pathlib\n"
        "def end(*_):\n"
        "    time.sleep(0.2)\n"
        f"    open({str(tmp_path / 'ends')!r}, 'a').write(sys.argv[1])\n"
        "    raise SystemExit\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "pathlib.Path(sys.argv[2], sys.argv[1]).touch()\n"
        "time.sleep(600)\n"
    )
    command = (sys.executable, "-c", code)
    specs = [Spec(name, (*command, name, str(tmp_path))) for name in "ab"]
    with supervised(*specs):
        wait_for(lambda: (tmp_path / "a").exists() and (tmp_path / "b").exists(), 300, "both")
    assert (tmp_path / "ends").read_text() == "ba"


def test_a_child_deaf_to_sigterm_is_killed_after_the_grace(tmp_path):
    ready = tmp_path / "ready"
    code = (
        "import pathlib, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        f"pathlib.Path({str(ready)!r}).touch(); time.sleep(600)"
    )
    with supervised(python("deaf", code), grace_s=0.3) as lines:
        wait_for(ready.exists, 300, "the child")
    assert not alive(pids(lines, "deaf")[0])


@contextlib.contextmanager
def supervising(stop: str) -> Iterator[tuple["subprocess.Popen[str]", int]]:
    """A process that supervises one sleeping child until `stop`, and the child's number."""
    code = (
        "import threading;"
        "from privet.common.child_processes import Spec, stop_on_signals, supervise;"
        f"supervise([Spec('child', ({sys.executable!r}, '-c', {SLEEP!r}))], {stop})"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        yield parent, int(parent.stdout.readline().rpartition(" ")[2])


@linux
def test_children_die_with_a_supervisor_that_is_killed():
    with supervising("threading.Event()") as (parent, child):
        assert alive(child)
        parent.kill()
    wait_for(lambda: not alive(child), 300, "the child's end")


@linux
def test_without_the_tie_a_child_would_outlive_its_supervisor():
    code = (
        "import subprocess, sys, time;"
        f"print(subprocess.Popen([sys.executable, '-c', {SLEEP!r}]).pid, flush=True);"
        "time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
    time.sleep(0.3)
    assert alive(child)
    os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_children_and_supervisor_cleanly(sent):
    with supervising("stop_on_signals()") as (parent, child):
        parent.send_signal(sent)
        assert parent.wait(300) == 0
        assert parent.stdout is not None
        assert parent.stdout.read().splitlines()[-1] == "supervisor: all children ended"
    assert not alive(child)


@pytest.mark.parametrize("status", [1, 0])
def test_a_child_that_dies_takes_down_the_one_that_would_wait_for_it(status, tmp_path):
    flag = tmp_path / "flag"
    once = (
        f"import pathlib, time; flag = pathlib.Path({str(flag)!r}); seen = flag.exists();"
        f"flag.touch(); time.sleep(600 if seen else 0.3); raise SystemExit({status})"
    )
    worker = python("worker", once, takes_down=("supernode",))
    with supervised(python("supernode", SLEEP), worker) as lines:
        wait_for(lambda: len(pids(lines, "worker")) == 2, 300, "the second worker")
        if status:
            wait_for(lambda: len(pids(lines, "supernode")) == 2, 300, "the second node")
        nodes = [alive(pid) for pid in pids(lines, "supernode")]
    assert nodes == ([False, True] if status else [True])
    assert ("supernode is restarted with worker" in lines) == bool(status)


@linux
def test_children_neither_dump_core_nor_see_the_passphrase(monkeypatch, tmp_path):
    monkeypatch.setenv("PRIVET_PASSPHRASE", "hunter2")
    code = (
        "import os, resource, pathlib, time;"
        f"path = pathlib.Path({str(tmp_path / 'seen')!r});"
        "path.with_suffix('.new').write_text(repr((resource.getrlimit(resource.RLIMIT_CORE),"
        "'PRIVET_PASSPHRASE' in os.environ))); path.with_suffix('.new').rename(path);"
        "time.sleep(600)"
    )
    with supervised(python("child", code)):
        wait_for((tmp_path / "seen").exists, 300, "the child")
    assert (tmp_path / "seen").read_text() == "((0, 0), False)"
    assert "hunter2" not in repr(Spec("child", ("true",), env={"A": "hunter2"}))


@pytest.mark.parametrize(
    "specs",
    [
        [Spec("a", ("true",)), Spec("a", ("true",))],
        [Spec("a", ("true",), takes_down=("b",))],
    ],
    ids=["one name twice", "a stranger"],
)
def test_children_that_contradict_each_other_are_refused(specs):
    with pytest.raises(ConfigError, match="children need names"):
        supervise(specs, threading.Event())
