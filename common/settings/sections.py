"""The sections of an experiment's settings: frozen, validated, a class for each.

Privacy settings are a type of their own (`PrivacySettings`); speed settings another
(`SpeedSettings`): nothing in the latter may change a result.
"""

import math
import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from ..model.families import family_named
from ..model.server_optimizers import optimizer_named

NoiseAt = Literal["device", "distributed", "server"]
Adjacency = Literal["add_remove", "zero_out", "replace_one"]
FamilyName = Annotated[str, AfterValidator(lambda name: family_named(name).name)]
"""An adapter family by its name, or that of before."""
OptimizerName = Annotated[str, AfterValidator(lambda name: optimizer_named(name).name)]
Quantization = Literal["none", "int8", "nf4"]
Task = Literal["auto", "generation", "regression", "classification", "preference"]

NEW_DEVICE = {"client": 10.0, "example": 15.0}
"""Epsilon for each unit that a new device's policy.toml allows over all runs, and that a simulated
client, which has no owner, spends in a run without a cap of its own."""

MAX_ARMS = 8
DEVICES = "devices"
"""`data.source` of a run on people's own devices: their records are nobody else's to name."""

ARM_ON_DEVICES = re.compile(r"[a-z0-9][a-z0-9-]{0,63}(@[0-9]{1,6}(\.[0-9]{1,6}){2})?")


class Section(BaseModel):
    """One section of a file of settings: frozen, and without keys that it does not know."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, strict=False, defer_build=True
    )


class DataSettings(Section):
    """Whose records, and which of them are held out."""

    source: str = Field("shakespeare", min_length=1)
    clients: int = Field(256, ge=1, description="train users, each one client")
    test_clients: int = Field(64, ge=0, description="users never trained on")
    min_records: int = Field(20, ge=1, description="users with fewer records are left out")
    records_per_client: int = Field(32, ge=1, description="public cap; fixes the Poisson rate")
    holdout: float = Field(0.3, gt=0, lt=1, description="last fraction of each user's records")
    max_tokens: int = Field(48, ge=4, description="a record is cut after this many tokens")
    seed: int = Field(7, ge=0, description="public: which users are drawn, and every cohort")
    task: Task = Field("auto", description="auto: what the records' labels say")
    classes: tuple[str, ...] = Field((), description="classification: the public label names")


class ModelSettings(Section):
    """The frozen public base model: a catalogue name, Hugging Face id, folder or GGUF file."""

    base: str = Field("smollm2-135m-instruct", min_length=1)


DEVICE = r"^(auto|cpu|mps|cuda(:[0-9]{1,3})?)$"


class ComputeSettings(Section):
    """Where the frozen base model computes, and in which numbers (`common/model/compute.py`)."""

    device: str = Field("auto", pattern=DEVICE)
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the base model's weights; all that is trained is float32"
    )
    quantization: Quantization = Field(
        "none", description="how the weights of the blocks' linear layers are kept"
    )
    gradient_checkpointing: bool = Field(
        False, description="compute each block twice and keep little of it: less memory, more time"
    )


class AdapterSettings(Section):
    """What is trained and released.

    Section 5 of DESIGN tells the families apart.
    """

    family: FamilyName = "lora_xs"
    rank: int = Field(4, ge=1, le=256)
    last_blocks: int = Field(12, ge=1, description="only the last blocks are adapted")
    modules: tuple[str, ...] = Field((), description="linear layers by name; empty: the usual four")
    seed: int = Field(7, ge=0, description="public: the frozen factor of ffa and lora's start")
    start: str = Field("", max_length=1024, description="a run to start from; empty: anew")


class ClusterSettings(Section):
    """Cluster adapters: each device picks one in private, and trains that one."""

    count: int = Field(1, ge=1, le=16, description="cluster adapters; 1: one for everybody")
    extra: int = Field(2, ge=0, le=16, description="more than that while groups are looked for")
    warmup: int = Field(1, ge=1, description="rounds with one adapter, before it is split")
    merge_every: int = Field(3, ge=1, description="rounds from the split, or a merger, to the next")
    spread: float = Field(0.3, gt=0, le=1, description="of the split, over how far it has moved")
    min_share: float = Field(0.05, gt=0, lt=1, description="share of members: least denominator")
    members_share: float = Field(0.35, gt=0, lt=1, description="of the clip, for the members")
    seed: int = Field(7, ge=0, description="public: in which directions the adapter is split")

    @property
    def max_clusters(self) -> int:
        """The most clusters there are at any time. A state has a place for each."""
        return 1 if self.count == 1 else self.count + self.extra

    def active_clusters(self, number: int) -> int:
        """Return how many clusters there are to pick from in round `number`.

        It is one while warming up, then `max_clusters`, then one less each merger, down to `count`.
        """
        if number <= self.warmup:
            return 1
        return max(self.count, self.max_clusters - (number - 1 - self.warmup) // self.merge_every)


class TrainingSettings(Section):
    """Local steps on one device."""

    steps: int = Field(1, ge=1, le=1000)
    batch_size: int = Field(8, ge=1, description="expected size; the public denominator")
    learning_rate: float = Field(1.0, gt=0)
    ends: bool = Field(True, description="texts: learn where a record ends, too")
    opening: int = Field(
        0, ge=0, description="texts: first tokens, at most half of a record, that are not learnt"
    )
    packed: int = Field(
        0, ge=0, description="texts: whole records in rows of so many tokens, which count as one"
    )
    constant: bool = Field(
        False, description="the same work whatever the records are; real devices always"
    )


class PreferenceSettings(Section):
    """DPO on pairs of answers (`common/model/dpo.py`), with `data.task = "preference"`."""

    score: Literal["likelihood", "head"] = Field(
        "likelihood", description="of an answer: its log-likelihood, or a head on its state"
    )
    beta: float = Field(0.1, gt=0, description="how dear it is to leave the reference model")
    length_normalised: bool = Field(False, description="likelihood a token, not of the whole")
    length_controlled: bool = Field(
        True, description="the personal head has no part along what goes with length"
    )


class ExamplePrivacySettings(Section):
    """DP-SGD inside local training (Opacus): the unit is one record."""

    enabled: bool = True
    noise_multiplier: float = Field(0.5, ge=0)
    clip: float = Field(1.0, gt=0, description="l2 bound of one record's gradient")
    adjacency: Adjacency = Field("zero_out", description="a record put in would move others")


class ClientPrivacySettings(Section):
    """Clip and noise of the whole contribution: the unit is one client."""

    enabled: bool = True
    noise_at: NoiseAt = "distributed"
    noise_multiplier: float = Field(1.0, ge=0)
    clip: float = Field(1.0, gt=0, description="l2 bound of one client's contribution")
    adjacency: Adjacency = "add_remove"
    bits: int = Field(0, ge=0, le=32, description="the sum is taken modulo 2**bits; 0: chosen")


MAX_PARTICIPANTS = 1 << 14
"""Largest roster; it bounds every masked message but the vector."""


def quorum(participants: int, colluders: int) -> int:
    """How many of a roster must sign one survivor list before anybody opens a share.

    **Guarantee**: with at most `colluders` dishonest participants no two lists can both have so
    many signatures: two such sets have more than `colluders` members in common, so an honest one
    among them, and an honest device signs one list only.
    """
    return (participants + colluders) // 2 + 1


class SecureAggregationSettings(Section):
    """Secure aggregation, with `noise_at = "distributed"`: what a sum must have to be opened."""

    survivors: float = Field(0.6, gt=0, le=1, description="smallest accepted share of the cohort")
    colluding: float = Field(
        0.1,
        ge=0,
        description="devices of the whole fleet that may work with the server: their number, or "
        "below 1 that share of rounds.cohort, rounded up",
    )
    min_cohort: int = Field(10, ge=3, description="the device's own: no roster below it")
    degree: int = Field(0, ge=0, description="neighbours of each device; 0: sized from the above")
    threshold: int = Field(0, ge=0, description="holders that open a secret; 0: sized likewise")

    def min_sum(self, cohort: int) -> int:
        """Return how many vectors a sum must have. Every device's noise is sized for it."""
        return math.ceil(self.survivors * cohort - 1e-9)

    def colluders(self, cohort: int) -> int:
        """Devices of the whole fleet that may collude, where runs have a cohort of this size."""
        return math.ceil(self.colluding * (cohort if self.colluding < 1 else 1) - 1e-9)


class StatisticsSettings(Section):
    """Noised sums that ride in the contribution: losses of the batches, gains."""

    enabled: bool = False
    noise_multiplier: float = Field(3.0, gt=0, description="against the block's public l2 bound")
    loss_bound: float = Field(10.0, gt=0, description="a record's loss is clipped to 0 .. this")
    gains: bool = Field(False, description="what adapter and head gain on held-out records")
    gain_bound: float = Field(0.5, gt=0, description="a gain is clipped to -this .. this")
    gain_noise_multiplier: float = Field(4.0, gt=0)

    def asked(self) -> dict[str, Any]:
        """Which blocks a plan asks for, and their public bounds, as a plan names them."""
        if not self.enabled:
            return {}
        return {
            "losses_bound": self.loss_bound,
            "gains_bound": self.gain_bound if self.gains else 0.0,
        }

    @property
    def asked_for(self) -> tuple[bool, bool]:
        """Whether losses and gains are asked for, in this order."""
        return self.enabled, self.enabled and self.gains

    def multiplier(self, block: str) -> float:
        """Noise of a block over its bound."""
        return {"losses": self.noise_multiplier, "gains": self.gain_noise_multiplier}[block]

    def allows(self, block: str) -> bool:
        """Whether a device with these settings takes part in a block."""
        return self.enabled and (self.gains or block != "gains")


class BudgetSettings(Section):
    """The run's own cap: the largest epsilon per unit that a device spends in it, at its delta.

    Left out: none. What a device spends over all runs is its owner's (policy.toml). A simulated
    client, which has no owner, then has what a new device has (`NEW_DEVICE`).
    """

    client: float | None = Field(None, gt=0)
    example: float | None = Field(None, gt=0)
    open_directory: float = Field(
        0.0,
        ge=0,
        description="client-level against the server, where releases without a closed directory "
        "count with one share of the noise each; 0, or less than client: as client",
    )

    @property
    def simulated(self) -> dict[str, float]:
        """What a simulated client may spend."""
        return {unit: getattr(self, unit) or most for unit, most in NEW_DEVICE.items()}


class PrivacySettings(Section):
    """Everything an epsilon depends on besides what happened."""

    delta: float = Field(1e-5, gt=0, lt=1)
    clip_chosen: Literal["public", "looked"] = Field(
        "public", description="looked: clips were chosen by looking at these very people's norms"
    )
    example: ExamplePrivacySettings = Field(default_factory=ExamplePrivacySettings)
    client: ClientPrivacySettings = Field(default_factory=ClientPrivacySettings)
    budget: BudgetSettings = Field(default_factory=BudgetSettings)
    directory: Literal["closed", "open"] = Field(
        "closed",
        description='whether devices know beforehand which devices there are; "open": a server may '
        "invent the others, so that against it one device's share of the noise counts",
    )


class RoundSettings(Section):
    """How often, with how many, and what the server does with the mean."""

    count: int = Field(4, ge=1)
    cohort: int = Field(64, ge=1, description="clients asked in a round; the public denominator")
    quorum: float = Field(0.5, gt=0, le=1, description="smaller share of replies: round is void")
    patience: int = Field(10, ge=1, description="void attempts in a row that end the run")
    wait_s: float = Field(
        120.0, ge=0, description="real devices: longest wait after a void attempt; 1, 2, 4 s first"
    )
    extra_releases: int = Field(
        2, ge=0, description="releases a device makes beyond count, where rounds were void"
    )
    timeout_s: float = Field(3600.0, gt=0, description="what training may last on a device")
    answer_timeout_s: float = Field(60.0, gt=0, description="the other phases of a round")
    gather_s: float = Field(
        30.0, ge=0, description="how long the first round waits for a whole cohort of real devices"
    )
    tick_s: float = Field(
        0.5, ge=0.1, le=600, description="real devices answer it times a power of four after"
    )
    optimizer: OptimizerName = "fedadam"
    learning_rate: float = Field(0.02, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    second_momentum: float = Field(0.99, ge=0, lt=1)
    adaptivity: float = Field(1e-3, gt=0, description="Adam's tau, in units of the mean delta")


class HeadSettings(Section):
    """The personal head, which is fitted after the release and kept on the device."""

    enabled: bool = True


class SimulationSettings(Section):
    """What simulated devices do not do as real ones would. A real device reads none of it."""

    masking: Literal["protocol", "ideal"] = Field(
        "protocol",
        description="ideal: the same integers are summed without keys and masks, for experiments "
        "that are about learning",
    )

    dropout: float = Field(
        0.0, ge=0, lt=1, description="chance that a device dies for a round, at a random phase"
    )


class AbRunSettings(Section):
    """An A/B experiment: its arms, an outcome for each person, and looks at the outcomes.

    See `common/ab_test.py`.
    """

    arms: tuple[str, ...] = Field((), max_length=MAX_ARMS, description="empty: no experiment")
    outcome: Literal["binary", "bounded"] = "binary"
    low: float = Field(0.0, ge=-1e12, description="public bounds of an outcome; binary: 0 and 1")
    high: float = Field(1.0, le=1e12)
    looks: int = Field(1, ge=1, le=100, description="planned; the noise is sized for all of them")
    stop: bool = Field(False, description="take no further look once a difference is found")
    alpha: float = Field(0.05, gt=0, lt=0.5, description="chance of any false difference, all told")
    spending: Literal["equal", "late"] = Field("equal", description="of alpha over the looks")
    hours: float = Field(0.0, ge=0, description="on devices: with the arms in use, before a look")
    days: float = Field(30.0, gt=0, le=365, description="on devices: an arm is in use no longer")

    @model_validator(mode="after")
    def _one_outcome(self) -> Self:
        if len({*self.arms}) < len(self.arms) or len(self.arms) == 1:
            raise ValueError(f"arms = {list(self.arms)}: expected names that differ, two at least")
        if not self.low < self.high:
            raise ValueError(f"low = {self.low} must be below high = {self.high}")
        if self.outcome == "binary" and (self.low, self.high) != (0.0, 1.0):
            raise ValueError('outcome = "binary" has low = 0 and high = 1; leave both out')
        if self.looks * self.hours > self.days * 24:
            raise ValueError(
                f"hours = {self.hours:g} before each of {self.looks} looks is longer than days = "
                f"{self.days:g}, after which no arm is in use any more"
            )
        return self

    @property
    def entries(self) -> int:
        """Numbers of one arm: (1, y), or (1, y, y^2)."""
        return {"binary": 2, "bounded": 3}[self.outcome]

    @property
    def norm(self) -> float:
        """l2 norm that no contribution exceeds: entries of at most 1, in one arm."""
        return math.sqrt(self.entries)


class EvaluationSettings(Section):
    """What the experimenter measures on simulated devices. No part of it passes the server."""

    users: int = Field(64, ge=1, description="seen users measured, and as many unseen")
    records: int = Field(10, ge=1, description="held-out records of each")
    fit_records: int = Field(24, ge=1, description="own records the head is fitted on")
    bootstrap: int = Field(2000, ge=100)
    metrics_of: Literal["seen", "unseen"] = Field("seen", description="whose table comes first")


class SpeedSettings(Section):
    """Never changes what is computed, but for the rounding of floats by `threads`, `together`."""

    threads: int = Field(2, ge=1)
    processes: int = Field(
        1, ge=1, le=256, description="simulated devices side by side, with a thread each; 1: none"
    )
    together: int = Field(
        1, ge=1, le=1024, description="simulated devices trained in one batch; for small models"
    )
    cache_mb: int = Field(0, ge=0, description="keeps the frozen prefix of records met again")
