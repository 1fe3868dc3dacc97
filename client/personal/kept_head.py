"""The end of a run on a person's own device: the personal head is fitted, and kept in the vault.

**Guarantee**: head, adapter and figures go into the vault and nowhere else; the server is told
that the message arrived, whatever came of it.
"""

import json
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from ...common.errors import PrivetError
from ..device import Device, exchange_at, kept_half, persona_of
from ..store.device_store import ME
from ..training.cluster_choice import choose
from ..training.constant_work import choice_of, missing
from .evaluator import measure_of
from .head import head_bytes

if TYPE_CHECKING:
    from ..enrolled.participant import OwnDesk

__all__ = ["keep"]


def keep(desk: "OwnDesk", adapter: NDArray[np.float32]) -> None:
    """Fit the head on the own records under the run's last adapter, and keep both.

    Of several personas the one that fits the own records is chosen here, and kept: its adapter
    vector, and its number in `persona/RUN`.

    Args:
        desk: of the run.
        adapter: the run's last state: one adapter vector, or one for each persona.

    Also kept: the losses on the person's held-out records under the base model, the shared adapter
    and the head, for the person to see. Somebody without held-out records keeps the adapter alone.

    The server sees how long it takes: so the same is done on dummies first, and says when the
    answer leaves (`client/runtime/answer_pace.py`).
    """
    me, state = Device(ME, desk), adapter
    desk.pace.rehearse(
        ("keep", desk.run), desk.config.rounds.tick_s, lambda: _rehearsal(desk, state)
    )
    place, adapter = persona_of(me, adapter)
    entries = {f"adapters/{desk.run}": safetensors.numpy.save({"adapter": adapter})}
    if desk.config.groups.count > 1:
        entries[f"persona/{desk.run}"] = str(place).encode()
    own, held_out = me.measured_on()
    measure = measure_of(desk.trainer.adapter, adapter, kept_half(me), desk.config.pairs)
    try:
        person = measure.person(own, held_out, fit=True)
    except PrivetError as failed:
        desk.home.note(f"no personal head for {desk.run}: {failed}")
        person = None
    if person is not None:
        losses = {"base": person.base, "shared": measure.loss(person, None)}
        if person.head is not None:
            losses["personal"] = measure.loss(person, person.head)
            entries[f"heads/{desk.run}"] = head_bytes(person.head)
        facts = {"time": time.time(), "records": len(own), "held_out": len(held_out), **losses}
        entries[f"measured/{desk.run}"] = json.dumps(facts).encode()
    desk.home.keep(desk.run, entries)


def _rehearsal(desk: "OwnDesk", state: NDArray[np.float32]) -> None:
    """The most that `keep` may have to do, on made-up records; nothing of it is kept."""
    adapter, config, exchange = desk.trainer.adapter, desk.config, exchange_at(desk)
    personas, live = exchange.personas(state), exchange.groups.live(config.rounds.count + 1)
    place = choose(adapter, personas, live, (), choice_of(config))
    measure = measure_of(adapter, personas[place], pairs=config.pairs)
    own, held_out = missing(config, (), (), len(adapter.base.tokenizer))
    with suppress(PrivetError):
        person = measure.person(own, held_out, fit=True)
        if person is not None:
            measure.loss(person, None)
            measure.loss(person, person.head)
