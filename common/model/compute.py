"""Where the frozen base model computes, and in which numbers.

Only the base model's: adapters, a record's gradient, clips, sums and noise are float32 and integers
whatever is chosen here. `auto` follows from what machine and model are, not from a measurement, so
that a run that goes on chooses as it began.

Quantised weights are bitsandbytes', loaded by transformers' own configuration. They are multiplied
here, not there: back in the dtype, by the same product as any other layer's.

**Guarantee**: no record takes part in another's product, beyond what the product of a layer that is
not quantised does. bitsandbytes' own products do not give that. LLM.int8 multiplies the columns in
which *some* row of the batch is large in more digits than the others, so a record with large states
changes its neighbours' results. And a 4-bit layer that has run once without a gradient, on a
processor with AVX512-BF16, never gives one again.
"""

import importlib.util
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, ModelError
from ..settings.sections import ComputeSettings, Quantization

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

__all__ = [
    "FROM_THE_FOLDER",
    "Compute",
    "as_before",
    "chosen",
    "in_double",
    "kept_as",
    "multiply_apart",
    "quantizer",
    "refuse_kept",
]

WIDE = 256
"""Numbers in a state from which on bfloat16 is faster than float32: a narrow model's time goes into
starting operations, and in bfloat16 there are more of them."""


_NO_DOUBLE = ("mps",)


@dataclass(frozen=True)
class Compute:
    """What was chosen, and why.

    Attributes:
        device: of torch, such as `cpu`, `cuda:0`.
        dtype: of the base model's weights, and of products with those that are quantised.
        why: a clause for people.
        quantization: how the weights of the blocks' linear layers are kept.
        gradient_checkpointing: whether training computes each block twice and keeps little of it.
    """

    device: torch.device
    dtype: torch.dtype
    why: str
    quantization: Quantization = "none"
    gradient_checkpointing: bool = False

    @property
    def exact(self) -> bool:
        """Whether the weights are float32, all of them."""
        return self.dtype == torch.float32 and self.quantization == "none"

    @property
    def settings(self) -> ComputeSettings:
        """The choice as settings that leave nothing to be chosen."""
        return ComputeSettings(
            device=str(self.device),
            dtype="bfloat16" if self.dtype == torch.bfloat16 else "float32",
            quantization=self.quantization,
            gradient_checkpointing=self.gradient_checkpointing,
        )

    @property
    def numbers(self) -> str:
        """What the weights are: `bfloat16`, or `nf4 multiplied in bfloat16`."""
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            dtype if self.quantization == "none" else f"{self.quantization} multiplied in {dtype}"
        )

    @property
    def mend(self) -> str:
        """The settings with which it would be exact."""
        if self.quantization == "none":
            return 'compute.dtype = "float32"'
        return 'compute.quantization = "none" and compute.dtype = "float32"'

    @property
    def line(self) -> str:
        """What was taken and why, for people: `bfloat16 on cpu: the processor multiplies it`."""
        twice = ", each block computed twice" if self.gradient_checkpointing else ""
        return f"{self.numbers} on {self.device}{twice}: {self.why}"


FROM_THE_FOLDER = Compute(torch.device("cpu"), torch.float32, "as its folder has it")
"""How a model is read before it is put where it computes."""


def chosen(settings: ComputeSettings, width: int, routed: bool = False) -> Compute:
    """Choose for a model with states of so many numbers, on this machine.

    `routed`: whether it is a mixture of experts.

    Raises:
        ConfigError: the device is not there, or cannot compute in that dtype, or the weights
            cannot be quantised for it.
    """
    device = _device(settings.device)
    dtype, why = _dtype(settings, device, width, routed)
    if settings.quantization != "none":
        _refuse_unquantisable(settings.quantization, device, routed)
    return Compute(device, dtype, why, settings.quantization, settings.gradient_checkpointing)


def _dtype(
    settings: ComputeSettings, device: torch.device, width: int, routed: bool
) -> tuple[torch.dtype, str]:
    if settings.dtype == "float32":
        return torch.float32, "compute.dtype, or records with labels, ask for it"
    can, what = _bfloat16(device)
    if settings.dtype == "bfloat16":
        if not can and device.type != "cpu":
            raise ConfigError(
                f'compute.dtype = "bfloat16": {device} {what}; set compute.dtype = "float32", or '
                '"auto"'
            )
        return torch.bfloat16, "compute.dtype asks for it"
    if not can:
        return torch.float32, what
    if routed:
        return torch.float32, "a mixture of experts trains privately in no other"
    if width < WIDE:
        return torch.float32, f"a model {width} wide gains nothing from bfloat16"
    return torch.bfloat16, what


def in_double(numbers: torch.Tensor) -> torch.Tensor:
    """Return the numbers in float64, or as they are on a device that has none (Apple's)."""
    return numbers if numbers.device.type in _NO_DOUBLE else numbers.double()


def _device(asked: str) -> torch.device:
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    if asked.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        number = int(asked.partition(":")[2] or 0)
        if number >= count:
            there = ", ".join(["cpu", *(f"cuda:{n}" for n in range(count))])
            raise ConfigError(
                f'compute.device = "{asked}" is not there: this machine has {there}; take one of '
                'them, or "auto"'
            )
        return torch.device("cuda", number)
    if asked == "mps" and not torch.backends.mps.is_available():
        raise ConfigError('compute.device = "mps" is not there: take "cpu", or "auto"')
    return torch.device(asked)


def _bfloat16(device: torch.device) -> tuple[bool, str]:
    """Return whether the device multiplies bfloat16 faster than float32, and the clause for it."""
    if device.type == "cuda":
        can = torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.type == "cpu":
        can = bool(torch.cpu.get_capabilities().get("amx_bf16"))
    else:
        can = False
    return can, f"{'multiplies' if can else 'has no fast multiplication of'} bfloat16"


def _refuse_unquantisable(quantization: str, device: torch.device, routed: bool) -> None:
    asked, plain = f'compute.quantization = "{quantization}"', 'set compute.quantization = "none"'
    if routed:
        raise ConfigError(
            f"{asked}: a mixture of experts keeps its experts in no linear layers, which are all "
            f"that is quantised; {plain}"
        )
    if not _installed():
        raise ConfigError(f"{asked} needs {_MISSING}, or {plain}")
    if device.type not in _known_devices():
        raise ConfigError(
            f'{asked}: bitsandbytes does not know {device}; take compute.device = "cpu", or {plain}'
        )


_MISSING = "bitsandbytes, which is not installed: pip install 'privet[quantised]'"


def _installed() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None


def _known_devices() -> set[str]:
    import bitsandbytes

    known: set[str] = bitsandbytes.supported_torch_devices
    return known


def quantizer(quantization: Quantization) -> "BitsAndBytesConfig":
    """Return transformers' own configuration for how weights are to be kept."""
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


def kept_as(config: "PretrainedConfig") -> str:
    """Return how a model's folder keeps its weights: `none` (in full), `int8`, `nf4`, another."""
    kept = getattr(config, "quantization_config", None) or {}
    how = kept if isinstance(kept, dict) else kept.to_dict()
    if how.get("load_in_8bit"):
        return "int8"
    if how.get("load_in_4bit"):
        return str(how.get("bnb_4bit_quant_type", "fp4"))
    return str(how.get("quant_method", "none"))


def refuse_kept(base: str, config: "PretrainedConfig", asked: str) -> None:
    """Refuse a folder of quantised weights that cannot be read, or not as is asked.

    Raises:
        ConfigError: they are to be quantised otherwise.
        ModelError: they are kept in a way that privet does not read, or bitsandbytes is missing.
    """
    kept = kept_as(config)
    if kept == "none":
        return
    what = f"the weights of model.base = {base!r} are {kept} already"
    if kept not in ("int8", "nf4"):
        raise ModelError(
            f"{what}, which privet does not read; take the model as it was before, and "
            'compute.quantization = "int8" or "nf4" where it is to be small'
        )
    if not _installed():
        raise ModelError(f"{what}, which needs {_MISSING}")
    if asked not in ("none", kept):
        raise ConfigError(
            f'compute.quantization = "{asked}": {what}; set compute.quantization = "{kept}", or '
            '"none" for their full numbers'
        )


def multiply_apart(base: str, network: "PreTrainedModel") -> None:
    """Make quantised layers multiply as the others do.

    Raises:
        ModelError: there is none, or bitsandbytes would not give back the weights of one.
    """
    layers = {
        name: module
        for name, module in network.named_modules()
        if type(getattr(module, "weight", None)).__name__ in ("Params4bit", "Int8Params")
    }
    if not layers:
        raise ModelError(
            f"model.base = {base!r} ({network.config.model_type}) has no layer that is quantised; "
            'set compute.quantization = "none"'
        )
    for name, layer in layers.items():
        size = getattr(layer.weight, "blocksize", 1)
        if layer.in_features % size:
            # seen with bitsandbytes 0.50.2 on a CPU, which reads scales beyond their end
            raise ModelError(
                f"model.base = {base!r}: {name} has {layer.in_features} inputs, and bitsandbytes "
                f"reads back nf4 weights wrongly where they are no multiple of {size}; set "
                'compute.quantization = "int8" or "none"'
            )
        layer.forward = partial(_Product.apply, layer)


class _Product(torch.autograd.Function):
    """states @ weight' + bias with a quantised, frozen weight.

    The weight's full numbers are made for each product anew, and for its way back, so that no more
    than one layer's are in memory.
    """

    @staticmethod
    def forward(ctx: Any, layer: nn.Linear, states: Tensor) -> Tensor:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(states.dtype)
        return nn.functional.linear(states, _full(layer, states.dtype), bias)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[None, Tensor]:
        return None, slope @ _full(ctx.layer, slope.dtype)


def _full(layer: nn.Linear, dtype: torch.dtype) -> Tensor:
    """Return a quantised layer's weight, (out, in), in this dtype."""
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    weight: Tensor = dequantize_bnb_weight(layer.weight, getattr(layer, "state", None))
    return weight.to(dtype)


def as_before(asked: ComputeSettings, before: ComputeSettings) -> ComputeSettings:
    """Return settings in which what is left to `auto` is what a run began with."""
    left = {k: v for k, v in asked.model_dump().items() if v == "auto"}
    return asked.model_copy(update={name: getattr(before, name) for name in left})
