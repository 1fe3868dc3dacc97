"""What the floors of a deployment are held against, on loopback over TLS with node keys.

    python -m privet.experiments.benchmarks.fleet_floors WHAT

    rounds [--rounds 5]    a masked round of 3 devices
    memory                 a device, idle and training
    status [--times 10]    `privet client status`

`rounds` puts three stock SuperNodes beside three of privet's devices, at the same SuperLink, one
after the other: each of their exchanges starts a process per message, and Flower's own loop
(`Grid.send_and_receive`) waits for it. What they answer is one byte.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from ...client.runtime.processes import free_port
from ...client.store.device_store import DeviceStore
from ...client.store.key_file import Passphrase
from ...common.child_processes import below, privet_command
from ...common.files import read_lines
from ...server.operations import control, services
from ...server.round_record import RoundRecord
from .deployment import (
    PASSPHRASE,
    Up,
    followed,
    homes,
    people,
    run_config,
    server_up,
    tiny_model,
)
from .harness import command, process_memory_mb, program, wait_for
from .worker_start import PYPROJECT

DEVICES = 3
PHASES = ("keys", "shares", "vector", "confirm", "unmask")
SMOLLM2 = "smollm2-135m-instruct"
SERVER = """import json, os, time
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()


@app.main()
def main(grid, context):
    given = json.loads(os.environ["PRIVET_LOOPBACK"])
    while len(nodes := sorted(given["nodes"])) > len(set(nodes) & set(grid.get_node_ids())):
        time.sleep(0.1)
    for number in range(given["exchanges"]):
        began = time.perf_counter()
        content = lambda: RecordDict({"given": ConfigRecord({"number": number})})
        sent = [Message(content(), dst_node_id=node, message_type="train") for node in nodes]
        replies = list(grid.send_and_receive(sent, timeout=300))
        row = {"seconds": time.perf_counter() - began}
        row["errors"] = [r.error.reason for r in replies if r.has_error()]
        with open(given["replies"], "a") as file:
            print(json.dumps(row), file=file)
"""
CLIENT = """from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message, context):
    return Message(RecordDict({"reply": ConfigRecord({"vector": b"x"})}), reply_to=message)
"""


def masked_rounds(up: Up, folder: Path, rounds: int) -> list[RoundRecord]:
    """Run masked rounds of three real devices. The first one greets them and loads the model."""
    base = str(tiny_model(folder / "model"))
    config = run_config("fleet", base, DEVICES, rounds)
    with people(homes(folder, up, DEVICES, [base])):
        return followed(up, config, 60 + 60 * rounds)


def stock_exchanges(up: Up, folder: Path, exchanges: int) -> list[float]:
    """Measure the seconds of each exchange with three stock SuperNodes and their own processes."""
    keys = [_node_key(folder / f"stock{number}") for number in range(DEVICES)]
    nodes = [_registered(up, key, f"stock-{number}") for number, key in enumerate(keys)]
    replies = folder / "replies"
    given = {"nodes": nodes, "exchanges": exchanges, "replies": str(replies)}
    # the SuperExec passes its environment on to the server's app
    env = up.env | {"PRIVET_LOOPBACK": json.dumps(given)}
    with ExitStack() as stack:
        line = services.commands(up.server)["superexec"]
        stack.enter_context(program(list(line), env))
        for number in range(DEVICES):
            command = [str(Path(sys.executable).parent / "flower-supernode")]
            command += ["--superlink", up.address, "--root-certificates", str(up.authority)]
            command += ["--auth-supernode-private-key", str(folder / f"stock{number}")]
            command += ["--host", "127.0.0.1", "--port", str(free_port())]
            stack.enter_context(program(command, env)).wait_for("SuperNode ID", 120)
        _start_sent(up)
        wait_for(
            lambda: len(read_lines(replies)) == exchanges, 60 + 60 * exchanges, "the exchanges"
        )
    rows = read_lines(replies)
    if errors := [row["errors"] for row in rows if row["errors"]]:
        raise RuntimeError(f"a stock node failed: {errors[0][0]}")
    return [float(row["seconds"]) for row in rows]


def _node_key(path: Path) -> bytes:
    """Make a node's key: write the private half to `path`, return the public half."""
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", str(path)], check=True
    )
    return path.with_suffix(".pub").read_bytes()


def _registered(up: Up, key: bytes, name: str) -> int:
    from flwr.proto.control_pb2 import RegisterNodeRequest

    with control.control(up.server) as client:
        answer = client.RegisterNode(RegisterNodeRequest(public_key=_pem(key), name=name))
    return int(answer.node_id)


def _pem(key: bytes) -> bytes:
    path = Path("/dev/stdin")
    done = subprocess.run(
        ["ssh-keygen", "-e", "-m", "PKCS8", "-f", str(path)], input=key, capture_output=True,
        check=True,
    )  # fmt: skip
    return done.stdout


def _start_sent(up: Up) -> None:
    """Start a run whose two apps are in the bundle, as Flower's own are."""
    import hashlib

    from flwr.cli.build import build_fab_from_files
    from flwr.common.serde import fab_to_proto
    from flwr.proto.control_pb2 import StartRunRequest
    from flwr.supercore.fab import Fab

    files = {"pyproject.toml": PYPROJECT, "sent/__init__.py": ""}
    files |= {"sent/server.py": SERVER, "sent/client.py": CLIENT}
    content, _ = build_fab_from_files({name: text.encode() for name, text in files.items()})
    fab = fab_to_proto(Fab(hashlib.sha256(content).hexdigest(), content, {}))
    with control.control(up.server) as client:
        client.StartRun(StartRunRequest(fab=fab))


def rounds(count: int) -> dict[str, object]:
    """Measure masked rounds and stock nodes' exchanges, both at one SuperLink.

    Seconds, medians but for `rounds`; the first of these greets the devices and loads the model.
    """
    with TemporaryDirectory() as name, server_up(Path(name)) as up:
        folder = Path(name)
        records = masked_rounds(up, folder, count + 1)
        superexec = up.programs["superexec"].process
        superexec.terminate()
        superexec.wait(30)
        stock = statistics.median(stock_exchanges(up, folder, count))
    later = records[1:]
    whole = statistics.median(record["seconds"] for record in later)
    phases = {
        phase: statistics.median(record["phases"][phase] for record in later) for phase in PHASES
    }
    return {
        "phases_s": phases,
        "between_them_s": statistics.median(
            record["seconds"] - sum(record["phases"].values()) for record in later
        ),
        "round_s": whole,
        "stock_exchange_s": stock,
        "stock_exchanges_over_round": len(PHASES) * stock / whole,
        "rounds_s": [record["seconds"] for record in records],
        "load": os.getloadavg()[0],
    }


def memory() -> dict[str, object]:
    """Measure the memory of one device of three, before a model is loaded and after training.

    The device is a SuperNode and a worker; of three the largest is shown, MB.
    """
    config = run_config(
        "memory", SMOLLM2, DEVICES, 2,
        data={"source": "devices", "clients": DEVICES, "records_per_client": 32,
              "max_tokens": 64, "task": "generation"},
        adapter={"family": "lora_xs", "rank": 4, "last_blocks": 4},
    )  # fmt: skip
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        up = stack.enter_context(server_up(folder))
        started = stack.enter_context(people(homes(folder, up, DEVICES, [SMOLLM2])))
        supervisors = [one.process.pid for one in started]
        wait_for(lambda: all(len(below(pid)) >= 2 for pid in supervisors), 60, "devices")
        for one in started:
            one.wait_for("SuperNode ID", 120)
        time.sleep(5)
        pids = [_named(pid) for pid in supervisors]
        idle = _largest(pids, "rss")
        followed(up, config, 600)
        return {
            "idle, no model": idle,
            "training 4 x 64, most": _largest(pids, "most"),
            "after the run": _largest(pids, "rss"),
        }


def _named(supervisor: int) -> dict[str, int]:
    found = {"supervisor": supervisor}
    for one in below(supervisor):
        words = " ".join(one.cmdline())
        for name, mark in (("SuperNode", "flower-supernode"), ("worker", "work")):
            if mark in words and name not in found:
                found[name] = one.pid
                break
    return found


def _largest(devices: Sequence[Mapping[str, int]], kind: str) -> dict[str, float]:
    sizes = [{name: process_memory_mb(pid)[kind] for name, pid in one.items()} for one in devices]
    return max(sizes, key=lambda found: found["SuperNode"] + found["worker"])


def status(times: int) -> dict[str, object]:
    """Measure wall and processor seconds of `privet client status`."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pass").write_text(PASSPHRASE)
        with DeviceStore.create(folder / "home", Passphrase(PASSPHRASE), ""):
            pass
        opened = ("--home", folder / "home", "--passphrase-file", folder / "pass")
        line = privet_command("client", "status", *opened)
        walls, used = [], []
        for _ in range(times):
            began, before = time.perf_counter(), os.times()
            subprocess.run(line, check=True, capture_output=True)
            walls.append(time.perf_counter() - began)
            after = os.times()
            used.append(sum(after[2:4]) - sum(before[2:4]))  # those of children
    return {
        "times": times,
        "wall_median_s": statistics.median(walls),
        "wall_least_s": min(walls),
        "processor_median_s": statistics.median(used),
        "load": os.getloadavg()[0],
    }


class What(StrEnum):
    """What is measured."""

    ROUNDS = "rounds"
    MEMORY = "memory"
    STATUS = "status"


def main(
    what: What,
    count: Annotated[int, typer.Option("--rounds")] = 5,
    times: int = 10,
) -> dict[str, object]:
    """The figures asked for."""
    if what is What.ROUNDS:
        return rounds(count)
    return memory() if what is What.MEMORY else status(times)


if __name__ == "__main__":
    command(main)
