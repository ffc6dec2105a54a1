"""The table of a track's imports: what foreign logs say, apart from what was measured here, and without ranks."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from nanorun.records.grouping import LoggedGroup, group_logged_runs, mean_text, seconds_text
from nanorun.records.imported import ImportedRun
from nanorun.records.record import Skipped
from nanorun.records.report import SHOWN_SKIPS, clean, markdown_text, moment

if TYPE_CHECKING:
    from rich.console import Console

TITLE = "imported logs (claims of others; nothing here was measured by nanorun)"
TITLES = ("name", "steps", "hardware", "code", "n", "final loss", "seconds", "claimed", "date")
NUMBERS = ("n", "final loss", "seconds", "claimed")


@dataclasses.dataclass(frozen=True)
class ImportedRow:
    """Imports of one configuration on one machine; means are over the complete ones alone."""

    name: str
    """That of the first of them."""
    total_steps: int | None
    hardware: str
    source_sha256: str | None
    n: int
    """Complete runs."""
    left_out: int
    """Runs that ended before the declared last step."""
    loss_mean: float | None
    loss_std: float | None
    seconds_mean: float | None
    """By the logs' own clocks."""
    claimed_seconds: tuple[float, ...]
    """Each claim once."""
    date: str
    """Day of the latest."""
    ids: tuple[str, ...]
    steps: str
    """`total_steps` in words."""


@dataclasses.dataclass(frozen=True)
class ImportedTable:
    """All imports of a track, and what has to be said about them."""

    rows: tuple[ImportedRow, ...]
    notes: tuple[str, ...]
    skipped: tuple[Skipped, ...]
    filtered_out: int
    """Imports of this track that `hardware` and `since` left out."""


def build_imported_table(
    track: str,
    imports: Iterable[ImportedRun],
    *,
    skipped: Iterable[Skipped] = (),
    hardware: str | None = None,
    since: str | None = None,
) -> ImportedTable:
    """Return the table of a track's imports, the soonest first; the filters are those of `build_table`."""
    start = moment(since)
    pairs = [(one, one.to_logged_run()) for one in imports if one.track == track]
    groups = group_logged_runs(run for one, run in pairs if start is None or _end_of_day(one.date) >= start)
    kept = [group for group in groups if hardware is None or hardware.lower() in group.hardware.lower()]
    by_run = {id(run): one for one, run in pairs}
    rows = [_row(group, [by_run[id(run)] for run in group.runs]) for group in kept]
    rows.sort(key=lambda row: (row.seconds_mean is None, row.seconds_mean or 0.0, row.name))
    notes = tuple(note for row in rows for note in _notes(row))
    n_kept = sum(len(group.runs) for group in kept)
    return ImportedTable(tuple(rows), notes, tuple(skipped), len(pairs) - n_kept)


def _end_of_day(date: str) -> datetime.datetime:
    return datetime.datetime.fromisoformat(f"{date}T23:59:59+00:00")


def _row(group: LoggedGroup, imports: Sequence[ImportedRun]) -> ImportedRow:
    claims = {one.claimed_seconds for one in imports if one.claimed_seconds is not None}
    return ImportedRow(
        name=imports[0].name,
        total_steps=group.key.total_steps,
        hardware=group.hardware,
        source_sha256=group.key.source_sha256,
        n=len(group.complete),
        left_out=group.left_out,
        loss_mean=group.mean_loss,
        loss_std=group.std_loss,
        seconds_mean=group.seconds_mean,
        claimed_seconds=tuple(sorted(claims)),
        date=max(one.date for one in imports),
        ids=tuple(one.id for one in imports),
        steps=group.steps,
    )


def _notes(row: ImportedRow) -> Iterable[str]:
    if row.left_out:
        runs = row.n + row.left_out
        yield (
            f"{row.name}: {row.left_out} of {runs} run{'s' if runs > 1 else ''} ended before the declared last "
            "step; no mean includes it"
        )
    if len(row.claimed_seconds) > 1:
        yield f"{row.name}: its runs were imported with {len(row.claimed_seconds)} different claims"


def to_dict(table: ImportedTable) -> dict[str, Any]:
    """The table as JSON has it; a number that does not exist is null."""
    return {
        "rows": [
            {key: value for key, value in dataclasses.asdict(row).items() if key != "steps"}
            for row in table.rows
        ],
        "notes": list(table.notes),
        "skipped": [{"path": str(path), "why": why} for path, why in table.skipped],
        "filtered_out": table.filtered_out,
    }


def to_markdown(table: ImportedTable) -> str:
    """The table as GitHub's Markdown; an empty text where there is nothing to tell."""
    lines = []
    if table.rows:
        lines = [f"#### {markdown_text(TITLE)}", "", f"| {' | '.join(TITLES)} |", "|" + "---|" * len(TITLES)]
        lines += [f"| {' | '.join(map(markdown_text, row_texts(row)))} |" for row in table.rows]
        lines.append("")
    lines += [f"- {markdown_text(line, longest=400)}" for line in lines_under(table)]
    return "\n" + "\n".join(lines) + "\n" if lines else ""


def print_imported(table: ImportedTable, console: Console) -> None:
    """Print the table for people, or nothing where there is nothing to tell."""
    from nanorun.records.terminal import print_grid, say

    if table.rows:
        say(console, TITLE, "bold")
        print_grid(console, TITLES, [row_texts(row) for row in table.rows], left=(*TITLES[:4], "date"))
    for line in lines_under(table):
        say(console, line, "yellow" if line.startswith("skipped ") else "dim")


def row_texts(row: ImportedRow) -> list[str]:
    """The cells of a row, one for each of `TITLES`."""
    return [
        clean(row.name, longest=32),
        row.steps,
        clean(row.hardware),
        row.source_sha256[:8] if row.source_sha256 else "-",
        str(row.n),
        mean_text(row.loss_mean, row.loss_std),
        seconds_text(row.seconds_mean),
        ", ".join(f"{claim:g}" for claim in row.claimed_seconds) or "-",
        row.date,
    ]


def lines_under(table: ImportedTable) -> Iterable[str]:
    """What has to be said under the rows, in every form for people."""
    yield from table.notes
    for path, why in table.skipped[:SHOWN_SKIPS]:
        yield f"skipped {path}: {why}"
    if len(table.skipped) > SHOWN_SKIPS:
        yield f"skipped {len(table.skipped) - SHOWN_SKIPS} more; --json names them all"
