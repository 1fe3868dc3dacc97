"""What stands before a held-out text, what of the text is given, and the states of the rest.

Every model is asked in the same way: a record's first tokens, its *opening*, are given and not
scored; retrieval sees the opening and nothing after it; all models are scored on the same tokens.
That is what a device has when somebody has begun to write. The person's previous record was the
other choice of a query; it is the same for every next text, so it cannot tell them apart, and
retrieval counts the latest records anyway.

**Guarantee**: `Asked.query` is made of the opening's ids alone, and `History.context` is given
nothing else of the record, so that no token that is scored can choose what stands before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...client.assistant.retrieval import Encoder, Index, Ways, pick
from ...client.personal.text_head import TokenStates
from ...common.model.adapter import Adapter, Vector
from ...common.model.base_model import final_states, pad, prefix_states, resumed_at

__all__ = ["Asked", "History", "Row", "Scored", "asked", "states_of"]

_ROWS = 32  # at once; of about the same length
_HITS = 16


@dataclass(frozen=True, slots=True)
class Asked:
    """One record, of which every model is given the opening.

    Attributes:
        ids: the record's tokens.
        given: how many of them are the opening, at least 1.
    """

    ids: tuple[int, ...] = field(repr=False)
    given: int

    def query(self, tokenizer: Any) -> str:
        """Return the opening's text, which is the query for retrieval."""
        return str(tokenizer.decode(self.ids[: self.given], skip_special_tokens=True))

    def scored_text(self, tokenizer: Any) -> str:
        """The text that is scored, the opening taken off."""
        whole = str(tokenizer.decode(self.ids, skip_special_tokens=True))
        return whole[len(self.query(tokenizer)) :]


def asked(ids: Sequence[int], opening: int) -> Asked:
    """A record with its opening: `opening` tokens, at most half of it, at least one."""
    return Asked(tuple(ids), max(1, min(opening, len(ids) // 2)))


@dataclass(frozen=True, eq=False)
class History:
    """One person's earlier records, searchable.

    They are sensitive, so `repr` hides them.

    Attributes:
        index: over the records' texts, as far as their tokens go.
        ids: the records' tokens, cut like every record's.
        ways: how retrieval ranks.
    """

    index: Index = field(repr=False)
    ids: tuple[tuple[int, ...], ...] = field(repr=False)
    ways: Ways

    @classmethod
    def of(
        cls, records: Sequence[Sequence[int]], tokenizer: Any, encoder: Encoder | None
    ) -> "History":
        """Index tokenised records, earliest first.

        What was cut off a record is not searched.
        """
        texts = [str(tokenizer.decode(list(ids), skip_special_tokens=True)) for ids in records]
        index = Index.build(texts, encoder)
        return cls(index, tuple(map(tuple, records)), Ways(meaning=1.0 if encoder else 0.0))

    def context(self, query: str, budget: int, before: int | None = None) -> tuple[int, ...]:
        """Whole earlier records that fit the query, in the order of time, `budget` tokens at most.

        Args:
            query: `Asked.query` of the record that comes.
            budget: tokens; records that do not fit are passed over.
            before: only the first so many records, for a record of the history itself.
        """
        if not self.ids or before == 0:
            return ()
        hits = self.index.search(query, _HITS, self.ways, before)
        chosen = pick(self.index, hits, [len(self.ids[hit.index]) for hit in hits], budget)
        indices = sorted(hit.index for hit in chosen)
        return tuple(token for index in indices for token in self.ids[index])


@dataclass(frozen=True, slots=True)
class Row:
    """A record and the tokens that stand before it."""

    context: tuple[int, ...] = field(repr=False)
    asked: Asked


@dataclass(frozen=True, eq=False)
class Scored:
    """States of rows under one adapter.

    Attributes:
        states: one position per predicted token, of every token but each record's first;
            `states.record` is the row.
        scored: (n,) bool, False where the token that follows belongs to the opening, or is one
            of the tokenizer's own marks: they have no bytes.
    """

    states: TokenStates = field(repr=False)
    scored: Tensor = field(repr=False)


@torch.no_grad()
def states_of(
    adapter: Adapter,
    rows: Sequence[Row],
    vectors: Sequence[Vector],
    half: bool = False,
    with_marks: bool = False,
) -> list[Scored]:
    """Compute the final states of the records in their contexts, under each adapter.

    Contexts have no loss.

    Args:
        adapter: overwritten. The frozen blocks below it are computed once for all vectors.
        rows: at least one.
        vectors: adapters, shape (d,) each.
        half: multiply in bfloat16, 2 to 3 times as fast where the processor can, for every
            vector alike; SmolLM2's loss moved by 0.0005 nats.
        with_marks: score the tokenizer's own marks too, such as a record's end.
    """
    parts: list[list[tuple[Tensor, Tensor, Tensor, Tensor]]] = [[] for _ in vectors]
    marks = torch.tensor(sorted(adapter.base.tokenizer.all_special_ids), dtype=torch.int64)
    order = sorted(
        range(len(rows)), key=lambda row: len(rows[row].context) + len(rows[row].asked.ids)
    )
    for start in range(0, len(order), _ROWS):
        chunk = order[start : start + _ROWS]
        ids, mask = pad([rows[row].context + rows[row].asked.ids for row in chunk])
        place = torch.arange(1, ids.shape[1])[None] - torch.tensor(
            [[len(rows[row].context)] for row in chunk]
        )  # of the predicted token in its record
        wanted = mask[:, 1:].bool() & (place >= 1)
        given = torch.tensor([[rows[row].asked.given] for row in chunk])
        number = torch.tensor(chunk)[:, None].expand_as(place)[wanted]
        targets = ids[:, 1:][wanted]
        scored = (place >= given)[wanted] & (with_marks | ~torch.isin(targets, marks))
        for found, states in zip(parts, _under(adapter, ids, mask, vectors, half), strict=True):
            found.append((states[:, :-1][wanted].float(), targets, number, scored))
    return [_together(found) for found in parts]


def _under(
    adapter: Adapter, ids: Tensor, mask: Tensor, vectors: Sequence[Vector], half: bool
) -> list[Tensor]:
    base, first = adapter.base, adapter.first_block
    found = []
    with _multiplying(half):
        prefix = prefix_states(base, first, ids, mask)
    for vector in vectors:
        adapter.write(vector)
        # a region of its own for each: within one, autocast goes on with the first one's weights
        with _multiplying(half), resumed_at(base, first, prefix):
            found.append(final_states(base, ids, mask))
    return found


def _multiplying(half: bool) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=half)


def _together(parts: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]]) -> Scored:
    """Join the chunks of all rows, in the order of the rows."""
    states, targets, record, scored = (torch.cat(column) for column in zip(*parts, strict=True))
    order = torch.argsort(record, stable=True)
    return Scored(TokenStates(states[order], targets[order], record[order]), scored[order])
