"""client/runtime/supervisor.py: real child processes, short pauses."""

import datetime
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from privet.client.runtime.processes import free_port
from privet.client.runtime.supervisor import (
    as_file_descriptor,
    descriptor_path,
    node_spec,
    unit_text,
)
from privet.common.errors import ConfigError, StateError
from privet.experiments.benchmarks.harness import listening, wait_for

from ...supervised import pids, python, supervised

SLEEP = "import time; time.sleep(600)"
linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux")


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
