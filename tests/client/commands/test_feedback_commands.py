"""feedback.py: every command on a real home; bad input is a sentence and exit code 2."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from privet import commands as main
from privet.client.store import key_file as unlock_module


@pytest.fixture(autouse=True)
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home that costs nothing to open, in an empty folder."""
    cost = {"iterations": 1, "lanes": 1, "memory_kib": 1024}
    monkeypatch.setattr(unlock_module, "_ARGON2ID", cost)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pass").write_text("own words\n")
    for name, value in (("HOME", "home"), ("PASSPHRASE_FILE", "pass")):
        monkeypatch.setenv(f"PRIVET_{name}", str(tmp_path / value))
    assert main.run(["client", "init"]) == 0
    return tmp_path


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Any:
    """`privet client feedback ...` -> the JSON it prints."""

    def asked(*arguments: str) -> Any:
        capsys.readouterr()
        assert main.run(["client", "feedback", *arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return asked


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture[str]) -> Any:
    """`privet client feedback ...` -> the one sentence it refuses with."""

    def asked(*arguments: str) -> str:
        capsys.readouterr()
        assert main.run(["client", "feedback", *arguments]) == 2
        said = capsys.readouterr().err
        assert said.startswith("privet: ")
        assert said.count("\n") == 1
        return said

    return asked


def say(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main.run(["client", "feedback", *arguments]) == 0
    return capsys.readouterr().out


def test_verdicts_are_added_listed_and_forgotten(ask: Any, capsys: pytest.CaptureFixture[str]):
    assert ask("add", "--prompt", "tea?", "--accept", "green", "--over", "black") == {
        "kept": [1], "verdicts_kept": 1, "pairs_formed": 1,
    }  # fmt: skip
    assert ask("add", "--prompt", "tea?", "--reject", "white")["pairs_formed"] == 2
    assert ask("add", "--edit", "warm", "--to", "warm, please")["kept"] == [3]
    listed = ask("list", "--texts")
    assert [row["kind"] for row in listed["verdicts"]] == ["accept", "reject", "edit"]
    assert listed["verdicts"][0]["other"] == "black"
    found = ask("list", "--pairs", "--texts")["pairs"]
    assert [(row["chosen"], row["rejected"]) for row in found] == [
        ("green", "black"), ("green", "white"), ("warm, please", "warm"),
    ]  # fmt: skip
    assert "1 verdict erased; 2 kept in all, pairs they give: 2." in say(capsys, "forget", "2")
    assert ask("forget", "--all") == {"forgotten": 2, "verdicts_kept": 0, "pairs_formed": 0}
    assert ask("list") == {"verdicts_kept": 0, "pairs_formed": 0, "verdicts": []}


def test_a_list_prints_texts_only_when_asked(capsys: pytest.CaptureFixture[str]):
    say(capsys, "add", "--prompt", "tea?", "--accept", "green", "--over", "black")
    for plain in (say(capsys, "list"), say(capsys, "list", "--pairs")):
        assert "green" not in plain
        assert "tea?" not in plain
    assert "green" in say(capsys, "list", "--texts")


def test_a_file_of_verdicts_is_kept_as_a_whole_or_not_at_all(made: Path, ask: Any, refuse: Any):
    good = {"kind": "accept", "prompt": "tea?", "answer": "green", "over": "black", "time": 10}
    lines = [json.dumps(good), "", json.dumps({**good, "over": "white"})]
    (made / "v.jsonl").write_text("\n".join(lines))
    assert ask("add", "v.jsonl")["kept"] == [1, 2]
    (made / "v.jsonl").write_text("\n".join([*lines, '{"kind": "like", "answer": "x"}']))
    assert "v.jsonl, line 4" in refuse("add", "v.jsonl")
    assert ask("list")["verdicts_kept"] == 2


def test_verdicts_come_from_standard_input(ask: Any, monkeypatch: pytest.MonkeyPatch):
    line = b'{"kind": "reject", "answer": "x"}\n'
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(line)))
    assert ask("add", "-")["kept"] == [1]


def test_bad_input_is_one_sentence(made: Path, refuse: Any):
    assert "0 verdicts were given" in refuse("add")
    assert "2 verdicts were given" in refuse("add", "--accept", "a", "--reject", "b")
    assert "choose one" in refuse("add", "v.jsonl", "--accept", "a")
    assert "'over' does not belong to reject" in refuse("add", "--reject", "a", "--over", "b")
    assert "what the answer became" in refuse("add", "--edit", "a")
    assert "is the answer itself" in refuse("add", "--edit", "a", "--to", "a")
    assert "v.jsonl" in refuse("add", "v.jsonl")
    (made / "empty.jsonl").write_text("\n")
    assert "found none" in refuse("add", "empty.jsonl")
    (made / "cut.jsonl").write_text('{"kind": ')
    assert "cut.jsonl, line 1" in refuse("add", "cut.jsonl")
    assert "--all" in refuse("forget")
    assert "--all" in refuse("forget", "1", "--all")
    assert "no verdict 9" in refuse("forget", "9")


def test_forgetting_the_device_forgets_the_verdicts(made: Path, capsys: pytest.CaptureFixture[str]):
    say(capsys, "add", "--reject", "never again")
    assert main.run(["client", "forget", "--yes"]) == 0
    assert not (made / "home" / "vault.sqlite").exists()
    assert main.run(["client", "feedback", "list"]) == 2
    assert "there is no home" in capsys.readouterr().err


def test_no_command_loads_torch(made: Path):
    """Texts go through readers and the vault; a model is not needed to keep an opinion."""
    del made
    program = (
        "import sys; from privet import commands as main\n"
        "assert main.run(['client', 'feedback', 'add', '--reject', 'x']) == 0\n"
        "assert main.run(['client', 'feedback', 'list', '--pairs']) == 0\n"
        "assert main.run(['client', 'feedback', 'forget', '--all']) == 0\n"
        "assert not {'torch', 'transformers', 'scipy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=600)
