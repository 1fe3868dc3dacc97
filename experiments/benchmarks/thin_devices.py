"""What grows with the number of devices: many thin ones in one process, a real server before them.

    python -m privet.experiments.benchmarks.thin_devices [--counts 10,50,100,250] [--rounds 2]

A thin device has a registered ECDSA key, a heartbeat and a TLS connection of its own, through
Flower's own client of the Fleet API; it keeps time as `client/runtime/supernode.py` does, and
answers the five phases with the real client half of the masking protocol and a constant vector. It
has no process, no model, no ledger. SuperLink, SuperExec and ServerApp are real, on the same
machine: the thin devices' processor time is shown apart, and takes cores from the server.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from ...client.privacy import masked_upload
from ...client.runtime.supernode import PARTS, Waits
from ...common.child_processes import below
from ...common.privacy.round_plan import Plan
from ...common.secure_aggregation.keys import Directory, Identity, greeting
from ...common.secure_aggregation.terms import MaskingPolicy
from ...common.settings.config import Config
from ...server.operations import control, enrolment
from ...server.round_record import RoundRecord
from .deployment import Up, followed, quiet, run_config, server_up, tiny_model
from .harness import command, process_memory_mb, processor_s, wait_for

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from flwr.app import Message
    from flwr.proto.message_pb2 import ObjectTree
    from flwr.supercore.protobuf.client import ProtobufRequestContext
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from httpx import Headers, Response

IDLE_S = 20.0
PHASES = ("keys", "shares", "vector", "confirm", "unmask")


@dataclass
class Counts:
    """What all thin devices of this process have sent and received."""

    requests: dict[str, int] = field(default_factory=dict)
    sent: int = 0
    received: int = 0
    failed: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def total(self) -> tuple[int, int, int]:
        """Requests, bytes sent, bytes received so far."""
        return sum(self.requests.values()), self.sent, self.received


@dataclass
class Thin:
    """One device: its keys, and the masking protocol's state between two phases."""

    number: int
    identity: Identity
    key: "EllipticCurvePrivateKey"
    dimension: int
    state: masked_upload.State | None = None

    def hello(self, run: str, nonce: bytes, node: int) -> dict[str, str | bytes | bool]:
        """Answer a greeting by accepting the run."""
        signature = self.identity.sign(greeting(run, nonce, node))
        own = {"identity": self.identity.public, "signature": signature}
        return {"version": version("privet"), **own, "accepted": True}

    def phase(self, name: str, plan: Plan, message: bytes, number: int) -> bytes:
        """One phase of a masked round."""
        if name == "keys":
            policy = MaskingPolicy(
                min_cohort=3, max_cohort=plan.cohort, min_survivors=2, min_bits=8, colluders=0
            )
            terms = plan.terms(self.dimension)
            self.state, payload = masked_upload.announce(
                number, self.identity, terms, policy, plan.attempt - 1, os.urandom
            )
            return payload
        assert self.state is not None
        if name == "shares":
            known = Directory({}, closed=False)
            self.state, payload, _ = masked_upload.share(self.state, message, known, os.urandom)
        elif name == "vector":
            received = masked_upload.receive(self.state, message)
            vector = np.ones(received.party.terms.dimension, np.uint32)
            self.state, payload = masked_upload.mask(received, vector)
        elif name == "confirm":
            self.state, payload = masked_upload.confirm(self.state, message)
        else:
            self.state, payload = masked_upload.unmask(self.state, message)
        return payload


def live(device: Thin, up: Up, counts: Counts, stop: threading.Event) -> None:
    """Answer messages until `stop`, as Flower's SuperNode and a worker would.

    It is for a thread of its own.
    """
    from flwr.supernode.fleet_http_connection import http_request_response

    keys = (device.key, device.key.public_key())
    roots = up.authority.read_bytes()

    def rest(seconds: float) -> None:
        stop.wait(seconds)

    waits = Waits(pause=rest)
    runs: set[int] = set()
    try:
        with http_request_response(up.address, False, roots, keys) as conn:
            _, receive, send, get_run, get_fab, pull, push, confirm = conn
            while not stop.is_set():
                received = receive()
                if received is None:
                    waits.sleep(3.0)
                    continue
                listed, tree = received
                run = listed.metadata.run_id
                if run not in runs:
                    get_fab(get_run(run).fab_hash, run)
                    runs.add(run)
                message = _inflated(tree, run, pull)
                confirm(run, tree.object_id)
                _send(_answer(device, message), run, send, push)
                waits.sleep(0.5)  # a look for the reply, as the SuperNode takes
    except Exception as error:
        counts.failed.append(f"device {device.number}: {type(error).__name__}: {error}")


def _inflated(tree: "ObjectTree", run: int, pull: Callable[[int, str], bytes]) -> "Message":
    from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
    from flwr.supercore.inflatable.inflatable_utils import (
        inflate_object_from_contents,
        pull_objects,
    )

    # asks again where the server has listed an object and not yet stored it
    ids = [node.object_id for node in iterate_object_tree(tree)]
    contents = pull_objects(ids, lambda name: pull(run, name), **PARTS)
    message = inflate_object_from_contents(tree.object_id, contents)
    message.metadata.__dict__["_message_id"] = tree.object_id
    return message


def _answer(device: Thin, message: "Message") -> "Message":
    from flwr.app import ConfigRecord, Message, RecordDict

    name = message.metadata.message_type.partition(".")[2]
    if name == "hello":
        offer, node = message.content["offer"], message.metadata.dst_node_id
        accepted = device.hello(str(offer["run"]), offer["nonce"], node)
        return Message(RecordDict({"hello": ConfigRecord(accepted)}), reply_to=message)
    payload = b""
    if name != "keep":
        plan = Plan.from_dict(dict(message.content["plan"]))
        protocol = message.content["protocol"]
        payload = device.phase(name, plan, protocol["message"], int(protocol["client"]))
    reply = {"client": device.number, "released": True, "vector": payload}
    return Message(RecordDict({"reply": ConfigRecord(reply)}), reply_to=message)


def _send(
    reply: "Message",
    run: int,
    send: "Callable[[Message, ObjectTree, float], tuple[set[str], str]]",
    push: Callable[[int, str, str, bytes], object],
) -> None:
    from flwr.supercore.inflatable.inflatable_object import (
        get_all_nested_objects,
        get_object_tree,
    )

    reply.metadata.__dict__["_message_id"] = reply.object_id
    wanted, session = send(reply, get_object_tree(reply), 0.0)
    for name, part in get_all_nested_objects(reply).items():
        if name in wanted:
            push(run, session, name, part.deflate())


def counted(counts: Counts) -> "type[FleetHttpClient]":
    """Make a client of Flower's Fleet API that counts requests and the bytes of HTTP (TLS not)."""
    from flwr.supernode.fleet_http_client import FleetHttpClient

    class Counted(FleetHttpClient):  # type: ignore[misc]
        """A client of Flower's Fleet API that counts what it sends and receives."""

        def _send(self, context: "ProtobufRequestContext") -> "Response":
            response: Response = super()._send(context)
            request = context.request
            with counts.lock:
                name = request.url.path.rpartition("/")[2]
                counts.requests[name] = counts.requests.get(name, 0) + 1
                counts.sent += len(request.content) + _size(request.headers)
                counts.received += len(response.content) + _size(response.headers)
            return response

    return Counted


def _size(headers: "Headers") -> int:
    return 40 + sum(len(name) + len(value) + 4 for name, value in headers.raw)


def thin_devices(folder: Path, up: Up, count: int, dimension: int) -> list[Thin]:
    """Make `count` thin devices, enrolled in one session of the Control API."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    form = serialization.PublicFormat.SubjectPublicKeyInfo
    devices, cards = [], []
    for number in range(count):
        key, identity = ec.generate_private_key(ec.SECP384R1()), Identity.of(os.urandom(32))
        node = key.public_key().public_bytes(serialization.Encoding.PEM, form).decode()
        card = {"privet": version("privet"), "identity": identity.public.hex(), "node": node}
        cards.append(folder / f"card{number}.json")
        cards[-1].write_text(json.dumps({**card, "name": ""}))
        devices.append(Thin(number, identity, key, dimension))
    enrolment.enrol(up.server, cards, quiet)
    return devices


@dataclass(frozen=True)
class Sample:
    """What the server's programs have used at one moment.

    It has the processor seconds of each and the memory of the SuperLink.
    """

    moment: float
    used: Mapping[str, float]
    memory: float
    counted: tuple[int, int, int]


def sampled(up: Up, counts: Counts) -> Sample:
    """Take a sample of the server's programs now."""
    used = {}
    for name, started in up.programs.items():
        pid = started.process.pid
        children = sum(processor_s(child.pid) for child in below(pid))
        used[name] = processor_s(pid) + (children if name == "proxy" else 0.0)
        if name == "superexec":
            used["serverapp"] = children
    own = os.times()
    used["thin devices"] = own.user + own.system
    memory = process_memory_mb(up.programs["superlink"].process.pid)["rss"]
    return Sample(time.monotonic(), used, memory, counts.total())


class Watch(threading.Thread):
    """A thread that takes a sample whenever a round ends."""

    def __init__(self, up: Up, counts: Counts, log: Path) -> None:
        super().__init__(daemon=True)
        self._up, self._counts, self._log = up, counts, log
        self.rounds: list[Sample] = []
        self.over = threading.Event()

    def run(self) -> None:
        """Take samples until `over` is set."""
        while not self.over.wait(0.1):
            with suppress(OSError):
                if len(self._log.read_text().splitlines()) > len(self.rounds):
                    self.rounds.append(sampled(self._up, self._counts))


def measure(count: int, rounds: int, limit_s: float) -> dict[str, object]:
    """One server, `count` devices, a greeting round and `rounds` more."""
    from flwr.supernode import fleet_http_connection

    from ...common.model.adapter import shared

    counts, stop = Counts(), threading.Event()
    fleet_http_connection.FleetHttpClient = counted(counts)
    with TemporaryDirectory() as name, server_up(Path(name)) as up, ExitStack() as stack:
        folder = Path(name)
        base = str(tiny_model(folder / "model"))
        config = run_config("thin", base, count, rounds + 1)
        began = time.monotonic()
        devices = thin_devices(folder, up, count, shared(config).layout.dimension)
        enrolled = time.monotonic() - began
        threads = [
            threading.Thread(target=live, args=(device, up, counts, stop), daemon=True)
            for device in devices
        ]
        stack.callback(_ended, threads, stop)
        for thread in threads:
            thread.start()
        wait_for(lambda: _online(up) >= count, 60 + count, f"{count} devices")
        time.sleep(60)  # a minute later a device that nobody asks is at its slowest
        before = sampled(up, counts)
        time.sleep(IDLE_S)
        after = sampled(up, counts)
        records, ends = _watched(up, config, counts, limit_s)
        database = sum(part.stat().st_size for part in up.server.folder.glob("state.sqlite*"))
        return {
            **_per_round(count, ends, records[1:]),
            **_idle(before, after),
            "load": os.getloadavg()[0],
            "database_mb": database / 2**20,
            "enrol_s": enrolled,
            "greeting_s": records[0]["seconds"],
            "superlink_mb": process_memory_mb(up.programs["superlink"].process.pid)["rss"],
            "idle_superlink_mb": before.memory,
        }


def _watched(
    up: Up, config: Config, counts: Counts, limit_s: float
) -> tuple[list[RoundRecord], list[Sample]]:
    """Run to the end; return the records of the rounds, and a sample at the end of each."""
    watch = Watch(up, counts, up.server.folder / "runs" / config.name / "rounds.jsonl")
    watch.start()
    try:
        return followed(up, config, limit_s), watch.rounds
    finally:
        watch.over.set()
        for line in counts.failed[:3]:
            print(line, file=sys.stderr)


def _ended(threads: Sequence[threading.Thread], stop: threading.Event) -> None:
    stop.set()
    for thread in threads:
        thread.join(20)


def _online(up: Up) -> int:
    time.sleep(1)
    return sum(node.status == "online" for node in control.nodes(up.server))


def _per_round(
    count: int, ends: Sequence[Sample], records: Sequence[RoundRecord]
) -> dict[str, object]:
    first, last, rounds = ends[0], ends[len(records)], len(records)
    requests, sent, received = (
        (b - a) / rounds for a, b in zip(first.counted, last.counted, strict=True)
    )
    phases = {name: sum(record["phases"][name] for record in records) / rounds for name in PHASES}
    return {
        "devices": count,
        "answered": [record["answered"] for record in records],
        "round_s": sum(record["seconds"] for record in records) / rounds,
        "phases": phases,
        "used_s": {name: (last.used[name] - first.used[name]) / rounds for name in first.used},
        "requests": requests,
        "sent_kb": sent / count / 1000,
        "received_kb": received / count / 1000,
    }


def _idle(before: Sample, after: Sample) -> dict[str, object]:
    seconds = after.moment - before.moment
    return {
        "idle_requests_s": (after.counted[0] - before.counted[0]) / seconds,
        "idle_superlink": (after.used["superlink"] - before.used["superlink"]) / seconds,
    }


def main(
    counts: str = "10,50,100,250", rounds: int = 2, limit: float = 1800.0
) -> dict[str, object]:
    """What grows with the number of devices; `limit`: seconds for one run."""
    rows = []
    for count in map(int, counts.split(",")):
        rows.append(measure(count, rounds, limit))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return {"runs": rows}


if __name__ == "__main__":
    command(main)
