"""experiments/demo/child_processes.py: what was started ends, however the block is left."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from privet.common.errors import StateError
from privet.experiments.demo.child_processes import (
    Processes,
    below,
    call,
    memory_mb,
    privet,
    stopped_by_signals,
)

FAMILY = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"],
                         start_new_session=True)
open(sys.argv[1], "w").write(str(child.pid))
time.sleep(600)
"""
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);"


def alive(pid: int) -> bool:
    listed = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return bool(listed.stdout.strip()) and not listed.stdout.strip().startswith("Z")


def until(true: Callable[[], object]) -> None:
    limit = time.monotonic() + 300
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.02)


def family(processes: Processes, folder: Path, program: str = FAMILY) -> int:
    """Start a parent with a child in a session of its own; the child's number."""
    told = folder / "child"
    processes.start("family", [sys.executable, "-c", program, str(told)])
    until(lambda: told.exists() and told.read_text())
    return int(told.read_text())


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_children_and_their_children_are_dead_when_the_block_is_left(tmp_path, error):
    child = 0
    try:
        with Processes(tmp_path) as processes:
            child = family(processes, tmp_path)
            assert alive(child)
            if error is not None:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        pass
    until(lambda: not alive(child))


def test_one_that_does_not_listen_is_killed_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr("privet.experiments.demo.child_processes.GRACE_S", 0.3)
    with Processes(tmp_path) as processes:
        child = family(processes, tmp_path, "import signal\n" + DEAF + FAMILY)
    until(lambda: not alive(child))


def test_killed_means_with_everything_below(tmp_path):
    with Processes(tmp_path) as processes:
        child = family(processes, tmp_path)
        processes.kill("family")
        until(lambda: not alive(child))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children")
def test_programs_end_with_a_process_that_is_killed(tmp_path):
    owner = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from privet.experiments.demo.child_processes import Processes\n"
        "processes = Processes(Path(sys.argv[1]))\n"
        "processes.start('one', [sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(processes._running['one'].pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    command = [sys.executable, "-c", owner, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        child = int(running.stdout.readline())
        running.kill()
    until(lambda: not alive(child))


def test_a_log_has_what_a_program_said_and_its_end_is_seen(tmp_path):
    with Processes(tmp_path) as processes:
        processes.start("said", [sys.executable, "-c", "print('hello'); raise SystemExit(3)"])
        until(lambda: processes.code("said") is not None)
        assert processes.code("said") == 3
        assert processes.log("said").read_text() == "hello\n"


def test_memory_is_counted_over_the_whole_family(tmp_path):
    with Processes(tmp_path) as processes:
        child = family(processes, tmp_path)
        assert below(os.getpid())[-1] == child or child in below(os.getpid())
        found = processes.memory_mb()
        if sys.platform == "linux":
            assert found is not None
            assert found > (memory_mb([child]) or 0) > 1


def test_a_second_ctrl_c_does_not_leave_half_of_them_running(tmp_path):
    owner = (
        "import os, signal, sys, threading, time\n"
        "from pathlib import Path\n"
        "from privet.experiments.demo.child_processes import Processes\n"
        "slow = 'import signal, time; '"
        "       'signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), exit())); '"
        "       'print(1, flush=True); time.sleep(600)'\n"
        "with Processes(Path(sys.argv[1])) as processes:\n"
        "    processes.start('slow', [sys.executable, '-c', slow])\n"
        "    while not processes.log('slow').read_text(): time.sleep(0.02)\n"
        "    print(processes._running['slow'].pid, flush=True)\n"
        "    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
    )
    command = [sys.executable, "-c", owner, str(tmp_path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    assert not alive(int(done.stdout))
    assert done.returncode == 0


def test_a_command_gives_what_it_prints_and_its_refusal_in_its_own_words(tmp_path):
    assert call("--version").startswith("privet ")
    with pytest.raises(StateError, match="privet client status: there is no home in"):
        call("client", "status", "--home", tmp_path / "none")
    assert privet("report")[0] == sys.executable


def test_sigterm_ends_the_block_as_ctrl_c_does(tmp_path):
    children: list[int] = []

    def told() -> None:
        with stopped_by_signals(), Processes(tmp_path) as processes:
            children.append(family(processes, tmp_path))
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        told()
    until(lambda: not alive(children[0]))
    assert signal.getsignal(signal.SIGTERM) == before
