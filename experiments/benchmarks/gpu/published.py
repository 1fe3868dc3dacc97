"""Models with random weights in the shapes of published ones, made where they compute.

Nothing is downloaded: the configurations stand here, as the models' `config.json` has them. Speed
and memory do not depend on the weights, and random ones have gradients as well.
"""

import copy
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

from ....common.model.base_model import BaseModel, load_anew
from ....common.model.compute import Compute

__all__ = ["PUBLISHED", "Published", "built", "copied", "loaded"]

_LLAMA: Mapping[str, Any] = {"model_type": "llama", "rms_norm_eps": 1e-5}
_QWEN: Mapping[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
}
_TINY: Mapping[str, Any] = {
    "vocab_size": 192,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


@dataclass(frozen=True)
class Published:
    """The shape of a published model.

    Attributes:
        name: as it was published.
        parameters: how many numbers it has; a test counts them.
        settings: what its `config.json` says of its shape.
    """

    name: str
    parameters: int
    settings: Mapping[str, Any]

    @property
    def config(self) -> PretrainedConfig:
        """The configuration of the `transformers` model; the embeddings are tied in all of them."""
        settings = {"tie_word_embeddings": True, "initializer_range": 0.02, **self.settings}
        return AutoConfig.for_model(settings.pop("model_type"), **settings)

    @property
    def tiny(self) -> "Published":
        """The same architecture, so small that a processor tries everything in seconds."""
        return Published(f"{self.name} (tiny)", 0, {**self.settings, **_TINY})


PUBLISHED = (
    Published(
        "SmolLM2-135M",
        134_515_008,
        {
            **_LLAMA,
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": 64,
            "max_position_embeddings": 8192,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
        },
    ),
    Published(
        "Qwen2.5-0.5B",
        494_032_768,
        {
            **_QWEN,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
        },
    ),
    Published(
        "Qwen2.5-1.5B",
        1_543_714_304,
        {
            **_QWEN,
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "max_position_embeddings": 131072,
        },
    ),
    Published(
        "Llama-3.2-3B",
        3_212_749_824,
        {
            **_LLAMA,
            "vocab_size": 128256,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 28,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 131072,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
            "rope_parameters": {
                "rope_theta": 500000.0,
                "rope_type": "llama3",
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
)
"""The smallest first, so that what a short lease cuts off is the largest."""


def built(shape: Published, compute: Compute) -> BaseModel:
    """Make a model of this shape where it computes: random weights that bfloat16 holds."""
    torch.manual_seed(1)
    with torch.device(compute.device):
        network = AutoModelForCausalLM.from_config(shape.config, dtype=torch.bfloat16)
    return _based(shape.name, network, _tokenizer(shape), compute)


def copied(base: BaseModel, compute: Compute) -> BaseModel:
    """Return the model once more in float32, with the same weights, there or elsewhere."""
    network = copy.deepcopy(base.network).to(compute.device, torch.float32)
    return _based(base.name, network, base.tokenizer, compute)


def loaded(base: BaseModel) -> BaseModel:
    """Write the model as a folder, and load it as privet loads any model."""
    with tempfile.TemporaryDirectory() as folder:
        base.network.save_pretrained(folder)
        base.tokenizer.save_pretrained(folder)
        return load_anew(folder, base.compute.settings)


def _based(
    name: str, network: Any, tokenizer: PreTrainedTokenizerFast, compute: Compute
) -> BaseModel:
    network.eval().requires_grad_(False)
    return BaseModel(name, "", "decoder", network, tokenizer, f"random {name}", compute)


def _tokenizer(shape: Published) -> PreTrainedTokenizerFast:
    """A tokenizer with almost as many words as the model: loading may add some."""
    words = {str(number): number for number in range(shape.config.vocab_size - 16)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="0")), unk_token="0"
    )
