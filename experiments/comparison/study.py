"""A scenario's people and models, opened: what every stage of a comparison measures with."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ...client.assistant.retrieval import Encoder
from ...client.device import Device
from ...client.personal.text_evaluator import TextEvaluator
from ...client.privacy.run_ledger import run_id
from ...client.simulated import SimulatedContext
from ...client.training import records
from ...common.errors import ConfigError, StateError
from ...common.files import (
    append_line,
    explain_os_errors,
    read_lines,
    write_json_atomic,
)
from ...common.model.adapter import Vector
from ...common.settings import config as settings
from ...common.settings.config import Config
from ...common.settings.sections import DEVICES
from .. import progress, simulate
from ..evaluation.cluster_evaluation import kept_state
from ..evaluation.people import drawn, partner
from ..named import configuration, run_folder
from .comparisons import ComparisonEvaluator, OwnSide
from .scenario import Scenario

__all__ = ["Line", "Study"]

Line = dict[str, Any]

SIDES = 64  # of about 5 MB each, so that a later stage makes none again


@dataclass(eq=False)
class Study:
    """A scenario's people and models, opened.

    Attributes:
        folder: where the results go.
        users: who is measured, in the order drawn.
        shared: the shared adapter, shape (d,); the start where no round was finished.
        trained: whether a round was.
    """

    scenario: Scenario
    bench: SimulatedContext
    folder: Path
    users: list[str]
    shared: Vector
    trained: bool

    @classmethod
    def open(cls, scenario: Scenario, runs: Path) -> "Study":
        """Open a scenario's run, or prepare its people, and make the results' folder.

        Who is measured is drawn here too.
        """
        run = run_of(scenario, runs)
        if settings.of_run(run).data.source == DEVICES:
            raise ConfigError(f"{run} is a run on real devices: nobody's records can be read here")
        bench = SimulatedContext.open(run.resolve())
        kept = _adapter(bench)
        if kept is None and scenario.run:
            raise StateError(
                f"{run} has no finished round yet; go on with privet simulate --resume"
            )
        shared = bench.trainer.adapter.start if kept is None else kept
        bench = replace(bench, config=_measuring(bench.config, scenario))
        folder = run / "compared" / scenario.name
        study = cls(scenario, bench, folder, _drawn(scenario, bench), shared, kept is not None)
        study._claim()
        return study

    @property
    def labelled(self) -> bool:
        """Whether the records have labels.

        Then there is no text to make or to put in front.
        """
        return self.bench.config.outputs > 0

    @cached_property
    def others(self) -> dict[str, list[Vector]]:
        """The adapters of other runs, by name."""
        return {
            name: [_of_other_run(self.bench, run) for run in runs]
            for name, runs in self.scenario.adapters.items()
        }

    @cached_property
    def evaluator(self) -> ComparisonEvaluator:
        """What texts are evaluated with."""
        wanted, adapter = self.scenario, self.bench.trainer.adapter
        return ComparisonEvaluator(
            TextEvaluator(adapter, self.shared, opening=wanted.retrieval.opening),
            self.trained,
            self.others,
            _encoder() if wanted.retrieval.meaning else None,
            wanted.retrieval.tokens,
            wanted.people.validation,
        )

    @property
    def seed(self) -> int:
        """The public seed of all that is drawn."""
        seed = self.scenario.people.seed
        return self.bench.config.data.seed if seed is None else seed

    def own(self, user: str) -> list[records.Tokenised]:
        """Return a person's latest own records, as token ids."""
        return Device(user, self.bench).measured_on()[0]

    def amount(self, user: str) -> int:
        """Count all own records of a person."""
        return len(self.split(user)[0])

    def held_out(self, user: str) -> list[records.Tokenised]:
        """Return records spread evenly over the held-out time, as a run's evaluation has them."""
        return Device(user, self.bench).measured_on()[1]

    def side(self, user: str) -> OwnSide:
        """Return what a person's device made of the own records.

        The latest `SIDES` are kept.
        """
        sides = self.__dict__.setdefault("_sides", {})
        if user not in sides:
            while len(sides) >= SIDES:
                sides.pop(next(iter(sides)))
            sides[user] = OwnSide.of(self.evaluator, self.own(user))
        found: OwnSide = sides[user]
        return found

    def partner(self, user: str) -> str | None:
        """Return whose texts and head the controls take: the next person, of the same group if any.

        It is None where there is nobody else.
        """
        if len(self.users) < 2:
            return None
        return partner(self.bench.index, self.users, self.users.index(user))

    def stage(
        self, name: str, users: Sequence[str], measure: Callable[[str], Line | None]
    ) -> list[Line]:
        """Compute one line a person, reading those of an earlier call from the stage's file."""
        path = self.folder / f"{name}.jsonl"
        lines = read_lines(path)
        if not all(isinstance(line.get("user"), str) for line in lines):
            raise StateError(f"{path} has a line without a user; remove the file: it is made again")
        done = {line["user"]: line for line in lines}
        with progress.counting(name, len(users), "people") as one:
            for user in users:
                if user not in done:
                    done[user] = {"user": user, **(measure(user) or {"nothing": True})}
                    append_line(path, done[user])
                one()
        return [done[user] for user in users if "nothing" not in done[user]]

    def split(self, user: str) -> tuple[tuple[records.Record, ...], tuple[records.Record, ...]]:
        """Return a person's own records and the held-out later ones."""
        return records.split(self.bench.records(user), self.bench.config.data.holdout)

    def _claim(self) -> None:
        """Make the folder for these settings and this adapter, or refuse one of others."""
        path = self.folder / "settings.json"
        adapter = hashlib.sha256(self.shared.tobytes()).hexdigest()
        mine: Line = {"scenario": self.scenario.digest, "adapter": adapter, "users": self.users}
        if self.others:
            mine["others"] = {
                name: [hashlib.sha256(one.tobytes()).hexdigest() for one in found]
                for name, found in self.others.items()
            }
        with explain_os_errors(self.folder, "make the folder"):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.exists() and _settings_of(path) != mine:
            raise StateError(
                f"{self.folder} holds results of other settings or of another adapter; remove it, "
                "or give the scenario another name"
            )
        write_json_atomic(path, mine)


def _adapter(bench: SimulatedContext) -> Vector | None:
    layout = bench.trainer.adapter.layout.digest
    return kept_state(bench.folder, bench.run, bench.config, layout)


def _of_other_run(bench: SimulatedContext, run: str) -> Vector:
    """The shared adapter of another run, which must have the same layout."""
    folder = Path(run)
    config = settings.of_run(folder)
    layout = bench.trainer.adapter.layout.digest
    kept = kept_state(folder, run_id(folder), config, layout)
    if kept is None:
        raise StateError(f"{folder} has no finished round; adapters takes finished runs")
    return kept


def _settings_of(path: Path) -> object:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise StateError(
            f"{path} cannot be read as JSON ({error}): what the results beside it were made with "
            f"is unknown; remove {path.parent}, and they are made again"
        ) from None


def _measuring(config: Config, scenario: Scenario) -> Config:
    """Return a run's settings with what the scenario measures in place of its own."""
    people = scenario.people
    wanted = {"users": people.users, "records": people.records, "fit_records": people.own_records}
    named = {name: value for name, value in wanted.items() if value is not None}
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update=named)})


def _drawn(scenario: Scenario, bench: SimulatedContext) -> list[str]:
    """Draw who is measured, as a run's evaluation does."""
    index, people = bench.index, scenario.people
    if people.whom == "unseen":
        able: Sequence[str] = index.test_users
    elif people.whom == "everybody":
        able = [*index.train_users, *index.test_users]
    else:
        able = [user for user in index.train_users if bench.ledger.participations(user)]
    return drawn(able, bench, people.seed)


def _encoder() -> Encoder:
    from ...client.assistant.sentence_encoder import sentence_encoder

    return sentence_encoder()


def run_of(scenario: Scenario, runs: Path) -> Path:
    """The folder of the run that the scenario names, or of one that is prepared for it."""
    if scenario.run:
        return run_folder(scenario.run, runs)
    config = configuration(scenario.config)
    simulate.prepare(config, runs / config.name, resume=True)
    return runs / config.name
