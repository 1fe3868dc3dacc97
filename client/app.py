"""Flower's edge on the device: messages in, `take_part`, messages out. No logic.

Every field of a reply but `vector` is public: fixed by the plan, or by who takes part. A device
that declines says so and nothing else; the reason stays in its ledger. A device that fails says
one fixed sentence: Flower would send the text of its error, which may quote private records.

The same two functions, `greet` and `answer`, serve a simulated device (`Simulated`) and a person's
own (`client/store/device_store.py`, called by `client/runtime/worker.py`).
"""

import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from ..common.errors import PrivacyError, ProtocolError, StateError
from ..common.privacy.round_plan import Plan
from ..common.secure_aggregation.keys import Identity, greeting
from .privacy import upload_state

if TYPE_CHECKING:
    from .device import Device

__all__ = ["Participant", "Simulated", "answer", "app", "greet", "nothing"]

app = ClientApp()

BEGINS = ("keys", "round")
FAILED = "this device could not take part; the reason is in its own log"


class Participant(Protocol):
    """Where a message finds its device."""

    @property
    def identity(self) -> Identity:
        """The device's long-lived key."""

    def hello(self, offer: Mapping[str, Any]) -> Mapping[str, Any]:
        """Whether the device takes part in what is offered: `accepted`."""

    def device(self, plan: Plan, number: int, begins: bool, /) -> "Device":
        """The device, known to the server by `number`; PrivacyError where it does not take part.

        `begins`: whether this is the first phase of a round.
        """

    def recall(self) -> Any:
        """What the phase before left, once; None at the first."""

    def keep(self, state: Any) -> None:
        """What the next phase needs."""

    def sent(self, plan: Plan, phase: str, payload: bytes) -> None:
        """Bytes that are about to leave."""

    def decline(self, plan: Plan, reason: str) -> None:
        """Nothing leaves; the reason stays."""

    def finish(self, run: str, adapter: NDArray[np.float32]) -> None:
        """The run is over; this is its adapter."""


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """The first message of a run, to a simulated device."""
    return greet(message, Simulated(context))


@app.train("round")
@app.train("keys")
@app.train("shares")
@app.train("vector")
@app.train("confirm")
@app.train("unmask")
def phase(message: Message, context: Context) -> Message:
    """One phase of one simulated device; without masking a round has one, `round`."""
    return answer(message, Simulated(context))


def greet(message: Message, seat: Participant) -> Message:
    """Who is there, with which version, and whether this device takes part in the run offered."""
    try:
        offer, identity = dict(message.content["offer"]), seat.identity
        said = greeting(str(offer["run"]), offer.pop("nonce"), message.metadata.dst_node_id)
        found = {
            "version": version("privet"),
            "identity": identity.public,
            "signature": identity.sign(said),
            **seat.hello(offer),
        }
    except Exception as error:
        raise StateError(FAILED) from error
    return Message(RecordDict({"hello": ConfigRecord(found)}), reply_to=message)


def answer(message: Message, seat: Participant) -> Message:
    """One phase of a round, or the end of the run (`keep`): the reply says `released` or not."""
    name = message.metadata.message_type.partition(".")[2]
    number = -1
    try:
        given = message.content.get("adapter")
        start: Any = None if given is None else given["vector"].numpy()
        if name == "keep":
            seat.finish(str(message.content["offer"]["run"]), start)
            payload: bytes | None = b""
        else:
            number = int(message.content["protocol"]["client"])
            payload = _phase(name, message, start, seat, number)
    except Exception as error:
        raise StateError(FAILED) from error
    return _reply(message, number, payload)


def nothing(message: Message) -> Message:
    """What a person's own device answers that declines or has failed, which nobody can tell apart.

    The end of a run is answered in one way only, whatever became of it.
    """
    ended = message.metadata.message_type == "query.keep"
    number = -1
    if not ended and message.has_content() and "protocol" in message.content:
        asked = message.content["protocol"].get("client")
        number = asked if isinstance(asked, int) else -1
    return _reply(message, number, b"" if ended else None)


def _reply(message: Message, number: int, payload: bytes | None) -> Message:
    reply = {"client": number, "released": payload is not None, "vector": payload or b""}
    return Message(RecordDict({"reply": ConfigRecord(reply)}), reply_to=message)


def _phase(name: str, message: Message, start: Any, seat: Participant, number: int) -> bytes | None:
    from .device import masked_phase, take_part  # loads torch, which a greeting does not need

    plan = Plan.from_dict(dict(message.content["plan"]))
    try:
        device = seat.device(plan, number, name in BEGINS)
    except (PrivacyError, ProtocolError) as refusal:
        seat.decline(plan, str(refusal))
        return None
    if name == "round":
        payload = take_part(device, plan, start)
    else:
        given = message.content["protocol"]["message"]
        kept, payload = masked_phase(device, name, plan, given, start, seat.recall())
        seat.keep(kept)
    if payload is not None:
        seat.sent(plan, name, payload)
    return payload


class Simulated:
    """A simulated device: its run's folder, and Flower's node state between the phases.

    Engines that move a device between processes need the state in Flower's hands: in the memory
    of its node, never on the wire.
    """

    def __init__(self, context: Context) -> None:
        self._context = context

    def _own(self) -> "Device":
        from .device import SimulatedContext

        number = int(self._context.node_config["partition-id"])
        return SimulatedContext.open(run_folder(self._context)).device(number)

    @property
    def identity(self) -> Identity:
        """Derived from the run's one secret."""
        own = self._own()
        return own.desk.identity(own.name)

    def hello(self, _: Mapping[str, Any]) -> Mapping[str, Any]:
        """Every simulated device takes part."""
        return {"accepted": True}

    def device(self, _plan: Plan, _number: int, _begins: bool) -> "Device":
        """The one of this partition."""
        return self._own()

    def recall(self) -> Any:
        """From Flower's node state."""
        kept = self._context.state.pop("masking", None)
        return None if kept is None else upload_state.decode(kept["state"])

    def keep(self, state: Any) -> None:
        """Into Flower's node state; a device that declined has none."""
        if state is not None:
            kept = ConfigRecord({"state": upload_state.encode(state)})
            self._context.state["masking"] = kept

    def sent(self, plan: Plan, phase: str, payload: bytes) -> None:
        """The ledger has it."""

    def decline(self, plan: Plan, reason: str) -> None:
        """The ledger has it."""

    def finish(self, run: str, adapter: NDArray[np.float32]) -> None:
        """The experimenter fits the heads."""


def run_folder(context: Context) -> Path:
    """Where a simulated device finds its run: the run's configuration, or `PRIVET_RUN`."""
    return Path(str(context.run_config.get("run") or os.environ["PRIVET_RUN"]))
