"""One person's device in a run: what it owns, and what it does in a round.

`take_part` is a client's whole round, read downwards. What a device works with is its
`DeviceContext`: a person's own (`client/enrolled/participant.py`), or the one that all devices
simulated by one process share (`client/simulated.py`).
"""

import dataclasses
import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from ..common.errors import GateRefused, PrivacyError, ProtocolError
from ..common.model.exchange_layout import Exchange
from ..common.model.vector_layout import Layout
from ..common.privacy import noise
from ..common.privacy.encoding import unpack
from ..common.privacy.round_plan import Plan
from ..common.secure_aggregation.keys import (
    Directory,
    Identity,
    RoundKey,
    Secret,
)
from ..common.secure_aggregation.terms import MaskingPolicy
from ..common.settings.config import Config
from ..common.settings.sections import AbRunSettings
from .personal.person_losses import (
    Losses,
    evaluate_person,
    evaluator_of,
    gains_block,
)
from .privacy import masked_upload
from .privacy.gate import Statistics, budgets, caps, charges, refuse_more, release
from .privacy.ledger import Ledger
from .training import local_factor as local_factors
from .training import records as data
from .training.cluster_choice import choose
from .training.constant_work import Shape, Work, choice_of, chunks_of, missing, work_of
from .training.local_training import Randomness, Trained, Trainer, train

if TYPE_CHECKING:
    from .runtime.answer_pace import Pace

__all__ = [
    "Device",
    "DeviceContext",
    "Learnt",
    "chosen_cluster",
    "cluster_of",
    "exchange_at",
    "local_factor_of",
    "masked_phase",
    "randomness_of",
    "step_shape",
    "take_part",
    "tokenised",
]

_WORK = ("local_steps", "rate", "record_clip", "losses_bound", "gains_bound")
"""Fields of a plan that say how much there is to do."""


class DeviceContext(Protocol):
    """What a device works with in one run."""

    @property
    def config(self) -> Config:
        """The device's own settings, which a plan may tighten and never loosen."""

    @property
    def trainer(self) -> Trainer:
        """The base model, loaded once, and the adapter in it."""

    @property
    def ledger(self) -> Ledger:
        """The record of the privacy budget that was spent."""

    @property
    def directory(self) -> Directory:
        """The identities of the devices this device knows."""

    def pin(self, directory: Directory) -> None:
        """Keep the identities that were seen first in this round."""

    def agreement(self, key: RoundKey, /) -> Callable[[bytes], Secret]:
        """Return the function peer's public key -> secret shared with the holder of `key`."""

    def identity(self, name: str) -> Identity:
        """Return the device's long-lived key pair."""

    def number(self, name: str) -> int:
        """Return the device's number in the directory."""

    def records(self, name: str) -> Sequence[data.Record]:
        """Return all records of the person, earliest first."""

    def tokenised(self, records: Sequence[data.Record]) -> list[data.Tokenised]:
        """Return records as token ids."""

    def outcome(self, name: str) -> float | None:
        """Return the person's outcome in the A/B experiment that the run is.

        None where there is none yet.
        """

    def local_factor(self, name: str) -> bytes | None:
        """Return the part of the adapter that is trained here and never leaves.

        `client/training/local_factor.py` says what that is. None where there is nothing yet.
        """

    def keep_local_factor(self, name: str, kept: bytes) -> None:
        """Keep that part of the adapter durably."""

    def taught(self, name: str, plan: Plan) -> "Learnt | None":
        """Return what was trained already, beside other simulated devices; None: nothing.

        A person's own device has nothing of the kind.
        """

    @property
    def pace(self) -> "Pace | None":
        """The times at which this device's answers leave.

        None where nobody sees when they do.
        """


def tokenised(
    records: Sequence[data.Record], config: Config, trainer: Trainer, task: data.Task
) -> list[data.Tokenised]:
    """Return records as token ids, each class name replaced by its number."""
    tokenizer = trainer.adapter.base.tokenizer
    if config.pairs is not None:
        from .training.preference_pairs import tokenize_pairs

        return tokenize_pairs(records, tokenizer, config.data.max_tokens, config.pairs.score)
    rows = data.tokenize(records, tokenizer, config.data.max_tokens, task)
    if not config.data.classes:
        return rows
    numbers = {name: float(i) for i, name in enumerate(config.data.classes)}
    return [dataclasses.replace(row, label=numbers[str(row.label)]) for row in rows]


@dataclass(frozen=True, eq=False)
class Device:
    """One person's device in a run, by its name and the context it works in."""

    name: str
    context: DeviceContext

    def is_empty(self) -> bool:
        """Return whether the person has no records at all, whatever is learnt of them."""
        return not self.context.records(self.name)

    def records(self) -> Sequence[data.Tokenised]:
        """Return the person's training records, neither held out nor above the public cap."""
        context, config = self.context, self.context.config
        mine, _ = data.split(context.records(self.name), config.data.holdout)
        rows = context.tokenised(data.capped(mine, config.data.records_per_client))
        if config.outputs or config.pairs is not None:
            return rows
        end = context.trainer.adapter.base.tokenizer.eos_token_id
        return data.lessons(rows, end, config.training)

    def measured_on(self) -> tuple[list[data.Tokenised], list[data.Tokenised]]:
        """Return the records that the head is fitted on, and those it is measured on.

        These are the latest of the person's own training records, and of those held out as many as
        are wanted, spread over their time.
        """
        context, limits = self.context, self.context.config.evaluation
        own, held_out = data.split(context.records(self.name), context.config.data.holdout)
        places = data.spread(len(held_out), limits.records)
        return context.tokenised(own[-limits.fit_records :]), context.tokenised(
            [held_out[place] for place in places]
        )


def take_part(device: Device, plan: Plan, start: NDArray[np.float32]) -> bytes | None:
    """Answer a round as one device: check the plan, train, pass the gate.

    Returns:
        The bytes that leave, or None when the device declines. Why it declined stays in its own
        ledger. A round asked again gets the same bytes again and costs nothing. A plan with masks
        is declined: its contributions carry a share of the noise each, too little to be seen alone;
        but for simulated devices that are to do without (`simulation.masking`).
    """
    try:
        if plan.masked and device.context.config.simulation.masking == "protocol":
            raise ProtocolError(
                f"round {plan.round}: the plan has each device add a share of the noise, and such "
                "a contribution leaves under masks only; the server asked for it without"
            )
        return _answer(device, plan, start)
    except (PrivacyError, ProtocolError) as refusal:
        device.context.ledger.decline(device.name, plan.run, plan.round, str(refusal))
        return None


def _answer(device: Device, plan: Plan, start: NDArray[np.float32]) -> bytes:
    """Return the gate's bytes for this round, or raise the reason for having none.

    **Guarantee**: without any records the contribution is zero before the release's noise, in the
    adapter, in `members` and in the statistics, whatever noise training adds. So "all records of
    one person added or removed" moves it by its norm, one clip, and not from one contribution to
    another, up to two. Whether there are any is asked of the records themselves: what a record says
    may decide that nothing of it is learnt, and must not decide that nothing is contributed.
    """
    context, name, config = device.context, device.name, device.context.config
    if config.ab_run is not None:
        return _look(device, plan, config.ab_run)
    exchange = exchange_at(context)
    released = exchange.released(plan.round)
    plan.refuse_if_laxer(config, released.dimension)
    _refuse_other_start(plan, start)
    kept = context.ledger.resend(name, plan.run, plan.round, plan.digest)
    if kept is not None:
        return kept
    _refuse_unpaid(device, plan, released.dimension)
    work, cluster_vectors = work_of(config, plan), exchange.cluster_vectors(start)
    if work is not None:
        _rehearse(device, plan, cluster_vectors, work)
    learnt = _learnt(device, plan, cluster_vectors, work)
    contribution = exchange.contribution(
        learnt.trained.delta, None if device.is_empty() else learnt.cluster, plan.clip
    )
    _refuse_other_length(plan, len(contribution), released.dimension)
    return release(
        contribution,
        released.digest,
        plan,
        name,
        context.ledger,
        config.privacy,
        noise.source(config.insecure_test_seed, f"{name} round {plan.round} release"),
        _statistics(device, plan, cluster_vectors[learnt.cluster], learnt, work),
    )


def _refuse_unpaid(device: Device, plan: Plan, dimension: int) -> None:
    """Refuse a round that the ledger does not pay for: such a device does not train either."""
    context, privacy = device.context, device.context.config.privacy
    refuse_more(context.ledger, device.name, plan, context.config)
    cost = charges(plan, dimension, privacy)
    context.ledger.check(
        device.name, cost, budgets(privacy), privacy.delta, plan.run, caps(privacy)
    )


@dataclass(frozen=True, eq=False)
class Learnt:
    """What a device has learnt in a round: of which cluster, from which local factor."""

    cluster: int
    local_factor: NDArray[np.float32] | None = field(repr=False)
    trained: Trained = field(repr=False)


def _learnt(
    device: Device, plan: Plan, cluster_vectors: NDArray[np.float32], work: Work | None
) -> Learnt:
    """Choose a cluster and train it."""
    context = device.context
    if taught := context.taught(device.name, plan):
        return taught
    records = device.records()
    cluster = chosen_cluster(
        device, plan, cluster_vectors, records, None if work is None else work.choice
    )
    local_factor = local_factor_of(device, plan.round)
    trained = train(
        context.trainer,
        cluster_vectors[cluster],
        records,
        plan,
        randomness_of(device, plan),
        local_factor=local_factor,
        shape=step_shape(context, work),
    )
    if len(trained.local_factor):
        before = context.local_factor(device.name)
        kept = local_factors.added(before, plan.round, trained.local_factor)
        context.keep_local_factor(device.name, kept)
    return Learnt(cluster, local_factor, trained)


def step_shape(context: DeviceContext, work: Work | None) -> Shape | None:
    """Return the public shape of a local step; None: as little work as the batch needs."""
    base = context.trainer.adapter.base
    if work is not None:
        return work.step
    return chunks_of(context.config, base.positions) if base.by_shape else None


def chosen_cluster(
    device: Device,
    plan: Plan,
    cluster_vectors: NDArray[np.float32],
    records: Sequence[data.Tokenised],
    choice: Shape | None,
) -> int:
    """Choose the cluster that a device trains in a round."""
    active_clusters = exchange_at(device.context).clusters.active_clusters(plan.round)
    adapter = device.context.trainer.adapter
    return choose(adapter, cluster_vectors, active_clusters, records, choice)


def _rehearse(device: Device, plan: Plan, cluster_vectors: NDArray[np.float32], work: Work) -> None:
    """Learn how long a round's work takes, where it matters when the answer leaves."""
    pace = device.context.pace
    if pace is not None:
        kind = ("round", plan.run, *(getattr(plan, name) for name in _WORK), len(cluster_vectors))
        tick_s = device.context.config.rounds.tick_s
        pace.rehearse(kind, tick_s, lambda: _rehearsal(device, plan, cluster_vectors, work))


def _rehearsal(
    device: Device, plan: Plan, cluster_vectors: NDArray[np.float32], work: Work
) -> None:
    """Do a round's work on dummy records alone, to learn how long it takes.

    Nothing of it is kept.
    """
    context, exchange = device.context, exchange_at(device.context)
    adapter, dimension = context.trainer.adapter, context.trainer.adapter.local_factor.dimension
    active_clusters = exchange.clusters.active_clusters(plan.round)
    cluster = choose(adapter, cluster_vectors, active_clusters, (), work.choice)
    local_factor = np.zeros(dimension, np.float32) if dimension else None
    train(
        context.trainer,
        cluster_vectors[cluster],
        (),
        plan,
        Randomness(_batches(0, "rehearsal"), noise.SystemSource()),
        local_factor=local_factor,
        shape=work.step,
    )
    if plan.gains_bound:
        _evaluated(device, cluster_vectors[cluster], local_factor, ([], []), work)


def _look(device: Device, plan: Plan, ab_run: AbRunSettings) -> bytes:
    """Answer one look of an A/B experiment, with the outcome in the entries of the device's arm."""
    from . import ab_outcome
    from .ab_arm import arm_of

    context, name = device.context, device.name
    if context.pace is not None:
        context.pace.rehearse(("look", plan.run), context.config.rounds.tick_s, _nothing)
    return ab_outcome.answered(
        ab_run,
        context.config,
        plan,
        ab_outcome.ArmOutcome(
            name,
            arm_of(context.identity(name).seed, plan.run, len(ab_run.arms)),
            context.outcome(name),
        ),
        context.ledger,
        noise.source(context.config.insecure_test_seed, f"{name} round {plan.round} release"),
    )


def _nothing() -> None:
    """Do nothing, because no model takes part in a look that is rehearsed."""


def _released(context: DeviceContext, number: int) -> Layout:
    """Return the layout of a contribution to round `number`.

    That of an A/B experiment is known without loading a model.
    """
    ab_run = context.config.ab_run
    if ab_run is None:
        return exchange_at(context).released(number)
    from ..common.ab_test import layout

    return layout(ab_run)


def exchange_at(context: DeviceContext) -> Exchange:
    """Return what this device and its server exchange, by the device's own settings."""
    adapter = context.trainer.adapter
    return Exchange(adapter.layout, adapter.start, context.config.clusters)


def cluster_of(device: Device, state: NDArray[np.float32]) -> tuple[int, NDArray[np.float32]]:
    """Return the cluster that fits this device's training records after a run, and its adapter.

    Private: it is for this device alone, or for an experimenter who reads simulated devices.
    """
    context, exchange = device.context, exchange_at(device.context)
    cluster_vectors = exchange.cluster_vectors(state)
    active_clusters = exchange.clusters.active_clusters(context.config.rounds.count + 1)
    records = device.records() if active_clusters > 1 else ()
    cluster = choose(
        context.trainer.adapter,
        cluster_vectors,
        active_clusters,
        records,
        choice_of(context.config),
    )
    return cluster, cluster_vectors[cluster]


def local_factor_of(device: Device, number: int | None = None) -> NDArray[np.float32] | None:
    """Return what of the adapter this device keeps (fedsa's B), as a round begins.

    That is before round `number`, or after the last one.

    None: nothing, or nothing yet. It never leaves.
    """
    dimension = device.context.trainer.adapter.local_factor.dimension
    if not dimension:
        return None
    # void rounds have numbers too, so the last may be above rounds.count
    before = sys.maxsize if number is None else number
    return local_factors.before(device.context.local_factor(device.name), before, dimension)


def _statistics(
    device: Device,
    plan: Plan,
    start: NDArray[np.float32],
    learnt: Learnt,
    work: Work | None,
) -> Statistics:
    """Return the blocks of statistics that the plan asks for.

    The delta is made before a head is fitted.
    """
    statistics = dict[str, NDArray[np.float64]]()
    if plan.losses_bound:
        statistics["losses"] = learnt.trained.statistics
    if plan.gains_bound:
        evaluated = _evaluated(device, start, learnt.local_factor, device.measured_on(), work)
        statistics["gains"] = gains_block(evaluated, plan.gains_bound)
    return statistics


def _evaluated(
    device: Device,
    start: NDArray[np.float32],
    kept: NDArray[np.float32] | None,
    person: tuple[list[data.Tokenised], list[data.Tokenised]],
    work: Work | None,
) -> Losses | None:
    """Return the losses of the person's held-out records.

    With constant work those of made-up records, in place of those that are not there, are computed
    as well; they are nobody's and go nowhere.
    """
    context, adapter = device.context, device.context.trainer.adapter
    fit, pairs = context.config.head.enabled, context.config.pairs
    tokens = 0 if work is None else work.tokens
    evaluator = partial(evaluator_of, adapter, start, kept, pairs, tokens)
    losses = evaluate_person(evaluator, *person, fit)
    if work is not None:
        instead = missing(context.config, *person, len(adapter.base.tokenizer))
        evaluate_person(evaluator, *instead, fit)
    return losses


def masked_phase(
    device: Device,
    phase: str,
    plan: Plan,
    message: bytes,
    start: NDArray[np.float32] | None,
    state: masked_upload.State | None,
) -> tuple[masked_upload.State | None, bytes | None]:
    """Answer one phase of a masked round: keys, shares, vector, confirm, unmask.

    Args:
        device: whose round.
        phase: which one.
        plan: the same in every phase, or the device refuses.
        message: the server's, from `server/unmasking.py`.
        start: the global adapter; with `vector` only.
        state: what the phase before returned.

    Returns:
        What to keep for the next phase, and the bytes that leave; None and None when the device
        declines. Why stays in its ledger.
    """
    try:
        if not plan.masked:
            raise ProtocolError(f"round {plan.round}: the plan has no masks, phase {phase!r} does")
        if phase == "keys":
            return _announce(device, plan)
        terms = plan.terms(_released(device.context, plan.round).dimension)
        if state is None or state.party.terms != terms:
            raise ProtocolError(f"round {plan.round}: no phase before {phase!r} of this plan")
        return _went_on(device, phase, plan, message, start, state)
    except (PrivacyError, ProtocolError) as refusal:
        device.context.ledger.decline(device.name, plan.run, plan.round, str(refusal))
        return None, None


def _went_on(
    device: Device,
    phase: str,
    plan: Plan,
    message: bytes,
    start: NDArray[np.float32] | None,
    state: masked_upload.State,
) -> tuple[masked_upload.State, bytes]:
    """Answer a phase after the first, from what the phase before kept."""
    context = device.context
    if phase == "shares":
        shared, sealed, known = masked_upload.share(
            state, message, context.directory, os.urandom, context.agreement
        )
        context.pin(known)
        return shared, sealed
    if phase == "vector" and start is not None:
        received = masked_upload.receive(state, message)
        return masked_upload.mask(received, _contribution(device, plan, start))
    if phase == "confirm":
        return masked_upload.confirm(state, message)
    return masked_upload.unmask(state, message)


def _announce(device: Device, plan: Plan) -> tuple[masked_upload.State, bytes]:
    """Announce keys for one attempt, after everything that can be refused beforehand."""
    context, name = device.context, device.name
    dimension = _released(context, plan.round).dimension
    plan.refuse_if_laxer(context.config, dimension)
    if not _answered(device, plan):
        _refuse_unpaid(device, plan, dimension)
    policy = MaskingPolicy.agreed(context.config, plan.cohort)
    last = context.ledger.announce(name, plan.run, plan.attempt)
    terms = plan.terms(dimension)
    return masked_upload.announce(
        context.number(name), context.identity(name), terms, policy, last, os.urandom
    )


def _contribution(device: Device, plan: Plan, start: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Return the gate's integers for this round, to be masked."""
    _answered(device, plan)
    dimension = _released(device.context, plan.round).dimension
    return unpack(_answer(device, plan, start), plan.length(dimension), plan.bits)


def _answered(device: Device, plan: Plan) -> bool:
    """Refuse a round that was answered before, except under a test seed.

    Returns whether it was answered before.

    The same contribution is never masked twice: two sums over different survivors would differ by
    single contributions. A test seed, which protects nobody, repeats a round.
    """
    context = device.context
    kept = context.ledger.resend(device.name, plan.run, plan.round, plan.digest)
    if kept is not None and context.config.insecure_test_seed is None:
        raise PrivacyError(f"round {plan.round} was answered before; it is not answered again")
    return kept is not None


def _refuse_other_length(plan: Plan, length: int, dimension: int) -> None:
    if length != dimension:
        raise GateRefused(
            f"round {plan.round}: {length} numbers were trained to be released, the round's layout "
            f"has {dimension}; nothing left"
        )


def _refuse_other_start(plan: Plan, start: NDArray[np.float32]) -> None:
    if hashlib.sha256(start.tobytes()).hexdigest() != plan.start:
        raise ProtocolError(f"round {plan.round}: the adapter received is not the one announced")


def randomness_of(device: Device, plan: Plan) -> Randomness:
    seed, label = device.context.config.insecure_test_seed, f"{device.name} round {plan.round}"
    return Randomness(_batches(seed, label), noise.source(seed, f"{label} training"))


def _batches(seed: int | None, label: str) -> np.random.Generator:
    """Return the generator that draws the records of a batch.

    Its seed is 128 bits of the operating system, or the test seed.
    """
    if seed is None:
        return np.random.default_rng(int.from_bytes(os.urandom(16)))
    return np.random.default_rng([seed, *label.encode()])
