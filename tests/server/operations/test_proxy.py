"""What gets through the proxy, over real TLS on loopback: SuperLink, nginx and SuperNodes.

Each refusal has its contrast: the same call succeeds on the inner port, or with the right key.
"""

import datetime
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from privet.common.errors import StateError
from privet.common.secure_aggregation.keys import Identity
from privet.server.operations import commands, control, enrolment, proxy, services, setup
from privet.server.operations.server_folder import Server

from ...fleet import answers, free_ports, until
from ...nginx import find_or_fetch_nginx

DAY = datetime.timedelta(days=1)
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Up:
    """A running server."""

    server: Server
    nginx: Path
    supervisor: int


@pytest.fixture(scope="module")
def nginx() -> Path:
    found = find_or_fetch_nginx()
    if found is None:
        pytest.skip("there is no nginx, and none could be fetched")
    return found


@pytest.fixture(scope="module")
def up(nginx: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """SuperLink and proxy, as `privet server up` runs them, without the SuperExec."""
    outer, inner = free_ports(2)
    folder = tmp_path_factory.mktemp("proxy") / "a server"
    server = setup.init(folder, ["localhost"], port=outer, inner_port=inner)
    code = (
        "import sys; from pathlib import Path\n"
        "from privet.common.child_processes import stop_on_signals, supervise\n"
        "from privet.server.operations import commands, services, setup\n"
        "programs = services.programs(setup.load(Path(sys.argv[1])), Path(sys.argv[2]))\n"
        "programs = [program for program in programs if program.name != 'superexec']\n"
        "supervise(programs, stop_on_signals(), say=commands.say)"
    )
    supervisor = subprocess.Popen(
        [sys.executable, "-c", code, str(folder), str(nginx)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        until(lambda: answers(inner) and answers(outer))
        yield Up(server, nginx, supervisor.pid)
    finally:
        supervisor.send_signal(signal.SIGTERM)
        said = supervisor.communicate(timeout=300)[0]
    assert b"all children ended" in said, said


def client(port: int, authority: Path) -> Any:
    from flwr.supercore.control import ControlHttpClient

    return ControlHttpClient.from_server_address(
        f"127.0.0.1:{port}", False, authority.read_bytes(), []
    )


def node_key(path: Path) -> str:
    """A SuperNode's key: the private half to `path`, the public half returned."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = serialization.PrivateFormat.OpenSSH
    pem = serialization.Encoding.PEM
    path.write_bytes(key.private_bytes(pem, private, serialization.NoEncryption()))
    public = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_key().public_bytes(pem, public).decode()


def card(folder: Path, number: int) -> Path:
    content = {
        "privet": version("privet"),
        "identity": Identity.of(bytes([number]) * 32).public.hex(),
        "node": node_key(folder / f"{number}.key"),
        "name": f"device {number}",
    }
    path = folder / f"{number}.json"
    path.write_text(json.dumps(content))
    return path


def supernode(folder: Path, port: int, authority: Path, key: Path) -> "subprocess.Popen[str]":
    """Started; it ends by itself where it cannot join."""
    (own,) = free_ports(1)
    variables = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    return subprocess.Popen(
        [
            str(BIN / "flower-supernode"), "--root-certificates", str(authority),
            "--superlink", f"localhost:{port}", "--auth-supernode-private-key", str(key),
            "--isolation", "process", "--max-retries", "0",
            "--host", "127.0.0.1", "--port", str(own),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **variables, "FLWR_HOME": str(folder / "flwr")},
    )  # fmt: skip


def activate(up: Up, key: Path) -> int:
    """What a SuperNode says first; its node id."""
    from flwr.proto.fleet_pb2 import ActivateNodeRequest
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    private = serialization.load_ssh_private_key(key.read_bytes(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    fleet = FleetHttpClient.from_server_address(
        f"localhost:{up.server.port}",
        False,
        (up.server.folder / "ca.crt").read_bytes(),
        [NodeAuthHttpInterceptor(private, private.public_key())],
    )
    public = serialization.PublicFormat.SubjectPublicKeyInfo
    named = private.public_key().public_bytes(serialization.Encoding.PEM, public)
    request = ActivateNodeRequest(public_key=named, heartbeat_interval=30)
    return int(fleet.ActivateNode(request).node_id)


def ended(process: "subprocess.Popen[str]") -> str:
    """What a SuperNode said that had to give up."""
    try:
        said = process.communicate(timeout=600)[0]
    finally:
        process.kill()
        process.wait()
    assert process.returncode != 0, said
    return said


def calls() -> Mapping[str, Callable[[Any], Any]]:
    """What nobody may do from outside."""
    from flwr.common.serde import fab_to_proto
    from flwr.proto.control_pb2 import (
        ListNodesRequest,
        ListRunsRequest,
        RegisterNodeRequest,
        StartRunRequest,
    )
    from flwr.supercore.fab import Fab

    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    public = serialization.PublicFormat.SubjectPublicKeyInfo
    register = RegisterNodeRequest(
        public_key=key.public_bytes(serialization.Encoding.PEM, public), name="intruder"
    )
    start = StartRunRequest(fab=fab_to_proto(Fab("0", control.bundle(), {})))
    return {
        "registering a node": lambda api: api.RegisterNode(register),
        "starting a run": lambda api: api.StartRun(start),
        "listing runs": lambda api: api.ListRuns(ListRunsRequest()),
        "listing nodes": lambda api: api.ListNodes(ListNodesRequest()),
    }


@pytest.mark.parametrize(
    "what", ["registering a node", "starting a run", "listing runs", "listing nodes"]
)
def test_from_outside_with_the_ca_certificate_the_control_api_is_not_there(
    up: Up, what: str
) -> None:
    call = calls()[what]
    outside = client(up.server.port, up.server.folder / "ca.crt")
    with pytest.raises(httpx.HTTPStatusError) as refused:
        call(outside)
    assert refused.value.response.status_code == 404
    assert refused.value.response.headers["server"] == "nginx"
    call(client(up.server.inner_port, up.server.certificate("internal-ca.crt")))


def test_a_device_s_ca_certificate_does_not_open_the_inner_port(up: Up) -> None:
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        calls()["listing runs"](client(up.server.inner_port, up.server.folder / "ca.crt"))


def test_the_inner_port_answers_on_loopback_only(up: Up) -> None:
    hexadecimal = f"{up.server.inner_port:04X}"
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening = [w[1] for w in lines if w[3] == "0A" and w[1].endswith(f":{hexadecimal}")]
    assert listening == [f"0100007F:{hexadecimal}"]


def spoken(up: Up, request: bytes) -> bytes:
    """The first line of the answer to bytes sent over TLS."""
    context = ssl.create_default_context(cafile=str(up.server.folder / "ca.crt"))
    with (
        socket.create_connection(("127.0.0.1", up.server.port), timeout=120) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secure,
    ):
        secure.sendall(request)
        return secure.recv(65536).partition(b"\r\n")[0]


ODD_PATHS = (
    "/", "/docs", "/openapi.json", "/health", "/v1/fleet", "/v1/fleet/", "/v1/fleet/register-node",
    "/v1/fleet/unregister-node", "/v1/runtime/acquire-task", "/v1/control/list-runs",
    "//v1/control/list-runs", "/v1/fleet/../control/list-runs", "/v1/fleet/..%2fcontrol/list-runs",
    "/v1/fleet/%2e%2e/control/list-runs", "/v1/fleet/pull-messages/../../control/list-runs",
    "/v1/control/list-runs?/v1/fleet/get-run", "/v1/control/list-runs;/v1/fleet/get-run",
    "/V1/FLEET/GET-RUN", "/v1/fleet/get-run/", "/v1/fleet/get-run%00",
)  # fmt: skip


@pytest.mark.parametrize("path", ODD_PATHS)
def test_no_spelling_of_another_path_reaches_the_superlink(up: Up, path: str) -> None:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"
    assert spoken(up, head.encode()).split()[1] in (b"404", b"400")


# nginx reads the Fleet path; with the raw path sent on, the SuperLink would read another one
TIDIED = (
    "POST /v1/control/list-runs/../../fleet/get-run HTTP/1.1\r\nHost: localhost\r\n"
    "Content-Length: 0\r\nContent-Type: application/x-protobuf\r\n\r\n"
)


def test_a_path_the_proxy_would_tidy_up_is_sent_on_as_the_constant(up: Up) -> None:
    assert spoken(up, TIDIED.encode()).split()[1] in (b"401", b"415")  # Fleet's own refusals


def test_a_proxy_that_passes_paths_on_as_they_came_is_caught_by_these_tests(
    up: Up, tmp_path: Path
) -> None:
    (port,) = free_ports(1)
    server = setup.init(
        tmp_path / "faulty", ["localhost"], port=port, inner_port=up.server.inner_port
    )
    inner = server.certificate("internal-ca.crt")
    inner.write_bytes(up.server.certificate("internal-ca.crt").read_bytes())
    path = server.folder / "nginx.conf"
    rules = [rule for rule in path.read_text().splitlines() if "location = " not in rule]
    raw = [f"location = {fleet} {{ proxy_pass https://superlink; }}" for fleet in proxy.FLEET_PATHS]
    for rule in ("location /v1/ { proxy_pass https://superlink; }", "\n".join(raw)):
        faulty = [f"{rule}\n{line}" if "location / " in line else line for line in rules]
        path.write_text("\n".join(faulty))
        running = subprocess.Popen(services.commands(server, up.nginx)["proxy"])
        try:
            until(lambda: answers(port))
            if "= " in rule:
                odd = Up(server, up.nginx, 0)
                assert spoken(odd, TIDIED.encode()).split()[1] == b"404"  # of another path
            else:
                calls()["listing runs"](client(port, server.folder / "ca.crt"))
        finally:
            running.terminate()
            running.wait()
        until(lambda: not answers(port))


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "CONNECT"])
def test_other_methods_than_post_are_refused(up: Up, method: str) -> None:
    head = f"{method} /v1/fleet/pull-messages HTTP/1.1\r\nHost: localhost\r\n\r\n"
    assert spoken(up, head.encode()).split()[1] in (b"403", b"400", b"405")


def test_a_body_that_needs_a_file_gets_through_and_one_that_is_too_large_does_not(up: Up) -> None:
    context = ssl.create_default_context(cafile=str(up.server.folder / "ca.crt"))
    with httpx.Client(verify=context, base_url=f"https://localhost:{up.server.port}") as web:
        for megabytes, code in ((20, (401, 415)), (65, (413,))):
            answer = web.post("/v1/fleet/push-object", content=bytes(megabytes << 20))
            assert answer.status_code in code


@pytest.mark.filterwarnings("ignore:ssl:DeprecationWarning")
@pytest.mark.parametrize(
    ("highest", "taken"),
    [
        (ssl.TLSVersion.TLSv1_1, False),
        (ssl.TLSVersion.TLSv1_2, False),
        (ssl.TLSVersion.TLSv1_3, True),
    ],
)
def test_a_downgraded_tls_version_is_refused(up: Up, highest: ssl.TLSVersion, taken: bool) -> None:
    context = ssl.create_default_context(cafile=str(up.server.folder / "ca.crt"))
    context.set_ciphers("ALL:@SECLEVEL=0")  # so that it is the server that refuses TLS 1.1
    context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1_1, highest
    with socket.create_connection(("127.0.0.1", up.server.port), timeout=120) as plain:
        if taken:
            with context.wrap_socket(plain, server_hostname="localhost") as secure:
                assert secure.version() == "TLSv1.3"
        else:
            with pytest.raises(ssl.SSLError, match=r"(?i)protocol.version"):
                context.wrap_socket(plain, server_hostname="localhost")


def test_a_node_joins_with_an_enrolled_key_and_not_without(up: Up, tmp_path: Path) -> None:
    path = card(tmp_path, 1)
    enrolment.enrol(up.server, [path], lambda _: None)
    node_key(tmp_path / "stranger.key")
    authority = up.server.folder / "ca.crt"
    known = supernode(tmp_path, up.server.port, authority, tmp_path / "1.key")
    stranger = supernode(tmp_path, up.server.port, authority, tmp_path / "stranger.key")
    try:
        until(lambda: commands.facts(up.server)["devices"]["online"] == 1)
        assert "connection to the SuperLink" in ended(stranger)
        assert known.poll() is None
        with pytest.raises(StateError, match="refused"), control.control(up.server) as connected:
            control.register(
                connected, enrolment.devices(up.server)[0].card.node, "again"
            )  # its key is taken
        enrolment.remove(up.server, [str(path)], lambda _: None)
    finally:
        for process in (known, stranger):
            process.kill()
            process.communicate()
    with pytest.raises(httpx.HTTPStatusError):
        activate(up, tmp_path / "1.key")
    nobody = {"enrolled": 0, "registered": 0, "online": 0, "each": []}
    assert commands.facts(up.server)["devices"] == nobody


@pytest.fixture
def pretenders(up: Up, tmp_path: Path) -> Iterator[Mapping[str, tuple[Server, Path]]]:
    """Proxies with a wrong certificate each, and the CA that their devices were given."""
    now = datetime.datetime.now(datetime.UTC)
    made: dict[str, tuple[Server, Path]] = {}
    for name, port in zip(("another", "expired", "not yet"), free_ports(3), strict=True):
        when = now - 30 * DAY if name == "expired" else now
        folder = tmp_path / name
        server = setup.init(
            folder, ["localhost"], port=port, inner_port=up.server.inner_port, days=10, now=when
        )
        made[name] = server, server.folder / "ca.crt"
    made["another"] = made["another"][0], up.server.folder / "ca.crt"
    setup.renew(made["not yet"][0].folder, now=now + 2 * DAY)
    running = [
        subprocess.Popen(services.commands(server, up.nginx)["proxy"])
        for server, _ in made.values()
    ]
    try:
        until(lambda: all(answers(server.port) for server, _ in made.values()))
        yield made
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


def test_a_node_refuses_another_server_and_certificates_out_of_their_time(
    pretenders: Mapping[str, tuple[Server, Path]], tmp_path: Path
) -> None:
    node_key(tmp_path / "key")
    nodes = {
        name: supernode(tmp_path, server.port, authority, tmp_path / "key")
        for name, (server, authority) in pretenders.items()
    }
    said = {name: ended(process) for name, process in nodes.items()}
    assert "certificate verify failed" in said["another"]
    assert "certificate has expired" in said["expired"]
    assert "certificate is not yet valid" in said["not yet"]
    # the contrast: renewed, the same certificates are taken
    server, authority = pretenders["expired"]
    setup.renew(server.folder)
    pid = int((server.folder / "nginx" / "nginx.pid").read_text())
    os.kill(pid, signal.SIGHUP)
    context = ssl.create_default_context(cafile=str(authority))
    until(lambda: taken(context, server.port))


def taken(context: ssl.SSLContext, port: int) -> bool:
    try:
        with (
            socket.create_connection(("127.0.0.1", port), timeout=120) as plain,
            context.wrap_socket(plain, server_hostname="localhost"),
        ):
            return True
    except ssl.SSLCertVerificationError:
        return False


def test_a_superlink_that_is_killed_comes_back_with_its_nodes(up: Up, tmp_path: Path) -> None:
    enrolment.enrol(up.server, [card(tmp_path, 3)], lambda _: None)
    before = commands.facts(up.server)["devices"]["registered"]
    children = Path(f"/proc/{up.supervisor}/task/{up.supervisor}/children").read_text().split()
    (superlink,) = [
        int(pid) for pid in children if b"superlink" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    os.kill(superlink, signal.SIGKILL)
    until(lambda: not answers(up.server.inner_port))
    until(lambda: answers(up.server.inner_port))
    assert commands.facts(up.server)["devices"]["registered"] == before
