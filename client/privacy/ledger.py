"""The ledger of what a device has spent: one row per release, durable before the bytes leave.

The rows are chained by hash.

One SQLite file holds the ledger of one owner (a device, or a run whose simulated devices share the
file), with one hash chain per client: each row's hash covers the row and the hash before it, and a
head per client (count, last hash) changes in the same transaction. `client/privacy/gate.py` asks in
this order: `resend`, then `check`, then `commit`.

**Guarantee**: when `commit` returns, the row is on disk (WAL, synchronous=FULL, one transaction for
row, head and payload), and the gate hands out bytes only after that. A crash before the commit:
nothing spent, nothing left the device. A crash after it: either the bytes never leave and one
release too many is counted, or `resend` gives the very same bytes again, which costs nothing.
`commit` refuses charges that `check` did not allow on the chain as it is now, so that two processes
cannot pass the budget together.

**Not covered**: the chain has no key. It finds rows that were edited, removed, reordered or moved,
in the middle and at the end; it does not find somebody who computes every hash anew, nor an older
copy of the whole file put back. The outbox holds the last payload as the gate released it: noised
under `noise_at = device`, only clipped under `noise_at = server`.

`Ledger.open` keeps the file as it is, for simulations. `Ledger.in_vault` keeps the same database as
a sealed entry of the device's vault, which adds the key that the chain has not.

`client/privacy/ledger_chain.py` has the tables and the hashes.
"""

import atexit
import hashlib
import os
import sqlite3
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol, Self, TypeVar

from ...common.errors import BudgetExceeded, LedgerCorrupt, PrivacyError, PrivetError, StateError
from ...common.privacy.accounting import Charge, epsilon, within
from . import ledger_chain
from .ledger_chain import Head, RawRow, verify

if TYPE_CHECKING:  # a simulation's ledger needs no vault, and loads no cryptography
    from ..store.vault import Vault

__all__ = ["Declined", "Ledger", "Limit", "Row", "budget_of", "verify", "without_directory"]

_Budget = TypeVar("_Budget", bound=float)

MAX_DECLINED = 1000
LONGEST_REASON = 1000
_ENTRY, _BEGUN = "ledger", "ledger-begun"


@dataclass(frozen=True)
class Row:
    """One release in the ledger.

    `seq` counts a client's releases from 1. Hashes are lower-case hex SHA-256.
    """

    seq: int
    client: str
    run: str
    round: int
    plan: str
    charges: tuple[Charge, ...]
    payload_sha256: str
    previous: str
    hash: str


@dataclass(frozen=True)
class Declined:
    """A round in which a client released nothing, and why."""

    client: str
    run: str
    round: int
    reason: str


class Limit(float):
    """A largest epsilon that knows who set it.

    Attributes:
        whose: a part of a sentence: who set it, and where.
        mend: what can be done by whom, where a release would pass it.
        of_run: whether it is a run's own cap, of what is spent in that run.
        setting: its name in the file it is set in.
    """

    whose: str
    mend: str
    of_run: bool
    setting: str

    def __new__(
        cls,
        max_epsilon: float,
        whose: str = "",
        mend: str = "",
        of_run: bool = False,
        setting: str = "",
    ) -> Self:
        """Make a limit, which is a plain budget without the words."""
        made = super().__new__(cls, max_epsilon)
        made.whose, made.mend, made.of_run, made.setting = whose, mend, of_run, setting
        return made


class Ledger:
    """An open ledger, which is a context manager.

    Open one per process, keep it, and close it.

    Threads may share it. A fork may happen at any time outside a call: the connection is closed
    before the fork and opened again by the next call on either side, because SQLite's locks do not
    survive a fork. Each client's chain is verified before its first use in a process, and again
    when another process has moved its head.
    """

    def __init__(self, storage: "Storage", owner: str) -> None:
        """Use `Ledger.open` or `Ledger.in_vault`, which create or verify it first."""
        self._storage = storage
        self._path = storage.path
        self._owner = owner
        self._lock = storage.lock
        self._verified: dict[str, Head] = {}
        self._allowed: dict[str, tuple[Head, str]] = {}
        _close_at_fork_and_exit(self)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, owner: str) -> Self:
        """Open the ledger of `owner` (a run or device id), creating it where there is none.

        Raises:
            LedgerCorrupt: the file is damaged, of a newer format, or another owner's; it is left
                as it is.
            StateError: the file cannot be read or written.
        """
        path = Path(os.path.abspath(path))
        # In this order: a ledger's journal appears only after the ledger itself. An empty one is
        # what reading leaves behind.
        journal = Path(f"{path}-wal")
        has_journal = journal.exists() and journal.stat().st_size > 0
        if not path.exists():
            if has_journal:
                raise LedgerCorrupt(
                    f"The ledger {path} is missing but its journal {journal} is there: the "
                    f"ledger was moved or deleted. {ledger_chain.RECOVER}."
                )
            ledger_chain.create(path, owner)
        ledger_chain.inspect(path, owner)
        return cls(FileStorage(path), owner)

    @classmethod
    def in_vault(cls, vault: "Vault", *, owner: str) -> Self:
        """Open the ledger that `vault` keeps sealed, beginning it where there never was one.

        It is held in memory; what a method writes is in the vault, durably, when it returns. Do not
        close the vault before the ledger's last use.

        Raises:
            LedgerCorrupt: the vault had a ledger and has none, or one that does not verify, or
                another owner's; it is left as it is.
            StateError: the vault cannot be read or written.
        """
        storage = VaultStorage(vault)
        with ledger_chain.sentences(storage.path):
            storage.begin(owner)
            with storage.transaction("BEGIN") as db:
                ledger_chain.inspect_open(storage.path, db, owner)
        return cls(storage, owner)

    def close(self) -> None:
        """Close the file, which a later call opens again."""
        with self._lock, ledger_chain.sentences(self._path):
            self._storage.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Ledger({os.fspath(self._path)!r}, owner={self._owner!r})"

    def check(
        self,
        client: str,
        charges: Sequence[Charge],
        budgets: Mapping[str, float],
        delta: float,
        run: str = "",
        caps: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Allow a release of `charges` within `budgets`, or refuse it.

        `budgets`: epsilon by unit, or for one adversary by `unit/against`, which then counts.

        **Guarantee**: for every line (unit, against, adjacency) of everything this client released
        and of `charges`, the composed epsilon at `delta` is at most its budget. A line without a
        budget has none to spend; an epsilon that is not a number is over every budget. Of what was
        released in `run` it is at most its own cap (`caps`, by the same names), too, where there
        is one. Nothing is written.

        Raises:
            BudgetExceeded: the release would pass a budget; nothing was spent.
            PrivacyError: `charges` is empty: whatever leaves must say what it costs.
        """
        if not charges:
            raise PrivacyError(
                f"Client {client!r}: a release must carry at least one charge; got none. Pass the "
                "charges of its mechanism (noise multiplier 0 for none)."
            )
        with self._transaction("BEGIN") as db:
            head = self._trusted_head(db, client)
            past = _charges(self._path, db, client)
            mine = _charges(self._path, db, client, run) if caps else ()
        before, new = ([c for c in some if c.unit in caps] for some in (mine, charges))
        _refuse_over_budget(client, before, new, caps, delta, " of this run")
        _refuse_over_budget(client, past, charges, budgets, delta)
        self._allowed[client] = (head, _canonical(charges))

    def commit(
        self,
        client: str,
        run: str,
        round: int,
        plan: str,
        charges: Sequence[Charge],
        payload: bytes,
        asked: str = "",
    ) -> None:
        """Record a release in one durable transaction: row, head and payload.

        **Guarantee**: when this returns, the row is on disk; when it raises, the caller must not
        hand out `payload`.

        Args:
            client: whose release.
            run: id of the run.
            round: number of the round in the run.
            plan: hash of the round's plan, hex.
            charges: what `check` has just allowed for this client.
            payload: the bytes that leave, kept until the client's next release.
            asked: the plan itself, kept for whoever asks later what its noise is worth.

        Raises:
            StateError: this round was released before, or the file cannot be written.
            PrivacyError: `check` has not allowed these charges, or another process has released
                for this client since.
            LedgerCorrupt: the client's chain does not verify.
        """
        text = _canonical(charges)
        with self._transaction("BEGIN IMMEDIATE") as db:
            head = self._trusted_head(db, client)
            if ledger_chain.find_row(db, client, run, round) is not None:
                raise StateError(
                    f"Client {client!r} has released round {round} of run {run!r} already; a round "
                    "is counted once. Send the same bytes again with resend()."
                )
            if self._allowed.pop(client, None) != (head, text):
                raise PrivacyError(
                    f"Client {client!r}, round {round}: these charges were not allowed by check() "
                    "on the ledger as it is now; nothing was spent. Call check() again."
                )
            digest = hashlib.sha256(payload).hexdigest()
            seq = head.count + 1
            row = RawRow(seq, client, run, int(round), plan, text, digest, head.hash, "")
            row = row._replace(hash=ledger_chain.row_hash(self._owner, row))
            ledger_chain.insert(db, row, payload)
            if asked:
                ledger_chain.keep_plan(db, plan, asked)
        self._verified[client] = Head(seq, row.hash)

    def resend(self, client: str, run: str, round: int, plan: str) -> bytes | None:
        """Return the bytes released for this round before, or None where there was no release.

        **Guarantee**: a server that asks for the same round again gets the very same bytes, at no
        cost; one that asks with another plan gets nothing.

        Raises:
            PrivacyError: the round was released under another plan, or its bytes are not kept.
            LedgerCorrupt: the chain or the kept bytes do not verify.
        """
        with self._transaction("BEGIN") as db:
            self._trusted_head(db, client)
            row = ledger_chain.find_row(db, client, run, round)
            kept = db.execute("SELECT seq, payload FROM outbox WHERE client = ?", (client,))
            seq, payload = kept.fetchone() or (None, b"")
        if row is None:
            return None
        where = f"Client {client!r} has released round {round} of run {run!r}"
        if row.plan != plan:
            raise PrivacyError(
                f"{where} under plan {row.plan}, and was asked again with plan {plan}; it answers "
                "a round once. Ask the next round."
            )
        if seq != row.seq:
            raise PrivacyError(
                f"{where}, and its bytes are not kept any more: only those of the last release "
                "are. Ask the next round."
            )
        if hashlib.sha256(payload).hexdigest() != row.payload_sha256:
            raise ledger_chain.corrupt(
                self._path, client, row.seq, "the kept payload is another one"
            )
        return bytes(payload)

    def decline(self, client: str, run: str, round: int, reason: str) -> None:
        """Record that a client released nothing in a round, and why.

        The last reason stands. It is not part of the hash chain.

        Of one client the last thousand are kept: a server may ask for any round of any run.

        Raises:
            StateError: the file cannot be written.
        """
        with self._transaction("BEGIN IMMEDIATE") as db:
            db.execute(
                "INSERT OR REPLACE INTO declined (client, run, round, reason) VALUES (?, ?, ?, ?)",
                (client, run, int(round), reason[:LONGEST_REASON]),
            )
            db.execute(
                "DELETE FROM declined WHERE client = ?1 AND rowid <= (SELECT rowid FROM declined "
                "WHERE client = ?1 ORDER BY rowid DESC LIMIT 1 OFFSET ?2)",
                (client, MAX_DECLINED),
            )

    def announce(self, client: str, run: str, attempt: int) -> int:
        """Record, durably, that `client` announces keys for a masked attempt.

        Returns:
            The largest attempt of this run it announced before, 0 where there is none. The caller
            refuses an attempt that is not larger.
        """
        with self._transaction("BEGIN IMMEDIATE") as db:
            query = "SELECT attempt FROM announced WHERE client = ? AND run = ?"
            found = db.execute(query, (client, run)).fetchone()
            last = 0 if found is None else int(found[0])
            db.execute(
                "INSERT OR REPLACE INTO announced VALUES (?, ?, ?)",
                (client, run, max(last, int(attempt))),
            )
            return last

    def clients(self) -> list[str]:
        """Return the names of all clients that released something, sorted."""
        with self._transaction("BEGIN") as db:
            return [name for (name,) in db.execute("SELECT client FROM head ORDER BY client")]

    def rows(self, client: str) -> list[Row]:
        """Return a client's releases, oldest first, after its chain was verified."""
        with self._transaction("BEGIN") as db:
            self._trusted_head(db, client)
            raws = ledger_chain.raw_rows(db, client)
            return [
                Row(
                    **{
                        **raw._asdict(),
                        "charges": _parsed(self._path, client, raw.seq, raw.charges),
                    }
                )
                for raw in raws
            ]

    def charges(self, client: str) -> tuple[Charge, ...]:
        """Return everything a client has spent, oldest first, after its chain was verified."""
        with self._transaction("BEGIN") as db:
            self._trusted_head(db, client)
            return _charges(self._path, db, client)

    def plans(self) -> dict[str, str]:
        """Return the plans that releases were asked with, by digest.

        Releases of an older privet have none.
        """
        with self._transaction("BEGIN") as db:
            return ledger_chain.plans(db)

    def releases(self, run: str) -> dict[int, int]:
        """Count the releases of all clients in each round of a run."""
        with self._transaction("BEGIN") as db:
            asked = "SELECT round, COUNT(*) FROM release WHERE run = ? GROUP BY round"
            return dict(db.execute(asked, (run,)).fetchall())

    def releases_of(self, client: str, run: str) -> int:
        """Count the releases of a client in one run, after its chain was verified."""
        with self._transaction("BEGIN") as db:
            self._trusted_head(db, client)
            asked = "SELECT COUNT(*) FROM release WHERE client = ? AND run = ?"
            return int(db.execute(asked, (client, run)).fetchone()[0])

    def participations(self, client: str) -> int:
        """Count the releases of a client, 0 for an unknown one."""
        with self._transaction("BEGIN") as db:
            return self._trusted_head(db, client).count

    def declined(self, client: str | None = None) -> list[Declined]:
        """Return the declined rounds of one client, or of all, by client, run and round."""
        with self._transaction("BEGIN") as db:
            rows = db.execute(
                "SELECT client, run, round, reason FROM declined "
                "WHERE client = ?1 OR ?1 IS NULL ORDER BY client, run, round",
                (client,),
            )
            return [Declined(*raw) for raw in rows]

    def _trusted_head(self, db: sqlite3.Connection, client: str) -> Head:
        """Return a client's stored head, verified.

        The chain is walked unless this is the head that this process has seen.
        """
        head = ledger_chain.find_head(db, client)
        known = self._verified.get(client)
        if head is None or head != known:
            head = ledger_chain.verify_client(self._path, db, self._owner, client)
            if known and head.count < known.count:
                raise ledger_chain.corrupt(
                    self._path, client, known.count, "it was there and is gone"
                )
            self._verified[client] = head
        return head

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        with self._lock, ledger_chain.sentences(self._path), self._storage.transaction(begin) as db:
            yield db


class Storage(Protocol):
    """The storage of a ledger, which gives the connection and makes transactions durable.

    Attributes:
        path: for the sentences.
        lock: keeps the threads of this process apart.
    """

    path: Path
    lock: threading.RLock

    def transaction(self, begin: str) -> AbstractContextManager[sqlite3.Connection]:
        """Open a transaction that is durable when the block ends, and undone when it raises."""

    def close(self) -> None:
        """Close the connection, which the next transaction opens again."""


class FileStorage:
    """A ledger's storage in a SQLite file of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None

    @contextmanager
    def transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        """Open a transaction on the file, as `Storage` says."""
        if self._connection is None:
            self._connection = ledger_chain.connect(self.path, "rw")
        with ledger_chain.transaction(self._connection, begin) as db:
            yield db

    def close(self) -> None:
        """Close the connection to the file."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


class VaultStorage:
    """A ledger's storage in a vault's entry, sealed anew by each transaction that writes.

    **Guarantee**: a transaction that writes holds the vault's write lock from before it reads until
    the vault is durable, so that no other process writes in between. Where the vault cannot be
    written the block raises, and memory is dropped: the next call reads what the vault has.
    """

    def __init__(self, vault: "Vault") -> None:
        self.path = vault.folder / "vault.sqlite"
        self.lock = vault.lock
        self._vault = vault
        self._connection: sqlite3.Connection | None = None
        self._version: int | None = None

    def begin(self, owner: str) -> None:
        """Make an empty ledger in a vault that never had one."""
        if self._vault.version(_ENTRY) is not None:
            return
        with self._vault.transaction(outermost=True):
            # Another process may have begun it meanwhile, and both entries came together.
            if self._vault.version(_BEGUN) is None:
                with closing(ledger_chain.memory()) as db:
                    ledger_chain.fill(db, owner)
                    self._vault.put_all({_ENTRY: db.serialize(), _BEGUN: owner.encode()})

    @contextmanager
    def transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        """Open a transaction on the entry, as `Storage` says."""
        writing = begin != "BEGIN"
        try:
            with self._vault.transaction(writing=writing, outermost=writing):
                # An error of the database in memory is not one of the vault.
                with (
                    ledger_chain.sentences(self.path),
                    ledger_chain.transaction(self._current(), begin) as db,
                ):
                    yield db
                if writing:
                    self._vault.put(_ENTRY, db.serialize())
                    self._version = self._vault.version(_ENTRY)
        except BaseException:
            if writing:
                self.close()
            raise

    def close(self) -> None:
        """Drop the database in memory."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _current(self) -> sqlite3.Connection:
        """Return the database, read again if another process has written it."""
        version = self._vault.version(_ENTRY)
        if self._connection is None or version != self._version:
            self.close()
            content = self._vault.get(_ENTRY)
            if not content:
                raise LedgerCorrupt(
                    f"The vault {self.path} had a ledger and has none: it was deleted. "
                    f"{ledger_chain.RECOVER}."
                )
            self._connection, self._version = ledger_chain.memory(content), version
        return self._connection


def _close_at_fork_and_exit(ledger: Ledger) -> None:
    """Keep no connection open through a fork, nor through the end of the process.

    A file that is closed is whole without its journal. Hooks are not removed: they hold no ledger.
    """
    atexit.register(_close_if_alive, weakref.ref(ledger))
    if not hasattr(os, "register_at_fork"):
        return
    reference = weakref.ref(ledger)

    def before() -> None:
        if (alive := reference()) is not None:
            alive._lock.acquire()
            alive.close()

    def after() -> None:
        if (alive := reference()) is not None:
            alive._lock.release()

    os.register_at_fork(before=before, after_in_parent=after, after_in_child=after)


def _close_if_alive(ledger: "weakref.ref[Ledger]") -> None:
    if (alive := ledger()) is not None:
        with suppress(PrivetError):
            alive.close()


def _charges(
    path: Path, db: sqlite3.Connection, client: str, run: str | None = None
) -> tuple[Charge, ...]:
    rows = [row for row in ledger_chain.raw_rows(db, client) if run in (None, row.run)]
    return tuple(charge for r in rows for charge in _parsed(path, client, r.seq, r.charges))


def _parsed(path: Path, client: str, seq: int, text: str) -> tuple[Charge, ...]:
    try:
        return tuple(Charge.from_json(line) for line in text.split("\n"))
    except PrivetError as error:
        raise ledger_chain.corrupt(
            path, client, seq, f"its charges cannot be read ({error})"
        ) from error


def _canonical(charges: Sequence[Charge]) -> str:
    return "\n".join(charge.to_json() for charge in charges)


def _refuse_over_budget(
    client: str,
    past: Sequence[Charge],
    new: Sequence[Charge],
    budgets: Mapping[str, float],
    delta: float,
    of: str = "",
) -> None:
    for line in dict.fromkeys(charge.line for charge in (*past, *new)):
        unit, against, adjacency = line
        after = [c for c in (*past, *new) if c.line == line]
        budget = budget_of(budgets, unit, against)
        if budget is not None and within(after, delta, budget):
            continue
        total = epsilon(after, delta)
        before = [c for c in past if c.line == line]
        spent = epsilon(before, delta) if before else 0.0
        plain = "no budget" if budget is None else f"the budget of {budget:.6g}"
        whose = getattr(budget, "whose", "") or f"there is {plain} for this unit"
        mend = getattr(budget, "mend", "") or "Stop here, or grant a larger budget"
        raise BudgetExceeded(
            f"Client {client!r} declines: its next release would bring the {unit}-level epsilon"
            f"{of} against the {against} ({adjacency}) from {spent:.6g} to {total:.6g} at delta "
            f"{delta:.6g}, and {whose}; nothing was spent. "
            f"{without_directory(new, unit, against)}{mend}."
        )


_WITHOUT_DIRECTORY = (
    "This device has no closed directory, so that a server may have invented the others, and of "
    "the noise only its own share counts: join again with the operator's list of devices (`privet "
    "client join --directory FILE`), or set budget.open_directory in policy.toml. "
)


def budget_of(budgets: Mapping[str, _Budget], unit: str, against: str) -> _Budget | None:
    """Return what may be spent on a line, from its own budget or else its unit's.

    None: nothing.
    """
    return budgets.get(f"{unit}/{against}", budgets.get(unit))


def without_directory(charges: Sequence[Charge], unit: str, against: str) -> str:
    """Return the advice for a device whose share alone counts against the server, on that line.

    Empty elsewhere.
    """
    on_line = (unit, against) == ("client", "server")
    return _WITHOUT_DIRECTORY if on_line and _own_share_only(charges) else ""


def _own_share_only(charges: Sequence[Charge]) -> bool:
    """Return whether a masked release costs as much against the server as if its mask broke."""
    multipliers = {c.against: c.noise_multiplier for c in charges if c.unit == "client"}
    return "server" in multipliers and multipliers["server"] == multipliers.get("unmasked server")
