"""Adapter families, and adapter <-> flat float32 vector.

What a family trains and sends is one entry in `families.py`.

Labelled tasks train one more piece, the shared head. The pieces in a fixed order make one vector;
`Layout.digest` names that order, and both sides compare it before a round.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import AdapterError
from ..files import write_atomic
from ..settings.config import Config
from ..settings.sections import AdapterSettings, ComputeSettings
from .base_model import BaseModel, final_states, load, pad
from .exchange_layout import Exchange, Vector, turns
from .families import A, B, Family, R, family_named
from .lora_xs import Product
from .objective import SharedHead
from .vector_layout import Layout

__all__ = [
    "Adapter",
    "Layout",
    "Vector",
    "attach",
    "exchanged",
    "modules_by_record",
    "shared",
    "usual_modules",
]

# the four layers of a block that gain most for their size, by architecture
_USUAL = (
    ("q_proj", "v_proj", "o_proj", "down_proj"),
    ("query", "value", "attention.output.dense", "intermediate.dense"),
    ("q_lin", "v_lin", "out_lin", "ffn.lin2"),
    ("attn.c_attn", "attn.c_proj", "mlp.c_proj"),
)
_LINEAR = (nn.Linear, Conv1D)  # GPT-2's: a linear layer whose weight is (in, out)
# by the end of a parameter's name
_PARAMETERS = {
    A: ".lora_A.default.weight", B: ".lora_B.default.weight", R: ".lora_B.default.trained.weight"
}  # fmt: skip
HEAD = "head.weight"
HEAD_BIAS = "head.bias"


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter inside `base.network`, which `read` and `write` move as one vector.

    Attributes:
        layout: of that vector, which the server sends.
        local_factor: layout of what is trained beside it and never leaves the device; empty but
            for fedsa.
        trainable: the modules that some round trains.
        start: the vector before the first round, with which the model is the base model.
    """

    base: BaseModel
    settings: AdapterSettings
    layout: Layout
    modules: tuple[str, ...]
    trainable: nn.ModuleDict
    head: SharedHead | None
    start: Vector
    local_factor: Layout
    named: Mapping[str, nn.Parameter]

    @property
    def parameters(self) -> tuple[tuple[str, nn.Parameter], ...]:
        """The parameters that the vector holds, in the order of the layout."""
        return tuple((name, self.named[name]) for name, _ in self.layout.pieces)

    def train_only(self, number: int | None) -> tuple[tuple[str, nn.Parameter], ...]:
        """Freeze everything but what round `number` trains (None: what some round trains).

        Returns:
            The trained parameters: those a contribution holds, in its order, then those
                of the local factor.
        """
        parts = turns(self.layout)
        if number is not None:
            parts = (parts[(number - 1) % len(parts)],)
        wanted = [name for part in (*parts, self.local_factor) for name, _ in part.pieces]
        for name, parameter in self.named.items():
            parameter.requires_grad_(name in wanted)
        return tuple((name, self.named[name]) for name in wanted)

    @cached_property
    def mixing(self) -> tuple[str, ...]:
        """The adapted layers that do not see one row for each record, so give it no gradient."""
        layers = {name: _plain(self.base, name) for name in self.modules}
        fitting = _seeing_records(self.base, layers)
        return tuple(name for name in self.modules if name not in fitting)

    @property
    def attached(self) -> bool:
        """Whether the base model runs through this adapter still."""
        inside = set(self.base.network.parameters())
        _, first = self.parameters[0]
        return first in inside

    @property
    def first_block(self) -> int:
        """Number of the first adapted block. All blocks below it are a frozen prefix."""
        depth = len(self.base.blocks)
        return max(depth - self.settings.last_blocks, 0)

    def read(self) -> Vector:
        """The trained numbers, shape (dimension,), float32."""
        return _numbers([p for _, p in self.parameters])

    def read_local_factor(self) -> Vector:
        """What stays on the device, shape (local_factor.dimension,), float32."""
        return _numbers([self.named[name] for name, _ in self.local_factor.pieces])

    def write(self, vector: Vector, local_factor: Vector | None = None) -> None:
        """Set the adapter's parameters to `vector`, and what stays on the device to `local_factor`.

        Without one, what stays on the device is set to zero.

        Raises:
            AdapterError: wrong shape or not float32.
        """
        if local_factor is None:
            local_factor = np.zeros(self.local_factor.dimension, np.float32)
        for layout, given in ((self.layout, vector), (self.local_factor, local_factor)):
            if given.shape != (layout.dimension,) or given.dtype != np.float32:
                raise AdapterError(
                    f"expected an adapter vector of {layout.dimension} float32 numbers, got "
                    f"{given.dtype} of shape {given.shape}"
                )
            start = 0
            with torch.no_grad():
                for name, _ in layout.pieces:
                    parameter = self.named[name]
                    piece = given[start : start + parameter.numel()]
                    parameter.copy_(torch.from_numpy(piece.copy()).view_as(parameter))
                    start += parameter.numel()

    def save(self, folder: Path) -> None:
        """Write what is loaded now as a plain PEFT folder, with the shared head beside it."""
        tensors: dict[str, Tensor] = {}
        for name in self.modules:
            layer = self.base.network.get_submodule(name)
            down, up = layer.lora_A["default"].weight, layer.lora_B["default"]
            weight = up.frozen.weight @ up.trained.weight if isinstance(up, Product) else up.weight
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


def shared(config: Config) -> "Adapter":
    """The adapter of an experiment, one per process: server and simulated clients share it.

    One that another adapter has pushed out of its base model since is made anew.
    """
    wanted = config.model.base, config.compute, config.adapter, config.outputs
    adapter = _shared(*wanted)
    if not adapter.attached:
        _shared.cache_clear()
        adapter = _shared(*wanted)
    return adapter


def exchanged(config: Config) -> Exchange:
    """What server and devices exchange in an experiment, from `shared`."""
    adapter = shared(config)
    return Exchange(adapter.layout, adapter.start, config.clusters)


@lru_cache(maxsize=1)
def _shared(
    base: str, compute: ComputeSettings, settings: AdapterSettings, outputs: int
) -> "Adapter":
    if outputs and compute.dtype == "auto":  # a shared head is trained privately in no other
        compute = compute.model_copy(update={"dtype": "float32"})
    model = load(base, compute)
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
    modules, weight_of = _select(base, settings), base.exact_weights()
    inject_adapter_in_model(_lora_config(base, settings, modules), base.network)
    trainable = nn.ModuleDict()
    state, own = dict[str, Any](), dict[str, Any]()
    generator = torch.Generator().manual_seed(settings.seed)
    family = family_named(settings.family)
    for name in modules:
        layer = base.network.get_submodule(name)
        if not hasattr(layer, "lora_A"):
            raise AdapterError(
                f"{name} ({type(layer).__name__}) is no layer that PEFT adapts; set "
                "adapter.modules to others"
            )
        layer.lora_A.float()
        layer.lora_B.float()
        family.start(layer, partial(weight_of, name), settings.rank, generator)
        for factor, module in _factors(layer).items():
            if factor in family.trained:
                trainable[_module_key(f"{name}.{factor}")] = module
            if factor in family.trained + family.sent:
                here = state if factor in family.sent else own
                here[f"{name}.{factor}.weight"] = module.weight
    head = None
    if outputs:
        head = SharedHead(base.width, outputs, device=base.compute.device)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        trainable["head"] = head
        state |= {HEAD: head.weight, HEAD_BIAS: head.bias}
    layout, local_layout = (
        Layout(
            family.name,
            base.fingerprint,
            tuple((n, tuple(p.shape)) for n, p in some.items()),
        )
        for some in (state, own)
    )
    _freeze_all_but(base, family, list(trainable.parameters()))
    start = _numbers(list(state.values()))
    named = {**state, **own}
    return Adapter(base, settings, layout, modules, trainable, head, start, local_layout, named)


def usual_modules(base: BaseModel) -> tuple[str, ...]:
    """The layer names adapted by default in this architecture.

    Only layers that see a record as a row are: no other has a gradient for each record.
    """
    names = modules_by_record(base)
    for usual in _USUAL:
        if all(any(name.endswith(part) for name in names) for part in usual):
            return usual
    if not names:
        raise AdapterError(f"{base.name}: a block has no linear layer that could be adapted")
    return names


def modules_by_record(base: BaseModel) -> tuple[str, ...]:
    """The linear layers of the last block that see one row for each record, sorted."""
    _, block = base.blocks[-1]
    return _seeing_records(base, _linear_layers(block))


@torch.no_grad()
def _seeing_records(base: BaseModel, layers: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """Return the names of those layers that are called once, with one row for each record.

    Found by looking: some blocks give a layer tokens for rows (OPT), or call it with positions too
    (DeBERTa-v2).
    """
    rows: dict[str, list[int]] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, given, name=name: rows.setdefault(name, []).append(len(given[0]))
        )
        for name, module in layers.items()
    ]
    try:
        final_states(base, *pad([[1, 2, 3, 4, 5], [6, 7, 8], [9, 10]]))
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(sorted(name for name, seen in rows.items() if seen == [3]))


def _linear_layers(block: nn.Module) -> dict[str, nn.Module]:
    """A block's linear layers by name, with an adapter in it or without."""
    return {
        name.removesuffix(".base_layer"): module
        for name, module in block.named_modules()
        if isinstance(module, _LINEAR) and ".lora_" not in name
    }


def _select(base: BaseModel, settings: AdapterSettings) -> tuple[str, ...]:
    wanted = settings.modules or usual_modules(base)
    selected: list[str] = []
    missing = set(wanted)
    for block_name, block in base.blocks[-settings.last_blocks :]:
        for name, module in block.named_modules():
            parts = {part for part in wanted if name == part or name.endswith("." + part)}
            if isinstance(module, _LINEAR) and parts:
                missing -= parts
                if settings.rank > (most := _smaller_side(module)):
                    raise AdapterError(
                        f"adapter.rank = {settings.rank} is larger than {block_name}.{name} allows "
                        f"({most})"
                    )
                selected.append(f"{block_name}.{name}")
    if missing:
        _, block = base.blocks[-1]
        raise AdapterError(
            f"adapter.modules = {list(wanted)}: no such linear layer in {base.name}: "
            f"{', '.join(sorted(missing))}; its blocks have {', '.join(_linear_layers(block))}"
        )
    return tuple(selected)


def _smaller_side(layer: nn.Linear | Conv1D) -> int:
    """The smaller of a linear layer's input and output; a quantised weight has another shape."""
    if isinstance(layer, nn.Linear):
        return min(layer.in_features, layer.out_features)
    weight: Tensor = layer.weight
    return min(weight.shape)


def _is_turned(layer: nn.Module) -> bool:
    """Whether the folder has the layer's weight as (in, out); once quantised, what it was."""
    return getattr(layer, "source_cls", type(layer)) is Conv1D


def _lora_config(base: BaseModel, settings: AdapterSettings, modules: tuple[str, ...]) -> Any:
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.rank,  # scaling 1
        lora_dropout=0.0,
        bias="none",
        target_modules=list(modules),
        task_type="CAUSAL_LM" if base.kind == "decoder" else "FEATURE_EXTRACTION",
        base_model_name_or_path=base.folder,
        fan_in_fan_out=any(_is_turned(_plain(base, name)) for name in modules),
        inference_mode=True,
    )


def _plain(base: BaseModel, name: str) -> nn.Module:
    """Return a module of the base model, without the adapter that may be around it."""
    module = base.network.get_submodule(name)
    plain: nn.Module = getattr(module, "base_layer", module)
    return plain


def _factors(layer: Any) -> dict[str, nn.Linear]:
    """The factors of an adapted layer, A first."""
    down, up = layer.lora_A["default"], layer.lora_B["default"]
    return {A: down, R: up.trained} if isinstance(up, Product) else {A: down, B: up}


def _freeze_all_but(base: BaseModel, family: Family, wanted: list[Tensor]) -> None:
    allowed = tuple(_PARAMETERS[factor] for factor in family.trained)
    base.network.requires_grad_(False)
    for parameter in wanted:
        parameter.requires_grad_(True)
    for name, parameter in base.network.named_parameters():
        if parameter.requires_grad and not name.endswith(allowed):
            raise AdapterError(f"{name} would be trained, but the family {family.name} freezes it")
    base.network.eval()


def _detach(base: BaseModel) -> None:
    for name, module in list(base.network.named_modules()):
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            parent, _, child = name.rpartition(".")
            setattr(base.network.get_submodule(parent), child, module.base_layer)
    if hasattr(base.network, "peft_config"):
        del base.network.peft_config


def _numbers(parameters: Sequence[Tensor]) -> Vector:
    """Return all numbers in a row, float32."""
    rows = [p.detach().cpu().numpy().ravel() for p in parameters]
    return np.concatenate([np.zeros(0, np.float32), *rows])


def _module_key(name: str) -> str:
    return name.replace(".", "/")
