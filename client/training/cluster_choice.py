"""The choice of the cluster whose adapter fits the own records best.

It is made on the device, and never sent.

**Guarantee**: the choice is a function of the shared adapters, which are public, and of the own
records. It leaves through the gate only, as the block of the contribution that is not zero, under
the clip and the noise of the whole contribution (`common/model/exchange_layout.py`).
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ...common.model.adapter import Adapter
from ...common.model.base_model import pad, prefix_states, resumed_at
from ...common.model.objective import collate, record_losses
from .constant_work import Shape
from .records import Tokenised

__all__ = ["choose", "mean_losses"]

_CHUNK = 32


def choose(
    adapter: Adapter,
    cluster_vectors: NDArray[np.float32],
    active_clusters: int,
    records: Sequence[Tokenised],
    shape: Shape | None = None,
) -> int:
    """Return the cluster with the smallest mean loss on the own training records.

    Of equals it is the first.

    Args:
        adapter: overwritten.
        clusters: each one's adapter, shape (k, d).
        active_clusters: how many of them there are already; with one there is nothing to choose.
        records: own training records. With nothing to learn the choice is the first; a device
            without any records contributes to none (`common/model/exchange_layout.py`).
        shape: of the work, whatever records there are; None: as little as they need.
    """
    if active_clusters == 1 or not (records or shape):
        return 0
    return int(np.argmin(mean_losses(adapter, cluster_vectors[:active_clusters], records, shape)))


@torch.no_grad()
def mean_losses(
    adapter: Adapter,
    cluster_vectors: NDArray[np.float32],
    records: Sequence[Tokenised],
    shape: Shape | None = None,
) -> NDArray[np.float64]:
    """Return the mean loss of the records under each adapter, shape (k,).

    Infinite where it is not finite, 0 where there are no records.
    """
    base, first = adapter.base, adapter.first_block
    totals = np.zeros(len(cluster_vectors))
    ordered = sorted(records, key=lambda record: len(record.ids))
    if shape is None:
        chunks = [ordered[i : i + _CHUNK] for i in range(0, len(ordered), _CHUNK)]
    else:
        chunks = shape.dealt(ordered)
    tokens = 0 if shape is None else shape.tokens
    for real in chunks:
        chunk = real if shape is None else shape.filled(real)
        ids = [record.ids for record in chunk]
        labels = None if adapter.head is None else [float(record.label or 0.0) for record in chunk]
        learnt = [record.learnt for record in chunk]
        batch = collate(ids, labels, learnt, tokens, everywhere=tokens > 0)
        prefix = prefix_states(base, first, *pad(ids, tokens=tokens))
        for cluster, vector in enumerate(cluster_vectors):
            adapter.write(vector)
            with resumed_at(base, first, prefix):
                losses = record_losses(base, batch, adapter.head).cpu().double()
            totals[cluster] += float(losses[: len(real)].sum())
    return np.where(np.isfinite(totals), totals / max(1, len(ordered)), np.inf)
