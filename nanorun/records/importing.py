"""import as a person asks for it: logs read, shown by group, and kept as imports that say no more than they do."""

from __future__ import annotations

import dataclasses
import datetime
import math
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanorun.errors import UserError
from nanorun.files import locked
from nanorun.records.grouping import LoggedGroup, group_logged_runs, mean_text, seconds_text
from nanorun.records.imported import ImportedRun, read_imported, run_sha256, write_imported
from nanorun.records.logs import LoggedRun, SkippedLog
from nanorun.records.reading import read_logs
from nanorun.tracks import load_track

if TYPE_CHECKING:
    from rich.console import Console

SHOWN_LINES = 10


@dataclasses.dataclass(frozen=True)
class ImportResult:
    """What was read, and what became of it."""

    runs: tuple[LoggedRun, ...]
    skipped: tuple[SkippedLog, ...]
    dry_run: bool
    written: tuple[Path, ...] = ()
    """Folders of new imports."""
    known: tuple[tuple[LoggedRun, str], ...] = ()
    """Runs that were imported before, each with the id it has."""

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON has it; null where the log does not say."""
        document: dict[str, Any] = {
            "runs": [_run_dict(run) for run in self.runs],
            "skipped": [one._asdict() for one in self.skipped],
        }
        if not self.dry_run:
            document["written"] = [str(folder) for folder in self.written]
            document["known"] = [{"file": run.file, "run": run.run, "id": id} for run, id in self.known]
        return document


def _run_dict(run: LoggedRun) -> dict[str, Any]:
    return {
        "file": run.file,
        "run": run.run,
        "first_val_step": run.points[0].step,
        "last_val_step": run.points[-1].step,
        "total_steps": run.total_steps,
        "complete": run.complete,
        "final_val_loss": run.final_val_loss,
        "train_seconds": run.train_seconds,
        "world_size": run.machine.world_size,
        "gpu": run.machine.gpu,
        "torch": run.machine.torch,
        "peak_memory_mib": run.machine.peak_memory_mib,
    }


def import_logs(
    paths: Sequence[Path],
    *,
    track: str | None,
    records: Path,
    dry_run: bool = False,
    claimed_seconds: float | None = None,
    now: datetime.datetime | None = None,
) -> ImportResult:
    """Return what the logs under `paths` hold, and unless `dry_run` leave an import of each run in `records`.

    A run that was imported before, under whatever name, is left as it is. `claimed_seconds` stand beside the
    log's own time in each import. Raises UserError for an unknown track or none to write to, a path that is
    not there, or a claim that is no time.
    """
    if track is not None:
        load_track(track)
    elif not dry_run:
        raise UserError(
            "--track is missing: say which competition the runs belong to, or add --dry-run to look"
        )
    if claimed_seconds is not None and not 0 < claimed_seconds < math.inf:
        raise UserError(f"--claimed-seconds {claimed_seconds}: wanted a finite number of seconds above 0")
    reading = read_logs(paths)
    result = ImportResult(reading.runs, reading.skipped, dry_run)
    if dry_run or track is None or not reading.runs:
        return result
    # Two imports of one log must not both find it new.
    with locked(records / track, on_wait=_say_who_imports):
        return _keep(result, track, records, claimed_seconds, now)


def _say_who_imports(holder: str) -> None:
    print(f"waiting for {holder}, which imports to the same track", file=sys.stderr)


def _keep(
    result: ImportResult,
    track: str,
    records: Path,
    claimed_seconds: float | None,
    now: datetime.datetime | None,
) -> ImportResult:
    """Return the result after leaving an import of each run that has none yet."""
    imports, _ = read_imported(records, track)
    ids = {one.run_sha256: one.id for one in imports}
    imported = (now or datetime.datetime.now(datetime.UTC)).strftime("%Y-%m-%dT%H:%M:%SZ")
    written, known = [], []
    for run in result.runs:
        id = ids.get(run_sha256(run))
        if id is not None:
            known.append((run, id))
            continue
        one = ImportedRun.of(
            run, track=track, name=_safe_name(run), imported=imported, claimed_seconds=claimed_seconds
        )
        written.append(write_imported(records, one, run))
        ids[one.run_sha256] = one.id
    return dataclasses.replace(result, written=tuple(written), known=tuple(known))


def _safe_name(run: LoggedRun) -> str:
    """The log's name as a word that is harmless in a path, and told apart where the file holds several runs."""
    place = f"-{run.run}" if run.run else ""
    stem = re.sub(r"[^a-z0-9._-]+", "-", Path(run.file).stem.lower())[: 60 - len(place)].strip("-.")
    return f"{stem or 'log'}{place}"


def print_terminal(result: ImportResult, console: Console) -> None:
    """Print the result for people: a line for each group of runs, then all that has to be known of them."""
    from nanorun.records.terminal import print_grid, say

    groups = group_logged_runs(result.runs)
    if groups:
        print_grid(console, TITLES, [group_cells(group) for group in groups], left=TITLES[:3])
    else:
        say(console, "no runs found")
    for line in notes_of(groups):
        say(console, line, "dim")
    _say_skipped(result.skipped, console)
    for run, id in result.known[:SHOWN_LINES]:
        say(console, f"{run.file}, run {run.run}: imported before as {id}", "dim")
    if len(result.known) > SHOWN_LINES:
        say(
            console,
            f"{len(result.known) - SHOWN_LINES} more were imported before; --json names them all",
            "dim",
        )
    if result.dry_run:
        say(console, f"{_count(len(result.runs), 'run')} found, nothing written (--dry-run)", "bold")
    else:
        where = f" under {result.written[0].parent}" if result.written else ""
        old = f", {len(result.known)} imported before" if result.known else ""
        say(console, f"{_count(len(result.written), 'import')} written{where}{old}", "bold")


def _say_skipped(skipped: Sequence[SkippedLog], console: Console) -> None:
    from nanorun.records.terminal import say

    for one in skipped[:SHOWN_LINES]:
        say(console, f"skipped {one.file}: {one.why}", "yellow")
    if len(skipped) > SHOWN_LINES:
        say(console, f"skipped {len(skipped) - SHOWN_LINES} more; --json names them all", "yellow")


TITLES = ("steps", "hardware", "code", "runs", "complete", "final loss", "seconds")


def group_cells(group: LoggedGroup) -> list[str]:
    """The texts of one group under TITLES; whoever prints them escapes them."""
    return [
        group.steps,
        group.hardware,
        group.key.source_sha256[:8] if group.key.source_sha256 else "-",
        str(len(group.runs)),
        str(len(group.complete)),
        mean_text(group.mean_loss, group.std_loss),
        seconds_text(group.seconds_mean),
    ]


def notes_of(groups: Sequence[LoggedGroup]) -> list[str]:
    """Return what the table's columns do not say: runs left out of means, and each kind of note once."""
    lines = [
        f"{group.label}: {_count(group.left_out, 'run')} of {len(group.runs)} ended before the declared last "
        "step, and no mean includes it"
        for group in groups
        if group.left_out
    ]
    lines += [
        f"{group.label}: the mean takes it on trust that {len(files)} files come from the same code"
        for group in groups
        if not group.key.source_sha256 and len(files := {run.file for run in group.complete}) > 1
    ]
    kinds: Counter[str] = Counter()
    example: dict[str, str] = {}
    for run in (run for group in groups for run in group.runs):
        for note in run.notes:
            kind = re.sub(r"[0-9]+(\.[0-9]+)?", "N", note)
            kinds[kind] += 1
            example.setdefault(kind, f"{Path(run.file).name}: {note}")
    lines += [
        f"{example[kind]}" + (f" (and so in {count - 1} more)" if count > 1 else "")
        for kind, count in kinds.most_common(SHOWN_LINES)
    ]
    if len(kinds) > SHOWN_LINES:
        lines.append(f"{len(kinds) - SHOWN_LINES} more kinds of notes; the imports hold them all")
    return lines


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
