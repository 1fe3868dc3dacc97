"""The made-up work of the GPU benchmark: settings, records, the plan of a round, an adapter."""

import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ....client.privacy.ledger import Ledger
from ....client.training.constant_work import Shape
from ....client.training.records import Tokenised
from ....common.model.adapter import Adapter
from ....common.model.exchange_layout import Vector
from ....common.privacy.plan_maker import make_plan
from ....common.privacy.round_plan import Plan
from ....common.settings.config import Config, parse
from ....common.settings.sections import AdapterSettings

__all__ = ["Work", "adapter_settings", "public_shape", "settings"]


def adapter_settings(rank: int) -> AdapterSettings:
    """LoRA on the usual four layers of every block."""
    return AdapterSettings(family="lora", rank=rank, last_blocks=1000)


def settings() -> Config:
    """The settings of a round with both levels of noise, and a budget for many."""
    return parse(
        {
            "rounds": {"cohort": 64},
            "privacy": {
                "client": {"noise_at": "device", "clip": 0.1},
                "example": {"clip": 0.1},
                "budget": {"client": 1e6, "example": 1e6},
            },
        }
    )


def public_shape(rows: int, tokens: int) -> Shape:
    """One chunk for so many records, with a row one token longer than any of them."""
    return Shape(1, rows, tokens + 1, spare=0)


@dataclass(frozen=True)
class Work:
    """What one device has to do.

    Attributes:
        config: the run's settings.
        plan: of a round in which every record is drawn.
        records: of random tokens.
        start: the adapter before the round, away from zero so that every gradient is alive.
        words: of the vocabulary.
    """

    config: Config
    plan: Plan
    records: list[Tokenised]
    start: Vector
    words: int

    @classmethod
    def of(cls, adapter: Adapter, records: int, tokens: int, shortest: int = 0) -> "Work":
        """Make work of so many records, of `shortest` to `tokens` tokens (0: all of `tokens`)."""
        config, words = settings(), adapter.base.output.words
        away = np.random.default_rng(5).normal(size=len(adapter.start))
        start = (adapter.start + 0.02 * away).astype(np.float32)
        plan = make_plan(config, "benchmark", 1, adapter.layout.digest, start)
        plan = dataclasses.replace(plan, rate=1.0, batch_size=records)
        own = _drawn(records, shortest or tokens, tokens, words, seed=1)
        return cls(config, plan, own, start, words)

    @property
    def plain(self) -> Plan:
        """The same round without privacy."""
        return dataclasses.replace(self.plan, record_clip=0.0, record_noise=0.0)

    def strangers(self, count: int) -> list[Tokenised]:
        """Draw records of other people, as long as the own ones or shorter."""
        lengths = [len(record.ids) for record in self.records]
        return _drawn(count, min(lengths), max(lengths), self.words, seed=2)

    @contextmanager
    def ledger(self) -> Iterator[Ledger]:
        """A device's ledger, of nobody, on disk as any is."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "ledger.sqlite"
            with Ledger.open(path, owner="benchmark") as ledger:
                yield ledger


def _drawn(count: int, shortest: int, longest: int, words: int, seed: int) -> list[Tokenised]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(shortest, longest + 1, size=count)
    return [Tokenised(tuple(map(int, rng.integers(words, size=length)))) for length in lengths]
