"""Gains and A/B outcomes in the page, the terminal, the live line and TensorBoard."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from privet.common.files import read_lines
from privet.experiments import progress
from privet.experiments.reports import report, terminal
from privet.experiments.reports.html_page import page
from privet.server.round_statistics import statistics_of

from ...client.privacy.test_measured_blocks import configured, planned
from ...fake_run import fake_config, fake_run
from .test_report import MEASURED, Reader

OFF = {"example": {"enabled": False}}


def of_round(number: int, noisy: bool = False) -> dict[str, Any]:
    """What a server says of 400 devices; `noisy`: of sums that the noise outweighs."""
    plan = planned(configured("server", example=False))
    sums = {
        "losses": np.array([300.0, 600.0]),
        "gains": np.array([80.0 + 5 * number, 20.0, 400.0]),
    }
    scale = 0.01 if noisy else 1.0
    return statistics_of({name: scale * values for name, values in sums.items()}, plan, 400)


def with_statistics(folder: Path, noisy: tuple[int, ...] = ()) -> Path:
    """A run of four rounds, each with statistics."""
    run = fake_run(folder, fake_config(privacy=OFF))
    lines = read_lines(run / "rounds.jsonl")
    for line in lines:
        number = int(line["round"])
        line["statistics"] = of_round(number, number in noisy)
        line |= {"void": False, "mean_norm": 0.1, "update_norm": 0.2, "seconds": 1.0}
    (run / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def shown(facts: Any) -> str:
    printed = io.StringIO()
    terminal.show(facts, Console(file=printed, width=110, color_system=None))
    return printed.getvalue()


@pytest.mark.parametrize("noisy", [(), (2,), (4,), (1, 2, 3, 4)])
def test_page_and_terminal_say_what_every_round_said_and_stay_quiet_where_noise_wins(
    tmp_path, noisy
):
    run = with_statistics(tmp_path / "run", noisy)
    facts = report.report_facts(run, MEASURED)
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert [row["round"] for row in facts["statistics"]] == [1, 2, 3, 4]
    seen = Reader(page(facts))
    assert seen.open == []
    assert len(seen.ids) == len(set(seen.ids))
    assert seen.tags.count("svg") == 6
    words, said = " ".join(seen.words), " ".join(shown(facts).split())
    assert "What the rounds' noised sums say" in words
    assert "What the rounds' noised sums say" in said
    last = facts["statistics"][-1]
    if 4 in noisy:
        assert last["gain_shared"] is None
    else:
        assert f"{last['gain_shared']:.3g} ± {last['gain_shared_std']:.2g}" in said


def test_a_run_without_statistics_has_no_section_on_them(tmp_path):
    facts = report.report_facts(fake_run(tmp_path / "run", fake_config(privacy=OFF)), MEASURED)
    assert facts["statistics"] == []
    assert "noised sums say" not in page(facts)
    assert "noised sums say" not in shown(facts)


def test_the_live_line_says_gains_where_the_noise_leaves_them():
    record: Any = {"round": 1, "asked": 4, "answered": 4, "declined": 0, "void": False}
    record |= {"mean_norm": 0.1, "update_norm": 0.2, "seconds": 1.0}
    said = progress.line(record | {"statistics": of_round(1)}, 2)
    assert "noised gain +0.106 +- " in said
    assert "noised head +0.025 +- " in said
    quiet = progress.line(record | {"statistics": of_round(1, noisy=True)}, 2)
    assert "gain lost in the noise" in quiet


def test_tensorboard_has_a_curve_for_every_statistic_that_is_a_number(tmp_path):
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="tensorboard is not installed (privet[dev])",
    )
    run = with_statistics(tmp_path / "run", noisy=(2,))
    report.write(run, MEASURED)
    progress.tensorboard(run)
    accumulator = events.EventAccumulator(str(run / "tensorboard"))
    accumulator.Reload()
    tags = set(accumulator.Tags()["scalars"])
    assert {"statistics/gain_shared", "statistics/gain_personal_std"} <= tags
    written = [(event.step, event.value) for event in accumulator.Scalars("statistics/gain_shared")]
    truth = [(number, of_round(number)["gain_shared"]) for number in (1, 3, 4)]
    assert [step for step, _ in written] == [1, 3, 4]  # the noise won round 2
    assert [value for _, value in written] == pytest.approx([value for _, value in truth])
