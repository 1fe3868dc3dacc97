"""The state of a run after each round, on disk as one whole file and one whole predecessor.

**Guarantee**: after a crash or a `kill -9` at any moment, `load` gives a complete checkpoint that
`save` was given, bit for bit: the last one whose `save` returned, or the one being saved. A file
that was cut, edited, or belongs to another run, config or adapter layout is never loaded.

The format is safetensors, readable by other tools; the SHA-256 in its metadata covers every tensor
(name, type, shape, bytes) and the metadata itself. It finds damage and edits, not a person who
computes it anew. Everything in a checkpoint is public: sums in the clear, no client's data.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors import numpy as safetensors_numpy

from ...common.errors import CheckpointCorrupt, StateError
from ...common.files import explain_os_errors, keep_aside, write_atomic

__all__ = ["CURRENT", "PREVIOUS", "Checkpoint", "load", "restamp", "save"]

CURRENT = "checkpoint.safetensors"
PREVIOUS = "checkpoint.previous.safetensors"
FORMAT = 1
_ADAPTER = "adapter"
_OPTIMIZER = "optimizer."
_START_ANEW = "start the run anew in another folder"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a run needs to go on after a round.

    Attributes:
        run: id of the run.
        round: the last finished round; 0 before the first.
        layout: layout hash of the adapter.
        adapter: float32, (d,): the global adapter.
        optimizer: the server optimiser's arrays by name, any shape and numeric type.
        config_hash: hash of the resolved config.
        extra: other public facts, such as the state of the cohort's draw.
        note: empty, or why `load` gave an earlier checkpoint than the last; never saved.
    """

    run: str
    round: int
    layout: str
    adapter: npt.NDArray[np.float32]
    optimizer: Mapping[str, npt.NDArray[Any]]
    config_hash: str
    extra: Mapping[str, str | int | float]
    note: str = ""

    def __post_init__(self) -> None:
        if self.adapter.dtype != np.float32 or self.adapter.ndim != 1:
            raise StateError(
                "A checkpoint's adapter must be float32 with shape (d,), and is "
                f"{self.adapter.dtype} with shape {self.adapter.shape}: flatten and convert it."
            )
        for name, value in self.extra.items():
            if not isinstance(value, str | int | float):
                raise StateError(
                    f"A checkpoint's extra {name!r} must be a str, int or float, and is a "
                    f"{type(value).__name__}: convert it."
                )


def save(folder: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
    """Make `checkpoint` the current one of `folder`, and the current one the previous.

    One process saves in a folder at a time. Leftovers of an interrupted `save` are removed.

    **Guarantee**: durable when the call returns; on any error the current checkpoint stays.

    Raises:
        StateError: the disk is full, or the folder is read-only or missing.
    """
    folder = Path(folder)
    current = folder / CURRENT
    data = _encode(checkpoint)
    with explain_os_errors(current, "write"):
        for leftover in folder.glob(".checkpoint.*.tmp"):
            leftover.unlink(missing_ok=True)
        before = current.read_bytes() if current.exists() else None
    if before is not None:  # A copy, not a rename: at no moment is there no current checkpoint.
        write_atomic(folder / PREVIOUS, before)
    write_atomic(current, data)


def load(
    folder: str | os.PathLike[str], *, run: str, config_hash: str, layout: str
) -> Checkpoint | None:
    """The current checkpoint of `folder`, or None where there never was one.

    A damaged current file is kept aside as `checkpoint.safetensors.damaged-N`; then, and where the
    current one is missing, the previous one is given if it is whole, with a `note` that says so.

    Raises:
        CheckpointCorrupt: no whole checkpoint, or it is of another run, config, layout or newer
            format (such a file is left as it is); names the file and what differs.
        StateError: a file cannot be read.
    """
    folder = Path(folder)
    wanted = {"run": run, "config_hash": config_hash, "layout": layout}
    current, previous = folder / CURRENT, folder / PREVIOUS
    if not current.exists() and not previous.exists():
        return None
    try:
        return _read(current, wanted)
    except _Damaged as damaged:
        problem = f"The checkpoint {current} {damaged}"
        if current.exists():
            problem += f"; it was kept aside as {keep_aside(current).name}"
    try:
        checkpoint = _read(previous, wanted)
    except _Damaged as damaged:
        raise CheckpointCorrupt(
            f"{problem}. The previous one {previous} {damaged}. Restore one of them from a copy, "
            f"or {_START_ANEW}."
        ) from None
    note = f"{problem}. Going on from the previous one, {previous}, of round {checkpoint.round}."
    return replace(checkpoint, note=note)


def restamp(folder: str | os.PathLike[str], *, run: str, config_hash: str) -> None:
    """Mark both checkpoints of `folder` as belonging to settings of this hash from now on.

    For settings that may change while a run goes on. A damaged file is left to `load`.

    Raises:
        CheckpointCorrupt: a checkpoint is of another run.
        StateError: a file cannot be read or written.
    """
    for path in (Path(folder) / PREVIOUS, Path(folder) / CURRENT):
        try:
            checkpoint = _read(path, {"run": run})
        except _Damaged:
            continue
        write_atomic(path, _encode(replace(checkpoint, config_hash=config_hash)))


class _Damaged(Exception):
    """A file holds no whole checkpoint.

    The message continues "The checkpoint FILE …".
    """


def _read(path: Path, wanted: Mapping[str, str]) -> Checkpoint:
    if not path.exists():
        raise _Damaged("is missing")
    with explain_os_errors(path, "read"):
        data = path.read_bytes()
    facts, tensors = _decode(path, data)
    for name, value in wanted.items():
        if facts[name] != value:
            raise CheckpointCorrupt(
                f"The checkpoint {path} has {name} {facts[name]!r}, and {value!r} is being run "
                f"(other settings, or an earlier privet began it); the file was left as it is. "
                f"Give the run folder that belongs to it, or "
                f"{_START_ANEW}."
            )
    adapter = tensors.pop(_ADAPTER)
    optimizer = {name.removeprefix(_OPTIMIZER): array for name, array in tensors.items()}
    return Checkpoint(adapter=adapter, optimizer=optimizer, **facts)


def _encode(checkpoint: Checkpoint) -> bytes:
    optimizer = {_OPTIMIZER + name: array for name, array in checkpoint.optimizer.items()}
    # safetensors writes the memory as it lies: a transposed array would come back scrambled.
    tensors = {
        name: np.asarray(array).copy(order="C")
        for name, array in {_ADAPTER: checkpoint.adapter, **optimizer}.items()
    }
    facts = json.dumps(
        {
            "run": checkpoint.run,
            "round": checkpoint.round,
            "layout": checkpoint.layout,
            "config_hash": checkpoint.config_hash,
            "extra": dict(checkpoint.extra),
        }
    )
    metadata = {"format": str(FORMAT), "checkpoint": facts, "sha256": _digest(facts, tensors)}
    return safetensors_numpy.save(tensors, metadata)


def _decode(path: Path, data: bytes) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    try:
        tensors = safetensors_numpy.load(data)
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__") or {}
        if metadata["format"] != str(FORMAT):
            raise CheckpointCorrupt(
                f"The checkpoint {path} has format {metadata['format']}; this privet reads format "
                f"{FORMAT}. The file was left as it is: use the privet that wrote it."
            )
        if metadata["sha256"] != _digest(metadata["checkpoint"], tensors):
            raise _Damaged("does not match its own sha256: it was edited or damaged")
        return json.loads(metadata["checkpoint"]), tensors
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise _Damaged(f"is cut or is no checkpoint ({error})") from error


def _digest(facts: str, tensors: Mapping[str, npt.NDArray[Any]]) -> str:
    """SHA-256 of length-prefixed fields, so that no two checkpoints share an encoding."""
    total = hashlib.sha256()
    fields: list[bytes] = [b"privet checkpoint", str(FORMAT).encode(), facts.encode()]
    for name, array in sorted(tensors.items()):
        shape = json.dumps(array.shape).encode()
        fields += [name.encode(), array.dtype.str.encode(), shape, array.tobytes()]
    for field in fields:
        total.update(len(field).to_bytes(8, "big"))
        total.update(field)
    return total.hexdigest()
