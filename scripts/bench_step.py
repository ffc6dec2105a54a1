"""Time the training step of a track's preset and set it beside the machine's fp32 matrix rate.

Prints, for each preset: milliseconds of a step and of its optimizer part, tokens/s, and the share of the best
GEMM rate of the same process that the step reaches, by GPT.flops_per_token at the mean length of the rows of the
steps that are timed. `--micro` tries micro-batches, `--windows` validation passes, `--compile` adds the compiled step
and what compiling cost, `--deterministic` the step with deterministic algorithms alone. Presets take turns, so that a
machine whose speed drifts moves all alike; the medians are printed, and `--out` writes JSON.

    python scripts/bench_step.py --track sotu --optim adamw --optim muon --micro 1024,2048,4096 --compile
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from figures import write_figures
from mistakes import telling_mistakes
from rich.console import Console

from nanorun.config import resolve
from nanorun.doctor import gemm_gflops
from nanorun.tracks import load_track
from nanorun.training import distributed, setup
from nanorun.training.clock import TrainingClock
from nanorun.training.machine import deterministic_algorithms, keep_memory
from nanorun.training.setup import Options, Run
from nanorun.training.taking_up import Begun

DETERMINISTIC = " deterministic"


def make_run(track_name: str, optim: str, settings: list[str], data: Path, folder: str) -> Run:
    track = load_track(track_name)
    config = resolve(track, optim, settings)
    device, ranks = distributed.pick_device("auto"), distributed.Ranks()
    options = Options(runs=Path(folder), data=data)
    run = setup.set_up(config, track, options, Console(quiet=True), TrainingClock(), device, ranks, Begun())
    if device.type == "cpu":
        keep_memory()
    run.stepper.warm_up()
    return run


def time_steps(runs: dict[str, Run], steps: int) -> dict[str, tuple[float, float]]:
    """Return median seconds of a step and of its update for each run, the runs taking turns."""
    whole: dict[str, list[float]] = {name: [] for name in runs}
    updates: dict[str, list[float]] = {name: [] for name in runs}
    for name, run in runs.items():
        run.stepper.update = _timed(run.stepper.update, updates[name])  # type: ignore[method-assign]
    for step in range(steps):
        for name, run in runs.items():
            with deterministic_algorithms(name.endswith(DETERMINISTIC)):
                began = time.perf_counter()
                float(run.stepper.step(step, 1.0).loss)
                whole[name].append(time.perf_counter() - began)
    return {name: (statistics.median(whole[name]), statistics.median(updates[name])) for name in runs}


def _timed(call: Any, into: list[float]) -> Any:
    def timed(*arguments: Any) -> Any:
        began = time.perf_counter()
        result = call(*arguments)
        into.append(time.perf_counter() - began)
        return result

    return timed


@telling_mistakes("bench_step")
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--track", default="sotu")
    parser.add_argument("--optim", action="append")
    parser.add_argument("--set", dest="settings", action="append", default=[])
    parser.add_argument("--micro", default="", help="tokens of a micro-batch to try, with commas")
    parser.add_argument("--windows", default="", help="validation windows a pass to try, with commas")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        document = measure(arguments, folder)
    print(json.dumps(document, indent=1))
    if arguments.out:
        write_figures(arguments.out, "bench_step.py", None, **document)


def measure(arguments: argparse.Namespace, folder: str) -> dict[str, Any]:
    runs: dict[str, Run] = {}
    for optim in arguments.optim or ["adamw", "muon"]:
        for micro in arguments.micro.split(","):
            settings = list(arguments.settings)
            run = make_run(arguments.track, optim, settings, arguments.data, folder)
            if micro:
                run.stepper.micro_batch_rows = max(1, int(micro) // run.config.model.context_len)
            runs[f"{optim} {micro}".strip()] = run
    document: dict[str, Any] = {
        "track": arguments.track,
        "rows": [],
    }
    rate = gemm_gflops()
    if arguments.compile:
        document["compile_seconds"] = {}
        for optim in arguments.optim or ["adamw", "muon"]:
            run = make_run(arguments.track, optim, arguments.settings, arguments.data, folder)
            began = time.perf_counter()
            run.stepper.compile()
            run.stepper.warm_up()
            document["compile_seconds"][optim] = time.perf_counter() - began
            runs[f"{optim} compiled"] = run
    if arguments.deterministic:
        for optim in arguments.optim or ["adamw", "muon"]:
            runs[optim + DETERMINISTIC] = make_run(
                arguments.track, optim, arguments.settings, arguments.data, folder
            )
    seconds = time_steps(runs, arguments.steps)
    rate = max(rate, gemm_gflops())
    document["gemm_gflops"] = rate
    for name, (step, update) in seconds.items():
        run = runs[name]
        tokens = run.config.train.batch_tokens
        flops = run.model.flops_per_token(run.config.mean_length(arguments.steps))
        reached = flops * tokens / step / 1e9
        document["rows"].append(
            {
                "name": name,
                "step_ms": step * 1e3,
                "optimizer_ms": update * 1e3,
                "tokens_per_second": tokens / step,
                "gflops": reached,
                "share_of_gemm": reached / rate,
            }
        )
    document["validation_tokens_per_second"] = {
        windows: _validation_rate(next(iter(runs.values())), int(windows))
        for windows in arguments.windows.split(",")
        if windows
    }
    return document


@torch.no_grad()
def _validation_rate(run: Run, windows: int) -> float:
    idx_BT = torch.randint(run.model.vocab_size, (windows, run.config.model.context_len))
    seconds = []
    for _ in range(6):
        began = time.perf_counter()
        run.model(idx_BT, idx_BT)
        seconds.append(time.perf_counter() - began)
    return idx_BT.numel() / statistics.median(seconds)


if __name__ == "__main__":
    main()
