"""`privet evaluate SCENARIO`: settings, stages that resume, tables, page, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import tomli_w

from privet import commands as main
from privet.common.settings import config as settings
from privet.experiments.comparison import (
    comparison_page,
    comparisons,
    scenario,
    scenario_run,
    study,
    tables,
)
from privet.experiments.evaluation import run_evaluation
from privet.experiments.simulate import simulate

from ...tiny import population, tiny_bert, tiny_config, tiny_llama

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
    calls, right = [], comparisons.evaluate_text

    def counted(*arguments):
        calls.append(1)
        return right(*arguments)

    monkeypatch.setattr(scenario_run, "evaluate_text", counted)
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


@pytest.mark.parametrize("run", ["tiny", "numbers"])
def test_a_run_and_a_scenario_of_it_print_the_same_figures(run):
    """Base, shared and personal head: the same people, records, tokens, unit and mean."""
    summary = json.loads(Path(f"runs/{run}/summary.json").read_text())
    name = written(f"same-{run}.toml", f"run = '{run}'\n[retrieval]\nmeaning = false\n")
    assert main.run(["evaluate", name]) == 0
    found = json.loads(Path(f"runs/{run}/compared/same-{run}/summary.json").read_text())
    assert found["unit"] == summary["metrics"]["name"]
    seen = json.loads(Path(f"runs/{run}/evaluation.json").read_text())["seen"]
    assert found["people"] == len(seen["users"]) > 1
    losses = {one["model"]: one["loss"] for one in found["models"]}
    for theirs, ours in (("base", "base"), ("global", "global"), ("head", "personal")):
        assert losses[theirs]["mean"] == pytest.approx(summary["metrics"][ours]["mean"], abs=1e-6)
    said = {(one["worse"], one["better"]): one for one in found["comparisons"]}
    gain = summary["differences"]["base_minus_global_seen"]
    assert said["base", "global"]["ci95"] == pytest.approx(gain["ci95"], abs=1e-6)


def test_another_runs_adapter_is_measured_beside():
    name = written("beside.toml", 'adapters = { group = ["runs/tiny", "runs/tiny"] }\n' + SCENARIO)
    assert main.run(["evaluate", name]) == 0
    found = json.loads(Path("runs/tiny/compared/beside/summary.json").read_text())
    means = {one["model"]: one["loss"]["mean"] for one in found["models"]}
    assert means["group"] == pytest.approx(means["global"])


def test_one_person_alone_is_no_control_of_himself():
    name = written("alone.toml", SCENARIO.replace("users = 4", "users = 1"))
    assert main.run(["evaluate", name]) == 0
    found = json.loads(Path("runs/tiny/compared/alone/summary.json").read_text())
    assert not [one["model"] for one in found["models"] if one["control"]]
    assert not [one for one in found["harm"]["findings"] if one["kind"] == "control"]


@pytest.mark.parametrize("run", ["tiny", "numbers"])
def test_a_run_with_one_measured_person_has_no_swapped_head(run):
    folder = Path(shutil.copytree(f"runs/{run}", f"runs/one-{run}"))
    config = settings.read(folder / "config.toml")
    wanted = config.evaluation.model_copy(update={"users": 1})
    found = run_evaluation.evaluate(folder, config.model_copy(update={"evaluation": wanted}))
    assert "swapped_head" not in found["seen"]
    assert len(found["seen"]["personal"]) == 1


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("settings.json", b'{"a":', "cannot be read as JSON"),
        ("settings.json", b"\xff\xfe", "cannot be read as JSON"),
        ("users.jsonl", b'{"foo": 1}\n', "has a line without a user"),
    ],
)
def test_a_comparisons_damaged_file_is_one_sentence(file, content, sentence, capsys):
    name = written("damaged.toml", SCENARIO)
    shutil.rmtree("runs/tiny/compared/damaged", ignore_errors=True)
    assert main.run(["evaluate", name]) == 0
    (Path("runs/tiny/compared/damaged") / file).write_bytes(content)
    assert main.run(["evaluate", name]) == 2
    assert sentence in capsys.readouterr().err


def test_results_beside_another_runs_adapter_are_not_mixed_when_it_changes(monkeypatch, capsys):
    name = written("changed.toml", 'adapters = { group = ["runs/tiny"] }\n' + SCENARIO)
    assert main.run(["evaluate", name]) == 0
    right = study._of_other_run
    monkeypatch.setattr(study, "_of_other_run", lambda bench, run: right(bench, run) + 1)
    assert main.run(["evaluate", name]) == 2
    assert "of another adapter" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_not_silently_that_of_the_round_before(capsys):
    without = shutil.ignore_patterns("compared")
    folder = Path(shutil.copytree("runs/tiny", "runs/cut", ignore=without))
    path = folder / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    name = written("cut.toml", SCENARIO.replace('run = "tiny"', 'run = "cut"'))
    assert main.run(["evaluate", name]) == 0
    assert "checkpoint.safetensors.damaged-1" in capsys.readouterr().err


def test_a_damaged_summary_is_kept_aside_and_made_again(capsys):
    folder = Path(shutil.copytree("runs/tiny", "runs/garbage"))
    (folder / "summary.json").write_text("garbage")
    assert main.run(["evaluate", "garbage"]) == 0
    assert "kept aside as summary.json.damaged-1" in capsys.readouterr().err
    assert json.loads((folder / "summary.json").read_text())["run"] == "tiny"
    assert (folder / "summary.json.damaged-1").read_text() == "garbage"


def test_a_control_keeps_nothing_of_a_gain_that_is_none():
    losses = {"global": [1.0, 1.0], "retrieval": [1.1, 1.0], "retrieval_swapped": [1.3, 1.4]}
    assert tables._kept(losses, "global", "retrieval_swapped", "retrieval") is None
    gained = {**losses, "retrieval": [0.5, 0.5], "retrieval_swapped": [0.75, 0.75]}
    assert tables._kept(gained, "global", "retrieval_swapped", "retrieval") == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("run = 'tiny'\nusers = 3", "users: unknown key"),
        ("title = 'none'", "name either run"),
        ("run = 'a'\nconfig = 'b'", "name either run"),
        ("run = 'nowhere'", "there is no run 'nowhere'"),
        ("run = 'tiny'\n[people]\nusers = 0", "people.users = 0"),
        ("run = 'tiny'\n[cold_start]\ncounts = [4, 1]", "rising numbers"),
        ("run = 'tiny'\nname = '..'", "name = '..'"),
        ("run = 'tiny'\nname = '../../evil'", "name = '../../evil'"),
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
    assert "there is no scenario 'missing.toml'" in said and "shakespeare" in said  # noqa: PT018
    assert main.run(["evaluate", "missing"]) == 2
    assert "there is no run 'missing'" in capsys.readouterr().err


@pytest.mark.parametrize("name", scenario.known())
def test_the_scenarios_that_privet_brings_can_be_read(name):
    found = scenario.read(name)
    assert (found.name, bool(found.title)) == (name, True)
    assert tomli_w.dumps(found.model_dump(mode="json", exclude_none=True))


def test_the_page_escapes_what_settings_say():
    name = written("escaped.toml", SCENARIO.replace("tiny people", "<script>x</script>"))
    found = scenario_run.compare(scenario.read(name), Path("runs"))
    assert "<script>" not in comparison_page.page(found)
