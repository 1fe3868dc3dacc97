"""Texts made for a person: overlap with what came, style, diversity, another person's profile.

For each held-out opening four answers are drawn at the same temperature:

    shared   the shared model                      hybrid   own texts in front and own head
    swapped  another person's texts and head       again    hybrid, from another seed

*swapped* against *hybrid* is the counterfactual: the same question, another profile. Two draws of
one model differ as well, so *again* against *hybrid* is what the distance is held against. Answers
are those of the hybrid for everybody, fall-back or not: harm is measured where there is most of it.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypedDict

import numpy as np
from numpy.typing import NDArray

from ...client.assistant.text_generation import Sampling, completed
from .metrics import distinct_n, style_distance, text_overlap
from .user_statistics import Mean, bootstrap_mean

if TYPE_CHECKING:
    from ..comparison.study import Study

__all__ = ["evaluate_user", "summarised"]

Line = Mapping[str, float]


class AnswerSummary(TypedDict):
    """Means over people of everything that was measured of answers, and their `narrowed`."""

    people: int
    means: dict[str, Mean]
    narrowed: list[float]


MODELS = ("shared", "hybrid", "swapped", "again")


def evaluate_user(study: "Study", user: str) -> dict[str, float] | None:
    """Evaluate one person's answers under the four models.

    The texts themselves are not kept.
    """
    wanted, text = study.scenario.answers, study.evaluator.text
    base, held_out, partner = text.adapter.base, study.held_out(user), study.partner(user)
    if not held_out or partner is None:
        return None
    own, other = study.side(user), study.side(partner)
    questions = text.asked(held_out[: wanted.records])
    openings = [list(one.ids[: one.given]) for one in questions]
    queries = [one.query(base.tokenizer) for one in questions]
    mine, theirs = (
        [list(side.history.context(query, study.evaluator.budget)) + start
         for query, start in zip(queries, openings, strict=True)]
        for side in (own, other)
    )  # fmt: skip
    text.adapter.write(text.shared)
    first, second = (Sampling(wanted.tokens, wanted.temperature, seed) for seed in (1, 2))
    made = {
        "shared": completed(base, openings, None, first),
        "hybrid": completed(base, mine, own.hybrid, first),
        "swapped": completed(base, theirs, other.hybrid, first),
        "again": completed(base, mine, own.hybrid, second),
    }
    texts = {
        name: [str(base.tokenizer.decode(ids, skip_special_tokens=True)) for ids in rows]
        for name, rows in made.items()
    }
    references = [one.scored_text(base.tokenizer) for one in questions]
    return _line(study, texts, references, [str(text) for text in own.history.index.texts])


def summarised(lines: Sequence[Line], draws: int) -> AnswerSummary:
    """Means over people of everything in the lines, and the differences that are claims."""
    names = [name for name in lines[0] if name != "user"]
    means = {
        name: bootstrap_mean([line[name] for line in lines], draws=draws).as_dict()
        for name in names
    }
    pairs = {
        "diversity_lost": ("distinct2_shared", "distinct2_hybrid"),
        "style_nearer": ("style_shared", "style_hybrid"),
        "persona_effect": ("swapped_from_hybrid", "again_from_hybrid"),
        "rougeL_gain": ("rougeL_hybrid", "rougeL_shared"),
    }
    for name, (more, less) in pairs.items():
        gaps = [line[more] - line[less] for line in lines]
        means[name] = bootstrap_mean(gaps, draws=draws).as_dict()
    return {"people": len(lines), "means": means, "narrowed": narrowed(lines)}


def narrowed(lines: Sequence[Line]) -> list[float]:
    """Return each person's relative loss of distinct-2 against the shared model.

    Below 0 it is a gain.
    """
    return [
        1 - line["distinct2_hybrid"] / line["distinct2_shared"] if line["distinct2_shared"] else 0.0
        for line in lines
    ]


def _line(
    study: "Study", texts: dict[str, list[str]], references: list[str], own: list[str]
) -> dict[str, float]:
    figures: dict[str, float] = {}
    for name in MODELS[:2]:
        figures |= {
            f"{key}_{name}": value for key, value in text_overlap(texts[name], references).items()
        }
        figures[f"distinct1_{name}"] = distinct_n(texts[name], 1)
        figures[f"distinct2_{name}"] = distinct_n(texts[name], 2)
        has_text = any(text.strip() for text in texts[name])
        figures[f"style_{name}"] = style_distance(texts[name], own) if has_text else 1.0
    for name in ("swapped", "again", "shared"):
        overlap = text_overlap(texts[name], texts["hybrid"])["rougeL"]
        figures[f"{name}_from_hybrid"] = 1.0 - overlap
    encoder = study.evaluator.encoder
    if encoder is not None:
        for name in MODELS[:2]:
            rows = encoder(texts[name]).astype(np.float64)
            figures[f"spread_{name}"] = _spread(rows @ rows.T)
    return figures


def _spread(cosines: NDArray[np.float64]) -> float:
    """Return the mean of one minus the cosine over pairs of texts. It is 0 for one text."""
    count = len(cosines)
    if count < 2:
        return 0.0
    return float(1 - (cosines.sum() - np.trace(cosines)) / (count * (count - 1)))
