"""The long-lived worker of a device, which answers a SuperNode's messages with installed code only.

A stock node starts a process for every message, which imports torch and loads the model again,
and runs code the server sent. This loop asks `flower-supernode --isolation process` for its tasks
instead, and calls one callable of this installation in this process: state and model stay.

    acquire a task -> pull its message -> handle -> push the reply -> push the context

The server's bundle comes with a task's input. It is not stored, unpacked, imported or run.

Everything private to Flower 1.41 that privet's worker needs is imported in this file, inside
functions; importing the file loads neither flwr nor torch.
"""

import ctypes
import errno
import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from ...common.errors import FAILED, ConfigError

if TYPE_CHECKING:
    import httpx
    from flwr.app import Context, Message
    from flwr.proto.runtime_pb2 import PullAppMessagesResponse
    from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
    from flwr.supercore.runtime import RuntimeHttpClient

__all__ = [
    "FLOWER",
    "pause_s",
    "refuse_other_flower",
    "release_memory",
    "where",
    "work",
]

FLOWER = "1.41"

Handle = Callable[["Message", "Context"], "Message"]
Say = Callable[[str], None]

QUICKEST_S, SLOWEST_S = 0.05, 1.0
LISTED_S = 2.0  # how long a task may be without its message: Flower makes the task first
BEAT_S = 10.0  # Flower forgets a task after 30 s without a sign of life, then after 60 s
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
TIMEOUT_S = 30.0


def _say(line: str) -> None:
    with suppress(OSError):  # a log on a full disk stops nobody
        print(f"worker: {line}", flush=True)


def work(
    address: str,
    handle: Handle,
    *,
    stop: threading.Event,
    secret: bytes | None = None,
    idle_s: float = 600.0,
    on_idle: Callable[[], None] = lambda: None,
    say: Say = _say,
) -> None:
    """Answer the SuperNode's messages, one at a time, until `stop` is set.

    Args:
        address: `host:port` of the SuperNode's runtime API, on this machine.
        handle: called with Flower's Message and Context, returns the reply: the installed
            ClientApp, or any callable. Runs in the calling thread.
        stop: the message in hand is finished and answered, then the function returns.
        secret: what the SuperNode was given as `--superexec-auth-secret-file`. Without it any
            process on this machine may take the device's tasks and answer in its name.
        idle_s, on_idle: called once when no task has come for so many seconds; the caller lets
            its model go there, then freed memory goes back to the system.
        say: gets one line per event, without private data.

    A SuperNode that is away (not yet started, restarting) is waited for, without an end. An error
    in `handle` becomes Flower's error reply with one fixed sentence; the log gets the type of the
    error and where it was raised, since its text may quote records. The context is handed back
    then too: what a handler took out of it stays out, so that no phase is played twice with the
    same state.

    Raises:
        ConfigError: another Flower than 1.41 is installed, or the address is not of this machine.

    **Guarantee**: no byte of the bundle the server sent is written, imported or executed here.
    """
    refuse_other_flower()
    node = _connect(address, secret)
    last, rested, away = time.monotonic(), False, 0
    try:
        while not stop.is_set():
            served, away = _next(node, handle, stop, away, say)
            quiet = time.monotonic() - last
            if served:
                last, rested = time.monotonic(), False
            elif not rested and quiet >= idle_s:
                rested = True
                on_idle()
                release_memory()
            if not served:
                stop.wait(min(SLOWEST_S, QUICKEST_S * 2**away) if away else pause_s(quiet))
    finally:
        node.client.close()


def pause_s(quiet_s: float) -> float:
    """Return the seconds until the next question, after `quiet_s` seconds without a task.

    50 ms in a run's first quiet minute, 0.2 s after four, 1 s from twenty minutes on.
    """
    return min(SLOWEST_S, max(QUICKEST_S, quiet_s / 1200))


def refuse_other_flower(installed: str | None = None) -> None:
    """Refuse an installed Flower that is not the one this file was written for.

    Args:
        installed: a version to judge; by default that of the installed package.

    Raises:
        ConfigError: major or minor version differ.
    """
    if installed is None:
        installed = version("flwr")
    if installed.split(".")[:2] != FLOWER.split("."):
        raise ConfigError(
            f"privet's worker was written for flwr {FLOWER} and flwr {installed} is installed: "
            f'install privet in a fresh environment, or pip install "flwr=={FLOWER}.*".'
        )


def release_memory() -> None:
    """Hand freed memory back to the system.

    Without glibc it is only Python's own collection.
    """
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@dataclass
class _Badge:
    """Puts the token of the task in hand on every request.

    So one connection serves all tasks.
    """

    header: str
    token: str = ""

    def intercept(
        self, context: "ProtobufRequestContext", call_next: "ProtobufCall"
    ) -> "httpx.Response":
        if self.token:
            context.request.headers[self.header] = self.token
        response: httpx.Response = call_next(context)
        return response


@dataclass(frozen=True)
class _Node:
    client: "RuntimeHttpClient"
    badge: _Badge


def _connect(address: str, secret: bytes | None) -> _Node:
    import httpx
    from flwr.supercore.constant import TASK_TOKEN_HEADER
    from flwr.supercore.interceptors import (
        RuntimeVersionHttpInterceptor,
        SuperExecAuthHttpInterceptor,
    )
    from flwr.supercore.runtime import RuntimeHttpClient

    host = address.rpartition(":")[0].strip("[]")
    if host not in ("127.0.0.1", "::1", "localhost"):
        raise ConfigError(
            f"the SuperNode's runtime address must be on this machine, got {address!r}: "
            "use 127.0.0.1."
        )
    badge = _Badge(TASK_TOKEN_HEADER)
    interceptors = [RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"), badge]
    if secret is not None:
        signed = {"/flwr.proto.Runtime/AcquireTask"}
        interceptors.append(
            SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=signed)
        )
    # No retries of Flower's: on a refusal they send this process SIGINT.
    client = RuntimeHttpClient(f"http://{address}", interceptors=interceptors, verify=False)
    client.close()
    # Flower's own would send loopback traffic to the proxy named in the environment.
    client._client = httpx.Client(verify=False, timeout=TIMEOUT_S, trust_env=False)
    return _Node(client, badge)


def _next(
    node: _Node, handle: Handle, stop: threading.Event, away: int, say: Say
) -> tuple[bool, int]:
    """Serve a task if there is one.

    Returns whether it did, and how often the node was away in a row.
    """
    import httpx
    from flwr.proto.runtime_pb2 import AcquireTaskRequest
    from flwr.supercore.constant import TaskType

    kinds = [TaskType.CLIENT_APP]
    try:
        found = node.client.AcquireTask(AcquireTaskRequest(supported_task_types=kinds))
    except (httpx.HTTPError, ValueError) as error:
        if not away:
            say(f"the SuperNode does not answer ({_why(error)}); waiting for it")
        return False, min(away + 1, 10)
    if away:
        say("the SuperNode answers again")
    if not found.token:
        return False, 0
    node.badge.token = found.token
    try:
        with _heartbeat(node.client):
            _serve(node.client, handle, stop, say)
    except Exception as error:
        # The task is left unfinished on purpose: the SuperNode answers for it after 60 s, while
        # it would wait for ever for the reply of a task that was finished without one.
        say(f"a message was left without a reply: {where(error)}")
    finally:
        node.badge.token = ""
    return True, 0


def _serve(client: "RuntimeHttpClient", handle: Handle, stop: threading.Event, say: Say) -> None:
    """Serve one task, from its message to its end."""
    from flwr.app import Error, Message
    from flwr.common.constant import ErrorCode, SubStatus
    from flwr.common.serde import context_from_proto
    from flwr.proto.runtime_pb2 import PullTaskInputRequest
    from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
    from flwr.supercore.task_identity import TaskIdentity
    from flwr.supernode.runtime.run_clientapp import push_message, push_task_output

    # The message first, the task's start after it (the stock process does the reverse): a worker
    # killed between the two leaves a task that the SuperNode hands out again.
    listed = _listed(client, stop)
    given = client.PullTaskInput(PullTaskInputRequest())
    TaskIdentity.task_id, TaskIdentity.run_id = given.task_id, given.run.run_id
    TaskIdentity.node_id = given.context.node_id
    context = context_from_proto(given.context)
    status, details = SubStatus.COMPLETED, ""
    try:
        reply = handle(_inflated(client, listed, context), context)
        if not isinstance(reply, Message):
            raise TypeError(f"expected a Message as the reply, got {type(reply).__name__}")
    except Exception as error:
        say(f"a message was answered with an error: {where(error)}")
        status, details = SubStatus.FAILED, FAILED
        failure = Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=FAILED)
        reply = Message(failure, reply_to=_envelope(listed))
    try:
        push_message(client, reply, context)
    except ObjectPushError:
        # The SuperNode has sent what it had, the server wanted nothing of it, and the reply is
        # forgotten: nobody waits for the rest. A task left open would end in 60 s with an error
        # reply to whatever message of the run is in hand then.
        say("a reply was not wanted any more: it came too late")
    push_task_output(client=client, context=context, sub_status=status, details=details)


def _listed(client: "RuntimeHttpClient", stop: threading.Event) -> "PullAppMessagesResponse":
    """Return the task's message without its content.

    Flower stores it a moment after the task, which is waited for.
    """
    from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullTaskInputRequest

    until = time.monotonic() + LISTED_S
    while True:
        listed: PullAppMessagesResponse = client.PullMessages(PullAppMessagesRequest())
        if listed.messages_list:
            return listed
        if stop.wait(0.01):
            raise LookupError("stopped before the message came")  # handed out again after 30 s
        if time.monotonic() > until:
            # Another worker took it and died. Started and left, the SuperNode answers for it.
            client.PullTaskInput(PullTaskInputRequest())
            raise LookupError("a task without a message")


def _inflated(
    client: "RuntimeHttpClient", listed: "PullAppMessagesResponse", context: "Context"
) -> "Message":
    """Return the task's message with its content.

    It waits while the SuperNode itself is still pulling that.
    """
    from flwr.app import Message
    from flwr.proto.node_pb2 import Node
    from flwr.supercore.inflatable import inflatable_protobuf_utils as wire
    from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree

    node, run = Node(node_id=context.node_id), context.run_id
    tree = listed.message_object_trees[0]
    message = pull_and_inflate_object_from_tree(
        tree,
        wire.make_pull_object_fn_protobuf(client.PullObject, node, run),
        wire.make_confirm_message_received_fn_protobuf(client.ConfirmMessageReceived, node, run),
        return_type=Message,
        initial_backoff=0.02,
        backoff_cap=0.5,
    )
    message.metadata.__dict__["_message_id"] = tree.object_id  # not part of what is hashed
    return message


def _envelope(listed: "PullAppMessagesResponse") -> "Message":
    """Return the message as an address to reply to, for which its metadata is enough."""
    from flwr.common.serde import message_from_proto

    return message_from_proto(listed.messages_list[0])


@contextmanager
def _heartbeat(client: "RuntimeHttpClient") -> Iterator[None]:
    """Send signs of life while a task is in hand.

    One that fails is made good by the next.
    """
    from flwr.proto.runtime_pb2 import SendTaskHeartbeatRequest

    done = threading.Event()

    def beat() -> None:
        while not done.wait(BEAT_S):
            with suppress(Exception):
                client.SendTaskHeartbeat(SendTaskHeartbeatRequest())

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _why(error: Exception) -> str:
    """Return the status of a refusal, or what kind of silence it is."""
    response = getattr(error, "response", None)
    if response is None:
        return type(error).__name__
    hint = ": the worker's secret is not the SuperNode's" if response.status_code == 401 else ""
    return f"status {response.status_code}{hint}"


def where(error: BaseException) -> str:
    """Return the first cause's type and line of code, never its text, which may quote records."""
    while error.__cause__ is not None:
        error = error.__cause__
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return type(error).__name__
    file = Path(trace.tb_frame.f_code.co_filename).name
    full = "; the disk is full" if getattr(error, "errno", None) in FULL else ""
    return f"{type(error).__name__} at {file}:{trace.tb_lineno}{full}"
