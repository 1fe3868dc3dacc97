"""A decoder's output layer: the scores of the next token from a final state.

The same for losses, heads and generation, so that all of them mean the model's own scores.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["OutputLayer", "at_least_float32"]


@dataclass(frozen=True, eq=False)
class OutputLayer:
    """score = f(scale * (weight @ state + bias)), where f caps softly: cap * tanh(score / cap).

    Attributes:
        weight: (v, w), frozen, in the base model's dtype and on its device.
        bias: (v,); None: none (Phi and GPT-J have one).
        scale: 1 but for Cohere and Granite.
        cap: None: scores are not capped (Gemma 2 caps them).
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, network: "PreTrainedModel") -> "OutputLayer":
        """Read a decoder's output layer off its module and its configuration.

        `base_model.load` compares its scores with the model's own, so a key that is missing here is
        found there.
        """
        module, config = network.get_output_embeddings(), network.config
        bias = getattr(module, "bias", None)
        return cls(
            module.weight.detach(),
            None if bias is None else bias.detach(),
            float(getattr(config, "logit_scale", None) or 1.0)
            / float(getattr(config, "logits_scaling", None) or 1.0),
            getattr(config, "final_logit_softcapping", None),
        )

    @property
    def words(self) -> int:
        """Size of the vocabulary."""
        return len(self.weight)

    @property
    def width(self) -> int:
        """Size of a state."""
        return int(self.weight.shape[1])

    def scores(self, states: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Compute the scores where the states are, at least in float32.

        They are multiplied in the base model's dtype.

        Args:
            states: (n, w).
            tokens: (m,) int64, whose scores alone are wanted; None: all.

        Returns:
            (n, m), or (n, v).
        """
        weight, bias = self.weight, self.bias
        if tokens is not None:
            tokens = tokens.to(weight.device)
            weight, bias = weight[tokens], None if bias is None else bias[tokens]
        scores = at_least_float32(states.to(weight) @ weight.T).to(states.device)
        if bias is not None:
            scores = scores + bias.to(scores)
        if self.scale != 1:
            scores = scores * self.scale
        return scores if self.cap is None else self.cap * torch.tanh(scores / self.cap)


def at_least_float32(numbers: Tensor) -> Tensor:
    """Return the numbers in float32 if they were in fewer digits."""
    return numbers.to(torch.promote_types(numbers.dtype, torch.float32))
