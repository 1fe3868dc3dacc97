"""The owner's side of an A/B experiment: which arm the chat answers with, what is an outcome."""

import io
import json
import time

import pytest

from privet import commands as main
from privet.client.assistant.device_chat import VaultRecorder, assistant_of
from privet.client.enrolled import ab_assignment
from privet.client.store import device_store as homes
from privet.client.store import verdicts
from privet.client.store.device_store import DeviceStore
from privet.common.settings.config import Config, to_toml

from ..assistant.test_chat import SHORT, command, home
from .test_field_ab import config_of
from .test_participant import RUN as TRAINED
from .test_participant import allow, cheap

__all__ = ["cheap", "home"]

RUN = "templates-1"


def agreed(home: DeviceStore, arms: tuple[str, ...], run: str = RUN) -> Config:
    """The owner has said yes to an experiment with these arms."""
    config = config_of(arms=list(arms))
    for before, after in (
        ("min_cohort = 10", "min_cohort = 3"),
        ("colluding = 0.1", "colluding = 0.0"),
        ("min_noise = 1.0", "min_noise = 0.5"),
    ):
        if before in (home.folder / homes.POLICY).read_text():
            allow(home, before, after)
    home.receive(run, to_toml(config))
    home.agree(home.run(run)[0], "owner")
    return config


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every device is in the second arm."""
    monkeypatch.setattr(ab_assignment, "arm_of", lambda *_: 1)


@pytest.mark.usefixtures("second")
def test_the_chat_answers_with_the_arms_template_from_the_yes_until_the_end(home: DeviceStore):
    def used() -> tuple[str, str]:
        found = assistant_of(home, TRAINED, None, "none", SHORT)
        return found.template.name, found.ab_run

    assert used() == ("memory", "")
    agreed(home, ("memory", "notes@1.0.0"))
    assert used() == ("notes", RUN)
    home.withdraw(home.run(RUN)[0])
    assert used() == ("memory", "")
    home.agree(home.run(RUN)[0], "owner")
    home.keep(RUN, {})
    assert used() == ("memory", "")


@pytest.mark.usefixtures("second")
def test_an_arm_is_in_use_for_the_days_that_were_agreed_to_and_no_longer(
    home: DeviceStore, monkeypatch: pytest.MonkeyPatch
):
    agreed(home, ("memory", "notes"))
    since = time.time()
    assert ab_assignment.current(home) == ab_assignment.AbAssignment(
        RUN, config_of(arms=["memory", "notes"]).ab_test, "notes"
    )
    for days, there in ((29.9, True), (30.1, False)):
        monkeypatch.setattr(
            "privet.client.enrolled.ab_assignment.time.time", lambda d=days: since + d * 86400
        )
        assert (ab_assignment.current(home) is not None) == there


def test_the_experiment_agreed_to_last_counts(home: DeviceStore):
    agreed(home, ("memory", "notes"), "first")
    agreed(home, ("memory", "portrait"), "second")
    home.withdraw(home.run("first")[0])
    home.agree(home.run("first")[0], "owner")
    found = ab_assignment.current(home)
    assert found is not None
    assert found.run == "first"


@pytest.mark.usefixtures("second")
def test_the_arm_without_the_head_is_the_shared_model_with_the_same_template(home: DeviceStore):
    assert assistant_of(home, TRAINED, None, "none", SHORT).head is not None
    agreed(home, ("personal", "shared"))
    found = assistant_of(home, TRAINED, None, "none", SHORT)
    assert (found.head, found.template.name, found.ab_run) == (None, "memory", RUN)
    agreed(home, ("shared", "personal"), "turned")
    found = assistant_of(home, TRAINED, None, "none", SHORT)
    assert (found.head is None, found.ab_run) == (False, "turned")


@pytest.mark.usefixtures("second")
def test_a_template_this_device_has_not_and_one_the_owner_asks_for_are_no_arm(home: DeviceStore):
    agreed(home, ("memory", "letters"))
    found = assistant_of(home, TRAINED, None, "none", SHORT)
    assert (found.template.name, found.ab_run) == ("memory", "")
    agreed(home, ("memory", "notes"), "other")
    found = assistant_of(home, TRAINED, "memory", "none", SHORT)
    assert (found.template.name, found.ab_run) == ("memory", "")


@pytest.mark.usefixtures("second")
def test_verdicts_of_a_chat_in_an_arm_are_its_outcome_and_no_others(
    home: DeviceStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    config = agreed(home, ("memory", "notes"))
    assert ab_assignment.outcome(home, RUN, config.ab_test) is None
    text = home.records()[0].text
    lines = f"{text[:5]}\n:accept\n:global\n:reject\n{text[:9]}\n:edit something else\n:accept\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert main.run(command(home, TRAINED, "--encoder", "none", "--json")) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (said[0]["from"]["template"], said[0]["from"]["experiment"]) == ("notes 1.0.0", RUN)
    every = verdicts.kept(home).values()
    assert [(one.run, one.taken) for one in every] == [
        (RUN, True), (RUN, False), (RUN, False), (RUN, False), (RUN, True),
    ]  # fmt: skip
    VaultRecorder(home)("accept", "ba", "da", over=None, edited=None, taken=True)
    assert ab_assignment.outcome(home, RUN, config.ab_test) == 0.4
    assert (
        ab_assignment.outcome(home, RUN, config.ab_test.model_copy(update={"outcome": "binary"}))
        == 0.0
    )
    verdicts.forget(home, [2, 3])
    assert ab_assignment.outcome(home, RUN, config.ab_test) == 2 / 3
    assert (
        ab_assignment.outcome(home, RUN, config.ab_test.model_copy(update={"outcome": "binary"}))
        == 1.0
    )
    assert ab_assignment.outcome(home, "another", config.ab_test) is None


def test_a_verdict_kept_by_an_earlier_privet_is_of_no_experiment(home: DeviceStore):
    old = {"format": 1, "kind": "accept", "prompt": "", "answer": "ba", "over": None,
           "edited": None, "time": 1.0}  # fmt: skip
    home.vault.put("feedback/00000001", json.dumps(old).encode())
    assert verdicts.kept(home)[1] == verdicts.Verdict("accept", "", "ba", time=1.0)


@pytest.mark.usefixtures("second")
def test_the_owner_sees_what_an_experiment_asks_and_costs_and_the_own_arm_before_the_yes(
    home: DeviceStore, capsys: pytest.CaptureFixture[str]
):
    config = config_of(arms=["memory", "letters"], looks=2, hours=12.0)
    home.receive(RUN, to_toml(config))
    words = ["client", "runs", RUN, "--home", str(home.folder), "--passphrase-file",
             str(home.folder.parent / "pass")]  # fmt: skip
    assert main.run([*words, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["asks"]
    said = {label: text for label, text in rows if label != "refused"}
    assert "one of memory, letters" in said["experiment"]
    assert "nothing is trained" in said["experiment"]
    assert "12 hours or more before each" in said["looks"]
    assert "only this device's share" in said["noise"]
    assert "your budget over all runs 10" in said["epsilon, client-level"]
    assert "after 2" in said["epsilon, client-level"]
    claim, _, broken = said["epsilon, client-level"].partition("should they fail")
    assert "against the server: about 5.30 after 1 release" in claim  # a closed directory
    assert "that is if the masks hold" in claim
    assert "about 10.25 after 1 release" in broken
    assert not {"base model", "adapter", "work"} & set(said)
    assert "there is no template 'letters'" in said["your arm"]
    assert said["your outcome"] == "none yet"
    assert not any(name.startswith("model.base") for name, _ in rows)
    assert main.run([*words, "--agree"]) == 2  # the policy's smallest cohort
