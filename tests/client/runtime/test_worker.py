"""client/runtime/worker.py: against Flower's own node state, and against real Flower processes."""

import errno
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privet.client.commands import printing
from privet.client.runtime import worker
from privet.client.runtime.processes import free_port
from privet.client.runtime.worker import pause_s, refuse_other_flower, work
from privet.common import child_processes
from privet.common.errors import FAILED, ConfigError
from privet.experiments.benchmarks import harness
from privet.experiments.benchmarks import worker_start as loopback

PRIVATE = "dear diary"


def test_importing_the_worker_loads_neither_flower_nor_torch():
    code = "import sys, privet.client.runtime.worker; print({'flwr', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_another_minor_version_of_flower_is_refused_and_both_are_named():
    refuse_other_flower()
    refuse_other_flower("1.41.7")
    for other in ("1.42.0", "1.4.1", "2.41.0", "1"):
        with pytest.raises(ConfigError, match=rf"1\.41 and flwr {other}"):
            refuse_other_flower(other)


def test_the_runtime_api_is_asked_without_tls_on_this_machine_only():
    with pytest.raises(ConfigError, match=r"10\.0\.0\.9:9094"):
        work("10.0.0.9:9094", print, stop=threading.Event())


@given(st.floats(0, 1e6), st.floats(0, 1e6))
def test_the_longer_it_is_quiet_the_rarer_the_questions(one: float, other: float) -> None:
    sooner, later = sorted((one, other))
    assert 0.05 <= pause_s(sooner) <= pause_s(later) <= 1.0
    assert pause_s(240) <= 0.2


class Node:
    """Flower's own SuperNode state and runtime API, without a SuperLink behind them."""

    def __init__(self, secret: bytes | None = None) -> None:
        from flwr.app import Context, RecordDict
        from flwr.supercore.fab import Fab
        from flwr.supercore.object_store import ObjectStoreFactory
        from flwr.supercore.run import Run
        from flwr.supercore.task_identity import TaskIdentity
        from flwr.supernode.nodestate import NodeStateFactory

        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 7
        self.factory = NodeStateFactory(objectstore_factory=ObjectStoreFactory())
        self.state = self.factory.state()
        self.state.set_node_id(7)
        run = Run.create_empty(1)
        run.fab_hash = self.state.store_fab(Fab("", b"never a bundle", {}))
        self.state.store_run(run)
        self.state.set_run_series_context(0, Context(1, 7, {}, RecordDict(), {}))
        self.fab, self.secret, self.port = run.fab_hash, secret, free_port()
        self.address = f"127.0.0.1:{self.port}"

    @contextmanager
    def up(self) -> Iterator[None]:
        """Its runtime API is served."""
        import uvicorn
        from flwr.supernode.main import create_app

        app = create_app(self.factory, self.secret)
        server = uvicorn.Server(
            uvicorn.Config(app, port=self.port, log_level="critical", ws="none")
        )
        thread = threading.Thread(target=server.run)
        thread.start()
        harness.wait_for(lambda: server.started, 300, "the runtime API")
        try:
            yield
        finally:
            server.should_exit = True
            thread.join()

    def task(self) -> int:
        from flwr.supercore.constant import TaskType

        return int(self.state.create_task(TaskType.CLIENT_APP, 1, self.fab) or 0)

    def message(self, number: int = 0) -> None:
        from flwr.app import ConfigRecord, Message, RecordDict
        from flwr.supernode.start_client_internal import _insert_message

        content = RecordDict({"given": ConfigRecord({"number": number})})
        _insert_message(Message(content, 7, "train"), self.state, self.state.object_store)

    def give(self, number: int = 0) -> int:
        """As the SuperNode's own loop does: the task first."""
        task = self.task()
        self.message(number)
        return task

    def replies(self) -> list[Any]:
        return list(self.state.get_messages_legacy(is_reply=True))

    def reply(self, timeout_s: float = 300) -> Any:
        found: list[Any] = []

        def come() -> bool:
            found.extend(self.replies())
            return bool(found)

        harness.wait_for(come, timeout_s, "a reply")
        return found[0]

    def contains(self, reply: Any) -> dict[str, Any]:
        """The content of a reply, read from the node's object store."""
        from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
        from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

        store, name = self.state.object_store, reply.metadata.message_id
        ids = [one.object_id for one in iterate_object_tree(store.get_object_tree(name))]
        harness.wait_for(lambda: all(store.get(one) for one in ids), 300, "the reply's content")
        whole = inflate_object_from_contents(name, {one: store.get(one) for one in ids})
        return dict(whole.content["reply"])

    def status(self, task: int) -> Any:
        return self.state.get_tasks(task_ids=[task])[0].status

    def ended(self, task: int) -> None:
        harness.wait_for(lambda: self.status(task).sub_status, 300, "the task's end")

    def expire(self) -> None:
        """A minute without a sign of life from whoever holds a task."""
        for record in self.state.task_token_store.values():
            record.active_until -= timedelta(seconds=61)

    def client(self) -> Any:
        """The connection of a second worker, by hand."""
        return worker._connect(self.address, self.secret)


@contextmanager
def working(node: Node, handle: Callable[..., Any], **options: Any) -> Iterator[list[str]]:
    """A worker in a thread; gives the lines it prints."""
    stop, lines = threading.Event(), list[str]()
    options = {"secret": node.secret, "say": lines.append} | options
    thread = threading.Thread(
        target=work, args=(node.address, handle), kwargs={"stop": stop} | options
    )
    thread.start()
    try:
        yield lines
    finally:
        stop.set()
        thread.join(10)
        assert not thread.is_alive()


def answer(message: Any, _: Any) -> Any:
    from flwr.app import ConfigRecord, Message, RecordDict

    number = dict(message.content["given"])["number"]
    return Message(RecordDict({"reply": ConfigRecord({"number": number})}), reply_to=message)


def test_messages_are_answered_and_their_tasks_end():
    node = Node(secret=b"s" * 32)
    with node.up(), working(node, answer):
        for number in range(3):
            task = node.give(number)
            assert node.contains(node.reply()) == {"number": number}
            node.ended(task)
            assert node.status(task).sub_status == "completed"


def test_an_error_of_the_handler_becomes_one_fixed_sentence_and_quotes_nothing():
    def broken(*_: Any) -> Any:
        try:
            raise KeyError(PRIVATE)
        except KeyError as error:
            raise ValueError(f"no record {PRIVATE}") from error

    node = Node()
    with node.up(), working(node, broken) as lines:
        task = node.give()
        reply = node.reply()
        node.ended(task)
    assert (reply.has_error(), reply.error.reason) == (True, FAILED)
    assert node.status(task).details == FAILED
    assert PRIVATE not in "".join(lines)
    assert "KeyError at test_worker.py:" in lines[0]


def test_what_is_no_message_is_answered_with_the_same_error():
    node = Node()
    with node.up(), working(node, lambda *_: {"text": PRIVATE}):
        node.give()
        assert node.reply().error.reason == FAILED


def test_state_taken_out_of_the_context_stays_out_after_an_error():
    from flwr.app import ConfigRecord

    def takes(_: Any, context: Any) -> Any:
        context.state.pop("masking")
        raise RuntimeError

    node = Node()
    node.state.get_run_series_context(0).state["masking"] = ConfigRecord({"seed": b"secret"})
    with node.up(), working(node, takes):
        task = node.give()
        node.ended(task)
    assert "masking" not in node.state.get_run_series_context(0).state


def test_a_task_seen_before_its_message_is_stored_is_not_lost():
    from flwr.supernode.runtime.run_clientapp import pull_task_input

    node = Node()
    with node.up():
        node.task()
        with working(node, answer):
            time.sleep(0.3)
            node.message(4)
            assert node.contains(node.reply()) == {"number": 4}
        node.task()
        stock = node.client()
        stock.badge.token = _acquire(stock).token
        with pytest.raises(RuntimeError, match="No messages"):  # Flower's own fails here
            pull_task_input(stock.client)


def _acquire(node: Any) -> Any:
    from flwr.proto.runtime_pb2 import AcquireTaskRequest

    return node.client.AcquireTask(AcquireTaskRequest(supported_task_types=["flwr-clientapp"]))


@pytest.mark.parametrize("order", ["ours", "stock"])
def test_a_worker_killed_while_it_takes_a_task_does_not_silence_the_node(order, monkeypatch):
    from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullTaskInputRequest

    monkeypatch.setattr(worker, "LISTED_S", 0.2)
    node = Node()
    with node.up():
        node.give()
        killed = node.client()
        killed.badge.token = _acquire(killed).token
        if order == "ours":
            killed.client.PullMessages(PullAppMessagesRequest())
        else:
            killed.client.PullTaskInput(PullTaskInputRequest())
        node.expire()
        with working(node, answer) as lines:
            node.replies()  # the SuperNode looks for replies, and clears up while it does
            if order == "ours":
                harness.wait_for(lambda: lines, 300, "the next worker to give the task up")
            node.expire()
            if order == "ours":
                found = [node.reply()]
            else:  # the contrast: none comes
                time.sleep(0.2)
                found = node.replies()
    # The stock order leaves a SuperNode that waits for this reply for ever.
    assert len(found) == (1 if order == "ours" else 0)


def test_a_reply_that_came_too_late_leaves_no_open_task_behind(monkeypatch):
    """An open one ends in 60 s, and answers for the messages that are in hand then."""
    node = Node()

    def not_wanted(*_: Any) -> bool:  # the server asks for no object: the node forgets the reply
        names = [one.metadata.message_id for one in node.replies()]
        node.state.delete_messages(message_ids=names)
        return False

    monkeypatch.setattr(node.state, "store_object", not_wanted)
    with node.up(), working(node, answer) as lines:
        late = node.give(1)
        node.ended(late)
        told(lines, 1)
    assert "came too late" in lines[0]
    monkeypatch.undo()
    node.expire()
    assert not node.replies()


def test_a_task_in_hand_is_kept_alive(monkeypatch):
    monkeypatch.setattr(worker, "BEAT_S", 0.05)
    seen: list[bool] = []

    def slow(message: Any, context: Any) -> Any:
        (record,) = node.state.task_token_store.values()
        before = record.active_until
        harness.wait_for(lambda: record.active_until > before, 300, "a heartbeat")
        seen.append(True)
        return answer(message, context)

    node = Node()
    with node.up(), working(node, slow):
        node.give(9)
        assert node.contains(node.reply()) == {"number": 9}
    assert seen == [True]


def test_without_the_secret_no_task_is_handed_out():
    node = Node(secret=b"s" * 32)
    with node.up(), working(node, answer, secret=b"t" * 32) as lines:
        task = node.give()
        harness.wait_for(lambda: lines, 300, "the refusal")
        assert "status 401: the worker's secret is not the SuperNode's" in lines[0]
        assert node.status(task).status == "pending"


def test_a_proxy_in_the_environment_is_not_asked(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    node = Node()
    with node.up(), working(node, answer):
        node.give(2)
        assert node.contains(node.reply()) == {"number": 2}


def told(lines: list[str], number: int) -> None:
    harness.wait_for(lambda: len(lines) >= number, 300, f"line {number}")


def test_a_node_that_goes_away_is_waited_for():
    node = Node()
    with working(node, answer) as lines:
        told(lines, 1)
        for number in (1, 2):
            with node.up():
                node.give(number)
                assert node.contains(node.reply()) == {"number": number}
            told(lines, 2 * number + 1)
    assert [line.split("(")[0] for line in lines[:4]] == [
        "the SuperNode does not answer ", "the SuperNode answers again"
    ] * 2  # fmt: skip


def test_the_caller_is_told_once_when_it_is_quiet_for_long():
    rests: list[float] = []
    node = Node()
    with node.up(), working(node, answer, idle_s=0.2, on_idle=lambda: rests.append(1)):
        harness.wait_for(lambda: rests, 300, "the first quiet time")
        time.sleep(0.5)
        assert len(rests) == 1
        node.give()
        node.reply()
        harness.wait_for(lambda: len(rests) == 2, 300, "the second quiet time")


def test_stop_lets_the_message_in_hand_be_answered():
    begun, go = threading.Event(), threading.Event()

    def slow(message: Any, context: Any) -> Any:
        begun.set()
        go.wait(5)
        return answer(message, context)

    node = Node()
    with node.up():
        with ExitStack() as stack:
            stack.enter_context(working(node, slow))
            node.give(3)
            begun.wait(5)
            threading.Timer(0.2, go.set).start()
        assert node.contains(node.reply()) == {"number": 3}


SENT = """import json, os, pathlib
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

folder = pathlib.Path(json.loads(os.environ["PRIVET_LOOPBACK"])["replies"]).parent
(folder / f"imported-{os.getpid()}").touch()
app = ClientApp()


@app.train()
def train(message, context):
    (folder / f"executed-{context.node_id}").touch()
    reply = {"by": "sent code", "pid": os.getpid(), "count": 1, "entered": 0.0}
    return Message(RecordDict({"reply": ConfigRecord(reply)}), reply_to=message)
"""
WORKER = """
import os, sys, time
from privet.common.child_processes import stop_on_signals
from privet.client.runtime.worker import work

count = 0

def handle(message, context):
    from flwr.app import ConfigRecord, Message, RecordDict
    global count
    entered, count = time.time(), count + 1
    context.state["count"] = ConfigRecord({"n": 1 + context.state.get("count", {"n": 0})["n"]})
    reply = {"by": "installed code", "pid": os.getpid(), "count": count, "entered": entered}
    reply |= {"kept": context.state["count"]["n"], "torch": "torch" in sys.modules}
    return Message(RecordDict({"reply": ConfigRecord(reply)}), reply_to=message)

work(sys.argv[1], handle, stop=stop_on_signals())
"""
MESSAGES = 4


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run over two real SuperNodes, a stock one and one with privet's worker."""
    folder = tmp_path_factory.mktemp("deployment")
    ports = {"subprocess": free_port(), "process": free_port()}
    with ExitStack() as stack:
        address, env = stack.enter_context(loopback.superlink(folder, 2, MESSAGES))
        nodes = {
            name: stack.enter_context(
                harness.program(loopback.stock_node(address, port, name), env)
            )
            for name, port in ports.items()
        }
        command = [sys.executable, "-c", WORKER, f"127.0.0.1:{ports['process']}"]
        process = stack.enter_context(harness.program(command, env))
        for node in nodes.values():
            node.wait_for("SuperNode ID", 300)
        time.sleep(0.5)
        pids = (nodes["process"].process.pid, process.process.pid)
        memory = [harness.process_memory_mb(pid) for pid in pids]
        loopback.start_run(loopback.flower_project(folder / "project", client=SENT), env)
        replies = folder / "replies"
        harness.wait_for(
            lambda: replies.exists() and len(replies.read_text().splitlines()) == 2 * MESSAGES,
            600,
            "the replies",
        )
        process.process.terminate()
        status = process.process.wait(5)
    rows = [json.loads(line) for line in replies.read_text().splitlines()]
    return {
        "folder": folder,
        "worker": [row for row in rows if row.get("by") == "installed code"],
        "stock": [row for row in rows if row.get("by") == "sent code"],
        "available": nodes["process"].times("Received successfully"),
        "memory": memory,
        "pid": pids[1],
        "status": status,
        "lines": process.lines,
    }


def test_the_code_a_server_sends_runs_on_the_stock_node_and_never_in_the_worker(deployment):
    stock = {row["node"] for row in deployment["stock"]}
    executed = {int(path.name.split("-")[1]) for path in deployment["folder"].glob("executed-*")}
    imported = {int(path.name.split("-")[1]) for path in deployment["folder"].glob("imported-*")}
    assert executed == stock  # the trap is real: the same bundle ran there
    assert len(deployment["worker"]) == len(deployment["stock"]) == MESSAGES
    assert deployment["pid"] not in imported
    assert len(imported) == MESSAGES  # a new process of the stock node's for every message


def test_one_process_and_its_state_serve_all_messages(deployment):
    rows = deployment["worker"]
    assert [row["count"] for row in rows] == [row["kept"] for row in rows] == [1, 2, 3, 4]
    assert {row["pid"] for row in rows} == {deployment["pid"]}
    assert len({row["pid"] for row in deployment["stock"]}) == MESSAGES
    assert deployment["status"] == 0
    assert not any(row["torch"] for row in rows)


def test_a_message_is_begun_a_fifth_of_a_second_after_it_is_there(deployment):
    pairs = zip(deployment["worker"], deployment["available"], strict=True)
    delays = [row["entered"] - when for row, when in pairs]
    assert statistics.median(delays) < 0.2, delays


def test_an_idle_node_and_worker_take_less_than_350_megabytes(deployment):
    assert sum(size["rss"] for size in deployment["memory"]) < 350, deployment["memory"]


def test_a_log_on_a_full_disk_stops_neither_worker_nor_supervisor(monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("builtins.print", full)
    worker._say("a line")
    child_processes.print_line("a line")
    printing.line("a line")


def test_an_error_of_a_full_disk_is_told_as_one_and_no_other_text_is():
    def told(error: OSError) -> str:
        try:
            raise error
        except OSError as raised:
            return worker.where(raised)

    assert told(OSError(errno.ENOSPC, "my diary")).endswith("; the disk is full")
    assert "diary" not in told(OSError(errno.EIO, "my diary"))
    assert "full" not in told(OSError(errno.EIO, "my diary"))
