"""The personal head for preferences between answers that are scored by their likelihood.

Also how far a model prefers long answers.

A pair says that the owner prefers one answer to another. The personal model adds to the shared
model's margin m of the pair a change f, and is fitted by DPO with the shared model as the frozen
reference: minimise the sum of -log sigmoid(beta f) plus a Gaussian prior on the change, a bias on
the tokens of the owner's answers, by L-BFGS. It is a `TextHead` without a memory.

The prior's strength is chosen on the owner's own pairs by folds: the one whose personal model
(shared margin and change together) predicts the left-out pairs best, where no answer is on both
sides. The shared model alone, at the scale that suits it best, is always among the choices.

A likelihood sums over tokens, so long answers weigh more: `length_normalised` takes the mean.
Where a head scores the answers: `score_head.py`.

**Guarantee**: fitted on private records without differential privacy, after the release. Nothing
here is read by training or by the gate.

Source: Rafailov et al. 2023 (DPO).
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional

from ...common.model.output_layer import OutputLayer
from ...common.settings.sections import PreferenceSettings
from .head import best_choice, minimise
from .text_head import (
    SharedScores,
    TextHead,
    TokenStates,
    no_text_head,
    shared_scores,
    token_losses,
)

__all__ = [
    "AnswerTokens",
    "Lengths",
    "fit_token_bias",
    "length_bias",
    "token_margins",
]

# Public constants; docs/preferences.md has what was tried.
BIAS_SPREADS = (0.3, 1.0, 3.0)  # standard deviation of a token's bias, nats, tried beside 0
SHARES = (1.0, 3.0, 10.0, 30.0)  # scales of the shared margin at which it is judged alone
MAX_TOKENS = 512
FOLDS = 5
MIN_PAIRS = 5


@dataclass(frozen=True, eq=False)
class AnswerTokens:
    """The tokens of n pairs' answers under the shared model.

    They are private.

    Attributes:
        tokens: (k,) positions: states, targets, and the pair each is of as `record`.
        weight: (k,) what the position counts for in its pair's margin: 1 chosen, -1 rejected,
            over the answer's tokens where lengths are normalised.
        which: (n, 2) int64, a number for each answer, chosen and rejected.
    """

    tokens: TokenStates
    weight: Tensor = field(repr=False)
    which: Tensor = field(repr=False)

    @property
    def pairs(self) -> int:
        """The number of pairs, n."""
        return len(self.which)

    def summed(self, values: Tensor) -> Tensor:
        """Sum values of positions (k,) to values of pairs (n,), weighed."""
        sums = torch.zeros(self.pairs, dtype=values.dtype)
        return sums.index_add(0, self.tokens.record, self.weight.to(values.dtype) * values)


@dataclass(frozen=True)
class Lengths:
    """The correlations, -1 to 1, of margins with the difference of the answers' lengths.

    Taken about zero, so that it does not matter which answer of a pair is called the first.

    Attributes:
        model: of the model's margins.
        choices: of the owner's own choices; what the content supports.
    """

    model: float
    choices: float

    @property
    def excess(self) -> float:
        """The model's preference for long answers beyond the owner's.

        Below 0 it prefers short ones.
        """
        return self.model - self.choices


def length_bias(margin: Tensor, longer: Tensor) -> Lengths:
    """Measure whether a model prefers long answers more than the person does.

    Args:
        margin: (n,) of chosen over rejected.
        longer: (n,) length of chosen less length of rejected, any unit.

    Edge cases: no pair, no margin or no difference of length: 0.
    """
    margin, longer = margin.double(), longer.double()
    return Lengths(_cosine(margin, longer), _cosine(torch.ones_like(longer), longer))


def _cosine(left: Tensor, right: Tensor) -> float:
    size = float(left.norm() * right.norm())
    return float(left @ right) / size if size > 0 else 0.0


@torch.no_grad()
def token_margins(answers: AnswerTokens, head: TextHead | None, shared: SharedScores,
                  output: OutputLayer) -> Tensor:  # fmt: skip
    """Return margins (n,) of the pairs under the shared model (None) or with a head, nats."""
    return -answers.summed(token_losses(head, answers.tokens, output, shared))


def fit_token_bias(
    answers: AnswerTokens, output: OutputLayer, settings: PreferenceSettings
) -> TextHead:
    """Fit one person's bias on tokens to their preferences.

    Run on the device, after the release.

    Args:
        answers: of the person's own pairs, under the reference: the shared model.
        output: the model's.
        settings: beta.

    Returns:
        A head without a memory, whose biases may be below zero; the shared model for fewer than
        `MIN_PAIRS` pairs, or where no change predicts left-out pairs better.
    """
    nothing = no_text_head(output.width)
    if answers.pairs < MIN_PAIRS:
        return nothing
    tokens, slots = _distinguishing(answers)
    scores = shared_scores(answers.tokens, output)
    with torch.no_grad():
        own = (output.scores(answers.tokens.states, tokens) - scores.log_z[:, None]).exp()
        offset = settings.beta * token_margins(answers, None, scores, output)
    fit = _BiasFit(answers, slots, own, settings.beta)
    spread = _best(offset, _folds(answers.which), fit)
    if spread == 0:
        return nothing
    bias = fit.bias(spread, torch.ones(answers.pairs, dtype=torch.bool))
    return replace(nothing, tokens=tokens, bias=bias, bias_weight=spread)


@dataclass(frozen=True, eq=False)
class _BiasFit:
    """Fits a bias on m tokens to n pairs.

    Attributes:
        answers: k positions.
        slots: (k,) which of the tokens each position has, -1 for none.
        own: (k, m) the shared model's probabilities of the tokens.
        beta: DPO's.
    """

    answers: AnswerTokens
    slots: Tensor
    own: Tensor
    beta: float

    def added(self, bias: Tensor) -> Tensor:
        """Return what the bias adds to beta times the margins, (n,)."""
        given = torch.where(self.slots >= 0, bias[self.slots.clamp_min(0)], 0.0)
        growth = torch.log1p((self.own @ torch.expm1(bias)).clamp_min(-0.999))
        return self.beta * self.answers.summed(given - growth)

    def bias(self, spread: float, counted: Tensor) -> Tensor:
        """Fit the bias (m,) on the pairs where `counted` (n,) is true."""
        free = torch.zeros(self.own.shape[1], requires_grad=True)

        def objective() -> Tensor:
            losses = functional.softplus(-self.added(spread * free))[counted]
            return losses.sum() + free.square().sum() / 2

        minimise(objective, free, max_iter=40)
        return spread * free.detach()


def _distinguishing(answers: AnswerTokens) -> tuple[Tensor, Tensor]:
    """Choose the tokens (m,) most of which stand on one side only.

    Also returned is each position's token among them, -1 for none.
    """
    used, index = torch.unique(answers.tokens.targets, return_inverse=True)
    net = torch.zeros(len(used)).index_add(0, index, answers.weight.sign().float()).abs()
    chosen = net.argsort(descending=True, stable=True)[:MAX_TOKENS].sort().values
    slot = torch.full((len(used),), -1)
    slot[chosen] = torch.arange(len(chosen))
    return used[chosen], slot[index]


# --- folds ---------------------------------------------------------------------------------------


def _folds(answers: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Split the pairs into folds so that no answer is on both sides.

    Returns masks (n,): pairs left out, pairs to fit on.

    Answers, in the order they are met, are cut into groups; a fold leaves out the pairs within one
    group and fits on those without it. Pairs across groups are left out of no fold. Where that
    would be most pairs, because answers come back in many of them, there are two groups.
    """
    rank = _ranks(answers)
    for groups in (FOLDS, 2):
        group = rank * groups // (int(rank.max()) + 1)
        inside = group[:, 0] == group[:, 1]
        if 2 * int(inside.sum()) >= len(answers):
            break
    folds = [(inside & (group[:, 0] == g), (group != g).all(1)) for g in range(groups)]
    return [(out, rest) for out, rest in folds if bool(out.any() and rest.any())]


def _ranks(answers: Tensor) -> Tensor:
    """Return how many other answers were met before each one, (n, 2), first come first."""
    order: dict[int, int] = {}
    flat = [order.setdefault(answer, len(order)) for answer in answers.flatten().tolist()]
    return torch.tensor(flat).view(answers.shape)


def _best(offset: Tensor, folds: list[tuple[Tensor, Tensor]], fit: _BiasFit) -> float:
    """Return the spread that predicts left-out pairs best.

    0 unless one beats the shared model alone, whose scale is chosen on the left-out pairs
    themselves: it is given the benefit of the doubt.

    Args:
        offset: (n,) beta times the shared model's margins.
        folds: masks (n,) of the pairs left out and of those to fit on.
        fit: of the pairs.
    """
    if not folds:
        return 0.0
    shared = torch.cat([offset[out] for out, _ in folds])

    def held_out(spread: float) -> float:
        added = torch.cat([fit.added(fit.bias(spread, rest))[out] for out, rest in folds])
        return float(functional.softplus(-(shared + added)).mean())

    alone = min(float(functional.softplus(-share * shared).mean()) for share in SHARES)
    return best_choice(BIAS_SPREADS, held_out, alone)
