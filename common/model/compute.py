"""Where the frozen base model computes, and in which numbers.

Only the base model's: adapters, a record's gradient, clips, sums and noise are float32 and integers
whatever is chosen here. `auto` follows from what machine and model are, not from a measurement, so
that a run that goes on chooses as it began.
"""

from dataclasses import dataclass

import torch

from ..errors import ConfigError
from ..settings.sections import ComputeSettings

__all__ = ["Compute", "as_before", "chosen", "in_double"]

WIDE = 256
"""Numbers in a state from which on bfloat16 is faster than float32: a narrow model's time goes into
starting operations, and in bfloat16 there are more of them."""


_NO_DOUBLE = ("mps",)


@dataclass(frozen=True)
class Compute:
    """What was chosen, and why.

    Attributes:
        device: of torch, such as `cpu`, `cuda:0`.
        dtype: of the base model's weights.
        why: a clause for people.
    """

    device: torch.device
    dtype: torch.dtype
    why: str

    @property
    def settings(self) -> ComputeSettings:
        """The choice as settings that leave nothing to be chosen."""
        dtype = "bfloat16" if self.dtype == torch.bfloat16 else "float32"
        return ComputeSettings(device=str(self.device), dtype=dtype)

    @property
    def line(self) -> str:
        """What was taken and why, for people: `bfloat16 on cpu: the processor multiplies it`."""
        return f"{str(self.dtype).removeprefix('torch.')} on {self.device}: {self.why}"


def chosen(settings: ComputeSettings, width: int, routed: bool = False) -> Compute:
    """Choose for a model with states of so many numbers, on this machine.

    `routed`: whether it is a mixture of experts.

    Raises:
        ConfigError: the device is not there, or cannot compute in that dtype.
    """
    device = _device(settings.device)
    if settings.dtype == "float32":
        return Compute(device, torch.float32, "compute.dtype, or records with labels, ask for it")
    can, what = _bfloat16(device)
    if settings.dtype == "bfloat16":
        if not can and device.type != "cpu":
            raise ConfigError(
                f'compute.dtype = "bfloat16": {device} {what}; set compute.dtype = "float32", or '
                '"auto"'
            )
        return Compute(device, torch.bfloat16, "compute.dtype asks for it")
    if not can:
        return Compute(device, torch.float32, what)
    if routed:
        return Compute(device, torch.float32, "a mixture of experts trains privately in no other")
    if width < WIDE:
        return Compute(device, torch.float32, f"a model {width} wide gains nothing from bfloat16")
    return Compute(device, torch.bfloat16, what)


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


def as_before(asked: ComputeSettings, before: ComputeSettings) -> ComputeSettings:
    """Return settings in which what is left to `auto` is what a run began with."""
    left = {k: v for k, v in asked.model_dump().items() if v == "auto"}
    return asked.model_copy(update={name: getattr(before, name) for name in left})
