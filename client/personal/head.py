"""What is kept on the device: personal heads as safetensors files. They never leave.

**Guarantee**: a head was fitted on private records without differential privacy. Nothing here is
read by adapter training, and nothing here may be sent; `client/privacy/gate.py` does not import it.
"""

import json
import os
from collections.abc import Mapping
from typing import Literal, cast

import safetensors
import safetensors.torch
from torch import Tensor

from ...common.errors import DataError, StateError
from ...common.files import explain_os_errors, write_atomic
from .label_head import LabelHead
from .text_head import TextHead

__all__ = [
    "head_bytes",
    "load_label_head",
    "load_text_head",
    "read_text_head",
    "save_label_head",
    "save_text_head",
]

_Path = str | os.PathLike[str]
_TEXT_TENSORS = ("tokens", "bias", "keys", "slots", "centre")
_LABEL_TENSORS = ("weight", "bias")


def head_bytes(head: TextHead | LabelHead) -> bytes:
    """A head as the safetensors file that the savers write; what a vault keeps."""
    if isinstance(head, TextHead):
        kind, names = "text", list(_TEXT_TENSORS)
        facts = {"bias_weight": repr(head.bias_weight), "memory_offset": repr(head.memory_offset)}
    else:
        kind, names = "label", list(_LABEL_TENSORS)
        facts = {"task": head.task, "strength": repr(head.strength)}
    plain = {name: getattr(head, name).detach().cpu().contiguous() for name in names}
    return safetensors.torch.save(plain, {"privet": f"{kind} head 1", **facts})


def save_text_head(head: TextHead, path: _Path) -> None:
    """Writes a text head, as a whole or not at all.

    Raises:
        StateError: as `write_atomic`.
    """
    write_atomic(path, head_bytes(head))


def load_text_head(path: _Path) -> TextHead:
    """Reads what `save_text_head` wrote.

    Raises:
        StateError: the file is missing, cut, damaged, or not a text head.
    """
    return read_text_head(_content(path), path)


def read_text_head(content: bytes, path: _Path) -> TextHead:
    """A text head from the bytes of `head_bytes`, as a vault keeps them.

    Args:
        content: the safetensors file.
        path: what it is called, for the sentence.

    Raises:
        StateError: cut, damaged, or not a text head.
    """
    tensors, facts = _load("text", _TEXT_TENSORS, content, path)
    tokens, bias, keys, slots, centre = (tensors[name] for name in _TEXT_TENSORS)
    fits = tokens.shape == bias.shape and len(keys) == len(slots)
    fits = fits and keys.ndim == 2 and centre.shape == keys.shape[1:]
    if not fits or bool((slots < 0).any() or (slots >= len(tokens)).any()):
        raise _damaged(path, "its tensors do not fit together")
    return TextHead(
        tokens, bias, keys, slots, centre,
        bias_weight=_number(facts, "bias_weight", path),
        memory_offset=_number(facts, "memory_offset", path),
    )  # fmt: skip


def save_label_head(head: LabelHead, path: _Path) -> None:
    """Writes a label head, as a whole or not at all.

    Raises:
        StateError: as `write_atomic`.
    """
    write_atomic(path, head_bytes(head))


def load_label_head(path: _Path) -> LabelHead:
    """Reads what `save_label_head` wrote.

    Raises:
        StateError: the file is missing, cut, damaged, or not a label head.
    """
    tensors, facts = _load("label", _LABEL_TENSORS, _content(path), path)
    task = facts.get("task")
    if task not in ("regression", "classification"):
        raise _damaged(path, f"its task is {task!r}")
    task = cast(Literal["regression", "classification"], task)
    try:
        return LabelHead(**tensors, task=task, strength=_number(facts, "strength", path))
    except DataError as error:
        raise _damaged(path, str(error)) from error


def _content(path: _Path) -> bytes:
    with explain_os_errors(path, "read"), open(path, "rb") as file:
        return file.read()


def _load(
    kind: str, names: tuple[str, ...], content: bytes, path: _Path
) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        tensors = safetensors.torch.load(content)
        size = int.from_bytes(content[:8], "little")  # of the header, which is JSON
        facts = json.loads(content[8 : 8 + size]).get("__metadata__") or {}
    except (safetensors.SafetensorError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    if facts.get("privet") != f"{kind} head 1" or set(tensors) != set(names):
        raise _damaged(path, f"it is not a {kind} head of this version")
    return tensors, facts


def _number(facts: Mapping[str, str], name: str, path: _Path) -> float:
    try:
        return float(facts[name])
    except (KeyError, ValueError) as error:
        raise _damaged(path, f"its {name} is not a number") from error


def _damaged(path: _Path, why: str) -> StateError:
    return StateError(
        f"{os.fspath(path)} is not a usable personal head: {why}; remove it, and it is fitted "
        "again from the records on this device."
    )
