"""`privet server ab` with a server and four devices that are processes of their own, over TLS."""

import json
from functools import partial
from pathlib import Path

import pytest

from privet.client.assistant.device_chat import VaultRecorder
from privet.client.enrolled import ab_assignment
from privet.client.store.device_store import ME, DeviceStore
from privet.commands import run as command
from privet.common.files import read_lines
from privet.common.privacy.accounting import epsilon
from privet.common.secure_aggregation.keys import Directory, write_directory
from privet.common.settings.config import parse, to_toml
from privet.server.ab_estimates import device_settings
from privet.server.operations import setup

from ...client.enrolled.test_field_ab import experiment
from ...client.enrolled.test_participant import PHASES
from ...fleet import running, until

EXPERIMENT = """
name = "templates"
arms = ["memory", "notes"]
outcome = "bounded"
clients = 4
looks = 2
hours = 0.005            # eighteen seconds: the arms are in use, verdicts come in

[privacy]
epsilon = 4.0

[secure_aggregation]
min_cohort = 3
colluding = 0.0

[devices]
gather_s = 120.0
"""


def ended(home: DeviceStore) -> bool:
    """Whether no arm is in use any more."""
    return ab_assignment.current(home) is None


@pytest.mark.heavy
def test_a_server_and_four_devices_take_two_looks_of_which_each_is_paid_for(
    tmp_path: Path, llama_folder: Path
):
    (tmp_path / "ab.toml").write_text(EXPERIMENT)
    with running(tmp_path, llama_folder) as fleet:
        started = fleet.privet("server", "ab", str(fleet.server.folder), str(tmp_path / "ab.toml"))
        place = fleet.server.folder / "runs" / "templates"
        until((place / "run-id").exists, 120, "the run folder")
        run = (place / "run-id").read_text().strip()
        for number, person in enumerate(fleet.people):
            with person.open() as home:
                until(partial(ab_assignment.current, home), 300, "an arm")
                record = VaultRecorder(home, run)
                for taken in (True, number % 2 == 0):
                    kind = "accept" if taken else "reject"
                    record(kind, "ba", f"be {taken}", over=None, edited=None, taken=taken)
        said, _ = started.communicate(timeout=1200)
        print(said)
        assert started.returncode == 0, said + fleet.said()
        shown = read_lines(place / "rounds.jsonl")
        assert [(one["answered"], one["void"]) for one in shown] == [(4, False)] * 2, fleet.said()
        assert [one["look"]["look"] for one in shown] == [1, 2]
        assert "look 2: 4 devices answered; 97.5 % intervals" in said
        assert "has spent at most epsilon 4 at delta 1e-05, client-level, add_remove" in said
        assert "noise distributed, against the analyst and the server" in said
        for person in fleet.people:
            with person.open() as home:
                assert [(row.run, row.round) for row in home.ledger.rows(ME)] == [
                    (run, 1),
                    (run, 2),
                ]
                spent = [one for one in home.ledger.charges(ME) if one.against == "server"]
                assert 3.8 < epsilon(spent, 1e-5) <= 4.0
                sent = [(one.round, one.phase) for one in home.outbox()]
                assert sent == [(look, phase) for look in (1, 2) for phase in PHASES]
                until(partial(ended, home), 30, "the end of the arm")


def test_wrong_experiments_are_answered_with_a_sentence_and_leave_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    server = setup.init(tmp_path / "server", ["localhost"])
    known = {number: bytes([number + 1]) * 32 for number in range(3)}
    write_directory(server.folder / "directory", Directory(known, closed=True))
    path, fewer = tmp_path / "ab.toml", EXPERIMENT.replace("clients = 4", "clients = 3")
    for text, sentence in (
        (EXPERIMENT, "clients = 4, but 3 devices are enrolled"),
        (fewer.replace('["memory", "notes"]', '["A", "B"]'), "an arm is a template"),
        (EXPERIMENT.replace("looks", "look"), "did you mean looks?"),
    ):
        path.write_text(text)
        assert command(["server", "ab", str(server.folder), str(path)]) == 2
        assert sentence in capsys.readouterr().err
    path.write_text(to_toml(device_settings(experiment(), 4)))
    assert command(["server", "run", str(server.folder), str(path)]) == 2
    assert "privet server ab" in capsys.readouterr().err
    assert list((server.folder / "runs").iterdir()) == []


def test_a_run_without_arms_is_no_ab_test():
    plain = parse({"data": {"clients": 64}})
    assert plain.ab_run is None
    assert json.loads(plain.model_dump_json())["ab_test"]["arms"] == []
