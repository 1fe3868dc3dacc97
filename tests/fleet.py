"""A server and devices on loopback, each process its own, over TLS with registered node keys.

Between each device and the SuperLink stands a `Wire` of the test's own that can be cut or stalled.
A run's contributions are repeatable (`insecure_test_seed`), so what the server did can be
recomputed: see `retrace`.
"""

import ctypes
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from privet.client.consent import policy as policies
from privet.client.consent.policy_settings import Policy
from privet.client.enrolled import join
from privet.client.import_texts import watched_folders
from privet.client.store import key_file as unlock_module
from privet.client.store.device_store import POLICY, DeviceStore
from privet.client.store.key_file import Passphrase
from privet.common.errors import StateError
from privet.common.files import write_atomic
from privet.common.settings.config import Config, parse, to_toml
from privet.server.operations import control, enrolment, setup
from privet.server.operations.server_folder import Server

from .tiny import WORDS

ENTRY = "import sys; sys.argv[0] = 'privet'; from privet.commands import main; main()"
UP = (
    "import sys; from pathlib import Path\n"
    "from privet.common.child_processes import stop_on_signals, supervise\n"
    "from privet.server.operations import commands, services, setup\n"
    "programs = services.programs(setup.load(Path(sys.argv[1])), Path('/bin/false'))\n"
    "programs = [program for program in programs if program.name != 'proxy']\n"
    "supervise(programs, stop_on_signals(), say=commands.say)"
)
PASSPHRASE = "own"
NOISE = 16.0
"""So much that the homes of one fleet can take part in a hundred rounds with a finite epsilon."""
OWNER: dict[str, dict[str, Any]] = {
    "budget": {"client": 1e5, "example": 1e5},
    "limits": {"min_cohort": 3, "colluding": 0.0, "min_example_noise": 0.0},
    "when": {"max_load": 1000.0},
    "resources": {"nice": 0},
    "consent": {"ask": False},
}


def until(true: Callable[[], Any], seconds: float = 300.0, what: str = "it") -> Any:
    """What `true` gives once it gives something."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        if found := true():
            return found
        time.sleep(0.05)
    raise AssertionError(f"waited {seconds:g} s for {what}")


def ends_with_the_tests() -> None:
    """In a child before it begins: SIGTERM when the tests are gone, however they went (Linux)."""
    with suppress(OSError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on now."""
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def answers(port: int) -> bool:
    """Whether somebody listens there."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


CLOCK = Path(__file__).parent / "clock"


class Clock:
    """The wall clock of some processes, right until it jumps; see `clock/sitecustomize.py`."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.jump(0.0)

    @property
    def env(self) -> dict[str, str]:
        """What a process is started with whose clock this is."""
        before = os.environ.get("PYTHONPATH")
        path = os.pathsep.join([str(CLOCK), *([before] if before else [])])
        return {**os.environ, "PYTHONPATH": path, "TEST_CLOCK": str(self._file)}

    def jump(self, seconds: float) -> None:
        """It is ahead of the right one by so much from now on; negative: behind."""
        write_atomic(self._file, str(seconds).encode())


class Wire:
    """Carries bytes between a port of its own and another one, or does not.

    `cut`: what is open breaks, what is new is refused. `stall`: nothing breaks and nothing passes.
    """

    def __init__(self, target: int) -> None:
        self._target, self.port = target, free_ports(1)[0]
        self._flows = threading.Event()
        self._listener: socket.socket | None = None
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self.resume()

    def resume(self) -> None:
        """Bytes pass again."""
        self._flows.set()
        if self._listener is None:
            self._listener = socket.create_server(("127.0.0.1", self.port))
            threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def stall(self) -> None:
        """No byte passes; nobody is told."""
        self._flows.clear()

    def cut(self) -> None:
        """Every connection breaks, and none can be made."""
        listener, self._listener = self._listener, None
        if listener is not None:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        self._flows.set()
        with self._lock:
            for one in self._open:
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near = listener.accept()[0]
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:  # nobody there: a reset, as a proxy's refusal, not the end of a stream
                near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                near.close()
                continue
            with self._lock:
                self._open |= {near, far}
            left = threading.Semaphore(0)
            for pair in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=(*pair, left), daemon=True).start()
            threading.Thread(target=self._close, args=(near, far, left), daemon=True).start()

    def _carry(self, given: socket.socket, to: socket.socket, left: threading.Semaphore) -> None:
        with suppress(OSError):
            while data := given.recv(65536):
                self._flows.wait()
                to.sendall(data)
        with suppress(OSError):
            to.shutdown(socket.SHUT_RDWR)
        left.release()

    def _close(self, near: socket.socket, far: socket.socket, left: threading.Semaphore) -> None:
        left.acquire()
        left.acquire()
        with self._lock:
            self._open -= {near, far}
        near.close()
        far.close()


def command_line(pid: int) -> str:
    """Of a process; empty for one that is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def children(pid: int) -> list[int]:
    """The processes a process has started itself."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(one) for task in tasks for one in (task / "children").read_text().split()]
    except OSError:
        return []


@dataclass
class Person:
    """One device: its home, its wire, and the process that `privet client start` is."""

    number: int
    home: Path
    wire: Wire
    log: Path
    clock: Clock
    process: "subprocess.Popen[bytes] | None" = None

    def start(self) -> None:
        """`privet client start`."""
        command = [sys.executable, "-c", ENTRY, "client", "start", "--home", str(self.home)]
        command += ["--passphrase-file", str(self.home.parent / "pass")]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.clock.env,
                start_new_session=True,
                preexec_fn=ends_with_the_tests,
            )

    def stop(self) -> None:
        """As Ctrl-C does; the children end with it."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait(60)
            self.process = None

    def pid(self, words: str) -> int | None:
        """Of the SuperNode ("flower-supernode") or the worker ("client work")."""
        if self.process is None:
            return None
        found = children(self.process.pid)
        return next((pid for pid in found if words in command_line(pid)), None)

    def open(self) -> DeviceStore:
        """The home, also while its worker runs."""
        return DeviceStore.open(self.home, Passphrase(PASSPHRASE))


@dataclass
class Fleet:
    """A server's folder, its supervisor, and the devices."""

    folder: Path
    server: Server
    people: list[Person]
    base: Path
    clock: Clock
    supervisor: "subprocess.Popen[bytes] | None" = None
    runs: list["subprocess.Popen[str]"] = field(default_factory=list)

    def start_server(self) -> None:
        """SuperLink and SuperExec, as `privet server up` runs them, without the proxy."""
        with open(self.folder / "up.log", "ab") as log:
            self.supervisor = subprocess.Popen(
                [sys.executable, "-c", UP, str(self.server.folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.clock.env,
                start_new_session=True,
                preexec_fn=ends_with_the_tests,
            )
        until(lambda: answers(self.server.inner_port), 60, "the SuperLink")

    def pid(self, target: str) -> int | None:
        """Of `superlink`, `superexec` or `serverapp`."""
        if target == "serverapp":
            marks = ("flwr-serverapp", self.server.inner)
            every = (int(one.name) for one in Path("/proc").iterdir() if one.name.isdecimal())
            lines = ((pid, command_line(pid)) for pid in every)
            return next((pid for pid, line in lines if all(m in line for m in marks)), None)
        started = children(self.supervisor.pid) if self.supervisor else []
        return next((pid for pid in started if f"flower-{target}" in command_line(pid)), None)

    def online(self) -> int:
        """How many devices the SuperLink takes for connected."""
        try:
            return sum(node.status == "online" for node in control.nodes(self.server))
        except StateError:
            return 0

    def run(self, config: Config, *more: str) -> "subprocess.Popen[str]":
        """`privet server run`, started."""
        path = self.folder / f"{config.name}.toml"
        path.write_text(to_toml(config))
        return self.privet("server", "run", str(self.server.folder), str(path), *more)

    def privet(self, *words: str) -> "subprocess.Popen[str]":
        """A command, started."""
        process = subprocess.Popen(
            [sys.executable, "-c", ENTRY, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=ends_with_the_tests,
        )
        self.runs.append(process)
        return process

    def config(self, name: str, **changes: Any) -> Config:
        """A run of three masked rounds with training of no cost."""
        return run_config(self.base, len(self.people), name, **changes)

    def place(self, config: Config) -> Path:
        """The run's folder."""
        return self.server.folder / "runs" / config.name

    def said(self) -> str:
        """Every log, for a test that fails."""
        logs = sorted([*self.folder.glob("*.log"), *(self.server.folder / "logs").glob("*.log*")])
        noise = ("uvicorn", "INFO:", "ListRuns", "INFO \x1b[0m:      \n", "Push replies")
        told = []
        for log in logs:
            lines = log.read_text(errors="replace").splitlines(keepends=True)
            told += [
                f"=== {log.name}\n",
                *[one for one in lines if not any(n in one for n in noise)],
            ]
        return "".join(told)

    def close(self) -> None:
        """Ends every process that was started."""
        for process in self.runs:
            if process.poll() is None:
                process.kill()
            process.communicate()
        for person in self.people:
            if person.process is not None:
                person.process.terminate()
        for person in self.people:
            person.stop()
        if self.supervisor is not None:
            self.supervisor.terminate()
            self.supervisor.wait(60)
        if (orphan := self.pid("serverapp")) is not None:  # its SuperExec was killed
            with suppress(ProcessLookupError):
                os.kill(orphan, signal.SIGKILL)


def run_config(base: Path, people: int, name: str, **changes: Any) -> Config:
    """See `Fleet.config`; `changes` go into `[rounds]`."""
    rounds = {"count": 3, "cohort": people, "timeout_s": 60.0, "answer_timeout_s": 15.0}
    return parse(
        {
            "name": name,
            "data": {
                "source": "devices",
                "clients": people,
                "records_per_client": 8,
                "max_tokens": 16,
                "task": "generation",
            },
            "model": {"base": str(base)},
            "adapter": {"rank": 2, "last_blocks": 2},
            "training": {"batch_size": 4},
            "rounds": {**rounds, **changes},
            "privacy": {
                "client": {"noise_at": "distributed", "noise_multiplier": NOISE},
                "example": {"enabled": False},
                "budget": {"client": 100000.0, "example": 100000.0},
            },
            "secure_aggregation": {"survivors": 0.6, "colluding": 0.0, "min_cohort": 3},
            "speed": {"threads": 1},
            "insecure_test_seed": 1,
        }
    )


def own_policy(base: Path) -> str:
    """The owner's limits: what these tests need, and nothing laxer."""
    allowed = {"models": [str(base)], "insecure_test_seed": True}
    return policies.text(Policy.model_validate({**OWNER, "allowed": allowed}))


def make(folder: Path, base: Path, people: int = 4) -> Fleet:
    """Server, homes and records, enrolled nowhere yet; nothing runs."""
    outer, inner = free_ports(2)
    server = setup.init(folder / "server", ["localhost"], port=outer, inner_port=inner)
    (folder / "pass").write_text(PASSPHRASE)
    (folder / "pass").chmod(0o600)
    authority = server.certificate("internal-ca.crt")
    found = []
    for number in range(people):
        wire, home = Wire(inner), folder / f"home{number}"
        draw = random.Random(number)
        favourites = draw.sample(WORDS, 12)
        texts = [" ".join(draw.choices(favourites, k=draw.randint(4, 9))) for _ in range(12)]
        words = folder / f"texts{number}"
        words.mkdir()
        for place, text in enumerate(texts):
            (words / f"{place:02}.txt").write_text(text)
        with DeviceStore.create(home, Passphrase(PASSPHRASE), f"device {number}") as made:
            (home / POLICY).write_text(own_policy(base))
            listed = server.folder / "directory"  # of nobody yet: the rest comes by itself
            asked = join.Asked(f"127.0.0.1:{wire.port}", authority, listed, insecure=False)
            join.join(made, asked)
            watched_folders.rescan(made, roots=[str(words)])
            assert len(made.records()) == len(texts)
            (folder / f"card{number}.json").write_text(made.card)
        clock = Clock(folder / f"clock{number}")
        found.append(Person(number, home, wire, folder / f"device{number}.log", clock))
    return Fleet(folder, server, found, base, Clock(folder / "clock"))


@contextmanager
def cheap_passphrases() -> Iterator[None]:
    """Homes made meanwhile have passphrases that cost nothing to try."""
    before = unlock_module._ARGON2ID
    unlock_module._ARGON2ID = {"iterations": 1, "lanes": 1, "memory_kib": 1024}
    try:
        yield
    finally:
        unlock_module._ARGON2ID = before


@contextmanager
def running(folder: Path, base: Path, people: int = 4) -> Iterator[Fleet]:
    """A fleet that is up, everybody enrolled and started."""
    with cheap_passphrases(), ExitStack() as stack:
        fleet = make(folder, base, people)
        stack.callback(fleet.close)
        fleet.start_server()
        cards = [folder / f"card{number}.json" for number in range(people)]
        enrolment.enrol(fleet.server, cards, lambda _: None)
        for person in fleet.people:
            person.start()
        yield fleet
