"""What a device's supervisor hands to its children: the SuperNode's command, keys, descriptors.

    node = node_spec("fleet.example.org:443", 9094, key=..., certificates=..., secret=...)
    supervise([node, Spec("worker", (sys.executable, ...), takes_down=("supernode",))], stop)

Keys and certificates reach the children as open file descriptors, never as files. How children are
started, watched and ended is in `common/child_processes.py`.
"""

import contextlib
import ctypes
import fcntl
import importlib.util
import os
import signal
import sys
import tempfile
from pathlib import Path

from ...common.child_processes import Spec
from ...common.errors import ConfigError, StateError
from ...common.file_templates import render
from . import connection

__all__ = [
    "as_file_descriptor",
    "descriptor_path",
    "keep_to_itself",
    "node_spec",
    "unit_text",
]

PR_SET_DUMPABLE = 4
NODE = "from privet.client.runtime.supernode import main; main({}, {!r})  # flower-supernode"
"""With the name that a list of processes is searched for."""


def keep_to_itself() -> None:
    """Close this process's memory and descriptors to other processes of the same person (Linux).

    Nor does it dump core. A SuperNode or a browser that somebody has taken over could otherwise
    read the passphrase from them. It ends with the process: each program calls it for itself.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)


def as_file_descriptor(data: bytes) -> int:
    """Return an open descriptor of `data`, for a child that wants a path (`descriptor_path`).

    On Linux the bytes are in sealed memory without a name in any folder; opened through its path
    it starts at its beginning every time. Elsewhere: a file with mode 0600 in a private folder,
    unlinked before this function returns; there a reopened path goes on where the last reader
    stopped, which is why `Children` rewinds. The caller owns the descriptor and closes it.

    **Guarantee**: with sealed memory, nobody can change the bytes, and nothing reaches a disk but
    by swapping.
    """
    if hasattr(os, "memfd_create"):
        with contextlib.suppress(OSError):  # a kernel that lacks it
            descriptor = os.memfd_create("privet", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            _write(descriptor, data)
            seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
            return descriptor
    return _unlinked_file(data)


def descriptor_path(descriptor: int) -> str:
    """Return the path under which a child opens a descriptor it inherits."""
    return f"/dev/fd/{descriptor}"


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    os.lseek(descriptor, 0, os.SEEK_SET)


def _unlinked_file(data: bytes) -> int:
    folder = Path(tempfile.mkdtemp(prefix="privet-", dir=os.environ.get("XDG_RUNTIME_DIR")))
    path = folder / "bytes"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        _write(descriptor, data)
        return descriptor
    finally:
        path.unlink(missing_ok=True)
        folder.rmdir()


def node_spec(
    server: str,
    port: int,
    *,
    key: bytes | None,
    certificates: bytes | None,
    secret: bytes,
    insecure: bool = False,
    home: Path | None = None,
) -> Spec:
    """Describe the installed SuperNode (`supernode.py`) as a child that runs no app itself.

    That is `--isolation process`.

    Args:
        server: the SuperLink's `host:port`.
        port: of its runtime API, on 127.0.0.1, where the worker asks.
        key: the device's node key, an OpenSSH ECDSA private key; None: none.
        certificates: PEM of the CA the server must be signed by; None: the system's.
        secret: random bytes that the worker is given too; see `worker.work`.
        insecure: no TLS; for tests on one machine.
        home: where the connection's state is kept (`client/runtime/connection.py`); None: nowhere.

    Its longest pause is 10 s: for 60 s after a crash of this process too, the SuperLink takes the
    node for alive, and every start ends with Flower's exit code 305 (status 1) until that is over.

    Raises:
        StateError: Flower is not installed.
        ConfigError: key or certificates given together with `insecure`.
    """
    if insecure and (key is not None or certificates is not None):
        raise ConfigError("without TLS a SuperNode takes no key and no certificates: leave them.")
    if importlib.util.find_spec("flwr") is None:
        raise StateError(f"flwr was not found beside {sys.executable}: install privet again.")
    # -P: what lies in the folder this was started from is not imported
    descriptors = [_unlinked_file(b"")]  # the node writes its id there, for the one after it
    command = [sys.executable, "-P", "-c", NODE.format(descriptors[0], home and str(home))]
    command += ["--superlink", server, "--isolation", "process"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    given = {"--superexec-auth-secret-file": secret, "--auth-supernode-private-key": key}
    given["--root-certificates"] = certificates
    for option, data in given.items():
        if data is not None:
            descriptors.append(as_file_descriptor(data))
            command += [option, descriptor_path(descriptors[-1])]
    command += ["--insecure"] if insecure else []
    return Spec(
        "supernode",
        tuple(command),
        env={"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"},
        pass_fds=tuple(descriptors),
        orphaned=signal.SIGKILL,
        longest_s=10.0,
        linger_s=1.5,  # it looks for replies to send every 0.5 s
        why=lambda: _not_reached(home, server),
    )


def _not_reached(home: Path | None, server: str) -> str:
    sentence = "" if home is None else connection.read(home, server).said
    return sentence and f"the server {server} is not reached: {sentence}"


def unit_text(home: Path, executable: Path, *, passphrase: Path | None = None) -> str:
    """Return a systemd user unit that runs `privet client start`.

    Save it in ~/.config/systemd/user/.

    Args:
        home: the device's home, the only folder it may write to beside privet's cache.
        executable: the `privet` command.
        passphrase: file with the vault's passphrase, readable by its owner only; systemd hands it
            over as a credential, `$CREDENTIALS_DIRECTORY/privet-passphrase`. None: the OS keyring.

    Raises:
        ConfigError: a path is not absolute or holds a line break, or the executable's has quotes.
    """
    for path in (home, executable, *([passphrase] if passphrase else [])):
        if not path.is_absolute() or "\n" in str(path):
            raise ConfigError(f"a systemd unit needs absolute paths in one line, got {str(path)!r}")
    if set(str(executable)) & set("\"'\\"):
        raise ConfigError(f"systemd runs no program whose path has quotes, got {str(executable)!r}")
    return render(
        __package__, "privet.service", home=home, executable=executable, passphrase=passphrase
    )
