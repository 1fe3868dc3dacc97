"""server/replies.py over Flower's own grid, with a SuperLink that has only half a reply."""

import time
from inspect import signature
from typing import Any, cast

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid.http_grid import HttpGrid

from privet.experiments.grid import LocalGrid
from privet.server import replies as module
from privet.server.replies import AT_ONCE, PARTS, UNANSWERED, addressed, enough_s, replies


class HalfStored(HttpGrid):  # type: ignore[misc]
    """Everybody has answered, one after the other; the SuperLink has no content of `dead`."""

    def __init__(self, dead: set[int]) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 7, 1
        self.node = Node(node_id=1)
        self._run = cast(Any, type("Run", (), {"run_id": 7}))
        self._dead, self._replies, self._stored = dead, list[Any](), dict[str, bytes]()
        self.pushed: list[int] = []

    @property
    def _runtime_client(self) -> Any:
        return self

    def push_messages(self, messages: Any) -> list[str]:
        names = []
        self.pushed.append(len(messages))
        for message in messages:
            node = message.metadata.dst_node_id
            name = f"{node:064x}"
            message.metadata.__dict__["_message_id"] = name
            content = RecordDict({"said": ConfigRecord({"node": node})})
            reply = Message(content, reply_to=message)
            reply.metadata.__dict__["_message_id"] = reply.object_id
            with no_object_id_recompute():
                objects = get_all_nested_objects(reply)
                self._replies.append((message_to_proto(reply), get_object_tree(reply)))
            if node not in self._dead:
                self._stored |= {one: part.deflate() for one, part in objects.items()}
            names.append(name)
        return names

    def PullMessages(self, _: object) -> PullAppMessagesResponse:
        found, self._replies = self._replies[:1], self._replies[1:]
        return PullAppMessagesResponse(
            messages_list=[one for one, _ in found],
            message_object_trees=[tree for _, tree in found],
        )

    def PullObject(self, asked: Any) -> PullObjectResponse:
        content = self._stored.get(asked.object_id)
        return PullObjectResponse(
            object_found=True, object_available=content is not None, object_content=content or b""
        )

    def ConfirmMessageReceived(self, _: object) -> None:
        pass


class Asked(LocalGrid):
    """Nodes of which the first so many never answer; `most`: unanswered at one time."""

    def __init__(self, silent: int) -> None:
        super().__init__(lambda message, _: Message(RecordDict(), reply_to=message), 1000, "run")
        self._silent, self._open, self.most = silent, set[str](), 0

    def push_messages(self, messages: Any) -> list[str]:
        names = list(super().push_messages(messages))
        self._open |= set(names)
        self.most = max(self.most, len(self._open))
        return names

    def pull_messages(self, message_ids: Any) -> Any:
        known = [
            one for one in message_ids if self._pending[one].metadata.dst_node_id >= self._silent
        ]
        self._open -= set(known)
        return super().pull_messages(known)


@pytest.mark.parametrize("dead", [set(), {1}, {0, 2}])
def test_a_device_that_dies_while_it_answers_holds_the_others_up_no_longer_than_a_silent_one(dead):
    grid = HalfStored(dead)
    outgoing = [addressed({}, node, "query.hello", 60.0) for node in range(3)]
    began = time.monotonic()
    heard = [int(cast(Any, one.content["said"])["node"]) for one in replies(grid, outgoing, 0.5)]
    assert time.monotonic() - began < 120.0  # Flower's own waits for 500 questions
    assert heard == sorted({0, 1, 2} - dead)


@pytest.mark.parametrize("silent", [0, 2 * AT_ONCE + 1])
def test_a_few_devices_are_asked_at_a_time_and_in_the_end_all(silent, monkeypatch):
    monkeypatch.setattr(module, "PACE_S", 0.3)
    grid = Asked(silent)
    outgoing = [addressed({}, node, "query.hello", 60.0) for node in range(6 * AT_ONCE + 1)]
    began = time.monotonic()
    heard = list(replies(grid, outgoing, 4.0))
    assert len(heard) == len(outgoing) - silent
    assert grid.most <= UNANSWERED + AT_ONCE if silent == 0 else time.monotonic() - began >= 4.0


def test_those_who_take_long_hold_nobody_up_for_more_than_the_pace(monkeypatch):
    monkeypatch.setattr(module, "PACE_S", 0.3)
    everybody = 6 * AT_ONCE
    grid = Asked(everybody)
    outgoing = [addressed({}, node, "query.hello", 60.0) for node in range(everybody)]
    assert list(replies(grid, outgoing, 4.0)) == []
    assert grid.most == everybody


@pytest.mark.parametrize("count", [1, AT_ONCE, 6 * AT_ONCE])
def test_in_time_enough_everybody_is_asked_though_nobody_answers(count, monkeypatch):
    monkeypatch.setattr(module, "PACE_S", 0.3)
    grid = Asked(count)
    outgoing = [addressed({}, node, "query.hello", 60.0) for node in range(count)]
    assert list(replies(grid, outgoing, enough_s(count, 0.3))) == []
    assert grid.most == count


def test_flower_still_pulls_replies_where_the_server_makes_it_ask_sooner():
    """A new minor version that waits elsewhere would silently be slow again."""
    known = set(signature(module._pull_objects).parameters)
    assert {*PARTS, "max_time", "max_tries_per_object"} < known
