"""Joining a server, after its address, certificate and directory were checked.

**Guarantee**: without TLS nothing but this machine is joined, and only when a test asks for it.
"""

import ipaddress
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from ...common.errors import ConfigError, ProtocolError
from ...common.files import explain_os_errors
from ...common.secure_aggregation import fleet_directory as directories
from ...common.secure_aggregation.fleet_directory import Chain
from ...common.secure_aggregation.keys import Directory
from ..consent.policy import matches
from ..store.device_store import DeviceStore, Joined

__all__ = ["Asked", "join"]

LARGEST = 1_000_000


@dataclass(frozen=True)
class Asked:
    """The arguments of `privet client join`.

    Attributes:
        server: HOST:PORT.
        ca: the PEM file of the authority the server must be signed by.
        directory: the list of devices; None: the file `directory` beside `ca`, if there is one.
        insecure: without TLS.
        key: of whoever signs the directory, hexadecimal; None: the one the directory names.
        open: without a directory, although there may be one.
    """

    server: str
    ca: Path | None
    directory: Path | None
    insecure: bool
    key: str | None = None
    open: bool = False


def join(home: DeviceStore, asked: Asked, now: datetime | None = None) -> list[str]:
    """Join a server, after everything was checked.

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
    if isinstance(directory, Chain):
        joined = Joined(
            asked.server, ca, True, asked.insecure, key=directory.key.hex(), fleet=directory.fleet
        )
    else:
        joined = Joined(asked.server, ca, directory.closed, asked.insecure)
    home.join(joined, directory)
    return [f"{home.folder} belongs to {asked.server} now.", *_left_open(home, asked, directory)]


def _host(server: str) -> str:
    if "://" in server:
        scheme = server.partition("://")[0]
        raise ConfigError(
            f"server = {server!r}: expected HOST:PORT without {scheme}://, such as "
            "fl.example.org:9092; the connection uses TLS anyway"
        )
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})", server)
    if match is None or not 0 < int(match[2]) < 65536:
        raise ConfigError(f"server = {server!r}: expected HOST:PORT, such as fl.example.org:9092")
    return match[1].strip("[]")


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
    """Return the certificates of a PEM file, and nothing else that stands in it."""
    with explain_os_errors(path, "read the certificate"), open(path, "rb") as file:
        content = file.read(LARGEST)
    try:
        certificates = x509.load_pem_x509_certificates(content)
    except ValueError:
        what = "a private key" if b"PRIVATE KEY-----" in content else "none"
        raise ConfigError(
            f"{path}: expected a certificate in PEM, found {what}; ask the operator for ca.crt"
        ) from None
    for certificate in certificates:
        begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        if not begins <= now <= ends:
            wrong = "is not valid yet" if now < begins else "has expired"
            raise ConfigError(
                f"{path}: the certificate {wrong}: it holds from {begins:%Y-%m-%d %H:%M} to "
                f"{ends:%Y-%m-%d %H:%M} UTC, and it is {now:%Y-%m-%d %H:%M} UTC; ask the operator "
                "for a new one, or set this machine's clock"
            )
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates).decode(
        "ascii"
    )


def _directory(home: DeviceStore, asked: Asked) -> Directory | Chain:
    """Return the directory this device holds from now on: signed, a list as it is, or open."""
    joined = home.joined
    again = joined is not None and joined.server == asked.server
    if asked.open:
        if asked.directory is not None or asked.key is not None:
            raise ConfigError("--open was given with a directory or its key: leave --open out")
        return Directory(home.directory.known if again else {}, closed=False)
    key, path = _key(asked.key), asked.directory or _beside(asked.ca)
    held = home.chain if again else None
    if path is None and (key is not None or held is not None):
        if held is not None and key in (None, held.key):
            return held  # what is held already stays
        return Chain("", key or b"")
    if path is None:
        # what was pinned stays pinned
        return Directory(home.directory.known if again else {}, closed=False)
    loaded = directories.load(path)
    if not isinstance(loaded, Chain):
        if key is not None:
            raise ConfigError(
                f"{path} is a list that nobody signed, and --directory-key was given: ask the "
                "operator for the signed directory"
            )
        return loaded
    if key not in (None, loaded.key):
        raise ConfigError(
            f"{path} is signed with the key {loaded.key.hex()}, and --directory-key is "
            f"{asked.key}: it is not the directory that you trust"
        )
    return loaded if held is None else _continued(held, loaded, path)


def _continued(held: Chain, loaded: Chain, path: Path) -> Chain:
    """Return the newer of a held directory and a file, of which one must continue the other."""
    if held.fleet and held.version > loaded.version:
        held, loaded = loaded, held
    try:
        directories.refuse_unless_later(held, loaded)
    except ProtocolError as error:
        raise ConfigError(
            f"{path} and the directory that this device holds differ: {error}. The file was not "
            "taken"
        ) from None
    return loaded


def _key(given: str | None) -> bytes | None:
    """Read the public key that was given as digits or as a file."""
    if given is None:
        return None
    path, words = Path(given), given
    if path.is_file():
        with explain_os_errors(path, "read the key"):
            words = path.read_text("utf-8", errors="replace")[:200].strip()
    if not re.fullmatch("[0-9a-f]{64}", words):
        raise ConfigError(
            f"--directory-key {given!r:.90}: expected 64 hexadecimal digits, or a file with them: "
            "the public key of whoever signs the directory"
        )
    return bytes.fromhex(words)


def _beside(ca: Path | None) -> Path | None:
    """Find the operator's directory, if it came together with the certificate."""
    path = None if ca is None else ca.parent / "directory"
    return path if path is not None and path.is_file() else None


def _left_open(home: DeviceStore, asked: Asked, directory: Directory | Chain) -> list[str]:
    sentences = []
    if asked.insecure:
        sentences.append(
            "WITHOUT TLS: for tests on this machine; nothing that is sent is protected."
        )
    if isinstance(directory, Chain):
        return sentences + _signed(home, asked, directory)
    if not directory.closed:
        sentences.append(
            "WITHOUT A DIRECTORY: other devices are remembered when they are first seen. A "
            "server that invents devices to surround yours is not held back by that, and of the "
            "noise against the server only your own device's share is certain. A signed directory "
            "is what holds it back: ask the operator for the file `directory`, and join again with "
            "--directory FILE, and with --directory-key KEY where somebody else signs it."
        )
    elif home.identity.public not in directory.known.values():
        sentences.append(
            "This device is not in the directory yet: send the operator its card (`privet client "
            "card`), and join again with the new directory."
        )
    else:
        sentences.append(
            f"The directory is closed: it has {len(directory.known)} devices. Nobody signed it, so "
            "it stays as it is: rounds with devices that are enrolled later are declined until you "
            "join again with the new one."
        )
    return sentences


def _signed(home: DeviceStore, asked: Asked, chain: Chain) -> list[str]:
    known = chain.directory.known
    who = "the key you named" if asked.key else "the key that came with it"
    if not chain.fleet:
        return [
            f"The directory is closed and has not come yet: the first one under {who} "
            f"({chain.key.hex()}) is taken."
        ]
    sentences = [
        f"The directory is closed: {chain.fleet} has {len(known)} devices, version "
        f"{chain.version}, signed by {who} ({chain.key.hex()}).",
        f"Its head, to compare with other owners: {chain.hash.hex()}",
        "Newer ones are fetched and checked by this device itself.",
    ]
    if home.identity.public not in known.values():
        sentences.append(
            "This device is not in it yet: send the operator its card (`privet client card`)."
        )
    if not asked.key:
        sentences.append(
            "Whoever holds that key says which devices exist; where it is the operator, a lying "
            "one can enrol devices of its own. A key of somebody else: --directory-key."
        )
    return sentences
