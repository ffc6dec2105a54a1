"""report as a person asks for it: one track or all, in one of the forms."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

from nanorun.errors import UserError, printable
from nanorun.records import imported_table
from nanorun.records.curves import terminal_lines, to_svg
from nanorun.records.imported import ImportedRun, read_imported
from nanorun.records.index import indexed_records
from nanorun.records.record import Record, Skipped, read_records
from nanorun.records.report import (
    Table,
    TrackView,
    build_table,
    encodable,
    next_command,
    print_terminal,
    to_csv,
    to_dict,
    to_markdown,
)
from nanorun.records.states import State, states_of
from nanorun.tracks import DEFAULT_TRACK, load_track, preset_names, track_names


def report_text(
    root: Path,
    *,
    track: str | None,
    form: str,
    since: str | None,
    hardware: str | None,
    console: Console,
    x: str | None = None,
    curves: bool | None = False,
) -> str:
    """Return the report of one track, or of every track that has records under `root`.

    `form` is `table` (for this console), `markdown`, `csv`, `json`, `svg` or `html`. `x` is what curves run against,
    None for what the track is scored in; `curves` says whether the table has them under it, None for a terminal's
    alone.
    """
    # The page shows every record with its curve; a table does with what the index holds.
    records, skipped = (
        read_records(root, track) if form == "html" else indexed_records(root, track, target_of)
    )
    imports, unreadable = read_imported(root, track)
    held = {record.track for record in records} | {one.track for one in imports}
    held |= {one.path.parent.name for one in (*skipped, *unreadable)}
    known = track_names()
    names = [track] if track else [name for name in known if name in held] or [DEFAULT_TRACK]
    states = states_of(root, records)
    tables = [_table(name, records, skipped, since, hardware, states) for name in names]
    for name in sorted(held - set(known)) if track is None else []:
        _aside(f"{root / name} holds records of a track that is not here: add ./configs/{name}/track.toml")
    foreign = [_imported_table(name, imports, unreadable, since, hardware) for name in names]
    if form == "json":
        documents = [
            {**to_dict(table), "imported": imported_table.to_dict(other)}
            for table, other in zip(tables, foreign)
        ]
        whole = documents[0] if track else {"tracks": documents}
        return json.dumps(whole, indent=1, allow_nan=False) + "\n"
    if form == "html":
        return _page(tables, states, foreign)
    if form in ("csv", "svg"):
        if len(tables) > 1:
            what = form.upper()
            raise UserError(
                f"one {what} holds one track, and {', '.join(names)} have records: add --track NAME"
            )
        for path, why in tables[0].skipped + foreign[0].skipped:
            _aside(f"skipped {path}: {why}")
        if foreign[0].rows:
            _aside(f"imported logs are left out of the {form.upper()}; --format json has them")
        return to_csv(tables[0]) if form == "csv" else to_svg(tables[0], root, x)
    if form == "markdown":
        return "\n".join(
            to_markdown(table) + imported_table.to_markdown(other) for table, other in zip(tables, foreign)
        )
    with console.capture() as captured:
        for table, other in zip(tables, foreign):
            _print_table(table, root, console, x, curves)
            imported_table.print_imported(other, console)
    return captured.get()


def _page(tables: list[Table], states: dict[str, State], foreign: list[imported_table.ImportedTable]) -> str:
    """The HTML page of some tables: first those with a result, the default track before others."""
    from nanorun.records.page import render_page

    order = sorted(
        tables, key=lambda one: (not any(row.counts for row in one.rows), one.track.name != DEFAULT_TRACK)
    )
    return render_page(
        order,
        summaries={one.track.name: load_track(one.track.name).summary for one in tables},
        states={key: (state.name, state.describe()) for key, state in states.items()},
        imports={table.track.name: other for table, other in zip(tables, foreign)},
    )


def _print_table(table: Table, root: Path, console: Console, x: str | None, curves: bool | None) -> None:
    """Print one table for people, its curves where they are wanted, and the next command."""
    print_terminal(table, console)
    if console.is_terminal if curves is None else curves:
        for line in terminal_lines(table, root, x, console, asked=bool(curves)):
            console.print(Text(encodable(line, console.encoding)), no_wrap=True, overflow="crop")
    if table.rows:
        place = "" if root == Path("records") else f" --records {shlex.quote(str(root))}"
        command = next_command(table, preset_names(load_track(table.track.name)), place)
        console.print(f"next: {command}", style="dim", markup=False, highlight=False)


def target_of(track: str) -> float | None:
    """Return the target of a track that can be read; what is wrong with another is said where its table is made."""
    try:
        return load_track(track).target_val_loss
    except UserError:
        return None


def _aside(line: str) -> None:
    """Say what the form itself has no place for."""
    print(printable(line), file=sys.stderr)


def _imported_table(
    name: str, imports: list[ImportedRun], skipped: list[Skipped], since: str | None, hardware: str | None
) -> imported_table.ImportedTable:
    of_track = [one for one in skipped if one.path.parent.name == name]
    return imported_table.build_imported_table(
        name, imports, skipped=of_track, since=since, hardware=hardware
    )


def _table(
    name: str,
    records: list[Record],
    skipped: list[Skipped],
    since: str | None,
    hardware: str | None,
    states: dict[str, State],
) -> Table:
    of_track = [one for one in skipped if one.path.parent.name == name]
    return build_table(
        TrackView.of(load_track(name)),
        records,
        hardware=hardware,
        since=since,
        skipped=of_track,
        states=states,
    )
