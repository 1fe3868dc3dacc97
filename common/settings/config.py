"""The settings of one experiment: TOML in, one frozen validated `Config` out.

Its sections are in `sections.py`; keys of before in `former_names.py`; the sentence for a fault,
with the key, its value and what is allowed, in `faults.py`.
"""

import hashlib
import json
import math
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import tomli_w
from pydantic import Field, ValidationError, model_validator

from ..errors import ConfigError
from ..model.families import FAMILIES
from . import former_names
from .faults import faults
from .sections import (
    ARM_ON_DEVICES,
    DEVICES,
    MAX_PARTICIPANTS,
    AbRunSettings,
    AdapterSettings,
    ClusterSettings,
    ComputeSettings,
    DataSettings,
    EvaluationSettings,
    HeadSettings,
    ModelSettings,
    PreferenceSettings,
    PrivacySettings,
    RoundSettings,
    Section,
    SecureAggregationSettings,
    SimulationSettings,
    SpeedSettings,
    StatisticsSettings,
    TrainingSettings,
    quorum,
)


class Config(Section):
    """All settings of one experiment, resolved and validated."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    data: DataSettings = Field(default_factory=DataSettings)
    model: ModelSettings = Field(default_factory=ModelSettings)
    compute: ComputeSettings = Field(default_factory=ComputeSettings)
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
        self._refuse_sizes_that_do_not_fit()
        self._refuse_what_a_task_has_not()
        self._refuse_false_claims()
        self._refuse_hopeless_clusters()
        self._refuse_hopeless_local_factors()
        if self.ab_run is not None:
            self._refuse_wrong_ab_run(self.ab_run)
        if self.masked:
            self._refuse_hopeless_secure_aggregation()
        if self.statistics.enabled:
            self._refuse_hopeless_statistics()
        elif self.statistics.gains:
            raise ValueError("statistics.gains needs statistics.enabled = true")
        return self

    def _refuse_sizes_that_do_not_fit(self) -> None:
        if self.data.source == DEVICES and self.simulation.masking == "ideal":
            raise ValueError(
                'simulation.masking = "ideal" is for simulated devices; with data.source = '
                '"devices" leave it out'
            )
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
        if 0 < self.training.packed < self.data.max_tokens:
            raise ValueError(
                f"training.packed = {self.training.packed} is smaller than data.max_tokens = "
                f"{self.data.max_tokens}, so that some records fit no row; take a larger one, or 0 "
                "for records on their own"
            )
        if 0 < self.privacy.client.bits < 12:
            raise ValueError(
                f"privacy.client.bits = {self.privacy.client.bits}: expected 12 to 32, or 0 for "
                "the smallest modulus that costs next to nothing"
            )

    def _refuse_what_a_task_has_not(self) -> None:
        if self.pairs and self.pairs.score == "head" and self.pairs.length_normalised:
            raise ValueError(
                "preference.length_normalised = true takes the mean of a likelihood over tokens, "
                'and preference.score = "head" has none; leave it false'
            )
        if self.pairs and (self.clusters.count > 1 or FAMILIES[self.adapter.family].local):
            raise ValueError(
                "data.task = 'preference' with clusters.count above 1, or with adapter.family = "
                "'fedsa', is not built; take another family and one cluster"
            )
        if self.data.task == "classification" and len(self.data.classes) == 1:
            raise ValueError(
                f"data.classes = {list(self.data.classes)}: classification needs at least two"
            )

    def _refuse_false_claims(self) -> None:
        client, example, clusters = self.privacy.client, self.privacy.example, self.clusters.count
        if client.enabled and client.noise_multiplier == 0 and self.insecure_test_seed is None:
            raise ValueError(
                "privacy.client.noise_multiplier = 0 gives no client-level guarantee; take a "
                "positive one, or say privacy.client.enabled = false"
            )
        if not example.enabled:
            return
        if example.adjacency == "add_remove":
            raise ValueError(
                "privacy.example.adjacency = 'add_remove': a record put in moves others across the "
                "cap of data.records_per_client and the cut of data.holdout, so the batch would "
                "change by two records where one is counted; take zero_out (one record replaced by "
                "nothing in its place) or replace_one"
            )
        if self.training.packed:
            raise ValueError(
                f"training.packed = {self.training.packed}: a record acts on the losses of those "
                "behind it in its row, and moves others from row to row, so no example-level claim "
                "can be made; set privacy.example.enabled = false"
            )
        if clusters > 1:
            raise ValueError(
                f"clusters.count = {clusters}: which cluster a device picks depends on each of its "
                "records without DP, and one record that changes the pick moves the contribution "
                "by up to sqrt(2) times the clip, so no example-level claim can be made; set "
                "privacy.example.enabled = false"
            )
        if FAMILIES[self.adapter.family].local:
            raise ValueError(
                f"adapter.family = {self.adapter.family!r}: B is fitted on the device's records "
                "without DP and takes part in the forward pass, so no example-level claim can be "
                "made; set privacy.example.enabled = false"
            )

    def _refuse_hopeless_clusters(self) -> None:
        clusters, family = self.clusters, self.adapter.family
        if clusters.count == 1:
            return
        if not FAMILIES[family].clusters:
            able = ", ".join(known.name for known in FAMILIES.values() if known.clusters)
            raise ValueError(
                f"clusters.count = {clusters.count} with adapter.family = {family!r}: clusters are "
                f"built for {able}; take one of these, or clusters.count = 1"
            )
        needed = clusters.warmup + clusters.extra * clusters.merge_every + 1
        if self.rounds.count < needed:
            raise ValueError(
                f"clusters.count = {clusters.count} with clusters.extra = {clusters.extra}: in "
                f"rounds.count = {self.rounds.count} rounds they are not all merged and trained "
                f"once more; take at least {needed}, or a smaller clusters.warmup, clusters.extra "
                "or clusters.merge_every"
            )

    def _refuse_hopeless_local_factors(self) -> None:
        family = self.adapter.family
        if FAMILIES[family].local and self.training.steps == 1:
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
        odd = [arm for arm in ab_run.arms if not ARM_ON_DEVICES.fullmatch(arm)]
        if odd:
            raise ValueError(
                f"ab_test.arms has {odd[0]!r}: on devices an arm is a template, such as memory or "
                'memory@1.0.0, or "personal" or "shared"'
            )
        client, example = self.privacy.client, self.privacy.example
        for name, value, wanted in (
            ("ab_test.low", ab_run.low, 0.0),
            ("ab_test.high", ab_run.high, 1.0),
            ("rounds.count", self.rounds.count, ab_run.looks),
            ("privacy.client.enabled", client.enabled, True),
            ("privacy.client.clip", client.clip, ab_run.norm),
            ("privacy.client.bits", client.bits, 32),  # a device holds the grid of these alone
            ("privacy.example.enabled", example.enabled, False),
            ("statistics.enabled", self.statistics.enabled, False),
        ):
            if value != wanted:
                raise ValueError(f"{name} = {value}: an experiment on devices has {wanted}")
        if client.noise_at == "server":
            raise ValueError(
                'privacy.client.noise_at = "server": an outcome leaves no device before its noise; '
                'take "distributed" or "device"'
            )

    def _refuse_hopeless_secure_aggregation(self) -> None:
        cohort, secure_aggregation = self.rounds.cohort, self.secure_aggregation
        min_sum, colluders = self.min_sum, self.colluders
        if cohort < secure_aggregation.min_cohort:
            raise ValueError(
                f"rounds.cohort = {cohort} is smaller than secure_aggregation.min_cohort = "
                f"{secure_aggregation.min_cohort}, so every device would decline; "
                f'{self._cohort_needed()}, or set privacy.client.noise_at = "device"'
            )
        if min_sum - colluders < 2:
            raise ValueError(
                f"secure_aggregation.colluding = {secure_aggregation.colluding:g} lets "
                f"{colluders} devices collude and leaves {max(min_sum - colluders, 0)} honest "
                f"survivors of a cohort of {cohort}, but a sum needs at least 2: "
                f"{self._cohort_needed()}"
            )
        holders = (secure_aggregation.degree or cohort - 1) + 1
        if secure_aggregation.threshold and not colluders < secure_aggregation.threshold <= holders:
            raise ValueError(
                f"secure_aggregation.threshold = {secure_aggregation.threshold}: expected 0 "
                f"(sized), or from {colluders + 1}, as {colluders} colluding devices open every "
                f"secret together, to {holders}, the holders of a secret"
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

    def _cohort_needed(self) -> str:
        """Say what would help: the smallest cohort in which two honest survivors are left."""
        feared = self.secure_aggregation.colluders
        sizes = range(
            max(self.rounds.cohort + 1, self.secure_aggregation.min_cohort), MAX_PARTICIPANTS + 1
        )
        cohort = next((n for n in sizes if quorum(n, feared(n)) >= feared(n) + 2), None)
        if cohort is None:
            most = f"no cohort of up to {MAX_PARTICIPANTS:,} would do"
            return f"{most}; lower secure_aggregation.colluding"
        return f"it would need rounds.cohort = {cohort}"

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
    def masked(self) -> bool:
        """Whether a run's sums are formed under masks (secure aggregation)."""
        client = self.privacy.client
        return client.enabled and client.noise_at == "distributed"

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
        sentences = []
        if self.privacy.delta >= 1 / self.data.clients:
            sentences.append(
                f"privacy.delta = {self.privacy.delta:g} is not below 1/clients = "
                f"{1 / self.data.clients:g}: releasing one client in full would be allowed"
            )
        if not self.privacy.client.enabled:
            sentences.append("privacy.client.enabled = false: no client-level claim is made")
        if not self.privacy.example.enabled and self.ab_run is None:
            sentences.append("privacy.example.enabled = false: no DP-SGD noise inside training")
        elif self.privacy.example.enabled and self.privacy.example.noise_multiplier == 0:
            sentences.append(
                "privacy.example.noise_multiplier = 0: nothing holds against the server at example "
                "level, so devices decline every round; set privacy.example.enabled = false instead"
            )
        if self.simulation.masking == "ideal" and self.masked:
            sentences.append(
                'simulation.masking = "ideal": sums were formed without keys and masks, so the '
                "masking protocol that the claims against the server rest on was not run"
            )
        if self.insecure_test_seed is not None:
            sentences.append("insecure_test_seed is set: NOT PRIVATE, every report says so")
        return sentences


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
