"""Scenarios: what `privet evaluate` compares, on whom, as a few lines of TOML.

    title = "Shakespeare's roles"
    run = "demo"              # a finished run; or `config`, and the base model stands alone

    [people]
    users = 48

Those of `experiments/scenarios/` go by their names.
"""

import hashlib
import json
import tomllib
import warnings
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from ...client.personal.scored_text import OPENING
from ...common.errors import ConfigError
from ...common.files import explain_os_errors
from ...common.settings.faults import faults
from ...common.settings.former_names import FormerName
from ...common.settings.sections import Section
from ..named import toml_file

__all__ = ["FOLDER", "Scenario", "known", "read"]

FOLDER = Path(__file__).parent.parent / "scenarios"


class PeopleSettings(Section):
    """Who is measured, and on what.

    What is left out is as in the run's `[evaluation]`: then the scenario has the same figures for
    base model, shared model and personal head as the run's own report.
    """

    users: int | None = Field(None, ge=1)
    whom: Literal["seen", "unseen", "everybody"] = Field(
        "seen", description="seen: took part in training; unseen: never did"
    )
    records: int | None = Field(
        None, ge=1, description="held-out records of each, spread over their time"
    )
    own_records: int | None = Field(
        None, ge=1, description="latest own records: heads and retrieval"
    )
    validation: float = Field(0.3, gt=0, lt=1, description="of the own records, to choose a model")
    seed: int | None = Field(None, ge=0, description="public: who is drawn; the run's data.seed")


class RetrievalSettings(Section):
    """The earlier text that retrieval puts in front of a record."""

    tokens: int = Field(96, ge=2, description="of earlier text, whole records")
    opening: int = Field(OPENING, ge=1, description="tokens given of each record, never scored")
    meaning: bool = Field(True, description="sentence vectors (MiniLM) besides words")


class AnswerSettings(Section):
    """Texts that are made: overlap, style, diversity, cluster swap."""

    users: int = Field(0, ge=0)
    records: int = Field(4, ge=1)
    tokens: int = Field(24, ge=1)
    temperature: float = Field(0.8, ge=0.01, le=100)


class ColdStartSettings(Section):
    """A newcomer with so many records."""

    users: int = Field(0, ge=0)
    counts: tuple[int, ...] = (0, 1, 2, 4, 8, 16)

    @field_validator("counts")
    @classmethod
    def _rising(cls, counts: tuple[int, ...]) -> tuple[int, ...]:
        if not counts or min(counts) < 0 or list(counts) != sorted(set(counts)):
            raise ValueError("expected rising numbers of records of at least 0")
        return counts


class HarmSettings(Section):
    """What counts as a finding, and how many people's rare strings are tried."""

    memory_users: int = Field(0, ge=0)
    segments: int = Field(3, ge=2, description="parts by amount of own data")
    topics: int = Field(3, ge=0, description="clusters of people by the words they use; 0: none")
    groups: str = Field("", description="a JSON file, user -> declared group")
    gap: float = Field(0.1, gt=0, description="difference of gains between segments, share of loss")
    touched: float = Field(0.05, ge=0, le=1, description="share of users hurt that is a finding")
    diversity: float = Field(0.1, gt=0, description="relative loss of distinct-2")
    exposure: float = Field(1.0, gt=0, description="bits above the base model")


class Scenario(Section):
    """One comparison: which models, on whom, by what measures."""

    name: str = Field("", pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]{0,63})?$")
    title: str = ""
    run: str = Field("", description="a run's name, or its folder")
    config: str = Field("", description="settings of people who were never trained on")
    bootstrap: int = Field(2000, ge=100)
    adapters: dict[str, tuple[str, ...]] = Field(
        {}, description="name -> other runs of the same adapter; own records choose among several"
    )
    people: PeopleSettings = PeopleSettings()
    retrieval: RetrievalSettings = RetrievalSettings()
    answers: AnswerSettings = AnswerSettings()
    cold_start: ColdStartSettings = ColdStartSettings()
    harm: HarmSettings = HarmSettings()

    @model_validator(mode="after")
    def _one_source(self) -> "Scenario":
        if bool(self.run) == bool(self.config):
            raise ValueError("name either run (a finished run) or config (the base model alone)")
        return self

    @property
    def digest(self) -> str:
        """SHA-256 of what decides a person's lines: not how many people a further stage has."""
        chosen = self.model_dump(
            mode="json",
            exclude={
                "name": True,
                "title": True,
                "bootstrap": True,
                "harm": True,
                "answers": {"users"},
                "cold_start": {"users"},
            },
        )
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()


def known() -> list[str]:
    """The names of the scenarios that privet brings."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def read(name: str) -> Scenario:
    """A scenario by its name or file.

    Raises:
        ConfigError: there is none; not TOML; settings that do not fit, each in one sentence.
    """
    path = toml_file(name, FOLDER, "scenario")
    try:
        with explain_os_errors(path, "read"):
            table = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    if table.pop("precision", None) is not None:
        sentence = "precision is no key of a scenario any more: its run's [compute] says it"
        warnings.warn(FormerName(sentence), stacklevel=2)
    try:
        return Scenario.model_validate({"name": path.stem, **table})
    except ValidationError as error:
        raise ConfigError(f"{path} does not fit:\n{faults(error, Scenario)}") from None
