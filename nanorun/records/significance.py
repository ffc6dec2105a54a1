"""How sure a result is: whether losses lie below a target, and how two sets of seconds compare.

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
    bad = [loss for loss in losses if not math.isfinite(loss)]
    if bad:
        return Verdict(n, None, None, None, None, False, f"{len(bad)} of {n} final losses are not finite")
    if n == 0:
        return Verdict(0, None, None, None, None, False, f"no full run; the rule asks for {rule.n} seeds")
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
        passes = margin >= rule.margin
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
    std_a, std_b = std(log_a), std(log_b)
    if std_a is None or std_b is None or std_a == std_b == 0:
        return RatioEstimate(math.exp(difference), None, None, None, len(a), len(b))
    from scipy.special import stdtr, stdtrit

    var_a, var_b = std_a**2 / len(a), std_b**2 / len(b)
    error = math.sqrt(var_a + var_b)
    freedom = (var_a + var_b) ** 2 / (var_a**2 / (len(a) - 1) + var_b**2 / (len(b) - 1))
    half = float(stdtrit(freedom, 0.975)) * error
    return RatioEstimate(
        ratio=math.exp(difference),
        low=math.exp(difference - half),
        high=math.exp(difference + half),
        p_value=2 * float(stdtr(freedom, -abs(difference) / error)),
        n_a=len(a),
        n_b=len(b),
    )
