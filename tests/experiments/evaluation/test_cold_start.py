"""cold_start.py: the curve over own labels, its controls and its verdicts."""

import json
from typing import Any

import numpy as np
import pytest
import torch

from privet.client.personal.label_head import LabelHead, fit_label_head, label_losses
from privet.client.simulated import SimulatedContext
from privet.client.training import records
from privet.commands import run as command
from privet.common.errors import ConfigError, DataError
from privet.common.settings.config import read
from privet.experiments.evaluation import cold_start
from privet.experiments.evaluation.cold_start import Newcomer, label_lines, picture
from privet.experiments.simulate import prepare

from ...tiny import population, tiny_config

WIDTH = 12
SHARED = LabelHead(torch.ones(1, WIDTH) / WIDTH, torch.zeros(1), "regression")
COUNTS = (0, 1, 2, 4, 8)


def people(count: int, taste: float, batch: float, per_group: int = 4, seed: int = 0):
    """Raters of batches: `taste` is a person's own offset, `batch` one that a batch shares."""
    rng = np.random.default_rng(seed)
    found = []
    for group in range(count // per_group):
        features = torch.tensor(rng.normal(size=(14, WIDTH))).float()
        common = batch * rng.normal()
        for member in range(per_group):
            noise = torch.tensor(0.5 * rng.normal(size=14)).float()
            labels = features.mean(1) + common + taste * rng.normal() + noise
            found.append(
                Newcomer(
                    f"{group}/{member}",
                    str(group),
                    (features[:8], labels[:8]),
                    (features[8:], labels[8:]),
                )
            )
    return found


def curve(people, shared, counts):
    return cold_start.curve(label_lines(people, shared, counts))


def test_with_a_taste_of_their_own_people_gain_from_two_labels_on_and_others_heads_do_not_do():
    found = curve(people(120, taste=2.0, batch=0.0), SHARED, COUNTS)
    assert found["beats_from"] == 2
    assert found["monotone"]
    assert found["people"] == 120
    assert found["groups"] == 30
    last = found["rows"][-1]
    assert last["personal_minus_global"]["mean"] < -2
    assert last["personal_minus_other"]["ci95"][1] < 0
    assert last["other"]["mean"] > last["global"]["mean"]


def test_what_only_the_batch_has_is_no_personal_gain():
    """Everybody gains, and somebody else's labels of the same batch serve as well."""
    found = curve(people(160, taste=0.0, batch=2.0), SHARED, COUNTS)
    last = found["rows"][-1]
    assert last["personal_minus_global"]["ci95"][1] < 0
    assert abs(last["personal_minus_other"]["mean"]) < 0.05
    assert found["beats_from"] is None


def test_nothing_to_learn_means_nothing_gained_and_little_lost():
    found = curve(people(120, taste=0.0, batch=0.0), SHARED, COUNTS)
    assert found["beats_from"] is None
    for row in found["rows"]:
        assert row["personal_minus_global"]["mean"] < 0.05


def test_no_label_and_one_label_leave_the_shared_head():
    rows = curve(people(16, taste=2.0, batch=0.0), SHARED, COUNTS)["rows"]
    for row in rows[:2]:
        assert row["personal"] == row["other"] == row["global"]
        assert (row["hurt"], row["chosen"]) == (0.0, {"global": 16})


def test_a_row_is_the_loss_of_heads_fitted_on_the_first_labels_of_oneself_and_of_the_next_one():
    some = people(8, taste=1.0, batch=1.0)
    row = curve(some, SHARED, COUNTS)["rows"][3]
    heads = [fit_label_head(one.own[0][:4], one.own[1][:4], SHARED) for one in some]
    own = [label_losses(head, *one.held_out).mean() for head, one in zip(heads, some, strict=True)]
    others = [heads[4 * (n // 4) + (n + 1) % 4] for n in range(8)]
    other = [label_losses(h, *one.held_out).mean() for h, one in zip(others, some, strict=True)]
    assert row["personal"]["mean"] == pytest.approx(float(np.mean(own)))
    assert row["other"]["mean"] == pytest.approx(float(np.mean(other)))


def test_a_curve_that_rises_beyond_chance_is_not_called_monotone(monkeypatch):
    worse = LabelHead(SHARED.weight, torch.full((1,), 9.0), "regression")
    real = fit_label_head

    def faulty(features, labels, shared):
        return worse if len(labels) == 4 else real(features, labels, shared)

    monkeypatch.setattr(cold_start, "fit_label_head", faulty)
    found = curve(people(40, taste=1.0, batch=0.0), SHARED, COUNTS)
    assert not found["monotone"]
    assert found["beats_from"] == 8


def test_groups_that_differ_widen_the_interval_over_groups_and_not_the_one_over_people():
    found = curve(people(160, taste=0.3, batch=2.0, per_group=16), SHARED, COUNTS)
    one = found["rows"][-1]["personal_minus_global"]
    width, wider = (np.diff(one[name])[0] for name in ("ci95", "ci95_groups"))
    assert wider > 1.5 * width


def test_people_with_too_few_labels_or_nobody_beside_them_are_left_out_and_counted():
    some = people(8, taste=1.0, batch=0.0)
    short = Newcomer("short", "0", tuple(part[:3] for part in some[0].own), some[0].held_out)
    lone = Newcomer("lone", "alone", some[0].own, some[0].held_out)
    found = curve([*some, short, lone], SHARED, COUNTS)
    assert found["people"] == 8
    with pytest.raises(DataError, match="0 of 1 people"):
        curve([lone], SHARED, COUNTS)


@pytest.mark.parametrize("counts", [(), (1, 2), (0, 2, 2), (0, 4, 2)])
def test_counts_that_do_not_ascend_from_zero_are_refused(counts):
    with pytest.raises(ConfigError, match="ascending"):
        curve(people(8, 1.0, 0.0), SHARED, counts)


def test_the_picture_names_its_curves_and_needs_no_style_sheet():
    drawn: Any = {"unit": "squared error", **curve(people(12, 1.0, 0.0), SHARED, COUNTS)}
    text = picture(drawn)
    assert text.startswith("<svg")
    assert "var(--" not in text
    for name in ("global", "personal", "other", "own labels"):
        assert name in text


@pytest.fixture
def rated(tmp_path, bert_folder, monkeypatch):
    """A run folder of ratings whose adapter is as at the start."""
    source = population(tmp_path, 12, 12, True)
    config = tiny_config(bert_folder, source, data={"test_clients": 5, "records_per_client": 8})
    prepare(config, tmp_path / "run", resume=False)
    start = SimulatedContext.open(tmp_path / "run").trainer.adapter.start
    monkeypatch.setattr(cold_start, "global_adapter", lambda _: start)
    return tmp_path / "run"


def test_of_a_run_only_people_never_trained_on_are_measured_on_their_later_records(rated):
    config, found = read(rated / "config.toml"), []

    def seen(newcomers, *_):
        found.extend(newcomers)
        return []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cold_start, "label_lines", seen)
        assert cold_start.cold_start(rated, config)["left_out"] == len(found)
    index = records.read_index(rated)
    assert [one.name for one in found] == list(index.test_users)
    own, held = records.split(records.read_user(rated, found[0].name, index), config.data.holdout)
    assert found[0].own[1].tolist() == pytest.approx([one.label for one in own])
    places = records.spread(len(held), config.evaluation.records)
    assert found[0].held_out[1].tolist() == pytest.approx([held[place].label for place in places])


def test_the_command_writes_table_picture_and_json_and_tells_what_is_wrong(
    rated, capsys, tmp_path, monkeypatch
):
    assert command(["coldstart", str(rated)]) == 2
    assert "20 own records" in capsys.readouterr().err
    real = cold_start.cold_start
    few = (0, 1, 2, 4)
    monkeypatch.setattr(cold_start, "cold_start", lambda folder, config: real(folder, config, few))
    out = tmp_path / "out"
    assert command(["coldstart", str(rated), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "personal - other" in said
    assert "no epsilon covers" in said
    assert command(["coldstart", str(rated), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((out / "cold-start.json").read_text())
    assert (out / "cold-start.svg").read_text().startswith("<svg")


def test_a_run_that_makes_text_is_refused(tmp_path, llama_folder, capsys):
    config = tiny_config(llama_folder, population(tmp_path, 12, 12))
    prepare(config, tmp_path / "run", resume=False)
    assert command(["coldstart", str(tmp_path / "run")]) == 2
    assert "needs a run with labels" in capsys.readouterr().err
