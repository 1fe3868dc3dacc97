"""Retrieval over one person's own history, on the device: which earlier texts a prompt is about.

Three rankings, fused by reciprocal rank (Cormack, Clarke and Buettcher, SIGIR 2009): *words*, BM25
as in Lucene; *meaning*, the cosine of sentence vectors (`client/assistant/sentence_encoder.py`);
*recency* among what the other two found. `pick` then takes what fits into a budget of tokens, the
relevant first and the same thing not twice (maximal marginal relevance, Carbonell and Goldstein,
SIGIR 1998).

**Guarantee**: nothing here writes or sends anything; an index lives in memory, and its `repr`
shows no text.
"""

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...common.errors import ConfigError, DataError

__all__ = ["Encoder", "Hit", "Ranking", "TextIndex", "pick", "words_of"]

Encoder = Callable[[Sequence[str]], NDArray[np.float32]]
"""Texts -> unit rows, (texts, width)."""

RANK_CONSTANT = 60
"""Of reciprocal rank fusion; the paper's own."""
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Ranking:
    """How three rankings are fused: how much each of them counts, and how long it is.

    Attributes:
        words, meaning, recency: weights of 1 / (60 + rank), >= 0; 0 leaves a ranking out.
        pool: how many texts of words and of meaning are fused.

    Raises:
        ConfigError: a negative weight, or an empty pool.
    """

    words: float = 1.0
    meaning: float = 1.0
    recency: float = 0.25
    pool: int = 100

    def __post_init__(self) -> None:
        weights = (self.words, self.meaning, self.recency)
        if not all(0 <= weight < float("inf") for weight in weights) or self.pool < 1:
            raise ConfigError(
                f"weights of retrieval must be at least 0 and its pool at least 1; they are "
                f"{weights} and {self.pool}"
            )


@dataclass(frozen=True, slots=True)
class Hit:
    """One text that was found.

    Attributes:
        index: in the history; 0 is the earliest.
        score: fused; comparable within one search only.
        words, meaning: its rank in each, 1 is the best; None: not in the pool.
    """

    index: int
    score: float
    words: int | None = None
    meaning: int | None = None


@dataclass(frozen=True, eq=False)
class TextIndex:
    """An index over texts, earliest first.

    Attributes:
        texts: what is searched.
        encoder: makes sentence vectors, or None: words and recency only.
        vectors: (texts, width) unit rows, with an encoder.
    """

    texts: tuple[str, ...] = field(repr=False)
    encoder: Encoder | None = field(repr=False)
    vectors: NDArray[np.float32] | None = field(repr=False)
    _sparse: Any = field(repr=False)

    @classmethod
    def build(
        cls,
        texts: Sequence[str],
        encoder: Encoder | None = None,
        vectors: NDArray[np.float32] | None = None,
    ) -> "TextIndex":
        """TextIndex a history.

        Args:
            texts: earliest first, as `DeviceStore.records` and `records.read_user` give them.
            encoder: None for words and recency only.
            vectors: the encoder's rows for `texts`, where they are known already.

        Raises:
            DataError: vectors without an encoder, not one a text, or not finite.
        """
        texts = tuple(texts)
        if vectors is not None and (
            encoder is None or len(vectors) != len(texts) or not np.isfinite(vectors).all()
        ):
            raise DataError(
                f"expected an encoder and one finite vector for each of {len(texts)} texts, got "
                f"{len(vectors)} vectors; make them again from the texts"
            )
        if encoder is not None and vectors is None and texts:
            vectors = encoder(texts)
        return cls(texts, encoder, vectors, _sparse(texts))

    def search(
        self, query: str, k: int, ranking: Ranking | None = None, before: int | None = None
    ) -> list[Hit]:
        """Find the texts that fit a query best, best first.

        Ties go to the later text.

        Args:
            query: a text; one that matches nothing gets the latest texts, where recency counts.
            k: at most so many.
            ranking: None: all three rankings.
            before: only texts at indices below it; for somebody's past at an earlier time.

        Raises:
            ConfigError: `k` below 1, or `before` below 0.
        """
        if k < 1 or (before is not None and before < 0):
            raise ConfigError(f"k must be at least 1 and before at least 0: {k}, {before}")
        ranking = ranking or Ranking()
        size = len(self.texts) if before is None else min(before, len(self.texts))
        by_words = self._by_words(query, size, ranking.pool) if ranking.words else []
        by_meaning = self._by_meaning(query, size, ranking.pool) if ranking.meaning else []
        indices = {*by_words, *by_meaning}
        if not indices and ranking.recency:
            indices = set(range(max(0, size - k), size))
        return _fused(by_words, by_meaning, sorted(indices, reverse=True), ranking)[:k]

    def alike(self, indices: Sequence[int]) -> NDArray[np.float64]:
        """Return how alike each two of these texts are, in [0, 1].

        (indices, indices): cosines of their vectors, or shared words where there are none.
        """
        if self.vectors is not None:
            rows = self.vectors[list(indices)].astype(np.float64)
            return np.clip(rows @ rows.T, 0.0, 1.0)
        words = [set(words_of(self.texts[index])) for index in indices]
        return np.array([[_jaccard(left, right) for right in words] for left in words])

    def _by_words(self, query: str, size: int, pool: int) -> list[int]:
        asked = [] if self._sparse is None else list(dict.fromkeys(words_of(query)))
        known = [word for word in asked if word in self._sparse.vocab_dict]
        if not known:
            return []
        scores = self._sparse.get_scores(known)[:size]
        return [index for index in _best(scores, pool) if scores[index] > 0]

    def _by_meaning(self, query: str, size: int, pool: int) -> list[int]:
        if self.encoder is None or self.vectors is None or not size or not query.strip():
            return []
        return _best(self.vectors[:size] @ self.encoder([query])[0], pool)


def pick(
    index: TextIndex,
    hits: Sequence[Hit],
    lengths: Sequence[int],
    budget: int,
    diversity: float = 0.3,
) -> list[Hit]:
    """Choose hits to put before a prompt, so that they fit a budget and do not repeat one thing.

    At each step the hit with the largest (1 - diversity) * score / best score - diversity * (how
    alike it is to what was picked) among those that still fit. A text is never picked twice.

    Args:
        index: that found them.
        hits: best first.
        lengths: tokens of each hit, with whatever stands between two.
        budget: tokens in all.
        diversity: in [0, 1]; 0 is by score alone.

    Returns:
        In the order picked; none when none fits.

    Raises:
        ConfigError: diversity outside [0, 1].
        DataError: not one length a hit, or a length below 1.
    """
    if not 0.0 <= diversity <= 1.0:
        raise ConfigError(f"diversity must lie in [0, 1]; it is {diversity!r}")
    if len(lengths) != len(hits) or any(length < 1 for length in lengths):
        raise DataError(f"expected a length of at least 1 for each of {len(hits)} hits")
    if not hits:
        return []
    alike = index.alike([hit.index for hit in hits])
    texts = [index.texts[hit.index] for hit in hits]
    relevance = np.array([hit.score for hit in hits]) / max(hit.score for hit in hits)
    nearest, left = np.zeros(len(hits)), budget
    picked: dict[str, Hit] = {}
    while True:
        open_ = [i for i, text in enumerate(texts) if lengths[i] <= left and text not in picked]
        if not open_:
            return list(picked.values())
        value = (1 - diversity) * relevance[open_] - diversity * nearest[open_]
        best = open_[int(value.argmax())]
        picked[texts[best]] = hits[best]
        left -= lengths[best]
        nearest = np.maximum(nearest, alike[best])


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case: runs of letters, digits and underscores."""
    return _WORD.findall(text.lower())


def _sparse(texts: Sequence[str]) -> Any:
    """TextIndex the words of texts for BM25, or return None when there is no word at all."""
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it would tell the terminal of each index
    words = [words_of(text) for text in texts]
    if not any(words):
        return None
    ranking = bm25s.BM25(method="lucene", dtype="float32")
    ranking.index(words, show_progress=False)
    return ranking


def _best(scores: NDArray[np.float32], count: int) -> list[int]:
    """Return the indices of the largest scores, largest first, and of equals the later first."""
    count = min(count, len(scores))
    best = np.argpartition(scores, len(scores) - count)[len(scores) - count :]
    return [int(index) for index in best[np.lexsort((-best, -scores[best]))]]


def _fused(
    by_words: Sequence[int], by_meaning: Sequence[int], by_time: Sequence[int], ranking: Ranking
) -> list[Hit]:
    words = {index: rank for rank, index in enumerate(by_words, start=1)}
    meaning = {index: rank for rank, index in enumerate(by_meaning, start=1)}
    hits = []
    for age, index in enumerate(by_time, start=1):
        score = ranking.recency / (RANK_CONSTANT + age)
        if index in words:
            score += ranking.words / (RANK_CONSTANT + words[index])
        if index in meaning:
            score += ranking.meaning / (RANK_CONSTANT + meaning[index])
        hits.append(Hit(index, score, words.get(index), meaning.get(index)))
    return sorted(hits, key=lambda hit: (-hit.score, -hit.index))


def _jaccard(left: set[str], right: set[str]) -> float:
    """Return Jaccard's index of two sets of words, which is 1 for two empty sets."""
    return len(left & right) / len(left | right) if left or right else 1.0
