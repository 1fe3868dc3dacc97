"""The round loop: announce, sum as contributions arrive, noise, step, checkpoint.

Read `run_rounds` downwards; it is the whole server. It knows no Flower: `ask` is the wire.

**Guarantee**: what is stored or shown of a round is a function of the noised sum and of who
answered. The sum is held as integers mod 2**bits, memory O(dimension); with `noise_at = server`
the noise is added to it before anything is decoded. A round with too few answers is void: no sum
is decoded, and what the clients spent stays spent. It does not count, and is asked again
(`server/void_rounds.py`), `rounds.patience` times in a row.
"""

import dataclasses
import functools
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..common.errors import CheckpointCorrupt, ConfigError, ProtocolError, RoundVoid, RunUnfinished
from ..common.files import append_line, read_lines, write_atomic
from ..common.model.exchange_layout import Exchange
from ..common.model.server_optimizers import optimizer_named
from ..common.privacy import noise
from ..common.privacy.encoding import decode, unpack, unwrap, wrap
from ..common.privacy.plan_maker import make_plan
from ..common.privacy.rotation import unrotate
from ..common.privacy.round_plan import Plan
from ..common.secure_aggregation.terms import Graph, Terms, sized_graph
from ..common.settings.config import Config
from . import server_step, unmasking, void_rounds
from .cohort import draw
from .round_record import LOG, Counts, RoundRecord, read_records
from .run_folder import checkpoint

__all__ = [
    "PLANS",
    "Reply",
    "ServedRun",
    "ask_again",
    "attempt",
    "begun_before",
    "masked_sum",
    "run_rounds",
    "wait_or_end",
]

Vector = NDArray[np.float32]
Total = NDArray[np.uint32]
"""A sum mod 2**bits."""

PLANS = "plans.jsonl"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reply:
    """What one client answered in a phase: bytes, or None when it declined."""

    client: int
    payload: bytes | None


Ask = Callable[[str, Mapping[int, bytes], Plan, Vector], Iterable[Reply]]
"""Phase, a message for each client, plan, global adapter -> the replies as they arrive."""
Show = Callable[[RoundRecord], None]
Summed = tuple[Total | None, list[int], Counts]


@dataclass(frozen=True, eq=False)
class ServedRun:
    """One run as its server holds it: settings, folder, and the wire to the devices.

    Attributes:
        config: the resolved experiment.
        id: of the run.
        folder: where checkpoint, `rounds.jsonl` and `plans.jsonl` go.
        ask: sends a phase's messages with plan and adapter, yields replies as they arrive.
        present: the clients that are there as a round begins, ascending.
        show: called with the record of each attempt, void ones too.
        greet: says hello to who has not agreed yet.
    """

    config: Config
    id: str
    folder: Path
    ask: Ask
    present: Callable[[], Sequence[int]]
    show: Show
    greet: Callable[[], object]


@dataclass(frozen=True, eq=False)
class State:
    """The global adapter and the optimiser's memory after the round of number `round`."""

    round: int
    adapter: Vector
    optimizer: Mapping[str, Vector]


def run_rounds(run: ServedRun, exchange: Exchange) -> Vector:
    """Run all rounds that are still missing in the run's folder.

    The result has the same bits whether the run was interrupted or not.

    Args:
        run: what is served.
        exchange: what is sent, and what of it a round's contributions hold.

    Returns:
        The state after the last round, as `exchange.state` has it.

    Raises:
        RunUnfinished: `rounds.patience` attempts in a row were void.
    """
    config, folder, layout = run.config, run.folder, exchange.state.digest
    state, voids, unsure = _resume(run, exchange), 0, begun_before(folder)
    while void_rounds.trained(read_records(folder)) < config.rounds.count:
        number, there, began = state.round + 1, run.present(), time.perf_counter()
        plan = make_plan(config, run.id, number, layout, state.adapter, exchange)
        size = exchange.released(number).dimension
        total, record = attempt(run, there, plan, state.adapter, size, number == unsure)
        voids = 0 if total is not None else voids + 1
        if total is not None:
            state, facts = _moved(config, exchange, state, plan, total, record["answered"])
            record |= facts
        else:
            record |= ask_again(config, voids)
            if not record["again"]:
                state, facts = _passed(config, exchange, state)
                record |= facts
        record["seconds"] = time.perf_counter() - began
        if record.get("again"):
            append_line(folder / LOG, record)
        else:
            _keep(run, layout, state, record)
        run.show(record)
        wait_or_end(config, record, folder)
    return state.adapter


def _passed(config: Config, exchange: Exchange, state: State) -> tuple[State, RoundRecord]:
    """Use up a round's number: the state is the same, but for what is due by the number."""
    number = state.round + 1
    adapter, memory, facts = server_step.turned(
        config, exchange, number, state.adapter, state.optimizer
    )
    return State(number, adapter, memory), facts


def _moved(
    config: Config, exchange: Exchange, state: State, plan: Plan, total: Total, answered: int
) -> tuple[State, RoundRecord]:
    """Decode a round's sum and step: the state after it, and facts for the round's record."""
    mean, sums = _noised_mean(total, plan, config.insecure_test_seed)
    facts: RoundRecord = {}
    if plan.blocks:
        from .round_statistics import statistics_of

        facts["statistics"] = statistics_of(sums, plan, answered)
    adapter, memory, stepped = server_step.step(
        config, exchange, plan.round, state.adapter, state.optimizer, mean
    )
    _refuse_overflow(plan.round, adapter)
    facts |= stepped
    facts["mean_norm"] = float(np.linalg.norm(mean))
    facts["update_norm"] = float(np.linalg.norm(adapter.astype(np.float64) - state.adapter))
    return State(plan.round, adapter, memory), facts


def ask_again(config: Config, voids: int) -> RoundRecord:
    """Return what a void attempt's record says of the next attempt.

    Without `wait_s` there is none.
    """
    if voids >= config.rounds.patience:
        return {"attempt": voids}
    return {"attempt": voids, "wait_s": void_rounds.wait_s(config, voids)}


def wait_or_end(config: Config, record: RoundRecord, folder: Path) -> None:
    """Wait after a void attempt until the next one. After any other do nothing.

    Raises:
        RunUnfinished: it was the last in a row that `rounds.patience` allows.
    """
    if not record["void"]:
        return
    if "wait_s" in record:
        time.sleep(record["wait_s"])
        return
    done = void_rounds.trained(read_records(folder))
    what = "looks" if config.ab_run else "rounds"
    raise RunUnfinished(
        f"{done} of {config.rounds.count} {what} of {config.name} are done, and the last "
        f"{record['attempt']} attempts were void (rounds.patience = {config.rounds.patience}): "
        f"round {record['round']} {void_rounds.sentence(record)}. What is done is kept: go on with "
        "--resume when more can take part"
    )


def begun_before(folder: Path) -> int:
    """Return the number of the round asked for last when this process began. 0: none.

    Somebody may have released in it, and the process that would know is gone.
    """
    return max((int(line["plan"]["round"]) for line in read_lines(folder / PLANS)), default=0)


def attempt(
    run: ServedRun,
    there: Sequence[int],
    plan: Plan,
    start: Vector,
    dimension: int,
    unsure: bool,
) -> tuple[Total | None, RoundRecord]:
    """Draw a cohort from who is there, and ask it for one round, or one look.

    Args:
        run: what is served.
        there: who is present.
        plan, start: of the round, and the global adapter it starts from.
        dimension: numbers in a contribution, without blocks.
        unsure: whether a process that has ended may have asked for this round's vectors.

    Returns:
        The sum mod 2**bits, None for a void round; and what the round's record begins with. That
        of a void attempt says who is missing, whether somebody may have released (`spent`), and
        whether the same number is asked again (`again`).
    """
    config, seen, phases = run.config, void_rounds.Seen(), dict[str, float]()
    cohort = _cohort(run, there, plan.round)
    _announce(run.folder, cohort, plan, dimension)
    watched = dataclasses.replace(run, ask=seen.watch(_timed(run.ask, phases)))
    total, came, counts = _sum(watched, cohort, plan, start, dimension, seen.refused)
    few = total is None or counts["answered"] < config.rounds.quorum * len(cohort) - 1e-9
    record: RoundRecord = {
        "round": plan.round,
        "asked": len(cohort),
        "answered": counts["answered"],
        "declined": counts["declined"],
        "refused": counts["refused"],
        "who": {"asked": list(cohort), "came": came},
        "void": few,
        "phases": phases,
    }
    if few:
        needed = void_rounds.needed(config, len(cohort), plan.survivors)
        record |= {"needed": needed, **seen.facts(plan.masked, unsure)}
    return None if few else total, record


def _cohort(run: ServedRun, there: Sequence[int], number: int) -> list[int]:
    config, seed = run.config, run.config.data.seed
    drawn = draw(len(there), min(config.rounds.cohort, len(there)), number, seed)
    records = read_records(run.folder)
    return void_rounds.cohort_of(there, [there[index] for index in drawn], records, number, seed)


def _timed(ask: Ask, seconds: dict[str, float]) -> Ask:
    """Wrap `ask` so that the duration of each phase is noted in `seconds`.

    A phase lasts from its first message to its last reply.
    """

    def asked(
        phase: str, messages: Mapping[int, bytes], plan: Plan, start: Vector
    ) -> Iterator[Reply]:
        began = time.perf_counter()
        yield from ask(phase, messages, plan, start)
        seconds[phase] = time.perf_counter() - began

    return asked


def _sum(
    run: ServedRun,
    cohort: Sequence[int],
    plan: Plan,
    adapter: Vector,
    dimension: int,
    why: dict[int, str],
) -> Summed:
    """Collect the sum of the contributions, mod 2**bits. None where masking reveals none."""
    ideal = run.config.simulation.masking == "ideal"
    if plan.masked and not ideal:
        tried = dataclasses.replace(plan, attempt=_next_attempt(run.folder))
        sized = functools.partial(sized_graph, run.config.secure_aggregation, plan.colluders)
        return masked_sum(run.ask, cohort, tried, adapter, dimension, sized, why)
    replies = run.ask("round", dict.fromkeys(cohort, b""), plan, adapter)
    total, came, counts = _collect(replies, plan, plan.length(dimension), cohort, why)
    return (None if len(came) < plan.survivors else total), came, counts


def _announce(folder: Path, cohort: Sequence[int], plan: Plan, dimension: int) -> None:
    """Write down who will be asked for what: a report says from it what each may have spent.

    A round begun again after a crash has the same plan, and no device answers it twice; the cohort
    may be another one.
    """
    line = {"asked": list(cohort), "dimension": dimension, "plan": plan.to_dict()}
    if line not in read_lines(folder / PLANS)[-1:]:
        append_line(folder / PLANS, line)


def _next_attempt(folder: Path) -> int:
    """Number the next masked attempt, counting over crashes too.

    Devices take part in each number once only.
    """
    path = folder / "attempts"
    attempt = int(path.read_text()) + 1 if path.exists() else 1
    write_atomic(path, f"{attempt}\n".encode())
    return attempt


def masked_sum(
    ask: Ask,
    cohort: Sequence[int],
    plan: Plan,
    adapter: Vector,
    dimension: int | None = None,
    sized: Callable[[int], Graph] | None = None,
    why: dict[int, str] | None = None,
) -> Summed:
    """One masked round, phase by phase (`experiments/protocol.py` shows both sides).

    A client that is missing, declines or is refused in a phase has dropped out of the rest.
    `dimension`: numbers in a contribution, where these are not as many as in `adapter`. `sized`:
    the neighbour graph for so many participants, None for the default one. `why`: filled with a
    sentence for each client that was refused.

    Returns:
        The sum over the survivors, or None when the round is void and nothing was revealed; their
        numbers; and how many answered, declined, and were refused.
    """
    tally = _Tally(plan.round, {} if why is None else why)

    def phase(name: str, messages: Mapping[int, bytes]) -> Iterator[tuple[int, bytes]]:
        return tally.given(ask(name, messages, plan, adapter), messages)

    terms = plan.terms(len(adapter) if dimension is None else dimension)
    try:
        outcome = _unmasked(phase, terms, cohort, sized, tally)
    except RoundVoid as too_few:
        logger.warning("%s", too_few)
        return None, [], tally.counts
    tally.counts["answered"] = len(outcome.survivors)
    return outcome.total, sorted(outcome.survivors), tally.counts


def _unmasked(
    phase: Callable[[str, Mapping[int, bytes]], Iterator[tuple[int, bytes]]],
    terms: Terms,
    cohort: Sequence[int],
    sized: Callable[[int], Graph] | None,
    tally: "_Tally",
) -> unmasking.Outcome:
    """Ask the five phases, from keys to the sum without masks.

    Raises:
        RoundVoid: too few are left.
    """
    keys = dict(phase("keys", dict.fromkeys(cohort, b"")))
    everybody, out, refused = unmasking.gather(terms, keys, sized=sized)
    tally.left_out(refused)
    dealt, out, refused = unmasking.relay(everybody, dict(phase("shares", out)))
    tally.left_out(refused)
    running = unmasking.begin_sum(dealt)
    for client, vector in phase("vector", out):
        try:
            unmasking.add_vector(running, client, vector)
        except ProtocolError as refusal:
            tally.left_out({client: str(refusal)})
    listed, out = unmasking.close_sum(running)
    agreed, out, refused = unmasking.exchange(listed, dict(phase("confirm", out)))
    tally.left_out(refused)
    return unmasking.unmask(agreed, dict(phase("unmask", out)))


@dataclass(frozen=True, eq=False)
class _Tally:
    """Counts who answered, declined and was refused in one round, and notes why."""

    round: int
    why: dict[int, str]
    counts: Counts = field(default_factory=lambda: Counts(answered=0, declined=0, refused=0))

    def given(self, replies: Iterable[Reply], asked: Iterable[int]) -> Iterator[tuple[int, bytes]]:
        """Yield whose reply is what, each client once, and count who declines."""
        waiting = set(asked)
        for reply in replies:
            if reply.client not in waiting:
                raise ProtocolError(
                    f"round {self.round}: client {reply.client} answered twice or was not asked"
                )
            waiting.remove(reply.client)
            if reply.payload is None:
                self.counts["declined"] += 1
            else:
                yield reply.client, reply.payload

    def left_out(self, refused: Mapping[int, str]) -> None:
        """Count clients whose bytes do not fit, and tell why."""
        self.refuse(refused)
        for sentence in refused.values():
            logger.warning("left out: %s", sentence)

    def refuse(self, refused: Mapping[int, str]) -> None:
        """Count clients whose bytes do not fit."""
        self.counts["refused"] += len(refused)
        self.why.update(refused)


def _collect(
    replies: Iterable[Reply], plan: Plan, length: int, cohort: Sequence[int], why: dict[int, str]
) -> Summed:
    """Sum the vectors mod 2**bits as they arrive.

    Returns the sum, whose vectors are in it, and the counts, as `masked_sum`.

    A vector that does not fit the plan is left out and the round goes on: one broken client must
    not stop the others.
    """
    total, came, tally = np.zeros(length, np.uint32), list[int](), _Tally(plan.round, why)
    for client, vector in tally.given(replies, cohort):
        try:
            total += unpack(vector, length, plan.bits)
        except ProtocolError as error:
            logger.warning("round %d: client %d is left out: %s", plan.round, client, error)
            tally.refuse({client: str(error)})
        else:
            came.append(client)
    tally.counts["answered"] = len(came)
    return total, sorted(came), tally.counts


def _noised_mean(
    total: NDArray[np.uint32], plan: Plan, test_seed: int | None
) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
    """Decode a sum to real numbers, adding the noise where that is the server's to do.

    Returns:
        The adapter's mean over the public cohort, and the sums of each block.
    """
    parts = plan.parts(len(total) - plan.length(0))
    if plan.noise_at == "server":
        source = noise.source(test_seed, f"server round {plan.round}")
        drawn = [plan.mechanism.sample(part.variance, part.size, source) for part in parts]
        total = total + wrap(np.concatenate(drawn), plan.bits)
    centred = unwrap(wrap(total.astype(np.int64), plan.bits), plan.bits)
    pieces = np.split(centred, np.cumsum([part.size for part in parts])[:-1])
    adapter, *sums = (decode(piece, p.step) for piece, p in zip(pieces, parts, strict=True))
    mean = adapter / plan.cohort
    mean = unrotate(mean, plan.start) if plan.rotated else mean
    return mean, {block.name: found for block, found in zip(plan.blocks, sums, strict=True)}


def _refuse_overflow(number: int, adapter: Vector) -> None:
    if not np.isfinite(adapter).all():
        raise ConfigError(
            f"round {number}: the shared adapter has grown beyond what float32 holds; lower "
            "rounds.learning_rate and start the run anew under another name"
        )


def _resume(run: ServedRun, exchange: Exchange) -> State:
    config, folder, layout = run.config, run.folder, exchange.state.digest
    kept = checkpoint.load(folder, run=run.id, config_hash=config.digest, layout=layout)
    lines = read_records(folder)
    shown = max((int(line["round"]) for line in lines if not line.get("again")), default=0)
    if kept is None and shown:
        raise CheckpointCorrupt(
            f"{folder / LOG} has {shown} rounds, but the checkpoint beside it is missing; restore "
            "it from a copy, or start the run anew in another folder"
        )
    if kept is None:
        optimizer = optimizer_named(config.rounds.optimizer)
        return State(0, exchange.start, optimizer.begin(exchange.state.dimension))
    # a crash between checkpoint and log leaves the last line to be written now
    if shown < kept.round:
        append_line(folder / LOG, json.loads(str(kept.extra["record"])))
    if kept.note:
        logger.warning("%s", kept.note)
    if shown > kept.round:
        # fresh noise on a sum that was shown before would be a second release of it, for nothing
        logger.warning(
            "rounds %d to %d are lost and are not run again; what they cost stays spent",
            kept.round + 1,
            shown,
        )
    return State(max(kept.round, shown), kept.adapter, kept.optimizer)


def _keep(run: ServedRun, layout: str, state: State, record: RoundRecord) -> None:
    """Save the checkpoint, then append to the log.

    So what the log says has happened can be gone on from.
    """
    kept = checkpoint.Checkpoint(
        run=run.id,
        round=state.round,
        layout=layout,
        adapter=state.adapter,
        optimizer=dict(state.optimizer),
        config_hash=run.config.digest,
        extra={"record": json.dumps(record)},
    )
    checkpoint.save(run.folder, kept)
    append_line(run.folder / LOG, record)
