"""`privet server`: init, enrol, up, run, ab, status.

Heavy imports wait inside the functions, so that `privet server status` answers at once.
"""

import json
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...common.errors import AssetError, ConfigError, StateError
from . import directory_commands

if TYPE_CHECKING:
    from ...common.settings.config import Config
    from .server_folder import Server

__all__ = ["app", "facts", "say"]

app = typer.Typer(help="The server: set it up, let devices join, run.", no_args_is_help=True)
app.add_typer(directory_commands.app, name="directory")

_Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="The server's folder.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
_Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="A TOML file.")]
_Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run there is.")]


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
    no_proxy: Annotated[
        bool, typer.Option("--no-proxy", help="For devices on this machine only: a test.")
    ] = False,
) -> None:
    """Run SuperLink, SuperExec and proxy here until Ctrl-C (for good, use the systemd units)."""
    from ...common.child_processes import stop_on_signals, supervise
    from . import proxy, services, setup

    server, nginx = setup.load(folder), proxy.find_nginx()
    if nginx is None and not no_proxy:
        raise AssetError(
            "there is no nginx on PATH or in /usr/sbin; install it (sudo apt install nginx, or "
            "your system's package of that name)"
        )
    for number in (server.port, server.inner_port):
        if _answers(number):
            raise StateError(
                f"port {number} is taken already: is `privet server up` running elsewhere? Stop it"
            )
    programs = services.programs(server, nginx)
    if no_proxy:
        programs = [program for program in programs if program.name != "proxy"]
    supervise(programs, stop_on_signals(), say=say)


@app.command("run")
def run(
    context: typer.Context,
    folder: _Folder,
    config: _Config,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting.")
    ] = None,
    resume: _Resume = False,
) -> None:
    """Start a run with the enrolled devices, follow it, a line a round, and write its report."""
    from ...common.settings.config import read
    from . import setup
    from .device_runs import prepare

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
    run_folder = _followed(server, settings, f"privet server run {folder} {config} --resume")
    if callable(context.obj):
        context.obj(run_folder)


@app.command("ab")
def ab(
    context: typer.Context,
    folder: _Folder,
    config: _Config,
    resume: _Resume = False,
) -> None:
    """Compare templates, or heads, on the enrolled devices: noised sums, keyed arms, paid looks."""
    from ...common.ab_test import read
    from ..ab_estimates import device_settings
    from ..round_record import LOG
    from . import setup
    from .device_runs import enrolled_in, prepare

    server, settings = setup.load(folder), read(config)
    enrolled = enrolled_in(server, settings.name, resume)
    run = prepare(server, device_settings(settings, enrolled), resume=resume)
    run_folder = _followed(server, run, f"privet server ab {folder} {config} --resume")
    asked = settings.privacy
    masks = ""
    if asked.noise_at == "distributed":
        max_colluders = settings.secure_aggregation.colluders(settings.clients)
        masks = (
            f" (if: closed directory; at most {max_colluders} of the {enrolled:,} enrolled devices "
            "collude with the server)"
        )
    print(
        f"a device that took part in all {settings.looks} looks has spent at most epsilon "
        f"{asked.epsilon:g} at delta {asked.delta:g}, client-level, {asked.adjacency}, noise "
        f"{asked.noise_at}, against the analyst and the server{masks}; its own ledger says what it "
        "did spend (privet client budget)"
    )
    print(f"{run_folder / LOG} has every number")
    if callable(context.obj):
        context.obj(run_folder)


def _followed(server: "Server", settings: "Config", again: str) -> Path:
    """Show a prepared run until it ends, and return its folder.

    It is started, unless it is going already.
    """
    from . import control
    from .device_runs import follow, going_on

    run_folder = server.folder / "runs" / settings.name
    going = going_on(server, run_folder)
    flower = going if going is not None else control.start_run(server, run_folder)
    rounds, what = settings.rounds, "rounds" if settings.ab_run is None else "looks"
    print(f"run {settings.name}: {rounds.count} {what} of {rounds.cohort} devices")
    try:
        follow(server, run_folder, flower, rounds.count, print)
    except KeyboardInterrupt:
        print(
            "\nThe run goes on without this command. Look: privet server status "
            f"{server.folder}\nFollow it again: {again}",
            file=sys.stderr,
        )
        raise SystemExit(130) from None
    return run_folder


@app.command("status")
def status(folder: _Folder, as_json: _Json = False) -> None:
    """What is up, who is enrolled and online, how far the runs are."""
    from ..void_rounds import round_line
    from . import setup

    status_facts = facts(setup.load(folder))
    if as_json:
        print(json.dumps(status_facts, indent=2))
        return
    for name in ("superlink", "proxy"):
        print(f"{name}: {'up' if status_facts[name] else 'DOWN'}")
    print(f"certificates: until {status_facts['certified_until'][:10]}")
    for warning in status_facts["warnings"]:
        print(f"WARNING: {warning}")
    people = status_facts["devices"]
    print(
        f"devices: {people['enrolled']} enrolled, {_number(people['registered'])} registered, "
        f"{_number(people['online'])} online"
    )
    for device in people["each"]:
        print(f"  {_device(device)}")
    for run in status_facts["runs"]:
        void = sum(record["void"] for record in run["rounds"])
        print(
            f"run {run['name']}: {run['status']}, {len(run['rounds']) - void} of {run['count']} "
            f"rounds" + (f", {void} void attempts" if void else "")
        )
        for record in run["rounds"]:
            print(f"  {round_line(record, run['count'])}")


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
    latest = {run.folder: run.status for run in reversed(started)}
    going = next((Path(run.folder).name for run in started if not run.over), None)
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
            _run_facts(path, latest, known is not None, enrolment.names(server))
            for path in sorted((server.folder / "runs").glob("*/config.toml"))
        ],
    }


def _run_facts(
    config: Path, latest: Mapping[str, str], asked: bool, names: Mapping[int, str]
) -> dict[str, Any]:
    from ...common.settings.config import read
    from ..round_record import read_records
    from ..void_rounds import sentence

    run_folder = config.parent
    counts = ("round", "asked", "answered", "declined", "refused", "void")
    return {
        "name": run_folder.name,
        "status": latest.get(str(run_folder), "not started" if asked else "unknown"),
        "count": read(config).rounds.count,
        "rounds": [
            {name: value for name, value in record.items() if name in counts}
            | ({"why": sentence(record, names)} if record["void"] else {})
            for record in read_records(run_folder)
        ],
    }


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


def _device(device: Mapping[str, Any]) -> str:
    """Show a device as `0 desk  privet 0.1.0  seen 2026-11-30 07:10  accepted`."""
    seen = (
        f"seen {device['last_seen'][:16].replace('T', ' ')}"
        if device["last_seen"]
        else "never seen"
    )
    accepted = {True: "accepted", False: "not accepted", None: ""}
    parts = [
        f"{device['number']} {device['name']}".rstrip(),
        f"privet {device['version']}" if device["version"] else "version unknown",
        "online" if device["online"] else seen,
        accepted[device["accepted"]],
        f"missing: {device['missing']}" if device["missing"] else "",
    ]
    return "  ".join(filter(None, parts))
