"""report as a person asks for it: one track or all, in one of the forms."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.console import Console

from nanorun.errors import UserError, printable
from nanorun.records import imported_table
from nanorun.records.imported import ImportedRun, read_imported
from nanorun.records.record import Record, Skipped, read_records
from nanorun.records.report import (
    Table,
    TrackView,
    build_table,
    next_command,
    print_terminal,
    to_csv,
    to_dict,
    to_markdown,
)
from nanorun.records.states import State, states_of
from nanorun.tracks import DEFAULT_TRACK, load_track, preset_names, track_names


def report_text(
    root: Path, *, track: str | None, form: str, since: str | None, hardware: str | None, console: Console
) -> str:
    """Return the report of one track, or of every track that has records under `root`.

    `form` is `table` (for this console), `markdown`, `csv`, `json` or `html`.
    """
    records, skipped = read_records(root, track)
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
        return _page(tables, states)
    if form == "csv":
        if len(tables) > 1:
            raise UserError(f"one CSV holds one track, and {', '.join(names)} have records: add --track NAME")
        for path, why in tables[0].skipped + foreign[0].skipped:
            _aside(f"skipped {path}: {why}")
        if foreign[0].rows:
            _aside("imported logs are left out of the CSV; --format json has them")
        return to_csv(tables[0])
    if form == "markdown":
        return "\n".join(
            to_markdown(table) + imported_table.to_markdown(other) for table, other in zip(tables, foreign)
        )
    place = "" if root == Path("records") else f" --records {root}"
    with console.capture() as captured:
        for table, other in zip(tables, foreign):
            print_terminal(table, console)
            if table.rows:
                presets = preset_names(load_track(table.track.name))
                console.print(
                    f"next: {next_command(table, presets, place)}", style="dim", markup=False, highlight=False
                )
            imported_table.print_imported(other, console)
    return captured.get()


def _page(tables: list[Table], states: dict[str, State]) -> str:
    """The HTML page of some tables: first those with a result, the default track before others."""
    from nanorun.records.page import render_page

    order = sorted(
        tables, key=lambda one: (not any(row.counts for row in one.rows), one.track.name != DEFAULT_TRACK)
    )
    return render_page(
        order,
        summaries={one.track.name: load_track(one.track.name).summary for one in tables},
        states={record: (state.name, state.describe()) for record, state in states.items()},
    )


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
