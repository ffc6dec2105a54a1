"""Loss curves of a table's rows: a mean over seeds with the band from the lowest seed to the highest."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nanorun.errors import UserError
from nanorun.records.record import Record, RecordError, ValidationPoint, read_record
from nanorun.records.report import Table, empty_line
from nanorun.records.scales import Series
from nanorun.records.significance import mean

if TYPE_CHECKING:
    from rich.console import Console

X_LABELS = {"seconds": "training seconds", "steps": "steps", "tokens": "training tokens"}
Y_LABEL = "validation loss, nats a token"
MOST_IN_PICTURE = 24
MOST_IN_TERMINAL = 6
MOST_READ_UNASKED = 300
"""Records whose curves are read for the terminal where nobody asked for curves: about a quarter of a second."""


def row_series(name: str, records: Sequence[Record], x: str) -> Series | None:
    """Return the curve of runs that differ in their seeds alone; None where they have no point in common.

    Only runs that got to their declared last step are averaged, where there are any, and only steps at which each of
    them has a reading, so that no mean is over fewer runs than the next. `x` is `seconds`, `steps` or `tokens`;
    seconds are means as well. A seed that ran several times counts once, by its mean.
    """
    runs = [record for record in records if record.completed] or list(records)
    runs = [record for record in runs if record.validation]
    readings = [{point.step: point for point in record.validation} for record in runs]
    common = set.intersection(*(set(one) for one in readings)) if readings else set()
    if not common:
        return None
    seeds: dict[int, list[dict[int, ValidationPoint]]] = {}
    for record, points in zip(runs, readings):
        seeds.setdefault(record.seed, []).append(points)

    def by_seed(step: int, value: Callable[[ValidationPoint], float]) -> list[float]:
        return [mean([value(points[step]) for points in same]) for same in seeds.values()]

    steps = sorted(common)
    place = {"seconds": lambda p: p.train_seconds, "steps": lambda p: p.step, "tokens": lambda p: p.tokens}[x]
    losses = [by_seed(step, lambda point: point.val_loss) for step in steps]
    return Series(
        name,
        [mean(by_seed(step, place)) for step in steps],
        [mean(of_seeds) for of_seeds in losses],
        low=[min(of_seeds) for of_seeds in losses],
        high=[max(of_seeds) for of_seeds in losses],
    )


def table_series(table: Table, root: Path, x: str, *, most: int) -> list[Series]:
    """Return the curves of the first `most` rows of a table of the records under `root`, best first.

    The curves come from the records' own files; one that is gone by now, or broken, is left out.
    """
    machines = {row.hardware for row in table.rows[:most]}
    found = []
    for row, group in list(zip(table.rows, table.runs))[:most]:
        records = []
        for one in group:
            try:
                records.append(read_record(root / table.track.name / one.id))
            except RecordError:
                continue
        name = f"{row.name}, {row.hardware}" if len(machines) > 1 else row.name
        series = row_series(name, records, x)
        if series is not None:
            found.append(series)
    return found


def to_svg(table: Table, root: Path, x: str | None) -> str:
    """Return loss against `x` (what the track is scored in, if None) as an SVG document."""
    from nanorun.records.svg import line_chart

    empty = empty_line(table)
    if empty:
        raise UserError(f"there is nothing to draw: {empty}")
    series = table_series(table, root, x or table.track.scored_in, most=MOST_IN_PICTURE)
    left_out = len(table.rows) - MOST_IN_PICTURE
    others = f", without the last {left_out} of {len(table.rows)} rows" if left_out > 0 else ""
    return line_chart(
        series,
        title=f"{table.track.name}: mean and range over seeds{others}",
        x_label=X_LABELS[x or table.track.scored_in],
        y_label=Y_LABEL,
        target=table.track.target_val_loss,
        target_label=f"target {table.track.target_val_loss:g}",
    )


def terminal_lines(table: Table, root: Path, x: str | None, console: Console, *, asked: bool) -> list[str]:
    """Return small curves of the first rows for this console; none where it can't draw them.

    Unless they were `asked` for, a table of very many runs is left without, because each run's file has to be read.
    """
    from nanorun.records.terminal_plot import marks_for, small_multiples

    marks = marks_for(console.encoding, os.environ.get("TERM"))
    n_records = sum(map(len, table.runs[:MOST_IN_TERMINAL]))
    if marks is None or not table.rows or not (asked or n_records <= MOST_READ_UNASKED):
        return []
    return small_multiples(
        table_series(table, root, x or table.track.scored_in, most=MOST_IN_TERMINAL),
        columns=console.width,
        marks=marks,
        x_label=X_LABELS[x or table.track.scored_in],
        y_label=f"{Y_LABEL} (dotted: {table.track.target_val_loss:g})",
        target=table.track.target_val_loss,
    )
