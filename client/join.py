"""What is checked before a device belongs to a server: address, certificate, directory.

**Guarantee**: without TLS nothing but this machine is joined, and only when a test asks for it.
"""

import ipaddress
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from ..common.errors import ConfigError
from ..common.files import explain_os_errors
from ..common.keys import Directory, read_directory
from .home import Home, Joined
from .policy import matches

__all__ = ["Asked", "join"]

LARGEST = 1_000_000


@dataclass(frozen=True)
class Asked:
    """What `privet client join` was given.

    Attributes:
        server: HOST:PORT.
        ca: the PEM file of the authority the server must be signed by.
        directory: the operator's list of devices.
        insecure: without TLS.
    """

    server: str
    ca: Path | None
    directory: Path | None
    insecure: bool


def join(home: Home, asked: Asked, now: datetime | None = None) -> list[str]:
    """Joins, after everything was checked.

    Returns:
        Sentences for the owner: what was joined, and what is left open.

    Raises:
        ConfigError: the address, the certificate or their combination is not accepted, or the
            policy does not allow this server; nothing was changed.
        StateError: the directory's file is wrong, or another server was joined before.
    """
    host = _host(asked.server)
    _refuse_without_tls(asked, host)
    allowed = [one.lower() for one in home.policy.allowed.servers]
    if allowed and not matches(asked.server.lower(), allowed):
        raise ConfigError(
            f"server = {asked.server!r}: this device's owner allows {', '.join(allowed)} "
            "(allowed.servers in policy.toml)"
        )
    ca = "" if asked.ca is None else _certificates(asked.ca, now or datetime.now(UTC))
    directory = _directory(home, asked)
    home.join(Joined(asked.server, ca, directory.closed, asked.insecure), directory)
    return [f"{home.folder} belongs to {asked.server} now.", *_left_open(home, asked, directory)]


def _host(server: str) -> str:
    if "://" in server:
        scheme = server.partition("://")[0]
        raise ConfigError(
            f"server = {server!r}: expected HOST:PORT without {scheme}://, such as "
            "fl.example.org:9092; the connection uses TLS anyway"
        )
    found = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})", server)
    if found is None or not 0 < int(found[2]) < 65536:
        raise ConfigError(f"server = {server!r}: expected HOST:PORT, such as fl.example.org:9092")
    return found[1].strip("[]")


def _refuse_without_tls(asked: Asked, host: str) -> None:
    if asked.insecure and asked.ca is not None:
        raise ConfigError("--ca and --insecure-test were given: leave --insecure-test out")
    if asked.insecure and not _is_loopback(host):
        raise ConfigError(
            f"--insecure-test joins a server on this machine only (127.0.0.1, ::1, localhost), and "
            f"server = {asked.server!r}: give --ca FILE, the certificate the operator sent you"
        )
    if asked.ca is None and not asked.insecure:
        raise ConfigError(
            f"joining {asked.server} without TLS is refused: anybody on the way could read and "
            "alter what is sent. Give --ca FILE, the certificate the operator sent you "
            "(--insecure-test is for tests on this machine)"
        )


def _is_loopback(host: str) -> bool:
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _certificates(path: Path, now: datetime) -> str:
    """The certificates of a PEM file, and nothing else that stands in it."""
    with explain_os_errors(path, "read the certificate"), open(path, "rb") as file:
        content = file.read(LARGEST)
    try:
        found = x509.load_pem_x509_certificates(content)
    except ValueError:
        what = "a private key" if b"PRIVATE KEY-----" in content else "none"
        raise ConfigError(
            f"{path}: expected a certificate in PEM, found {what}; ask the operator for ca.crt"
        ) from None
    for one in found:
        begins, ends = one.not_valid_before_utc, one.not_valid_after_utc
        if not begins <= now <= ends:
            wrong = "is not valid yet" if now < begins else "has expired"
            raise ConfigError(
                f"{path}: the certificate {wrong}: it holds from {begins:%Y-%m-%d %H:%M} to "
                f"{ends:%Y-%m-%d %H:%M} UTC, and it is {now:%Y-%m-%d %H:%M} UTC; ask the operator "
                "for a new one, or set this machine's clock"
            )
    return b"".join(one.public_bytes(Encoding.PEM) for one in found).decode("ascii")


def _directory(home: Home, asked: Asked) -> Directory:
    if asked.directory is not None:
        return read_directory(asked.directory, closed=True)
    joined = home.joined
    if joined is not None and joined.server == asked.server:
        return Directory(home.directory.known, closed=False)  # what was pinned stays pinned
    return Directory({}, closed=False)


def _left_open(home: Home, asked: Asked, directory: Directory) -> list[str]:
    said = []
    if asked.insecure:
        said.append("WITHOUT TLS: for tests on this machine; nothing that is sent is protected.")
    if not directory.closed:
        said.append(
            "No directory was given: other devices are remembered when they are first seen. A "
            "server that invents devices to surround yours is not held back by that; a directory "
            "that reaches you by another way than through the server is what does it (--directory)."
        )
    elif home.identity.public not in directory.known.values():
        said.append(
            "This device is not in the directory yet: send the operator its card (`privet client "
            "card`), and join again with the new directory."
        )
    else:
        said.append(f"The directory is closed: it has {len(directory.known)} devices.")
    return said
