"""Whether a device reaches its server, as the SuperNode noted it in a small file for `status`.

    connection.json      0600: when the server was last reached, what failed last and since when

The node's process writes it (`client/runtime/supernode.py`), which has no key of the vault; so the
file names no server, run or record: of the server's address it has a hash, so that another one's
state is nobody else's.
"""

import hashlib
import json
import os
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import ParamSpec, TypeVar

__all__ = ["FILE", "Connection", "Watch", "classify", "expiries", "read", "sentence"]

FILE = "connection.json"
FORMAT = 1
WRITE_S = 10.0
"""While nothing changes the file is written no more often."""
TAKEN_S = 120.0
"""For a minute after a crash a SuperLink takes the node before for connected."""
SILENT_S = 120.0
"""A node hears from its server every 30 s at least: after this it is not reached any more."""

NOT_ENROLLED = "not enrolled"
EXPIRED = "certificate expired"

_P = ParamSpec("_P")
_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class Connection:
    """The last that a node met when it asked its server.

    Attributes:
        server: SHA-256 of HOST:PORT.
        reached: when the server last answered, seconds since 1970; 0: never.
        failed: when it failed last; 0: it did not since it was reached.
        kind: of the failure, in two words; "" while it is reached.
        said: the failure as a part of a sentence.
    """

    server: str
    reached: float = 0.0
    failed: float = 0.0
    kind: str = ""
    said: str = ""


def read(folder: Path, server: str) -> Connection:
    """Read the state of a home's connection to `server`.

    It is an empty one where there is none to read.
    """
    nothing = Connection(_hashed(server))
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        table = json.loads((folder / FILE).read_bytes())
        if table.pop("format") == FORMAT and table["server"] == nothing.server:
            kinds = {one.name: one.type for one in fields(Connection)}
            if {name: type(value) for name, value in table.items()} == kinds:
                return Connection(**table)
    return nothing


def sentence(state: Connection, running: bool, now: float) -> tuple[bool, str]:
    """Return whether the server is reached, and the sentence for the owner.

    Args:
        state: what the node wrote.
        running: whether `privet client start` is.
        now: seconds since 1970.
    """
    before = f"not reached since {_date(state.reached)}" if state.reached else "not reached yet"
    if state.kind == NOT_ENROLLED:
        if state.reached:
            return False, (
                f"not enrolled any more: {before}; ask the operator, and send your card again "
                "(privet client card)"
            )
        return False, "not enrolled yet: send your card to the operator (privet client card)"
    if state.kind:
        stopped = "" if running else "; `privet client start` is not running"
        return False, f"{before} ({state.said}){stopped}"
    if not running:
        return False, f"{before} (`privet client start` is not running)"
    if not state.reached:
        return False, "not reached yet (no answer so far)"
    if now - state.reached > SILENT_S:
        return False, f"{before} (nothing was heard; the network may be away)"
    return True, f"reached {_ago(now - state.reached)} ago"


@dataclass
class Watch:
    """Sees every request of a node to its server, and keeps the state's file.

    Attributes:
        path: of the file.
        server: HOST:PORT.
        say: gets privet's sentence when something changes.
        clock: seconds since 1970.
        dates: when the server's certificate runs out, and that of the CA, where they can be had.
    """

    path: Path
    server: str
    say: Callable[[str], None]
    dates: Callable[[], tuple[float, ...]] = lambda: ()
    clock: Callable[[], float] = time.time
    _state: Connection = field(init=False)
    _written: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._state = read(self.path.parent, self.server)

    @property
    def failure(self) -> str:
        """The failure of now, "" while the server is reached."""
        return self._state.said

    def watched(self, ask: Callable[_P, _Answer]) -> Callable[_P, _Answer]:
        """Wrap a function `ask` so that every answer and every failure of it is seen."""

        def asked(*args: _P.args, **named: _P.kwargs) -> _Answer:
            try:
                answer = ask(*args, **named)
            except Exception as error:
                self.failed(error)
                raise
            self.reached()
            return answer

        return asked

    def reached(self) -> None:
        """Note that the server has answered."""
        changed = bool(self._state.kind) or not self._state.reached
        if changed:
            self.say(f"the server {self.server} is reached")
        self._keep(
            replace(self._state, reached=self.clock(), failed=0.0, kind="", said=""), changed
        )

    def failed(self, error: BaseException) -> None:
        """Note that the server has not answered, or has refused."""
        now = self.clock()
        if getattr(getattr(error, "response", None), "status_code", 0) in ENDED:
            return
        taken = 0 < now - self._state.reached < TAKEN_S
        kind, sentence = classify(error, taken, self.dates, now)
        changed = kind != self._state.kind
        if changed:
            self.say(f"the server {self.server} is not reached: {sentence}")
        self._keep(replace(self._state, failed=now, kind=kind, said=sentence), changed)

    def _keep(self, state: Connection, changed: bool) -> None:
        self._state, now = state, self.clock()
        if not changed and 0 <= now - self._written < WRITE_S:
            return
        self._written = now
        beside = self.path.with_name(f".{self.path.name}.tmp")
        with suppress(OSError):  # a full disk stops nobody, and a home may be erased meanwhile
            handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
            with open(handle, "wb") as file:
                file.write(json.dumps({"format": FORMAT, **asdict(state)}).encode())
            os.replace(beside, self.path)


ENDED = (403, 404, 409)
"""Statuses about a run that has ended, or an object that is not stored yet: the server is there."""


def classify(
    error: BaseException, taken: bool, dates: Callable[[], tuple[float, ...]], now: float
) -> tuple[str, str]:
    """Classify a failure: its kind, and a part of a sentence on what it was and what helps.

    Args:
        error: of a request.
        taken: whether a node of this device was connected a moment ago.
        dates: see `Watch`.
        now: seconds since 1970.
    """
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return _untrusted(cause, dates, now)
        if isinstance(cause, ssl.SSLError):
            return "no TLS", "it does not speak TLS as expected: is HOST:PORT the right one?"
        if isinstance(cause, socket.gaierror):
            return "no address", "its name is not known here: is there a network?"
        if isinstance(cause, ConnectionRefusedError):
            return "refused", "nothing answers at its address: it may be switched off"
        if isinstance(cause, TimeoutError):
            return "no answer", "it does not answer: is there a network?"
    status = getattr(getattr(error, "response", None), "status_code", 0)
    if status == 412:
        if taken:
            return "taken", "it takes the process before for connected, for a minute after a crash"
        return NOT_ENROLLED, "it does not know this device: send your card (privet client card)"
    if status == 401:
        return "no proof", "it refuses this device's signature: is the clock right on both sides?"
    if status in (502, 503, 504):
        return "half up", "its proxy answers, and its SuperLink does not: the operator starts it"
    if status:
        return f"status {status}", f"it answered with status {status}"
    return "broken", f"the connection broke ({type(error).__name__})"


def _untrusted(
    error: ssl.SSLCertVerificationError, dates: Callable[[], tuple[float, ...]], now: float
) -> tuple[str, str]:
    if error.verify_code == 10:
        gone = [date for date in dates() if date < now]
        on = f" on {_date(max(gone))[:10]}" if gone else ""
        return EXPIRED, f"its certificate expired{on}: the operator renews it"
    if error.verify_code == 9:
        return "not yet valid", "its certificate holds from a later date: is this clock right?"
    if error.verify_code in (62, 64):
        return "another name", "its certificate is for another name than the one joined"
    return "not trusted", "its certificate is not signed by the one this device joined with"


def expiries(server: str, authority: bytes | None, timeout_s: float = 5.0) -> tuple[float, ...]:
    """Return when the server's certificate runs out, and the CA's.

    Only of certificates that hold but for their date.
    """
    dates: list[float] = []
    with suppress(OSError, ValueError, KeyError):
        context = ssl.create_default_context(cadata=authority.decode() if authority else None)
        context.verify_flags |= 0x200000  # X509_V_FLAG_NO_CHECK_TIME: signature and name still are
        for certificate in context.get_ca_certs() if authority else ():
            dates.append(ssl.cert_time_to_seconds(str(certificate["notAfter"])))
        host, _, port = server.rpartition(":")
        host = host.strip("[]")
        with (
            socket.create_connection((host, int(port)), timeout_s) as wire,
            context.wrap_socket(wire, server_hostname=host) as secure,
        ):
            shown = secure.getpeercert() or {}
            dates.append(ssl.cert_time_to_seconds(str(shown["notAfter"])))
    return tuple(dates)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen = set[int]()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _hashed(server: str) -> str:
    return hashlib.sha256(server.encode()).hexdigest()


def _date(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"


def _ago(seconds: float) -> str:
    return f"{max(seconds, 0):.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
