"""What saving checkpoints beside the steps costs the steps.

Blocks of steps take turns: in every other one a checkpoint is begun after the first step, as a run does it, and written
while the rest goes on. Told are the milliseconds of a step without and with, the share by which the block is slower,
that of the steps alone that ran while the thread was writing, and the pause in which the copy is taken, which is not
counted as training.

    python scripts/bench_checkpoint.py --out records/benchmarks/checkpoint.json

The larger model is a GPT of 14 million parameters on the tokens of shakespeare-sprint.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_step import make_run
from figures import write_figures
from mistakes import telling_mistakes

from nanorun.training import checkpoint
from nanorun.training.setup import Run

CASES: dict[str, tuple[str, str, list[str]]] = {
    "sotu muon": ("sotu", "muon", []),
    "sotu adamw": ("sotu", "adamw", []),
    "14M muon": (
        "shakespeare-sprint",
        "muon",
        ["model.n_layer=8", "model.n_head=6", "model.n_embd=384", "train.batch_tokens=1024"],
    ),
}


def snapshot(run: Run) -> checkpoint.Snapshot:
    return checkpoint.Snapshot.of(
        run.done,
        model=run.model.state_dict(),
        optimizer=run.optimizers.state_dict(),
        state={"step": run.done},
    )


class Block:
    """Milliseconds of the steps of one block, and what was saved meanwhile."""

    def __init__(self, run: Run, steps: int, *, saves: bool) -> None:
        self.ms: list[float] = []
        self.ms_while_writing: list[float] = []
        self.pause_ms = self.writing_ms = 0.0
        began = 0.0
        for index in range(steps):
            writing = run.saver.busy
            self._step(run, writing)
            if writing and not run.saver.busy:
                self.writing_ms = (time.perf_counter() - began) * 1e3
            if saves and index == 0:
                began = time.perf_counter()
                run.saver.begin(snapshot(run))
                self.pause_ms = (time.perf_counter() - began) * 1e3
        run.saver.wait()
        if saves and not self.writing_ms:
            self.writing_ms = (time.perf_counter() - began) * 1e3

    def _step(self, run: Run, writing: bool) -> None:
        began = time.perf_counter()
        float(run.stepper.step(run.done % run.config.train.steps, 1.0).loss)
        run.done += 1
        taken = (time.perf_counter() - began) * 1e3
        self.ms.append(taken)
        if writing:
            self.ms_while_writing.append(taken)


def measure(name: str, arguments: argparse.Namespace, folder: str) -> dict[str, Any]:
    track, optim, settings = CASES[name]
    run = make_run(track, optim, [*settings, *arguments.settings], arguments.data, folder)
    run.saver.also = None  # there are no metrics here
    Block(run, arguments.steps, saves=False)
    plain, saving = [], []
    for _ in range(arguments.blocks):
        plain.append(Block(run, arguments.steps, saves=False))
        saving.append(Block(run, arguments.steps, saves=True))
    # The first step of a block is before the save in either kind.
    step_ms = statistics.mean(ms for block in plain for ms in block.ms[1:])
    saving_ms = statistics.mean(ms for block in saving for ms in block.ms[1:])
    beside = [ms for block in saving for ms in block.ms_while_writing]
    return {
        "case": name,
        "parameters": run.model.n_parameters(),
        "steps_of_a_block": arguments.steps,
        "step_ms": round(step_ms, 2),
        "step_ms_with_a_checkpoint": round(saving_ms, 2),
        "slower": round(saving_ms / step_ms - 1, 4),
        "steps_beside_writing": len(beside),
        "slower_beside_writing": round(statistics.mean(beside) / step_ms - 1, 4) if beside else None,
        "pause_ms": round(statistics.median(block.pause_ms for block in saving), 2),
        "writing_ms": round(statistics.median(block.writing_ms for block in saving), 1),
    }


@telling_mistakes("bench_checkpoint")
def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", action="append", choices=list(CASES))
    parser.add_argument("--steps", type=int, default=8, help="steps of a block, and so from save to save")
    parser.add_argument("--blocks", type=int, default=6, help="blocks of each kind")
    parser.add_argument("--set", dest="settings", action="append", default=[])
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(words)
    rows = []
    for name in arguments.case or CASES:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(name, arguments, folder))
        print(json.dumps(rows[-1]), flush=True)
    if arguments.out:
        write_figures(arguments.out, "bench_checkpoint.py", words, rows=rows)


if __name__ == "__main__":
    main()
