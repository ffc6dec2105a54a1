"""Times to a target, for the score: from a CSV file that anyone may have written, or from our own records."""

from __future__ import annotations

import csv
import io
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from nanorun.errors import UserError
from nanorun.records.record import Record
from nanorun.records.report import TrackView, crossing_of, ranked_groups, why_not_its_corpus

COLUMNS = ("submission", "workload", "seconds")
OPTIONAL = ("study", "budget")
MAX_BYTES = 64_000_000
MAX_SECONDS = 1e12
BUDGET_FACTOR = {"external": 1.0, "self": 3.0}
"""Times the given budget: self-tuning gets three times as long, because it tunes on the clock."""
_NUMBER = re.compile(r"[0-9]{1,30}(\.[0-9]{0,30})?([eE][+-]?[0-9]{1,3})?")


@dataclass(frozen=True)
class Timing:
    """One row of a file of times."""

    line: int
    submission: str
    workload: str
    seconds: float
    """Infinite where the target was not reached."""
    study: str | None = None
    budget: float | None = None
    """Seconds that the external ruleset gives this workload."""


@dataclass(frozen=True)
class Studied:
    """Medians over studies, and how many studies they are medians of."""

    times: dict[str, dict[str, float]]
    """Submission, then workload, to seconds; infinite for a miss."""
    n_studies: dict[str, dict[str, int]]
    notes: tuple[str, ...] = ()


def read_timings(path: Path) -> list[Timing]:
    """Return the rows of a CSV file, `-` for stdin; raises UserError with the line and the mend."""
    where = "stdin" if str(path) == "-" else str(path)
    try:
        if str(path) == "-":
            content = sys.stdin.buffer.read(MAX_BYTES + 1)
        else:
            with open(path, "rb") as file:
                content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(
            f"{where}: cannot be read ({error.strerror or error}); wanted a CSV file with the columns "
            f"{', '.join(COLUMNS)}"
        ) from None
    except ValueError as error:
        raise UserError(f"{where!r}: is no file's name ({error})") from None
    return parse_timings(content, where)


def parse_timings(content: bytes, where: str) -> list[Timing]:
    """Return the rows of a CSV file's content; raises UserError with `where`, the line and the mend."""
    if len(content) > MAX_BYTES:
        raise UserError(f"{where}: has more than {MAX_BYTES:,} bytes; wanted one line for each study")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{where}, line {line}: is not UTF-8; save it as CSV in UTF-8") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    timings: list[Timing] = []
    columns: dict[str, int] | None = None
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if columns is None:
                columns = _columns(cells, where)
            else:
                timings.append(_timing(cells, columns, f"{where}, line {reader.line_num}", reader.line_num))
    except csv.Error as error:
        raise UserError(
            f"{where}, line {reader.line_num}: is no CSV ({error}); mend the quotes there"
        ) from None
    if not timings:
        raise UserError(
            f"{where}: holds no times; wanted a header {','.join(COLUMNS)} and a line for each study"
        )
    return timings


def _columns(cells: Sequence[str], where: str) -> dict[str, int]:
    """Column to place, from the header."""
    names = [cell.strip() for cell in cells]
    for name in (*COLUMNS, *OPTIONAL):
        if names.count(name) > 1:
            raise UserError(f"{where}: the header has two columns {name!r}; leave one out")
        if name in COLUMNS and name not in names:
            found = ", ".join(repr(one[:40]) for one in names[:10])
            raise UserError(
                f"{where}: the header has no column {name!r}; it has {found}, and the columns wanted are "
                f"{', '.join(COLUMNS)} (and study and budget, if you have them), split by commas"
            )
    return {name: names.index(name) for name in (*COLUMNS, *OPTIONAL) if name in names}


def _timing(cells: Sequence[str], columns: Mapping[str, int], where: str, line: int) -> Timing:
    if len(cells) <= max(columns.values()):
        raise UserError(
            f"{where}: has {len(cells)} cells, fewer than the header; an unreached target is an empty cell"
        )
    values = {name: cells[place].strip() for name, place in columns.items()}
    for name in ("submission", "workload"):
        if not values[name]:
            raise UserError(f"{where}: the {name} is empty; name it")
    seconds = _positive(values["seconds"], f"{where}: seconds")
    budget = _positive(values.get("budget", ""), f"{where}: budget")
    return Timing(
        line,
        values["submission"],
        values["workload"],
        math.inf if seconds is None else seconds,
        values.get("study") or None,
        budget,
    )


def _positive(text: str, what: str) -> float | None:
    """The number in a cell; None where the cell is empty."""
    if not text:
        return None
    number = float(text) if _NUMBER.fullmatch(text) else math.nan
    if not 0 < number <= MAX_SECONDS:
        shown = text if len(text) <= 40 else f"{text[:37]}..."
        raise UserError(
            f"{what} is {shown!r}; wanted a number above 0 and up to {MAX_SECONDS:g}, or an empty cell where the "
            "target was not reached"
        )
    return number


def medians(timings: Sequence[Timing], ruleset: str) -> Studied:
    """Return the median over the studies of each submission on each workload, a miss counted as infinite.

    Rows that name one study are its trials: of `external` the fastest counts, `self` has one trial a study.
    Rows without a study are studies of their own. A time above the budget is a miss, above three times the
    budget for `self`.
    """
    budgets = _budgets(timings)
    studies: dict[tuple[str, str], dict[str, float]] = {}
    for timing in timings:
        budget = budgets.get(timing.workload, math.inf) * BUDGET_FACTOR[ruleset]
        seconds = timing.seconds if timing.seconds <= budget else math.inf
        found = studies.setdefault((timing.submission, timing.workload), {})
        study = f"line {timing.line}" if timing.study is None else f"study {timing.study}"
        if study in found and ruleset == "self":
            raise UserError(
                f"line {timing.line}: a second trial of {study} of {timing.submission!r} on {timing.workload!r}; "
                "self-tuning takes one trial a study, so name another study or leave it out"
            )
        found[study] = min(seconds, found.get(study, math.inf))
    times: dict[str, dict[str, float]] = {}
    n_studies: dict[str, dict[str, int]] = {}
    for (submission, workload), found in studies.items():
        times.setdefault(submission, {})[workload] = float(median(found.values()))
        n_studies.setdefault(submission, {})[workload] = len(found)
    return Studied(times, n_studies)


def _budgets(timings: Sequence[Timing]) -> dict[str, float]:
    """Workload to its budget; raises UserError where two rows disagree."""
    found: dict[str, Timing] = {}
    for timing in timings:
        if timing.budget is None:
            continue
        first = found.setdefault(timing.workload, timing)
        if first.budget != timing.budget:
            raise UserError(
                f"line {timing.line}: the budget of {timing.workload!r} is {timing.budget:g} seconds, and line "
                f"{first.line} says {first.budget:g}; a workload has one budget"
            )
    return {workload: timing.budget for workload, timing in found.items() if timing.budget is not None}


def of_records(tracks: Sequence[TrackView], records: Sequence[Record], *, hardware: str | None) -> Studied:
    """Return the first crossings of our own records: presets as submissions, tracks as workloads, seeds as studies.

    Of a preset with several rows in a track, the first of the track's table counts, and a note says so. Raises
    UserError where there are no records, or records of several machines.
    """
    wanted = {track.name for track in tracks}
    kept = [
        record
        for record in records
        if record.track in wanted and (hardware is None or hardware.lower() in record.hardware.label.lower())
    ]
    _check_one_machine(kept)
    times: dict[str, dict[str, float]] = {}
    n_studies: dict[str, dict[str, int]] = {}
    notes = []
    for track in tracks:
        groups: dict[str, list[Sequence[Record]]] = {}
        for row, group in ranked_groups(track, kept):
            if mixed := why_not_its_corpus(group[0], track):
                notes.append(f"{row.name} on {track.name} is left out: {mixed}")
            else:
                groups.setdefault(row.preset, []).append(group)
        if not groups:
            raise UserError(
                f"no records of track {track.name!r}"
                + (f" on hardware with {hardware!r}" if hardware else "")
                + f"; make one: nanorun train --track {track.name}"
            )
        for preset, rows in groups.items():
            seconds = list(_seconds_of_seeds(rows[0], track.target_val_loss))
            times.setdefault(preset, {})[track.name] = float(median(seconds))
            n_studies.setdefault(preset, {})[track.name] = len(seconds)
            if len(rows) > 1:
                notes.append(f"{preset} on {track.name}: the first of {len(rows)} rows of its table")
    return Studied(times, n_studies, tuple(notes))


def _check_one_machine(records: Sequence[Record]) -> None:
    machines = sorted({record.hardware.label for record in records})
    if len(machines) > 1:
        raise UserError(
            f"the records are of {len(machines)} machines, whose seconds don't compare: {'; '.join(machines[:10])}; "
            "choose one with --hardware and a part of its name that the others lack"
        )


def _seconds_of_seeds(group: Sequence[Record], target: float) -> Iterator[float]:
    """For each seed the mean of its first crossings, infinite where a finished run of it never crossed."""
    by_seed: dict[int, list[float]] = {}
    for record in group:
        crossing = crossing_of(record, target)
        runs = by_seed.setdefault(record.seed, [])
        if crossing is not None:
            runs.append(crossing[1])
        elif record.completed:
            runs.append(math.inf)
    for seed in sorted(by_seed):
        runs = by_seed[seed]
        yield sum(runs) / len(runs) if runs else math.inf
