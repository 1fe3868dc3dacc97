"""Small random models, made-up people and a small configuration: whole runs in seconds."""

import importlib.util
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from privet.common.model.base_model import BaseModel, load_anew
from privet.common.settings.config import Config, parse

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="privet[quantised] is not installed"
)
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "<s>", "</s>")
WORDS = tuple(a + b + c for a in "bdgklm" for b in "aeiou" for c in ("", "n", "r", "s", "ta", "to"))
VOCABULARY = len(SPECIAL) + len(WORDS)  # 186


def tiny_tokenizer(folder: Path, *, encoder: bool = False) -> None:
    """A word-level tokenizer over `WORDS`; everything else is [UNK]."""
    numbers = {word: number for number, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    named = {"unk_token": "[UNK]", "pad_token": "[PAD]"}
    if encoder:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        named |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    else:
        named |= {"bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)


def patiently(run: Callable[[], object], before_again: Callable[[], object]) -> None:
    """Run with Ray, and once more where its own start took longer than the 30 s that Ray allows."""
    try:
        run()
    except Exception as late:
        if "timed out during startup" not in str(late):
            raise
        before_again()
        run()


def fresh(folder: Path) -> BaseModel:
    """A base model of one's own: what others attach to the one `load` keeps does not touch it."""
    return load_anew(str(folder))


def tiny_llama(folder: Path, **changes: Any) -> Path:
    """A random decoder: width 32, 4 blocks; `changes` go into its configuration."""
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "bos_token_id": 4,
        "eos_token_id": 5,
        "pad_token_id": 0,
    }
    with torch.random.fork_rng():
        torch.manual_seed(1)
        LlamaForCausalLM(LlamaConfig(**settings | changes)).save_pretrained(folder)
    tiny_tokenizer(folder)
    return folder


def tiny_bert(folder: Path) -> Path:
    """A random encoder: width 32, 4 blocks."""
    settings = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(2)
        BertModel(settings).save_pretrained(folder)
    tiny_tokenizer(folder, encoder=True)
    return folder


def population(
    folder: Path, users: int, records: int, labels: bool | str = False, *, seed: int = 0
) -> Path:
    """A JSON Lines file of `users` people with favourite words of their own.

    `labels`: False (generation), True (numbers) or "names" (classification into three).
    """
    rng = random.Random(seed)
    lines = []
    for number in range(users):
        favourites = rng.sample(WORDS, 12)
        for time in range(records):
            text = " ".join(rng.choices(favourites, k=rng.randint(3, 9)))
            line: dict[str, Any] = {"user": f"user {number:03}", "text": text, "time": time}
            if labels:
                place = WORDS.index(text.split()[0]) / len(WORDS)
                line["label"] = (
                    ("bad", "fair", "good")[int(3 * place)]
                    if labels == "names"
                    else round(4 * place - 2 + rng.gauss(number % 3, 0.3), 3)
                )
            lines.append(json.dumps(line))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "people.jsonl"
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def tiny_config(base: Path, source: Path | str = "shakespeare", **changes: Any) -> Config:
    """Settings of a run of seconds; `changes` are sections, merged as deep as they go."""
    table: dict[str, Any] = {
        "name": "tiny",
        "data": {
            "source": str(source),
            "clients": 6,
            "test_clients": 3,
            "min_records": 1,
            "records_per_client": 8,
            "max_tokens": 16,
        },
        "model": {"base": str(base)},
        "adapter": {"rank": 2, "last_blocks": 2},
        "training": {"batch_size": 4},
        "rounds": {"count": 2, "cohort": 3},
        "privacy": {
            "client": {"noise_at": "server"},  # masking wants more than three devices
            "budget": {"client": 1000.0, "example": 1000.0},
        },
        "evaluation": {"users": 3, "records": 4, "fit_records": 8, "bootstrap": 100},
        "speed": {"threads": 1},
        "insecure_test_seed": 1,
    }
    return parse(_merged(table, changes))


def _merged(table: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    found = dict(table)
    for key, value in changes.items():
        inner = found.get(key)
        if isinstance(value, dict) and isinstance(inner, dict):
            found[key] = _merged(inner, value)
        else:
            found[key] = value
    return found
