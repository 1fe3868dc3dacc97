"""`import privet`: what a program does with it, from settings to a report."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import privet

from .tiny import population, tiny_config


def test_the_names_of_the_package_are_all_there_and_unknown_ones_are_told():
    assert [name for name in privet.__all__ if not hasattr(privet, name)] == []
    assert set(privet.__all__) == set(dir(privet))
    with pytest.raises(AttributeError, match="'privet' has no attribute 'simulator'"):
        privet.simulator  # noqa: B018


def test_importing_privet_and_asking_for_an_epsilon_loads_no_torch():
    code = (
        "import sys, privet; charge = privet.Charge('client', 'analyst', 'add_remove', 1.0); "
        "print(privet.__version__, round(privet.epsilon([charge], 1e-5), 2), "
        "sorted({'torch', 'flwr', 'opacus', 'peft', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{privet.__version__} 4.38 []\n"


def test_a_noise_multiplier_is_calibrated_to_the_epsilon_it_gives():
    multiplier = privet.calibrate(4.0, 1e-5, participations=3, adjacency="add_remove")
    charges = [privet.Charge("client", "analyst", "add_remove", multiplier, steps=3)]
    assert privet.epsilon(charges, 1e-5) == pytest.approx(4.0, rel=1e-3)


def test_settings_come_by_name_from_a_file_and_from_a_table(tmp_path: Path):
    changes = {"rounds.count": 2, "name": "mine", "adapter.modules": ["q_proj"]}
    named = privet.load_config("demo", overrides=changes)
    assert (named.rounds.count, named.name) == (2, "mine")
    (tmp_path / "own.toml").write_text("[rounds]\ncount = 3\n")
    assert privet.load_config(tmp_path / "own.toml").rounds.count == 3
    table = {"rounds": {"count": 4}}
    assert privet.load_config(table, {"rounds.cohort": 12}).rounds.cohort == 12
    assert table == {"rounds": {"count": 4}}


@pytest.mark.parametrize(
    ("config", "overrides", "said"),
    [
        ("nope", {}, "there is no configuration 'nope'"),
        ("demo", {"rounds.cuont": 1}, "rounds.cuont: unknown key; did you mean count"),
        ("demo", {"rounds.count": object()}, "rounds.count = .*: expected what TOML can hold"),
        ("demo", {"rounds.count=3 #": 1}, "expected section.key and one value"),
        ("demo", {"privacy.budget": {"client": 2.0}}, "expected section.key and one value"),
        ({"rounds": {"count": "x"}}, {}, "rounds.count = 'x'"),
    ],
)
def test_a_wrong_setting_is_a_sentence(config, overrides, said):
    with pytest.raises(privet.PrivetError, match=said):
        privet.load_config(config, overrides)


def test_a_run_from_settings_to_its_figures(llama_folder: Path, tmp_path: Path):
    config = tiny_config(llama_folder, population(tmp_path, 9, 10))
    run = privet.simulate(config, tmp_path / "run")
    assert run.summary["rounds"] == config.rounds.count
    assert run.privacy["lines"]
    assert (run.adapter_folder / "adapter_config.json").is_file()
    losses = privet.evaluate(run)
    assert losses["seen"]["users"]
    assert losses == json.loads((run.folder / "evaluation.json").read_text())
    assert run.report() == privet.report(run.folder) == run.folder / "report.html"
    assert privet.Run.open(run.folder).config == run.config
    with pytest.raises(privet.PrivetError, match="there is no run"):
        privet.evaluate(tmp_path / "other")
    (run.folder / "summary.json").unlink()
    with pytest.raises(privet.PrivetError, match="has no report yet"):
        run.summary  # noqa: B018
