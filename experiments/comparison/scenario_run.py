"""A scenario from its settings to its report, resuming every stage where it was stopped.

    people      who is measured: drawn by a public seed from a run, or from settings never trained
    users       models side by side, one line a person (comparisons.py, label_evaluation.py)
    newcomers   the cold-start curve                  (experiments/evaluation/cold_start.py)
    answers     texts made for a person               (experiments/evaluation/answers.py)
    memory      the person's own rare strings         (experiments/evaluation/memorisation.py)
    report      summary.json, report.html             (experiments/comparison/tables.py, harm.py)

The files lie in RUN/compared/SCENARIO: `settings.json`, a JSON Lines file for each stage, with
people's names in it like the run folder, and the summary, which has none.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from ...client.personal.label_evaluator import LabelEvaluator
from ...common.errors import ConfigError, DataError
from ...common.files import (
    write_atomic,
    write_json_atomic,
)
from ..evaluation.label_evaluation import LabelLosses, evaluate_labels
from . import tables
from .comparisons import TextLosses, evaluate_text
from .scenario import Scenario
from .study import Line, Study

__all__ = ["compare"]


def compare(scenario: Scenario, runs: Path) -> Line:
    """Measure, or go on measuring, what a scenario asks for.

    Args:
        scenario: the settings.
        runs: the folder of runs.

    Returns:
        The content of `summary.json`.

    Raises:
        StateError: no such run, or the files were made with other settings.
        ConfigError: settings that do not fit the run, such as texts in front of labels.
        DataError: nobody has anything held out.
    """
    from . import comparison_page, harm

    study = Study.open(scenario, runs)
    rows = study.stage("users", study.users, user_evaluation(study))
    if not rows:
        raise DataError(f"{study.folder}: nobody of {len(study.users)} people has a held-out text")
    rows = placed(study, rows)
    found: Line = {
        "schema": 1,
        "folder": str(study.folder),
        "scenario": scenario.name,
        "title": scenario.title or scenario.name,
        "run": study.bench.config.name,
        "dataset": study.bench.config.data.source,
        "base_model": study.bench.config.model.base,
        "trained": study.trained,
        "settings": scenario.model_dump(mode="json"),
        **tables.summarised(rows, scenario.bootstrap),
    }
    found |= further(study)
    found["harm"] = harm.findings(rows, found, scenario)
    write_json_atomic(study.folder / "summary.json", found)
    write_atomic(study.folder / "report.html", comparison_page.page(found).encode())
    return found


def placed(study: Study, rows: Sequence[Line]) -> list[Line]:
    """Add each person's topic and declared group to the lines, for the segments of the report."""
    from . import harm

    wanted, index = study.scenario.harm, study.bench.index
    declared = _declared(wanted.groups)
    users = [row["user"] for row in rows]
    own = [" ".join(record.text for record in study.split(user)[0]) for user in users]
    topics = harm.topics(own, wanted.topics)
    return [
        {**row, "topic": topic, "group": declared.get(user, index.blocks[user].group)}
        for row, user, topic in zip(rows, users, topics, strict=True)
    ]


def _declared(file: str) -> dict[str, str]:
    if not file:
        return {}
    try:
        found = json.loads(Path(file).read_text("utf-8"))
        return {str(user): str(group) for user, group in found.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"harm.groups = {file!r}: expected a JSON object, user -> group ({error})"
        ) from None


def further(study: Study) -> Line:
    """Run the stages that texts have and labels do not."""
    from ..evaluation import answers, cold_start, memorisation

    wanted, found = study.scenario, Line()
    if study.labelled:
        return found
    if wanted.cold_start.users:
        users = study.users[: wanted.cold_start.users]
        lines = study.stage("newcomers", users, lambda user: cold_start.evaluate_user(study, user))
        found["cold_start"] = cold_start.curve(lines, wanted.bootstrap)
    if wanted.answers.users and len(study.users) > 1:
        users = study.users[: wanted.answers.users]
        lines = study.stage("answers", users, lambda user: answers.evaluate_user(study, user))
        found["answers"] = answers.summarised(lines, wanted.bootstrap)
    if wanted.harm.memory_users:
        users = study.users[: wanted.harm.memory_users]
        lines = study.stage("memory", users, lambda user: memorisation.evaluate_user(study, user))
        found["memory"] = memorisation.summarised(lines, wanted.bootstrap)
    return found


def user_evaluation(study: Study) -> Callable[[str], Line | None]:
    """One person's line under every model, for texts or for labels."""
    if study.labelled:
        evaluator = LabelEvaluator(study.bench.trainer.adapter, study.shared)
        return lambda user: _line(study, user, evaluate_labels(evaluator, study, user))
    return lambda user: _line(study, user, _of_texts(study, user))


def _of_texts(study: Study, user: str) -> TextLosses | None:
    partner = study.partner(user)
    other = None if partner is None else study.side(partner)
    return evaluate_text(study.evaluator, study.side(user), other, study.held_out(user))


def _line(study: Study, user: str, losses: TextLosses | LabelLosses | None) -> Line | None:
    """Add how late each record is, in [0, 1), and how many own records there are."""
    if losses is None:
        return None
    count = len(next(iter(losses["nats"].values())))
    time = [index / count for index in range(count)]
    return {"time": time, "own": len(study.own(user)), "all_own": study.amount(user), **losses}
