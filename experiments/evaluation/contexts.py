"""What stands before a text: a person's earlier records that fit its opening.

Retrieval sees the opening (`client/personal/scored_text.py`) and nothing after it. The person's
previous record was the other choice of a query; it is the same for every next text, so it cannot
tell them apart, and retrieval counts the latest records anyway.

**Guarantee**: `Asked.query` is made of the opening's ids alone, and `History.context` is given
nothing else of the record, so that no token that is scored can choose what stands before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ...client.assistant.retrieval import Encoder, Ranking, TextIndex, pick

__all__ = ["History"]

_HITS = 16


@dataclass(frozen=True, eq=False)
class History:
    """One person's earlier records, searchable.

    They are sensitive, so `repr` hides them.

    Attributes:
        index: over the records' texts, as far as their tokens go.
        ids: the records' tokens, cut like every record's.
        ranking: how retrieval ranks.
    """

    index: TextIndex = field(repr=False)
    ids: tuple[tuple[int, ...], ...] = field(repr=False)
    ranking: Ranking

    @classmethod
    def of(
        cls, records: Sequence[Sequence[int]], tokenizer: Any, encoder: Encoder | None
    ) -> "History":
        """TextIndex tokenised records, earliest first.

        What was cut off a record is not searched.
        """
        texts = [str(tokenizer.decode(list(ids), skip_special_tokens=True)) for ids in records]
        index = TextIndex.build(texts, encoder)
        return cls(index, tuple(map(tuple, records)), Ranking(meaning=1.0 if encoder else 0.0))

    def context(self, query: str, budget: int, before: int | None = None) -> tuple[int, ...]:
        """Whole earlier records that fit the query, in the order of time, `budget` tokens at most.

        Args:
            query: `Asked.query` of the record that comes.
            budget: tokens; records that do not fit are passed over.
            before: only the first so many records, for a record of the history itself.
        """
        if not self.ids or before == 0:
            return ()
        hits = self.index.search(query, _HITS, self.ranking, before)
        chosen = pick(self.index, hits, [len(self.ids[hit.index]) for hit in hits], budget)
        indices = sorted(hit.index for hit in chosen)
        return tuple(token for index in indices for token in self.ids[index])
