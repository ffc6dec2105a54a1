"""Runs as `verify` and `compare` see them, whatever they came from: records, folders under runs/, foreign logs.

Reading any of it ends in a run or in one sentence that says why not, and executes nothing. Texts are kept as they
were found; whoever shows one cleans it for the place it is shown in.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nanorun.errors import UserError, nearest
from nanorun.names import is_track_name
from nanorun.records.grouping import GroupKey
from nanorun.records.imported import ImportedRun, read_import, read_imported, run_sha256
from nanorun.records.logs import LoggedRun, SkippedLog
from nanorun.records.record import (
    IMPORT_FILE,
    Corpus,
    MixedCorpus,
    Record,
    RecordError,
    holds_import,
    read_fields,
    read_record,
    read_records,
    visible_folders,
)
from nanorun.records.report import TrackView, build_table, config_identity, identity, with_mix
from nanorun.records.significance import LARGEST_LOSS
from nanorun.tables import flattened, read_toml

VAL_LOSS = "val_loss"
"""The key of the validation loss that every run has."""
LARGEST_SECONDS = 1e10
"""Three hundred years; a clock that says more is broken."""
MOST_BYTES = 20_000_000
"""Of a config, a result or a checkpoint's state; ours have kilobytes."""
MOST_METRICS_BYTES = 200_000_000
MOST_SOURCE_BYTES = 4_000_000


class Reading(NamedTuple):
    """One reading of a validation loss; seconds as the run's own clock counts them."""

    step: int
    loss: float
    seconds: float | None


@dataclasses.dataclass(frozen=True)
class ComparedRun:
    """One run; what is None was not said."""

    kind: str
    """record, run (a folder under runs/ without a record) or log (imported or not)."""
    name: str
    """The preset's, or the file's without its ending."""
    file: str
    place: int
    """Place in the file, from 0."""
    curves: Mapping[str, tuple[Reading, ...]]
    """Readings in order of their steps, by the loss's key; `val_loss` is always there and never empty."""
    declared_steps: int | None
    complete: bool
    """The last reading is that of the declared last step."""
    stops_on_loss: bool
    """The run was allowed to end on its own validation loss."""
    identity: Mapping[str, Any]
    """What runs that are averaged have in common, under dotted names."""
    train_seconds: float | None = None
    seed: int | None = None
    created: str | None = None
    track: str | None = None
    target: float | None = None
    corpus: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    validation_tokens: int | None = None
    hardware: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    software: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    code: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    source: str | None = None
    """The code that a log embeds."""
    config: Mapping[str, Any] | None = None
    """Flat, under dotted names."""
    final_weights_sha256: str | None = None
    digest: str | None = None
    """The same for all copies of a foreign log's run."""
    notes: tuple[str, ...] = ()

    @property
    def last_step(self) -> int:
        """The step of the last reading of `val_loss`."""
        return self.curves[VAL_LOSS][-1].step

    @property
    def label(self) -> str:
        """The file, and the place in it where it is not the first."""
        return self.file if self.place == 0 else f"{self.file} (run {self.place})"

    def at(self, key: str, step: int) -> Reading | None:
        """The reading of one loss at one step; seconds of the last step are the clock's total."""
        found = next((reading for reading in self.curves.get(key, ()) if reading.step == step), None)
        if found and self.complete and step == self.last_step and self.train_seconds is not None:
            return found._replace(seconds=self.train_seconds)
        return found

    def steps(self, key: str) -> set[int]:
        """The steps at which that loss was read."""
        return {reading.step for reading in self.curves.get(key, ())}


@dataclasses.dataclass
class RunsRead:
    """What was found where the user pointed."""

    runs: list[ComparedRun] = dataclasses.field(default_factory=list)
    skipped: list[SkippedLog] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class RunGroup:
    """Runs that may be averaged: alike in all but the seed, or pooled because somebody asked for it."""

    label: str
    apart: str
    """What sets it apart from other groups called the same, but for a number."""
    runs: tuple[ComparedRun, ...]
    identity: Mapping[str, Any]
    """What all of them have in common."""
    differs: Mapping[str, tuple[Any, ...]]
    """Keys in which pooled runs differ, with the values."""


def read_runs(names: Sequence[str | Path], *, records: Path = Path("records")) -> RunsRead:
    """Return the runs at `names`: a record, a run's folder, a log, a folder or pattern of these, track:optimizer.

    `records` is where track:optimizer is looked up. A run met twice counts once. Raises UserError for a name
    that leads nowhere.
    """
    found, logs = RunsRead(), []
    for name in names:
        paths = _paths(str(name))
        if paths:
            logs += [path for path in paths if not _read_own(path, found)]
        elif ":" in str(name):
            _read_preset(str(name), records, found)
        else:
            raise UserError(
                f"{name}: no such file or folder; wanted a record, a run's folder, a log, a folder of these, a "
                "pattern such as 'logs/*.txt', or track:optimizer"
            )
    if logs:
        from nanorun.records.reading import read_logs

        logged = read_logs(logs)
        found.runs += [from_log(run) for run in logged.runs]
        found.skipped += logged.skipped
    _drop_copies(found)
    _drop_impossible(found)
    return found


def _paths(name: str) -> list[Path]:
    """What lies at a path, or fits a pattern with * ? or []; nothing where there is nothing."""
    if os.path.lexists(name):
        return [Path(name)]
    return [Path(path) for path in sorted(glob.glob(name))] if glob.has_magic(name) else []


def _read_own(path: Path, found: RunsRead) -> bool:
    """Add what records and runs' folders lie at `path`; return False where it is neither, nor a folder of them."""
    if path.name in ("record.json", IMPORT_FILE, "metrics.jsonl", "result.json") and path.is_file():
        path = path.parent
    if not path.is_dir():
        return False
    # A record's folder must bear its id, and "." bears no name.
    whole = path if path.name not in ("", "..") else Path(os.path.abspath(path))
    if _is_record(whole):
        _add_record(whole, found)
    elif _is_run(whole):
        _add_run(whole, found)
    else:
        children = visible_folders(whole)
        if any(map(_is_record, children)):
            _add_records(whole.parent, whole.name, found)
        elif any(map(_is_run, children)):
            for child in filter(_is_run, children):
                _add_run(child, found)
        elif any(_is_record(inner) for child in children for inner in visible_folders(child)):
            _add_records(whole, None, found)
        else:
            return False
    return True


def _is_record(folder: Path) -> bool:
    """Whether a folder holds a record of ours, or what was imported from a foreign log."""
    return (folder / "record.json").is_file() or holds_import(folder)


def _is_run(folder: Path) -> bool:
    return (folder / "config.toml").is_file() and (folder / "metrics.jsonl").is_file()


def _add_records(root: Path, track: str | None, found: RunsRead) -> None:
    records, skipped = read_records(root, track)
    imports, not_read = read_imported(root, track)
    found.runs += [from_record(record, str(root / record.track / record.id)) for record in records]
    found.runs += [from_import(one, root / one.track / one.id) for one in imports]
    found.skipped += [SkippedLog(str(one.path), one.why) for one in (*skipped, *not_read)]


def _add_record(folder: Path, found: RunsRead) -> None:
    whole = Path(os.path.abspath(folder))
    try:
        if holds_import(folder):
            found.runs.append(from_import(read_import(whole), folder))
        else:
            found.runs.append(from_record(read_record(whole), str(folder)))
    except RecordError as error:
        found.skipped.append(SkippedLog(str(folder), str(error)))


def _add_run(folder: Path, found: RunsRead) -> None:
    try:
        found.runs.append(from_run_folder(folder))
    except RecursionError:
        found.skipped.append(SkippedLog(str(folder), "config.toml is nested too deeply"))
    except ValueError as error:  # UserError too
        found.skipped.append(SkippedLog(str(folder), str(error)))


def _read_preset(name: str, root: Path, found: RunsRead) -> None:
    """Add the records of the highest row of `track:optimizer` in the records table."""
    from nanorun.tracks import load_track

    track, _, preset = name.partition(":")
    try:
        loaded = load_track(track)
    except UserError as error:
        raise UserError(f"{name}: no such file or folder; read as track:optimizer, {error}") from None
    records, skipped = read_records(root, track)
    table = build_table(TrackView.of(loaded), records)
    places = [index for index, row in enumerate(table.rows) if row.preset == preset]
    if not places:
        known = list(dict.fromkeys(row.preset for row in table.rows))
        there = f"there are {', '.join(known)}" if known else "there are none"
        raise UserError(
            f"{name}: no record of {preset!r} under {root / track}; {there}.{nearest(preset, known)} Make one with: "
            f"nanorun train --track {track} --optim {preset}"
        )
    group = table.runs[places[0]]
    found.runs += [from_record(record, str(root / track / record.id)) for record in group]
    found.skipped += [SkippedLog(str(one.path), one.why) for one in skipped]
    if len(places) > 1:
        found.notes.append(f"{name}: the highest of {len(places)} rows of the table ({len(group)} runs)")


def from_record(record: Record, file: str) -> ComparedRun:
    """Return a record as a run to compare."""
    points = [Reading(point.step, point.val_loss, point.train_seconds) for point in record.validation]
    if not points or points[-1].step != record.steps:
        points.append(Reading(record.steps, record.final_val_loss, record.clock["train_seconds"]))
    return ComparedRun(
        kind="record",
        name=record.name,
        file=file,
        place=0,
        curves={VAL_LOSS: _in_order(points)},
        declared_steps=record.declared_steps,
        complete=record.completed,
        stops_on_loss=record.stop_at_target,
        identity={"preset": record.name, "optimizer": record.optimizer, **identity(record)},
        train_seconds=record.clock["train_seconds"],
        seed=record.seed,
        created=record.created,
        track=record.track,
        target=record.target_val_loss,
        corpus=_corpus_of(record.corpus),
        validation_tokens=record.validation_tokens,
        hardware={"hardware": record.hardware.label, "memory_gib": record.hardware.memory_gib},
        software=vars(record.software),
        code=vars(record.code),
        config=flattened(record.config),
        final_weights_sha256=record.final_weights_sha256,
        notes=(f"{record.validation_left_out} validation points are in curve.csv alone",)
        if record.validation_left_out
        else (),
    )


def _corpus_of(corpus: Corpus) -> dict[str, Any]:
    """What a record says of its corpus, a mix as one text."""
    fields = {**vars(corpus), "mix": corpus.mix_label}
    return fields if corpus.mix else {key: value for key, value in fields.items() if key != "mix"}


def _in_order(points: Iterable[Reading]) -> tuple[Reading, ...]:
    """The readings by their steps; of two at one step the later."""
    return tuple(sorted({point.step: point for point in points}.values()))


def from_log(run: LoggedRun) -> ComparedRun:
    """Return a foreign log's run as a run to compare."""
    machine = run.machine
    seconds = {point.step: point.train_seconds for point in run.points}
    curves = {
        key: _in_order(Reading(step, loss, seconds.get(step)) for step, loss in readings)
        for key, readings in run.other_losses.items()
        if readings
    }
    hardware = {"gpu": machine.gpu, "world size": machine.world_size}
    software = {"torch": machine.torch, "driver": machine.driver}
    return ComparedRun(
        kind="log",
        name=Path(run.file).stem,
        file=run.file,
        place=run.run,
        curves={
            **curves,
            VAL_LOSS: _in_order(
                Reading(point.step, point.val_loss, point.train_seconds) for point in run.points
            ),
        },
        declared_steps=run.total_steps,
        complete=run.complete,
        stops_on_loss=False,
        identity={key.replace("_", " "): value for key, value in GroupKey.of(run)._asdict().items()},
        train_seconds=run.train_seconds,
        seed=run.seed,
        hardware={key: value for key, value in hardware.items() if value is not None},
        software={key: value for key, value in software.items() if value is not None},
        code={} if run.source_sha256 is None else {"source sha256": run.source_sha256},
        source=run.source,
        digest=_digest(run),
        notes=run.notes,
    )


def _digest(run: LoggedRun) -> str:
    """What copies of one run have in common; a few losses without a clock are no proof, so there the file counts."""
    if run.train_seconds is None and len(run.points) < 3:
        return f"{run.file_sha256 or run.file} {run.run}"
    return run_sha256(run)


def from_import(imported: ImportedRun, folder: Path) -> ComparedRun:
    """Return what was imported from a foreign log as a run to compare."""
    thinned = f"{imported.validation_left_out} validation points are in curve.csv alone"
    return dataclasses.replace(
        from_log(imported.to_logged_run()),
        name=imported.name,
        file=str(folder),
        place=0,
        track=imported.track,
        source=_source_beside(folder) if imported.source else None,
        digest=imported.run_sha256,
        notes=(*imported.notes, thinned) if imported.validation_left_out else imported.notes,
    )


def _source_beside(folder: Path) -> str | None:
    """The code that the import kept; None where it is gone or too large to compare."""
    path = folder / "source.txt"
    try:
        if not path.is_file() or path.stat().st_size > MOST_SOURCE_BYTES:
            return None
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def from_run_folder(folder: Path) -> ComparedRun:
    """Return a folder under runs/ as a run to compare: its record, or what config, metrics and checkpoint say.

    Raises UserError where they cannot be believed.
    """
    result = _json_object(folder / "result.json") if (folder / "result.json").is_file() else {}
    options = _json_object(folder / "options.json") if (folder / "options.json").is_file() else {}
    record = _record_of(result, options)
    if record is not None:
        return dataclasses.replace(record, notes=(*record.notes, f"made by {folder}"))
    _check_size(folder / "config.toml", MOST_BYTES)
    config = _plain(read_toml(folder / "config.toml"))
    points = _metrics(folder / "metrics.jsonl")
    if not points:
        raise UserError(f"{folder}/metrics.jsonl holds no validation yet")
    steps = _whole(_table(config.get("train")).get("steps"))
    told = ComparedRun(
        kind="run",
        name=_text(config.get("name")) or folder.name,
        file=str(folder),
        place=0,
        curves={VAL_LOSS: points},
        declared_steps=steps,
        complete=steps is not None and points[-1].step == steps,
        stops_on_loss=options.get("stop_at_target") is True,
        identity={"preset": _text(config.get("name")), **config_identity(config)},
        train_seconds=_seconds(_table(result.get("clock")).get("train_seconds")),
        seed=_whole(config.get("seed")),
        config=flattened(config),
        final_weights_sha256=_text(result.get("final_weights_sha256")),
    )
    return _placed(told, config.get("track"), _newest_state(folder))


def _placed(run: ComparedRun, track: object, state: Mapping[str, Any]) -> ComparedRun:
    """The run with its track's target, and with what a checkpoint says of its machine, data and code."""
    outcome, choices = _table(state.get("outcome")), _table(state.get("choices"))
    hardware, corpus = _text(choices.get("hardware")), _text(state.get("corpus_sha256"))
    mix = _mix_label(state.get("mix"))
    tokens = _whole(outcome.get("validation_tokens"))
    known = track if isinstance(track, str) and is_track_name(track) else None
    target = _target_of(known)
    measured = {
        "hardware": hardware,
        "corpus manifest": corpus,
        "validation tokens": tokens,
        "target": target,
    }
    return dataclasses.replace(
        run,
        identity={**with_mix(run.identity, mix), **measured},
        track=known,
        target=target,
        corpus={} if corpus is None else {"manifest_sha256": corpus, **({"mix": mix} if mix else {})},
        validation_tokens=tokens,
        hardware={} if hardware is None else {"hardware": hardware},
        software={
            key: choices[key] for key in ("torch", "compiled", "deterministic", "kernels") if key in choices
        },
        code=_table(outcome.get("code")),
    )


def _mix_label(mix: object) -> str:
    """The mix that a checkpoint was trained on, as a record labels it; empty for none, and for nonsense."""
    try:
        parts = tuple(read_fields(MixedCorpus, one) for one in mix) if isinstance(mix, list) else ()
    except RecordError:
        return ""
    return Corpus("", "", 0, "", 0, 0, parts).mix_label


def _record_of(result: Mapping[str, Any], options: Mapping[str, Any]) -> ComparedRun | None:
    """The record that a run's result names, where it still lies there and is this run's."""
    named = result.get("record")
    if not isinstance(named, str):
        return None
    places = [Path(named), Path(_text(options.get("records")) or ".") / Path(*Path(named).parts[-2:])]
    for place in places:
        try:
            record = read_record(Path(os.path.abspath(place)))
        except (RecordError, ValueError):
            continue
        if record.final_weights_sha256 == result.get("final_weights_sha256"):
            return from_record(record, str(place))
    return None


def _plain(value: Any) -> Any:
    """A TOML value as JSON can hold it: dates and numbers that are not finite become texts."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)


def _json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file of ours; raises UserError for anything else."""
    try:
        _check_size(path, MOST_BYTES)
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds no JSON object")
    return value


def _check_size(path: Path, most: int) -> None:
    if path.stat().st_size > most:
        raise UserError(f"{path}: more than {most:,} bytes; no run of ours writes so much")


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _newest_state(folder: Path) -> dict[str, Any]:
    """What the run's newest checkpoint says of its machine and data; empty where none can be read."""
    for path in sorted((folder / "checkpoints").glob("step-*/state.json"), reverse=True):
        try:
            return _json_object(path)
        except UserError:
            continue
    return {}


def _metrics(path: Path) -> tuple[Reading, ...]:
    """The validations in metrics.jsonl; a line that a kill cut off is passed over."""
    _check_size(path, MOST_METRICS_BYTES)
    points = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            step, loss = (
                (_whole(row.get("step")), row.get("val_loss")) if isinstance(row, dict) else (None, None)
            )
            if step is not None and type(loss) is float and math.isfinite(loss):
                points.append(Reading(step, loss, _seconds(row.get("train_seconds"))))
    return _in_order(points)


def _table(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _whole(value: object) -> int | None:
    return value if type(value) is int and 0 <= value < 2**53 else None


def _seconds(value: object) -> float | None:
    """Counted seconds, rounded as a record has them."""
    return (
        round(float(value), 4) if isinstance(value, int | float) and 0 <= value <= LARGEST_SECONDS else None
    )


def _target_of(track: str | None) -> float | None:
    from nanorun.tracks import load_track

    try:
        return None if track is None else load_track(track).target_val_loss
    except UserError:
        return None


def _drop_copies(found: RunsRead) -> None:
    """Keep the first of each run that was met more than once, and say so of the others."""
    kept: dict[Any, ComparedRun] = {}
    for run in found.runs:
        same_file = (os.path.realpath(run.file), run.place)
        # Seconds are kept to 1e-4, so that two runs of ours never have one curve.
        key = run.digest if run.kind == "log" else (run.track, run.name, run.seed, run.curves[VAL_LOSS])
        first = kept.setdefault(key, run)
        if first is not run and os.path.realpath(first.file) != same_file[0]:
            found.skipped.append(SkippedLog(run.label, f"the same run as {first.label}"))
    found.runs[:] = kept.values()


def _drop_impossible(found: RunsRead) -> None:
    """Leave out, and name, the runs whose numbers no run can have."""
    possible = []
    for run in found.runs:
        readings = [reading for curve in run.curves.values() for reading in curve]
        loss = next((r.loss for r in readings if not abs(r.loss) <= LARGEST_LOSS), None)
        seconds = [r.seconds for r in readings] + [run.train_seconds]
        time = next((s for s in seconds if s is not None and not 0 <= s <= LARGEST_SECONDS), None)
        if loss is not None:
            found.skipped.append(SkippedLog(run.label, f"holds a validation loss of {loss:g} nats"))
        elif time is not None:
            found.skipped.append(SkippedLog(run.label, f"holds a time of {time:g} s"))
        else:
            possible.append(run)
    found.runs[:] = possible


def group_runs(runs: Sequence[ComparedRun], *, pool: bool = False) -> list[RunGroup]:
    """Return the runs in groups that may be averaged, in order of their first run; one group under `pool`."""
    members: dict[str, list[ComparedRun]] = {}
    for run in runs:
        key = "" if pool else json.dumps([run.kind == "log", run.identity], sort_keys=True, default=str)
        members.setdefault(key, []).append(run)
    groups = list(members.values())
    labels = _labels(groups)
    return [
        RunGroup(label, apart, tuple(group), *_common([run.identity for run in group]))
        for (label, apart), group in zip(labels, groups)
    ]


def _common(identities: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, tuple[Any, ...]]]:
    """(what all have in common, the keys in which they differ with the values met)."""
    common, differs = {}, {}
    for key in dict.fromkeys(key for one in identities for key in one):
        values = list({repr(one.get(key)): one.get(key) for one in identities}.values())
        if len(values) == 1:
            common[key] = values[0]
        else:
            differs[key] = tuple(values)
    return common, differs


def _labels(groups: Sequence[Sequence[ComparedRun]]) -> list[tuple[str, str]]:
    """For each group what to call it, told apart as `muon (2)`, and what sets it apart from those of its name."""
    names = [_name_of(group) for group in groups]
    identities: dict[str, list[Mapping[str, Any]]] = {}
    for name, group in zip(names, groups):
        identities.setdefault(name, []).append(group[0].identity)
    differing = {name: list(_common(same)[1]) for name, same in identities.items()}
    numbers: Counter[str] = Counter()
    labels = []
    for name, group in zip(names, groups):
        numbers[name] += 1
        identity = group[0].identity
        parts = [f"{key} = {shown(identity[key])}" for key in differing[name] if key in identity]
        labels.append((name if numbers[name] == 1 else f"{name} ({numbers[name]})", "; ".join(parts)))
    return labels


def _name_of(group: Sequence[ComparedRun]) -> str:
    names = list(dict.fromkeys(run.name for run in group))
    if len(names) == 1:
        return names[0]
    folders = {os.path.dirname(run.file) for run in group}
    common = os.path.commonpath([os.path.abspath(folder) for folder in folders])
    return os.path.basename(common) or common


def shown(value: object) -> str:
    """A value of an identity in few characters; hashes by their first eight."""
    if value is None:
        return "not said"
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    is_hash = len(text) == 64 and all(char in "0123456789abcdef" for char in text)
    return text[:8] if is_hash else text


def by_seed(pairs: Iterable[tuple[ComparedRun, float]]) -> list[float]:
    """One value for each seed, its runs averaged; every run of a foreign log stands for itself.

    Our runs of one seed on one machine are copies of each other, or nearly; those of a log may say one seed and
    shuffle by something else, and who claims them counts runs.
    """
    values: dict[Any, list[float]] = {}
    for run, value in pairs:
        key = (run.file, run.place) if run.kind == "log" or run.seed is None else run.seed
        values.setdefault(key, []).append(value)
    return [math.fsum(one) / len(one) for one in values.values()]
