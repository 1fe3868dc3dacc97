"""client/runtime/supervisor.py: real child processes, short pauses."""

import contextlib
import datetime
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privet.client.runtime import supervisor
from privet.client.runtime.supervisor import (
    Spec,
    as_file_descriptor,
    backoff_s,
    descriptor_path,
    node_spec,
    supervise,
    unit_text,
)
from privet.common.errors import ConfigError, StateError
from privet.experiments.benchmarks.worker_start import free_port, listening, wait_for

SLEEP = "import time; time.sleep(600)"
linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux")


def python(name: str, code: str, **options: Any) -> Spec:
    return Spec(name, (sys.executable, "-c", code), **options)


@contextlib.contextmanager
def supervised(*specs: Spec, **options: Any) -> Iterator[list[str]]:
    """Runs the supervisor in a thread; gives its lines."""
    stop, lines = threading.Event(), list[str]()
    options = {"say": lines.append, "backoff": lambda *_: 0.05, "grace_s": 120.0} | options
    thread = threading.Thread(target=supervise, args=(specs, stop), kwargs=options)
    thread.start()
    try:
        yield lines
    finally:
        stop.set()
        thread.join(300)
        assert not thread.is_alive()


def pids(lines: list[str], name: str) -> list[int]:
    started = [line for line in lines if line.startswith(f"{name} started")]
    return [int(line.rpartition(" ")[2]) for line in started]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def read(descriptor: int) -> bytes:
    return Path(descriptor_path(descriptor)).read_bytes()


@pytest.mark.parametrize("size", [0, 5, 1 << 20])
def test_a_descriptor_gives_all_its_bytes_to_every_reader(size):
    data = os.urandom(size)
    descriptor = as_file_descriptor(data)
    assert [read(descriptor), read(descriptor)] == [data, data]
    assert not os.get_inheritable(descriptor)
    os.close(descriptor)


def test_nobody_can_change_the_bytes_of_a_descriptor():
    descriptor = as_file_descriptor(b"key")
    for change in (lambda: os.write(descriptor, b"KEY"), lambda: os.ftruncate(descriptor, 0)):
        with pytest.raises(PermissionError):
            change()
    os.close(descriptor)


def test_without_memory_files_the_bytes_are_in_a_file_that_has_no_name(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delattr(os, "memfd_create")
    descriptor = as_file_descriptor(b"key")
    assert (read(descriptor), list(tmp_path.iterdir())) == (b"key", [])
    assert os.fstat(descriptor).st_mode & 0o777 == 0o600
    os.close(descriptor)


def test_a_child_reads_its_descriptors_at_every_start():
    descriptor = as_file_descriptor(b"the node's key")
    code = f"import os; print(os.read({descriptor}, 99).decode(), flush=True)"  # a shared offset
    os.read(descriptor, 99)
    into, out = os.pipe()
    spec = python("reader", f"import os; os.dup2({out}, 1); {code}", pass_fds=(descriptor, out))
    with supervised(spec), os.fdopen(into) as lines:
        assert [lines.readline() for _ in range(3)] == ["the node's key\n"] * 3
        os.close(out)
    os.close(descriptor)


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
    monkeypatch.setattr(supervisor, "LIVED_S", 0.3)
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


@linux
def test_children_die_with_a_supervisor_that_is_killed():
    code = (
        "import threading; from privet.client.runtime.supervisor import Spec, supervise;"
        f"supervise([Spec('child', ({sys.executable!r}, '-c', {SLEEP!r}))], threading.Event())"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline().rpartition(" ")[2])
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
    code = (
        "from privet.client.runtime.supervisor import Spec, stop_on_signals, supervise;"
        f"supervise([Spec('child', ({sys.executable!r}, '-c', {SLEEP!r}))], stop_on_signals())"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline().rpartition(" ")[2])
        parent.send_signal(sent)
        assert parent.wait(300) == 0
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


def node_key() -> bytes:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP384R1()).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )


def authority() -> bytes:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, name = ec.generate_private_key(ec.SECP384R1()), x509.Name([])
    day = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, day, day.replace(year=2036))
    return made.sign(key, hashes.SHA384()).public_bytes(serialization.Encoding.PEM)


@linux
def test_flowers_supernode_reads_key_authority_and_secret_from_memory_at_every_start(capfd):
    port = free_port()
    key, server = node_key(), f"127.0.0.1:{free_port()}"
    spec = node_spec(server, port, key=key, certificates=authority(), secret=b"s" * 32)
    shown = " ".join(spec.command)
    assert key.decode().splitlines()[1] not in shown
    assert shown.count("/dev/fd/") == 3
    assert len(spec.pass_fds) == 4  # and the place of the node before
    with supervised(spec) as lines:
        for start in (1, 2):
            wait_for(lambda: listening(f"127.0.0.1:{port}"), 300, "the runtime API")
            running = pids(lines, "supernode")
            assert len(running) == start
            if start == 1:
                os.kill(running[0], signal.SIGKILL)
                wait_for(lambda: len(pids(lines, "supernode")) == 2, 300, "the second start")
    assert "Exit Code" not in "".join(capfd.readouterr())
    for descriptor in spec.pass_fds:
        os.close(descriptor)


@linux
def test_a_key_that_is_none_ends_flowers_supernode_so_it_was_read():
    spec = node_spec("127.0.0.1:1", free_port(), key=b"no key", certificates=None, secret=b"s")
    done = subprocess.run(
        spec.command, env=spec.env, pass_fds=spec.pass_fds, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "Exit Code: 302" in done.stdout + done.stderr
    for descriptor in spec.pass_fds:
        os.close(descriptor)


def test_without_tls_a_node_takes_no_key():
    with pytest.raises(ConfigError, match="takes no key"):
        node_spec("a:1", 2, key=b"key", certificates=None, secret=b"s", insecure=True)


def test_a_device_without_flower_is_told_so(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(StateError, match="flwr was not found"):
        node_spec("a:1", 2, key=None, certificates=None, secret=b"s")


def verified(text: str, folder: Path) -> str:
    """What `systemd-analyze` has to say about a unit."""
    folder.mkdir(exist_ok=True)
    unit = folder / "privet.service"
    unit.write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "--user", "--man=no", "verify", str(unit)],
        env=os.environ | {"XDG_RUNTIME_DIR": str(folder)},
        capture_output=True,
        text=True,
    )
    # Units of the machine's own are not ours to judge.
    return "\n".join(line for line in done.stderr.splitlines() if "privet" in line)


def executable(folder: Path) -> Path:
    folder.mkdir(parents=True)
    program = folder / "privet"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    return program


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd")
@pytest.mark.parametrize("name", ["plain", "two words", "100% $HOME \"quoted\" 'too' \\n"])
def test_systemd_accepts_the_unit_whatever_the_paths_are_called(name, tmp_path):
    program = executable(tmp_path / "".join(one for one in name if one not in "\"'\\"))
    text = unit_text(tmp_path / name / "home", program, passphrase=tmp_path / "pass phrase")
    assert verified(text, tmp_path / "unit") == ""
    faulty = text.replace("Restart=always", "Restart=allways")
    assert "privet.service" in verified(faulty, tmp_path / "unit")
    if name == "two words":
        unquoted = text.replace(f'"{program}"', str(program))
        assert "privet.service" in verified(unquoted, tmp_path / "unit")


def test_the_unit_keeps_the_device_to_its_home(tmp_path):
    text = unit_text(tmp_path, Path("/usr/bin/privet"))
    for line in ("NoNewPrivileges=yes", "ProtectSystem=strict", "LimitCORE=0", "Restart=always"):
        assert line in text.splitlines()
    assert f'ReadWritePaths="{tmp_path}" -%C/privet' in text
    assert "LoadCredential" not in text
    with pytest.raises(ConfigError, match="absolute"):
        unit_text(Path("home"), Path("/usr/bin/privet"))
    with pytest.raises(ConfigError, match="quotes"):
        unit_text(tmp_path, Path('/opt/"quoted"/privet'))
    with pytest.raises(ConfigError, match="one line"):
        unit_text(Path("/a\n[Service]"), Path("/usr/bin/privet"))


@pytest.mark.skipif(sys.platform != "linux", reason="Linux has the switch")
def test_a_process_that_keeps_to_itself_is_closed_to_others_and_opens_its_own_descriptors():
    code = (
        "import ctypes, os\n"
        "from privet.client.runtime.supervisor import as_file_descriptor\n"
        "from privet.client.runtime.supervisor import descriptor_path, keep_to_itself\n"
        "secret, ask = as_file_descriptor(b'own words'), ctypes.CDLL(None).prctl\n"
        "before = ask(3, 0, 0, 0, 0)  # PR_GET_DUMPABLE\n"
        "keep_to_itself()\n"
        "print(before, ask(3, 0, 0, 0, 0), open(descriptor_path(secret)).read())\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == "1 0 own words\n"
