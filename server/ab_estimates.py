"""What the noised sums of an A/B experiment say: arm means, differences, and how well known.

**Guarantee**: a function of the noised sums and of public numbers only, so it costs no privacy.

An arm's mean is a quotient of two noised sums, outcomes over devices. Its variance is by the delta
method: noise of variance s^2 in each entry adds s^2 (1 + R^2) / N^2, sampling adds V / N. Where N
is less than ten times the noise of the count the method is not sound and nothing is said. V is
taken at the upper end of what the noise allows, never above the public range, and an extreme mean
is shrunk by one success and one failure (Agresti and Caffo 2000), which matters for small arms.

Looks. Data of earlier looks are in later ones, so the looks' errors are dependent; their shares of
alpha add up to alpha (Bonferroni), which holds under any dependence. `equal` gives each look the
same; `late` follows O'Brien and Fleming's spending function (Lan and DeMets 1983) and keeps most
for the last. More than two arms share a look's part among the differences to the first arm.
"""

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from ..common.ab_test import AbTestSettings, layout, run_settings
from ..common.errors import ConfigError
from ..common.privacy.encoding import decode, unwrap
from ..common.privacy.plan_maker import make_plan
from ..common.privacy.rotation import unrotate
from ..common.privacy.round_plan import Plan
from ..common.settings.config import Config, parse
from ..common.settings.sections import DEVICES, AbRunSettings
from .round_record import ArmEstimate, Difference, Estimates

__all__ = [
    "device_settings",
    "estimated",
    "lines",
    "look_plan",
    "plan_of",
    "spent_alpha",
    "sums_of",
]

SOUND = 10.0
"""Devices over the noise of their count, below which a quotient says nothing."""


def look_plan(settings: AbTestSettings, run: str, look: int) -> Plan:
    """Make the public constants of one look at an experiment.

    Their noise pays for its own distance from Gaussian noise.

    Raises:
        ConfigError: no noise reaches the epsilon, or too few honest devices are left.
    """
    return plan_of(_sized(settings), settings, run, look)


def plan_of(config: Config, settings: AbRunSettings, run: str, look: int) -> Plan:
    """Make the plan of one look at an experiment, with the noise that `config` has."""
    start = np.zeros(layout(settings).dimension, np.float32)
    return make_plan(config, run, look, layout(settings).digest, start)


def _sized(settings: AbTestSettings) -> Config:
    plain = plan_of(run_settings(settings), settings, "", 1)
    dimension = layout(settings).dimension
    near = plain.mechanism.closeness(plain.counted_variance, dimension, plain.adders)
    # more noise has a finer grid or the same one: the second plan is at least as close
    return run_settings(settings, near.slack, near.ratio)


def device_settings(settings: AbTestSettings, enrolled: int) -> Config:
    """The experiment as a run on devices: what they are offered, and what they agree to.

    Raises:
        ConfigError: an arm no device knows, other bounds than 0 and 1, too few enrolled.
    """
    if enrolled < settings.clients:
        raise ConfigError(
            f"clients = {settings.clients}, but {enrolled} devices are enrolled; ask fewer, or "
            "enrol more"
        )
    table = _sized(settings).model_dump(mode="json", exclude_none=True)
    times = settings.devices
    table["data"] |= {"source": DEVICES, "clients": enrolled}
    table["ab_test"] = settings.ab_run.model_dump(mode="json")
    table["rounds"] |= {"gather_s": times.gather_s, "timeout_s": times.timeout_s,
                        "answer_timeout_s": times.answer_s, "patience": times.patience,
                        "wait_s": times.wait_s}  # fmt: skip
    return parse(table, source=f"the experiment {settings.name}")


def sums_of(total: NDArray[np.uint32], plan: Plan) -> NDArray[np.float64]:
    """Decode a sum mod 2**bits to noised sums, shape (d,), real units."""
    sums = decode(unwrap(total, plan.bits), plan.step)
    return unrotate(sums, plan.start) if plan.rotated else sums


def spent_alpha(settings: AbRunSettings, look: int) -> float:
    """Return the part of alpha that one look may spend.

    Over all looks the parts add up to alpha.

    >>> settings = AbRunSettings(looks=4, spending="late")
    >>> [round(spent_alpha(settings, look), 5) for look in (1, 2, 3, 4)]
    [9e-05, 0.00549, 0.01805, 0.02637]
    """
    if settings.spending == "equal":
        return settings.alpha / settings.looks
    normal = NormalDist()
    far = normal.inv_cdf(1 - settings.alpha / 2)

    def until(number: int) -> float:
        if number == 0:
            return 0.0
        return 2 - 2 * normal.cdf(far / math.sqrt(number / settings.looks))

    return until(look) - until(look - 1)


def estimated(
    sums: NDArray[np.float64],
    plan: Plan,
    answered: int,
    settings: AbRunSettings,
    alpha: float | None = None,
) -> Estimates:
    """Estimate arm means and their differences from one look's noised sums.

    Args:
        sums: from `sums_of`.
        plan: of the look.
        answered: contributions in the sums, each with its share of the noise.
        settings: the experiment.
        alpha: of this look; what `spent_alpha` says unless given (to show what peeking would do).

    Returns:
        `level`: of the intervals, 1 less the look's alpha, shared among the differences; `arms`:
        for each its mean, standard error, interval, devices, and the standard deviation of that
        noised count; `differences` to the first arm: value, interval, and whether it excludes 0.
        None where the noise leaves nothing to say.
    """
    alpha = spent_alpha(settings, plan.round) if alpha is None else alpha
    alpha /= len(settings.arms) - 1
    reach = NormalDist().inv_cdf(1 - alpha / 2)
    spread = plan.step * math.sqrt(answered * (plan.variance + 0.25))  # 1/4: randomised rounding
    half_width = (settings.high - settings.low) / 2
    arms: list[ArmEstimate] = []
    for name, row in zip(settings.arms, sums.reshape(-1, settings.entries), strict=True):
        mean, error = _mean(row, spread)
        shown = None if mean is None else settings.low + half_width * (mean + 1)
        scaled = None if error is None else half_width * error
        arms.append(
            {"arm": name, "mean": shown, "error": scaled, "interval": _around(shown, scaled, reach),
             "devices": float(row[0]), "devices_std": spread}
        )  # fmt: skip
    first = arms[0]
    differences: list[Difference] = []
    for other in arms[1:]:
        value = error = None
        if first["mean"] is not None and other["mean"] is not None:
            value = other["mean"] - first["mean"]
        if first["error"] is not None and other["error"] is not None:
            error = math.hypot(first["error"], other["error"])
        interval = _around(value, error, reach)
        differences.append(
            {"arm": other["arm"], "against": first["arm"], "difference": value, "error": error,
             "interval": interval,
             "found": interval is not None and (interval[0] > 0 or interval[1] < 0)}
        )  # fmt: skip
    return {"look": plan.round, "answered": answered, "level": 1 - alpha, "arms": arms,
            "differences": differences}  # fmt: skip


def _mean(row: NDArray[np.float64], spread: float) -> tuple[float | None, float | None]:
    """Mean of outcomes in [-1, 1] and its standard error, noise and sampling."""
    count, total = float(row[0]), float(row[1])
    if count < 2 or count < SOUND * spread:
        return None, None
    mean = total / count
    noisy = spread * math.hypot(1, mean) / count
    shrunk = min(1.0, abs(mean)) * count / (count + 2)
    widest = 1 - max(0.0, shrunk - noisy) ** 2
    variance = widest
    if len(row) > 2:
        square = float(row[2]) / count
        slack = spread / count * math.hypot(1, 2 * mean, 2 * mean**2 - square)
        variance = min(widest, max(0.0, square - mean**2 + 2 * slack))
    return mean, math.hypot(noisy, math.sqrt(variance / (count - 1)))


def _around(value: float | None, error: float | None, reach: float) -> list[float] | None:
    if value is None or error is None:
        return None
    return [value - reach * error, value + reach * error]


def lines(look: Estimates) -> list[str]:
    """The estimates of one look, as a person reads them."""
    shown = [
        f"look {look['look']}: {look['answered']} devices answered; "
        f"{100 * look['level']:.4g} % intervals"
    ]
    for arm in look["arms"]:
        shown.append(
            f"  {arm['arm']:<20} {_value(arm['mean'], arm['interval'])}   "
            f"devices {arm['devices']:.0f} +- {arm['devices_std']:.1f}"
        )
    for difference in look["differences"]:
        verdict = "a difference" if difference["found"] else "no difference found"
        name = f"{difference['arm']} - {difference['against']}"
        shown.append(
            f"  {name:<20} {_value(difference['difference'], difference['interval'])}   {verdict}"
        )
    return shown


def _value(value: float | None, interval: list[float] | None) -> str:
    if value is None or interval is None:
        return "lost in the noise: too few devices for this epsilon"
    return f"{value:+.4f} ({interval[0]:+.4f} to {interval[1]:+.4f})"
