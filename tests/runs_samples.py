"""Runs of foreign logs and folders under runs/, made up for tests."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from records_samples import a_record

from nanorun.records.imported import ImportedRun, write_imported
from nanorun.records.logs import LoggedMachine, LoggedPoint, LoggedRun
from nanorun.records.record import Record, write_record
from nanorun.records.runs import ComparedRun, from_log
from nanorun.tables import to_toml

EIGHT_H100 = LoggedMachine(gpu="NVIDIA H100 80GB HBM3", world_size=8, torch="2.9.0")


def a_logged_run(
    final: float = 3.279, *, file: str = "logs/a.txt", steps: int = 100, falls: float = 0.01, **changes: Any
) -> LoggedRun:
    """Return a log's run with readings every tenth of its steps, each `falls` nats below the one before."""
    every = steps // 10
    points = [
        LoggedPoint(index * every, index * every * 0.1, final + falls * (10 - index)) for index in range(11)
    ]
    base = LoggedRun(
        file, 0, "modded_nanogpt", tuple(points), steps, steps, EIGHT_H100, source_sha256="a" * 64
    )
    return dataclasses.replace(base, **changes)


def a_log(final: float = 3.279, **changes: Any) -> ComparedRun:
    """Return the same as a run to compare."""
    return from_log(a_logged_run(final, **changes))


def log_text(losses: dict[int, float], *, steps: int, seconds: float = 0.1) -> str:
    """Return a log of modded-nanogpt's form without its header."""
    lines = [
        f"step:{step}/{steps} val_loss:{loss:.5f} train_time:{step * seconds:.3f}s step_avg:{seconds * 1e3:.2f}ms\n"
        for step, loss in losses.items()
    ]
    return "".join(lines)


def write_log(path: Path, final: float, *, steps: int = 100, seconds: float = 0.1) -> Path:
    """Write a log that reads a loss at every tenth of its steps and ends at `final`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    every = steps // 10
    losses = {index * every: final + 0.01 * (10 - index) for index in range(11)}
    path.write_text(log_text(losses, steps=steps, seconds=seconds))
    return path


def put_record(root: Path, **changes: Any) -> Path:
    """Write a made-up record under `root` and return its folder."""
    record = a_record(**changes)
    return write_record(root, record, config_toml="", source_patch=None)


def put_import(root: Path, run: LoggedRun, *, track: str = "sotu") -> Path:
    """Write what `nanorun import` keeps of a log's run and return its folder."""
    imported = ImportedRun.of(
        run, track=track, name=Path(run.file).stem, imported="2026-11-24T12:30:00Z", claimed_seconds=None
    )
    return write_imported(root, imported, run)


def put_run(
    folder: Path, record: Record, *, named: Path | None, done: int | None = None, **options: Any
) -> Path:
    """Write what `nanorun train` leaves of a run in `folder`: config, options, metrics, state, result.

    `named` is where its result says the record lies; `done` cuts the run off after that step.
    """
    state = folder / "checkpoints" / "step-00000001"
    state.mkdir(parents=True)
    points = [point for point in record.validation if done is None or point.step <= done]
    rows = [{"step": 1, "loss": 5.0, "train_seconds": 0.1}, *(point._asdict() for point in points)]
    (folder / "config.toml").write_text(to_toml(record.config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 99')
    (folder / "options.json").write_text(json.dumps({"stop_at_target": False, "records": "gone", **options}))
    outcome = {"validation_tokens": record.validation_tokens, "code": vars(record.code)}
    choices = {"hardware": record.hardware.label, "torch": "2.9.0", "compiled": False}
    saved = {"outcome": outcome, "choices": choices, "corpus_sha256": record.corpus.manifest_sha256}
    saved["mix"] = [vars(one) for one in record.corpus.mix]
    (state / "state.json").write_text(json.dumps(saved))
    if done is None:
        result = {
            "record": str(named),
            "final_weights_sha256": record.final_weights_sha256,
            "clock": record.clock,
        }
        (folder / "result.json").write_text(json.dumps(result))
    return folder
