"""Who somebody is in their own words: a short summary, and the text that is put before a prompt.

The summary is made on the device from the person's records alone: how long they write, how they
end their sentences, and the words and pairs of words they use more than people do. What people do
is public: the order of a tokenizer's vocabulary, which is by frequency, read as Zipf's law.

**Guarantee**: summary and context are as private as the records. They go to the model on this
device, the screen and the vault; nothing that answers a server imports this module.
"""

import heapq
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Protocol, TypeVar

from ...common.errors import ConfigError
from ..training.records import Record
from .retrieval import Hit, TextIndex, pick
from .templates import Template, render

__all__ = ["Context", "Profile", "context", "describe", "profile_of", "public_chances"]

FAVOURITES, PHRASES = 12, 6
MAX_HITS = 30
"""Texts of the history that a prompt's context is picked from."""
PRIOR = 2000.0
"""Words of public text that stand against the person's own (shrinkage)."""
SURE = 2.0
"""Standard errors that a favourite's log-odds must lie above zero."""
ZIPF = 2.7
"""Mandelbrot's shift: a word of rank r has a chance in proportion to 1 / (r + 2.7)."""
COMMON = 150
"""The most frequent words of all are nobody's favourites, and no phrase has only them."""
_SENTENCE = re.compile(r"[.!?]+")
_WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")
_WORD_STARTS = "\u0120\u2581"


@dataclass(frozen=True)
class Profile:
    """A private summary of how one person writes, made from their records.

    Attributes:
        records: how many it was made from.
        words: median words of a record; `sentence`: of a sentence.
        asks, exclaims, lower: shares of the records with a question mark, with an exclamation
            mark, beginning in lower case.
        favourites: own words, the surest first; `phrases`: pairs of words, likewise.
        label: mean or most frequent label; None without labels.
    """

    records: int
    words: float
    sentence: float
    asks: float
    exclaims: float
    lower: float
    favourites: tuple[str, ...] = field(repr=False)
    phrases: tuple[str, ...] = field(repr=False)
    label: float | str | None = field(repr=False)

    def to_bytes(self) -> bytes:
        """Return the summary as the JSON bytes that the vault keeps."""
        return json.dumps(asdict(self)).encode()


@dataclass(frozen=True)
class Context:
    """The text that goes to the model, and what it was made from.

    Attributes:
        text: the template, filled in, with the prompt.
        tokens: of `text`.
        hits: the texts of the history that are in it.
        with_profile: whether the summary is.
    """

    text: str = field(repr=False)
    tokens: int
    hits: tuple[Hit, ...]
    with_profile: bool


class Vocabulary(Protocol):
    """The one method of a tokenizer that is used here."""

    def get_vocab(self) -> Mapping[str, int]:
        """Return each token's number."""


def public_chances(tokenizer: Vocabulary) -> dict[str, float]:
    """Estimate how likely each word is in public text, from the order of a tokenizer's vocabulary.

    The chances follow Zipf's law and sum to 1.

    Byte-pair and WordPiece vocabularies list what is frequent first. Only tokens that begin a word
    count, where the vocabulary marks them.
    """
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    marked = [token[1:] for token in tokens if token[:1] in _WORD_STARTS]
    ranks: dict[str, int] = {}
    for token in marked or tokens:
        word = token.lower()
        if word.isalpha() and (len(word) > 1 or word in "ai") and word not in ranks:
            ranks[word] = len(ranks) + 1
    total = sum(1 / (rank + ZIPF) for rank in ranks.values())
    return {word: 1 / (rank + ZIPF) / total for word, rank in ranks.items()}


def profile_of(records: Sequence[Record], public: Mapping[str, float]) -> Profile:
    """Summarise how somebody writes, from their records.

    A favourite is used at least three times, in two records at least, and its log-odds against
    the public chances, shrunken by a Dirichlet prior of `PRIOR` words, lie `SURE` standard errors
    above zero (Monroe, Colaresi and Quinn, Fightin' Words, 2008, section 3.3). A phrase is a pair
    of words that follow each other more often than their own chances say, by the same rule.

    Args:
        records: earliest first; none: an empty summary.
        public: word -> chance, from `public_chances`.
    """
    rows = [_WORD.findall(record.text.lower()) for record in records]
    sentences = [
        len(_WORD.findall(part))
        for record in records
        for part in _SENTENCE.split(record.text)
        if _WORD.search(part)
    ]
    common = set(heapq.nlargest(COMMON, public, key=lambda word: public[word]))
    return Profile(
        records=len(records),
        words=statistics.median(map(len, rows)) if rows else 0.0,
        sentence=statistics.median(sentences) if sentences else 0.0,
        asks=_share(records, lambda text: "?" in text),
        exclaims=_share(records, lambda text: "!" in text),
        lower=_share(records, lambda text: text[:1].islower()),
        favourites=_favourites(rows, public, common),
        phrases=_phrases(rows, common),
        label=_label([record.label for record in records if record.label is not None]),
    )


def _favourites(
    rows: Sequence[Sequence[str]], public: Mapping[str, float], common: Set[str]
) -> tuple[str, ...]:
    rare = min(public.values(), default=1e-6)
    words = Counter(word for row in rows for word in row)
    spread = Counter(word for row in rows for word in set(row))
    own = {word: n for word, n in words.items() if len(word) > 2 and word not in common}
    chances = {word: public.get(word, rare) for word in own}
    return tuple(_surest(own, words.total(), chances, spread)[:FAVOURITES])


def _phrases(rows: Sequence[Sequence[str]], common: Set[str]) -> tuple[str, ...]:
    words = Counter(word for row in rows for word in row)
    pairs = Counter(pair for row in rows for pair in pairwise(row))
    spread = Counter(pair for row in rows for pair in set(pairwise(row)))
    own = {pair: n for pair, n in pairs.items() if not common >= {*pair}}
    total = words.total()
    chances = {(a, b): (words[a] / total) * (words[b] / total) for a, b in own}
    return tuple(map(" ".join, _surest(own, pairs.total(), chances, spread)[:PHRASES]))


def describe(profile: Profile) -> str:
    """Describe a summary in a few short English sentences.

    Empty where there were no records.
    """
    if not profile.records:
        return ""
    sentences = [f"Writes about {profile.words:.0f} words at a time."]
    if profile.favourites:
        sentences.append(f"Often uses: {', '.join(profile.favourites)}.")
    if profile.phrases:
        sentences.append(f"Often says: {', '.join(profile.phrases)}.")
    habits = [
        habit
        for share, habit in (
            (profile.asks, "asks questions"),
            (profile.exclaims, "exclaims"),
            (profile.lower, "begins in lower case"),
        )
        if share >= 1 / 3
    ]
    if habits:
        sentences.append(f"Often {' and '.join(habits)}.")
    if isinstance(profile.label, float):
        sentences.append(f"Rates at {profile.label:.2g} on average.")
    elif profile.label is not None:
        sentences.append(f"Mostly says: {profile.label}.")
    return " ".join(sentences)


def context(
    template: Template,
    prompt: str,
    index: TextIndex,
    count: Callable[[str], int],
    budget: int,
    profile: Profile | None = None,
) -> Context:
    """Put a template around a prompt, with the summary and the retrieved texts that fit a budget.

    What fits the prompt best stands nearest to it. Summary and texts are left out of a template
    that has no place for them.

    Args:
        template: whose.
        prompt: what the person asks; also the query.
        index: over the history.
        count: tokens of a text.
        budget: tokens of the whole beyond those of the prompt alone.
        profile: None for none.

    Raises:
        ConfigError: the bare template does not fit the budget.

    **Guarantee**: `tokens` is at most `budget` more than `count(prompt)`.
    """
    max_tokens = budget + count(prompt)
    used = count(render(template, prompt=prompt))
    if used > max_tokens:
        raise ConfigError(
            f"template {template.name!r} takes {used - max_tokens} tokens more than the budget of "
            f"{budget}; raise it, or take another template"
        )
    summary = "" if profile is None or "{profile}" not in template.text else describe(profile)
    if summary and count(render(template, prompt=prompt, profile=summary)) > max_tokens:
        summary = ""
    picked: list[Hit] = []
    if "{history}" in template.text:
        used = count(render(template, prompt=prompt, profile=summary))
        hits = index.search(prompt, MAX_HITS)
        lengths = [1 + count(index.texts[hit.index]) for hit in hits]
        picked = pick(index, hits, lengths, max_tokens - used)
    while True:
        history = "\n\n".join(index.texts[hit.index] for hit in reversed(picked))
        text = render(template, prompt=prompt, profile=summary, history=history)
        tokens = count(text)
        if tokens <= max_tokens:
            return Context(text, tokens, tuple(picked), bool(summary))
        picked.pop()


_Term = TypeVar("_Term", str, tuple[str, str])
"""A word, or a pair of words that follow each other."""


def _surest(
    counts: Mapping[_Term, int],
    total: int,
    chances: Mapping[_Term, float],
    spread: Mapping[_Term, int],
) -> list[_Term]:
    """Return what is used surely more often than its chance, the surest first."""
    surest = []
    for term, used in counts.items():
        chance = chances[term]
        if used < 3 or spread[term] < 2 or chance >= 0.5:
            continue
        prior = PRIOR * chance
        own = (used + prior) / max(total + PRIOR - used - prior, 1.0)
        z_score = (math.log(own) - math.log(chance / (1 - chance))) * math.sqrt(used + prior)
        if z_score > SURE:
            surest.append((-z_score, term))
    return [term for _, term in sorted(surest)]


def _share(records: Sequence[Record], has_habit: Callable[[str], bool]) -> float:
    return sum(has_habit(record.text) for record in records) / len(records) if records else 0.0


def _label(labels: Sequence[float | str]) -> float | str | None:
    numbers = [label for label in labels if isinstance(label, float | int)]
    if numbers and len(numbers) == len(labels):
        return float(statistics.fmean(numbers))
    return Counter(map(str, labels)).most_common(1)[0][0] if labels else None
