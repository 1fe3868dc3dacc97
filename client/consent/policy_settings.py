"""The settings of `policy.toml` as frozen types, with the unit of each limit.

A field's description is the key's comment in the file. `client/consent/policy.py` reads and writes
the file, and holds runs against it.
"""

import re
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ...common.settings.sections import (
    DEVICE,
    NEW_DEVICE,
    Adjacency,
    BudgetSettings,
    NoiseAt,
    Quantization,
    SecureAggregationSettings,
    quorum,
)

__all__ = [
    "Allowed",
    "Budget",
    "ConsentRules",
    "ImportTexts",
    "Outbox",
    "OwnBudget",
    "Policy",
    "Prompts",
    "Resources",
    "RunLimits",
    "When",
    "ranges",
]

DAY = 24 * 60
MIN_COLLUDERS = 2
"""Of a share: in a cohort of ten, two devices of a server's own would read everybody else's."""

MODELS = ("smollm2-135m-instruct", "minilm")
Words = Annotated[tuple[str, ...], Field(strict=False)]


class _Section(BaseModel):
    # strict: `true` is not 1.0 and "10" is not 10 where a limit is meant
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)


class Budget(_Section):
    """The largest epsilon this device ever spends, over all runs together, for its whole life.
    Another device with your records, or a home begun after `forget`, has its own: they add up.

    It has no date and is never given back. A release that would pass it is declined. Each epsilon
    is counted against each adversary, at the stricter of this delta and the run's."""

    client: float = Field(
        NEW_DEVICE["client"], gt=0, description="for all of your records together (epsilon)"
    )
    example: float = Field(
        NEW_DEVICE["example"], gt=0, description="for any single record (epsilon)"
    )
    delta: float = Field(
        1e-5,
        gt=0,
        lt=1,
        description="largest delta (a probability) of a run; a run with a larger one is refused",
    )
    client_adjacency: Adjacency = Field(
        "add_remove",
        description="what hiding all of your records means: that you were there at all "
        '("add_remove"), that your share was not zero ("zero_out"), or that your records were not '
        'others ("replace_one"); a run that counts in another way is refused, because it would '
        "begin a second budget",
    )
    example_adjacency: Literal["zero_out", "replace_one"] = Field(
        "zero_out", description="the same for a single record"
    )
    open_directory: float = Field(
        0.0,
        ge=0,
        description="for all of your records together (epsilon) against a server that you joined "
        "without a closed directory (`privet client join --directory`): it may have invented the "
        "other devices of a round, so that what is left of masked noise is this device's own "
        "share, which one round of 64 devices may spend 47 of; 0: not more than client above, "
        "which such rounds pass at once, so that this device declines them",
    )


class OwnBudget(BudgetSettings):
    """The budgets a device counts a run by: the run's own cap, and the owner's over all runs.

    `open_directory`, which is inherited, is the owner's here, not the run's.
    """

    owner_client: float
    owner_example: float


class RunLimits(_Section):
    """What a run must hide, and how much work it may ask for. A run past a limit is refused."""

    noise_at: NoiseAt = Field(
        "distributed",
        description='where noise may be added: "device" (you trust nobody), "distributed" (in '
        'shares by the devices, under masks) or "server" (you trust the server); what comes before '
        "it in this list is accepted too",
    )
    min_noise: float = Field(
        1.0,
        ge=0,
        description="client-level noise in a sum, in multiples of the clip; 0 accepts runs without "
        "it, if they have example-level noise",
    )
    min_example_noise: float = Field(
        0.5,
        ge=0,
        description="example-level noise in each training step, in multiples of one record's clip; "
        "it is what is left should the masks fail; 0 accepts runs without it, if they have "
        "client-level noise",
    )
    max_clip: float = Field(
        1.0, gt=0, description="l2 norm that one contribution may have, in units of the adapter"
    )
    min_cohort: int = Field(10, ge=3, description="devices asked in one round")
    min_survivors: float = Field(
        0.6, gt=0, le=1, description="share of the cohort that a sum must have to be opened"
    )
    colluding: float = Field(
        0.1,
        ge=0,
        description="devices of the whole fleet that a run must reckon with as working for the "
        "server: their number, or between 0 and 1 that share of the run's cohort, and then 2 at "
        "least, which whoever runs a server soon has",
    )
    min_bits: int = Field(
        12, ge=12, le=16, description="of the numbers under masks: sums are taken modulo 2**bits"
    )
    max_steps: int = Field(20, ge=1, description="training steps in one round")
    max_batch: int = Field(32, ge=1, description="expected records in one step")
    max_records: int = Field(1000, ge=1, description="own records that a run may train on")
    max_tokens: int = Field(512, ge=4, description="tokens read of one record")

    @model_validator(mode="after")
    def _no_contradictions(self) -> Self:
        cohort, feared = self.min_cohort, self.colluders(self.min_cohort)
        secure_aggregation = SecureAggregationSettings(survivors=self.min_survivors)
        smallest = max(secure_aggregation.min_sum(cohort), quorum(cohort, feared))
        honest = min(smallest, cohort) - feared
        if honest < 2:
            raise ValueError(
                f"colluding = {self.colluding:g} leaves {max(honest, 0)} honest survivors of "
                f"min_cohort = {cohort}, but a sum needs at least 2; raise min_cohort"
            )
        return self

    def colluders(self, cohort: int) -> int:
        """Return how many devices a run with this cohort must count as working for its server."""
        found = SecureAggregationSettings(colluding=self.colluding).colluders(cohort)
        return max(found, MIN_COLLUDERS) if 0 < self.colluding < 1 else found


class Allowed(_Section):
    """What a run may use. `*` in a name stands for anything but a colon."""

    models: Words = Field(MODELS, description="base models, by the name a run gives")
    servers: Words = Field(
        (), description='HOST:PORT, such as "*.example.org:9092"; empty: those you joined'
    )
    statistics: bool = Field(
        True,
        description="whether noised sums of something else than training may be asked for: its "
        "loss and batch size, which answers you took in an experiment",
    )
    insecure_test_seed: bool = Field(
        False, description="true accepts tests whose noise anybody can remove: NOT PRIVATE"
    )

    @field_validator("models")
    @classmethod
    def _some_model(cls, models: tuple[str, ...]) -> tuple[str, ...]:
        if not models:
            raise ValueError("no run could use a model; name one (`privet client pause` stops all)")
        return models

    @field_validator("servers")
    @classmethod
    def _host_and_port(cls, servers: tuple[str, ...]) -> tuple[str, ...]:
        for server in servers:
            if not re.fullmatch(r"[^\s/]+:([0-9]{1,5}|\*)", server):
                raise ValueError(f'{server!r} is not HOST:PORT, such as "fl.example.org:9092"')
        return servers


class When(_Section):
    """When this device takes part. It is asked at the beginning of each round."""

    hours: str = Field(
        "",
        description='local time, such as "22:00-07:00, 12:30-13:00"; empty: at any hour',
    )
    on_battery: bool = Field(False, description="whether to train without mains power")
    min_battery: float = Field(
        30.0, ge=0, le=100, description="charge in percent, also while charging"
    )
    max_load: float = Field(
        2.0, gt=0, description="1-minute load average for each core, from all programs"
    )

    @field_validator("hours")
    @classmethod
    def _some_hours(cls, hours: str) -> str:
        ranges(hours)
        return hours


class Resources(_Section):
    """What the worker may take of this machine."""

    cpu_share: float = Field(
        0.5, gt=0, le=1, description="of the cores, rounded down, but one at least: its threads"
    )
    nice: int = Field(10, ge=0, le=19, description="19 gives way to every other program, 0 to none")
    memory_mb: int = Field(
        2000,
        ge=400,
        description="memory of the worker; the system (Linux) refuses it more, and a model that "
        "does not fit ends the round",
    )
    device: str = Field(
        "auto", pattern=DEVICE, description="where the base model computes: cpu, cuda, cuda:1, mps"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the base model's weights"
    )
    quantization: Quantization = Field(
        "none",
        description="int8, nf4: its weights take less memory, and their last digits are lost",
    )
    gradient_checkpointing: bool = Field(
        False, description="compute each block twice in training: less memory, more time"
    )
    idle_minutes: float = Field(
        10.0, gt=0, description="without work, after which the model is let go from memory"
    )


class ConsentRules(_Section):
    """Who says yes to a run that is inside the limits above."""

    ask: bool = Field(
        True, description="false: such a run is accepted at once, and `privet client runs` shows it"
    )


class ImportTexts(_Section):
    """The folders of `privet client add`."""

    rescan_minutes: float = Field(15.0, gt=0, description="between two looks for new records")


class Outbox(_Section):
    """Copies of what this device has sent."""

    keep_mb: float = Field(
        64.0, ge=0, description="above it the oldest bytes go; their date, size and hash stay"
    )


class Prompts(_Section):
    """Whose prompt templates this device takes (`privet prompts add`)."""

    publishers: Words = Field(
        (),
        description="public keys, 64 hexadecimal digits each; empty: only those that come with "
        "privet",
    )

    @field_validator("publishers")
    @classmethod
    def _keys(cls, publishers: tuple[str, ...]) -> tuple[str, ...]:
        for key in publishers:
            if not re.fullmatch(r"[0-9a-f]{64}", key):
                raise ValueError(f"{key!r} is not a public key: 64 digits, 0-9 and a-f")
        return publishers


class Policy(_Section):
    """The owner's limits. `Policy()` is what `privet client init` writes."""

    budget: Budget = Budget()
    limits: RunLimits = RunLimits()
    allowed: Allowed = Allowed()
    when: When = When()
    resources: Resources = Resources()
    consent: ConsentRules = ConsentRules()
    import_texts: ImportTexts = ImportTexts()
    outbox: Outbox = Outbox()
    prompts: Prompts = Prompts()

    def warnings(self) -> list[str]:
        """Return warnings about settings that are allowed and still deserve one."""
        texts = []
        if self.limits.noise_at == "server":
            texts.append(
                'limits.noise_at = "server": runs are accepted whose server reads your '
                "contribution before any client-level noise is added"
            )
        if self.allowed.insecure_test_seed:
            texts.append(
                "allowed.insecure_test_seed = true: runs that are NOT PRIVATE are accepted"
            )
        if "*" in self.allowed.models:
            texts.append('allowed.models = ["*"]: a server may have any model fetched and loaded')
        if not self.consent.ask and not self.allowed.servers:
            texts.append(
                "consent.ask = false: runs of every server you joined begin without asking you"
            )
        return texts


def ranges(hours: str) -> tuple[tuple[int, int], ...]:
    """Read hours of the day as ranges of minutes since midnight.

    `"22:00-07:00, 12:30-13:00"` gives two pairs, from which minute and until which. The empty text
    gives none.

    Raises:
        ValueError: not hours, or a range that never comes.
    """
    spans = []
    for part in filter(None, (part.strip() for part in hours.split(","))):
        digits = re.fullmatch(r"([0-9]{1,2}):([0-9]{2})\s*-\s*([0-9]{1,2}):([0-9]{2})", part)
        if not digits:
            raise ValueError(f'{part!r} is not FROM-UNTIL, such as "22:00-07:00"')
        hour, minute, last_hour, last_minute = map(int, digits.groups())
        start, end = 60 * hour + minute, 60 * last_hour + last_minute
        if max(minute, last_minute) > 59 or start >= DAY or end > DAY:
            raise ValueError(f"{part!r} has no such time of day; expected 00:00 to 24:00")
        if start == end:
            raise ValueError(f"{part!r} never comes; leave hours empty for any hour")
        spans.append((start, end))
    if hours and not spans:
        raise ValueError(f"{hours!r} has no hours; leave it empty for any hour")
    return tuple(spans)
