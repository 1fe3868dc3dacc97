"""Settings: TOML in, frozen validated types out.

Privacy settings are a type of their own (`PrivacySettings`); speed settings another
(`SpeedSettings`): nothing in the latter may change a result. An unknown key is answered with the
nearest known one, a wrong value with its name, the value, and what is allowed.
"""

import difflib
import hashlib
import json
import math
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from ..errors import ConfigError
from ..model.families import FAMILIES, family_named
from ..model.server_optimizers import optimizer_named
from ..privacy.statistics_blocks import MAX_ARMS
from . import former_names

NoiseAt = Literal["device", "distributed", "server"]
Adjacency = Literal["add_remove", "zero_out", "replace_one"]
FamilyName = Annotated[str, AfterValidator(lambda name: family_named(name).name)]
"""An adapter family by its name, or that of before."""
OptimizerName = Annotated[str, AfterValidator(lambda name: optimizer_named(name).name)]
Task = Literal["auto", "generation", "regression", "classification", "preference"]

NEW_DEVICE = {"client": 10.0, "example": 15.0}
"""Epsilon for each unit that a new device's policy.toml allows over all runs, and that a simulated
client, which has no owner, spends in a run without a cap of its own."""

DEVICES = "devices"
"""`data.source` of a run on people's own devices: their records are nobody else's to name."""

_ARM = re.compile(r"[a-z0-9][a-z0-9-]{0,63}(@[0-9]{1,6}(\.[0-9]{1,6}){2})?")


class _Settings(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, strict=False, defer_build=True
    )


class DataSettings(_Settings):
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


class ModelSettings(_Settings):
    """The frozen public base model: a catalogue name, Hugging Face id, folder or GGUF file."""

    base: str = Field("smollm2-135m-instruct", min_length=1)


class AdapterSettings(_Settings):
    """What is trained and released.

    Section 5 of DESIGN tells the families apart.
    """

    family: FamilyName = "lora_xs"
    rank: int = Field(4, ge=1, le=256)
    last_blocks: int = Field(12, ge=1, description="only the last blocks are adapted")
    modules: tuple[str, ...] = Field((), description="linear layers by name; empty: the usual four")
    seed: int = Field(7, ge=0, description="public: the frozen factor of ffa and lora's start")
    start: str = Field("", max_length=1024, description="a run to start from; empty: anew")


class ClusterSettings(_Settings):
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


class TrainingSettings(_Settings):
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


class PreferenceSettings(_Settings):
    """DPO on pairs of answers (`common/model/dpo.py`), with `data.task = "preference"`."""

    score: Literal["likelihood", "head"] = Field(
        "likelihood", description="of an answer: its log-likelihood, or a head on its state"
    )
    beta: float = Field(0.1, gt=0, description="how dear it is to leave the reference model")
    length_normalised: bool = Field(False, description="likelihood a token, not of the whole")
    length_controlled: bool = Field(
        True, description="the personal head has no part along what goes with length"
    )


class ExamplePrivacySettings(_Settings):
    """DP-SGD inside local training (Opacus): the unit is one record."""

    enabled: bool = True
    noise_multiplier: float = Field(0.5, ge=0)
    clip: float = Field(1.0, gt=0, description="l2 bound of one record's gradient")
    adjacency: Adjacency = Field("zero_out", description="a record put in would move others")


class ClientPrivacySettings(_Settings):
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


class SecureAggregationSettings(_Settings):
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


class StatisticsSettings(_Settings):
    """Noised sums that ride in the contribution: losses of the batches, gains, A/B outcomes."""

    enabled: bool = False
    noise_multiplier: float = Field(3.0, gt=0, description="against the block's public l2 bound")
    loss_bound: float = Field(10.0, gt=0, description="a record's loss is clipped to 0 .. this")
    gains: bool = Field(False, description="what adapter and head gain on held-out records")
    gain_bound: float = Field(0.5, gt=0, description="a gain is clipped to -this .. this")
    gain_noise_multiplier: float = Field(4.0, gt=0)
    arms: tuple[Literal["base", "shared", "personal"], ...] = Field(
        (), max_length=MAX_ARMS, description="models compared: a device measures one of them"
    )
    arm_noise_multiplier: float = Field(4.0, gt=0)

    def asked(self) -> dict[str, Any]:
        """Which blocks a plan asks for, and their public bounds, as a plan names them."""
        if not self.enabled:
            return {}
        return {
            "losses_bound": self.loss_bound,
            "gains_bound": self.gain_bound if self.gains else 0.0,
            "arms": ",".join(self.arms),
            "arms_bound": self.loss_bound if self.arms else 0.0,
        }

    @property
    def asked_for(self) -> tuple[bool, bool, bool]:
        """Whether losses, gains and arms are asked for, in this order."""
        return self.enabled, self.enabled and self.gains, self.enabled and bool(self.arms)

    def multiplier(self, block: str) -> float:
        """Noise of a block over its bound."""
        return {
            "losses": self.noise_multiplier,
            "gains": self.gain_noise_multiplier,
            "arms": self.arm_noise_multiplier,
        }[block]

    def allows(self, block: str, arms: tuple[str, ...]) -> bool:
        """Whether a device with these settings takes part in a block."""
        own = {"losses": True, "gains": self.gains, "arms": {*arms} <= {*self.arms}}
        return self.enabled and own[block]


class BudgetSettings(_Settings):
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


class PrivacySettings(_Settings):
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


class RoundSettings(_Settings):
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


class HeadSettings(_Settings):
    """The personal head, which is fitted after the release and kept on the device."""

    enabled: bool = True


class SimulationSettings(_Settings):
    """How often simulated devices drop out."""

    dropout: float = Field(
        0.0, ge=0, lt=1, description="chance that a device dies for a round, at a random phase"
    )


class AbRunSettings(_Settings):
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


class EvaluationSettings(_Settings):
    """What the experimenter measures on simulated devices. No part of it passes the server."""

    users: int = Field(64, ge=1, description="seen users measured, and as many unseen")
    records: int = Field(10, ge=1, description="held-out records of each")
    fit_records: int = Field(24, ge=1, description="own records the head is fitted on")
    bootstrap: int = Field(2000, ge=100)
    metrics_of: Literal["seen", "unseen"] = Field("seen", description="whose table comes first")


class SpeedSettings(_Settings):
    """Never changes what is computed, but for the thread count's rounding of floats."""

    threads: int = Field(2, ge=1)
    cache_mb: int = Field(0, ge=0, description="keeps the frozen prefix of records met again")


class Config(_Settings):
    """All settings of one experiment, resolved and validated."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    data: DataSettings = Field(default_factory=DataSettings)
    model: ModelSettings = Field(default_factory=ModelSettings)
    adapter: AdapterSettings = Field(default_factory=AdapterSettings)
    clusters: ClusterSettings = Field(default_factory=ClusterSettings)
    training: TrainingSettings = Field(default_factory=TrainingSettings)
    preference: PreferenceSettings = Field(default_factory=PreferenceSettings)
    privacy: PrivacySettings = Field(default_factory=PrivacySettings)
    rounds: RoundSettings = Field(default_factory=RoundSettings)
    secure_aggregation: SecureAggregationSettings = Field(default_factory=SecureAggregationSettings)
    statistics: StatisticsSettings = Field(default_factory=StatisticsSettings)
    ab_test: AbRunSettings = Field(default_factory=AbRunSettings)
    head: HeadSettings = Field(default_factory=HeadSettings)
    simulation: SimulationSettings = Field(default_factory=SimulationSettings)
    evaluation: EvaluationSettings = Field(default_factory=EvaluationSettings)
    speed: SpeedSettings = Field(default_factory=SpeedSettings)
    insecure_test_seed: int | None = Field(None, ge=0, description="tests only: not private")

    @model_validator(mode="after")
    def _no_contradictions(self) -> Self:
        if self.rounds.cohort > self.data.clients:
            raise ValueError(
                f"rounds.cohort = {self.rounds.cohort} is larger than data.clients = "
                f"{self.data.clients}; lower the cohort or take more clients"
            )
        if self.training.batch_size > self.data.records_per_client:
            raise ValueError(
                f"training.batch_size = {self.training.batch_size} is larger than "
                f"data.records_per_client = {self.data.records_per_client}, so the sampling rate "
                "would be above 1; lower the batch size"
            )
        if 0 < self.privacy.client.bits < 12:
            raise ValueError(
                f"privacy.client.bits = {self.privacy.client.bits}: expected 12 to 32, or 0 for "
                "the smallest modulus that costs next to nothing"
            )
        if self.privacy.example.enabled and self.privacy.example.adjacency == "add_remove":
            raise ValueError(
                "privacy.example.adjacency = 'add_remove': a record put in moves others across the "
                "cap of data.records_per_client and the cut of data.holdout, so the batch would "
                "change by two records where one is counted; take zero_out (one record replaced by "
                "nothing in its place) or replace_one"
            )
        self._refuse_false_claims()
        if self.ab_run is not None:
            self._refuse_wrong_ab_run(self.ab_run)
        if 0 < self.training.packed < self.data.max_tokens:
            raise ValueError(
                f"training.packed = {self.training.packed} is smaller than data.max_tokens = "
                f"{self.data.max_tokens}, so that some records fit no row; take a larger one, or 0 "
                "for records on their own"
            )
        if self.pairs and self.pairs.score == "head" and self.pairs.length_normalised:
            raise ValueError(
                "preference.length_normalised = true takes the mean of a likelihood over tokens, "
                'and preference.score = "head" has none; leave it false'
            )
        if self.data.task == "classification" and len(self.data.classes) == 1:
            raise ValueError(
                f"data.classes = {list(self.data.classes)}: classification needs at least two"
            )
        client = self.privacy.client
        if client.enabled and client.noise_at == "distributed":
            self._refuse_hopeless_secure_aggregation()
        if self.statistics.enabled:
            self._refuse_hopeless_statistics()
        elif self.statistics.gains or self.statistics.arms:
            raise ValueError("statistics.gains and statistics.arms need statistics.enabled = true")
        if client.enabled and client.noise_multiplier == 0 and self.insecure_test_seed is None:
            raise ValueError(
                "privacy.client.noise_multiplier = 0 gives no client-level guarantee; take a "
                "positive one, or say privacy.client.enabled = false"
            )
        return self

    def _refuse_false_claims(self) -> None:
        groups, family = self.clusters.count, self.adapter.family
        if self.training.packed and self.privacy.example.enabled:
            raise ValueError(
                f"training.packed = {self.training.packed}: a record acts on the losses of those "
                "behind it in its row, and moves others from row to row, so no example-level claim "
                "can be made; set privacy.example.enabled = false"
            )
        if groups > 1 and self.privacy.example.enabled:
            raise ValueError(
                f"clusters.count = {groups}: which cluster a device picks depends on each of its "
                "records without DP, and one record that changes the pick moves the contribution "
                "by up to sqrt(2) times the clip, so no example-level claim can be made; set "
                "privacy.example.enabled = false"
            )
        if groups > 1 and not FAMILIES[family].clusters:
            able = ", ".join(one.name for one in FAMILIES.values() if one.clusters)
            raise ValueError(
                f"clusters.count = {groups} with adapter.family = {family!r}: clusters are built "
                f"for {able}; take one of these, or clusters.count = 1"
            )
        needed = self.clusters.warmup + self.clusters.extra * self.clusters.merge_every + 1
        if groups > 1 and self.rounds.count < needed:
            raise ValueError(
                f"clusters.count = {groups} with clusters.extra = {self.clusters.extra}: in "
                f"rounds.count = {self.rounds.count} rounds they are not all merged and trained "
                f"once more; take at least {needed}, or a smaller clusters.warmup, clusters.extra "
                "or clusters.merge_every"
            )
        local = FAMILIES[family].local
        if self.pairs and (groups > 1 or local):
            raise ValueError(
                "data.task = 'preference' with clusters.count above 1, or with adapter.family = "
                "'fedsa', is not built; take another family and one group"
            )
        if local and self.privacy.example.enabled:
            raise ValueError(
                f"adapter.family = {family!r}: B is fitted on the device's records without DP and "
                "takes part in the forward pass, so no example-level claim can be made; set "
                "privacy.example.enabled = false"
            )
        if local and self.training.steps == 1:
            raise ValueError(
                f"adapter.family = {family!r} with training.steps = 1: at the first step B is zero "
                "and the gradient of A exactly zero, so noise alone would leave; take at least 2"
            )

    def _refuse_wrong_ab_run(self, ab_run: AbRunSettings) -> None:
        if self.data.source != DEVICES:
            raise ValueError(
                f"ab_test.arms with data.source = {self.data.source!r}: a run with arms is one on "
                "devices; `privet ab` simulates an experiment"
            )
        odd = [arm for arm in ab_run.arms if not _ARM.fullmatch(arm)]
        if odd:
            raise ValueError(
                f"ab_test.arms has {odd[0]!r}: on devices an arm is a template, such as memory or "
                'memory@1.0.0, or "personal" or "shared"'
            )
        client, example = self.privacy.client, self.privacy.example
        for name, found, wanted in (
            ("ab_test.low", ab_run.low, 0.0),
            ("ab_test.high", ab_run.high, 1.0),
            ("rounds.count", self.rounds.count, ab_run.looks),
            ("privacy.client.enabled", client.enabled, True),
            ("privacy.client.clip", client.clip, ab_run.norm),
            ("privacy.client.bits", client.bits, 32),  # a device holds the grid of these alone
            ("privacy.example.enabled", example.enabled, False),
            ("statistics.enabled", self.statistics.enabled, False),
        ):
            if found != wanted:
                raise ValueError(f"{name} = {found}: an experiment on devices has {wanted}")
        if client.noise_at == "server":
            raise ValueError(
                'privacy.client.noise_at = "server": an outcome leaves no device before its noise; '
                'take "distributed" or "device"'
            )

    def _refuse_hopeless_secure_aggregation(self) -> None:
        cohort, secure_aggregation = self.rounds.cohort, self.secure_aggregation
        smallest, colluders = self.min_sum, self.colluders
        if cohort < secure_aggregation.min_cohort:
            raise ValueError(
                f"rounds.cohort = {cohort} is smaller than secure_aggregation.min_cohort = "
                f"{secure_aggregation.min_cohort}, so every device would decline; "
                f'{self._cohort_needed()}, or set privacy.client.noise_at = "device"'
            )
        if smallest - colluders < 2:
            raise ValueError(
                f"secure_aggregation.colluding = {secure_aggregation.colluding:g} lets "
                f"{colluders} devices collude and leaves {max(smallest - colluders, 0)} honest "
                f"survivors of a cohort of {cohort}, but a sum needs at least 2: "
                f"{self._cohort_needed()}"
            )
        holders = (secure_aggregation.degree or cohort - 1) + 1
        if secure_aggregation.threshold and not colluders < secure_aggregation.threshold <= holders:
            raise ValueError(
                f"secure_aggregation.threshold = {secure_aggregation.threshold}: expected 0 "
                "(sized), "
                f"or from {colluders + 1}, as {colluders} colluding devices open every secret "
                f"together, to {holders}, the holders of a secret"
            )

    def _refuse_hopeless_statistics(self) -> None:
        client, example = self.privacy.client, self.privacy.example
        if self.training.steps != 1:
            raise ValueError(
                f"training.steps = {self.training.steps}: statistics.enabled = true needs one "
                "local step, because losses and gradients are counted as one release of one batch"
            )
        if example.enabled and not (client.enabled and client.noise_at != "server"):
            raise ValueError(
                "statistics.enabled = true with privacy.example.enabled = true needs noise from "
                "the devices, or the server would read losses without noise and every device "
                'would decline; set privacy.client.noise_at = "distributed" or "device"'
            )
        arms = self.statistics.arms
        if arms and len({*arms}) < 2:
            raise ValueError(
                f"statistics.arms = {list(arms)}: a comparison needs at least two different ones"
            )
        if "personal" in arms and not self.head.enabled:
            raise ValueError('statistics.arms with "personal" needs head.enabled = true')

    def _cohort_needed(self) -> str:
        """Say what would help: the smallest cohort in which two honest survivors are left."""
        feared = self.secure_aggregation.colluders
        sizes = range(
            max(self.rounds.cohort + 1, self.secure_aggregation.min_cohort), MAX_PARTICIPANTS + 1
        )
        found = next((n for n in sizes if quorum(n, feared(n)) >= feared(n) + 2), None)
        if found is None:
            most = f"no cohort of up to {MAX_PARTICIPANTS:,} would do"
            return f"{most}; lower secure_aggregation.colluding"
        return f"it would need rounds.cohort = {found}"

    @property
    def min_sum(self) -> int:
        """Number of vectors that a masked sum must have. Every device's noise is sized for it.

        One below the round's quorum would be opened for nothing, and one that fewer than a majority
        of the honest and all colluders sign is not opened at all
        (`common/secure_aggregation/terms.py`).
        """
        cohort = self.rounds.cohort
        answers = math.ceil(self.rounds.quorum * cohort - 1e-9)
        signed = quorum(cohort, self.colluders)
        return min(cohort, max(answers, signed, self.secure_aggregation.min_sum(cohort)))

    @property
    def colluders(self) -> int:
        """Devices that may work with the server: the one number m of plan, noise, graph and report.

        Absolute, and of the whole fleet: whom a server asks in a round does not change it.
        """
        return self.secure_aggregation.colluders(self.rounds.cohort)

    @property
    def max_releases(self) -> int:
        """The most releases of one device in the run, as void rounds may be asked for anew.

        An experiment's epsilon is that of its looks, so there it is their number.
        """
        return self.rounds.count + (0 if self.ab_run else self.rounds.extra_releases)

    @property
    def digest(self) -> str:
        """SHA-256 of all settings that decide results, without speed settings and the name.

        How long a server waits for devices that do not come decides none.
        """
        waiting = {"patience", "wait_s", "extra_releases"}
        settings = self.model_dump(
            mode="json",
            exclude_defaults=True,  # so that a run keeps its digest when there is a new setting
            exclude={"speed": True, "name": True, "rounds": waiting},
        )
        text = json.dumps(_without_empty(settings), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def sampling_rate(self) -> float:
        """Poisson rate of local batches: public constants only, never a client's data size."""
        return self.training.batch_size / self.data.records_per_client

    @property
    def constant(self) -> bool:
        """Whether a device's work is a function of public numbers only.

        It always is where somebody sees when the device answers. See
        `client/training/constant_work.py`.
        """
        return self.training.constant or self.data.source == DEVICES

    @property
    def pairs(self) -> PreferenceSettings | None:
        """How to learn from pairs of answers. None where records are no pairs."""
        return self.preference if self.data.task == "preference" else None

    @property
    def ab_run(self) -> AbRunSettings | None:
        """The A/B experiment that this run is. None where it trains an adapter."""
        return self.ab_test if self.ab_test.arms else None

    @property
    def outputs(self) -> int:
        """Size of the shared head: 0 for texts, 1 for numbers and scores, else the classes."""
        if self.pairs is not None:
            return int(self.pairs.score == "head")
        return {"regression": 1, "classification": len(self.data.classes)}.get(self.data.task, 0)

    def warnings(self) -> list[str]:
        """Settings that are allowed and still deserve a sentence."""
        found = []
        if self.privacy.delta >= 1 / self.data.clients:
            found.append(
                f"privacy.delta = {self.privacy.delta:g} is not below 1/clients = "
                f"{1 / self.data.clients:g}: releasing one client in full would be allowed"
            )
        if not self.privacy.client.enabled:
            found.append("privacy.client.enabled = false: no client-level claim is made")
        if not self.privacy.example.enabled and self.ab_run is None:
            found.append("privacy.example.enabled = false: no DP-SGD noise inside training")
        elif self.privacy.example.enabled and self.privacy.example.noise_multiplier == 0:
            found.append(
                "privacy.example.noise_multiplier = 0: nothing holds against the server at example "
                "level, so devices decline every round; set privacy.example.enabled = false instead"
            )
        if self.insecure_test_seed is not None:
            found.append("insecure_test_seed is set: NOT PRIVATE, every report says so")
        return found


def _without_empty(table: Mapping[str, Any]) -> dict[str, Any]:
    inner = {k: _without_empty(v) if isinstance(v, Mapping) else v for k, v in table.items()}
    return {key: value for key, value in inner.items() if value != {}}


def parse(
    table: Mapping[str, Any],
    *,
    source: str = "the configuration",
    overrides: Iterable[str] = (),
    quiet: bool = False,
) -> Config:
    """Validate settings from a parsed TOML table, with `section.key=value` overrides on top.

    Args:
        table: of sections; keys may have their former names (`former_names.py`).
        source: what sentences about faults begin with.
        overrides: `section.key=value`, such as `rounds.count=8`.
        quiet: no warnings of former names.

    Raises:
        ConfigError: one sentence for each fault, all faults at once.
    """
    own = former_names.with_names_of_today(table, former_names.CONFIG, quiet=quiet)
    for override in overrides:
        _set(own, override)
    try:
        return Config.model_validate(own)
    except ValidationError as error:
        raise ConfigError(f"{source} does not fit:\n{faults(error, Config)}") from None


def of_run(folder: Path) -> Config:
    """Settings of the run in a folder, also of one begun when keys had other names."""
    return read(folder / "config.toml", quiet=True)


def read(path: Path, overrides: Iterable[str] = (), *, quiet: bool = False) -> Config:
    """Settings from a TOML file, with `section.key=value` overrides on top."""
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    return parse(table, source=str(path), overrides=overrides, quiet=quiet)


def to_toml(config: Config) -> str:
    """Write the resolved settings as TOML, from which `read` gives the same `Config` back."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def _set(table: dict[str, Any], override: str) -> None:
    """Put `section.key=value` into a table of sections, the value in TOML's form or a text.

    Raises:
        ConfigError: no such form.
    """
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {override!r}: expected KEY=VALUE, such as rounds.count=8")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, last = former_names.key_of_today(key.strip(), former_names.CONFIG).split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {override!r}: {parent} is a value, not a section")
    table[last] = value


def faults(error: ValidationError, root: type[BaseModel]) -> str:
    """A sentence for each fault of settings, a line each.

    Args:
        error: of reading them.
        root: what was to be read; of its sections the nearest known key is named.
    """
    return "\n".join(_sentence(fault, root) for fault in error.errors(include_url=False))


def shortened(value: object) -> str:
    """A value as it was given, of which a file or a server may have sent any amount."""
    shown = repr(value)
    return shown if len(shown) <= 100 else f"{shown[:100]}..."


def _sentence(fault: Mapping[str, Any], root: type[BaseModel]) -> str:
    place = tuple(part for part in fault["loc"] if isinstance(part, str))
    where = ".".join(place)
    if fault["type"] == "extra_forbidden":
        return f"  {where}: unknown key{_nearest(place, root)}"
    if fault["type"] == "value_error":
        return f"  {where}: {fault['ctx']['error']}" if where else f"  {fault['ctx']['error']}"
    expected = str(fault["msg"]).removeprefix("Input should be ")
    expected = expected.replace("String should match pattern", "a text that fits")
    expected = expected.replace("String should have", "a text of")
    known = {
        "model_type": f"a section, as in [{where}]",
        "tuple_type": 'a list, as in ["one", "two"]',
        "bool_type": "true or false",
    }
    found = known.get(fault["type"], expected)
    return f"  {where} = {shortened(fault['input'])}: expected {found}"


def _nearest(place: Sequence[str], root: type[BaseModel]) -> str:
    section: Any = root
    for part in place[:-1]:
        section = section.model_fields[part].annotation
    known = list(section.model_fields)
    close = difflib.get_close_matches(place[-1], known, n=1, cutoff=0.4)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"
