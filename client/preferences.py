"""The personal part from preferences: DPO on cached states, around the shared model of the round.

A pair says that the owner prefers one answer to another. The personal model adds to the shared
model's margin m of the pair a change f, and is fitted by DPO with the shared model as the frozen
reference: minimise the sum of -log sigmoid(beta f) plus a Gaussian prior on the change.

- *score head* (answers scored by a linear head): f is linear in the difference of the two pooled
  states, so this is logistic regression, solved in the dual by Newton's method (Rasmussen and
  Williams 2006, algorithm 3.1).
- *bias* (answers scored by likelihood): a bias on the tokens of the owner's answers, by L-BFGS; it
  is a `TextHead` without a memory.

The prior's strength is chosen on the owner's own pairs by folds: the one whose personal model
(shared margin and change together) predicts the left-out pairs best, where no answer is on both
sides. With it, for a score head, how much the shared margin counts: beta says what a change costs,
not how sure the shared model may be. The shared model alone, at the scale that suits it best, is
always among the choices.

Length. A head sees length in the pooled states: with `length_controlled` the change has no part
along the direction in which the differences of states move with the differences of length around
their means, that is, with the preference held fixed. A likelihood sums over tokens: there
`length_normalised` takes the mean instead.

**Guarantee**: fitted on private records without differential privacy, after the release. Nothing
here is read by training or by the gate.

Source: Rafailov et al. 2023 (DPO).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from ..common.config import PreferenceSettings
from ..common.errors import DataError
from .label_head import LabelHead
from .text_head import SharedScores, TextHead, TokenStates, no_text_head, shared_scores

__all__ = [
    "AnswerTokens",
    "Lengths",
    "fit_score_head",
    "fit_token_bias",
    "length_bias",
    "token_margins",
]

# Public constants; docs/preferences.md has what was tried.
STRENGTHS = (3.0, 30.0, 300.0)  # variance of beta f, pairs of usual size, tried beside 0
TILT = 3.0  # how much more freely the change goes along the shared head
SHARES = (1.0, 3.0, 10.0, 30.0)  # how much the shared margin counts, in units of beta
BIAS_SPREADS = (0.3, 1.0, 3.0)  # standard deviation of a token's bias, nats, tried beside 0
MOST_TOKENS = 512
FOLDS = 5
MIN_PAIRS = 5
_NEWTON_STEPS = 50
_LENGTH = 1e-9


@dataclass(frozen=True, eq=False)
class AnswerTokens:
    """The tokens of n pairs' answers under the shared model; private.

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
        """n."""
        return len(self.which)

    def summed(self, values: Tensor) -> Tensor:
        """Values of positions (k,) -> of pairs (n,), weighed."""
        found = torch.zeros(self.pairs, dtype=values.dtype)
        return found.index_add(0, self.tokens.record, self.weight.to(values.dtype) * values)


@dataclass(frozen=True)
class Lengths:
    """How margins go with the difference of the answers' lengths: correlations, -1 to 1.

    Taken about zero, so that it does not matter which answer of a pair is called the first.

    Attributes:
        model: of the model's margins.
        choices: of the owner's own choices; what the content supports.
    """

    model: float
    choices: float

    @property
    def excess(self) -> float:
        """Preference for long answers beyond the owner's; below 0: for short ones."""
        return self.model - self.choices


def length_bias(margin: Tensor, longer: Tensor) -> Lengths:
    """Whether a model prefers long answers more than the person does.

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


# --- answers scored by a head --------------------------------------------------------------------


@torch.no_grad()
def fit_score_head(
    differences: Tensor,
    longer: Tensor,
    answers: Tensor,
    shared: LabelHead,
    settings: PreferenceSettings,
) -> LabelHead:
    """One person's score head; run on the device, after the release.

    Args:
        differences: (n, w) pooled state of the chosen answer less that of the rejected one.
        longer: (n,) length of the chosen answer less that of the rejected one.
        answers: (n, 2) int64, a number for each answer, chosen and rejected.
        shared: the reference: the shared model's head.
        settings: beta, and whether length is controlled.

    Returns:
        The shared head and the change; the shared head itself for fewer than `MIN_PAIRS` pairs,
        or where no change predicts left-out pairs better.

    Raises:
        DataError: shapes that do not fit, NaN or infinity.
    """
    _check(differences, longer, answers, shared)
    if len(differences) < MIN_PAIRS:
        return shared
    kind, weight = shared.weight.dtype, shared.weight.double()[0]
    scaled, size = _scaled(differences.double())
    along = functional.normalize(weight, dim=0)
    if settings.length_controlled:
        off = _length_direction(scaled, longer.double())
        scaled, along = scaled - torch.outer(scaled @ off, off), along - (along @ off) * off
    tilt = scaled @ along
    kernel = scaled @ scaled.T + TILT * torch.outer(tilt, tilt)
    offset = settings.beta * (differences.double() @ weight)

    def fitted_on(strength: float, rest: Tensor) -> Tensor:
        return strength * kernel[:, rest] @ _dual(strength * kernel[rest][:, rest])

    strength, share = _best(STRENGTHS, SHARES, offset, _folds(answers), fitted_on)
    if strength == 0:
        return shared
    dual = strength * _dual(strength * kernel)
    change = (dual @ scaled + TILT * (dual @ tilt) * along) / (size * settings.beta)
    personal = (share * weight + change).to(kind)[None]
    return LabelHead(personal, shared.bias, shared.task, strength)


def _dual(kernel: Tensor) -> Tensor:
    """Logistic regression with all outcomes 1: the dual weights a (n,); the fit is kernel @ a."""
    count = len(kernel)
    fit, identity = torch.zeros(count).double(), torch.eye(count).double()
    dual = fit
    for _ in range(_NEWTON_STEPS):
        missing = torch.sigmoid(-fit)  # the gradient; the outcome is 1
        curvature = missing * (1 - missing)
        root = curvature.sqrt()
        target = curvature * fit + missing
        inner = torch.linalg.solve(
            identity + root[:, None] * kernel * root[None], root * (kernel @ target)
        )
        before, dual = fit, target - root * inner
        fit = kernel @ dual
        if float((fit - before).abs().max()) < 1e-8:
            break
    return dual


def _length_direction(differences: Tensor, longer: Tensor) -> Tensor:
    """Unit direction (w,) in which states move with length, the preference held fixed; or zero."""
    away = longer - longer.mean()
    return functional.normalize(away @ (differences - differences.mean(0)), dim=0)


def _scaled(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows over their root mean square length, and that; as they are where all are zero."""
    size = rows.square().sum(1).mean().sqrt()
    size = size if float(size) > _LENGTH else torch.ones_like(size)
    return rows / size, size


def _folds(answers: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Masks (n,): pairs left out, pairs to fit on; no answer is on both sides.

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
    """(n, 2) how many other answers were met before each one, first come first."""
    order: dict[int, int] = {}
    flat = [order.setdefault(one, len(order)) for one in answers.flatten().tolist()]
    return torch.tensor(flat).view(answers.shape)


def _best(
    strengths: tuple[float, ...],
    shares: tuple[float, ...],
    offset: Tensor,
    folds: list[tuple[Tensor, Tensor]],
    fitted_on: Callable[[float, Tensor], Tensor],
) -> tuple[float, float]:
    """The strength, and the share of the shared margin, that predict left-out pairs best.

    Strength 0 unless one beats the shared model alone, whose scale is chosen on the left-out pairs
    themselves: it is given the benefit of the doubt.

    Args:
        shares: times `offset`, those a personal model may have.
        offset: (n,) beta times the shared model's margins.
        folds: masks (n,) of the pairs left out and of those to fit on.
        fitted_on: strength and mask (n,) of the pairs to fit on -> (n,) what it adds to them.
    """
    if not folds:
        return 0.0, 1.0
    shared = torch.cat([offset[out] for out, _ in folds])
    found = (0.0, 1.0)
    lowest = min(float(functional.softplus(-share * shared).mean()) for share in SHARES)
    for strength in strengths:
        added = torch.cat([fitted_on(strength, rest)[out] for out, rest in folds])
        for share in shares:
            loss = float(functional.softplus(-(share * shared + added)).mean())
            if loss < lowest:
                found, lowest = (strength, share), loss
    return found


def _check(differences: Tensor, longer: Tensor, answers: Tensor, shared: LabelHead) -> None:
    width, count = shared.weight.shape[1], len(differences)
    if shared.weight.shape[0] != 1:
        raise DataError(f"A score head has one output, this one has {len(shared.weight)}.")
    fits = differences.shape == (count, width) and longer.shape == (count,)
    if not fits or answers.shape != (count, 2):
        raise DataError(
            f"Differences (n, {width}), lengths (n,) and answers (n, 2) were expected, got "
            f"{tuple(differences.shape)}, {tuple(longer.shape)} and {tuple(answers.shape)}; take "
            "them from the same pairs."
        )
    if not bool(torch.isfinite(differences).all() and torch.isfinite(longer).all()):
        raise DataError("Differences or lengths hold NaN or infinity; leave such pairs out.")


# --- answers scored by likelihood ---------------------------------------------------------------


@torch.no_grad()
def token_margins(answers: AnswerTokens, head: TextHead | None, shared: SharedScores,
                  output: Tensor) -> Tensor:  # fmt: skip
    """Margins (n,) of the pairs under the shared model (None) or with a head, nats."""
    from .text_head import token_losses

    return -answers.summed(token_losses(head, answers.tokens, output, shared))


def fit_token_bias(answers: AnswerTokens, output: Tensor, settings: PreferenceSettings) -> TextHead:
    """One person's bias on tokens; run on the device, after the release.

    Args:
        answers: of the person's own pairs, under the reference: the shared model.
        output: (v, w) the model's output embedding.
        settings: beta.

    Returns:
        A head without a memory, whose biases may be below zero; the shared model for fewer than
        `MIN_PAIRS` pairs, or where no change predicts left-out pairs better.
    """
    if answers.pairs < MIN_PAIRS:
        return no_text_head(output.shape[1])
    tokens, slots = _distinguishing(answers)
    scores = shared_scores(answers.tokens, output)
    with torch.no_grad():
        states = answers.tokens.states.float()
        own = (states @ output[tokens].float().T - scores.log_z[:, None]).exp()
        offset = settings.beta * token_margins(answers, None, scores, output)

    def change(bias: Tensor) -> Tensor:
        """(n,) what the bias adds to the margins."""
        given = torch.where(slots >= 0, bias[slots.clamp_min(0)], 0.0)
        return answers.summed(given - torch.log1p((own @ torch.expm1(bias)).clamp_min(-0.999)))

    def fitted(spread: float, counted: Tensor) -> Tensor:
        """The bias (m,) fitted on the pairs where `counted` (n,) is true."""

        def objective(free: Tensor) -> Tensor:
            fit = functional.softplus(-settings.beta * change(spread * free))[counted].sum()
            return fit + free.square().sum() / 2

        return spread * _minimum(objective, len(tokens))

    def fitted_on(spread: float, rest: Tensor) -> Tensor:
        return settings.beta * change(fitted(spread, rest))

    spread, _ = _best(BIAS_SPREADS, (1.0,), offset, _folds(answers.which), fitted_on)
    if spread == 0:
        return no_text_head(output.shape[1])
    bias = fitted(spread, torch.ones(answers.pairs, dtype=torch.bool))
    nothing = no_text_head(output.shape[1])
    return TextHead(
        tokens, bias, nothing.keys, nothing.slots, nothing.centre,
        bias_weight=spread, memory_offset=0.0,
    )  # fmt: skip


def _distinguishing(answers: AnswerTokens) -> tuple[Tensor, Tensor]:
    """The tokens (m,) most of which stand on one side only, and each position's, -1 for none."""
    every, place = torch.unique(answers.tokens.targets, return_inverse=True)
    net = torch.zeros(len(every)).index_add(0, place, answers.weight.sign().float()).abs()
    chosen = net.argsort(descending=True, stable=True)[:MOST_TOKENS].sort().values
    slot = torch.full((len(every),), -1)
    slot[chosen] = torch.arange(len(chosen))
    return every[chosen], slot[place]


def _minimum(objective: Callable[[Tensor], Tensor], count: int) -> Tensor:
    free = torch.zeros(count, requires_grad=True)
    solver = torch.optim.LBFGS([free], max_iter=40, line_search_fn="strong_wolfe")

    def step() -> float:
        solver.zero_grad()
        with torch.enable_grad():
            loss = objective(free)
            loss.backward()
        return float(loss.detach())

    solver.step(step)
    return free.detach()
