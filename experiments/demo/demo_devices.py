"""`make demo-devices`: a server and six people's devices on this machine, two of which die.

`play` is the whole story, read downwards. Everything goes through the commands that a person or an
operator would type, as processes of their own, over TLS on loopback; one role's speeches are one
person's texts. Two devices are killed on the way, supervisor and all, and the run ends with four.
"""

import fcntl
import json
import os
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ...client.runtime.processes import free_port
from ...client.store.device_store import ME, POLICY, DeviceStore
from ...client.store.key_file import Passphrase
from ...common.child_processes import Children, Spec, privet_command, stopped_by_signals
from ...common.errors import RunExists, StateError
from ...common.files import explain_os_errors, write_atomic
from ...common.model.assets import fetch
from ...common.settings.config import read
from ...server.round_record import read_records

__all__ = ["adapted", "claimed", "demo"]

T = TypeVar("T")

CONFIG = Path(__file__).parent.parent / "configs" / "devices.toml"
MARK = ".made-by-privet-demo-devices"
DEVICES = 6
AT_ONCE = 3  # commands of devices that run side by side; each is a process of its own
ROUND_OF_THE_FIRST, FIRST, SECOND = 2, 2, 4  # places in the list of devices
PATIENCE_S = 600.0
GRACE_S = 25.0  # a SuperNode is given 1.5 s for its last replies, a worker finishes its message
LOOK_S = 0.1
TRIES = 20
MEMORY_S = 2.0
DEALT_S = 1.0  # shares are written down before they are on their way

POLICY_CHANGES: Mapping[str, tuple[str, str]] = {
    "min_cohort": ("4", "there are six devices in all, where the default asks for ten"),
    "colluding": ("1", "of six devices more than one cannot be reckoned with"),
    "max_load": ("1000.0", "all six share this machine, with whatever else it does"),
    "on_battery": ("true", "a laptop may show this demo too"),
    "min_battery": ("0.0", "a laptop may show this demo too"),
    "nice": ("0", "the demo would wait for every other program of this machine"),
}
"""Key of policy.toml -> its value here, and why."""

Show = Callable[[str], None]


@dataclass(frozen=True)
class Person:
    """One simulated person with a real device.

    Attributes:
        name: the device's label.
        role: whose speeches are the texts.
        folder: with `home`, `texts` and the file `passphrase`.
    """

    name: str
    role: str
    folder: Path

    @property
    def own(self) -> tuple[str | Path, ...]:
        """Options that say which home a command means, and how it is opened."""
        return "--home", self.folder / "home", "--passphrase-file", self.folder / "passphrase"

    def open(self) -> DeviceStore:
        """Open the home, as its owner does."""
        words = (self.folder / "passphrase").read_text("utf-8").strip()
        return DeviceStore.open(self.folder / "home", Passphrase(words))


@dataclass(frozen=True)
class Hosted:
    """The server: its folder, HOST:PORT for devices, and the certificate that they are given."""

    folder: Path
    address: str
    authority: Path


@dataclass(frozen=True)
class Stage:
    """Where the demo plays.

    Attributes:
        folder: of everything it makes.
        processes: those that run; the caller ends them.
        console: where the story is told.
        began: when it began, monotonic seconds.
    """

    folder: Path
    processes: Children
    console: Console
    began: float

    def show(self, line: str) -> None:
        """Print a line, with the minutes and seconds since the beginning."""
        passed = int(time.monotonic() - self.began)
        self.console.print(Text(f"{passed // 60:>3}:{passed % 60:02}  {line}"), soft_wrap=True)

    def log(self, name: str) -> Path:
        """Return where a process's output goes."""
        return self.folder / "logs" / f"{name}.log"

    def start(self, name: str, *words: str | Path) -> None:
        """Start `privet WORDS` as a process that is not started again."""
        unbuffered = {"PYTHONUNBUFFERED": "1"}
        self.processes.start(Spec(name, privet_command(*words), unbuffered, log=self.log(name)))

    def wait(self, done: Callable[[], bool], what: str, name: str) -> None:
        """Wait until something is done.

        Raises:
            StateError: the process that is to do it has ended, or takes too long.
        """
        limit = time.monotonic() + PATIENCE_S
        while not done():
            if self.processes.status(name) is not None or time.monotonic() > limit:
                log = self.log(name)
                last = (log.read_text("utf-8", "replace").splitlines() or ["nothing"])[-1]
                raise StateError(f"waited for {what} in vain; {log} ends with: {last}")
            time.sleep(LOOK_S)


def demo(folder: Path, console: Console) -> None:
    """Run the whole demo in `folder`, made anew.

    All processes have ended when it returns or raises.

    Raises:
        RunExists: the folder holds something else; nothing in it was touched.
        StateError: another demo is running there, or a part failed; the sentence names its log.
    """
    began = time.monotonic()
    with stopped_by_signals(), claimed(folder), Children(lambda _: None, GRACE_S) as processes:
        stage = Stage(folder, processes, console, began)
        play(stage)
        stage.show(f"all processes are ended; {folder} has everything")


def play(stage: Stage) -> None:
    """Play the demo from the first set-up to the last report."""
    show, processes, console = stage.show, stage.processes, stage.console
    people = make_people(stage.folder)
    server = open_server(stage)
    init_devices(people, show)
    enrol(people, server, stage)
    join(people, server, show)
    for person in people:
        stage.start(person.name, "client", "start", *person.own)
    show(f"{len(people)} x privet client start: a SuperNode and a worker each")
    stage.start("run", "server", "run", server.folder, CONFIG)
    show(
        f"privet server run {server.folder.name} {CONFIG.name}: loads the model, greets the devices"
    )
    place = server.folder / "runs" / read(CONFIG).name
    agree(people, place, stage)
    most = follow(people, place, stage)
    processes.end(*(person.name for person in people if person not in killed(people)))
    processes.end()
    show("the devices that are left, and the server, were told to end")
    report(place, console)
    budgets(people, console)
    for person in killed(people):
        show(reopened(person))
    if most is not None:
        show(f"peak memory of server, proxy and six devices together: {most:,.0f} MB")


# --- the parts, in the order of the story ---------------------------------------------------------


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Empty the demo's folder, and keep it from other demos while the block runs.

    Raises:
        RunExists: it holds what no demo made; nothing was touched.
        StateError: another demo is running in it.
    """
    mark = folder / MARK
    with explain_os_errors(folder, "make the folder"):
        if folder.exists() and (
            not folder.is_dir() or (any(folder.iterdir()) and not mark.exists())
        ):
            raise RunExists(
                f"{folder} holds something that no `privet demo-devices` made; move it away, or "
                "run the command in another folder"
            )
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(mark, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        _alone(handle, folder)
        with explain_os_errors(folder, "empty"):
            for one in folder.iterdir():
                if one.is_dir() and not one.is_symlink():
                    shutil.rmtree(one)
                elif one != mark:
                    one.unlink()
        yield
    finally:
        os.close(handle)


def _alone(handle: int, folder: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StateError(
            f"another `privet demo-devices` is running in {folder}; let it end first"
        ) from None


def make_people(folder: Path) -> list[Person]:
    """Make six people of roles of Shakespeare's plays, each with its speeches as one text file."""
    from ..data import population

    fetch(read(CONFIG).model.base)
    chosen = population.load("shakespeare", clients=DEVICES, test_clients=0, min_records=30, seed=7)
    found = []
    for number, role in enumerate(chosen.train_users, 1):
        person = Person(f"device-{number}", role, folder / f"device-{number}")
        with explain_os_errors(person.folder, "make"):
            person.folder.mkdir(mode=0o700)
            (person.folder / "texts").mkdir(mode=0o700)
        speeches = "\n\n".join(record.text for record in chosen.read(role))
        write_atomic(person.folder / "texts" / "speeches.txt", speeches.encode())
        write_atomic(person.folder / "passphrase", f"{secrets.token_urlsafe(16)}\n".encode())
        found.append(person)
    return found


def open_server(stage: Stage) -> Hosted:
    """Start SuperLink, SuperExec and proxy.

    Where there is no nginx, there is no proxy, but still TLS.
    """
    from ...server.operations import proxy

    server, port, inner = stage.folder.absolute() / "server", free_port(), free_port()
    call("server", "init", server, "--host", "localhost", "--port", str(port),
         "--inner-port", str(inner))  # fmt: skip
    if proxy.find_nginx() is None:
        stage.start("server", "server", "up", server, "--no-proxy")
        authority = server / "certificates" / "internal-ca.crt"
        hosted = Hosted(server, f"localhost:{inner}", authority)
        how = "without a proxy, still over TLS: no nginx is installed here"
    else:
        stage.start("server", "server", "up", server)
        hosted = Hosted(server, f"localhost:{port}", server / "ca.crt")
        how = "nginx in front lets the Fleet API through, and nothing else"
    stage.show(f"server at https://{hosted.address}: {how}")
    return hosted


def init_devices(people: Sequence[Person], show: Show) -> None:
    """Make a home for each person: identity, vault, card, and the policy adapted to this demo."""

    def one(person: Person) -> None:
        said = json.loads(call("client", "init", "--name", person.name, "--json", *person.own))
        write_atomic(person.folder / "card.json", json.dumps(said["card"]).encode())
        policy = person.folder / "home" / POLICY
        write_atomic(policy, adapted(policy.read_text("utf-8")).encode())

    _for_each(one, people)
    show(f"{len(people)} homes with identities, vaults and policies; changed in policy.toml:")
    for key, (value, why) in POLICY_CHANGES.items():
        show(f"  {key} = {value}: {why}")


def adapted(policy: str) -> str:
    """Adapt the default policy.toml to six devices on one machine, each change with its reason.

    Raises:
        StateError: a key that is to be changed is not there.
    """
    for key, (value, why) in POLICY_CHANGES.items():
        line = f"# changed by `make demo-devices`: {why}\n{key} = {value}"
        policy, count = re.subn(rf"^{key} = .*$", line, policy, flags=re.MULTILINE)
        if count != 1:
            raise StateError(f"policy.toml has {count} lines {key!r}, expected one")
    return policy


def enrol(people: Sequence[Person], server: Hosted, stage: Stage) -> None:
    """Let the devices join, by their cards, as the operator."""
    stage.wait(lambda: _up(server.folder), "the server to answer", "server")
    call("server", "enrol", server.folder, *(person.folder / "card.json" for person in people))
    stage.show(f"privet server enrol: {len(people)} cards; the directory of devices is closed")


def join(people: Sequence[Person], server: Hosted, show: Show) -> None:
    """Add each person's own texts, and join the server they belong to."""
    given: list[str | Path] = ["--server", server.address, "--ca", server.authority]
    given += ["--directory", server.folder / "directory"]

    def one(person: Person) -> str:
        added = json.loads(call("client", "add", person.folder / "texts", "--json", *person.own))
        call("client", "join", *given, *person.own)
        return f"  {person.name}: {person.role}, {added['records']} records"

    lines = _for_each(one, people)
    show("privet client add, privet client join; each has one role's speeches:")
    for line in lines:
        show(line)


def agree(people: Sequence[Person], place: Path, stage: Stage) -> None:
    """Have every owner say yes to the run, and show once what it asks for."""

    def offered(person: Person) -> bool:
        said = json.loads(call("client", "runs", "--json", *person.own))
        return any(one["run"] == run for one in said["runs"])

    def yes(person: Person) -> str:
        for _ in range(TRIES):
            with suppress(StateError):  # not offered yet
                return call("client", "runs", run, "--agree", *person.own, environment=width)
        return call("client", "runs", run, "--agree", *person.own, environment=width)

    width = {"COLUMNS": str(min(stage.console.width, 110))}
    stage.wait((place / "run-id").is_file, "the run to begin", "run")
    run = (place / "run-id").read_text("utf-8").strip()
    stage.wait(lambda: offered(people[0]), f"{people[0].name} to be asked", "run")
    stage.show(f"privet client runs {run} --agree, on {people[0].name}:")
    stage.console.print(Text(yes(people[0])), soft_wrap=True)
    _for_each(yes, people[1:])
    stage.show(f"the owners of the other {len(people) - 1} agree too")


def follow(people: Sequence[Person], place: Path, stage: Stage) -> float | None:
    """Follow the run until its end, with two deaths.

    Returns the most memory that all took together, MB.
    """
    first, second = killed(people)
    processes, show, log = stage.processes, stage.show, stage.log("run")
    with ExitStack() as stack:
        dying: DeviceStore | None = stack.enter_context(first.open())
        waiting, most, measured, said = True, 0.0, 0.0, 0
        while processes.status("run") is None:
            if dying is not None and _trains(dying):
                processes.kill(first.name)
                show(
                    f"{first.name} is killed (SIGKILL, supervisor and all) in the middle of round "
                    f"{ROUND_OF_THE_FIRST}: it trains, and others hold shares of its masks"
                )
                dying = None
            if waiting and len(read_records(place)) >= ROUND_OF_THE_FIRST:
                processes.kill(second.name)
                show(f"{second.name} is killed before round {ROUND_OF_THE_FIRST + 1}")
                waiting = False
            said = _pass_on(log, said, show)
            if time.monotonic() - measured > MEMORY_S:
                most, measured = max(most, processes.memory_mb() or 0.0), time.monotonic()
            time.sleep(LOOK_S)
    _pass_on(log, said, show)
    if processes.status("run") or waiting or dying is not None:
        raise StateError(f"the run failed, or ended too soon; see {log.parent}")
    return most or None


def killed(people: Sequence[Person]) -> tuple[Person, Person]:
    """Return the two people whose devices die: the third in round 2, the fifth before round 3."""
    return people[FIRST], people[SECOND]


def _trains(home: DeviceStore) -> bool:
    """Return whether a device has dealt its shares a while ago, and not contributed yet."""
    sent = [one for one in home.outbox() if one.round == ROUND_OF_THE_FIRST][-1:]
    return any(one.phase == "shares" and time.time() - one.time > DEALT_S for one in sent)


def report(place: Path, console: Console) -> None:
    """Show the report that `privet server run` has written, in the terminal."""
    from ..reports import report, terminal

    console.rule("privet report")
    terminal.show(report.written(place), console)
    console.print(Text(f"\n{place}/report.html has the pictures", style="dim"), soft_wrap=True)


def budgets(people: Sequence[Person], console: Console) -> None:
    """Show what each device says of itself, `privet client budget` and `outbox`, in one table."""
    from ...client.privacy.spending import spending

    spent, sent = {}, {}
    for person in people:
        with person.open() as home:
            spent[person.name], sent[person.name] = spending(home), home.outbox()
    delta = max(one["delta"] for one in spent.values())
    console.rule(f"privet client budget | outbox, on each device (delta = {delta:g})")
    columns = _columns(list(spent.values()))
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("device")
    for head in ("releases", *columns, "sent", "bytes"):
        table.add_column(head, justify="right")
    for place, (name, one) in enumerate(spent.items()):
        cells = [_epsilon(values[place]) for values in columns.values()]
        size = sum(each.bytes for each in sent[name])
        table.add_row(name, str(one["releases"]), *cells, str(len(sent[name])), f"{size:,}")
    console.print(table)
    rests = {"; ".join(x["conditions"]) for one in spent.values() for x in one["lines"]} - {""}
    for conditions in sorted(rests):
        console.print(Text(f"against the server: if {conditions}"))


def _columns(spent: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float | None, ...]]:
    """Make the table's columns: heading -> each device's epsilon.

    Adversaries against whom all are equal share a column.
    """
    subjects = {"client": "all records", "example": "any one record"}
    found: dict[tuple[str, float | None, tuple[float | None, ...]], list[str]] = {}
    kinds = {(x["unit"], x["against"], x["budget"]): None for one in spent for x in one["lines"]}
    for unit, against, budget in kinds:
        values = tuple(
            next((x["epsilon"] for x in one["lines"]
                  if (x["unit"], x["against"]) == (unit, against)), None)
            for one in spent
        )  # fmt: skip
        found.setdefault((unit, budget, values), []).append(against)
    return {
        f"ε {subjects[unit]},\n{'no limit' if budget is None else f'of {budget:g}'}, against\n"
        f"{', '.join(names)}": values
        for (unit, budget, values), names in found.items()
    }


def reopened(person: Person) -> str:
    """Check that a killed device's home opens again, with everything in it.

    Raises:
        StateError: something is not as it was.
    """
    card = json.loads((person.folder / "card.json").read_text("utf-8"))
    with person.open() as home:
        releases, records = len(home.ledger.rows(ME)), len(home.records())
        sent = sum(one.phase == "vector" for one in home.outbox())
        same = home.identity.public.hex() == card["identity"]
    if not same or not records or releases < sent:
        raise StateError(f"{person.name}: identity, records or ledger are not as they were")
    return (
        f"{person.name}, killed, opens again: identity {card['identity'][:16]}… as on its card, "
        f"ledger verifies and has {releases} of {sent} contributions sent, {records} records"
    )


# --- small things ---------------------------------------------------------------------------------


def call(*words: str | Path, environment: Mapping[str, str] | None = None) -> str:
    """Run `privet WORDS`, and return what it prints.

    Raises:
        StateError: it failed; in its own words.
    """
    done = subprocess.run(
        privet_command(*words),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **(environment or {})},
    )
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise StateError(f"privet {' '.join(map(str, words[:2]))}: {said.removeprefix('privet: ')}")
    return done.stdout


def _epsilon(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _for_each(do: Callable[[Person], T], people: Sequence[Person]) -> list[T]:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(do, people))


def _up(server: Path) -> bool:
    from ...server.operations import commands, setup

    return bool(commands.facts(setup.load(server))["superlink"])


def _pass_on(log: Path, said: int, show: Show) -> int:
    """Show the whole lines of a log that were not shown yet.

    Returns how many bytes are shown now.
    """
    with open(log, "rb") as file:
        file.seek(said)
        fresh = file.read()
    whole = fresh[: fresh.rfind(b"\n") + 1]
    for line in whole.decode("utf-8", "replace").splitlines():
        show(f"  {line}")
    return said + len(whole)
