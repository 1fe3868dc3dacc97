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
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import ModelError
from ..settings.sections import ComputeSettings
from . import assets
from .compute import (
    FROM_THE_FOLDER,
    Compute,
    chosen,
    kept_as,
    multiply_apart,
    quantizer,
    refuse_kept,
)
from .output_layer import OutputLayer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "BaseModel",
    "final_states",
    "forget",
    "load",
    "load_anew",
    "pad",
    "prefix_states",
    "recomputed",
    "resumed_at",
]

Kind = Literal["decoder", "encoder"]
_AUTO = ComputeSettings()
_POSSIBLE = (
    "take a decoder (such as Llama, Qwen, Gemma, GPT-2) or encoder (such as BERT, ModernBERT) that "
    "makes one state of each token"
)
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError)


@dataclass(frozen=True, eq=False)
class BaseModel:
    """A frozen transformer with its tokenizer.

    Attributes:
        name: what the user called it.
        folder: where it was loaded from.
        kind: `decoder` (has an output embedding) or `encoder`.
        network: the `transformers` model; every parameter frozen, in evaluation mode.
        tokenizer: its tokenizer.
        fingerprint: hash of architecture, shapes and some of the weights in float32, so the same
            wherever it computes; both sides compare it.
        compute: where it computes, and in which numbers.
        rounded: whether its weights have lost digits by that.
    """

    name: str
    folder: str
    kind: Kind
    network: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    fingerprint: str
    compute: Compute
    rounded: bool = False

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
    def output(self) -> OutputLayer:
        """The output layer of a decoder.

        Raises:
            ModelError: an encoder has none.
        """
        if self.kind == "encoder":
            raise ModelError(
                f"model.base = {self.name!r} is an encoder and makes no text; take a decoder, or "
                "data with labels"
            )
        return OutputLayer.of(self.network)

    @property
    def width(self) -> int:
        """Size of a hidden state."""
        return int(self.network.config.hidden_size)

    @property
    def positions(self) -> int:
        """How many tokens a record may have; a large number where there is no limit."""
        config, limit = self.network.config, 2**31
        for name in ("max_position_embeddings", "max_seq_len", "n_positions"):
            limit = min(limit, getattr(config, name, None) or limit)
        for name, module in self.network.named_modules():
            if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
                # RoBERTa's begin behind the padding's
                behind = 0 if module.padding_idx is None else module.padding_idx + 1
                limit = min(limit, module.num_embeddings - behind)
        return limit

    @cached_property
    def routed(self) -> bool:
        """Whether tokens choose which weights they meet (a mixture of experts)."""
        return any(name.endswith("experts") for name, _ in self.network.named_modules())

    @property
    def by_shape(self) -> bool:
        """Whether a record's gradient depends on its batch's shape by more than clipping allows.

        So it does in anything below float32 (docs/privacy.md); where weights are quantised it is
        not relied upon in float32 either.
        """
        return not self.compute.exact

    def exact_weights(self) -> Callable[[str], Tensor]:
        """Return a function that gives weights by their module's name as the folder has them.

        On the CPU, (out, in), float32: what an adapter starts from is the same on every machine.
        """
        from transformers.pytorch_utils import Conv1D

        network = self.network

        def weight(name: str) -> Tensor:
            nonlocal network
            if self.rounded and network is self.network:
                network = _exact_network(self.name, self.folder)
            module = network.get_submodule(name)
            found: Tensor = module.weight.detach().to("cpu", torch.float32)
            turned = isinstance(module, Conv1D) or getattr(module, "fan_in_fan_out", False)
            return found.T if turned else found

        return weight


def load(base: str, compute: ComputeSettings = _AUTO) -> BaseModel:
    """The base model called `base`, from the cache of this process when it was loaded before.

    Raises:
        ConfigError: as `compute.chosen`.
        ModelError: no such model, unknown architecture, no tokenizer, a vocabulary that does not
            fit the tokenizer, or an architecture privet would compute wrongly.
    """
    return _kept(base, *_located(base, compute))


def load_anew(base: str, compute: ComputeSettings = _AUTO) -> BaseModel:
    """As `load`, one's own: whatever is attached to it touches no other."""
    return _kept.__wrapped__(base, *_located(base, compute))


def forget() -> None:
    """Let go of the models that `load` keeps."""
    _kept.cache_clear()


def _located(base: str, compute: ComputeSettings) -> tuple[str, Compute]:
    """Return a model's folder or id, and where it computes."""
    folder = _locate(base)
    config = _configuration(base, folder)
    routed = any(getattr(config, name, None) for name in _EXPERTS)
    refuse_kept(base, config, compute.quantization)
    return folder, chosen(compute, int(getattr(config, "hidden_size", 0)), routed)


@lru_cache(maxsize=2)
def _kept(base: str, folder: str, where: Compute) -> BaseModel:
    model = _from_the_folder(base, folder)
    if where.quantization != "none":
        model.network.to("meta")  # let go of it: the next is as large until it is quantised
        network = _network(base, folder, where).eval().requires_grad_(False)
        model = replace(model, network=network, rounded=True)
    elif where.dtype != torch.float32:
        model = replace(model, rounded=not _holds(model.network, where.dtype))
    _place(model.network, where)
    model = replace(model, compute=where)
    if not where.exact:
        _check_numbers(model)
    return model


def _from_the_folder(base: str, folder: str) -> BaseModel:
    """Read a model in float32 on the CPU, and check it."""
    network, tokenizer = _exact_network(base, folder), _tokenizer(base, folder)
    if not getattr(network.config, "num_attention_heads", None):
        architecture = network.config.model_type
        raise ModelError(f"model.base = {base!r} ({architecture}) has no attention; {_POSSIBLE}")
    _check_vocabulary(base, network, tokenizer)
    network.float().eval().requires_grad_(False)
    kind: Kind = "decoder" if network.get_output_embeddings() is not None else "encoder"
    fingerprint = _fingerprint(network)
    model = BaseModel(base, folder, kind, network, tokenizer, fingerprint, FROM_THE_FOLDER)
    _check_states(model)
    return model


@torch.no_grad()
def _check_numbers(base: BaseModel) -> None:
    try:
        states = final_states(base, *pad([[1, 2, 3, 4], [4, 3]]))
    except RuntimeError as error:
        raise ModelError(
            f"model.base = {base.name!r} does not compute in {base.compute.numbers} "
            f"({_line(error)}); set {base.compute.mend}"
        ) from None
    if not states.isfinite().all():
        raise ModelError(
            f"model.base = {base.name!r}: its states are not finite in {base.compute.numbers}; set "
            f"{base.compute.mend}"
        )


def _holds(network: "PreTrainedModel", dtype: torch.dtype) -> bool:
    """Return whether all weights are what they were, once they are in this dtype."""
    return all(torch.equal(value.to(dtype).float(), value) for value in network.parameters())


def _place(network: "PreTrainedModel", where: Compute) -> None:
    """Round the weights, one after the other, and move everything.

    Buffers keep their numbers: a rotary embedding's angles are float32 whatever the weights are. So
    do quantised weights, which are integers.
    """
    for value in network.parameters():
        if value.is_floating_point():
            value.data = value.data.to(where.dtype)
    network.to(where.device)


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
    device = base.compute.device
    out = core(input_ids=ids.to(device), attention_mask=mask.to(device), **extra)
    states: Tensor = out.last_hidden_state
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


@contextlib.contextmanager
def recomputed(
    base: BaseModel, first: int, silenced: Callable[[], AbstractContextManager[None]]
) -> Iterator[None]:
    """Make the blocks from `first` on keep nothing but their input of a pass in this context.

    On the way back each block is computed again, whole, so memory is that of one block's inside and
    all blocks' inputs. Results are the same to the bit.

    transformers' own switch works in training mode alone, in which some blocks drop states at
    random.

    Args:
        base: the base model.
        first: number of the first block that is trained.
        silenced: context in which hooks inside a block record nothing: they run twice, and are to
            record what is computed again.
    """
    blocks = [module for _, module in base.blocks[first:]]

    try:
        for block in blocks:
            block.forward = partial(_computed_twice, block.forward, silenced)
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)


def _computed_twice(
    forward: Callable[..., Any],
    silenced: Callable[[], AbstractContextManager[None]],
    states: Tensor,
    *more: Any,
    **named: Any,
) -> Any:
    if torch.is_grad_enabled() and not states.requires_grad:
        # else a hook inside could meet its slope before its block is computed again
        states = states.detach().requires_grad_()
    return checkpoint(
        forward,
        states,
        *more,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (silenced(), contextlib.nullcontext()),
        early_stop=False,  # the last hook runs after the last tensor that the way back needs
        **named,
    )


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


def _configuration(base: str, folder: str) -> "PretrainedConfig":
    import transformers

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        return transformers.AutoConfig.from_pretrained(folder)
    except _UNREADABLE as error:
        raise _unreadable(base, error) from None


def _unreadable(base: str, error: Exception) -> ModelError:
    known = ", ".join(name for name, a in assets.CATALOGUE.items() if a.kind != "texts")
    return ModelError(
        f"model.base = {base!r}: configuration or tokenizer cannot be read ({_line(error)}). "
        f"Expected one of the catalogue ({known}), a folder with config.json and a tokenizer, "
        "a GGUF file, or a Hugging Face id that this machine can reach"
    )


def _tokenizer(base: str, folder: str) -> "PreTrainedTokenizerBase":
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder)
    except _UNREADABLE as error:
        raise _unreadable(base, error) from None


def _exact_network(base: str, folder: str) -> "PreTrainedModel":
    """Read a model's weights in float32, on the CPU; also those that the folder keeps quantised."""
    network = _network(base, folder, FROM_THE_FOLDER)
    return network.dequantize(torch.float32) if kept_as(network.config) != "none" else network


def _network(base: str, folder: str, where: Compute) -> "PreTrainedModel":
    """Read a model's weights in float32, or quantised for where they are multiplied."""
    import transformers

    config, how = _configuration(base, folder), dict[str, Any]()
    if kept_as(config) != "none" or where.quantization != "none":
        how["device_map"] = {"": where.device}
    if kept_as(config) == "none" != where.quantization:
        how["quantization_config"] = quantizer(where.quantization)
    decodes = any(
        "CausalLM" in name or name == "GPT2LMHeadModel" for name in config.architectures or ()
    )
    loader = transformers.AutoModelForCausalLM if decodes else transformers.AutoModel
    try:
        network = loader.from_pretrained(folder, dtype=torch.float32, **how)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, ImportError) as error:
        raise ModelError(
            f"model.base = {base!r}: the weights cannot be loaded ({_line(error)})"
        ) from None
    except Exception as error:  # safetensors raises its own type on a damaged file
        raise ModelError(f"model.base = {base!r}: damaged weights ({_line(error)})") from None
    if how:
        multiply_apart(base, network)
    return network


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

    Some architectures need more than token ids (T5), some are damaged files that still load.
    """
    ids, mask = pad([[1, 2, 3, 4], [4, 3]])
    try:
        states = final_states(base, ids, mask)
        separate = final_states(base, ids[1:, :2], mask[1:, :2])
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError) as error:
        raise ModelError(
            f"model.base = {base.name!r} cannot be run as a plain {base.kind} ({_line(error)}); "
            f"{_POSSIBLE}"
        ) from None
    if not states.isfinite().all():
        raise ModelError(f"model.base = {base.name!r}: its states are not finite; damaged weights?")
    if not torch.allclose(states[1, :2], separate[0], rtol=1e-3, atol=1e-3):
        raise ModelError(
            f"model.base = {base.name!r}: records in one batch influence each other, so no record "
            "has a gradient of its own; take another architecture"
        )
    if base.kind == "decoder":
        scores = base.network(input_ids=ids, attention_mask=mask).logits[0].float()
        if not torch.allclose(scores, base.output.scores(states[0]), rtol=1e-4, atol=1e-4):
            raise ModelError(
                f"model.base = {base.name!r} ({base.network.config.model_type}) does more to its "
                "scores than to scale, shift and cap them, which losses and heads would miss; take "
                "another decoder"
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
