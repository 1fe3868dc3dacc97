"""Keys of settings that had another name: still read, with a warning that says today's.

Kept for one release. A file with both names of a key is refused, as it would say two things.
"""

import copy
import warnings
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError

__all__ = ["AB_TEST", "CONFIG", "POLICY", "FormerName", "key_of_today", "with_names_of_today"]

_SECURE_AGGREGATION = {
    "masking": "secure_aggregation",
    "secure_aggregation.smallest_cohort": "secure_aggregation.min_cohort",
}
CONFIG = {
    **_SECURE_AGGREGATION,
    "groups": "clusters",
    "clusters.spare": "clusters.extra",
    "clusters.smallest": "clusters.min_share",
    "rounds.spare": "rounds.extra_releases",
    "ab": "ab_test",
}
"""Of an experiment: former key -> key of today, sections first."""

AB_TEST = {**_SECURE_AGGREGATION, "made": "simulated"}
"""Of an A/B test."""

POLICY = {
    "intake": "import_texts",
    "limits.smallest_noise": "limits.min_noise",
    "limits.smallest_example_noise": "limits.min_example_noise",
    "limits.largest_clip": "limits.max_clip",
    "limits.smallest_cohort": "limits.min_cohort",
    "limits.smallest_survivors": "limits.min_survivors",
    "limits.smallest_bits": "limits.min_bits",
    "limits.largest_steps": "limits.max_steps",
    "limits.largest_batch": "limits.max_batch",
    "limits.largest_records": "limits.max_records",
    "limits.largest_tokens": "limits.max_tokens",
    "when.smallest_battery": "when.min_battery",
    "when.largest_load": "when.max_load",
}
"""Of a device's policy.toml."""

_GONE: Mapping[str, tuple[object, str]] = {
    "head.in_the_loop": (False, "no part of privet trains through a head"),
    "statistics.arms": ([], "models are compared by an A/B test of their own (`privet ab`)"),
    "statistics.arm_noise_multiplier": (..., ""),
}
"""Keys that are no more: the value that said nothing, with which they are dropped (...: any), and
why there is no other."""


class FormerName(FutureWarning):
    """A key of settings has a new name; the former one is read for one release."""


def with_names_of_today(
    table: Mapping[str, Any], names: Mapping[str, str], *, quiet: bool = False
) -> dict[str, Any]:
    """Return a copy of a table of settings, its former keys under their names of today.

    Args:
        table: sections of settings.
        names: former dotted key -> dotted key of today; a section before its keys.
        quiet: no warning, as a finished run's settings are nobody's to change.

    Raises:
        ConfigError: a key is there under both names, or one that is no more says something.
    """
    renamed = copy.deepcopy(dict(table))
    for former, today in names.items():
        section, last = _section(renamed, former)
        if last not in section:
            continue
        name = today.rpartition(".")[2]
        if name in section:
            raise ConfigError(f"{former} is called {today} now; both are there: leave {former} out")
        section[name] = section.pop(last)
        if not quiet:
            _warn(former, today)
    for former, (nothing, why) in _GONE.items():
        section, last = _section(renamed, former)
        if last not in section:
            continue
        if section.pop(last) != nothing is not ...:
            raise ConfigError(f"{former} is no more: {why}; leave it out")
    return renamed


def key_of_today(key: str, names: Mapping[str, str]) -> str:
    """Return today's name of one dotted key, such as `clusters.extra` for `groups.spare`."""
    for former, today in names.items():
        if key == former or key.startswith(f"{former}."):
            key = today + key.removeprefix(former)
            _warn(former, today)
    return key


def _section(table: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """Return the section that a dotted key is in, empty where there is none, and its last part."""
    *sections, last = key.split(".")
    section: Any = table
    for name in sections:
        section = section.get(name) if isinstance(section, dict) else None
    return section if isinstance(section, dict) else {}, last


def _warn(former: str, today: str) -> None:
    sentence = f"{former} is called {today} now; the former name goes with the next release"
    warnings.warn(FormerName(sentence), stacklevel=4)
