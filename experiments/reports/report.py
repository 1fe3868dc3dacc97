"""The report of a run: the facts and the summary, and the files that are written of them.

`report_facts` reads a run folder; `html_page.py` and `terminal.py` draw from the same facts, and
`--json` prints them, so that the three cannot differ. The privacy part is computed from
the ledgers each time; `summary.json` only gives what was measured while the run was going on.
"""

import json
import platform
from pathlib import Path
from typing import Any, cast

from ...common.errors import StateError
from ...common.files import keep_aside, write_atomic, write_json_atomic
from ...common.settings.config import of_run
from ...common.settings.sections import DEVICES
from ...server.round_record import read_records
from ...server.run_folder import starting
from .. import progress
from .facts import Evaluation, Facts, Measured, Statistics
from .privacy_facts import privacy_facts
from .summary import build_summary

__all__ = ["build_summary", "report_facts", "write", "written"]


def report_facts(run_folder: Path, measured: Measured | None = None) -> Facts:
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
        from .device_run_facts import device_facts, device_measured

        privacy, known = device_facts(run_folder), device_measured(run_folder)
    else:
        privacy, known = privacy_facts(run_folder), _measured(run_folder)
    config = of_run(run_folder)
    records = read_records(run_folder)
    opened = {record["round"] for record in records if not record.get("void")}
    void = {record["round"] for record in records} - opened
    evaluation = cast("Evaluation", _json(run_folder / "evaluation.json"))
    summary = build_summary(config, privacy, evaluation, known if measured is None else measured)
    summary["rounds"] = sum(row["round"] not in void for row in privacy["rounds"])
    start = starting.facts(run_folder)
    if start is not None:
        sentence = starting.start_sentence(start, config.data.source == DEVICES)
        privacy["not_covered"].insert(0, sentence)
        summary["start"] = privacy["start"] = start
    found: Facts = {
        "summary": summary,
        "privacy": privacy,
        "statistics": _statistics(run_folder),
    }
    if looks := [record["look"] for record in records if "look" in record]:
        found["looks"] = looks  # what each look of an A/B experiment on devices said
    return found


def _of_devices(run_folder: Path) -> bool:
    """Whether people were real devices, whose ledgers are not here."""
    known = (run_folder / "config.toml").is_file()
    return known and of_run(run_folder).data.source == DEVICES


def _statistics(run_folder: Path) -> list[Statistics]:
    return [
        {"round": record["round"], **record["statistics"]}
        for record in read_records(run_folder)
        if record.get("statistics")
    ]


def write(run_folder: Path, measured: Measured | None = None) -> Facts:
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


def written(run_folder: Path) -> Facts:
    """The facts that `write` has written, without computing them again.

    Raises:
        StateError: a file is missing or cannot be read.
    """
    summary, privacy = (_json(run_folder / f"{name}.json") for name in ("summary", "privacy"))
    if not summary or not privacy:
        raise StateError(f"{run_folder} has no report yet; `privet report RUN --html` writes one")
    found = {"summary": summary, "privacy": privacy, "statistics": _statistics(run_folder)}
    return cast("Facts", found)


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


def _measured(run_folder: Path) -> Measured:
    """What only the run itself could measure, from its `summary.json`."""
    path = run_folder / "summary.json"
    try:
        summary = _json(path)
    except StateError as error:
        summary = {}
        progress.warn(f"{error}; kept aside as {keep_aside(path).name}, the run's times are lost")
    adapter = summary.get("adapter") or {}
    return {
        "seconds": summary.get("seconds"),
        "peak_rss_bytes": summary.get("peak_rss_bytes"),
        "upload_bytes_per_client_round": summary.get("upload_bytes_per_client_round"),
        "dimension": adapter.get("dimension"),
        "compute": summary.get("compute"),
        "versions": summary.get("versions") or {"python": platform.python_version()},
    }
