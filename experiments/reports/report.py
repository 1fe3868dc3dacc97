"""The report of a run: the facts and the summary, and the files that are written of them.

`report_facts` reads a run folder; `html_page.py` and `terminal.py` draw from the same facts, and
`--json` prints them, so that the three cannot differ. The privacy part is computed from
the ledgers each time; `summary.json` only gives what was measured while the run was going on.
"""

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...common.errors import StateError
from ...common.files import keep_aside, read_lines, write_atomic, write_json_atomic
from ...common.settings.config import of_run
from ...common.settings.sections import DEVICES
from ...server.run_folder import starting
from .. import progress
from .device_run_facts import device_facts, device_measured
from .privacy_facts import privacy_facts
from .summary import MEASURED, build_summary

__all__ = ["build_summary", "report_facts", "write", "written"]


def report_facts(run_folder: Path, measured: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What `privet report --json` prints: `{"summary": ..., "privacy": ..., "statistics": [...]}`.

    A run without an evaluation has `summary["metrics"]` = None; `statistics` has what the noised
    sums of each round said, and is empty where rounds have none.

    Args:
        run_folder: the run, finished or under way.
        measured: as for `build_summary`; None: what the run's `summary.json` says.

    Raises:
        StateError: a file is missing or cannot be read; says which command makes it.
        LedgerCorrupt: a ledger does not verify.
    """
    if _of_devices(run_folder):
        privacy, known = device_facts(run_folder), device_measured(run_folder)
    else:
        privacy = privacy_facts(run_folder)
        known = _measured(run_folder)
    config = of_run(run_folder)
    start = starting.facts(run_folder)
    if start is not None:
        said = starting.start_sentence(start, config.data.source == DEVICES)
        privacy = {**privacy, "start": start, "not_covered": [said, *privacy["not_covered"]]}
    evaluation = _json(run_folder / "evaluation.json")
    records = read_lines(run_folder / "rounds.jsonl")
    opened = {one["round"] for one in records if not one.get("void")}
    void = {one["round"] for one in records} - opened
    return {
        "summary": {
            **build_summary(config, privacy, evaluation, known if measured is None else measured),
            "rounds": sum(row["round"] not in void for row in privacy["rounds"]),
            **({} if start is None else {"start": start}),
        },
        "privacy": privacy,
        "statistics": _statistics(run_folder),
        **_looks(run_folder),
    }


def _looks(run_folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return what each look of an A/B experiment on devices said.

    Of another run it is nothing.
    """
    found = [one["look"] for one in read_lines(run_folder / "rounds.jsonl") if "look" in one]
    return {"looks": found} if found else {}


def _of_devices(run_folder: Path) -> bool:
    """Whether people were real devices, whose ledgers are not here."""
    known = (run_folder / "config.toml").is_file()
    return known and of_run(run_folder).data.source == DEVICES


def _statistics(run_folder: Path) -> list[dict[str, Any]]:
    return [
        {"round": record["round"], **record["statistics"]}
        for record in read_lines(run_folder / "rounds.jsonl")
        if record.get("statistics")
    ]


def write(run_folder: Path, measured: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Writes `privacy.json`, `report.html` and `summary.json`, each whole or not at all.

    Args:
        run_folder: the run.
        measured: as for `build_summary`; None: what the run's `summary.json` says.

    Returns:
        The facts that were written.

    Raises:
        StateError, LedgerCorrupt: as for `report_facts`; nothing was written.
        ConfigError: Matplotlib is not installed.
    """
    from .html_page import page  # Matplotlib takes its time

    facts = report_facts(run_folder, measured)
    drawn = page(facts)
    write_json_atomic(run_folder / "privacy.json", facts["privacy"])
    write_atomic(run_folder / "report.html", drawn.encode())
    write_json_atomic(run_folder / "summary.json", facts["summary"])
    return facts


def written(run_folder: Path) -> dict[str, Any]:
    """The facts that `write` has written, without computing them again.

    Raises:
        StateError: a file is missing or cannot be read.
    """
    found = {name: _json(run_folder / f"{name}.json") for name in ("summary", "privacy")}
    if not all(found.values()):
        raise StateError(f"{run_folder} has no report yet; `privet report RUN --html` writes one")
    return {**found, "statistics": _statistics(run_folder)}


def _json(path: Path) -> dict[str, Any]:
    """A JSON object, or {} where there is no file."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise StateError(
            f"{path} cannot be read as JSON ({error}); `privet evaluate RUN` makes it again"
        ) from None
    if not isinstance(found, dict):
        raise StateError(f"{path} holds no JSON object; `privet evaluate RUN` makes it again")
    return found


def _measured(run_folder: Path) -> dict[str, Any]:
    """What only the run itself could measure, from its `summary.json`."""
    path = run_folder / "summary.json"
    try:
        summary = _json(path)
    except StateError as error:
        summary = {}
        progress.warn(f"{error}; kept aside as {keep_aside(path).name}, the run's times are lost")
    adapter = summary.get("adapter") or {}
    known = {name: summary.get(name) for name in MEASURED}
    versions = known["versions"] or {"python": platform.python_version()}
    return {**known, "versions": versions, "dimension": adapter.get("dimension")}
