"""Evaluation of people who rate or classify, by mean losses, with the head of `label_head.py`."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...common.model.adapter import Adapter, Vector
from ...common.model.base_model import final_states, pad
from ...common.model.objective import pooled
from ..training.records import Tokenised
from .head import PersonalHead, head_of_kind
from .label_head import LabelHead, fit_label_head, label_losses

__all__ = ["LabelEvaluator", "LabelPerson"]


@dataclass(frozen=True, eq=False)
class LabelPerson:
    """One person's held-out labels, and the head they fitted.

    Attributes:
        base: mean loss where every prediction is 0, or every class alike.
        head: the personal head; None where none was fitted.
        features: (n, w) of the held-out records under the shared model.
        labels: (n,) of the held-out records.
        shared: the head everybody starts from.
    """

    base: float = field(repr=False)
    head: LabelHead | None = field(repr=False)
    features: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    shared: LabelHead = field(repr=False)

    def loss(self, head: PersonalHead | None) -> float:
        """Return the mean loss on the held-out labels with a `LabelHead`.

        None is the shared head.
        """
        used = head_of_kind(LabelHead, head) or self.shared
        return float(self.losses(used).double().mean())

    def losses(self, head: LabelHead) -> Tensor:
        """Return the losses on the held-out labels, (n,)."""
        return label_losses(head, self.features, self.labels)


class LabelEvaluator:
    """Evaluates people with labels.

    Features of the same text are computed once.

    Args: as `person_losses.evaluator_of`.

    Attributes:
        shared: the head everybody starts from.
        nothing: the head that predicts 0, or every class alike.
    """

    def __init__(
        self, adapter: Adapter, shared: Vector, kept: Vector | None = None, tokens: int = 0
    ) -> None:
        self.adapter, self.tokens = adapter, tokens
        adapter.write(shared, kept)
        if adapter.head is None:
            raise ValueError("a labelled task without a head")
        self.shared = LabelHead.of(adapter.head)
        weight, bias = torch.zeros_like(self.shared.weight), torch.zeros_like(self.shared.bias)
        self.nothing = LabelHead(weight, bias, self.shared.task)
        self._known: dict[tuple[int, ...], Tensor] = {}

    def person(
        self, own: Sequence[Tokenised], held_out: Sequence[Tokenised], fit: bool
    ) -> LabelPerson | None:
        """Prepare one person, as `Evaluator.person` says."""
        if not held_out:
            return None
        features, labels = self.features(held_out)
        base = float(label_losses(self.nothing, features, labels).double().mean())
        head = fit_label_head(*self.features(own), self.shared) if own and fit else None
        return LabelPerson(base, head, features, labels, self.shared)

    @torch.no_grad()
    def features(self, records: Sequence[Tokenised]) -> tuple[Tensor, Tensor]:
        """Return features (n, w) and labels (n,) of at least one record.

        A missing label counts as 0.
        """
        base = self.adapter.base
        new = [record.ids for record in records if record.ids not in self._known]
        if new:
            ids, mask = pad(new, tokens=self.tokens)
            vectors = pooled(base, final_states(base, ids, mask).cpu(), mask)
            self._known.update(zip(new, vectors, strict=True))
        labels = torch.tensor([float(record.label or 0.0) for record in records])
        return torch.stack([self._known[record.ids] for record in records]), labels
