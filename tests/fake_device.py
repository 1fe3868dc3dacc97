"""A device beside the CPU on a machine that has none: what a GPU refuses fails here too.

Its tensors say that they are elsewhere (`meta` is the name that torch lets anybody use) and hold
their numbers in a CPU tensor that only this file reaches. As on a GPU,

    an operation with a CPU tensor of one dimension or more is refused, but for `copy_` and indices
    `.numpy()` is refused; `.cpu()`, `.tolist()`, `float(...)` and `bool(...)` copy
    `.to(device)` and `device=` put a tensor there

and, if `no_double`, there is no float64, as on Apple's.

Nothing is registered with torch, so nothing is left when the context ends.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from privet.common.model import base_model, compute
from privet.common.model.compute import Compute

DEVICE = torch.device("meta")
_aten = torch.ops.aten
_COPIES = (_aten.copy_.default,)
_BY_INDEX = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default)
_BY_LIST = (Tensor.__getitem__, Tensor.__setitem__)
_MAKERS = (torch.tensor, torch.as_tensor)


class OnDevice(Tensor):
    """A tensor on the device; `inside` holds its numbers."""

    inside: Tensor

    @staticmethod
    def __new__(cls, inside: Tensor) -> "OnDevice":
        made = Tensor._make_wrapper_subclass(
            cls, inside.shape, strides=inside.stride(), storage_offset=inside.storage_offset(),
            dtype=inside.dtype, device=DEVICE,
        )  # fmt: skip
        made.inside = inside
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        """Say that a module may move such tensors."""
        return ["inside"], None

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, op: Any, types: Any, given: Any = (), named: Any = None
    ) -> Any:
        return _computed(op, given, named or {})


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, op: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        return _computed(op, given, named or {})


class _BelowDispatch(TorchFunctionMode):
    """What torch does below the dispatch: tensors of Python's numbers, and the way back.

    `paused` while a model is read, for which transformers uses real meta tensors.
    """

    paused = False

    def __torch_function__(self, op: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        named = dict(named or {})
        if self.paused:
            return op(*given, **named)
        if op == Tensor.data.__set__ and isinstance(given[1], OnDevice):  # type: ignore[attr-defined]
            given[0].inside = given[1].inside
        if op in _BY_LIST and isinstance(given[0], OnDevice) and isinstance(given[1], list):
            given = (given[0], torch.tensor(given[1]), *given[2:])
        if op is Tensor.tolist:
            return given[0].detach().cpu().tolist()
        if op in _MAKERS and named.get("device") is not None:
            device = named.pop("device")
            return op(*given, **named).to(device)
        return op(*given, **named)


def _computed(op: Any, given: Any, named: dict[str, Any]) -> Any:
    """Run an operation on the numbers inside, and put the results where they belong."""
    flat, form = tree_flatten((given, named))
    leaves = [leaf for leaf in flat if isinstance(leaf, Tensor)]
    here = [leaf for leaf in leaves if isinstance(leaf, OnDevice)]
    if any(leaf.is_meta and not isinstance(leaf, OnDevice) for leaf in leaves):
        raise AssertionError(f"{op} has a meta tensor that this fake did not make")
    if here and op not in _COPIES:
        of = leaves[:1] if op in _BY_INDEX else leaves
        if any(not isinstance(leaf, OnDevice) and leaf.ndim for leaf in of):
            raise RuntimeError(f"{op}: expected all tensors on one device, got {DEVICE} and cpu")
    asked = [leaf for leaf in flat if isinstance(leaf, torch.device)]
    there = isinstance(given[0], OnDevice) if op in _COPIES else bool(here)
    there = asked[0] == DEVICE if asked else there
    if there and torch.float64 in flat and (DEVICE.type,) == compute._NO_DOUBLE:
        raise TypeError(f"{op}: the device has no float64")
    inside = {id(leaf.inside): leaf for leaf in here}
    given_inside, named_inside = tree_unflatten([_inside(leaf) for leaf in flat], form)
    result = op(*given_inside, **named_inside)

    def placed(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if there and id(leaf) in inside:  # an operation in place returns what it was given
            return inside[id(leaf)]
        if id(leaf) in inside or (asked and any(leaf is one for one in leaves)):
            leaf = leaf.clone()  # it went from one side to the other
        return OnDevice(leaf) if there else leaf

    return placed(result) if isinstance(result, Tensor) else tree_map(placed, result)


def _inside(leaf: Any) -> Any:
    """Return what an operation on the CPU is given instead."""
    if isinstance(leaf, torch.device):
        return torch.device("cpu")
    return leaf.inside if isinstance(leaf, OnDevice) else leaf


@contextlib.contextmanager
def fake_device(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, no_double: bool = False
) -> Iterator[None]:
    """Have every base model that is loaded compute on the fake device, in this dtype."""
    read, below = base_model._exact_network, _BelowDispatch()

    def elsewhere(*_: object) -> Compute:
        return Compute(DEVICE, dtype, "a test asks for it")

    def read_outside(*given: str) -> Any:
        below.paused = True
        try:
            with _disable_current_modes():
                return read(*given)
        finally:
            below.paused = False

    if no_double:
        monkeypatch.setattr(compute, "_NO_DOUBLE", (DEVICE.type,))
    monkeypatch.setattr(base_model, "chosen", elsewhere)
    monkeypatch.setattr(base_model, "_exact_network", read_outside)
    # torch cannot detach a tensor of a class of one's own in inference mode
    monkeypatch.setattr(torch._C, "_InferenceMode", lambda _: torch.no_grad())
    with below, _Operations():
        yield
