"""One line a person -> what a comparison found: means, gains, controls, deciles, drift.

A gain is a loss minus a loss of the same person, above zero is better. Intervals are 95 %, by a
bootstrap over people. Texts: bits per byte; labels: the loss of the task.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..evaluation.metrics import bits_per_byte, deciles, label_metrics
from ..evaluation.user_statistics import (
    bootstrap,
    bootstrap_mean,
    fraction_hurt,
    gini,
    ratio,
    win_rate,
)

__all__ = ["NAMES", "loss_per_user", "summarised"]

Row = Mapping[str, Any]

NAMES = {
    "base": "base model",
    "prompt": "own texts in front of the base model",
    "global": "shared model",
    "retrieval": "own texts in front of the shared model",
    "head": "personal head",
    "hybrid": "own texts and personal head",
    "personal": "chosen by each person's own records",
    "retrieval_swapped": "another person's texts",
    "head_swapped": "another person's head",
    "hybrid_swapped": "another person's texts and head",
    "hybrid_other_profile": "another person's texts, own head",
    "hybrid_other_head": "own texts, another person's head",
}
CONTROL_OF = {
    "retrieval_swapped": "retrieval",
    "head_swapped": "head",
    "hybrid_swapped": "hybrid",
    "hybrid_other_profile": "hybrid",
    "hybrid_other_head": "hybrid",
}


def loss_per_user(rows: Sequence[Row], model: str) -> list[float]:
    """Each person's loss under a model: bits per byte of texts, the mean loss of labels."""
    return [_loss(row, model) for row in rows]


def summarised(rows: Sequence[Row], draws: int) -> dict[str, Any]:
    """The tables of a comparison.

    Args:
        rows: a line for each person, of `evaluate_text` or `evaluate_labels`.
        draws: of the bootstrap.
    """
    measured = list(next(iter(rows))["nats"])
    shared = "global" if "global" in measured else "base"
    losses = {model: loss_per_user(rows, model) for model in measured}
    texts = "bytes" in rows[0]
    chosen = [str(row["chosen"]) for row in rows]
    return {
        "people": len(rows),
        "records": sum(len(row["nats"][shared]) for row in rows),
        "unit": "bits per byte" if texts else rows[0]["unit"],
        "shared": shared,
        "models": [_model(model, losses, shared, rows, draws) for model in measured],
        "comparisons": _comparisons(losses, shared, draws),
        "chosen": {name: chosen.count(name) for name in sorted(set(chosen))},
        "over_time": _over_time(rows, shared, draws),
    }


def _loss(row: Row, model: str) -> float:
    if "bytes" in row:
        return bits_per_byte(sum(row["nats"][model]), max(1, sum(row["bytes"])))
    return float(np.mean(row["nats"][model]))


def _model(
    model: str,
    losses: Mapping[str, Sequence[float]],
    shared: str,
    rows: Sequence[Row],
    draws: int,
) -> dict[str, Any]:
    gains = np.subtract(losses[shared], losses[model])
    row = {
        "model": model,
        "name": NAMES.get(model, model),
        "control": model in CONTROL_OF,
        "loss": bootstrap_mean(losses[model], draws=draws).as_dict(),
        "gain": bootstrap_mean(gains, draws=draws).as_dict(),
        "win_rate": win_rate(gains),
        "ties": float(np.mean(gains == 0)),
        "hurt": fraction_hurt(gains),
        "deciles": deciles(gains.tolist()),
        "gini_of_losses": gini(losses[model]) if min(losses[model]) >= 0 else None,
    }
    if "tokens" in rows[0]:
        nats = [sum(line["nats"][shared]) - sum(line["nats"][model]) for line in rows]
        each = [n / max(1, sum(line["tokens"])) for n, line in zip(nats, rows, strict=True)]
        row["gain_nats_per_token"] = bootstrap_mean(each, draws=draws).as_dict()
    if "predicted" in rows[0]:
        predicted = [value for line in rows for value in line["predicted"][model]]
        true = [value for line in rows for value in line["labels"]]
        row["metrics"] = label_metrics(predicted, true, rows[0]["task"])
    return row


def _comparisons(
    losses: Mapping[str, Sequence[float]], shared: str, draws: int
) -> list[dict[str, Any]]:
    """Pairs whose difference is a claim: (worse - better), above zero where the claim holds."""
    front = "retrieval" if shared == "global" else "prompt"
    wanted = [(shared, "hybrid"), (front, "hybrid"), ("head", "hybrid"), (shared, "personal")]
    if shared == "global":
        wanted.insert(0, ("base", "global"))
        wanted.insert(1, ("prompt", "hybrid"))
    wanted += [
        (control, front if own == "retrieval" else own) for control, own in CONTROL_OF.items()
    ]
    return [
        {
            "better": better,
            "worse": worse,
            "title": f"{NAMES.get(better, better)}, over {NAMES.get(worse, worse)}",
            **bootstrap_mean(np.subtract(losses[worse], losses[better]), draws=draws).as_dict(),
            "gain_kept": _kept(losses, shared, worse, better),
        }
        for worse, better in wanted
        if worse in losses and better in losses
    ]


def _kept(
    losses: Mapping[str, Sequence[float]], shared: str, control: str, own: str
) -> float | None:
    """Return the share of the own model's gain that the control has too.

    It is None for no control, or no gain.
    """
    if control not in CONTROL_OF:
        return None
    gain = float(np.mean(np.subtract(losses[shared], losses[own])))
    return float(np.mean(np.subtract(losses[shared], losses[control]))) / gain if gain > 0 else None


def _over_time(rows: Sequence[Row], shared: str, draws: int) -> list[dict[str, Any]]:
    """Gain of `personal` by how late a held-out record is: ten parts of each person's time.

    A part's gain is that of all its text together, and its bootstrap is over the people who have a
    record there: a mean of single short records would be mostly their luck. The personal side is
    as old as the own records: nothing of the held-out time is added to it.
    """
    texts, parts = "bytes" in rows[0], []
    for part in range(10):
        pairs = []
        for row in rows:
            there = [i for i, t in enumerate(row["time"]) if min(9, int(10 * t)) == part]
            size = sum(row["bytes"][i] if texts else 1 for i in there)
            lost, kept = row["nats"][shared], row["nats"]["personal"]
            if size:
                gain = sum(lost[i] - kept[i] for i in there)
                pairs.append((gain / np.log(2) if texts else gain, size))
        if pairs:
            mean = bootstrap(ratio, *np.array(pairs, dtype=np.float64).T, draws=draws).as_dict()
            parts.append({"decile": part + 1, "people": len(pairs), **mean})
    return parts
