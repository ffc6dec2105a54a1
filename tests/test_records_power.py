"""How many seeds a test needs: against other ways of working out a power."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from nanorun import cli
from nanorun.errors import UserError
from nanorun.records.power import (
    DESIGNS,
    MOST_SEEDS,
    detectable_effect,
    known_sigma_power,
    lines,
    one_sample_power,
    plan,
    seeds_needed,
    two_sample_power,
)

EFFECTS = (0.05, 0.5, 1.0, 1.54, 3.0, 8.0)
SEEDS = (2, 3, 5, 12, 60, 1000)


@pytest.mark.parametrize("alpha", [1e-6, 0.001, 0.01, 0.05])
@pytest.mark.parametrize("effect", EFFECTS)
@pytest.mark.parametrize("n", SEEDS)
def test_powers_are_those_of_scipys_noncentral_t(n: int, effect: float, alpha: float):
    nct, t = scipy.stats.nct, scipy.stats.t
    one = nct.sf(t.isf(alpha, n - 1), n - 1, effect * math.sqrt(n))
    assert one_sample_power(n, effect, alpha) == pytest.approx(one, abs=1e-9)
    freedom, shift, critical = 2 * n - 2, effect * math.sqrt(n / 2), t.isf(alpha / 2, 2 * n - 2)
    low = np.nan_to_num(nct.cdf(-critical, freedom, shift))
    assert two_sample_power(n, effect, alpha) == pytest.approx(
        nct.sf(critical, freedom, shift) + low, abs=1e-9
    )


@pytest.mark.parametrize(("n", "effect"), [(2, 3.0), (3, 0.5), (8, 1.54), (40, 0.4)])
def test_the_power_is_that_of_the_integral_over_the_spread(n: int, effect: float):
    critical = scipy.stats.t.isf(0.01, n - 1)

    def passing_at(spread: float) -> float:
        """How often a sample whose standard deviation is `spread` sigmas passes, times how often that happens."""
        density = scipy.stats.chi.pdf(spread * math.sqrt(n - 1), n - 1) * math.sqrt(n - 1)
        return scipy.stats.norm.cdf(effect * math.sqrt(n) - critical * spread) * density

    by_integral, _ = scipy.integrate.quad(passing_at, 0, 6, limit=400, points=[0.5, 1, 2])
    assert one_sample_power(n, effect, 0.01) == pytest.approx(by_integral, abs=1e-6)


def test_the_power_is_how_often_simulated_arms_are_told_apart():
    random = np.random.default_rng(0)
    a, b = random.normal(0, 1, (20_000, 6)), random.normal(1.5, 1, (20_000, 6))
    share = (scipy.stats.ttest_ind(a, b, axis=1).pvalue < 0.05).mean()
    assert two_sample_power(6, 1.5, 0.05) == pytest.approx(share, abs=0.01)
    share = (scipy.stats.ttest_1samp(a, 0.9, axis=1, alternative="less").pvalue < 0.05).mean()
    assert one_sample_power(6, 0.9, 0.05) == pytest.approx(share, abs=0.01)


def test_without_an_effect_the_power_is_the_level():
    for design in DESIGNS:
        assert design.power(7, 0.0, 0.03) == pytest.approx(0.03, abs=1e-9)


@pytest.mark.parametrize("design", DESIGNS, ids=lambda design: design.name)
@pytest.mark.parametrize("effect", EFFECTS)
def test_the_seeds_needed_are_the_fewest_that_do(design, effect: float):
    n = seeds_needed(design, effect, 0.01, 0.8)
    assert design.power(n, effect, 0.01) >= 0.8
    assert n == design.fewest or design.power(n - 1, effect, 0.01) < 0.8


@pytest.mark.parametrize("design", DESIGNS, ids=lambda design: design.name)
@pytest.mark.parametrize("n", SEEDS)
def test_the_detectable_difference_has_the_power_that_was_asked_for(design, n: int):
    effect = detectable_effect(design, n, 0.01, 0.9)
    assert design.power(n, effect, 0.01) == pytest.approx(0.9, abs=1e-6)


def test_a_known_spread_needs_the_seeds_of_the_closed_formula():
    z = scipy.stats.norm.isf(0.001) + scipy.stats.norm.ppf(0.8)
    assert plan(sigma=0.0013, delta=0.002, alpha=0.001, power=0.8, n=None)["fixed_target_known_sigma"][
        "n"
    ] == math.ceil((z * 0.0013 / 0.002) ** 2)
    assert known_sigma_power(4, 3.09 / 2, 0.001) == pytest.approx(0.5, abs=0.001)


def test_what_needs_too_many_seeds_says_so_and_does_not_search_for_ever():
    document = plan(sigma=1.0, delta=1e-6, alpha=0.01, power=0.8, n=None)
    assert document["per_arm"]["n"] is None
    assert any(f"more than {MOST_SEEDS:,}" in line for line in lines(document))


def test_no_power_is_nan_however_far_out():
    for design in DESIGNS:
        for n in (2, 50, MOST_SEEDS):
            for effect in (1e-9, 1.0, 30.0, 1e4):
                for alpha in (1e-12, 0.01, 0.49):
                    assert 0 <= design.power(n, effect, alpha) <= 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sigma": 0.0}, "--sigma"),
        ({"sigma": math.nan}, "--sigma"),
        ({"delta": -0.1}, "--delta"),
        ({"delta": math.inf}, "--delta"),
        ({"delta": 1e300}, "times --sigma"),
        ({"alpha": 0.0}, "--alpha"),
        ({"alpha": math.nan}, "--alpha"),
        ({"power": 1.0}, "--power"),
        ({"power": 0.005}, "--power"),
        ({"n": 0}, "--n"),
        ({"delta": None}, "nothing to work out"),
    ],
)
def test_numbers_that_no_test_has_are_refused_by_name(change: dict[str, object], named: str):
    asked = {"sigma": 0.0013, "delta": 0.002, "alpha": 0.01, "power": 0.8, "n": None, **change}
    with pytest.raises(UserError, match=named):
        plan(**asked)  # type: ignore[arg-type]


def test_the_command_prints_the_plan_and_its_json(monkeypatch, capsys):
    def run(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["nanorun", "power", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        return capsys.readouterr().out

    asked = ("--sigma", "0.0013", "--delta", "0.002")
    document = json.loads(run(*asked, "--json"))
    assert (document["per_arm"]["n"], document["fixed_target"]["n"]) == (12, 8)
    assert "with_n" not in document
    with_n = json.loads(run("--sigma", "0.0013", "--n", "5", "--json"))["with_n"]
    assert with_n["per_arm"]["power"] is None
    assert with_n["per_arm"]["detectable_delta"] == pytest.approx(0.00357, abs=1e-5)
    text = run(*asked, "--n", "1")
    assert "12 seeds" in text
    assert "takes at least 2" in text
    assert "assumes" in text
