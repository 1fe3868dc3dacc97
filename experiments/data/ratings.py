"""Film-review sentences rated by people (Hutto & Gilbert 2014) -> one person's labels per rater.

10,605 sentences, each rated -4..4 by 15 to 29 people. The sentences were handed out in batches of
30 rows; a column of a batch is one rater. The rows are sorted by polarity, nearly: most of what
a rater's mean says is the polarity of the batch, so a gain of personalisation needs the control
"another rater of the same batch on the same items".
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from ...common.errors import DataError

__all__ = ["BATCH_ROWS", "Batch", "read_batches"]

BATCH_ROWS = 30
TEXTS = "movieReviewSnippets_GroundTruth.txt"
RATINGS = "movieReviewSnippets_anonDataRatings.txt"


@dataclass(frozen=True)
class Batch:
    """Sentences and who rated them: `ratings[rater][row]`, -4..4, over `texts[row]`."""

    name: str
    texts: tuple[str, ...] = field(repr=False)
    ratings: tuple[tuple[float, ...], ...] = field(repr=False)


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
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}).") from error
    table = [(f"{path}, line {n}", line.split("\t")) for n, line in enumerate(lines, 1) if line]
    for where, row in table:
        if len(row) != cells:
            raise DataError(f"{where}: expected {cells} cells, found {len(row)}.")
    return table
