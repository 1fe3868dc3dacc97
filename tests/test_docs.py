"""What the pages say exists: files, links, modules, commands; and the README is short and runs."""

import importlib.util
import re
import tomllib
import xml.etree.ElementTree as xml
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

import privet
from privet import commands as main

from .tiny import population, tiny_config

ROOT = Path(__file__).parent.parent
HISTORY = ("decisions.md",)  # names files as they were, and so may the changelog
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.name not in HISTORY),
]
FOLDERS = ("client/", "common/", "server/", "experiments/", "tests/", "docs/")
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.M | re.S)
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def quoted(text: str) -> list[str]:
    """What stands between backticks in running text."""
    return [" ".join(found.split()) for found in re.findall(r"`([^`]+)`", FENCE.sub("", text))]


def commands(text: str) -> Iterator[list[str]]:
    """Every `privet ...` of a page, as words: in running text, and in blocks without a language."""
    lines = quoted(text)
    for language, block in FENCE.findall(text):
        if not language:
            lines += block.replace("\\\n", " ").splitlines()
    for line in lines:
        for part in re.split(r"\s#\s|;|&&|\|", line):
            first, *words = part.removeprefix("$ ").split() or [""]
            if first == "privet":
                yield [word.rstrip(",.:") for word in words]


def fault(words: list[str], command: click.Command) -> str:
    """The first word that no command has; an argument's value may be anything."""
    known = {"--help", "-v"}
    for word in words:
        if isinstance(command, click.Group) and not word.startswith("-"):
            if word not in command.commands:
                return word
            command = command.commands[word]
        known |= {option for given in command.params for option in given.opts}
        if word.startswith("--") and word.partition("=")[0] not in known:
            return word
    return ""


@every_page
def test_a_path_that_a_page_names_exists(page: Path):
    words = [
        word.strip(".,:;()") for found in quoted(page.read_text("utf-8")) for word in found.split()
    ]
    paths = {word for word in words if word.startswith(FOLDERS)}
    assert sorted(path for path in paths if not list(ROOT.glob(path.rstrip("/")))) == []
    files = {word for word in words if re.fullmatch(r"\w+\.py", word)}
    assert sorted(name for name in files if not list(ROOT.glob(f"*/**/{name}"))) == []


@every_page
def test_a_link_leads_to_a_file(page: Path):
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text("utf-8"))
    inside = [link for link in links if not link.startswith(("http://", "https://"))]
    assert [link for link in inside if not (page.parent / link).exists()] == []


@every_page
def test_a_module_that_a_page_runs_or_imports_exists(page: Path):
    text = page.read_text("utf-8")
    names = re.findall(r"python -m (privet[\w.]+)", text)
    names += re.findall(r"^ *(?:>>> )?from (privet[\w.]*) import", text, re.M)
    assert [name for name in names if importlib.util.find_spec(name.rstrip(".")) is None] == []


@every_page
def test_a_command_that_a_page_names_is_one_of_privets(page: Path):
    tree = main._command(())
    found = {" ".join(words): fault(words, tree) for words in commands(page.read_text("utf-8"))}
    assert {line: word for line, word in found.items() if word} == {}


def test_a_wrong_command_would_be_found():
    tree = main._command(())
    text = (
        "`privet simulat demo`, `privet server ab srv`\n```\n$ privet report demo --jsn; ls\n```\n"
    )
    assert [fault(words, tree) for words in commands(text)] == ["simulat", "", "--jsn"]


def test_the_readme_has_at_most_600_words_one_drawing_and_every_page():
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.split()) <= 600
    assert re.findall(r"!\[[^\]]{40,}\]\(([^)]+)\)", text) == ["docs/round.svg"]
    linked = set(re.findall(r"\]\((docs/\w[\w-]*\.md)\)", text))
    assert linked == {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")}


def test_the_readmes_python_runs(llama_folder, tmp_path, monkeypatch, capsys):
    """On a tiny model, for the demo's takes minutes; the call that names the demo is made too."""
    code = dict(FENCE.findall((ROOT / "README.md").read_text("utf-8")))["python"]
    tiny = tiny_config(llama_folder, population(tmp_path, 9, 10))
    asked = []

    def load(*arguments: Any, **named: Any) -> Any:
        asked.append(read(*arguments, **named))
        return tiny

    read = privet.load_config
    monkeypatch.setattr(privet, "load_config", load)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert [(config.name, config.rounds.count) for config in asked] == [("mine", 2)]
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1] == "4.38"
    assert "bits per byte" in shown[-3]
    assert (tmp_path / "runs/mine/report.html").is_file()


@pytest.mark.parametrize("drawing", sorted((ROOT / "docs").glob("*.svg")), ids=lambda one: one.name)
def test_a_drawing_has_a_title_a_description_and_dark_colours(drawing: Path):
    root = xml.parse(drawing).getroot()
    names = {element.tag.partition("}")[2]: element.text or "" for element in root}
    assert names["title"].strip()
    assert names["desc"].strip()
    assert "prefers-color-scheme: dark" in names["style"]
    assert "http" not in drawing.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")


def test_the_citation_names_this_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    cited = (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"version: {project['version']}\n" in cited
    assert f"license: {project['license']}\n" in cited
