"""The facts of a report, as they are in `privacy.json` and `summary.json`.

Page, terminal and `--json` show these and compute nothing themselves.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NotRequired, TypedDict

from ...common.privacy.accounting import Adjacency, Against, Unit
from ...server.round_record import Estimates
from ..evaluation.user_statistics import Mean

__all__ = [
    "ClientFacts",
    "CrossCheck",
    "DeviceFacts",
    "Evaluation",
    "Facts",
    "Gain",
    "HistoryFacts",
    "LineFacts",
    "Measured",
    "MechanismFacts",
    "Metrics",
    "NamedMean",
    "PrivacyFacts",
    "Promised",
    "RoundFacts",
    "Statistics",
    "Summary",
]

Statistics = Mapping[str, Any]
"""A round's noised statistics in `rounds.jsonl`; its keys are those of the blocks that are on."""


class CrossCheck(TypedDict):
    """The same epsilon by a second accountant; None where there is none."""

    accountant: str
    epsilon: float | None
    difference: float | None
    agrees: bool


class ColludingRow(TypedDict):
    """A person's epsilon if so many devices collude; None: no noise is left."""

    colluding: int
    epsilon: float | None
    bound: bool


class Colluding(TypedDict):
    """A person's epsilon against the server by the number of devices that collude with it."""

    agreed: int
    enrolled: int | None
    rows: list[ColludingRow]


class LineFacts(TypedDict):
    """One epsilon: whose, against whom, between which neighbours, and what it rests on."""

    key: str
    unit: Unit
    against: Against
    epsilon: float
    bound: bool
    delta: float
    adjacency: Adjacency
    adjacency_means: str
    noise_at: str
    conditions: list[str]
    budget: float | None
    client: str
    participations_max: int
    holds_against: list[str]
    does_not_hold_against: list[str]
    assumptions: list[str]
    noise_counted: str
    amplified: None
    amplified_note: str
    cross_check: CrossCheck
    colluding: Colluding | None


class ClientFacts(TypedDict):
    """What one client released and spent, by line."""

    client: str
    participations: int
    declined: int
    epsilon: dict[str, float]


class HistoryFacts(TypedDict):
    """What each of some clients with equal histories spent, by line."""

    participations: int
    clients: int
    epsilon: dict[str, float]


class RoundFacts(TypedDict):
    """The worst client's epsilon after a round; the counts are those of real devices."""

    round: int
    released: int
    epsilon: dict[str, float]
    asked: NotRequired[int | None]
    answered: NotRequired[int | None]
    declined: NotRequired[int | None]
    refused: NotRequired[int | None]
    void: NotRequired[bool | None]


class MechanismFacts(TypedDict):
    """One kind of noise: its size, how often it was used, and what one use costs."""

    mechanism: str
    unit: Unit
    against: Against
    adjacency: Adjacency
    noise_multiplier: float
    sampling_rate: float
    steps: int
    releases: int | None
    per_client_max: int
    epsilon_once: float | None


class Promised(TypedDict):
    """What the settings promised."""

    budgets: dict[str, float]
    delta: float
    sentences: list[str]


class DeviceFacts(TypedDict):
    """What is special about a run on real devices."""

    enrolled: int | None
    sentences: list[str]


class PrivacyFacts(TypedDict):
    """The content of `privacy.json`."""

    schema: int
    run: str
    private: bool
    noise_at: str | None
    delta: float
    problems: list[str]
    warnings: list[str]
    promised: Promised
    lines: list[LineFacts]
    no_claim: list[str]
    clients: list[ClientFacts]
    histories: list[HistoryFacts]
    rounds: list[RoundFacts]
    mechanisms: list[MechanismFacts]
    declined: dict[str, int]
    not_covered: list[str]
    adversaries: list[str]
    devices: DeviceFacts | None
    start: NotRequired[Mapping[str, object]]


class NamedMean(Mean):
    """A mean difference between two models."""

    name: str
    title: str


class Gain(NamedMean):
    """What each person gained."""

    users: list[str]
    gains: list[float]
    better: int
    equal: int
    hurt: int
    p10: float


class Metrics(TypedDict):
    """How personal heads did; beside these, the mean loss of each model by its name."""

    name: str
    unit: str
    of: str
    win_rate_personal_over_global: float | None
    ties: float | None
    fraction_hurt: float | None
    p10_gain: float | None
    gini_personal: float | None


class AdapterFacts(TypedDict):
    """The adapter that was trained."""

    family: str
    dimension: int | None


class Measured(TypedDict, total=False):
    """What only the run itself can measure."""

    seconds: dict[str, float] | None
    peak_rss_bytes: int | None
    upload_bytes_per_client_round: int | None
    dimension: int | None
    compute: str | None
    versions: dict[str, str] | None


class Evaluation(TypedDict, total=False):
    """The content of `evaluation.json`: aligned lists of users and of their losses by model."""

    name: str
    unit: str
    metrics_of: Literal["seen", "unseen"]
    seen: Mapping[str, Sequence[object]]
    unseen: Mapping[str, Sequence[object]]
    more: list[NamedMean]


class Summary(TypedDict):
    """The content of `summary.json`."""

    schema: int
    run: str
    private: bool
    dataset: str
    base_model: str
    adapter: AdapterFacts
    clients: int
    rounds: int
    rounds_planned: int
    cohort: int
    metrics: Metrics | None
    seen: dict[str, Mean] | None
    unseen: dict[str, Mean] | None
    differences: dict[str, Mean] | None
    gains: list[Gain]
    comparisons: list[NamedMean]
    privacy: list[LineFacts]
    seconds: dict[str, float] | None
    peak_rss_bytes: int | None
    upload_bytes_per_client_round: int | None
    compute: str | None
    versions: dict[str, str] | None
    start: NotRequired[Mapping[str, object]]


class Facts(TypedDict):
    """What `privet report --json` prints."""

    summary: Summary
    privacy: PrivacyFacts
    statistics: list[Statistics]
    looks: NotRequired[list[Estimates]]
