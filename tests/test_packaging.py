"""What is shipped, what it imports, and how the one command fails."""

import doctest
import importlib
import importlib.util
import os
import pkgutil
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import pytest
import tomli_w

from privet import commands as main
from privet.common.errors import DataError

from .tiny import population, tiny_config

ROOT = Path(__file__).parent.parent
ROOT_FILES = ("__init__.py", "commands.py", "py.typed")
PACKAGES = ("common", "client", "server", "experiments")
PEERS = ("simulators.pfl_peer", "simulators.flower_peer")
"""Run by their paths: one of them by an interpreter that has no privet."""
MODULES = [
    "privet",
    "privet.commands",
    *sorted(
        module.name
        for package in PACKAGES
        for module in pkgutil.walk_packages([str(ROOT / package)], f"privet.{package}.")
        if not module.name.endswith(PEERS)
    ),
]
no_cli = importlib.util.find_spec("privet.experiments.commands.experiment") is None
needs_cli = pytest.mark.skipif(no_cli, reason="experiments/commands/experiment.py is not there yet")


def privet(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-c",
        "from privet.commands import main; main()",
        *arguments,
    ]
    variables = {**os.environ, **environment}
    return subprocess.run(
        command, capture_output=True, text=True, env=variables, check=False, timeout=600
    )


def wheel(folder: Path) -> set[str]:
    """The names inside the wheel of a copy of the tree (a build leaves files behind)."""
    tree = folder / "tree"
    shutil.copytree(ROOT, tree, ignore=lambda path, names: _unshipped(Path(path), names))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--wheel-dir", str(folder), str(tree)]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    with zipfile.ZipFile(next(folder.glob("privet-*.whl"))) as archive:
        return set(archive.namelist())


def _unshipped(folder: Path, names: list[str]) -> set[str]:
    if folder != ROOT:
        return {name for name in names if name == "__pycache__"}
    shipped = {"pyproject.toml", "README.md", "LICENSE", *ROOT_FILES, *PACKAGES}
    return set(names) - shipped


def expected(root: Path) -> set[str]:
    """Every module, configuration, template and typing mark of the package."""
    found = [path for package in PACKAGES for path in (root / package).rglob("*")]
    found += [path for path in (root / name for name in ROOT_FILES) if path.exists()]
    kinds = (".py", ".toml", ".typed", ".html", ".css")
    paths = (path.relative_to(root).as_posix() for path in found if path.suffix in kinds)
    return {f"privet/{path}" for path in paths}


def test_the_wheel_holds_every_module_configuration_and_typing_mark(tmp_path: Path) -> None:
    names = wheel(tmp_path)
    assert expected(ROOT) - names == set()
    assert {f"privet/{name}" for name in ROOT_FILES} <= names
    outside = {name for name in names if not name.startswith("privet")}
    assert outside == set(), "nothing but privet goes into site-packages"
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_an_installed_wheel_runs_an_experiment_without_the_repository(
    llama_folder: Path, tmp_path: Path
) -> None:
    wheel(tmp_path)
    with zipfile.ZipFile(next(tmp_path.glob("privet-*.whl"))) as archive:
        archive.extractall(tmp_path / "installed")
    people = population(tmp_path, 9, 10)
    config = tiny_config(llama_folder, people).model_dump(mode="json", exclude_none=True)
    (tmp_path / "tiny.toml").write_text(tomli_w.dumps(config))
    code = """
import privet, sys
from privet.client.assistant import templates
from privet.commands import run
print("FROM", privet.__file__)
assert privet.load_config("demo").name == "demo"
assert run(["--help"]) == 0
assert run(["simulate", "tiny.toml"]) == 0
assert privet.Run.open("tiny").privacy["lines"]
print("TEMPLATES", len(templates.builtins()))
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, text=True, check=False, timeout=900,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")}, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"FROM {tmp_path / 'installed' / 'privet' / '__init__.py'}" in done.stdout
    assert "TEMPLATES 0" not in done.stdout


def test_a_folder_missing_from_the_packages_would_be_caught(tmp_path: Path) -> None:
    """The trap: setuptools leaves an unlisted folder out of the wheel without a warning."""
    (tmp_path / "common" / "unlisted").mkdir(parents=True)
    (tmp_path / "common" / "unlisted" / "__init__.py").touch()
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert "privet.common.unlisted" not in listed
    assert expected(tmp_path) == {"privet/common/unlisted/__init__.py"}


def test_the_lock_pins_every_direct_dependency_exactly() -> None:
    lock = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [line for line in lock if not line.startswith("#")]
    assert all(len(line.split("==")) == 2 and "+" not in line for line in pins)
    locked = {_plain(line.split("==")[0]) for line in pins}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = chain(project["dependencies"], *project["optional-dependencies"].values())
    assert {_plain(line) for line in wanted} - locked == {"privet"}


def test_neither_lock_nor_build_files_name_a_host() -> None:
    for name in ("requirements.lock", "Makefile", "pyproject.toml", ".ci/run"):
        assert "://" not in (ROOT / name).read_text(), name


def _plain(requirement: str) -> str:
    name = requirement
    for end in "[<>=~! ":
        name = name.split(end)[0]
    return name.lower().replace("_", "-")


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_keeps_its_all_and_its_doctests(name: str) -> None:
    module = importlib.import_module(name)
    public = getattr(module, "__all__", ())
    assert list(public) == sorted(set(public), key=_ruff_order)
    assert [entry for entry in public if not hasattr(module, entry)] == []
    assert doctest.testmod(module).failed == 0


def _ruff_order(name: str) -> tuple[int, str]:
    """Constants, then classes, then the rest, as ruff's RUF022 sorts."""
    if name.isupper() and len(name) > 1:
        return 0, name
    return (1, name) if name[:1].isupper() else (2, name)


@needs_cli
def test_the_help_of_a_command_says_what_its_arguments_are(capsys: pytest.CaptureFixture[str]):
    assert main.run(["simulate", "--help"]) == 0
    assert "A TOML file, or a name" in capsys.readouterr().out


def test_help_costs_little_more_than_the_libraries_it_is_made_of_and_never_loads_torch() -> None:
    heavy = "{'torch', 'flwr', 'opacus', 'transformers', 'peft', 'matplotlib', 'scipy'}"
    code = f"""
import os, sys
from privet.commands import run
code = run(["--help"])
print("LOADED", sorted({heavy} & set(sys.modules)), code)
print("SECONDS", sum(os.times()[:2]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "LOADED [] 0" in done.stdout, done.stdout + done.stderr
    # beside it, in the same run: what a command line of these libraries costs at the least
    code = "import os, typer.main, rich.console, pydantic; print(sum(os.times()[:2]))"
    least = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ratio = float(done.stdout.split()[-1]) / float(least.stdout)
    assert ratio < 6, f"privet --help took {ratio:.1f} times what its libraries take"
    for command in ("simulate", "evaluate", "report", "generate", "assets"):
        assert command in done.stdout


@needs_cli
def test_version_is_the_version_of_the_distribution() -> None:
    assert privet("--version").stdout == f"privet {version('privet')}\n"


@needs_cli
@pytest.mark.parametrize(
    "arguments", [("report", "nowhere"), ("assets", "fetch", "nope"), ("assets", "fetch")]
)
def test_a_wrong_call_is_one_sentence_and_exit_code_2(arguments: tuple[str, ...]) -> None:
    done = privet(*arguments)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("privet: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@needs_cli
def test_an_unknown_option_is_exit_code_2_and_names_the_help() -> None:
    done = privet("report", "--nope")
    assert done.returncode == 2
    assert "--help" in done.stderr


@needs_cli
def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = [
        sys.executable,
        "-c",
        "from privet.commands import main; main()",
        "--help",
    ]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False, timeout=600)
    os.close(writing)
    assert done.stderr == b""


@needs_cli
def test_the_empty_cache_is_listed_as_json(tmp_path: Path) -> None:
    done = privet("assets", "list", "--json", PRIVET_CACHE=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"missing"') == 4
    assert list(tmp_path.iterdir()) == []


class Faults:
    """A command that ends in the error it was given."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error

    def __call__(self, *_: object, **__: object) -> int:
        if self.error:
            raise self.error
        return 130


@pytest.mark.parametrize(
    ("error", "arguments", "code", "said"),
    [
        (DataError("No text."), ["simulate", "x"], 2, "privet: No text.\n"),
        (
            RuntimeError("odd"),
            ["simulate", "x"],
            1,
            "privet: RuntimeError: odd; run again with -v for the traceback\n",
        ),
        (KeyboardInterrupt(), ["report", "x"], 130, "privet: stopped; run the same command again."),
        (None, ["simulate", "a b"], 130, "privet simulate 'a b' --resume\n"),
        (None, ["simulate", "x", "--resume"], 130, "privet simulate x --resume\n"),
    ],
)
def test_every_error_is_told_in_one_line(
    error: BaseException | None,
    arguments: list[str],
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(main, "_command", lambda _: Faults(error))
    assert main.run(arguments) == code
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1


@pytest.mark.parametrize("arguments", [["-v", "simulate"], ["simulate", "-v"]])
def test_the_traceback_is_printed_only_with_v(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(main, "_command", lambda _: Faults(RuntimeError("odd")))
    assert main.run(arguments) == 1
    assert "Traceback" in capsys.readouterr().err
    assert main.run(["simulate"]) == 1
    assert "Traceback" not in capsys.readouterr().err


@needs_cli
def test_ctrl_c_exits_130_with_a_sentence() -> None:
    code = """
import os, signal
from privet.experiments.commands import experiment as cli
from privet import commands as main
def report() -> None:
    os.kill(os.getpid(), signal.SIGINT)
cli.report = report
raise SystemExit(main.run(["report"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 130, done.stderr
    assert done.stderr == "privet: stopped; run the same command again.\n"
