"""A run of the enrolled devices: its folder is made, and it is followed to its end.

Modules that load torch wait inside the functions, so that `privet server status` answers at once.
"""

import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ...common.errors import ConfigError, PrivacyError, RunExists, RunUnfinished, StateError
from ...common.files import explain_os_errors, write_atomic
from ...common.secure_aggregation.fleet_directory import refuse_colluders
from ...common.settings.config import Config, of_run, parse, to_toml
from ...common.settings.sections import DEVICES
from .. import void_rounds
from ..directory_listing import newest
from ..round_record import RoundRecord, read_records
from ..run_folder import run_lock
from . import control, enrolment
from .server_folder import Server

if TYPE_CHECKING:
    from ...common.privacy.round_plan import Plan
    from ..run_folder.starting import Start

__all__ = ["enrolled_in", "follow", "going_on", "prepare"]

LOOK_S = 0.5
FIRST_WAIT_S = 1.0
SILENCE_S = 2.0  # a process that ends by itself tells Flower so, a moment after its lock is free
TRIES = 5

Refuse = Callable[[Config, "Plan", int], None]
Show = Callable[[str], None]


def prepare(
    server: Server, config: Config, *, resume: bool, refuse: Refuse | None = None
) -> Config:
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
    from ..run_folder.resuming import resumed
    from ..run_folder.starting import keep

    config = _resolved(server, config, enrolled_in(server, config.name, resume))
    run_folder = server.folder / "runs" / config.name
    if (run_folder / "config.toml").is_file():
        if not resume:
            raise RunExists(
                f"{run_folder} holds a run already; go on with --resume, or choose another name "
                "with --set name=..."
            )
        newest(run_folder)  # refuses a directory that does not continue the run's
        return resumed(run_folder, of_run(run_folder), config)
    config, start = _try_out(server, config, refuse)
    partial = run_folder.with_name(f".{run_folder.name}.partial")
    try:
        with explain_os_errors(run_folder, "make the run folder"):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True, mode=0o700)
        write_atomic(partial / "config.toml", to_toml(config).encode())
        keep(partial, start)
        write_atomic(partial / "run-id", f"{config.name}-{os.urandom(8).hex()}\n".encode())
        with explain_os_errors(run_folder, "make the run folder"):
            write_atomic(partial / "directory", (server.folder / "directory").read_bytes())
            os.replace(partial, run_folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return config


def enrolled_in(server: Server, name: str, resume: bool) -> int:
    """Count the devices of a run: those in the directory now.

    A run that goes on has as many as when it was begun.
    """
    begun = server.folder / "runs" / name
    if resume and (begun / "config.toml").is_file():
        return of_run(begun).data.clients
    return enrolment.count(server)


def _resolved(server: Server, config: Config, enrolled: int) -> Config:
    """Fill in the number of devices and the task."""
    data = config.data
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
    if config.simulation.dropout:
        raise ConfigError("simulation.dropout is for simulations; leave it out for devices")
    task = data.task
    if task == "auto":
        task = "classification" if data.classes else "generation"
    people = data.model_copy(update={"clients": enrolled, "test_clients": 0, "task": task})
    # validated again: a cohort may be too large for those who are enrolled
    resolved = parse({**config.model_dump(exclude_none=True), "data": people.model_dump()})
    try:
        refuse_colluders(resolved, enrolment.count(server))
    except PrivacyError as error:
        raise ConfigError(str(error)) from None
    return resolved


def _try_out(
    server: Server, config: Config, refuse: Refuse | None
) -> tuple[Config, "Start | None"]:
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


def follow(server: Server, run_folder: Path, flower: int, count: int, show: Show) -> None:
    """Show each round as it ends, until the run ends.

    A SuperLink that restarts is waited for. A run whose server process was lost (killed, or its
    machine was) is started again from its last checkpoint, after 1, 2, 4 … s and `TRIES` times
    without a round in between.

    Raises:
        RunUnfinished: the run ended without its rounds: it was refused or stopped, was lost too
            often, or too many attempts in a row were void.
    """
    names = enrolment.names(server)
    shown, failures, silent, waiting = 0, 0, 0.0, ""
    while True:
        run, why = _state(server, flower)
        if why and not waiting:
            show(f"waiting: {why}")
        waiting = why
        records = read_records(run_folder)  # after the status: the last round is never missed
        for line in (line for one in records[shown:] for line in _lines(one, count, names)):
            show(line)
        failures, shown = 0 if len(records) > shown else failures, len(records)
        if run is not None and run.status == "completed":
            break
        is_silent = run is not None and not run.over and run_lock.lost(run_folder, flower)
        silent = silent or time.monotonic() if is_silent else 0.0
        is_lost = is_silent and time.monotonic() - silent >= SILENCE_S
        if run is not None and (run.over or is_lost):
            refused = run_lock.refusal(run_folder, flower)
            if refused or run.status == "stopped" or failures == TRIES:
                raise _ended(run_folder, run, refused)
            failures, silent = failures + 1, 0.0
            flower = _again(server, run_folder, flower, failures, show)
        time.sleep(LOOK_S)
    _refuse_unfinished(run_folder, records, count)
    show(f"done: {run_folder / 'adapter' if (run_folder / 'adapter').exists() else run_folder}")


def _state(server: Server, flower: int) -> tuple[control.Run | None, str]:
    """Return what the SuperLink says of a run, or why it says nothing."""
    try:
        return next((run for run in control.runs(server) if run.run_id == flower), None), ""
    except StateError as error:
        return None, str(error)


def _refuse_unfinished(run_folder: Path, records: list[RoundRecord], count: int) -> None:
    """Raise an error when a run ended before all its rounds were done.

    An experiment may find its answer early.
    """
    looks = [record["look"] for record in records if "look" in record]
    decided = any(difference["found"] for look in looks for difference in look["differences"])
    done = void_rounds.trained(records)
    if done < count and not decided:
        raise RunUnfinished(
            f"the run {run_folder.name} ended with {done} of {count} rounds done; what is done is "
            "kept: go on with --resume"
        )


def _ended(run_folder: Path, run: control.Run, refused: str) -> RunUnfinished:
    how = "was stopped" if run.status == "stopped" else "failed"
    why = refused or run.details or "its server process ended without a word"
    return RunUnfinished(
        f"the run {run_folder.name} {how}: {why}; see logs/superexec.log, and go on with --resume"
    )


def _again(server: Server, run_folder: Path, flower: int, failures: int, show: Show) -> int:
    """Start a lost run again, as soon as the SuperLink answers, and return Flower's new id."""
    wait, reason = FIRST_WAIT_S * 2 ** (failures - 1), ""
    show(f"the run was lost; it goes on from its checkpoint in {wait:g} s ({failures} of {TRIES})")
    while True:
        time.sleep(wait)
        try:
            control.stop_run(server, flower)
            # one that was started a moment ago, whose answer was lost
            going = going_on(server, run_folder)
            return going if going is not None else control.start_run(server, run_folder)
        except StateError as error:
            if str(error) != reason:
                show(f"waiting: {error}")
            wait, reason = FIRST_WAIT_S, str(error)


def going_on(server: Server, run_folder: Path) -> int | None:
    """Flower's id of the run that is going on in a folder."""
    active = (run for run in control.runs(server) if run.folder == str(run_folder) and not run.over)
    return next((run.run_id for run in active), None)


def _lines(record: RoundRecord, count: int, names: Mapping[int, str]) -> list[str]:
    """Show a round's record, or a look's with what it said."""
    line = void_rounds.round_line(record, count, names)
    if "look" not in record:
        return [line]
    from ..ab_estimates import lines

    return [line, *lines(record["look"])]
