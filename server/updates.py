"""What the server does with a round's mean, by family and by persona. All of it post-processing.

    tiny, ffa, lora, fedsa   a step of the optimiser (`server/aggregation.py`)
    rolora                   the same, of the half that was trained
    fedsvd                   the same, of B; then B A = U S V' is split anew: A = V', B = U S
    groups                   a step for each persona, over its own members; then perhaps a split

**Guarantee**: everything here is a function of public settings, of the state, and of the noised
mean. So it costs no privacy, and the numbers of members it shows are the noised ones.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..common.config import Config, GroupSettings, RoundSettings
from ..common.exchange import MEMBERS, Exchange, Vector
from ..common.layout import Layout
from . import aggregation

__all__ = ["step"]

Memory = Mapping[str, Vector]
Stepped = tuple[Vector, dict[str, Vector], dict[str, Any]]


def step(
    config: Config,
    exchange: Exchange,
    number: int,
    state: Vector,
    memory: Memory,
    mean: NDArray[np.float64],
) -> Stepped:
    """State and optimiser's memory after round `number`, and what the round's record says of it.

    Args:
        mean: noised mean over the public cohort, as `exchange.released(number)` has it.
    """
    if exchange.groups.count > 1:
        return _grouped(config, exchange, number, state, memory, mean)
    places = exchange.adapter.places(exchange.released(number))
    part = {name: values[places] for name, values in memory.items()}
    moved, stepped = aggregation.apply(config.rounds, part, state[places], mean)
    new, kept = state.copy(), {name: values.copy() for name, values in memory.items()}
    new[places] = moved
    for name, values in stepped.items():
        kept[name][places] = values
    if exchange.adapter.family == "fedsvd":
        _turn(exchange.adapter, new, kept)
    return new, kept, {}


# --- fedsvd -------------------------------------------------------------------------------------


def _turn(layout: Layout, state: Vector, memory: dict[str, Vector]) -> None:
    """Split every B A anew, in place: A's rows orthonormal, and B's columns orthogonal.

    B A stays what it is. The memory goes along: a mean of steps turns as B does, and a mean of
    squares as that of independent coordinates.

    A's new rows span the space of its old ones: V' is a product with A on the right. So A turns
    and never leaves the space of its public seed.
    """
    shapes = dict(layout.pieces)
    for name, shape in layout.pieces:
        if not name.endswith(".lora_A.weight"):
            continue
        other = name.replace(".lora_A.", ".lora_B.")
        down = layout.places(Layout("", "", ((name, shape),)))
        up = layout.places(Layout("", "", ((other, shapes[other]),)))
        a, b = (
            state[p].reshape(shapes[n]).astype(np.float64) for p, n in ((down, name), (up, other))
        )
        basis, triangle = np.linalg.qr(a.T)  # A = triangle' basis'
        _, _, right = np.linalg.svd(b @ triangle.T, full_matrices=False)
        if len(right) < len(basis.T):
            continue  # fewer outputs than ranks: B A cannot have orthogonal columns
        rows = right @ basis.T
        signs = np.sign(rows[np.arange(len(rows)), np.abs(rows).argmax(1)])
        turn = triangle.T @ right.T * signs
        state[down] = (rows * signs[:, None]).ravel()
        state[up] = (b @ turn).ravel()
        for kind, values in memory.items():
            by = turn**2 if kind == "second" else turn
            values[up] = (values[up].reshape(shapes[other]).astype(np.float64) @ by).ravel()


# --- personas -----------------------------------------------------------------------------------


def _grouped(
    config: Config,
    exchange: Exchange,
    number: int,
    state: Vector,
    memory: Memory,
    mean: NDArray[np.float64],
) -> Stepped:
    """A step for each persona there is; the denominator is its noised number of members.

    It is a mean over the rounds since the last time a split was due: the noise of one round is as
    large as a small persona. Where it is below the public floor, `groups.smallest` of the cohort,
    the floor is taken.
    """
    settings, cohort = exchange.groups, config.rounds.cohort
    count, live = settings.count, settings.live(number)
    sums = (mean[:-count] * cohort).reshape(count, -1)
    members = mean[-count:] * cohort / exchange.mark(config.privacy.client.clip)
    floor = settings.smallest * cohort
    told = np.array(memory.get(MEMBERS, np.zeros(count + 1, np.float32)))
    told += np.append(members, 1.0).astype(np.float32)
    usual = told[:live].astype(np.float64) / told[-1]
    new = exchange.personas(state).copy()
    kept = {name: v.reshape(count, -1).copy() for name, v in memory.items() if name != MEMBERS}
    for place in range(live):
        own = {name: values[place] for name, values in kept.items()}
        denominator = max(float(usual[place]), floor)
        moved, stepped = aggregation.apply(
            config.rounds, own, new[place], sums[place] / denominator
        )
        new[place] = moved
        for name, values in stepped.items():
            kept[name][place] = values
    said: dict[str, Any] = {"members": [round(float(one), 2) for one in members[:live]]}
    if _due(settings, number):
        told[:] = 0
    parted = _parted(settings, config.rounds, number, usual)
    if parted is not None:
        said["split"] = list(parted)
        _split(exchange, number, new, kept, *parted)
    flat = {name: values.ravel() for name, values in kept.items()}
    return new.ravel(), {**flat, MEMBERS: told}, said


def _due(settings: GroupSettings, number: int) -> bool:
    """Whether a split is looked for after this round; by public settings only."""
    return number >= settings.warmup and (number - settings.warmup) % settings.split_every == 0


def _parted(
    settings: GroupSettings, rounds: RoundSettings, number: int, members: NDArray[np.float64]
) -> tuple[int, int] | None:
    """(the largest persona, the one that begins anew as its other half), if there is a split now.

    A persona that is not there yet; or, at the same distance and not at the very end, the smallest
    one, if its noised share of the members is below `groups.smallest`: nobody's, or almost.
    """
    live = len(members)
    largest, smallest = int(members.argmax()), int(members.argmin())
    if settings.live(number + 1) > live:
        return largest, live
    lonely = members[smallest] < settings.smallest * rounds.cohort
    if (
        live > 1
        and _due(settings, number)
        and lonely
        and number + settings.split_every <= rounds.count
    ):
        return largest, smallest
    return None


def _split(
    exchange: Exchange,
    number: int,
    personas: Vector,
    memory: Mapping[str, Vector],
    large: int,
    new: int,
) -> None:
    """Two adapters instead of one, apart from it by a step to and fro in a public random direction.

    Its members, each by its own loss, take the side their own gradients point to. The step is
    `groups.spread` of how far the adapter has come since the start. Momentum begins anew.
    """
    middle, first = personas[large].astype(np.float64), exchange.first
    way = float(np.linalg.norm(middle - first)) or 1e-2
    drawn = np.random.default_rng([exchange.groups.seed, number]).normal(size=len(middle))
    apart = exchange.groups.spread * way * drawn / np.linalg.norm(drawn)
    personas[large], personas[new] = middle - apart, middle + apart
    for name, values in memory.items():
        values[new] = values[large]
        if name == "momentum":
            values[[large, new]] = 0.0
