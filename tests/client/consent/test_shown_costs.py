"""offer_description.py, plan_maker.py: what an owner is shown is what the ledger then charges."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from privet.client.ab_outcome import ArmOutcome, answered
from privet.client.consent.offer_description import (
    ADVERSARY_WORDS,
    UNIT_WORDS,
    describe,
    release_cost,
)
from privet.client.consent.policy_settings import Policy
from privet.client.consent.run_offers import Offer
from privet.client.device import exchange_at
from privet.client.privacy.ledger import Ledger
from privet.client.simulated import SimulatedContext
from privet.common.ab_test import AbPrivacy, AbTestSettings, layout
from privet.common.privacy.accounting import Charge, epsilon
from privet.common.privacy.noise import TestSource
from privet.common.settings.config import Config, to_toml
from privet.experiments import engine
from privet.experiments.simulate import prepare
from privet.server.ab_estimates import device_settings, plan_of

from ...tiny import population, tiny_config


def shown(config: Config, dimension: int | None = None) -> dict[tuple[str, str], float]:
    """The figures of the consent text: unit and adversary -> epsilon after one release."""
    offer = Offer("run", "fl.example.org:9092", 0.0, to_toml(config))
    found: dict[tuple[str, str], float] = {}
    for label, text in describe(offer, Policy(), dimension=dimension):
        if label.startswith("epsilon"):
            who, figures = text.split(": about ", 1)
            of, names = who.split(", against ", 1)
            unit = next(name for name, words in UNIT_WORDS.items() if words == of)
            value = float(figures.split(" after 1 release")[0])
            against = [
                name for name, words in ADVERSARY_WORDS.items() if words in names.split(" and ")
            ]
            found |= {(unit, name): value for name in against}
            if "should they fail, about " in text:
                left = text.split("should they fail, about ")[1]
                found[unit, "unmasked server"] = float(left.split(" after")[0])
    return found


def charged(charges: Sequence[Charge], delta: float) -> dict[tuple[str, str], float]:
    """The same figures from a ledger's row."""
    lines = {(charge.unit, charge.against) for charge in charges}
    of = {line: [c for c in charges if (c.unit, c.against) == line] for line in lines}
    return {line: math.ceil(100 * epsilon(of[line], delta) - 1e-9) / 100 for line in lines}


def test_the_figures_of_the_consent_text_are_those_of_the_first_ledger_row_of_a_run(
    llama_folder: Path, tmp_path: Path
):
    people = population(tmp_path / "people", 15, 8)
    table = tiny_config(
        llama_folder,
        people,
        data={"clients": 12},
        rounds={"count": 1, "cohort": 12},
        privacy={"client": {"noise_at": "distributed", "noise_multiplier": 2.0}},
    )
    config = prepare(table, tmp_path / "run", resume=False)
    engine.run("local", tmp_path / "run", config)
    bench = SimulatedContext.open(tmp_path / "run")
    dimension = exchange_at(bench).released(1).dimension
    row = bench.ledger.rows(bench.ledger.clients()[0])[0]
    assert release_cost(config, dimension) == row.charges
    told, spent = shown(config, dimension), charged(row.charges, config.privacy.delta)
    assert told == {line: spent[line] for line in told}
    assert ("client", "server") in told
    assert ("client", "unmasked server") in told


def test_the_figures_of_an_ab_offer_are_those_of_its_first_ledger_row(tmp_path: Path):
    asked = AbPrivacy(epsilon=0.5, noise_at="device")
    settings = AbTestSettings(arms=("memory", "shared"), clients=40, looks=4, privacy=asked)
    config = device_settings(settings, enrolled=40)
    assert config.ab_run is not None
    plan = plan_of(config, config.ab_run, "run", 1)
    with Ledger.open(tmp_path / "ledger", owner="test") as ledger:
        given, source = ArmOutcome("ann", 0, 1.0), TestSource(1, "release")
        answered(config.ab_run, config, plan, given, ledger, source)
        row = ledger.rows("ann")[0]
    assert release_cost(config, layout(settings).dimension) == row.charges
    assert shown(config) == charged(row.charges, config.privacy.delta)
    of_all_looks = epsilon(row.charges[:1] * settings.looks, config.privacy.delta)
    assert of_all_looks == pytest.approx(0.5, rel=0.01)
