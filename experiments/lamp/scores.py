"""LaMP's metrics, as published, through scikit-learn and rouge-score.

    labels (1, 2)   accuracy, and F1 as the mean over all labels; an answer that is none is wrong
    scores (3)      MAE and RMSE; an answer that is no number counts as 1 or 5, whichever is
                    further from the truth
    texts (4 to 7)  ROUGE-1 and ROUGE-L, F-measures, no stemming, mean over the questions

Answers are compared after white space at both ends is taken away, and in no other way. Source: the
authors' evaluation script (LaMP-Benchmark/LaMP, eval/evaluation.py).
"""

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from ...common.errors import ConfigError, DataError
from ..evaluation.user_statistics import bootstrap_mean
from .tasks import Task

__all__ = ["each", "score"]


@dataclass(frozen=True)
class Scores:
    """A task's metrics over its questions.

    Attributes:
        metrics: each by its name, the task's first one first.
        ci95: of the first metric's mean, bootstrap over questions; None for one question.
        of_questions: the first metric's value for each question, in order.
    """

    metrics: dict[str, float]
    ci95: list[float] | None
    of_questions: list[float] = field(repr=False)


def score(task: Task, answers: Sequence[str], truth: Sequence[str]) -> Scores:
    """The task's metrics over its questions.

    Raises:
        DataError: no question, or not one answer each; a truth that is not allowed.
        ConfigError: the library is not installed.
    """
    if not answers or len(answers) != len(truth):
        raise DataError(f"expected an answer to each of {len(truth)} questions, got {len(answers)}")
    answers, truth = [one.strip() for one in answers], [one.strip() for one in truth]
    values = each(task, answers, truth)
    metrics = {task.measured[0]: float(values.mean())}
    if "f1" in task.measured:
        metrics["f1"] = _f1(task, answers, truth)
    if "rmse" in task.measured:
        metrics["rmse"] = math.sqrt(float(np.mean(values**2)))
    if "rouge-L" in task.measured:
        metrics["rouge-L"] = float(np.mean(_rouge("rougeL", answers, truth)))
    return Scores(metrics, bootstrap_mean(values).as_dict()["ci95"], values.tolist())


def each(task: Task, answers: Sequence[str], truth: Sequence[str]) -> NDArray[np.float64]:
    """Compute the first metric for every question by itself, shape (questions,)."""
    first = task.measured[0]
    if first == "accuracy":
        _refuse_unknown(task, truth)
        return np.array([float(one == right) for one, right in zip(answers, truth, strict=True)])
    if first == "mae":
        _refuse_unknown(task, truth)
        pairs = zip(answers, truth, strict=True)
        return np.array([abs(_number(one, float(right)) - float(right)) for one, right in pairs])
    return np.array(_rouge("rouge1", answers, truth))


def _f1(task: Task, answers: Sequence[str], truth: Sequence[str]) -> float:
    indices = {label: index for index, label in enumerate(task.labels)}
    return float(
        _library("sklearn.metrics").f1_score(
            [indices[right] for right in truth],
            [indices.get(one, -1) for one in answers],
            labels=list(indices.values()),
            average="macro",
            zero_division=0.0,
        )
    )


def _number(answer: str, truth: float) -> float:
    try:
        number = float(answer)
    except ValueError:
        number = math.nan
    return number if math.isfinite(number) else (1.0 if abs(1 - truth) > abs(5 - truth) else 5.0)


def _rouge(kind: str, answers: Sequence[str], truth: Sequence[str]) -> list[float]:
    scorer = _library("rouge_score.rouge_scorer").RougeScorer([kind], use_stemmer=False)
    pairs = zip(answers, truth, strict=True)
    return [float(scorer.score(right, one)[kind].fmeasure) for one, right in pairs]


def _refuse_unknown(task: Task, truth: Sequence[str]) -> None:
    odd = sorted({*truth} - {*task.labels})
    if odd:
        raise DataError(
            f"{task.name} has the answers {', '.join(task.labels)}, and the outputs hold "
            f"{odd[0]!r}; is it a file of this task?"
        )


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(
            f"LaMP's metrics need {name}: pip install 'privet[experiments]'"
        ) from None
