"""A run that was stopped, for tests to damage, and its checkpoint sealed again as whoever made it could."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
from rich.console import Console

from nanorun.errors import Stopped
from nanorun.training import checkpoint
from nanorun.training.run import train_seeds
from nanorun.training.step import Stepper

QUIET = Console(quiet=True)
SETTINGS = (
    "train.steps=6",
    "train.batch_tokens=512",
    "validation.from_step=4",
    "validation.every_steps=4",
    "model.n_layer=1",
    "model.n_head=2",
    "model.n_embd=32",
    "log.every_steps=1",
)


def stopped_run(place: Path, data: Path, *, optim: str = "muon", settings: tuple[str, ...] = ()) -> Path:
    """Return the folder of a run under `place`/runs that was stopped after step 4 of 6."""
    real, left = Stepper.step, [signal.SIGINT]

    def stopping(self, step, scale, **options):
        if step == 3 and left:
            signal.raise_signal(left.pop())
        return real(self, step, scale, **options)

    options = {"runs": place / "runs", "records": place / "records", "data": data}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stepper, "step", stopping)
        with pytest.raises(Stopped):
            train_seeds("shakespeare-sprint", optim, [*SETTINGS, *settings], 0, 1, options, QUIET)
    return next(path for path in (place / "runs").iterdir() if (path / "config.toml").exists())


def copied(run: Path, place: Path) -> Path:
    """Return a copy of a run under `place`/runs, with options as if it had been started there."""
    folder = place / "runs" / run.name
    shutil.copytree(run, folder)
    changed_options(folder, runs=str(place / "runs"), records=str(place / "records"))
    return folder


def changed_options(run: Path, **changes: object) -> None:
    """Write other values into a run's options.json."""
    path = run / "options.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def newest(run: Path) -> Path:
    """Return the folder of a run's newest checkpoint."""
    return checkpoint.checkpoints(run / "checkpoints")[0]


def sealed(path: Path) -> Path:
    """Make a checkpoint's manifest fit its files again, as whoever made it could."""
    manifest = json.loads((path / "manifest.json").read_text())
    files = {
        name: {"bytes": (path / name).stat().st_size, "sha256": checkpoint.sha256_of(path / name)}
        for name in manifest["files"]
    }
    text = checkpoint.manifest_text(manifest["run"], manifest["step"], files)
    (path / "manifest.json").write_text(text)
    return path
