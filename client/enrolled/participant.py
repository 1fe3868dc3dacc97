"""A person's own device as a server's messages reach it: `Participant` of `app.py`, over a home.

The state between the phases of a masked round, the base model and the adapter stay in this
process; everything else is in the vault. **Guarantee**: as `client/store/device_store.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, cast

from ...common.errors import PrivacyError, PrivetError
from ...common.secure_aggregation.keys import Directory, Identity, RoundKey, Secret
from ...common.settings.config import Config
from ..consent.device_conditions import threads
from ..consent.policy import own_config
from ..consent.run_offers import waiting
from ..runtime.answer_pace import Pace
from ..store.device_store import ME, DeviceStore
from . import pinned_directory

if TYPE_CHECKING:  # an idle worker is small: it has loaded no accountant, no SciPy, no model
    import numpy as np
    from numpy.typing import NDArray

    from ...common.privacy.round_plan import Plan
    from ..device import Device
    from ..privacy.ledger import Ledger
    from ..privacy.masked_upload import State
    from ..training.local_training import Trainer
    from ..training.records import Record, Tokenised

__all__ = ["EnrolledContext", "EnrolledParticipant"]

NOBODY = -1
"""The device's number before a round has told it."""


@dataclass(frozen=True, eq=False)
class EnrolledContext:
    """The context a real device works with in one run, read from its home.

    `client/device.py` says what each part is.
    """

    home: DeviceStore
    run: str
    config: Config
    trainer: "Trainer"
    device_number: int
    pace: Pace = field(default_factory=Pace)

    @property
    def ledger(self) -> "Ledger":
        """The one ledger of the home, for all runs, because a budget is for life."""
        return self.home.ledger

    @property
    def directory(self) -> Directory:
        """The directory that the vault holds."""
        return self.home.directory

    def pin(self, directory: Directory) -> None:
        """Keep the identities that were seen first in the vault."""
        self.home.pin(directory)

    def agreement(self, key: RoundKey) -> Callable[[bytes], Secret]:
        """Agree with the other devices of a round by this device's own key, and keep nothing."""
        return key.agreement()

    def identity(self, _: str) -> Identity:
        """Return the key pair that the vault holds."""
        return self.home.identity

    def number(self, _: str) -> int:
        """Return this device's number in the server's directory.

        Other devices check it against their own.
        """
        return self.device_number

    def records(self, _: str) -> Sequence["Record"]:
        """Return all records of the owner, earliest first.

        In a run on preferences they are those that the owner's verdicts give.
        """
        if self.config.pairs is not None:
            from ..store.verdicts import own_records

            return own_records(self.home)
        return self.home.records()

    def outcome(self, _: str) -> float | None:
        """Return what the owner's verdicts say of the answers of this device's arm."""
        from .ab_assignment import outcome

        ab_run = self.config.ab_run
        return None if ab_run is None else outcome(self.home, self.run, ab_run)

    def local_factor(self, _: str) -> bytes | None:
        """Read the part of the adapter that stays on this device from the vault."""
        return self.home.vault.get(f"at-home/{self.run}")

    def keep_local_factor(self, _: str, kept: bytes) -> None:
        """Write the part of the adapter that stays on this device into the vault."""
        self.home.vault.put(f"at-home/{self.run}", kept)

    def taught(self, _name: str, _plan: "Plan") -> None:
        """Return None, because nobody else's records are here to be trained beside."""

    def tokenised(self, records: Sequence["Record"]) -> list["Tokenised"]:
        """Return records as token ids.

        Records without one of the run's labels are left out.
        """
        from ..device import tokenised

        task, classes = self.config.data.task, self.config.data.classes
        if task == "classification":
            records = [
                record
                for record in records
                if record.label is not None and str(record.label) in classes
            ]
        if task == "regression":
            records = [record for record in records if isinstance(record.label, int | float)]
        return tokenised(
            records, self.config, self.trainer, "generation" if task == "auto" else task
        )


class EnrolledParticipant:
    """One person's device, for as long as its worker lives.

    Args:
        home: open.
        server: HOST:PORT that the SuperNode was started for; what comes from there is no word of
            another server that the owner has joined since. None: tests.
    """

    def __init__(self, home: DeviceStore, server: str | None = None) -> None:
        self._home, self._server = home, server
        self._state: State | None = None
        self._desk: EnrolledContext | None = None
        self.pace = Pace()

    @property
    def identity(self) -> Identity:
        """The key pair that the vault holds."""
        return self._home.identity

    def hello(self, offer: Mapping[str, object]) -> Mapping[str, bool | int]:
        """Keep the offer, and say whether this device takes part in it now.

        One that does loads the model first, so that no round waits for it; should that outlast the
        server's patience, the next greeting finds it ready.
        """
        home, mine = self._home, version("privet")
        accepted, lacks = False, -1
        try:
            if offer["version"] != mine:
                raise PrivacyError(
                    f"the server runs privet {offer['version']}, this device {mine}: install the "
                    "same version on both; this device runs its own code only"
                )
            self._refuse_other_server()
            lacks = pinned_directory.heard(home, offer)
            if lacks >= 0:  # at once: the server greets again, with what is lacking
                return {"accepted": False, "lacks": lacks}
            accepted = home.receive(str(offer["run"]), str(offer["config"]))
            if accepted:
                self._desk_of(str(offer["run"]), NOBODY, begins=True)
            elif not home.declined(str(offer["run"])):
                home.note(waiting(str(offer["run"])))
        except PrivetError as refusal:
            accepted = False
            home.note(str(refusal))
        return {"accepted": accepted, "lacks": lacks}

    def device(self, plan: "Plan", number: int, begins: bool) -> "Device":
        """Return the device with its context for the run, loading the model only once."""
        from ..device import Device

        return Device(ME, self._desk_of(plan.run, number, begins))

    def _desk_of(self, run: str, number: int, begins: bool) -> EnrolledContext:
        self._refuse_other_server()
        offer = self._home.taking_part(run, begins)
        joined = self._home.joined
        closed = joined is not None and joined.closed
        config = own_config(self._home.policy, offer.config, closed)
        context = self._desk
        if (
            context is None
            or (context.run, context.device_number) != (run, number)
            or context.config != config
        ):
            context = self._desk = self._opened(run, config, number)
        return context

    def _refuse_other_server(self) -> None:
        joined = self._home.joined
        if joined is not None and self._server not in (None, joined.server):
            raise PrivacyError(
                f"this device has joined {joined.server} since `privet client start` began to "
                f"serve {self._server}: stop it and start it again"
            )

    def _opened(self, run: str, config: Config, number: int) -> EnrolledContext:
        import torch

        from ...common.model.adapter import shared
        from .. import device  # noqa: F401  # the accountant is loaded now, not in the first phase
        from ..training.local_training import Trainer

        torch.set_num_threads(threads(self._home.policy.resources))
        if config.ab_run is not None:  # nothing is trained: no model is loaded
            return EnrolledContext(
                self._home, run, config, cast("Trainer", None), number, self.pace
            )
        trainer = Trainer.of(shared(config), config.speed.cache_mb, config.pairs)
        return EnrolledContext(self._home, run, config, trainer, number, self.pace)

    def recall(self) -> "State | None":
        """Return what the phase before kept, and forget it."""
        state, self._state = self._state, None
        return state

    def keep(self, state: "State | None") -> None:
        """Keep the state for the next phase in memory.

        A worker that dies in a round has so dropped out of it.
        """
        self._state = state

    def sent(self, plan: "Plan", phase: str, payload: bytes) -> None:
        """Record the bytes that are about to leave in the outbox."""
        self._home.sent(plan.run, plan.round, phase, payload)

    def decline(self, plan: "Plan", reason: str) -> None:
        """Record why nothing leaves, in the ledger and where the owner sees it."""
        self._home.ledger.decline(ME, plan.run, plan.round, reason)
        self._home.note(f"round {plan.round} of {plan.run}: {reason}")

    def finish(self, run: str, adapter: "NDArray[np.float32]") -> None:
        """Fit the personal head on the run's last adapter and keep both, or note why not.

        At the end of an experiment only that it has ended: no arm is in use any more.
        """
        from ...common.ab_test import layout
        from ..device import exchange_at
        from ..personal.kept_head import keep

        try:
            context = self._desk_of(run, NOBODY, begins=False)
            if context.config.ab_run is not None:
                self._home.refuse_to_keep(run, adapter, layout(context.config.ab_run).dimension)
                self._home.keep(run, {})
                return
            self._home.refuse_to_keep(run, adapter, exchange_at(context).state.dimension)
            keep(context, self._home, run, adapter)
        except PrivetError as refusal:
            self._home.note(str(refusal))

    def rest(self) -> None:
        """Let the model go from memory, when nobody has asked for long."""
        self._desk = self._state = None
        let_go()


def let_go() -> None:
    """Forget every model this process has loaded."""
    import sys

    if "torch" not in sys.modules:
        return
    from ...common.model import adapter, base_model
    from ..training.local_training import Trainer

    Trainer.of.cache_clear()
    adapter._shared.cache_clear()
    base_model.forget()
