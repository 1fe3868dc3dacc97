"""Devices at the server: their cards, their node keys at the SuperLink, the directory.

**Guarantee**: a number belongs to one identity for ever: numbers are not given out again, neither
after `remove` nor after a crash between two steps, and `devices.json` is whole or as it was.
Enrolling says who may join; what a device releases is decided on the device alone.
"""

import fcntl
import json
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from ...common.errors import DataError, ProtocolError, StateError
from ...common.files import explain_os_errors, owners_own, write_atomic, write_json_atomic
from ...common.secure_aggregation import fleet_directory as directories
from ...common.secure_aggregation.fleet_directory import Chain, Entry
from ...common.secure_aggregation.keys import KEY_BYTES, Directory, Identity
from .control import control, nodes_of, register, unregister
from .server_folder import Server
from .setup import DIRECTORY, DIRECTORY_KEY, UNSIGNED, new_fleet

__all__ = [
    "Card",
    "Device",
    "count",
    "current",
    "devices",
    "enrol",
    "names",
    "pending",
    "read_card",
    "read_key",
    "remove",
    "take",
]

DEVICES = "devices.json"
CARD_BYTES = 16384
CARD_KEYS = {"privet", "identity", "node", "name"}
_PRINTABLE = re.compile(r"[^\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]{0,64}")

Show = Callable[[str], None]


@dataclass(frozen=True)
class Card:
    """What a device tells its server, all of it public.

    Attributes:
        identity: Ed25519 public key, 64 hexadecimal digits.
        node: ECDSA P-384 public key, PEM.
        name: a label its owner chose; may be empty.
    """

    identity: str
    node: str
    name: str


@dataclass(frozen=True)
class Device:
    """An enrolled device.

    Attributes:
        number: its client number, never another device's.
        card: what it showed.
        removed: no longer listed; its number, identity and node key stay taken.
    """

    number: int
    card: Card
    removed: bool = False

    def __str__(self) -> str:
        return f"client {self.number}" + (f" ({self.card.name})" if self.card.name else "")


def read_card(path: Path) -> Card:
    """A device's card, strictly checked.

    Raises:
        DataError: unreadable, not one JSON object with the four keys, of another version of
            privet, or a key that is none.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(CARD_BYTES + 1)
    except OSError as error:
        raise DataError(f"cannot read the card {path}: {error.strerror}") from None
    if len(data) > CARD_BYTES:
        raise DataError(f"{path} is larger than a card can be ({CARD_BYTES} bytes); give the card")
    try:
        value = json.loads(data, object_pairs_hook=_no_key_twice)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} is no card ({error}): expected the one line of JSON that "
            "`privet client card` prints"
        ) from None
    if not isinstance(value, dict) or set(value) != CARD_KEYS:
        found = ", ".join(sorted(map(str, value)))[:200] if isinstance(value, dict) else "no object"
        raise DataError(f"{path}: expected the keys {', '.join(sorted(CARD_KEYS))}; found {found}")
    return _checked(path, value)


def _checked(path: Path, value: Mapping[str, object]) -> Card:
    for name in CARD_KEYS:
        if not isinstance(value[name], str):
            raise DataError(f"{path}: {name} should be a text, and is {value[name]!r:.80}")
    theirs, identity, node, name = (str(value[k]) for k in ("privet", "identity", "node", "name"))
    mine = version("privet")
    if theirs != mine:
        raise DataError(
            f"{path}: the device runs privet {theirs[:20]!r}, this server {mine}; bring both to "
            "one version, and print the card again"
        )
    if not re.fullmatch(r"[0-9a-f]{64}", identity):
        raise DataError(f"{path}: identity should be 64 hexadecimal digits, in small letters")
    if not _of_prime_order(bytes.fromhex(identity)):
        raise DataError(
            f"{path}: identity is no Ed25519 key of full order: anybody could sign for it, or "
            "nobody; make a new one on the device"
        )
    if not _PRINTABLE.fullmatch(name):
        raise DataError(f"{path}: name should be at most 64 letters, none of them a control one")
    return Card(identity, _node_key(path, node), name)


def _no_key_twice(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key appears twice")
    return dict(pairs)


def _node_key(path: Path, text: str) -> str:
    """The key in the one spelling the SuperLink compares, whether it came as PEM or OpenSSH."""
    data = text.strip().encode()
    try:
        if data.startswith(b"ecdsa-"):
            key: object = serialization.load_ssh_public_key(data)
        else:
            key = serialization.load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise DataError(f"{path}: node should be a public ECDSA key on the curve P-384")
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_bytes(serialization.Encoding.PEM, form).decode()


_P = 2**255 - 19
_L = 2**252 + 27742317777372353535851937790883648493
_D = -121665 * pow(121666, -1, _P) % _P
_Point = tuple[int, int, int, int]


def _of_prime_order(encoded: bytes) -> bool:
    """Whether 32 bytes are a point that an honest Ed25519 key can be.

    A point of low order verifies signatures that nobody made; OpenSSL does not look. RFC 8032,
    sections 5.1.3 and 5.1.4; takes 3 ms, needs no secrecy.
    """
    sign, y = encoded[-1] >> 7, int.from_bytes(encoded, "little") & ((1 << 255) - 1)
    if len(encoded) != KEY_BYTES or y >= _P:
        return False
    square = (y * y - 1) * pow(_D * y * y + 1, -1, _P) % _P
    x = pow(square, (_P + 3) // 8, _P)
    if x * x % _P != square:
        x = x * pow(2, (_P - 1) // 4, _P) % _P
    if x * x % _P != square or (x == 0 and sign):
        return False
    x = _P - x if x & 1 != sign else x
    point, total, left = (x, y, 1, x * y % _P), (0, 1, 1, 0), _L
    while left:
        total = _add(total, point) if left & 1 else total
        point, left = _add(point, point), left >> 1
    neutral = total[0] == 0 and total[1] == total[2]
    return neutral and (x, y) != (0, 1)


def _add(p: _Point, q: _Point) -> _Point:
    a, b = (p[1] - p[0]) * (q[1] - q[0]) % _P, (p[1] + p[0]) * (q[1] + q[0]) % _P
    c, d = 2 * p[3] * q[3] * _D % _P, 2 * p[2] * q[2] % _P
    e, f, g, h = b - a, d - c, d + c, b + a
    return e * f % _P, g * h % _P, f * g % _P, e * h % _P


def enrol(server: Server, paths: Sequence[Path], show: Show) -> Sequence[Device]:
    """Let devices join: all of these cards or, where one is refused, none.

    A card that is enrolled already changes nothing; its node key is registered again where the
    SuperLink has lost it (a new database). After a crash, the same command goes on.

    Raises:
        DataError: a card is refused, or its keys are another device's.
        StateError: the SuperLink does not answer or refuses; `devices.json` cannot be written.
    """
    cards = [(path, read_card(path)) for path in paths]
    with _locked(server), control(server) as client:
        everybody = list(devices(server))
        chosen, fresh = [], []
        for path, card in cards:
            device = _device_of_card(everybody, path, card)
            if device is None:
                device = Device(len(everybody), card)
                everybody.append(device)
                fresh.append(device)
            chosen.append(device)
        registered = {node.key for node in nodes_of(client)}
        for device in dict.fromkeys(chosen):
            known = device.card.node in registered
            if not known:
                register(client, device.card.node, f"client-{device.number}")
            if device not in fresh:
                again = "" if known else "; the SuperLink had lost its node key"
                show(f"{device} is enrolled already{again}")
        listed = _keep(server, everybody)
    for device in fresh:
        show(f"{device} is enrolled")
    if fresh:
        _tell(server, listed, show)
    return chosen


def remove(server: Server, named: Sequence[str], show: Show) -> None:
    """Let devices join no more, each named by its card's file or its number.

    Its number, identity and node key stay taken: the device comes back with new keys only.

    Raises:
        DataError: a card is refused, or names nobody who is enrolled.
        StateError: as `enrol`.
    """
    with _locked(server), control(server) as client:
        everybody = list(devices(server))
        leaving = [_named(everybody, name) for name in named]
        ids = {node.key: node.node_id for node in nodes_of(client)}
        for name, device in zip(named, leaving, strict=True):
            if device.removed and device.card.node not in ids:
                raise DataError(f"{name}: {device} was removed already")
            # the list first: one that the SuperLink alone forgot would be registered again
            everybody[device.number] = replace(device, removed=True)
        listed = _keep(server, everybody)
        for device in dict.fromkeys(leaving):
            if device.card.node in ids:
                unregister(client, ids[device.card.node])
            show(f"{device} is removed")
    _tell(server, listed, show)


def devices(server: Server) -> Sequence[Device]:
    """Everybody who was ever enrolled, in the order of their numbers.

    Raises:
        StateError: `devices.json` is damaged.
    """
    path = server.folder / DEVICES
    if not path.exists():
        return []
    try:
        with explain_os_errors(path, "read"):
            entries = json.loads(path.read_bytes())
        enrolled = [
            Device(int(e["number"]), Card(**e["card"]), bool(e["removed"])) for e in entries
        ]
        if [device.number for device in enrolled] != list(range(len(enrolled))):
            raise ValueError("numbers are missing")
    except (ValueError, KeyError, TypeError) as error:
        raise StateError(f"{path} is damaged ({error}); restore it from a copy") from None
    return enrolled


def names(server: Server) -> dict[int, str]:
    """What the enrolled devices are called, by number."""
    return {device.number: device.card.name for device in devices(server)}


def count(server: Server) -> int:
    """Count the devices of the signed directory now."""
    chain = current(server)
    return 0 if chain is None else len(chain.directory.known)


def _device_of_card(everybody: Sequence[Device], path: Path, card: Card) -> Device | None:
    """Find the device of a card. It is None for a new one."""
    for device in everybody:
        same_identity = device.card.identity == card.identity
        same_node = device.card.node == card.node
        if not same_identity and not same_node:
            continue
        if device.removed:
            raise DataError(
                f"{path}: {device} was removed, and keys do not come back; make a new identity on "
                "the device, and print its card again"
            )
        if not (same_identity and same_node):
            which = "identity" if same_identity else "node key"
            raise DataError(
                f"{path}: the {which} is that of {device}, with another card; no two "
                "devices share a key, so make a new identity on one of them"
            )
        return device
    return None


def _named(everybody: Sequence[Device], name: str) -> Device:
    """The device of a number or card, also one whose removal was cut short."""
    if name.isdecimal():
        device = everybody[int(name)] if int(name) < len(everybody) else None
    else:
        card = read_card(Path(name))
        device = next((device for device in everybody if device.card == card), None)
    if device is None:
        raise DataError(f"{name}: nobody with this number or card is enrolled")
    return device


def current(server: Server) -> Chain | None:
    """Return the newest signed directory.

    In a folder made by an earlier privet, the plain list is signed now.

    Returns:
        None: whoever signs it has signed none yet.

    Raises:
        StateError: it is damaged, or rewritten.
    """
    path = server.folder / DIRECTORY
    if path.exists():
        signed = directories.load(path)
        if isinstance(signed, Chain):
            return signed
        with _locked(server):
            return _signed_now(server, signed)
    return None


def pending(server: Server) -> Chain | None:
    """Return the directory that waits for the signature of whoever keeps its key, if any.

    Raises:
        StateError: it is damaged.
    """
    path = server.folder / UNSIGNED
    unsigned = directories.load(path, signed=False) if path.exists() else None
    return unsigned if isinstance(unsigned, Chain) else None


def take(server: Server, path: Path) -> Chain:
    """Put the directory in force that was signed elsewhere.

    Raises:
        DataError: it is not what waits for a signature.
        StateError: it is damaged or not signed by its key.
    """
    signed = directories.load(path)
    with _locked(server):
        wanted = pending(server)
        if wanted is None:
            raise DataError(f"{server.folder}: no directory waits for a signature")
        if not isinstance(signed, Chain) or signed.head.message != wanted.head.message:
            raise DataError(
                f"{path} is not the directory that waits for a signature, "
                f"{server.folder / UNSIGNED}; sign that one"
            )
        directories.write(server.folder / DIRECTORY, signed)
        with explain_os_errors(server.folder / UNSIGNED, "remove"):
            (server.folder / UNSIGNED).unlink()
    return signed


def read_key(path: Path) -> Identity:
    """The secret key of a directory, from the file `privet server directory key` wrote.

    Raises:
        DataError: unreadable, or no key.
    """
    try:
        with open(path, "rb") as file:
            words = file.read(256).decode("ascii", errors="replace").split()
    except OSError as error:
        raise DataError(f"cannot read the key {path}: {error.strerror}") from None
    if len(words) != 1 or not re.fullmatch(r"[0-9a-f]{64}", words[0]):
        raise DataError(f"{path}: expected the secret key of a directory, 64 hexadecimal digits")
    return Identity.of(bytes.fromhex(words[0]))


def _signed_now(server: Server, before: Directory) -> Chain:
    """A folder of an earlier privet: a key is made, and the present list is signed with it."""
    everybody = devices(server)
    if not (server.folder / DIRECTORY_KEY).exists():
        seed = secrets.token_hex(KEY_BYTES)
        write_atomic(server.folder / DIRECTORY_KEY, f"{seed}\n".encode())
    signer = read_key(server.folder / DIRECTORY_KEY)
    empty = Chain(new_fleet(server.hosts), signer.public)
    entries = _missing(empty, everybody)
    if not everybody:
        entries = [Entry(number, key) for number, key in sorted(before.known.items())]
    chain = empty.with_entries(entries).sign(signer)
    directories.write(server.folder / DIRECTORY, chain)
    return chain


def _missing(chain: Chain, everybody: Sequence[Device]) -> list[Entry]:
    """Return the entries that are in `devices.json` and not in the directory yet."""
    entries = {(one.client, one.removed) for one in chain.entries}
    return [
        Entry(device.number, bytes.fromhex(device.card.identity), removed)
        for device in everybody
        for removed in (False, True)
        if (device.removed or not removed) and (device.number, removed) not in entries
    ]


def _keep(server: Server, everybody: Sequence[Device]) -> Chain:
    """Write the list of devices, and then the directory that follows from it.

    The directory is written again by every call.
    """
    write_json_atomic(server.folder / DEVICES, [asdict(device) for device in everybody])
    path, key = server.folder / DIRECTORY, server.folder / DIRECTORY_KEY
    before = directories.load(path) if path.exists() else pending(server)
    if isinstance(before, Directory):
        return _signed_now(server, before)
    if before is None:
        raise StateError(f"{path} is gone; restore it from a copy")
    try:
        chain = before.with_entries(_missing(before, everybody))
    except ProtocolError as error:
        raise StateError(
            f"{path} and {DEVICES} differ ({error}); restore both from a copy"
        ) from None
    if chain.signature:
        return chain
    if not key.exists():
        directories.write(server.folder / UNSIGNED, chain)
        return chain
    chain = chain.sign(read_key(key))
    directories.write(path, chain)
    return chain


def _tell(server: Server, chain: Chain, show: Show) -> None:
    enrolled = len(chain.directory.known)
    if chain.signature:
        show(f"the directory has version {chain.version} and {enrolled} devices; it is signed")
        return
    show(
        f"version {chain.version} of the directory waits for its signature: have "
        f"{server.folder / UNSIGNED} signed (`privet server directory sign`), and hand it in with "
        "`privet server directory take`; until then these devices take part in nothing"
    )


@contextmanager
def _locked(server: Server) -> Iterator[None]:
    """Hold the lock for one enrolment at a time, as two would give out one number."""
    path = server.folder / ".enrolment.lock"
    with explain_os_errors(path, "lock"), open(path, "a", opener=owners_own) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
