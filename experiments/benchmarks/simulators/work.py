"""The work of one client that all simulators do, as each field's own library does it.

A small Llama with random weights, LoRA by PEFT, and local steps of DP-SGD by Opacus. This file and
the peers' import nothing of privet: a peer's interpreter, which has no privet, runs them by path.
"""

import json
import random
from pathlib import Path

import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

WORDS, WIDTH, BLOCKS, HEADS = 1024, 128, 2, 4
RECORDS, TOKENS, BATCH, STEPS = 32, 32, 8, 2
RANK, MODULES = 8, ("q_proj", "v_proj")
RATE, CLIP, NOISE = 0.1, 1.0, 1.0


def save_model(folder: Path) -> None:
    """Write the base model into a folder, with the same random weights each time."""
    torch.manual_seed(1)
    settings = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=2 * TOKENS,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(settings).save_pretrained(folder)
    words = WordLevel({f"w{number}": number for number in range(WORDS)}, unk_token="w2")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = Whitespace()
    special = {"bos_token": "w0", "eos_token": "w1", "pad_token": "w2", "unk_token": "w2"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def records_of(client: int, records: int = RECORDS) -> list[list[int]]:
    """Return one client's records as token ids, all of one length."""
    draw = random.Random(client)
    return [[draw.randrange(3, WORDS) for _ in range(TOKENS)] for _ in range(records)]


class Client:
    """A model with LoRA and Opacus's hooks, made once, and the steps of a client."""

    def __init__(self, folder: Path, threads: int = 1) -> None:
        torch.set_num_threads(threads)
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        base.config.use_cache = False
        lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(MODULES), lora_dropout=0.0)
        model = get_peft_model(base, lora)
        self.model = GradSampleModule(model, loss_reduction="sum")
        self.parameters = [one for one in model.parameters() if one.requires_grad]
        self.start = [one.detach().clone() for one in self.parameters]

    def reset(self) -> None:
        """Go back to the global adapter."""
        with torch.no_grad():
            for parameter, start in zip(self.parameters, self.start, strict=True):
                parameter.copy_(start)

    def optimizer(self) -> DPOptimizer:
        """Return a client's optimiser: clips each record's gradient and adds the noise."""
        plain = torch.optim.SGD(self.parameters, lr=RATE)
        return DPOptimizer(
            plain, noise_multiplier=NOISE, max_grad_norm=CLIP, expected_batch_size=BATCH
        )

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the sum of the records' losses, each the mean over its tokens."""
        scores = self.model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        each = torch.nn.functional.cross_entropy(scores, ids[:, 1:].flatten(), reduction="none")
        return each.view(len(ids), -1).mean(1).sum()

    def train(self, records: torch.Tensor) -> list[torch.Tensor]:
        """Take a client's steps from the global adapter, and return by how much it has moved."""
        self.reset()
        optimizer = self.optimizer()
        for _ in range(STEPS):
            batch = records[torch.rand(len(records)) < BATCH / RECORDS]
            optimizer.zero_grad(set_to_none=True)
            self.loss(batch).backward()
            optimizer.step()
        with torch.no_grad():
            return [p - s for p, s in zip(self.parameters, self.start, strict=True)]


def said(**figures: object) -> None:
    """Print a simulator's figures as its last line."""
    print(json.dumps(figures), flush=True)
