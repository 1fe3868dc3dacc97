"""server/server_step.py: what the server makes of a noised mean, by family and by cluster."""

from typing import Any

import numpy as np
import pytest

from privet.common.model.adapter import attach
from privet.common.model.exchange_layout import Exchange
from privet.common.model.server_optimizers import optimizer_named
from privet.common.settings.config import Config, parse
from privet.common.settings.sections import AdapterSettings, ClusterSettings
from privet.server import server_step

RNG = np.random.default_rng


def exchange_of(base: Any, family: str, **clusters: Any) -> Exchange:
    adapter = attach(base, AdapterSettings(family=family, rank=2, last_blocks=1))
    return Exchange(adapter.layout, adapter.start, ClusterSettings(**clusters))


def configured(count: int = 40, cohort: int = 100, **rounds: Any) -> Config:
    return parse(
        {
            "data": {"clients": 200},
            "rounds": {"count": count, "cohort": cohort, **rounds},
            "privacy": {
                "example": {"enabled": False},
                "client": {"enabled": False, "clip": 0.4},
            },
        }
    )


def begun(config: Config, exchange: Exchange) -> tuple[Any, Any]:
    return exchange.start, optimizer_named(config.rounds.optimizer).begin(exchange.state.dimension)


def drawn(exchange: Exchange, number: int) -> Any:
    return 0.1 * RNG(number).normal(size=exchange.released(number).dimension)


def factors(exchange: Exchange, state: Any) -> dict[str, Any]:
    found, begin = {}, 0
    for name, shape in exchange.adapter.pieces:
        found[name] = state[begin : begin + np.prod(shape)].reshape(shape).astype(np.float64)
        begin += int(np.prod(shape))
    return found


def products(exchange: Exchange, state: Any) -> dict[str, Any]:
    own = factors(exchange, state)
    return {
        name: own[name.replace(".lora_A.", ".lora_B.")] @ down
        for name, down in own.items()
        if ".lora_A." in name
    }


# --- families -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["tiny", "ffa", "lora", "fedsa"])
@pytest.mark.parametrize("optimizer", ["fedavg", "fedavgm", "fedadam"])
def test_the_usual_families_take_the_optimisers_step_bit_for_bit(llama, family, optimizer):
    exchange, config = exchange_of(llama, family), configured(optimizer=optimizer)
    state, memory = begun(config, exchange)
    mean = drawn(exchange, 1)
    wanted, kept = optimizer_named(optimizer).apply(config.rounds, memory, state, mean)
    found, stepped, said = server_step.step(config, exchange, 1, state, memory, mean)
    assert found.tobytes() == wanted.tobytes()
    assert {k: v.tobytes() for k, v in stepped.items()} == {k: v.tobytes() for k, v in kept.items()}
    assert said == {}


def test_rolora_moves_the_half_of_the_round_and_its_memory_and_nothing_else(llama):
    exchange, config = exchange_of(llama, "rolora"), configured()
    state, memory = begun(config, exchange)
    for number in (1, 2, 3, 4):
        mean = drawn(exchange, number)
        new, kept, _ = server_step.step(config, exchange, number, state, memory, mean)
        places = exchange.adapter.places(exchange.released(number))
        for before, after in ((state, new), *((memory[k], kept[k]) for k in memory)):
            moved = np.flatnonzero(before != after)
            assert set(moved) <= set(places)
            assert len(moved) > 0.9 * len(places)
        state, memory = new, kept


def test_fedsvd_splits_the_product_anew_and_changes_nothing_in_it(llama):
    exchange, config = exchange_of(llama, "fedsvd"), configured(optimizer="fedavg")
    state, memory = begun(config, exchange)
    for number in range(1, 5):
        mean = drawn(exchange, number)
        plain = state.copy()
        places = exchange.adapter.places(exchange.released(number))
        plain[places] += (config.rounds.learning_rate * mean).astype(np.float32)
        wanted = products(exchange, plain)
        state, memory, _ = server_step.step(config, exchange, number, state, memory, mean)
        for name, product in products(exchange, state).items():
            assert np.abs(product - wanted[name]).max() < 1e-6 * np.abs(wanted[name]).max() + 1e-9
        own = factors(exchange, state)
        for name, down in own.items():
            if ".lora_A." not in name:
                continue
            up = own[name.replace(".lora_A.", ".lora_B.")]
            assert np.allclose(down @ down.T, np.eye(2), atol=1e-5)
            assert np.allclose(up.T @ up, np.diag(np.diag(up.T @ up)), atol=1e-7)

    def faulty() -> float:
        """A is made anew and B left as it is."""
        name = next(iter(wanted))
        up = factors(exchange, plain)[name.replace(".lora_A.", ".lora_B.")]
        moved = up @ factors(exchange, state)[name]
        return float(np.abs(moved - wanted[name]).max() / np.abs(wanted[name]).max())

    assert faulty() > 1e-2


def test_fedsvd_turns_a_in_the_space_of_its_public_start_and_never_leaves_it(llama):
    """What the family can and cannot do: V' spans the rows of A, whatever B is."""
    exchange, config = exchange_of(llama, "fedsvd"), configured()
    state, memory = begun(config, exchange)
    first = {n: f for n, f in factors(exchange, state).items() if ".lora_A." in n}
    for number in range(1, 6):
        mean = drawn(exchange, number)
        state, memory, _ = server_step.step(config, exchange, number, state, memory, mean)
    for name, begin in first.items():
        now = factors(exchange, state)[name]
        assert not np.allclose(now, begin, atol=1e-2)
        assert np.allclose(now.T @ now, begin.T @ begin, atol=1e-5)  # the same projection


def test_with_plain_averaging_fedsvd_is_ffa_with_orthonormal_a(llama):
    """Turning the coordinates of gradient steps changes no step; only Adam sees coordinates."""
    exchange, config = exchange_of(llama, "fedsvd"), configured(optimizer="fedavg")
    state, memory = begun(config, exchange)
    fixed = state.copy()
    gradient = {n: RNG(i).normal(size=p.shape) for i, (n, p) in
                enumerate(products(exchange, state).items())}  # fmt: skip
    for number in range(1, 5):
        for which in ("turned", "fixed"):
            own = factors(exchange, state if which == "turned" else fixed)
            pieces = []
            for name, _ in exchange.released(number).pieces:
                down = name.replace(".lora_B.", ".lora_A.")
                pieces.append((gradient[down] @ own[down].T).ravel())
            mean = np.concatenate(pieces)
            if which == "turned":
                state, memory, _ = server_step.step(config, exchange, number, state, memory, mean)
            else:
                places = exchange.adapter.places(exchange.released(number))
                fixed[places] += (config.rounds.learning_rate * mean).astype(np.float32)
    left, right = products(exchange, state), products(exchange, fixed)
    assert all(np.allclose(left[name], right[name], atol=1e-5) for name in left)


# --- clusters -----------------------------------------------------------------------------------

GROUPS = {"count": 3, "extra": 2, "warmup": 2, "merge_every": 3, "min_share": 0.1}
SETTLED = 20  # a round when all that are to be merged are


def mean_of(exchange: Exchange, config: Config, members: Any, directions: Any) -> Any:
    """The mean that members of each cluster give, without noise: each a delta of its direction."""
    total = np.zeros(exchange.released(1).dimension)
    for place, count in enumerate(members):
        delta = directions[place].astype(np.float32)
        given = exchange.contribution(delta, place, config.privacy.client.clip)
        total += count * given.astype(np.float64)
    return total / config.rounds.cohort


def test_each_persona_moves_by_the_mean_of_its_own_members(llama):
    exchange = exchange_of(llama, "tiny", **GROUPS)
    config = configured(optimizer="fedavg", learning_rate=1.0)
    state, memory = begun(config, exchange)
    directions = 0.01 * RNG(0).normal(size=(3, exchange.adapter.dimension))
    mean = mean_of(exchange, config, (50, 30, 20), directions)
    new, _, said = server_step.step(config, exchange, SETTLED, state, memory, mean)
    moved = exchange.cluster_vectors(new) - exchange.cluster_vectors(state)
    assert np.allclose(moved[:3], directions, atol=1e-6)
    assert said == {"members": [50, 30, 20]}

    def faulty() -> float:
        """The cohort as everybody's denominator: a small group is slowed down."""
        wrong = mean[: exchange.adapter.dimension * 3].reshape(3, -1)
        return float(np.linalg.norm(wrong[2]) / np.linalg.norm(directions[2]))

    assert faulty() < 0.3


def test_where_a_noised_number_is_small_or_below_zero_the_public_floor_divides(llama):
    exchange = exchange_of(llama, "tiny", **GROUPS)
    config = configured(optimizer="fedavg", learning_rate=1.0)
    state, memory = begun(config, exchange)
    directions = 0.01 * RNG(0).normal(size=(3, exchange.adapter.dimension))
    mean = mean_of(exchange, config, (60, 38, 2), directions)
    mean[-3] = -5 * mean[-3]
    new, _, said = server_step.step(config, exchange, SETTLED, state, memory, mean)
    moved = exchange.cluster_vectors(new) - exchange.cluster_vectors(state)
    assert said["members"][2] == -10
    assert np.allclose(moved[2], directions[2] * 2 / 10, atol=1e-6)  # floor: 0.1 of 100


def test_personas_that_are_not_there_stay_as_they_are(llama):
    exchange, config = exchange_of(llama, "tiny", **GROUPS), configured()
    state, memory = begun(config, exchange)
    for number, live in ((1, 1), (SETTLED, 3)):
        new, kept, said = server_step.step(
            config, exchange, number, state, memory, drawn(exchange, 1)
        )
        assert len(said["members"]) == live
        assert np.array_equal(
            exchange.cluster_vectors(new)[live:], exchange.cluster_vectors(state)[live:]
        )
        assert all(not exchange.cluster_vectors(kept[name])[live:].any() for name in memory)


def test_one_adapter_becomes_all_personas_around_it_when_it_is_warm(llama):
    exchange, config = exchange_of(llama, "tiny", **GROUPS), configured(optimizer="fedavgm")
    state, memory = begun(config, exchange)
    directions = 0.1 * RNG(0).normal(size=(1, exchange.adapter.dimension))
    mean = mean_of(exchange, config, (100,), directions)
    state, memory, said = server_step.step(config, exchange, 1, state, memory, mean)
    assert "split" not in said
    state, memory, said = server_step.step(config, exchange, 2, state, memory, mean)
    assert said["split"] == 5
    cluster_vectors = exchange.cluster_vectors(state).astype(np.float64)
    middle = cluster_vectors.mean(0)
    way = np.linalg.norm(middle - exchange.first)
    steps = np.linalg.norm(cluster_vectors - middle, axis=1) / way
    assert (steps > 0.2).all()
    assert (steps < 0.35).all()  # 0.3, less what all of them have in common
    assert np.linalg.matrix_rank(cluster_vectors - middle, tol=0.01 * way) == 4
    assert not exchange.cluster_vectors(memory["momentum"]).any()


def spread_out(exchange: Exchange, config: Config, places: Any) -> tuple[Any, Any]:
    """A state and an optimiser's memory whose clusters stand where they are put."""
    _, memory = begun(config, exchange)
    cluster_vectors = exchange.cluster_vectors(exchange.start).copy()
    for number, place in enumerate(places):
        cluster_vectors[number, :2] += place
    for values in memory.values():
        exchange.cluster_vectors(values)[: len(places)] = np.arange(1, len(places) + 1)[:, None]
    return cluster_vectors.ravel(), memory


def test_two_personas_that_share_a_group_out_become_one_and_the_others_move_up(llama):
    """After the round that is due, by members; the server's memory goes along."""
    exchange = exchange_of(llama, "tiny", **GROUPS)
    config = configured(optimizer="fedavgm", learning_rate=1e-9)
    places = ((5.0, 0.0), (0.0, 5.0), (5.0, 1.0), (-5.0, 0.0), (0.0, -5.0))
    state, memory = spread_out(exchange, config, places)
    still = np.zeros((5, exchange.adapter.dimension))
    mean = mean_of(exchange, config, (10, 20, 30, 20, 20), still)
    for number in (3, 4):
        unmerged, _, said = server_step.step(config, exchange, number, state, memory, mean)
        assert "merged" not in said
        assert np.allclose(unmerged, state, atol=1e-6)
    new, kept, said = server_step.step(config, exchange, 5, state, memory, mean)
    assert said["merged"] == [0, 2]
    found = exchange.cluster_vectors(new - exchange.start)[:, :2]
    expected = [(5.0, 0.75), (0.0, 5.0), (-5.0, 0.0), (0.0, -5.0), (0.0, 0.0)]
    assert np.allclose(found, expected, atol=1e-5)
    momentum = exchange.cluster_vectors(kept["momentum"])[:, 0] / config.rounds.momentum
    assert np.allclose(momentum, [2.5, 2, 4, 5, 0], atol=1e-5)  # (10 * 1 + 30 * 3) / 40
    again, _, said = server_step.step(config, exchange, 8, new, kept, mean)
    assert "merged" in said
    assert server_step.step(config, exchange, 11, again, kept, mean)[2].keys() == {"members"}


def test_a_persona_that_almost_nobody_picks_is_merged_before_two_groups_are(llama):
    exchange = exchange_of(llama, "tiny", **GROUPS)
    config = configured(optimizer="fedavg", learning_rate=1e-9)
    places = ((5.0, 0.0), (0.0, 5.0), (3.0, 3.0), (-3.2, -3.0), (0.0, -5.0))
    state, memory = spread_out(exchange, config, places)
    still = np.zeros((5, exchange.adapter.dimension))
    even = mean_of(exchange, config, (20, 20, 20, 20, 20), still)
    lonely = mean_of(exchange, config, (24, 24, 24, 1, 27), still)
    assert server_step.step(config, exchange, 5, state, memory, even)[2]["merged"] == [0, 2]
    assert 3 in server_step.step(config, exchange, 5, state, memory, lonely)[2]["merged"]


def test_what_is_due_after_a_void_round_is_done(llama):
    """Else the next round would ask for five clusters of which four are the base model."""
    exchange, config = exchange_of(llama, "tiny", **GROUPS), configured()
    state, memory = begun(config, exchange)
    mean = drawn(exchange, 1)
    state, memory, _ = server_step.step(config, exchange, 1, state, memory, mean)
    assert server_step.turned(config, exchange, 1, state, memory)[2] == {}
    split, kept, said = server_step.turned(config, exchange, 2, state, memory)
    assert said == {"split": 5}
    assert len({one.tobytes() for one in exchange.cluster_vectors(split)}) == 5
    merged, _, said = server_step.turned(config, exchange, 5, split, kept)
    assert list(said) == ["merged"]
    assert np.array_equal(exchange.cluster_vectors(merged)[4], exchange.first)


def test_a_step_is_a_function_of_public_numbers_and_the_noised_mean(llama):
    exchange, config = exchange_of(llama, "tiny", **GROUPS), configured()
    state, memory = begun(config, exchange)
    mean = drawn(exchange, 2)
    for number in (2, 5):
        first, again = (
            server_step.step(config, exchange, number, state, memory, mean) for _ in range(2)
        )
        assert first[0].tobytes() == again[0].tobytes()
        assert first[2] == again[2]
    assert state.tobytes() == exchange.start.tobytes()


def test_the_members_of_a_persona_are_a_mean_over_rounds_since_the_last_turn(llama):
    exchange = exchange_of(llama, "tiny", **GROUPS)
    config = configured(optimizer="fedavg", learning_rate=1.0)
    state, memory = begun(config, exchange)
    directions = 0.01 * RNG(0).normal(size=(3, exchange.adapter.dimension))
    for number, third in ((SETTLED, 30), (SETTLED + 1, 10)):
        mean = mean_of(exchange, config, (40, 40, third), directions)
        before = exchange.cluster_vectors(state)
        state, memory, _ = server_step.step(config, exchange, number, state, memory, mean)
    moved = exchange.cluster_vectors(state) - before
    assert np.allclose(moved[2], directions[2] * 10 / 20, atol=1e-6)
