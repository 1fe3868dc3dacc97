"""Flower's edge on the device: messages in, `take_part`, messages out. No logic.

Every field of a reply but `vector` is public: fixed by the plan, or by who takes part. A device
that declines says so and nothing else; the reason stays in its ledger. A device that fails says
one fixed sentence: Flower would send the text of its error, which may quote private records.
"""

import os
from importlib.metadata import version
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from ..common.errors import StateError
from ..common.plan import Plan
from .device import Bench, take_part

app = ClientApp()

FAILED = "this device could not take part; the reason is in its own log"


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Who is there, and with which version: the first message of a run."""
    me = {"version": version("privet"), "client": int(context.node_config["partition-id"])}
    return Message(RecordDict({"hello": ConfigRecord(me)}), reply_to=message)


@app.train("round")
def round(message: Message, context: Context) -> Message:
    """One round of one device."""
    number = int(context.node_config["partition-id"])
    try:
        plan = Plan.from_dict(dict(message.content["plan"]))
        start = message.content["adapter"]["vector"].numpy()
        vector = take_part(Bench.open(run_folder(context)).device(number), plan, start)
    except Exception as error:
        raise StateError(FAILED) from error
    reply = {"client": number, "released": vector is not None, "vector": vector or b""}
    return Message(RecordDict({"reply": ConfigRecord(reply)}), reply_to=message)


def run_folder(context: Context) -> Path:
    """Where a simulated device finds its run: the run's configuration, or `PRIVET_RUN`."""
    return Path(str(context.run_config.get("run") or os.environ["PRIVET_RUN"]))
