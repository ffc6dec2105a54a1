"""Show how long nanorun takes to start: to import, to help, to report, and to train its first step.

    python scripts/bench_start.py [--tracks sotu shakespeare-sprint] [--repeats 3] [--records DIR] [--out OUT]

Each figure is of a new Python, and the least of the repeats. An import is told less an empty Python's start. A run's
first step is seen in its metrics.jsonl, with its data prepared by an earlier run and not; the run is then stopped,
and its clock says what set-up, and warming up with the choice of threads and of compiled code, took of it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from figures import write_figures
from mistakes import telling_mistakes

from nanorun.tracks import load_track
from nanorun.training.checkpoint import newest_of

PACKAGES = ("nanorun", "nanorun.cli", "torch", "nanorun.training.run")
MOST_SECONDS = 120.0


def python_seconds(*words: str) -> float:
    """Return how long a Python process takes from its start to its end."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def first_step(track: str, folder: Path) -> dict[str, float]:
    """Return the seconds from a run's start to its first step, and what its clock charged to set-up and warm-up."""
    shutil.rmtree(folder / "runs", ignore_errors=True)
    words = [sys.executable, "-m", "nanorun", "train", "--track", track, "--run-name", "start", "--no-record"]
    metrics = folder / "runs" / "start" / "metrics.jsonl"
    # By its absolute path: the run begins in a folder of its own.
    root = str(Path(__file__).resolve().parent.parent)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    began = time.perf_counter()
    process = subprocess.Popen(words, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
    try:
        while not (metrics.exists() and metrics.stat().st_size):
            if process.poll() is not None:
                sys.exit(f"{' '.join(words[1:])} ended with {process.returncode} before its first step")
            if time.perf_counter() - began > MOST_SECONDS:
                sys.exit(f"{' '.join(words[1:])} came to no first step in {MOST_SECONDS:.0f} s")
            time.sleep(0.005)
        seconds = time.perf_counter() - began
        process.send_signal(signal.SIGTERM)
        process.wait(MOST_SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()
    clock = newest_of(metrics.parent)[0].state["clock"]
    return {"seconds": seconds, "setup_seconds": clock["setup"], "warm_up_seconds": clock["compile"]}


def least(readings: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(min(one[key] for one in readings), 3) for key in readings[0]}


def measure(tracks: list[str], repeats: int, records: Path) -> dict[str, Any]:
    """Return the figures: `imports` and `commands` in seconds, `first_step` by track."""
    commands = {"--help": ["--help"], "report": ["report", "--records", str(records)]}
    python_seconds("-c", "import nanorun.training.run")  # the first reads every file from the disk
    empty, imports, ran = [], {name: [] for name in PACKAGES}, {name: [] for name in commands}
    for _ in range(repeats):
        empty.append(python_seconds("-c", "pass"))
        for name in PACKAGES:
            imports[name].append(python_seconds("-c", f"import {name}"))
        for name, words in commands.items():
            ran[name].append(python_seconds("-m", "nanorun", *words))
    found: dict[str, Any] = {
        "empty_python": round(min(empty), 4),
        "imports": {name: round(max(0.0, min(took) - min(empty)), 4) for name, took in imports.items()},
        "commands": {name: round(min(took), 4) for name, took in ran.items()},
        "first_step": {},
    }
    for track in tracks:
        with tempfile.TemporaryDirectory() as folder:
            fresh, prepared = [], []
            for _ in range(repeats):
                shutil.rmtree(Path(folder) / "data", ignore_errors=True)
                fresh.append(first_step(track, Path(folder)))
                prepared.append(first_step(track, Path(folder)))
        found["first_step"][track] = {"data to be prepared": least(fresh), "data prepared": least(prepared)}
    return found


def show(found: dict[str, Any]) -> None:
    for name, seconds in found["imports"].items():
        print(
            f"import {name:<24} {seconds * 1e3:7.0f} ms beyond Python's own {found['empty_python'] * 1e3:.0f}"
        )
    for name, seconds in found["commands"].items():
        print(f"nanorun {name:<23} {seconds * 1e3:7.0f} ms")
    for track, kinds in found["first_step"].items():
        for kind, parts in kinds.items():
            print(
                f"nanorun train --track {track}, {kind}: first step after {parts['seconds']:.2f} s "
                f"(set-up {parts['setup_seconds']:.2f}, warm-up {parts['warm_up_seconds']:.2f})"
            )


@telling_mistakes("bench_start")
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tracks", nargs="+", default=["sotu", "shakespeare-sprint"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--records", type=Path, default=Path("records"))
    parser.add_argument("--out", type=Path, metavar="OUT")
    arguments = parser.parse_args(argv)
    for track in arguments.tracks:
        load_track(track)
    found = measure(arguments.tracks, arguments.repeats, arguments.records)
    show(found)
    if arguments.out:
        write_figures(arguments.out, "bench_start.py", argv, **found)


if __name__ == "__main__":
    main()
