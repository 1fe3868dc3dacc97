"""constant_work.py: what a device computes in a round does not hang on its records."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import binom

from privet.client.device import Device, take_part, tokenised
from privet.client.runtime.answer_pace import Pace
from privet.client.training import records as data
from privet.client.training.cluster_choice import mean_losses
from privet.client.training.constant_work import DUMMY, Shape, max_drawn, work_of
from privet.client.training.local_training import Randomness, Trainer, train
from privet.client.training.records import Record, Tokenised
from privet.common.model import base_model, objective
from privet.common.model.adapter import attach
from privet.common.privacy.noise import TestSource
from privet.common.privacy.plan_maker import make_plan
from privet.common.privacy.round_plan import Plan
from privet.common.secure_aggregation.keys import Identity
from privet.common.settings.config import Config
from privet.common.settings.sections import PreferenceSettings

from ...tiny import VOCABULARY, WORDS, fresh, tiny_config

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

SHAPE = Shape(2, 6, 14)
PAIRS = PreferenceSettings()


def plan(**changes: Any) -> Plan:
    public: dict[str, Any] = {
        "run": "run", "round": 1, "layout": "", "start": "", "cohort": 4, "clip": 1.0,
        "step": 1e-6, "bits": 32, "rotated": False, "noise_at": "server",
        "variance": 1e12, "survivors": 0, "colluders": 0, "learning_rate": 1.0,
        "local_steps": 1, "batch_size": 8, "rate": 1.0, "record_clip": 0.05, "record_noise": 0.0,
        "losses_bound": 10.0,
    }  # fmt: skip
    return Plan(**public | changes)


def records(count: int, seed: int = 0) -> list[Tokenised]:
    drawn = np.random.default_rng(seed)

    def ids() -> tuple[int, ...]:
        return tuple(int(i) for i in drawn.integers(6, VOCABULARY, drawn.integers(3, 14)))

    return [Tokenised(ids(), float(n % 2), rejected=ids(), prompts=(1, 1)) for n in range(count)]


def trained(trainer: Trainer, own: Sequence[Tokenised], shape: Shape | None, **changes: Any) -> Any:
    """One `train` with repeatable randomness, away from the start."""
    drawn = np.random.default_rng(5).normal(size=trainer.adapter.layout.dimension)
    start = (trainer.adapter.start + 0.3 * drawn).astype(np.float32)
    return train(
        trainer, start, own, plan(**changes),
        Randomness(np.random.default_rng(1), TestSource(1, "noise")), shape=shape,
    )  # fmt: skip


@pytest.fixture(scope="module")
def texts(llama_folder: Path) -> Trainer:
    return Trainer.of(attach(fresh(llama_folder), tiny_config(llama_folder).adapter))


@pytest.fixture(scope="module")
def labels(bert_folder: Path) -> Trainer:
    return Trainer.of(attach(fresh(bert_folder), tiny_config(bert_folder).adapter, 1))


@pytest.fixture(scope="module")
def pairs(llama_folder: Path) -> Trainer:
    adapter = attach(fresh(llama_folder), tiny_config(llama_folder).adapter)
    return Trainer.of(adapter, pairs=PAIRS)


@pytest.fixture(params=["texts", "labels", "pairs"])
def trainer(request: pytest.FixtureRequest) -> Trainer:
    found: Trainer = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The shapes of everything that passes a model, and of what meets its vocabulary."""
    from privet.client.personal import label_evaluator, pair_evaluator, scored_text
    from privet.common.model import dpo

    found: list[tuple[Any, ...]] = []

    def watched(module: Any, name: str) -> None:
        real = getattr(module, name)

        def wrapped(base: Any, first: Any, *rest: Any, **named: Any) -> Any:
            tensor = first if isinstance(first, torch.Tensor) else rest[0]
            whole = not (rest and isinstance(rest[0], torch.Tensor) and rest[0].all())
            found.append((name, tuple(tensor.shape), whole))
            return real(base, first, *rest, **named)

        monkeypatch.setattr(module, name, wrapped)

    for module in (
        objective, dpo, base_model, label_evaluator, pair_evaluator, scored_text
    ):  # fmt: skip
        watched(module, "final_states")
    watched(objective, "token_losses")
    return found


# --- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [0.05, 0.0])
@pytest.mark.parametrize("steps", [1, 2])
def test_the_work_of_training_is_the_same_with_no_record_with_one_and_with_a_full_batch(
    trainer: Trainer, seen: list[tuple[Any, ...]], clip: float, steps: int
):
    found, changes = [], {"local_steps": steps, "record_clip": clip}
    trained(trainer, [], SHAPE, **changes)  # tries memory and kernels, once for a shape
    for count in (0, 1, 3, SHAPE.capacity):
        seen.clear()
        trained(trainer, records(count, seed=count), SHAPE, **changes)
        found.append(list(seen))
    assert found == [found[0]] * 4
    passes = [one for one in found[0] if one[0] == "final_states"]
    again = steps - 1 if trainer.pairs else 0  # the margins of the reference
    assert len(passes) == SHAPE.chunks * (steps + again)
    rows = SHAPE.rows * (2 if trainer.pairs else 1)
    # a mask has a gap in every chunk: without one attention would take another kernel
    assert {one[1:] for one in passes} == {((rows, SHAPE.tokens), True)}


@pytest.mark.parametrize("clip", [0.05, 0.0])
@pytest.mark.parametrize("count", [0, 1, 7, 10, 25])
def test_dummies_change_neither_delta_nor_statistics(trainer: Trainer, clip: float, count: int):
    own = records(count)
    plain, padded = (trained(trainer, own, shape, record_clip=clip) for shape in (None, SHAPE))
    scale = max(1e-3, float(np.abs(plain.delta).max()))
    assert np.allclose(plain.delta, padded.delta, rtol=0, atol=2e-5 * scale)
    assert np.allclose(plain.statistics, padded.statistics, rtol=1e-5, atol=0)
    assert np.array_equal(padded.statistics[1:], [count / 8])
    if not count:
        assert not padded.delta.any()


def test_an_empty_batch_of_dummies_still_steps_with_the_same_noise(texts: Trainer):
    none, padded = (trained(texts, [], shape, record_noise=0.7) for shape in (None, SHAPE))
    assert none.delta.any()
    assert np.array_equal(none.delta, padded.delta)


def test_a_record_and_a_dummy_that_are_not_finite_leave_the_others_as_they_are(
    texts: Trainer, monkeypatch: pytest.MonkeyPatch
):
    own = records(4)
    clean = trained(texts, own[1:], SHAPE)
    real = objective.record_losses

    def spoilt(base: Any, batch: Any, head: Any) -> Any:
        losses = real(base, batch, head)
        odd = (batch.mask.sum(1) == 1) | (batch.ids[:, 1] == own[0].ids[1])
        return losses * torch.where(odd, float("nan"), 1.0)  # row by row, also backwards

    monkeypatch.setattr("privet.client.training.local_training.record_losses", spoilt)
    found = trained(texts, own, SHAPE)
    assert np.isfinite(found.delta).all()
    assert np.allclose(found.delta, clean.delta, atol=1e-6)


def test_the_prefix_cache_rests_so_that_no_time_tells_which_records_it_has_met(llama_folder: Path):
    adapter = attach(fresh(llama_folder), tiny_config(llama_folder).adapter)
    trainer = Trainer.of(adapter, 1)
    assert trainer.prefix is not None
    trained(trainer, records(5), SHAPE)
    assert not trainer.prefix._kept
    trained(trainer, records(5), None)
    assert len(trainer.prefix._kept) == 5


# --- shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "rate"), [(8, 0.5), (32, 0.25), (200, 0.04), (1000, 0.01)])
def test_a_draw_exceeds_what_is_provided_for_once_in_2_to_the_40(count: int, rate: float):
    most = max_drawn(count, rate)
    assert binom.sf(most, count, rate) <= 2.0**-40
    assert most == count or binom.sf(most - 1, count, rate) > 2.0**-40
    assert max_drawn(count, 1.0) == count


@pytest.mark.parametrize("tokens", [4, 48, 512, 4096])
@pytest.mark.parametrize("count", [0, 1, 2, 15, 16, 27, 200])
def test_every_chunk_has_a_dummy_and_what_does_not_fit_takes_another_chunk(count: int, tokens: int):
    shape = Shape.of(count, tokens, 16)
    assert count <= shape.capacity
    assert shape.rows <= 17
    for drawn in (0, 1, count, shape.capacity, shape.capacity + 1, 3 * shape.capacity):
        dealt = shape.dealt(list(range(drawn)))
        assert sorted(n for chunk in dealt for n in chunk) == list(range(drawn))
        assert len(dealt) == shape.chunks if drawn <= shape.capacity else len(dealt) > shape.chunks
        assert all(len(chunk) < shape.rows for chunk in dealt)
        filled = shape.filled(records(len(dealt[0])))
        assert len(filled) == shape.rows
        assert filled[-1] == DUMMY


# --- a device's round ----------------------------------------------------------------------------


class _Free:
    """A ledger that allows everything."""

    def resend(self, *_: object) -> None:
        """Nothing was released."""

    check = commit = decline = resend

    def releases_of(self, *_: object) -> int:
        """None so far."""
        return 0


@dataclasses.dataclass(frozen=True, eq=False)
class FreeContext:
    """As far as one round needs it."""

    config: Config
    trainer: Trainer
    own: Sequence[Record]
    pace: Pace | None = None
    ledger: Any = dataclasses.field(default_factory=_Free)

    def identity(self, _: str) -> Identity:
        return Identity.of(bytes(32))

    def records(self, _: str) -> Sequence[Record]:
        return self.own

    def taught(self, *_: object) -> None:
        """Nothing is."""

    def tokenised(self, some: Sequence[Record]) -> list[data.Tokenised]:
        return tokenised(some, self.config, self.trainer, "generation")

    def local_factor(self, _: str) -> None:
        return None


def person(count: int, seed: int = 0) -> list[Record]:
    drawn = np.random.default_rng(seed)
    return [Record(" ".join(drawn.choice(WORDS, drawn.integers(2, 9)))) for _ in range(count)]


def config_of(folder: Path, **changes: Any) -> Config:
    table: dict[str, Any] = {
        "training": {"constant": True},
        "rounds": {"optimizer": "fedavg", "count": 20},
        "clusters": {"count": 2, "extra": 0},
        "privacy": {"client": {"noise_at": "device"}, "example": {"enabled": False}},
        "statistics": {"enabled": True, "gains": True},
    }
    return tiny_config(folder, **table | changes)


def answers(
    config: Config, people: Sequence[Sequence[Record]], **context: Any
) -> list[bytes | None]:
    """What each answers in round 2, when there are two clusters."""
    from privet.common.model.exchange_layout import Exchange

    adapter = attach(fresh(Path(config.model.base)), config.adapter)
    trainer = Trainer.of(adapter)
    exchange = Exchange(adapter.layout, adapter.start, config.clusters)
    state: NDArray[np.float32] = exchange.start
    given = make_plan(config, "run", 2, "", state, exchange)
    return [
        take_part(Device("me", FreeContext(config, trainer, own, **context)), given, state)  # type: ignore[arg-type]
        for own in people
    ]


def test_a_round_with_personas_and_gains_passes_the_model_as_often_with_records_as_without(
    llama_folder: Path, seen: list[tuple[Any, ...]]
):
    config, found = config_of(llama_folder), []
    for count in (0, 12):
        seen.clear()
        (payload,) = answers(config, [person(count)])
        assert payload is not None
        found.append([one for one in seen if one[0] == "token_losses"])
    assert found[0] == found[1]
    assert found[0]
    without = config_of(llama_folder, training={"constant": False})
    seen.clear()
    answers(without, [[]])
    assert [one for one in seen if one[0] == "token_losses"] == []


def test_the_rehearsal_of_a_round_comes_twice_before_any_record_is_read_and_is_not_released(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    config, order = config_of(llama_folder), list[str]()

    def watched(trainer: Any, start: Any, some: Any, *rest: Any, **named: Any) -> Any:
        order.append(f"{len(some)} records")
        return train(trainer, start, some, *rest, **named)

    monkeypatch.setattr("privet.client.device.train", watched)
    pace = Pace(pause=lambda _: None)
    paced = answers(config, [person(12)] * 2, pace=pace)
    assert order == ["0 records", "0 records", "8 records", "8 records"]
    assert paced == answers(config, [person(12)] * 2)


def test_real_devices_always_work_constantly_and_simulated_ones_only_when_told(llama_folder: Path):
    simulated, real = tiny_config(llama_folder), tiny_config(llama_folder, "devices")
    given = plan(rate=0.5)
    assert work_of(simulated, given) is None
    found = work_of(real, given)
    assert found is not None
    assert found.step.tokens == 16
    assert found.step.capacity >= 8
    told = tiny_config(llama_folder, training={"constant": True})
    assert work_of(told, given) == found


def test_the_digest_of_a_run_begun_before_these_settings_stays_valid(llama_folder: Path):
    plain = tiny_config(llama_folder)
    dumped = plain.model_dump(mode="json")
    assert "constant" in dumped["training"]
    assert "tick_s" in dumped["rounds"]
    assert plain.digest != tiny_config(llama_folder, training={"constant": True}).digest
    assert plain.digest != tiny_config(llama_folder, rounds={"tick_s": 1.0}).digest


def test_a_persona_is_chosen_alike_with_dummies_and_without(texts: Trainer):
    adapter = texts.adapter
    moved = np.random.default_rng(3).normal(size=(3, adapter.layout.dimension))
    cluster_vectors = (adapter.start + moved).astype(np.float32)
    for count in (1, 5, 20):
        own = records(count)
        plain, padded = (mean_losses(adapter, cluster_vectors, own, one) for one in (None, SHAPE))
        assert np.allclose(plain, padded, rtol=1e-5)
