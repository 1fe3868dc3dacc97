"""Flower's Control API, for the operator on the server's machine: nodes, runs, a new run.

Private to Flower 1.41: `tests/server/operations/test_proxy.py` runs it against a real SuperLink, so
that a new minor version fails loudly.
"""

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ...common.errors import StateError
from ...common.file_templates import render
from ...common.files import explain_os_errors
from .server_folder import Server

__all__ = [
    "Node",
    "Run",
    "bundle",
    "control",
    "nodes",
    "nodes_of",
    "register",
    "runs",
    "start_run",
    "stop_run",
    "unregister",
]


@dataclass(frozen=True)
class Node:
    """A SuperNode that the SuperLink knows: its id, PEM key, and `registered`, `online`, …

    `seen`: until when it is, or was, taken for online, at most now; seconds since 1970, 0: never.
    """

    node_id: int
    key: str
    status: str
    seen: float = 0.0


@dataclass(frozen=True)
class Run:
    """A run that the SuperLink knows.

    Attributes:
        run_id: Flower's.
        folder: the run folder it was started on.
        status: `pending`, `starting`, `running`, `completed`, `failed` or `stopped`.
        details: Flower's words about it.
    """

    run_id: int
    folder: str
    status: str
    details: str

    @property
    def over(self) -> bool:
        """Whether nothing more will happen."""
        return self.status in ("completed", "failed", "stopped")


@contextmanager
def control(server: Server) -> Iterator[Any]:
    """The SuperLink's Control API, over TLS with the inner CA.

    Raises:
        StateError: the SuperLink does not answer, or refuses; in its own words.
    """
    import httpx
    from flwr.supercore.control import ControlHttpClient
    from flwr.supercore.error import FlowerError
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

    authority = server.certificate("internal-ca.crt")
    with explain_os_errors(authority, "read"):
        roots = authority.read_bytes()
    client = ControlHttpClient.from_server_address(
        server.inner, False, roots, [RuntimeVersionHttpInterceptor(component_name="privet server")]
    )
    try:
        yield client
    except httpx.HTTPStatusError as error:
        told = FlowerError.from_json(error.response.text)
        reason = told.message if told else error
        raise StateError(f"the SuperLink at {server.inner} refused: {reason}") from None
    except httpx.RequestError as error:
        raise StateError(
            f"the SuperLink does not answer at {server.inner} ({error}); start it with `privet "
            f"server up {server.folder}`, or its systemd unit, and run this again"
        ) from None
    finally:
        client.close()


def nodes(server: Server) -> Sequence[Node]:
    """All SuperNodes that are registered and not removed.

    Raises:
        StateError: as `control`.
    """
    with control(server) as client:
        return nodes_of(client)


def nodes_of(client: Any) -> Sequence[Node]:
    """List the SuperNodes as `nodes` does, over a connection that is open."""
    from flwr.proto.control_pb2 import ListNodesRequest

    answer = client.ListNodes(ListNodesRequest())
    return [
        Node(node.node_id, node.public_key.decode(), node.status, _seen(node))
        for node in answer.nodes_info
        if node.status != "unregistered"
    ]


def _seen(node: Any) -> float:
    """Return when a node was last there, in seconds since 1970.

    A node that leaves says so. One that is killed is missed when its time is over.
    """
    times = [time.time()] if node.status == "online" else []
    with suppress(ValueError):
        for text in () if times else (node.last_deactivated_at, node.online_until):
            times += [datetime.fromisoformat(text).timestamp()] if text else []
    return min(max(times, default=0.0), time.time())


def register(client: Any, key: str, name: str) -> None:
    """Let the SuperNode with this PEM key connect."""
    from flwr.proto.control_pb2 import RegisterNodeRequest

    client.RegisterNode(RegisterNodeRequest(public_key=key.encode(), name=name))


def unregister(client: Any, node_id: int) -> None:
    """Let a SuperNode connect no more. Its key stays taken."""
    from flwr.proto.control_pb2 import UnregisterNodeRequest

    client.UnregisterNode(UnregisterNodeRequest(node_id=node_id))


def runs(server: Server) -> Sequence[Run]:
    """The last hundred runs, the newest first.

    Raises:
        StateError: as `control`.
    """
    from flwr.proto.control_pb2 import ListRunsRequest

    with control(server) as client:
        answer = client.ListRuns(ListRunsRequest(limit=100))
    newest = sorted(answer.run_dict.values(), key=lambda run: run.pending_at, reverse=True)
    return [
        Run(
            run.run_id,
            run.override_config["run"].string,
            run.status.sub_status or run.status.status,
            run.status.details,
        )
        for run in newest
        if "run" in run.override_config
    ]


def start_run(server: Server, folder: Path) -> int:
    """Start a run on a run folder, with the ServerApp that is installed here.

    Returns:
        Flower's id of the run.

    Raises:
        StateError: as `control`.
    """
    from flwr.common.serde import fab_to_proto, user_config_to_proto
    from flwr.proto.control_pb2 import StartRunRequest
    from flwr.supercore.fab import Fab

    content = bundle()
    fab = fab_to_proto(Fab(hashlib.sha256(content).hexdigest(), content, {}))
    settings = user_config_to_proto({"run": str(folder)})
    with control(server) as client:
        answer = client.StartRun(StartRunRequest(fab=fab, override_config=settings))
    if not answer.HasField("run_id"):
        raise StateError(f"the SuperLink at {server.inner} did not start the run; see its log")
    return int(answer.run_id)


def bundle() -> bytes:
    """Make the bundle that Flower wants of a run.

    It names the two apps and holds no code of theirs: a device runs what it has installed.
    """
    from flwr.cli.build import build_fab_from_files

    project = render(__package__, "bundle.toml", version=version("privet"))
    content, _ = build_fab_from_files({"pyproject.toml": project.encode()})
    return bytes(content)


def stop_run(server: Server, run: int) -> None:
    """Tell the SuperLink that a run is over, which may know it already.

    Raises:
        StateError: as `control`.
    """
    from flwr.proto.control_pb2 import StopRunRequest

    if any(one.run_id == run and not one.over for one in runs(server)):
        with control(server) as client:
            client.StopRun(StopRunRequest(run_id=run))
