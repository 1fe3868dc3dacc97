"""An A/B experiment in the field: what server and devices must agree on.

A device is in one arm. At each look it releases three public-sized numbers in the slots of its own
arm and zeros elsewhere, and takes no other part: nothing is trained.

    binary    (1, y)        y = -1 or 1, a template's answer rejected or accepted
    bounded   (1, y, y^2)   y in [-1, 1], an outcome within public bounds

The vector is a contribution like any other (DESIGN section 1): its clip is its public l2 norm, and
`client/privacy/gate.py` lets it out. A device without an outcome yet releases zeros.

**Guarantee**: the noise is sized for all planned looks together: whoever takes part in every look
has spent at most `privacy.epsilon`, client-level, at `privacy.delta`. A look that is not taken is
not charged.
"""

import functools
import tomllib
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import ConfigError
from .model.vector_layout import Layout
from .settings import former_names
from .settings.config import Config, parse
from .settings.faults import faults
from .settings.sections import MAX_ARMS, AbRunSettings, Adjacency, SecureAggregationSettings

__all__ = ["AbTestSettings", "OnDevices", "layout", "read", "run_settings"]

OWN_NAMES = {
    "data.clients": "clients",
    "rounds.cohort": "clients",
    "rounds.count": "looks",
    "privacy.client.noise_at": "privacy.noise_at",
    "privacy.budget.client": "privacy.epsilon",
}
"""A run's settings that an experiment has under other names; of sentences about them."""
BITS = 32  # a contribution is a few numbers: the finest grid costs a few bytes


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class AbPrivacy(_Settings):
    """What all looks together may cost a person."""

    epsilon: float = Field(1.0, ge=1e-3, description="client-level, of all looks")
    delta: float = Field(1e-5, gt=0, lt=1)
    noise_at: Literal["device", "distributed"] = "distributed"
    adjacency: Adjacency = "add_remove"


class SimulatedPeople(_Settings):
    """Simulated people with a truth that is known."""

    means: tuple[float, ...] = Field((0.5, 0.6), description="of the outcome, arm by arm")
    spread: float = Field(0.2, gt=0, description="bounded: standard deviation before the clip")
    dropout: float = Field(0.0, ge=0, lt=1, description="chance that a device misses a look")
    masks: bool = Field(False, description="run the masking protocol; meant for small cohorts")


class OnDevices(_Settings):
    """How long real devices are waited for."""

    gather_s: float = Field(30.0, ge=0, description="the first look, for everybody to be there")
    timeout_s: float = Field(86400.0, gt=0, description="any look, for as many as it needs")
    answer_s: float = Field(60.0, gt=0, description="a device's answer")
    patience: int = Field(10, ge=1, description="void attempts in a row that end the experiment")
    wait_s: float = Field(120.0, ge=0, description="longest wait after one; 1, 2, 4 s first")


class AbTestSettings(AbRunSettings):
    """One experiment: arms, outcome, looks, and what it may cost."""

    name: str = Field("ab", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    arms: tuple[str, ...] = Field(("A", "B"), min_length=2, max_length=MAX_ARMS)
    clients: int = Field(2000, ge=2, description="devices asked at each look")
    privacy: AbPrivacy = Field(default_factory=AbPrivacy)
    secure_aggregation: SecureAggregationSettings = Field(default_factory=SecureAggregationSettings)
    devices: OnDevices = Field(default_factory=OnDevices)
    simulated: SimulatedPeople = Field(default_factory=SimulatedPeople)

    @property
    def ab_run(self) -> AbRunSettings:
        """The part of the experiment that devices are told."""
        return AbRunSettings(**{name: getattr(self, name) for name in AbRunSettings.model_fields})

    @model_validator(mode="after")
    def _a_truth_for_each_arm(self) -> Self:
        if len(self.simulated.means) != len(self.arms):
            raise ValueError(
                f"simulated.means = {list(self.simulated.means)}: expected one for each of the "
                f"{len(self.arms)} arms"
            )
        if not all(self.low <= mean <= self.high for mean in self.simulated.means):
            raise ValueError(
                f"simulated.means = {list(self.simulated.means)}: expected numbers from "
                f"{self.low} to {self.high}"
            )
        return self

    @model_validator(mode="after")
    def _masks_need_shares_of_noise(self) -> Self:
        if self.simulated.masks and self.privacy.noise_at == "device":
            raise ValueError(
                'simulated.masks = true: expected privacy.noise_at = "distributed", for a sum '
                "under masks is made of the devices' shares of its noise"
            )
        return self


def read(path: Path) -> AbTestSettings:
    """The experiment in a TOML file.

    Raises:
        ConfigError: it cannot be read, or a sentence for each fault.
    """
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the experiment {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    try:
        settings = AbTestSettings.model_validate(
            former_names.with_names_of_today(table, former_names.AB_TEST)
        )
    except ValidationError as error:
        raise ConfigError(f"{path} does not fit:\n{faults(error, AbTestSettings)}") from None
    run_settings(settings)
    return settings


def layout(settings: AbRunSettings) -> Layout:
    """Return the layout of an experiment's numbers: the meaning of the outcome and the arms.

    The gate compares its digest with the plan's.
    """
    meant = f"{settings.outcome} from {settings.low!r} to {settings.high!r}"
    return Layout("ab", meant, tuple((arm, (settings.entries,)) for arm in settings.arms))


@functools.lru_cache(maxsize=16)
def run_settings(settings: AbTestSettings, slack: float = 0.0, ratio: float = 0.0) -> Config:
    """The experiment as settings of a run in which each look is a round.

    Args:
        settings: the experiment.
        slack, ratio: how close a look's integer noise is to Gaussian noise
            (`common/privacy/noise.py`); with zeros the noise multiplier is a floor, which is what a
            device insists on.

    Raises:
        ConfigError: no noise reaches the epsilon, or masks leave too few honest devices.
    """
    from .privacy.accounting import calibrate  # scipy: only where a number is asked for

    asked = settings.privacy
    multiplier = calibrate(
        asked.epsilon, asked.delta, settings.looks, asked.adjacency, slack, ratio
    )
    table = {
        "name": settings.name,
        "data": {"source": "ab", "clients": settings.clients, "test_clients": 0},
        # no release beyond the looks, which the epsilon is of
        "rounds": {"count": settings.looks, "cohort": settings.clients, "extra_releases": 0},
        "secure_aggregation": settings.secure_aggregation.model_dump(),
        "privacy": {
            "delta": asked.delta,
            "example": {"enabled": False},
            "client": {
                "noise_at": asked.noise_at,
                "noise_multiplier": multiplier,
                "clip": settings.norm,
                "adjacency": asked.adjacency,
                "bits": BITS,
            },
            "budget": {"client": asked.epsilon},
        },
    }
    try:
        return parse(table, source=f"the experiment {settings.name}")
    except ConfigError as error:
        message = str(error)
        for theirs, ours in OWN_NAMES.items():
            message = message.replace(theirs, ours)
        raise ConfigError(message) from None
