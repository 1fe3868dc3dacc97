"""What one person's own held-out records say about three models: base, shared, personal.

    base      the base model, no adapter (labels: every prediction 0)
    shared    the shared adapter
    personal  the shared adapter and the head fitted on the person's own earlier records

Losses are means over the person's held-out tokens or records; lower is better.

**Guarantee**: a head is fitted on private records without differential privacy. What is measured
with it leaves a device through the gate's noised blocks only (`client/privacy/gate.py`), and
nothing here is read by training: a device measures after its delta is made.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...common.errors import DataError
from ...common.model.adapter import Adapter, Vector
from ...common.model.base_model import final_states, pad, prefix_states, resumed_at
from ...common.model.objective import pooled
from ...common.privacy.statistics_blocks import ENTRIES
from ...common.settings.config import PreferenceSettings
from ..training.records import Tokenised
from .label_head import LabelHead, fit_label_head, label_losses
from .text_head import TokenStates, fit_text_head, shared_scores, token_losses

__all__ = [
    "LabelMeasure",
    "Measure",
    "Measured",
    "Person",
    "TextMeasure",
    "arms_block",
    "gains_block",
    "measure_of",
    "measured",
]


@dataclass(frozen=True)
class Measured:
    """One person's mean losses on the own held-out records; sensitive, so `repr` hides them."""

    base: float = field(repr=False)
    shared: float = field(repr=False)
    personal: float = field(repr=False)


def measured(
    adapter: Adapter,
    shared: Vector,
    own: Sequence[Tokenised],
    held_out: Sequence[Tokenised],
    fit: bool,
    kept: Vector | None = None,
    pairs: PreferenceSettings | None = None,
    tokens: int = 0,
) -> Measured | None:
    """One person's losses; run by the client, after its delta is made.

    All three are computed whatever is asked for, so that the time it takes tells no arm.

    Args:
        adapter: overwritten.
        shared: the global adapter, shape (d,), float32.
        own: records the head is fitted on.
        held_out: records the losses are of.
        fit: whether there is a personal head; otherwise personal is shared.
        kept: what the device trains and keeps (fedsa's B); shared is then the adapter with it.
        pairs, tokens: as `measure_of`.

    Returns:
        None where nothing is held out, or a loss is not finite: a contribution must not depend on
        that, so such a device takes part as one that has measured nothing.
    """
    try:
        measure = measure_of(adapter, shared, kept, pairs, tokens)
        person = measure.person(own, held_out, fit)
        if person is None:
            return None
        alone, together = measure.loss(person, None), measure.loss(person, person.head)
    except DataError:  # states that are not finite
        return None
    found = Measured(person.base, alone, together)
    return found if all(map(math.isfinite, (found.base, alone, together))) else None


def gains_block(found: Measured | None, bound: float) -> NDArray[np.float64]:
    """(base - shared, shared - personal, 1), gains in [-1, 1] of the bound; zeros for None."""
    if found is None:
        return np.zeros(ENTRIES["gains"])
    gains = np.array([found.base - found.shared, found.shared - found.personal])
    return np.append(np.clip(gains / bound, -1.0, 1.0), 1.0)


def arms_block(
    found: Measured | None, bound: float, arms: Sequence[str], own: int
) -> NDArray[np.float64]:
    """(1, outcome, its square) in the slots of the own arm, zeros elsewhere; zeros for None.

    Args:
        found: the losses.
        bound: a loss is clipped to 0 .. this, and is 2 loss / bound - 1 as an outcome.
        arms: the models compared.
        own: the place of this device's arm.
    """
    block = np.zeros((len(arms), ENTRIES["arms"]))
    if found is not None:
        outcome = 2.0 * min(max(getattr(found, arms[own]) / bound, 0.0), 1.0) - 1.0
        block[own] = 1.0, outcome, outcome * outcome
    return block.ravel()


@dataclass(frozen=True, eq=False)
class Person:
    """One person's held-out material under the shared model, and the head they fitted.

    Attributes:
        base: mean loss under the base model.
        held_out: what `Measure.loss` needs of the held-out records.
        head: the personal head; None where none was fitted.
    """

    base: float = field(repr=False)
    held_out: Any = field(repr=False)
    head: Any = field(repr=False)


class Measure(Protocol):
    """Measures people under one shared adapter."""

    def person(
        self, own: Sequence[Tokenised], held_out: Sequence[Tokenised], fit: bool
    ) -> Person | None:
        """Prepare one person, and fit the head on `own`; None where nothing is held out."""

    def loss(self, person: Person, head: Any) -> float:
        """Mean loss on the person's held-out records; head None: the shared model."""


def measure_of(
    adapter: Adapter,
    shared: Vector,
    kept: Vector | None = None,
    pairs: PreferenceSettings | None = None,
    tokens: int = 0,
) -> Measure:
    """The measure that fits the adapter's task.

    Args:
        adapter: overwritten, again and again.
        shared: the shared adapter's weights, shape (d,), float32.
        kept: what one device keeps of the adapter (fedsa's B); the measure is then for its owner.
        pairs: how answers are scored, where records are pairs of them.
        tokens: that every record passes the model with, whatever it has; 0: with its own.
    """
    if pairs is not None:
        from .pair_evaluator import PairMeasure

        return PairMeasure(adapter, shared, pairs, tokens)
    return (TextMeasure if adapter.head is None else LabelMeasure)(adapter, shared, kept, tokens)


class TextMeasure:
    """Generation: nats per token; the frozen prefix is computed once for base and shared."""

    def __init__(
        self, adapter: Adapter, shared: Vector, kept: Vector | None = None, tokens: int = 0
    ) -> None:
        self.adapter, self.shared, self.kept, self.tokens = adapter, shared, kept, tokens
        self.output = adapter.base.output.detach()

    def person(
        self, own: Sequence[Tokenised], held_out: Sequence[Tokenised], fit: bool
    ) -> Person | None:
        """As `Measure`."""
        if not held_out:
            return None
        base, shared = self._states(held_out, (self.adapter.start, self.shared))
        base_scores = shared_scores(base, self.output)
        base_loss = token_losses(None, base, self.output, base_scores).mean()
        head = None
        if own and fit:
            (mine,) = self._states(own, (self.shared,))
            head = fit_text_head(mine, self.output)
        scores = shared_scores(shared, self.output)
        return Person(float(base_loss), (shared, scores), head)

    def loss(self, person: Person, head: Any) -> float:
        """As `Measure`."""
        states, scores = person.held_out
        return float(token_losses(head, states, self.output, scores).mean())

    @torch.no_grad()
    def _states(self, records: Sequence[Tokenised], vectors: Sequence[Vector]) -> list[TokenStates]:
        """Final states of the records under each adapter."""
        base, first = self.adapter.base, self.adapter.first_block
        ids, mask = pad([record.ids for record in records], tokens=self.tokens)
        wanted = mask[:, 1:].bool()
        targets, record = ids[:, 1:][wanted], torch.nonzero(wanted)[:, 0]
        prefix = prefix_states(base, first, ids, mask)
        found = []
        for vector in vectors:
            self.adapter.write(vector, self.kept if vector is self.shared else None)
            with resumed_at(base, first, prefix):
                states = final_states(base, ids, mask)[:, :-1][wanted]
            found.append(TokenStates(states, targets, record))
        return found


class LabelMeasure:
    """Labels: squared error or nats; features of the same text are computed once."""

    def __init__(
        self, adapter: Adapter, shared: Vector, kept: Vector | None = None, tokens: int = 0
    ) -> None:
        self.adapter, self.tokens = adapter, tokens
        adapter.write(shared, kept)
        head = adapter.head
        if head is None:
            raise ValueError("a labelled task without a head")
        task: Literal["regression", "classification"] = (
            "regression" if head.out_features == 1 else "classification"
        )
        weight, bias = head.weight.detach().clone(), head.bias.detach().clone()
        self.shared = LabelHead(weight, bias, task)
        self.nothing = LabelHead(torch.zeros_like(weight), torch.zeros_like(bias), task)
        self.known: dict[tuple[int, ...], Tensor] = {}

    def person(
        self, own: Sequence[Tokenised], held_out: Sequence[Tokenised], fit: bool
    ) -> Person | None:
        """As `Measure`."""
        if not held_out:
            return None
        features, labels = self._features(held_out)
        base = float(label_losses(self.nothing, features, labels).mean())
        head = None
        if own and fit:
            head = fit_label_head(*self._features(own), self.shared)
        return Person(base, (features, labels), head)

    def loss(self, person: Person, head: Any) -> float:
        """As `Measure`."""
        return float(label_losses(head or self.shared, *person.held_out).mean())

    @torch.no_grad()
    def _features(self, records: Sequence[Tokenised]) -> tuple[Tensor, Tensor]:
        base = self.adapter.base
        new = [r.ids for r in records if r.ids not in self.known]
        if new:
            ids, mask = pad(new, tokens=self.tokens)
            found = pooled(base, final_states(base, ids, mask), mask)
            self.known.update(zip(new, found, strict=True))
        labels = torch.tensor([float(r.label or 0.0) for r in records])
        return torch.stack([self.known[r.ids] for r in records]), labels
