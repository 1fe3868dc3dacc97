"""How soon a device starts on a message: a stock node beside privet's worker, in one run.

    python -m privet.experiments.benchmarks.worker_start [--model smollm2-135m-instruct] [--messages
    3]

One SuperLink and two stock SuperNodes on loopback; one starts Flower's processes, the other is
asked by `client/runtime/worker.py`. Both run the same handler, which loads the base model and notes
the time. "Available" is when the node's own log says that it has received the message; it hands the
message out a few milliseconds before it says so, so a delay can come out as slightly negative.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

import psutil

from ...client.runtime.worker import work
from ...common.child_processes import stop_on_signals

__all__ = [
    "Program",
    "flower_project",
    "free_port",
    "memory_mb",
    "program",
    "start_run",
    "wait_for",
]

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


@dataclass
class Program:
    """A started program and its lines, each with the second it was read."""

    process: "subprocess.Popen[str]"
    lines: list[tuple[float, str]] = field(default_factory=list)

    def times(self, words: str) -> list[float]:
        """When lines with these words came."""
        return [when for when, line in list(self.lines) if words in line]

    def wait_for(self, words: str, timeout_s: float) -> None:
        """Wait until the program has printed a line with these words.

        The TimeoutError names them.
        """
        wait_for(lambda: self.times(words), timeout_s, repr(words))


@contextmanager
def program(
    command: list[str], env: dict[str, str], fds: tuple[int, ...] = ()
) -> Iterator[Program]:
    """Starts a program in a group of its own, reads its lines, ends the whole group."""
    process = subprocess.Popen(
        command,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=fds,
        start_new_session=True,
    )
    running = Program(process)
    assert process.stdout is not None
    reader = threading.Thread(target=_read, args=(process.stdout, running.lines), daemon=True)
    reader.start()
    try:
        yield running
    finally:
        process.terminate()
        try:
            process.wait(8)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it started itself
        reader.join(5)
        process.stdout.close()


def _read(stream: IO[str], lines: list[tuple[float, str]]) -> None:
    for line in stream:
        lines.append((time.time(), line))


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wait_for(condition: Callable[[], Any], timeout_s: float, what: str) -> None:
    """Wait until the condition holds. The TimeoutError names what was waited for."""
    until = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError(f"waited {timeout_s:.0f} s for {what}")
        time.sleep(0.02)


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
    command = ["flower-superlink", "--insecure", "--port", address.rpartition(":")[2]]
    command += ["--isolation", "subprocess", "--disable-runtime-dependency-installation"]
    with program([_beside(command[0]), *command[1:]], env) as link:
        wait_for(lambda: listening(address) or link.process.poll() is not None, 30, "the SuperLink")
        yield address, env


def _beside(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def listening(address: str) -> bool:
    """Return whether something listens at this address."""
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def stock_node(address: str, port: int, isolation: str) -> list[str]:
    """The command of a SuperNode without TLS and without a key."""
    command = [_beside("flower-supernode"), "--insecure", "--superlink", address]
    return [*command, "--isolation", isolation, "--host", "127.0.0.1", "--port", str(port)]


def start_run(project: Path, env: dict[str, str]) -> None:
    """`flwr run`: bundles the project and sends it."""
    done = subprocess.run(
        [_beside("flwr"), "run", str(project), "loopback"], env=env, capture_output=True, text=True
    )
    if done.returncode or "uccessfully started run" not in done.stdout:
        raise RuntimeError(f"flwr run failed: {done.stdout}{done.stderr}")


def memory_mb(pid: int) -> dict[str, float]:
    """Resident and proportional memory of a process, MB (2**20 bytes)."""
    found = psutil.Process(pid).memory_full_info()
    return {"rss": found.rss / 2**20, "pss": found.pss / 2**20}


def noted(message: Any, context: Any) -> Any:
    """Reply with when this was called, and when the base model was loaded."""
    from flwr.app import ConfigRecord, Message, RecordDict

    entered = time.time()
    if model := os.environ.get("PRIVET_BENCHMARK_MODEL"):
        from ...common.model.base_model import load

        load(model)
    reply: dict[str, Any] = {"entered": entered, "ready": time.time(), "pid": os.getpid()}
    reply |= {"by": str(context.node_id)}
    return Message(RecordDict({"reply": ConfigRecord(reply)}), reply_to=message)


def serve(address: str, idle_s: float) -> None:
    """Run the worker of this benchmark, in a process of its own."""

    def let_go() -> None:
        if "privet.common.model.base_model" in sys.modules:
            from ...common.model.base_model import load

            load.cache_clear()
        print(LET_GO, flush=True)

    work(address, noted, stop=stop_on_signals(), idle_s=idle_s, on_idle=let_go)


def measure(model: str, messages: int, folder: Path) -> dict[str, Any]:
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
        before = [memory_mb(pid) for pid in pids]
        start_run(flower_project(folder / "project"), env)
        replies = folder / "replies"
        wait_for(lambda: replies.exists() and len(_rows(replies)) == 2 * messages, 300, "replies")
        loaded = memory_mb(pids[1])
        worker.wait_for(LET_GO, IDLE_S + 10)
        time.sleep(1)
        released = memory_mb(pids[1])
        rows = _rows(replies)
    worker_node = next(row["by"] for row in rows if row["pid"] == pids[1])
    found: dict[str, Any] = {}
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


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def table(found: dict[str, Any]) -> str:
    """Show the measurements as lines of text."""
    lines = ["seconds from available to        handler entered            model ready"]
    lines += ["message                      stock  worker  ratio     stock  worker  ratio"]
    for number, (stock, worker) in enumerate(zip(found["stock"], found["worker"], strict=True), 1):
        cells = []
        for key in ("entered", "ready"):
            ratio = stock[key] / max(worker[key], 0.001)
            cells.append(f"{stock[key]:8.2f}{worker[key]:8.3f}{ratio:6.0f}x")
        lines.append(f"{number:<26}" + "  ".join(cells))
    for what, sizes in found["memory_mb"].items():
        lines.append(f"{what:<26} RSS {sizes['rss']:7.0f} MB   PSS {sizes['pss']:7.0f} MB")
    return "\n".join(lines)


def main() -> None:
    """Print a table of start times and memory."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--model", default="smollm2-135m-instruct")
    options.add_argument("--messages", type=int, default=3)
    options.add_argument("--json", action="store_true")
    options.add_argument("--serve", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.serve:
        serve(given.serve, idle_s=IDLE_S)
        return
    with TemporaryDirectory() as folder:
        found = measure(given.model, given.messages, Path(folder))
    print(json.dumps(found, indent=2) if given.json else table(found))


if __name__ == "__main__":
    main()
