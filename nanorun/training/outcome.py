"""What a run has seen so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


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
    """How often the run was taken up again."""
    skipped_steps: list[int] = field(default_factory=list)
    """Steps, counted from 1, whose loss or gradient was not finite and whose update was left out."""
    inexact: str = ""
    """What was otherwise after an interruption, so that the bits are not those of a run never stopped."""
    earlier_hardware: str = ""
    """Labels of the other machines that earlier parts ran on."""
    code: dict[str, Any] = field(default_factory=dict)
    """The record's `code`, as it was when the run began."""

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
