"""A/B in the field: what leaves a device, what it costs, what the server may conclude from it."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from privet.client import ab_outcome as device
from privet.client.privacy.ledger import Ledger
from privet.commands import run as command
from privet.common.ab_test import AbTestSettings, SimulatedPeople, read, run_settings
from privet.common.errors import DataError, PrivacyError, RoundVoid, RunExists
from privet.common.privacy.accounting import epsilon
from privet.common.privacy.encoding import unpack
from privet.common.privacy.noise import TestSource
from privet.common.settings.sections import BudgetSettings
from privet.experiments.ab_test import coverage_check, simulated_ab_test
from privet.server.ab_estimates import _mean, estimated, look_plan, spent_alpha, sums_of

CONFIG = Path(simulated_ab_test.__file__).parent / "ab.toml"
ANN = device.ArmOutcome("ann", 0, 1.0)


def experiment(**changes) -> AbTestSettings:
    return AbTestSettings.model_validate({"clients": 24, "privacy": {"epsilon": 20.0}, **changes})


def three_arms(outcome: str) -> AbTestSettings:
    made = SimulatedPeople(means=(0.5, 0.5, 0.6))
    return experiment(arms=("a", "b", "c"), outcome=outcome, simulated=made)


@pytest.fixture
def ledger(tmp_path):
    with Ledger.open(tmp_path / "ledger", owner="test") as opened:
        yield opened


# --- what leaves -------------------------------------------------------------------------------


@given(st.sampled_from(["binary", "bounded"]), st.integers(0, 2), st.floats(-3, 4))
def test_a_contribution_fills_its_own_arm_and_never_passes_its_public_norm(kind, arm, outcome):
    settings = three_arms(kind)
    outcome = float(outcome > 0.5) if kind == "binary" else outcome
    rows = device.outcome_vector(settings, arm, outcome).reshape(3, settings.entries)
    assert rows[arm, 0] == 1
    assert not np.delete(rows, arm, axis=0).any()
    assert np.linalg.norm(rows.astype(np.float64)) <= settings.norm * (1 + 1e-12)
    assert np.abs(rows).max() <= 1


def test_no_outcome_is_zeros_and_a_wrong_one_is_refused():
    assert not device.outcome_vector(experiment(), 0, None).any()
    with pytest.raises(DataError, match="must be 0 or 1"):
        device.outcome_vector(experiment(), 0, 0.5)
    with pytest.raises(DataError, match="finite"):
        device.outcome_vector(experiment(outcome="bounded"), 0, math.nan)


def test_what_leaves_is_what_the_gate_returned_and_the_vector_goes_nowhere_else(
    ledger, monkeypatch
):
    settings, seen = experiment(), []

    def gate(vector, *_):
        seen.append(vector)
        return b"from the gate"

    monkeypatch.setattr(device, "release", gate)
    plan = look_plan(settings, "run", 1)
    source = TestSource(1, "x")
    left = device.take_part(settings, plan, device.ArmOutcome("ann", 1, 1.0), ledger, source)
    assert left == b"from the gate"
    assert [list(one) for one in seen] == [[0, 0, 1, 1]]


@pytest.mark.parametrize("kind", ["binary", "bounded"])
def test_the_vectorised_sum_is_the_gates_sum_bit_for_bit(ledger, kind):
    """The Monte Carlo draws everybody's rounding and noise at once, with the same functions."""
    settings = three_arms(kind)
    plan = look_plan(settings, "run", 1)
    rng = np.random.default_rng(3)
    arms = rng.integers(3, size=settings.clients)
    found = simulated_ab_test.outcomes(settings, arms, rng)
    found[::5] = np.nan
    length = 3 * settings.entries
    total = np.zeros(length, np.uint32)
    for number, (arm, outcome) in enumerate(zip(arms, found, strict=True)):
        payload = device.take_part(
            settings,
            plan,
            device.ArmOutcome(
                f"device-{number}", int(arm), None if np.isnan(outcome) else float(outcome)
            ),
            ledger,
            TestSource(number, "release"),
        )
        assert payload is not None
        total += unpack(payload, length, plan.bits)

    sources = [TestSource(number, "release") for number in range(settings.clients)]

    class Joined:
        """Everybody's words behind one another."""

        def words(self, count):
            return np.concatenate([one.words(count // len(sources)) for one in sources])

    vectors = coverage_check.contributions(settings, arms, found)
    assert coverage_check.summed(vectors, plan, Joined()).tolist() == total.tolist()


# --- what it costs -----------------------------------------------------------------------------


@pytest.mark.parametrize("looks", [1, 3])
def test_every_look_is_charged_all_planned_ones_fit_the_epsilon_and_one_more_does_not(
    ledger, looks
):
    settings = experiment(looks=looks, privacy={"epsilon": 1.0})
    spent = []
    for look in range(1, looks + 1):
        plan = look_plan(settings, "run", look)
        source = TestSource(look, "x")
        assert device.take_part(settings, plan, ANN, ledger, source) is not None
        server = [c for c in ledger.charges("ann") if c.against == "server"]
        spent.append(epsilon(server, settings.privacy.delta))
    assert spent == sorted(set(spent))
    assert 0.99 < spent[-1] <= 1.0
    again = device.take_part(
        settings, plan, dataclasses.replace(ANN, outcome=0.0), ledger, TestSource(9, "x")
    )
    assert again is not None
    assert ledger.participations("ann") == looks
    more = look_plan(settings, "another run", 1)
    assert device.take_part(settings, more, ANN, ledger, TestSource(1, "y")) is None
    assert "budget" in ledger.declined("ann")[-1].reason


def test_a_device_declines_a_plan_with_less_noise_a_longer_clip_or_more_looks(ledger):
    settings = experiment(looks=2)
    plan = look_plan(settings, "run", 1)
    for change in (
        {"variance": plan.variance / 2},
        {"clip": 2 * plan.clip},
        {"round": 10**6},
        {"noise_at": "server"},
        {"layout": "0" * 64},
        {"gains_bound": 1.0, "gains_step": plan.step, "gains_variance": plan.variance},
    ):
        laxer = dataclasses.replace(plan, **change)
        assert device.take_part(settings, laxer, ANN, ledger, TestSource(1, "x")) is None
        assert ledger.participations("ann") == 0


def test_a_device_makes_no_more_releases_than_looks_whatever_their_numbers(ledger):
    """A void look uses its number up; the epsilon is that of the looks the owner agreed to."""
    settings = experiment(looks=2)
    own = run_settings(settings)
    rich = own.privacy.model_copy(update={"budget": BudgetSettings(client=1e6)})
    own = own.model_copy(update={"privacy": rich})

    def look(number: int) -> bytes:
        plan, source = look_plan(settings, "run", number), TestSource(number, "x")
        return device.answered(settings, own, plan, ANN, ledger, source)

    assert look(2)
    assert look(5)
    with pytest.raises(PrivacyError, match="has made the 2 releases"):
        look(6)
    assert ledger.participations("ann") == 2


# --- what the server concludes -----------------------------------------------------------------


def simulated(
    settings: AbTestSettings, repetitions: int, seed: int = 1, alpha: float | None = None
):
    """Looks of many experiments; arms by a generator, which is faster than the keyed hash."""
    rng = np.random.default_rng(seed)
    plans = [look_plan(settings, "run", look + 1) for look in range(settings.looks)]
    since = 1 + np.arange(settings.clients) * settings.looks // settings.clients
    for number in range(repetitions):
        arms = rng.integers(len(settings.arms), size=settings.clients)
        vectors = coverage_check.contributions(
            settings, arms, simulated_ab_test.outcomes(settings, arms, rng)
        )
        looks = []
        for plan in plans:
            now = np.where((since <= plan.round)[:, None], vectors, 0.0)
            source = TestSource(number, f"{seed} {plan.round}")
            sums = sums_of(coverage_check.summed(now, plan, source), plan)
            looks.append(estimated(sums, plan, len(now), settings, alpha))
        yield looks


def test_a_true_difference_is_found_a_null_is_not_and_the_interval_holds_the_truth():
    settings = read(CONFIG)
    true = settings.simulated.means[1] - settings.simulated.means[0]
    looks = [looks[0]["differences"][0] for looks in simulated(settings, 60)]
    assert sum(one["found"] for one in looks) >= 54
    assert sum(one["interval"][0] <= true <= one["interval"][1] for one in looks) >= 54
    null = settings.model_copy(update={"simulated": SimulatedPeople(means=(0.5, 0.5))})
    assert sum(looks[0]["differences"][0]["found"] for looks in simulated(null, 60)) <= 6


@pytest.mark.parametrize("kind", ["binary", "bounded"])
def test_standard_errors_are_those_of_sampling_and_noise_together(kind):
    """At this epsilon noise is three quarters of the variance, so neither part can be left out."""
    made = SimulatedPeople(means=(0.5, 0.8), spread=0.4)
    privacy = {"epsilon": 0.6}
    settings = AbTestSettings(clients=400, outcome=kind, simulated=made, privacy=privacy)
    found = [looks[0]["differences"][0] for looks in simulated(settings, 300)]
    values = np.array([one["difference"] for one in found if one["difference"] is not None])
    errors = np.array([one["error"] for one in found if one["difference"] is not None])
    assert len(values) > 290
    assert np.median(errors) == pytest.approx(values.std(), rel=0.12)
    assert values.mean() == pytest.approx(0.3, abs=4 * values.std() / math.sqrt(len(values)))


def test_an_arm_whose_devices_all_agree_is_not_called_certain():
    """Two more devices, one of each outcome, are counted (Agresti and Caffo 2000)."""
    mean, error = _mean(np.array([10.0, 10.0]), 0.0)
    assert mean == 1.0
    assert error == pytest.approx(((1 - (10 / 12) ** 2) / 9) ** 0.5)


@pytest.mark.parametrize("spending", ["equal", "late"])
def test_peeking_passes_the_error_rate_and_the_corrected_looks_do_not(spending):
    settings = AbTestSettings(
        clients=300, looks=5, spending=spending, simulated=SimulatedPeople(means=(0.5, 0.5)),
        privacy={"epsilon": 8.0},
    )  # fmt: skip

    def called(alpha):
        return sum(
            any(look["differences"][0]["found"] for look in looks)
            for looks in simulated(settings, 300, alpha=alpha)
        )

    assert called(settings.alpha) > 300 * 0.08
    assert called(None) <= 300 * 0.05 + 8


@pytest.mark.parametrize("spending", ["equal", "late"])
@pytest.mark.parametrize("looks", [1, 2, 7])
def test_the_looks_spend_alpha_and_no_more(spending, looks):
    settings = experiment(looks=looks, spending=spending)
    parts = [spent_alpha(settings, look) for look in range(1, looks + 1)]
    assert sum(parts) == pytest.approx(settings.alpha)
    assert min(parts) > 0


def test_more_arms_share_a_looks_alpha_and_are_compared_with_the_first():
    settings = three_arms("binary")
    plan = look_plan(settings, "run", 1)
    found: Any = estimated(np.array([500.0, 0, 500, 0, 500, 250]), plan, 24, settings)
    assert found["level"] == pytest.approx(1 - 0.05 / 2)
    assert [one["found"] for one in found["differences"]] == [False, True]
    assert [round(arm["mean"], 3) for arm in found["arms"]] == [0.5, 0.5, 0.75]


@pytest.mark.parametrize("count", [-3.0, 0.0, 1.5, 20.0])
def test_where_the_noise_hides_how_many_devices_there_are_nothing_is_said(count):
    settings = experiment(privacy={"epsilon": 1.0})
    plan = look_plan(settings, "run", 1)
    found = estimated(np.array([count, 1.0, 500.0, 1.0]), plan, 24, settings)
    assert found["arms"][0]["mean"] is None
    assert found["differences"][0]["difference"] is None
    assert not found["differences"][0]["found"]


# --- from end to end ---------------------------------------------------------------------------


@pytest.mark.parametrize("masks", [False, True])
def test_a_small_cohort_from_outcomes_to_the_report(tmp_path, masks):
    made = SimulatedPeople(means=(0.1, 0.9), masks=masks)
    settings = experiment(clients=60, looks=2, simulated=made)
    facts = simulated_ab_test.run(settings, tmp_path / "run")
    assert [look["answered"] for look in facts["looks"]] == [60, 60]
    last = facts["looks"][-1]
    assert sum(arm["devices"] for arm in last["arms"]) == pytest.approx(60, abs=10)
    assert 0.3 < last["differences"][0]["difference"] < 1.2
    lines = {line["against"]: line for line in facts["privacy"]}
    assert set(lines) == {"analyst", "server", "unmasked server"}
    assert lines["unmasked server"]["epsilon"] is None or lines["unmasked server"]["epsilon"] > 20
    for line in (lines["analyst"], lines["server"]):
        assert (line["unit"], line["adjacency"], line["delta"]) == ("client", "add_remove", 1e-5)
        assert line["noise_at"] == "distributed"
        assert line["participations_max"] == 2
        assert 19 < line["epsilon"] <= 20
        assert line["cross_check"]["agrees"]
    kept = json.loads((tmp_path / "run" / "ab.json").read_text())
    assert kept == json.loads(json.dumps(facts))
    assert (tmp_path / "run" / "ab.svg").read_text().startswith("<svg")
    with pytest.raises(RunExists):
        simulated_ab_test.run(settings, tmp_path / "run")


def test_an_experiment_that_stops_early_spends_less(tmp_path):
    made = SimulatedPeople(means=(0.0, 1.0))
    settings = experiment(clients=90, looks=3, stop=True, simulated=made)
    facts = simulated_ab_test.run(settings, tmp_path / "run")
    taken = len(facts["looks"])
    assert taken < 3
    assert facts["privacy"][0]["participations_max"] == taken
    assert facts["privacy"][0]["epsilon"] < 18


def test_too_few_devices_open_nothing(tmp_path):
    with pytest.raises(RoundVoid):
        simulated_ab_test.run(experiment(simulated=SimulatedPeople(dropout=0.95)), tmp_path / "run")
    assert not (tmp_path / "run" / "looks.jsonl").exists()


def test_the_check_counts_and_reads_the_epsilon_off_the_ledgers(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.toml"
    path.write_text(
        'name = "mine"\nclients = 60\nlooks = 2\n[privacy]\nepsilon = 20.0\n'
        "[simulated]\nmeans = [0.1, 0.9]\n"
    )
    assert command(["ab", str(path), "--check", "5", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["repetitions"] == 5
    assert facts["found"] == 5
    assert facts["null_called"] <= facts["null_called_uncorrected"] <= 5
    assert 19 < facts["privacy"][0]["epsilon"] <= 20
    assert command(["ab", str(path)]) == 2
    assert "runs/mine holds a run already" in capsys.readouterr().err
    assert command(["ab", str(path), "--out", "other"]) == 0
    said = capsys.readouterr().out
    assert "client-level, add_remove" in said
    assert "against the server" in said


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("arm = 3", "did you mean arms?"),
        ('arms = ["a"]', "arms"),
        ('arms = ["a", "a"]', "expected names that differ"),
        ("low = 2.0", "low = 2.0 must be below high"),
        ("high = 5.0", "binary"),
        ("[simulated]\nmeans = [0.5]", "one for each of the 2 arms"),
        ("[simulated]\nmeans = [0.5, 1.5]", "expected numbers from 0.0 to 1.0"),
        ("[privacy]\nepsilon = -1", "privacy.epsilon = -1"),
        ("[privacy]\nepsilon = 1e-9", "privacy.epsilon = 1e-09"),
        ('outcome = "bounded"\nhigh = 1e300', "high = 1e+300"),
        ("clients = 5", "  clients = 5 is smaller than secure_aggregation.min_cohort"),
        ("clients = 5", 'set privacy.noise_at = "device"'),
        (
            '[privacy]\nnoise_at = "device"\n[simulated]\nmasks = true',
            "simulated.masks = true: expected",
        ),
        ("not toml", "not valid TOML"),
    ],
)
def test_a_wrong_file_is_answered_with_a_sentence(tmp_path, capsys, text, sentence):
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    assert command(["ab", str(path)]) == 2
    assert sentence in capsys.readouterr().err


def test_the_shipped_experiment_is_the_issues_floor():
    settings = read(CONFIG)
    assert (settings.clients, settings.privacy.epsilon, settings.privacy.delta) == (2000, 1.0, 1e-5)
    assert settings.simulated.means == (0.5, 0.6)
    assert run_settings(settings).privacy.client.noise_at == "distributed"


def test_an_experiment_that_was_stopped_is_not_called_a_run_that_has_ended(tmp_path, capsys):
    (tmp_path / "ab.toml").write_text("clients = 20")
    folder = tmp_path / "stopped"
    folder.mkdir()
    (folder / "run-id").write_text("ab-1")
    assert command(["ab", str(tmp_path / "ab.toml"), "--out", str(folder)]) == 2
    assert "did not end and cannot go on" in capsys.readouterr().err
