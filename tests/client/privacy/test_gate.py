"""gate.py: what leaves was refused, clipped, allowed, noised and counted, in that order.

Each trap of docs/privacy.md keeps its faulty version here, and a check that the faulty one fails.
"""

import dataclasses
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting import dp_event, pld
from numpy.typing import NDArray

from privet.client.privacy.gate import budgets, charges, release
from privet.client.privacy.ledger import Ledger
from privet.common.errors import BudgetExceeded, GateRefused
from privet.common.privacy.accounting import Charge, epsilon
from privet.common.privacy.clipping import clip
from privet.common.privacy.encoding import decode, rounded_sensitivity, unpack, unwrap
from privet.common.privacy.noise import TestSource
from privet.common.privacy.plan_maker import make_plan
from privet.common.privacy.rotation import flat_bound, unrotate
from privet.common.privacy.round_plan import Plan
from privet.common.settings.config import Config, parse

LAYOUT = "0" * 64
RUN = "run-1"


def settings(**client: Any) -> Config:
    """Four clients, all asked; `client` goes into `privacy.client`."""
    budget = client.pop("budget", 100.0)
    example = client.pop("example", {"enabled": False})
    training = client.pop("training", {})
    return parse(
        {
            "data": {"clients": 40},
            "rounds": {"cohort": 4},
            "training": training,
            "privacy": {
                "client": {"noise_at": "server", "bits": 32, **client},
                "example": example,
                "budget": {"client": budget, "example": budget},
            },
        }
    )


def planned(config: Config, dimension: int, number: int = 1) -> Plan:
    return make_plan(config, RUN, number, LAYOUT, np.zeros(dimension, np.float32))


def vector(dimension: int, norm: float = 10.0, seed: int = 0) -> NDArray[np.float32]:
    drawn = np.random.default_rng(seed).normal(size=dimension)
    return (drawn * norm / np.linalg.norm(drawn)).astype(np.float32)


def released(delta: NDArray[np.float32], plan: Plan, config: Config, ledger: Ledger) -> bytes:
    source = TestSource(1, f"round {plan.round}")
    return release(delta, LAYOUT, plan, "ann", ledger, config.privacy, source)


def integers(payload: bytes, plan: Plan, dimension: int) -> NDArray[np.int64]:
    return unwrap(unpack(payload, dimension, plan.bits), plan.bits)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger.open(tmp_path / "ledger.sqlite", owner=RUN)


# --- refused before anything is spent ----------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("noise_at", ["device", "server"])
def test_a_value_that_is_not_finite_is_refused_and_costs_nothing(ledger, bad, noise_at):
    config, delta = settings(noise_at=noise_at), vector(9)
    delta[4] = bad
    with pytest.raises(GateRefused, match=r"round 1: .*1 values that are not finite"):
        released(delta, planned(config, 9), config, ledger)
    assert ledger.clients() == []


@pytest.mark.parametrize(
    "delta",
    [vector(9).astype(np.float64), vector(9).reshape(3, 3), vector(9).astype(np.float16)],
    ids=["float64", "matrix", "float16"],
)
def test_another_type_or_shape_is_refused_and_costs_nothing(ledger, delta):
    config = settings()
    with pytest.raises(GateRefused, match="expected a flat float32 delta"):
        released(delta, planned(config, 9), config, ledger)
    assert ledger.clients() == []


def test_another_layout_is_refused_and_costs_nothing(ledger):
    config = settings()
    plan = dataclasses.replace(planned(config, 9), layout="1" * 64)
    with pytest.raises(GateRefused, match=r"layout 000000000000, the plan asks for 111111111111"):
        released(vector(9), plan, config, ledger)
    assert ledger.clients() == []


def test_over_budget_nothing_leaves_and_nothing_is_added(ledger):
    config = settings(budget=6.0)
    released(vector(9), planned(config, 9, 1), config, ledger)
    with pytest.raises(
        BudgetExceeded,
        match=r"the run's own cap is 6 \(privacy.budget.client in its .* nothing was spent",
    ):
        released(vector(9), planned(config, 9, 2), config, ledger)
    assert ledger.participations("ann") == 1


# --- what is released --------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [0.0, 0.3, 50.0])
def test_without_noise_the_payload_is_the_clipped_vector_rounded_to_a_neighbour(ledger, norm):
    config, delta = settings(noise_at="server", clip=0.7), vector(300, norm or 1.0) * (norm > 0)
    plan = planned(config, 300)
    found = integers(released(delta, plan, config, ledger), plan, 300)
    wanted = clip(delta, 0.7).vector
    assert np.abs(decode(found, plan.step) - wanted).max() < plan.step
    assert np.linalg.norm(found) <= rounded_sensitivity(0.7, plan.step, 300)[0]


def test_a_coordinate_that_a_rotation_left_above_its_bound_is_cut(ledger):
    """Else the sum of such contributions could wrap."""
    config, size = settings(noise_at="server"), 1 << 12
    plan = dataclasses.replace(planned(config, size), rotated=True)
    spike = np.zeros(size)
    spike[3] = plan.clip
    most = flat_bound(plan.clip, size)
    assert most < 0.5 * plan.clip
    payload = released(unrotate(spike, plan.start).astype(np.float32), plan, config, ledger)
    found = integers(payload, plan, size)
    assert 0.9 * most < np.abs(found).max() * plan.step <= most + plan.step


def fits(values: NDArray[np.float64], variance: float) -> bool:
    """Whether the values' variance is the declared one; 5 deviations of that estimate."""
    return bool(abs(np.var(values) / variance - 1) < 5 * (2 / values.size) ** 0.5)


def test_noise_of_the_device_has_the_declared_variance_on_the_grid(ledger):
    config, size = settings(noise_at="device", noise_multiplier=1.3), 20_000
    plan, delta = planned(config, size), vector(size)
    found = integers(released(delta, plan, config, ledger), plan, size)
    noise = found - clip(delta, 1.0).vector / plan.step
    assert fits(noise, plan.variance)
    assert not fits(noise, plan.variance * 2 / 3)
    assert not fits(noise, plan.variance * 3 / 2)
    needed = 1.3 * rounded_sensitivity(1.0, plan.step, size)[0]
    assert plan.variance**0.5 == pytest.approx(needed)


def test_the_payload_is_as_long_whatever_it_holds(ledger):
    config = settings(bits=20)
    plan = planned(config, 33)
    sizes = {
        len(released(delta, dataclasses.replace(plan, round=number), config, ledger))
        for number, delta in enumerate((vector(33), np.zeros(33, np.float32)), start=1)
    }
    assert sizes == {-(-33 * 20 // 8)}


# --- counted first -----------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, str(Path({tests!r}).parent))
import importlib.util
spec = importlib.util.spec_from_file_location("gate", {tests!r})
gate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gate)

class Dies(gate.Ledger):
    def commit(self, *given):
        super().commit(*given)
        os.kill(os.getpid(), signal.SIGKILL)

config = gate.settings()
ledger = Dies.open({path!r}, owner=gate.RUN)
print(gate.released(gate.vector(9), gate.planned(config, 9), config, ledger))
"""


def test_killed_between_row_and_bytes_it_is_counted_and_the_same_bytes_cost_nothing_more(tmp_path):
    path, config = tmp_path / "ledger.sqlite", settings()
    plan = planned(config, 9)
    code = KILLED.format(tests=str(Path(__file__).resolve()), path=str(path))
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=600)
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    assert child.stdout == b""
    with Ledger.open(path, owner=RUN) as after, Ledger.open(tmp_path / "b", owner=RUN) as other:
        assert after.participations("ann") == 1
        again = after.resend("ann", RUN, 1, plan.digest)
        assert again == released(vector(9), plan, config, other)
        assert after.participations("ann") == 1


# --- what it costs -----------------------------------------------------------------------------

DIMENSION = 100
EXAMPLE = {"enabled": True, "noise_multiplier": 0.5, "clip": 0.5}


def found_charges(noise_at: str, example: bool, steps: int) -> tuple[tuple[Charge, ...], Plan]:
    client = {"enabled": False} if noise_at == "off" else {"noise_at": noise_at}
    config = settings(
        **client,
        noise_multiplier=2.0,
        example=EXAMPLE if example else {"enabled": False},
        training={"steps": steps, "learning_rate": 0.4},
    )
    plan = planned(config, DIMENSION)
    return charges(plan, DIMENSION, config.privacy), plan


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("example", [True, False], ids=["example", "no example"])
@pytest.mark.parametrize("noise_at", ["device", "server", "off"])
def test_a_release_costs_exactly_these_lines(noise_at, example, steps):
    found, plan = found_charges(noise_at, example, steps)
    said = {(c.unit, c.against): (c.noise_multiplier, c.sampling_rate, c.steps) for c in found}
    assert len(said) == len(found)
    wanted: dict[tuple[str, str], Any] = {}
    if noise_at != "off":
        wanted["client", "analyst"] = (2.0, 1.0, 1)
    if noise_at == "device":
        wanted["client", "server"] = (2.0, 1.0, 1)
    if example:
        opacus = (0.5, 8 / 32, steps)
        # lr C / B = 0.4 * 0.5 / 8 of a clip of 1, a little more after rounding
        ratio = (1 / plan.step + 10) / (0.025 / plan.step + 10)
        both = (2.0 * ratio, 8 / 32, 1)
        assert 79 < both[0] < 80
        everywhere = noise_at == "device"
        wanted["example", "analyst"] = both if noise_at != "off" and steps == 1 else opacus
        wanted["example", "server"] = both if everywhere and steps == 1 else opacus
    if not wanted:
        wanted["client", "analyst"] = (0.0, 1.0, 1)
    assert said == {key: pytest.approx(value) for key, value in wanted.items()}


@pytest.mark.parametrize(("clips", "counted"), [(1.5, 1.5), (2.0, 2.0), (10.0, 2.0)])
def test_one_record_reaches_from_one_side_of_the_clip_to_the_other(clips, counted):
    """Both deltas are clipped, and nothing but the clip keeps them on one side of it."""
    example = {"enabled": True, "noise_multiplier": 0.1, "clip": clips * 8 / 0.4}
    config = settings(
        noise_at="device",
        noise_multiplier=2.0,
        example=example,
        training={"steps": 1, "learning_rate": 0.4},
    )
    plan = planned(config, DIMENSION)
    lines = {(c.unit, c.against): c for c in charges(plan, DIMENSION, config.privacy)}
    moved = rounded_sensitivity(counted * plan.clip, plan.step, DIMENSION)[0]
    wanted = plan.variance**0.5 / moved
    assert lines["example", "analyst"].noise_multiplier == pytest.approx(wanted)


def test_integer_noise_is_charged_for_what_it_lacks_to_gaussian_noise():
    found, _ = found_charges("device", True, 1)
    assert all(charge.ratio > 0 and charge.distance > 0 for charge in found)
    inside, _ = found_charges("off", True, 1)
    assert all(charge.ratio == charge.distance == 0 for charge in inside)


def test_only_a_run_that_claims_nothing_has_no_limit():
    limits = {"client": 3.0, "example": 3.0, "client/unmasked server": np.inf}
    assert budgets(settings(budget=3.0).privacy) == limits
    example_only = settings(enabled=False, example=EXAMPLE, budget=3.0).privacy
    assert budgets(example_only) == limits
    assert budgets(settings(enabled=False).privacy) == {"client": np.inf, "example": np.inf}


# --- traps -------------------------------------------------------------------------------------


def test_clipping_tensor_by_tensor_would_pass_the_bound_and_is_not_what_is_done(ledger):
    config, size, tensors = settings(noise_at="server"), 480, 48
    plan, delta = planned(config, size), vector(size, 100.0)
    limit = rounded_sensitivity(1.0, plan.step, size)[0]

    def faulty(given: NDArray[np.float32]) -> NDArray[np.float64]:
        return np.concatenate([clip(part, plan.clip).vector for part in np.split(given, tensors)])

    assert np.linalg.norm(faulty(delta) / plan.step) > 6.9 * limit
    found = integers(released(delta, plan, config, ledger), plan, size)
    assert np.linalg.norm(found) <= limit


def test_a_client_with_a_hundred_times_the_records_moves_the_sum_by_at_most_the_clip(ledger):
    config, size = settings(noise_at="server"), 50
    plan = planned(config, size)
    others = [vector(size, 0.5, seed) for seed in range(3)]
    heavy, records = vector(size, 80.0, 9), [1, 1, 1, 100]

    def faulty(deltas: list[NDArray[np.float32]]) -> NDArray[np.float64]:
        weights = np.array(records[: len(deltas)], float)
        return np.average([clip(d, 1.0).vector for d in deltas], axis=0, weights=weights) * 4

    moved = faulty([*others, heavy]) - faulty(others) * 3 / 4
    assert np.linalg.norm(moved) > 3 * plan.clip
    found = decode(integers(released(heavy, plan, config, ledger), plan, size), plan.step)
    assert np.linalg.norm(found) <= plan.clip + plan.step * size**0.5


def test_the_epsilon_of_a_run_is_the_composition_of_its_rounds_not_that_of_one(tmp_path):
    config, rounds = settings(noise_at="device", noise_multiplier=4.0), 20
    with Ledger.open(tmp_path / "ledger", owner=RUN) as ledger:
        for number in range(1, rounds + 1):
            released(vector(9), planned(config, 9, number), config, ledger)
    with Ledger.open(tmp_path / "ledger", owner=RUN) as again:
        spent = [c for c in again.charges("ann") if (c.unit, c.against) == ("client", "server")]

    def faulty(history: list[Charge]) -> float:
        return epsilon(history[-1:], 1e-5)

    accountant = pld.PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    accountant.compose(dp_event.SelfComposedDpEvent(dp_event.GaussianDpEvent(4.0), rounds))
    independent = accountant.get_epsilon(1e-5)
    assert epsilon(spent, 1e-5) == pytest.approx(independent, rel=0.01)
    assert faulty(spent) < independent / 3


def test_a_server_that_picks_one_client_every_round_is_refused_by_that_clients_own_ledger(ledger):
    config = settings(noise_at="device", noise_multiplier=2.0, budget=5.0)
    for number in range(1, 11):
        try:
            released(vector(9), planned(config, 9, number), config, ledger)
        except BudgetExceeded:
            break
    assert ledger.participations("ann") < 10

    def faulty(history: list[Charge]) -> float:
        """Amplified by the rate that the server says it samples with."""
        rate = config.rounds.cohort / config.data.clients
        return epsilon([dataclasses.replace(c, sampling_rate=rate) for c in history], 1e-5)

    line = [c for c in charges(planned(config, 9), 9, config.privacy) if c.against == "server"]
    assert epsilon(line * 10, 1e-5) > 5.0 > faulty(line * 10)
