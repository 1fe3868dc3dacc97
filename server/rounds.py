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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..common.errors import CheckpointCorrupt, ConfigError, ProtocolError, RoundVoid, RunUnfinished
from ..common.files import append_line, read_lines, write_atomic
from ..common.model.exchange_layout import Exchange
from ..common.privacy import noise
from ..common.privacy.encoding import decode, unpack, unwrap, wrap
from ..common.privacy.plan_maker import make_plan
from ..common.privacy.rotation import unrotate
from ..common.privacy.round_plan import Plan
from ..common.secure_aggregation.terms import Graph, sized_graph
from ..common.settings.config import Config
from ..common.settings.sections import SecureAggregationSettings
from . import aggregation, server_step, unmasking, void_rounds
from .cohort import draw
from .round_statistics import told
from .run_folder import checkpoint

__all__ = [
    "PLANS",
    "Reply",
    "ask_again",
    "attempt",
    "begun_before",
    "masked_sum",
    "run_rounds",
    "wait_or_end",
]

Vector = NDArray[np.float32]

LOG = "rounds.jsonl"
PLANS = "plans.jsonl"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reply:
    """What one client answered in a phase: bytes, or None when it declined."""

    client: int
    payload: bytes | None


Ask = Callable[[str, Mapping[int, bytes], Plan, Vector], Iterable[Reply]]
"""Phase, a message for each client, plan, global adapter -> the replies as they arrive."""
Show = Callable[[Mapping[str, Any]], None]
Summed = tuple[NDArray[np.uint32] | None, list[int], dict[str, int]]
Present = Callable[[], Sequence[int]]


@dataclass(frozen=True, eq=False)
class State:
    """The global adapter and the optimiser's memory after the round of number `round`."""

    round: int
    adapter: Vector
    optimizer: Mapping[str, Vector]


def run_rounds(
    ask: Ask,
    config: Config,
    run: str,
    layout: str,
    start: Vector,
    folder: Path,
    show: Show,
    present: Present | None = None,
    exchange: Exchange | None = None,
) -> Vector:
    """Run all rounds that are still missing in `folder`.

    The result has the same bits whether the run was interrupted or not.

    Args:
        ask: sends a phase's messages with plan and adapter, yields replies as they arrive.
        config: the resolved experiment.
        run: id of the run.
        layout: digest of the state's layout.
        start: state before the first round, shape (d,): the adapter, or those of all clusters.
        folder: where checkpoint, `rounds.jsonl` and `plans.jsonl` go.
        show: called with the record of each attempt, void ones too.
        present: the clients that are there as a round begins, ascending; all of them when None.
        exchange: what of the state a round's contributions hold; None: all of it.

    Returns:
        The state after the last round.

    Raises:
        RunUnfinished: `rounds.patience` attempts in a row were void.
    """
    state, voids = _resume(config, run, layout, start, folder), 0
    unsure = begun_before(folder)
    while void_rounds.trained(read_lines(folder / LOG)) < config.rounds.count:
        number = state.round + 1
        there = range(config.data.clients) if present is None else present()
        began = time.perf_counter()
        plan = make_plan(config, run, number, layout, state.adapter, exchange)
        size = len(state.adapter) if exchange is None else exchange.released(number).dimension
        total, record, phases = attempt(
            ask, config, there, plan, state.adapter, folder, size, number == unsure
        )
        voids = 0 if total is not None else voids + 1
        if total is None:
            record |= ask_again(config, voids)
            if not record["again"]:
                adapter, memory, said = _unmoved(config, exchange, number, state)
                record |= said
                state = State(number, adapter, memory)
        else:
            mean, sums = _noised_mean(total, plan, config.insecure_test_seed)
            if plan.blocks:
                record["statistics"] = told(sums, plan, record["answered"])
            adapter, memory, said = _step(config, exchange, number, state, mean)
            record |= said
            _refuse_overflow(number, adapter)
            record["mean_norm"] = float(np.linalg.norm(mean))
            record["update_norm"] = float(
                np.linalg.norm(adapter.astype(np.float64) - state.adapter)
            )
            state = State(number, adapter, memory)
        record["seconds"] = time.perf_counter() - began
        record["phases"] = phases
        if record.get("again"):
            append_line(folder / LOG, record)
        else:
            _keep(folder, config, run, layout, state, record)
        show(record)
        wait_or_end(config, record, folder)
    return state.adapter


def ask_again(config: Config, voids: int) -> dict[str, Any]:
    """Return what a void attempt's record says of the next attempt.

    Without `wait_s` there is none.
    """
    found: dict[str, Any] = {"attempt": voids}
    return (
        found
        if voids >= config.rounds.patience
        else found | {"wait_s": void_rounds.wait_s(config, voids)}
    )


def wait_or_end(config: Config, record: Mapping[str, Any], folder: Path) -> None:
    """Wait after a void attempt until the next one. After any other do nothing.

    Raises:
        RunUnfinished: it was the last in a row that `rounds.patience` allows.
    """
    if not record["void"]:
        return
    if "wait_s" in record:
        time.sleep(record["wait_s"])
        return
    done, what = (
        void_rounds.trained(read_lines(folder / LOG)),
        "looks" if config.ab_run else "rounds",
    )
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
    ask: Ask,
    config: Config,
    there: Sequence[int],
    plan: Plan,
    start: Vector,
    folder: Path,
    dimension: int,
    unsure: bool,
) -> tuple[NDArray[np.uint32] | None, dict[str, Any], dict[str, float]]:
    """Draw a cohort from who is there, and ask it for one round, or one look.

    Args:
        unsure: whether a process that has ended may have asked for this round's vectors.

    Returns:
        As `summed`; the record of a void attempt says who is missing, whether somebody may have
        released (`spent`), and whether the same number is asked again (`again`).
    """
    number, seed = plan.round, config.data.seed
    drawn = draw(len(there), min(config.rounds.cohort, len(there)), number, seed)
    records = read_lines(folder / LOG)
    cohort = void_rounds.cohort_of(there, [there[place] for place in drawn], records, number, seed)
    seen = void_rounds.Seen()
    total, record, phases = summed(ask, config, cohort, plan, start, folder, dimension, seen)
    if total is None:
        spent = seen.released or unsure
        record |= {
            "needed": void_rounds.needed(config, len(cohort), plan.survivors),
            "missing": seen.missing,
            "spent": spent,
            "again": not (plan.masked and spent),
        }
    return total, record, phases


def summed(
    ask: Ask,
    config: Config,
    cohort: Sequence[int],
    plan: Plan,
    start: Vector,
    folder: Path,
    dimension: int,
    seen: void_rounds.Seen,
) -> tuple[NDArray[np.uint32] | None, dict[str, Any], dict[str, float]]:
    """Ask a cohort for one round, or one look, of `dimension` numbers.

    `seen` is filled in.

    Returns:
        The sum mod 2**bits, None for a void round; what the round's record begins with; seconds of
        each phase.
    """
    _announce(folder, cohort, plan, dimension)
    phases: dict[str, float] = {}
    wire, masks = seen.watch(_timed(ask, phases)), config.secure_aggregation
    total, came, counts = _sum(wire, cohort, plan, start, folder, dimension, masks, seen)
    few = total is None or counts["answered"] < config.rounds.quorum * len(cohort) - 1e-9
    record: dict[str, Any] = {
        "round": plan.round,
        "asked": len(cohort),
        **counts,
        "who": {"asked": list(cohort), "came": came},
        "void": few,
    }
    return None if few else total, record, phases


def _step(
    config: Config,
    exchange: Exchange | None,
    number: int,
    state: State,
    mean: NDArray[np.float64],
) -> tuple[Vector, dict[str, Vector], dict[str, Any]]:
    if exchange is not None:
        return server_step.step(config, exchange, number, state.adapter, state.optimizer, mean)
    return *aggregation.apply(config.rounds, state.optimizer, state.adapter, mean), {}


def _unmoved(
    config: Config, exchange: Exchange | None, number: int, state: State
) -> tuple[Vector, dict[str, Vector], dict[str, Any]]:
    """Return the state after a void round: unchanged, but for what is due by the round's number."""
    if exchange is None or exchange.clusters.count == 1:
        return state.adapter, dict(state.optimizer), {}
    return server_step.turned(config, exchange, number, state.adapter, state.optimizer)


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
    ask: Ask,
    cohort: Sequence[int],
    plan: Plan,
    adapter: Vector,
    folder: Path,
    dimension: int,
    masks: SecureAggregationSettings,
    seen: void_rounds.Seen,
) -> Summed:
    """Collect the sum of the contributions, mod 2**bits. None where masking reveals none."""
    if plan.masked:
        tried = dataclasses.replace(plan, attempt=_next_attempt(folder))
        sized = functools.partial(sized_graph, masks, plan.colluders)
        return masked_sum(ask, cohort, tried, adapter, dimension, sized, seen.refused)
    replies = ask("round", dict.fromkeys(cohort, b""), plan, adapter)
    return _collect(replies, plan, plan.length(dimension), cohort, seen.refused)


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
    counts = {"answered": 0, "declined": 0, "refused": 0}

    def phase(name: str, messages: Mapping[int, bytes]) -> dict[int, bytes]:
        return dict(_given(ask(name, messages, plan, adapter), plan, set(messages), counts))

    def left_out(refused: Mapping[int, str]) -> None:
        counts["refused"] += len(refused)
        if why is not None:
            why.update(refused)
        for sentence in refused.values():
            logger.warning("left out: %s", sentence)

    try:
        everybody, out, refused = unmasking.gather(
            plan.terms(len(adapter) if dimension is None else dimension),
            phase("keys", dict.fromkeys(cohort, b"")),
            sized=sized,
        )
        left_out(refused)
        dealt, out, refused = unmasking.relay(everybody, phase("shares", out))
        left_out(refused)
        running = unmasking.begin_sum(dealt)
        for client, vector in _given(ask("vector", out, plan, adapter), plan, set(out), counts):
            try:
                unmasking.add_vector(running, client, vector)
            except ProtocolError as refusal:
                left_out({client: str(refusal)})
        listed, out = unmasking.close_sum(running)
        agreed, out, refused = unmasking.exchange(listed, phase("confirm", out))
        left_out(refused)
        outcome = unmasking.unmask(agreed, phase("unmask", out))
    except RoundVoid as too_few:
        logger.warning("%s", too_few)
        return None, [], counts
    counts["answered"] = len(outcome.survivors)
    return outcome.total, sorted(outcome.survivors), counts


def _given(
    replies: Iterable[Reply], plan: Plan, asked: set[int], counts: dict[str, int]
) -> Iterator[tuple[int, bytes]]:
    """Yield whose reply is what, each client once, and count who declines."""
    for reply in replies:
        if reply.client not in asked:
            raise ProtocolError(
                f"round {plan.round}: client {reply.client} answered twice or was not asked"
            )
        asked.remove(reply.client)
        if reply.payload is None:
            counts["declined"] += 1
        else:
            yield reply.client, reply.payload


def _collect(
    replies: Iterable[Reply],
    plan: Plan,
    length: int,
    cohort: Sequence[int],
    why: dict[int, str] | None = None,
) -> Summed:
    """Sum the vectors mod 2**bits as they arrive.

    Returns the sum, whose vectors are in it, and the counts, as `masked_sum`.

    A vector that does not fit the plan is left out and the round goes on: one broken client must
    not stop the others.
    """
    total, came = np.zeros(length, np.uint32), list[int]()
    counts = {"answered": 0, "declined": 0, "refused": 0}
    for client, vector in _given(replies, plan, set(cohort), counts):
        try:
            total += unpack(vector, length, plan.bits)
        except ProtocolError as error:
            logger.warning("round %d: client %d is left out: %s", plan.round, client, error)
            counts["refused"] += 1
            if why is not None:
                why[client] = str(error)
            continue
        came.append(client)
    counts["answered"] = len(came)
    return total, sorted(came), counts


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


def _resume(config: Config, run: str, layout: str, start: Vector, folder: Path) -> State:
    kept = checkpoint.load(folder, run=run, config_hash=config.digest, layout=layout)
    lines = read_lines(folder / LOG)
    shown = max((int(line["round"]) for line in lines if not line.get("again")), default=0)
    if kept is None and shown:
        raise CheckpointCorrupt(
            f"{folder / LOG} has {shown} rounds, but the checkpoint beside it is missing; restore "
            "it from a copy, or start the run anew in another folder"
        )
    if kept is None:
        return State(0, start, aggregation.begin(config.rounds, len(start)))
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


def _keep(
    folder: Path, config: Config, run: str, layout: str, state: State, record: Mapping[str, Any]
) -> None:
    """Save the checkpoint, then append to the log.

    So what the log says has happened can be gone on from.
    """
    kept = checkpoint.Checkpoint(
        run=run,
        round=state.round,
        layout=layout,
        adapter=state.adapter,
        optimizer=dict(state.optimizer),
        config_hash=config.digest,
        extra={"record": json.dumps(record)},
    )
    checkpoint.save(folder, kept)
    append_line(folder / LOG, record)
