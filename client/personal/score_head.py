"""The personal head that scores answers, a Bayesian one around the shared head of the round.

A pair says that the owner prefers one answer to another; the probability of it is sigmoid(c m + f)
(Bradley and Terry 1952). m is the shared head's margin of the pair, of root mean square 1; c, in
nats, says how sure the shared head may be. f is the owner's own part, Gaussian around 0:

    f = change . (difference of the answers' states) + (worth of one answer) - (worth of the other)

- The *change* of the head has variance s, on one of the answers' views: the shared head's own
  states, or the mean of what enters the first block, which is nearly a bag of words.
- An answer's own *worth*, of variance w, is what its states do not say. Where answers come back in
  many pairs, it takes what can only be remembered, and is no part of the head.

Nothing is left out and nothing chosen: every (c, s, view, w) of a small public grid is fitted
(Laplace approximation: Rasmussen and Williams 2006, algorithm 3.1), and the heads are averaged by
their evidence, each at the same scale. Where the evidence for a change is not `ODDS` times that
for none, the shared head stays as it is.

Length. A head sees length in the states: with `length_controlled` the change has no part along the
direction in which the differences of states move with the differences of length around their
means, that is, with the preference held fixed.

**Guarantee**: fitted on private records without differential privacy, after the release. Nothing
here is read by training or by the gate.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional

from ...common.errors import DataError
from ...common.settings.sections import PreferenceSettings
from .label_head import LabelHead

__all__ = ["fit_score_head", "widened"]

# Public constants, chosen on made people of seeds 20 to 22 and on 225 raters of 14 batches, under
# shared heads of seed 7; docs/preferences.md has what was tried.
SHARES = (0.5, 1.0, 2.0)  # c
STRENGTHS = (1.0, 10.0, 100.0)  # s, of a pair whose states are as far apart as usual; 0 besides
WORTHS = (0.0, 3.0, 30.0)  # w
ODDS = 3.0  # "positive" evidence (Kass and Raftery 1995, section 3.2)
MIN_PAIRS = 5
MAX_PAIRS = 300  # the latest; time goes with the cube
_NEWTON_STEPS = 40
_HALVINGS = 6
_ENOUGH = 1e-7  # nats
_LENGTH = 1e-9


@torch.no_grad()
def fit_score_head(
    differences: Tensor,
    longer: Tensor,
    answers: Tensor,
    shared: LabelHead,
    settings: PreferenceSettings,
    widths: Sequence[int] | None = None,
) -> LabelHead:
    """Fit one person's score head to their preferences.

    Run on the device, after the release.

    Args:
        differences: (n, w) states of the chosen answer less those of the rejected one, earliest
            pair first; the views side by side.
        longer: (n,) length of the chosen answer less that of the rejected one.
        answers: (n, 2) int64, a number for each answer, chosen and rejected.
        shared: the shared model's head over the same columns; zeros in views it does not know.
        settings: beta: beta times a personal margin is in nats; and whether length is controlled.
        widths: of the views, w in all; None: one view.

    Returns:
        The personal head, whose `strength` is the probability that there is a change; the shared
        head itself for fewer than `MIN_PAIRS` pairs, or where the evidence does not want a change.

    Raises:
        DataError: shapes that do not fit, NaN or infinity.
    """
    widths = [differences.shape[-1]] if widths is None else list(widths)
    _check(differences, longer, answers, shared, widths)
    if len(differences) < MIN_PAIRS:
        return shared
    rows, longer = differences[-MAX_PAIRS:].double(), longer[-MAX_PAIRS:].double()
    weight = shared.weight.double()[0]
    margin, unit = _scaled((rows @ weight)[:, None])
    views, sizes = zip(*map(_scaled, rows.split(widths, dim=1)), strict=True)
    if settings.length_controlled:
        views = tuple(_off_length(view, longer) for view in views)
    grid = _fitted_grid(margin, views, _own_worth(answers[-MAX_PAIRS:]))
    changed = grid.strength > 0
    if not _wanted(grid.evidence, changed):
        return shared
    size = grid.margins.square().mean(1).sqrt().clamp_min(_LENGTH)
    probability = torch.softmax(grid.evidence, 0)
    part = probability / size * (probability @ size) / settings.beta
    changes = [
        (part * grid.strength * (grid.view == number)) @ grid.dual @ view / sizes[number]
        for number, view in enumerate(views)
    ]
    personal = (part @ grid.share) / unit * weight + torch.cat(changes)
    sure = float(probability[changed].sum())
    return LabelHead(personal.to(shared.weight.dtype)[None], shared.bias, shared.task, sure)


def widened(shared: LabelHead, width: int) -> LabelHead:
    """Return the shared head over `width` columns, with 0 in those it does not know."""
    weight = functional.pad(shared.weight, (0, width - shared.weight.shape[1]))
    return LabelHead(weight, shared.bias, shared.task, shared.strength)


@dataclass(frozen=True)
class _Grid:
    """The g fitted heads of the public grid.

    Attributes:
        share, strength, view: (g,) c, s and the number of the view.
        dual: (g, n) of each head's posterior.
        evidence: (g,) log evidence.
        margins: (g, n) of the pairs under each head, without an answer's own worth.
    """

    share: Tensor
    strength: Tensor
    view: Tensor
    dual: Tensor
    evidence: Tensor
    margins: Tensor


def _fitted_grid(margin: Tensor, views: Sequence[Tensor], own: Tensor) -> _Grid:
    """Fit every (c, s, view, w) of the grid.

    Args:
        margin: (n, 1) the shared head's margins, of root mean square 1.
        views: each (n, its width), likewise.
        own: (n, n) covariance of the answers' own worths.
    """
    choices = [(c, 0.0, 0, w) for c, w in product(SHARES, WORTHS)]
    choices += list(product(SHARES, STRENGTHS, range(len(views)), WORTHS))
    share, strength, view, worth = torch.tensor(choices).double().T
    mean = share[:, None] * margin.T
    kernels = torch.stack([rows @ rows.T for rows in views])
    changed = strength[:, None, None] * kernels[view.long()]
    dual, evidence = _laplace(mean, changed + worth[:, None, None] * own)
    margins = mean + (changed @ dual[:, :, None])[:, :, 0]
    return _Grid(share, strength, view, dual, evidence, margins)


def _laplace(mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Approximate the posterior under g Gaussian priors of n pairs' log odds (Laplace).

    All pairs are preferred as they stand.

    Newton's method, each step halved until it does not lead down.

    Args:
        mean: (g, n).
        covariance: (g, n, n).

    Returns:
        The dual (g, n), so that mean + covariance @ dual is the mode, and the log evidence (g,).
    """
    identity = torch.eye(mean.shape[1]).double()
    dual, fit = torch.zeros_like(mean), mean

    def times(vector: Tensor) -> Tensor:
        return (covariance @ vector[:, :, None])[:, :, 0]

    def value(dual: Tensor, fit: Tensor) -> Tensor:
        return functional.logsigmoid(fit).sum(1) - (dual * (fit - mean)).sum(1) / 2

    def root_and_factor(fit: Tensor) -> tuple[Tensor, Tensor]:
        root = (torch.sigmoid(fit) * torch.sigmoid(-fit)).sqrt()
        inner = identity + root[:, :, None] * covariance * root[:, None]
        return root, torch.linalg.cholesky(inner)

    reached = value(dual, fit)
    for _ in range(_NEWTON_STEPS):
        root, factor = root_and_factor(fit)
        target = root.square() * (fit - mean) + torch.sigmoid(-fit)
        solved = torch.cholesky_solve((root * times(target))[:, :, None], factor)[:, :, 0]
        step = target - root * solved - dual
        moved, length = times(step), torch.ones(len(mean), 1).double()
        for _ in range(_HALVINGS):
            candidate = value(dual + length * step, fit + length * moved)
            down = candidate < reached - _ENOUGH
            length[down] /= 2
            if not bool(down.any()):
                break
        dual, fit = dual + length * step, fit + length * moved
        before, reached = reached, value(dual, fit)
        if float((reached - before).abs().max()) < _ENOUGH:
            break
    _, factor = root_and_factor(fit)
    return dual, reached - factor.diagonal(dim1=1, dim2=2).log().sum(1)


def _wanted(evidence: Tensor, change: Tensor) -> bool:
    """Return whether the evidence for a change, on average, is `ODDS` times that for none."""
    each = [evidence[which].logsumexp(0) - which.sum().log() for which in (change, ~change)]
    return float(each[0] - each[1]) >= math.log(ODDS)


def _own_worth(answers: Tensor) -> Tensor:
    """Return the covariance (n, n) of differences of answers' own worths, each of variance 1."""
    _, number = torch.unique(answers, return_inverse=True)
    chosen, rejected = functional.one_hot(number).double().unbind(1)
    return (chosen - rejected) @ (chosen - rejected).T


def _off_length(rows: Tensor, longer: Tensor) -> Tensor:
    """Remove the part of the rows that moves with length, with the preference held fixed."""
    away = longer - longer.mean()
    direction = functional.normalize(away @ (rows - rows.mean(0)), dim=0)
    return rows - torch.outer(rows @ direction, direction)


def _scaled(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Divide rows by their root mean square length, and return that too.

    Rows that are all zero stay as they are.
    """
    size = rows.square().sum(1).mean().sqrt()
    size = size if float(size) > _LENGTH else torch.ones_like(size)
    return rows / size, size


def _check(
    differences: Tensor, longer: Tensor, answers: Tensor, shared: LabelHead, widths: Sequence[int]
) -> None:
    width, count = shared.weight.shape[1], len(differences)
    if shared.weight.shape[0] != 1:
        raise DataError(f"A score head has one output, this one has {len(shared.weight)}.")
    fits = differences.shape == (count, width) and longer.shape == (count,)
    if not fits or answers.shape != (count, 2) or sum(widths) != width:
        raise DataError(
            f"Differences (n, {width}), lengths (n,) and answers (n, 2) were expected, got "
            f"{tuple(differences.shape)}, {tuple(longer.shape)} and {tuple(answers.shape)}, in "
            f"views of {list(widths)}; take them from the same pairs."
        )
    if not bool(torch.isfinite(differences).all() and torch.isfinite(longer).all()):
        raise DataError("Differences or lengths hold NaN or infinity; leave such pairs out.")
