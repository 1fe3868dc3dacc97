"""`privet evaluate SCENARIO`: settings, stages that resume, tables, page, and what is refused."""

import json
from pathlib import Path

import pytest
import tomli_w

from privet.common import config as settings
from privet.experiments import compared, compared_page, comparisons, main, scenario
from privet.experiments.compared import spread
from privet.experiments.simulate import simulate

from .tiny import population, tiny_bert, tiny_config, tiny_llama

SCENARIO = """
title = "tiny people"
run = "tiny"
bootstrap = 200

[people]
users = 4
records = 3

[retrieval]
tokens = 24
opening = 2
meaning = false

[answers]
users = 2
records = 2
tokens = 4

[cold_start]
users = 2
counts = [0, 1, 4]

[harm]
memory_users = 2
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a finished run of texts, and one of labels."""
    folder = tmp_path_factory.mktemp("evaluate")
    texts = tiny_config(
        tiny_llama(folder / "llama"), population(folder / "texts", 10, 16),
        privacy={"client": {"enabled": False}, "example": {"enabled": False}},
    )  # fmt: skip
    simulate(texts, folder / "runs" / "tiny")
    labels = tiny_config(
        tiny_bert(folder / "bert"), population(folder / "labels", 10, 16, True), name="numbers",
        privacy={"client": {"enabled": False}, "example": {"enabled": False}},
    )  # fmt: skip
    simulate(labels, folder / "runs" / "numbers")
    return folder


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    monkeypatch.chdir(place)


def written(name, text):
    Path(name).write_text(text, "utf-8")
    return name


def test_a_scenario_is_measured_and_told_in_table_page_and_json(capsys):
    name = written("first.toml", SCENARIO)
    assert main.run(["evaluate", name]) == 0
    said = capsys.readouterr().out
    for text in ("tiny people", "own texts and personal head", "Cold start", "Rare own strings"):
        assert text in said
    folder = Path("runs/tiny/compared/first")
    found = json.loads((folder / "summary.json").read_text())
    assert (found["people"], found["unit"], found["trained"]) == (4, "bits per byte", True)
    page = (folder / "report.html").read_text()
    assert "<svg" in page and "Findings" in page and "user 0" not in page + json.dumps(found)  # noqa: PT018
    assert len((folder / "users.jsonl").read_text().splitlines()) == 4
    assert main.run(["evaluate", name, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["people"] == 4


def test_a_second_call_measures_nobody_again_and_a_killed_one_goes_on(monkeypatch):
    name = written("again.toml", SCENARIO)
    assert main.run(["evaluate", name]) == 0
    path = Path("runs/tiny/compared/again/users.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    calls, right = [], comparisons.measure_text

    def counted(*arguments):
        calls.append(1)
        return right(*arguments)

    monkeypatch.setattr(compared, "measure_text", counted)
    assert main.run(["evaluate", name]) == 0
    assert not calls
    path.write_text("".join(lines[:3]) + lines[3][:20])  # stopped in the middle of a line
    assert main.run(["evaluate", name]) == 0
    assert len(calls) == 1
    assert path.read_text().splitlines(keepends=True) == lines


def test_results_of_other_settings_are_not_mixed(capsys):
    written("mixed.toml", SCENARIO)
    assert main.run(["evaluate", "mixed.toml"]) == 0
    written("mixed.toml", SCENARIO.replace("opening = 2", "opening = 3"))
    assert main.run(["evaluate", "mixed.toml"]) == 2
    assert "other settings" in capsys.readouterr().err
    written("mixed.toml", SCENARIO.replace('title = "tiny people"', 'title = "others"'))
    assert main.run(["evaluate", "mixed.toml"]) == 0  # a title decides no result


def test_labels_have_heads_and_their_metrics(capsys):
    name = written("labels.toml", 'run = "numbers"\nbootstrap = 200\n[people]\nusers = 4\n')
    assert main.run(["evaluate", name]) == 0
    said = capsys.readouterr().out
    assert "mae" in said
    found = json.loads(Path("runs/numbers/compared/labels/summary.json").read_text())
    assert {one["model"] for one in found["models"]} == {
        "base", "global", "head", "head_swapped", "personal",
    }  # fmt: skip
    assert found["unit"] == "squared error"
    assert all(set(one["metrics"]) == {"mae", "rmse"} for one in found["models"])


def test_people_who_were_never_trained_on_are_measured_with_the_base_model(place):
    config = tiny_config(place / "llama", place / "texts" / "people.jsonl", name="untrained")
    written("untrained-config.toml", settings.to_toml(config))
    text = SCENARIO.replace('run = "tiny"', 'config = "untrained-config.toml"')
    name = written("untrained.toml", text.replace("users = 4", 'users = 4\nwhom = "everybody"'))
    assert main.run(["evaluate", name]) == 0
    found = json.loads(Path("runs/untrained/compared/untrained/summary.json").read_text())
    assert (found["trained"], found["shared"], found["people"]) == (False, "base", 4)
    assert "global" not in {one["model"] for one in found["models"]}


def test_another_runs_adapter_is_measured_beside():
    name = written("beside.toml", 'adapters = { group = ["runs/tiny", "runs/tiny"] }\n' + SCENARIO)
    assert main.run(["evaluate", name]) == 0
    found = json.loads(Path("runs/tiny/compared/beside/summary.json").read_text())
    means = {one["model"]: one["loss"]["mean"] for one in found["models"]}
    assert means["group"] == pytest.approx(means["global"])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("run = 'tiny'\nusers = 3", "users: unknown key"),
        ("title = 'none'", "name either run"),
        ("run = 'a'\nconfig = 'b'", "name either run"),
        ("run = 'nowhere'", "there is no run 'nowhere'"),
        ("run = 'tiny'\n[people]\nusers = 0", "people.users = 0"),
        ("run = 'tiny'\n[cold_start]\ncounts = [4, 1]", "rising numbers"),
        ("run = [", "not valid TOML"),
        ("run = 'tiny'\n[harm]\ngroups = 'nowhere.json'", "expected a JSON object, user -> group"),
        ("config = 'nothing'", "there is no configuration 'nothing'"),
    ],
)
def test_a_scenario_that_does_not_fit_is_one_sentence_and_exit_code_2(text, sentence, capsys):
    assert main.run(["evaluate", written("wrong.toml", text)]) == 2
    assert sentence in capsys.readouterr().err


def test_a_missing_scenario_file_and_a_missing_run_are_told_apart(capsys):
    assert main.run(["evaluate", "missing.toml"]) == 2
    said = capsys.readouterr().err
    assert "cannot read the scenario" in said and "shakespeare" in said  # noqa: PT018
    assert main.run(["evaluate", "missing"]) == 2
    assert "there is no run 'missing'" in capsys.readouterr().err


@pytest.mark.parametrize("name", scenario.known())
def test_the_scenarios_that_privet_brings_can_be_read(name):
    found = scenario.read(name)
    assert (found.name, bool(found.title)) == (name, True)
    assert tomli_w.dumps(found.model_dump(mode="json"))


def test_held_out_records_are_spread_over_their_time():
    assert spread(100, 4) == [0, 25, 50, 75]
    assert spread(3, 8) == [0, 1, 2]
    assert spread(0, 8) == []


def test_the_page_escapes_what_settings_say():
    name = written("escaped.toml", SCENARIO.replace("tiny people", "<script>x</script>"))
    found = compared.compare(scenario.read(name), Path("runs"))
    assert "<script>" not in compared_page.page(found)
