"""Small decoders over words of our own, for made people and for benchmarks: no download."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = ["made_model", "save_made_model"]

MARKS = ("[PAD]", "[UNK]", "<s>", "</s>")


def made_model(
    words: Sequence[str], size: Mapping[str, int], *, framed: bool = False
) -> tuple["PreTrainedTokenizerFast", "LlamaForCausalLM"]:
    """Make a tokenizer of whole words, and a Llama with random weights from torch's generator.

    Args:
        words: all that the tokenizer knows.
        size: settings of `LlamaConfig`.
        framed: each text gets a mark for its start and its end.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    numbers = {word: number for number, word in enumerate((*MARKS, *words))}
    own = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    if framed:
        own.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[(mark, numbers[mark]) for mark in MARKS[2:]]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=own, pad_token="[PAD]", unk_token="[UNK]", bos_token="<s>",
        eos_token="</s>",
    )  # fmt: skip
    settings = LlamaConfig(
        vocab_size=len(numbers), pad_token_id=0, bos_token_id=2, eos_token_id=3,
        tie_word_embeddings=False, **size,
    )  # fmt: skip
    return tokenizer, LlamaForCausalLM(settings)


def save_made_model(
    folder: Path, words: Sequence[str], size: Mapping[str, int], *, seed: int
) -> None:
    """Save a random decoder in a folder, as `made_model` makes it from a seed."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer, model = made_model(words, size)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
