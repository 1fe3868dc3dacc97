"""The ledger's file: its tables, its hash chains, and how both are verified.

`client/privacy/ledger.py` decides with them. Nothing here changes a file except `create` and
`insert`.

Hash chains after Haber and Stornetta, How to time-stamp a digital document (1991).
"""

import hashlib
import os
import secrets
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ...common.errors import LedgerCorrupt, StateError
from ...common.files import explain_os_errors, owners_own, sync_folder

FORMAT = 1
_BUSY_TIMEOUT_MS = 30_000
_SCHEMA = """
CREATE TABLE meta (format INTEGER NOT NULL, owner TEXT NOT NULL, releases INTEGER NOT NULL) STRICT;
CREATE TABLE release (
    client TEXT NOT NULL, seq INTEGER NOT NULL, run TEXT NOT NULL, round INTEGER NOT NULL,
    plan TEXT NOT NULL, charges TEXT NOT NULL, payload_sha256 TEXT NOT NULL,
    previous TEXT NOT NULL, hash TEXT NOT NULL,
    PRIMARY KEY (client, seq), UNIQUE (client, run, round)) STRICT;
CREATE TABLE head (client TEXT PRIMARY KEY, count INTEGER NOT NULL, hash TEXT NOT NULL) STRICT;
CREATE TABLE outbox (client TEXT PRIMARY KEY, seq INTEGER NOT NULL, payload BLOB NOT NULL) STRICT;
CREATE TABLE announced (
    client TEXT NOT NULL, run TEXT NOT NULL, attempt INTEGER NOT NULL,
    PRIMARY KEY (client, run)) STRICT;
CREATE TABLE declined (
    client TEXT NOT NULL, run TEXT NOT NULL, round INTEGER NOT NULL, reason TEXT NOT NULL,
    PRIMARY KEY (client, run, round)) STRICT;
"""
_PLANS = "CREATE TABLE IF NOT EXISTS plan (digest TEXT PRIMARY KEY, content TEXT NOT NULL) STRICT"
"""Not in `_SCHEMA`: a ledger that an older privet began gets it with its next release."""
RECOVER = (
    "The file was left as it is. A device whose past spending is unknown must not release: restore "
    "the ledger from a copy, or, for a simulation, start a new run folder"
)
_CORRUPT = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR}
_ADVICE = {
    sqlite3.SQLITE_FULL: "the disk is full: free some space and run again",
    sqlite3.SQLITE_READONLY: "it is read-only: make the file and its folder writable",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened: its folder must exist and be writable",
    sqlite3.SQLITE_BUSY: "another process is holding it: end that process, then run again",
    sqlite3.SQLITE_LOCKED: "another process is holding it: end that process, then run again",
}


class RawRow(NamedTuple):
    """A row of the table `release` as it is stored.

    `charges`: one canonical JSON object a line.
    """

    seq: int
    client: str
    run: str
    round: int
    plan: str
    charges: str
    payload_sha256: str
    previous: str
    hash: str


_COLUMNS = ", ".join(RawRow._fields)


@dataclass(frozen=True)
class Head:
    """The end of a client's chain: how many rows it has, and the last one's hash."""

    count: int
    hash: str


def verify(path: str | os.PathLike[str], owner: str | None = None) -> int:
    """Verify a whole ledger file without changing it: the file, every chain, every kept payload.

    Args:
        path: the ledger.
        owner: whose it must be; None accepts any.

    Returns:
        The number of releases.

    Raises:
        LedgerCorrupt: names the client and the row that does not verify.
        StateError: the file cannot be read.
    """
    path = Path(os.path.abspath(path))
    return sum(inspect(path, owner, chains=True))


def create(path: Path, owner: str) -> None:
    """Create an empty ledger, unless one has appeared meanwhile.

    The file is complete under another name first, so that a half-made ledger never exists; a hard
    link never replaces a file, so that of two processes that create at once one wins.

    Raises:
        StateError: the folder is missing or read-only, the disk is full, or has no hard links.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with explain_os_errors(path, "create"), sentences(path):
        try:
            # SQLite gives what stands beside it (-wal, -shm) the same mode
            os.close(owners_own(str(temporary), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            with closing(connect(temporary, "rw")) as db:
                db.execute("PRAGMA journal_mode = WAL")
                fill(db, owner)
            with suppress(FileExistsError):
                os.link(temporary, path)
            sync_folder(path.parent)
        finally:
            for suffix in ("", "-wal", "-shm", "-journal"):
                Path(f"{temporary}{suffix}").unlink(missing_ok=True)


def fill(db: sqlite3.Connection, owner: str) -> None:
    """Make an empty database an empty ledger."""
    with transaction(db, "BEGIN IMMEDIATE"):
        for statement in filter(str.strip, _SCHEMA.split(";")):
            db.execute(statement)
        db.execute("INSERT INTO meta VALUES (?, ?, 0)", (FORMAT, owner))


def memory(content: bytes | None = None) -> sqlite3.Connection:
    """Open a database in memory, with the content of a ledger.

    SQLite puts no part of it on disk.
    """
    db = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    db.execute("PRAGMA temp_store = MEMORY")
    if content is not None:
        db.deserialize(content)
    return db


def connect(path: Path, mode: str) -> sqlite3.Connection:
    """Open a ledger's file without creating it (`mode`: "rw" or "ro").

    The lock of `Ledger` keeps threads apart.
    """
    db = sqlite3.connect(
        f"{path.as_uri()}?mode={mode}", uri=True, isolation_level=None, check_same_thread=False
    )
    db.execute(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT_MS}")
    db.execute("PRAGMA synchronous = FULL")
    db.execute("PRAGMA fullfsync = ON")  # macOS: fsync alone stops at the drive's cache.
    return db


@contextmanager
def transaction(db: sqlite3.Connection, begin: str) -> Iterator[sqlite3.Connection]:
    """Commit when the block ends, and roll back when it raises."""
    try:
        db.execute(begin)
        yield db
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


@contextmanager
def sentences(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into `LedgerCorrupt` or `StateError`, with what to do."""
    try:
        yield
    except sqlite3.Error as error:
        what_to_do = advice(error)
        if what_to_do is None:
            raise LedgerCorrupt(f"The ledger {path} is damaged ({error}). {RECOVER}.") from error
        raise StateError(
            f"The ledger {path} cannot be used: {what_to_do}. Nothing left the device."
        ) from error


def advice(error: sqlite3.Error) -> str | None:
    """Return what a person can do about an error of SQLite.

    None where the file itself is damaged.
    """
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    return None if code in _CORRUPT else _ADVICE.get(code, f"{error}: check the disk")


def inspect(path: Path, owner: str | None, *, chains: bool = False) -> list[int]:
    """Check a ledger's file through a read-only connection.

    A writing one could repair what must stay as it is.

    Returns:
        The number of releases of each client whose chain was walked; none without `chains`.
    """
    with explain_os_errors(path, "read"):
        if path.stat().st_size == 0:
            raise LedgerCorrupt(f"The ledger {path} is empty: it was cut. {RECOVER}.")
    with sentences(path), closing(connect(path, "ro")) as db, transaction(db, "BEGIN"):
        return inspect_open(path, db, owner, chains=chains)


def inspect_open(
    path: Path, db: sqlite3.Connection, owner: str | None, *, chains: bool = False
) -> list[int]:
    """Check a ledger in an open database, as `inspect` does.

    `path` is for the sentences of errors.
    """
    its_owner = _check_meta(path, db, owner)
    counts = _walk(path, db, its_owner) if chains else []
    _check_total(path, db, its_owner)
    return counts


def _walk(path: Path, db: sqlite3.Connection, owner: str) -> list[int]:
    tables = ("release", "head", "outbox")
    every = " UNION ".join(f"SELECT client FROM {table}" for table in tables)
    names = [name for (name,) in db.execute(f"{every} ORDER BY 1")]
    return [verify_client(path, db, owner, name).count for name in names]


def _check_meta(path: Path, db: sqlite3.Connection, owner: str | None) -> str:
    problems = [text for (text,) in db.execute("PRAGMA quick_check(1)")]
    if problems != ["ok"]:
        raise LedgerCorrupt(f"The ledger {path} is damaged ({problems[0]}). {RECOVER}.")
    metas = db.execute("SELECT * FROM meta").fetchall()
    if len(metas) != 1 or metas[0][0] != FORMAT:
        version = metas[0][0] if metas else "none"
        raise LedgerCorrupt(
            f"The ledger {path} has format {version}; this privet reads format {FORMAT}. The file "
            "was left as it is: use the privet that wrote it, or a newer one."
        )
    its_owner = str(metas[0][1])
    if owner is not None and its_owner != owner:
        raise LedgerCorrupt(
            f"The ledger {path} belongs to {its_owner!r}, and {owner!r} was asked for. The file "
            f"was left as it is: give the ledger of {owner!r}, or a path where there is none."
        )
    return its_owner


def _check_total(path: Path, db: sqlite3.Connection, owner: str) -> None:
    """Find what no chain can show: a client that is gone with all its rows and its head."""
    count, total = db.execute(
        "SELECT COUNT(*), (SELECT releases FROM meta) FROM release"
    ).fetchone()
    if count != total:
        _walk(path, db, owner)  # names the client and the row, where one chain is to blame
        raise LedgerCorrupt(
            f"The ledger {path} holds {count} releases and should hold {total}: all rows of a "
            f"client were removed, or added. {RECOVER}."
        )


def verify_client(path: Path, db: sqlite3.Connection, owner: str, client: str) -> Head:
    """Walk one chain from the start and return the head it ends in, which is the stored one.

    **Guarantee**: a row that was edited, removed, reordered, or moved from another client, run or
    owner is found, also when it is the last; the kept payload is the last release's. A client
    without rows has a chain of length 0.

    Raises:
        LedgerCorrupt: names the client and the row.
    """
    current = Head(0, _digest("privet ledger start", [owner, client]))
    digest = None
    for row in raw_rows(db, client):
        seq = current.count + 1
        if row.seq != seq:
            raise corrupt(path, client, seq, f"it is missing; row {row.seq} comes instead")
        if row.previous != current.hash:
            raise corrupt(path, client, seq, "it does not follow the row before it")
        if row.hash != row_hash(owner, row):
            raise corrupt(path, client, seq, "its content does not match its hash")
        current = Head(seq, row.hash)
        digest = row.payload_sha256
    stored = find_head(db, client) or Head(0, current.hash)
    if stored.count != current.count:
        last = max(stored.count, current.count)
        raise corrupt(path, client, last, f"{current.count} rows, {stored.count} counted")
    if stored != current:
        raise corrupt(path, client, current.count, "it is not the last row that was committed")
    kept = db.execute("SELECT seq, payload FROM outbox WHERE client = ?", (client,)).fetchone()
    if (kept or (0,))[0] != current.count:
        raise corrupt(path, client, current.count, "its payload is missing or another release's")
    if kept and hashlib.sha256(kept[1]).hexdigest() != digest:
        raise corrupt(path, client, current.count, "the kept payload is not the released one")
    return current


def insert(db: sqlite3.Connection, row: RawRow, payload: bytes) -> None:
    """Write row, payload, head and total inside the caller's transaction."""
    marks = ", ".join("?" * len(row))
    db.execute(f"INSERT INTO release ({_COLUMNS}) VALUES ({marks})", row)
    db.execute("INSERT OR REPLACE INTO outbox VALUES (?, ?, ?)", (row.client, row.seq, payload))
    db.execute("INSERT OR REPLACE INTO head VALUES (?, ?, ?)", (row.client, row.seq, row.hash))
    db.execute("UPDATE meta SET releases = releases + 1")


def keep_plan(db: sqlite3.Connection, digest: str, content: str) -> None:
    """Keep the plan a release was asked with, once.

    Its digest is in the row, which is chained.
    """
    db.execute(_PLANS)
    db.execute("INSERT OR IGNORE INTO plan VALUES (?, ?)", (digest, content))


def plans(db: sqlite3.Connection) -> dict[str, str]:
    """Return the plans that were kept, by digest.

    Empty in a ledger of an older privet.
    """
    if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'plan'").fetchone():
        return {}
    return dict(db.execute("SELECT digest, content FROM plan"))


def raw_rows(db: sqlite3.Connection, client: str) -> Iterator[RawRow]:
    """Return a client's rows by `seq`."""
    rows = db.execute(f"SELECT {_COLUMNS} FROM release WHERE client = ? ORDER BY seq", (client,))
    return map(RawRow._make, rows)


def find_row(db: sqlite3.Connection, client: str, run: str, round: int) -> RawRow | None:
    """Return the row of one round, or None."""
    row = db.execute(
        f"SELECT {_COLUMNS} FROM release WHERE client = ? AND run = ? AND round = ?",
        (client, run, int(round)),
    ).fetchone()
    return RawRow._make(row) if row else None


def find_head(db: sqlite3.Connection, client: str) -> Head | None:
    """Return the stored head of a client, or None before its first release."""
    head = db.execute("SELECT count, hash FROM head WHERE client = ?", (client,)).fetchone()
    return Head(*head) if head else None


def row_hash(owner: str, row: RawRow) -> str:
    """Return the hash of a row, over the owner and every field but the hash itself."""
    return _digest("privet ledger row", [owner, *row[:-1]])


def _digest(domain: str, fields: Iterable[str | int]) -> str:
    """Hash a list of fields, each with its length, so that no two lists share an encoding."""
    total = hashlib.sha256()
    for field in (domain, FORMAT, *fields):
        data = str(field).encode()
        total.update(len(data).to_bytes(8, "big") + data)
    return total.hexdigest()


def corrupt(path: Path, client: str, seq: int, why: str) -> LedgerCorrupt:
    """Return the error for a row that does not verify."""
    return LedgerCorrupt(
        f"The ledger {path} does not verify: client {client!r}, row {seq}: {why}. {RECOVER}."
    )
