"""What a run has seen so far, and the record it becomes."""

from __future__ import annotations

import datetime
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nanorun.config import RunConfig
from nanorun.data.batches import TokenSet
from nanorun.records.record import Record, record_id, write_record
from nanorun.tables import to_toml
from nanorun.tracks import Track
from nanorun.training import machine


@dataclass
class Outcome:
    """The readings of a run; part of its checkpoints."""

    initial_weights_sha256: str = ""
    validation: list[dict[str, Any]] = field(default_factory=list)
    """Points of step, tokens, train_seconds, val_loss."""
    reached: dict[str, Any] | None = None
    """The first validation at or under the target: step, seconds."""
    validation_tokens: int = 0
    resumed: int = 0

    def add(self, step: int, tokens: int, seconds: float, val_loss: float, target: float) -> None:
        """Append a validation; one that is not finite never counts as reached."""
        point = {"step": step, "tokens": tokens, "train_seconds": round(seconds, 4), "val_loss": val_loss}
        self.validation.append(point)
        if self.reached is None and val_loss <= target:
            self.reached = {"step": step, "seconds": round(seconds, 4)}


def as_json(
    outcome: Outcome, *, run: Path, record: Path | None, steps: int, weights: str, clock: dict[str, float]
) -> dict[str, Any]:
    """Return what `nanorun train --json` prints of a run."""
    return {
        "run": str(run),
        "record": str(record) if record else None,
        "reached": outcome.reached,
        "steps": steps,
        "final_val_loss": outcome.validation[-1]["val_loss"],
        "initial_weights_sha256": outcome.initial_weights_sha256,
        "final_weights_sha256": weights,
        "clock": {"compile_seconds": 0.0, "validation_seconds": 0.0, "checkpoint_seconds": 0.0, **clock},
    }


def write(
    outcome: Outcome,
    config: RunConfig,
    track: Track,
    result: dict[str, Any],
    tokens: TokenSet,
    validation_tokens: TokenSet,
    root: Path,
    *,
    device: torch.device,
    n_ranks: int,
    compiled: bool,
    stop_at_target: bool,
    n_parameters: int,
    optimizer_state_bytes: int,
) -> Path:
    """Write the record of a finished run under `root` and return its folder."""
    assert tokens.manifest is not None
    code, patch = machine.code_identity()
    created = datetime.datetime.now(datetime.UTC)
    algorithms = list(dict.fromkeys(options["name"] for options in config.optim_by_role.values()))
    bytes_per_token = validation_tokens.n_bytes / validation_tokens.n_tokens
    content = {
        "format_version": 1,
        "track": track.name,
        "name": config.name,
        "optimizer": " + ".join(algorithms),
        "created": created.isoformat(timespec="seconds"),
        "seed": config.seed,
        "config": config.model_dump(),
        "n_parameters": n_parameters,
        "initial_weights_sha256": result["initial_weights_sha256"],
        "final_weights_sha256": result["final_weights_sha256"],
        "corpus": {
            "name": config.data.corpus,
            "tokenizer": config.data.tokenizer,
            "vocab_size": tokens.manifest.vocab_size,
            "manifest_sha256": tokens.manifest.sha256,
            "train_tokens": tokens.n_tokens,
            "val_tokens": validation_tokens.n_tokens,
        },
        "code": code,
        "hardware": machine.hardware(device, n_ranks),
        "software": machine.software(compiled),
        "target_val_loss": track.target_val_loss,
        "validation_tokens": outcome.validation_tokens,
        "stop_at_target": stop_at_target,
        "completed": result["steps"] == config.train.steps,
        "declared_steps": config.train.steps,
        "steps": result["steps"],
        "tokens": result["steps"] * config.train.batch_tokens,
        "validation": outcome.validation,
        "reached": outcome.reached,
        "final_val_loss": result["final_val_loss"],
        "bits_per_byte": result["final_val_loss"] / math.log(2) / bytes_per_token,
        "clock": {reason: round(seconds, 4) for reason, seconds in result["clock"].items()},
        "peak_memory_mib": round(machine.peak_memory_mib(device), 1),
        "resumed": outcome.resumed,
        "optimizer_state_bytes": optimizer_state_bytes,
    }
    content["id"] = record_id(created.date().isoformat(), config.name, content)
    return write_record(
        root, Record.from_dict(content), config_toml=to_toml(config.model_dump()), source_patch=patch
    )
