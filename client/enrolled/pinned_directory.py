"""The signed directory of devices that a device holds, and how it is renewed and compared.

**Guarantee**: what is taken over continues what this device holds, under the key that its owner
pinned (`common/secure_aggregation/fleet_directory.py`). What is refused is told once, by name, and
said with every round that is declined for it. Nothing here says anything about the person.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from ...common.errors import DataError, PrivetError, ProtocolError, StateError
from ...common.secure_aggregation import fleet_directory as directories
from ...common.secure_aggregation.fleet_directory import Chain, Head

if TYPE_CHECKING:
    from ..store.device_store import DeviceStore

__all__ = ["DirectoryFacts", "compared", "facts", "heard", "history"]

NOTHING = -1
LATEST = 1000
"""Lines of the record that are kept; the chain itself is kept whole."""
FEW = 8


def heard(home: "DeviceStore", offer: Mapping[str, Any]) -> int:
    """Take over the newer directory that a greeting shows, or write down why it is refused.

    Returns:
        From which entry on this device needs them; -1: it needs none.
    """
    own = home.chain
    if own is None or "directory" not in offer:
        return NOTHING
    try:
        head, since = Head.of(str(offer["directory"])), offer["since"]
        if not isinstance(since, int) or since < 0:
            raise ProtocolError(f"since = {since!r:.20}: expected the index of an entry")
        entries = directories.entries_of(str(offer["entries"]).splitlines(), since)
        newest = directories.brought_up(own, head, since, entries)
    except (KeyError, ProtocolError) as error:
        reason = str(error) if isinstance(error, ProtocolError) else "a part of it is missing"
        sentence = f"a newer directory was refused: {reason}"[:2000]
        if home.directory_refused != sentence:
            home.refuse_directory(sentence, _recorded(home, own, sentence))
            home.note(sentence)
        return NOTHING
    if isinstance(newest, int):
        return newest
    if newest != own or home.directory_refused:
        home.keep_chain(newest, _recorded(home, newest, _added(own, newest)))
        if newest != own:
            home.note(f"the directory has version {newest.version} now: {_added(own, newest)}")
    return NOTHING


def _added(before: Chain, after: Chain) -> str:
    new = after.entries[before.version :]
    if not new:
        return "the server shows the directory that this device holds"
    named = ", ".join(map(str, new[:FEW])) + (f" and {len(new) - FEW} more" if new[FEW:] else "")
    return f"{named}; {len(after.directory.known)} devices are enrolled"


def _recorded(home: "DeviceStore", chain: Chain, sentence: str) -> bytes:
    line = [time.time(), chain.version, chain.hash.hex(), sentence]
    return json.dumps([*history(home), line][-LATEST:]).encode()


def history(home: "DeviceStore") -> list[tuple[float, int, str, str]]:
    """Return what became of the signed directory, oldest first.

    Each entry has the time (seconds since 1970), version and hash held then, and what happened.
    """
    kept = home.vault.get("directory-log")
    return [] if kept is None else [(t, v, h, sentence) for t, v, h, sentence in json.loads(kept)]


class DirectoryFacts(TypedDict):
    """What is shown of a directory; from `version` on only of a signed one."""

    enrolled: int | None
    signed: bool
    listed: bool
    refused: str | None
    version: NotRequired[int]
    head: NotRequired[str]
    key: NotRequired[str]
    fleet: NotRequired[str]
    last: NotRequired[tuple[float, int, str, str] | None]


def facts(home: "DeviceStore") -> DirectoryFacts | None:
    """Return what `privet client status` shows of the directory.

    None with an open directory, or where no server was joined.
    """
    joined = home.joined
    if joined is None or not joined.closed:
        return None
    chain, directory = home.chain, home.directory
    shown: DirectoryFacts = {
        "enrolled": directory.enrolled,
        "signed": chain is not None,
        "listed": home.identity.public in directory.known.values(),
        "refused": home.directory_refused or None,
    }
    if chain is None:
        return shown
    last = history(home)
    return {
        **shown,
        "version": chain.version,
        "head": chain.hash.hex(),
        "key": chain.key.hex(),
        "fleet": chain.fleet,
        "last": last[-1] if last else None,
    }


def compared(home: "DeviceStore", path: Path) -> str:
    """Compare this device's directory with the one that another device exported.

    One of the two must continue the other.

    Raises:
        StateError: this device holds none, or the file is damaged.
        DataError: it is a list without a chain, of another fleet or key, or **it differs**: both
            are signed, so the signer has shown two devices two directories.
    """
    own, other = home.chain, directories.load(path)
    if own is None:
        raise StateError("this device holds no signed directory to compare with")
    if not isinstance(other, Chain):
        raise DataError(f"{path} is a list without a chain: nothing in it is signed")
    older, newer = sorted((own, other), key=lambda chain: chain.version)
    try:
        directories.refuse_unless_later(older, newer)
    except PrivetError as error:
        raise DataError(
            f"{path} and this device's directory differ: {error}. Where fleet and key are the same "
            "and both are signed, the signer has shown two devices two directories: keep both files"
        ) from None
    if older.version == newer.version:
        return f"the same: version {own.version}, head {own.hash.hex()}"
    which = "this device's" if older is own else str(path)
    return f"{which} is the older one, version {older.version} of {newer.version}; nothing differs"
