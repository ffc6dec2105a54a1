"""How many seeds a test needs before it can see a difference, and what it can see with the seeds there are.

Powers of t-tests are exact: the noncentral t distribution of `scipy.special`, imported late.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from nanorun.errors import UserError

MOST_SEEDS = 1_000_000
"""A search for a number of seeds ends here."""
SMALLEST_EFFECT = 1e-9
LARGEST_EFFECT = 1e4
"""Differences in units of the spread between which the detectable one is looked for."""


def two_sample_power(n: int, effect: float, alpha: float) -> float:
    """Return how often a two-sided two-sample t-test, `n` seeds an arm, sees a difference of `effect` sigmas."""
    from scipy.special import stdtrit

    freedom, shift = 2 * n - 2, effect * math.sqrt(n / 2)
    critical = -float(stdtrit(freedom, alpha / 2))
    return 1 - _noncentral_t(freedom, shift, critical) + _noncentral_t(freedom, shift, -critical)


def one_sample_power(n: int, effect: float, alpha: float) -> float:
    """Return how often a one-sided t-test of `n` seeds passes whose true mean lies `effect` sigmas under the target."""
    from scipy.special import stdtrit

    return 1 - _noncentral_t(n - 1, effect * math.sqrt(n), -float(stdtrit(n - 1, alpha)))


def known_sigma_power(n: int, effect: float, alpha: float) -> float:
    """Return the same for a one-sided z-test, whose spread is known beforehand."""
    from scipy.special import ndtr, ndtri

    return float(ndtr(effect * math.sqrt(n) + ndtri(alpha)))


def _noncentral_t(freedom: int, shift: float, value: float) -> float:
    """The noncentral t's distribution function."""
    from scipy.special import nctdtr

    found = float(nctdtr(freedom, shift, value))
    # Some scipys answer NaN where the probability is smaller than about 1e-16.
    return 0.0 if math.isnan(found) else found


@dataclasses.dataclass(frozen=True)
class Design:
    """One way of testing, with what has to be known to plan it."""

    name: str
    test: str
    fewest: int
    power: Callable[[int, float, float], float]
    """Of seeds, effect (in sigmas) and alpha."""


DESIGNS = (
    Design("per_arm", "two arms: two-sided two-sample t-test, seeds in each arm", 2, two_sample_power),
    Design("fixed_target", "against a fixed target: one-sided one-sample t-test", 2, one_sample_power),
    Design(
        "fixed_target_known_sigma",
        "against a fixed target with sigma known beforehand: one-sided z-test",
        1,
        known_sigma_power,
    ),
)


def seeds_needed(design: Design, effect: float, alpha: float, power: float) -> int | None:
    """Return the fewest seeds whose power is at least `power`; None where MOST_SEEDS are too few."""
    high = design.fewest
    while design.power(high, effect, alpha) < power:
        if high >= MOST_SEEDS:
            return None
        high = min(2 * high, MOST_SEEDS)
    low = max(design.fewest, high // 2)
    while low < high:
        middle = (low + high) // 2
        if design.power(middle, effect, alpha) < power:
            low = middle + 1
        else:
            high = middle
    return high


def detectable_effect(design: Design, n: int, alpha: float, power: float) -> float | None:
    """Return the smallest difference in sigmas that `n` seeds see with that power; None if there is none."""
    if design.power(n, LARGEST_EFFECT, alpha) < power:
        return None
    low, high = math.log(SMALLEST_EFFECT), math.log(LARGEST_EFFECT)
    for _ in range(60):
        middle = (low + high) / 2
        if design.power(n, math.exp(middle), alpha) < power:
            low = middle
        else:
            high = middle
    return math.exp(high)


def plan(*, sigma: float, delta: float | None, alpha: float, power: float, n: int | None) -> dict[str, Any]:
    """Return what `nanorun power --json` prints: seeds for `delta`, and what `n` seeds can tell.

    `sigma` and `delta` are in nats. Raises UserError for a number that no test can have.
    """
    _check(sigma=sigma, delta=delta, alpha=alpha, power=power, n=n)
    document: dict[str, Any] = {"sigma": sigma, "delta": delta, "alpha": alpha, "power": power}
    for design in DESIGNS:
        entry: dict[str, Any] = {"test": design.test}
        if delta is not None:
            needed = seeds_needed(design, delta / sigma, alpha, power)
            entry["n"] = needed
            entry["power"] = None if needed is None else design.power(needed, delta / sigma, alpha)
        document[design.name] = entry
    if n is not None:
        document["with_n"] = {"n": n, **{design.name: _with_n(design, n, document) for design in DESIGNS}}
    document["assumes"] = ASSUMES
    return document


ASSUMES = (
    "assumes final losses that are normal and independent over seeds, with the same sigma in both arms; powers of the "
    "t-tests by the noncentral t distribution"
)


def _with_n(design: Design, n: int, asked: dict[str, Any]) -> dict[str, Any]:
    if n < design.fewest:
        return {"power": None, "detectable_delta": None}
    sigma, delta, alpha = asked["sigma"], asked["delta"], asked["alpha"]
    effect = detectable_effect(design, n, alpha, asked["power"])
    return {
        "power": None if delta is None else design.power(n, delta / sigma, alpha),
        "detectable_delta": None if effect is None else effect * sigma,
    }


def _check(*, sigma: float, delta: float | None, alpha: float, power: float, n: int | None) -> None:
    for flag, value in (("sigma", sigma), ("delta", delta)):
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{flag} is {value:g}; wanted a number of nats above 0, such as 0.0013")
    if delta is None and n is None:
        raise UserError(
            "nothing to work out: add --delta (the difference to see, in nats), --n (the seeds there are), or both"
        )
    if delta is not None and not SMALLEST_EFFECT <= delta / sigma <= LARGEST_EFFECT:
        raise UserError(
            f"--delta {delta:g} is {delta / sigma:.3g} times --sigma {sigma:g}; wanted between {SMALLEST_EFFECT:g} and "
            f"{LARGEST_EFFECT:g} times"
        )
    if not 1e-12 <= alpha < 0.5:
        raise UserError(f"--alpha is {alpha:g}; wanted a level from 1e-12 up to, but not, 0.5, such as 0.01")
    if not alpha < power <= 0.999999:
        raise UserError(f"--power is {power:g}; wanted it above --alpha ({alpha:g}) and at most 0.999999")
    if n is not None and not 1 <= n <= MOST_SEEDS:
        raise UserError(f"--n is {n}; wanted from 1 to {MOST_SEEDS:,} seeds")


def lines(document: dict[str, Any]) -> list[str]:
    """The plan as a person reads it."""
    alpha, power, delta = document["alpha"], document["power"], document["delta"]
    out = [f"sigma {document['sigma']:g} nats, alpha {alpha:g}, power {power:g}"]
    for design in DESIGNS:
        entry, test = document[design.name], design.test
        if delta is not None:
            n = entry["n"]
            told = f"{n:,} seeds (power {entry['power']:.3f})" if n else f"more than {MOST_SEEDS:,} seeds"
            out.append(f"to see {delta:g}, {test}: {told}")
    if "with_n" in document:
        out += [_line_with_n(design, document) for design in DESIGNS]
    out.append(document["assumes"])
    return out


def _line_with_n(design: Design, document: dict[str, Any]) -> str:
    given, delta = document["with_n"], document["delta"]
    entry, start = given[design.name], f"with n = {given['n']}, {design.test}"
    if given["n"] < design.fewest:
        return f"{start}: it takes at least {design.fewest}"
    seen = entry["detectable_delta"]
    told = (
        "no difference can be told"
        if seen is None
        else f"{seen:.3g} is seen with power {document['power']:g}"
    )
    return f"{start}: {told}" + ("" if delta is None else f", {delta:g} with power {entry['power']:.3f}")
