"""common/exchange.py: what is sent and what a contribution holds, by family, round and persona."""

import dataclasses

import numpy as np
import pytest

from privet.common.adapter import attach
from privet.common.config import AdapterSettings, GroupSettings
from privet.common.errors import ProtocolError
from privet.common.exchange import Exchange

FAMILIES = ("tiny", "ffa", "fedsvd", "rolora", "fedsa", "lora")


def adapter_of(base, family, outputs=0):
    return attach(base, AdapterSettings(family=family, rank=2, last_blocks=1), outputs)


def exchange_of(base, family, outputs=0, **groups):
    adapter = adapter_of(base, family, outputs)
    return Exchange(adapter.layout, adapter.start, GroupSettings(**groups))


def names(layout):
    return [name for name, _ in layout.pieces]


# --- families -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["tiny", "ffa", "lora", "fedsa"])
def test_a_contribution_holds_what_is_sent(bert, family):
    exchange = exchange_of(bert, family, 2)
    assert exchange.released(1) == exchange.released(2) == exchange.state == exchange.adapter


def test_of_fedsvd_only_b_is_released_and_a_is_sent_with_it(bert):
    exchange = exchange_of(bert, "fedsvd", 2)
    assert exchange.released(1) == exchange.released(2)
    released = names(exchange.released(1))
    assert all(name.endswith(".lora_B.weight") for name in released[:-2])
    assert released[-2:] == ["head.weight", "head.bias"]
    assert len(names(exchange.state)) == 2 * len(released) - 2


def test_of_rolora_a_round_releases_the_half_it_trains_and_the_plans_tell_them_apart(bert):
    exchange = exchange_of(bert, "rolora", 2)
    odd, even = exchange.released(1), exchange.released(2)
    assert (exchange.released(3), exchange.released(4)) == (odd, even)
    assert all(".lora_B." in name or name.startswith("head") for name in names(odd))
    assert all(".lora_A." in name for name in names(even))
    assert sorted(names(odd) + names(even)) == sorted(names(exchange.state))
    assert len({odd.digest, even.digest, exchange.state.digest}) == 3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("number", [1, 2])
def test_a_round_trains_by_name_what_it_releases_and_the_own_part(bert, family, number):
    adapter = adapter_of(bert, family, 2)
    exchange = Exchange(adapter.layout, adapter.start, GroupSettings())
    trained = adapter.train_only(number)
    wanted = names(exchange.released(number)) + names(adapter.own)
    assert [name for name, _ in trained] == wanted
    moving = {id(p) for p in adapter.named.values() if p.requires_grad}
    assert moving == {id(p) for _, p in trained}


def test_fedsa_keeps_b_in_a_layout_of_its_own_that_is_in_no_plan(llama):
    adapter = adapter_of(llama, "fedsa")
    assert all(".lora_A." in name for name in names(adapter.layout))
    assert all(".lora_B." in name for name in names(adapter.own))
    for family in ("tiny", "ffa", "fedsvd", "rolora", "lora"):
        assert adapter_of(llama, family).own.dimension == 0


def test_places_are_where_the_numbers_stand(llama):
    exchange = exchange_of(llama, "rolora")
    every = np.sort(np.concatenate([exchange.state.places(exchange.released(n)) for n in (1, 2)]))
    assert np.array_equal(every, np.arange(exchange.state.dimension))
    part = exchange.released(2)
    first = np.prod(exchange.state.pieces[0][1])  # A comes first, then its B
    assert np.array_equal(exchange.state.places(part)[:first], np.arange(first))


# --- personas -----------------------------------------------------------------------------------


def test_one_persona_changes_nothing(llama):
    exchange = exchange_of(llama, "tiny", count=1, warmup=9)
    delta = np.ones(exchange.adapter.dimension, np.float32)
    assert exchange.contribution(delta, 0, 0.1) is delta
    assert exchange.start is exchange.first
    assert exchange.state is exchange.adapter
    assert [exchange.groups.live(number) for number in (1, 20)] == [1, 1]


def test_a_contribution_to_one_of_three_personas_fills_one_block_and_one_mark(llama):
    exchange = exchange_of(llama, "tiny", count=3)
    size = exchange.adapter.dimension
    assert exchange.state.dimension == 3 * size
    assert exchange.released(1).dimension == 3 * size + 3
    delta = np.random.default_rng(0).normal(size=size).astype(np.float32)
    found = exchange.contribution(delta, 1, 0.4)
    blocks, marks = found[:-3].reshape(3, -1), found[-3:]
    assert not blocks[[0, 2]].any()
    assert marks.tolist() == [0.0, pytest.approx(0.14), 0.0]
    assert np.allclose(blocks[1] / np.linalg.norm(blocks[1]), delta / np.linalg.norm(delta))


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_block_and_mark_together_never_pass_the_clip(llama, place, scale):
    """The joint clip: whichever block it is, and whatever is in it."""
    exchange = exchange_of(llama, "tiny", count=3)
    delta = np.random.default_rng(1).normal(size=exchange.adapter.dimension).astype(np.float32)
    bound = 0.3
    found = exchange.contribution(np.float32(scale) * delta, place, bound).astype(np.float64)
    assert np.linalg.norm(found) <= bound * (1 + 1e-6)

    def faulty() -> float:
        """The mark beside a delta that was clipped to the whole bound."""
        marked = np.append(found[:-3] / max(np.linalg.norm(found[:-3]), 1e-9) * bound, found[-3:])
        return float(np.linalg.norm(marked))

    assert faulty() > bound * 1.02


def test_a_delta_that_is_not_finite_is_left_to_the_gate(llama):
    exchange = exchange_of(llama, "tiny", count=2)
    found = exchange.contribution(np.full(exchange.adapter.dimension, np.nan, np.float32), 1, 1.0)
    assert np.isnan(found).any()


def test_a_state_of_another_number_of_personas_is_refused(llama):
    exchange = exchange_of(llama, "tiny", count=3)
    with pytest.raises(ProtocolError, match=r"expected a state of 48 numbers, got shape \(16,\)"):
        exchange.personas(np.zeros(16, np.float32))


def test_the_layout_tells_the_number_of_personas(llama):
    digests = {exchange_of(llama, "tiny", count=count).released(1).digest for count in (1, 2, 3)}
    assert len(digests) == 3
    three = exchange_of(llama, "tiny", count=3)
    without = dataclasses.replace(three.released(1), pieces=three.released(1).pieces[:-1])
    assert three.state.digest == without.digest != three.released(1).digest


def test_personas_come_one_by_one_after_the_warm_up():
    groups = GroupSettings(count=3, warmup=2, split_every=3)
    assert [groups.live(number) for number in range(1, 9)] == [1, 1, 2, 2, 2, 3, 3, 3]
    late = GroupSettings(count=2, warmup=7, split_every=2)
    assert [late.live(number) for number in (1, 7, 8, 30)] == [1, 1, 2, 2]
