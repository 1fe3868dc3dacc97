"""Film-review sentences rated by people (Hutto & Gilbert 2014) -> one person's labels per rater.

10,605 sentences, each rated -4..4 by 15 to 29 people. The sentences were handed out in batches of
30 rows; a column of a batch is one rater. The rows are sorted by polarity, nearly: most of what
a rater's mean says is the polarity of the batch, so a gain of personalisation needs the control
"another rater of the same batch on the same items".
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ...client.training.records import Record
from ...common.errors import DataError
from .record_sources import DataSource, SourceUser, read_text

__all__ = ["BATCH_ROWS", "Batch", "ratings_source", "read_batches"]

BATCH_ROWS = 30
TEXTS = "movieReviewSnippets_GroundTruth.txt"
RATINGS = "movieReviewSnippets_anonDataRatings.txt"


@dataclass(frozen=True)
class Batch:
    """Sentences and who rated them: `ratings[rater][row]`, -4..4, over `texts[row]`."""

    name: str
    texts: tuple[str, ...] = field(repr=False)
    ratings: tuple[tuple[float, ...], ...] = field(repr=False)

    @property
    def raters(self) -> Iterator[tuple[str, int]]:
        """Every rater's name as a user, and number."""
        return ((f"{self.name}/{rater:02d}", rater) for rater in range(len(self.ratings)))

    def order(self, seed: int) -> list[int]:
        """The rows shuffled by the public seed, the same for all raters.

        The first k labels are then no sorted part, and another rater of the batch has the same
        items held out.
        """
        rng = np.random.default_rng([seed, int(self.name)])
        return [int(row) for row in rng.permutation(len(self.texts))]


def ratings_source(folder: Path, seed: int) -> DataSource:
    """Make a source of ratings, with raters as users and batches as groups."""
    batches = {batch.name: batch for batch in read_batches(folder)}
    orders = {name: batch.order(seed) for name, batch in batches.items()}

    def read(user: str) -> tuple[Record, ...]:
        name, rater = user.split("/")
        batch = batches[name]
        return tuple(
            Record(batch.texts[row], batch.ratings[int(rater)][row], time)
            for time, row in enumerate(orders[name])
        )

    people = tuple(
        SourceUser(user, batch.name, len(batch.texts))
        for batch in batches.values()
        for user, _ in batch.raters
    )
    return DataSource("ratings", people, "regression", None, read)


def read_batches(folder: Path) -> tuple[Batch, ...]:
    """Read both tables into batches in file order. The last one has 15 rows.

    Raises:
        DataError: a table is missing, a line does not parse, ids differ between the tables, or
            a batch whose rows were rated by different numbers of people.
    """
    texts = {cells[0]: cells[2] for _, cells in _table(folder / TEXTS, cells=3)}
    names: list[str] = []
    rows: list[tuple[str, list[float]]] = []
    for where, (name, _, _, written) in _table(folder / RATINGS, cells=4):
        try:
            rows.append((texts[name], [float(rating) for rating in json.loads(written)]))
        except (KeyError, ValueError, TypeError) as error:
            raise DataError(f"{where}: expected an id of {TEXTS} and a list of numbers.") from error
        names.append(where)
    return tuple(
        _batch(first // BATCH_ROWS, rows[first : first + BATCH_ROWS], names[first])
        for first in range(0, len(rows), BATCH_ROWS)
    )


def _batch(number: int, rows: list[tuple[str, list[float]]], where: str) -> Batch:
    if len({len(ratings) for _, ratings in rows}) != 1:
        raise DataError(f"{where}: expected the same number of raters in the batch's rows.")
    columns = tuple(zip(*(ratings for _, ratings in rows), strict=True))
    return Batch(f"{number:03d}", tuple(text for text, _ in rows), columns)


def _table(path: Path, cells: int) -> list[tuple[str, list[str]]]:
    """Tab-separated lines -> (file and line, cells)."""
    lines = read_text(path).splitlines()
    table = [(f"{path}, line {n}", line.split("\t")) for n, line in enumerate(lines, 1) if line]
    for where, row in table:
        if len(row) != cells:
            raise DataError(f"{where}: expected {cells} cells, found {len(row)}.")
    return table
