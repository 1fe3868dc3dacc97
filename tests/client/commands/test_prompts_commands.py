"""`privet prompts`: every command on a real home; bad input is one sentence and exit code 2."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w

from privet import commands as main
from privet.client.store import key_file as unlock_module

from ..assistant.test_templates import table


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """A home, a template signed by a new publisher whom the owner trusts."""
    cost = {"iterations": 1, "lanes": 1, "memory_kib": 1024}
    monkeypatch.setattr(unlock_module, "_ARGON2ID", cost)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pass").write_text("own words\n")
    for name, value in (("HOME", "home"), ("PASSPHRASE_FILE", "pass")):
        monkeypatch.setenv(f"PRIVET_{name}", str(tmp_path / value))
    assert main.run(["client", "init"]) == 0
    write("one.toml", "1.0.0")
    assert main.run(["prompts", "sign", "one.toml", "--key", "key", "--json"]) == 0
    out = capsys.readouterr().out
    public = json.loads(out[out.index("{\n") :])["publisher"]
    trust = Path("home/policy.toml")
    trust.write_text(trust.read_text().replace("publishers = []", f'publishers = ["{public}"]'))
    return tmp_path


def write(name: str, version: str, **changes: str) -> None:
    Path(name).write_text(tomli_w.dumps(table(version, **changes)))


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main.run(["prompts", *words]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main.run(["prompts", *words]) == 2
    return capsys.readouterr().err


def test_a_template_goes_in_is_listed_shown_compared_and_gone_back_from(capsys):
    assert "+version: 1.0.0" in said(capsys, "add", "one.toml", "--yes")
    write("two.toml", "1.1.0", text="{prompt}")
    said(capsys, "sign", "two.toml", "--key", "key")
    assert "-  {history}" in said(capsys, "diff", "two.toml")
    assert "-  {history}" in said(capsys, "add", "two.toml", "--yes")
    listed = said(capsys, "list")
    assert all(word in listed for word in ("letters", "1.0.0", "1.1.0", "in use", "memory"))
    assert "  {prompt}" in said(capsys, "show", "letters")
    assert "  {history}" in said(capsys, "show", "letters", "--version", "1.0.0")
    assert "-  {history}" in said(capsys, "diff", "letters")
    assert "+  {history}" in said(capsys, "diff", "letters", "1.1.0", "1.0.0")
    back = said(capsys, "rollback", "letters", "--yes")
    assert "'letters' 1.0.0 is in use; it was 1.1.0." in back
    assert "nothing changed" in said(capsys, "diff", "letters", "1.0.0")


def test_every_command_speaks_json(capsys):
    added = json.loads(said(capsys, "add", "one.toml", "--yes", "--json"))
    assert (added["name"], added["version"]) == ("letters", "1.0.0")
    write("two.toml", "2.0.0")
    json.loads(said(capsys, "sign", "two.toml", "--key", "key", "--json"))
    assert json.loads(said(capsys, "diff", "two.toml", "--json"))["changed"]
    said(capsys, "add", "two.toml", "--yes", "--json")
    states = {
        (one["name"], one["version"]): one["state"]
        for one in json.loads(said(capsys, "list", "--json"))
    }
    assert states[("letters", "1.0.0")] == "kept"
    assert states[("letters", "2.0.0")] == "in use"
    assert json.loads(said(capsys, "show", "letters", "--json"))["version"] == "2.0.0"
    back = json.loads(said(capsys, "rollback", "letters", "--yes", "--json"))
    assert (back["before"], back["version"]) == ("2.0.0", "1.0.0")


def test_nothing_is_taken_without_a_yes(capsys):
    assert "add --yes" in refused(capsys, "add", "one.toml")
    assert "letters" not in said(capsys, "list")
    said(capsys, "add", "one.toml", "--yes")
    write("two.toml", "2.0.0")
    said(capsys, "sign", "two.toml", "--key", "key")
    said(capsys, "add", "two.toml", "--yes")
    assert "add --yes" in refused(capsys, "rollback", "letters")
    assert "2.0.0" in said(capsys, "show", "letters")


def test_bad_input_is_one_sentence_each(capsys, place):
    write("plain.toml", "1.0.0")
    assert "is not signed" in refused(capsys, "add", "plain.toml", "--yes")
    said(capsys, "sign", "plain.toml", "--key", "other")
    assert "does not trust" in refused(capsys, "add", "plain.toml", "--yes")
    signed = Path("one.toml").read_text()
    Path("one.toml").write_text(signed.replace("friends", "enemies"))
    assert "was changed after" in refused(capsys, "add", "one.toml", "--yes")
    assert "no template file" in refused(capsys, "add", "nowhere.toml", "--yes")
    assert "no template file" in refused(capsys, "add", str(place), "--yes")
    assert "there is no template 'x'" in refused(capsys, "show", "x")
    assert "no version before" in refused(capsys, "rollback", "memory", "--yes")
    assert "no version 9.9.9" in refused(capsys, "diff", "memory", "9.9.9")
    assert "two versions" in refused(capsys, "diff", "memory", "1", "2", "3")
    Path("bad").write_text("not a key")
    assert "no publisher's key" in refused(capsys, "sign", "one.toml", "--key", "bad")


def test_a_publishers_key_is_for_its_owners_eyes_and_made_once():
    assert Path("key").stat().st_mode & 0o077 == 0
    before = Path("key").read_text()
    assert main.run(["prompts", "sign", "one.toml", "--key", "key"]) == 0
    assert Path("key").read_text() == before


def test_the_commands_load_no_torch():
    code = (
        "import sys; from privet.commands import run; run(['prompts', 'list']);"
        "print('HEAVY', {'torch', 'transformers', 'flwr', 'scipy', 'bm25s'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "HEAVY set()" in found.stdout
    assert "memory" in found.stdout
