"""Adapter families, and adapter <-> flat float32 vector.

Every family is an ordinary PEFT LoRA on the last blocks' linear layers, W + B A:

    tiny    B = U R, A = V: only R (r x r) is trained; U, V are the leading singular vectors of W
            itself, so the frozen parts use no data (LoRA-XS, Balazy et al. 2024)
    ffa     only B is trained; A comes from a public seed (FFA-LoRA, Sun et al. 2024)
    lora    A and B are trained and averaged separately: the naive baseline

Labelled tasks train one more piece, the shared head. The pieces in a fixed order make one vector;
`Layout.digest` names that order, and both sides compare it before a round.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from .config import AdapterSettings, Config
from .errors import AdapterError
from .files import write_atomic
from .models import BaseModel, load

__all__ = ["Adapter", "Layout", "attach", "shared", "usual_modules"]

Vector = NDArray[np.float32]

# the four layers of a block that gain most for their size, by architecture
_USUAL = (
    ("q_proj", "v_proj", "o_proj", "down_proj"),
    ("query", "value", "attention.output.dense", "intermediate.dense"),
    ("q_lin", "v_lin", "out_lin", "ffn.lin2"),
)
# what a family may train, by the end of a parameter's name
_TRAINED = {
    "tiny": (".lora_B.default.trained.weight",),
    "ffa": (".lora_B.default.weight",),
    "lora": (".lora_A.default.weight", ".lora_B.default.weight"),
}
HEAD = "head.weight"
HEAD_BIAS = "head.bias"


@dataclass(frozen=True)
class Layout:
    """Which numbers an adapter has, in which order: (name, shape) pieces of one flat vector."""

    family: str
    base: str
    pieces: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def dimension(self) -> int:
        """Length of the vector."""
        return sum(int(np.prod(shape)) for _, shape in self.pieces)

    @property
    def digest(self) -> str:
        """SHA-256 of family, base model and pieces."""
        text = json.dumps(["privet layout 1", self.family, self.base, self.pieces])
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter living inside `base.network`; `read` and `write` move it as one vector."""

    base: BaseModel
    settings: AdapterSettings
    layout: Layout
    modules: tuple[str, ...]
    trainable: nn.ModuleDict
    head: nn.Linear | None
    start: Vector

    @property
    def parameters(self) -> tuple[tuple[str, nn.Parameter], ...]:
        """The trained parameters in the order of the layout."""
        named = dict(self.trainable.named_parameters())
        return tuple((name, named[_key(name)]) for name, _ in self.layout.pieces)

    @property
    def attached(self) -> bool:
        """Whether the base model runs through this adapter still."""
        inside = set(self.base.network.parameters())
        _, first = self.parameters[0]
        return first in inside

    @property
    def first_block(self) -> int:
        """Number of the first adapted block; all below it is a frozen prefix."""
        depth = len(self.base.blocks)
        return max(depth - self.settings.last_blocks, 0)

    def read(self) -> Vector:
        """The trained numbers, shape (dimension,), float32."""
        return np.concatenate([p.detach().numpy().ravel() for _, p in self.parameters])

    def write(self, vector: Vector) -> None:
        """Set the trained numbers.

        Raises:
            AdapterError: wrong shape or not float32.
        """
        if vector.shape != (self.layout.dimension,) or vector.dtype != np.float32:
            raise AdapterError(
                f"expected an adapter vector of {self.layout.dimension} float32 numbers, got "
                f"{vector.dtype} of shape {vector.shape}"
            )
        start = 0
        with torch.no_grad():
            for _, parameter in self.parameters:
                piece = vector[start : start + parameter.numel()]
                parameter.copy_(torch.from_numpy(piece.copy()).view_as(parameter))
                start += parameter.numel()

    def save(self, folder: Path) -> None:
        """Write what is loaded now as a plain PEFT folder, with the shared head beside it."""
        tensors: dict[str, Tensor] = {}
        for name in self.modules:
            layer = self.base.network.get_submodule(name)
            down, up = layer.lora_A["default"].weight, layer.lora_B["default"]
            weight = up.frozen.weight @ up.trained.weight if isinstance(up, _Tiny) else up.weight
            tensors[f"base_model.model.{name}.lora_A.weight"] = down.detach().contiguous()
            tensors[f"base_model.model.{name}.lora_B.weight"] = weight.detach().contiguous()
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "adapter_model.safetensors", to_safetensors(tensors))
        if self.head is not None:
            head = {"weight": self.head.weight.detach(), "bias": self.head.bias.detach()}
            write_atomic(folder / "head.safetensors", to_safetensors(head))
        # last: where it is there, the folder is whole
        config = _lora_config(self.base, self.settings, self.modules).to_dict()
        config["target_modules"] = list(self.modules)
        write_atomic(folder / "adapter_config.json", json.dumps(config, indent=2).encode())


class _Tiny(nn.Module):
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


def shared(config: Config) -> "Adapter":
    """The adapter of an experiment, one per process: server and simulated clients share it.

    One that another adapter has pushed out of its base model since is made anew.
    """
    wanted = config.model.base, config.adapter, config.outputs
    found = _shared(*wanted)
    if not found.attached:
        _shared.cache_clear()
        found = _shared(*wanted)
    return found


@lru_cache(maxsize=1)
def _shared(base: str, settings: AdapterSettings, outputs: int) -> "Adapter":
    model = load(base)
    if not outputs:
        _ = model.output  # without labels it must make text: refuse an encoder at the start
    return attach(model, settings, outputs)


def attach(base: BaseModel, settings: AdapterSettings, outputs: int = 0) -> Adapter:
    """Put a fresh adapter into the base model (and take out the one that was there).

    Args:
        base: the base model; changed in place.
        settings: family, rank, blocks, modules, public seed.
        outputs: size of the shared head; 0 for generation.

    Raises:
        AdapterError: no layer fits, the rank is too large, or more than the family trains would
            be trained.
    """
    _detach(base)
    modules = _select(base, settings)
    inject_adapter_in_model(_lora_config(base, settings, modules), base.network)
    trainable = nn.ModuleDict()
    pieces: list[tuple[str, Tensor]] = []
    generator = torch.Generator().manual_seed(settings.seed)
    for name in modules:
        for piece, module in _initialise(base.network.get_submodule(name), settings, generator):
            trainable[_module_key(f"{name}.{piece}")] = module
            pieces.append((f"{name}.{piece}.weight", module.weight))
    head = None
    if outputs:
        head = nn.Linear(base.width, outputs)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        trainable["head"] = head
        pieces += [(HEAD, head.weight), (HEAD_BIAS, head.bias)]
    layout = Layout(
        settings.family, base.fingerprint, tuple((n, tuple(p.shape)) for n, p in pieces)
    )
    _freeze_all_but(base, settings.family, [p for _, p in pieces])
    start = np.concatenate([p.detach().numpy().ravel() for _, p in pieces])
    return Adapter(base, settings, layout, modules, trainable, head, start)


def usual_modules(base: BaseModel) -> tuple[str, ...]:
    """The layer names adapted by default in this architecture."""
    _, block = base.blocks[-1]
    names = {
        name.removesuffix(".base_layer")
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name
    }
    for usual in _USUAL:
        if all(any(name.endswith(part) for name in names) for part in usual):
            return usual
    if not names:
        raise AdapterError(f"{base.name}: a block has no linear layer that could be adapted")
    return tuple(sorted(names))


def _select(base: BaseModel, settings: AdapterSettings) -> tuple[str, ...]:
    wanted = settings.modules or usual_modules(base)
    found: list[str] = []
    missing = set(wanted)
    for block_name, block in base.blocks[-settings.last_blocks :]:
        for name, module in block.named_modules():
            parts = {part for part in wanted if name == part or name.endswith("." + part)}
            if isinstance(module, nn.Linear) and parts:
                missing -= parts
                if settings.rank > min(module.weight.shape):
                    raise AdapterError(
                        f"adapter.rank = {settings.rank} is larger than {block_name}.{name} allows "
                        f"({min(module.weight.shape)})"
                    )
                found.append(f"{block_name}.{name}")
    if missing:
        _, block = base.blocks[-1]
        names = [name for name, m in block.named_modules() if isinstance(m, nn.Linear)]
        raise AdapterError(
            f"adapter.modules = {list(wanted)}: no such linear layer in {base.name}: "
            f"{', '.join(sorted(missing))}; its blocks have {', '.join(names)}"
        )
    return tuple(found)


def _lora_config(base: BaseModel, settings: AdapterSettings, modules: tuple[str, ...]) -> Any:
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.rank,  # scaling 1
        lora_dropout=0.0,
        bias="none",
        target_modules=list(modules),
        task_type="CAUSAL_LM" if base.kind == "decoder" else "FEATURE_EXTRACTION",
        base_model_name_or_path=base.folder,
        inference_mode=True,
    )


def _initialise(
    layer: Any, settings: AdapterSettings, generator: torch.Generator
) -> list[tuple[str, nn.Linear]]:
    down, up = layer.lora_A["default"], layer.lora_B["default"]
    with torch.no_grad():
        if settings.family == "tiny":
            left, right = _leading_singular(layer.base_layer.weight, settings.rank)
            down.weight.copy_(right)
            layer.lora_B["default"] = _Tiny(left)
            return [("lora_R", layer.lora_B["default"].trained)]
        noise = torch.randn(down.weight.shape, generator=generator)
        down.weight.copy_(noise / down.weight.shape[1] ** 0.5)
        nn.init.zeros_(up.weight)
    return [("lora_B", up)] if settings.family == "ffa" else [("lora_A", down), ("lora_B", up)]


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


def _freeze_all_but(base: BaseModel, family: str, wanted: list[Tensor]) -> None:
    base.network.requires_grad_(False)
    for parameter in wanted:
        parameter.requires_grad_(True)
    for name, parameter in base.network.named_parameters():
        if parameter.requires_grad and not name.endswith(_TRAINED[family]):
            raise AdapterError(f"{name} would be trained, but the family {family} freezes it")
    base.network.eval()


def _detach(base: BaseModel) -> None:
    for name, module in list(base.network.named_modules()):
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            parent, _, child = name.rpartition(".")
            setattr(base.network.get_submodule(parent), child, module.base_layer)
    if hasattr(base.network, "peft_config"):
        del base.network.peft_config


def _module_key(name: str) -> str:
    return name.replace(".", "/")


def _key(piece: str) -> str:
    module, _, weight = piece.rpartition(".")
    return f"{_module_key(module)}.{weight}"
