"""The owner's `policy.toml`, and how a run's configuration is held against it.

A server chooses its run's configuration, and may be stricter than the owner, never laxer:
`refuse_run` says what is laxer before anything is answered, and `own_config` is what every plan
of an accepted run is checked against afterwards (`Plan.refuse_if_laxer`, the gate, the ledger).

The keys' comments in the file are the descriptions in `client/consent/policy_settings.py`: a number
is typed once.
"""

import re
import stat
import textwrap
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar, get_args

import tomli_w
from pydantic import BaseModel, ValidationError

from ...common.errors import ConfigError, PrivacyError, StateError
from ...common.files import explain_os_errors, write_atomic
from ...common.settings.config import Config
from ...common.settings.faults import faults, shortened
from ...common.settings.former_names import POLICY, with_names_of_today
from ...common.settings.sections import (
    ComputeSettings,
    NoiseAt,
    PrivacySettings,
    SecureAggregationSettings,
    SimulationSettings,
)
from .policy_settings import OwnBudget, Policy, RunLimits

__all__ = [
    "DEFAULT",
    "Policy",
    "matches",
    "own_config",
    "read",
    "reasons",
    "refuse_run",
    "shown",
    "text",
    "write_default",
]

PLACES: tuple[NoiseAt, ...] = get_args(NoiseAt)
"""Where noise may be added, the safest first, as in `common/privacy/round_plan.py`, which would
load NumPy."""

BLOCK_NOISE = ("noise_multiplier", "gain_noise_multiplier")
MAX_FILE_BYTES = 1_000_000
"""Bytes; a larger policy file is somebody else's file."""

Settings = TypeVar("Settings", bound=BaseModel)


def read(path: Path) -> Policy:
    """Read the owner's policy.

    Raises:
        ConfigError: missing, not a file, too large, not text, not TOML; or unknown keys and wrong
            or contradictory values, one sentence for each, all at once.
    """
    try:
        table = tomllib.loads(_bytes(path).decode("utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(
            f"there is no policy {path}; `privet client init` writes one with safe limits"
        ) from None
    except OSError as error:
        raise ConfigError(f"cannot read the policy {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not TOML, numbers without end
        raise ConfigError(f"the policy {path} is not valid TOML: {error}") from None
    try:
        return Policy.model_validate(with_names_of_today(table, POLICY))
    except ValidationError as error:
        raise ConfigError(f"the policy {path} does not fit:\n{faults(error, Policy)}") from None


def text(policy: Policy) -> str:
    """Write a policy as a file with comments.

    `read` gives the same `Policy` back.
    """
    parts = [
        "# What privet may do on this device, and what it may tell a server. A server can be\n"
        "# stricter than this file, never laxer. Changes count from the next round on."
    ]
    for name in Policy.model_fields:
        section = getattr(policy, name)
        heading = _comment(type(section).__doc__ or "")
        parts.append("\n".join([heading, f"[{name}]", *_lines(section)]))
    return "\n\n".join(parts) + "\n"


def write_default(path: Path) -> None:
    """Write the default policy, readable by the owner alone.

    Raises:
        StateError: there is one already, which is left as it is; or it cannot be written.
    """
    if path.exists() or path.is_symlink():
        raise StateError(f"there is a policy {path} already: edit it, or move it away first")
    write_atomic(path, DEFAULT.encode())
    with explain_os_errors(path, "protect"):
        path.chmod(0o600)


def reasons(policy: Policy, config: Config, server: str) -> tuple[str, ...]:
    """Return why this device takes no part in a run.

    Empty where nothing in the run is laxer than the owner allows.

    Each names the configuration's field and value, the owner's limit, and its key in policy.toml.
    """
    return tuple(
        f"{field} = {shortened(value)}: this device's owner {demand} ({key} in policy.toml)"
        for field, value, kept, demand, key in (
            *_promises(policy, config),
            *_masks(policy, config),
            *(_work(policy, config) if config.ab_run is None else ()),
            *_uses(policy, config, server),
        )
        if not kept
    )


def refuse_run(policy: Policy, config: Config, server: str) -> None:
    """Refuse a run in which something is laxer than the owner allows.

    Args:
        policy: the owner's.
        config: the run's, resolved.
        server: HOST:PORT, as the owner joined it.

    Raises:
        PrivacyError: all reasons, one a line.

    The run's own `privacy.budget` is no reason: the ledger stops at either. Neither is
    `secure_aggregation.min_cohort`, of which the larger holds.
    """
    refusals = reasons(policy, config, server)
    if refusals:
        raise PrivacyError(
            "\n  ".join(["the run asks for what this device does not do:", *refusals])
        )


def own_config(policy: Policy, config: Config, closed: bool = True) -> Config:
    """Return the settings that a device holds every plan of this run against.

    `closed`: whether this device knows from its directory which devices there are.

    **Guarantee**: whatever `config` is, also one that `refuse_run` refuses, each field that
    `Plan.refuse_if_laxer`, the gate, the masks or the ledger read is at least as strict as in
    `config` and as in `policy`; adjacency is the owner's, so that all runs share one budget. A run
    that claims nothing gets a client-level claim, because without any the gate knows no budget.

    Without a closed directory a server may have invented the other devices of a round: what is
    counted against it is then this device's own share of the noise (`privacy.directory`), up to
    the owner's own limit for that (`budget.open_directory`).

    Two things stay the run's on purpose: its public batch size and its cap on records. A smaller
    cap would raise the sampling rate that is allowed, a smaller batch the influence of a record.

    The budget is the owner's, over all runs; the run's own cap, of what is spent in this run, is
    kept beside it.

    An A/B experiment trains nothing: there is no record's gradient to noise, its clip is the norm
    of its outcome, and what it may cost is in its noise and its number of looks. So it has no cap.
    """
    limits, allowed = policy.limits, policy.allowed
    blocks = {name: max(getattr(config.statistics, name), limits.min_noise) for name in BLOCK_NOISE}
    return _with(
        config,
        privacy=_own_privacy(policy, config, closed),
        secure_aggregation=_own_aggregation(limits, config),
        compute=ComputeSettings(
            **policy.resources.model_dump(include=set(ComputeSettings.model_fields))
        ),
        statistics=_with(
            config.statistics,
            enabled=config.statistics.enabled and allowed.statistics,
            **blocks,
        ),
        training=_with(config.training, steps=min(config.training.steps, limits.max_steps)),
        simulation=SimulationSettings(),
        insecure_test_seed=config.insecure_test_seed if allowed.insecure_test_seed else None,
    )


def _own_aggregation(limits: RunLimits, config: Config) -> SecureAggregationSettings:
    given = config.secure_aggregation
    return _with(
        given,
        survivors=max(given.survivors, limits.min_survivors),
        colluding=float(max(config.colluders, limits.colluders(config.rounds.cohort))),
        min_cohort=max(given.min_cohort, limits.min_cohort),
    )


def _own_privacy(policy: Policy, config: Config, closed: bool) -> PrivacySettings:
    limits, budget, trains = policy.limits, policy.budget, config.ab_run is None
    given, cap = config.privacy, config.privacy.budget
    has_examples = trains and (given.example.enabled or limits.min_example_noise > 0)
    return _with(
        given,
        delta=min(given.delta, budget.delta),
        budget=OwnBudget(
            client=cap.client if trains else None,
            example=cap.example if trains else None,
            owner_client=budget.client,
            owner_example=budget.example,
            open_directory=budget.open_directory,
        ),
        directory=given.directory if closed else "open",
        client=_with(
            given.client,
            enabled=given.client.enabled or limits.min_noise > 0 or not has_examples,
            noise_at=min(given.client.noise_at, limits.noise_at, key=PLACES.index),
            noise_multiplier=max(given.client.noise_multiplier, limits.min_noise),
            clip=min(given.client.clip, limits.max_clip) if trains else given.client.clip,
            bits=max(given.client.bits, limits.min_bits),
            adjacency=budget.client_adjacency,
        ),
        example=_with(
            given.example,
            enabled=has_examples,
            noise_multiplier=max(given.example.noise_multiplier, limits.min_example_noise),
            adjacency=budget.example_adjacency,
        ),
    )


_Check = tuple[str, object, bool, str, str]
"""A field of the configuration, its value, whether it is kept, what the owner demands, the key."""


def _promises(policy: Policy, config: Config) -> Iterator[_Check]:
    limits, budget = policy.limits, policy.budget
    client, example = config.privacy.client, config.privacy.example
    noise, record_noise = limits.min_noise, limits.min_example_noise
    yield _at_most("privacy.delta", config.privacy.delta, budget.delta, "budget.delta")
    if not client.enabled and not example.enabled:
        demand = "asks for a claim at client or example level"
        key = "limits.min_noise, limits.min_example_noise"
        yield "privacy.client.enabled", False, False, demand, key
    elif not client.enabled:
        demand = f"asks for client-level noise of {noise:g}"
        yield "privacy.client.enabled", False, noise == 0, demand, "limits.min_noise"
    elif not example.enabled and config.ab_run is None:
        demand, key = f"asks for {record_noise:g} at example level", "limits.min_example_noise"
        yield "privacy.example.enabled", False, record_noise == 0, demand, key
    if client.enabled:
        allowed = PLACES[: PLACES.index(limits.noise_at) + 1]
        demand, key = f"accepts {' or '.join(allowed)}", "limits.noise_at"
        yield "privacy.client.noise_at", client.noise_at, client.noise_at in allowed, demand, key
        field, given = "privacy.client.noise_multiplier", client.noise_multiplier
        yield _at_least(field, given, noise, "limits.min_noise")
        yield _adjacency("client", client.adjacency, budget.client_adjacency)
    if example.enabled:
        field, given = "privacy.example.noise_multiplier", example.noise_multiplier
        yield _at_least(field, given, record_noise, "limits.min_example_noise")
        yield _adjacency("example", example.adjacency, budget.example_adjacency)
    for name, asked in zip(BLOCK_NOISE, config.statistics.asked_for, strict=True):
        if asked:
            given = getattr(config.statistics, name)
            yield _at_least(f"statistics.{name}", given, noise, "limits.min_noise")
    if config.ab_run is None:
        clip, key = limits.max_clip, "limits.max_clip"
        yield _at_most("privacy.client.clip", client.clip, clip, key)


def _masks(policy: Policy, config: Config) -> Iterator[_Check]:
    limits, client, given = policy.limits, config.privacy.client, config.secure_aggregation
    cohort = config.rounds.cohort
    yield _at_least("rounds.cohort", cohort, limits.min_cohort, "limits.min_cohort")
    if client.bits:  # 0: chosen, and then never below 16
        bits = limits.min_bits
        yield _at_least("privacy.client.bits", client.bits, bits, "limits.min_bits")
    if client.enabled and client.noise_at == "distributed":
        survivors, key = limits.min_survivors, "limits.min_survivors"
        yield _at_least("secure_aggregation.survivors", given.survivors, survivors, key)
        feared = limits.colluders(cohort)
        yield (
            "secure_aggregation.colluding",
            given.colluding,
            config.colluders >= feared,
            f"asks for at least {feared} colluding devices in a cohort of {cohort}",
            "limits.colluding",
        )


def _work(policy: Policy, config: Config) -> Iterator[_Check]:
    limits, training, data = policy.limits, config.training, config.data
    for field, given, maximum, key in (
        ("training.steps", training.steps, limits.max_steps, "max_steps"),
        ("training.batch_size", training.batch_size, limits.max_batch, "max_batch"),
        ("data.records_per_client", data.records_per_client, limits.max_records,
         "max_records"),
        ("data.max_tokens", data.max_tokens, limits.max_tokens, "max_tokens"),
        ("training.packed", training.packed, limits.max_tokens, "max_tokens"),
    ):  # fmt: skip
        yield _at_most(field, given, maximum, f"limits.{key}")


def _uses(policy: Policy, config: Config, server: str) -> Iterator[_Check]:
    allowed, base, seed = policy.allowed, config.model.base, config.insecure_test_seed
    demand = f"allows {', '.join(allowed.models)}"
    loads = config.ab_run is None
    yield "model.base", base, not loads or matches(base, allowed.models), demand, "allowed.models"
    demand = f"allows {', '.join(allowed.servers)}"
    known = [name.lower() for name in allowed.servers]
    kept = not known or matches(server.lower(), known)
    yield "server", server, kept, demand, "allowed.servers"
    kept = allowed.statistics or not config.statistics.enabled
    demand, key = "allows no statistics", "allowed.statistics"
    yield "statistics.enabled", config.statistics.enabled, kept, demand, key
    kept = allowed.statistics or loads
    yield "ab_test.arms", list(config.ab_test.arms), kept, demand, key
    kept = allowed.insecure_test_seed or seed is None
    demand, key = "takes no part in runs that are not private", "allowed.insecure_test_seed"
    yield "insecure_test_seed", seed, kept, demand, key


def _at_most(field: str, given: float, maximum: float, key: str) -> _Check:
    return field, given, given <= maximum, f"allows at most {maximum:g}", key


def _at_least(field: str, given: float, minimum: float, key: str) -> _Check:
    return field, given, given >= minimum, f"asks for at least {minimum:g}", key


def _adjacency(unit: str, given: str, own: str) -> _Check:
    demand = f"counts its {unit}-level budget in {own}"
    return f"privacy.{unit}.adjacency", given, given == own, demand, f"budget.{unit}_adjacency"


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Return whether a name matches one of the patterns.

    `*` stands for anything but a colon, so that no pattern for hosts swallows a port.
    """
    return any(
        re.fullmatch(re.escape(pattern).replace(r"\*", "[^:]*"), name) for pattern in patterns
    )


def _with(settings: Settings, **changes: object) -> Settings:
    return settings.model_copy(update=changes)


def _bytes(path: Path) -> bytes:
    """Read the file's content if it is a regular file of reasonable size.

    It never waits for a pipe.
    """
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise ConfigError(f"the policy {path} is a folder; expected a TOML file")
    if not stat.S_ISREG(mode):
        raise ConfigError(f"the policy {path} is not a regular file; expected a TOML file")
    with path.open("rb") as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(
            f"the policy {path} has more than {MAX_FILE_BYTES} bytes; expected a short TOML file, "
            "as `privet client init` writes it"
        )
    return content


def _lines(section: BaseModel) -> Iterator[str]:
    for name, field in type(section).model_fields.items():
        yield _comment(field.description or "")
        yield tomli_w.dumps({name: getattr(section, name)}).rstrip()


def _comment(words: str) -> str:
    return textwrap.fill(
        " ".join(words.split()), 96, initial_indent="# ", subsequent_indent="# ",
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


DEFAULT = text(Policy())
"""What `privet client init` writes: every key with its unit and what happens."""


def shown(value: object) -> str:
    """Make a peer's word short and harmless to a terminal."""
    words = value if isinstance(value, str) else repr(value)
    plain = "".join(c if c.isprintable() else f"<{ord(c):x}>" for c in words)
    return plain if len(plain) <= 120 else plain[:120] + "..."
