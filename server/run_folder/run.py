"""A run from its folder: its rounds or looks, and at the end its adapter as plain PEFT folders."""

from pathlib import Path

import numpy as np

from ...common.model.adapter import Adapter, exchanged, shared
from ...common.model.exchange_layout import Exchange
from ..round_record import read_records
from ..rounds import ServedRun, Vector, run_rounds
from .starting import started

__all__ = ["index_of_largest_cluster", "run_to_completion"]


def run_to_completion(run: ServedRun) -> Vector:
    """Run all rounds or looks, and return what devices are told at the end.

    A trained adapter is then a PEFT folder.
    """
    if run.config.ab_run is not None:
        from ..ab_rounds import run_looks

        return run_looks(run, run.config.ab_run)
    adapter = shared(run.config)
    sent = started(run.folder, run.config, exchanged(run.config))
    final = run_rounds(run, sent)
    _save(adapter, sent, final, run.folder)
    return final


def _save(adapter: Adapter, exchange: Exchange, final: Vector, folder: Path) -> None:
    """Write `folder/adapter`, and of several clusters `folder/adapter/cluster-0` and so on.

    Of several, `adapter` itself is the one with most members: for somebody who has no records to
    choose by.
    """
    cluster_vectors = exchange.cluster_vectors(final)[: exchange.clusters.count]
    for index, vector in enumerate(cluster_vectors if len(cluster_vectors) > 1 else ()):
        adapter.write(vector)
        adapter.save(folder / "adapter" / f"cluster-{index}")
    adapter.write(cluster_vectors[index_of_largest_cluster(folder, exchange.clusters.count)])
    adapter.save(folder / "adapter")


def index_of_largest_cluster(folder: Path, count: int) -> int:
    """Return which of `count` clusters has most members.

    It goes by the noised numbers of the rounds since there are no more of them, and is 0 where no
    such round was finished.
    """
    counted = [line.get("members", ()) for line in read_records(folder)]
    same = [members for members in counted if len(members) == count]
    return int(np.sum(same, axis=0).argmax()) if same else 0
