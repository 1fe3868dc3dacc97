"""LoRA-XS: B = U R, of which only the small R is trained (Balazy et al. 2024)."""

from typing import Any

import scipy.linalg
import torch
from torch import Tensor, nn

__all__ = ["Product", "start"]


class Product(nn.Module):
    """B = U R as two linear layers, so that Opacus's hooks see R as it is."""

    def __init__(self, frozen: Tensor) -> None:
        super().__init__()
        rank = frozen.shape[1]
        self.trained = nn.Linear(rank, rank, bias=False)
        self.frozen = nn.Linear(rank, frozen.shape[0], bias=False)
        self.frozen.weight = nn.Parameter(frozen, requires_grad=False)
        nn.init.zeros_(self.trained.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.frozen(self.trained(hidden))
        return out


def _leading_singular(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Leading singular vectors of (out, in): U (out, r), V (r, in), signs fixed."""
    wide = weight.shape[1] >= weight.shape[0]
    gram = (weight @ weight.T if wide else weight.T @ weight).double().numpy()
    size = len(gram)
    _, vectors = scipy.linalg.eigh(gram, subset_by_index=[size - rank, size - 1])
    first = torch.from_numpy(vectors[:, ::-1].copy())
    largest = first.abs().argmax(0)
    first = first * first[largest, torch.arange(rank)].sign()
    other = (weight.double().T if wide else weight.double()) @ first
    other = other / other.norm(dim=0).clamp_min(1e-12)
    left, right = (first, other) if wide else (other, first)
    return left.float().contiguous(), right.T.float().contiguous()


def start(layer: Any, weight: Tensor, rank: int) -> None:
    """A = V and B = U R with R = 0: U and V are the leading singular vectors of the frozen weight.

    Args:
        layer: PEFT's; changed in place.
        weight: the layer's, (out, in), exact.
        rank: of R.
    """
    left, right = _leading_singular(weight, rank)
    down = layer.lora_A["default"].weight
    with torch.no_grad():
        down.copy_(right)
    layer.lora_B["default"] = Product(left).to(down.device)
