"""The vault of a device: entries with names, sealed one by one in a SQLite file of the home folder.

`vault.sqlite` holds rows, `key.json` the wrapped key (`client/store/key_file.py`). A row's key is
the HMAC of the entry's name; the name, padded to a multiple of 128 bytes, and the data are sealed
apart (AES-256-GCM), so that names can be listed without reading the data. A random 96-bit nonce is
safe for 2^32 uses of one key (NIST SP 800-38D, section 8.3): every write of an entry has a key of
its own, derived from the vault's key, the entry and the number of the transaction, so that this
limit is never met. What is authenticated with each: vault, format, entry, transaction.

**Guarantee, a thief**: who has the folder but neither passphrase nor keyring learns sizes, counts
and dates, and nothing else.

**Guarantee, somebody who can write the file**: an entry that was edited, removed, added, swapped
or put back to an older version is found: when the vault is opened, when another process has written
it, and when the entry is read. The sum of a keyed hash over all rows (entry, transaction, digest)
is sealed and changes in the same transaction as the rows: MSet-Add-Hash of Clarke, Devadas, van
Dijk, Gassend and Suh, Incremental Multiset Hash Functions (2003). Who cannot compute the keyed hash
and never sees the sum changes one unnoticed with probability 2^-256.

**Guarantee, a crash**: a transaction is there whole or not at all, and is on disk when the call
returns (WAL, synchronous=FULL).

**Not covered**: an older copy of the whole folder put back while no process has it open; memory,
swap and core dumps of a process that has it open; copies of the folder made elsewhere.
"""

import hashlib
import hmac
import os
import secrets
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from ...common.errors import StateError
from ...common.files import explain_os_errors
from ...common.secure_aggregation.keys import Secret
from ..privacy import ledger_chain
from .key_file import (
    FORMAT,
    KEY_FILE,
    Keyring,
    Passphrase,
    Unlock,
    VaultKey,
    erase_key,
    new_key,
    private_file,
    read_key,
    regular,
    rewrap,
    unlock_kind,
)

__all__ = [
    "FILE",
    "MAX_ENTRY_BYTES",
    "Keyring",
    "Passphrase",
    "Unlock",
    "Vault",
    "rewrap",
    "unlock_kind",
]

FILE = "vault.sqlite"
MAX_ENTRY_BYTES = 2**29
"""Bytes of one entry at most; a sealed row must fit into memory several times."""
_APPLICATION = 0x70726976  # "priv": what `file` shows
_NONCE, _DIGEST, _PAD, _MAX_NAME_BYTES = 12, 32, 128, 1024
_SCHEMA = (
    "CREATE TABLE entry (id BLOB PRIMARY KEY, generation INTEGER NOT NULL, digest BLOB NOT NULL, "
    "name BLOB NOT NULL, data BLOB NOT NULL) STRICT",
    "CREATE TABLE state (one INTEGER PRIMARY KEY CHECK (one = 1), vault BLOB NOT NULL, "
    "generation INTEGER NOT NULL, digest BLOB NOT NULL, sealed BLOB NOT NULL) STRICT",
)
_STATE = bytes(_DIGEST)
_MODULUS = 2**256
_LEFT = "The file was left as it is"
_COPY = f"{_LEFT}: put back a copy of the whole folder, or erase the vault and begin again"


class Mark(NamedTuple):
    """The right version of an entry, by its last transaction and its row's digest."""

    generation: int
    digest: bytes


class Vault:
    """An open vault, which is a context manager.

    Threads may share it, a fork may not.

    Several processes may have the same vault open: each sees what the others wrote, as of its
    next call.

    Attributes:
        folder: where its files are.
        lock: held during every call; who has a lock of its own around calls uses this one.
    """

    def __init__(self, folder: Path, key: VaultKey) -> None:
        """Use `Vault.create` or `Vault.open`, which verify first."""
        self.folder = folder
        self._path = folder / FILE
        self._keys: _Keys | None = _Keys.of(key)
        self._connection: sqlite3.Connection | None = None
        self.lock = threading.RLock()
        self._marks: dict[bytes, Mark] = {}
        self._total = 0
        self._generation = 0
        self._trusted: tuple[int, bytes] | None = None
        self._writing: bool | None = None
        self._dirty = False

    @classmethod
    def create(cls, folder: str | os.PathLike[str], unlock: Unlock) -> Self:
        """Make an empty vault and open it.

        The folder is made (mode 0700) where there is none.

        Raises:
            StateError: there is a vault, or half of one, already; the disk is full or read-only.
            ConfigError: the keyring cannot be used.
        """
        folder = Path(os.path.abspath(folder))
        with explain_os_errors(folder, "make"):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        there = [name for name in (FILE, KEY_FILE) if os.path.lexists(folder / name)]
        if there:
            raise StateError(
                f"There is a vault already in {folder} ({' and '.join(there)}), which was left as "
                "it is: open it, or choose another folder."
            )
        key = new_key(folder, unlock)
        try:
            with _sentences(folder / FILE), private_file(folder / FILE) as temporary:
                _fill(temporary, key)
                os.link(temporary, folder / FILE)
        except BaseException:
            with suppress(StateError):  # a key of nothing would be in the way next time
                erase_key(folder, unlock.backend if isinstance(unlock, Keyring) else None)
            raise
        return cls._verified(folder, key)

    @classmethod
    def open(cls, folder: str | os.PathLike[str], unlock: Unlock) -> Self:
        """Open and verify the vault in `folder`.

        Raises:
            StateError: a file is missing, damaged, tampered with, or of a newer format; nothing is
                changed.
            ConfigError: the passphrase is wrong, or the keyring has no entry for this vault.
        """
        folder = Path(os.path.abspath(folder))
        _both_there(folder)
        return cls._verified(folder, read_key(folder, unlock))

    @classmethod
    def _verified(cls, folder: Path, key: VaultKey) -> Self:
        vault = cls(folder, key)
        # While a reader is there, no writer that closes moves the journal into a file that turns
        # out to be damaged.
        with _sentences(vault._path), closing(ledger_chain.connect(vault._path, "ro")) as reader:
            _check_file(vault._path, reader)
            try:
                with vault.transaction(writing=False):
                    pass
            except BaseException:
                vault.close()
                raise
        return vault

    def close(self) -> None:
        """Close the file, and let go of the keys.

        The vault cannot be used afterwards.
        """
        with self.lock:
            connection, self._connection = self._connection, None
            self._keys = None
            self._marks.clear()
            if connection is not None:
                with _sentences(self._path):
                    connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Vault({os.fspath(self.folder)!r})"

    def get(self, name: str) -> bytes | None:
        """Return the data of an entry, or None where there is none.

        Raises:
            StateError: the entry is damaged or was tampered with.
        """
        with self.transaction(writing=False):
            entry = self._open_keys.id(name)
            row = self._row(entry)
            return None if row is None else self._opened(entry, row[0], "data", row[3])

    def put(self, name: str, data: bytes) -> None:
        """Write one entry.

        It is durable when the call, or the transaction around it, returns.

        Raises:
            StateError: the disk is full or read-only, the entry too large; nothing was written.
        """
        self.put_all({name: data})

    def put_all(self, entries: Mapping[str, bytes | None]) -> None:
        """Write entries, and delete those that are None, in one durable transaction.

        **Guarantee**: all or nothing, also after a crash and on a full disk. A deleted entry's
        bytes are overwritten in the file; the journal may keep their sealed form a while.

        Raises:
            StateError: the disk is full or read-only, an entry too large; nothing was written.
        """
        if not entries:
            return
        with self.transaction():
            for name, data in entries.items():
                if data is None:
                    self._delete(self._open_keys.id(name))
                else:
                    self._insert(name, data)
            self._dirty = True

    def names(self, prefix: str = "") -> list[str]:
        """Return the names that begin with `prefix`, sorted.

        Raises:
            StateError: an entry is damaged or was tampered with.
        """
        with self.transaction(writing=False):
            rows = self._rows("SELECT id, generation, name FROM entry", bytes, int, bytes)
            names = [self._name(*row) for row in rows]
        return sorted(name for name in names if name.startswith(prefix))

    def version(self, name: str) -> int | None:
        """Return a number that changes when the entry is written.

        None where there is no entry.
        """
        with self.transaction(writing=False):
            mark = self._marks.get(self._open_keys.id(name))
            return None if mark is None else mark.generation

    @contextmanager
    def transaction(self, *, writing: bool = True, outermost: bool = False) -> Iterator[None]:
        """Make the calls in the block one transaction: all of them durable at its end, or none.

        **Guarantee**: while it lasts no other process writes the vault (`writing`), or what this
        one reads does not change (not `writing`). Transactions may be nested: only the end of the
        outermost is durable. `outermost` refuses to be nested, for who hands something out next.

        Raises:
            StateError: nested where it must not be, or a write inside a block that only reads; and
                as `put_all` and `get`.
        """
        with self.lock, _sentences(self._path):
            if self._writing is None:
                with self._whole(writing):
                    yield
                return
            if outermost or (writing and not self._writing):
                raise StateError(
                    f"The vault {self.folder} has a transaction open that is not durable yet, or "
                    "only reads: end it before this one."
                )
            yield

    @contextmanager
    def _whole(self, writing: bool) -> Iterator[None]:
        connection = self._connected()
        self._writing, self._dirty = writing, False
        try:
            with ledger_chain.transaction(connection, "BEGIN IMMEDIATE" if writing else "BEGIN"):
                version = self._refresh()
                yield
                if self._dirty:
                    version = (version[0], self._write_state())
            self._trusted = version
            self._generation += self._dirty
        except BaseException:
            self._trusted = None  # the marks may say what was rolled back: walk again
            raise
        finally:
            self._writing = None

    @property
    def _open_keys(self) -> "_Keys":
        if self._keys is None:
            raise StateError(f"The vault {self.folder} is closed: open it again.")
        return self._keys

    def _connected(self) -> sqlite3.Connection:
        _ = self._open_keys
        if self._connection is None:
            self._connection = ledger_chain.connect(self._path, "rw")
            _careful(self._connection)
        return self._connection

    def _refresh(self) -> tuple[int, bytes]:
        """Walk all digests, unless nothing was written since this process did.

        Returns:
            What changes when the file is written: SQLite's counter for other connections, and the
            sealed state.
        """
        ((version,),) = self._rows("PRAGMA data_version", int)
        query = "SELECT vault, generation, digest, sealed FROM state"
        states = self._rows(query, bytes, int, bytes, bytes)
        if len(states) == 1 and self._trusted == (version, states[0][3]):
            return version, states[0][3]
        _check_file(self._path, self._connected())
        if len(states) != 1:
            self._damaged("its state is missing")
        count, total = self._opened_state(*states[0])
        marks, walked = self._walked()
        if (len(marks), walked) != (count, total):
            self._blame()
        if states[0][1] < self._generation:
            self._tampered("an older state was put back while it was in use")
        self._marks, self._total, self._generation = marks, total, states[0][1]
        return version, states[0][3]

    def _walked(self) -> tuple[dict[bytes, Mark], int]:
        marks: dict[bytes, Mark] = {}
        total = 0
        query = "SELECT id, generation, digest FROM entry"
        for entry, generation, digest in self._rows(query, bytes, int, bytes):
            if len(entry) != _DIGEST or len(digest) != _DIGEST or generation < 1:
                self._damaged("a row has the wrong shape")
            marks[entry] = Mark(generation, digest)
            total += self._open_keys.element(entry, marks[entry])
        return marks, total % _MODULUS

    def _rows(self, query: str, *types: type) -> list[tuple[Any, ...]]:
        """Run a query, and refuse values of a type that privet does not write.

        A damaged or hostile file may have given any.
        """
        rows = self._connected().execute(query).fetchall()
        for row in rows:
            if tuple(map(type, row)) != types:
                self._damaged("a row has the wrong shape")
        return rows

    def _opened_state(
        self, vault: bytes, generation: int, digest: bytes, sealed: bytes
    ) -> tuple[int, int]:
        """Open the sealed truth: count of entries, sum of their hashes."""
        if hashlib.sha256(sealed).digest() != digest:
            self._damaged("its state does not match its checksum")
        if vault != self._open_keys.vault:
            raise StateError(
                f"{self._path} and {KEY_FILE} beside it belong to two different vaults. {_LEFT}: "
                "put back the two files that belong together."
            )
        plain = self._open_keys.open("state", _STATE, generation, sealed)
        if plain is None or len(plain) != 8 + _DIGEST:
            self._tampered("its state was not written with this vault's key")
        return int.from_bytes(plain[:8], "big"), int.from_bytes(plain[8:], "big")

    def _write_state(self) -> bytes:
        generation = self._generation + 1
        sealed = self._open_keys.state(generation, len(self._marks), self._total)
        digest = hashlib.sha256(sealed).digest()
        change = "UPDATE state SET generation = ?, digest = ?, sealed = ?"
        self._connected().execute(change, (generation, digest, sealed))
        return sealed

    def _insert(self, name: str, data: bytes) -> None:
        if len(data) > MAX_ENTRY_BYTES:
            raise StateError(
                f"The entry {name!r} has {len(data)} bytes; the vault keeps at most "
                f"{MAX_ENTRY_BYTES} in one entry. Nothing was written: split it."
            )
        entry, generation = self._open_keys.id(name), self._generation + 1
        sealed_name = self._open_keys.seal("name", entry, generation, _padded(name))
        sealed = self._open_keys.seal("data", entry, generation, data)
        mark = Mark(generation, _row_digest(sealed_name, sealed))
        row = (entry, *mark, sealed_name, sealed)
        self._connected().execute("INSERT OR REPLACE INTO entry VALUES (?, ?, ?, ?, ?)", row)
        self._account(entry, mark)

    def _delete(self, entry: bytes) -> None:
        self._connected().execute("DELETE FROM entry WHERE id = ?", (entry,))
        self._account(entry, None)

    def _account(self, entry: bytes, mark: Mark | None) -> None:
        old = self._marks.pop(entry, None)
        if old is not None:
            self._total -= self._open_keys.element(entry, old)
        if mark is not None:
            self._marks[entry] = mark
            self._total += self._open_keys.element(entry, mark)
        self._total %= _MODULUS

    def _row(self, entry: bytes) -> tuple[Any, ...] | None:
        """Return the row of an entry, which is the one that was verified."""
        query = f"SELECT generation, digest, name, data FROM entry WHERE id = x'{entry.hex()}'"
        rows = self._rows(query, int, bytes, bytes, bytes)
        row = rows[0] if rows else None
        if row is not None and _row_digest(row[2], row[3]) != row[1]:
            self._damaged("a row does not match its checksum")
        if (None if row is None else row[:2]) != self._marks.get(entry):
            self._tampered("a row is not the one that was written last")
        return row

    def _opened(self, entry: bytes, generation: int, purpose: str, sealed: bytes) -> bytes:
        plain = self._open_keys.open(purpose, entry, generation, sealed)
        if plain is None:
            self._tampered("a row was not written with this vault's key")
        return plain

    def _name(self, entry: bytes, generation: int, sealed: bytes) -> str:
        if self._open_keys.open("name", entry, generation, sealed) is None:
            self._row(entry)  # says it better: damaged, or not the one written last
        plain = self._opened(entry, generation, "name", sealed)
        name = plain.rstrip(b"\0").decode(errors="replace")
        if self._open_keys.id(name) != entry:
            self._tampered("a row has the name of another one")
        return name

    def _blame(self) -> NoReturn:
        for (entry,) in self._rows("SELECT id FROM entry", bytes):
            query = f"SELECT digest, name, data FROM entry WHERE id = x'{entry.hex()}'"
            for digest, name, data in self._rows(query, bytes, bytes, bytes):
                if _row_digest(name, data) != digest:
                    self._damaged("a row does not match its checksum")
        self._tampered("entries were removed, added or put back by somebody without its key")

    def _damaged(self, why: str) -> NoReturn:
        raise StateError(f"The vault {self._path} is damaged: {why}. {_COPY}.")

    def _tampered(self, why: str) -> NoReturn:
        raise StateError(f"The vault {self._path} was tampered with: {why}. {_COPY}.")


@dataclass(frozen=True, repr=False)
class _Keys:
    """A vault's id, and its keys for each purpose (HKDF-SHA256, RFC 5869)."""

    vault: bytes
    names: Secret
    rows: Secret
    sums: Secret

    @classmethod
    def of(cls, key: VaultKey) -> Self:
        def derived(purpose: bytes) -> Secret:
            info = b"privet vault %d %s" % (FORMAT, purpose)
            hkdf = HKDF(hashes.SHA256(), length=_DIGEST, salt=key.vault, info=info)
            return Secret(hkdf.derive(key.key.value))

        return cls(key.vault, derived(b"names"), derived(b"rows"), derived(b"sums"))

    def id(self, name: str) -> bytes:
        """Return the row key of an entry."""
        return hmac.digest(self.names.value, _encoded(name), "sha256")

    def element(self, entry: bytes, mark: Mark) -> int:
        """Return what a row adds to the sum of hashes.

        Every part of what is hashed has a fixed length.
        """
        message = entry + mark.generation.to_bytes(8, "big") + mark.digest
        return int.from_bytes(hmac.digest(self.sums.value, message, "sha256"), "big")

    def seal(self, purpose: str, entry: bytes, generation: int, plain: bytes) -> bytes:
        """Seal bytes as nonce (12 bytes), ciphertext and tag (16 bytes)."""
        cipher, bound = self._cipher(purpose, entry, generation)
        nonce = secrets.token_bytes(_NONCE)
        return nonce + cipher.encrypt(nonce, plain, bound)

    def open(self, purpose: str, entry: bytes, generation: int, sealed: bytes) -> bytes | None:
        """Open what `seal` sealed for the same purpose, entry and transaction.

        None for anything else.
        """
        cipher, bound = self._cipher(purpose, entry, generation)
        try:
            return cipher.decrypt(sealed[:_NONCE], sealed[_NONCE:], bound)
        except (InvalidTag, ValueError):
            return None

    def state(self, generation: int, count: int, total: int) -> bytes:
        """Return the sealed state of a vault."""
        plain = count.to_bytes(8, "big") + total.to_bytes(_DIGEST, "big")
        return self.seal("state", _STATE, generation, plain)

    def _cipher(self, purpose: str, entry: bytes, generation: int) -> tuple[AESGCM, bytes]:
        parts = (b"privet vault", bytes([FORMAT]), self.vault, purpose.encode(), entry)
        bound = b"\0".join(parts) + generation.to_bytes(8, "big", signed=True)
        return AESGCM(hmac.digest(self.rows.value, bound, "sha256")), bound


def _both_there(folder: Path) -> None:
    there = {name: os.path.lexists(folder / name) for name in (FILE, KEY_FILE)}
    if not any(there.values()):
        raise StateError(f"There is no vault in {folder}: make one with `privet client init`.")
    if not there[KEY_FILE]:
        raise StateError(
            f"The vault in {folder} has no {KEY_FILE}: it was moved or destroyed, and without it "
            f"nobody can open {FILE}. Put a copy of it back, or erase the vault."
        )
    if not there[FILE]:
        raise StateError(
            f"{folder} has a {KEY_FILE} and no {FILE}: the entries were moved or removed, or "
            f"making the vault was interrupted. Put {FILE} back; if the vault was never used, "
            f"remove {KEY_FILE} and make it again."
        )
    regular(folder / FILE)


def _fill(path: Path, key: VaultKey) -> None:
    """Make an empty vault in an empty file."""
    with closing(ledger_chain.connect(path, "rw")) as db:
        db.execute("PRAGMA journal_mode = WAL")
        with ledger_chain.transaction(db, "BEGIN IMMEDIATE"):
            db.execute(f"PRAGMA application_id = {_APPLICATION}")
            db.execute(f"PRAGMA user_version = {FORMAT}")
            for statement in _SCHEMA:
                db.execute(statement)
            sealed = _Keys.of(key).state(1, 0, 0)
            digest = hashlib.sha256(sealed).digest()
            db.execute("INSERT INTO state VALUES (1, ?, 1, ?, ?)", (key.vault, digest, sealed))


def _careful(db: sqlite3.Connection) -> None:
    db.execute("PRAGMA trusted_schema = OFF")
    db.execute("PRAGMA secure_delete = ON")
    db.execute("PRAGMA temp_store = MEMORY")


def _check_file(path: Path, db: sqlite3.Connection) -> None:
    """Refuse a file that is not a vault of this version, with its tables and nothing else.

    A trigger would be something else.
    """
    (application,) = db.execute("PRAGMA application_id").fetchone()
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if application == _APPLICATION and version > FORMAT:
        raise StateError(
            f"The vault {path} has format version {version}, and this privet reads version "
            f"{FORMAT}. It was left untouched: use the privet that wrote it, or a newer one."
        )
    rows = db.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY name")
    schema = tuple(sql for (sql,) in rows)
    if (application, version, schema) != (_APPLICATION, FORMAT, _SCHEMA):
        raise StateError(
            f"The vault {path} is damaged: it has not the tables of a vault (cut, overwritten, or "
            f"another database). {_COPY}."
        )


@contextmanager
def _sentences(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into sentences, with what to do."""
    try:
        yield
    except sqlite3.Error as error:
        what_to_do = ledger_chain.advice(error)
        if what_to_do is None:
            raise StateError(f"The vault {path} is damaged ({error}). {_COPY}.") from error
        raise StateError(
            f"The vault {path} cannot be used: {what_to_do}. Nothing was written."
        ) from error


def _encoded(name: str) -> bytes:
    try:
        data = name.encode()
    except UnicodeEncodeError:
        data = b""
    if not 0 < len(data) <= _MAX_NAME_BYTES or b"\0" in data:
        raise StateError(
            f"{name[:80]!r} cannot name an entry of the vault: 1 to {_MAX_NAME_BYTES} bytes of "
            "UTF-8 without NUL are needed."
        )
    return data


def _padded(name: str) -> bytes:
    data = _encoded(name)
    return data.ljust(-(-len(data) // _PAD) * _PAD, b"\0")


def _row_digest(name: bytes, data: bytes) -> bytes:
    return hashlib.sha256(len(name).to_bytes(8, "big") + name + data).digest()
