"""common/privacy/plan_maker.py: the modulus is chosen, and a rotation where it saves bits."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privet.common.errors import ConfigError, ProtocolError
from privet.common.privacy.encoding import cannot_wrap, rounded_sensitivity
from privet.common.privacy.noise import TestSource, skellam_table
from privet.common.privacy.plan_maker import make_plan, size
from privet.common.privacy.rotation import flat_bound
from privet.common.settings.config import parse
from privet.common.settings.sections import ClientPrivacySettings


@settings(deadline=None, max_examples=60)
@given(
    noise_at=st.sampled_from(["device", "distributed", "server"]),
    multiplier=st.floats(0.1, 10),
    cohort=st.integers(3, 1000),
    dimension=st.integers(1, 1_000_000),
)
def test_the_chosen_modulus_cannot_wrap_and_costs_next_to_nothing(
    noise_at, multiplier, cohort, dimension
):
    client = ClientPrivacySettings(noise_at=noise_at, noise_multiplier=multiplier, clip=0.3)
    shares = max(1, cohort // 2) if noise_at == "distributed" else 1
    sizing = size(client, cohort, shares, dimension)
    largest = flat_bound(0.3, dimension) if sizing.rotated else 0.3
    draws = 1 if noise_at == "server" else cohort
    bound = draws * skellam_table(sizing.deviation**2).bound
    assert cannot_wrap(sizing.grid, largest, bound, cohort)
    if sizing.grid.bits < 32:
        longer = rounded_sensitivity(0.3, sizing.grid.step, dimension)[0] * sizing.grid.step
        assert longer <= 1.002 * 0.3
        assert shares * sizing.deviation**2 >= 2.0**21


def test_a_smaller_modulus_than_the_chosen_one_would_be_coarser_than_asked():
    auto = size(ClientPrivacySettings(clip=1.0), 64, 1, 192)
    smaller = ClientPrivacySettings(clip=1.0, bits=auto.grid.bits - 1)
    forced = size(smaller, 64, 1, 192)
    longer = rounded_sensitivity(1.0, forced.grid.step, 192)[0] * forced.grid.step
    assert longer > 1.002 or forced.deviation**2 < 2.0**21


def test_a_rotation_is_used_where_it_makes_the_grid_finer():
    small = ClientPrivacySettings(noise_at="server", clip=1.0, bits=20)
    assert size(small, 64, 1, 1 << 17).rotated
    assert not size(small, 64, 1, 16).rotated
    with pytest.raises(ConfigError, match="modulus of 12 bits is too small"):
        size(ClientPrivacySettings(clip=1.0, bits=12), 4000, 1, 1 << 17)


def test_a_device_that_names_a_modulus_refuses_a_smaller_one():
    config = parse({"privacy": {"client": {"bits": 24}}})
    plan = make_plan(config, "run", 1, "0" * 64, np.zeros(50, np.float32))
    plan.refuse_if_laxer(config)
    weaker = dataclasses.replace(plan, bits=23)
    with pytest.raises(ProtocolError, match=r"bits \(own limit 24\)"):
        weaker.refuse_if_laxer(config)


def test_rotated_contributions_add_up_to_the_plain_mean(tmp_path):
    from privet.client.privacy.gate import release
    from privet.client.privacy.ledger import Ledger
    from privet.common.privacy.encoding import unpack
    from privet.server.rounds import _noised_mean

    client = {"enabled": False, "clip": 1.0, "bits": 20}
    privacy = {"client": client, "example": {"enabled": False}}
    config = parse({"privacy": privacy, "data": {"clients": 8}, "rounds": {"cohort": 8}})
    deltas = np.zeros((8, 1 << 14), np.float32)
    deltas[np.arange(8), np.arange(8) * 7] = 0.9  # spikes: the worst for a small modulus
    plan = make_plan(config, "run", 1, "0" * 64, np.zeros(1 << 14, np.float32))
    assert plan.rotated
    total = np.zeros(1 << 14, np.uint32)
    with Ledger.open(tmp_path / "ledger.sqlite", owner="run") as ledger:
        for number, delta in enumerate(deltas):
            source = TestSource(1, str(number))
            payload = release(delta, "0" * 64, plan, str(number), ledger, config.privacy, source)
            total += unpack(payload, 1 << 14, plan.bits)
    mean, _ = _noised_mean(total, plan, None)
    assert mean == pytest.approx(deltas.mean(axis=0), abs=6 * plan.step / 8**0.5)
