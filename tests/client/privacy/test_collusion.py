"""What is left if devices collude or masks break: charged, in the report, on the device's page."""

import io
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from privet.client.commands import printing
from privet.client.consent.offer_description import DeviceState, describe
from privet.client.consent.policy import own_config
from privet.client.consent.policy_settings import Policy
from privet.client.consent.run_offers import receive
from privet.client.privacy.collusion import Release, completed, epsilon_or_estimate, points, table
from privet.client.privacy.gate import budgets, charges, colluding, release
from privet.client.privacy.ledger import Ledger
from privet.client.privacy.spending import Spending, spending
from privet.client.store import key_file as unlock_module
from privet.client.store.device_store import ME, DeviceStore, Joined
from privet.client.store.key_file import Passphrase
from privet.common.errors import BudgetExceeded, PrivacyError
from privet.common.privacy.accounting import Charge, epsilon
from privet.common.privacy.encoding import rounded_sensitivity
from privet.common.privacy.noise import TestSource, gaussian_closeness
from privet.common.privacy.plan_maker import make_plan
from privet.common.privacy.release_facts import Asked, restored
from privet.common.privacy.round_plan import Plan
from privet.common.secure_aggregation.keys import Directory
from privet.common.settings.config import Config, parse, to_toml
from privet.common.settings.sections import NEW_DEVICE
from privet.experiments.reports import figures, html_page, privacy_facts, report, terminal
from privet.experiments.reports.claims import headline, line_name, main_line
from privet.experiments.reports.privacy_facts import History, facts_of

from ...experiments.reports.test_report import MEASURED, Reader

SIZE, LAYOUT, DELTA = 96, "0" * 64, 1e-5
SURVIVORS, COLLUDERS, COHORT, ENROLLED = 39, 7, 64, 200
CONDITIONS = ("closed directory", f"at most {COLLUDERS} of the {ENROLLED} enrolled devices collude")
SERVER = "fl.example.org:9092"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No second accountant, whose tests are elsewhere, and a passphrase that costs nothing."""
    monkeypatch.setattr(
        privacy_facts, "cross_check", lambda charges, delta: ("same", epsilon(charges, delta))
    )
    cost = {"iterations": 1, "lanes": 1, "memory_kib": 1024}
    monkeypatch.setattr(unlock_module, "_ARGON2ID", cost)


def settings(**changes: Any) -> Config:
    table: dict[str, Any] = {
        "name": "fake",
        "data": {"clients": ENROLLED, "test_clients": 0},
        "rounds": {"cohort": COHORT, "count": 2},
        "privacy": {"client": {"noise_at": "distributed"}, "example": {"enabled": False}},
    }
    return parse({**table, **changes})


def planned(config: Config, number: int = 1) -> Plan:
    return make_plan(config, "run-1", number, LAYOUT, np.zeros(SIZE, np.float32))


def figure(*cost: Charge) -> float:
    """As it is shown: also where it is no bound."""
    found, _ = epsilon_or_estimate(cost, DELTA)
    assert found is not None
    return found


def person(found: tuple[Charge, ...], against: str) -> Charge:
    (charge,) = (c for c in found if (c.unit, c.against) == ("client", against))
    return charge


# --- the charge and the table -------------------------------------------------------------------


def test_the_own_share_is_one_adders_noise_and_its_distance_from_gaussian_noise():
    plan, config = planned(settings()), settings()
    assert (plan.survivors, plan.colluders) == (SURVIVORS, COLLUDERS)
    charge = person(charges(plan, SIZE, config.privacy), "unmasked server")
    moved = rounded_sensitivity(plan.clip, plan.step, SIZE)[0]
    assert charge.noise_multiplier == pytest.approx(plan.variance**0.5 / moved, rel=1e-12)
    near = gaussian_closeness(plan.variance, SIZE, 1)
    assert (charge.ratio, charge.distance) == (near.ratio, near.slack)
    of_all = person(charges(plan, SIZE, config.privacy), "server")
    assert charge.ratio > of_all.ratio  # closeness of all shares would claim too much for one


@pytest.mark.parametrize("blocks", [False, True])
def test_both_ends_and_the_agreed_row_of_the_table_are_exact_and_it_only_grows(blocks):
    statistics = {"enabled": True, "gains": True} if blocks else {}
    config = settings(statistics=statistics)
    plan = planned(config)
    cost, asked = charges(plan, SIZE, config.privacy), Asked(plan, SIZE)
    rows = table([[Release(cost, asked)]], "add_remove", DELTA, COLLUDERS)
    by_devices = {row["colluding"]: row["epsilon"] for row in rows}
    assert list(by_devices) == points(COLLUDERS, SURVIVORS - 1)
    assert by_devices[COLLUDERS] == epsilon([person(cost, "server")], DELTA)
    assert by_devices[SURVIVORS - 1] == figure(person(cost, "unmasked server"))
    everybody = colluding(plan, SIZE, "add_remove", 0)
    assert by_devices[0] == epsilon([everybody], DELTA)
    one = person(cost, "unmasked server").noise_multiplier
    assert everybody.noise_multiplier == pytest.approx(one * SURVIVORS**0.5, rel=1e-9)
    values = [value for value in by_devices.values() if value is not None]
    assert list(by_devices.values()) == sorted(set(values))
    # more colluders than a sum has vectors: nobody knows the own share
    assert colluding(plan, SIZE, "add_remove", 10**6) == colluding(
        plan, SIZE, "add_remove", SURVIVORS - 1
    )


def test_the_table_composes_what_happened_and_shows_the_worst_client():
    config = settings()
    plans = [planned(config, number) for number in (1, 2)]
    once, twice = (
        [Release(charges(p, SIZE, config.privacy), Asked(p, SIZE)) for p in plans[:count]]
        for count in (1, 2)
    )
    rows = table([once, twice], "add_remove", DELTA, COLLUDERS)
    for row in rows:
        cost = [colluding(plan, SIZE, "add_remove", row["colluding"]) for plan in plans]
        assert row["epsilon"] == figure(*cost)
        assert row["bound"] == math.isfinite(epsilon(cost, DELTA))
    assert table([once, [Release(once[0].charges, None)]], "add_remove", DELTA, COLLUDERS) == []


@pytest.mark.parametrize(("agreed", "last"), [(7, 38), (1, 1), (0, 4), (100, 599), (9, 3)])
def test_the_rows_begin_at_nobody_have_the_agreed_number_and_end_at_the_own_share(agreed, last):
    found = points(agreed, last)
    assert (found[0], found[-1]) == (0, last)
    assert min(agreed, last) in found
    assert found == sorted(set(found))
    assert len(found) <= 12


def test_a_plan_without_shares_has_no_table():
    config = settings(privacy={"client": {"noise_at": "device"}, "example": {"enabled": False}})
    plan = planned(config)
    cost = charges(plan, SIZE, config.privacy)
    assert [c.against for c in cost] == ["analyst", "server"]
    assert table([[Release(cost, Asked(plan, SIZE))]], "add_remove", DELTA, COLLUDERS) == []
    with pytest.raises(PrivacyError, match="noise_at = 'device': expected distributed"):
        colluding(plan, SIZE, "add_remove", 1)


# --- the budget ---------------------------------------------------------------------------------


def test_no_budget_counts_what_is_left_if_masks_break_and_everything_else_is_counted(tmp_path):
    config = settings()
    cost = charges(planned(config), SIZE, config.privacy)
    assert epsilon([person(cost, "unmasked server")], DELTA) > NEW_DEVICE["client"]
    with Ledger.open(tmp_path / "ledger", owner="me") as ledger:
        ledger.check("a", cost, budgets(config.privacy), DELTA)
        small = settings(
            privacy={
                "client": {"noise_at": "distributed"},
                "example": {"enabled": False},
                "budget": {"client": 4.0},
            }
        )
        with pytest.raises(BudgetExceeded, match="against the analyst"):
            ledger.check("a", cost, budgets(small.privacy), DELTA)


def test_without_a_closed_directory_a_masked_round_is_declined_unless_the_owner_said_how_much(
    tmp_path,
):
    config = settings(rounds={"cohort": 10})
    plan = planned(config)
    own = own_config(Policy(), config, closed=False)
    cost = charges(plan, SIZE, own.privacy)
    assert person(cost, "server").noise_multiplier == (
        person(cost, "unmasked server").noise_multiplier
    )
    generous = Policy.model_validate({"budget": {"open_directory": 14.0}})
    with Ledger.open(tmp_path / "ledger", owner="me") as ledger:
        with pytest.raises(BudgetExceeded, match=r"closed directory.*budget\.open_directory"):
            ledger.check("a", cost, budgets(own.privacy), DELTA)
        allowed = own_config(generous, config, closed=False).privacy
        ledger.check("a", cost, budgets(allowed), DELTA)
        ledger.commit("a", "run-1", 1, plan.digest, cost, b"x")
        with pytest.raises(BudgetExceeded, match="against the server"):
            ledger.check("a", cost, budgets(allowed), DELTA)
        # of 64 devices one share hides too little for any bound: no limit is large enough
        many = charges(planned(settings()), SIZE, own.privacy)
        limits = {"client": 10.0, "client/server": 1e6, "client/unmasked server": math.inf}
        with pytest.raises(BudgetExceeded, match="from 0 to inf"):
            ledger.check("b", many, limits, DELTA)
    assert own_config(Policy(), config).privacy.directory == "closed"


def test_a_records_figure_without_a_closed_directory_is_that_of_training_alone():
    config = settings(privacy={"client": {"noise_at": "distributed"}})
    plan = planned(config)
    opened = charges(plan, SIZE, own_config(Policy(), config, closed=False).privacy)
    by = {c.against: c for c in opened if c.unit == "example"}
    assert by["server"].noise_multiplier == by["unmasked server"].noise_multiplier
    assert by["server"].distance == 0
    assert by["analyst"].noise_multiplier > by["server"].noise_multiplier


# --- what is kept beside a release --------------------------------------------------------------


def test_a_kept_plan_comes_back_and_no_other_passes_for_it():
    plan = planned(settings())
    asked = Asked(plan, SIZE)
    assert restored(plan.digest, asked.text) == asked
    other = planned(settings(), 2)
    wrong = json.loads(asked.text)
    wrong["plan"]["variance"] *= 2
    for text in (Asked(other, SIZE).text, json.dumps(wrong), "", "[]", asked.text[:-9]):
        assert restored(plan.digest, text) is None
    assert restored(plan.digest, asked.text.replace(str(SIZE), "-1", 1)) is None


def test_a_row_of_an_older_privet_is_completed_from_its_plan_and_left_alone_without():
    config = settings()
    plan = planned(config)
    cost = charges(plan, SIZE, config.privacy)
    old = tuple(c for c in cost if c.against != "unmasked server")
    assert set(completed(old, Asked(plan, SIZE))) == set(cost)
    assert completed(old, None) == old
    assert completed(cost, Asked(plan, SIZE)) == cost


# --- the report ---------------------------------------------------------------------------------


def history(config: Config, *, asked: bool = True, old: bool = False) -> History:
    plan = planned(config)
    cost = charges(plan, SIZE, config.privacy)
    if old:
        cost = tuple(c for c in cost if (c.unit, c.against) != ("client", "unmasked server"))
    return History("a", ((1, cost),), (Asked(plan, SIZE) if asked else None,))


def full() -> Config:
    return settings(privacy={"client": {"noise_at": "distributed"}})


def small() -> Config:
    """So few devices that one share of the noise has a bound."""
    return settings(
        rounds={"cohort": 10, "count": 3}, privacy={"client": {"noise_at": "distributed"}}
    )


def shown(facts: Any) -> str:
    printed = io.StringIO()
    terminal.show(facts, Console(file=printed, width=400, color_system=None))
    return printed.getvalue()


def reported(config: Config, history: History) -> Any:
    facts = facts_of(config, [history])
    return {
        "summary": report.build_summary(config, facts, {}, MEASURED),
        "privacy": facts,
        "statistics": [],
    }


def test_every_line_against_the_server_carries_its_conditions_in_json_terminal_and_page():
    facts = reported(full(), history(full()))
    against = [x for x in facts["privacy"]["lines"] if x["against"] == "server"]
    assert {line["unit"] for line in against} == {"client", "example"}
    for line in (*against, *(x for x in facts["summary"]["privacy"] if x["against"] == "server")):
        assert len(line["conditions"]) == 2
        assert all(map(str.startswith, line["conditions"], CONDITIONS))
    whole = "; ".join(against[0]["conditions"])
    for found in (shown(facts), "\n".join(Reader(html_page.page(facts)).words)):
        text = " ".join(found.split())  # a picture breaks its titles
        places = [m.start() for m in re.finditer(r"-level, against the server", text)]
        assert len(places) > 4
        for place in places:
            near = text[place : place + 60]
            assert near.startswith(("-level, against the server (if: closed directory; at most 7 ",
                                    "-level, against the server (if …)")), near  # fmt: skip
        assert whole in text
    labels = re.findall(r'aria-label="([^"]*)"', html_page.page(facts))
    assert any("against the server (if: closed directory" in label for label in labels)
    said = headline(facts["privacy"])
    assert whole in said
    assert "If masking is broken, the device's own share of the noise is left: epsilon = " in said


def test_the_line_if_masking_is_broken_is_in_all_three_and_has_no_budget():
    facts = reported(full(), history(full()))
    (line,) = (x for x in facts["privacy"]["lines"] if x["key"] == "client/unmasked server")
    cost = charges(planned(full()), SIZE, full().privacy)
    assert line["epsilon"] == figure(person(cost, "unmasked server"))
    assert (line["bound"], line["holds_against"]) == (False, [])
    assert "reckoned as Gaussian noise, no bound" in line_name(line)
    assert (line["budget"], line["conditions"]) == (None, [])
    assert "own share" in line["noise_counted"]
    assert not any("masking holds" in said for said in line["assumptions"])
    main = main_line(facts["privacy"])
    assert main is not None
    assert main["key"] == "client/server"
    page, printed = html_page.page(facts), shown(facts)
    for text in (page, printed):
        assert f"{line['epsilon']:.2f}" in text
        assert line_name(line) in text
        assert "If devices collude with the server, or masking is broken" in text
    (against,) = (x for x in facts["privacy"]["lines"] if x["key"] == "client/server")
    found = against["colluding"]
    assert (found["agreed"], found["enrolled"]) == (COLLUDERS, ENROLLED)
    assert found["rows"][-1]["epsilon"] == line["epsilon"]
    assert {row["colluding"]: row["epsilon"] for row in found["rows"]}[COLLUDERS] == (
        against["epsilon"]
    )
    for devices, value, _ in figures.colluding(against).rows:
        assert re.search(rf"\n *{devices} +{re.escape(value)}", printed)
    assert "colluding-" in page  # the picture
    json.dumps(facts, allow_nan=False)


def test_noise_that_the_device_adds_in_full_rests_on_no_masks():
    config = settings(privacy={"client": {"noise_at": "device"}})
    facts = reported(config, history(config))
    for line in facts["privacy"]["lines"]:
        assert line["conditions"] == []
        assert line["colluding"] is None
    assert "(if" not in shown(facts)


def test_an_old_ledger_is_shown_right_with_its_plans_and_said_to_lack_them_without():
    new = facts_of(full(), [history(full())])
    assert facts_of(full(), [history(full(), old=True)]) == new
    bare = facts_of(full(), [history(full(), asked=False, old=True)])
    assert "client/unmasked server" not in [line["key"] for line in bare["lines"]]
    assert any("an older privet" in said for said in bare["no_claim"])
    assert not any("an older privet" in said for said in new["no_claim"])
    (line,) = (x for x in bare["lines"] if x["key"] == "client/server")
    assert line["colluding"] is None
    assert len(line["conditions"]) == 2


# --- the device's page --------------------------------------------------------------------------


@pytest.fixture
def homes(tmp_path: Path) -> Iterator[Any]:
    """Makes a home that joined and released two rounds through the gate."""
    made: list[DeviceStore] = []

    def make(closed: bool, **policy: Any) -> DeviceStore:
        home = DeviceStore.create(tmp_path / f"home-{len(made)}", Passphrase("own"))
        made.append(home)
        known = {n: bytes([n, n // 256]) * 16 for n in range(ENROLLED - 1)}
        known[ENROLLED] = home.identity.public
        home.join(Joined(SERVER, "PEM", closed), Directory(known if closed else {}, closed))
        asked = full() if closed else small()
        own = own_config(Policy.model_validate(policy), asked, closed).privacy
        for number in (1, 2):
            plan = planned(asked, number)
            source = TestSource(number, "release")
            delta = np.zeros(SIZE, np.float32)
            release(delta, LAYOUT, plan, ME, home.ledger, own, source)
        return home

    yield make
    for home in made:
        home.close()


def page(facts: Spending, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    printing.budget(facts, False)
    return capsys.readouterr().out


def lines(facts: Spending) -> dict[tuple[str, str], Any]:
    json.dumps(facts, allow_nan=False)
    return {(line["unit"], line["against"]): line for line in facts["lines"]}


def test_with_a_closed_directory_the_page_has_both_figures_conditions_and_the_table(
    homes, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "400")
    home = homes(True)
    facts = spending(home)
    found = lines(facts)
    cost = [charges(planned(full(), n), SIZE, full().privacy) for n in (1, 2)]
    for against in ("analyst", "server", "unmasked server"):
        wanted = figure(*(person(one, against) for one in cost))
        assert found["client", against]["epsilon"] == wanted
    assert (facts["directory"], facts["enrolled"], facts["older"]) == ("closed", ENROLLED, 0)
    for unit in ("client", "example"):
        line = found[unit, "server"]
        assert all(map(str.startswith, line["conditions"], CONDITIONS))
        assert (line["alone"], line["with_masks"]) == (0, None)
    assert found["client", "unmasked server"]["budget"] is None
    rows = found["client", "server"]["colluding"]["rows"]
    assert rows[-1]["epsilon"] == found["client", "unmasked server"]["epsilon"]
    text = page(facts, capsys)
    against_it = [row for row in text.splitlines() if re.search("  the server", row)]
    assert len(against_it) == 4
    for row in against_it:
        assert "the server, should the masks fail" in row or all(c in row for c in CONDITIONS)
    assert re.search(rf"\n{rows[0]['colluding']} +{rows[0]['epsilon']:.3f}", text)
    assert "no limit" in text


def test_the_page_of_a_device_without_a_closed_directory_never_claims_the_masked_figure(
    homes, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "400")
    home = homes(False, budget={"open_directory": 200.0})
    facts = spending(home)
    found = lines(facts)
    server = found["client", "server"]
    masked = epsilon(
        [person(charges(planned(small(), n), SIZE, small().privacy), "server") for n in (1, 2)],
        DELTA,
    )
    assert server["epsilon"] == found["client", "unmasked server"]["epsilon"] > 2 * masked
    assert (server["alone"], server["conditions"]) == (2, [])
    assert server["with_masks"]["epsilon"] == masked
    assert server["with_masks"]["conditions"][0] == "nobody on the roster was invented"
    assert facts["directory"] == "open"
    text = page(facts, capsys)
    against_it = [
        row for row in text.splitlines() if re.search("records together +the server", row)
    ]
    claim, conditional, broken = (row for row in against_it)
    assert f"{server['epsilon']:.3f}" in claim
    assert "own share of the noise: no closed directory" in claim
    assert "only if: nobody on the roster was invented; at most 1 of all enrolled" in conditional
    assert re.search(rf"{masked:.3f} +no claim", conditional)
    assert f"{masked:.3f}" not in claim + broken
    assert "(only if nobody on the roster was invented):" in text
    assert "--directory FILE" in text


def test_a_device_that_joins_with_a_directory_later_keeps_what_it_released_without(homes):
    home = homes(False, budget={"open_directory": 200.0})
    known = Directory({1: home.identity.public}, closed=True)
    home.join(Joined(SERVER, "PEM", closed=True), known)
    own = own_config(Policy.model_validate({"budget": {"open_directory": 200.0}}), small())
    release(np.zeros(SIZE, np.float32), LAYOUT, planned(small(), 3), ME, home.ledger, own.privacy,
            TestSource(3, "release"))  # fmt: skip
    server = lines(spending(home))["client", "server"]
    assert (server["alone"], server["releases"]) == (2, 3)
    assert len(server["conditions"]) == 2
    assert server["epsilon"] > server["with_masks"]["epsilon"]


def test_an_old_ledger_opens_and_what_it_lacks_is_said(homes, capsys):
    home = homes(True)
    with home.ledger._transaction("BEGIN IMMEDIATE") as db:
        db.execute("DROP TABLE plan")  # as an older privet left it: and no charge of the own share
    old = tuple(
        c for c in charges(planned(full(), 9), SIZE, full().privacy)
        if (c.unit, c.against) != ("client", "unmasked server")
    )  # fmt: skip
    generous = own_config(
        Policy.model_validate({"budget": {"client": 50.0}}),
        parse(
            {
                **full().model_dump(exclude_none=True),
                "privacy": {"client": {"noise_at": "distributed"}, "budget": {"client": 50.0}},
            }
        ),
    ).privacy
    home.ledger.check(ME, old, budgets(generous), DELTA)
    home.ledger.commit(ME, "run-1", 9, "ab" * 32, old, b"x")
    assert home.ledger.plans() == {}
    facts = spending(home)
    assert facts["older"] == 1
    assert lines(facts)["client", "server"]["colluding"] is None
    assert len(lines(facts)["client", "server"]["conditions"]) == 2
    assert "older privet wrote down without their plans" in " ".join(page(facts, capsys).split())
    release(np.zeros(SIZE, np.float32), LAYOUT, planned(full(), 10), ME, home.ledger,
            generous, TestSource(10, "release"))  # fmt: skip
    assert list(home.ledger.plans()) == [planned(full(), 10).digest]


@pytest.mark.parametrize("closed", [True, False])
def test_the_consent_text_has_both_figures_in_one_sentence(closed):
    config = full() if closed else small()
    offer = receive("run-1", SERVER, to_toml(config), 1.7e9)
    device = DeviceState(closed=closed, enrolled=ENROLLED if closed else None)
    rows = describe(offer, Policy(), device, dimension=SIZE)
    (said,) = (t for _, t in rows if t.startswith("all your records together, against the server"))
    cost = charges(planned(config), SIZE, config.privacy)
    masked, alone = (figure(person(cost, x)) for x in ("server", "unmasked server"))
    numbers = [float(x) for x in re.findall(r"about ([0-9.]+) after 1 release", said)]
    if closed:
        assert numbers == pytest.approx([masked, alone], rel=0.01)
        assert all(c in said for c in CONDITIONS)
        assert "should they fail, about" in said
        assert "(as Gaussian noise: so little has no bound)" in said
    else:
        claim, _, rest = said.partition("only if nobody on the roster was invented")
        assert numbers == pytest.approx([alone, alone, masked], rel=0.01)
        assert f"about {numbers[-1]}" not in claim
        assert f"about {numbers[-1]}" in rest
        assert "does not allow a single one" in claim
