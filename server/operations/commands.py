"""`privet server`: init, enrol, up, run, ab, status.

Heavy imports wait inside the functions, so that `privet server status` answers at once.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from ...common.errors import AssetError, ConfigError, RunExists, RunUnfinished, StateError
from ...common.files import explain_os_errors, owners_own, read_lines, write_atomic
from . import directory_commands

if TYPE_CHECKING:
    from ...common.privacy.round_plan import Plan
    from ...common.settings.config import Config
    from ..run_folder.starting import Start
    from .control import Run
    from .server_folder import Server

__all__ = ["app", "facts", "follow", "prepare", "supervise"]

app = typer.Typer(help="The server: set it up, let devices join, run.", no_args_is_help=True)
app.add_typer(directory_commands.app, name="directory")

LOG = "rounds.jsonl"
LOOK_S = 0.5
FIRST_WAIT_S, LONGEST_WAIT_S, STEADY_S = 1.0, 60.0, 30.0
PATIENCE_S = 10.0
SILENCE_S = 2.0  # a process that ends by itself tells Flower so, a moment after its lock is free
TRIES = 5

Refuse = Callable[["Config", "Plan", int], None]

_Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="The server's folder.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]


@app.command("init")
def init(
    folder: _Folder,
    host: Annotated[
        list[str] | None,
        typer.Option("--host", metavar="NAME", help="Name or address devices use; repeatable."),
    ] = None,
    days: Annotated[int, typer.Option(help="How long the certificates hold.")] = 365,
    port: Annotated[int, typer.Option(help="Of the proxy: the one port to open.")] = 9092,
    inner_port: Annotated[int, typer.Option(help="Of the SuperLink, on this machine.")] = 9093,
    renew: Annotated[bool, typer.Option("--renew", help="New certificates, same CA.")] = False,
    ca_key: Annotated[
        Path | None, typer.Option(metavar="PATH", help="With --renew: where the CA's key is.")
    ] = None,
    directory_key: Annotated[
        str | None,
        typer.Option(metavar="HEX", help="Of somebody else who signs the list of devices."),
    ] = None,
) -> None:
    """Make the server's folder: certificates, proxy, commands, units (README.md has the steps)."""
    from . import setup

    if renew:
        if directory_key is not None:
            raise ConfigError(
                "--directory-key is for a new folder; devices have pinned the old key"
            )
        setup.renew(folder, host or (), days=days, ca_key=ca_key)
        print(f"{folder} has new certificates for {days} days; devices keep their ca.crt.")
        print("Start SuperLink, SuperExec and proxy again to use them.")
        return
    if ca_key is not None:
        raise ConfigError("--ca-key goes with --renew; a new folder gets a CA of its own")
    signer = None if directory_key is None else _public_key(directory_key)
    setup.init(
        folder, host or (), port=port, inner_port=inner_port, days=days, directory_key=signer
    )
    print(f"{folder} is made; {folder}/README.md has the steps.")
    print(
        f"Move {folder}/ca away from this machine now: who has ca/ca.key can pretend to be this "
        "server. It is needed again for --renew only."
    )


def _public_key(text: str) -> bytes:
    if len(text) != 64 or text.strip("0123456789abcdef"):
        raise ConfigError(
            f"--directory-key {text!r:.80}: expected the 64 hexadecimal digits that `privet server "
            "directory key` printed"
        )
    return bytes.fromhex(text)


@app.command("enrol")
def enrol(
    folder: _Folder,
    cards: Annotated[
        list[str], typer.Argument(metavar="CARD...", help="Cards' files; with --remove or numbers.")
    ],
    remove: Annotated[bool, typer.Option("--remove", help="Let them join no more.")] = False,
) -> None:
    """Let devices join, by the cards that `privet client card` printed."""
    from . import enrolment, setup

    server = setup.load(folder)
    if remove:
        enrolment.remove(server, cards, print)
    else:
        enrolment.enrol(server, [Path(card) for card in cards], print)


@app.command("up")
def up(
    folder: _Folder,
    fetch_nginx: Annotated[
        bool, typer.Option("--fetch-nginx", help="Debian: unpack nginx into the cache, no root.")
    ] = False,
    no_proxy: Annotated[
        bool, typer.Option("--no-proxy", help="For devices on this machine only: a test.")
    ] = False,
) -> None:
    """Run SuperLink, SuperExec and proxy here until Ctrl-C (for good, use the systemd units)."""
    from . import services, setup

    server = setup.load(folder)
    nginx = None if no_proxy else _nginx(fetch_nginx)
    for number in (server.port, server.inner_port):
        if _answers(number):
            raise StateError(
                f"port {number} is taken already: is `privet server up` running elsewhere? Stop it"
            )
    programs = dict(services.commands(server, nginx))
    if no_proxy:
        del programs["proxy"]
    supervise(programs, services.environment(server), server.folder / "logs", say)


def _nginx(fetch: bool) -> Path:
    from ...common.model.assets import cache_folder
    from . import proxy

    cache = cache_folder()
    nginx = proxy.find_or_fetch_nginx(cache) if fetch else proxy.find_nginx(cache)
    if nginx is None:
        raise AssetError(
            "there is no nginx on PATH, in /usr/sbin or in the cache; install it (sudo apt install "
            "nginx), or on Debian without root add --fetch-nginx"
        )
    return nginx


@app.command("run")
def run(
    context: typer.Context,
    folder: _Folder,
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A TOML file.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run there is.")] = False,
) -> None:
    """Start a run with the enrolled devices, follow it, a line a round, and write its report."""
    from ...common.settings.config import read
    from . import setup

    server, settings = setup.load(folder), read(config, set_ or [])
    if settings.ab_run is not None:
        raise ConfigError(
            f"{config} has arms: `privet server ab` runs an experiment, from a file with its arms, "
            "looks and epsilon"
        )
    settings = prepare(
        server, settings, resume=resume, refuse=getattr(context.obj, "refuse_unpaid", None)
    )
    for warning in settings.warnings():
        print(f"warning: {warning}", file=sys.stderr)
    place = _followed(server, settings, f"privet server run {folder} {config} --resume")
    if callable(context.obj):
        context.obj(place)


@app.command("ab")
def ab(
    context: typer.Context,
    folder: _Folder,
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A TOML file.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the one there is.")] = False,
) -> None:
    """Compare templates, or heads, on the enrolled devices: noised sums, keyed arms, paid looks."""
    from ...common.ab_test import read
    from ..ab_estimates import device_settings
    from . import setup

    server, settings = setup.load(folder), read(config)
    enrolled = _enrolled(server, settings.name, resume)
    run = prepare(server, device_settings(settings, enrolled), resume=resume)
    place = _followed(server, run, f"privet server ab {folder} {config} --resume")
    asked = settings.privacy
    masks = ""
    if asked.noise_at == "distributed":
        most = settings.secure_aggregation.colluders(settings.clients)
        masks = (
            f" (if: closed directory; at most {most} of the {enrolled:,} enrolled devices collude "
            "with the server)"
        )
    print(
        f"a device that took part in all {settings.looks} looks has spent at most epsilon "
        f"{asked.epsilon:g} at delta {asked.delta:g}, client-level, {asked.adjacency}, noise "
        f"{asked.noise_at}, against the analyst and the server{masks}; its own ledger says what it "
        "did spend (privet client budget)"
    )
    print(f"{place / LOG} has every number")
    if callable(context.obj):
        context.obj(place)


def _followed(server: "Server", settings: "Config", again: str) -> Path:
    """Show a prepared run until it ends, and return its folder.

    It is started, unless it is going already.
    """
    from . import control

    place = server.folder / "runs" / settings.name
    going = _going(server, place)
    flower = going if going is not None else control.start_run(server, place)
    what = "rounds" if settings.ab_run is None else "looks"
    print(
        f"run {settings.name}: {settings.rounds.count} {what} of {settings.rounds.cohort} devices"
    )
    try:
        follow(server, place, flower, settings.rounds.count, print)
    except KeyboardInterrupt:
        print(
            "\nThe run goes on without this command. Look: privet server status "
            f"{server.folder}\nFollow it again: {again}",
            file=sys.stderr,
        )
        raise SystemExit(130) from None
    return place


@app.command("status")
def status(folder: _Folder, as_json: _Json = False) -> None:
    """What is up, who is enrolled and online, how far the runs are."""
    from ..void_rounds import round_line
    from . import setup

    found = facts(setup.load(folder))
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for name in ("superlink", "proxy"):
        print(f"{name}: {'up' if found[name] else 'DOWN'}")
    print(f"certificates: until {found['certified_until'][:10]}")
    for warning in found["warnings"]:
        print(f"WARNING: {warning}")
    people = found["devices"]
    print(
        f"devices: {people['enrolled']} enrolled, {_number(people['registered'])} registered, "
        f"{_number(people['online'])} online"
    )
    for device in people["each"]:
        print(f"  {_device(device)}")
    for one in found["runs"]:
        void = sum(record["void"] for record in one["rounds"])
        print(
            f"run {one['name']}: {one['status']}, {len(one['rounds']) - void} of {one['count']} "
            f"rounds" + (f", {void} void attempts" if void else "")
        )
        for record in one["rounds"]:
            print(f"  {round_line(record, one['count'])}")


def facts(server: "Server") -> dict[str, Any]:
    """Collect what `privet server status --json` prints.

    Where the SuperLink is down, what it would know is None.

    Of a round: who was asked, came, declined, in numbers only; reasons stay on the device.
    """
    from . import attendance, control, enrolment, setup

    enrolled = [device for device in enrolment.devices(server) if not device.removed]
    known: Sequence[control.Node] | None = None
    started: Sequence[control.Run] = ()
    if _answers(server.inner_port):
        with suppress(StateError):
            known, started = control.nodes(server), control.runs(server)
    keys = {device.card.node for device in enrolled}
    ours = None if known is None else [node for node in known if node.key in keys]
    latest = {one.folder: one.status for one in reversed(started)}
    going = next((Path(one.folder).name for one in started if not one.over), None)
    heard = attendance.read(server.folder / attendance.FILE)
    return {
        "superlink": known is not None,
        "proxy": _answers(server.port),
        "certified_until": setup.certified_until(server).isoformat(),
        "certificates": {
            name: until.isoformat() for name, until in setup.certificates(server).items()
        },
        "warnings": setup.expiring(server, datetime.now(UTC)),
        "devices": {
            "enrolled": len(enrolled),
            "registered": None if ours is None else len(ours),
            "online": None if ours is None else sum(node.status == "online" for node in ours),
            "each": attendance.table(enrolled, heard, known, going),
        },
        "runs": [
            _run_facts(place, latest, known is not None, _names(server))
            for place in sorted((server.folder / "runs").glob("*/config.toml"))
        ],
    }


def _run_facts(
    config: Path, latest: Mapping[str, str], asked: bool, names: Mapping[int, str]
) -> dict[str, Any]:
    from ...common.settings.config import read
    from ..void_rounds import sentence

    place = config.parent
    counts = ("round", "asked", "answered", "declined", "refused", "void")
    return {
        "name": place.name,
        "status": latest.get(str(place), "not started" if asked else "unknown"),
        "count": read(config).rounds.count,
        "rounds": [
            {name: record[name] for name in counts if name in record}
            | ({"why": sentence(record, names)} if record["void"] else {})
            for record in read_lines(place / LOG)
        ],
    }


def prepare(
    server: "Server", config: "Config", *, resume: bool, refuse: Refuse | None = None
) -> "Config":
    """Make the run folder `runs/NAME`, whole or not at all: settings, run id, directory.

    Model, adapter and plan are tried first, so that settings they refuse leave nothing behind. The
    directory is that of the beginning: a run that goes on does so with the newest, which must
    continue it, and with the number of devices it was begun with in its settings.

    Args:
        server, config: where, and the settings as they were given.
        resume: go on with the run there is.
        refuse: raises where nobody could pay for the rounds (`client/privacy/affordable_rounds.py`,
            which this package may not import); gets settings, first plan, and numbers in a
            contribution.

    Returns:
        The resolved settings.

    Raises:
        ConfigError: settings that real devices cannot take part in, or others than the run that
            is resumed was started with and may not go on with (`server/run_folder/resuming.py`).
        RunExists: there is a run of this name, and `resume` is false.
        StateError: nothing to resume, or nobody is enrolled.
    """
    from ...common.settings.config import of_run, to_toml
    from ..directory_listing import newest
    from ..run_folder.resuming import resumed
    from ..run_folder.starting import keep

    config = _resolved(server, config, resume)
    place = server.folder / "runs" / config.name
    if (place / "config.toml").is_file():
        if not resume:
            raise RunExists(
                f"{place} holds a run already; go on with --resume, or choose another name with "
                "--set name=..."
            )
        newest(place)  # refuses a directory that does not continue the run's
        return resumed(place, of_run(place), config)
    config, start = _try_out(server, config, refuse)
    partial = place.with_name(f".{place.name}.partial")
    try:
        with explain_os_errors(place, "make the run folder"):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True, mode=0o700)
        write_atomic(partial / "config.toml", to_toml(config).encode())
        keep(partial, start)
        write_atomic(partial / "run-id", f"{config.name}-{os.urandom(8).hex()}\n".encode())
        with explain_os_errors(place, "make the run folder"):
            write_atomic(partial / "directory", (server.folder / "directory").read_bytes())
            os.replace(partial, place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return config


def _enrolled(server: "Server", name: str, resume: bool) -> int:
    """Count the devices in the directory now.

    A run that goes on has as many as when it was begun.
    """
    from ...common.settings.config import read
    from .enrolment import current

    begun = server.folder / "runs" / name / "config.toml"
    if resume and begun.is_file():
        return read(begun).data.clients
    chain = current(server)
    return 0 if chain is None else len(chain.directory.known)


def _refuse_colluders(server: "Server", config: "Config") -> None:
    from ...common.errors import PrivacyError
    from ...common.secure_aggregation.fleet_directory import refuse_colluders
    from .enrolment import current

    chain = current(server)
    enrolled = 0 if chain is None else len(chain.directory.known)
    try:
        refuse_colluders(config, enrolled)
    except PrivacyError as error:
        raise ConfigError(str(error)) from None


def _resolved(server: "Server", config: "Config", resume: bool) -> "Config":
    """Fill in the number of devices and the task."""
    from ...common.settings.sections import DEVICES

    enrolled = _enrolled(server, config.name, resume)
    data, simulation = config.data, config.simulation
    if data.source != DEVICES:
        raise ConfigError(
            f"data.source = {data.source!r}: a run with real devices says data.source = "
            f'"{DEVICES}"; `privet simulate` runs the others'
        )
    if not enrolled:
        raise StateError(
            "nobody is enrolled in a signed directory; take cards first: privet server enrol "
            "FOLDER CARD..."
        )
    if "clients" in data.model_fields_set and data.clients != enrolled:
        raise ConfigError(
            f"data.clients = {data.clients}, but {enrolled} devices are enrolled; leave it out"
        )
    for name in ("dropout", "noise_cohort"):
        if getattr(simulation, name, None):
            raise ConfigError(f"simulation.{name} is for simulations; leave it out for devices")
    task = data.task
    if task == "auto":
        task = "classification" if data.classes else "generation"
    people = data.model_copy(update={"clients": enrolled, "test_clients": 0, "task": task})
    # validated again: a cohort may be too large for those who are enrolled
    from ...common.settings.config import parse

    found = parse({**config.model_dump(exclude_none=True), "data": people.model_dump()})
    _refuse_colluders(server, found)
    return found


def _try_out(
    server: "Server", config: "Config", refuse: Refuse | None
) -> tuple["Config", "Start | None"]:
    """Refuse settings that cannot run.

    Returns the settings, and the adapter that the run starts from.
    """
    from ...common.model.adapter import exchanged
    from ...common.privacy.plan_maker import make_plan
    from ..ab_estimates import plan_of
    from ..run_folder.starting import take

    if config.ab_run is not None:
        plan_of(config, config.ab_run, config.name, 1)
        return config, None
    sent = exchanged(config)
    plan = make_plan(config, config.name, 1, sent.state.digest, sent.start, sent)
    if refuse is not None:
        refuse(config, plan, sent.released(1).dimension)
    return take(config, sent, [server.folder / "runs"])


def follow(
    server: "Server", place: Path, flower: int, count: int, show: Callable[[str], None]
) -> None:
    """Show each round as it ends, until the run ends.

    A SuperLink that restarts is waited for. A run whose server process was lost (killed, or its
    machine was) is started again from its last checkpoint, after 1, 2, 4 … s and `TRIES` times
    without a round in between.

    Raises:
        RunUnfinished: the run ended without its rounds: it was refused or stopped, was lost too
            often, or too many attempts in a row were void.
    """
    from ..run_folder import run_lock
    from ..void_rounds import round_line
    from . import control

    names = _names(server)

    shown = failures = 0
    gone, silent = False, 0.0
    while True:
        try:
            now = next((r for r in control.runs(server) if r.run_id == flower), None)
            gone = False
        except StateError as error:
            if not gone:
                show(f"waiting: {error}")
            now, gone = None, True
        records = read_lines(place / LOG)  # after the status: the last round is never missed
        for record in records[shown:]:
            show(round_line(record, count, names))
            for line in _arms(record):
                show(line)
        failures = 0 if len(records) > shown else failures
        shown = len(records)
        if now is not None and now.status == "completed":
            break
        is_silent = now is not None and not now.over and run_lock.lost(place, flower)
        silent = silent or time.monotonic() if is_silent else 0.0
        is_lost = is_silent and time.monotonic() - silent >= SILENCE_S
        if now is not None and (is_lost or now.over):
            refused = run_lock.refusal(place, flower)
            if refused or now.status == "stopped" or failures == TRIES:
                raise _ended(place, now, refused)
            failures += 1
            flower = _again(server, place, flower, failures, show)
            silent = 0.0
        time.sleep(LOOK_S)
    _refuse_unfinished(place, count)
    show(f"done: {place / 'adapter' if (place / 'adapter').exists() else place}")


def _names(server: "Server") -> dict[int, str]:
    """What the enrolled devices are called, by number."""
    from . import enrolment

    return {one.number: one.card.name for one in enrolment.devices(server)}


def _refuse_unfinished(place: Path, count: int) -> None:
    """Raise an error when a run ended before all its rounds were done.

    An experiment may find its answer early.
    """
    from .. import void_rounds as void

    records = read_lines(place / LOG)
    found = any(one["found"] for r in records if "look" in r for one in r["look"]["differences"])
    if not found and (done := void.trained(records)) < count:
        raise RunUnfinished(
            f"the run {place.name} ended with {done} of {count} rounds done; what is done is kept: "
            "go on with --resume"
        )


def _ended(place: Path, run: "Run", refused: str) -> RunUnfinished:
    how = "was stopped" if run.status == "stopped" else "failed"
    why = refused or run.details or "its server process ended without a word"
    return RunUnfinished(
        f"the run {place.name} {how}: {why}; see logs/superexec.log, and go on with --resume"
    )


def _again(
    server: "Server", place: Path, flower: int, failures: int, show: Callable[[str], None]
) -> int:
    """Start a lost run again, as soon as the SuperLink answers, and return Flower's new id."""
    from . import control

    wait, told = FIRST_WAIT_S * 2 ** (failures - 1), ""
    show(f"the run was lost; it goes on from its checkpoint in {wait:g} s ({failures} of {TRIES})")
    while True:
        time.sleep(wait)
        try:
            control.stop_run(server, flower)
            # one that was started a moment ago, whose answer was lost
            going = _going(server, place)
            return going if going is not None else control.start_run(server, place)
        except StateError as error:
            if str(error) != told:
                show(f"waiting: {error}")
            wait, told = FIRST_WAIT_S, str(error)


def _going(server: "Server", place: Path) -> int | None:
    """Flower's id of the run that is going on in a folder."""
    from . import control

    found = (r for r in control.runs(server) if r.folder == str(place) and not r.over)
    return next((run.run_id for run in found), None)


def supervise(
    programs: Mapping[str, Sequence[str]],
    environment: Mapping[str, str],
    logs: Path,
    show: Callable[[str], None],
    patience_s: float = PATIENCE_S,
) -> None:
    """Run programs until SIGINT or SIGTERM, and start again whatever ends.

    It is started again after 1, 2, 4 … 60 s.

    What they print goes to `logs/NAME.log` (that of the time before: `NAME.log.1`). On Linux they
    also end when this process is killed.
    """
    stop = False

    def asked(*_: object) -> None:
        nonlocal stop
        stop = True

    before = {number: signal.signal(number, asked) for number in (signal.SIGINT, signal.SIGTERM)}
    children = {name: _Child(name, tuple(command)) for name, command in programs.items()}
    variables = {**os.environ, **environment}
    files = {name: _log(logs, name) for name in children}
    try:
        while not stop:
            for name, child in children.items():
                children[name] = _looked_after(child, variables, files[name], show)
            time.sleep(0.1)
    finally:
        _end([child for child in reversed(children.values()) if child.process], patience_s, show)
        for file in files.values():
            file.close()
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True, eq=False)
class _Child:
    """A program that should be running.

    Attributes:
        process: None while it waits for its next start.
        since: when it was started; `due`: when it is to be (monotonic seconds).
        failures: how often in a row it ended early.
    """

    name: str
    command: tuple[str, ...]
    process: "subprocess.Popen[bytes] | None" = None
    since: float = 0.0
    due: float = 0.0
    failures: int = 0


def _looked_after(
    child: _Child, variables: Mapping[str, str], log: IO[bytes], show: Callable[[str], None]
) -> _Child:
    now = time.monotonic()
    if child.process is None:
        if now < child.due:
            return child
        process = subprocess.Popen(
            child.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=variables,
            start_new_session=True, preexec_fn=_end_with_parent, umask=0o077,
        )  # fmt: skip
        show(f"{child.name} started (process {process.pid})")
        return _Child(child.name, child.command, process, now, 0.0, child.failures)
    code = child.process.poll()
    if code is None:
        return child
    failures = 0 if now - child.since > STEADY_S else child.failures
    wait = min(FIRST_WAIT_S * 2**failures, LONGEST_WAIT_S)
    why = f"killed by signal {-code}" if code < 0 else f"ended with code {code}"
    show(f"{child.name} {why}; {log.name} says why; starts again in {wait:g} s")
    return _Child(child.name, child.command, None, 0.0, now + wait, failures + 1)


def _end(children: Sequence[_Child], patience_s: float, show: Callable[[str], None]) -> None:
    running = [child.process for child in children if child.process is not None]
    for process in running:
        process.terminate()
    limit = time.monotonic() + patience_s
    for process in running:
        try:
            process.wait(max(limit - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        with suppress(ProcessLookupError):  # a run's server part that the SuperExec started
            os.killpg(process.pid, signal.SIGKILL)
    show("all stopped")


def _end_with_parent() -> None:
    """Have this child end when its parent dies, even by SIGKILL (Linux only)."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _log(logs: Path, name: str) -> IO[bytes]:
    path = logs / f"{name}.log"
    with explain_os_errors(path, "write"):
        if path.exists():
            os.replace(path, f"{path}.1")
        return open(path, "ab", buffering=0, opener=owners_own)


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def say(line: str) -> None:
    """Print one line with the time, at once."""
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def _number(value: int | None) -> str:
    return "?" if value is None else str(value)


def _device(one: Mapping[str, Any]) -> str:
    """Show a device as `0 desk  privet 0.1.0  seen 2026-11-30 07:10  accepted`."""
    name = f" {one['name']}" if one["name"] else ""
    seen = one["last_seen"]
    parts = [
        f"{one['number']}{name}",
        f"privet {one['version']}" if one["version"] else "version unknown",
        "online"
        if one["online"]
        else f"seen {seen[:16].replace('T', ' ')}"
        if seen
        else "never seen",
        "accepted" if one["accepted"] else "" if one["accepted"] is None else "not accepted",
        f"missing: {one['missing']}" if one["missing"] else "",
    ]
    return "  ".join(filter(None, parts))


def _arms(record: Mapping[str, Any]) -> list[str]:
    """Show what an experiment's look said. A round of training has nothing to show."""
    if "look" not in record:
        return []
    from ..ab_estimates import lines

    return lines(record["look"])
