"""Preferences as token ids, with each answer behind its prompt, for the two ways to score one."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...common.errors import ConfigError
from .records import CHARACTERS, Record, Tokenised, beginnings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["tokenize_pairs"]

BETWEEN = "\n"
"""Between prompt and answer; part of the prompt. A chat template goes into the prompt itself."""


def tokenize_pairs(
    records: Sequence[Record], tokenizer: "PreTrainedTokenizerBase", max_tokens: int, score: str
) -> list[Tokenised]:
    """Turn preferences into token ids.

    Records without a rejected answer are left out.

    Args:
        tokenizer: a Hugging Face tokenizer.
        max_tokens: of prompt and answer together, >= 4. A prompt keeps its last half of them at
            most, an answer is cut at its end; pairs that are the same after that are left out,
            for nothing is preferred in them.
        score: "likelihood": beginning token, prompt, answer, end token; "head": as an encoder
            reads a pair of texts.

    Raises:
        ConfigError: `max_tokens` below 4.
    """
    if max_tokens < 4:
        raise ConfigError(f"max_tokens must be at least 4 for pairs; it is {max_tokens}.")
    pairs = [record for record in records if record.rejected is not None]
    if not pairs:
        return []
    rows = _framed if score == "likelihood" else _as_read
    prompts = [record.prompt for record in pairs]
    chosen = rows(prompts, [record.text for record in pairs], tokenizer, max_tokens)
    rejected = rows(prompts, [record.rejected or "" for record in pairs], tokenizer, max_tokens)
    return [
        Tokenised(one, rejected=other, prompts=(start, behind))
        for (one, start), (other, behind) in zip(chosen, rejected, strict=True)
        if one != other
    ]


_Row = tuple[tuple[int, ...], int]


def _framed(
    prompts: list[str], answers: list[str], tokenizer: "PreTrainedTokenizerBase", max_tokens: int
) -> list[_Row]:
    prompts = [prompt[-CHARACTERS * max_tokens :] for prompt in prompts]
    before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    after = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    answered = _plain(beginnings(answers, max_tokens), tokenizer)
    asked = _plain([prompt + BETWEEN if prompt else "" for prompt in prompts], tokenizer)
    rows = []
    for prompt, answer in zip(asked, answered, strict=True):
        start = before + prompt[len(prompt) - min(len(prompt), max_tokens // 2) :]
        rows.append((tuple((start + answer + after)[:max_tokens]), len(start)))
    return rows


def _plain(texts: list[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    return [
        list(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
    ]


def _as_read(
    prompts: list[str], answers: list[str], tokenizer: "PreTrainedTokenizerBase", max_tokens: int
) -> list[_Row]:
    prompts, answers = (beginnings(texts, max_tokens) for texts in (prompts, answers))
    cut = {"truncation": True, "max_length": max_tokens}
    if not any(prompts):
        rows = tokenizer(answers, **cut)["input_ids"]
    else:
        rows = tokenizer(prompts, answers, **cut)["input_ids"]
    return [(tuple(ids), 0) for ids in rows]
