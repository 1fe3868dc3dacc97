"""What an owner can ask of a device at any time: its state, its spending, and what has left it.

`facts` answers at once: it loads neither a model nor an accountant. Nothing here quotes a record.
"""

import fcntl
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

from ...common.errors import PrivetError, StateError
from ..consent import device_conditions, run_offers
from ..enrolled import pinned_directory
from ..import_texts import watched_folders
from ..runtime import connection
from ..store.device_store import ME, DeviceStore, Sent
from ..store.erase import LOCK

if TYPE_CHECKING:
    from ..privacy.ledger import Row

__all__ = [
    "DeviceFacts",
    "RunFacts",
    "facts",
    "outbox",
    "release_of",
    "runs",
    "worker",
]

Decision = Literal["agreed", "declined", "changed", "waits"]


class RunFacts(TypedDict):
    """An offer that is kept, and what was decided about it; times are seconds since 1970."""

    run: str
    server: str
    received: float
    state: Decision
    agreed: float | None
    by: run_offers.How | None


class ConnectionFacts(TypedDict):
    """Whether the server is reached, since when not, and why, with a sentence on it."""

    ok: bool
    reached: float | None
    failed: str | None
    sentence: str


class NoteFacts(TypedDict):
    """The last thing the owner should know."""

    time: float
    sentence: str


class DeviceFacts(TypedDict):
    """The content of `privet client status --json`."""

    home: str
    server: str | None
    insecure: bool
    closed: bool
    directory: pinned_directory.DirectoryFacts | None
    paused: bool
    worker: int | None
    connection: ConnectionFacts | None
    records: int
    sources: list[str]
    runs: list[RunFacts]
    releases: int
    note: NoteFacts | None
    not_now: str | None
    budget: dict[str, float] | None


def facts(home: DeviceStore) -> DeviceFacts:
    """Return everything about the device's state but epsilon, whose accountant is slow to load."""
    joined, held, note = home.joined, watched_folders.read(home), home.last_note
    running = worker(home.folder)
    budget: dict[str, float] | None = None
    try:
        policy = home.policy
        conditions = device_conditions.read_conditions(paused=home.paused)
        not_now = device_conditions.not_now(policy, datetime.now(), conditions)
        budget = {"client": policy.budget.client, "example": policy.budget.example}
    except PrivetError as error:  # the rest is worth showing, and rounds are declined meanwhile
        not_now = str(error)
    return {
        "home": str(home.folder),
        "server": None if joined is None else joined.server,
        "insecure": joined is not None and joined.insecure,
        "closed": joined is not None and joined.closed,
        "directory": pinned_directory.facts(home),
        "paused": home.paused,
        "worker": running,
        "connection": None if joined is None else _connection(home, joined.server, running),
        "records": held.records,
        "sources": list(held.roots),
        "runs": runs(home),
        "releases": home.releases,
        "note": None if note is None else {"time": note[0], "sentence": note[1]},
        "not_now": not_now,
        "budget": budget,
    }


def _connection(home: DeviceStore, server: str, running: int | None) -> ConnectionFacts:
    last = connection.read(home.folder, server)
    reached, sentence = connection.sentence(last, running is not None, time.time())
    kind = None if reached else last.kind or "not heard"
    return {"ok": reached, "reached": last.reached or None, "failed": kind, "sentence": sentence}


def runs(home: DeviceStore) -> list[RunFacts]:
    """Return every offer that is kept, oldest first, with what was decided about it.

    `state`: agreed, declined, changed (since the owner agreed), or waits.
    """
    return [
        {
            "run": offer.run,
            "server": offer.server,
            "received": offer.received,
            "state": _state(home, offer.run) if consent is None else "agreed",
            "agreed": None if consent is None else consent.time,
            "by": None if consent is None else consent.how,
        }
        for offer, consent in home.runs()
    ]


def _state(home: DeviceStore, run: str) -> Decision:
    if home.declined(run):
        return "declined"
    return "waits" if home.agreed(run) is None else "changed"


def worker(folder: Path) -> int | None:
    """Return the id of the process that is the worker of a home.

    None where there is no such process.
    """
    with suppress(OSError, ValueError):
        handle = os.open(folder / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            holder = int(os.pread(handle, 20, 0))
            os.kill(holder, 0)  # asks first, so that a worker that starts now meets no lock
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return holder
        finally:
            os.close(handle)
    return None


def outbox(home: DeviceStore) -> list[tuple[Sent, int | None]]:
    """Return all that left, oldest first, each with the number of its release, if it has one."""
    outbox = home.outbox()
    rows = _rows(home) if outbox else {}
    return [(sent, row.seq if (row := _row(rows, sent)) else None) for sent in outbox]


def release_of(home: DeviceStore, seq: int) -> tuple[Sent, "Row | None"]:
    """Return one byte-string that left, and the row of the ledger it belongs to.

    Raises:
        StateError: nothing with that number has left.
    """
    for sent in home.outbox():
        if sent.seq == seq:
            return sent, _row(_rows(home), sent)
    raise StateError(f"nothing with number {seq} has left; `privet client outbox` lists it all")


def _rows(home: DeviceStore) -> Mapping[tuple[str, int], "Row"]:
    return {(row.run, row.round): row for row in home.ledger.rows(ME)}


def _row(rows: Mapping[tuple[str, int], "Row"], sent: Sent) -> "Row | None":
    """Return the row of the ledger for a byte-string, if it is a contribution.

    Keys, shares and signatures cost nothing, so they are no releases.
    """
    return rows.get((sent.run, sent.round)) if sent.phase in ("round", "vector") else None
