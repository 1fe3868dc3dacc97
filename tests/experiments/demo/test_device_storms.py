"""Real devices under chaos: whatever dies, the run ends right or says why, and nothing is spent
twice or lost.

One fleet serves all tests: SuperLink, SuperExec and four devices, each with SuperNode and
worker, on loopback over TLS with registered keys.
"""

import hashlib
import itertools
import os
import random
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from privet.client import device as devices
from privet.client.consent.policy import own_config
from privet.client.enrolled.participant import EnrolledContext
from privet.client.store.device_store import ME, DeviceStore
from privet.client.training.local_training import Trainer
from privet.common.files import read_lines
from privet.common.model.adapter import shared
from privet.common.model.server_optimizers import optimizer_named
from privet.common.privacy.encoding import unpack
from privet.common.privacy.plan_maker import make_plan
from privet.common.privacy.round_plan import Plan
from privet.common.settings import config as settings
from privet.common.settings.config import Config
from privet.server.round_record import LOG
from privet.server.rounds import _noised_mean
from privet.server.run_folder import checkpoint
from privet.server.void_rounds import trained

from ...fleet import Fleet, Person, running, until

TARGETS = ("worker", "supernode", "superlink", "superexec", "serverapp")
HOME_FILES = {"policy.toml", "vault.sqlite", "vault.sqlite-wal", "vault.sqlite-shm", "key.json"}


class Unspent:
    """A ledger that allows everything, for recomputing what was released."""

    def resend(self, *_: object) -> None:
        """Nothing was released."""

    check = commit = resend

    def releases_of(self, *_: object) -> int:
        """None at all."""
        return 0


@dataclass(frozen=True, eq=False)
class Again(EnrolledContext):
    """The device's context, with nothing spent."""

    @property
    def ledger(self) -> Any:
        return Unspent()


def contribution(
    home: DeviceStore, config: Config, plan: Plan, start: NDArray[np.float32]
) -> bytes:
    """What this device gives to a round, with the test seed; before the masks."""
    own = own_config(home.policy, config)
    context = Again(home, plan.run, own, Trainer.of(shared(own), own.speed.cache_mb), 0)
    return devices._answer(devices.Device(ME, context), plan, start)


def written(home: DeviceStore, plan: Plan) -> str | None:
    """SHA-256 of what the ledger says this device has given to a round; None: nothing."""
    rows = [row for row in home.ledger.rows(ME) if (row.run, row.round) == (plan.run, plan.round)]
    return rows[0].payload_sha256 if rows else None


def retrace(fleet: Fleet, config: Config, refused: bool = False) -> list[frozenset[int]]:
    """Recomputes a run from the devices' own records; whose sum each round's step was.

    The server's adapter must be what the devices gave that the round's record names, bit for bit,
    and their ledgers must hold the hash of it.
    """
    place = fleet.place(config)
    config = settings.read(place / "config.toml")
    run = (place / "run-id").read_text().strip()
    adapter = shared(config)
    layout, start = adapter.layout.digest, adapter.start
    optimizer = optimizer_named(config.rounds.optimizer)
    memory = optimizer.begin(len(start))
    records = [one for one in read_lines(place / LOG) if not one.get("again")]
    assert refused or trained(records) == config.rounds.count
    count = len(records)
    assert [record["round"] for record in records] == list(range(1, count + 1))
    found = []
    for record in records:
        plan = make_plan(config, run, record["round"], layout, start)
        if record["void"]:
            found.append(frozenset[int]())
            continue
        given = []
        for number in record["who"]["came"]:
            with fleet.people[number].open() as home:
                payload = contribution(home, config, plan, start)
                said = written(home, plan)
            assert said == hashlib.sha256(payload).hexdigest(), "the ledger says what was given"
            given.append(unpack(payload, plan.length(len(start)), plan.bits))
        mean = applied(given, record, plan, config)
        start, memory = optimizer.apply(config.rounds, memory, start, mean)
        found.append(frozenset(record["who"]["came"]))
    kept = checkpoint.load(place, run=run, config_hash=config.digest, layout=layout)
    if count:
        assert kept is not None
        assert kept.round == count
        np.testing.assert_array_equal(kept.adapter, start)
    assert refused or (place / "adapter" / "adapter_model.safetensors").is_file()
    return found


def applied(
    given: Sequence[NDArray[np.uint32]], record: Mapping[str, Any], plan: Plan, config: Config
) -> NDArray[np.float64]:
    """What the server has applied, which must be the mean of what these devices gave."""
    total = np.sum(given, axis=0, dtype=np.uint32)
    wrapped = np.asarray(total & np.uint32(2**plan.bits - 1), np.uint32)
    mean, _ = _noised_mean(wrapped, plan, config.insecure_test_seed)
    assert float(np.linalg.norm(mean)) == record["mean_norm"]
    return mean


@dataclass(frozen=True)
class Kept:
    """What a device must not lose."""

    identity: bytes
    card: str
    rows: Sequence[str]
    sent: int
    entries: Mapping[str, bytes]


def kept(person: Person) -> Kept:
    """Of a home that opens, whose ledger verifies, and that holds nothing half-written."""
    names = {path.name for path in person.home.iterdir()}
    assert names - HOME_FILES <= {"worker.lock", "connection.json"}, names
    with person.open() as home:
        rows = home.ledger.rows(ME)  # verifies the chain
        sent = home.outbox()
        heads = {name: home.vault.get(name) or b"" for name in home.vault.names("heads/")}
        released = [(one.run, one.round) for one in sent if one.phase == "vector"]
        charged = [(row.run, row.round) for row in rows]
        assert len(set(charged)) == len(charged), "a release is counted once"
        assert set(released) <= set(charged), "nothing leaves that is not in the ledger"
        assert [one.seq for one in sent] == list(range(1, len(sent) + 1))
        hashes = [row.hash for row in rows]
        return Kept(home.identity.public, home.card, hashes, len(sent), heads)


def nothing_lost(before: Kept, after: Kept) -> None:
    """Identity, head and ledger are what they were, or have grown."""
    assert (after.identity, after.card) == (before.identity, before.card)
    assert after.rows[: len(before.rows)] == before.rows
    assert after.sent >= before.sent
    assert after.entries.items() >= before.entries.items()


class Run:
    """`privet server run`, and what it has said so far."""

    def __init__(self, fleet: Fleet, config: Config, *more: str) -> None:
        self.fleet, self.config = fleet, config
        self.process, self.lines = fleet.run(config, *more), list[str]()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())

    @property
    def over(self) -> bool:
        """Whether the command has ended."""
        return self.process.poll() is not None

    def rounds(self) -> list[Any]:
        """The log so far."""
        return read_lines(self.fleet.place(self.config) / LOG)

    def ended(self, seconds: float) -> int:
        """Its exit code."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            said = "\n".join(self.lines)
            raise AssertionError(f"no end in {seconds:g} s:\n{said}\n{self.fleet.said()}") from None
        self._reader.join(5)
        return code


def killed(fleet: Fleet, target: str, draw: random.Random) -> str:
    """SIGKILL, once the target is there; who it was."""
    if target in ("worker", "supernode"):
        person = draw.choice(fleet.people)
        words = {"worker": "client work", "supernode": "flower-supernode"}[target]
        pid = until(lambda: person.pid(words), 120, f"the {target} of device {person.number}")
        os.kill(pid, signal.SIGKILL)
        return f"{target} of device {person.number}"
    pid = until(lambda: fleet.pid(target), 240, target)
    os.kill(pid, signal.SIGKILL)
    return target


def troubled(fleet: Fleet, target: str, seconds: float, draw: random.Random) -> str:
    """One process killed, or for some seconds one wire cut or one clock wrong; what it was."""
    if target == "wire":
        person = draw.choice(fleet.people)
        draw.choice([person.wire.cut, person.wire.stall])()
        threading.Timer(seconds, person.wire.resume).start()
        return f"wire of device {person.number} for {seconds:.0f} s"
    if target == "clock":
        everybody: list[Fleet | Person] = [fleet, *fleet.people]
        whose = draw.choice(everybody)
        ahead = draw.choice([-1, 1]) * draw.uniform(60, 4000)
        whose.clock.jump(ahead)
        threading.Timer(seconds, whose.clock.jump, (0.0,)).start()
        name = f"device {whose.number}" if isinstance(whose, Person) else "the server"
        return f"clock of {name} by {ahead:.0f} s for {seconds:.0f} s"
    return killed(fleet, target, draw)


def storm(fleet: Fleet, seed: int, *, for_s: tuple[float, float], rounds: int) -> list[str]:
    """One run in which everything dies once, at a random moment, and for some seconds one device
    is cut off and one clock is wrong."""
    draw = random.Random(seed)
    config = fleet.config(f"storm-{seed}", count=rounds)
    until(lambda: fleet.online() == len(fleet.people), 120, "all devices online")
    before = [kept(person) for person in fleet.people]
    run, began, done = Run(fleet, config), time.monotonic(), list[str]()
    until(lambda: fleet.pid("serverapp") or run.over, 240, "the ServerApp")
    targets = draw.sample([*TARGETS, "wire", "clock"], len(TARGETS) + 2)
    for number, target in enumerate(targets):
        over = number * rounds // len(targets)
        until(lambda: len(run.rounds()) >= over or run.over, 240, f"{over} rounds")  # noqa: B023
        time.sleep(draw.uniform(0.0, 5.0))
        if run.over:
            break
        who = troubled(fleet, target, draw.uniform(*for_s), draw)
        done.append(f"{time.monotonic() - began:5.1f} s {len(run.rounds())} rounds: {who}")
    code = run.ended(400)
    said = [f"{time.monotonic() - began:5.1f} s ended", *run.lines]
    print("\n".join([*done, *said]))
    refused = code != 0 and "a round needs" in "\n".join(run.lines)
    assert code == 0 or refused, "\n".join([*done, *said, fleet.said()])
    print([sorted(one) for one in retrace(fleet, config, refused)])
    for person, one in zip(fleet.people, before, strict=True):
        nothing_lost(one, kept(person))
    return done


@pytest.fixture(scope="module")
def fleet(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Up for all tests of this file."""
    with running(tmp_path_factory.mktemp("fleet"), llama_folder) as found:
        yield found


@pytest.mark.parametrize("seed", range(1))
def test_whatever_is_killed_the_run_ends_right_and_nothing_is_lost(fleet: Fleet, seed: int):
    storm(fleet, seed, for_s=(3.0, 6.0), rounds=4)


@pytest.mark.heavy
@pytest.mark.parametrize("seed", range(1, 33))
def test_whatever_is_killed_over_thirty_seeds(fleet: Fleet, seed: int):
    storm(fleet, seed, for_s=(5.0, 90.0), rounds=5)


def all_come(fleet: Fleet, name: str) -> None:
    """Runs of a round until everybody comes to one.

    After a storm a device may wait for the rest of a message from a server that is dead.
    """
    until(lambda: fleet.online() == len(fleet.people), 120, "all devices online")
    numbers = itertools.count()

    def a_round_of_all() -> bool:
        run = Run(fleet, fleet.config(f"{name}-{next(numbers)}", count=1))
        assert run.ended(300) == 0, fleet.said()
        return set(run.rounds()[-1]["who"]["came"]) == {one.number for one in fleet.people}

    until(a_round_of_all, 600, "a round of all")


def test_a_full_disk_stops_its_device_alone_and_with_room_it_comes_back(fleet: Fleet):
    """A limit on the size of files is met as a full disk is: writes fail, the process lives."""
    person = fleet.people[0]
    all_come(fleet, "before-full")
    before = kept(person)
    worker = until(lambda: person.pid("client work"), 30, "the worker")
    resource.prlimit(worker, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    full = Run(fleet, config := fleet.config("full", count=2))
    assert full.ended(300) == 0, fleet.said()
    resource.prlimit(worker, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    assert retrace(fleet, config) == [frozenset({1, 2, 3})] * 2
    all_come(fleet, "after-full")
    assert person.pid("client work") == worker, "it never died of it"
    nothing_lost(before, kept(person))
