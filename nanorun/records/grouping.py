"""Logged runs in groups that may be averaged: alike in steps, hardware and code, and never across these."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

from nanorun.records.logs import LoggedRun
from nanorun.records.significance import mean, std


class GroupKey(NamedTuple):
    """What runs have in common that are averaged; None where the log does not say."""

    total_steps: int | None
    gpu: str | None
    world_size: int | None
    source_sha256: str | None
    format: str
    last_step: int | None
    """Only where no last step is declared: the last one there is."""

    @classmethod
    def of(cls, run: LoggedRun) -> GroupKey:
        """The key of one run."""
        return cls(
            total_steps=run.total_steps,
            gpu=run.machine.gpu,
            world_size=run.machine.world_size,
            source_sha256=run.source_sha256,
            format=run.format,
            last_step=run.last_step if run.total_steps is None else None,
        )


@dataclasses.dataclass(frozen=True)
class LoggedGroup:
    """Runs of one key; means are over the complete ones, and `left_out` says how many are not."""

    key: GroupKey
    runs: tuple[LoggedRun, ...]

    @property
    def label(self) -> str:
        """What the group is, in words that may hold text of the log."""
        return f"{self.steps} steps, {self.hardware}, {self.code}"

    @property
    def steps(self) -> str:
        """The declared last step, or that none is declared."""
        if self.key.total_steps is None:
            return f"{self.key.last_step:,} (not declared)"
        return f"{self.key.total_steps:,}"

    @property
    def hardware(self) -> str:
        """The devices, and whether their number is only implied by how many the log lists."""
        gpu, size = self.key.gpu, self.key.world_size
        if gpu is None and size is None:
            return "hardware not said"
        implied = " (implied)" if any(run.machine.world_size_is_implied for run in self.runs) else ""
        return f"{'?' if size is None else size} × {gpu or 'devices not named'}{implied}"

    @property
    def code(self) -> str:
        """The embedded source by the start of its hash."""
        digest = self.key.source_sha256
        return f"code {digest[:8]}" if digest else "code not in the log"

    @property
    def complete(self) -> tuple[LoggedRun, ...]:
        """The runs whose last validation is that of the declared last step."""
        return tuple(run for run in self.runs if run.complete)

    @property
    def left_out(self) -> int:
        """Incomplete runs, which no mean includes."""
        return len(self.runs) - len(self.complete)

    @property
    def mean_loss(self) -> float | None:
        """Mean last validation loss of the complete runs, in nats."""
        losses = [run.final_val_loss for run in self.complete]
        return mean(losses) if losses else None

    @property
    def std_loss(self) -> float | None:
        """Sample standard deviation of the same; None for fewer than two."""
        return std([run.final_val_loss for run in self.complete])

    @property
    def seconds_mean(self) -> float | None:
        """Mean of the logs' own seconds at the last step; None unless every complete run says them."""
        seconds = [run.train_seconds for run in self.complete]
        told = [value for value in seconds if value is not None]
        return mean(told) if told and len(told) == len(seconds) else None


def group_logged_runs(runs: Iterable[LoggedRun]) -> list[LoggedGroup]:
    """Return the groups of runs that may be averaged, in order of their first run."""
    members: dict[GroupKey, list[LoggedRun]] = {}
    for run in runs:
        members.setdefault(GroupKey.of(run), []).append(run)
    return [LoggedGroup(key, tuple(group)) for key, group in members.items()]


def mean_text(mean: float | None, std: float | None) -> str:
    """A mean loss with its spread over runs, in five decimals."""
    return "-" if mean is None else f"{mean:.5f}" + ("" if std is None else f" ±{std:.5f}")


def seconds_text(seconds: float | None) -> str:
    """Seconds in one decimal."""
    return "-" if seconds is None else f"{seconds:,.1f}"
