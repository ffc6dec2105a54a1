"""Small curves for a terminal: one panel for each series, side by side, all on the same axes.

Panels rather than lines of several colours in one, because a terminal may have no colours and a log of it has none.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.cells import cell_len, set_cell_size

from nanorun.records.scales import Axis, Series, axis_over, tick_labels

Marks = Literal["braille", "blocks"]
NARROWEST, WIDEST = 18, 40
"""Columns of a panel."""
_DOTS = {"braille": (2, 4), "blocks": (1, 2)}
"""Dots across and down in one character."""
_BRAILLE = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bit of each dot of a braille character, by row and column."""
_BLOCKS = {(False, False): " ", (True, False): "▀", (False, True): "▄", (True, True): "█"}


def marks_for(encoding: str, terminal: str | None = None) -> Marks | None:
    """Return what a terminal of this encoding and TERM can draw with, None for one that can't."""
    if terminal == "dumb":
        return None
    # The Linux console has no braille in its font.
    kinds: tuple[tuple[Marks, str], ...] = (("braille", "⠁⣿"), ("blocks", "▀▄█"))
    for kind, signs in kinds[1:] if terminal == "linux" else kinds:
        try:
            signs.encode(encoding)
        except (UnicodeEncodeError, LookupError):
            continue
        return kind
    return None


@dataclass(frozen=True)
class _Axes:
    x: Axis
    y: Axis
    target: float | None
    step: bool


def small_multiples(
    series: Sequence[Series],
    *,
    columns: int,
    marks: Marks,
    x_label: str,
    y_label: str,
    rows: int = 5,
    target: float | None = None,
    x_log: bool = False,
    step: bool = False,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
) -> list[str]:
    """Return lines no wider than `columns`: the series as panels `rows` high, the target dotted.

    None at all where there is nothing to draw or no room for a panel.
    """
    drawable = [one for one in series if len(one.xs)]
    x_axis = (
        Axis(*x_range, x_log) if x_range else axis_over((x for one in drawable for x in one.xs), log=x_log)
    )
    ys = itertools.chain((y for one in drawable for y in one.ys), [] if target is None else [target])
    axes = _Axes(x_axis, Axis(*y_range) if y_range else axis_over(ys), target, step)
    top, bottom = _ends(axes.y)
    gutter = max(len(top), len(bottom)) + 1
    room = columns - gutter
    if not drawable or room < NARROWEST:
        return []
    across = min(len(drawable), (room + 2) // (NARROWEST + 2))
    width = min(WIDEST, (room - 2 * (across - 1)) // across)
    lines = [_fitted(f"{y_label} against {x_label}", columns)]
    for first in range(0, len(drawable), across):
        shown = drawable[first : first + across]
        lines.append(" " * gutter + "  ".join(_fitted(one.name, width) for one in shown))
        panels = [_panel(one, axes, width, rows, marks) for one in shown]
        for row in range(rows):
            label = bottom if row == rows - 1 else top if row == 0 else ""
            lines.append(f"{label:>{gutter - 1}} " + "  ".join(panel[row] for panel in panels))
        lines.append(" " * gutter + "  ".join([_x_ends(axes.x, width)] * len(shown)))
    return [line.rstrip() for line in lines]


def _ends(axis: Axis) -> tuple[str, str]:
    """The larger and the smaller end of an axis, as text."""
    low, high = tick_labels([float(f"{axis.start:.4g}"), float(f"{axis.end:.4g}")])
    return high, low


def _x_ends(axis: Axis, width: int) -> str:
    high, low = _ends(axis)
    return f"{low}{high:>{width - len(low)}}"


def _fitted(text: str, width: int) -> str:
    """Text of exactly `width` columns, whatever it holds."""
    seen = "".join(char if char.isprintable() else "?" for char in text)
    return set_cell_size(seen, width) if cell_len(seen) <= width else set_cell_size(seen, width - 2) + ".."


def _panel(one: Series, axes: _Axes, width: int, rows: int, marks: Marks) -> list[str]:
    """One series in `rows` texts of `width` characters."""
    across, down = _DOTS[marks]
    wide, high = width * across, rows * down
    dots = set(_dots(one, axes, wide, high))
    if axes.target is not None and axes.y.holds(axes.target):
        y = _dot(1 - axes.y.place(axes.target), high)
        dots |= {(x, y) for x in range(0, wide, 3)}
    return ["".join(_character(dots, column, row, marks) for column in range(width)) for row in range(rows)]


def _dots(one: Series, axes: _Axes, wide: int, high: int) -> Iterator[tuple[int, int]]:
    """Every dot that a line through the points touches; what lies outside the axes is left out or cut off."""
    before: tuple[int, int] | None = None
    for x, y in zip(one.xs, one.ys):
        if not (axes.x.holds(x) and axes.y.has_place(y)):
            before = None
            continue
        here = _dot(axes.x.place(x), wide), _dot(1 - axes.y.place(y), high)
        if before is None:
            yield here
        elif axes.step:
            yield from _line(before, (here[0], before[1]))
            yield from _line((here[0], before[1]), here)
        else:
            yield from _line(before, here)
        before = here


def _dot(place: float, count: int) -> int:
    """The dot of a place between 0 and 1; places outside go to the edge."""
    return min(max(int(place * count), 0), count - 1)


def _line(start: tuple[int, int], end: tuple[int, int]) -> Iterator[tuple[int, int]]:
    (x0, y0), (x1, y1) = start, end
    steps = max(abs(x1 - x0), abs(y1 - y0), 1)
    for step in range(steps + 1):
        yield round(x0 + (x1 - x0) * step / steps), round(y0 + (y1 - y0) * step / steps)


def _character(dots: set[tuple[int, int]], column: int, row: int, marks: Marks) -> str:
    if marks == "blocks":
        return _BLOCKS[(column, 2 * row) in dots, (column, 2 * row + 1) in dots]
    bits = sum(
        bit
        for down, pair in enumerate(_BRAILLE)
        for across, bit in enumerate(pair)
        if (2 * column + across, 4 * row + down) in dots
    )
    return chr(0x2800 + bits) if bits else " "
