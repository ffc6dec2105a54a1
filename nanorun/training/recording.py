"""The record that a finished run becomes."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from nanorun.files import write_whole
from nanorun.records.record import FORMAT_VERSION, RECORD_ID, Record, read_record, record_id, write_record
from nanorun.tables import to_toml
from nanorun.training import checkpoint, machine
from nanorun.training.setup import ELSEWHERE, Run, mix_of, read_patch

RECORD_NOTE = "record"
"""In the run's folder: the id of the record that it becomes."""


def write(run: Run, result: dict[str, Any]) -> Path:
    """Write the record of a finished run under its records' folder and return the record's own folder.

    `result` is what `--json` prints of the run. A run that was killed after it had written its record writes no second
    one. Raises UserError where the disk refuses.
    """
    config = run.config
    if (there := _written_before(run, result)) is not None:
        return there
    created = datetime.datetime.now(datetime.UTC)
    patch = read_patch(run.folder)
    hashed = {} if patch is None else {"patch_sha256": checkpoint.hash_of_text(patch)}
    content = {
        "format_version": FORMAT_VERSION,
        "track": run.track.name,
        "name": config.name,
        "optimizer": " + ".join(dict.fromkeys(run.optimizers.names)),
        "created": created.isoformat(timespec="seconds"),
        "seed": config.seed,
        "config": config.model_dump(),
        "code": {**run.outcome.code, **hashed},
        "software": machine.software(
            run.compiled, run.options.deterministic, machine.runs_kernels(run.device)
        ),
        "hardware": {
            **machine.hardware(run.device, run.ranks.n_ranks),
            "earlier": run.outcome.earlier_hardware,
        },
        "corpus": _corpus(run),
        **_readings(run, result),
    }
    content["id"] = record_id(created.date().isoformat(), config.name, content)
    write_whole(run.folder / RECORD_NOTE, content["id"], mend=ELSEWHERE)
    return write_record(
        run.options.records,
        Record.from_dict(content),
        config_toml=to_toml(config.model_dump()),
        source_patch=patch,
    )


def _written_before(run: Run, result: dict[str, Any]) -> Path | None:
    """Return the record of this run that an earlier part of it has written; None where there is none."""
    try:
        name = (run.folder / RECORD_NOTE).read_text()
        if not RECORD_ID.fullmatch(name):
            return None
        folder = run.options.records / run.track.name / name
        record = read_record(folder)
    except (OSError, ValueError):  # UserError is a ValueError
        return None
    return folder if record.final_weights_sha256 == result["final_weights_sha256"] else None


def _corpus(run: Run) -> dict[str, Any]:
    manifest, mix = run.validation_tokens.manifest, mix_of(run)
    assert manifest is not None
    return {
        "name": run.config.data.corpus,
        "tokenizer": run.config.data.tokenizer,
        "vocab_size": manifest.vocab_size,
        "manifest_sha256": manifest.sha256,
        "train_tokens": manifest.n_tokens("train"),
        "val_tokens": run.validation_tokens.n_tokens,
        **({"mix": mix} if mix else {}),
    }


def _readings(run: Run, result: dict[str, Any]) -> dict[str, Any]:
    """Return what was measured: losses, times, memory, and the weights it began and ended with."""
    outcome, steps = run.outcome, result["steps"]
    return {
        "n_parameters": run.model.n_parameters(),
        "initial_weights_sha256": result["initial_weights_sha256"],
        "final_weights_sha256": result["final_weights_sha256"],
        "target_val_loss": run.track.target_val_loss,
        "validation_tokens": outcome.validation_tokens,
        "stop_at_target": run.options.stop_at_target,
        "completed": steps == run.config.train.steps,
        "declared_steps": run.config.train.steps,
        "steps": steps,
        "tokens": steps * run.config.train.batch_tokens,
        "validation": outcome.validation,
        "reached": outcome.reached,
        "final_val_loss": result["final_val_loss"],
        "bits_per_byte": result["bits_per_byte"],
        "clock": {reason: round(seconds, 4) for reason, seconds in result["clock"].items()},
        "peak_memory_mib": round(machine.peak_memory_mib(run.device), 1),
        "resumed": outcome.resumed,
        "skipped_steps": len(outcome.skipped_steps),
        "inexact": outcome.inexact,
        "optimizer_state_bytes": run.optimizers.state_bytes(),
    }
