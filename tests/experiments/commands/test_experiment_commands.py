"""experiment.py: bad input is one sentence and exit code 2; whole runs by command."""

import json
import math
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from privet import commands as main
from privet.common.files import read_lines
from privet.common.settings.config import to_toml

from ...tiny import population, tiny_config


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every command runs in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def written(place: Path, llama_folder: Path) -> Path:
    """A configuration that works, as tiny.toml, with nine people."""
    path = place / "tiny.toml"
    path.write_text(to_toml(tiny_config(llama_folder, population(place / "people", 10, 8))))
    return path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence of a refused command; nothing on standard output, nothing written."""
    before = files()
    capsys.readouterr()
    code = main.run(list(arguments))
    said = capsys.readouterr()
    assert (code, said.out) == (2, ""), said
    assert "Traceback" not in said.err
    assert said.err.startswith("privet: ")
    assert said.err.count("privet: ") == 1
    assert files() == before
    return said.err


def files() -> list[str]:
    """All below `runs`, and whether there is one; SQLite's own files of an open ledger left out."""
    found = [str(path) for path in Path().rglob("runs/**")]
    return sorted(name for name in found if not name.endswith(("-wal", "-shm")))


def sets(*changes: str) -> list[str]:
    return [word for change in changes for word in ("--set", change)]


# --- settings ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("written")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("adapter.rank=0", r"adapter\.rank = 0: expected greater than or equal to 1"),
        ("privacy.client.clip=0", r"privacy\.client\.clip = 0: expected greater than 0"),
        ("privacy.example.clip=0", r"privacy\.example\.clip = 0: expected greater than 0"),
        ("privacy.client.noise_multiplier=-1", r"noise_multiplier = -1: expected greater"),
        ("privacy.client.noise_multiplier=nan", r"noise_multiplier = nan: expected a finite"),
        ("rounds.cohort=100", r"rounds\.cohort = 100 is larger than data\.clients = 6"),
        ("data.clients=100", r"10 users .* 7 left to train where 100 were asked for"),
        ("data.clint=3", r"data\.clint: unknown key; did you mean clients\?"),
        ("wyvwy=3", r"wyvwy: unknown key; known: name, data"),
        ("name=a/b", r"name = 'a/b': expected"),
        ("privacy.client.adjacency=none", r"adjacency = 'none': expected 'add_remove'"),
        ("nonsense", r"--set 'nonsense': expected KEY=VALUE, such as rounds.count=8"),
        ("=3", r"expected KEY=VALUE"),
        ("name.x=3", r"name is a value, not a section"),
        ("adapter.rank=300", r"adapter\.rank = 300"),
        ("adapter.rank=100", r"adapter\.rank = 100 is larger than .* allows"),
        ("adapter.modules=['nose']", r"no such linear layer .*nose; its blocks have"),
        ("model.base=/no/where", r"model\.base = '/no/where': there is no such folder"),
        ("data.task=regression", r"data\.task = 'regression', but the records of"),
        (
            "data.source=nowhere",
            r"No data at 'nowhere': expected shakespeare, ratings, changelogs, dialects, pref",
        ),
        ("data.source=nowhere.jsonl", r"nowhere\.jsonl cannot be read \(No such file"),
    ],
)
def test_a_wrong_setting_is_named_with_its_value_and_what_is_allowed(capsys, change, said):
    assert re.search(said, refused(capsys, "simulate", "tiny.toml", "--set", change))


@pytest.mark.usefixtures("written")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["simulate", "nowhere"], r"no configuration 'nowhere': .* one of .*demo"),
        (["simulate", "nowhere.toml"], r"no configuration 'nowhere.toml'"),
        (["simulate", "tiny.toml", "--engine", "spark"], r"spark: expected one of local, ray"),
        (["report", "nowhere"], r"there is no run 'nowhere'"),
        (["evaluate", "nowhere"], r"there is no run 'nowhere'"),
        (["generate", "nowhere", "--user", "a", "--prompt", "b"], r"there is no run 'nowhere'"),
    ],
)
def test_an_unknown_configuration_engine_or_run_is_named(capsys, arguments, said):
    assert re.search(said, refused(capsys, *arguments))


@pytest.mark.parametrize("content", ["name = ", "name = 'a'\nname = 'b'", "\xff\xfe"])
def test_a_file_that_is_no_toml_is_named(place, capsys, content):
    (place / "bad.toml").write_bytes(content.encode("latin-1"))
    assert "bad.toml is not valid TOML" in refused(capsys, "simulate", "bad.toml")


@pytest.mark.usefixtures("written")
def test_all_wrong_settings_are_told_at_once(capsys):
    changes = "adapter.rank=0", "rounds.count=0", "data.clint=3"
    said = refused(capsys, "simulate", "tiny.toml", *sets(*changes))
    assert all(name in said for name in ("adapter.rank", "rounds.count", "data.clint"))


@pytest.mark.usefixtures("written")
def test_too_few_bits_for_the_noise_of_a_round_are_refused_before_it(capsys):
    changes = sets("privacy.client.bits=12", "privacy.client.noise_multiplier=30")
    said = refused(capsys, "simulate", "tiny.toml", *changes)
    assert "A modulus of 12 bits is too small for 3 contributions of 32 numbers" in said


# --- people's records --------------------------------------------------------------------------


def record(**fields: Any) -> bytes:
    return json.dumps({"user": "ann", "text": "ba bo", **fields}).encode() + b"\n"


def endless(path: Path) -> None:
    path.write_bytes(record() + b'{"user": "ann", "text": "' + b"a" * 10_000_000 + b'"}\n')


def unreadable(path: Path) -> None:
    path.symlink_to("/proc/self/mem")  # what root too cannot read


def twice(path: Path) -> None:
    path.mkdir()
    (path / "ann.txt").write_text("ba bo")
    (path / "ann").mkdir()
    (path / "ann" / "one.txt").write_text("ba bo")


def bytes_of(content: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(content)

    return write


@pytest.mark.usefixtures("written")
@pytest.mark.parametrize(
    ("write", "said"),
    [
        (endless, r"line 2.*1,?000,?000 bytes"),
        (unreadable, r"people\.jsonl cannot be read|cannot be read"),
        (twice, r"two entries for one user, 'ann'"),
        (bytes_of(b""), r"nobody|no users|no records"),
        (bytes_of(record() + b"\xff\xfe\n"), r"line 2: expected UTF-8, found byte 0xff"),
        (bytes_of(record(label=float("nan"))), r"line 1: .*NaN is not a finite number"),
        (bytes_of(record(label=1.0) + record(label="bad")), r"line 2"),
        (bytes_of(record(label=True)), r'line 1: "label" must be a number or a text'),
        (bytes_of(record(user="")), r'line 1: expected "user" to name somebody'),
        (bytes_of(record(text=None)), r'line 1: expected "text", but the record has none'),
        (bytes_of(b"[1]\n"), r"line 1: expected a JSON object, found a list"),
        (bytes_of(record() * 3), r"has 1 of 1 users .* 6 were asked for"),
    ],
    ids=[
        "10 MB line", "unreadable", "user twice", "empty", "not UTF-8", "NaN", "mixed labels",
        "boolean label", "no name", "no text", "no object", "one user",
    ],
)  # fmt: skip
def test_bad_records_are_named_by_file_and_line_and_nothing_is_written(capsys, place, write, said):
    source = place / "own.jsonl"
    write(source)
    assert re.search(
        said, refused(capsys, "simulate", "tiny.toml", "--set", f"data.source={source}")
    )


@pytest.mark.usefixtures("written")
def test_people_with_one_or_only_empty_records_do_not_stop_a_run(place, capsys):
    lines = (place / "people" / "people.jsonl").read_text().splitlines()
    lines.append(json.dumps({"user": "single", "text": "ba"}))
    lines += [json.dumps({"user": "silent", "text": " "})] * 3
    (place / "more.jsonl").write_text("\n".join(lines) + "\n")
    changes = sets("data.source=more.jsonl", "data.clients=8", "rounds.cohort=8", "rounds.count=1")
    changes += sets("privacy.example.enabled=false")
    assert main.run(["simulate", "tiny.toml", *changes]) == 0
    (line,) = read_lines(place / "runs" / "tiny" / "rounds.jsonl")
    assert line["answered"] == 8
    assert "warning: more: 3 empty records were dropped." in capsys.readouterr().err


@pytest.mark.usefixtures("written")
def test_a_delta_of_one_over_the_clients_is_allowed_with_a_warning(capsys):
    changes = sets("privacy.delta=0.2", "privacy.example.enabled=false")
    assert main.run(["simulate", "tiny.toml", *changes]) == 0
    assert "privacy.delta = 0.2 is not below 1/clients = 0.166667" in capsys.readouterr().err


# --- whole runs --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(
    llama_folder: Path, bert_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A finished run of each kind, by name."""
    place = tmp_path_factory.mktemp("runs")
    people = population(place / "texts", 10, 8)
    rated = population(place / "ratings", 10, 8, labels=True)
    nothing = {"client": {"enabled": False}, "example": {"enabled": False}}
    configs = [
        tiny_config(llama_folder, people, name="texts", insecure_test_seed=None),
        tiny_config(bert_folder, rated, name="ratings", privacy={"client": {"noise_at": "device"}}),
        tiny_config(llama_folder, people, name="bare", privacy=nothing),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for config in configs:
            (place / f"{config.name}.toml").write_text(to_toml(config))
            assert main.run(["simulate", f"{config.name}.toml", "--json"]) == 0
    return {config.name: place / "runs" / config.name for config in configs}


NAMES = ["texts", "ratings", "bare"]


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from numbers(inner)
    elif isinstance(value, int | float):
        yield value


def strict(text: str) -> Any:
    """JSON as the standard has it: without NaN and infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("name", NAMES)
def test_the_summary_has_every_key_of_its_schema_and_finite_numbers(runs, name):
    summary = strict((runs[name] / "summary.json").read_text())
    assert summary["schema"] == 1
    metrics = ["name", "unit", "base", "global", "personal", "swapped_head"]
    metrics += ["win_rate_personal_over_global", "fraction_hurt", "p10_gain"]
    line = ["unit", "epsilon", "delta", "adjacency", "noise_at", "participations_max"]
    line += ["holds_against", "assumptions", "amplified", "cross_check"]
    wanted = {
        "": ["dataset", "base_model", "clients", "rounds", "cohort", "peak_rss_bytes"],
        "adapter": ["family", "dimension"],
        "metrics": metrics,
        "seconds": ["total", "training", "overhead"],
    }
    for key, names in wanted.items():
        inner = summary[key] if key else summary
        assert all(name in inner for name in names), (key, sorted(inner))
    assert all(name in spent for spent in summary["privacy"] for name in line)
    assert all(math.isfinite(number) for number in numbers(summary))
    for model in ("base", "global", "personal", "swapped_head"):
        low, high = summary["metrics"][model]["ci95"]
        assert low <= summary["metrics"][model]["mean"] <= high
    assert summary["adapter"]["dimension"] > 0
    a_number = summary["upload_bytes_per_client_round"] / summary["adapter"]["dimension"]
    assert 2 <= a_number <= 4
    assert summary["peak_rss_bytes"] > 1e8
    assert {"python", "privet", "torch", "flwr", "peft", "opacus"} <= set(summary["versions"])


def test_every_promised_epsilon_is_there_and_two_accountants_agree(runs):
    for name in ("texts", "ratings"):
        for spent in strict((runs[name] / "privacy.json").read_text())["lines"]:
            assert 0 < spent["epsilon"] < 1000
            assert spent["cross_check"]["epsilon"] == pytest.approx(spent["epsilon"], rel=0.02)


def test_a_run_without_privacy_says_so_and_claims_no_epsilon(runs):
    facts = strict((runs["bare"] / "privacy.json").read_text())
    assert not facts["private"]
    assert not [line for line in facts["lines"] if line["holds_against"]]


class Loads(HTMLParser):
    """What a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for key, value in attributes:
            if key in ("src", "srcset", "data", "action") or (tag, key) == ("link", "href"):
                self.found.append(value or "")


@pytest.mark.parametrize("name", NAMES)
def test_the_report_is_one_file_that_fetches_nothing_and_has_its_pictures_inside(runs, name):
    page = (runs[name] / "report.html").read_text()
    loads = Loads()
    loads.feed(page)
    assert all(address.startswith("data:") for address in loads.found)
    assert not re.search(r"url\(\s*['\"]?(?!data:|#)", page)
    assert "@import" not in page
    assert "<script src" not in page
    assert page.count("<svg") + page.count("data:image") >= 3


@pytest.mark.parametrize("name", ["texts", "ratings"])
def test_the_adapter_loads_with_plain_peft_and_changes_the_model(
    runs, name, llama_folder, bert_folder
):
    from peft import PeftModel
    from transformers import AutoModel, AutoModelForCausalLM

    base = (
        AutoModelForCausalLM.from_pretrained(llama_folder)
        if name == "texts"
        else AutoModel.from_pretrained(bert_folder)
    )
    ids = torch.tensor([[4, 7, 9, 30]])
    before = base(input_ids=ids)[0].detach()
    loaded = PeftModel.from_pretrained(base, str(runs[name] / "adapter"))
    assert not torch.allclose(loaded(input_ids=ids)[0], before)


def test_every_round_has_a_line_and_the_ledgers_hold_every_answer(runs):
    lines = read_lines(runs["texts"] / "rounds.jsonl")
    assert [line["round"] for line in lines] == [1, 2]
    assert all(line["answered"] == 3 and not line["void"] for line in lines)
    facts = strict((runs["texts"] / "privacy.json").read_text())
    assert max(line["participations_max"] for line in facts["lines"]) == 1


def test_tensorboard_has_every_rounds_scalars_and_the_epsilons(runs):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    ).EventAccumulator(str(runs["texts"] / "tensorboard"))
    accumulator.Reload()
    tags = set(accumulator.Tags()["scalars"])
    rounds = {"noised_mean_norm", "update_norm", "answered", "declined"}
    assert {f"rounds/{name}" for name in rounds} <= tags
    assert {"epsilon/client_against_analyst", "epsilon/example_against_server"} <= tags
    written = [event.value for event in accumulator.Scalars("rounds/noised_mean_norm")]
    shown = [line["mean_norm"] for line in read_lines(runs["texts"] / "rounds.jsonl")]
    assert written == pytest.approx(shown, rel=1e-6)


@pytest.mark.parametrize(
    "arguments",
    [
        ["report", "RUN", "--json"],
        ["evaluate", "RUN", "--json"],
        ["generate", "RUN", "--user", "user 001", "--prompt", "ba bo", "--tokens", "3", "--json"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_json_on_standard_output_parses(runs, capsys, arguments):
    run = str(runs["texts"])
    assert main.run([run if word == "RUN" else word for word in arguments]) == 0
    assert strict(capsys.readouterr().out)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_is_found_by_its_name_and_reported_in_words(runs, name, capsys, monkeypatch):
    monkeypatch.chdir(runs[name].parent.parent)
    assert main.run(["report", name]) == 0
    assert "What was promised" in capsys.readouterr().out
    assert main.run(["report", name, "--html"]) == 0
    assert capsys.readouterr().out.strip().endswith("report.html")


def test_the_same_seed_continues_a_prompt_the_same_way(runs, capsys):
    def texts() -> Any:
        capsys.readouterr()
        words = ["--user", "user 001", "--prompt", "ba bo", "--tokens", "5", "--json"]
        assert main.run(["generate", str(runs["texts"]), *words]) == 0
        return strict(capsys.readouterr().out)

    first = texts()
    assert set(first) == {"user", "prompt", "base", "shared", "personal"}
    assert texts() == first


def test_generate_names_the_people_one_may_have_meant(runs, capsys, monkeypatch):
    monkeypatch.chdir(runs["texts"].parent.parent)
    said = refused(capsys, "generate", "texts", "--user", "USER 00", "--prompt", "ba")
    assert "has no user 'USER 00'; did you mean user 00" in said
    said = refused(capsys, "generate", "texts", "--user", "user 001", "--prompt", "")
    assert "--prompt is empty; give the model a few words" in said
    said = refused(capsys, "generate", "ratings", "--user", "user 001", "--prompt", "ba")
    assert "predicts labels" in said


@pytest.mark.usefixtures("written")
def test_prepare_only_makes_the_folder_and_stops(capsys, place):
    assert main.run(["simulate", "tiny.toml", "--prepare-only"]) == 0
    assert capsys.readouterr().out.strip() == str((place / "runs" / "tiny").resolve())
    files = {"config.toml", "run-id", "population.json", "population.jsonl", "ledgers.sqlite"}
    assert files <= {path.name for path in (place / "runs" / "tiny").iterdir()}
    assert not (place / "runs" / "tiny" / "rounds.jsonl").exists()
