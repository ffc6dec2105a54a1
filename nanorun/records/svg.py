"""Charts as SVG that stands alone: light and dark by the reader's setting, readable without colour.

Every text is escaped, so the names in a chart may come from files that anyone wrote.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from nanorun.records.scales import Axis, Series, axis_over, tick_labels

__all__ = ["DARK", "DASHES", "LIGHT", "Series", "line_chart"]

LIGHT = ("#0060a8", "#b34700", "#007a55", "#a03080", "#7a5c00", "#4f4fc4", "#b3202c", "#4d6b12")
"""Line colours on white; each has a contrast of at least 4.5 with it."""
DARK = ("#62b5f5", "#ff9a57", "#3fcf9f", "#ee8fd0", "#e3c04d", "#a9a6ff", "#ff8087", "#a9cf55")
"""The same lines on a dark ground."""
DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4", "4 2 1 2 1 2", "1 2")
"""Dash patterns; seven of them beside eight colours make 56 lines that all differ."""
LONGEST_NAME = 40
LEGEND_LINE = 20
CHARACTER = 7.2
"""About the width of a character of the legend, in pixels."""


@dataclass(frozen=True)
class _Frame:
    """Where the curves lie in the picture, in pixels, and what the axes mean."""

    left: float
    top: float
    width: float
    height: float
    x: Axis
    y: Axis

    def at(self, x: float, y: float) -> tuple[float, float]:
        return self.left + self.width * self.x.place(x), self.top + self.height * (1 - self.y.place(y))


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    target: float | None = None,
    target_label: str = "target",
    x_log: bool = False,
    y_log: bool = False,
    step: bool = False,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    description: str = "",
    size: tuple[int, int] = (860, 460),
    scope: str = "chart",
) -> str:
    """Return an SVG document with one line for each series, its band, a legend and a line at the target.

    `step` holds each value until the next point. Points that are not finite, not above 0 on a logarithmic
    axis, or beyond the ends of x break the line. Ranges default to what the series hold. `scope` starts every id in
    the document, so that several charts can stand in one page.
    """
    x_axis = Axis(*x_range, x_log) if x_range else axis_over(_all_xs(series), log=x_log)
    ys = itertools.chain(_all_ys(series), [] if target is None else [target])
    y_axis = Axis(*y_range, y_log) if y_range else axis_over(ys, log=y_log, room=0.04)
    names = [_cut(one.name) for one in series] + ([_cut(target_label)] if target is not None else [])
    legend = 52 + CHARACTER * max(map(len, names), default=0)
    height = max(size[1], LEGEND_LINE * len(names) + 110)
    frame = _Frame(70, 44, max(size[0] - 70 - 20 - legend, 200), height - 44 - 60, x_axis, y_axis)
    width = math.ceil(frame.left + frame.width + 20 + legend)
    parts = [
        _opening(scope, width, height, title, description or _described(series, x_label, y_label, target)),
        _axes(frame, title, x_label, y_label),
        *(_curve(one, frame, index, step) for index, one in enumerate(series)),
        _target_line(frame, target),
        _legend(names, frame.left + frame.width + 20, has_target=target is not None),
        "</svg>\n",
    ]
    return "\n".join(part for part in parts if part)


def escaped(text: str) -> str:
    """Return `text` as XML shows it, what XML cannot hold or a reader cannot see as `?`."""
    seen = "".join(char if char.isprintable() else "?" for char in text)
    for sign, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ('"', "&quot;"), ("'", "&#39;")):
        seen = seen.replace(sign, entity)
    return seen


def _cut(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def _all_xs(series: Sequence[Series]) -> Iterator[float]:
    return (x for one in series for x in one.xs)


def _all_ys(series: Sequence[Series]) -> Iterator[float]:
    return (y for one in series for y in (*one.ys, *(one.low or ()), *(one.high or ())))


def _described(series: Sequence[Series], x_label: str, y_label: str, target: float | None) -> str:
    """What the chart shows, for those who cannot see it: where each line begins and ends."""
    parts = [f"{y_label} against {x_label}."]
    for one in series:
        points = [(x, y) for x, y in zip(one.xs, one.ys) if math.isfinite(y)]
        if points:
            (x0, y0), (x1, y1) = points[0], points[-1]
            parts.append(f"{_cut(one.name)}: {y0:.4g} at {x0:.4g}, {y1:.4g} at {x1:.4g}.")
        else:
            parts.append(f"{_cut(one.name)}: no points.")
    if target is not None:
        parts.append(f"Target {target:.4g}.")
    return " ".join(parts)


def _opening(scope: str, width: int, height: float, title: str, description: str) -> str:
    """The root with its style; selectors begin with the root's id, so that they reach nothing else in a page."""
    root = f"#{scope}"
    light = "".join(f"{root} .s{i}{{stroke:{colour};fill:{colour}}}" for i, colour in enumerate(LIGHT))
    dark = "".join(f"{root} .s{i}{{stroke:{colour};fill:{colour}}}" for i, colour in enumerate(DARK))
    style = (
        f"{root}{{background:#fff}}{root} text{{fill:#1b1f24;stroke:none;font:12px system-ui,sans-serif}}"
        f"{root} .title{{font-size:15px;font-weight:600}}{root} .grid{{stroke:#d8dce1}}{root} .frame{{stroke:#5b636d}}"
        f"{root} .target{{stroke:#1b1f24}}{light}"
        f"{root} .line{{fill:none;stroke-width:2;stroke-linejoin:round}}"
        f"{root} .band{{stroke:none;fill-opacity:.15}}{root} .dot{{stroke:none}}"
        f"@media(prefers-color-scheme:dark){{{root}{{background:#14171b}}{root} text{{fill:#e4e7eb}}"
        f"{root} .grid{{stroke:#333a42}}{root} .frame{{stroke:#98a1ab}}{root} .target{{stroke:#e4e7eb}}{dark}"
        # The curves' own rules follow the colours once more, because they have to win over them.
        f"{root} .line{{fill:none}}{root} .band,{root} .dot{{stroke:none}}}}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" id="{scope}" viewBox="0 0 {width} {height:g}" width="{width}" '
        f'height="{height:g}" role="img" aria-labelledby="{scope}-title {scope}-desc">\n'
        f'<title id="{scope}-title">{escaped(title)}</title>\n'
        f'<desc id="{scope}-desc">{escaped(description)}</desc>\n'
        f"<style>{style}</style>"
    )


def _axes(frame: _Frame, title: str, x_label: str, y_label: str) -> str:
    """The title, the grid, the frame, the numbers and the labels."""
    right, bottom = frame.left + frame.width, frame.top + frame.height
    parts = [f'<text class="title" x="{frame.left:g}" y="24">{escaped(title)}</text>', '<g class="grid">']
    numbers = []
    ticks = frame.x.ticks(int(frame.width // 80))
    for tick, label in zip(ticks, tick_labels(ticks)):
        x = frame.left + frame.width * frame.x.place(tick)
        parts.append(f'<path d="M{_n(x)} {_n(frame.top)}V{_n(bottom)}"/>')
        numbers.append(f'<text x="{_n(x)}" y="{_n(bottom + 18)}" text-anchor="middle">{label}</text>')
    ticks = frame.y.ticks(int(frame.height // 50))
    for tick, label in zip(ticks, tick_labels(ticks)):
        y = frame.top + frame.height * (1 - frame.y.place(tick))
        parts.append(f'<path d="M{_n(frame.left)} {_n(y)}H{_n(right)}"/>')
        numbers.append(f'<text x="{_n(frame.left - 8)}" y="{_n(y + 4)}" text-anchor="end">{label}</text>')
    middle = _n(frame.top + frame.height / 2)
    parts += [
        "</g>",
        f'<path class="frame" fill="none" d="M{_n(frame.left)} {_n(frame.top)}V{_n(bottom)}H{_n(right)}"/>',
        *numbers,
        f'<text x="{_n(frame.left + frame.width / 2)}" y="{_n(bottom + 42)}" text-anchor="middle">'
        f"{escaped(x_label)}</text>",
        f'<text x="18" y="{middle}" text-anchor="middle" transform="rotate(-90 18 {middle})">'
        f"{escaped(y_label)}</text>",
    ]
    return "\n".join(parts)


def _curve(one: Series, frame: _Frame, index: int, step: bool) -> str:
    """One series as a group: its band, then its line; the name shows where the pointer rests."""
    colour = f"s{index % len(LIGHT)}"
    parts = [f"<g><title>{escaped(one.name)}</title>"]
    if one.low is not None and one.high is not None:
        edges = _held(one.xs, one.low, one.high, step)
        for stretch in _stretches(edges, frame):
            there = [frame.at(x, _inside(low, frame.y)) for x, low, _ in stretch]
            back = [frame.at(x, _inside(high, frame.y)) for x, _, high in reversed(stretch)]
            parts.append(f'<path class="{colour} band" d="{_path(there + back)}Z"/>')
    for stretch in _stretches(_held(one.xs, one.ys, one.ys, step), frame):
        points = [frame.at(x, _inside(y, frame.y)) for x, y, _ in stretch]
        if len(points) == 1:
            parts.append(
                f'<circle class="{colour} dot" cx="{_n(points[0][0])}" cy="{_n(points[0][1])}" r="3"/>'
            )
        else:
            parts.append(f'<path class="{colour} line"{_dash(index)} d="{_path(_thinned(points))}"/>')
    return "".join(parts) + "</g>"


def _held(
    xs: Sequence[float], low: Sequence[float], high: Sequence[float], step: bool
) -> Iterator[tuple[float, float, float]]:
    """The points, and with `step` each value once more just where the next one begins."""
    before: tuple[float, float] | None = None
    for x, one, other in zip(xs, low, high):
        if step and before is not None:
            yield x, *before
        yield x, one, other
        before = one, other


def _stretches(
    points: Iterable[tuple[float, float, float]], frame: _Frame
) -> Iterator[list[tuple[float, float, float]]]:
    """The runs of points that can be drawn, one after another."""

    def drawable(point: tuple[float, float, float]) -> bool:
        x, low, high = point
        return frame.x.holds(x) and frame.y.has_place(low) and frame.y.has_place(high)

    for good, stretch in itertools.groupby(points, drawable):
        if good:
            yield list(stretch)


def _inside(y: float, axis: Axis) -> float:
    """`y`, moved to the edge where a given range leaves it out."""
    return min(max(y, axis.start), axis.end)


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points less those within half a pixel of the one before: a curve of thousands stays small."""
    kept = [points[0]]
    for x, y in points[1:-1]:
        if abs(x - kept[-1][0]) >= 0.5 or abs(y - kept[-1][1]) >= 0.5:
            kept.append((x, y))
    return [*kept, points[-1]]


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{_n(x)} {_n(y)}" for x, y in points)


def _n(value: float) -> str:
    """A place in pixels, to a tenth."""
    return f"{value:.1f}".removesuffix(".0")


def _dash(index: int) -> str:
    pattern = DASHES[index % len(DASHES)]
    return f' stroke-dasharray="{pattern}"' if pattern else ""


def _target_line(frame: _Frame, target: float | None) -> str:
    if target is None or not frame.y.holds(target):
        return ""
    y = _n(frame.top + frame.height * (1 - frame.y.place(target)))
    return f'<path class="target" stroke-dasharray="1 4" stroke-width="2" d="M{_n(frame.left)} {y}h{_n(frame.width)}"/>'


def _legend(names: Sequence[str], left: float, *, has_target: bool) -> str:
    """A sample of each line with its name, from top to bottom; the target's is the last."""
    parts = []
    for index, name in enumerate(names):
        y = _n(54 + LEGEND_LINE * index)
        if has_target and index == len(names) - 1:
            style = ' class="target" stroke-dasharray="1 4" stroke-width="2"'
        else:
            style = f' class="s{index % len(LIGHT)} line"{_dash(index)}'
        parts.append(f'<path{style} d="M{_n(left)} {y}h30"/>')
        parts.append(f'<text x="{_n(left + 38)}" y="{y}" dy="4">{escaped(name)}</text>')
    return "\n".join(parts)
