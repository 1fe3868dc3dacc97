"""Settings under the names they had before: read with a warning, never read as two things."""

import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
from pydantic import BaseModel

from privet.client.consent import policy as policies
from privet.client.consent.policy_settings import Policy
from privet.commands import run
from privet.common import ab_test
from privet.common.ab_test import AbTestSettings
from privet.common.errors import ConfigError
from privet.common.settings import config as settings
from privet.common.settings import former_names
from privet.common.settings.config import Config, parse

FORMER = {
    "masking": {"survivors": 0.8, "smallest_cohort": 12},
    "groups": {"count": 2, "spare": 1, "smallest": 0.1},
    "rounds": {"spare": 5},
    "ab": {"looks": 3},
    "head": {"in_the_loop": False},
    "privacy": {"example": {"enabled": False}},
}
TODAY = {
    "secure_aggregation": {"survivors": 0.8, "min_cohort": 12},
    "clusters": {"count": 2, "extra": 1, "min_share": 0.1},
    "rounds": {"extra_releases": 5},
    "ab_test": {"looks": 3},
    "privacy": {"example": {"enabled": False}},
}


def _key(root: type[BaseModel], dotted: str) -> bool:
    kind: type[BaseModel] = root
    *sections, last = dotted.split(".")
    for name in sections:
        annotation = kind.model_fields[name].annotation
        assert isinstance(annotation, type)
        kind = annotation
    return last in kind.model_fields


@pytest.mark.parametrize(
    ("root", "names"),
    [
        (Config, former_names.CONFIG),
        (Policy, former_names.POLICY),
        (AbTestSettings, former_names.AB_TEST),
    ],
)
def test_every_name_of_today_is_a_key_and_no_former_one_is(root, names):
    for former, today in names.items():
        assert _key(root, today), today
        assert not _key(root, former), former


def test_former_names_are_read_with_a_warning_that_says_todays():
    with pytest.warns(former_names.FormerName) as caught:
        old = parse({**FORMER, "rounds": {"spare": 5, "count": 9}})
    assert old == parse({**TODAY, "rounds": {"extra_releases": 5, "count": 9}})
    said = {str(warning.message).split(" now;")[0] for warning in caught}
    assert said == {f"{former} is called {today}" for former, today in former_names.CONFIG.items()}


def test_a_key_under_both_names_is_refused():
    both = {"masking": {"survivors": 0.8}, "secure_aggregation": {"survivors": 0.9}}
    with pytest.raises(ConfigError, match="masking is called secure_aggregation now; both"):
        parse(both)


def test_a_key_that_is_no_more_is_dropped_where_it_said_nothing_and_refused_otherwise():
    nothing = {"arms": [], "arm_noise_multiplier": 7.0}
    assert parse({"head": {"in_the_loop": False}, "statistics": nothing}) == Config()
    with pytest.raises(ConfigError, match=r"head\.in_the_loop is no more: no part of privet"):
        parse({"head": {"in_the_loop": True}})
    with pytest.raises(ConfigError, match=r"statistics\.arms is no more: .*`privet ab`"):
        parse({"statistics": {"enabled": True, "arms": ["base", "shared"]}})


def test_an_override_may_have_a_former_name_and_changes_todays_section():
    table = {"secure_aggregation": {"survivors": 0.8}}
    with pytest.warns(former_names.FormerName, match="masking is called secure_aggregation"):
        changed = parse(table, overrides=["masking.smallest_cohort=11"])
    assert (changed.secure_aggregation.min_cohort, changed.secure_aggregation.survivors) == (
        11,
        0.8,
    )


def test_settings_that_are_no_table_are_answered_with_the_usual_sentence():
    with pytest.raises(ConfigError, match=r"clusters = 3: expected a section"), pytest.warns():
        parse({"groups": 3})


def test_a_runs_own_settings_are_read_without_a_warning(tmp_path: Path):
    (tmp_path / "config.toml").write_text("[masking]\nsmallest_cohort = 12\n", "utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert settings.of_run(tmp_path).secure_aggregation.min_cohort == 12


def test_an_owners_policy_of_before_still_limits(tmp_path: Path):
    path = tmp_path / "policy.toml"
    path.write_text("[limits]\nsmallest_noise = 2.5\n\n[when]\nlargest_load = 1.5\n", "utf-8")
    with pytest.warns(former_names.FormerName):
        own = policies.read(path)
    assert (own.limits.min_noise, own.when.max_load) == (2.5, 1.5)


def test_an_ab_test_of_before_is_read(tmp_path: Path):
    path = tmp_path / "ab.toml"
    path.write_text("[masking]\nsurvivors = 0.9\n\n[made]\nmeans = [0.5, 0.7]\n", "utf-8")
    with pytest.warns(former_names.FormerName):
        read = ab_test.read(path)
    assert (read.secure_aggregation.survivors, read.simulated.means) == (0.9, (0.5, 0.7))


def test_the_command_line_warns_in_one_line(tmp_path: Path):
    words = ["simulate", "demo", "--set", "masking.smallest_cohort=2"]
    main = "from privet.commands import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", main, *words], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2
    warned, *_, last = done.stderr.splitlines()
    assert warned.startswith("warning: masking is called secure_aggregation now;")
    assert last == "  secure_aggregation.min_cohort = 2: expected greater than or equal to 3"


def test_a_commands_former_name_runs_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["personas", str(tmp_path / "none"), "--against", "none"]) == 2
    assert "`privet personas` is called `privet clusters` now" in capsys.readouterr().err


def test_every_configuration_that_comes_with_privet_has_names_of_today():
    for path in Path(settings.__file__).parents[2].glob("experiments/configs/*.toml"):
        table = tomllib.loads(path.read_text("utf-8"))
        assert former_names.with_names_of_today(table, former_names.CONFIG) == table
