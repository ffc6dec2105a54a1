"""report as a person asks for it: one track or all, in one of the forms."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from nanorun.errors import UserError
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
from nanorun.tracks import DEFAULT_TRACK, load_track, preset_names, track_names


def report_text(
    root: Path, *, track: str | None, form: str, since: str | None, hardware: str | None, console: Console
) -> str:
    """Return the report of one track, or of every track that has records under `root`.

    `form` is `table` (for this console), `markdown`, `csv` or `json`.
    """
    records, skipped = read_records(root, track)
    with_records = {record.track for record in records}
    names = [track] if track else [name for name in track_names() if name in with_records] or [DEFAULT_TRACK]
    tables = [_table(name, records, skipped, since, hardware) for name in names]
    if form == "json":
        documents = [to_dict(table) for table in tables]
        whole = documents[0] if track else {"tracks": documents}
        return json.dumps(whole, indent=1, allow_nan=False) + "\n"
    if form == "csv":
        if len(tables) > 1:
            raise UserError(f"one CSV holds one track, and {', '.join(names)} have records: add --track NAME")
        return to_csv(tables[0])
    if form == "markdown":
        return "\n".join(to_markdown(table) for table in tables)
    with console.capture() as captured:
        for table in tables:
            print_terminal(table, console)
            if table.rows:
                presets = preset_names(load_track(table.track.name))
                console.print(
                    f"next: {next_command(table, presets)}", style="dim", markup=False, highlight=False
                )
    return captured.get()


def _table(
    name: str, records: list[Record], skipped: list[Skipped], since: str | None, hardware: str | None
) -> Table:
    of_track = [one for one in skipped if one.path.parent.name == name]
    return build_table(
        TrackView.of(load_track(name)), records, hardware=hardware, since=since, skipped=of_track
    )
