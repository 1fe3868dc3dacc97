"""Base models: frozen, public, loaded once per process.

A base model is a catalogue name, a folder, a GGUF file or a Hugging Face id; a decoder (text
generation) or an encoder (labels). What the rest of privet needs of it is three things: its final
hidden states, its output embedding, and the list of its blocks.
"""

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import assets
from .errors import ModelError

__all__ = ["BaseModel", "final_states", "load", "pad"]

Kind = Literal["decoder", "encoder"]


@dataclass(frozen=True, eq=False)
class BaseModel:
    """A frozen transformer with its tokenizer.

    Attributes:
        name: what the user called it.
        folder: where it was loaded from.
        kind: `decoder` (has an output embedding) or `encoder`.
        network: the `transformers` model; every parameter frozen, in evaluation mode.
        tokenizer: its tokenizer.
        fingerprint: hash of architecture and parameter shapes; both sides compare it.
    """

    name: str
    folder: str
    kind: Kind
    network: Any
    tokenizer: Any
    fingerprint: str

    @property
    def blocks(self) -> tuple[tuple[str, nn.Module], ...]:
        """The repeated transformer blocks with their names, first to last."""
        lists = [
            (name, module)
            for name, module in self.network.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) > 1
        ]
        depth = getattr(self.network.config, "num_hidden_layers", None)
        name, found = next(
            ((name, module) for name, module in lists if len(module) == depth), ("", None)
        )
        if found is None:
            raise ModelError(f"{self.name}: found no list of {depth} blocks to adapt")
        return tuple((f"{name}.{index}", block) for index, block in enumerate(found))

    @property
    def output(self) -> Tensor:
        """Output embedding of a decoder, shape (vocabulary, width)."""
        weight: Tensor = self.network.get_output_embeddings().weight
        return weight

    @property
    def width(self) -> int:
        """Size of a hidden state."""
        return int(self.network.config.hidden_size)


@lru_cache(maxsize=2)
def load(base: str) -> BaseModel:
    """The base model called `base`, from the cache of this process when it was loaded before.

    Raises:
        ModelError: no such model, unknown architecture, no tokenizer, or a vocabulary that does
            not fit the tokenizer.
    """
    folder, gguf = _locate(base)
    network, tokenizer = _read(base, folder, gguf)
    _check_vocabulary(base, network, tokenizer)
    network.float().eval().requires_grad_(False)
    kind: Kind = "decoder" if network.get_output_embeddings() is not None else "encoder"
    return BaseModel(base, folder, kind, network, tokenizer, _fingerprint(network))


def pad(sequences: Sequence[Sequence[int]], fill: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids padded on the right: (ids, mask), both int64 of shape (records, longest)."""
    longest = max(len(sequence) for sequence in sequences)
    ids = torch.full((len(sequences), longest), fill, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
    return ids, mask


def final_states(base: BaseModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Final hidden states, after the last norm; shape (records, length, width)."""
    network = base.network
    core = network.base_model if base.kind == "decoder" else network
    extra = {"use_cache": False} if base.kind == "decoder" else {}
    states: Tensor = core(input_ids=ids, attention_mask=mask, **extra).last_hidden_state
    return states


@contextlib.contextmanager
def resumed_at(base: BaseModel, block: int, states: Tensor) -> Iterator[None]:
    """Within it, `final_states` takes `states` as the input of block number `block`.

    The blocks below are skipped, so a frozen prefix is paid for once per record.
    """
    blocks = [module for _, module in base.blocks]
    skipped = blocks[:block]
    try:
        for module in skipped:
            module.forward = _same  # type: ignore[assignment]
        hook = blocks[block].register_forward_pre_hook(
            lambda _, given, named: ((states, *given[1:]), named), with_kwargs=True
        )
        yield
    finally:
        hook.remove()
        for module in skipped:
            del module.forward


def prefix_states(base: BaseModel, block: int, ids: Tensor, mask: Tensor) -> Tensor:
    """What enters block number `block`; shape (records, length, width)."""
    kept: list[Tensor] = []

    def keep(_: nn.Module, given: tuple[Any, ...]) -> None:
        kept.append(given[0])
        raise _Reached

    hook = base.blocks[block][1].register_forward_pre_hook(keep)
    try:
        with torch.no_grad(), contextlib.suppress(_Reached):
            final_states(base, ids, mask)
    finally:
        hook.remove()
    return kept[0]


class _Reached(Exception):
    """The prefix is computed; nothing above it is needed."""


def _same(hidden: Any, *_: Any, **__: Any) -> Any:
    return hidden


def _locate(base: str) -> tuple[str, str | None]:
    if base in assets.CATALOGUE and assets.CATALOGUE[base].kind != "texts":
        return str(assets.fetch(base)), None
    path = Path(base).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"model.base = {base!r}: there is no such GGUF file")
        return str(path.parent), path.name
    if path.is_dir():
        return str(path), None
    if base.startswith((".", "/", "~")):
        raise ModelError(f"model.base = {base!r}: there is no such folder or GGUF file")
    return base, None


def _read(base: str, folder: str, gguf: str | None) -> tuple[Any, Any]:
    import transformers

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    source = {"gguf_file": gguf} if gguf else {}
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **source)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **source)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        known = ", ".join(name for name, a in assets.CATALOGUE.items() if a.kind != "texts")
        raise ModelError(
            f"model.base = {base!r}: configuration or tokenizer cannot be read ({_line(error)}). "
            f"Expected one of the catalogue ({known}), a folder with config.json and a tokenizer, "
            "a GGUF file, or a Hugging Face id that this machine can reach"
        ) from None
    decodes = any("CausalLM" in name for name in config.architectures or ()) or bool(gguf)
    loader = transformers.AutoModelForCausalLM if decodes else transformers.AutoModel
    try:
        network = loader.from_pretrained(folder, dtype=torch.float32, **source)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, ImportError) as error:
        raise ModelError(
            f"model.base = {base!r}: the weights cannot be loaded ({_line(error)})"
        ) from None
    except Exception as error:  # safetensors raises its own type on a damaged file
        raise ModelError(f"model.base = {base!r}: damaged weights ({_line(error)})") from None
    return network, tokenizer


def _check_vocabulary(base: str, network: Any, tokenizer: Any) -> None:
    words, rows = len(tokenizer), network.get_input_embeddings().weight.shape[0]
    if words == 0:
        raise ModelError(f"model.base = {base!r} has no tokenizer; add tokenizer.json to it")
    if words > rows or rows > 1.1 * words + 64:
        raise ModelError(
            f"model.base = {base!r}: the tokenizer has {words} entries but the model has {rows} "
            "embeddings; they do not belong together"
        )


def _fingerprint(network: Any) -> str:
    shapes = [(name, list(value.shape)) for name, value in network.state_dict().items()]
    text = json.dumps([network.config.model_type, sorted(shapes)])
    return hashlib.sha256(text.encode()).hexdigest()


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
