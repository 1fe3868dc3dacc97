"""CONTRIBUTING.md: each worked example runs as it stands, tests and all."""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from privet.common.model.families import FAMILIES
from privet.common.model.server_optimizers import OPTIMIZERS

TEXT = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text("utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S))
CODE = {
    title: "\n".join(re.findall(r"^```python\n(.*?)^```", body, re.M | re.S))
    for title, body in SECTIONS.items()
}
EXAMPLES = [title for title, code in CODE.items() if code]


@pytest.fixture
def _tables_stay() -> Iterator[None]:
    """What an example adds to a table is there for the example only."""
    tables: list[dict[str, Any]] = [FAMILIES, OPTIMIZERS]
    before = [dict(table) for table in tables]
    yield
    for table, kept in zip(tables, before, strict=True):
        table.clear()
        table.update(kept)


def test_the_five_additions_are_there():
    assert EXAMPLES == [
        "Add an adapter family",
        "Add a server optimiser",
        "Add a personal head",
        "Add a data source",
        "Add a command",
    ]


@pytest.mark.usefixtures("_tables_stay")
@pytest.mark.parametrize("title", EXAMPLES)
def test_a_worked_example_runs_as_it_stands(title: str, request: pytest.FixtureRequest) -> None:
    names: dict[str, Any] = {"__name__": __name__, "__package__": __package__}
    exec(compile(CODE[title], f"CONTRIBUTING.md, {title}", "exec"), names)
    tests = [value for name, value in names.items() if name.startswith("test_")]
    assert tests, "an example without a test shows nothing"
    for test in tests:
        test(**{name: request.getfixturevalue(name) for name in inspect.signature(test).parameters})
