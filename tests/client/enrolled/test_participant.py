"""participant.py: whole masked runs of people's own devices in one process, and hostile servers.

The server is `server/app.py` over a grid in memory, the devices are four homes with their vaults.
"""

import dataclasses
import functools
import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from privet.client.consent import run_offers
from privet.client.enrolled.participant import EnrolledParticipant
from privet.client.privacy import ledger as ledgers
from privet.client.runtime import processes
from privet.client.runtime.answer_pace import Pace
from privet.client.store import device_store as homes
from privet.client.store import key_file as unlock_module
from privet.client.store.device_store import ME, DeviceStore, Joined
from privet.client.store.key_file import Passphrase
from privet.client.training import local_factor
from privet.common.errors import ConfigError, PrivacyError, ProtocolError, RunUnfinished, StateError
from privet.common.files import read_lines
from privet.common.model.adapter import exchanged, shared
from privet.common.privacy.encoding import unpack
from privet.common.privacy.plan_maker import make_plan
from privet.common.privacy.round_plan import Plan
from privet.common.secure_aggregation import keys as common_keys
from privet.common.secure_aggregation.keys import Directory, write_directory
from privet.common.settings.config import Config, to_toml
from privet.experiments.grid import FIRST_NODE, LocalGrid
from privet.server import rounds
from privet.server.app import serve
from privet.server.run_folder import checkpoint
from privet.server.run_folder.resuming import resumed

from ...tiny import WORDS, tiny_config

SERVER = "fl.example.org:9092"
RUN = "run-1"
PEOPLE = 4
PHASES = ("keys", "shares", "vector", "confirm", "unmask")


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """A passphrase that costs nothing to try, and answers that wait for no public moment."""
    cost = {"iterations": 1, "lanes": 1, "memory_kib": 1024}
    monkeypatch.setattr(unlock_module, "_ARGON2ID", cost)
    hasty = functools.partial(Pace, pause=lambda _: None)
    monkeypatch.setattr("privet.client.enrolled.participant.Pace", hasty)


@pytest.fixture
def homes_of_four(tmp_path: Path, llama_folder: Path) -> Iterator[list[DeviceStore]]:
    """Four people who know each other's identities, with twelve records each."""
    made = [DeviceStore.create(tmp_path / f"home-{n}", Passphrase("own")) for n in range(PEOPLE)]
    directory = Directory({n: home.identity.public for n, home in enumerate(made)}, closed=True)
    for number, home in enumerate(made):
        home.join(Joined(SERVER, "PEM", closed=True), directory)
        allow(home, "min_cohort = 10", "min_cohort = 3")
        allow(home, "colluding = 0.1", "colluding = 0.0")
        allow(home, "min_example_noise = 0.5", "min_example_noise = 0.0")
        allow(home, "models = [\n", f'models = [\n    "{llama_folder}",\n')
        allow(home, "max_load = 2.0", "max_load = 1000.0")
        home.vault.put("records/own", records(number))
    yield made
    for home in made:
        home.close()


def allow(home: DeviceStore, before: str, after: str) -> None:
    """Change the owner's policy."""
    path = home.folder / "policy.toml"
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))


def records(seed: int, count: int = 12) -> bytes:
    """Made-up texts, as the vault keeps them."""
    drawn = np.random.default_rng(seed)
    lines = [
        {"user": ME, "text": " ".join(drawn.choice(WORDS, 6)), "time": float(n)}
        for n in range(count)
    ]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def config_of(llama_folder: Path, **changes: Any) -> Config:
    """A masked run of four, client-level only, so that the accounting takes no time."""
    table: dict[str, Any] = {
        "data": {"clients": PEOPLE, "test_clients": 0, "task": "generation"},
        "rounds": {
            "cohort": PEOPLE,
            "count": 2,
            "timeout_s": 60.0,
            "optimizer": "fedavg",
            "patience": 2,
            "wait_s": 0.01,
        },
        "privacy": {"client": {"noise_at": "distributed"}, "example": {"enabled": False}},
        "secure_aggregation": {"min_cohort": 3, "colluding": 0.0},
        "insecure_test_seed": None,
    }
    for section, values in changes.items():
        table[section] = {**table.get(section, {}), **values} if type(values) is dict else values
    return tiny_config(llama_folder, "devices", **table)


@dataclasses.dataclass(eq=False)
class World:
    """A server's run folder and the devices it can reach."""

    folder: Path
    config: Config
    seats: list[EnrolledParticipant]
    before: Callable[[int, Message], None] = lambda _number, _message: None

    def __post_init__(self) -> None:
        self.folder.mkdir()
        (self.folder / "config.toml").write_text(to_toml(self.config))
        (self.folder / "run-id").write_text(RUN)
        known = {n: seat.identity.public for n, seat in enumerate(self.seats)}
        write_directory(self.folder / "directory", Directory(known, closed=True))
        said: list[str] = []
        handles = [processes.handler(seat, threading.Lock(), said.append) for seat in self.seats]

        def app(message: Message, context: Any) -> Message:
            number = context.node_id - FIRST_NODE
            self.before(number, message)
            return handles[number](message, context)

        self.said, self.grid = said, LocalGrid(app, len(self.seats), str(self.folder))

    def serve(self) -> list[Mapping[str, Any]]:
        """All rounds; their records."""
        shown: list[Mapping[str, Any]] = []
        serve(self.grid, self.folder, shown.append)
        return shown

    def tell(self, number: int, kind: str, **content: Any) -> Message:
        """One message to one device, and what it answers."""
        message = Message(RecordDict(content), FIRST_NODE + number, kind)
        (reply,) = self.grid.send_and_receive([message])
        return reply


@pytest.fixture
def world(tmp_path: Path, llama_folder: Path, homes_of_four: list[DeviceStore]) -> World:
    """Four devices whose owners have agreed to the run."""
    made = World(
        tmp_path / "run",
        config_of(llama_folder),
        [EnrolledParticipant(home) for home in homes_of_four],
    )
    for home in homes_of_four:
        agree(home, made.config)
    return made


def agree(home: DeviceStore, config: Config, partly: bool = False) -> None:
    home.receive(RUN, to_toml(config))
    home.agree(home.run(RUN)[0], "owner", partly)


def plan_of(config: Config, number: int = 1, **changes: Any) -> Plan:
    adapter = shared(config)
    plan = make_plan(config, RUN, number, adapter.layout.digest, adapter.start)
    return dataclasses.replace(plan, **changes)


# --- a whole run ---------------------------------------------------------------------------------


def released_and_opened(
    world: World, homes: list[DeviceStore], dimension: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Mapping[str, Any]], Plan, Any]:
    """A run of two rounds whose opened sum is that of what the gates released.

    Returns:
        The rounds' records; plan and opened sum of the second.
    """
    opened: list[Any] = []
    real = rounds.masked_sum

    def watched(*given: Any) -> Any:
        opened.append((given[2], real(*given)))
        return opened[-1][1]

    monkeypatch.setattr(rounds, "masked_sum", watched)
    shown = world.serve()
    assert [(one["answered"], one["declined"], one["void"]) for one in shown] == [(4, 0, False)] * 2
    plan, (total, *_) = opened[-1]
    gates = [home.ledger.resend(ME, RUN, 2, plan.digest) for home in homes]
    length = plan.length(dimension)
    plain = sum(unpack(gate or b"", length, plan.bits).astype(np.int64) for gate in gates)
    assert np.array_equal(plain % 2**plan.bits, total.astype(np.int64) % 2**plan.bits)
    for home in homes:
        assert home.ledger.participations(ME) == 2
        # every byte-string, in order, each as it was handed out
        assert [(one.round, one.phase) for one in home.outbox()] == [
            (number, phase) for number in (1, 2) for phase in PHASES
        ]
        assert all(len(home.payload(one.seq) or b"") == one.bytes for one in home.outbox())
    return shown, plan, total


def test_a_masked_run_of_own_devices_gives_the_sum_of_what_their_gates_released(
    world: World, homes_of_four: list[DeviceStore], monkeypatch: pytest.MonkeyPatch
):
    dimension = shared(world.config).layout.dimension
    released_and_opened(world, homes_of_four, dimension, monkeypatch)
    for home in homes_of_four:
        assert home.vault.names("heads/") == [f"heads/{RUN}"]


def test_of_several_personas_the_vault_keeps_the_own_one_and_no_message_says_which(
    tmp_path: Path, llama_folder: Path, homes_of_four: list[DeviceStore]
):
    clusters = {"count": 2, "extra": 0}
    config = config_of(llama_folder, clusters=clusters)
    for home in homes_of_four:
        agree(home, config)
    world = World(tmp_path / "run", config, [EnrolledParticipant(home) for home in homes_of_four])
    assert [one["answered"] for one in world.serve()] == [4, 4]
    state, sent = _state(world), exchanged(config)
    for home in homes_of_four:
        place = int(home.vault.get(f"persona/{RUN}") or b"-1")
        kept = safetensors.numpy.load(home.vault.get(f"adapters/{RUN}") or b"")["adapter"]
        assert np.array_equal(kept, sent.cluster_vectors(state)[place])
        size = -(-sent.released(1).dimension * 32 // 8) + 150  # header, lengths and a signature
        assert all(len(home.payload(one.seq) or b"") <= size or one.phase != "vector"
                   for one in home.outbox())  # fmt: skip


def test_fedsas_b_is_in_the_vault_and_in_nothing_that_was_sent(
    tmp_path: Path, llama_folder: Path, homes_of_four: list[DeviceStore]
):
    config = config_of(llama_folder, adapter={"family": "fedsa"}, training={"steps": 2})
    for home in homes_of_four:
        agree(home, config)
    world = World(tmp_path / "run", config, [EnrolledParticipant(home) for home in homes_of_four])
    assert [one["answered"] for one in world.serve()] == [4, 4]
    adapter = shared(config)
    for home in homes_of_four:
        own = local_factor.before(
            home.vault.get(f"at-home/{RUN}"), 3, adapter.local_factor.dimension
        )
        assert own is not None
        assert own.any()
        piece = own[np.flatnonzero(own)[0] :][:4].tobytes()
        assert not any(piece in (home.payload(one.seq) or b"") for one in home.outbox())
        assert not any(piece in path.read_bytes() for path in world.folder.rglob("*")
                       if path.is_file())  # fmt: skip


def _state(world: World) -> Any:
    sent = exchanged(world.config)
    kept = checkpoint.load(
        world.folder, run=RUN, config_hash=world.config.digest, layout=sent.state.digest
    )
    assert kept is not None
    return kept.adapter


# --- what the owner allows -----------------------------------------------------------------------


def everything_sent(home: DeviceStore) -> list[str]:
    return [f"{one.round} {one.phase}" for one in home.outbox()]


def test_without_an_owners_yes_nothing_leaves_and_no_round_begins(
    tmp_path: Path, llama_folder: Path, homes_of_four: list[DeviceStore]
):
    config = config_of(llama_folder, rounds={"timeout_s": 0.3})
    world = World(tmp_path / "run", config, [EnrolledParticipant(home) for home in homes_of_four])
    with pytest.raises(StateError, match="have accepted the run, and 0 of 4"):
        world.serve()
    for home in homes_of_four:
        assert home.outbox() == []
        assert "waits for your yes" in str(home.last_note)


def from_round_two(change: Callable[[], None]) -> Callable[[int, Message], None]:
    """Something the first device's owner does when the second round begins."""
    left = [change]

    def before(number: int, message: Message) -> None:
        begins = message.metadata.message_type == "train.keys"
        if left and number == 0 and begins and message.content["plan"]["round"] == 2:
            left.pop()()

    return before


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda home: allow(home, "max_clip = 1.0", "max_clip = 0.5"), "max_clip"),
        (lambda home: home.pause(True), "paused"),
        (lambda home: home.withdraw(home.run(RUN)[0]), "waits for your yes"),
        (lambda home: home.leave(), "no run"),
        (lambda home: allow(home, "client = 10.0", "client = 0.001"), "declines"),
    ],
)
def test_what_the_owner_forbids_in_a_run_counts_from_the_next_round_on(
    world: World,
    homes_of_four: list[DeviceStore],
    change: Callable[[DeviceStore], None],
    reason: str,
):
    first = homes_of_four[0]
    world.before = from_round_two(lambda: change(first))
    shown = world.serve()
    assert [(one["answered"], one["declined"]) for one in shown] == [(4, 0), (3, 1)]
    assert everything_sent(first) == [f"1 {phase}" for phase in PHASES]
    assert first.ledger.participations(ME) == 1
    (declined,) = first.ledger.declined(ME)
    assert (declined.round, reason in declined.reason) == (2, True)


def test_a_budget_that_is_spent_ends_a_run(
    tmp_path: Path, llama_folder: Path, homes_of_four: list[DeviceStore]
):
    budget = {"budget": {"client": 6.0, "example": 1.0}}
    config = config_of(llama_folder, privacy=budget)
    world = World(tmp_path / "run", config, [EnrolledParticipant(home) for home in homes_of_four])
    for home in homes_of_four:
        agree(home, config, partly=True)
    with pytest.raises(
        RunUnfinished, match=r"^1 of 2 rounds .* 4 declined .*: 0, 1, 2, 3; nothing"
    ):
        world.serve()
    shown = read_lines(world.folder / "rounds.jsonl")
    assert [(one["round"], one["answered"], one["void"]) for one in shown] == [
        (1, 4, False), (2, 0, True), (2, 0, True)
    ]  # fmt: skip
    assert [home.ledger.participations(ME) for home in homes_of_four] == [1] * 4


def test_an_extended_run_is_a_changed_offer_and_goes_on_after_another_yes(
    world: World, homes_of_four: list[DeviceStore]
):
    world.serve()
    rounds = world.config.rounds.model_copy(update={"count": 3})
    longer = resumed(world.folder, world.config, world.config.model_copy(update={"rounds": rounds}))
    for home in homes_of_four:
        assert not home.receive(RUN, to_toml(longer))
        before, after = home.agreed(RUN), home.run(RUN)[0]
        assert before is not None
        assert run_offers.changes(before[0], after) == ["rounds.count: 2 -> 3"]
        agree(home, longer)
    assert [(one["round"], one["answered"]) for one in world.serve()] == [(3, 4)]
    assert [home.ledger.participations(ME) for home in homes_of_four] == [3] * 4
    assert (world.folder / "adapter-after-2").is_dir()
    fewer = longer.model_copy(update={"rounds": rounds.model_copy(update={"count": 2})})
    with pytest.raises(ConfigError, match=r"rounds.count = 2, but 3 rounds of"):
        resumed(world.folder, longer, fewer)
    other = longer.model_copy(update={"rounds": rounds.model_copy(update={"cohort": 3})})
    with pytest.raises(ConfigError, match=r"\(rounds.cohort was 4, is now 3\)"):
        resumed(world.folder, longer, other)


def test_another_version_is_refused_by_name_and_nothing_is_kept(
    world: World, homes_of_four: list[DeviceStore]
):
    offer = {"version": "9.9", "run": "another", "config": to_toml(world.config), "nonce": b"n"}
    reply = world.tell(0, "query.hello", offer=ConfigRecord(offer))
    assert reply.content["hello"]["accepted"] is False
    note = str(homes_of_four[0].last_note)
    assert "9.9" in note
    assert version("privet") in note
    assert [one.run for one, _ in homes_of_four[0].runs()] == [RUN]


def hello(world: World, number: int, config: Config, name: str = RUN) -> bool:
    """Whether the device takes part in what is offered."""
    mine = version("privet")
    offer = {"version": mine, "run": name, "config": to_toml(config), "nonce": b"n"}
    reply = world.tell(number, "query.hello", offer=ConfigRecord(offer))
    return bool(reply.content["hello"]["accepted"])


def test_an_offer_that_has_changed_waits_for_another_yes(
    world: World, llama_folder: Path, homes_of_four: list[DeviceStore]
):
    assert hello(world, 0, world.config)
    assert not hello(world, 0, config_of(llama_folder, rounds={"count": 3}))
    assert declined(keys(world, 0, plan_of(world.config)))
    agree(homes_of_four[0], world.config)
    assert not declined(keys(world, 0, plan_of(world.config)))


# --- a server that lies --------------------------------------------------------------------------


def keys(world: World, number: int, plan: Plan) -> Message:
    protocol = ConfigRecord({"message": b"", "client": number})
    return world.tell(number, "train.keys", plan=ConfigRecord(plan.to_dict()), protocol=protocol)


def declined(reply: Message) -> bool:
    """Exactly the one reply that every decline and every failure gives."""
    said = dict(reply.content["reply"])
    return (said["released"], said["vector"], len(said)) == (False, b"", 3)


def test_a_device_answers_one_round_of_one_run_once_whatever_the_server_forgets(
    world: World, tmp_path: Path, homes_of_four: list[DeviceStore]
):
    world.serve()
    before = [everything_sent(home) for home in homes_of_four]
    again = World(tmp_path / "again", world.config, world.seats)  # a server without a memory
    (again.folder / "attempts").write_text("50")
    with pytest.raises(RunUnfinished, match=r"^0 of 2 rounds .* 4 declined"):
        again.serve()
    shown = read_lines(again.folder / "rounds.jsonl")
    assert [(one["answered"], one["declined"]) for one in shown] == [(0, 4), (0, 4)]
    assert [everything_sent(home) for home in homes_of_four] == before
    assert [home.ledger.participations(ME) for home in homes_of_four] == [2] * 4


def test_a_phase_of_an_attempt_that_another_one_replaced_is_not_answered(world: World):
    first, second = (plan_of(world.config, attempt=attempt) for attempt in (1, 2))
    assert not declined(keys(world, 0, first))
    assert not declined(keys(world, 0, second))
    for phase in PHASES[1:]:
        protocol = ConfigRecord({"message": b"", "client": 0})
        plan = ConfigRecord(first.to_dict())
        assert declined(world.tell(0, f"train.{phase}", plan=plan, protocol=protocol))


LAXER: tuple[dict[str, Any], ...] = (
    {"clip": 100.0}, {"variance": 0.0}, {"survivors": 2}, {"local_steps": 10**9},
    {"learning_rate": 1e30}, {"rate": 1.0}, {"round": 10**6}, {"attempt": 10**6},
    {"noise_at": "server", "survivors": 0, "colluders": 0}, {"bits": 8}, {"run": "x" * 10**6},
    {"run": "never offered"}, {"cohort": 2, "survivors": 2}, {"batch_size": 1},
    {"variance": 1e300}, {"layout": "0" * 64, "clip": 3.0}, {"round": 2**62},
)  # fmt: skip


def test_a_plan_that_asks_for_more_than_the_owner_agreed_to_is_declined(
    world: World, homes_of_four: list[DeviceStore]
):
    for changes in LAXER:
        assert declined(keys(world, 0, plan_of(world.config, **changes))), changes
    assert homes_of_four[0].outbox() == []
    assert not declined(keys(world, 0, plan_of(world.config)))


def test_two_devices_whose_numbers_are_swapped_take_no_part(
    world: World, homes_of_four: list[DeviceStore]
):
    known = {n: homes_of_four[(1, 0, 2, 3)[n]].identity.public for n in range(PEOPLE)}
    write_directory(world.folder / "directory", Directory(known, closed=True))
    with pytest.raises(RunUnfinished, match="0 of 2 rounds of tiny are done"):
        world.serve()
    for home in homes_of_four:
        assert {one.phase for one in home.outbox()} == {"keys"}
        assert home.ledger.participations(ME) == 0


def test_an_adapter_that_does_not_fit_is_declined_whatever_its_hash(
    world: World, homes_of_four: list[DeviceStore]
):
    """The plan names the hash of what comes, so a hash alone proves nothing."""
    right = shared(world.config).start
    for start in (
        None, np.full(3, np.nan, np.float32), np.zeros(0, np.float32), right.astype(np.float64),
        right.reshape(2, -1), np.full(10**6, 1e30, np.float32), right.astype(np.int8), right[1:],
    ):  # fmt: skip
        assert declined(asked_for_one(world, 1, start))
    home = homes_of_four[0]
    assert home.outbox() == []
    for number, start in enumerate((np.full_like(right, np.nan), np.full_like(right, 3e38)), 1):
        assert not declined(asked_for_one(world, number, start))  # noise alone
    assert len(home.outbox()) == home.ledger.participations(ME) == 2


def asked_for_one(world: World, number: int, start: Any) -> Message:
    """A round without masks, in which the device adds all the noise."""
    plan = plan_of(world.config, number, start=digest_of(start), noise_at="device", survivors=0)
    plan = dataclasses.replace(plan, colluders=0, variance=plan.variance * 4)
    content: dict[str, Any] = {"plan": ConfigRecord(plan.to_dict())}
    content["protocol"] = ConfigRecord({"message": b"", "client": 0})
    if start is not None:
        content["adapter"] = ArrayRecord({"vector": Array(start)})
    return world.tell(0, "train.round", **content)


def digest_of(start: Any) -> str:
    return hashlib.sha256(b"" if start is None else start.tobytes()).hexdigest()


def end(world: World, adapter: Any, name: str = RUN) -> Mapping[str, Any]:
    content = {"offer": ConfigRecord({"run": name})}
    if adapter is not None:
        content["adapter"] = ArrayRecord({"vector": Array(adapter)})
    return dict(world.tell(0, "query.keep", **content).content["reply"])


def test_the_end_of_a_run_is_answered_in_one_way_and_keeps_a_usable_adapter_once(
    world: World, homes_of_four: list[DeviceStore]
):
    home, right = homes_of_four[0], shared(world.config).start
    answer = {"client": -1, "released": True, "vector": b""}
    home.vault.put("heads/another", b"head")
    nan = right.copy()
    nan[-1] = np.inf
    for wrong in (None, nan, right[:-1], right.astype(np.float64), right.reshape(1, -1)):
        assert end(world, wrong) == answer
        assert home.vault.names("adapters/") == []
    for stranger in ("another", "../x", "x" * 5000):
        assert end(world, right, stranger) == answer
    home.pause(True)
    assert end(world, right) == answer
    assert home.vault.names("adapters/") == []
    home.pause(False)
    assert end(world, right) == answer
    kept = {name: home.vault.version(name) for name in (f"adapters/{RUN}", f"heads/{RUN}")}
    assert None not in kept.values()
    assert end(world, right + 1) == answer  # it has taken part in nothing since
    assert {name: home.vault.version(name) for name in kept} == kept
    assert home.vault.get("heads/another") == b"head"


@pytest.mark.parametrize(
    "own",
    [
        b"",
        records(0, 1),
        b'{"user": "me", "text": "ba be", "label": "of no run", "time": "2020-01-01"}\n',
        b'{"user": "me", "text": "\\ud83d\\ude00\\ud83d\\ude00", "label": 3.5}\n' * 3,
    ],
)
@pytest.mark.parametrize("task", ["generation", "regression", "classification"])
def test_whatever_a_person_holds_or_lacks_the_device_answers_the_same_phases(
    tmp_path: Path, llama_folder: Path, homes_of_four: list[DeviceStore], own: bytes, task: str
):
    """A device that failed over its records would say something about them, for nothing."""
    classes = ["bad", "good"] if task == "classification" else []
    config = config_of(
        llama_folder, data={"task": task, "classes": classes}, rounds={"count": 1},
        statistics={"enabled": True, "gains": True},
    )  # fmt: skip
    world = World(tmp_path / "run", config, [EnrolledParticipant(home) for home in homes_of_four])
    for home in homes_of_four:
        agree(home, config)
    homes_of_four[0].vault.put("records/own", own)
    (shown,) = world.serve()
    assert (shown["answered"], shown["declined"], shown["refused"]) == (4, 0, 0)


def test_a_device_that_fails_answers_as_one_that_declines(
    world: World, homes_of_four: list[DeviceStore], monkeypatch: pytest.MonkeyPatch
):
    plan = plan_of(world.config)
    homes_of_four[1].pause(True)
    refused = keys(world, 1, plan)

    def fails(*_: Any) -> Any:
        raise MemoryError("the words of somebody")

    monkeypatch.setattr(EnrolledParticipant, "device", fails)
    failed = keys(world, 0, plan)
    assert declined(failed)
    assert declined(refused)
    assert not failed.has_error()
    assert "MemoryError" in world.said[0]
    assert "words" not in world.said[0]


def test_what_cannot_be_written_down_does_not_leave(
    world: World, homes_of_four: list[DeviceStore], monkeypatch: pytest.MonkeyPatch
):
    def full(*_: Any) -> None:
        raise StateError("the disk is full")

    monkeypatch.setattr(homes_of_four[0].vault, "put_all", full)
    assert declined(keys(world, 0, plan_of(world.config)))


def test_a_server_that_asks_for_ever_fills_no_disk(
    world: World, homes_of_four: list[DeviceStore], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ledgers, "MAX_DECLINED", 5)
    home = homes_of_four[0]
    for number in range(1, 20):
        assert declined(keys(world, 0, plan_of(world.config, run=f"run {number}")))
    assert len(home.ledger.declined(ME)) == 5
    most = 100 + 10 * world.config.rounds.count
    assert not declined(keys(world, 0, plan_of(world.config, attempt=most)))
    assert declined(keys(world, 0, plan_of(world.config, attempt=most + 1)))
    monkeypatch.setattr(homes, "MAX_RUNS", 3)
    for number in range(6):
        hello(world, 0, world.config, f"flood-{number}")
    assert len(home.vault.names("runs/")) == 3


def test_a_no_outlives_a_flood_of_offers_and_leaving(
    world: World, homes_of_four: list[DeviceStore], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(homes, "MAX_RUNS", 3)
    home = homes_of_four[0]
    joined, directory = home.joined, home.directory
    home.withdraw(home.run(RUN)[0])
    for number in range(6):
        hello(world, 0, world.config, f"flood-{number}")
    with pytest.raises(PrivacyError, match="no run"):
        home.run(RUN)
    allow(home, "ask = true", "ask = false")
    assert not hello(world, 0, world.config)
    home.leave()
    assert joined is not None
    home.join(joined, directory)
    assert not hello(world, 0, world.config)


def test_a_greeting_that_says_nothing_new_writes_nothing(
    world: World, homes_of_four: list[DeviceStore]
):
    home = homes_of_four[0]
    home.withdraw(home.run(RUN)[0])
    home.agree(home.run(RUN)[0], "owner")
    home.pause(True)
    assert not hello(world, 0, world.config)
    before = {name: home.vault.version(name) for name in home.vault.names()}
    assert not hello(world, 0, world.config)
    assert {name: home.vault.version(name) for name in home.vault.names()} == before


def test_a_worker_of_one_server_does_not_speak_for_the_next_one(
    tmp_path: Path, llama_folder: Path, homes_of_four: list[DeviceStore]
):
    config = config_of(llama_folder)
    home = homes_of_four[0]
    world = World(tmp_path / "run", config, [EnrolledParticipant(home, SERVER)])
    agree(home, config)
    directory = home.directory
    home.leave()
    home.join(Joined("other.example.org:9092", "PEM", closed=True), directory)
    assert not hello(world, 0, config)
    assert home.runs() == []  # it would have been shown as the other's
    assert "start it again" in str(home.last_note)
    agree(home, config)
    assert declined(keys(world, 0, plan_of(config)))


def test_pins_have_an_end(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(common_keys, "MAX_KNOWN", 3)
    known = Directory({n: bytes([n]) * 32 for n in range(3)}, closed=False)
    assert known.admit({1: b"\1" * 32}) is known
    with pytest.raises(ProtocolError, match="more than 3"):
        known.admit({3: b"\3" * 32})
