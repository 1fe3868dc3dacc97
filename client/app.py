"""Flower's edge on the device: messages in, `take_part`, messages out. No logic.

Every field of a reply but `vector` is public: fixed by the plan, or by who takes part. A device
that declines says so and nothing else; the reason stays in its ledger. A device that fails says
one fixed sentence: Flower would send the text of its error, which may quote private records.

The same two functions, `greet` and `answer`, serve a simulated device (`Simulated`) and a person's
own (`client/enrolled/participant.py`, called by `client/runtime/processes.py`).
"""

import functools
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from ..common.errors import FAILED, PrivacyError, ProtocolError, StateError
from ..common.privacy.round_plan import Plan
from ..common.secure_aggregation.keys import Identity, greeting
from .privacy import upload_state

if TYPE_CHECKING:
    from .device import Device
    from .privacy.masked_upload import State

Vector = NDArray[np.float32]

__all__ = ["Participant", "Simulated", "answer", "app", "greet", "nothing"]

app = ClientApp()

BEGINS = ("keys", "round")


class Participant(Protocol):
    """A device as the two functions that answer messages see it."""

    @property
    def identity(self) -> Identity:
        """The long-lived key pair of the device."""

    def hello(self, offer: Mapping[str, object]) -> Mapping[str, bool | int]:
        """Return whether the device takes part in the run that is offered, as `accepted`."""

    def device(self, plan: Plan, number: int, begins: bool, /) -> "Device":
        """Return the device that is to answer a plan.

        `number` is its number at the server. `begins` says whether this is the first phase of a
        round. PrivacyError where the device does not take part.
        """

    def recall(self) -> "State | None":
        """Return what the phase before kept, and forget it.

        None at the first phase of a round.
        """

    def keep(self, state: "State | None") -> None:
        """Keep what the next phase of the round needs."""

    def sent(self, plan: Plan, phase: str, payload: bytes) -> None:
        """Record the bytes that are about to leave."""

    def decline(self, plan: Plan, reason: str) -> None:
        """Record why the device sends nothing."""

    def finish(self, run: str, adapter: Vector) -> None:
        """Take over the adapter that a run has ended with."""


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Answer the first message of a run for a simulated device."""
    return greet(message, Simulated(context))


@app.train("round")
@app.train("keys")
@app.train("shares")
@app.train("vector")
@app.train("confirm")
@app.train("unmask")
def phase(message: Message, context: Context) -> Message:
    """Answer one phase of a round for a simulated device.

    Without masking a round has one phase, `round`.
    """
    return answer(message, Simulated(context))


def greet(message: Message, seat: Participant) -> Message:
    """Answer a server's greeting with version, identity, and whether the device takes part."""
    try:
        offer, identity = dict(message.content["offer"]), seat.identity
        greeted = greeting(str(offer["run"]), offer.pop("nonce"), message.metadata.dst_node_id)
        hello = {
            "version": _installed(),
            "identity": identity.public,
            "signature": identity.sign(greeted),
            **seat.hello(offer),
        }
    except Exception as error:
        raise StateError(FAILED) from error
    return Message(RecordDict({"hello": ConfigRecord(hello)}), reply_to=message)


@functools.cache
def _installed() -> str:
    """Return the version of this privet, which takes milliseconds to look up."""
    return version("privet")


def answer(message: Message, seat: Participant) -> Message:
    """Answer one phase of a round, or the message that ends a run (`keep`).

    The reply says in `released` whether the device released anything.
    """
    name = message.metadata.message_type.partition(".")[2]
    number = -1
    try:
        given = message.content.get("adapter")
        start: Vector | None = None if given is None else given["vector"].numpy()
        if name == "keep":
            seat.finish(str(message.content["offer"]["run"]), _needed(start, name))
            payload: bytes | None = b""
        else:
            number = int(message.content["protocol"]["client"])
            payload = _phase(name, message, start, seat, number)
    except Exception as error:
        raise StateError(FAILED) from error
    return _reply(message, number, payload)


def nothing(message: Message) -> Message:
    """Return the answer of a person's own device that has declined or failed.

    Nobody can tell which of the two it was.

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


def _phase(
    name: str, message: Message, start: Vector | None, seat: Participant, number: int
) -> bytes | None:
    from .device import masked_phase, take_part  # loads torch, which a greeting does not need

    plan = Plan.from_dict(dict(message.content["plan"]))
    try:
        device = seat.device(plan, number, name in BEGINS)
    except (PrivacyError, ProtocolError) as refusal:
        seat.decline(plan, str(refusal))
        return None
    if name == "round":
        payload = take_part(device, plan, _needed(start, name))
    else:
        given = message.content["protocol"]["message"]
        kept, payload = masked_phase(device, name, plan, given, start, seat.recall())
        seat.keep(kept)
    if payload is not None:
        seat.sent(plan, name, payload)
    return payload


def _needed(start: Vector | None, name: str) -> Vector:
    if start is None:
        raise ProtocolError(f"the message {name!r} came without an adapter")
    return start


class Simulated:
    """A simulated device: its run's folder, and Flower's node state between the phases.

    Engines that move a device between processes need the state in Flower's hands: in the memory
    of its node, never on the wire.
    """

    def __init__(self, context: Context) -> None:
        self._context = context

    def _own(self) -> "Device":
        from .simulated import SimulatedContext

        number = int(self._context.node_config["partition-id"])
        return SimulatedContext.open(run_folder(self._context)).device(number)

    @property
    def identity(self) -> Identity:
        """The key pair derived from the one secret of the run's devices."""
        own = self._own()
        return own.context.identity(own.name)

    def hello(self, _: Mapping[str, object]) -> Mapping[str, bool | int]:
        """Accept the run, as every simulated device does."""
        return {"accepted": True}

    def device(self, _plan: Plan, _number: int, _begins: bool) -> "Device":
        """Return the device of this Flower partition."""
        return self._own()

    def recall(self) -> "State | None":
        """Return what the phase before kept in Flower's node state, and remove it there."""
        kept = self._context.state.pop("masking", None)
        return None if kept is None else upload_state.decode(kept["state"])

    def keep(self, state: "State | None") -> None:
        """Keep the state for the next phase in Flower's node state.

        A device that declined has none to keep.
        """
        if state is not None:
            kept = ConfigRecord({"state": upload_state.encode(state)})
            self._context.state["masking"] = kept

    def sent(self, plan: Plan, phase: str, payload: bytes) -> None:
        """Record nothing here, because the ledger has the release."""

    def decline(self, plan: Plan, reason: str) -> None:
        """Record nothing here, because the ledger has the reason."""

    def finish(self, run: str, adapter: Vector) -> None:
        """Do nothing, because the experimenter fits the heads."""


def run_folder(context: Context) -> Path:
    """Return the run folder of a simulated device, from the run's configuration or `PRIVET_RUN`."""
    return Path(str(context.run_config.get("run") or os.environ["PRIVET_RUN"]))
