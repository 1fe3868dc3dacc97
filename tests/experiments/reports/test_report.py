"""Page, terminal and JSON give the same true facts, whatever the data holds."""

import io
import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from rich.console import Console

from privet.common.errors import LedgerCorrupt, StateError
from privet.common.privacy.accounting import epsilon
from privet.common.settings.config import Config, parse
from privet.experiments.reports import pictures, privacy_facts, report, terminal
from privet.experiments.reports.facts import Evaluation, Facts, Measured
from privet.experiments.reports.html_page import page
from privet.experiments.reports.summary import build_summary

from ...fake_run import fake_config, fake_evaluation, fake_run

MEASURED: Measured = {
    "seconds": {"total": 431.0, "training": 402.0, "overhead": 6.0},
    "peak_rss_bytes": 2_100_000_000,
    "upload_bytes_per_client_round": 3072,
    "dimension": 768,
    "versions": {"privet": "0.1.0"},
}
VOID = {"meta", "br", "hr", "img", "link", "input", "col"}


class Reader(HTMLParser):
    """Collects what a browser would see, and faults of nesting and of ids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.ids: list[Any] = []
        self.sources: list[Any] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = dict(attrs)
        self.ids += [found["id"]] if "id" in found else []
        self.sources += [found[name] for name in ("src", "href", "xlink:href") if name in found]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    folder = fake_run(tmp_path_factory.mktemp("runs") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(privacy_facts, "cross_check", second)
        return report.report_facts(folder, MEASURED)


@pytest.fixture(autouse=True)
def quick_second_opinion(monkeypatch):
    """The PRV accountant takes a second a line; its own tests are elsewhere."""
    monkeypatch.setattr(privacy_facts, "cross_check", second)


def second(charges, delta):
    return "same", epsilon(charges, delta)


def client_only(**changes: Any) -> Config:
    """Without the example level, whose accountant is slow."""
    off = {"example": {"enabled": False}, **changes.pop("privacy", {})}
    return fake_config(privacy=off, **changes)


def shown(facts: Facts, width: int = 100) -> str:
    printed = io.StringIO()
    terminal.show(facts, Console(file=printed, width=width, color_system=None))
    return printed.getvalue()


def test_the_summary_has_every_key_that_was_agreed(facts):
    summary = facts["summary"]
    assert summary["schema"] == 1
    assert summary["adapter"] == {"family": "lora_xs", "dimension": 768}
    wanted = {"dataset", "base_model", "clients", "rounds", "cohort", "metrics", "privacy"}
    wanted |= {"upload_bytes_per_client_round", "seconds", "peak_rss_bytes", "versions"}
    assert wanted <= set(summary)
    metrics = {"name", "unit", "base", "global", "personal", "swapped_head", "fraction_hurt"}
    assert metrics | {"win_rate_personal_over_global", "p10_gain"} <= set(summary["metrics"])
    line = {"unit", "epsilon", "delta", "adjacency", "noise_at", "participations_max"}
    line |= {"holds_against", "assumptions", "amplified", "cross_check"}
    assert all(line <= set(found) for found in summary["privacy"])


def test_the_facts_are_json_without_infinity(facts):
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts


def test_the_three_differences_have_means_of_paired_users(facts):
    evaluation = fake_evaluation(fake_config())
    found = facts["summary"]["differences"]
    names = (
        "base_minus_global_unseen",
        "global_minus_personal_seen",
        "swapped_minus_personal_seen",
    )
    for name in names:
        pair, _, group = name.rpartition("_")
        worse, better = pair.split("_minus_")
        losses = evaluation[group]
        left = losses["swapped_head" if worse == "swapped" else worse]
        mean = sum(a - b for a, b in zip(left, losses[better], strict=True)) / len(left)
        assert found[name]["mean"] == pytest.approx(mean)
        low, high = found[name]["ci95"]
        assert low < mean < high


def test_a_control_that_only_some_data_sets_have_is_compared_too():
    evaluation: Any = fake_evaluation(fake_config())
    evaluation["seen"]["same_batch_rater"] = [x + 0.01 for x in evaluation["seen"]["personal"]]
    bare: Any = {"private": True, "rounds": [], "lines": []}
    found: Any = build_summary(fake_config(), bare, evaluation, {})
    assert found["differences"]["same_batch_rater_minus_personal_seen"]["mean"] == pytest.approx(
        0.01
    )
    assert "same_batch_rater" in found["metrics"]


def test_hurt_people_are_counted_as_hurt_and_ties_are_not():
    losses: Any = {"users": list("abcd"), "global": [1.0] * 4, "personal": [0.5, 1.0, 1.5, 0.9]}
    evaluation: Evaluation = {"name": "nats per token", "seen": losses}
    bare: Any = {"private": True, "rounds": [], "lines": []}
    metrics: Any = build_summary(fake_config(), bare, evaluation, {})["metrics"]
    assert metrics["fraction_hurt"] == 0.25
    assert metrics["ties"] == 0.25


@pytest.mark.parametrize("value", [float("nan"), None, "x"])
def test_a_loss_that_is_no_number_is_refused_with_the_user(value):
    losses = {"users": ["a", "b"], "global": [1.0, value]}
    bare: Any = {"private": True, "rounds": [], "lines": []}
    with pytest.raises(StateError, match=r"seen\.global of user 'b'"):
        build_summary(fake_config(), bare, {"name": "n", "seen": losses}, {})


def test_lists_that_do_not_fit_the_users_are_refused():
    losses: Any = {"users": ["a", "b"], "global": [1.0]}
    bare: Any = {"private": True, "rounds": [], "lines": []}
    with pytest.raises(StateError, match="1 values for 2 users"):
        build_summary(fake_config(), bare, {"name": "n", "seen": losses}, {})


def test_one_evaluated_person_gives_no_interval_and_still_a_page(tmp_path):
    folder = fake_run(tmp_path / "run", client_only(evaluation={"users": 1}), rounds=1)
    found: Any = report.write(folder, MEASURED)
    assert found["summary"]["differences"]["global_minus_personal_seen"]["ci95"] is None
    shown(found)


def test_write_leaves_three_files_that_agree_with_the_json(tmp_path):
    folder = fake_run(tmp_path / "run", client_only(), rounds=2)
    found = report.write(folder, MEASURED)
    assert json.loads((folder / "privacy.json").read_text()) == found["privacy"]
    assert json.loads((folder / "summary.json").read_text()) == found["summary"]
    assert (folder / "report.html").read_text() == page(found)
    assert report.report_facts(folder) == found  # measured figures come back from summary.json


def test_the_page_is_one_well_formed_file_that_loads_nothing(facts):
    seen = Reader(page(facts))
    assert seen.open == []
    assert "script" not in seen.tags
    assert not {"img", "link", "iframe"} & set(seen.tags)
    assert all(source.startswith("#") for source in seen.sources)
    assert len(seen.ids) == len(set(seen.ids))
    assert seen.tags.count("svg") == 5


def test_every_picture_has_words_for_people_who_do_not_see_it(facts):
    for picture in re.findall(r"<svg [^>]*>", page(facts)):
        assert 'role="img"' in picture
        assert re.search(r'aria-label="[^"]{30,}"', picture)


def test_pictures_take_their_colours_from_the_page_so_that_dark_mode_works(facts):
    pieces = re.findall(r"<svg .*?</svg>", page(facts), flags=re.DOTALL)
    assert not any(re.search(r"#[0-9a-f]{6}\b", piece) for piece in pieces)
    assert all("var(--ink)" in piece for piece in pieces)


def test_the_first_line_has_epsilon_unit_adjacency_delta_noise_and_adversary(facts):
    head = "".join(Reader(page(facts).split("</header>")[0]).words)
    for part in ("6.57", "client-level", "add_remove", "1e-05", "added by the server", "analyst"):
        assert part in head
    assert "does not hold against an honest but curious server" in head


def test_the_questions_are_answered_in_order(facts):
    titles = re.findall(r"<h2>(.*?)</h2>", page(facts))
    assert [title.split(".")[0] for title in titles[:4]] == ["1", "2", "3", "4"]
    for word, title in zip(("promised", "spent", "Against whom", "got"), titles, strict=False):
        assert word in title


def test_every_epsilon_of_the_facts_is_on_the_page_and_in_the_terminal(facts):
    text, printed = page(facts), shown(facts)
    for line in facts["privacy"]["lines"]:
        assert f"{line['epsilon']:.2f}" in text
        assert f"{line['epsilon']:.2f}" in printed


def test_names_from_data_cannot_break_out_of_the_page(tmp_path):
    bad = '<script>alert("1")</script> & <b>\\1 "q" \''
    config = parse(
        {**client_only().model_dump(exclude_none=True), "data": {"clients": 60, "source": bad}}
    )
    folder = fake_run(tmp_path / "run", config, rounds=1)
    found: Any = report.report_facts(folder, MEASURED)
    found["privacy"]["lines"][0]["client"] = bad
    found["privacy"]["declined"] = {bad: 1}
    found["summary"]["metrics"]["unit"] = bad
    text = page(found)
    assert "<script" not in text
    assert "<b>" not in text
    assert Reader(text).open == []


def test_a_test_seed_is_a_red_banner_on_the_page_and_in_the_terminal(tmp_path):
    folder = fake_run(tmp_path / "run", client_only(insecure_test_seed=1), rounds=1)
    found = report.report_facts(folder, MEASURED)
    text = page(found)
    assert text.index('class="banner"') < text.index("<h1>Not private</h1>")
    assert "NOT PRIVATE" in shown(found)
    assert "is protected with" not in text


def test_a_private_run_has_no_banner(facts):
    assert 'class="banner"' not in page(facts)


def test_a_run_under_way_has_a_privacy_report_and_says_that_nothing_was_evaluated(tmp_path):
    folder = fake_run(tmp_path / "run", client_only(), rounds=1, evaluated=False)
    found = report.report_facts(folder)
    assert found["summary"]["metrics"] is None
    assert found["summary"]["rounds"] == 1
    assert "No evaluation was done" in page(found)
    assert "No evaluation was done" in shown(found)


def test_a_run_that_released_nothing_yet_has_a_page(tmp_path):
    folder = fake_run(tmp_path / "run", rounds=0, evaluated=False)
    assert "Nothing has been released yet" in page(report.report_facts(folder))


def test_evaluation_without_personal_heads_has_a_page(tmp_path):
    folder = fake_run(tmp_path / "run", client_only(), rounds=1)
    path = folder / "evaluation.json"
    evaluation = json.loads(path.read_text())
    del evaluation["seen"]["personal"], evaluation["seen"]["swapped_head"]
    path.write_text(json.dumps(evaluation))
    found = report.report_facts(folder)
    assert "No personal heads were measured" in page(found)
    shown(found)


def test_a_damaged_evaluation_is_named(tmp_path):
    folder = fake_run(tmp_path / "run", client_only(), rounds=1)
    (folder / "evaluation.json").write_text('{"name": ')
    with pytest.raises(StateError, match=r"evaluation\.json.*privet evaluate"):
        report.report_facts(folder)


def test_a_cut_ledger_writes_nothing(tmp_path):
    folder = fake_run(tmp_path / "run", client_only(), rounds=1)
    (folder / "ledgers.sqlite").write_bytes((folder / "ledgers.sqlite").read_bytes()[:5000])
    with pytest.raises(LedgerCorrupt):
        report.write(folder, MEASURED)
    assert not (folder / "report.html").exists()
    assert not (folder / "privacy.json").exists()


def test_the_terminal_keeps_to_its_width(facts):
    assert max(map(len, shown(facts, width=72).splitlines())) <= 72


def test_hurt_people_have_their_own_colour():
    drawn = pictures.gains_per_user([0.2, 0.1, -0.1], 0.07, [0.0, 0.1], "nats")
    colours = [bar.get_facecolor()[:3] for bar in drawn.axes[0].patches[:3]]
    assert colours[0] == colours[1] != colours[2]


def test_a_picture_is_the_same_bytes_each_time():
    once, again = (
        pictures.svg(pictures.gains_per_user([0.2, -0.1], 0.05, [0.0, 0.1], "nats"), "gain", "alt")
        for _ in range(2)
    )
    assert once == again


@pytest.mark.parametrize("count", [1, 2, 13, 5000])
def test_the_clients_of_a_histogram_are_all_in_it(count):
    values = [place * 0.001 for place in range(count)]
    _, heights, _ = pictures._histogram(values, 5.0)
    assert sum(heights) == count
