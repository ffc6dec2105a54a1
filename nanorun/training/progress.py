"""What a run shows and writes as it goes: a console line, metrics.jsonl, wandb."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from nanorun.errors import UserError, first_line
from nanorun.files import write_whole

PLAIN_LINE_SECONDS = 10.0
"""Seconds between plain lines where stdout is no terminal."""


class RunProgress:
    """The progress line: step, loss, tokens/s, seconds counted, estimated end, distance to the target."""

    def __init__(
        self, console: Console, *, steps: int, first_step: int, batch_tokens: int, target: float
    ) -> None:
        self._console, self._steps, self._first, self._target = console, steps, first_step, target
        self._batch_tokens = batch_tokens
        self._val_loss: float | None = None
        self._began: tuple[int, float] | None = None
        self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (BarColumn(bar_width=16), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=console, transient=True, redirect_stdout=False)
            self._task = self._bar.add_task("starting", total=steps, completed=first_step)

    def __enter__(self) -> RunProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def train(self, step: int, loss: float, seconds: float) -> None:
        """Show a step's loss at `seconds` counted."""
        line = self._line(step, loss, seconds)
        if self._bar:
            self._bar.update(self._task, completed=step, description=line)
        elif time.monotonic() - self._last_line >= PLAIN_LINE_SECONDS:
            self._plain(line)

    def validation(self, step: int, val_loss: float, seconds: float, bits: str = "") -> None:
        """Show a validation, on a line that stays; `bits` is the same loss in bits a byte, in words."""
        self._val_loss = val_loss
        gap = val_loss - self._target
        where = f"{gap:.4f} above" if gap > 0 else f"{-gap:.4f} below"
        self._plain(
            f"step {step}/{self._steps}  val loss {val_loss:.4f} nats{f' ({bits})' if bits else ''}, {where} the "
            f"target  {seconds:.1f} s counted"
        )

    def _plain(self, line: str) -> None:
        self._last_line = time.monotonic()
        self._console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)

    def _line(self, step: int, loss: float, seconds: float) -> str:
        if self._began is None:
            self._began = (self._first, 0.0 if self._first == 0 else seconds)
        done, spent = step - self._began[0], seconds - self._began[1]
        rate = done / spent if spent > 0 else 0.0
        parts = [f"step {step}/{self._steps}", f"loss {loss:.3f}"]
        if rate:
            parts.append(f"{_thousands(rate * self._batch_tokens)} tok/s")
        parts.append(f"{seconds:.1f} s")
        if rate:
            parts.append(f"ends in {_clock((self._steps - step) / rate)}")
        # Until the first validation the training loss stands in for it.
        now = loss if self._val_loss is None else self._val_loss
        parts.append(f"{now - self._target:+.3f} to target" + (" (train)" if self._val_loss is None else ""))
        return "  ".join(parts)


class MetricsFile:
    """metrics.jsonl: one JSON object a line, flushed as it is written; resuming drops what lies ahead."""

    def __init__(self, path: Path, *, after_step: int) -> None:
        kept = []
        if path.is_file():
            for line in path.read_text(errors="replace").splitlines():
                try:
                    if json.loads(line)["step"] <= after_step:
                        kept.append(line + "\n")
                except (ValueError, KeyError, TypeError, RecursionError):
                    continue  # a line cut off when the run was killed
        write_whole(path, "".join(kept), mend="free some disk, or choose another folder with --runs")
        self._path, self._file = path, path.open("a")

    def write(self, row: Mapping[str, Any]) -> None:
        try:
            self._file.write(json.dumps(dict(row)) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"{self._path}: cannot be written ({error.strerror}); free some disk, then go on from the last "
                f"checkpoint with: nanorun train --resume {self._path.parent}"
            ) from None

    def close(self) -> None:
        with suppress(
            OSError
        ):  # of a full disk `write` has told, and what it could not write is tried once more
            self._file.close()


class WandbRun:
    """The same rows in wandb; nothing of it is imported while the mode is off."""

    def __init__(self, mode: str, folder: Path, config: Mapping[str, Any]) -> None:
        try:
            import wandb

            self._run = wandb.init(
                project="nanorun",
                name=folder.name,
                dir=str(folder),
                mode="offline" if mode == "offline" else "online",
                config=dict(config),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except Exception as error:  # a missing package, a missing login, no network: each its own class
            reason = first_line(error)
            raise UserError(
                f"wandb cannot start ({reason[:200]}): use --wandb offline, log in with `wandb login`, or leave "
                "--wandb off"
            ) from None

    def write(self, row: Mapping[str, Any]) -> None:
        self._run.log(dict(row), step=int(row["step"]))

    def close(self) -> None:
        self._run.finish()


def _thousands(value: float) -> str:
    return (
        f"{value / 1e6:.2f}M" if value >= 1e6 else f"{value / 1e3:.1f}k" if value >= 1e3 else f"{value:.0f}"
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
