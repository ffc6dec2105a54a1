"""What a foreign training log says of its runs: the shape every importer fills, and nothing it does not say.

An importer reads text that anyone may have written. It executes nothing, believes no number that is not finite,
and leaves out what the log leaves out: a field that is None was not said. Texts here are as the log has them;
whoever shows one escapes it for the place it is shown in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple


class LoggedPoint(NamedTuple):
    """One reading of the validation loss, in nats a token; seconds as the log's own clock counts them."""

    step: int
    train_seconds: float | None
    val_loss: float


@dataclasses.dataclass(frozen=True)
class LoggedMachine:
    """Where a log says that it was made."""

    gpu: str | None = None
    """The device's name; runs on several kinds of device name them all, joined by ` + `."""
    n_gpus: int | None = None
    """Devices that the log lists, whether the run used all of them or not."""
    world_size: int | None = None
    world_size_is_implied: bool = False
    """The log never states it: `world_size` is the number of GPUs listed."""
    driver: str | None = None
    torch: str | None = None
    peak_memory_mib: float | None = None


@dataclasses.dataclass(frozen=True)
class LoggedRun:
    """One run of a foreign log."""

    file: str
    """The path as it was given, or found below a folder that was given."""
    run: int
    """Place in the file, from 0."""
    format: str
    """The importer's name: modded_nanogpt, llmc or nanogpt."""
    points: tuple[LoggedPoint, ...]
    """Validations in order of their steps; never empty."""
    last_step: int
    """The last step of any line of the run, validation or not."""
    total_steps: int | None = None
    """The declared last step; None where the log does not declare one."""
    machine: LoggedMachine = LoggedMachine()
    seed: int | None = None
    other_losses: Mapping[str, tuple[tuple[int, float], ...]] = dataclasses.field(default_factory=dict)
    """Other validation losses by their key, such as val_ema_loss: (step, nats)."""
    source: str | None = None
    """The code that the log embeds, as text."""
    source_sha256: str | None = None
    notes: tuple[str, ...] = ()
    """What a reader has to know, one sentence each: a clock that restarts, a run resumed in the middle."""
    date: str | None = None
    """The day that the log says it was made on, such as 2026-05-25."""
    file_sha256: str | None = None
    """Hash of the whole file's bytes."""

    @property
    def complete(self) -> bool:
        """Whether the last validation is that of the declared last step (of the last line, if none is declared)."""
        return self.points[-1].step >= (self.last_step if self.total_steps is None else self.total_steps)

    @property
    def final_val_loss(self) -> float:
        """The last validation's loss, in nats, complete or not."""
        return self.points[-1].val_loss

    @property
    def train_seconds(self) -> float | None:
        """The log's seconds at the last validation."""
        return self.points[-1].train_seconds


class SkippedLog(NamedTuple):
    """A file that holds no run we can read, or a copy of one that we have, and why."""

    file: str
    why: str
