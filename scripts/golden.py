"""Compare the first losses of the tracks on embedded corpora with those that are kept, or keep new ones.

    python scripts/golden.py                 compare, on this machine, and exit with 1 where a loss has moved
    python scripts/golden.py --write         keep what comes out now as tests/golden/<torch version>.json

A loss that moves where nobody meant it to is a change of the algorithm: look for it before writing. After a change
that is meant to move it, write, and say in the commit why.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console

from nanorun.config import resolve
from nanorun.optim.schedules import scale_at
from nanorun.tracks import load_track
from nanorun.training import setup
from nanorun.training.clock import TrainingClock
from nanorun.training.distributed import Ranks
from nanorun.training.setup import Options
from nanorun.training.taking_up import Begun

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "golden"
TRACKS = ("shakespeare-sprint", "sotu", "shakespeare")
PRESETS = ("adamw", "muon")
N_STEPS = 20
TOLERANCE = 2e-4
"""Nats a token. One thread or two, SSE, AVX2 or AVX-512 (ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA,
MKL_ENABLE_INSTRUCTIONS) moved no loss by more than 2e-5; a learning rate 1 % off, of one role alone, moved one by at
least 8e-4."""


def first_losses(
    track_name: str,
    preset: str,
    *,
    data: Path,
    settings: tuple[str, ...] = (),
    device: torch.device = torch.device("cpu"),  # noqa: B008
    n_steps: int = N_STEPS,
) -> list[float]:
    """Return the training losses of a preset's first steps, as written and in fp32."""
    track = load_track(track_name)
    plan = resolve(track, preset, ["train.precision=fp32", *settings])
    with tempfile.TemporaryDirectory() as folder:
        options = Options(runs=Path(folder), data=data)
        quiet = Console(quiet=True)
        run = setup.set_up(plan, track, options, quiet, TrainingClock(), device, Ranks(), Begun())
        losses = []
        for step in range(n_steps):
            scale = scale_at(
                plan.train.schedule,
                step,
                steps=plan.train.steps,
                warmup_steps=plan.train.warmup_steps,
                cooldown_fraction=plan.train.cooldown_fraction,
                final_scale=plan.train.final_scale,
                cycles=plan.train.cycles,
            )
            losses.append(round(float(run.stepper.step(step, scale).loss), 6))
            run.optimizers.after_step(step + 1)
        run.stepper.close()
    return losses


def kept_file() -> Path:
    """Return where the losses of this version of torch are kept: versions differ in the order of their sums."""
    return FOLDER / f"{'.'.join(torch.__version__.split('.')[:2])}.json"


def largest_move(found: list[float], kept: list[float]) -> float:
    """Return by how much the loss that moved most has moved; infinite where there are not as many, or one is NaN."""
    moves = [abs(one - other) for one, other in zip(found, kept)]
    comparable = len(found) == len(kept) and all(move < float("inf") for move in moves)
    return max(moves) if comparable else float("inf")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="keep what comes out now")
    parser.add_argument("--data", type=Path, default=Path("data"))
    arguments = parser.parse_args()
    path = kept_file()
    kept = json.loads(path.read_text()) if path.exists() else {}
    losses, moved = {}, False
    for name, track, preset in ((f"{t} {p}", t, p) for t in TRACKS for p in PRESETS):
        losses[name] = first_losses(track, preset, data=arguments.data)
        move = largest_move(losses[name], kept.get(name, []))
        moved |= not move <= TOLERANCE
        print(
            f"{name}: {losses[name][-1]:.6f} after {N_STEPS} steps, moved by at most {move:.1e}", flush=True
        )
    if arguments.write:
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(losses, indent=1) + "\n")
        print(f"written: {path}")
    elif moved:
        sys.exit(f"a loss is more than {TOLERANCE} away from {path}, or is not there")


if __name__ == "__main__":
    main()
