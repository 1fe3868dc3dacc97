"""The plan of one round: everything public that both sides must agree on.

The server announces it, the device checks it against its own settings (the server can only be
stricter), and the ledger row names its digest. It crosses the wire as a dict of scalars.
"""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ProtocolError
from ..secure_aggregation.terms import MAX_PARTICIPANTS, Terms
from ..settings.config import Config
from .encoding import rounded_sensitivity
from .mechanism import SKELLAM, Mechanism
from .noise import MAX_VARIANCE
from .statistics_blocks import BOUNDS, DIAMETERS, ENTRIES, Block

__all__ = ["VERSION", "Plan"]

VERSION = 4

LONGEST_TEXT = 256

FINEST = 32
"""Bits of the largest modulus: who agreed to it agreed to a fine grid."""

PLACES = ("device", "distributed", "server")
"""Where noise may be added, the safest first."""

# the smallest and the largest value of each number; what is outside would fail deep inside
_RANGES: Mapping[str, tuple[float, float]] = {
    "round": (1, 2**31),
    "cohort": (1, math.inf),
    "clip": (5e-324, math.inf),
    "step": (5e-324, math.inf),
    "bits": (8, 32),
    "variance": (0, MAX_VARIANCE),
    "survivors": (0, MAX_PARTICIPANTS),
    "colluders": (0, MAX_PARTICIPANTS),
    "attempt": (1, 2**32 - 1),
    "learning_rate": (5e-324, math.inf),
    "local_steps": (1, math.inf),
    "batch_size": (1, math.inf),
    "rate": (5e-324, 1),
    "record_clip": (0, math.inf),
    "record_noise": (0, math.inf),
    **{f"{name}_bound": (0, math.inf) for name in ENTRIES},
    **{f"{name}_step": (5e-324, math.inf) for name in ENTRIES},
    **{f"{name}_variance": (0, MAX_VARIANCE) for name in ENTRIES},
}

Check = tuple[str, bool, float | str]
"""What is checked, whether a plan keeps to it, the device's own limit."""
_NO_ARMS: Mapping[str, Any] = {
    "arms": "", "arms_bound": 0.0, "arms_step": 1.0, "arms_variance": 0.0
}  # fmt: skip
"""A block that plans no longer have. Its empty fields stay in what is sent and digested, so that a
plan in a ledger keeps its digest."""


@dataclass(frozen=True)
class Plan:
    """Public constants of one round.

    Attributes:
        run, round: which round of which run; rounds count from 1.
        layout: digest of the adapter's layout.
        start: SHA-256 of the global adapter the round starts from.
        cohort: clients asked; the public denominator of the mean.
        clip: l2 bound of one contribution, in units of the adapter.
        step, bits: the grid; contributions are integers mod 2**bits in units of `step`.
        rotated: whether contributions are flattened by a rotation seeded with `start`.
        noise_at: `device`, `distributed` or `server`; `none` when there is no client-level noise.
        variance: of the noise one adder adds, in squared grid units (each device for `device` and
            `distributed`, the server for `server`).
        survivors, colluders: with `distributed`, the smallest number of vectors a sum may have,
            and how many of those may be the server's; 0 and 0 otherwise.
        learning_rate, local_steps, batch_size, rate: local training.
        attempt: counts every masked round the server began, repeated ones too; it is no part of
            the digest.
        record_clip, record_noise: example-level DP-SGD; 0 and 0 when it is off.
        losses_bound, gains_bound: what a loss, a gain is clipped to and divided by, in the loss's
            unit; 0: the block is not asked for (`common/privacy/statistics_blocks.py`).
        losses_step, losses_variance and so on: each block's own grid and noise, as `step` and
            `variance`; the modulus is the adapter's.
    """

    run: str
    round: int
    layout: str
    start: str
    cohort: int
    clip: float
    step: float
    bits: int
    rotated: bool
    noise_at: str
    variance: float
    survivors: int
    colluders: int
    learning_rate: float
    local_steps: int
    batch_size: int
    rate: float
    record_clip: float
    record_noise: float
    attempt: int = 1
    losses_bound: float = 0.0
    losses_step: float = 1.0
    losses_variance: float = 0.0
    gains_bound: float = 0.0
    gains_step: float = 1.0
    gains_variance: float = 0.0
    version: int = VERSION

    @property
    def masked(self) -> bool:
        """Whether the server sees a sum only (secure aggregation)."""
        return self.noise_at == "distributed"

    @property
    def adders(self) -> int:
        """Honest noise shares that the smallest accepted sum carries."""
        return self.survivors - self.colluders if self.masked else 1

    @property
    def mechanism(self) -> Mechanism:
        """The noise mechanism of this round.

        Plans do not name it, for there is one so far.
        """
        return SKELLAM

    @property
    def counted_variance(self) -> float:
        """Variance of the noise that a claim may count, squared grid units."""
        return self.mechanism.counted_variance(self.variance, self.adders)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the plan, by which ledger rows name it."""
        fields = dataclasses.replace(self, attempt=1).to_dict()
        text = json.dumps(["privet plan", fields], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks asked for, in the order they have in a contribution."""
        moved = {"losses": math.sqrt(2) / self.batch_size, **DIAMETERS}
        return tuple(
            Block(
                name,
                size,
                BOUNDS[name],
                moved[name],
                name == "losses",
                getattr(self, f"{name}_step"),
                getattr(self, f"{name}_variance"),
            )
            for name, size in ENTRIES.items()
            if getattr(self, f"{name}_bound")
        )

    def parts(self, dimension: int) -> tuple[Block, ...]:
        """What a contribution is made of: `dimension` numbers of the adapter, then the blocks.

        One local step lets a record move the adapter by at most learning_rate * record_clip /
        batch_size, for clipping is a projection.
        """
        moved = min(self.learning_rate * self.record_clip / self.batch_size, 2 * self.clip)
        adapter = Block("adapter", dimension, self.clip, moved, True, self.step, self.variance)
        return (adapter, *self.blocks)

    def length(self, dimension: int) -> int:
        """Integers in a contribution: the adapter's and the blocks'."""
        return sum(part.size for part in self.parts(dimension))

    def terms(self, dimension: int) -> Terms:
        """What the masking protocol binds every key and signature of this attempt to."""
        run = hashlib.sha256(self.run.encode()).hexdigest()
        plan = bytes.fromhex(self.digest)
        return Terms(
            run,
            self.attempt,
            plan,
            self.length(dimension),
            self.bits,
            self.survivors,
            self.colluders,
        )

    def to_dict(self) -> dict[str, Any]:
        """Scalars only, ready for any wire."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**own, **_NO_ARMS}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> "Plan":
        """The plan in a message.

        Raises:
            ProtocolError: a field is missing, unknown, of another type, or out of range.
        """
        kinds = {field.name: field.type for field in dataclasses.fields(cls)}
        _refuse_other_fields(given, kinds)
        _refuse_out_of_range(given)
        plan = cls(**{name: given[name] for name in kinds})
        if plan.adders < 1 or plan.survivors > plan.cohort:
            raise ProtocolError(
                f"the round plan's survivors = {plan.survivors} of {plan.cohort} with "
                f"{plan.colluders} colluders leave no honest sum"
            )
        return plan

    def refuse_if_laxer(self, own: Config, dimension: int = 0) -> None:
        """Refuse a plan that is weaker than the device's own settings.

        Args:
            own: the device's settings.
            dimension: numbers in a contribution, without blocks. Rounding moves each of them by up
                to a step, so on a coarser grid the same noise hides less.

        Raises:
            ProtocolError: the plan is weaker than the device allows; names the field.
        """
        checks = [*self._of_the_work(own), *self._of_the_noise(own, dimension)]
        if self.masked:
            checks += self._of_the_masks(own)
        checks += self._of_the_blocks(own)
        for name, kept, limit in checks:
            if not kept:
                raise ProtocolError(
                    f"round {self.round}: the server's plan is laxer than this device allows: "
                    f"{name} (own limit {limit})"
                )

    def _of_the_work(self, own: Config) -> Iterator[Check]:
        training, example = own.training, own.privacy.example
        # a server that was restarted often, and none that has devices fill their disks; how often
        # one device releases is bounded by its ledger (`Config.max_releases`)
        attempts = 100 + 10 * own.rounds.count
        yield "round", self.round <= attempts, attempts
        yield "attempt", self.attempt <= attempts, attempts
        yield "cohort", self.cohort >= own.rounds.cohort, own.rounds.cohort
        yield "rate", self.rate <= own.sampling_rate, own.sampling_rate
        yield "batch_size", self.batch_size >= training.batch_size, training.batch_size
        yield "local_steps", self.local_steps <= training.steps, training.steps
        slow = self.learning_rate <= training.learning_rate
        yield "learning_rate", slow, training.learning_rate
        if example.enabled:
            yield "record_clip", 0 < self.record_clip <= example.clip, example.clip
            noised = self.record_noise >= example.noise_multiplier
            yield "record_noise", noised, example.noise_multiplier

    def _of_the_noise(self, own: Config, dimension: int) -> Iterator[Check]:
        client = own.privacy.client
        multiplier = client.noise_multiplier if client.enabled else 0.0
        noise = multiplier * client.clip
        yield "clip", self.clip <= client.clip, client.clip
        yield "noise", self.counted_variance**0.5 * self.step >= noise * (1 - 1e-9), noise
        yield "bits", self.bits >= client.bits, client.bits
        if not client.enabled:
            return
        yield (
            "noise_at",
            self.noise_at in PLACES[: PLACES.index(client.noise_at) + 1],
            client.noise_at,
        )
        hidden = self._hidden(self.parts(dimension)[0], multiplier)
        yield "noise over a rounded contribution", hidden, multiplier
        enough = self.mechanism.min_variance
        fine = client.bits < FINEST or not multiplier or self.counted_variance >= enough
        yield "squared steps of noise", fine, enough

    def _of_the_masks(self, own: Config) -> Iterator[Check]:
        least, feared = own.min_sum, own.colluders
        honest = self.survivors - self.colluders
        yield "survivors", self.survivors >= least, least
        yield "colluders", self.colluders >= feared, feared
        yield "survivors less colluders", honest >= max(2, least - feared), least - feared

    def _of_the_blocks(self, own: Config) -> Iterator[Check]:
        for block in self.blocks:
            wanted = own.statistics.multiplier(block.name) if own.privacy.client.enabled else 0.0
            yield block.name, own.statistics.allows(block.name), "none"
            yield f"{block.name}_noise", self._hidden(block, wanted), wanted

    def _hidden(self, part: Block, multiplier: float) -> bool:
        """Return whether a part, once rounded, is hidden by `multiplier` times its longest."""
        noise = self.mechanism.counted_variance(part.variance, self.adders) ** 0.5
        longest = rounded_sensitivity(part.bound, part.step, part.size)[0]
        return not multiplier or noise >= multiplier * longest * (1 - 1e-9)


def _refuse_other_fields(given: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    """Refuse a plan with other fields, types or version than this privet's."""
    odd = sorted(set(given) ^ {*kinds, *_NO_ARMS})
    if odd:
        raise ProtocolError(f"a round plan came with missing or unknown fields: {odd}")
    for name, empty in _NO_ARMS.items():
        if given[name] != empty or type(given[name]) is not type(empty):
            raise ProtocolError(
                f"the round plan's {name} = {given[name]!r}: expected {empty!r}, for models "
                "are compared by an A/B run of its own ([ab_test]), not beside training"
            )
    for name, kind in kinds.items():
        if type(given[name]).__name__ != getattr(kind, "__name__", kind):
            raise ProtocolError(f"the round plan's {name} is not of the expected type {kind}")
    if given["version"] != VERSION:
        raise ProtocolError(
            f"the server speaks plan version {given['version']}, this device {VERSION}; "
            "install the same privet on both"
        )


def _refuse_out_of_range(given: Mapping[str, Any]) -> None:
    """Refuse a plan whose values no round can have, each by itself."""
    for name in ("run", "layout", "start"):
        if len(given[name]) > LONGEST_TEXT:
            raise ProtocolError(
                f"the round plan's {name} has {len(given[name])} characters: expected at most "
                f"{LONGEST_TEXT}"
            )
    for name, (low, high) in _RANGES.items():
        if not (math.isfinite(given[name]) and low <= given[name] <= high):
            raise ProtocolError(
                f"the round plan's {name} = {given[name]!r} is out of range: expected a finite "
                f"number from {low:g} to {high:g}"
            )
    if given["noise_at"] not in (*PLACES, "none"):
        raise ProtocolError(
            f"the round plan's noise_at = {given['noise_at']!r}: expected one of "
            f"{', '.join(PLACES)}, none"
        )
    if given["losses_bound"] and given["local_steps"] != 1:
        raise ProtocolError(
            f"the round plan's local_steps = {given['local_steps']}: expected 1 where "
            "statistics are asked for"
        )
