"""A federated experiment on one machine, from a configuration to a report. Read this first.

    prepare     people drawn, records laid down as the devices' own files, settings resolved
    rounds      server/rounds.py asks, client/device.py answers (experiments/engine.py is the wire)
    evaluate    personal heads fitted on the devices' records, everybody's loss measured
    report      what was spent, from the ledgers; what people got for it

Each stage leaves files in the run folder and is skipped when they are there: a run that was
interrupted at any moment goes on with `resume`.
"""

import os
import secrets
import shutil
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from ..client.privacy.affordable_rounds import refuse_unpaid
from ..client.privacy.ledger import Ledger
from ..client.privacy.run_ledger import LEDGERS, ledger_path, run_id, run_ledger
from ..client.simulated import DEVICE_SECRET, DIRECTORY, simulated_identity
from ..client.training import records
from ..common.errors import ConfigError, RunExists, RunUnfinished
from ..common.files import explain_os_errors, write_atomic, write_json_atomic
from ..common.model.adapter import exchanged, shared
from ..common.model.compute import as_before
from ..common.privacy.plan_maker import make_plan
from ..common.secure_aggregation.keys import Directory, Secret, write_directory
from ..common.settings import config as settings
from ..common.settings.config import Config
from ..server.round_record import read_records
from ..server.run_folder import starting
from ..server.void_rounds import trained
from . import engine, progress, run_costs
from .data import population
from .data.dialects import BASE, ensure_base
from .data.preference_people import refuse_other_cut
from .evaluation import run_evaluation
from .reports.facts import Measured, Summary
from .reports.privacy_facts import reasons

__all__ = ["prepare", "simulate"]

COMPUTE = "compute"
"""File of a run folder: where its base model computes, in which numbers, and why."""


def simulate(
    config: Config, folder: Path, *, engine_name: str = "local", resume: bool = False
) -> Summary:
    """Run an experiment to its end.

    Args:
        config: the experiment.
        folder: where the run goes; must not exist, unless `resume`.
        engine_name: `local` or `ray`.
        resume: go on with the run that is there.

    Returns:
        The content of `summary.json`.

    Raises:
        RunExists: the folder holds a run and `resume` is false.
        ConfigError: `resume` with other settings than the run was started with.
        RunUnfinished: too many attempts in a row were void; it can be gone on with.
    """
    from .reports import report

    engine.check(engine_name)
    config = prepare(config, folder, resume=resume)
    for warning in config.warnings():
        progress.warn(warning)
    missing = trained(read_records(folder)) < config.rounds.count
    if missing or not (folder / "adapter" / "adapter_config.json").exists():
        _run_rounds(config, folder, engine_name)
    if not (folder / "evaluation.json").exists():
        progress.say("measuring base, shared and personal models on held-out records")
        with run_costs.measuring(folder, "evaluation"):
            write_json_atomic(folder / "evaluation.json", run_evaluation.evaluate(folder, config))
    facts = report.write(folder, measured(folder))
    progress.tensorboard(folder)
    return facts["summary"]


def _run_rounds(config: Config, folder: Path, engine_name: str) -> None:
    computed = _computed(folder)
    progress.say(
        f"{config.data.clients} clients of {config.data.source}, {config.rounds.count} rounds "
        f"of {config.rounds.cohort}, base model {config.model.base}"
        f"{f' in {computed}' if computed else ''}; in {folder}"
    )
    try:
        with run_costs.measuring(folder, "rounds"):
            engine.run(engine_name, folder, config)
    except RunUnfinished:
        _tell_why_devices_declined(folder)
        raise


def _tell_why_devices_declined(folder: Path) -> None:
    """Warn of the reasons in simulated devices' own ledgers, which no server reads."""
    with run_ledger(folder, run_id(folder)) as ledger:
        found = reasons(ledger.declined())
    for reason, count in list(found.items())[:3]:
        progress.warn(f"{count} times a simulated device declined: {reason}")


def prepare(config: Config, folder: Path, *, resume: bool) -> Config:
    """Make the run folder, whole or not at all, and return the resolved settings.

    The people are drawn and their records laid down in a folder beside it, which is renamed when
    it is complete. Model, adapter and grid are tried first, so that a setting they refuse leaves
    nothing behind.
    """
    if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        return _resolved(config, folder, resume)
    refuse_other_cut(config)
    if config.model.base == BASE:
        ensure_base(Path(BASE))
    people = _people(config)
    config = _with_task(config, people)
    sent, compute = exchanged(config), shared(config).base.compute
    config = config.model_copy(update={"compute": compute.settings})
    config, start = starting.take(config, sent, [folder.parent])
    plan = make_plan(config, config.name, 1, sent.state.digest, sent.start, sent)
    dimension = sent.released(1).dimension
    refuse_unpaid(config, plan, dimension, progress.warn)
    sizes = {"dimension": dimension, "upload_bytes": -(-plan.length(dimension) * plan.bits // 8)}
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        with explain_os_errors(folder, "make the run folder"):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True, mode=0o700)
        population.write(people, partial)
        write_atomic(partial / "config.toml", settings.to_toml(config).encode())
        run = f"{config.name}-{secrets.token_hex(8)}"
        write_atomic(partial / "run-id", f"{run}\n".encode())
        starting.keep(partial, start)
        Ledger.open(partial / LEDGERS, owner=run).close()
        _enrol(partial, people.train_users)
        write_json_atomic(partial / run_costs.MEASURED, sizes)
        write_atomic(partial / COMPUTE, f"{compute.line}\n".encode())
        with explain_os_errors(folder, "make the run folder"):
            if folder.exists():
                folder.rmdir()
            os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return config


def _enrol(folder: Path, users: Sequence[str]) -> None:
    """Identities of the simulated devices, and the directory that lists them all."""
    secret = Secret(secrets.token_bytes(32))
    write_atomic(folder / DEVICE_SECRET, secret.value)
    known = {number: simulated_identity(secret, user).public for number, user in enumerate(users)}
    write_directory(folder / DIRECTORY, Directory(known, closed=True))


def measured(folder: Path) -> Measured:
    """What only the run itself could see: time, memory, bytes, versions."""
    kept = run_costs.read(folder)
    rounds, training = kept.get("rounds", 0.0), kept.get("training", 0.0)
    evaluated = kept.get("evaluation", 0.0)
    dimension = len(run_evaluation.global_adapter(folder))
    return {
        "seconds": {
            "total": rounds + evaluated,
            "training": training,
            "overhead": max(rounds - training, 0.0),
            "evaluation": evaluated,
        },
        "peak_rss_bytes": int(kept.get("peak_rss_bytes", 0)),
        "upload_bytes_per_client_round": int(kept.get("upload_bytes", 0)),
        "dimension": dimension,
        "compute": _computed(folder),
        "versions": {
            "python": sys.version.split()[0],
            **{name: version(name) for name in ("privet", "torch", "flwr", "peft", "opacus")},
        },
    }


def _computed(folder: Path) -> str | None:
    """Return where a run's base model computes, and why; None where an earlier privet began it."""
    path = folder / COMPUTE
    return path.read_text("utf-8").strip() if path.is_file() else None


def _resolved(config: Config, folder: Path, resume: bool) -> Config:
    from ..server.run_folder.resuming import resumed

    if not resume:
        raise RunExists(
            f"{folder} holds a run already; go on with --resume, or choose another name with "
            "--set name=..."
        )
    if not (folder / "config.toml").is_file():
        raise RunExists(f"{folder} exists but holds no run of privet; choose another name")
    kept = settings.of_run(folder)
    config = config.model_copy(update={"compute": as_before(config.compute, kept.compute)})
    index = records.read_index(folder)
    ledger_path(folder)
    return resumed(folder, kept, _with_task(config, index))


def _people(config: Config) -> population.Population:
    """Draw all people of the experiment.

    What the source only warns of is said in one line each.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        found = population.load(
            config.data.source,
            clients=config.data.clients,
            test_clients=config.data.test_clients,
            min_records=config.data.min_records,
            seed=config.data.seed,
        )
    for warning in caught:
        progress.warn(str(warning.message))
    return found


def _with_task(config: Config, people: population.Population | records.Index) -> Config:
    chosen = {"task": people.task, "classes": tuple(people.classes or ())}
    for name, value in chosen.items():
        asked = getattr(config.data, name)
        if asked not in ("auto", (), value):
            raise ConfigError(
                f"data.{name} = {asked!r}, but the records of {config.data.source} say {value!r}"
            )
    return config.model_copy(update={"data": config.data.model_copy(update=chosen)})
