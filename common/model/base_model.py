"""Base models: frozen, public, loaded once per process.

A base model is a catalogue name, a folder, a GGUF file or a Hugging Face id; a decoder (text
generation) or an encoder (labels). What the rest of privet needs of it is three things: its final
hidden states, its output embedding, and the list of its blocks.
"""

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from ..errors import ModelError
from . import assets

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["BaseModel", "final_states", "load", "pad", "prefix_states", "resumed_at"]

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
        fingerprint: hash of architecture, shapes and some of the weights; both sides compare it.
    """

    name: str
    folder: str
    kind: Kind
    network: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    fingerprint: str

    @cached_property
    def blocks(self) -> tuple[tuple[str, nn.Module], ...]:
        """The repeated transformer blocks with their names, first to last."""
        lists = [
            (name, module)
            for name, module in self.network.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) > 1
        ]
        depth = getattr(self.network.config, "num_hidden_layers", None)
        name, modules = next(
            ((name, module) for name, module in lists if len(module) == depth), ("", None)
        )
        if modules is None:
            raise ModelError(f"{self.name}: found no list of {depth} blocks to adapt")
        return tuple((f"{name}.{index}", block) for index, block in enumerate(modules))

    @property
    def output(self) -> Tensor:
        """Output embedding of a decoder, shape (vocabulary, width).

        Raises:
            ModelError: an encoder has none.
        """
        if self.kind == "encoder":
            raise ModelError(
                f"model.base = {self.name!r} is an encoder and makes no text; take a decoder, or "
                "data with labels"
            )
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
        ModelError: no such model, unknown architecture, no tokenizer, a vocabulary that does not
            fit the tokenizer, or an architecture privet would compute wrongly.
    """
    folder = _locate(base)
    network, tokenizer = _read(base, folder)
    _check_vocabulary(base, network, tokenizer)
    network.float().eval().requires_grad_(False)
    kind: Kind = "decoder" if network.get_output_embeddings() is not None else "encoder"
    model = BaseModel(base, folder, kind, network, tokenizer, _fingerprint(network))
    _check_states(model)
    return model


def pad(
    sequences: Sequence[Sequence[int]], fill: int = 0, tokens: int = 0
) -> tuple[Tensor, Tensor]:
    """Pad sequences of token ids on the right, and return (ids, mask).

    Both are int64 of shape (records, longest), or (records, tokens) where none is longer.
    """
    longest = max([tokens, *(len(sequence) for sequence in sequences)])
    ids = torch.full((len(sequences), longest), fill, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
    return ids, mask


def final_states(base: BaseModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Compute the final hidden states, after the last norm, shape (records, length, width)."""
    network = base.network
    core = network.base_model if base.kind == "decoder" else network
    extra = {"use_cache": False} if base.kind == "decoder" else {}
    states: Tensor = core(input_ids=ids, attention_mask=mask, **extra).last_hidden_state
    return states


@contextlib.contextmanager
def resumed_at(base: BaseModel, block: int, states: Tensor) -> Iterator[None]:
    """Make `final_states` take `states` as the input of block number `block`, within the context.

    The blocks below are skipped, so a frozen prefix is paid for once per record.
    """
    blocks = [module for _, module in base.blocks]
    skipped = blocks[:block]
    try:
        for module in skipped:
            module.forward = _same
        hook = blocks[block].register_forward_pre_hook(
            lambda _, given, named: ((states, *given[1:]), named), with_kwargs=True
        )
        yield
    finally:
        hook.remove()
        for module in skipped:
            del module.forward


def prefix_states(base: BaseModel, block: int, ids: Tensor, mask: Tensor) -> Tensor:
    """Compute the input of block number `block`, shape (records, length, width)."""
    kept: list[Tensor] = []

    def keep(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        kept.append(given[0])
        raise _Reached

    hook = base.blocks[block][1].register_forward_pre_hook(keep)
    try:
        with torch.no_grad(), contextlib.suppress(_Reached):
            final_states(base, ids, mask)
    finally:
        hook.remove()
    return kept[0]


class PrefixCache:
    """What enters a block, kept by record, least recently used out first.

    Each record passes the prefix alone, so what is kept is a function of the record only and no
    result depends on what was in the cache.

    Args:
        base: the base model; frozen below `block`.
        block: number of the first block that is not skipped.
        limit: bytes to keep.
    """

    def __init__(self, base: BaseModel, block: int, limit: int) -> None:
        self._base, self._block, self._left = base, block, limit
        self._kept: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()

    def padded(self, records: Sequence[tuple[int, ...]]) -> Tensor:
        """Return the states entering the block, (records, longest, width), zero where padded."""
        return nn.utils.rnn.pad_sequence([self._states(ids) for ids in records], batch_first=True)

    def _states(self, ids: tuple[int, ...]) -> Tensor:
        if ids in self._kept:
            self._kept.move_to_end(ids)
            return self._kept[ids]
        tokens = torch.tensor([ids])
        states = prefix_states(self._base, self._block, tokens, torch.ones_like(tokens))[0]
        self._kept[ids] = states
        self._left -= states.nbytes
        while self._left < 0 and len(self._kept) > 1:
            self._left += self._kept.popitem(last=False)[1].nbytes
        return states


class _Reached(Exception):
    """Raised to stop the forward pass when the prefix is computed."""


def _same(hidden: Tensor, *_: object, **__: object) -> Tensor:
    return hidden


def _locate(base: str) -> str:
    if base in assets.CATALOGUE and assets.CATALOGUE[base].kind != "texts":
        return str(assets.fetch(base))
    path = Path(base).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"model.base = {base!r}: there is no such GGUF file")
        return str(_converted(base, path))
    if path.is_dir():
        return str(path)
    if base.startswith((".", "/", "~")):
        raise ModelError(f"model.base = {base!r}: there is no such folder or GGUF file")
    return base


def _converted(base: str, file: Path) -> Path:
    """Convert a GGUF file to a folder of safetensors in the cache, once per content.

    It is made beside its place and moved there by one rename, so it is whole or not there.
    """
    converted = assets.cache_folder() / "converted"
    try:
        with file.open("rb") as handle:
            folder = converted / hashlib.file_digest(handle, "sha256").hexdigest()
        if folder.is_dir():
            return folder
        converted.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=converted) as temporary:
            made = Path(temporary) / "model"
            made.mkdir()
            (made / file.name).symlink_to(file.resolve())
            assets.convert_gguf(made)
            if not folder.is_dir():  # another process may have been faster
                os.rename(made, folder)
    except OSError as error:
        raise ModelError(
            f"model.base = {base!r}: the GGUF file cannot be read, or its conversion not be kept "
            f"in {converted} ({_line(error)}); free some space, or set PRIVET_CACHE to another "
            "folder"
        ) from None
    except Exception as error:  # readers of damaged bytes raise whatever they stumble over
        raise ModelError(
            f"model.base = {base!r}: the GGUF file cannot be converted ({_line(error)})"
        ) from None
    return folder


def _read(base: str, folder: str) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    import transformers

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        known = ", ".join(name for name, a in assets.CATALOGUE.items() if a.kind != "texts")
        raise ModelError(
            f"model.base = {base!r}: configuration or tokenizer cannot be read ({_line(error)}). "
            f"Expected one of the catalogue ({known}), a folder with config.json and a tokenizer, "
            "a GGUF file, or a Hugging Face id that this machine can reach"
        ) from None
    decodes = any(
        "CausalLM" in name or name == "GPT2LMHeadModel" for name in config.architectures or ()
    )
    loader = transformers.AutoModelForCausalLM if decodes else transformers.AutoModel
    try:
        network = loader.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, ImportError) as error:
        raise ModelError(
            f"model.base = {base!r}: the weights cannot be loaded ({_line(error)})"
        ) from None
    except Exception as error:  # safetensors raises its own type on a damaged file
        raise ModelError(f"model.base = {base!r}: damaged weights ({_line(error)})") from None
    return network, tokenizer


def _check_vocabulary(
    base: str, network: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase"
) -> None:
    words, rows = len(tokenizer), network.get_input_embeddings().weight.shape[0]
    if words == 0:
        raise ModelError(f"model.base = {base!r} has no tokenizer; add tokenizer.json to it")
    if words > rows or rows > 1.1 * words + 64:
        raise ModelError(
            f"model.base = {base!r}: the tokenizer has {words} entries but the model has {rows} "
            "embeddings; they do not belong together"
        )


@torch.no_grad()
def _check_states(base: BaseModel) -> None:
    """Refuse a model in which records of one batch influence each other or the states are wrong.

    It is found by trying two records, padded, in one batch.

    Some architectures scale or cap their scores or add a bias to them (Gemma 2, Cohere, Phi), some
    need more than token ids (T5), some are damaged files that still load.
    """
    ids, mask = pad([[1, 2, 3, 4], [4, 3]])
    try:
        states = final_states(base, ids, mask)
        separate = final_states(base, ids[1:, :2], mask[1:, :2])
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError) as error:
        raise ModelError(
            f"model.base = {base.name!r} cannot be run as a plain {base.kind} ({_line(error)})"
        ) from None
    if not states.isfinite().all():
        raise ModelError(f"model.base = {base.name!r}: its states are not finite; damaged weights?")
    if not torch.allclose(states[1, :2], separate[0], rtol=1e-3, atol=1e-3):
        raise ModelError(
            f"model.base = {base.name!r}: records in one batch influence each other, so no record "
            "has a gradient of its own; take another architecture"
        )
    if base.kind == "decoder":
        scores = base.network(input_ids=ids, attention_mask=mask).logits[0]
        if not torch.allclose(scores, states[0] @ base.output.T, rtol=1e-4, atol=1e-4):
            raise ModelError(
                f"model.base = {base.name!r} ({base.network.config.model_type}) scales, caps or "
                "shifts its scores, which privet's losses and heads do not; take another decoder"
            )


def _fingerprint(network: "PreTrainedModel") -> str:
    """Hash the first numbers of every tensor, to tell models of the same shapes apart."""
    hashed = hashlib.sha256(network.config.model_type.encode())
    for name, value in sorted(network.state_dict().items()):
        hashed.update(json.dumps([name, list(value.shape)]).encode())
        hashed.update(value.flatten()[:256].float().numpy().tobytes())
    return hashed.hexdigest()


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
