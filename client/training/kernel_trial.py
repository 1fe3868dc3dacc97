"""The trial of kernels: whether a record's gradient depends on what else is in its batch.

It does in batches of many shapes, by rounding, and in those of one public shape it does not, to the
bit (docs/privacy.md). To the bit it must be: a server can send an adapter, or a head, under which
what is left of a record's output is its rounding. Whether it is so is a matter of the kernels that
device and dtype have, so it is tried in each process before anything is trained there.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from ...common.errors import AdapterError
from ...common.model.adapter import Adapter
from .constant_work import Shape
from .records import Tokenised

__all__ = ["of_nobody", "refuse_coupling"]


def refuse_coupling(
    adapter: Adapter, shape: Shape, gradients: Callable[[list[Tokenised]], torch.Tensor]
) -> None:
    """Refuse kernels with which a record's gradient depends on its neighbours or its place.

    Tried on made-up records of many lengths, in other places and in other company, under an
    adapter that is nobody's: a server's might hide it. The adapter is as it was afterwards.

    Args:
        adapter: whose layers are trained.
        shape: of each batch.
        gradients: of the records of one batch, shape (records, d).

    Raises:
        AdapterError: a gradient depends on its neighbours, or is not a number.
    """
    now = adapter.read(), adapter.read_local_factor()
    adapter.write(*of_nobody(adapter))
    made = _drawn_records(2 * shape.records, shape, len(adapter.base.tokenizer))
    own, others = made[: shape.records], made[shape.records :]
    expected = dict(zip(own, gradients(own), strict=True))
    for company in (some[: shape.records] for some in _companies(own, others)):
        found = zip(company, gradients(company), strict=True)
        for gradient, wanted in ((row, expected[one]) for one, row in found if one in expected):
            if not torch.equal(gradient, wanted):  # nor may it be NaN, which equals nothing
                raise _coupled(adapter, float((gradient - wanted).norm() / wanted.norm()))
    adapter.write(*now)


def _companies(own: list[Tokenised], others: list[Tokenised]) -> list[list[Tokenised]]:
    """Return batches in which own records have other places and other company."""
    rows = len(own)
    apart = range(0, rows, max(1, rows // 3))
    few = own[-1:], own[: max(1, rows // 2)], others[:1] + own[:1]
    return [own[::-1], own[1:], *few, *([own[n], *others[1:]] for n in apart)]


def _drawn_records(count: int, shape: Shape, words: int) -> list[Tokenised]:
    """Draw made-up records of 2 tokens or more, by a public seed; the first as long as can be."""
    rng = np.random.default_rng(count)
    longest = max(2, shape.longest)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(map(int, rng.integers(words, size=length)))

    lengths = [longest, *(int(rng.integers(2, longest + 1)) for _ in range(count - 1))]
    return [Tokenised(ids(n), 0.0, rejected=ids(n), prompts=(1, 1)) for n in lengths]


def of_nobody(adapter: Adapter) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return a vector and a local factor under which every trained number has a gradient."""
    rng = np.random.default_rng(0)
    away = rng.normal(size=len(adapter.start)), rng.normal(size=adapter.local_factor.dimension)
    return (
        (adapter.start + 0.05 * away[0]).astype(np.float32),
        (0.05 * away[1]).astype(np.float32),
    )


def _coupled(adapter: Adapter, gap: float) -> AdapterError:
    where = adapter.base.compute
    return AdapterError(
        f"in {where.numbers} on {where.device} a record's gradient depends on its neighbours, by "
        f"{gap:.1e} of its norm, so it cannot be clipped for itself; set {where.mend}, or "
        'compute.device = "cpu"'
    )
