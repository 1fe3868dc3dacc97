"""A finished run's adapter as plain PEFT folders: `adapter/`, and in it one for each cluster."""

from pathlib import Path

import numpy as np

from ...common.files import read_lines
from ...common.model.adapter import Adapter
from ...common.model.exchange_layout import Exchange, Vector

__all__ = ["largest", "save"]

LOG = "rounds.jsonl"


def save(adapter: Adapter, exchange: Exchange, final: Vector, folder: Path) -> None:
    """Write `folder/adapter`, and of several clusters `folder/adapter/cluster-0` and so on.

    Of several, `adapter` itself is the one with most members: for somebody who has no records to
    choose by.
    """
    cluster_vectors = exchange.cluster_vectors(final)[: exchange.clusters.count]
    for place, vector in enumerate(cluster_vectors if len(cluster_vectors) > 1 else ()):
        adapter.write(vector)
        adapter.save(folder / "adapter" / f"cluster-{place}")
    adapter.write(cluster_vectors[largest(folder, exchange.clusters.count)])
    adapter.save(folder / "adapter")


def largest(folder: Path, count: int) -> int:
    """Return which of `count` clusters has most members.

    It goes by the noised numbers of the rounds since there are no more of them, and is 0 where no
    such round was finished.
    """
    counted = [line.get("members", ()) for line in read_lines(folder / LOG)]
    same = [one for one in counted if len(one) == count]
    return int(np.sum(same, axis=0).argmax()) if same else 0
