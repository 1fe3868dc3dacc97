"""The runs that servers offer to this device, and the owner's recorded yes.

A server's `hello` carries an offer: the run and its resolved configuration. It is shown before the
first round, and nothing is answered before there is a `Consent` bound to its digest.

**Guarantee**: the digest covers the run, the server and every setting as this device understands
them. A server that changes any of them later, or a privet with other settings, has no consent.
"""

import hashlib
import json
import re
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Literal, NoReturn, TypeVar, get_args

from ...common.errors import ConfigError, PrivacyError, ProtocolError, StateError
from ...common.settings import config as settings
from ...common.settings.config import Config
from .policy import refuse_run, shown
from .policy_settings import Policy

__all__ = [
    "Consent",
    "How",
    "Offer",
    "agree",
    "by_beginning",
    "changes",
    "promises_less",
    "receive",
    "refuse_without_consent",
    "restore",
    "store",
    "waiting",
]

How = Literal["owner", "policy"]
"""Who agreed: the owner at the keyboard, or `consent.ask = false`."""

FORMAT = 1
MAX_TEXT = 64 * 1024


@dataclass(frozen=True)
class Offer:
    """One run as a server offered it.

    Made by `receive` and `restore`.

    Attributes:
        run: its id.
        server: HOST:PORT, as the owner joined it.
        received: seconds since 1970, UTC.
        text: its configuration, TOML.
    """

    run: str
    server: str
    received: float
    text: str

    @cached_property
    def config(self) -> Config:
        """The run's configuration as this device understands it."""
        return settings.parse(
            tomllib.loads(self.text), source="the run's configuration", quiet=True
        )

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of run, server and every setting.

        When the offer was received is no part of it.
        """
        given = ["privet offer", self.run, self.server, self.config.model_dump(mode="json")]
        return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Consent:
    """The owner's yes to one offer, recorded.

    Attributes:
        run: its id.
        digest: of the offer.
        time: seconds since 1970, UTC.
        how: who said it.
    """

    run: str
    digest: str
    time: float
    how: How


def receive(run: str, server: str, text: str, time: float) -> Offer:
    """Check an offer that came in from a server.

    Raises:
        ProtocolError: an id, a size or a setting is not what a server of this version sends.
    """
    try:
        return _checked(Offer(run, server, time, text))
    except (ConfigError, StateError) as error:
        raise ProtocolError(
            f"the server {server} offers a run that cannot be read: {error}"
        ) from None


def agree(offer: Offer, policy: Policy, how: How, time: float) -> Consent:
    """Record the owner's yes to an offer.

    Not even the owner's own yes goes past policy.toml.

    Raises:
        PrivacyError: the run is laxer than the policy; or nobody was asked and the policy says to.
    """
    refuse_run(policy, offer.config, offer.server)
    if how == "policy" and policy.consent.ask:
        raise PrivacyError(
            f"run {offer.run} waits for your yes (consent.ask = true): see `privet client runs`"
        )
    return Consent(offer.run, offer.digest, time, how)


def waiting(run: str) -> str:
    """Return the sentence for the owner about a run that nobody has decided about."""
    return f"run {run} waits for your yes: see `privet client runs`"


def refuse_without_consent(offer: Offer, consent: Consent | None) -> None:
    """Refuse to answer in a run that nobody said yes to.

    Raises:
        PrivacyError: there is no consent, or it was for another run or another configuration.
    """
    if consent is None:
        raise PrivacyError(waiting(offer.run))
    if (consent.run, consent.digest) != (offer.run, offer.digest):
        raise PrivacyError(
            f"run {offer.run} of {offer.server} is not what you agreed to: its configuration was "
            "changed since; see `privet client runs` and decide again"
        )


def changes(before: Offer, after: Offer) -> list[str]:
    """Return what differs between two offers, a line for each setting."""
    old, new = (_flat(offer.config.model_dump(mode="json")) for offer in (before, after))
    old |= {"run": before.run, "server": before.server}
    new |= {"run": after.run, "server": after.server}
    return [
        f"{key}: {shown(old.get(key))} -> {shown(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def promises_less(before: Offer, after: Offer) -> bool:
    """Return whether the masks of a changed run hide a person among fewer than those of before."""
    old, new = before.config, after.config
    return (
        new.rounds.cohort < old.rounds.cohort
        or new.colluders < old.colluders
        or new.min_sum - new.colluders < old.min_sum - old.colluders
    )


def by_beginning(run: str, names: Sequence[str]) -> list[str]:
    """Return the run of this name, or else all whose names begin so."""
    return [name for name in names if name == run] or [
        name for name in names if name.startswith(run)
    ]


def store(offer: Offer, consent: Consent | None) -> bytes:
    """Return an offer and its consent as the vault's entry `runs/<run id>`."""
    entry = {"format": FORMAT, "offer": asdict(offer), "consent": consent and asdict(consent)}
    return json.dumps(entry, sort_keys=True, allow_nan=False).encode()


def restore(data: bytes) -> tuple[Offer, Consent | None]:
    """Read an offer and its consent from what `store` wrote.

    Raises:
        StateError: not what `store` writes: another format, a field too many, missing, repeated,
            of another type or out of range.
    """
    try:
        entry = json.loads(data, object_pairs_hook=_unique, parse_constant=_no_constant)
        if not isinstance(entry, dict) or set(entry) != {"format", "offer", "consent"}:
            raise StateError("expected format, offer and consent")
        if entry["format"] != FORMAT:
            raise StateError(f"format {shown(entry['format'])}, this privet knows {FORMAT}")
        offer = _checked(_made(Offer, entry["offer"]))
        if entry["consent"] is None:
            return offer, None
        consent = _made(Consent, entry["consent"])
        _refuse_time(consent.time)
        if consent.how not in get_args(How) or not re.fullmatch("[0-9a-f]{64}", consent.digest):
            raise StateError("a consent has a SHA-256, and owner or policy")
        return offer, consent
    except (ValueError, RecursionError, ConfigError, StateError) as error:
        raise StateError(
            f"a stored run cannot be read ({error}); install the privet that wrote it, or "
            "`privet client leave` and join again"
        ) from None


def _flat(table: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in table.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


_Kind = TypeVar("_Kind", Offer, Consent)


def _made(kind: type[_Kind], given: object) -> _Kind:
    names = {field.name: float if field.type is float else str for field in fields(kind)}
    if not isinstance(given, dict) or set(given) != set(names):
        raise StateError(f"expected exactly {', '.join(names)}")
    for name, wanted in names.items():
        if type(given[name]) is not wanted:
            raise StateError(f"{name} must be a {wanted.__name__}")
    return kind(**given)


def _checked(offer: Offer) -> Offer:
    """Check an offer, and read its configuration once."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", offer.run):
        raise StateError(f"run = {shown(offer.run)}: expected letters, digits, dots and dashes")
    if not 0 < len(offer.server) <= 300:
        raise StateError("server: expected HOST:PORT")
    if len(offer.text) > MAX_TEXT:
        raise StateError(f"its configuration has more than {MAX_TEXT} characters")
    _refuse_time(offer.received)
    try:
        _ = offer.config
    except (ValueError, RecursionError) as error:
        raise StateError(f"its configuration is not TOML: {shown(str(error))}") from None
    return offer


def _refuse_time(time: float) -> None:
    if not 0 <= time < 4e9:
        raise StateError(f"time = {time}: expected seconds since 1970")


def _unique(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{twice!r} comes twice")
    return table


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number here")
