"""The gate test: nothing a device sends depends on its records but through the gate.

The ClientApp runs on private data sets that differ, with the same randomness. Every field of every
reply but `vector` must be byte for byte the same, and no other field may be there.
"""

import dataclasses
import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from privet.client.app import app
from privet.client.device import Device, exchange_at, take_part
from privet.client.privacy.gate import charges
from privet.client.simulated import SimulatedContext
from privet.client.training.local_training import Randomness, Trained, train
from privet.client.training.records import Tokenised
from privet.common.errors import DataError, GateRefused, StateError
from privet.common.privacy.accounting import epsilon
from privet.common.privacy.clipping import clip
from privet.common.privacy.noise import TestSource
from privet.common.privacy.plan_maker import make_plan
from privet.common.privacy.round_plan import Plan
from privet.common.settings.config import Config
from privet.experiments.grid import LocalGrid
from privet.experiments.simulate import prepare
from privet.server.rounds import Reply, masked_sum

from ..masking_party import stream
from ..tiny import VOCABULARY, population, tiny_config

ALLOWED = {"reply.client", "reply.released", "reply.vector"}
# not the clock: when it was made, and how long it may live
FIXED = ("message_type", "src_node_id", "dst_node_id", "group_id", "run_id")
Records = tuple[Tokenised, ...]


@pytest.fixture(scope="module")
def prepared(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config]:
    """A run folder as it is before the first round."""
    folder = tmp_path_factory.mktemp("gate")
    people = population(folder / "people", 10, 10)
    privacy = {"client": {"noise_at": "device"}}
    config = tiny_config(llama_folder, people, rounds={"count": 4}, privacy=privacy)
    return folder / "run", prepare(config, folder / "run", resume=False)


@pytest.fixture
def bench(prepared: tuple[Path, Config], tmp_path: Path) -> SimulatedContext:
    return SimulatedContext.open(Path(shutil.copytree(prepared[0], tmp_path / "run")))


def records(count: int, seed: int = 0) -> Records:
    """Made-up private records, two to sixteen tokens each."""
    drawn = np.random.default_rng(seed)
    return tuple(
        Tokenised((4, *map(int, drawn.integers(6, VOCABULARY, drawn.integers(1, 16)))))
        for _ in range(count)
    )


def plan_of(bench: SimulatedContext, number: int = 1, **changes: Any) -> Plan:
    sent = exchange_at(bench)
    plan = make_plan(bench.config, bench.run, number, sent.state.digest, sent.start, sent)
    return dataclasses.replace(plan, **changes)


# --- the walk over replies ---------------------------------------------------------------------


def asked(folder: Path, client: Any, kind: str = "train.round") -> Message:
    """The reply of device 0 to the first round's message."""
    bench = SimulatedContext.open(folder)
    grid = LocalGrid(client, bench.config.data.clients, str(folder))
    content = RecordDict(
        {
            "adapter": ArrayRecord({"vector": Array(exchange_at(bench).start)}),
            "plan": ConfigRecord(plan_of(bench).to_dict()),
            "protocol": ConfigRecord({"message": b"", "client": 0}),
            "offer": ConfigRecord({"run": bench.run, "nonce": bytes(32)}),
        }
    )
    (reply,) = grid.send_and_receive([Message(content, next(iter(grid.get_node_ids())), kind)])
    return reply


def walk(reply: Message) -> Iterator[tuple[str, Any]]:
    """Every field that leaves; of the contribution only its length."""
    for name in FIXED:
        yield f"metadata.{name}", getattr(reply.metadata, name)
    yield "error", (reply.error.code, reply.error.reason) if reply.has_error() else None
    for record_name, record in reply.content.items():
        for key, value in record.items():
            field = f"{record_name}.{key}"
            if field not in ALLOWED:
                raise AssertionError(f"{field} leaves the device and is no part of the protocol")
            yield field, len(value) if key == "vector" else (type(value), value)


DATA_SETS: dict[str, Records] = {
    "none": (),
    "one": records(1, seed=1),
    "fifty": records(50, seed=2),
    "fifty others": records(50, seed=3),
}


def leaves_the_same(
    prepared: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, client: Any
) -> bool:
    """Whether replies differ in nothing but the vector; the vectors must differ."""
    seen, vectors = [], []
    for name, private in DATA_SETS.items():
        copy = Path(shutil.copytree(prepared, folder / name))
        with monkeypatch.context() as patch:
            patch.setattr(Device, "records", lambda _, private=private: private)
            reply = asked(copy, client)
        seen.append(dict(walk(reply)))
        vectors.append(bytes(reply.content["reply"]["vector"]))
    assert len(set(vectors)) >= 3  # the one record is not in every Poisson batch
    return all(fields == seen[0] for fields in seen)


def test_replies_on_different_private_data_differ_in_nothing_but_the_vector(
    prepared, tmp_path, monkeypatch
):
    assert leaves_the_same(prepared[0], tmp_path, monkeypatch, app)


# --- the phases of a masked round --------------------------------------------------------------

PHASES = ("keys", "shares", "vector", "confirm", "unmask")


@pytest.fixture(scope="module")
def masked(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for twelve devices that answer under masks."""
    folder = tmp_path_factory.mktemp("gate-masked")
    people = population(folder / "people", 16, 8)
    config = tiny_config(
        llama_folder,
        people,
        data={"clients": 12},
        rounds={"count": 1, "cohort": 12},
        privacy={"client": {"noise_at": "distributed"}},
    )
    prepare(config, folder / "run", resume=False)
    return folder / "run"


class Watched(LocalGrid):
    """Keeps what device 0 answers."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        for reply in super().pull_messages(message_ids):
            if reply.content["reply"]["client"] == 0:
                self.seen.append(reply)
            yield reply


def masked_replies(folder: Path, monkeypatch: pytest.MonkeyPatch, client: Any) -> list[Message]:
    """Device 0's replies in a whole masked round, with repeatable keys and nonces."""
    monkeypatch.setattr("privet.client.device.os", SimpleNamespace(urandom=stream("gate")))
    bench = SimulatedContext.open(folder)
    grid = Watched(client, 12, str(folder))
    grid.seen = []
    nodes = list(grid.get_node_ids())

    def ask(phase: str, messages: Any, plan: Plan, start: NDArray[np.float32]) -> Iterator[Reply]:
        common = {"plan": ConfigRecord(plan.to_dict())}
        if phase == "vector":
            common["adapter"] = ArrayRecord({"vector": Array(start)})
        sent = [
            Message(
                RecordDict(
                    {**common, "protocol": ConfigRecord({"message": message, "client": number})}
                ),
                nodes[number],
                f"train.{phase}",
            )
            for number, message in messages.items()
        ]
        for reply in grid.send_and_receive(sent):
            own = reply.content["reply"]
            yield Reply(own["client"], own["vector"] if own["released"] else None)

    sent = exchange_at(bench)
    size = sent.released(1).dimension
    total, _, _ = masked_sum(ask, range(12), plan_of(bench), sent.start, size)
    assert total is not None
    return list(grid.seen)


def masked_leave_the_same(
    prepared: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, client: Any
) -> bool:
    """As `leaves_the_same`, in every phase; but for the masked vector all bytes are the same."""
    seen, vectors, others = [], [], []
    for name, private in DATA_SETS.items():
        copy = Path(shutil.copytree(prepared, folder / name))
        with monkeypatch.context() as patch:
            own = Device.records

            def records_of(device: Device, private: Records = private, own: Any = own) -> Any:
                return private if device.name == "user 000" else own(device)

            patch.setattr(Device, "records", records_of)
            replies = masked_replies(copy, patch, client)
        kinds = [reply.metadata.message_type.rpartition(".")[2] for reply in replies]
        assert tuple(kinds) == PHASES
        seen.append([dict(walk(reply)) for reply in replies])
        sent = [bytes(reply.content["reply"]["vector"]) for reply in replies]
        vectors.append(sent.pop(PHASES.index("vector")))
        others.append(sent)
    assert len(set(vectors)) >= 3
    assert all(all(sent) for sent in others)
    return all(fields == seen[0] for fields in seen) and all(sent == others[0] for sent in others)


def test_in_every_phase_of_a_masked_round_only_the_masked_vector_depends_on_private_data(
    masked, tmp_path, monkeypatch
):
    assert SimulatedContext.open(masked).device(0).name == "user 000"
    assert masked_leave_the_same(masked, tmp_path, monkeypatch, app)


@pytest.mark.parametrize("phase", PHASES)
def test_an_app_that_hides_a_count_in_any_phase_of_a_masked_round_is_caught(
    masked, tmp_path, monkeypatch, phase
):
    def faulty(message: Message, context: Context) -> Message:
        """Tells the count of records in the node that the reply is said to be for."""
        reply = app(message, context)
        if message.metadata.message_type == f"train.{phase}":
            own = SimulatedContext.open(Path(str(context.run_config["run"]))).device(
                int(context.node_config["partition-id"])
            )
            reply.metadata.group_id = f"{len(own.records())}"
        return reply

    assert not masked_leave_the_same(masked, tmp_path, monkeypatch, faulty)


def test_the_greeting_says_who_and_which_version_and_nothing_else(prepared):
    reply = asked(prepared[0], app, "query.hello")
    assert {(name, *record) for name, record in reply.content.items()} == {
        ("hello", "version", "identity", "signature", "accepted")
    }


def with_metric(name: str, value: Callable[[Records], float]) -> Callable[..., Message]:
    def faulty(message: Message, context: Context) -> Message:
        reply = app(message, context)
        private = Device.records(None)  # type: ignore[arg-type]
        reply.content["metrics"] = MetricRecord({name: value(private)})  # type: ignore[arg-type]
        return reply

    return faulty


@pytest.mark.parametrize(
    ("name", "value"),
    [("num-examples", len), ("loss", lambda own: sum(len(r.ids) for r in own) / 7)],
)
def test_an_app_that_sends_a_count_or_a_loss_beside_the_vector_is_caught(
    prepared, tmp_path, monkeypatch, name, value
):
    with pytest.raises(AssertionError, match=f"metrics.{name} leaves the device"):
        leaves_the_same(prepared[0], tmp_path, monkeypatch, with_metric(name, value))


def long_as_data(message: Message, context: Context) -> Message:
    """Pads the contribution by a byte a record."""
    reply = app(message, context)
    own = Device.records(None)  # type: ignore[arg-type]
    reply.content["reply"]["vector"] = bytes(reply.content["reply"]["vector"]) + b"\0" * len(own)
    return reply


def silent_without_data(message: Message, context: Context) -> Message:
    """Declines where there is nothing to train on."""
    reply = app(message, context)
    reply.content["reply"]["released"] = bool(Device.records(None))  # type: ignore[arg-type]
    return reply


@pytest.mark.parametrize("faulty", [long_as_data, silent_without_data])
def test_an_app_that_hides_the_count_in_an_allowed_field_is_caught(
    prepared, tmp_path, monkeypatch, faulty
):
    assert not leaves_the_same(prepared[0], tmp_path, monkeypatch, faulty)


def test_what_goes_wrong_with_private_records_is_not_told_to_the_server(
    prepared, tmp_path, monkeypatch
):
    def damaged(_: Device) -> Records:
        raise DataError("my diary, line 3: I never told anybody that")

    monkeypatch.setattr(Device, "records", damaged)
    folder = Path(shutil.copytree(prepared[0], tmp_path / "run"))
    with pytest.raises(StateError) as told:  # Flower sends the error's type and text
        asked(folder, app)
    assert str(told.value) == "this device could not take part; the reason is in its own log"

    def faulty() -> None:
        damaged(None)  # type: ignore[arg-type]

    with pytest.raises(DataError, match="diary"):
        faulty()


# --- a device's round --------------------------------------------------------------------------


def test_a_round_asked_again_gets_the_same_bytes_at_no_cost_and_another_plan_gets_none(bench):
    device, plan = bench.device(0), plan_of(bench)
    start = bench.trainer.adapter.start
    first = take_part(device, plan, start)
    assert first is not None
    assert take_part(device, plan, start) == first
    assert bench.ledger.participations(device.name) == 1
    stricter = dataclasses.replace(plan, variance=plan.variance * 2)
    assert take_part(device, stricter, start) is None
    assert bench.ledger.participations(device.name) == 1
    (declined,) = bench.ledger.declined(device.name)
    assert "it answers a round once" in declined.reason


def test_a_laxer_plan_and_another_adapter_are_declined_and_the_ledger_says_why(bench):
    device, start = bench.device(0), bench.trainer.adapter.start
    assert take_part(device, plan_of(bench, variance=0.0), start) is None
    assert take_part(device, plan_of(bench, 2), start + np.float32(1)) is None
    assert take_part(device, plan_of(bench, 3, layout="0" * 64), start) is None
    laxer, other, layout = (found.reason for found in bench.ledger.declined(device.name))
    assert "laxer than this device allows: noise" in laxer
    assert "round 2: the adapter received is not the one announced" in other
    assert "the plan asks for 000000000000" in layout
    assert bench.ledger.participations(device.name) == 0


def test_a_device_over_its_budget_declines_before_it_trains_and_says_so(bench, monkeypatch):
    start = bench.trainer.adapter.start
    spent = epsilon(charges(plan_of(bench), len(start), bench.config.privacy)[:1], 1e-5)
    budget = bench.config.privacy.budget.model_copy(update={"client": 1.1 * spent})
    privacy = bench.config.privacy.model_copy(update={"budget": budget})
    config = bench.config.model_copy(update={"privacy": privacy})
    device = Device("user 000", dataclasses.replace(bench, config=config))
    assert take_part(device, plan_of(bench), start) is not None
    monkeypatch.setattr("privet.client.device.train", None)
    assert take_part(device, plan_of(bench, 2), start) is None
    assert bench.ledger.participations("user 000") == 1
    (declined,) = bench.ledger.declined("user 000")
    assert (declined.round, "declines: its next release" in declined.reason) == (2, True)


def test_a_delta_that_is_not_finite_stays_on_the_device_and_costs_nothing(bench, monkeypatch):
    def poisoned(*_: Any, **__: Any) -> Trained:
        return Trained(np.full(len(bench.trainer.adapter.start), np.nan, np.float32), np.zeros(0))

    monkeypatch.setattr("privet.client.device.train", poisoned)
    assert take_part(bench.device(0), plan_of(bench), bench.trainer.adapter.start) is None
    assert bench.ledger.participations(bench.device(0).name) == 0
    assert "not finite" in bench.ledger.declined()[0].reason
    assert issubclass(GateRefused, Exception)


# --- two levels, one noise ---------------------------------------------------------------------


def trained(bench: SimulatedContext, own: Records, plan: Plan, start: NDArray[np.float32]) -> Any:
    """The clipped delta; the randomness is the same in every call."""
    batches, source = np.random.default_rng(5), TestSource(1, "training")
    return clip(
        train(bench.trainer, start, own, plan, Randomness(batches, source)).delta, plan.clip
    ).vector


def moved_by_one_record(
    bench: SimulatedContext, steps: int, learning_rate: float
) -> tuple[float, float]:
    """How far one record more moves the clipped delta, at most over a few; and lr C / B."""
    plan = plan_of(
        bench, local_steps=steps, learning_rate=learning_rate, rate=1.0, record_noise=0.0,
        record_clip=0.01, clip=1e3,
    )  # fmt: skip
    start = np.random.default_rng(0).normal(0, 0.3, len(bench.trainer.adapter.start))
    found = 0.0
    for seed in range(6):
        own = records(9, seed)
        with_it = trained(bench, own, plan, start.astype(np.float32))
        without = trained(bench, own[:-1], plan, start.astype(np.float32))
        found = max(found, float(np.linalg.norm(with_it - without)))
    return found, learning_rate * plan.record_clip / plan.batch_size


@pytest.mark.parametrize("learning_rate", [0.1, 1.0, 30.0])
def test_after_one_step_one_record_moves_the_clipped_delta_by_at_most_lr_c_over_b(
    bench, learning_rate
):
    moved, bound = moved_by_one_record(bench, 1, learning_rate)
    assert 0.9 * bound < moved <= bound


def test_after_two_steps_that_bound_fails_and_only_opacus_noise_is_counted(bench):
    moved, bound = moved_by_one_record(bench, 2, 30.0)
    assert moved > 2 * bound  # not even once a step

    def faulty(plan: Plan) -> float:
        """The release's noise over the bound of one step, whatever the number of steps."""
        return float(plan.variance**0.5 * plan.step * plan.batch_size / plan.learning_rate)

    plan = plan_of(bench, local_steps=2)
    lines = charges(plan, len(bench.trainer.adapter.start), bench.config.privacy)
    counted = [c.noise_multiplier for c in lines if c.unit == "example"]
    assert counted == [plan.record_noise] * 2
    assert faulty(plan) > plan.record_noise


def test_clipping_moves_no_two_deltas_further_apart(bench):
    plan = plan_of(bench, rate=1.0, record_noise=0.0, clip=0.01, learning_rate=1.0)
    start, own = bench.trainer.adapter.start, records(9)
    moved = trained(bench, own, plan, start) - trained(bench, own[:-1], plan, start)
    assert np.linalg.norm(moved) <= min(2 * plan.clip, plan.record_clip / plan.batch_size)


def test_the_plan_names_the_adapter_it_starts_from(bench):
    start = bench.trainer.adapter.start
    assert plan_of(bench).start == hashlib.sha256(start.tobytes()).hexdigest()
