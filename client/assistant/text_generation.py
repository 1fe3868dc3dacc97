"""The chat's engine, which answers each prompt twice: as the shared and as the personal model.

    global    the shared adapter, the prompt alone
    personal  the shared adapter, the prompt with what a template puts before it (profile summary,
              retrieved texts), and the personal head on the vocabulary's scores

How much the head counts was chosen on the person's own held-out records when it was fitted
(`client/personal/text_head.py`); a head that did not help there is none.

**Guarantee**: no network, no message. Answers, sources and verdicts go to the caller, and into the
vault where the caller keeps them.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ...common.errors import ConfigError
from ...common.model.base_model import BaseModel
from ..personal.text_head import TextHead, adjusted_logits
from .profile import Context, Profile, context
from .retrieval import TextIndex
from .templates import Template

__all__ = [
    "Answer",
    "Assistant",
    "Recorder",
    "Reply",
    "Sampling",
    "Source",
    "completed",
    "continued",
    "sampled",
]

Heard = Callable[[str, str], object]
"""Told which answer, and its text so far, at each token."""


class Recorder(Protocol):
    """A function that keeps what the person thought of an answer."""

    def __call__(
        self, kind: str, prompt: str, answer: str, *, over: str | None, edited: str | None,
        taken: bool = False,
    ) -> object:  # fmt: skip
        """Keep one verdict, which is accept, reject or edit.

        `over`: with accept, the other answer. `edited`: with edit, the text it became. `taken`:
        whether the personal answer was the one accepted.
        """


@dataclass(frozen=True)
class Sampling:
    """How the tokens of an answer are drawn.

    Attributes:
        tokens: at most, of one answer.
        temperature: 0 takes the likeliest token.
        seed: of both answers.
        budget: tokens that may stand around the prompt.
    """

    tokens: int = 60
    temperature: float = 0.8
    seed: int = 0
    budget: int = 256

    def __post_init__(self) -> None:
        if self.temperature != 0 and not 0.01 <= self.temperature <= 100:
            raise ConfigError(
                f"temperature = {self.temperature:g}: expected 0 (the likeliest token) or a number "
                "from 0.01 to 100"
            )


@dataclass(frozen=True)
class Answer:
    """One model's answer, with its timings.

    Attributes:
        text: without the prompt.
        tokens: drawn.
        first_s: seconds from the question to the first token; `first_core_s`: of the processor.
        seconds: to the last.
    """

    text: str = field(repr=False)
    tokens: int
    first_s: float
    first_core_s: float
    seconds: float


@dataclass(frozen=True)
class Source:
    """A text of the person's history that stood before the prompt.

    Attributes:
        place: in the history, 0 is the earliest.
        text: itself.
        words, meaning: its rank in either search; None: not found there.
    """

    place: int
    text: str = field(repr=False)
    words: int | None
    meaning: int | None


@dataclass(frozen=True)
class Reply:
    """Both answers to one prompt, and what the personal one was made from."""

    prompt: str = field(repr=False)
    shared: Answer
    personal: Answer
    sources: tuple[Source, ...]
    with_profile: bool
    with_head: bool
    template: str
    context_tokens: int


@dataclass(frozen=True, eq=False)
class Assistant:
    """A base model with the shared adapter written into it, and what one person's device knows.

    Attributes:
        base: the model; the adapter is in it.
        adapter: which adapter that is; empty: none.
        head: the personal head; None or one that changes nothing: the shared scores.
        index: over the person's own texts, earliest first.
        profile: their summary, or None.
        template: what puts them before a prompt.
        sampling: how answers are drawn.
        trial: the A/B experiment whose arm the personal answer is of; empty: none.
    """

    base: BaseModel
    adapter: str
    head: TextHead | None = field(repr=False)
    index: TextIndex = field(repr=False)
    profile: Profile | None = field(repr=False)
    template: Template
    sampling: Sampling
    ab_run: str = ""

    def reply(self, prompt: str, heard: Heard | None = None) -> Reply:
        """Answer one prompt with the shared and with the personal model.

        Raises:
            ConfigError: the prompt is empty, or longer than the model reads.
        """
        if not prompt.strip():
            raise ConfigError("the prompt is empty; give the model a few words to begin with")
        limit = getattr(self.base.network.config, "max_position_embeddings", None)
        room = None if limit is None else limit - self.sampling.tokens - self._count(prompt)
        if room is not None and room < 0:
            raise ConfigError(
                f"the prompt has {self._count(prompt)} tokens; with {self.sampling.tokens} of an "
                f"answer the model reads {limit}: shorten it"
            )
        shared = self._answer("global", prompt, None, Clock.now(), heard)
        began = Clock.now()
        found = self._context(prompt, room)
        personal = self._answer("personal", found.text, self.head, began, heard)
        return Reply(
            prompt=prompt,
            shared=shared,
            personal=personal,
            sources=tuple(
                Source(hit.index, self.index.texts[hit.index], hit.words, hit.meaning)
                for hit in found.hits
            ),
            with_profile=found.with_profile,
            with_head=self.head is not None and not self.head.is_shared,
            template=f"{self.template.name} {self.template.version}",
            context_tokens=found.tokens,
        )

    def _context(self, prompt: str, room: int | None) -> Context:
        budget = self.sampling.budget if room is None else min(self.sampling.budget, room)
        return context(self.template, prompt, self.index, self._count, budget, profile=self.profile)

    def _answer(
        self, name: str, text: str, head: TextHead | None, began: "Clock", heard: Heard | None
    ) -> Answer:
        show = None if heard is None else lambda answer: heard(name, answer)
        return continued(self.base, head, text, self.sampling, began, show)

    def _count(self, text: str) -> int:
        return len(_ids(self.base.tokenizer, text))


@dataclass(frozen=True)
class Clock:
    """A moment, by the clock and by this process's processor time, in seconds."""

    clock: float
    core: float

    @classmethod
    def now(cls) -> "Clock":
        """Return the present moment."""
        return cls(time.perf_counter(), time.process_time())


def continued(
    base: BaseModel,
    head: TextHead | None,
    text: str,
    sampling: Sampling,
    began: Clock | None = None,
    show: Callable[[str], object] | None = None,
) -> Answer:
    """Continue a text token by token, reusing the keys and values of earlier tokens.

    It ends at the end token, at an empty line, or after `sampling.tokens`.

    Args:
        base: with whatever adapter is in it.
        head: None for the shared scores.
        text: what is continued.
        sampling: how.
        began: when the question came; None: now.
        show: gets the answer so far, at each token.
    """
    began = began or Clock.now()
    tokenizer, first = base.tokenizer, began
    drawn: list[int] = []
    answer = ""
    for (token,) in sampled(base, [_ids(tokenizer, text)], head, sampling):
        if not drawn:
            first = Clock.now()
        if token == tokenizer.eos_token_id:
            break
        drawn.append(token)
        answer = str(tokenizer.decode(drawn, skip_special_tokens=True))
        if answer.strip() and answer.endswith("\n\n"):
            break
        if show is not None:
            show(answer)
    return Answer(
        text=answer.strip("\n"),
        tokens=len(drawn),
        first_s=first.clock - began.clock,
        first_core_s=first.core - began.core,
        seconds=Clock.now().clock - began.clock,
    )


@torch.inference_mode()
def sampled(
    base: BaseModel,
    starts: Sequence[Sequence[int]],
    head: TextHead | None,
    sampling: Sampling,
) -> Iterator[list[int]]:
    """Draw one token after the other for each row, with a cache of keys and values.

    Args:
        base: with whatever adapter is in it.
        starts: token ids, at least one in each; all rows are one batch.
        head: None for the shared scores.
        sampling: how; row after row draws from one generator.

    Yields:
        The next token of each row, `sampling.tokens` times at most. A row does not stop at its end
        token: what comes after is for nobody.
    """
    longest = max(map(len, starts))
    given = torch.tensor([[0] * (longest - len(one)) + list(one) for one in starts])
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in starts])
    generator, cache = torch.Generator().manual_seed(sampling.seed), None
    for _ in range(sampling.tokens):
        positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -given.shape[1] :]
        device = base.compute.device
        out = base.network.base_model(
            input_ids=given.to(device),
            attention_mask=mask.to(device),
            position_ids=positions.to(device),
            past_key_values=cache,
            use_cache=True,
        )
        state, cache = out.last_hidden_state[:, -1].float().cpu(), out.past_key_values
        scores = adjusted_logits(head, state, base.output.scores(state))
        given = _drawn(scores, sampling.temperature, generator)
        mask = torch.cat([mask, torch.ones_like(given)], 1)
        yield given[:, 0].tolist()


def _drawn(scores: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Return one token of each row, shape (rows, 1): the best at temperature 0, else a draw."""
    if temperature == 0:
        return scores.argmax(1, keepdim=True)
    return torch.multinomial((scores / temperature).softmax(1), 1, generator=generator)


def completed(
    base: BaseModel,
    starts: Sequence[Sequence[int]],
    head: TextHead | None,
    sampling: Sampling,
) -> list[list[int]]:
    """Return the tokens that `sampled` draws for each row, up to before its end token."""
    end = base.tokenizer.eos_token_id
    rows: list[list[int]] = [[] for _ in starts]
    unfinished = set(range(len(rows)))
    for tokens in sampled(base, starts, head, sampling):
        unfinished -= {row for row in unfinished if tokens[row] == end}
        for row in unfinished:
            rows[row].append(tokens[row])
        if not unfinished:
            break
    return rows


def _ids(tokenizer: Any, text: str) -> Sequence[int]:
    """Tokenise a text as records are: a beginning token where there is one, and no other mark."""
    before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    found: list[int] = (
        before + tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    )
    return found
