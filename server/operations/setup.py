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
      directory             every enrolled device, signed; what devices hold and are sent
      directory.key         signs it; not here with --directory-key, then also directory.unsigned
      devices.json runs/ logs/ state.sqlite

The proxy is the one way in (`server/operations/proxy.py`). A person with a login on the server
machine is inside: who must not start runs must not have one.
"""

import datetime
import ipaddress
import json
import os
import re
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path

from ...common.errors import ConfigError, RunExists, StateError
from ...common.file_templates import render
from ...common.files import explain_os_errors, sync_folder, write_atomic, write_json_atomic
from ...common.secure_aggregation.fleet_directory import Chain, text
from ...common.secure_aggregation.keys import Identity
from .certificates import authority_of, new_authority, pem, valid_until, write_certificates
from .proxy import nginx_conf
from .server_folder import CERTIFICATES, Server
from .services import readme, units

__all__ = ["certificates", "certified_until", "expiring", "init", "load", "renew"]

FORMAT = 1
FACTS = "server.json"
DIRECTORY, DIRECTORY_KEY, UNSIGNED = "directory", "directory.key", "directory.unsigned"
CA_DAYS = 3650
WARN_DAYS = 30
_DNS = re.compile(
    r"(\*\.)?([A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)*"
    r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
)


def init(
    folder: Path,
    hosts: Sequence[str],
    *,
    port: int = 9092,
    inner_port: int = 9093,
    days: int = 365,
    directory_key: bytes | None = None,
    now: datetime.datetime | None = None,
) -> Server:
    """Make a server's folder, whole or not at all.

    Args:
        folder: must not exist, or be empty.
        hosts: names and addresses under which devices reach the server.
        port: the proxy's.
        inner_port: the SuperLink's, on loopback.
        days: how long the server's certificates hold; the CA's holds 3,650.
        directory_key: public key of whoever signs the directory elsewhere; None: one is made here.
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
            _fill(partial, server, days, now, directory_key)
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
    """Make new certificates and keys of the server, all put in place by one rename.

    Devices keep their CA.

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
    authority = authority_of(ca_key or server.folder / "ca" / "ca.key", server.folder / "ca.crt")
    now = now or datetime.datetime.now(datetime.UTC)
    with explain_os_errors(server.folder, "renew the certificates of"):
        before = os.readlink(server.folder / CERTIFICATES)
        following = f"{CERTIFICATES}.{int(before.rpartition('.')[2]) + 1}"
        shutil.rmtree(server.folder / following, ignore_errors=True)  # of a renewal cut short
        write_certificates(server.folder / following, server.hosts, authority, days, now)
        _link(server.folder / CERTIFICATES, following)
        write_json_atomic(server.folder / FACTS, _facts(server))
        shutil.rmtree(server.folder / before, ignore_errors=True)
    return server


def _link(link: Path, target: str) -> None:
    """Point `link` at `target` by one rename, so that there is always one or the other."""
    fresh = link.with_name(f".{link.name}.link")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    os.replace(fresh, link)


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


def certificates(server: Server) -> dict[str, datetime.datetime]:
    """When each certificate runs out, by its file's name.

    Raises:
        StateError: one is missing or damaged.
    """
    inside = ("server.crt", "internal.crt", "internal-ca.crt")
    found = {"ca.crt": valid_until(server.folder / "ca.crt")}
    return found | {name: valid_until(server.certificate(name)) for name in inside}


def expiring(server: Server, now: datetime.datetime) -> list[str]:
    """A sentence for each certificate that has expired, or will within `WARN_DAYS`."""
    return [
        _expiry(server, name, until, now)
        for name, until in certificates(server).items()
        if until - now <= datetime.timedelta(days=WARN_DAYS)
    ]


def _expiry(server: Server, name: str, until: datetime.datetime, now: datetime.datetime) -> str:
    when, effect = f"expires on {until:%Y-%m-%d}, in {(until - now).days} days", " from then on"
    if until <= now:
        when, effect = f"expired on {until:%Y-%m-%d}", ""
    mend = f"privet server init {server.folder} --renew, then start everything again"
    if name == "ca.crt":
        mend = "make a new server's folder, whose ca.crt every device joins with"
    return f"{name} {when}: no device can connect{effect}; {mend}"


def certified_until(server: Server) -> datetime.datetime:
    """When the first of the server's certificates runs out.

    Raises:
        StateError: a certificate is missing or damaged.
    """
    return min(valid_until(server.certificate(name)) for name in ("server.crt", "internal.crt"))


def _fill(
    partial: Path, server: Server, days: int, now: datetime.datetime, directory_key: bytes | None
) -> None:
    """Write all files of a new folder, beside its final place."""
    for name in ("", "ca", "nginx", "flwr", "systemd", "runs", "logs"):
        (partial / name).mkdir(mode=0o700)
    authority = new_authority(f"privet CA of {server.hosts[0]}", CA_DAYS, now)
    write_atomic(partial / "ca" / "ca.key", pem(authority.key))
    write_atomic(partial / "ca.crt", pem(authority.certificate))
    write_certificates(partial / f"{CERTIFICATES}.1", server.hosts, authority, days, now)
    (partial / CERTIFICATES).symlink_to(f"{CERTIFICATES}.1")
    write_atomic(partial / "superexec.secret", secrets.token_hex(32).encode())
    write_json_atomic(partial / FACTS, _facts(server))
    _put_directory(partial, server, directory_key)
    write_atomic(partial / "nginx.conf", nginx_conf(server.port, server.inner).encode())
    inner_ca = server.certificate("internal-ca.crt")
    connection = render(
        __package__, "flwr.toml", folder=server.folder, inner=server.inner, authority=inner_ca
    )
    write_atomic(partial / "flwr" / "config.toml", connection.encode())
    for name, unit in units(server).items():
        write_atomic(partial / "systemd" / name, unit.encode())
    write_atomic(partial / "README.md", readme(server).encode())


def _put_directory(partial: Path, server: Server, key: bytes | None) -> None:
    """Write a signed directory with no entries.

    With somebody else's key it waits for that signature.
    """
    fleet = new_fleet(server.hosts)
    if key is not None:
        write_atomic(partial / UNSIGNED, text(Chain(fleet, key)).encode())
        return
    signer = Identity.create(secrets.token_bytes)
    write_atomic(partial / DIRECTORY_KEY, signer.seed.value.hex().encode() + b"\n")
    write_atomic(partial / DIRECTORY, text(Chain(fleet, signer.public).sign(signer)).encode())


def new_fleet(hosts: Sequence[str]) -> str:
    """Make a name that no other fleet has, as one signer may keep several directories."""
    return f"{hosts[0]}-{secrets.token_hex(8)}"


def _facts(server: Server) -> dict[str, object]:
    ports = {"port": server.port, "inner_port": server.inner_port}
    return {"format": FORMAT, "hosts": list(server.hosts), **ports}


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
