"""experiments/grid.py: Flower's grid without Flower's start-up."""

import functools
from collections.abc import Collection
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from privet.common.errors import ProtocolError
from privet.experiments import engine
from privet.experiments.grid import LocalGrid
from privet.server.replies import replies


def echo(message: Message, context: Context) -> Message:
    """Says who it is and how often it was asked."""
    count = int(context.state.get("count", ConfigRecord({"n": 0}))["n"]) + 1
    context.state["count"] = ConfigRecord({"n": count})
    said = {"me": context.node_config["partition-id"], "of": context.node_config["num-partitions"]}
    said |= {"run": str(context.run_config["run"]), "count": count}
    return Message(RecordDict({"said": ConfigRecord(said)}), reply_to=message)


def messages(grid: LocalGrid, nodes: list[int] | None = None) -> list[Message]:
    ids = list(grid.get_node_ids())
    chosen = ids if nodes is None else [ids[node] for node in nodes]
    return [Message(RecordDict(), node, "query.hello") for node in chosen]


def said(reply: Message) -> dict[str, Any]:
    return dict(reply.content["said"])


@pytest.mark.parametrize("clients", [1, 10, 1000])
def test_every_node_answers_once_in_the_order_it_was_asked(clients):
    grid = LocalGrid(echo, clients, "/a/run")
    replies = [said(reply) for reply in grid.send_and_receive(messages(grid))]
    expected = {"of": clients, "run": "/a/run", "count": 1}
    assert replies == [{"me": number, **expected} for number in range(clients)]


def test_a_node_keeps_its_state_and_nobody_elses():
    grid = LocalGrid(echo, 3, "run")
    list(grid.send_and_receive(messages(grid, [0, 2])))
    replies = [said(reply) for reply in grid.send_and_receive(messages(grid))]
    assert [reply["count"] for reply in replies] == [2, 1, 2]


def test_a_message_is_handled_when_its_reply_is_pulled_so_one_is_held_at_a_time():
    handled: list[str] = []

    def heard(message: Message, context: Context) -> Message:
        handled.append(message.metadata.message_type)
        return echo(message, context)

    grid = LocalGrid(heard, 5, "run")
    pulled = grid.pull_messages(grid.push_messages(messages(grid)))
    assert handled == []
    next(pulled)
    next(pulled)
    assert handled == ["query.hello"] * 2
    assert len(list(pulled)) == 3


def mortal(dead: Collection[int], side: engine.Loss, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`echo` on devices of which some die."""
    monkeypatch.setattr(
        engine, "_lost", lambda _, __, client, *_rest: side if client in dead else None
    )
    config: Any = None
    return functools.partial(engine.mortal, config, echo)


@pytest.mark.parametrize(("side", "heard"), [("before", 1), ("after", 2)])
def test_a_lost_node_gives_an_error_before_or_after_it_has_heard_the_message(
    side, heard, monkeypatch
):
    dead = {1}
    grid = LocalGrid(mortal(dead, side, monkeypatch), 3, "run")
    replies = list(grid.send_and_receive(messages(grid)))
    assert [reply.has_error() for reply in replies] == [False, True, False]
    assert replies[1].metadata.src_node_id == list(grid.get_node_ids())[1]
    dead.clear()
    assert [said(reply)["count"] for reply in grid.send_and_receive(messages(grid))] == [
        2,
        heard,
        2,
    ]


def test_the_server_says_once_how_many_nodes_failed_and_the_first_reason(caplog, monkeypatch):
    grid = LocalGrid(mortal((1, 3, 4), "before", monkeypatch), 5, "run")
    heard = [said(reply)["me"] for reply in replies(grid, messages(grid), 10.0)]
    assert heard == [0, 2]
    (line,) = caplog.messages
    assert line == "3 nodes failed and are left out; the first: lost, by simulation.dropout"


def test_a_reply_is_pulled_once_and_unknown_ids_bring_none():
    grid = LocalGrid(echo, 2, "run")
    ids = list(grid.push_messages(messages(grid)))
    assert len(list(grid.pull_messages([ids[1], "77"]))) == 1
    assert len(list(grid.pull_messages(ids))) == 1
    assert list(grid.pull_messages(ids)) == []


def test_a_reply_names_its_node_and_its_question():
    grid = LocalGrid(echo, 2, "run")
    (name, _) = grid.push_messages(messages(grid))
    (reply,) = grid.pull_messages([name])
    assert reply.metadata.reply_to_message_id == name
    assert reply.metadata.src_node_id == next(iter(grid.get_node_ids()))


@pytest.mark.parametrize("error", [ProtocolError("broken"), ZeroDivisionError()])
def test_what_a_client_raises_the_run_raises(error):
    def broken(_: Message, __: Context) -> Message:
        raise error

    grid = LocalGrid(broken, 1, "run")

    with pytest.raises(type(error)):
        list(grid.send_and_receive(messages(grid)))
