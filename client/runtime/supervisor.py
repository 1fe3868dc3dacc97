"""The supervisor of a device's processes: the stock SuperNode, and privet's worker beside it.

    node = node_spec("fleet.example.org:443", 9094, key=..., certificates=..., secret=...)
    supervise([node, Spec("worker", (sys.executable, ...), takes_down=("supernode",))], stop)

A child that ends is started again after a pause that doubles. Keys and certificates reach the
children as open file descriptors, never as files.
"""

import contextlib
import ctypes
import fcntl
import importlib.util
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...common.errors import ConfigError, StateError
from . import connection

__all__ = [
    "Spec",
    "as_file_descriptor",
    "backoff_s",
    "descriptor_path",
    "keep_to_itself",
    "node_spec",
    "stop_on_signals",
    "supervise",
    "unit_text",
]

LIVED_S = 60.0  # a child that lived so long starts afresh with the shortest pause
GRACE_S = 20.0
TICK_S = 0.1
PR_SET_PDEATHSIG, PR_SET_DUMPABLE = 1, 4
NODE = "from privet.client.runtime.supernode import main; main({}, {!r})  # flower-supernode"
"""With the name that a list of processes is searched for."""

Say = Callable[[str], None]


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # a log on a full disk stops nobody
        print(f"supervisor: {line}", flush=True)


@dataclass(frozen=True)
class Spec:
    """One child process: how it is started, restarted and ended.

    Attributes:
        name: as in the lines that are printed.
        command: program and arguments; visible to everybody on the machine, so never a secret.
        env: its whole environment; None: this process's without privet's own variables.
        pass_fds: descriptors it inherits under the same numbers, rewound before each start.
        takes_down: children to restart when this one dies (ends with another status than 0). A
            SuperNode whose worker died in the middle of a reply waits for the rest without an end.
        longest_s: the longest pause before a restart, seconds.
        linger_s: at the end, seconds between the end of the children after it and its own.
        why: asked when it has ended: what its owner is told of it; "" where its status says more.
    """

    name: str
    command: tuple[str, ...]
    env: Mapping[str, str] | None = field(default=None, repr=False)
    pass_fds: tuple[int, ...] = ()
    takes_down: tuple[str, ...] = ()
    longest_s: float = 60.0
    linger_s: float = 0.0
    why: Callable[[], str] = field(default=lambda: "", repr=False, compare=False)


@dataclass
class _Child:
    spec: Spec
    process: "subprocess.Popen[bytes] | None" = None
    began: float = 0.0
    due: float = 0.0
    failures: int = 0


def supervise(
    specs: Sequence[Spec],
    stop: threading.Event,
    *,
    say: Say = _say,
    grace_s: float = GRACE_S,
    backoff: Callable[[int, float], float] | None = None,
) -> None:
    """Start every child, restart those that end, and end them all when `stop` is set.

    It never gives up, and says so with every restart. The end comes in the reverse order of
    `specs`: SIGTERM, and SIGKILL after `grace_s` seconds. On Linux the children are killed when
    this process dies, however it dies; elsewhere they outlive a SIGKILL of it. No child dumps
    core: a core file holds records and keys.

    Call it from the main thread: Linux ties the children to the thread that started them.

    Args:
        specs: in the order of their start.
        stop: see `stop_on_signals`.
        say: gets one line per event, without private data.
        backoff: (failures in a row, longest) -> seconds; by default `backoff_s`.

    Raises:
        ConfigError: two children with one name, or one that takes down a stranger.
    """
    names = [spec.name for spec in specs]
    strangers = {name for spec in specs for name in spec.takes_down} - set(names)
    if len(set(names)) < len(names) or strangers:
        raise ConfigError(
            f"children need names of their own and may take down only each other, got {names} "
            f"and {sorted(strangers)}."
        )
    children = {spec.name: _Child(spec) for spec in specs}
    try:
        while not stop.is_set():
            for child in children.values():
                _tend(child, children, say, grace_s, backoff or backoff_s)
            stop.wait(TICK_S)
    finally:
        for child in reversed(children.values()):
            if child.process is not None and child.process.poll() is None:
                time.sleep(child.spec.linger_s)
            _end(child, grace_s)
        say("all children ended")


def backoff_s(failures: int, longest_s: float = 60.0) -> float:
    """Return the pause before a restart, which doubles with each failure in a row.

    After `failures` (at least 1) it is 1, 2, 4 s ... `longest_s`.

    Of each pause a random half to whole is taken, so that devices do not come back together.
    """
    return min(longest_s, float(2 ** min(failures - 1, 10))) * random.uniform(0.5, 1.0)


def stop_on_signals() -> threading.Event:
    """Return an event that SIGTERM and SIGINT set.

    Call it once, in the main thread.
    """
    stop = threading.Event()

    def asked(*_: object) -> None:
        # Not `stop.set()` here: the main thread may be inside `stop.wait`, holding its lock.
        threading.Thread(target=stop.set, daemon=True).start()

    signal.signal(signal.SIGTERM, asked)
    signal.signal(signal.SIGINT, asked)
    return stop


def keep_to_itself() -> None:
    """Close this process's memory and descriptors to other processes of the same person (Linux).

    Nor does it dump core. A SuperNode or a browser that somebody has taken over could otherwise
    read the passphrase from them. It ends with the process: each program calls it for itself.
    """
    libc = _libc()
    if libc is not None:
        libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)


def _tend(
    child: _Child,
    children: dict[str, _Child],
    say: Say,
    grace_s: float,
    backoff: Callable[[int, float], float],
) -> None:
    """Start a child that is due, or handle the end of one that ran."""
    now = time.monotonic()
    if child.process is None:
        if now >= child.due:
            _start(child, say, backoff)
        return
    status = child.process.poll()
    if status is None:
        return
    lived = now - child.began
    child.process = None
    child.failures = 1 if lived >= LIVED_S else child.failures + 1
    pause = backoff(child.failures, child.spec.longest_s)
    child.due = now + pause
    how = f"signal {-status}" if status < 0 else f"status {status}"
    why = child.spec.why() if status > 0 else ""
    ended = f"ended: {why}" if why else f"ended with {how} after {lived:.0f} s"
    say(f"{child.spec.name} {ended}; restart {child.failures} in {pause:.1f} s")
    for name in child.spec.takes_down if status else ():
        if children[name].process is not None:
            say(f"{name} is restarted with {child.spec.name}")
            _end(children[name], grace_s)
            children[name].process, children[name].due = None, 0.0


def _start(child: _Child, say: Say, backoff: Callable[[int, float], float]) -> None:
    spec, parent, libc = child.spec, os.getpid(), _libc()
    for descriptor in spec.pass_fds:
        with contextlib.suppress(OSError):  # a pipe has no start to go back to
            os.lseek(descriptor, 0, os.SEEK_SET)

    def before() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if libc is not None:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != parent:  # it died before the line above
                os._exit(1)

    child.began = time.monotonic()
    try:
        child.process = subprocess.Popen(
            spec.command,
            env=dict(_environment() if spec.env is None else spec.env),
            pass_fds=spec.pass_fds,
            stdin=subprocess.DEVNULL,
            process_group=0,  # Ctrl-C is for this process: the children end in their order
            preexec_fn=before,
        )
    except OSError as error:
        child.failures += 1
        pause = backoff(child.failures, spec.longest_s)
        child.due = child.began + pause
        say(f"{spec.name} could not be started ({error.strerror}); again in {pause:.1f} s")
        return
    say(f"{spec.name} started, process {child.process.pid}")


def _end(child: _Child, grace_s: float) -> None:
    """End a child with SIGTERM, and its whole group with SIGKILL if it does not listen."""
    if child.process is None:
        return
    child.process.terminate()
    try:
        child.process.wait(grace_s)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.process.pid, signal.SIGKILL)
        child.process.wait()


def _libc() -> "ctypes.CDLL | None":
    return ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def _environment() -> dict[str, str]:
    """Return this process's environment without what is meant for privet alone (a passphrase)."""
    private = ("PRIVET_PASS", "CREDENTIALS_DIRECTORY")
    return {name: value for name, value in os.environ.items() if not name.startswith(private)}


def as_file_descriptor(data: bytes) -> int:
    """Return an open descriptor of `data`, for a child that wants a path (`descriptor_path`).

    On Linux the bytes are in sealed memory without a name in any folder; opened through its path
    it starts at its beginning every time. Elsewhere: a file with mode 0600 in a private folder,
    unlinked before this function returns; there a reopened path goes on where the last reader
    stopped, which is why `supervise` rewinds. The caller owns the descriptor and closes it.

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
    extra: tuple[str, ...] = (),
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
        extra: more arguments of `flower-supernode`.
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
    command += ["--insecure", *extra] if insecure else extra
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    return Spec(
        "supernode",
        tuple(command),
        env=_environment() | quiet,
        pass_fds=tuple(descriptors),
        longest_s=10.0,
        linger_s=1.5,  # it looks for replies to send every 0.5 s
        why=lambda: _not_reached(home, server),
    )


def _not_reached(home: Path | None, server: str) -> str:
    said = "" if home is None else connection.read(home, server).said
    return said and f"the server {server} is not reached: {said}"


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
    # Variables are replaced in arguments only, never in the program's own path.
    command = f"{_quoted(executable)} client start --home {_quoted(home, '$')}"
    credential = ""
    if passphrase is not None:
        credential = f"LoadCredential=privet-passphrase:{str(passphrase).replace('%', '%%')}\n"
    return f"""[Unit]
Description=privet: federated personalisation on this device
StartLimitIntervalSec=0

[Service]
ExecStart={command}
{credential}Restart=always
RestartSec=10
# SIGTERM goes to the supervisor alone, which ends its children in their order.
KillMode=mixed
TimeoutStopSec=60
Environment=FLWR_HOME=%t/privet
RuntimeDirectory=privet
UMask=0077
NoNewPrivileges=yes
# A user's own service manager needs a user namespace for the read-only file system.
PrivateUsers=yes
ProtectSystem=strict
ProtectHome=read-only
PrivateTmp=yes
ReadWritePaths={_quoted(home)} -%C/privet
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
LockPersonality=yes
RestrictRealtime=yes
# Records and keys must not reach the disk in a core file or in swap.
LimitCORE=0
MemorySwapMax=0
MemoryMax=2G
Nice=10
IOSchedulingClass=idle

[Install]
WantedBy=default.target
"""


def _quoted(path: Path, *doubled: str) -> str:
    """Quote a path for systemd: quotes and backslashes escaped, specifiers doubled."""
    text = str(path).replace("\\", "\\\\").replace('"', '\\"')
    for sign in ("%", *doubled):
        text = text.replace(sign, sign * 2)
    return f'"{text}"'
