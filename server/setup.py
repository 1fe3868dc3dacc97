"""A server's folder: certificates, the proxy's configuration, commands, systemd units.

    FOLDER/                 0700; every file 0600
      README.md             the steps, in order
      server.json           hosts and ports
      ca.crt                what devices are given and trust
      ca/ca.key             signs what devices trust; is moved away from this machine
      certificates -> certificates.N/   one rename changes them all
        server.crt server.key           the proxy shows these to devices
        internal-ca.crt internal.crt internal.key    proxy -> SuperLink, on this machine only
      superexec.secret      who may take server tasks from the SuperLink
      nginx.conf nginx/     the proxy, without root
      flwr/config.toml      FLWR_HOME: the `flwr` command finds the SuperLink
      systemd/              three units
      directory             client number and identity of every enrolled device
      devices.json runs/ logs/ state.sqlite

Flower 1.41 serves Fleet, Control and Runtime API on one port, and the Control API asks nobody who
they are. So the SuperLink listens on the loopback interface only, and the proxy is the one way in.

**Guarantee**: a request from outside reaches the SuperLink at one of the constant paths of
`FLEET_PATHS`, by POST, over TLS 1.3, or not at all: each path is an exact match and is sent on as
a constant of its own, so that no spelling (dots, encoded slashes, fragments) that proxy and
SuperLink read differently can name another one. A person with a login on the server machine is
inside: who must not start runs must not have one.
"""

import datetime
import ipaddress
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ..common.errors import AssetError, ConfigError, RunExists, StateError
from ..common.files import explain_os_errors, sync_folder

__all__ = [
    "FLEET_PATHS",
    "Server",
    "certified_until",
    "commands",
    "environment",
    "find_nginx",
    "find_or_fetch_nginx",
    "init",
    "load",
    "renew",
]

# What a SuperNode of flwr 1.41 with a registered key calls, read off
# flwr/supernode/fleet_http_connection.py (all of them POST). `register-node` and
# `unregister-node` are of SuperNodes that register themselves, which the SuperLink refuses.
FLEET_PATHS = (
    "/v1/fleet/activate-node",
    "/v1/fleet/deactivate-node",
    "/v1/fleet/send-node-heartbeat",
    "/v1/fleet/pull-messages",
    "/v1/fleet/push-messages",
    "/v1/fleet/get-run",
    "/v1/fleet/get-fab",
    "/v1/fleet/pull-object",
    "/v1/fleet/push-object",
    "/v1/fleet/confirm-message-received",
)

FORMAT = 1
FACTS = "server.json"
CERTIFICATES = "certificates"
ALWAYS = ("localhost", "127.0.0.1", "::1")
CA_DAYS = 3650
CLOCKS_DIFFER = datetime.timedelta(hours=1)

_DNS = re.compile(
    r"(\*\.)?([A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)*"
    r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
)


@dataclass(frozen=True)
class Server:
    """A server's folder and what was chosen when it was made.

    Attributes:
        folder: absolute.
        hosts: names and addresses in the server's certificate.
        port: the proxy's, seen from outside.
        inner_port: the SuperLink's, on 127.0.0.1 only.
    """

    folder: Path
    hosts: tuple[str, ...]
    port: int
    inner_port: int

    @property
    def inner(self) -> str:
        """Address of the SuperLink on this machine."""
        return f"127.0.0.1:{self.inner_port}"

    def certificate(self, name: str) -> Path:
        """Path of a current certificate or key."""
        return self.folder / CERTIFICATES / name


def init(
    folder: Path,
    hosts: Sequence[str],
    *,
    port: int = 9092,
    inner_port: int = 9093,
    days: int = 365,
    now: datetime.datetime | None = None,
) -> Server:
    """Make a server's folder, whole or not at all.

    Args:
        folder: must not exist, or be empty.
        hosts: names and addresses under which devices reach the server.
        port: the proxy's.
        inner_port: the SuperLink's, on loopback.
        days: how long the server's certificates hold; the CA's holds 3,650.
        now: tests only; certificates hold from an hour earlier, since clocks differ.

    Raises:
        RunExists: the folder holds something; nothing was overwritten.
        ConfigError: no host, a host that is no name or address, equal ports, days below 1.
        StateError: the disk.
    """
    folder = folder.absolute()
    server = Server(folder, _checked(hosts), port, inner_port)
    _refuse_wrong_numbers(server, days)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunExists(
            f"{folder} exists already and nothing in it was changed; choose another folder, or "
            "make new certificates for it with --renew"
        )
    partial = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
    now = now or datetime.datetime.now(datetime.UTC)
    try:
        with explain_os_errors(folder, "make the server's folder"):
            folder.parent.mkdir(parents=True, exist_ok=True)
            _fill(partial, server, days, now)
            os.replace(partial, folder)
            sync_folder(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return server


def renew(
    folder: Path,
    hosts: Sequence[str] = (),
    *,
    days: int = 365,
    ca_key: Path | None = None,
    now: datetime.datetime | None = None,
) -> Server:
    """New certificates and keys of the server, all changed by one rename; devices keep their CA.

    Args:
        folder: made by `init`.
        hosts: names and addresses from now on; empty: as they were.
        days: how long the new ones hold.
        ca_key: where the CA's key is kept now; None: where `init` put it.
        now: tests only.

    Raises:
        StateError: no server's folder, the CA's key is not there or belongs to another CA.
        ConfigError: as `init`.
    """
    server = load(folder)
    server = Server(
        server.folder, _checked(hosts) if hosts else server.hosts, server.port, server.inner_port
    )
    _refuse_wrong_numbers(server, days)
    authority = _authority(server, ca_key or server.folder / "ca" / "ca.key")
    now = now or datetime.datetime.now(datetime.UTC)
    with explain_os_errors(server.folder, "renew the certificates of"):
        link = server.folder / CERTIFICATES
        before = os.readlink(link)
        following = f"{CERTIFICATES}.{int(before.rpartition('.')[2]) + 1}"
        shutil.rmtree(server.folder / following, ignore_errors=True)  # of a renewal cut short
        _write_certificates(server.folder / following, server.hosts, authority, days, now)
        fresh = server.folder / f".{CERTIFICATES}.link"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(following)
        os.replace(fresh, link)
        _put(server.folder / f".{FACTS}", _facts(server))
        os.replace(server.folder / f".{FACTS}", server.folder / FACTS)
        sync_folder(server.folder)
        shutil.rmtree(server.folder / before, ignore_errors=True)
    return server


def load(folder: Path) -> Server:
    """The server of a folder that `init` made.

    Raises:
        StateError: it is none, damaged, or of a newer privet.
    """
    path = folder.absolute() / FACTS
    if not path.is_file():
        raise StateError(
            f"{folder} is no server's folder: expected {FACTS} in it; make one with "
            "`privet server init FOLDER --host NAME`"
        )
    try:
        with explain_os_errors(path, "read"):
            facts = json.loads(path.read_bytes())
        kind, hosts = facts["format"], tuple(map(str, facts["hosts"]))
        ports = int(facts["port"]), int(facts["inner_port"])
    except (ValueError, KeyError, TypeError) as error:
        raise StateError(f"{path} is damaged ({error}); restore it from a copy") from None
    if kind != FORMAT:
        raise StateError(
            f"{path} has format {kind}, this privet reads format {FORMAT}; use the privet that "
            "wrote it"
        )
    return Server(path.parent, hosts, *ports)


def commands(server: Server, nginx: Path | None = None) -> Mapping[str, tuple[str, ...]]:
    """What runs, as argument lists for no shell: `superlink`, `superexec`, `proxy`.

    They need `environment`. SuperLink and SuperExec are separate, so that a SuperLink that is
    killed in the middle of a round and started again finishes the run.
    """
    at = server.certificate
    secret = ("--superexec-auth-secret-file", str(server.folder / "superexec.secret"))
    superlink = (
        _program("flower-superlink"), "--host", "127.0.0.1", "--port", str(server.inner_port),
        "--ssl-certfile", str(at("internal.crt")), "--ssl-keyfile", str(at("internal.key")),
        "--ssl-ca-certfile", str(at("internal-ca.crt")), "--enable-supernode-auth",
        "--isolation", "process", "--database", str(server.folder / "state.sqlite"),
        "--disable-runtime-dependency-installation", *secret,
    )  # fmt: skip
    superexec = (
        _program("flower-superexec"), "--runtime-api-address", server.inner,
        "--root-certificates", str(at("internal-ca.crt")), *secret,
    )  # fmt: skip
    proxy = (
        str(nginx or find_nginx() or "/usr/sbin/nginx"), "-p", f"{server.folder}/",
        "-c", str(server.folder / "nginx.conf"), "-e", str(server.folder / "nginx" / "error.log"),
    )  # fmt: skip
    return {"superlink": superlink, "superexec": superexec, "proxy": proxy}


def environment(server: Server) -> Mapping[str, str]:
    """Variables that `commands` need on top of the caller's.

    `PATH` because the SuperExec starts `flwr-serverapp` by name.
    """
    return {
        "FLWR_HOME": str(server.folder / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
        "OMP_WAIT_POLICY": "PASSIVE",
        "PATH": os.pathsep.join([str(_bin()), os.environ.get("PATH", os.defpath)]),
    }


def certified_until(server: Server) -> datetime.datetime:
    """When the first of the server's certificates runs out.

    Raises:
        StateError: a certificate is missing or damaged.
    """
    ends = []
    for name in ("server.crt", "internal.crt"):
        path = server.certificate(name)
        with explain_os_errors(path, "read"):
            data = path.read_bytes()
        try:
            ends.append(x509.load_pem_x509_certificate(data).not_valid_after_utc)
        except ValueError:
            raise StateError(
                f"{path} is no certificate; make new ones: privet server init --renew"
            ) from None
    return min(ends)


def find_nginx(cache: Path | None = None) -> Path | None:
    """nginx on PATH, in /usr/sbin, or fetched into `cache` before; None where there is none."""
    named = shutil.which("nginx")
    places = [Path(named)] if named else []
    places.append(Path("/usr/sbin/nginx"))
    if cache is not None:
        places.append(cache / "nginx" / "usr" / "sbin" / "nginx")
    return next((place for place in places if os.access(place, os.X_OK)), None)


def find_or_fetch_nginx(cache: Path) -> Path:
    """`find_nginx`, or Debian's package unpacked below `cache`: no root, nothing installed.

    apt checks the package's signature chain as it does for an installation.

    Raises:
        AssetError: there is none, and it could not be fetched.
    """
    found = find_nginx(cache)
    if found:
        return found
    partial = cache / f".nginx.{secrets.token_hex(4)}"
    try:
        with explain_os_errors(cache, "unpack nginx into"):
            partial.mkdir(parents=True)
            _call(["apt-get", "download", "nginx"], partial)
            for package in sorted(partial.glob("*.deb")):
                _call(["dpkg", "-x", str(package), "."], partial)
                package.unlink()
            if (cache / "nginx").exists():
                shutil.rmtree(cache / "nginx")
            os.replace(partial, cache / "nginx")
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    found = find_nginx(cache)
    if found is None:
        raise AssetError("the package nginx has no usr/sbin/nginx; install nginx yourself")
    _call([str(found), "-v"], cache)  # its libraries are there
    return found


def _call(command: Sequence[str], folder: Path) -> None:
    advice = "install it: sudo apt install nginx (or your system's package of that name)"
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise AssetError(f"nginx could not be fetched ({command[0]}: {error}); {advice}") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise AssetError(f"nginx could not be fetched ({command[0]}: {last}); {advice}")


def _fill(partial: Path, server: Server, days: int, now: datetime.datetime) -> None:
    """All files of a new folder, laid down beside its final place."""
    for name in ("", "ca", "nginx", "flwr", "systemd", "runs", "logs"):
        (partial / name).mkdir(mode=0o700)
    authority = _new_authority(f"privet CA of {server.hosts[0]}", CA_DAYS, now)
    _put(partial / "ca" / "ca.key", _pem(authority.key))
    _put(partial / "ca.crt", _pem(authority.certificate))
    _write_certificates(partial / f"{CERTIFICATES}.1", server.hosts, authority, days, now)
    (partial / CERTIFICATES).symlink_to(f"{CERTIFICATES}.1")
    _put(partial / "superexec.secret", secrets.token_hex(32).encode())
    _put(partial / FACTS, _facts(server))
    _put(partial / "directory", b"")
    _put(partial / "nginx.conf", _nginx(server).encode())
    _put(partial / "flwr" / "config.toml", _connection(server).encode())
    for name, text in _units(server).items():
        _put(partial / "systemd" / name, text.encode())
    _put(partial / "README.md", _readme(server).encode())


def _put(path: Path, data: bytes) -> None:
    """A file that nobody else could read at any moment."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(handle)


def _facts(server: Server) -> bytes:
    facts = {
        "format": FORMAT,
        "hosts": list(server.hosts),
        "port": server.port,
        "inner_port": server.inner_port,
    }
    return (json.dumps(facts, indent=2) + "\n").encode()


@dataclass(frozen=True)
class _Authority:
    """A certificate and the key that signs with it."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    def __repr__(self) -> str:
        return f"_Authority({self.certificate.subject.rfc4514_string()})"


def _write_certificates(
    folder: Path, hosts: Iterable[str], authority: _Authority, days: int, now: datetime.datetime
) -> None:
    """The server's certificate, and one for the hop behind it.

    The inner hop has a CA of its own whose key is never stored: the CA that devices are given
    says nothing about who may speak to the SuperLink.
    """
    folder.mkdir(mode=0o700)
    inner = _new_authority("privet inner CA", days, now)
    outer_hosts = dict.fromkeys((*hosts, *ALWAYS))
    for name, signer, names in (
        ("server", authority, tuple(outer_hosts)),
        ("internal", inner, ALWAYS),
    ):
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _leaf(key.public_key(), names, signer, days, now)
        _put(folder / f"{name}.key", _pem(key))
        _put(folder / f"{name}.crt", _pem(certificate))
    _put(folder / "internal-ca.crt", _pem(inner.certificate))
    sync_folder(folder)


def _new_authority(name: str, days: int, now: datetime.datetime) -> _Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _name(name)
    usage = _usage(sign_certificates=True)
    certificate = (
        _begun(subject, subject, key.public_key(), days, now)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )
    return _Authority(certificate, key)


def _leaf(
    public: ec.EllipticCurvePublicKey,
    hosts: Sequence[str],
    signer: _Authority,
    days: int,
    now: datetime.datetime,
) -> x509.Certificate:
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.key.public_key())
    return (
        _begun(_name(f"privet {hosts[0]}"), signer.certificate.subject, public, days, now)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(sign_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_alternative(h) for h in hosts]), False)
        .add_extension(issuer, critical=False)
        .sign(signer.key, hashes.SHA256())
    )


def _begun(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    days: int,
    now: datetime.datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCKS_DIFFER)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(thing: x509.Certificate | ec.EllipticCurvePrivateKey) -> bytes:
    if isinstance(thing, x509.Certificate):
        return thing.public_bytes(serialization.Encoding.PEM)
    return thing.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _authority(server: Server, path: Path) -> _Authority:
    """The CA whose certificate devices have."""
    if not path.is_file():
        raise StateError(
            f"the CA's key is not at {path}; put it back for a moment, or say where it is with "
            "--ca-key PATH"
        )
    with explain_os_errors(path, "read"):
        data = path.read_bytes()
    certificate_path = server.folder / "ca.crt"
    with explain_os_errors(certificate_path, "read"):
        certificate_data = certificate_path.read_bytes()
    try:
        key = serialization.load_pem_private_key(data, None)
        certificate = x509.load_pem_x509_certificate(certificate_data)
    except (ValueError, TypeError):
        raise StateError(
            f"{path} and {certificate_path} should be an unencrypted private key and a "
            "certificate, both PEM; restore them from a copy"
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or (
        key.public_key() != certificate.public_key()
    ):
        raise StateError(f"{path} is the key of another CA than {certificate_path}; give its own")
    return _Authority(certificate, key)


def _checked(hosts: Sequence[str]) -> tuple[str, ...]:
    for host in hosts:
        try:
            ipaddress.ip_address(host)
        except ValueError:
            # all digits and dots is an address with a mistake in it, never a name
            digits = not host.strip("0123456789.")
            if digits or len(host) > 253 or not _DNS.fullmatch(host):
                raise ConfigError(
                    f"--host {host!r}: expected a name such as privet.example.org, or an IP "
                    "address, without a port or https://"
                ) from None
    if not hosts:
        raise ConfigError("expected at least one --host: the name under which devices reach you")
    return tuple(dict.fromkeys(hosts))


def _refuse_wrong_numbers(server: Server, days: int) -> None:
    ports = (server.port, server.inner_port)
    if not all(1 <= port <= 65535 for port in ports) or ports[0] == ports[1]:
        raise ConfigError(
            f"--port {ports[0]} and --inner-port {ports[1]}: expected two different numbers from "
            "1 to 65535"
        )
    if not 1 <= days <= CA_DAYS:
        raise ConfigError(f"--days {days}: expected 1 to {CA_DAYS}")
    if '"' in str(server.folder) or any(ord(letter) < 32 for letter in str(server.folder)):
        raise ConfigError(
            f"the folder's path {str(server.folder)!r} has a quote or a control character in it, "
            "which configuration files cannot carry; choose another"
        )


def _bin() -> Path:
    """Where the programs of this Python environment are."""
    return Path(sys.executable).parent


def _program(name: str) -> str:
    beside = _bin() / name
    return str(beside) if beside.exists() else (shutil.which(name) or str(beside))


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def _connection(server: Server) -> str:
    return f"""# FLWR_HOME of this server: `FLWR_HOME={server.folder}/flwr flwr ls` and the like.
[superlink]
default = "inner"

[superlink.inner]
address = "{server.inner}"
root-certificates = "{server.certificate("internal-ca.crt")}"
"""


def _nginx(server: Server) -> str:
    """The proxy. Relative paths: below FOLDER (`-p`), certificates beside this file."""
    listen = f"listen {server.port} ssl;"
    if _has_ipv6():
        listen += f"\n        listen [::]:{server.port} ssl;"
    places = "\n".join(
        f"        location = {path} {{ limit_except POST {{ deny all; }} "
        f"proxy_pass https://superlink{path}; }}"
        for path in FLEET_PATHS
    )
    # started by root, nginx would give its workers to nobody, who cannot read this folder
    account = "user root;\n" if os.getuid() == 0 else ""
    return f"""# The one way in from outside; written by `privet server init`.
daemon off;
{account}worker_processes auto;
pid nginx/nginx.pid;
error_log nginx/error.log crit;

events {{
    worker_connections 4096;
}}

http {{
    # Who connected, and when, is about people: it is not kept (error.log: crit only).
    access_log off;
    server_tokens off;
    client_body_temp_path nginx/body;
    proxy_temp_path nginx/proxy;
    fastcgi_temp_path nginx/fastcgi;
    uwsgi_temp_path nginx/uwsgi;
    scgi_temp_path nginx/scgi;

    # For each address, generous: a household or an office may share one. A device at rest asks
    # once in 3 s, one in a round some dozen times a second.
    limit_req_zone $binary_remote_addr zone=requests:10m rate=500r/s;
    limit_conn_zone $binary_remote_addr zone=connections:10m;

    upstream superlink {{
        server {server.inner};
        keepalive 32;
    }}

    server {{
        {listen}
        ssl_certificate certificates/server.crt;
        ssl_certificate_key certificates/server.key;
        ssl_protocols TLSv1.3;
        ssl_session_tickets off;

        limit_req zone=requests burst=5000 nodelay;
        limit_conn connections 2000;
        # Flower cuts arrays into pieces of 5 MiB; one masked vector travels whole.
        client_max_body_size 64m;
        client_header_timeout 10s;
        client_body_timeout 60s;
        send_timeout 60s;
        keepalive_timeout 75s;

        proxy_http_version 1.1;
        proxy_set_header Connection "";
        proxy_set_header Host $host;
        proxy_connect_timeout 5s;
        proxy_read_timeout 60s;
        proxy_ssl_verify on;
        proxy_ssl_trusted_certificate certificates/internal-ca.crt;
        proxy_ssl_name localhost;
        proxy_ssl_server_name on;
        proxy_ssl_protocols TLSv1.3;

        # Exact matches, each sent on as a constant: no spelling reaches another path.
{places}
        location / {{ return 404; }}
    }}
}}
"""


def _units(server: Server) -> Mapping[str, str]:
    """System units that run as the user who made the folder."""
    about = {
        "superlink": "privet: SuperLink (keeps nodes, messages and runs)",
        "superexec": "privet: SuperExec (starts the run's server part)",
        "proxy": "privet: proxy (the one way in from outside)",
    }
    passed = {name: value for name, value in environment(server).items() if name != "PATH"}
    passed["PATH"] = os.pathsep.join([str(_bin()), "/usr/local/bin", "/usr/bin", "/bin"])
    settings = "\n".join(
        f"Environment={_unit_word(f'{name}={value}')}" for name, value in passed.items()
    )
    after = {"superexec": "privet-superlink.service", "proxy": "privet-superlink.service"}
    found = {}
    for name, command in commands(server).items():
        needs = after.get(name)
        order = (
            f"Wants={needs}\nAfter=network-online.target {needs}"
            if needs
            else ("After=network-online.target")
        )
        reload = ""
        if name == "proxy":
            again = (*command, "-s", "reload")
            reload = f"ExecReload={' '.join(map(_unit_word, again))}\n"
        found[f"privet-{name}.service"] = f"""[Unit]
Description={about[name]}
{order}

[Service]
User={_user()}
WorkingDirectory={str(server.folder).replace("%", "%%")}
UMask=0077
{settings}
ExecStart={" ".join(map(_unit_word, command))}
{reload}Restart=always
RestartSec=2
KillSignal=SIGTERM
NoNewPrivileges=true
PrivateTmp=true
ProtectSystem=full

[Install]
WantedBy=multi-user.target
"""
    return found


def _unit_word(word: str) -> str:
    """One argument in systemd's syntax: quoted, its specifiers and variables taken as text."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"'


def _user() -> str:
    try:
        import pwd

        return pwd.getpwuid(os.getuid()).pw_name
    except (ImportError, KeyError):
        return "privet"


def _readme(server: Server) -> str:
    import shlex

    variables = {name: value for name, value in environment(server).items() if name != "PATH"}
    settings = " \\\n    ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
    lines = "\n".join(f"    {shlex.join(command)}" for name, command in commands(server).items())
    host = server.hosts[0]
    where = f"[{host}]" if ":" in host else host
    folder = shlex.quote(str(server.folder))
    return f"""# A privet server

Made by `privet server init`. The folder is for you alone (0700) and must stay at this path; back
it up as a whole while nothing runs.

1. **Move `ca/` away from this machine** (a USB stick in a drawer, a password manager). Who has
   `ca/ca.key` can pretend to be this server to every device. It is needed once a year:
   `privet server init {folder} --renew --ca-key /mnt/stick/ca.key`, then start everything again.
2. Start: `privet server up {folder}` while you try it; for good:
   `sudo cp systemd/*.service /etc/systemd/system/ && sudo systemctl daemon-reload &&
   sudo systemctl enable --now privet-superlink privet-superexec privet-proxy`.
3. Open port {server.port} in the firewall, and no other: port {server.inner_port} answers on
   this machine only and must stay so, because it asks nobody who they are. Who has a login here
   can start runs.
4. Give every person `ca.crt` by a way you both trust, and this line:
   `privet client join --server {where}:{server.port} --ca ca.crt`
5. Take the cards that `privet client card` prints on the devices:
   `privet server enrol {folder} CARD.json…`
6. A run: `privet server run {folder} CONFIG.toml`, with `data.source = "devices"`; then
   `privet server status {folder}`.

The SuperLink's database `state.sqlite` has messages in transit: masked contributions only.
`runs/` has every run's settings, round log and adapter. nginx keeps no access log.

What runs, without a shell in between (environment first):

    env {settings} \\
    PROGRAM

{lines}
"""
