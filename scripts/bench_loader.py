"""What reading batches costs a training step: what the step waits for, and what the reading takes in all.

For tracks with an embedded corpus a real step is timed on this machine, with its batches prepared ahead and without,
the two and all tracks taking turns, so that a machine whose speed drifts moves all alike.

For fineweb-small's shape, 524,288 tokens a step in rows of 1,024, made-up shards of 100 million tokens are read, and
sleep stands in for the passes of a GPU: one rank's rows of 8 x H100 and of 1 x H100, once with the shards in memory
and once with their pages dropped before each step (`cold`). Every figure is of one rank: eight on a machine read
beside one another, each from a thread of its own.

    python scripts/bench_loader.py --out records/benchmarks/loader.json

Milliseconds are medians over steps, the first one aside, which also draws the order of its epoch; it is told by
itself. A share is of the step's own milliseconds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import mmap
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_step import make_run
from mistakes import telling_mistakes

from nanorun.data.batches import TokenSet, train_rows
from nanorun.data.shards import open_shard, write_shard
from nanorun.training.feed import Feed, Pair, Read, Span
from nanorun.training.machine import hardware, software
from nanorun.training.setup import Run

TRACKS = ("sotu", "shakespeare-sprint", "shakespeare")
CONTEXT_LEN = 1024
ROWS_PER_STEP = 512
"""524,288 tokens, which fineweb-small-optim fixes."""
VOCAB_SIZE = 50257
STEP_MS_8_H100 = 146.2
"""Mean of 3,375 steps of that shape: `step_avg` of the last run in tests/logs/seconds_twenty_runs.txt.xz, a log of
modded-nanogpt's track 3 on 8 x H100."""
GPUS = {
    "8 x H100": (8, STEP_MS_8_H100),
    # Eight times the work on one GPU, which has nobody to exchange gradients with.
    "1 x H100": (1, 8 * STEP_MS_8_H100),
}
PASS_ROWS = 32
"""Rows of one forward pass there."""


class TimedFeed(Feed):
    """A feed that counts the seconds it lets the caller wait, and those it works, on whichever thread."""

    def __init__(self, read: Read, device: torch.device, *, ahead: bool) -> None:
        super().__init__(read, device, ahead=ahead)
        self.waited = self.worked = 0.0

    def take(self, span: Span, then: Span | None = None) -> Pair:
        began = time.perf_counter()
        try:
            return super().take(span, then)
        finally:
            self.waited += time.perf_counter() - began

    def prepare(self, span: Span) -> Any:
        began = time.perf_counter()
        try:
            return super().prepare(span)
        finally:
            self.worked += time.perf_counter() - began


class Readings:
    """Milliseconds of each step of one way to run: the step's, its waiting and its loader's work."""

    def __init__(self) -> None:
        self.step: list[float] = []
        self.waiting: list[float] = []
        self.loader: list[float] = []

    def measured(self, feed: TimedFeed, step: Any) -> None:
        """Run one step and keep what it took."""
        waited, worked, began = feed.waited, feed.worked, time.perf_counter()
        step()
        self.step.append(1e3 * (time.perf_counter() - began))
        self.waiting.append(1e3 * (feed.waited - waited))
        self.loader.append(1e3 * (feed.worked - worked))

    def summary(self, step_ms: float | None = None) -> dict[str, float]:
        """Return medians without the first step, and the first step's waiting; `step_ms` of a step that is known."""
        step_ms = step_ms or statistics.median(self.step[1:])
        waiting = statistics.median(self.waiting[1:])
        return {
            "step_ms": step_ms,
            "waiting_ms": waiting,
            "waiting_share": waiting / step_ms,
            "worst_waiting_ms": max(self.waiting[1:]),
            "first_waiting_ms": self.waiting[0],
            "loader_ms": statistics.median(self.loader[1:]),
        }


def in_turn(contenders: dict[Any, Any], step: int) -> list[tuple[Any, Any]]:
    """Return the contenders' items, from the front and from the back by turns: who comes later has warmer caches."""
    items = list(contenders.items())
    return items[::-1] if step % 2 else items


def compared(ahead: Readings, without: Readings, step_ms: float | None = None) -> dict[str, dict[str, float]]:
    return {"ahead": ahead.summary(step_ms), "without": without.summary(step_ms)}


def time_tracks(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each track: its real steps with batches prepared ahead and without, taking turns."""
    runs: dict[tuple[str, bool], tuple[Run, TimedFeed]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for track, ahead in itertools.product(arguments.track or TRACKS, (True, False)):
            run = make_run(track, arguments.optim, arguments.settings, arguments.data, folder)
            feed = TimedFeed(run.stepper.feed.read, run.device, ahead=ahead)
            run.stepper.feed = feed
            runs[track, ahead] = run, feed
    readings = {key: Readings() for key in runs}
    for step in range(arguments.steps):
        for key, (run, feed) in in_turn(runs, step):
            readings[key].measured(feed, lambda run=run: float(run.stepper.step(step, 1.0).loss))  # noqa: B023
    rows = []
    for (track, ahead), (run, _) in runs.items():
        run.stepper.close()
        if ahead:
            tokens = run.config.train.batch_tokens
            times = compared(readings[track, True], readings[track, False])
            rows.append({"track": track, "optim": arguments.optim, "tokens_per_step": tokens, **times})
    return rows


def make_shards(folder: Path, n_shards: int, n_tokens: int) -> list[Path]:
    """Write shards of made-up tokens and return their paths."""
    paths = [folder / f"made_up_train_{number:06d}.bin" for number in range(n_shards)]
    for number, path in enumerate(paths):
        numbers = np.random.default_rng(number).integers(0, VOCAB_SIZE, n_tokens, dtype=np.uint16)
        write_shard(path, numbers)
    return paths


def drop_pages(mapped: list[Any], paths: list[Path]) -> None:
    """Have the system forget what it holds of the shards, as far as it lets go of it."""
    for tokens, path in zip(mapped, paths):
        # The mapping first: pages that a process has mapped stay.
        tokens._mmap.madvise(mmap.MADV_DONTNEED)
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def one_step(feed: Feed, step: int, rows_of_rank: int, pass_seconds: float) -> None:
    """Take a step's micro-batches, and sleep where a GPU would be busy with each."""
    starts = [step * ROWS_PER_STEP + first for first in range(0, rows_of_rank, min(PASS_ROWS, rows_of_rank))]
    spans = [Span(start, min(PASS_ROWS, rows_of_rank)) for start in (*starts, (step + 1) * ROWS_PER_STEP)]
    for span, then in itertools.pairwise(spans):
        feed.take(span, then)
        time.sleep(pass_seconds)


def time_fineweb(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each number of GPUs, in memory and cold, with batches prepared ahead and without."""
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        paths = make_shards(Path(folder), arguments.shards, arguments.shard_tokens)
        mapped = [open_shard(path) for path in paths]
        tokens = TokenSet(tuple(map(np.asarray, mapped)), 0, "made-up tokens")
        for (gpus, (n_ranks, step_ms)), cold in itertools.product(GPUS.items(), (False, True)):
            readings = {ahead: Readings() for ahead in (True, False)}
            rows_of_rank = ROWS_PER_STEP // n_ranks
            pass_seconds = arguments.speed * step_ms / 1e3 / max(1, rows_of_rank // PASS_ROWS)
            read = {
                ahead: partial(train_rows, tokens, seed=int(ahead), context_len=CONTEXT_LEN)
                for ahead in (True, False)
            }
            feeds = {
                ahead: TimedFeed(read[ahead], torch.device("cpu"), ahead=ahead) for ahead in (True, False)
            }
            for step in range(arguments.steps):
                for ahead, feed in in_turn(feeds, step):
                    if cold:
                        drop_pages(mapped, paths)
                    take = partial(one_step, feed, step, rows_of_rank, pass_seconds)
                    readings[ahead].measured(feed, take)
            for feed in feeds.values():
                feed.close()
            row = {"shape": f"fineweb-small on {gpus}", "cold": cold, "rows_of_rank": rows_of_rank}
            rows.append({**row, **compared(readings[True], readings[False], step_ms)})
    return rows


@telling_mistakes("bench_loader")
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--track", action="append", help=f"repeatable; without it {', '.join(TRACKS)}")
    parser.add_argument("--optim", default="muon")
    parser.add_argument("--set", dest="settings", action="append", default=[])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--shard-tokens", type=int, default=100_000_000)
    parser.add_argument("--speed", type=float, default=1.0, help="share of a GPU's time that is slept")
    parser.add_argument("--scratch", type=Path, help="a folder on the disk to measure")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    document = {
        "hardware": hardware(torch.device("cpu"), 1),
        "software": software(compiled=False),
        "tracks": time_tracks(arguments),
        "fineweb": {
            "shards": arguments.shards,
            "shard_tokens": arguments.shard_tokens,
            "rows": time_fineweb(arguments),
        },
    }
    print(json.dumps(document, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
