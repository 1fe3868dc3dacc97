"""LaMP: seven tasks of personalised answers, read from their published files.

    1 citation identification     2 movie tagging        3 product rating
    4 news headline               5 scholarly title      6 e-mail subject       7 tweet paraphrase

A task's folder holds, for each split, `SPLIT_questions.json`, a list of {"id", "input", "profile"},
the profile being a list of the person's earlier items, and `SPLIT_outputs.json`, {"task": "LaMP_1",
"golds": [{"id", "output"}, ...]}. An item has an "id", the task's fields, and in the time-based
files a "date". The test split's outputs are not published.

Source: Salemi, Mysore, Bendersky, Zamani 2024, "LaMP: When Large Language Models Meet
Personalization" (ACL), and the authors' repository LaMP-Benchmark/LaMP, for file formats, query
parts, baselines and metrics. The words around a profile's items are privet's own; the question
itself is the file's.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from ...client.assistant.retrieval import Encoder, Ranking, TextIndex
from ...common.errors import ConfigError, DataError

__all__ = [
    "RETRIEVALS",
    "TASKS",
    "Item",
    "Question",
    "Task",
    "instruction",
    "prompt",
    "query",
    "read_outputs",
    "read_questions",
    "retrieve",
    "task_of",
]

RETRIEVALS = ("none", "random", "recency", "bm25", "dense")
Retrieval = Literal["none", "random", "recency", "bm25", "dense"]
Item = Mapping[str, str]
"""One item of a profile: its fields as text."""

MOVIE_TAGS = (
    "sci-fi", "based on a book", "comedy", "action", "twist ending", "dystopia", "dark comedy",
    "classic", "psychology", "fantasy", "romance", "thought-provoking", "social commentary",
    "violence", "true story",
)  # fmt: skip
_QUESTION_SHARE = 0.6  # of the tokens; the rest is the profile's


@dataclass(frozen=True)
class Task:
    """One of LaMP's seven tasks.

    Attributes:
        name: `LaMP-1` to `LaMP-7`.
        about: in a few words.
        text: the field of an item that may be long, and is cut to fit.
        answer: the field that has what the person made of it; None where the text itself is that.
        labels: the allowed answers; none for tasks that make text.
        after: the part of an input that is searched with begins after this.
        measured: the metrics as published, the first is the one to compare by.
        item: how an item reads in a prompt, from {text} and {answer}.
    """

    name: str
    about: str
    text: str
    answer: str | None
    labels: tuple[str, ...]
    after: str
    measured: tuple[str, ...]
    item: str

    @property
    def fields(self) -> tuple[str, ...]:
        """What every item of a profile must have."""
        return (self.text,) if self.answer is None else (self.text, self.answer)

    @property
    def official(self) -> str:
        """Name of the task in the published outputs."""
        return self.name.replace("-", "_")


_ROUGE = ("rouge-1", "rouge-L")
_LABELS = ("accuracy", "f1")

TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task("LaMP-1", "citation identification", "abstract", "title", ("[1]", "[2]"), "",
             _LABELS, 'The author has written "{answer}".'),
        Task("LaMP-2", "movie tagging", "description", "tag", MOVIE_TAGS, "description:",
             _LABELS, 'Description: {text}\nTag: {answer}'),
        Task("LaMP-3", "product rating", "text", "score", ("1", "2", "3", "4", "5"), "review:",
             ("mae", "rmse"), 'Review: {text}\nScore: {answer}'),
        Task("LaMP-4", "news headline", "text", "title", (), "article:", _ROUGE,
             'Article: {text}\nHeadline: {answer}'),
        Task("LaMP-5", "scholarly title", "abstract", "title", (), "paper:", _ROUGE,
             'Abstract: {text}\nTitle: {answer}'),
        Task("LaMP-6", "e-mail subject", "text", "title", (), ":", _ROUGE,
             'E-mail: {text}\nSubject: {answer}'),
        Task("LaMP-7", "tweet paraphrase", "text", None, (), ":", _ROUGE,
             'The person has written: {text}'),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Question:
    """One question of one person.

    Everything but the id is masked in `repr`.

    Attributes:
        id: of the question.
        text: the input.
        profile: the person's items, in the file's order.
        dates: of the items, where every item has one.
    """

    id: str
    text: str = field(repr=False)
    profile: tuple[Item, ...] = field(repr=False)
    dates: tuple[str, ...] | None = field(default=None, repr=False)


def task_of(name: str) -> Task:
    """`LaMP-3`, `LaMP_3`, `lamp3` or `3` -> the task.

    Raises:
        ConfigError: none of the seven.
    """
    number = re.fullmatch(r"(?:lamp)?[-_ ]?([1-7])", name.strip(), re.IGNORECASE)
    if number is None:
        known = ", ".join(f"{task.name} ({task.about})" for task in TASKS.values())
        raise ConfigError(f"--task {name!r}: expected one of {known}")
    return TASKS[f"LaMP-{number[1]}"]


def read_questions(path: Path, task: Task) -> list[Question]:
    """A file of questions.

    Raises:
        DataError: unreadable, not JSON, not such a list, a field missing, or an id twice; names
            the file, the question's place and the field.
    """
    found = _json(path)
    if not isinstance(found, list) or not found:
        raise DataError(
            f"{path}: expected a list of questions with id, input and profile, found "
            f"{_kind(found)}; take the task's SPLIT_questions.json"
        )
    questions = [_question(each, f"{path}, question {n}", task) for n, each in enumerate(found, 1)]
    _refuse_repeated([question.id for question in questions], path)
    return questions


def read_outputs(path: Path, task: Task) -> dict[str, str]:
    """A file of outputs, published or of a model: id -> answer.

    Raises:
        DataError: unreadable, not such a file, of another task, or an id twice.
    """
    found = _json(path)
    if not isinstance(found, dict) or not isinstance(found.get("golds"), list):
        raise DataError(
            f'{path}: expected {{"task": "{task.official}", "golds": [...]}}, found '
            f"{_kind(found)}; take the task's SPLIT_outputs.json"
        )
    if found.get("task") != task.official:
        raise DataError(
            f"{path} is of task {found.get('task')!r}, and {task.official!r} was asked for; name "
            "its task with --task"
        )
    pairs = []
    for number, each in enumerate(found["golds"], 1):
        where = f"{path}, output {number}"
        if not isinstance(each, dict):
            raise DataError(f"{where}: expected an object with id and output, found {_kind(each)}")
        pairs.append((_text(each, "id", where), _text(each, "output", where)))
    _refuse_repeated([name for name, _ in pairs], path)
    return dict(pairs)


def query(task: Task, text: str) -> str:
    """The part of a question that a profile is searched with.

    Citations: the titles of both candidates, which are the last two quoted texts; else what stands
    after the task's mark. The whole input where it is written in another way.
    """
    if not task.after:
        quoted = re.findall(r'"([^"]*)"', text)
        return " ".join(quoted[-2:]) if len(quoted) > 1 else text
    _, mark, rest = text.partition(task.after)
    return rest.strip() if mark and rest.strip() else text


def instruction(task: Task, text: str) -> str:
    """Return what all questions share: a question without what it is about."""
    about = query(task, text)
    if task.after:
        return text.replace(about, "N/A") if about != text else "N/A"
    return re.sub(r'"[^"]*"', '"N/A"', text)


def retrieve(
    task: Task, question: Question, how: Retrieval, k: int, seed: int, encoder: Encoder | None
) -> list[Item]:
    """At most k items of the profile, the best first.

    Args:
        task: of the question.
        question: whose profile.
        how: `none`; `random`, without repetition; `recency`, by date where there are dates, else
            the file's order, the last first; `bm25`; `dense`, by the encoder's cosine.
        k: at least 1.
        seed: of `random`, with the question's id.
        encoder: for `dense`.

    Raises:
        ConfigError: k below 1, no such way, or `dense` without an encoder.
    """
    if k < 1:
        raise ConfigError(f"--k {k}: expected at least 1 item")
    profile, size = question.profile, len(question.profile)
    if how == "none" or not size:
        return []
    if how == "random":
        rng = np.random.default_rng([seed, *question.id.encode()])
        return [profile[place] for place in rng.permutation(size)[:k]]
    if how == "recency":
        dates = question.dates
        order = sorted(range(size), key=lambda place: (_moment(dates[place]) if dates else (),
                                                       place))  # fmt: skip
        return [profile[place] for place in reversed(order[-k:])]
    if how not in ("bm25", "dense"):
        raise ConfigError(f"--retrieval {how!r}: expected one of {', '.join(RETRIEVALS)}")
    if how == "dense" and encoder is None:
        raise ConfigError("--retrieval dense needs a sentence encoder")
    ranking = Ranking(float(how == "bm25"), float(how == "dense"), recency=0.0, pool=k)
    index = TextIndex.build([_searched(task, item) for item in profile],
                        encoder if how == "dense" else None)  # fmt: skip
    return [profile[hit.index] for hit in index.search(query(task, question.text), k, ranking)]


def prompt(
    task: Task,
    question: Question,
    items: Sequence[Item],
    tokens: int,
    cut: Callable[[str, int], tuple[str, int]],
) -> str:
    """Build a prompt: the items, one below the other, and then the question.

    Args:
        task, question: what is asked.
        items: from `retrieve`.
        tokens: in all; the question has at most 60 % of them where there are items, these share
            the rest equally, and what one leaves over is the next one's.
        cut: text, limit -> the text cut to so many tokens, and how many it has.

    Items of which nothing but the frame would fit are left out.
    """
    share = int(_QUESTION_SHARE * tokens) if items else tokens
    asked, used = cut(question.text, share)
    left, lines = tokens - used, []
    for number, item in enumerate(items):
        allowed = left // (len(items) - number)
        answer = "" if task.answer is None else item[task.answer]
        _, frame = cut(task.item.format(text="", answer=answer), tokens)
        if frame >= allowed:
            continue
        text, _ = cut(item[task.text], allowed - frame)
        lines.append(task.item.format(text=text, answer=answer))
        left -= cut(lines[-1], tokens)[1]
    return "\n\n".join([*lines, asked])


def _searched(task: Task, item: Item) -> str:
    """What of an item is searched: its title and its text, and never a label."""
    title = item[task.answer] if task.answer == "title" else ""
    return f"{title} {item[task.text]}".strip()


def _moment(date: str) -> tuple[int, ...]:
    """Parse 2016-04-05 or 2016 into numbers that sort by time."""
    return tuple(int(part) for part in re.findall(r"\d+", date))


def _question(found: object, where: str, task: Task) -> Question:
    if not isinstance(found, dict):
        raise DataError(f"{where}: expected an object, found {_kind(found)}")
    profile = found.get("profile")
    if not isinstance(profile, list):
        raise DataError(f'{where}: expected "profile" to be a list, found {_kind(profile)}')
    items = []
    for number, item in enumerate(profile, 1):
        place = f"{where}, profile item {number}"
        if not isinstance(item, dict):
            raise DataError(f"{place}: expected an object, found {_kind(item)}")
        items.append({name: _text(item, name, place) for name in task.fields})
    dated = bool(profile) and all("date" in item for item in profile)
    dates = tuple(str(item["date"]) for item in profile) if dated else None
    return Question(_text(found, "id", where), _text(found, "input", where), tuple(items), dates)


def _text(found: Mapping[str, object], name: str, where: str) -> str:
    value = found.get(name)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(
            f'{where}: expected "{name}" to be a text, found '
            f"{_kind(value) if name in found else 'none'}; is it a file of this task?"
        )
    try:
        str(value).encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f'{where}: "{name}" holds half a surrogate pair, not a text') from None
    return str(value)


def _json(path: Path) -> object:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); see docs/lamp.md") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}); download it again") from None


def _refuse_repeated(names: Sequence[str], path: Path) -> None:
    if len({*names}) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{path}: the id {twice!r} occurs twice; download the file again")


def _kind(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", type(None): "nothing"}
    if isinstance(value, list) and not value:
        return "an empty list"
    return kinds.get(type(value), f"a {type(value).__name__}")
