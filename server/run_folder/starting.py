"""A run that starts from another run's adapter, which is public: it was released.

In a configuration `adapter.start` names a run; in a run's own folder it is the SHA-256 of the
vector in `start.safetensors`, so that it travels to devices as a number, not as a path.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors import numpy as safetensors_numpy

from ...common.errors import CheckpointCorrupt, ConfigError, StateError
from ...common.files import write_atomic, write_json_atomic
from ...common.model.exchange_layout import Exchange
from ...common.settings.config import Config, of_run
from ..round_record import read_records
from ..void_rounds import trained
from . import checkpoint

__all__ = ["Start", "as_kept", "facts", "keep", "start_sentence", "started", "take"]

VECTOR, FACTS = "start.safetensors", "start.json"
_SAME = ("family", "rank", "last_blocks", "modules", "seed")


@dataclass(frozen=True, eq=False)
class Start:
    """Another run's adapter, shape (d,), and what is known of it."""

    vector: NDArray[np.float32]
    facts: Mapping[str, Any]


def take(config: Config, exchange: Exchange, places: Sequence[Path]) -> tuple[Config, Start | None]:
    """Load and check the run that `adapter.start` names.

    The settings then hold its fingerprint.

    Args:
        config: of the new run.
        exchange: of the new run.
        places: folders in which a run of that name is looked for; a path is tried first.

    Returns:
        Settings with the SHA-256 in the place of the name, and the adapter; None: there is none.

    Raises:
        ConfigError: no such run, or its adapter is another kind.
        StateError, CheckpointCorrupt: it has trained no round, or cannot be read.
    """
    asked = config.adapter.start
    if not asked:
        return config, None
    folder = _folder(asked, places)
    old = of_run(folder)
    _refuse_other_kind(folder, old, config)
    run = (folder / "run-id").read_text("utf-8").strip()
    kept = checkpoint.load(folder, run=run, config_hash=old.digest, layout=exchange.adapter.digest)
    done = trained(read_records(folder))
    if kept is None or not done:
        raise StateError(f"adapter.start = {asked!r}: the run in {folder} has trained no round yet")
    fingerprint = _fingerprint(kept.adapter)
    start_facts = {
        "source": asked, "run": run, "rounds": done, "rounds_planned": old.rounds.count,
        "sha256": fingerprint, "private": old.insecure_test_seed is None,
        "lines": _lines(folder),
    }  # fmt: skip
    named = config.adapter.model_copy(update={"start": fingerprint})
    return config.model_copy(update={"adapter": named}), Start(kept.adapter, start_facts)


def _folder(asked: str, places: Sequence[Path]) -> Path:
    tried = [Path(asked), *(place / asked for place in places)]
    for candidate in tried:
        if (candidate / "config.toml").is_file():
            return candidate
    raise ConfigError(
        f"adapter.start = {asked!r}: expected a run's folder or name, and none of "
        f"{', '.join(map(str, tried))} has a config.toml"
    )


def _refuse_other_kind(folder: Path, old: Config, new: Config) -> None:
    pairs = [
        ("model.base", old.model.base, new.model.base),
        ("clusters.count", old.clusters.count, 1),
    ]
    pairs += [
        (f"adapter.{name}", getattr(old.adapter, name), getattr(new.adapter, name))
        for name in _SAME
    ]
    pairs += [("data.task", old.outputs, new.outputs)] if old.outputs != new.outputs else []
    for name, theirs, ours in pairs:
        if theirs != ours:
            raise ConfigError(
                f"the run in {folder} has {name} = {theirs!r}, and a run that starts from its "
                f"adapter needs the same there: expected {ours!r}; start from another run, or "
                "change the setting"
            )


def _lines(folder: Path) -> list[dict[str, Any]]:
    """Read the epsilons from a run's report, if it was written."""
    try:
        written = json.loads((folder / "privacy.json").read_text("utf-8"))["lines"]
        names = ("unit", "against", "epsilon", "delta", "adjacency")
        return [{name: line[name] for name in names} for line in written]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def keep(folder: Path, start: Start | None) -> None:
    """Write the start's adapter and facts into a run folder that is being made."""
    if start is not None:
        write_atomic(folder / VECTOR, safetensors_numpy.save({"adapter": start.vector}))
        write_json_atomic(folder / FACTS, dict(start.facts))


def started(folder: Path, config: Config, exchange: Exchange) -> Exchange:
    """Return the exchange beginning with the adapter that the run starts from.

    Raises:
        CheckpointCorrupt: it is missing, damaged, or not the one that the settings name.
    """
    if not config.adapter.start:
        return exchange
    path = folder / VECTOR
    try:
        vector = safetensors_numpy.load(path.read_bytes())["adapter"]
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointCorrupt(
            f"{path}, the adapter that this run starts from, cannot be read ({error}); restore it "
            "from a copy, or start the run anew in another folder"
        ) from None
    if _fingerprint(vector) != config.adapter.start or vector.shape != exchange.first.shape:
        raise CheckpointCorrupt(
            f"{path} is not the adapter that adapter.start = {config.adapter.start!r} names; "
            "restore it from a copy, or start the run anew in another folder"
        )
    return dataclasses.replace(exchange, first=vector)


def as_kept(folder: Path, kept: Config, wanted: Config) -> Config:
    """Return `wanted`, with `adapter.start` as the run has it if given by the same name."""
    start_facts = facts(folder)
    if start_facts is None or wanted.adapter.start != start_facts["source"]:
        return wanted
    named = wanted.adapter.model_copy(update={"start": kept.adapter.start})
    return wanted.model_copy(update={"adapter": named})


def facts(folder: Path) -> dict[str, Any] | None:
    """Read what is known of the adapter that a run started from. None: it started anew."""
    path = folder / FACTS
    try:
        return dict(json.loads(path.read_text("utf-8"))) if path.exists() else None
    except (OSError, ValueError, TypeError) as error:
        raise StateError(f"{path} cannot be read ({error}); restore it from a copy") from None


def start_sentence(start_facts: Mapping[str, Any], on_devices: bool) -> str:
    """Say what the report of a run that did not start anew covers, and what not."""
    figures = "; ".join(
        f"epsilon {line['epsilon']:.2f} at delta {line['delta']:g}, {line['unit']}-level, "
        f"{line['adjacency']}, against the {line['against']}"
        for line in start_facts["lines"]
    )
    figures = figures or "see its own report"
    figures = figures if start_facts["private"] else f"not private, a test seed was set ({figures})"
    composed = (
        "each device's own ledger counts both against one budget"
        if on_devices
        else "no ledger of this simulation adds the two"
    )
    return (
        f"The run that this one started from: the first adapter is what run {start_facts['run']} "
        f"released after {start_facts['rounds']} rounds (SHA-256 {start_facts['sha256'][:16]}), at "
        f"its own cost: {figures}. The figures here are of this run alone; for a person who "
        f"took part in both, the two compose, and {composed}."
    )


def _fingerprint(vector: NDArray[np.float32]) -> str:
    return hashlib.sha256(vector.tobytes()).hexdigest()
