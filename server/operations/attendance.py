"""Who of the enrolled devices was heard, and what is missing: for `privet server status`.

    seen.json      0600, in the server's folder: number -> version, run, accepted, when

A run writes it with every greeting; the rest is the SuperLink's list of nodes.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ...common.errors import StateError
from ...common.files import write_json_atomic
from .control import Node
from .enrolment import Device

__all__ = ["FILE", "Attendance", "Heard", "of_run", "read", "table"]

FILE = "seen.json"
WRITE_S = 5.0
LONGEST_VERSION = 40


@dataclass(frozen=True)
class Heard:
    """What a device said last, under its signature.

    It is privet's version there, and whether the device has accepted the run.
    """

    version: str
    run: str
    accepted: bool
    time: float


@dataclass
class Attendance:
    """Keeps what devices say in a run, for as long as its process lives.

    Attributes:
        path: of the file.
        run: the run's name.
        clock: seconds since 1970.
    """

    path: Path
    run: str
    clock: Callable[[], float] = time.time
    _heard: dict[int, Heard] = field(init=False)
    _written: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._heard = read(self.path)

    def heard(self, number: int, theirs: str, accepted: bool) -> None:
        """Note a device's answer to a greeting."""
        answer = Heard(theirs[:LONGEST_VERSION], self.run, accepted, self.clock())
        before = self._heard.get(number)
        self._heard[number] = answer
        if before is None or asdict(before) | {"time": 0} != asdict(answer) | {"time": 0}:
            self._written = 0.0

    def present(self, numbers: Sequence[int]) -> None:
        """Note which devices have accepted and are online now.

        What is new is written every few seconds.
        """
        now = self.clock()
        if 0 <= now - self._written < WRITE_S:
            return
        self._written = now
        for number in numbers:
            if number in self._heard:
                self.heard(number, self._heard[number].version, True)
        entries = {str(number): asdict(answer) for number, answer in sorted(self._heard.items())}
        with suppress(StateError):  # a full disk ends no run
            write_json_atomic(self.path, entries)
        self._written = now


def of_run(folder: Path) -> Attendance | None:
    """Return the attendance of the server to which a run folder belongs.

    It is None for a simulation's folder.
    """
    server = folder.absolute().parent.parent
    return Attendance(server / FILE, folder.name) if (server / "server.json").is_file() else None


def read(path: Path) -> dict[int, Heard]:
    """Read what devices have said so far. A missing or damaged file gives nothing."""
    with suppress(OSError, ValueError, TypeError, AttributeError):
        return {int(number): Heard(**one) for number, one in json.loads(path.read_bytes()).items()}
    return {}


def table(
    devices: Sequence[Device],
    heard: Mapping[int, Heard],
    nodes: Sequence[Node] | None,
    run: str | None,
) -> list[dict[str, Any]]:
    """A row for each enrolled device.

    Args:
        devices: the enrolled ones.
        heard: what they said last.
        nodes: the SuperLink's; None: it is down.
        run: the name of the run that goes on; None: there is none.
    """
    known = {node.key: node for node in nodes or ()}
    return [
        _row(device, heard.get(device.number), known.get(device.card.node), nodes is not None, run)
        for device in devices
    ]


def _row(
    device: Device, answer: Heard | None, node: Node | None, asked: bool, run: str | None
) -> dict[str, Any]:
    online = None if not asked else node is not None and node.status == "online"
    times = [answer.time if answer else 0.0, node.seen if node else 0.0]
    seen = max(times)
    mine = run is None or (answer is not None and answer.run == run)
    return {
        "number": device.number,
        "name": device.card.name,
        "version": answer.version if answer else None,
        "online": online,
        "last_seen": datetime.fromtimestamp(seen, UTC).isoformat() if seen else None,
        "accepted": answer.accepted if answer and mine else None,
        "missing": _missing(answer, node, asked, online, mine),
    }


def _missing(
    answer: Heard | None, node: Node | None, asked: bool, online: bool | None, mine: bool
) -> str:
    """Say the first thing that keeps a device from taking part, empty where none is known."""
    if asked and node is None:
        return "its node key: enrol its card again"
    if online is False:
        return "offline: `privet client start` on the device"
    if answer is None or not mine:
        return "no answer to this run yet" if answer else "has not been asked in a run yet"
    if answer.version != version("privet"):
        return f"runs privet {answer.version}, this server {version('privet')}"
    return "" if answer.accepted else "has not accepted the run (privet client runs on the device)"
