"""The facts of a report are what the ledgers hold, said with unit, adversary and delta."""

import json
import math
import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from privet.client.privacy.gate import charges as real_charges
from privet.client.privacy.ledger import Declined
from privet.common.errors import LedgerCorrupt, PrivacyError, StateError
from privet.common.privacy.accounting import Charge, epsilon
from privet.common.privacy.plan_maker import make_plan
from privet.experiments.reports import privacy_facts as privacy
from privet.experiments.reports.claims import headline, main_line
from privet.experiments.reports.facts import PrivacyFacts
from privet.experiments.reports.privacy_facts import History, facts_of, privacy_facts

from ...fake_run import DISTANCE, fake_charges, fake_config, fake_run


@pytest.fixture(autouse=True)
def quick_second_opinion(monkeypatch):
    """The PRV accountant takes a second a line; its own tests are elsewhere."""
    monkeypatch.setattr(
        privacy, "cross_check", lambda charges, delta: ("same", epsilon(charges, delta))
    )


def history(client: str, rounds: Iterable[int], cost: Sequence[Charge]) -> History:
    return History(client, tuple((number, tuple(cost)) for number in rounds))


def line(facts: PrivacyFacts, key: str) -> Any:
    (found,) = (found for found in facts["lines"] if found["key"] == key)
    return found


def test_the_facts_of_a_run_come_from_its_ledgers(tmp_path):
    facts = privacy_facts(fake_run(tmp_path / "run"))
    cost = fake_charges(fake_config())
    client = [charge for charge in cost if charge.unit == "client"]
    assert line(facts, "client/analyst")["epsilon"] == epsilon(client * 2, 1e-5)
    assert line(facts, "client/analyst")["participations_max"] == 2
    assert [row["released"] for row in facts["rounds"]] == [20, 20, 20, 20]
    assert sum(row["participations"] for row in facts["clients"]) == 80


def test_the_total_of_a_client_grows_with_its_releases_and_is_not_the_epsilon_of_one_round():
    cost = fake_charges(fake_config(privacy={"example": {"enabled": False}}))
    facts = facts_of(fake_config(), [history("a", range(1, 11), cost)])
    curve = [row["epsilon"]["client/analyst"] for row in facts["rounds"]]
    assert curve == sorted(curve)
    assert len(set(curve)) == 10
    per_round = epsilon([cost[0]], 1e-5)  # the faulty report: one round's epsilon as the total
    assert line(facts, "client/analyst")["epsilon"] == curve[-1] > 2 * per_round


def test_the_worst_client_is_shown_and_not_the_mean_one():
    cost = fake_charges(fake_config())
    quiet = [history(f"quiet-{place}", [1], cost) for place in range(50)]
    facts = facts_of(fake_config(), [*quiet, history("busy", [1, 2, 3], cost)])
    shown = line(facts, "client/analyst")
    assert shown["client"] == "busy"
    assert shown["epsilon"] == max(row["epsilon"]["client/analyst"] for row in facts["clients"])
    mean = sum(row["epsilon"]["client/analyst"] for row in facts["clients"]) / 51
    assert shown["epsilon"] > 1.5 * mean  # the faulty report


def test_noise_added_by_the_server_is_claimed_against_nobody_who_sees_contributions():
    facts = facts_of(fake_config(), [history("a", [1], fake_charges(fake_config()))])
    shown = line(facts, "client/analyst")
    assert shown["holds_against"] == ["analyst", "colluding clients"]
    for who in ("server, honest but curious", "server, malicious", "network", "thief"):
        assert who in shown["does_not_hold_against"]
    assert "client/server" not in [found["key"] for found in facts["lines"]]
    assert any("No client-level claim is made against the server" in x for x in facts["no_claim"])


def test_noise_added_by_the_device_holds_against_a_malicious_server():
    config = fake_config(privacy={"client": {"noise_at": "device"}})
    facts = facts_of(config, [history("a", [1], fake_charges(config))])
    shown = line(facts, "client/server")
    assert "server, malicious" in shown["holds_against"]
    assert shown["does_not_hold_against"] == ["thief"]
    assert main_line(facts) == shown
    assert facts["noise_at"] == "device"


def test_a_release_not_charged_against_the_server_leaves_no_claim_against_it():
    config = fake_config(privacy={"client": {"noise_at": "device"}})
    full, partial = fake_charges(config), fake_charges(fake_config())
    mixed = History("a", ((1, full), (2, partial)))
    facts = facts_of(config, [mixed])
    assert "client/server" not in [found["key"] for found in facts["lines"]]
    assert facts["noise_at"] == "server"


def test_each_line_says_which_noise_it_counts():
    facts = facts_of(fake_config(), [history("a", [1], fake_charges(fake_config()))])
    assert "Skellam noise that the server adds" in line(facts, "client/analyst")["noise_counted"]
    assert "one record can move" in line(facts, "example/analyst")["noise_counted"]
    inside = line(facts, "example/server")
    assert "training step" in inside["noise_counted"]
    assert inside["noise_at"] == "device"
    assert any("Mironov 2012" in sentence for sentence in inside["assumptions"])


@pytest.mark.parametrize("noise_at", ["server", "device"])
def test_the_charges_of_the_real_gate_are_told_apart(noise_at):
    import numpy as np

    config = fake_config(
        training={"learning_rate": 0.5}, privacy={"client": {"noise_at": noise_at}}
    )
    plan = make_plan(config, "run", 1, "0" * 64, np.zeros(768, np.float32))
    facts = facts_of(config, [history("a", [1], real_charges(plan, 768, config.privacy))])
    assert facts["noise_at"] == noise_at
    assert "Skellam" in line(facts, "example/analyst")["noise_counted"]
    expected = "training step" if noise_at == "server" else "each device adds"
    assert expected in line(facts, "example/server")["noise_counted"]


@pytest.mark.parametrize("unit", ["client", "example"])
def test_a_unit_that_is_off_gets_a_sentence_and_no_line(unit):
    config = fake_config(privacy={unit: {"enabled": False}})
    facts = facts_of(config, [history("a", [1], fake_charges(config))])
    assert unit not in {found["unit"] for found in facts["lines"]}
    assert any(f"No {unit}-level claim is made" in sentence for sentence in facts["no_claim"])
    assert unit not in facts["promised"]["budgets"]


@pytest.mark.parametrize("count", [1, 3])
def test_the_promises_name_the_personas_a_device_picks_from(count):
    clusters = {"count": count, "extra": 2, "warmup": 1, "merge_every": 3}
    off = {"example": {"enabled": False}}
    config = fake_config(clusters=clusters, privacy=off, rounds={"count": 12})
    facts = facts_of(config, [history("a", [1], fake_charges(config))])
    said = " ".join(facts["promised"]["sentences"])
    assert ("one of up to 5 group adapters" in said) == (count == 3)


def test_a_run_without_any_noise_claims_nothing():
    config = fake_config(privacy={"client": {"enabled": False}, "example": {"enabled": False}})
    facts = facts_of(config, [history("a", [1], fake_charges(config))])
    assert facts["lines"] == []
    assert headline(facts) == "No privacy claim is made for this run."
    assert facts["mechanisms"][0]["epsilon_once"] is None
    json.dumps(facts, allow_nan=False)


def test_zero_noise_inside_training_is_no_claim():
    config = fake_config(privacy={"example": {"noise_multiplier": 0.0}})
    facts = facts_of(config, [history("a", [1], fake_charges(config))])
    assert "example/server" not in [found["key"] for found in facts["lines"]]
    assert any("against the server: some release" in sentence for sentence in facts["no_claim"])


def test_a_test_seed_is_said_first_and_nothing_holds():
    config = fake_config(insecure_test_seed=1)
    facts = facts_of(config, [history("a", [1], fake_charges(config))])
    assert facts["private"] is False
    assert facts["problems"][0].startswith("NOT PRIVATE")
    assert all(found["holds_against"] == [] for found in facts["lines"])
    assert headline(facts).startswith("Not private")


def test_two_accountants_that_disagree_are_said_loudly(monkeypatch):
    monkeypatch.setattr(
        privacy, "cross_check", lambda charges, delta: ("other", 1.03 * epsilon(charges, delta))
    )
    facts = facts_of(fake_config(), [history("a", [1], fake_charges(fake_config()))])
    assert not any(found["cross_check"]["agrees"] for found in facts["lines"])
    assert "THE ACCOUNTANTS DISAGREE" in facts["problems"][0]


def test_a_line_without_a_second_accountant_says_so(monkeypatch):
    def none(*_):
        raise PrivacyError("no such accountant")

    monkeypatch.setattr(privacy, "cross_check", none)
    facts = facts_of(fake_config(), [history("a", [1], fake_charges(fake_config()))])
    assert facts["lines"][0]["cross_check"]["epsilon"] is None
    assert "NOT CROSS-CHECKED" in facts["problems"][0]


def test_declined_rounds_are_counted_by_reason_without_names(tmp_path):
    config = fake_config(privacy={"budget": {"client": 5.0}})
    facts = privacy_facts(fake_run(tmp_path / "run", config))
    ((reason, count),) = facts["declined"].items()
    assert count == 20
    assert "a device" in reason
    assert "hamlet" not in reason
    assert line(facts, "client/analyst")["epsilon"] <= 5.0
    assert sum(row["declined"] for row in facts["clients"]) == 20


def test_a_client_that_only_declined_is_listed_with_nothing_spent():
    facts = facts_of(
        fake_config(),
        [history("a", [1], fake_charges(fake_config()))],
        [Declined("b", "run", 1, "no")],
    )
    assert facts["clients"][1] == {
        "client": "b",
        "participations": 0,
        "declined": 1,
        "epsilon": dict.fromkeys((found["key"] for found in facts["lines"]), 0.0),
    }


def test_a_run_that_released_nothing_yet_spent_nothing(tmp_path):
    facts = privacy_facts(fake_run(tmp_path / "run", rounds=0))
    assert not any((facts["lines"], facts["rounds"], facts["clients"]))
    assert facts["no_claim"] == ["Nothing has been released yet, so nothing has been spent."]


@pytest.mark.parametrize("name", ["config.toml", "ledgers.sqlite", "run-id"])
def test_a_missing_file_is_named_with_the_command_that_makes_it(tmp_path, name):
    folder = fake_run(tmp_path / "run", rounds=1)
    (folder / name).unlink()
    with pytest.raises(StateError, match=rf"{name}.*privet simulate"):
        privacy_facts(folder)


def test_an_edited_ledger_gives_no_facts(tmp_path):
    folder = fake_run(tmp_path / "run", rounds=1)
    with sqlite3.connect(folder / "ledgers.sqlite") as db:
        db.execute("UPDATE release SET charges = replace(charges, '1.0', '2.0')")
    with pytest.raises(LedgerCorrupt):
        privacy_facts(folder)


def test_a_ledger_of_another_run_gives_no_facts(tmp_path):
    folder = fake_run(tmp_path / "run", rounds=1)
    Path(folder / "run-id").write_text("another\n")
    with pytest.raises(LedgerCorrupt, match="another"):
        privacy_facts(folder)


def test_the_figures_do_not_depend_on_what_the_configuration_planned():
    cost = fake_charges(fake_config())
    planned_more = fake_config(rounds={"count": 40, "cohort": 20})
    few, many = (
        facts_of(config, [history("a", [1], cost)]) for config in (fake_config(), planned_more)
    )
    assert few["lines"] == many["lines"]


def test_every_line_names_unit_adjacency_delta_and_makes_no_amplified_claim():
    facts = facts_of(fake_config(), [history("a", [1, 2], fake_charges(fake_config()))])
    for shown in facts["lines"]:
        assert shown["unit"] in ("client", "example")
        assert shown["adjacency"] == {"client": "add_remove", "example": "zero_out"}[shown["unit"]]
        assert shown["delta"] == 1e-5
        assert shown["amplified"] is None
        assert math.isfinite(shown["epsilon"])
    assert any("tuning" in sentence for sentence in facts["not_covered"])


def test_thousands_of_clients_take_seconds_because_equal_histories_are_one():
    import time

    cost = (Charge("client", "analyst", "add_remove", 1.3, 1.0, 1, DISTANCE),)
    config = fake_config(privacy={"example": {"enabled": False}})
    many = [history(f"rater-{place}", [1 + place % 7], cost) for place in range(6635)]
    began = time.process_time()  # not how busy the machine is
    facts = facts_of(config, many)
    assert time.process_time() - began < 30
    assert facts["histories"][0]["clients"] == 6635


def test_the_report_of_a_simulation_and_of_devices_says_what_is_known_of_times():
    from privet.common.settings.config import parse
    from privet.experiments.reports.claims import not_covered

    simulated = parse({})
    real = parse({"data": {"source": "devices", "task": "generation"}})
    (said,) = [one for one in not_covered(simulated) if "side channels" in one.lower()]
    assert "no times are observed" in said
    (said,) = [one for one in not_covered(real) if "side channels" in one.lower()]
    assert "same work whatever its records are" in said
