"""server/updates.py: what the server makes of a noised mean, by family and by persona."""

from typing import Any

import numpy as np
import pytest

from privet.common.adapter import attach
from privet.common.config import AdapterSettings, Config, GroupSettings, parse
from privet.common.exchange import Exchange
from privet.server import aggregation, updates

RNG = np.random.default_rng


def exchange_of(base: Any, family: str, **groups: Any) -> Exchange:
    adapter = attach(base, AdapterSettings(family=family, rank=2, last_blocks=1))
    return Exchange(adapter.layout, adapter.start, GroupSettings(**groups))


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
    return exchange.start, aggregation.begin(config.rounds, exchange.state.dimension)


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
    wanted, kept = aggregation.apply(config.rounds, memory, state, mean)
    found, stepped, said = updates.step(config, exchange, 1, state, memory, mean)
    assert found.tobytes() == wanted.tobytes()
    assert {k: v.tobytes() for k, v in stepped.items()} == {k: v.tobytes() for k, v in kept.items()}
    assert said == {}


def test_rolora_moves_the_half_of_the_round_and_its_memory_and_nothing_else(llama):
    exchange, config = exchange_of(llama, "rolora"), configured()
    state, memory = begun(config, exchange)
    for number in (1, 2, 3, 4):
        mean = drawn(exchange, number)
        new, kept, _ = updates.step(config, exchange, number, state, memory, mean)
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
        state, memory, _ = updates.step(config, exchange, number, state, memory, mean)
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
        state, memory, _ = updates.step(config, exchange, number, state, memory, mean)
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
                state, memory, _ = updates.step(config, exchange, number, state, memory, mean)
            else:
                places = exchange.adapter.places(exchange.released(number))
                fixed[places] += (config.rounds.learning_rate * mean).astype(np.float32)
    left, right = products(exchange, state), products(exchange, fixed)
    assert all(np.allclose(left[name], right[name], atol=1e-5) for name in left)


# --- personas -----------------------------------------------------------------------------------

GROUPS = {"count": 3, "warmup": 2, "split_every": 3, "smallest": 0.1}


def mean_of(exchange: Exchange, config: Config, members: Any, directions: Any) -> Any:
    """The mean that members of each persona give, without noise: each a delta of its direction."""
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
    new, _, said = updates.step(config, exchange, 7, state, memory, mean)
    moved = exchange.personas(new) - exchange.personas(state)
    assert np.allclose(moved, directions, atol=1e-6)
    assert said["members"] == [50, 30, 20]

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
    mean[-1] = -5 * mean[-1]
    new, _, said = updates.step(config, exchange, 7, state, memory, mean)
    moved = exchange.personas(new) - exchange.personas(state)
    assert said["members"][2] == -10
    assert np.allclose(moved[2], directions[2] * 2 / 10, atol=1e-6)  # floor: 0.1 of 100


def test_personas_that_are_not_there_yet_stay_as_they_are(llama):
    exchange, config = exchange_of(llama, "tiny", **GROUPS), configured()
    state, memory = begun(config, exchange)
    mean = drawn(exchange, 1)
    new, kept, said = updates.step(config, exchange, 1, state, memory, mean)
    assert len(said["members"]) == 1
    assert np.array_equal(exchange.personas(new)[1:], exchange.personas(state)[1:])
    assert all(not exchange.personas(kept[name])[1:].any() for name in memory)


def test_the_largest_is_split_when_the_next_one_is_due(llama):
    exchange, config = exchange_of(llama, "tiny", **GROUPS), configured(optimizer="fedavgm")
    state, memory = begun(config, exchange)
    directions = 0.1 * RNG(0).normal(size=(3, exchange.adapter.dimension))
    state, memory, said = updates.step(
        config, exchange, 1, state, memory, mean_of(exchange, config, (100, 0, 0), directions)
    )
    assert "split" not in said
    mean = mean_of(exchange, config, (100, 0, 0), directions)
    state, memory, said = updates.step(config, exchange, 2, state, memory, mean)
    assert said["split"] == [0, 1]
    one, two, three = exchange.personas(state)
    middle = (one + two) / 2 - exchange.first
    apart = np.linalg.norm(one - two) / 2
    assert apart == pytest.approx(0.3 * np.linalg.norm(middle), rel=1e-3)
    assert np.array_equal(three, exchange.first)
    assert not exchange.personas(memory["momentum"]).any()
    mean = mean_of(exchange, config, (30, 70, 0), directions)
    for number in (3, 4):
        state, memory, said = updates.step(config, exchange, number, state, memory, mean)
        assert "split" not in said
    _, _, said = updates.step(config, exchange, 5, state, memory, mean)
    assert said["split"] == [1, 2]


def test_a_persona_that_nobody_picks_begins_anew_beside_the_largest(llama):
    exchange, config = exchange_of(llama, "tiny", **GROUPS), configured()
    state, memory = begun(config, exchange)
    directions = 0.1 * RNG(0).normal(size=(3, exchange.adapter.dimension))
    lonely = mean_of(exchange, config, (2, 40, 58), directions)
    for number, split in ((6, None), (7, None), (8, [2, 0]), (9, None)):
        _, _, said = updates.step(config, exchange, number, state, memory, lonely)
        assert said.get("split") == split
    peopled = mean_of(exchange, config, (20, 40, 40), directions)
    _, _, said = updates.step(config, exchange, 8, state, memory, peopled)
    assert "split" not in said
    ending = configured(count=9)
    _, _, said = updates.step(ending, exchange, 8, state, memory, lonely)
    assert "split" not in said  # no time is left to find members


def test_a_step_is_a_function_of_public_numbers_and_the_noised_mean(llama):
    exchange, config = exchange_of(llama, "tiny", **GROUPS), configured()
    state, memory = begun(config, exchange)
    mean = drawn(exchange, 2)
    first, again = (updates.step(config, exchange, 2, state, memory, mean) for _ in range(2))
    assert first[0].tobytes() == again[0].tobytes()
    assert first[2] == again[2]
    assert state.tobytes() == exchange.start.tobytes()


def test_the_members_of_a_persona_are_a_mean_over_rounds_so_that_noise_splits_nothing(llama):
    exchange, config = exchange_of(llama, "tiny", **GROUPS), configured()
    state, memory = begun(config, exchange)
    directions = 0.1 * RNG(0).normal(size=(3, exchange.adapter.dimension))
    for number, third in ((6, 25), (7, 25), (8, -5)):  # its mean is 15, above the floor of 10
        mean = mean_of(exchange, config, (40, 40, third), directions)
        state, memory, said = updates.step(config, exchange, number, state, memory, mean)
        assert "split" not in said
    mean = mean_of(exchange, config, (40, 40, -5), directions)
    for number in (9, 10, 11):
        state, memory, said = updates.step(config, exchange, number, state, memory, mean)
    assert said["split"][1] == 2
