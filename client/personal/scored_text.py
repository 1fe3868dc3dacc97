"""What of a person's text is scored, and the losses of it under an adapter and a head.

Every model is asked in the same way, wherever text is evaluated: a record's first tokens, its
*opening*, are given and not scored, nor are the tokenizer's own marks, such as a record's end; all
models are scored on the tokens between. That is what a device has to guess when somebody has begun
to write.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...common.model.adapter import Adapter, Vector
from ...common.model.base_model import final_states, pad, prefix_states, resumed_at
from ...common.model.output_layer import OutputLayer
from .text_head import (
    SharedScores,
    TextHead,
    TokenStates,
    fit_text_head,
    shared_scores,
    token_losses,
)

__all__ = ["OPENING", "Asked", "Row", "ScoredText", "asked", "scored_texts"]

OPENING = 8
"""Tokens given of each record, where it has twice as many."""

_ROWS = 32  # at once; of about the same length


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
        """Return the text that is scored, the opening taken off."""
        whole = str(tokenizer.decode(self.ids, skip_special_tokens=True))
        return whole[len(self.query(tokenizer)) :]


def asked(ids: Sequence[int], opening: int = OPENING) -> Asked:
    """Return a record with its opening: `opening` tokens, at most half of it, at least one."""
    return Asked(tuple(ids), max(1, min(opening, len(ids) // 2)))


@dataclass(frozen=True, slots=True)
class Row:
    """A record and the tokens that stand before it."""

    context: tuple[int, ...] = field(repr=False)
    asked: Asked


@dataclass(frozen=True, eq=False)
class ScoredText:
    """Records under one adapter, with the shared model's scores, which every head starts from.

    Attributes:
        states: one position per predicted token, of every token but each record's first;
            `states.record` is the record.
        scored: (n,) bool, False where the token that follows belongs to the opening, or is one
            of the tokenizer's own marks: they have no bytes.
        scores: the shared model's, of the states.
        output: the model's.
        first, end: the records that are here, from `first` to before `end`.
    """

    states: TokenStates = field(repr=False)
    scored: Tensor = field(repr=False)
    scores: SharedScores = field(repr=False)
    output: OutputLayer = field(repr=False)
    first: int
    end: int

    def where(self, since: int | None = None, before: int | None = None) -> "ScoredText":
        """Return the records from `since` on, or those before `before`."""
        first = self.first if since is None else since
        end = self.end if before is None else before
        kept = (self.states.record >= first) & (self.states.record < end)
        states, scores = self.states.where(kept), self.scores.where(kept)
        return ScoredText(states, self.scored[kept], scores, self.output, first, end)

    def fitted(self) -> TextHead:
        """Fit a personal head to all tokens of these records."""
        return fit_text_head(self.states, self.output, self.scores)

    def counts(self) -> list[int]:
        """Count the scored tokens of each record."""
        records = self.states.record[self.scored] - self.first
        counts: list[int] = torch.bincount(records, minlength=self.end - self.first).tolist()
        return counts

    def sums(self, head: TextHead | None = None) -> list[float]:
        """Sum the nats of each record's scored tokens, in order.

        A record without any has 0.
        """
        states, scores = self.states.where(self.scored), self.scores.where(self.scored)
        losses = token_losses(head, states, self.output, scores).double()
        sums = torch.zeros(self.end - self.first, dtype=torch.float64)
        return [float(value) for value in sums.index_add_(0, states.record - self.first, losses)]

    def loss(self, head: TextHead | None = None) -> float:
        """Return the nats per scored token, of which there must be one."""
        return sum(self.sums(head)) / int(self.scored.sum())


@torch.no_grad()
def scored_texts(
    adapter: Adapter,
    rows: Sequence[Row],
    vectors: Sequence[tuple[Vector, Vector | None]],
    *,
    tokens: int = 0,
) -> list[ScoredText]:
    """Compute the records in their contexts, which have no loss, under each adapter.

    Args:
        adapter: overwritten. The frozen blocks below it are computed once for all vectors.
        rows: at least one.
        vectors: of each adapter the shared weights, shape (d,), and what a device keeps of it
            (fedsa's B), or None.
        tokens: that every row passes the model with, whatever it has; 0: with its own.
    """
    parts: list[list[tuple[Tensor, Tensor, Tensor, Tensor]]] = [[] for _ in vectors]
    marks = torch.tensor(sorted(adapter.base.tokenizer.all_special_ids), dtype=torch.int64)
    order = sorted(
        range(len(rows)), key=lambda row: len(rows[row].context) + len(rows[row].asked.ids)
    )
    for start in range(0, len(order), _ROWS):
        chunk = order[start : start + _ROWS]
        ids, mask = pad([rows[row].context + rows[row].asked.ids for row in chunk], tokens=tokens)
        position = torch.arange(1, ids.shape[1])[None] - torch.tensor(
            [[len(rows[row].context)] for row in chunk]
        )  # of the predicted token in its record
        wanted = mask[:, 1:].bool() & (position >= 1)
        given = torch.tensor([[rows[row].asked.given] for row in chunk])
        number = torch.tensor(chunk)[:, None].expand_as(position)[wanted]
        targets = ids[:, 1:][wanted]
        scored = (position >= given)[wanted] & ~torch.isin(targets, marks)
        for found, states in zip(parts, _under(adapter, ids, mask, vectors), strict=True):
            found.append((states[:, :-1][wanted].float(), targets, number, scored))
    output = adapter.base.output
    return [_together(found, output, len(rows)) for found in parts]


def _under(
    adapter: Adapter,
    ids: Tensor,
    mask: Tensor,
    vectors: Sequence[tuple[Vector, Vector | None]],
) -> list[Tensor]:
    """Return the final states of padded rows under each adapter, on the CPU."""
    base, first = adapter.base, adapter.first_block
    prefix, found = prefix_states(base, first, ids, mask), []
    for shared, kept in vectors:
        adapter.write(shared, kept)
        with resumed_at(base, first, prefix):
            found.append(final_states(base, ids, mask).cpu())
    return found


def _together(
    parts: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]], output: OutputLayer, count: int
) -> ScoredText:
    """Join the chunks of all rows, in the order of the rows."""
    states, targets, record, scored = (torch.cat(column) for column in zip(*parts, strict=True))
    order = torch.argsort(record, stable=True)
    joined = TokenStates(states[order], targets[order], record[order])
    return ScoredText(joined, scored[order], shared_scores(joined, output), output, 0, count)
