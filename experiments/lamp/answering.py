"""LaMP with a frozen model: retrieve, build the prompt, answer, score.

    choose    labels only: the label whose mean log probability a token rises most over what it is
              for the instruction alone (Holtzman et al. 2021), since a small model prefers some
              labels whatever it is asked
    generate  greedy text, its first line; what the published metrics were made for

Run on published data by the experimenter: nothing is trained, nothing is sent, no epsilon applies.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ...client.assistant.text_generation import Sampling, completed
from ...common.errors import ConfigError, DataError, ModelError
from ...common.model.base_model import BaseModel, load
from .. import progress
from ..evaluation.user_statistics import paired_difference
from .scores import score
from .tasks import (
    RETRIEVALS,
    Question,
    Task,
    instruction,
    prompt,
    read_outputs,
    read_questions,
    retrieve,
)

__all__ = ["Settings", "answers", "compare", "files_of", "scored"]


@dataclass(frozen=True)
class Settings:
    """How questions are answered.

    Attributes:
        retrievals: ways, compared on the same questions; the first is what others are compared to.
        k: items of the profile in a prompt.
        tokens: of a prompt; more than the model reads is refused.
        new_tokens: of an answer.
        answer: `auto` chooses where there are labels and generates elsewhere.
        seed: of random retrieval.
        base: the model; catalogue name, folder or Hugging Face id.
    """

    retrievals: tuple[str, ...] = ("none", "random", "recency", "bm25")
    k: int = 4
    tokens: int = 512
    new_tokens: int = 24
    answer: Literal["auto", "choose", "generate"] = "auto"
    seed: int = 0
    base: str = "smollm2-135m-instruct"

    def __post_init__(self) -> None:
        odd = [way for way in self.retrievals if way not in RETRIEVALS]
        if odd or not self.retrievals or len({*self.retrievals}) < len(self.retrievals):
            raise ConfigError(
                f"--retrieval {','.join(self.retrievals)}: expected some of "
                f"{', '.join(RETRIEVALS)}, each once, with commas"
            )
        if self.answer not in ("auto", "choose", "generate"):
            raise ConfigError(f"--answer {self.answer!r}: expected auto, choose or generate")


def files_of(folder: Path, task: Task, split: str) -> tuple[Path, Path]:
    """The questions and the outputs of a split, wherever in a copy of the published folders.

    Raises:
        DataError: no such folder, or no questions in it; names what was looked for.
    """
    own = folder / task.official
    # movie tagging is published beside the news task that was LaMP-2 before
    inside = (folder, own / "new" / split, own / split, own, folder / "new" / split, folder / split)
    for place in inside:
        if (place / f"{split}_questions.json").is_file():
            return place / f"{split}_questions.json", place / f"{split}_outputs.json"
    raise DataError(
        f"{folder} has no {split}_questions.json of {task.name}, neither there nor in "
        f"{task.official}/{split}; docs/lamp.md says where the files come from"
    )


def compare(
    folder: Path, task: Task, split: str, limit: int | None, settings: Settings
) -> dict[str, Any]:
    """Answer a split's questions with each way of retrieval, and score them.

    Args:
        folder, task, split: as `files_of`.
        limit: the first so many questions; all of them when None.
        settings: how.

    Returns:
        `ways`: for each its metrics, the difference of its first metric to the first way's with a
        95 % interval over questions, and the answers in the format of the published outputs.
    """
    asked, right = files_of(folder, task, split)
    questions = read_questions(asked, task)[:limit]
    truth = _aligned(questions, read_outputs(right, task), right)
    base = load(settings.base)
    ways: dict[str, dict[str, object]] = {}
    first: list[float] = []
    for way in settings.retrievals:
        given = answers(base, task, questions, way, settings)
        scores = score(task, given, truth)
        first = first or scores.of_questions
        difference = paired_difference(scores.of_questions, first).as_dict() if ways else None
        ways[way] = {
            **scores.metrics,
            "ci95": scores.ci95,
            "against_first": difference,
            "predictions": {"task": task.official, "golds": _golds(questions, given)},
        }
    return {
        "task": task.name,
        "about": task.about,
        "split": split,
        "questions": len(questions),
        "answered_by": _manner(task, settings),
        "settings": dataclasses.asdict(settings),
        "ways": ways,
    }


def _golds(questions: Sequence[Question], given: Sequence[str]) -> list[dict[str, str]]:
    """Put answers into the format of the published outputs."""
    pairs = zip(questions, given, strict=True)
    return [{"id": question.id, "output": answer} for question, answer in pairs]


def scored(folder: Path, task: Task, split: str, predictions: Path) -> dict[str, Any]:
    """The metrics of answers made elsewhere, in the format of the published outputs.

    Raises:
        DataError: other ids than the split's.
    """
    _, right = files_of(folder, task, split)
    golds, given = read_outputs(right, task), read_outputs(predictions, task)
    if golds.keys() != given.keys():
        odd = sorted(golds.keys() ^ given.keys())
        raise DataError(
            f"{predictions}: expected the {len(golds)} ids of {right}, but {len(odd)} differ, "
            f"such as {odd[0]!r}"
        )
    scores = score(task, [given[name] for name in golds], list(golds.values()))
    about = {"task": task.name, "split": split, "questions": len(golds)}
    return {**about, **scores.metrics, "ci95": scores.ci95}


def answers(
    base: BaseModel, task: Task, questions: Sequence[Question], way: str, settings: Settings
) -> list[str]:
    """The model's answer to each question.

    Raises:
        ModelError: the model is an encoder, or does not read so many tokens.
    """
    if base.kind == "encoder":
        raise ModelError(f"--model {base.name}: an encoder answers nothing; take a decoder")
    room = getattr(base.network.config, "max_position_embeddings", None)
    if room is not None and settings.tokens + settings.new_tokens > room:
        raise ModelError(
            f"--tokens {settings.tokens}: {base.name} reads {room} tokens, answer included"
        )
    encoder = None
    if way == "dense":
        from ...client.assistant.sentence_encoder import sentence_encoder

        encoder = sentence_encoder()
    cut, manner = _cutter(base), _manner(task, settings)
    before: dict[str, list[float]] = {}
    given = []
    with progress.counting(f"{task.name}, {way}", len(questions), "questions") as one:
        for question in questions:
            items = retrieve(task, question, way, settings.k, settings.seed, encoder)  # type: ignore[arg-type]
            ids = _ids(base, prompt(task, question, items, settings.tokens, cut))
            if manner == "choose":
                asked = instruction(task, question.text)
                if asked not in before:
                    before[asked] = _likely(base, _ids(base, asked), task.labels)
                given.append(_chosen(task.labels, _likely(base, ids, task.labels), before[asked]))
            else:
                given.append(_generated(base, ids, settings.new_tokens))
            one()
    return given


def _manner(task: Task, settings: Settings) -> str:
    if settings.answer == "choose" and not task.labels:
        raise ConfigError(f"--answer choose: {task.name} has no labels to choose from")
    if settings.answer == "auto":
        return "choose" if task.labels else "generate"
    return settings.answer


def _cutter(base: BaseModel) -> Callable[[str, int], tuple[str, int]]:
    def cut(text: str, limit: int) -> tuple[str, int]:
        ids = base.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) <= limit:
            return text, len(ids)
        return str(base.tokenizer.decode(ids[:limit], skip_special_tokens=True)), limit

    return cut


def _ids(base: BaseModel, text: str) -> list[int]:
    """Tokenise a prompt in the form that the model was taught to read."""
    if getattr(base.tokenizer, "chat_template", None):
        turned = base.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
        )
        return list(base.tokenizer(turned, add_special_tokens=False)["input_ids"])
    return list(base.tokenizer(f"{text}\nAnswer: ")["input_ids"])


def _chosen(labels: Sequence[str], likely: Sequence[float], before: Sequence[float]) -> str:
    rises = [one - other for one, other in zip(likely, before, strict=True)]
    return labels[max(range(len(labels)), key=rises.__getitem__)]


@torch.inference_mode()
def _likely(base: BaseModel, ids: list[int], labels: Sequence[str]) -> list[float]:
    """Mean log probability of each label's tokens after a prompt, which is read once."""
    rows = [base.tokenizer(one, add_special_tokens=False)["input_ids"] for one in labels]
    longest = max(map(len, rows))
    device = base.compute.device
    read = base.network(torch.tensor([ids], device=device), use_cache=True)
    cache = read.past_key_values
    cache.batch_repeat_interleave(len(rows))
    padded = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
    seen = torch.ones(len(rows), len(ids) + longest, dtype=torch.int64, device=device)
    later = base.network(padded, past_key_values=cache, attention_mask=seen, use_cache=True).logits
    start = read.logits[:, -1:].expand(len(rows), 1, -1)
    scores = torch.cat([start, later[:, :-1]], 1).log_softmax(-1)
    found = scores.gather(2, padded[:, :, None])[:, :, 0]
    return [float(found[n, : len(row)].mean()) for n, row in enumerate(rows)]


def _generated(base: BaseModel, ids: list[int], most: int) -> str:
    """Generate greedily, and return the first line that is not blank."""
    (made,) = completed(base, [ids], None, Sampling(most, temperature=0))
    text = str(base.tokenizer.decode(made, skip_special_tokens=True))
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _aligned(questions: Sequence[Question], golds: dict[str, str], path: Path) -> list[str]:
    missing = [question.id for question in questions if question.id not in golds]
    if missing:
        raise DataError(
            f"{path}: no output for {len(missing)} of {len(questions)} questions, such as id "
            f"{missing[0]!r}; both files must be of one split"
        )
    return [golds[question.id] for question in questions]
