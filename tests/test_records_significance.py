"""The tests behind `counts` and behind the comparison line."""

from __future__ import annotations

import math

import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from nanorun.records.significance import Rule, compare_seconds, judge

T_RULE = Rule("t", n=3, alpha=0.05)
LOSSES = [1.541, 1.543, 1.546]


def test_the_t_test_is_the_plain_formula_and_scipys():
    verdict = judge(T_RULE, LOSSES, 1.55)
    mean = sum(LOSSES) / 3
    spread = math.sqrt(sum((loss - mean) ** 2 for loss in LOSSES) / 2)
    t = (mean - 1.55) / (spread / math.sqrt(3))
    # The t distribution with two degrees of freedom has this distribution function.
    by_hand = 0.5 + t / (2 * math.sqrt(2 + t * t))
    assert verdict.p_value == pytest.approx(by_hand, rel=1e-9)
    by_scipy = scipy.stats.ttest_1samp(LOSSES, 1.55, alternative="less").pvalue
    assert verdict.p_value == pytest.approx(by_scipy, rel=1e-9)
    assert verdict.passes
    assert verdict.mean == pytest.approx(mean)
    assert verdict.std == pytest.approx(spread)


@given(st.lists(st.floats(1.0, 2.0), min_size=2, max_size=8), st.floats(1.0, 2.0))
def test_any_t_test_agrees_with_scipy(losses: list[float], target: float):
    if max(losses) - min(losses) < 1e-6:
        return
    verdict = judge(Rule("t", n=2, alpha=0.01), losses, target)
    expected = scipy.stats.ttest_1samp(losses, target, alternative="less").pvalue
    assert verdict.p_value == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert verdict.passes == (verdict.p_value < 0.01)


def test_losses_above_the_target_do_not_pass():
    verdict = judge(T_RULE, [1.56, 1.561, 1.562], 1.55)
    assert not verdict.passes
    assert verdict.p_value is not None
    assert verdict.p_value > 0.99


def test_too_few_seeds_do_not_pass_however_low():
    verdict = judge(T_RULE, [1.0, 1.001], 1.55)
    assert not verdict.passes
    assert "2 seeds of the 3" in verdict.why


def test_identical_losses_are_one_run_and_do_not_pass():
    verdict = judge(T_RULE, [1.5, 1.5, 1.5], 1.55)
    assert not verdict.passes
    assert verdict.p_value is None
    assert "same" in verdict.why
    assert not judge(T_RULE, [1.5, 1.5 + 1e-13, 1.5], 1.55).passes


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "rule", [T_RULE, Rule("margin", n=1, margin=0.0), Rule("z", n=1, alpha=0.05, sigma=0.001)]
)
def test_a_loss_that_is_not_finite_never_passes(rule: Rule, bad: float):
    verdict = judge(rule, [1.0, 1.1, 1.2, bad], 1.55)
    assert not verdict.passes
    assert verdict.p_value is None
    assert "1 of 4" in verdict.why


def test_no_losses_do_not_pass():
    verdict = judge(T_RULE, [], 1.55)
    assert not verdict.passes
    assert verdict.n == 0
    assert verdict.mean is None


def test_the_margin_rule_grows_with_the_root_of_n():
    rule = Rule("margin", n=2, margin=0.004)
    assert not judge(rule, [3.278] * 2, 3.28).passes
    verdict = judge(rule, [3.2779] * 4, 3.28)
    assert verdict.passes
    assert verdict.margin == pytest.approx(0.0042)
    assert verdict.p_value is None


def test_the_z_rule_uses_the_known_spread():
    verdict = judge(Rule("z", n=1, alpha=0.01, sigma=0.002), [3.275], 3.28)
    assert verdict.p_value == pytest.approx(scipy.stats.norm.cdf(-2.5))
    assert verdict.passes
    assert not judge(Rule("z", n=1, alpha=0.005, sigma=0.002), [3.275], 3.28).passes


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"rule": "u", "n": 3}, "rule"),
        ({"rule": "t", "n": 0, "alpha": 0.05}, "n "),
        ({"rule": "t", "n": 3}, "alpha"),
        ({"rule": "margin", "n": 3, "margin": math.nan}, "margin"),
        ({"rule": "z", "n": 3, "alpha": 0.05, "sigma": 0.0}, "sigma"),
    ],
)
def test_a_rule_that_cannot_be_applied_is_refused_by_name(settings: dict[str, object], named: str):
    with pytest.raises(ValueError, match=f"significance.{named}"):
        Rule(**settings)  # type: ignore[arg-type]


def test_the_ratio_of_seconds_is_welchs_on_logs():
    slow, fast = [58.0, 59.5, 57.7, 60.2], [31.2, 30.9, 32.4]
    found = compare_seconds(slow, fast)
    expected = scipy.stats.ttest_ind(
        [math.log(x) for x in slow], [math.log(x) for x in fast], equal_var=False
    )
    interval = expected.confidence_interval(0.95)
    assert found.ratio == pytest.approx(
        math.exp(math.fsum(map(math.log, slow)) / 4 - math.fsum(map(math.log, fast)) / 3)
    )
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-6)
    assert (found.low, found.high) == (
        pytest.approx(math.exp(interval.low), rel=1e-6),
        pytest.approx(math.exp(interval.high), rel=1e-6),
    )
    assert (found.n_a, found.n_b) == (4, 3)


def test_swapping_the_sides_inverts_ratio_and_interval():
    one, other = compare_seconds([10, 11, 12], [5, 6, 5.5]), compare_seconds([5, 6, 5.5], [10, 11, 12])
    assert one.low is not None
    assert other.high is not None
    assert one.ratio == pytest.approx(1 / other.ratio)
    assert one.low == pytest.approx(1 / other.high)
    assert one.p_value == pytest.approx(other.p_value)


@pytest.mark.parametrize(
    ("a", "b"), [([58.0], [31.0, 32.0]), ([58.0, 59.0], [31.0]), ([5.0, 5.0], [2.0, 2.0])]
)
def test_without_a_spread_there_is_a_ratio_and_no_interval(a: list[float], b: list[float]):
    found = compare_seconds(a, b)
    assert found.ratio > 1
    assert (found.low, found.high, found.p_value) == (None, None, None)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_seconds_that_are_no_seconds_are_refused(bad: float):
    with pytest.raises(ValueError, match="seconds"):
        compare_seconds([bad, 1.0], [1.0, 2.0])
