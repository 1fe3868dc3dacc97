"""experiments/reports/device_run_facts.py: the report of a run whose ledgers stay on the devices.

The devices are simulated, so that their ledgers, which no server of real devices has, can be held
against what the report says of them.
"""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from rich.console import Console

from privet import commands as main
from privet.client.app import app as client_app
from privet.client.privacy.ledger import Ledger
from privet.client.privacy.run_ledger import LEDGERS
from privet.client.simulated import SimulatedContext
from privet.common.errors import ConfigError, StateError
from privet.common.files import read_lines
from privet.common.privacy.accounting import epsilon
from privet.common.settings.config import parse, read, to_toml
from privet.experiments.commands import experiment
from privet.experiments.grid import LocalGrid
from privet.experiments.reports import device_run_facts, html_page, privacy_facts, report, terminal
from privet.experiments.simulate import prepare
from privet.server.app import serve
from privet.server.rounds import PLANS

from ...tiny import population, tiny_config
from .test_report import Reader

CLIENTS = 6
DYING = (3, 4, 5)  # in round 2, when their contribution is in their ledger and does not leave


def died(message: Message, context: Context) -> Message:
    """A device; half of them die in round 2, so that it is void."""
    if message.metadata.message_type == "query.keep":
        return Message(RecordDict({"reply": ConfigRecord({})}), reply_to=message)
    reply = client_app(message, context)
    plan = message.content.get("plan")
    dies = plan is not None and plan["round"] == 2 and context.node_config["partition-id"] in DYING
    if dies and message.metadata.message_type == "train.vector":
        return Message(Error(code=0, reason="gone"), reply_to=message)
    return reply


@pytest.fixture(scope="module")
def folder(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three masked rounds of six devices and a void one, as the server's run folder has them."""
    place = tmp_path_factory.mktemp("devices")
    config = tiny_config(
        llama_folder,
        population(place / "people", CLIENTS + 3, 8),
        rounds={"count": 3, "cohort": CLIENTS, "gather_s": 0.0},
        privacy={"client": {"noise_at": "distributed"}},
        secure_aggregation={"min_cohort": 4},
    )
    kept = parse({k: v for k, v in config.model_dump().items() if k != "insecure_test_seed"})
    run = place / "run"
    prepare(kept, run, resume=False)
    real = read(run / "config.toml").model_dump(exclude_none=True)
    real["data"] |= {"source": "devices"}
    (run / "config.toml").write_text(to_toml(parse(real)))
    serve(LocalGrid(died, CLIENTS, str(run)), run, lambda _: None)
    SimulatedContext.open.cache_clear()
    return run


@pytest.fixture(autouse=True)
def quick_second_opinion(monkeypatch):
    """The PRV accountant takes a second a line; its own tests are elsewhere."""
    monkeypatch.setattr(
        privacy_facts, "cross_check", lambda charges, delta: ("same", epsilon(charges, delta))
    )


@pytest.fixture
def facts(folder):
    return report.report_facts(folder)


def own_figures(folder: Path, line: dict[str, Any]) -> dict[str, float]:
    """What each device's own ledger says of a line."""
    run = (folder / "run-id").read_text().strip()
    with Ledger.open(folder / LEDGERS, owner=run) as ledger:
        spent = {name: ledger.charges(name) for name in ledger.clients()}
    key = line["unit"], line["against"], line["adjacency"]
    return {
        name: epsilon([c for c in charges if (c.unit, c.against, c.adjacency) == key], 1e-5)
        for name, charges in spent.items()
    }


def changed(folder: Path, tmp_path: Path, **files: bytes | None) -> Path:
    """A copy of what the report reads, with other contents."""
    for name in ("config.toml", "run-id", "plans.jsonl", "rounds.jsonl"):
        content = files.get(name.partition(".")[0], (folder / name).read_bytes())
        if content is not None:
            (tmp_path / name).write_bytes(content)
    return tmp_path


def shown(facts: Any) -> str:
    printed = io.StringIO()
    terminal.show(facts, Console(file=printed, width=120, color_system=None))
    return printed.getvalue()


def test_each_line_is_that_of_the_ledger_of_a_device_that_released_in_every_round(folder, facts):
    lines = facts["privacy"]["lines"]
    assert {(line["unit"], line["against"]) for line in lines} == {
        ("client", "analyst"), ("client", "server"), ("client", "unmasked server"),
        ("example", "analyst"), ("example", "server"), ("example", "unmasked server"),
    }  # fmt: skip
    for line in lines:
        own = own_figures(folder, line)
        assert len(own) == CLIENTS
        assert max(own.values()) == pytest.approx(line["epsilon"], rel=1e-12)


def test_rounds_that_were_void_are_counted_for_devices_had_released_by_then(folder, facts):
    assert [record["void"] for record in read_lines(folder / "rounds.jsonl")] == [0, 1, 0, 0]
    config = read(folder / "config.toml")
    summed = [one for one in device_run_facts._announced(folder) if one.plan.round != 2]
    faulty = privacy_facts.facts_of(config, device_run_facts.histories(config, summed))
    for line, less in zip(facts["privacy"]["lines"], faulty["lines"], strict=True):
        assert less["epsilon"] < max(own_figures(folder, line).values()) <= line["epsilon"]
    said = " ".join(facts["privacy"]["devices"]["sentences"])
    assert "1 of the rounds was void" in said
    assert f"{faulty['lines'][0]['epsilon']:.2f} (client-level, against the analyst)" in said


def test_a_round_that_was_announced_and_never_ended_is_counted(folder, tmp_path, facts):
    cut = b"".join((folder / "rounds.jsonl").read_bytes().splitlines(keepends=True)[:2])
    found = device_run_facts.device_facts(changed(folder, tmp_path, rounds=cut))
    assert found["lines"] == facts["privacy"]["lines"]
    assert [row["void"] for row in found["rounds"]] == [False, True, None, None]
    assert "not ended" in shown(report.report_facts(tmp_path))


def test_a_device_that_was_asked_before_a_crash_and_not_after_it_is_counted(folder, tmp_path):
    lines = read_lines(folder / PLANS)
    again = [lines[0] | {"asked": [0, 1, 2, 3]}, lines[0] | {"asked": [2, 3, 4, 5]}]
    text = "".join(json.dumps(line) + "\n" for line in again).encode()
    first = (folder / "rounds.jsonl").read_bytes().splitlines(keepends=True)[0]
    found = device_run_facts.device_facts(changed(folder, tmp_path, plans=text, rounds=first))
    assert [one["participations"] for one in found["clients"]] == [1] * CLIENTS


def test_a_device_that_was_not_asked_has_spent_nothing(folder, tmp_path):
    lines = [line | {"asked": [0, 1, 2, 3]} for line in read_lines(folder / PLANS)]
    lines[1]["asked"] = [0, 1, 2, 3, 5]
    text = "".join(json.dumps(line) + "\n" for line in lines).encode()
    found = device_run_facts.device_facts(changed(folder, tmp_path, plans=text))
    asked = {one["client"]: one["participations"] for one in found["clients"]}
    assert asked == {"client 0": 4, "client 1": 4, "client 2": 4, "client 3": 4, "client 5": 1}
    assert "1 device asked once" in shown(report.report_facts(tmp_path))


def test_rounds_have_who_was_asked_came_and_declined_in_numbers(facts):
    rows = facts["privacy"]["rounds"]
    assert [row["asked"] for row in rows] == [CLIENTS] * 4
    assert [row["answered"] for row in rows] == [CLIENTS, 0, CLIENTS, CLIENTS]
    assert [row["declined"] for row in rows] == [0, 0, 0, 0]
    text = shown(facts)
    assert "void" in text
    assert "asked" in text


def test_the_terminal_says_at_most_and_sends_the_reader_to_each_devices_own_ledger(facts):
    text = " ".join(shown(facts).split())
    assert "What was spent (at most)" in text
    assert "privet client budget" in text
    assert "worst client" not in text
    assert f"at most: {CLIENTS} devices asked 4 times" in text
    assert "No losses were measured: that would take the people's texts" in text
    assert "privet evaluate" not in text
    assert "(in 4 releases)" in text
    assert "Other runs with the same devices" in text
    assert "only if nobody on a roster was invented" in " ".join(
        sentence for line in facts["privacy"]["lines"] for sentence in line["assumptions"]
    )


def test_the_page_has_pictures_and_no_claim_about_ledgers_or_evaluations(facts):
    found = Reader(html_page.page(facts))
    words = " ".join(" ".join(found.words).split())
    assert not found.open
    assert len(found.ids) == len(set(found.ids))
    assert "svg" in found.tags
    assert "from the plans of the rounds; the ledgers are on the devices" in words
    assert "No losses were measured" in words
    assert "whose chains verify" not in words


def test_the_summary_has_the_same_keys_as_that_of_a_simulation_and_nothing_measured(facts):
    from ...fake_run import fake_config

    simulated = report.build_summary(
        fake_config(), privacy_facts.facts_of(fake_config(), []), {}, {}
    )
    summary = facts["summary"]
    assert set(summary) == set(simulated)
    assert summary["metrics"] is None
    assert summary["rounds"] == 3
    assert summary["upload_bytes_per_client_round"] > summary["adapter"]["dimension"]
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert set(facts["privacy"]) == set(privacy_facts.facts_of(fake_config(), []))


def test_what_was_written_is_read_back_without_computing_it_again(folder, tmp_path, facts):
    place = changed(folder, tmp_path)
    with pytest.raises(StateError, match="no report yet"):
        report.written(place)
    report.write(place)
    assert report.written(place) == facts
    assert {one.name for one in place.iterdir()} >= {"report.html", "summary.json", "privacy.json"}


def test_a_round_whose_plan_is_missing_gives_no_figure(folder, tmp_path):
    cut = b"".join((folder / PLANS).read_bytes().splitlines(keepends=True)[:2])
    with pytest.raises(StateError, match="lacks the plan of round 3"):
        report.report_facts(changed(folder, tmp_path, plans=cut))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (b'"cohort": 6', b'"cohort": "six"', "holds no plan"),
        (b'"version": 4', b'"version": 99', "holds no plan"),
        (b'"run": "', b'"run": "x', "is of the run"),
        (b'"dimension": ', b'"dimension": "x", "was": ', "or damaged"),
        (b'"asked": [0', b'"asked": ["0"', "or damaged"),
        (b'"asked": [', b'"ask": [', "holds no plan"),
        (b'{"asked', b'[{"asked', "is not JSON"),
    ],
)
def test_a_plan_that_is_damaged_or_of_another_run_gives_no_figure(folder, tmp_path, old, new, said):
    place = changed(folder, tmp_path, plans=(folder / PLANS).read_bytes().replace(old, new))
    with pytest.raises(StateError, match=said) as refused:
        report.report_facts(place)
    assert str(place / PLANS) in str(refused.value)


def test_before_the_first_round_nothing_was_spent(folder, tmp_path):
    place = changed(folder, tmp_path, plans=None, rounds=None)
    found = report.report_facts(place)
    assert found["privacy"]["lines"] == []
    assert "Nothing has been released yet, so nothing has been spent." in shown(found)
    assert "No losses" in html_page.page(found)


def test_privet_report_takes_the_folder_of_a_run_on_devices(folder, capsys):
    assert main.run(["report", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["privacy"]["devices"]["enrolled"] == CLIENTS


def test_privet_evaluate_refuses_a_run_on_devices(folder, capsys):
    assert main.run(["evaluate", str(folder)]) == 2
    assert "nobody's losses can be read here" in capsys.readouterr().err


def test_a_run_ends_by_writing_and_naming_its_report(folder, tmp_path, capsys):
    place = changed(folder, tmp_path)
    experiment.reported(place)
    assert f"{place}/report.html" in capsys.readouterr().out
    assert (place / "report.html").is_file()


def test_a_report_that_cannot_be_written_is_a_warning_and_the_run_stays_good(
    folder, tmp_path, monkeypatch, capsys
):
    def without(_: object) -> str:
        raise ConfigError("the pictures need matplotlib")

    monkeypatch.setattr(html_page, "page", without)
    experiment.reported(changed(folder, tmp_path))
    assert (
        "warning: there is no report yet: the pictures need matplotlib" in capsys.readouterr().err
    )
