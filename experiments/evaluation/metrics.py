"""How good an answer or a prediction is, by well-kept libraries.

These are pure functions, and use no model.

    text     bits per byte; ROUGE-1 and ROUGE-L (rouge-score), BLEU (sacrebleu), distinct-n,
             style distance (character trigrams, scikit-learn)
    labels   accuracy, macro F1, MAE, RMSE (scikit-learn)
    users    deciles; win rate, fraction hurt, Gini and the bootstrap are in
             `user_statistics.py`

The libraries are in the extra `experiments` and are imported when a metric is asked for.
"""

import math
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

import numpy as np

from ...common.errors import ConfigError, DataError

__all__ = [
    "bits_per_byte",
    "deciles",
    "distinct_n",
    "label_metrics",
    "style_distance",
    "text_overlap",
]


def bits_per_byte(nats: float, count: int) -> float:
    """Nats over `count` bytes of UTF-8 as bits a byte: comparable over tokenizers.

    Args:
        nats: the sum over the text's tokens.
        count: bytes of the text, at least 1.

    Raises:
        DataError: no bytes, or nats that are not finite.

    >>> round(bits_per_byte(math.log(2) * 6, 3), 9)
    2.0
    """
    if count < 1 or not math.isfinite(nats):
        raise DataError(
            f"Bits per byte need finite nats over at least one byte, got {nats} over {count}; "
            "leave out texts without bytes."
        )
    return nats / math.log(2) / count


def text_overlap(texts: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """ROUGE-1 and ROUGE-L (F, mean over texts, 0 to 1) and corpus BLEU (0 to 100).

    Args:
        texts: what was made, at least one; an empty text scores 0.
        references: what was wanted, one for each.

    Raises:
        DataError: none, or different numbers of them.
        ConfigError: the libraries are not installed.
    """
    _same_number("texts", texts, references)
    rouge = _library("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rougeL"])
    scores = [rouge.score(right, text) for text, right in zip(texts, references, strict=True)]
    bleu = _library("sacrebleu").corpus_bleu(list(texts), [list(references)])
    return {
        "rouge1": float(np.mean([score["rouge1"].fmeasure for score in scores])),
        "rougeL": float(np.mean([score["rougeL"].fmeasure for score in scores])),
        "bleu": float(bleu.score),
    }


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Return the share of the texts' n-grams of words that are different (Li et al. 2016).

    Without any n-gram it is 0.

    Words are split at white space, lower case; an n-gram never spans two texts. It falls with the
    amount of text, so compare equal amounts.

    Raises:
        DataError: n below 1.

    >>> distinct_n(["a rose is a rose"], 1), distinct_n(["a b", "b c"], 2), distinct_n([""], 2)
    (0.6, 1.0, 0.0)
    """
    if n < 1:
        raise DataError(f"distinct-n needs n of at least 1, got {n}.")
    words = [text.lower().split() for text in texts]
    grams = [tuple(row[i : i + n]) for row in words for i in range(len(row) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def style_distance(texts: Sequence[str], own: Sequence[str]) -> float:
    """How far texts are from a person's own in their character trigrams: 0 same, 1 nothing shared.

    One minus the cosine of the two trigram counts, all texts of a side taken together, case and
    punctuation kept: the plain stylometric profile (Stamatatos 2009).

    Raises:
        DataError: a side without any text.
        ConfigError: scikit-learn is not installed.
    """
    if not any(text.strip() for text in texts) or not any(text.strip() for text in own):
        raise DataError("A style distance needs some text on both sides; got an empty one.")
    hashing = _library("sklearn.feature_extraction.text").HashingVectorizer(
        analyzer="char", ngram_range=(3, 3), lowercase=False, alternate_sign=False, norm="l2"
    )
    both = hashing.transform(["\n".join(texts), "\n".join(own)])
    return float(max(0.0, 1.0 - (both[0] @ both[1].T).toarray()[0, 0]))


def label_metrics(
    predicted: Sequence[float], labels: Sequence[float], task: str
) -> dict[str, float]:
    """`{"mae", "rmse"}` of a regression, `{"accuracy", "f1"}` (macro) of a classification.

    Args:
        predicted, labels: numbers, or class numbers; at least one, as many of each.
        task: "regression" or "classification".

    Raises:
        DataError: none, different numbers of them, or another task.
        ConfigError: scikit-learn is not installed.
    """
    _same_number("predicted", predicted, labels)
    scores = _library("sklearn.metrics")
    if task == "regression":
        return {
            "mae": float(scores.mean_absolute_error(labels, predicted)),
            "rmse": float(scores.root_mean_squared_error(labels, predicted)),
        }
    if task != "classification":
        raise DataError(f"Labels are of a regression or a classification, not of {task!r}.")
    true, said = [int(label) for label in labels], [int(label) for label in predicted]
    return {
        "accuracy": float(scores.accuracy_score(true, said)),
        "f1": float(scores.f1_score(true, said, average="macro", zero_division=0)),
    }


def deciles(values: Sequence[float]) -> list[float]:
    """Return the 0th, 10th … 100th percentile over users, interpolated: eleven numbers.

    Raises:
        DataError: no user, NaN or infinity.

    >>> deciles([0.0, 10.0])[:3]
    [0.0, 1.0, 2.0]
    """
    numbers = np.asarray(values, dtype=np.float64)
    if not len(numbers) or not np.isfinite(numbers).all():
        raise DataError("Deciles need one finite number for each user, and at least one user.")
    return [float(value) for value in np.percentile(numbers, range(0, 101, 10))]


def _same_number(name: str, found: Sequence[object], wanted: Sequence[object]) -> None:
    if not len(found) or len(found) != len(wanted):
        raise DataError(
            f"{name} and what they are compared with must be as many, and at least one; got "
            f"{len(found)} and {len(wanted)}."
        )


def _library(name: str) -> ModuleType:
    """A module of the extra `experiments`, imported when it is first used."""
    try:
        return import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise ConfigError(
            f"this metric needs {package}, which is not installed; install privet[experiments]"
        ) from None
