"""The adapter families: what each trains, sends, releases and starts from. One entry is one family.

Every family is an ordinary PEFT LoRA on the last blocks' linear layers, W + B A:

    lora_xs  B = U R, A = V: only R (r x r) is trained; U, V are the leading singular vectors of W
             itself, so the frozen parts use no data (LoRA-XS, Balazy et al. 2024)
    ffa      only B is trained; A comes from a public seed (FFA-LoRA, Sun et al. 2024)
    fedsvd   only B is trained; the server turns A and B after each round so that A has the right
             singular vectors of B A for its rows (FedSVD, Lee et al. 2025)
    rolora   B is trained in odd rounds, A in even ones (RoLoRA, Chen et al. 2024)
    fedsa    A and B are trained, A is shared, B stays at home (FedSA-LoRA, Guo et al. 2024)
    lora     A and B are trained and averaged separately: the naive baseline

Settings know the families, so torch and NumPy are loaded only where a family starts or steps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from .vector_layout import Layout

__all__ = ["FAMILIES", "A", "B", "Family", "R", "family_named"]

A, B, R = "lora_A", "lora_B", "lora_R"
"""The factors of an adapted layer, as pieces of a vector are named."""


if TYPE_CHECKING:
    Weight = Callable[[], torch.Tensor]
    Start = Callable[[Any, Weight, int, torch.Generator], None]
    AfterStep = Callable[[Layout, NDArray[np.float32], dict[str, NDArray[np.float32]]], None]


@dataclass(frozen=True)
class Family:
    """One way to adapt a linear layer.

    Attributes:
        name: as in `adapter.family`.
        start: sets an adapted layer's factors before the first round: PEFT's layer, what gives its
            frozen weight (out, in), the rank, and a generator with the public seed.
        trained: the factors that some round trains.
        sent: the factors in the vector that the server sends; what is trained and not sent stays on
            the device.
        turns: the factors that a contribution holds, round after round; a shared head goes with the
            first turn.
        clusters: whether it is built for several clusters of clients.
        after_step: what the server does with state and optimiser's memory after each of its steps,
            in place.
        before: its former name, which settings still take.
    """

    name: str
    start: "Start"
    trained: tuple[str, ...]
    sent: tuple[str, ...]
    turns: tuple[tuple[str, ...], ...]
    clusters: bool = False
    after_step: "AfterStep | None" = None
    before: str = ""

    @property
    def local(self) -> tuple[str, ...]:
        """The factors that a device trains and keeps."""
        return tuple(factor for factor in self.trained if factor not in self.sent)


def _small_product(layer: Any, weight: "Weight", rank: int, _: "torch.Generator") -> None:
    from .lora_xs import start

    start(layer, weight(), rank)


def _random_down(layer: Any, _: "Weight", __: int, generator: "torch.Generator") -> None:
    _from_seed(layer, generator, lambda noise: noise / noise.shape[1] ** 0.5)


def _orthonormal_down(layer: Any, _: "Weight", __: int, generator: "torch.Generator") -> None:
    import torch

    _from_seed(layer, generator, lambda noise: torch.linalg.qr(noise.double().T).Q.T)


def _from_seed(
    layer: Any, generator: "torch.Generator", down: "Callable[[torch.Tensor], torch.Tensor]"
) -> None:
    """Set A to what `down` makes of noise from the public seed, and B to zero."""
    import torch

    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        a.copy_(down(torch.randn(a.shape, generator=generator)))
        b.zero_()


def _split_anew(
    layout: "Layout", state: "NDArray[np.float32]", memory: "dict[str, NDArray[np.float32]]"
) -> None:
    """Split every B A anew, in place: A's rows orthonormal, and B's columns orthogonal.

    B A stays what it is. The memory goes along: a mean of steps turns as B does, and a mean of
    squares as that of independent coordinates.

    A's new rows span the space of its old ones: V' is a product with A on the right. So A turns
    and never leaves the space of its public seed.
    """
    import numpy as np

    from .server_optimizers import SQUARES
    from .vector_layout import Layout

    shapes = dict(layout.pieces)
    for name, shape in layout.pieces:
        if not name.endswith(".lora_A.weight"):
            continue
        other = name.replace(".lora_A.", ".lora_B.")
        down = layout.places(Layout("", "", ((name, shape),)))
        up = layout.places(Layout("", "", ((other, shapes[other]),)))
        a, b = (
            state[p].reshape(shapes[n]).astype(np.float64) for p, n in ((down, name), (up, other))
        )
        basis, triangle = np.linalg.qr(a.T)  # A = triangle' basis'
        _, _, right = np.linalg.svd(b @ triangle.T, full_matrices=False)
        if len(right) < len(basis.T):
            continue  # fewer outputs than ranks: B A cannot have orthogonal columns
        rows = right @ basis.T
        signs = np.sign(rows[np.arange(len(rows)), np.abs(rows).argmax(1)])
        turn = triangle.T @ right.T * signs
        state[down] = (rows * signs[:, None]).ravel()
        state[up] = (b @ turn).ravel()
        for kind, values in memory.items():
            by = turn**2 if kind == SQUARES else turn
            values[up] = (values[up].reshape(shapes[other]).astype(np.float64) @ by).ravel()


FAMILIES = {
    family.name: family
    for family in (
        Family(
            "lora_xs", _small_product, trained=(R,), sent=(R,), turns=((R,),), clusters=True,
            before="tiny",
        ),
        Family("ffa", _random_down, trained=(B,), sent=(B,), turns=((B,),), clusters=True),
        Family(
            "fedsvd", _orthonormal_down, trained=(B,), sent=(A, B), turns=((B,),),
            after_step=_split_anew,
        ),
        Family("rolora", _random_down, trained=(A, B), sent=(A, B), turns=((B,), (A,))),
        Family("fedsa", _random_down, trained=(A, B), sent=(A,), turns=((A,),)),
        Family(
            "lora", _random_down, trained=(A, B), sent=(A, B), turns=((A, B),), clusters=True
        ),
    )
}  # fmt: skip
"""By name."""


def family_named(name: str) -> Family:
    """The family of this name, today's or that of before.

    Raises:
        ValueError: there is none; names those there are.
    """
    for family in FAMILIES.values():
        if name in (family.name, family.before):
            return family
    *others, last = map(repr, FAMILIES)
    raise ValueError(f"{name!r}: expected {', '.join(others)} or {last}")
