"""Going on with a run under settings of which a few may be others: a finished run is extended.

What may change decides how long a run goes on and how long it waits, and no round that is done.
Everything else is refused by name. On devices a changed setting is a changed offer: their owners
are asked again (`client/consent/run_offers.py`).
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...common.errors import ConfigError, StateError
from ...common.files import explain_os_errors, write_atomic
from ...common.settings.config import Config, parse, to_toml
from ..round_record import read_records
from ..void_rounds import trained
from . import checkpoint, run_lock, starting

__all__ = ["CHANGEABLE", "resumed"]

CHANGEABLE = tuple(
    f"rounds.{name}"
    for name in (
        "count", "patience", "wait_s", "extra_releases", "timeout_s", "answer_timeout_s", "gather_s"
    )
)  # fmt: skip
OF_THE_END = ("evaluation.json", "summary.json", "privacy.json", "report.html")


def resumed(folder: Path, kept: Config, wanted: Config) -> Config:
    """Return the settings that the run in `folder` goes on with, and write them to its files.

    Args:
        folder: the run's.
        kept: its settings so far.
        wanted: those it is to go on with; name and speed settings are left as they are.

    Of a run that is extended, what was made at its end is made anew; its adapter so far is kept
    as `adapter-after-N`.

    Raises:
        ConfigError: another setting differs, or more rounds are done than are wanted.
        StateError: a server process is at work in the folder.
    """
    before, after = _flat(kept), _flat(starting.as_kept(folder, kept, wanted))
    changed = [key for key in before if before[key] != after.get(key)]
    other = next((key for key in changed if key not in CHANGEABLE), None)
    if other is not None:
        raise ConfigError(
            f"{folder} was started with other settings ({other} was {before[other]!r}, is now "
            f"{after.get(other)!r}); resume with the same ones, or choose another name with --set "
            f"name=... Of a run that goes on, only {', '.join(CHANGEABLE)} may change"
        )
    if not changed:
        return kept
    done = trained(read_records(folder))
    if wanted.rounds.count < done:
        raise ConfigError(
            f"rounds.count = {wanted.rounds.count}, but {done} rounds of {folder} are done; take "
            f"at least {done} (it has {kept.rounds.count} now)"
        )
    if run_lock.held(folder):
        raise StateError(
            f"the run in {folder} is going on, with other settings ({', '.join(changed)}); wait "
            "until it ends, or stop it, and run this again"
        )
    table = kept.model_dump(mode="json", exclude_none=True)
    table["rounds"] |= {key.removeprefix("rounds."): after[key] for key in changed}
    config = parse(table, source=f"{folder / 'config.toml'}, changed,")
    run = (folder / "run-id").read_text("utf-8").strip()
    checkpoint.restamp(folder, run=run, config_hash=config.digest)
    if config.rounds.count > done:
        _retire(folder, done)
    write_atomic(folder / "config.toml", to_toml(config).encode())
    return config


def _retire(folder: Path, done: int) -> None:
    """Put aside or delete what was made at the run's former end."""
    with explain_os_errors(folder, "extend the run"):
        if (folder / "adapter").exists():
            aside = folder / f"adapter-after-{done}"
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(folder / "adapter", aside)
        for name in OF_THE_END:
            (folder / name).unlink(missing_ok=True)


def _flat(config: Config) -> Mapping[str, Any]:
    table = config.model_dump(mode="json", exclude={"name", "speed"})
    return dict(_leaves(table, ""))


def _leaves(table: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
