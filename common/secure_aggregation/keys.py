"""Keys of the masking protocol: who a device is, what two devices share, one way to derive.

Ed25519 (RFC 8032) for identities, X25519 (RFC 7748) for what two devices agree on in one round,
HKDF-SHA256 (RFC 5869) for everything derived from a secret. `derive` and `digest` are the only
users of HKDF and SHA-256 in the protocol, and each use has its own `Purpose`.
"""

import functools
import hashlib
import hmac
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from ..errors import ProtocolError, StateError
from ..files import explain_os_errors, write_atomic

__all__ = [
    "KEY_BYTES",
    "SIGNATURE_BYTES",
    "Directory",
    "Identity",
    "Purpose",
    "Random",
    "RoundKey",
    "Secret",
    "derive",
    "digest",
    "greeting",
    "read_directory",
    "verify",
    "write_directory",
]

KEY_BYTES, SIGNATURE_BYTES = 32, 64

Random = Callable[[int], bytes]
"""Draws that many secret bytes: `os.urandom`; a seeded stream in tests only."""

_LABEL = b"privet masking 1"
_FIELD_PRIME = 2**255 - 19
_EIGHT_BYTES = struct.Struct(">Q").pack


def _framed(*parts: bytes) -> bytes:
    """Join parts, each after its length: no two lists of parts give the same bytes."""
    joined = b""
    for part in parts:
        joined += _EIGHT_BYTES(len(part)) + part
    return joined


class Purpose(Enum):
    """The purpose of a derived key or a digest. Two purposes never give the same bytes.

    Attributes:
        head: what all that is derived or hashed for this purpose begins with.
    """

    def __init__(self, words: str) -> None:
        self.head = _framed(_LABEL, words.encode())

    PAIR_MASK = "mask shared by two clients"
    SELF_MASK = "mask of one client"
    SEALING = "encryption of shares"
    SELF_COMMITMENT = "commitment to the seed of a self mask"
    SHARE_COMMITMENT = "commitment to one share"
    TERMS = "terms of a round"
    ROSTER = "participants of a round"
    ANNOUNCEMENT = "signature of an announcement"
    DEALT = "signature of the list of who dealt shares"
    SURVIVORS = "signature of a survivor list"
    GRAPH = "order of the neighbour ring"
    GREETING = "answer to a server's greeting"
    ARM = "arm of a comparison that a device is in"
    SIMULATED_IDENTITY = "identity of a simulated device"
    TEMPLATE = "signature of a prompt template"
    DIRECTORY = "entry of a directory"
    DIRECTORY_HEAD = "signature of a directory"


@dataclass(frozen=True, slots=True)
class Secret:
    """Bytes that never show: not in `repr`, not in a log, not in a traceback's arguments."""

    value: bytes = field(repr=False)

    def __repr__(self) -> str:
        return "Secret(***)"


def derive(secret: Secret, purpose: Purpose, *context: bytes, size: int = 32) -> Secret:
    """HKDF-SHA256 of a secret, bound to a purpose and a context.

    **Guarantee**: two calls that differ in secret, purpose or context give independent keys:
    every part enters with its length, so no two lists of parts have the same encoding.
    """
    return Secret(_hkdf(secret.value, purpose.head + _framed(*context), size))


def _hkdf(secret: bytes, info: bytes, size: int) -> bytes:
    # RFC 5869 in its own words: with two keys a neighbour, a library's object costs more than HMAC
    inner, outer = _NO_SALT[0].copy(), _NO_SALT[1].copy()
    inner.update(secret)
    outer.update(inner.digest())
    key = outer.digest()
    block, output = b"", b""
    for count in range(1, -(-size // 32) + 1):
        block = hmac.digest(key, block + info + bytes([count]), "sha256")
        output += block
    return output[:size]


_NO_SALT = hashlib.sha256(b"\x36" * 64), hashlib.sha256(b"\x5c" * 64)
"""HMAC (RFC 2104) under a key of zeros, begun once: HKDF without a salt begins with it."""


def digest(purpose: Purpose, *parts: bytes) -> bytes:
    """Compute the SHA-256 of public parts, bound to a purpose.

    The encoding of the parts is that of `derive`.
    """
    return hashlib.sha256(purpose.head + _framed(*parts)).digest()


@dataclass(frozen=True)
class Identity:
    """A device's long-lived Ed25519 key.

    Attributes:
        seed: 32 bytes, secret, kept in the device's vault.
        public: 32 bytes; what a directory lists.
    """

    seed: Secret
    public: bytes

    @classmethod
    def create(cls, random: Random) -> "Identity":
        """Make a new identity from fresh random bytes."""
        return cls.of(random(KEY_BYTES))

    @classmethod
    def of(cls, seed: bytes) -> "Identity":
        """The identity of a stored seed."""
        return cls(Secret(seed), _signing(seed).public_key().public_bytes_raw())

    def sign(self, message: bytes) -> bytes:
        """Sign a message: 64 bytes, deterministic."""
        return _signing(self.seed.value).sign(message)


def greeting(run: str, nonce: bytes, node: int) -> bytes:
    """What a device signs when a server greets it.

    **Guarantee**: who answers at this node of this run holds the identity's key. A node cannot pass
    for another device by naming its public identity, nor by handing on a signature.

    Args:
        run: its id.
        nonce: the server's, fresh for each greeting.
        node: Flower's id of the node that answers.
    """
    return digest(Purpose.GREETING, run.encode(), nonce, str(node).encode())


def _signing(seed: bytes) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(seed)


@functools.lru_cache(maxsize=1 << 13)
def verify(public: bytes, message: bytes, signature: bytes) -> bool:
    """Return whether `signature` is that of `public` over `message`.

    It is False for any malformed input.

    A function of public bytes only, so the last answers are kept: a server, and devices that one
    process simulates, are shown the same signatures again and again.
    """
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


@dataclass(frozen=True)
class RoundKey:
    """An X25519 key pair that lives for one round."""

    private: Secret
    public: bytes

    @classmethod
    def create(cls, random: Random) -> "RoundKey":
        """Make a fresh key pair."""
        return cls.of(random(KEY_BYTES))

    @classmethod
    def of(cls, private: bytes) -> "RoundKey":
        """Make the key pair of a private key, computing the public half."""
        pair = X25519PrivateKey.from_private_bytes(private)
        return cls(Secret(private), pair.public_key().public_bytes_raw())

    def agreement(self) -> Callable[[bytes], Secret]:
        """Return the function peer's public key -> shared secret.

        It raises what `agree` raises.

        The private key is loaded once: loading costs as much as an exchange.
        """
        private = X25519PrivateKey.from_private_bytes(self.private.value)
        return lambda public: _exchange(private, public)

    def agree(self, public: bytes) -> Secret:
        """The secret shared with the holder of `public`.

        Raises:
            ProtocolError: `public` is not 32 bytes, not in its one canonical encoding (another
                one would let a key appear twice), or of low order (RFC 7748, section 6.1): the
                secret would be all zero and known to everybody. The caller adds sender and round.
        """
        return self.agreement()(public)


def _exchange(private: X25519PrivateKey, public: bytes) -> Secret:
    if len(public) != KEY_BYTES or int.from_bytes(public, "little") >= _FIELD_PRIME:
        raise ProtocolError("an X25519 key is not in its canonical 32-byte encoding")
    try:
        return Secret(private.exchange(X25519PublicKey.from_public_bytes(public)))
    except ValueError:  # the library refuses an all-zero result
        raise ProtocolError("an X25519 key is of low order: its secrets would be public") from None


MAX_KNOWN = 1 << 16
"""Identities that a device pins: four times the largest roster, 5 MB."""


@dataclass(frozen=True)
class Directory:
    """Which identity belongs to which client number.

    Attributes:
        known: client number -> 32-byte Ed25519 public key.
        closed: True: only listed clients exist (a file an operator provides). False: an unknown
            client is pinned when it is seen first. **A server that invents clients is held back
            by a closed directory only.**
        news: a sentence on what came of a newer directory, said with every refusal: that it was
            itself refused, or that none can come.
    """

    known: Mapping[int, bytes]
    closed: bool
    news: str = field(default="", compare=False)

    @property
    def enrolled(self) -> int | None:
        """Number of enrolled devices, N. With an open directory it is unknown: None."""
        return len(self.known) if self.closed else None

    @functools.cached_property
    def _owners(self) -> dict[bytes, int]:
        return {identity: client for client, identity in self.known.items()}

    def admit(self, claimed: Mapping[int, bytes]) -> "Directory":
        """The directory after a roster was seen.

        Raises:
            ProtocolError: a client is not listed, shows another identity than before, or an
                identity belongs to another client.
        """
        owners, new = self._owners, dict[bytes, int]()
        news = f" ({self.news})" if self.news else ""
        for client, identity in claimed.items():
            listed = self.known.get(client)
            if listed is None and self.closed:
                raise ProtocolError(f"client {client} is not in this device's directory{news}")
            if listed is not None and listed != identity:
                raise ProtocolError(
                    f"client {client} shows another identity than the known one{news}"
                )
            owner = owners[identity] if identity in owners else new.setdefault(identity, client)
            if owner != client:
                raise ProtocolError(f"clients {owner} and {client} have the same identity{news}")
        if claimed.keys() <= self.known.keys():
            return self
        if len(claimed.keys() | self.known.keys()) > MAX_KNOWN:
            raise ProtocolError(
                f"more than {MAX_KNOWN} clients were shown to this device, which keeps no more"
            )
        return Directory({**self.known, **claimed}, self.closed, self.news)


def read_directory(path: Path, closed: bool = True) -> Directory:
    """A directory file: one line a client, its number and its identity in hexadecimal.

    Raises:
        StateError: the file cannot be read, or a line is malformed or a repetition.
    """
    with explain_os_errors(path, "read"):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    known: dict[int, bytes] = {}
    taken: set[bytes] = set()
    for number, line in enumerate(lines, 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        try:
            client, identity = int(words[0]), bytes.fromhex(words[1])
        except (ValueError, IndexError):
            client, identity = -1, b""
        repeated = client in known or identity in taken
        if len(words) != 2 or client < 0 or len(identity) != KEY_BYTES or repeated:
            raise StateError(
                f"{path}, line {number}: expected a client number and 64 hexadecimal digits, each "
                "of them once in the file; correct the line."
            )
        known[client] = identity
        taken.add(identity)
    return Directory(known, closed)


def write_directory(path: Path, directory: Directory) -> None:
    """Write a directory as the file that `read_directory` reads.

    In this file a device keeps the identities it has pinned.
    """
    lines = (f"{client} {identity.hex()}\n" for client, identity in sorted(directory.known.items()))
    write_atomic(path, "".join(lines).encode())
