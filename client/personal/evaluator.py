"""How well the base, the shared and a personal model do on people's held-out records.

Each kind of head has an evaluator of its own. The three models are:

    base      the base model, no adapter (labels: every prediction 0; scored pairs: all equal)
    shared    the shared adapter
    personal  the shared adapter and the head fitted on the person's own earlier records

Losses are means over the person's held-out tokens, records or pairs; lower is better.

**Guarantee**: a head is fitted on private records without differential privacy. What is evaluated
with it leaves a device through the gate's noised blocks only (`client/privacy/gate.py`), and
nothing here is read by training: a device evaluates after its delta is made.
"""

from collections.abc import Sequence
from typing import Protocol

from ..training.records import Tokenised
from .head import PersonalHead

__all__ = ["EvaluatedPerson", "Evaluator"]


class EvaluatedPerson(Protocol):
    """One person's held-out records under the shared model, and the head they fitted.

    Private: it stays on the person's device.
    """

    @property
    def base(self) -> float:
        """The mean loss under the base model."""

    @property
    def head(self) -> PersonalHead | None:
        """The personal head, or None where none was fitted."""

    def loss(self, head: PersonalHead | None) -> float:
        """Return the mean loss on the held-out records with the own or another person's head.

        The other person's is the control.

        Args:
            head: of the kind this evaluator fits; None is the shared model.

        Raises:
            TypeError: a head of another kind.
        """


class Evaluator(Protocol):
    """A way to evaluate people, one after the other, under one shared adapter."""

    def person(
        self, own: Sequence[Tokenised], held_out: Sequence[Tokenised], fit: bool
    ) -> EvaluatedPerson | None:
        """Prepare one person's held-out records, and fit the head on the own earlier ones.

        Args:
            own: records the head is fitted on, earliest first; without any there is no head.
            held_out: records the losses are of.
            fit: whether to fit a head at all.

        Returns:
            None where nothing is held out.

        Raises:
            DataError: states of the model that are not finite.
        """
