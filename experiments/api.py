"""What `import privet` offers to a program: the commands of a simulated experiment as functions."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import tomli_w

from ..common.errors import ConfigError
from ..common.files import write_json_atomic
from ..common.settings.config import Config, of_run, parse
from ..common.settings.sections import DEVICES
from .named import RUNS, configuration, run_folder

if TYPE_CHECKING:  # a run is opened without loading what reports need
    from .reports.facts import Evaluation, Facts, PrivacyFacts, Summary

__all__ = ["Run", "evaluate", "load_config", "report", "simulate"]


@dataclass(frozen=True)
class Run:
    """A run by its folder.

    Attributes:
        folder: where everything of the run is.
    """

    folder: Path

    @classmethod
    def open(cls, run: "str | Path | Run") -> "Run":
        """A run by its folder, or by its name below `runs`.

        Raises:
            StateError: there is none.
        """
        return run if isinstance(run, Run) else cls(run_folder(run))

    @property
    def config(self) -> Config:
        """The resolved settings that the run was made with."""
        return of_run(self.folder)

    @property
    def summary(self) -> "Summary":
        """What people got and what it cost: the content of `summary.json`.

        Raises:
            StateError: the run has no report yet.
        """
        return self._written()["summary"]

    @property
    def privacy(self) -> "PrivacyFacts":
        """What was promised and spent, from the devices' ledgers: the content of `privacy.json`.

        Raises:
            StateError: the run has no report yet.
        """
        return self._written()["privacy"]

    @property
    def adapter_folder(self) -> Path:
        """The shared adapter as a PEFT folder."""
        return self.folder / "adapter"

    def report(self) -> Path:
        """Write `report.html` again, and return its path."""
        return report(self)

    def _written(self) -> "Facts":
        from .reports import report as files

        return files.written(self.folder)


def load_config(
    config: "str | Path | Mapping[str, object]", overrides: Mapping[str, object] | None = None
) -> Config:
    """Settings by the name of a configuration that comes with privet, from a file, or from a table.

    Args:
        config: such as `demo`; a TOML file; or sections as nested mappings.
        overrides: `{"section.key": value}`, on top.

    Raises:
        ConfigError: a setting is wrong or unknown; each fault is named.

    >>> load_config("demo", overrides={"rounds.count": 2}).rounds.count
    2
    """
    given = [f"{key}={_toml(key, value)}" for key, value in (overrides or {}).items()]
    if isinstance(config, Mapping):
        return parse(config, overrides=given)
    return configuration(config, given)


def simulate(
    config: Config, folder: str | Path | None = None, *, engine: str = "local", resume: bool = False
) -> Run:
    """Run a whole experiment on this machine: rounds, evaluation, report.

    Args:
        config: the experiment.
        folder: where the run goes; `runs/NAME` by default.
        engine: `local`, or `ray` for Flower's simulation.
        resume: go on with the run that is there.

    Raises:
        RunExists: the folder holds a run, and `resume` is false.
        ConfigError: `resume` with other settings than the run was begun with.
        RunUnfinished: nobody answered for too long; it can be gone on with.
    """
    from . import simulate as stages

    place = RUNS / config.name if folder is None else Path(folder)
    stages.simulate(config, place, engine_name=engine, resume=resume)
    return Run(place)


def evaluate(run: str | Path | Run) -> "Evaluation":
    """Measure a run's models again, and write its report.

    Returns:
        Each person's losses: `{"name", "unit", "seen": {...}, "unseen": {...}}`; each group has
        the aligned lists `users`, `base`, `global`, `personal`, `swapped_head`.

    Raises:
        ConfigError: a run on real devices, whose people nobody else can measure.
    """
    return evaluated(run)[0]


def evaluated(run: str | Path | Run) -> "tuple[Evaluation, Facts]":
    """As `evaluate`, with the facts of the report that was written.

    Raises:
        ConfigError: as `evaluate`.
    """
    from .evaluation import run_evaluation
    from .reports import report as files

    opened = Run.open(run)
    if opened.config.data.source == DEVICES:
        raise ConfigError(
            f"{opened.folder} is a run on real devices: nobody's losses can be read here"
        )
    losses = cast("Evaluation", run_evaluation.evaluate(opened.folder, opened.config))
    write_json_atomic(opened.folder / "evaluation.json", losses)
    return losses, files.write(opened.folder)


def report(run: str | Path | Run) -> Path:
    """Write a run's `report.html`, `privacy.json` and `summary.json` from its ledgers.

    Returns:
        The page.
    """
    from .reports import report as files

    folder = Run.open(run).folder
    files.write(folder)
    return folder / "report.html"


def _toml(key: str, value: object) -> str:
    """Write a value as TOML does."""
    if "=" in key or isinstance(value, Mapping):
        raise ConfigError(f"{key} = {value!r}: expected section.key and one value for it")
    try:
        return tomli_w.dumps({"value": value}).partition("=")[2].strip()
    except TypeError:
        raise ConfigError(f"{key} = {value!r}: expected what TOML can hold") from None
