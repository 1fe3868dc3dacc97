"""The directory of a fleet: who was ever enrolled, append-only, chained and signed.

    privet directory 1
    0 add 0 IDENTITY        index, kind, client number, Ed25519 key in hexadecimal
    1 add 1 IDENTITY
    2 remove 0 IDENTITY
    head FLEET KEY 3 HASH SIGNATURE

Each entry is hashed with the hash before it; the first with the fleet's name and the directory's
key. The head signs name, number of entries (the version) and last hash.

**Guarantee**: a device that holds a version takes over only one that continues it, entry for entry,
under the key that its owner pinned. A number or an identity is never given out again, not even
after a removal. **Not** guaranteed: that the signer enrols people only, and that it shows everybody
the same entries; two signed heads of one version with different hashes prove that it did not.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError, PrivacyError, ProtocolError, StateError
from ..files import explain_os_errors, write_atomic
from . import keys
from .keys import Directory, Identity, Purpose, digest

if TYPE_CHECKING:
    from ..settings.config import Config

__all__ = [
    "Chain",
    "Entry",
    "Head",
    "brought_up",
    "entries_of",
    "lines_of",
    "listed",
    "load",
    "parse",
    "refuse_colluders",
    "refuse_unless_later",
    "text",
    "write",
]

FIRST = "privet directory 1"
UNSIGNED = "unsigned"
_FLEET = re.compile(r"[A-Za-z0-9.:*_-]{1,300}")
_LINE = re.compile(r"(0|[1-9][0-9]{0,8}) (add|remove) (0|[1-9][0-9]{0,8}) ([0-9a-f]{64})")
_HEAD = re.compile(
    r"head (\S+) ([0-9a-f]{64}) (0|[1-9][0-9]{0,8}) ([0-9a-f]{64}) ([0-9a-f]{128}|unsigned)"
)
LARGEST = 128
"""Bytes of a line, reckoned; with `keys.MAX_KNOWN` it bounds what is read."""


@dataclass(frozen=True)
class Entry:
    """One entry of a directory: a client was enrolled, or removed.

    Attributes:
        client: its number.
        identity: its Ed25519 public key, 32 bytes.
        removed: False: it was enrolled.
    """

    client: int
    identity: bytes
    removed: bool = False

    def __str__(self) -> str:
        return f"client {self.client} {'removed' if self.removed else 'added'}"

    @property
    def kind(self) -> str:
        """Kind of the entry, `add` or `remove`."""
        return "remove" if self.removed else "add"


@dataclass(frozen=True)
class Head:
    """The signed summary of a directory: whose it is, how long, and the hash of its last entry.

    Attributes:
        fleet: whose directory it is; no spaces.
        key: the directory's Ed25519 public key, 32 bytes.
        version: number of entries.
        hash: of the last entry.
        signature: 64 bytes; empty: not signed.
    """

    fleet: str
    key: bytes
    version: int
    hash: bytes
    signature: bytes = b""

    @property
    def message(self) -> bytes:
        """The bytes that are signed."""
        version = self.version.to_bytes(8, "big")
        return digest(Purpose.DIRECTORY_HEAD, self.fleet.encode(), self.key, version, self.hash)

    @property
    def signed(self) -> bool:
        """Whether the signature is the key's."""
        return keys.verify(self.key, self.message, self.signature)

    def __str__(self) -> str:
        signature = self.signature.hex() or UNSIGNED
        return f"head {self.fleet} {self.key.hex()} {self.version} {self.hash.hex()} {signature}"

    @classmethod
    def of(cls, line: str) -> "Head":
        """Parse a head from a line: the strict inverse of `str`.

        Raises:
            ProtocolError: the line is no head.
        """
        match = _HEAD.fullmatch(line)
        if match is None or not _FLEET.fullmatch(match[1]):
            raise ProtocolError(
                "a directory's head should be `head FLEET KEY VERSION HASH SIGNATURE`, and is "
                f"{line[:80]!r}: the file was cut or altered"
            )
        signature = b"" if match[5] == UNSIGNED else bytes.fromhex(match[5])
        key, last = bytes.fromhex(match[2]), bytes.fromhex(match[4])
        return cls(match[1], key, int(match[3]), last, signature)


@dataclass(frozen=True)
class Chain:
    """A whole directory: all its entries and the signature of its head.

    Attributes:
        fleet, key: as in `Head`.
        entries: oldest first.
        signature: of the head; empty: not signed yet.
    """

    fleet: str
    key: bytes
    entries: tuple[Entry, ...] = ()
    signature: bytes = b""

    def __post_init__(self) -> None:
        """Refuse a list of entries that cannot be a directory.

        Raises:
            ProtocolError: too long; a number or an identity that was taken; a removal of nobody.
        """
        if len(self.entries) > keys.MAX_KNOWN:
            raise ProtocolError(
                f"the directory has {len(self.entries)} entries; at most {keys.MAX_KNOWN} are read"
            )
        given: dict[int, bytes] = {}
        owners: dict[bytes, int] = {}
        gone: set[int] = set()
        for index, entry in enumerate(self.entries):
            client = entry.client
            if entry.removed:
                if given.get(client) != entry.identity or client in gone:
                    raise ProtocolError(
                        f"entry {index} of the directory removes client {client}, who is not "
                        "listed with this identity"
                    )
                gone.add(client)
                continue
            if client in given:
                raise ProtocolError(
                    f"entry {index} of the directory adds client {client} a second time; a number "
                    "belongs to one identity for ever"
                )
            if owners.setdefault(entry.identity, client) != client:
                raise ProtocolError(
                    f"entry {index} of the directory gives client {client} the identity of client "
                    f"{owners[entry.identity]}: one device under two numbers"
                )
            given[client] = entry.identity
        object.__setattr__(self, "_known", {n: i for n, i in given.items() if n not in gone})

    @cached_property
    def directory(self) -> Directory:
        """Who is enrolled now: a closed directory."""
        known: dict[int, bytes] = self.__dict__["_known"]
        return Directory(known, closed=True)

    @property
    def version(self) -> int:
        """How many entries there are."""
        return len(self.entries)

    @cached_property
    def hash(self) -> bytes:
        """Hash of the last entry, which covers all entries before it."""
        return self.hash_at(self.version)

    def hash_at(self, version: int) -> bytes:
        """Compute the hash of the directory's first `version` entries."""
        link = digest(Purpose.DIRECTORY, self.fleet.encode(), self.key)
        for index, entry in enumerate(self.entries[:version]):
            position, client = (number.to_bytes(8, "big") for number in (index, entry.client))
            link = digest(
                Purpose.DIRECTORY, link, position, entry.kind.encode(), client, entry.identity
            )
        return link

    @property
    def head(self) -> Head:
        """Head of the directory, which is what its key signs."""
        return Head(self.fleet, self.key, self.version, self.hash, self.signature)

    def with_entries(self, entries: Sequence[Entry]) -> "Chain":
        """Return this directory with more entries at its end.

        With any, the result is not signed.

        Raises:
            ProtocolError: as when it is made.
        """
        return replace(self, entries=(*self.entries, *entries), signature=b"") if entries else self

    def sign(self, signer: Identity) -> "Chain":
        """Return this directory with its head signed.

        Raises:
            ConfigError: `signer` is not the directory's key.
        """
        if signer.public != self.key:
            raise ConfigError(
                f"the directory of {self.fleet} has the key {self.key.hex()}, and was to be signed "
                f"with {signer.public.hex()}; give the directory's own key"
            )
        return replace(self, signature=signer.sign(self.head.message))


def entries_of(lines: Sequence[str], since: int = 0) -> tuple[Entry, ...]:
    """Entries from their lines, the first of which has the index `since`.

    Raises:
        ProtocolError: a line is malformed, or not the next one.
    """
    if len(lines) > keys.MAX_KNOWN:
        raise ProtocolError(
            f"the directory has {len(lines)} entries; at most {keys.MAX_KNOWN} are read"
        )
    made = []
    for index, line in enumerate(lines, since):
        match = _LINE.fullmatch(line)
        if match is None or int(match[1]) != index:
            raise ProtocolError(
                f"entry {index} of the directory should be `{index} add|remove NUMBER IDENTITY`, "
                f"and is {line[:80]!r}: an entry is missing or was altered"
            )
        made.append(Entry(int(match[3]), bytes.fromhex(match[4]), match[2] == "remove"))
    return tuple(made)


def lines_of(chain: Chain, since: int = 0) -> list[str]:
    """Write entries as the lines that `entries_of` reads, from entry `since` on."""
    return [
        f"{index} {entry.kind} {entry.client} {entry.identity.hex()}"
        for index, entry in enumerate(chain.entries[since:], since)
    ]


def text(chain: Chain) -> str:
    """Write a directory as the text of its file."""
    return "\n".join([FIRST, *lines_of(chain), str(chain.head)]) + "\n"


def parse(content: str, *, signed: bool = True) -> Chain:
    """Strict inverse of `text`.

    Args:
        content: of the file.
        signed: whether a signature is asked for.

    Raises:
        ProtocolError: another format, cut, altered, or not signed by the key that it names.
    """
    lines = content.splitlines()
    if len(lines) < 2 or lines[0] != FIRST or not content.endswith("\n"):
        raise ProtocolError(f"a directory begins with {FIRST!r} and ends with its head: it was cut")
    head = Head.of(lines[-1])
    chain = Chain(head.fleet, head.key, entries_of(lines[1:-1]), head.signature)
    if (chain.version, chain.hash) != (head.version, head.hash):
        raise ProtocolError(
            f"the directory has {chain.version} entries and its head is that of {head.version}"
            + (" others" if chain.version == head.version else "")
            + ": an entry was cut off, added or altered"
        )
    if signed and not head.signed:
        raise ProtocolError(
            f"the directory of {head.fleet} is not signed by the key {head.key.hex()} that it names"
        )
    return chain


def load(path: Path, *, signed: bool = True) -> Chain | Directory:
    """The directory of a file: signed, or a plain list (`keys.write_directory`).

    Raises:
        StateError: it cannot be read, or is wrong.
    """
    with explain_os_errors(path, "read"), open(path, "rb") as file:
        content = file.read(LARGEST * (keys.MAX_KNOWN + 2)).decode("utf-8", errors="replace")
    if not content.startswith(FIRST):
        return keys.read_directory(path, closed=True)
    try:
        return parse(content, signed=signed)
    except ProtocolError as error:
        raise StateError(f"{path}: {error}; get it anew from who signs it") from None


def listed(path: Path) -> Directory:
    """Who is enrolled, whichever kind of file it is.

    Raises:
        StateError: as `load`.
    """
    found = load(path)
    return found.directory if isinstance(found, Chain) else found


def write(path: Path, chain: Chain) -> None:
    """The file `load` reads, as a whole or not at all, mode 0600."""
    write_atomic(path, text(chain).encode())
    with explain_os_errors(path, "protect"):
        path.chmod(0o600)


def refuse_unless_later(own: Chain, other: Chain) -> None:
    """Refuse a whole directory that is not a later state of `own`, or the same.

    Raises:
        ProtocolError: as `brought_up`.
    """
    brought_up(own, other.head, 0, other.entries)


def brought_up(own: Chain, head: Head, since: int, entries: Sequence[Entry]) -> Chain | int:
    """Bring a device's directory up to date with the head and entries that a server has shown.

    Args:
        own: what the device holds, under the key its owner pinned; an empty fleet: any.
        head: the server's.
        since, entries: the entries that came with it, maybe none.

    Returns:
        The directory to hold from now on, or from which entry on the others are needed.

    Raises:
        ProtocolError: refused, by name: another fleet or key, a wrong signature, too long, an
            entry of `own` forgotten or rewritten. The device goes on with its own.
    """
    _refuse_head(own, head)
    if since == 0 and len(entries) == head.version:
        _refuse_rewritten(own, entries)
    if head.version < own.version:
        forgotten = ", ".join(map(str, own.entries[head.version :]))
        raise ProtocolError(
            f"the server shows version {head.version} of the directory and this device holds "
            f"version {own.version}: forgotten are {forgotten}"
        )
    if (head.version, head.hash) == (own.version, own.hash):
        return own
    if entries and since + len(entries) != head.version:
        raise ProtocolError(
            f"of {head.version} entries of the directory, {since} to {since + len(entries) - 1} "
            "came: it was cut short on its way"
        )
    complete = since == 0 and len(entries) == head.version
    if not complete and since != own.version:
        return own.version
    chain = Chain(head.fleet, head.key, (*own.entries[:since], *entries), head.signature)
    if chain.hash == head.hash:
        return chain
    if not complete:
        return 0  # with all of them it can be told what was rewritten
    raise ProtocolError(
        f"the {len(entries)} entries that came are not those of the signed head: the directory was "
        "altered on its way"
    )


def _refuse_head(own: Chain, head: Head) -> None:
    if own.fleet and head.fleet != own.fleet:
        raise ProtocolError(
            f"the server shows the directory of {head.fleet}, and this device belongs to "
            f"{own.fleet}"
        )
    if head.key != own.key:
        raise ProtocolError(
            f"the server's directory is under the key {head.key.hex()}, and the pinned one is "
            f"{own.key.hex()}; if its owner trusts the new one: privet client leave, and join again"
        )
    if head.version > keys.MAX_KNOWN:
        raise ProtocolError(
            f"the directory has {head.version} entries; at most {keys.MAX_KNOWN} are read"
        )
    if not head.signed:
        raise ProtocolError(
            f"version {head.version} of the server's directory is not signed by the pinned key"
        )


def _refuse_rewritten(own: Chain, entries: Sequence[Entry]) -> None:
    for index, (mine, theirs) in enumerate(zip(own.entries, entries, strict=False)):
        if mine != theirs:
            raise ProtocolError(
                f"entry {index} of the directory was rewritten: {_shown(mine)} became "
                f"{_shown(theirs)}"
            )


def _shown(entry: Entry) -> str:
    return f"{entry} ({entry.identity.hex()[:16]}…)"


def refuse_colluders(config: "Config", enrolled: int | None) -> None:
    """Refuse a masked run that assumes so many colluders that fewer than two devices are honest.

    Args:
        config: of the run; its `colluders` are m.
        enrolled: N; None: unknown (an open directory).

    Raises:
        PrivacyError: m > N - 2.
    """
    client = config.privacy.client
    masked = client.enabled and client.noise_at == "distributed"
    colluders = config.colluders if masked else 0
    if colluders and enrolled is not None and colluders > enrolled - 2:
        raise PrivacyError(
            f"the run reckons with {colluders} colluding devices (secure_aggregation.colluding), "
            f"and {enrolled} devices are enrolled: at least two must be honest, so at most "
            f"{max(enrolled - 2, 0)} may collude; enrol more devices or lower "
            "secure_aggregation.colluding"
        )
