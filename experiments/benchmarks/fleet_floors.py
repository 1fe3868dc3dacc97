"""What the floors of a deployment are held against, on loopback over TLS with node keys.

    python -m privet.experiments.benchmarks.fleet_floors WHAT

    rounds [--rounds 5]    a masked round of 3 devices
    memory                 a device, idle and training
    status [--times 10]    `privet client status`

`rounds` puts three stock SuperNodes beside three of privet's devices, at the same SuperLink, one
after the other: each of their exchanges starts a process per message, and Flower's own loop
(`Grid.send_and_receive`) waits for it. What they answer is one byte.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ...client.store.device_store import DeviceStore
from ...client.store.key_file import Passphrase
from ...common.child_processes import below, privet_command
from ...server.operations import control, services
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
from .worker_start import PYPROJECT, free_port, program, wait_for

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


def masked_rounds(up: Up, folder: Path, rounds: int) -> list[dict[str, Any]]:
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
        wait_for(lambda: len(_rows(replies)) == exchanges, 60 + 60 * exchanges, "the exchanges")
    rows = _rows(replies)
    if errors := [row["errors"] for row in rows if row["errors"]]:
        raise RuntimeError(f"a stock node failed: {errors[0][0]}")
    return [float(row["seconds"]) for row in rows]


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


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


def rounds_table(records: Sequence[Mapping[str, Any]], stock: Sequence[float]) -> str:
    """Seconds of each phase and of the round, beside the stock nodes' exchanges."""
    later = records[1:]
    lines = [f"seconds, medians of {len(later)} rounds and {len(stock)} stock exchanges"]
    lines.append(f"{'':<24}{'privet':>9}{'stock':>9}{'ratio':>8}")
    one = statistics.median(stock)
    for phase in PHASES:
        own = statistics.median(record["phases"][phase] for record in later)
        lines.append(f"{phase:<24}{own:9.2f}{one:9.2f}{one / own:7.1f}x")
    whole = [float(record["seconds"]) for record in later]
    rest = statistics.median(record["seconds"] - sum(record["phases"].values()) for record in later)
    lines.append(f"{'the server between them':<24}{rest:9.2f}")
    own = statistics.median(whole)
    lines.append(f"{'masked round':<24}{own:9.2f}{5 * one:9.2f}{5 * one / own:7.1f}x")
    lines.append(f"{'one exchange (FedAvg)':<24}{'':9}{one:9.2f}")
    lines.append(f"rounds: {' '.join(f'{seconds:.2f}' for seconds in whole)} (the first, with")
    lines.append(f"the greeting: {records[0]['seconds']:.2f}); load {os.getloadavg()[0]:.1f}")
    return "\n".join(lines)


def rounds(count: int) -> str:
    """Measure masked rounds and stock nodes' exchanges, both at one SuperLink."""
    with TemporaryDirectory() as name, server_up(Path(name)) as up:
        folder = Path(name)
        records = masked_rounds(up, folder, count + 1)
        superexec = up.programs["superexec"].process
        superexec.terminate()
        superexec.wait(30)
        return rounds_table(records, stock_exchanges(up, folder, count))


def resident_mb(pid: int) -> tuple[float, float]:
    """Return a process's resident memory now and at its peak, MB (2**20 bytes)."""
    rows = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return tuple(int(rows[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM"))  # type: ignore[return-value]


def memory() -> str:
    """Measure the memory of one device of three, before a model is loaded and after training.

    The device is a SuperNode and a worker.
    """
    base, lines = SMOLLM2, list[str]()
    config = run_config(
        "memory", base, DEVICES, 2,
        data={"source": "devices", "clients": DEVICES, "records_per_client": 32,
              "max_tokens": 64, "task": "generation"},
        adapter={"family": "lora_xs", "rank": 4, "last_blocks": 4},
    )  # fmt: skip
    with TemporaryDirectory() as name, server_up(Path(name)) as up:
        made = homes(Path(name), up, DEVICES, [base])
        with people(made) as started:
            supervisors = [one.process.pid for one in started]
            wait_for(lambda: all(len(below(pid)) >= 2 for pid in supervisors), 60, "devices")
            for one in started:
                one.wait_for("SuperNode ID", 120)
            time.sleep(5)
            pids = [_named(pid) for pid in supervisors]
            lines.append(_sizes("idle, no model", pids, lambda now, _: now))
            followed(up, config, 600)
            lines.append(_sizes("training 4 x 64, most", pids, lambda _, most: most))
            lines.append(_sizes("after the run", pids, lambda now, _: now))
    return "\n".join([f"MB, the largest of {DEVICES} devices", *lines])


def _named(supervisor: int) -> dict[str, int]:
    found = {"supervisor": supervisor}
    for one in below(supervisor):
        words = " ".join(one.cmdline())
        for name, mark in (("SuperNode", "flower-supernode"), ("worker", "work")):
            if mark in words and name not in found:
                found[name] = one.pid
                break
    return found


def _sizes(
    what: str, devices: Sequence[Mapping[str, int]], pick: Callable[[float, float], float]
) -> str:
    sizes = [{name: pick(*resident_mb(pid)) for name, pid in one.items()} for one in devices]
    one = max(sizes, key=lambda found: found["SuperNode"] + found["worker"])
    told = ", ".join(f"{name} {size:.0f}" for name, size in one.items())
    return f"{what:<24}{one['SuperNode'] + one['worker']:7.0f}   ({told})"


def status(times: int) -> str:
    """Measure wall and processor seconds of `privet client status`."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pass").write_text(PASSPHRASE)
        with DeviceStore.create(folder / "home", Passphrase(PASSPHRASE), ""):
            pass
        opened = ("--home", folder / "home", "--passphrase-file", folder / "pass")
        command = privet_command("client", "status", *opened)
        walls, used = [], []
        for _ in range(times):
            began, before = time.perf_counter(), os.times()
            subprocess.run(command, check=True, capture_output=True)
            after = os.times()
            walls.append(time.perf_counter() - began)
            used.append(
                after.children_user + after.children_system
                - before.children_user - before.children_system
            )  # fmt: skip
    return (
        f"privet client status, {times} times: wall median {statistics.median(walls):.2f} s, least "
        f"{min(walls):.2f} s; processor median {statistics.median(used):.2f} s; load "
        f"{os.getloadavg()[0]:.1f}"
    )


def main() -> None:
    """Print the figures asked for."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("what", choices=("rounds", "memory", "status"))
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--times", type=int, default=10)
    given = options.parse_args()
    if given.what == "rounds":
        print(rounds(given.rounds))
    elif given.what == "memory":
        print(memory())
    else:
        print(status(given.times))


if __name__ == "__main__":
    main()
