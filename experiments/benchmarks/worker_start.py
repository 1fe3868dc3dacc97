"""How soon a device starts on a message: a stock node beside privet's worker, in one run.

    python -m privet.experiments.benchmarks.worker_start [--model MODEL] [--messages 3]

One SuperLink and two stock SuperNodes on loopback; one starts Flower's processes, the other is
asked by `client/runtime/worker.py`. Both run the same handler, which loads the base model and notes
the time. "Available" is when the node's own log says that it has received the message; it hands the
message out a few milliseconds before it says so, so a delay can come out as slightly negative.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from ...client.runtime.processes import free_port
from ...client.runtime.worker import work
from ...common.child_processes import stop_on_signals
from ...common.files import read_lines
from .harness import command, listening, process_memory_mb, program, wait_for

if TYPE_CHECKING:
    from flwr.app import Context, Message

__all__ = ["PYPROJECT", "flower_project", "start_run", "stock_node", "superlink"]

MODULE = "privet.experiments.benchmarks.worker_start"
LET_GO = "the model is let go"
IDLE_S = 45.0  # longer than the other node needs for a message
CONFIG = (
    '[superlink]\ndefault = "loopback"\n[superlink.loopback]\naddress = "{}"\ninsecure = true\n'
)
PYPROJECT = """[project]
name = "sent"
version = "1.0.0"
description = "code that a server sends"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "server"
[tool.flwr.app.components]
serverapp = "sent.server:app"
clientapp = "sent.client:app"
[tool.flwr.app.config]
"""
SERVER = """import json, os, time
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()


@app.main()
def main(grid, context):
    given = json.loads(os.environ["PRIVET_LOOPBACK"])
    while len(nodes := sorted(grid.get_node_ids())) < given["nodes"]:
        time.sleep(0.1)
    for number in range(given["messages"]):
        content = lambda: RecordDict({"given": ConfigRecord({"number": number})})
        sent = [Message(content(), dst_node_id=node, message_type="train") for node in nodes]
        waiting, replies = set(grid.push_messages(sent)), []
        while waiting:
            found = list(grid.pull_messages(list(waiting)))
            replies += found
            waiting -= {reply.metadata.reply_to_message_id for reply in found}
            time.sleep(0.05)
        with open(given["replies"], "a") as file:
            for reply in replies:
                row = {"number": number, "node": reply.metadata.src_node_id}
                row["error"] = reply.error.reason if reply.has_error() else ""
                row |= {} if reply.has_error() else dict(reply.content["reply"])
                print(json.dumps(row), file=file)
"""
CLIENT = """from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message, context):
    from privet.experiments.benchmarks.worker_start import noted
    return noted(message, context)
"""


def flower_project(folder: Path, server: str = SERVER, client: str = CLIENT) -> Path:
    """A Flower project with these two files: what a server bundles and sends."""
    (folder / "sent").mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PYPROJECT)
    for name, text in (("__init__", ""), ("server", server), ("client", client)):
        (folder / "sent" / f"{name}.py").write_text(text)
    return folder


@contextmanager
def superlink(folder: Path, nodes: int, messages: int) -> Iterator[tuple[str, dict[str, str]]]:
    """Run a SuperLink without TLS, until the block ends.

    Gives its address and the environment for all programs.

    The project's server app sends each of `nodes` nodes so many messages in turn, and writes the
    replies to `folder / "replies"`, a line each.
    """
    address, home = f"127.0.0.1:{free_port()}", folder / "flower"
    home.mkdir()
    (home / "config.toml").write_text(CONFIG.format(address))
    given = {"nodes": nodes, "messages": messages, "replies": str(folder / "replies")}
    env = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PYTHONUNBUFFERED": "1",
        "PRIVET_LOOPBACK": json.dumps(given),
    }
    line = ["flower-superlink", "--insecure", "--port", address.rpartition(":")[2]]
    line += ["--isolation", "subprocess", "--disable-runtime-dependency-installation"]
    with program([_beside(line[0]), *line[1:]], env) as link:
        wait_for(lambda: listening(address) or link.process.poll() is not None, 30, "the SuperLink")
        yield address, env


def _beside(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def stock_node(address: str, port: int, isolation: str) -> list[str]:
    """The command of a SuperNode without TLS and without a key."""
    line = [_beside("flower-supernode"), "--insecure", "--superlink", address]
    return [*line, "--isolation", isolation, "--host", "127.0.0.1", "--port", str(port)]


def start_run(project: Path, env: dict[str, str]) -> None:
    """`flwr run`: bundles the project and sends it."""
    done = subprocess.run(
        [_beside("flwr"), "run", str(project), "loopback"], env=env, capture_output=True, text=True
    )
    if done.returncode or "uccessfully started run" not in done.stdout:
        raise RuntimeError(f"flwr run failed: {done.stdout}{done.stderr}")


def noted(message: "Message", context: "Context") -> "Message":
    """Reply with when this was called, and when the base model was loaded."""
    from flwr.app import ConfigRecord, Message, RecordDict

    entered = time.time()
    if model := os.environ.get("PRIVET_BENCHMARK_MODEL"):
        from ...common.model.base_model import load

        load(model)
    times = {"entered": entered, "ready": time.time()}
    reply = {**times, "pid": os.getpid(), "by": str(context.node_id)}
    return Message(RecordDict({"reply": ConfigRecord(reply)}), reply_to=message)


def serve_at(address: str, idle_s: float) -> None:
    """Run the worker of this benchmark, in a process of its own."""

    def let_go() -> None:
        if "privet.common.model.base_model" in sys.modules:
            from ...common.model.base_model import forget

            forget()
        print(LET_GO, flush=True)

    work(address, noted, stop=stop_on_signals(), idle_s=idle_s, on_idle=let_go)


def measure(model: str, messages: int, folder: Path) -> dict[str, object]:
    """Seconds from "available" to the handler's start and to the loaded model, for both nodes."""
    ports = {"stock": free_port(), "worker": free_port()}
    with ExitStack() as stack:
        address, env = stack.enter_context(superlink(folder, 2, messages))
        env["PRIVET_BENCHMARK_MODEL"] = model
        nodes = {
            name: stack.enter_context(program(stock_node(address, ports[name], isolation), env))
            for name, isolation in (("stock", "subprocess"), ("worker", "process"))
        }
        serving = [sys.executable, "-m", MODULE, "--serve", f"127.0.0.1:{ports['worker']}"]
        worker = stack.enter_context(program(serving, env))
        for node in nodes.values():
            node.wait_for("SuperNode ID", 60)
        time.sleep(2)  # the worker is idle, nothing is loaded
        pids = (nodes["worker"].process.pid, worker.process.pid)
        before = [process_memory_mb(pid) for pid in pids]
        start_run(flower_project(folder / "project"), env)
        replies = folder / "replies"
        wait_for(lambda: len(read_lines(replies)) == 2 * messages, 300, "replies")
        loaded = process_memory_mb(pids[1])
        worker.wait_for(LET_GO, IDLE_S + 10)
        time.sleep(1)
        released = process_memory_mb(pids[1])
        rows = read_lines(replies)
    worker_node = next(row["by"] for row in rows if row["pid"] == pids[1])
    found: dict[str, object] = {}
    for name, node in nodes.items():
        own = [row for row in rows if (row["by"] == worker_node) == (name == "worker")]
        available = node.times("Received successfully")
        found[name] = [
            {key: row[key] - when for key in ("entered", "ready")}
            for row, when in zip(own, available, strict=True)
        ]
    found["memory_mb"] = {
        "node": before[0], "worker, nothing loaded": before[1],
        "worker, model loaded": loaded, "worker, model let go": released,
    }  # fmt: skip
    return found


def main(
    model: str = "smollm2-135m-instruct",
    messages: int = 3,
    serve: Annotated[str | None, typer.Option("--serve", hidden=True)] = None,
) -> dict[str, object]:
    """How soon both nodes start on each message, and the worker's memory."""
    if serve:
        serve_at(serve, idle_s=IDLE_S)
        return {}
    with TemporaryDirectory() as folder:
        return measure(model, messages, Path(folder))


if __name__ == "__main__":
    command(main)
