"""The charts of the HTML report as data: lines, ranges and ticks, and each chart once as a still drawing.

Ranges and ticks are settled here, so that the page's script only scales and draws, and so that the drawing a
reader without JavaScript gets has the same ones.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from nanorun.records import scales
from nanorun.records.profiles import TAUS, Profiles
from nanorun.records.record import Record, ValidationPoint
from nanorun.records.report import Row, TrackView, clean, final_losses, is_full
from nanorun.records.significance import judge, mean

MOST_POINTS = 60
"""Readings a line is drawn with at the most; a screen shows no more, and a page with 100 records stays small."""
LARGEST = 1e15
"""Readings above this are left out: no training has them, and ranges of doubles run over."""
N_COLORS, N_DASHES = 8, 3
SHOWN_AT_FIRST = 8
"""Lines that a chart begins with; the legend brings the others."""
STILL_WIDTH, STILL_HEIGHT = 720, 360
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 14, 44
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")

Ticks = tuple[tuple[float, str], ...]


class CurvePoint(NamedTuple):
    """One reading of a row: means over its seeds, and the range of the seeds' losses."""

    step: int
    tokens: float
    seconds: float
    loss: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Axis:
    """A range and the ticks within it."""

    low: float
    high: float
    ticks: Ticks


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a chart."""

    name: str
    mark: int
    """Which colour and dash it has."""
    x: Mapping[str, Sequence[float]]
    """Its places on each axis that can be chosen."""
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    mode: str = "line"
    """`line`, `steps` (holds until the next point) or `dots`."""
    notes: Sequence[str] = ()
    """What a reader is told of each point; without it the page's script tells the coordinates."""
    labels: Sequence[str] = ()
    """Short texts drawn beside the points."""
    seeds: int = 0


@dataclasses.dataclass(frozen=True)
class Chart:
    """Lines with every range they can be looked at in."""

    kind: str
    title: str
    alternative: str
    """What the chart shows, for those who do not see it."""
    x_names: Mapping[str, str]
    """Key and title of each horizontal axis that can be chosen, the first shown first."""
    y_name: str
    views: Mapping[str, tuple[Axis, Axis]]
    """`<axis>.<extent>` to the two axes; the extents are `near` and `whole`."""
    lines: tuple[Line, ...]
    target: float | None = None

    @property
    def extents(self) -> list[str]:
        """The extents that differ, the first shown first."""
        axis = next(iter(self.x_names))
        found = [one for one in ("near", "whole") if f"{axis}.{one}" in self.views]
        same = len({self.views[f"{key}.{one}"] for key in self.x_names for one in found}) <= len(self.x_names)
        return found[:1] if same else found


def curves_chart(track: TrackView, rows: Sequence[Row], runs: Sequence[Sequence[Record]]) -> Chart | None:
    """The loss of each row over seconds, steps and tokens, seeds as a range; None where nothing can be drawn."""
    lines = []
    for index, (row, group) in enumerate(zip(rows, runs)):
        points = thinned(mean_curve(group), track.target_val_loss)
        if points:
            seeds = len({record.seed for record in (_full_or_all(group))})
            lines.append(_curve_line(clean(row.name, longest=40), index, points, seeds))
    if not lines:
        return None
    x_names = {"seconds": "counted seconds", "steps": "steps", "tokens": "tokens"}
    told = "; ".join(_told(line, track.target_val_loss) for line in lines[:20])
    more = f"; and {len(lines) - 20} more rows, in the table" if len(lines) > 20 else ""
    return Chart(
        kind="curves",
        title=f"Validation loss of track {track.name}",
        alternative=f"Validation loss against counted seconds, target {track.target_val_loss:g}. {told}{more}.",
        x_names=x_names,
        y_name="validation loss, nats a token",
        views=_loss_views(lines, list(x_names), track.target_val_loss),
        lines=tuple(lines),
        target=track.target_val_loss,
    )


def run_line(record: Record, mark: int) -> Line | None:
    """The curve of one run, or None where it has no reading that can be drawn."""
    points = thinned([CurvePoint(*_drawn(p), p.val_loss, p.val_loss) for p in _drawable(record)])
    return _curve_line(f"seed {record.seed}", mark, points, 1) if points else None


def run_views(line: Line, target: float) -> Mapping[str, tuple[Axis, Axis]]:
    """The ranges of a card's small chart: one run over counted seconds."""
    return _loss_views([line], ["seconds"], target, ticks=4, above=0.25)


def history_chart(track: TrackView, rows: Sequence[Row], runs: Sequence[Sequence[Record]]) -> Chart | None:
    """The best score of the rows that count as it fell with time, one staircase for each machine that scores.

    A row stands at the time of the run with which its rule first passed, with the score it has in the table.
    None where no row counts.
    """
    standing = [
        (moment, score, row, index)
        for index, (row, group) in enumerate(zip(rows, runs))
        if row.counts
        and (score := _score(row, track)) is not None
        and score <= LARGEST
        and (moment := first_counted(group, track)) is not None
    ]
    if not standing:
        return None
    standing.sort(key=lambda one: (one[0], one[1], one[3]))
    now = max(_moment(record) for group in runs for record in group)
    unit = {"seconds": "counted seconds", "steps": "steps", "tokens": "tokens"}[track.scored_in]
    by_machine: dict[str, list[tuple[float, float, Row, int]]] = {}
    for one in standing:
        machine = one[2].hardware if track.scored_in == "seconds" else "record"
        by_machine.setdefault(machine, []).append(one)
    lines = [
        line
        for place, (machine, ones) in enumerate(by_machine.items())
        for line in _staircase(machine if len(by_machine) > 1 else "record", place, ones, now, unit)
    ]
    moments = [x for line in lines for x in line.x["time"]]
    scores = [y for line in lines for y in line.y]
    time_axis, title = _time_axis(min(moments), max(moments))
    views = {"time.near": (time_axis, _linear_axis(min(scores), max(scores), 5))}
    told = "; ".join(note for line in lines if line.mode == "steps" for note in line.notes[:20])
    return Chart(
        kind="history",
        title=f"Record history of track {track.name}",
        alternative=f"The best {unit} at the target as they fell with time: {told}.",
        x_names={"time": title},
        y_name=unit,
        views=views,
        lines=tuple(lines),
    )


def profiles_chart(profiles: Profiles) -> Chart:
    """AlgoPerf's performance profiles: for each preset the share of tracks within τ of the best, best score first."""
    names = by_score(profiles.scores)
    lines = [
        Line(clean(name, longest=40), index, {"tau": TAUS}, profiles.fractions[name], mode="steps")
        for index, name in enumerate(names)
    ]
    low, high = TAUS[0], TAUS[-1]
    told = "; ".join(
        f"{line.name}: {line.y[0]:.0%} at {low:g}, {line.y[-1]:.0%} at {high:g}, score {profiles.scores[name]:.4f}"
        for line, name in zip(lines, names)
    )
    return Chart(
        kind="profiles",
        title="Performance profiles",
        alternative=f"Share of tracks within τ times the best preset's time. {told}.",
        x_names={"tau": "τ: time over the best time"},
        y_name="share of tracks",
        views={
            "tau.near": (
                Axis(low, high, _round_ticks(low, high, 7)),
                Axis(0.0, 1.04, tuple((quarter / 4, f"{quarter / 4:.0%}") for quarter in range(5))),
            )
        },
        lines=tuple(lines),
    )


def by_score(scores: Mapping[str, float]) -> list[str]:
    """The names of some scores, the best first."""
    return sorted(scores, key=lambda name: (-scores[name], name))


def first_counted(runs: Sequence[Record], track: TrackView) -> float | None:
    """When (Unix seconds) the first runs of a row, oldest first, passed the track's rule; None if they never did."""
    for end in range(track.rule.n, len(runs) + 1):
        if judge(track.rule, final_losses(runs[:end]), track.target_val_loss).passes:
            return _moment(runs[end - 1])
    return None


def mean_curve(runs: Sequence[Record]) -> list[CurvePoint]:
    """The mean over seeds at every step that all of them hold, or that most of them do where there is none.

    Full runs alone, if there are any: others end early, and a mean over fewer and fewer seeds would jump.
    """
    by_step: dict[int, dict[int, list[ValidationPoint]]] = {}
    for record in _full_or_all(runs):
        for point in _drawable(record):
            by_step.setdefault(point.step, {}).setdefault(record.seed, []).append(point)
    most = max(map(len, by_step.values()), default=0)
    return [_mean_point(step, by_step[step]) for step in sorted(by_step) if len(by_step[step]) == most]


def _full_or_all(runs: Sequence[Record]) -> list[Record]:
    return [record for record in runs if is_full(record)] or list(runs)


def _drawable(record: Record) -> list[ValidationPoint]:
    return [point for point in record.validation if max(point) <= LARGEST]


def _drawn(point: ValidationPoint) -> tuple[int, float, float, float]:
    return point.step, float(point.tokens), point.train_seconds, point.val_loss


def _mean_point(step: int, by_seed: Mapping[int, Sequence[ValidationPoint]]) -> CurvePoint:
    losses = [mean([point.val_loss for point in points]) for points in by_seed.values()]
    return CurvePoint(
        step,
        mean([mean([point.tokens for point in points]) for points in by_seed.values()]),
        mean([mean([point.train_seconds for point in points]) for points in by_seed.values()]),
        mean(losses),
        min(losses),
        max(losses),
    )


def thinned(points: Sequence[CurvePoint], target: float = 0.0) -> list[CurvePoint]:
    """At most about `MOST_POINTS` of the points: evenly spread, with the first, crossing, best and last."""
    if len(points) <= MOST_POINTS:
        return list(points)
    last = len(points) - 1
    keep = {round(index * last / (MOST_POINTS - 1)) for index in range(MOST_POINTS)}
    keep.add(min(range(len(points)), key=lambda index: points[index].loss))
    keep.update([next((index for index, point in enumerate(points) if point.loss <= target), last)])
    return [points[index] for index in sorted(keep)]


def _curve_line(name: str, mark: int, points: Sequence[CurvePoint], seeds: int) -> Line:
    x = {
        "seconds": [point.seconds for point in points],
        "steps": [float(point.step) for point in points],
        "tokens": [point.tokens for point in points],
    }
    low, high = [point.low for point in points], [point.high for point in points]
    return Line(
        name,
        mark,
        x,
        [point.loss for point in points],
        low if seeds > 1 else (),
        high if seeds > 1 else (),
        seeds=seeds,
    )


def _told(line: Line, target: float) -> str:
    """One line in words: where it begins, where it ends, and when it first is at the target."""
    seconds, losses = line.x["seconds"], line.y
    crossing = next((index for index, loss in enumerate(losses) if loss <= target), None)
    end = (
        f"{line.name}: from {losses[0]:.3f} at {seconds[0]:.1f} s to {losses[-1]:.4f} at {seconds[-1]:.1f} s"
    )
    return end if crossing is None else f"{end}, under the target from {seconds[crossing]:.1f} s on"


def _loss_views(
    lines: Sequence[Line], keys: Sequence[str], target: float, ticks: int = 6, above: float = 0.06
) -> dict[str, tuple[Axis, Axis]]:
    """For each axis the whole of the lines, and the part near the target.

    Near: from below the lowest loss to somewhat above the target or the worst last loss, whichever is higher,
    so that the first fall from ln(vocabulary) does not press the rest flat; and from where a line first comes
    that low.
    """
    target = min(target, LARGEST)
    lowest = min(target, *(min(line.low or line.y) for line in lines))
    highest = max(target, *(max(line.high or line.y) for line in lines))
    ends = max(target, *((line.high or line.y)[-1] for line in lines))
    ceiling = min(highest, ends + max(0.6 * (ends - lowest), above * target))
    views = {}
    # Across there is room for more labels than down; the page leaves out those that do not fit.
    x_ticks = 2 * ticks if len(keys) > 1 else ticks
    for key in keys:
        last = max(max(line.x[key]) for line in lines)
        first = min(
            (x for line in lines for x, y in zip(line.x[key], line.low or line.y) if y <= ceiling),
            default=0.0,
        )
        views[f"{key}.near"] = (
            _linear_axis(0.0 if first < 0.2 * last else first, last, x_ticks, pad=0.02, floor=0.0),
            _linear_axis(lowest, ceiling, ticks, floor=0.0),
        )
        views[f"{key}.whole"] = (
            _linear_axis(0.0, last, x_ticks, pad=0.02, floor=0.0),
            _linear_axis(lowest, highest, ticks, floor=0.0),
        )
    return views


def _score(row: Row, track: TrackView) -> float | None:
    return {"seconds": row.seconds_mean, "steps": row.steps_mean, "tokens": row.tokens_mean}[track.scored_in]


def _moment(record: Record) -> float:
    return datetime.datetime.fromisoformat(record.created).timestamp()


def _staircase(
    machine: str, place: int, standing: Sequence[tuple[float, float, Row, int]], now: float, unit: str
) -> Iterator[Line]:
    """The falling line of one machine, and dots for the rows that count and were no record when they came."""
    records: list[tuple[float, float, Row, int]] = []
    others: list[tuple[float, float, Row, int]] = []
    for one in standing:
        (others if records and one[1] >= records[-1][1] else records).append(one)
    notes = [_standing_note(one, unit) for one in records]
    labels = [f"{clean(one[2].name, longest=24)} {_short_score(one[1], unit)}" for one in records]
    times, scores = [one[0] for one in records], [one[1] for one in records]
    if now > times[-1]:
        times, scores = [*times, now], [*scores, scores[-1]]
    yield Line(clean(machine), place, {"time": times}, scores, mode="steps", notes=notes, labels=labels)
    if others:
        yield Line(
            "also counts" if machine == "record" else f"{clean(machine)}, also counts",
            place,
            {"time": [one[0] for one in others]},
            [one[1] for one in others],
            mode="dots",
            notes=[_standing_note(one, unit) for one in others],
        )


def _standing_note(one: tuple[float, float, Row, int], unit: str) -> str:
    moment, score, row, _ = one
    when = datetime.datetime.fromtimestamp(moment, datetime.UTC)
    what = _short_score(score, unit) if unit == "counted seconds" else f"{score:,.0f} {unit}"
    return f"{clean(row.name, longest=40)}: {what} ({when:%Y-%m-%d %H:%M} UTC)"


def _short_score(score: float, unit: str) -> str:
    return f"{score:,.1f} s" if unit == "counted seconds" else f"{score:,.0f}"


def _linear_axis(low: float, high: float, count: int, pad: float = 0.06, floor: float | None = None) -> Axis:
    """A range a little wider than [low, high], never below `floor`, with about `count` round ticks."""
    alike = high - low <= 1e-9 * max(1.0, abs(high))
    room = (abs(high) * 0.05 if abs(high) > 1e-3 else 1.0) if alike else (high - low) * pad
    start = low - room if floor is None or low > floor else low
    start = start if floor is None else max(floor, start)
    return Axis(start, high + room, _round_ticks(start, high + room, count))


def _round_ticks(low: float, high: float, count: int) -> Ticks:
    ticks = scales.Axis(low, high).ticks(count)
    return tuple(zip(ticks, scales.tick_labels(ticks)))


_MINUTE, _HOUR, _DAY = 60, 3600, 86400
_TIME_STEPS = (
    *(n * _MINUTE for n in (1, 5, 15, 30)),
    *(n * _HOUR for n in (1, 3, 6, 12)),
    *(n * _DAY for n in (1, 2, 7, 14)),
)
_MONTH_STEPS = (1, 3, 6, 12, 24, 60, 120, 600, 1200, 12000)


def _time_axis(first: float, last: float) -> tuple[Axis, str]:
    """The range of some moments with ticks at round times of UTC, and the axis' title."""
    room = (last - first) * 0.05 or 0.5 * _HOUR
    low, high = first - room, last + room
    earliest = datetime.datetime(1, 1, 1, tzinfo=datetime.UTC).timestamp()
    low = max(low, earliest)
    high = min(high, datetime.datetime(9999, 12, 31, tzinfo=datetime.UTC).timestamp())
    step = next((one for one in _TIME_STEPS if (high - low) / one <= 6), None)
    if step is None:
        return Axis(low, high, _month_ticks(low, high)), "day of the record, UTC"
    moments = [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]
    dates = [datetime.datetime.fromtimestamp(moment, datetime.UTC) for moment in moments]
    if step >= _DAY:
        ticks = tuple((float(m), f"{d.day} {MONTHS[d.month - 1]}") for m, d in zip(moments, dates))
        return Axis(low, high, ticks), f"day of the record, {_years(first, last)}, UTC"
    day, last_day = (datetime.datetime.fromtimestamp(one, datetime.UTC).date() for one in (first, last))
    if day == last_day:
        ticks = tuple((float(m), f"{d:%H:%M}") for m, d in zip(moments, dates))
        return Axis(low, high, ticks), f"time on {day.isoformat()}, UTC"
    ticks = tuple(
        (float(m), f"{d:%H:%M}" if d.hour or d.minute else f"{d.day} {MONTHS[d.month - 1]}")
        for m, d in zip(moments, dates)
    )
    return Axis(low, high, ticks), f"time of the record, {day.isoformat()} to {last_day.isoformat()}, UTC"


def _years(first: float, last: float) -> str:
    years = [datetime.datetime.fromtimestamp(one, datetime.UTC).year for one in (first, last)]
    return str(years[0]) if years[0] == years[1] else f"{years[0]} to {years[1]}"


def _month_ticks(low: float, high: float) -> Ticks:
    """The first days of months, as many as fit."""
    months = (high - low) / (30.4 * _DAY)
    every = next((one for one in _MONTH_STEPS if months / one <= 6), _MONTH_STEPS[-1])
    start = datetime.datetime.fromtimestamp(low, datetime.UTC)
    index = math.ceil((start.year * 12 + start.month - 1) / every) * every
    ticks: list[tuple[float, str]] = []
    while index // 12 <= 9999 and len(ticks) < 12:
        first = datetime.datetime(max(1, index // 12), index % 12 + 1, 1, tzinfo=datetime.UTC)
        if first.timestamp() > high:
            break
        if first.timestamp() >= low:
            label = str(first.year) if every >= 12 else f"{MONTHS[first.month - 1]} {first.year}"
            ticks.append((first.timestamp(), label))
        index += every
    return tuple(ticks)


def to_json(chart: Chart) -> dict[str, Any]:
    """The chart as the page's script reads it, numbers in seven digits."""
    return {
        "kind": chart.kind,
        "x": dict(chart.x_names),
        "y": chart.y_name,
        "views": {key: [_axis_json(x), _axis_json(y)] for key, (x, y) in chart.views.items()},
        "target": chart.target,
        "lines": [line_json(line) for line in chart.lines],
    }


def views_json(views: Mapping[str, tuple[Axis, Axis]]) -> dict[str, Any]:
    """Ranges as the page's script reads them."""
    return {key: [_axis_json(x), _axis_json(y)] for key, (x, y) in views.items()}


def line_json(line: Line) -> dict[str, Any]:
    """A line as the page's script reads it; what is empty is left out."""
    content: dict[str, Any] = {
        "name": line.name,
        "mark": line.mark,
        "mode": line.mode,
        "x": {key: _short(values) for key, values in line.x.items()},
        "y": _short(line.y),
    }
    bands = {"low": _short(line.low), "high": _short(line.high)}
    texts = {"notes": list(line.notes), "labels": list(line.labels)}
    extra: dict[str, Any] = {**bands, **texts, "seeds": line.seeds}
    return content | {key: value for key, value in extra.items() if value}


def _axis_json(axis: Axis) -> list[Any]:
    return [axis.low, axis.high, [[value, label] for value, label in axis.ticks]]


def _short(values: Iterable[float]) -> list[float]:
    """Numbers in ten digits, whole ones without a point: a few bytes each, and no time or loss is moved."""
    rounded = (float(f"{value:.10g}") for value in values)
    return [int(value) if value.is_integer() else round(value, 6) for value in rounded]


@dataclasses.dataclass(frozen=True)
class Still:
    """A chart drawn once, in the coordinates of its viewBox."""

    width: int
    height: int
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    bands: list[tuple[int, str]]
    """Mark and path of each."""
    paths: list[tuple[int, str]]
    dots: list[tuple[int, float, float]]
    labels: list[tuple[float, float, str]]
    target_y: float | None


def still(chart: Chart) -> Still:
    """The chart as it first is, for readers without JavaScript and for the moment before it runs."""
    axis = next(iter(chart.x_names))
    x_axis, y_axis = chart.views[f"{axis}.near"]

    def across(value: float) -> float:
        share = (value - x_axis.low) / (x_axis.high - x_axis.low)
        return round(LEFT + share * (STILL_WIDTH - LEFT - RIGHT), 1)

    def down(value: float) -> float:
        share = (value - y_axis.low) / (y_axis.high - y_axis.low)
        return round(STILL_HEIGHT - BOTTOM - share * (STILL_HEIGHT - TOP - BOTTOM), 1)

    found = Still(STILL_WIDTH, STILL_HEIGHT, [], [], [], [], [], [], None)
    found.x_ticks.extend((across(value), label) for value, label in x_axis.ticks)
    found.y_ticks.extend((down(value), label) for value, label in y_axis.ticks)
    for line in chart.lines[: SHOWN_AT_FIRST if chart.kind == "curves" else None]:
        places = [(across(x), down(y)) for x, y in zip(line.x[axis], line.y)]
        if line.low:
            low = [(across(x), down(y)) for x, y in zip(line.x[axis], line.low)]
            high = [(across(x), down(y)) for x, y in zip(line.x[axis], line.high)]
            found.bands.append((line.mark, _path([*low, *reversed(high)]) + "Z"))
        if line.mode != "dots":
            found.paths.append((line.mark, _path(places, stepped=line.mode == "steps")))
        if line.mode == "dots" or (chart.kind != "profiles" and len(places) <= 20):
            drawn = places[: len(line.notes)] if line.notes else places
            found.dots.extend((line.mark, x, y) for x, y in drawn)
        found.labels.extend((x, y, text) for (x, y), text in zip(places, line.labels))
    target_y = None if chart.target is None or not chart.target <= LARGEST else down(chart.target)
    return dataclasses.replace(found, target_y=target_y)


def _path(places: Sequence[tuple[float, float]], stepped: bool = False) -> str:
    """An SVG path through the places."""
    parts = [f"M{places[0][0]:g} {places[0][1]:g}"]
    for x, y in places[1:]:
        parts.append(f"H{x:g}V{y:g}" if stepped else f"L{x:g} {y:g}")
    return "".join(parts)
