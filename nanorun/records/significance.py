"""How sure a result is: whether losses lie below a target, and how two sets of losses or seconds compare.

Only `scipy.special` is used, imported late: `scipy.stats` takes four times as long to import, longer than the
rest of a report. The tests hold these formulas against `scipy.stats`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

RULES = ("t", "margin", "z")
SAME_LOSS = 1e-9
"""Losses (nats) closer than this are one run counted several times: seeds never agree so well."""
ROUNDING = 1e-9
"""What a margin may fall short by, in nats: the error of the arithmetic, which makes (3.28 - 3.278)·√4 a little less
than 0.004. Logs print losses to 1e-5, so no two printed means are so close."""
LARGEST_LOSS = 1e6
"""Nats; a model that guesses at random has about 10, and what is far above is no validation loss."""


@dataclass(frozen=True)
class Rule:
    """What a track asks of the final losses before a row counts."""

    rule: str
    """`t`: one-sided t-test; `z`: the same with a known spread; `margin`: a margin that shrinks with √n."""
    n: int
    """Seeds, at the least."""
    alpha: float | None = None
    """Level of the test; the p-value has to be below it (t, z)."""
    margin: float | None = None
    """(target - mean)·√n has to be at least this, in nats (margin)."""
    sigma: float | None = None
    """Spread of the final loss over seeds, known beforehand, in nats (z)."""

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"significance.rule is {self.rule!r}; wanted one of {', '.join(RULES)}")
        if type(self.n) is not int or self.n < 1:
            raise ValueError(f"significance.n is {self.n!r}; wanted a whole number of 1 or more")
        if self.rule != "margin" and not (self.alpha is not None and 0 < self.alpha < 1):
            raise ValueError(f"significance.alpha is {self.alpha!r}; wanted it between 0 and 1")
        if self.rule == "margin" and not (self.margin is not None and 0 <= self.margin < math.inf):
            raise ValueError(f"significance.margin is {self.margin!r}; wanted 0 or more")
        if self.rule == "z" and not (self.sigma is not None and 0 < self.sigma < math.inf):
            raise ValueError(f"significance.sigma is {self.sigma!r}; wanted it above 0")

    def describe(self, target: float) -> str:
        """One sentence without an end: what counts under this rule."""
        seeds = f"n ≥ {self.n} seed{'s' if self.n > 1 else ''}"
        if self.rule == "margin":
            return f"mean of {seeds}, ({target:g} - mean)·√n ≥ {self.margin:g}, at the declared last step"
        test = "one-sided t-test" if self.rule == "t" else f"one-sided z-test with sigma = {self.sigma:g}"
        return f"mean of {seeds} below {target:g}, {test}, p < {self.alpha:g}, at the declared last step"


@dataclass(frozen=True)
class Verdict:
    """What a rule says about some losses."""

    n: int
    mean: float | None
    std: float | None
    """Sample standard deviation (n - 1); None for fewer than two."""
    p_value: float | None
    """None where the rule has none, or the test is undefined."""
    margin: float | None
    """(target - mean)·√n, in nats."""
    passes: bool
    why: str


@dataclass(frozen=True)
class DifferenceEstimate:
    """By how much the mean of one set of losses exceeds another's, with a 95 % interval."""

    difference: float
    low: float | None
    high: float | None
    p_value: float | None
    """Two-sided, against no difference."""
    effect_size: float | None
    """Hedges' g: the difference over the pooled standard deviation, less its bias for few runs."""
    n_a: int
    n_b: int


@dataclass(frozen=True)
class RatioEstimate:
    """By how much one set of seconds exceeds another: ratio of geometric means, with a 95 % interval."""

    ratio: float
    low: float | None
    high: float | None
    p_value: float | None
    """Two-sided, against a ratio of 1."""
    n_a: int
    n_b: int


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean of one or more values."""
    return math.fsum(values) / len(values)


def std(values: Sequence[float]) -> float | None:
    """The sample standard deviation, or None for fewer than two values."""
    if len(values) < 2:
        return None
    if min(values) == max(values):
        return 0.0
    center = mean(values)
    return math.sqrt(math.fsum((value - center) ** 2 for value in values) / (len(values) - 1))


def judge(rule: Rule, losses: Sequence[float], target: float) -> Verdict:
    """Return whether final losses, one for each seed, lie below `target` as `rule` asks.

    For `t` and `z` the null hypothesis is that the true mean is at or above the target. Losses that do not
    differ at all have no t statistic: they are one run repeated, so they do not pass and have no p-value.
    """
    n = len(losses)
    bad = [loss for loss in losses if not abs(loss) <= LARGEST_LOSS]
    if bad:
        what = f"are not finite or above {LARGEST_LOSS:g}"
        return Verdict(n, None, None, None, None, False, f"{len(bad)} of {n} final losses {what}")
    if n == 0:
        return Verdict(
            0,
            None,
            None,
            None,
            None,
            False,
            f"no full run; the rule asks for {rule.n} seed{'s' * (rule.n > 1)}",
        )
    center, spread = mean(losses), std(losses)
    margin = (target - center) * math.sqrt(n)
    p_value, passes, why = _apply(rule, losses, target)
    if n < rule.n:
        passes, why = False, f"{n} seed{'s' if n > 1 else ''} of the {rule.n} that the rule asks for"
    return Verdict(n, center, spread, p_value, margin, passes, why)


def _apply(rule: Rule, losses: Sequence[float], target: float) -> tuple[float | None, bool, str]:
    """(p-value, passes, why) of one or more finite losses, whatever their number."""
    n, center = len(losses), mean(losses)
    margin = (target - center) * math.sqrt(n)
    if rule.rule == "margin":
        assert rule.margin is not None
        passes = margin >= rule.margin - ROUNDING
        why = f"({target:g} - mean)·√n = {margin:.4g}, {'≥' if passes else '<'} {rule.margin:g}"
        return None, passes, why
    from scipy.special import ndtr, stdtr

    if rule.rule == "z":
        assert rule.sigma is not None
        p_value = float(ndtr(-margin / rule.sigma))
    elif n < 2:
        return None, False, "a t-test needs at least 2 seeds"
    elif max(losses) - min(losses) < SAME_LOSS:
        return None, False, "all final losses are the same: the seeds are no independent runs"
    else:
        spread = std(losses)
        assert spread
        p_value = float(stdtr(n - 1, -margin / spread))
    assert rule.alpha is not None
    passes = p_value < rule.alpha
    return p_value, passes, f"p = {p_value:.2g}, {'<' if passes else 'not <'} {rule.alpha:g}"


def compare_seconds(a: Sequence[float], b: Sequence[float]) -> RatioEstimate:
    """Return the ratio of geometric means, `a` over `b`, with a 95 % interval by Welch's t-test on the logs.

    With fewer than two on either side, or no spread at all, there is a ratio and no interval.
    Raises ValueError for seconds that are not above 0.
    """
    if not a or not b:
        raise ValueError(f"{len(a)} and {len(b)} readings; wanted at least one on each side")
    for value in (*a, *b):
        if not 0 < value < math.inf:
            raise ValueError(f"{value} seconds; wanted a finite number above 0")
    log_a, log_b = [math.log(value) for value in a], [math.log(value) for value in b]
    difference = mean(log_a) - mean(log_b)
    ratio, found = _exp(difference), _welch(log_a, log_b)
    if ratio is None:
        raise ValueError("the seconds of the two sides differ by more than a number can hold")
    if found is None:
        return RatioEstimate(ratio, None, None, None, len(a), len(b))
    half, p_value = found
    return RatioEstimate(ratio, _exp(difference - half), _exp(difference + half), p_value, len(a), len(b))


def _exp(value: float) -> float | None:
    """e to the power of `value`; None where that is no number."""
    try:
        return math.exp(value)
    except OverflowError:
        return None


def _welch(a: Sequence[float], b: Sequence[float]) -> tuple[float, float] | None:
    """(half of the 95 % interval of mean(a) - mean(b), two-sided p-value), by Welch's t-test.

    None with fewer than two on either side, or no spread at all.
    """
    std_a, std_b = std(a), std(b)
    if std_a is None or std_b is None:
        return None
    var_a, var_b = std_a**2 / len(a), std_b**2 / len(b)
    if not var_a + var_b > 0:
        return None
    from scipy.special import stdtr, stdtrit

    share = var_a / (var_a + var_b)
    freedom = 1 / (share**2 / (len(a) - 1) + (1 - share) ** 2 / (len(b) - 1))
    error = math.sqrt(var_a + var_b)
    t = abs(mean(a) - mean(b)) / error
    return float(stdtrit(freedom, 0.975)) * error, 2 * float(stdtr(freedom, -t))


def compare_means(a: Sequence[float], b: Sequence[float]) -> DifferenceEstimate:
    """Return mean(a) - mean(b) with a 95 % interval by Welch's t-test, and Hedges' g.

    With fewer than two on either side, or no spread at all, there is a difference and no interval; g asks for
    two degrees of freedom. Raises ValueError for losses that no model has.
    """
    if not a or not b:
        raise ValueError(f"{len(a)} and {len(b)} losses; wanted at least one on each side")
    for value in (*a, *b):
        if not abs(value) <= LARGEST_LOSS:
            raise ValueError(f"a loss of {value}; wanted a finite number up to {LARGEST_LOSS:g}")
    difference = mean(a) - mean(b)
    found = _welch(a, b)
    low, high, p_value = (difference - found[0], difference + found[0], found[1]) if found else (None,) * 3
    return DifferenceEstimate(difference, low, high, p_value, _hedges_g(a, b), len(a), len(b))


def _hedges_g(a: Sequence[float], b: Sequence[float]) -> float | None:
    """The difference over the pooled spread, with the exact correction for few runs (Hedges, 1981)."""
    freedom = len(a) + len(b) - 2
    if freedom < 2:
        return None
    squares = sum((std(one) or 0.0) ** 2 * (len(one) - 1) for one in (a, b))
    if not squares > 0:
        return None
    shrink = math.exp(math.lgamma(freedom / 2) - math.lgamma((freedom - 1) / 2)) / math.sqrt(freedom / 2)
    return shrink * (mean(a) - mean(b)) / math.sqrt(squares / freedom)
