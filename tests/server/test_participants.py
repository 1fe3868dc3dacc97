"""server/participants.py: who is there, and that nobody passes for somebody else."""

import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from typing import Any

import pytest

from privet.common.errors import ProtocolError, StateError
from privet.common.secure_aggregation.keys import Directory, Identity, greeting
from privet.common.settings.config import Config, parse
from privet.server.participants import Participants

RUN = "run-1"
DEVICES = [Identity.of(bytes([number]) * 32) for number in range(1, 5)]
DIRECTORY = Directory({number: one.public for number, one in enumerate(DEVICES)}, closed=True)


def settings(source: str = "devices", **rounds: Any) -> Config:
    return parse(
        {
            "data": {"source": source, "clients": 4},
            "rounds": {"cohort": 4, "timeout_s": 0.3, "gather_s": 0.0} | rounds,
            "secure_aggregation": {"min_cohort": 3},
        }
    )


def signed(one: Identity, nonce: bytes, node: int) -> dict[str, Any]:
    signature = one.sign(greeting(RUN, nonce, node))
    said = {"identity": one.public, "signature": signature, "accepted": True}
    return {"version": version("privet"), **said}


class Fleet:
    """Nodes 10, 11, …; `answer` says what each replies to a nonce."""

    def __init__(self, count: int = 4) -> None:
        self.nodes = list(range(10, 10 + count))
        self.greeted: list[int] = []
        self.changed: dict[int, Any] = {}

    def hello(self, nodes: Iterable[int], nonce: bytes) -> Iterator[tuple[int, Mapping[str, Any]]]:
        for node in nodes:
            self.greeted.append(node)
            reply = signed(DEVICES[(node - 10) % 4], nonce, node)
            yield node, self.changed.get(node, lambda reply, _: reply)(reply, nonce)


def crowd(fleet: Fleet, config: Config | None = None) -> Participants:
    return Participants(lambda: fleet.nodes, fleet.hello, DIRECTORY, config or settings(), RUN)


def test_devices_that_sign_for_their_identity_are_there_and_greeted_once():
    fleet = Fleet()
    here = crowd(fleet)
    assert here.present() == [0, 1, 2, 3]
    assert here.present() == [0, 1, 2, 3]
    assert here.accepted == {0: 10, 1: 11, 2: 12, 3: 13}
    assert fleet.greeted == [10, 11, 12, 13]


@pytest.mark.parametrize(
    "changed",
    [
        lambda reply, _: {**reply, "identity": DEVICES[0].public},
        lambda _, nonce: signed(DEVICES[0], nonce, 10),
        lambda *_: signed(DEVICES[0], bytes(32), 13),
        lambda reply, _: {**reply, "signature": b""},
        lambda reply, _: {**reply, "signature": "text"},
        lambda _, nonce: signed(Identity.of(bytes(32)), nonce, 13),
        lambda reply, _: {**reply, "accepted": 1},
        lambda *_: {},
    ],
    ids=["named", "handed on", "replayed", "unsigned", "mistyped", "stranger", "maybe", "silent"],
)
def test_a_node_cannot_pass_for_another_device(changed):
    fleet = Fleet()
    fleet.changed[13] = changed
    here = crowd(fleet, settings(quorum=0.5))
    least = dataclasses.replace(here, _begun=True)
    assert least.present() == [0, 1, 2]
    assert least.accepted == {0: 10, 1: 11, 2: 12}


def test_another_version_is_left_out_and_ends_a_simulation():
    def older(reply: dict[str, Any], _: bytes) -> dict[str, Any]:
        return {**reply, "version": "0.0.1"}

    fleet = Fleet()
    fleet.changed[13] = older
    assert dataclasses.replace(crowd(fleet), _begun=True).present() == [0, 1, 2]
    with pytest.raises(ProtocolError, match=r"node 13 runs privet 0\.0\.1, this server"):
        crowd(fleet, settings("shakespeare")).present()


def test_the_first_round_waits_for_a_whole_cohort_and_the_next_ones_do_not():
    fleet = Fleet(3)
    here = crowd(fleet, settings(gather_s=0.5, timeout_s=0.1))
    began = time.monotonic()
    assert here.present() == [0, 1, 2]
    assert time.monotonic() - began > 0.5
    here.config = settings(gather_s=3600.0)
    began = time.monotonic()
    assert here.present() == [0, 1, 2]
    assert time.monotonic() - began < 600


def test_a_cohort_that_is_whole_is_not_waited_for():
    began = time.monotonic()
    assert crowd(Fleet(), settings(gather_s=3600.0)).present() == [0, 1, 2, 3]
    assert time.monotonic() - began < 600


def test_too_few_devices_end_in_a_sentence():
    with pytest.raises(StateError, match=r"needs 3 devices that are online .* and 2 of 4 enrolled"):
        crowd(Fleet(2)).present()


def test_a_device_that_went_offline_is_not_asked_and_one_that_came_back_is():
    fleet = Fleet()
    here = crowd(fleet)
    here.present()
    fleet.nodes = [10, 11, 12]
    assert here.present() == [0, 1, 2]
    fleet.nodes = [10, 11, 12, 17]  # the same device at another node
    assert here.present() == [0, 1, 2, 3]
    assert here.accepted[3] == 17


def test_an_answer_that_comes_late_counts():
    """A device that loads its model for longer than one greeting waits is not asked in vain."""
    fleet, late = Fleet(), list[tuple[int, bytes]]()

    def slow(nodes: Iterable[int], nonce: bytes) -> Iterator[tuple[int, Mapping[str, Any]]]:
        earlier = late[:]
        late[:] = [(node, nonce) for node in nodes]
        for node, before in earlier:
            yield node, signed(DEVICES[node - 10], before, node)

    here = Participants(lambda: fleet.nodes, slow, DIRECTORY, settings(timeout_s=10.0), RUN)
    assert here.present() == [0, 1, 2, 3]


def test_a_device_that_does_not_answer_is_not_flooded_with_greetings():
    asked = list[int]()

    def deaf(nodes: Iterable[int], _: bytes) -> Iterator[tuple[int, Mapping[str, Any]]]:
        asked.extend(nodes)
        return iter(())

    here = Participants(lambda: [10, 11], deaf, DIRECTORY, settings(), RUN)
    with pytest.raises(StateError):
        here.present()
    assert asked == [10, 11]
