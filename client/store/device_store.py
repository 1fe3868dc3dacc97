"""A person's own device: its home folder, and the rules by which it answers a server.

    policy.toml      what the owner allows, readable
    vault.sqlite     everything else, sealed (client/store/vault.py)
    key.json         the vault's key, wrapped

**Guarantee**: nothing is answered for a run that the owner has not agreed to, or whose offer has
changed since; nothing outside the policy; nothing while the device is paused or the policy's
conditions do not hold. What leaves is written to the outbox, durably, before it leaves.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cached_property
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Self

from ...common.errors import PrivacyError, ProtocolError, StateError
from ...common.secure_aggregation import fleet_directory as directories
from ...common.secure_aggregation.fleet_directory import Chain, refuse_colluders
from ...common.secure_aggregation.keys import Directory, Identity
from ...common.settings.sections import DEVICES
from ..consent import device_conditions, run_offers
from ..consent import policy as policies
from ..consent.offer_description import DeviceState, limiting_budget, refuse_partial_run
from ..consent.policy_settings import Policy
from ..consent.run_offers import Consent, Offer
from ..privacy import ledger_chain as chain
from .key_file import Unlock
from .vault import Vault

if TYPE_CHECKING:  # the accountant and numpy, which `privet client status` has no time to load
    import numpy as np
    from numpy.typing import NDArray

    from ..privacy.ledger import Ledger
    from ..training.records import Record

__all__ = ["ME", "POLICY", "DeviceStore", "Joined", "Sent"]

ME = "me"
"""The one client in a device's own ledger."""

POLICY = "policy.toml"
RUN_ENTRIES = ("runs/", "agreed/")
"""Not `declined/`: an owner's no stands, whatever a server offers meanwhile."""
MAX_NOTE = 2000
MAX_RUNS = 100
"""Offers kept; a server that sends more pushes out the oldest nobody agreed to."""


@dataclass(frozen=True)
class Joined:
    """The server this device belongs to.

    Attributes:
        server: HOST:PORT.
        ca: the certificate it must be signed by, PEM; empty with `insecure`.
        closed: whether only devices in the operator's directory exist.
        insecure: without TLS, for tests on this machine.
        key: whose signature a newer directory needs, hexadecimal, pinned by the owner; empty: the
            list is as it was joined with, or open.
        fleet: whose directory it is; empty: that of the first one that comes under the key.
    """

    server: str
    ca: str
    closed: bool
    insecure: bool = False
    key: str = ""
    fleet: str = ""


@dataclass(frozen=True)
class Sent:
    """One byte-string that left: when, to whom, in which phase, and its hash.

    `time` is in seconds since 1970.
    """

    seq: int
    time: float
    server: str
    run: str
    round: int
    phase: str
    bytes: int
    sha256: str


class DeviceStore:
    """An open home: the vault and the policy of one device."""

    def __init__(self, folder: Path, vault: Vault) -> None:
        """Use `DeviceStore.create` or `DeviceStore.open` instead."""
        self.folder, self.vault = folder, vault

    def __repr__(self) -> str:
        return f"DeviceStore({str(self.folder)!r})"

    def close(self) -> None:
        """Close the vault, and let go of its keys."""
        if "ledger" in self.__dict__:
            self.ledger.close()
        self.vault.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @classmethod
    def create(cls, folder: Path, unlock: Unlock, name: str = "") -> "DeviceStore":
        """Make a new home: vault, identities, the default policy.

        Raises:
            StateError: there is one already; nothing was changed.
        """
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.serialization import (
            Encoding,
            NoEncryption,
            PrivateFormat,
            PublicFormat,
        )

        vault = Vault.create(folder, unlock)
        node = ec.generate_private_key(ec.SECP384R1())
        public = node.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        seed = os.urandom(32)
        card = {
            "privet": version("privet"),
            "identity": Identity.of(seed).public.hex(),
            "node": public.decode(),
            "name": name,
        }
        vault.put_all(
            {
                "identity": seed,
                "node-key": node.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()),
                "card": _json(card),
            }
        )
        if not (folder / POLICY).exists():
            policies.write_default(folder / POLICY)
        home = cls(folder, vault)
        home.ledger.close()
        return home

    @classmethod
    def open(cls, folder: Path, unlock: Unlock) -> "DeviceStore":
        """Open the home in `folder`.

        Raises:
            StateError: there is none, or it cannot be opened.
        """
        return cls(folder, Vault.open(folder, unlock))

    @property
    def policy(self) -> Policy:
        """The owner's policy, read again each time because the owner may have changed it."""
        return policies.read(self.folder / POLICY)

    @property
    def card(self) -> str:
        """The one line of public JSON that an operator needs to enrol this device."""
        return self._entry("card").decode()

    @cached_property
    def identity(self) -> Identity:
        """The device's long-lived Ed25519 key pair."""
        return Identity.of(self._entry("identity"))

    @cached_property
    def ledger(self) -> "Ledger":
        """The ledger of what this device has spent."""
        from ..privacy.ledger import Ledger

        return Ledger.in_vault(self.vault, owner=self.identity.public.hex())

    @property
    def releases(self) -> int:
        """The number of releases that the ledger counts.

        The ledger is not verified, and no accountant is loaded.
        """
        content = self.vault.get("ledger")
        if content is None:
            return 0
        with chain.sentences(self.folder), closing(chain.memory(content)) as db:
            head = chain.find_head(db, ME)
        return 0 if head is None else head.count

    # the server

    @property
    def joined(self) -> Joined | None:
        """The server this device belongs to, or None."""
        kept = self.vault.get("joined")
        return None if kept is None else Joined(**json.loads(kept))

    def join(self, joined: Joined, directory: Directory | Chain) -> None:
        """Belong to a server, one at a time."""
        present = self.joined
        if present is not None and present.server != joined.server:
            raise StateError(
                f"this device has joined {present.server}; leave it first, with "
                "`privet client leave`"
            )
        self.vault.put_all(
            {
                "joined": _json(asdict(joined)),
                "directory": None if isinstance(directory, Chain) else _written(directory),
                "directory-chain": _kept(directory) if isinstance(directory, Chain) else None,
                "directory-refused": None,
            }
        )

    def leave(self) -> None:
        """Belong to no server any more.

        What was spent stays in the ledger, and the heads stay too.
        """
        runs = [name for kind in RUN_ENTRIES for name in self.vault.names(kind)]
        held = ["directory", "directory-chain", "directory-log", "directory-refused"]
        self.vault.put_all(dict.fromkeys(["joined", *held, *runs]))

    @property
    def chain(self) -> Chain | None:
        """The signed directory this device holds.

        None where the directory is open, or a list without a chain.
        """
        joined, kept = self.joined, self.vault.get("directory-chain")
        if joined is None or not joined.key:
            return None
        if not kept:  # joined with a key alone: the first one that it has signed
            return Chain(joined.fleet, bytes.fromhex(joined.key))
        return directories.parse(kept.decode())

    def keep_chain(self, chain: Chain, log: bytes) -> None:
        """Keep a newer signed directory, which continues the one that was held."""
        self.vault.put_all(
            {"directory-chain": _kept(chain), "directory-log": log, "directory-refused": None}
        )

    def refuse_directory(self, sentence: str, log: bytes) -> None:
        """Record why the server's directory is not taken over.

        What was held stays.
        """
        self.vault.put_all({"directory-refused": sentence.encode(), "directory-log": log})

    @property
    def directory_refused(self) -> str:
        """The reason why the last directory was refused, empty if it was not."""
        return (self.vault.get("directory-refused") or b"").decode()

    @property
    def enrolled(self) -> int | None:
        """The number N of devices that are enrolled.

        None with an open directory, which cannot know.
        """
        return self.directory.enrolled

    @property
    def directory(self) -> Directory:
        """The identities this device knows: the signed directory's, or those it has pinned."""
        joined = self.joined
        if joined is None:
            raise PrivacyError("this device has joined no server")
        chain = self.chain
        if chain is not None:
            return Directory(chain.directory.known, closed=True, news=self.directory_refused)
        news = ""
        if joined.closed:
            news = (
                "it is a list that nobody signed, which stays as it was joined with: ask the "
                "operator for the signed directory, and join again"
            )
        known = {}
        for line in (self.vault.get("directory") or b"").decode().splitlines():
            number, identity = line.split()
            known[int(number)] = bytes.fromhex(identity)
        return Directory(known, joined.closed, news)

    def pin(self, directory: Directory) -> None:
        """Keep the identities that were seen first.

        A signed directory changes by its chain only.
        """
        if self.chain is not None:
            return
        written = _written(directory)
        if self.vault.get("directory") != written:
            self.vault.put("directory", written)

    # runs

    @property
    def paused(self) -> bool:
        """Whether the owner has told the device to stay out."""
        return self.vault.get("paused") is not None

    def pause(self, on: bool) -> None:
        """Stay out of all rounds, or take part again."""
        self.vault.put_all({"paused": b"yes" if on else None})

    def runs(self) -> list[tuple[Offer, Consent | None]]:
        """Return the runs that servers have offered, with what was agreed to, oldest first."""
        runs = [run_offers.restore(self._entry(name)) for name in self.vault.names("runs/")]
        return sorted(runs, key=lambda run: run[0].received)

    def run(self, run: str) -> tuple[Offer, Consent | None]:
        """Return one of the runs that were offered.

        Raises:
            PrivacyError: no such run was offered.
        """
        kept = self.vault.get(f"runs/{run}")
        if kept is None:
            raise PrivacyError(f"no run {run!r} was offered to this device")
        return run_offers.restore(kept)

    def agree(self, offer: Offer, how: run_offers.How, partly: bool = False) -> None:
        """Record a yes to exactly this offer.

        Args:
            offer: the run.
            how: who says it.
            partly: also where the budget, or the run's own cap, pays for some of its rounds only.

        Raises:
            PrivacyError: the policy forbids it; all reasons. Or not all rounds are paid for.
        """
        policy = self.policy
        if self.joined is not None:
            refuse_colluders(offer.config, self.enrolled)
        consent = run_offers.agree(offer, policy, how, time.time())
        limit = limiting_budget(offer, policy, self.state_for(offer.run))
        refuse_partial_run(offer.run, limit, partly)
        stored = run_offers.store(offer, consent)
        self.vault.put_all(
            {
                f"runs/{offer.run}": stored,
                f"agreed/{offer.run}": stored,
                f"declined/{offer.run}": None,
            }
        )
        if self.last_note is not None and self.last_note[1] == run_offers.waiting(offer.run):
            self.vault.put_all({"note": None})

    def state_for(self, run: str) -> DeviceState:
        """Return what an offer of this run is weighed with."""
        joined, rows = self.joined, self.ledger.rows(ME)
        closed = joined is not None and joined.closed
        return DeviceState(
            spent=[charge for row in rows for charge in row.charges],
            in_run=[row.charges for row in rows if row.run == run],
            closed=closed,
            enrolled=self.enrolled if closed else None,
        )

    def agreed(self, run: str) -> tuple[Offer, Consent | None] | None:
        """Return the offer of this run that was agreed to last, perhaps not the present one."""
        kept = self.vault.get(f"agreed/{run}")
        return None if kept is None else run_offers.restore(kept)

    def withdraw(self, offer: Offer) -> None:
        """Record that the owner says no to a run.

        It stands, whatever the policy accepts, until the owner agrees.
        """
        self.vault.put_all(
            {f"runs/{offer.run}": run_offers.store(offer, None), f"declined/{offer.run}": b"yes"}
        )

    def declined(self, run: str) -> bool:
        """Return whether the owner said no to this run."""
        return self.vault.get(f"declined/{run}") is not None

    def receive(self, run: str, text: str) -> bool:
        """Keep an offer of the joined server, and return whether this device takes part in it.

        An offer that has changed since the owner agreed waits for another yes: the policy's where
        it may give one, but the owner's own where the masks would promise less than before.
        """
        joined = self.joined
        if joined is None:
            raise PrivacyError("this device has joined no server")
        offer = run_offers.receive(run, joined.server, text, time.time())
        if offer.config.data.source != DEVICES:
            raise ProtocolError(
                f"run {run}: data.source = {offer.config.data.source!r}: expected {DEVICES!r}, "
                "which says that people are real devices"
            )
        kept = self.vault.get(f"runs/{run}")
        known, consent = (None, None) if kept is None else run_offers.restore(kept)
        if known is None:
            self._make_room_for_an_offer()
        if known is None or known.digest != offer.digest:
            consent = None
            self.vault.put(f"runs/{run}", run_offers.store(offer, None))
        if consent is None:
            if self.policy.consent.ask or self.declined(run):
                return False
            before = self.agreed(run)
            if before is not None and run_offers.promises_less(before[0], offer):
                return False
            self.agree(offer, "policy")
        return True

    def _make_room_for_an_offer(self) -> None:
        if len(self.vault.names("runs/")) < MAX_RUNS:
            return
        # what was agreed to once is kept, so that no flood of offers makes a weaker one a first one
        idle = (
            offer.run
            for offer, consent in self.runs()
            if consent is None and (self.declined(offer.run) or self.agreed(offer.run) is None)
        )
        oldest = next(idle, None)
        if oldest is None:
            raise PrivacyError(
                f"this device has agreed to {MAX_RUNS} runs already and keeps no more; "
                "`privet client leave` ends them"
            )
        self.vault.put_all(dict.fromkeys(f"{kind}{oldest}" for kind in RUN_ENTRIES))

    def taking_part(self, run: str, begins: bool) -> Offer:
        """Return the offer of a run, if this device takes part in it now.

        Args:
            run: its id.
            begins: whether a round begins; in the middle of one the conditions are not asked.

        Raises:
            PrivacyError: why it does not.
        """
        offer, consent = self.run(run)
        run_offers.refuse_without_consent(offer, consent)
        policies.refuse_run(self.policy, offer.config, offer.server)
        refuse_colluders(offer.config, self.enrolled)
        if begins:
            reading = device_conditions.read_conditions(paused=self.paused)
            reason = device_conditions.not_now(self.policy, datetime.now(), reading)
            if reason is not None:
                raise PrivacyError(reason)
        return offer

    def refuse_to_keep(self, run: str, adapter: "NDArray[np.float32]", dimension: int) -> None:
        """Refuse to keep the end of a run if its adapter is unusable or it was kept already.

        It is kept once only for what this device has released.

        A server may end a run as often as it likes, and each end costs minutes of fitting.

        Raises:
            PrivacyError: the device is paused, or the end of this run was kept already.
            ProtocolError: the adapter is not the run's: its type, its length, a number.
        """
        if self.paused:
            raise PrivacyError("its owner has paused this device (`privet client pause`)")
        if self.vault.get(f"kept/{run}") == self._count:
            raise PrivacyError(f"the end of run {run} came again; it was kept already")
        wrong = getattr(adapter, "dtype", None) != "float32" or adapter.shape != (dimension,)
        if wrong or not all(map(math.isfinite, adapter)):
            raise ProtocolError(
                f"run {run} ended with an adapter that is not {dimension} finite float32 numbers; "
                "nothing was kept"
            )

    def keep(self, run: str, entries: Mapping[str, bytes]) -> None:
        """Keep the results of a run that has ended, all of them or nothing."""
        self.vault.put_all({**entries, f"kept/{run}": self._count})

    @property
    def _count(self) -> bytes:
        return str(self.releases).encode()

    def note(self, sentence: str) -> None:
        """Keep the last thing the owner should know, which `privet client status` shows.

        Said again, it is not written again: a server greets every two seconds.
        """
        sentence = sentence[:MAX_NOTE]
        if self.last_note is None or self.last_note[1] != sentence:
            self.vault.put("note", _json([time.time(), sentence]))

    @property
    def last_note(self) -> tuple[float, str] | None:
        """The last note and its time (seconds since 1970), or None where there is none yet."""
        kept = self.vault.get("note")
        if kept is None:
            return None
        when, sentence = json.loads(kept)
        return float(when), str(sentence)

    # the outbox

    def sent(self, run: str, round: int, phase: str, payload: bytes) -> None:
        """Record what is about to leave, durably.

        The oldest payloads make room for it.

        Only the worker, of which there is one, calls it: what is kept is counted once a process.
        """
        joined, digest = self.joined, hashlib.sha256(payload).hexdigest()
        server = "" if joined is None else joined.server
        last, before = self._kept
        entry = Sent(last + 1, time.time(), server, run, round, phase, len(payload), digest)
        sizes = {**before, entry.seq: len(payload)}
        gone = _above(sizes, self.policy.outbox.keep_mb * 2**20)
        self.vault.put_all(
            {
                f"outbox/{entry.seq:08d}": _json(asdict(entry)),
                f"payload/{entry.seq:08d}": payload,
                **{f"payload/{seq:08d}": None for seq in gone},
            }
        )
        self._kept = entry.seq, {seq: size for seq, size in sizes.items() if seq not in gone}

    @cached_property
    def _kept(self) -> tuple[int, dict[int, int]]:
        """The last number of the outbox, and the sizes of the payloads that are kept."""
        kept = {int(name.partition("/")[2]) for name in self.vault.names("payload/")}
        outbox = self.outbox()
        sizes = {sent.seq: sent.bytes for sent in outbox if sent.seq in kept}
        return max((sent.seq for sent in outbox), default=0), sizes

    def outbox(self) -> list[Sent]:
        """Return everything that left, oldest first."""
        return [Sent(**json.loads(self._entry(name))) for name in self.vault.names("outbox/")]

    def payload(self, seq: int) -> bytes | None:
        """Return the bytes that left under a number, while they are kept."""
        return self.vault.get(f"payload/{seq:08d}")

    # own records

    def records(self) -> "Sequence[Record]":
        """Return all records of the owner, earliest first.

        Those without a time come first.
        """
        from ..training.records import parse_line

        with self.vault.transaction(writing=False):  # as of one moment: a scan may be writing
            records = [
                parse_line(line, name).record
                for name in self.vault.names("records/")
                for line in self._entry(name).splitlines()
            ]
        return sorted(records, key=_when)

    def _entry(self, name: str) -> bytes:
        content = self.vault.get(name)
        if content is None:
            raise StateError(
                f"{self.folder}: the vault has no entry {name!r}: making it was interrupted; "
                "erase it with `privet client forget`, and begin again"
            )
        return content


def _written(directory: Directory) -> bytes:
    lines = (f"{number} {key.hex()}\n" for number, key in sorted(directory.known.items()))
    return "".join(lines).encode()


def _kept(chain: Chain) -> bytes:
    return directories.text(chain).encode() if chain.signature else b""


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


def _when(record: "Record") -> tuple[int, float, str]:
    """Return the key that sorts records: without a time, then by number, then by text."""
    if record.time is None:
        return 0, 0.0, ""
    return (2, 0.0, record.time) if isinstance(record.time, str) else (1, record.time, "")


def _above(sizes: Mapping[int, int], limit: float) -> frozenset[int]:
    """Return the oldest payloads, for which there is no room beside the newer ones."""
    newest = sorted(sizes, reverse=True)
    totals = accumulate(sizes[seq] for seq in newest)
    return frozenset(seq for seq, total in zip(newest, totals, strict=True) if total > limit)
