"""What an import leaves behind: `records/<track>/<id>/import.json`, written once and read back strictly.

It is no record: nothing in it was measured here. It holds what a foreign log says of one run, and what its
submission claims, side by side and never mixed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from nanorun.errors import UserError
from nanorun.names import is_track_name
from nanorun.records.logs import LoggedMachine, LoggedPoint, LoggedRun
from nanorun.records.record import (
    FORMAT_VERSION,
    IMPORT_FILE,
    MAX_BYTES,
    RECORD_ID,
    RecordError,
    Skipped,
    check_version,
    holds_import,
    is_utc_time,
    layout_json,
    load_json,
    read_fields,
    record_id,
    track_folders,
    visible_folders,
    write_folder,
)

STATES = ("claimed",)
"""An import begins as a claim; whoever makes the run again writes a file of their own beside it."""


@dataclasses.dataclass(frozen=True)
class ImportedPoint:
    """One reading of the validation loss, in nats a token, with the seconds that the log's clock says."""

    step: int
    train_seconds: float | None
    val_loss: float


@dataclasses.dataclass(frozen=True)
class OtherLoss:
    """Readings of another validation loss, such as that of averaged weights."""

    name: str
    steps: tuple[int, ...]
    losses: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class ImportedLog:
    """The log that the run stands in; the file itself is not kept."""

    file: str
    """Its name, without folders."""
    sha256: str
    format: str
    run: int
    """Place in the file, from 0."""


@dataclasses.dataclass(frozen=True)
class ImportedRun:
    """One run of a foreign log; null is what the log does not say."""

    format_version: int
    id: str
    track: str
    name: str
    """The log's name without its ending, made safe."""
    state: str
    """One of STATES."""
    imported: str
    """When it was imported: ISO 8601 in UTC."""
    date: str
    """The day that the log says, or else that of the import."""
    date_is_of_import: bool
    log: ImportedLog
    run_sha256: str
    """Hash of the validations, the same for every copy of the run."""
    claimed_seconds: float | None
    """What the submission says the run takes."""
    train_seconds: float | None
    """What the log's clock says at the last validation."""
    total_steps: int | None
    last_step: int
    complete: bool
    """The last validation is that of the declared last step."""
    final_val_loss: float
    machine: LoggedMachine
    seed: int | None
    source_sha256: str | None
    source: str | None
    """`source.txt` where the log embeds its code; it is kept as text, and nothing runs it."""
    notes: tuple[str, ...]
    other_losses: tuple[OtherLoss, ...]
    validation: tuple[ImportedPoint, ...]
    validation_left_out: int = 0
    """Points that only curve.csv holds, because import.json would have grown too large."""

    @classmethod
    def of(
        cls, run: LoggedRun, *, track: str, name: str, imported: str, claimed_seconds: float | None
    ) -> ImportedRun:
        """Return what an import of `run` holds; `imported` is a time in UTC."""
        date = run.date or imported[:10]
        found = cls(
            format_version=FORMAT_VERSION,
            id="",
            track=track,
            name=name,
            state="claimed",
            imported=imported,
            date=date,
            date_is_of_import=run.date is None,
            log=ImportedLog(_file_name(run), run.file_sha256 or "", run.format, run.run),
            run_sha256=run_sha256(run),
            claimed_seconds=claimed_seconds,
            train_seconds=run.train_seconds,
            total_steps=run.total_steps,
            last_step=run.last_step,
            complete=run.complete,
            final_val_loss=run.final_val_loss,
            machine=run.machine,
            seed=run.seed,
            source_sha256=run.source_sha256,
            source=None if run.source is None else "source.txt",
            notes=run.notes,
            other_losses=tuple(
                OtherLoss(key, tuple(step for step, _ in values), tuple(loss for _, loss in values))
                for key, values in run.other_losses.items()
            ),
            validation=tuple(ImportedPoint(*point) for point in run.points),
        )
        return dataclasses.replace(found, id=record_id(date, name, dataclasses.asdict(found)))

    @classmethod
    def from_dict(cls, content: object) -> ImportedRun:
        """Return the import that `content` describes; it ignores keys it does not know. Raises RecordError."""
        check_version(content, "the import")
        found: ImportedRun = read_fields(cls, content)
        _check_sense(found)
        return found

    def to_logged_run(self) -> LoggedRun:
        """The run as its log told it, for all that takes logged runs; without its source."""
        return LoggedRun(
            file=self.log.file,
            run=self.log.run,
            format=self.log.format,
            points=tuple(LoggedPoint(p.step, p.train_seconds, p.val_loss) for p in self.validation),
            last_step=self.last_step,
            total_steps=self.total_steps,
            machine=self.machine,
            seed=self.seed,
            other_losses={one.name: tuple(zip(one.steps, one.losses)) for one in self.other_losses},
            source_sha256=self.source_sha256,
            notes=self.notes,
            date=None if self.date_is_of_import else self.date,
            file_sha256=self.log.sha256,
        )


def _file_name(run: LoggedRun) -> str:
    """The log's name as text that can be written down; a file system takes any bytes for a name."""
    return os.fsencode(Path(run.file).name).decode("utf-8", "replace")


def run_sha256(run: LoggedRun) -> str:
    """Return a hash of a run's format and validations, seconds included, as hex."""
    canonical = json.dumps([run.format, run.points], separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def write_imported(root: Path, imported: ImportedRun, run: LoggedRun) -> Path:
    """Return `<root>/<track>/<id>`, filled with import.json, curve.csv and any source.txt.

    All or nothing, and never over anything that is there. Raises UserError.
    """
    files = {IMPORT_FILE: _fitting_json(imported), "curve.csv": _curve_csv(run)}
    if run.source is not None:
        files["source.txt"] = run.source
    return write_folder(root / imported.track / imported.id, files)


def read_import(folder: Path) -> ImportedRun:
    """Return the import in `folder`, which must bear its id and lie under its track. Raises RecordError."""
    found = ImportedRun.from_dict(load_json(folder / IMPORT_FILE))
    for field, value, wanted in (("id", found.id, folder.name), ("track", found.track, folder.parent.name)):
        if value != wanted:
            raise RecordError(f"is {value!a}, in a folder called {wanted!a}; they must agree", field)
    return found


def read_imported(root: Path, track: str | None = None) -> tuple[list[ImportedRun], list[Skipped]]:
    """Return the imports under `root`, of one track or of all, and those that cannot be believed, with why."""
    found: list[ImportedRun] = []
    skipped: list[Skipped] = []
    for track_folder in track_folders(root, track):
        for folder in visible_folders(track_folder):
            if holds_import(folder):
                try:
                    found.append(read_import(folder))
                except RecordError as error:
                    skipped.append(Skipped(folder, str(error)))
    return found, skipped


def _check_sense(found: ImportedRun) -> None:
    """Raise RecordError where fields that are each well formed cannot be, or contradict one another."""
    if not RECORD_ID.fullmatch(found.id):
        raise RecordError(f"is {found.id[:80]!a}; wanted the form 2026-11-24-name-1a2b3c4d", "id")
    if not is_track_name(found.track):
        raise RecordError(f"is {found.track[:80]!a}; wanted a track's name", "track")
    if found.state not in STATES:
        raise RecordError(f"is {found.state[:80]!a}; wanted {' or '.join(STATES)}", "state")
    if not is_utc_time(found.imported):
        raise RecordError(f"is {found.imported[:80]!a}; wanted UTC such as 2026-11-24T12:30:00Z", "imported")
    if not is_utc_time(f"{found.date}T00:00:00Z"):
        raise RecordError(f"is {found.date[:80]!a}; wanted a day such as 2026-11-24", "date")
    if not found.validation:
        raise RecordError("is empty; wanted at least one reading", "validation")
    steps = [point.step for point in found.validation]
    if any(later <= step for step, later in pairwise(steps)):
        raise RecordError("does not rise from step to step", "validation")
    if any(len(one.steps) != len(one.losses) for one in found.other_losses):
        raise RecordError("holds more steps than losses, or fewer", "other_losses")
    last = found.validation[-1]
    declared = found.last_step if found.total_steps is None else found.total_steps
    for name, value, wanted in (
        ("final_val_loss", found.final_val_loss, last.val_loss),
        ("train_seconds", found.train_seconds, last.train_seconds),
        ("complete", found.complete, last.step >= declared),
        ("source", found.source, None if found.source_sha256 is None else "source.txt"),
    ):
        if value != wanted:
            raise RecordError(f"is {value!a}, and the rest of the file says {wanted!a}", name)


def _fitting_json(imported: ImportedRun) -> str:
    """import.json, its curves thinned as far as its size asks; it then says how many points it lacks."""
    every, fitting = 1, imported
    while len((text := layout_json(dataclasses.asdict(fitting))).encode()) >= MAX_BYTES:
        every *= 2
        if every > 2 * len(imported.validation):
            raise UserError(
                f"{imported.log.file!a}: import.json would have {len(text.encode()):,} bytes even without its "
                f"curve, and has to have fewer than {MAX_BYTES:,}"
            )
        points = _thinned(imported.validation, every)
        fitting = dataclasses.replace(
            imported,
            validation=tuple(points),
            validation_left_out=len(imported.validation) - len(points),
            other_losses=tuple(
                OtherLoss(one.name, tuple(_thinned(one.steps, every)), tuple(_thinned(one.losses, every)))
                for one in imported.other_losses
            ),
        )
    return text


def _thinned(values: Sequence[Any], every: int) -> list[Any]:
    """Each `every`-th value, and the last."""
    return [value for index, value in enumerate(values) if index % every == 0 or index == len(values) - 1]


def _curve_csv(run: LoggedRun) -> str:
    """Every validation, and the other losses at the same steps; a cell is empty where the log says nothing."""
    others = {key: dict(values) for key, values in run.other_losses.items()}
    rows = [",".join([*LoggedPoint._fields, *others])]
    for point in run.points:
        cells = [*point, *(values.get(point.step) for values in others.values())]
        rows.append(",".join("" if cell is None else repr(cell) for cell in cells))
    return "\n".join(rows) + "\n"
