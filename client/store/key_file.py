"""The vault's key, which key.json holds wrapped by a passphrase or by the OS keyring.

The vault has one key of 32 random bytes. key.json holds it wrapped (AES-256-GCM) under a key that
a passphrase gives (Argon2id) or that the OS keyring keeps. With the keyring, both are needed: the
entry and the file.

**Guarantee**: every wrapping has a new salt, or a new keyring entry, and a new nonce; the vault's
id, the format and the recipe are authenticated with the key. A changed passphrase replaces
key.json as a whole or not at all. `erase_key` overwrites the file before it unlinks it.

**Not covered**: overwriting reaches the blocks of the file as the file system shows them. A disk
that moves blocks (flash), a snapshot or a copy may keep the old ones: they are worth no more than
the passphrase or the keyring entry they were wrapped with.

Argon2id: Biryukov, Dinu, Khovratovich and Josefsson, RFC 9106 (2021); 64 MiB, 3 passes and 4 lanes
are its second recommended setting (section 4).
"""

import hashlib
import importlib
import json
import os
import secrets
import stat
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, TypedDict, cast

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from ...common.errors import ConfigError, StateError
from ...common.files import explain_os_errors, sync_folder
from ...common.secure_aggregation.keys import Secret

__all__ = [
    "FORMAT",
    "KEY_FILE",
    "Keyring",
    "KeyringBackend",
    "Passphrase",
    "Unlock",
    "VaultKey",
    "erase_key",
    "new_key",
    "private_file",
    "read_key",
    "regular",
    "rewrap",
    "unlock_kind",
]


class _Cost(TypedDict):
    iterations: int
    lanes: int
    memory_kib: int


FORMAT = 1
"""Version of a vault, written into key.json and into vault.sqlite."""
KEY_FILE = "key.json"
_SERVICE = "privet"
_KEY, _NONCE, _TAG, _ID = 32, 12, 16, 16
_Publish = Callable[[Path, Path], None]
_MAX_FILE_BYTES = 65_536
_ARGON2ID: _Cost = {"iterations": 3, "lanes": 4, "memory_kib": 65_536}
# What a key.json may ask of this machine at most: 256 MiB and about 5 s.
_BOUNDS = {"iterations": (1, 32), "lanes": (1, 16), "memory_kib": (1024, 262_144)}


class KeyringBackend(Protocol):
    """The methods that privet uses of a backend of the package `keyring`."""

    def get_password(self, service: str, username: str, /) -> str | None: ...
    def set_password(self, service: str, username: str, password: str, /) -> None: ...
    def delete_password(self, service: str, username: str, /) -> None: ...


@dataclass(frozen=True)
class Passphrase:
    """A passphrase that unlocks a vault.

    `repr` masks it.

    The text is taken in Unicode normal form C, so that keyboards that compose accents differently
    give the same bytes.

    Raises:
        ConfigError: it is empty, or not text.
    """

    text: str = field(repr=False)

    def __post_init__(self) -> None:
        if not self.text:
            raise ConfigError("The passphrase is empty, which protects nothing: choose a long one.")
        try:
            self.encoded()
        except UnicodeEncodeError:
            raise ConfigError("The passphrase is not text: type it in UTF-8.") from None

    def __repr__(self) -> str:
        return "Passphrase(***)"

    def encoded(self) -> bytes:
        """Return the bytes that the key is derived from."""
        return unicodedata.normalize("NFC", self.text).encode()


@dataclass(frozen=True)
class Keyring:
    """The operating system's keyring as what unlocks a vault.

    Attributes:
        backend: a keyring; None finds the system's own through the package `keyring`.
    """

    backend: KeyringBackend | None = field(default=None, repr=False)

    def usable(self) -> KeyringBackend:
        """Return the backend in use.

        Raises:
            ConfigError: there is none that keeps anything.
        """
        return _system_keyring() if self.backend is None else self.backend


Unlock = Passphrase | Keyring


def _system_keyring() -> KeyringBackend:
    try:
        backend: KeyringBackend = importlib.import_module("keyring").get_keyring()
    except ImportError:
        raise ConfigError(
            "The OS keyring was asked for, and the Python package 'keyring' is not installed: "
            "install it, or use a passphrase."
        ) from None
    if type(backend).__module__ in ("keyring.backends.fail", "keyring.backends.null"):
        raise ConfigError(
            "The OS keyring was asked for, and this system has none that keeps anything (a server "
            "or a bare console seldom does): use a passphrase."
        )
    return backend


@dataclass(frozen=True)
class VaultKey:
    """A vault's key, unwrapped.

    Attributes:
        vault: 16 bytes, the vault's public id.
        key: 32 bytes, secret.
    """

    vault: bytes
    key: Secret


class _PassphraseRecipe(_Cost):
    """How a passphrase gives the key that wraps the vault's."""

    kind: Literal["passphrase"]
    kdf: str
    salt: str


class _KeyringRecipe(TypedDict):
    """Where the OS keyring has the key that wraps the vault's."""

    kind: Literal["keyring"]
    service: str
    account: str


_Recipe = _PassphraseRecipe | _KeyringRecipe


@dataclass(frozen=True)
class _Wrapped:
    """The content of key.json: whose key, how to get at it (`recipe`), and the sealed key.

    `sealed` begins with its nonce.
    """

    vault: bytes
    recipe: _Recipe
    sealed: bytes

    def to_json(self) -> bytes:
        body = {
            "format": FORMAT,
            "vault": self.vault.hex(),
            "recipe": dict(self.recipe),
            "sealed": self.sealed.hex(),
        }
        return (json.dumps({**body, "checksum": _checksum(body)}, indent=2) + "\n").encode()


def new_key(folder: Path, unlock: Unlock) -> VaultKey:
    """Make a new vault key and write its key.json, where there must be none yet.

    Raises:
        StateError: there is a key.json already, or it cannot be written.
        ConfigError: the keyring cannot be used.
    """
    fresh = VaultKey(secrets.token_bytes(_ID), Secret(secrets.token_bytes(_KEY)))
    _write(folder, fresh, unlock, _publish_new)
    return fresh


def read_key(folder: Path, unlock: Unlock) -> VaultKey:
    """Unwrap the key in key.json.

    Raises:
        StateError: the file is missing, damaged, of a newer format, or asks for too much.
        ConfigError: the passphrase is wrong, or the keyring has no entry, or the vault is unlocked
            in the other way.
    """
    path = folder / KEY_FILE
    return _unwrap(path, _read(path), unlock)


def unlock_kind(folder: str | os.PathLike[str]) -> str:
    """Return how the vault in `folder` is unlocked, without unlocking it.

    It is "passphrase" or "keyring".

    Raises:
        StateError: as `read_key`.
    """
    return _read(Path(folder) / KEY_FILE).recipe["kind"]


def rewrap(folder: str | os.PathLike[str], old: Unlock, new: Unlock) -> None:
    """Change how a vault is unlocked: another passphrase, or to and from the OS keyring.

    **Guarantee**: key.json holds the old wrapping or the new one, whole, at any moment and after a
    crash; the entries are not touched. The replaced file is overwritten (see "Not covered").

    Raises:
        StateError, ConfigError: as `read_key` for `old`; the new keyring cannot be used. The old
            way of unlocking still works then.
    """
    folder = Path(folder)
    path = folder / KEY_FILE
    before = _read(path)
    key = _unwrap(path, before, old)
    with _handle(path) as handle:
        _write(folder, key, new, os.replace)
        with suppress(OSError):  # the name is gone already: this is for the disk's old blocks
            _overwrite(handle)
    if isinstance(old, Keyring) and before.recipe["kind"] == "keyring":
        _forget(old, before.recipe)


@dataclass(frozen=True)
class ErasedKey:
    """The report of what `erase_key` did.

    `sha256`: of key.json before, hex. `keyring`: what became of the keyring's entry.
    """

    sha256: str
    keyring: str


def erase_key(folder: Path, keyring: KeyringBackend | None) -> ErasedKey:
    """Destroy the vault's key.

    It overwrites key.json and its left-over copies, unlinks them, and deletes the keyring's entry.
    A missing key.json is destroyed already, and a damaged one is destroyed as well.

    Raises:
        StateError: key.json is a link or cannot be overwritten; nothing else was done then.
    """
    path = folder / KEY_FILE
    recipe: _Recipe | None = None
    sha256 = ""
    if os.path.lexists(path):
        regular(path)
        with suppress(StateError):
            recipe = _read(path).recipe
        with explain_os_errors(path, "overwrite"):
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            _shred(path)
    with explain_os_errors(folder, "erase the key in"):
        for copy in folder.glob(f".{KEY_FILE}.*.tmp"):
            if stat.S_ISREG(copy.lstat().st_mode):
                _shred(copy)
        sync_folder(folder)
    if recipe is None or recipe["kind"] != "keyring":
        return ErasedKey(sha256, "not used")
    try:
        return ErasedKey(sha256, _forget(Keyring(keyring), recipe))
    except ConfigError as error:
        return ErasedKey(sha256, f"entry could not be deleted ({error})")


def regular(path: Path) -> None:
    """Refuse a path that is not a plain file: privet makes no links, and follows none here.

    Raises:
        StateError: it is missing, or a link, a folder, a device.
    """
    with explain_os_errors(path, "read"):
        mode = path.lstat().st_mode
    if not stat.S_ISREG(mode):
        what = "a link" if stat.S_ISLNK(mode) else "not a plain file"
        raise StateError(
            f"{path} is {what}, and privet makes plain files only; it was not touched. Put the "
            "file itself there, or remove it."
        )


@contextmanager
def private_file(path: Path) -> Iterator[Path]:
    """Make an empty file beside `path` that only its owner can read, removed at the end.

    The caller fills it and gives it its name, so that `path` is never half-written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with explain_os_errors(path, "write"):
        try:
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            yield temporary
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def _write(folder: Path, key: VaultKey, unlock: Unlock, publish: _Publish) -> None:
    path = folder / KEY_FILE
    wrapping, recipe = _new_wrapping(unlock, key.vault)
    nonce = secrets.token_bytes(_NONCE)
    bound = _bound(key.vault, recipe)
    sealed = nonce + AESGCM(wrapping.value).encrypt(nonce, key.key.value, bound)
    try:
        with private_file(path) as temporary:
            with open(temporary, "wb") as file:
                file.write(_Wrapped(key.vault, recipe, sealed).to_json())
                file.flush()
                os.fsync(file.fileno())
            publish(temporary, path)
    except BaseException:
        if isinstance(unlock, Keyring) and recipe["kind"] == "keyring":
            with suppress(ConfigError):
                _forget(unlock, recipe)
        raise


def _publish_new(temporary: Path, path: Path) -> None:
    """Give a new key.json its name, which never replaces one that is there.

    A hard link never replaces a file: of two processes that create at once one wins.
    """
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise StateError(
            f"There is a key already ({path}), which was left as it is: open that vault, or choose "
            "another folder."
        ) from None


def _new_wrapping(unlock: Unlock, vault: bytes) -> tuple[Secret, _Recipe]:
    if isinstance(unlock, Passphrase):
        salt = secrets.token_bytes(16).hex()
        recipe: _PassphraseRecipe = {
            "kind": "passphrase", "kdf": "argon2id", "salt": salt, **_ARGON2ID
        }  # fmt: skip
        return _argon2id(unlock, recipe), recipe
    # A name of its own for each wrapping: until key.json is replaced, the old entry stays.
    account = f"vault-{vault.hex()}-{secrets.token_hex(4)}"
    wrapping = secrets.token_bytes(_KEY)
    backend = unlock.usable()
    with _keyring_answers():
        backend.set_password(_SERVICE, account, wrapping.hex())
        kept = backend.get_password(_SERVICE, account)
    if kept != wrapping.hex():
        raise ConfigError(
            "The OS keyring does not give back what it was asked to keep: use a passphrase."
        )
    return Secret(wrapping), {"kind": "keyring", "service": _SERVICE, "account": account}


def _unwrap(path: Path, wrapped: _Wrapped, unlock: Unlock) -> VaultKey:
    recipe = wrapped.recipe
    if isinstance(unlock, Passphrase) and recipe["kind"] == "passphrase":
        wrapping, given = _argon2id(unlock, recipe), "passphrase"
    elif isinstance(unlock, Keyring) and recipe["kind"] == "keyring":
        wrapping, given = _from_keyring(path, unlock, recipe), "entry in the OS keyring"
    else:
        given = "passphrase" if isinstance(unlock, Passphrase) else "keyring"
        raise ConfigError(
            f"The vault in {path.parent} is unlocked by a {recipe['kind']}, and a {given} was "
            f"given: unlock it by a {recipe['kind']}."
        )
    nonce, sealed = wrapped.sealed[:_NONCE], wrapped.sealed[_NONCE:]
    try:
        key = AESGCM(wrapping.value).decrypt(nonce, sealed, _bound(wrapped.vault, recipe))
    except InvalidTag:
        raise ConfigError(
            f"The {given} is not the one of the vault in {path.parent} (its key.json is not "
            "damaged; the other explanation is that somebody rewrote it). Try again."
        ) from None
    return VaultKey(wrapped.vault, Secret(key))


def _argon2id(unlock: Passphrase, recipe: _PassphraseRecipe) -> Secret:
    try:
        kdf = Argon2id(
            salt=bytes.fromhex(recipe["salt"]),
            length=_KEY,
            iterations=recipe["iterations"],
            lanes=recipe["lanes"],
            memory_cost=recipe["memory_kib"],
        )
        return Secret(kdf.derive(unlock.encoded()))
    except MemoryError:
        raise StateError(
            f"The passphrase cannot be tried: {recipe['memory_kib'] // 1024} MiB of free memory "
            "are needed. Close something and run again."
        ) from None


def _from_keyring(path: Path, unlock: Keyring, recipe: _KeyringRecipe) -> Secret:
    with _keyring_answers():
        kept = unlock.usable().get_password(recipe["service"], recipe["account"])
    try:
        wrapping = bytes.fromhex(kept or "")
    except ValueError:
        wrapping = b""
    if len(wrapping) != _KEY:
        raise ConfigError(
            f"The OS keyring has no usable entry {recipe['account']!r} of {recipe['service']!r} "
            f"for the vault in {path.parent}: log in as the person who made the vault, or unlock "
            "that person's keyring."
        )
    return Secret(wrapping)


def _forget(keyring: Keyring, recipe: _KeyringRecipe) -> str:
    with _keyring_answers():
        keyring.usable().delete_password(recipe["service"], recipe["account"])
    return f"entry {recipe['account']} deleted"


@contextmanager
def _keyring_answers() -> Iterator[None]:
    """Turn any error of a keyring's backend into a `ConfigError`.

    Every keyring has its own errors.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"The OS keyring refuses ({type(error).__name__}): unlock it, or use a passphrase."
        ) from error


def _read(path: Path) -> _Wrapped:
    regular(path)
    with explain_os_errors(path, "read"), open(path, "rb") as file:
        content = file.read(_MAX_FILE_BYTES)
    try:
        body = json.loads(content)
        checksum = body.pop("checksum")
        intact = checksum == _checksum(body)
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        intact, body = False, {}
    if not intact:
        raise StateError(
            f"{path} is damaged: its checksum does not match. It was left as it is; put a copy "
            "back. Without it nobody can open the vault."
        )
    if body.get("format") != FORMAT:
        raise StateError(
            f"The vault in {path.parent} has format version {body.get('format')!r}, and this "
            f"privet reads version {FORMAT}. It was left untouched: use the privet that wrote it, "
            "or a newer one."
        )
    return _checked(path, body)


def _checked(path: Path, body: Mapping[str, object]) -> _Wrapped:
    """Read the parts of an undamaged key.json, which somebody else may have written."""
    with _hostile(path):
        recipe = body["recipe"]
        if not isinstance(recipe, dict):
            raise TypeError
        kind = recipe["kind"]
        names = {"passphrase": ("salt",), "keyring": ("service", "account")}[kind]
        if not all(isinstance(recipe[name], str) for name in names):
            raise ValueError
        vault, sealed = (bytes.fromhex(str(body[name])) for name in ("vault", "sealed"))
        if len(vault) != _ID or len(sealed) != _NONCE + _KEY + _TAG:
            raise ValueError
        wrapped = _Wrapped(vault, cast(_Recipe, recipe), sealed)
        if kind == "keyring":
            return wrapped
        if len(bytes.fromhex(recipe["salt"])) < 8 or recipe["kdf"] != "argon2id":
            raise ValueError
    for name, (minimum, maximum) in _BOUNDS.items():
        value = recipe.get(name)
        if type(value) is not int or not minimum <= value <= maximum:
            raise StateError(
                f"{path} asks for {name} = {value!r} of Argon2id; this privet accepts {minimum} to "
                f"{maximum}. The file was left as it is: privet did not write it; put a copy back."
            )
    return wrapped


@contextmanager
def _hostile(path: Path) -> Iterator[None]:
    """Refuse a key.json whose checksum is right and which privet did not write."""
    try:
        yield
    except (ValueError, KeyError, TypeError):
        raise StateError(
            f"{path} is not a key that privet wrote, though its checksum is right. It was left as "
            "it is; put a copy back."
        ) from None


def _bound(vault: bytes, recipe: _Recipe) -> bytes:
    return b"privet vault key\0" + _canonical([FORMAT, vault.hex(), dict(recipe)])


def _checksum(body: Mapping[str, object]) -> str:
    return hashlib.sha256(_canonical(body)).hexdigest()


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


@contextmanager
def _handle(path: Path) -> Iterator[int]:
    with explain_os_errors(path, "overwrite"):
        handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        try:
            yield handle
        finally:
            os.close(handle)


def _overwrite(handle: int) -> None:
    size = os.fstat(handle).st_size
    os.lseek(handle, 0, os.SEEK_SET)
    with open(handle, "wb", closefd=False) as file:
        file.write(secrets.token_bytes(size))
    os.fsync(handle)


def _shred(path: Path) -> None:
    with _handle(path) as handle:
        _overwrite(handle)
    path.unlink()
