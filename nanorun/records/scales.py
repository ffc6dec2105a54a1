"""What every picture of curves shares: a series of points, axes, and the round numbers along them.

Drawn by `svg` for pages and by `terminal_plot` for terminals, so that both show the same thing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

LARGEST = 1e100
"""Numbers from here on are left out, because the span of two of them may be no number at all."""


@dataclass(frozen=True)
class Series:
    """One curve: points in order, and where there is a band around them, its lower and upper edge."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None

    def __post_init__(self) -> None:
        assert len(self.xs) == len(self.ys)
        assert (self.low is None) == (self.high is None)
        assert self.low is None or self.high is None or len(self.low) == len(self.high) == len(self.xs)


@dataclass(frozen=True)
class Axis:
    """A stretch of numbers and how it is drawn; `start` < `end`."""

    start: float
    end: float
    log: bool = False

    def place(self, value: float) -> float:
        """Return where `value` lies: 0 at the start, 1 at the end, beyond both outside."""
        if self.log:
            return (math.log(value) - math.log(self.start)) / (math.log(self.end) - math.log(self.start))
        return (value - self.start) / (self.end - self.start)

    def has_place(self, value: float) -> bool:
        """Return whether `place` can be asked: `value` is usable, and above 0 on a logarithmic axis."""
        return abs(value) < LARGEST and (not self.log or value > 1 / LARGEST)

    def holds(self, value: float) -> bool:
        """Return whether `value` lies on the axis, its ends included."""
        return self.has_place(value) and -1e-9 <= self.place(value) <= 1 + 1e-9

    def ticks(self, about: int) -> list[float]:
        """Return round numbers from start to end, about as many as asked."""
        if self.log and self.end / self.start >= 10:
            return _log_ticks(self.start, self.end, about)
        step = _round_step((self.end - self.start) / max(about, 1))
        first, last = math.ceil(self.start / step - 1e-9), math.floor(self.end / step + 1e-9)
        return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def _round_step(least: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is no smaller than `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least * (1 - 1e-9))


def _log_ticks(start: float, end: float, about: int) -> list[float]:
    first, last = math.floor(math.log10(start)), math.ceil(math.log10(end))
    every = max(1, round((last - first) / max(about, 1)))
    factors = (1, 2, 5) if 3 * (last - first) <= about + 3 else (1,)
    numbers = [factor * 10.0**power for power in range(first, last + 1, every) for factor in factors]
    return [number for number in numbers if start * (1 - 1e-9) <= number <= end * (1 + 1e-9)]


def axis_over(values: Iterable[float], *, log: bool = False, room: float = 0.0) -> Axis:
    """Return an axis over all finite values (those above 0, if `log`), `room` of its length wider at each end.

    No usable value at all gives an axis from 0 to 1 (1 to 10).
    """
    usable = [value for value in values if abs(value) < LARGEST and (not log or value > 1 / LARGEST)]
    if not usable:
        return Axis(1.0, 10.0, True) if log else Axis(0.0, 1.0)
    start, end = min(usable), max(usable)
    # Values that are all the same still need an axis with a length.
    if log:
        factor = 10 ** (room * math.log10(end / start)) if end / start > 1 + 1e-9 else 2.0
        return Axis(start / factor, end * factor, True)
    least = max(abs(start), abs(end), 1 / LARGEST) * 1e-9
    width = room * (end - start) if end - start > least else abs(end) / 2 if abs(end) > least else 0.5
    return Axis(start - width, end + width)


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Return the ticks as text, all with as many decimals as the finest of them needs."""
    if any(tick and not 1e-3 <= abs(tick) < 1e6 for tick in ticks):
        return [_short(tick) for tick in ticks]
    decimals = max((len(f"{tick:.10g}".partition(".")[2]) for tick in ticks), default=0)
    return [f"{tick:,.{min(decimals, 6)}f}" for tick in ticks]


def _short(value: float) -> str:
    """A large or small number in few characters: 2.5M, 1e-05."""
    for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if unit <= abs(value) < unit * 1000:
            return f"{value / unit:g}{letter}"
    return f"{value:g}"
