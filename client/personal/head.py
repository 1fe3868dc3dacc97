"""The personal head, which is fitted on one device and never leaves it.

A kind of head lives in two files: the head itself (what it adds to the shared model, how it is
fitted, how it becomes bytes) and its evaluator (`client/personal/evaluator.py`: what it is fitted
on and how well it does). `evaluator_of` in `client/personal/person_losses.py` says when the kind
is used. Vault and statistics know no kind; the chat, which speaks with a `TextHead`, and
comparisons, units and cold start in `experiments/` do.

**Guarantee**: a head was fitted on private records without differential privacy. Nothing here is
read by adapter training, and nothing here may be sent; `client/privacy/gate.py` does not import it.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, Self, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ...common.errors import StateError

__all__ = [
    "PersonalHead",
    "best_choice",
    "head_of_kind",
    "minimise",
    "number_of",
    "pack",
    "unpack",
    "unusable",
]

_Kind = TypeVar("_Kind")


class PersonalHead(Protocol):
    """One person's own addition to the shared model.

    Private: it is never in a log or a message.
    """

    @property
    def is_shared(self) -> bool:
        """Whether this head changes nothing."""

    def to_bytes(self) -> bytes:
        """Return the head as a safetensors file, for the vault."""

    @classmethod
    def from_bytes(cls, content: bytes, name: str) -> Self:
        """Read a head that `to_bytes` wrote.

        Args:
            content: the safetensors file.
            name: what the file or the vault's entry is called, for the error message.

        Raises:
            StateError: cut, damaged, or a head of another kind.
        """


def head_of_kind(kind: type[_Kind], head: PersonalHead | None) -> _Kind | None:
    """Check that a head is of the kind that can be used here, and return it.

    None is the shared model.

    Raises:
        TypeError: a head of another kind.
    """
    if head is None or isinstance(head, kind):
        return head
    raise TypeError(
        f"expected a {kind.__name__} or None, got a {type(head).__name__}: give the head that "
        "was fitted by the same evaluator"
    )


def minimise(objective: Callable[[], Tensor], variable: Tensor, max_iter: int) -> None:
    """Move `variable` to where `objective` is least, by L-BFGS with a strong Wolfe line search."""
    solver = torch.optim.LBFGS([variable], max_iter=max_iter, line_search_fn="strong_wolfe")

    def step() -> float:
        solver.zero_grad()
        with torch.enable_grad():
            loss = objective()
            loss.backward()
        return float(loss.detach())

    solver.step(step)


def best_choice(
    choices: Sequence[float], held_out: Callable[[float], float], shared: float
) -> float:
    """Return the choice with the lowest held-out loss, or 0 unless one is below `shared`.

    Of equal ones the first is taken.
    """
    best, lowest = 0.0, shared
    for choice in choices:
        loss = held_out(choice)
        if loss < lowest:
            best, lowest = choice, loss
    return best


def pack(kind: str, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> bytes:
    """Write a head's tensors and facts as one safetensors file that says which kind it is."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(plain, {"privet": f"{kind} head 1", **facts})


def unpack(
    kind: str, names: tuple[str, ...], content: bytes, name: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and facts that `pack` put into a file.

    Args:
        kind: the one expected.
        names: of the tensors expected.
        content: the safetensors file.
        name: what it is called, for the error message.

    Raises:
        StateError: cut, damaged, of another kind, or with other tensors.
    """
    try:
        tensors = safetensors.torch.load(content)
        size = int.from_bytes(content[:8], "little")  # of the header, which is JSON
        facts = json.loads(content[8 : 8 + size]).get("__metadata__") or {}
    except (safetensors.SafetensorError, ValueError) as error:
        raise unusable(name, str(error)) from error
    if facts.get("privet") != f"{kind} head 1" or set(tensors) != set(names):
        raise unusable(name, f"it is not a {kind} head of this version")
    return tensors, facts


def number_of(facts: Mapping[str, str], key: str, name: str) -> float:
    """Return the number that the facts of the file `name` have under `key`.

    Raises:
        StateError: there is none.
    """
    try:
        return float(facts[key])
    except (KeyError, ValueError) as error:
        raise unusable(name, f"its {key} is not a number") from error


def unusable(name: str, why: str) -> StateError:
    """Return the error for a head's file that cannot be read."""
    return StateError(
        f"{name} is not a usable personal head: {why}; remove it, and it is fitted "
        "again from the records on this device."
    )
