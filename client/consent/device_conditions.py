"""Whether this device takes part now, and what of the machine its worker may take.

Hours are local wall time at the moment of asking, so a clock that jumps opens or closes them at
once. It can do no more than that: budgets have no date, and the ledger reads no clock.
"""

import math
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from .policy_settings import Policy, Resources, ranges

__all__ = ["Reading", "limit_process", "not_now", "read_conditions", "threads"]

SUPPLIES = Path("/sys/class/power_supply")
BATTERIES = ("Battery", "UPS")


@dataclass(frozen=True)
class Reading:
    """The state of the machine at one moment.

    None means unknown, and stops nothing.

    Attributes:
        on_battery: whether no mains power comes in; None also without a battery.
        battery: charge in percent, the mean of all batteries.
        load: 1-minute load average for each core.
        paused: whether the owner said `privet client pause`.
    """

    on_battery: bool | None = None
    battery: float | None = None
    load: float | None = None
    paused: bool = False


def not_now(policy: Policy, now: datetime, reading: Reading) -> str | None:
    """Return why this device does not take part now, or None when it does.

    Args:
        policy: the owner's.
        now: local wall time.
        reading: of this moment.
    """
    when = policy.when
    if reading.paused:
        return "its owner has paused this device (`privet client pause`)"
    if not _open(when.hours, 60 * now.hour + now.minute):
        return f"it is {now:%H:%M}, outside when.hours = {when.hours!r}"
    if reading.on_battery and not when.on_battery:
        return "the device runs on battery, and when.on_battery = false"
    if reading.battery is not None and reading.battery < when.min_battery:
        return (
            f"the battery has {reading.battery:.0f} %, below when.min_battery = "
            f"{when.min_battery:g}"
        )
    if reading.load is not None and reading.load > when.max_load:
        return (
            f"the load is {reading.load:.1f} for each core, above when.max_load = {when.max_load:g}"
        )
    return None


def read_conditions(*, paused: bool = False, supplies: Path = SUPPLIES) -> Reading:
    """Read battery and load from Linux's files.

    psutil's reader would take a mouse's battery for the machine's, and see one battery of two.
    Where there are none, the machine counts as one without a battery.

    Batteries of mice and keyboards (scope `Device`) do not count.
    """
    found = [supply for supply in _supplies(supplies) if supply.get("scope") != "Device"]
    batteries = [supply for supply in found if supply.get("type") in BATTERIES]
    mains = [supply for supply in found if supply.get("type") not in BATTERIES]
    charges = [charge for one in batteries if (charge := _number(one.get("capacity"))) is not None]
    return Reading(
        on_battery=_discharging(batteries, mains) if batteries else None,
        battery=sum(charges) / len(charges) if charges else None,
        load=_load(),
        paused=paused,
    )


def threads(resources: Resources, cores: int | None = None) -> int:
    """Return how many threads the worker may compute with.

    `cpu_share` of the cores it may run on, at least 1.
    """
    if cores is None:
        everywhere = os.cpu_count() or 1
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else everywhere
    return max(1, math.floor(resources.cpu_share * cores + 1e-9))


def limit_process(resources: Resources) -> None:
    """Lower this process's priority and its memory, for itself and what it starts.

    Once a process, before the model is loaded: lowered limits cannot be raised again.

    Memory is bounded by RLIMIT_DATA (Linux 4.7): private writable memory, of which torch with a
    loaded model holds as much as is resident (measured: 997 MB and 1,016 MB). Above it an
    allocation fails, that round ends without an answer, and the worker is started again. Address
    space (RLIMIT_AS) would be no measure: it was twice that. Elsewhere nothing but the priority is
    enforced.
    """
    if os.name == "nt":
        return
    lower = resources.nice - os.nice(0)
    if lower > 0:
        os.nice(lower)
    if sys.platform == "linux":
        import resource

        most = resources.memory_mb * 2**20
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def _open(hours: str, minute: int) -> bool:
    """Return whether a minute of the day is inside the hours.

    A range that ends before it begins goes over midnight.
    """
    found = ranges(hours)
    return not found or any(
        start <= minute < end if start < end else minute >= start or minute < end
        for start, end in found
    )


def _supplies(folder: Path) -> Iterator[Mapping[str, str]]:
    try:
        supplies = sorted(folder.iterdir())
    except OSError:
        return
    names = ("type", "scope", "online", "status", "capacity")
    for supply in supplies:
        found = {name: _text(supply / name) for name in names}
        yield {name: value for name, value in found.items() if value is not None}


def _text(path: Path) -> str | None:
    """Read a file of sysfs, or return None where its driver refuses."""
    try:
        return path.read_text("ascii").strip()
    except (OSError, ValueError):
        return None


def _number(text: str | None) -> float | None:
    return float(text) if text is not None and text.isdecimal() and int(text) <= 100 else None


def _discharging(batteries: list[Mapping[str, str]], mains: list[Mapping[str, str]]) -> bool:
    """Return whether the machine runs on its batteries.

    Any supply that is online is mains power. Where none can be asked, the batteries' own word
    counts.
    """
    online = [supply["online"] for supply in mains if "online" in supply]
    if online:
        return all(value == "0" for value in online)
    return any(battery.get("status") == "Discharging" for battery in batteries)


def _load() -> float | None:
    try:
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    except (OSError, AttributeError):
        return None
