"""round_plan.py: a plan crosses the wire whole, and may only be stricter than the device."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from privet.common.errors import ProtocolError
from privet.common.privacy.plan_maker import make_plan
from privet.common.privacy.round_plan import Plan
from privet.common.settings.config import Config, parse


def settings(**sections: Any) -> Config:
    table: dict[str, Any] = {
        "data": {"clients": 8},
        "rounds": {"cohort": 4},
        "training": {"steps": 2},
    }
    table["privacy"] = {"client": {"noise_at": "server"}}
    return parse({**table, **sections})


def planned(config: Config) -> Plan:
    return make_plan(config, "run-1", 1, "0" * 64, np.zeros(20, np.float32))


def masked(cohort: int = 12, **sections: Any) -> Config:
    client = {"client": {"noise_at": "distributed"}}
    return settings(data={"clients": cohort}, rounds={"cohort": cohort}, privacy=client, **sections)


def test_a_plan_survives_the_wire_and_its_digest_names_every_field_but_the_attempt():
    plan = planned(masked())
    assert Plan.from_dict(plan.to_dict()) == plan
    assert dataclasses.replace(plan, attempt=2).digest == plan.digest
    others = [
        dataclasses.replace(plan, **{name: value + type(value)(1)})
        for name, value in vars(plan).items()
        if not isinstance(value, str) and name != "attempt"
    ]
    others += [
        dataclasses.replace(plan, run="x"),
        dataclasses.replace(plan, layout="x"),
        dataclasses.replace(plan, start="x"),
    ]
    assert len({plan.digest, *(other.digest for other in others)}) == len(others) + 1


def test_a_device_accepts_the_plan_of_its_own_settings_and_a_stricter_one():
    config = settings()
    plan = planned(config)
    plan.refuse_if_laxer(config)
    stricter: dict[str, Any] = {
        "clip": 0.5,
        "variance": 2 * plan.variance,
        "noise_at": "device",
        "rate": 0.1,
    }
    stricter |= {"batch_size": 9, "local_steps": 1, "record_clip": 0.5, "record_noise": 2.0}
    dataclasses.replace(plan, **stricter, learning_rate=0.1).refuse_if_laxer(config)


@pytest.mark.parametrize(
    ("field", "change", "named"),
    [
        ("cohort", lambda plan: plan.cohort - 1, "cohort"),
        ("clip", lambda plan: plan.clip * 1.01, "clip"),
        ("variance", lambda plan: plan.variance * 0.99, "noise"),
        ("variance", lambda _: 0.0, "noise"),
        ("step", lambda plan: plan.step * 0.9, "noise"),
        ("noise_at", lambda _: "none", "noise_at"),
        ("rate", lambda plan: plan.rate * 1.01, "rate"),
        ("batch_size", lambda plan: plan.batch_size - 1, "batch_size"),
        ("local_steps", lambda plan: plan.local_steps + 1, "local_steps"),
        ("learning_rate", lambda plan: plan.learning_rate * 2, "learning_rate"),
        ("record_clip", lambda plan: plan.record_clip * 1.01, "record_clip"),
        ("record_clip", lambda _: 0.0, "record_clip"),
        ("record_noise", lambda plan: plan.record_noise * 0.99, "record_noise"),
    ],
)
def test_a_plan_laxer_than_the_devices_own_settings_is_refused_by_name(field, change, named):
    config = settings()
    plan = planned(config)
    laxer = dataclasses.replace(plan, **{field: change(plan)})
    with pytest.raises(ProtocolError, match=rf"round 1: .* laxer .*: {named} \(own limit"):
        laxer.refuse_if_laxer(config)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"survivors": 7, "variance": 1e30}, "survivors"),
        ({"colluders": 1}, "colluders"),
        ({"survivors": 7}, "noise"),  # 7 - 2 shares of a sixth each
        ({"noise_at": "server", "variance": 1e30}, "noise_at"),
        ({"noise_at": "none", "variance": 1e30}, "noise_at"),
    ],
)
def test_a_masked_plan_laxer_than_the_devices_own_settings_is_refused_by_name(change, named):
    config = masked()
    plan = planned(config)
    assert (plan.survivors, plan.colluders, plan.adders) == (8, 2, 6)
    plan.refuse_if_laxer(config)
    laxer = dataclasses.replace(plan, **change)
    with pytest.raises(ProtocolError, match=rf"round 1: .* laxer .*: {named} \(own limit"):
        laxer.refuse_if_laxer(config)


def test_the_same_noise_on_a_coarser_grid_hides_less_and_is_refused_by_name():
    """A contribution is longer after rounding; what the ledger would charge grows with it."""
    config, dimension = masked(), 400
    exact = planned(config)
    plan = make_plan(config, "run-1", 1, "0" * 64, np.zeros(dimension, np.float32))
    plan.refuse_if_laxer(config, dimension)
    laxer = dataclasses.replace(plan, step=100 * plan.step, variance=plan.variance / 100**2)
    named = r"noise over a rounded contribution \(own limit 1.0\)"
    assert laxer.counted_variance**0.5 * laxer.step >= plan.clip
    for one in (laxer, dataclasses.replace(plan, variance=0.9999 * plan.variance)):
        with pytest.raises(ProtocolError, match=named):
            one.refuse_if_laxer(config, dimension)
    grown = dataclasses.replace(laxer, variance=10 * plan.variance)
    grown.refuse_if_laxer(config, dimension)
    exact.refuse_if_laxer(config, 20)


def test_a_masked_plan_may_be_stricter_than_the_devices_own_settings():
    config = masked()
    plan = planned(config)
    dataclasses.replace(plan, survivors=10, colluders=4).refuse_if_laxer(config)
    alone: dict[str, Any] = {
        "noise_at": "device",
        "survivors": 0,
        "colluders": 0,
        "variance": 6 * plan.variance,
    }
    dataclasses.replace(plan, **alone).refuse_if_laxer(config)
    # a device that trusts the server takes less than that from it, never less noise
    trusting = settings(data={"clients": 12}, rounds={"cohort": 12})
    plan.refuse_if_laxer(trusting)


@pytest.mark.parametrize(
    "change", [{"survivors": 13}, {"survivors": 2}, {"colluders": 8}, {"survivors": 0}]
)
def test_a_masked_plan_without_an_honest_sum_is_refused(change):
    given = {**planned(masked()).to_dict(), **change}
    with pytest.raises(ProtocolError, match="leave no honest sum"):
        Plan.from_dict(given)


def test_a_device_that_adds_its_own_noise_refuses_a_server_that_wants_to_add_it():
    config = settings(privacy={"client": {"noise_at": "device"}})
    plan = dataclasses.replace(planned(config), noise_at="server")
    with pytest.raises(ProtocolError, match=r"noise_at \(own limit device\)"):
        plan.refuse_if_laxer(config)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("clip", float("nan")),
        ("clip", -1.0),
        ("clip", 0.0),
        ("step", 0.0),
        ("step", float("inf")),
        ("bits", 0),
        ("bits", 64),
        ("variance", -1.0),
        ("variance", float("nan")),
        ("variance", 1e30),
        ("learning_rate", float("nan")),
        ("learning_rate", -1.0),
        ("local_steps", 0),
        ("batch_size", 0),
        ("rate", 0.0),
        ("rate", 1.5),
        ("record_clip", -1.0),
        ("record_noise", float("nan")),
        ("cohort", 0),
        ("survivors", -1),
        ("survivors", 1 << 15),
        ("colluders", -1),
        ("attempt", 0),
        ("attempt", 1 << 32),
        ("round", 0),
        ("noise_at", "nowhere"),
    ],
)
def test_a_number_that_no_honest_server_sends_is_refused_by_name(field, value):
    given = {**planned(settings()).to_dict(), field: value}
    with pytest.raises(ProtocolError, match=field):
        Plan.from_dict(given)


def test_a_missing_an_unknown_and_a_mistyped_field_are_refused_by_name():
    given = planned(settings()).to_dict()
    with pytest.raises(ProtocolError, match="clip"):
        Plan.from_dict({name: value for name, value in given.items() if name != "clip"})
    with pytest.raises(ProtocolError, match="colour"):
        Plan.from_dict({**given, "colour": "red"})
    with pytest.raises(ProtocolError, match="cohort"):
        Plan.from_dict({**given, "cohort": True})


def test_another_version_is_refused_with_what_to_do():
    with pytest.raises(ProtocolError, match="install the same privet on both"):
        Plan.from_dict({**planned(settings()).to_dict(), "version": 1})
