"""The round loop: announce, sum as contributions arrive, noise, step, checkpoint.

Read `run_rounds` downwards; it is the whole server. It knows no Flower: `ask` is the wire.

**Guarantee**: what is stored or shown of a round is a function of the noised sum and of who
answered. The sum is held as integers mod 2**bits, memory O(dimension); with `noise_at = server`
the noise is added to it before anything is decoded. A round with too few answers is void: no sum
is decoded, and what the clients spent stays spent.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..common import noise
from ..common.config import Config
from ..common.encoding import choose_grid, decode, rounded_sensitivity, unpack, unwrap, wrap
from ..common.errors import ProtocolError
from ..common.files import append_line, read_lines
from ..common.plan import Plan
from . import aggregation, checkpoint
from .cohort import draw

__all__ = ["Reply", "make_plan", "run_rounds"]

Vector = NDArray[np.float32]

LOG = "rounds.jsonl"


@dataclass(frozen=True)
class Reply:
    """What one client answered: its packed vector, or None when it declined."""

    client: int
    vector: bytes | None


Ask = Callable[[Sequence[int], Plan, Vector], Iterable[Reply]]
Show = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True, eq=False)
class State:
    """After `round` rounds: the global adapter and the optimiser's memory."""

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
) -> Vector:
    """All rounds that are still missing in `folder`; the same bits whether interrupted or not.

    Args:
        ask: sends plan and adapter to the cohort, yields replies as they arrive.
        config: the resolved experiment.
        run: id of the run.
        layout: digest of the adapter's layout.
        start: adapter before the first round, shape (d,).
        folder: where checkpoint and `rounds.jsonl` go.
        show: called with each round's record.

    Returns:
        The global adapter after the last round.
    """
    state = _resume(config, run, layout, start, folder)
    for number in range(state.round + 1, config.rounds.count + 1):
        began = time.perf_counter()
        cohort = draw(config.data.clients, config.rounds.cohort, number, config.data.seed)
        plan = make_plan(config, run, number, layout, state.adapter)
        total, answered, declined = _collect(
            ask(cohort, plan, state.adapter), plan, len(start), cohort
        )
        record: dict[str, Any] = {
            "round": number,
            "asked": len(cohort),
            "answered": answered,
            "declined": declined,
            "void": answered < config.rounds.quorum * len(cohort),
        }
        if record["void"]:
            state = State(number, state.adapter, state.optimizer)
        else:
            mean = _noised_mean(total, plan, config.insecure_test_seed)
            adapter, memory = aggregation.apply(config.rounds, state.optimizer, state.adapter, mean)
            record["mean_norm"] = float(np.linalg.norm(mean))
            record["update_norm"] = float(np.linalg.norm(adapter - state.adapter))
            state = State(number, adapter, memory)
        record["seconds"] = time.perf_counter() - began
        _keep(folder, config, run, layout, state, record)
        show(record)
    return state.adapter


def make_plan(config: Config, run: str, number: int, layout: str, adapter: Vector) -> Plan:
    """The public constants of one round, from the configuration and the global adapter only."""
    client, example = config.privacy.client, config.privacy.example
    cohort, dimension = config.rounds.cohort, len(adapter)
    adders = cohort if client.noise_at == "device" else 1
    multiplier = client.noise_multiplier if client.enabled else 0.0
    total_noise = multiplier * client.clip * adders**0.5
    grid = choose_grid(client.clip, total_noise, cohort, dimension, client.bits)
    # one unit's noise is measured against its norm after rounding, which is a little larger
    l2 = rounded_sensitivity(client.clip, grid.step, dimension)[0]
    return Plan(
        run=run,
        round=number,
        layout=layout,
        start=hashlib.sha256(adapter.tobytes()).hexdigest(),
        cohort=cohort,
        clip=client.clip,
        step=grid.step,
        bits=grid.bits,
        noise_at=client.noise_at if client.enabled else "none",
        variance=(multiplier * l2) ** 2,
        learning_rate=config.training.learning_rate,
        local_steps=config.training.steps,
        batch_size=config.training.batch_size,
        rate=config.sampling_rate,
        record_clip=example.clip if example.enabled else 0.0,
        record_noise=example.noise_multiplier if example.enabled else 0.0,
    )


def _collect(
    replies: Iterable[Reply], plan: Plan, dimension: int, cohort: Sequence[int]
) -> tuple[NDArray[np.uint32], int, int]:
    """Sum mod 2**bits of the vectors as they arrive; how many answered, how many declined."""
    total = np.zeros(dimension, np.uint32)
    missing = set(cohort)
    answered = declined = 0
    for reply in replies:
        if reply.client not in missing:
            raise ProtocolError(
                f"round {plan.round}: client {reply.client} answered twice or was not asked"
            )
        missing.remove(reply.client)
        if reply.vector is None:
            declined += 1
            continue
        total += unpack(reply.vector, dimension, plan.bits)
        answered += 1
    return total, answered, declined


def _noised_mean(
    total: NDArray[np.uint32], plan: Plan, test_seed: int | None
) -> NDArray[np.float64]:
    """Noise where it is the server's to add, then integers -> reals, over the public cohort."""
    if plan.noise_at == "server":
        source = noise.source(test_seed, f"server round {plan.round}")
        drawn = noise.skellam(noise.skellam_table(plan.variance), len(total), source)
        total = total + wrap(drawn, plan.bits)
    return (
        decode(unwrap(wrap(total.astype(np.int64), plan.bits), plan.bits), plan.step) / plan.cohort
    )


def _resume(config: Config, run: str, layout: str, start: Vector, folder: Path) -> State:
    kept = checkpoint.load(folder, run=run, config_hash=config.digest, layout=layout)
    if kept is None:
        return State(0, start, aggregation.begin(config.rounds, len(start)))
    # a crash between checkpoint and log leaves the last line to be written now
    if len(read_lines(folder / LOG)) < kept.round:
        append_line(folder / LOG, json.loads(str(kept.extra["record"])))
    return State(kept.round, kept.adapter, kept.optimizer)


def _keep(
    folder: Path, config: Config, run: str, layout: str, state: State, record: Mapping[str, Any]
) -> None:
    """Checkpoint first, then the log: what the log says has happened can be gone on from."""
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
