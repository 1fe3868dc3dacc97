"""The end of a run on a person's device, where the personal head is fitted and kept in the vault.

**Guarantee**: head, adapter and figures go into the vault and nowhere else; the server is told
that the message arrived, whatever came of it.
"""

import json
import time
from contextlib import suppress

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from ...common.errors import PrivetError
from ..device import Device, DeviceContext, cluster_of, exchange_at, local_factor_of
from ..store.device_store import ME, DeviceStore
from ..training.cluster_choice import choose
from ..training.constant_work import choice_of, missing
from .evaluator import EvaluatedPerson
from .person_losses import evaluator_of

__all__ = ["keep"]


def keep(context: DeviceContext, home: DeviceStore, run: str, state: NDArray[np.float32]) -> None:
    """Fit the head on the own records under the run's last adapter, and keep both.

    Of several clusters the one that fits the own records is chosen here, and kept: its adapter
    vector, and its number in `persona/RUN`.

    Args:
        context: what the device works with in the run.
        home: the owner's; head and adapter go into its vault.
        run: the run's name.
        state: the run's last: one adapter vector, or one for each cluster.

    Also kept: the losses on the person's held-out records under the base model, the shared adapter
    and the head, for the person to see. Somebody without held-out records keeps the adapter alone.

    The server sees how long it takes: so the same is done on dummies first, and says when the
    answer leaves (`client/runtime/answer_pace.py`).
    """
    me, config = Device(ME, context), context.config
    if context.pace is not None:
        context.pace.rehearse(
            ("keep", run), config.rounds.tick_s, lambda: _rehearsal(context, state)
        )
    cluster, adapter = cluster_of(me, state)
    entries = {f"adapters/{run}": safetensors.numpy.save({"adapter": adapter})}
    if config.clusters.count > 1:
        entries[f"persona/{run}"] = str(cluster).encode()
    own, held_out = me.measured_on()
    evaluator = evaluator_of(context.trainer.adapter, adapter, local_factor_of(me), config.pairs)
    try:
        person = evaluator.person(own, held_out, fit=True)
    except PrivetError as failed:
        home.note(f"no personal head for {run}: {failed}")
        person = None
    if person is not None:
        counts = {"records": len(own), "held_out": len(held_out)}
        entries |= _measured(person, run, counts)
    home.keep(run, entries)


def _measured(person: EvaluatedPerson, run: str, counts: dict[str, int]) -> dict[str, bytes]:
    """Return the vault's entries of a person who was measured: the losses, and the head if any."""
    losses = {"base": person.base, "shared": person.loss(None)}
    head = {}
    if person.head is not None:
        losses["personal"] = person.loss(person.head)
        head = {f"heads/{run}": person.head.to_bytes()}
    facts = {"time": time.time(), **counts, **losses}
    return head | {f"measured/{run}": json.dumps(facts).encode()}


def _rehearsal(context: DeviceContext, state: NDArray[np.float32]) -> None:
    """Do the most that `keep` may have to do, on made-up records, to learn how long it takes.

    Nothing of it is kept.
    """
    adapter, config, exchange = context.trainer.adapter, context.config, exchange_at(context)
    cluster_vectors = exchange.cluster_vectors(state)
    active_clusters = exchange.clusters.active_clusters(config.rounds.count + 1)
    cluster = choose(adapter, cluster_vectors, active_clusters, (), choice_of(config))
    evaluator = evaluator_of(adapter, cluster_vectors[cluster], pairs=config.pairs)
    own, held_out = missing(config, (), (), len(adapter.base.tokenizer))
    with suppress(PrivetError):
        person = evaluator.person(own, held_out, fit=True)
        if person is not None:
            person.loss(None)
            person.loss(person.head)
