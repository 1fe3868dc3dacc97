"""People who prefer answers to others: pairs from ratings, and made people whose taste is known.

`preferences`: the film-review sentences of `ratings`. A pair is two sentences of one batch that a
rater rated differently; the higher one is preferred. A rater's first `OWN` pairs are of the first
two thirds of the sentences, the last `HELD_OUT` of the last third: no sentence is on both sides.
All raters of a batch meet sentences and pairs in one order, so that another rater of the same batch
is a control on the same items. A rater's own best model is not known; what the batch's other raters
say of the same held-out sentences (`crowd`) is what no model of the text alone can easily beat.

`tastes`: made people, whose best possible model is known. An answer to "What shall I cook?" names a
dish and has five features, each one of two ways (`FEATURES`), and a closing sentence that is about
nothing, for its length. A person's taste is a weight for each feature: the population's mean
(`COMMON`) and an own part, standard normal. A person prefers one of two random answers with the
probability of Bradley and Terry 1952, sigmoid(`FIRMNESS` times the difference of the taste); dishes
of the held-out pairs are in none of the others. Nobody can do better than the oracle, which knows
the weights.
"""

from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np

from ...client.training.records import Record
from ...common.errors import ConfigError
from ...common.settings.config import Config
from .ratings import Batch, read_batches
from .record_sources import DataSource, SourceUser

__all__ = ["HELD_OUT", "OWN", "crowd", "pairs_of_ratings", "refuse_other_cut", "reward", "tastes"]

OWN, HELD_OUT = 50, 25
SOURCES = ("preferences", "tastes")

PROMPT = "What shall I cook?"
FEATURES = (
    ("with vegetables only", "with slow-cooked meat"),
    ("mild and gentle", "fiery hot with chilli"),
    ("salty and savoury", "sweet and fruity"),
    ("ready in ten minutes", "simmered for three hours"),
    ("as at home", "as in a grand restaurant"),
)
COMMON = (0.8, -0.5, 0.0, -0.8, 0.3)
FIRMNESS = 2.0
DISHES = (
    ("a soup", "a pie", "a curry", "dumplings", "a risotto", "a stew", "noodles", "a casserole"),
    ("a salad", "pancakes", "a gratin", "stuffed peppers"),
)
CLOSINGS = ("", " Serve it on a plate.", " There will be enough for everybody who comes by today.")
MADE_PEOPLE = 4096


def refuse_other_cut(config: Config) -> None:
    """Refuse a cut of these sources at which held-out pairs share texts with pairs learnt from.

    They share none only at the sources' own cut.

    Raises:
        ConfigError: data.holdout or data.min_records is another.
    """
    if config.data.source not in SOURCES:
        return
    held_out = round((OWN + HELD_OUT) * config.data.holdout)
    if held_out != HELD_OUT or config.data.min_records != OWN + HELD_OUT:
        raise ConfigError(
            f"data.source = {config.data.source!r} makes {OWN} pairs to learn from and {HELD_OUT} "
            f"of other texts: set data.min_records = {OWN + HELD_OUT} and data.holdout = 0.3333, "
            f"not {config.data.min_records} and {config.data.holdout:g}"
        )


# --- ratings -------------------------------------------------------------------------------------


def pairs_of_ratings(folder: Path, seed: int) -> DataSource:
    """Make a source of pairs from ratings, with raters as users and batches as groups.

    Raters who rate too much alike have fewer records.

    Args:
        folder: of the catalogue's `ratings`.
        seed: public: the order of sentences and of pairs.
    """
    batches = {batch.name: batch for batch in read_batches(folder)}

    def read(user: str) -> tuple[Record, ...]:
        name, rater = user.split("/")
        return _pairs(batches[name], int(rater), seed)

    people = tuple(
        SourceUser(user, name, len(_pairs(batch, rater, seed)))
        for name, batch in batches.items()
        for user, rater in batch.raters
    )
    return DataSource("preferences", people, "preference", None, read)


def crowd(folder: Path) -> Callable[[str, str], float]:
    """Return the function of user and text that gives the mean of the batch's other raters."""
    batches = {batch.name: batch for batch in read_batches(folder)}

    def rated(user: str, text: str) -> float:
        name, rater = user.split("/")
        return _others(batches[name], int(rater), text)

    return rated


def _others(batch: Batch, rater: int, text: str) -> float:
    row = batch.texts.index(text)
    return float(np.mean([each[row] for n, each in enumerate(batch.ratings) if n != rater]))


def _pairs(batch: Batch, rater: int, seed: int) -> tuple[Record, ...]:
    order = batch.order(seed)
    cut = 2 * len(order) // 3
    own = _differing(batch, rater, order[:cut], seed)[:OWN]
    held_out = _differing(batch, rater, order[cut:], seed)[:HELD_OUT]
    if len(own) < OWN or len(held_out) < HELD_OUT:
        return ()
    ratings, texts = batch.ratings[rater], batch.texts
    return tuple(
        Record(
            texts[max(pair, key=ratings.__getitem__)],
            time=time,
            rejected=texts[min(pair, key=ratings.__getitem__)],
        )
        for time, pair in enumerate([*own, *held_out])
    )


def _differing(batch: Batch, rater: int, rows: list[int], seed: int) -> list[tuple[int, int]]:
    """Pairs of rows that this rater rated differently, in the batch's order of pairs."""
    every = list(combinations(rows, 2))
    order = np.random.default_rng([seed, int(batch.name), len(rows)]).permutation(len(every))
    ratings, texts = batch.ratings[rater], batch.texts
    return [
        every[place]
        for place in order.tolist()
        if ratings[every[place][0]] != ratings[every[place][1]]
        and texts[every[place][0]].strip() != texts[every[place][1]].strip()
    ]


# --- made people ---------------------------------------------------------------------------------


def tastes(seed: int) -> DataSource:
    """`MADE_PEOPLE` people, the same for the same public seed."""

    def read(user: str) -> tuple[Record, ...]:
        rng = _generator(seed, user)
        weights = _weights(rng)
        own = [_choice(weights, DISHES[0], rng) for _ in range(OWN)]
        held_out = [_choice(weights, DISHES[1], rng) for _ in range(HELD_OUT)]
        return tuple(
            Record(chosen, time=time, rejected=rejected, prompt=PROMPT)
            for time, (chosen, rejected) in enumerate([*own, *held_out])
        )

    people = tuple(SourceUser(f"{n:04d}", None, OWN + HELD_OUT) for n in range(MADE_PEOPLE))
    return DataSource("tastes", people, "preference", None, read)


def reward(seed: int, user: str, text: str) -> float:
    """What an answer is worth to a made person: the oracle's score.

    >>> answer = _answer("a soup", (1, -1, 1, -1, 1), "")
    >>> reward(7, "0000", answer) == float(_weights(_generator(7, "0000")) @ [1, -1, 1, -1, 1])
    True
    """
    features = [1.0 if ways[1] in text else -1.0 for ways in FEATURES]
    return float(_weights(_generator(seed, user)) @ features)


def _generator(seed: int, user: str) -> np.random.Generator:
    return np.random.default_rng([seed, int(user)])


def _weights(rng: np.random.Generator) -> np.ndarray:
    return np.array(COMMON) + rng.normal(size=len(FEATURES))


def _choice(
    weights: np.ndarray, dishes: tuple[str, ...], rng: np.random.Generator
) -> tuple[str, str]:
    """Draw two answers of different features, the preferred one first."""
    one, other = rng.choice([-1, 1], size=(2, len(FEATURES)))
    while (one == other).all():
        other = rng.choice([-1, 1], size=len(FEATURES))
    texts = [
        _answer(str(rng.choice(dishes)), tuple(features), str(rng.choice(CLOSINGS)))
        for features in (one.tolist(), other.tolist())
    ]
    likes_one = rng.random() < 1 / (1 + np.exp(-FIRMNESS * float(weights @ (one - other))))
    return (texts[0], texts[1]) if likes_one else (texts[1], texts[0])


def _answer(dish: str, features: tuple[int, ...], closing: str) -> str:
    said = [ways[way > 0] for ways, way in zip(FEATURES, features, strict=True)]
    return f"Make {dish} {said[0]}, {said[1]}, {said[2]}, {said[3]}, {said[4]}.{closing}"
