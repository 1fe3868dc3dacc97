"""Learning from pairs of answers: what an answer scores, and the DPO loss of a pair.

    score        likelihood: log-probability of the answer after its prompt, nats (a token, where
                 `length_normalised`); head: a linear head on the pooled final state
    margin       score of the chosen answer less that of the rejected one
    loss         -log sigmoid(beta (margin - the reference model's margin))

A head's scores are the log-probabilities of a choice among the answers shown, up to a constant
that the margin cancels, so both kinds are one loss. The sum over tokens makes long answers weigh
more; `length_normalised` takes that away (Meng, Xia, Chen 2024, section 3).

Pairs never share a computation that would couple their gradients; the two answers of one pair do.

Source: Rafailov et al. 2023 (DPO), equation 7.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from .base_model import BaseModel, final_states, pad
from .compute import in_double
from .objective import SharedHead, losses_everywhere, pooled, token_losses

__all__ = ["answer_scores", "margins", "preference_losses"]

Ids = Sequence[int]


def answer_scores(
    base: BaseModel,
    ids: Sequence[Ids],
    prompts: Sequence[int],
    head: SharedHead | None,
    length_normalised: bool = False,
    tokens: int = 0,
) -> Tensor:
    """Score of each answer, shape (n,).

    Args:
        base: the model with the adapter in it.
        ids: prompt and answer of each row.
        prompts: how many ids of each row are the prompt's; they bear no likelihood.
        head: (1, w), whose output is the score; None: the score is the likelihood.
        length_normalised: nats a token of the answer instead of nats.
        tokens: of each row, and every place meets the vocabulary, as `objective.collate`.

    Edge cases: an answer without tokens after its prompt has likelihood 1, score 0.
    """
    padded, mask = (part.to(base.compute.device) for part in pad(ids, tokens=tokens))
    states = final_states(base, padded, mask)
    if head is not None:
        scores: Tensor = head(pooled(base, states, mask))[:, 0]
        return scores
    place = torch.arange(1, padded.shape[1], device=padded.device)[None]
    given = torch.tensor(list(prompts), device=padded.device)[:, None]
    wanted = mask[:, 1:].bool() & (place >= given)
    if tokens:
        every = losses_everywhere(base, states[:, :-1], padded[:, 1:], wanted)
        each = -in_double(every).sum(1)
        return each / wanted.sum(1).clamp_min(1) if length_normalised else each
    losses = token_losses(base, states[:, :-1][wanted], padded[:, 1:][wanted])
    rows = torch.nonzero(wanted)[:, 0]
    scored = -in_double(losses)
    sums = scored.new_zeros(len(padded)).index_add(0, rows, scored)
    return sums / wanted.sum(1).clamp_min(1) if length_normalised else sums


def margins(scores: Tensor) -> Tensor:
    """Scores of n chosen answers, then of n rejected ones, shape (2n,) -> margins (n,)."""
    chosen, rejected = scores.chunk(2)
    return chosen - rejected


def preference_losses(margin: Tensor, reference: Tensor, beta: float) -> Tensor:
    """DPO loss of each pair, nats, shape (n,).

    Args:
        margin: of the model that is trained, (n,).
        reference: of the reference model, (n,); frozen: no gradient goes through it.
        beta: above 0.

    A model that is its own reference has loss log 2 everywhere, and a gradient of -beta / 2 times
    that of the margin: the first step from the reference weighs all pairs alike.
    """
    return functional.softplus(-beta * (margin - reference.detach()))
