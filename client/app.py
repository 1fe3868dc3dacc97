"""Flower's edge on the device: messages in, `take_part`, messages out. No logic.

Every field of a reply but `vector` is public: fixed by the plan, or by who takes part. A device
that declines says so and nothing else; the reason stays in its ledger. A device that fails says
one fixed sentence: Flower would send the text of its error, which may quote private records.
"""

import os
import pickle
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from ..common.errors import StateError
from ..common.plan import Plan
from .device import Bench, masked_phase, take_part

app = ClientApp()

FAILED = "this device could not take part; the reason is in its own log"


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Who is there, and with which version: the first message of a run."""
    me = {"version": version("privet"), "client": int(context.node_config["partition-id"])}
    return Message(RecordDict({"hello": ConfigRecord(me)}), reply_to=message)


@app.train("round")
@app.train("keys")
@app.train("shares")
@app.train("vector")
@app.train("confirm")
@app.train("unmask")
def phase(message: Message, context: Context) -> Message:
    """One phase of one device; without masking a round has one, `round`.

    What a device keeps between the phases of a masked round stays in Flower's node state: in the
    memory of its SuperNode, never on the wire.
    """
    number = int(context.node_config["partition-id"])
    name = message.metadata.message_type.partition(".")[2]
    try:
        plan = Plan.from_dict(dict(message.content["plan"]))
        given = message.content.get("adapter")
        start: Any = None if given is None else given["vector"].numpy()
        device = Bench.open(run_folder(context)).device(number)
        if name == "round":
            vector = take_part(device, plan, start)
        else:
            kept, vector = masked_phase(
                device, name, plan, message.content["protocol"]["message"], start, _recall(context)
            )
            context.state["masking"] = ConfigRecord({"state": pickle.dumps(kept)})
    except Exception as error:
        raise StateError(FAILED) from error
    reply = {"client": number, "released": vector is not None, "vector": vector or b""}
    return Message(RecordDict({"reply": ConfigRecord(reply)}), reply_to=message)


def _recall(context: Context) -> Any:
    """What this device itself kept after the phase before; None at the first. Once only."""
    kept = context.state.pop("masking", None)
    return None if kept is None else pickle.loads(kept["state"])


def run_folder(context: Context) -> Path:
    """Where a simulated device finds its run: the run's configuration, or `PRIVET_RUN`."""
    return Path(str(context.run_config.get("run") or os.environ["PRIVET_RUN"]))
