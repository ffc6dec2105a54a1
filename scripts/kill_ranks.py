"""Kill ranks of a run at random moments, let torchrun start all again, and compare with a run that was never killed.

One `torchrun --max-restarts N -m nanorun train …` has to end by itself however often a rank gets SIGKILL: all ranks go
on from the newest checkpoint that is whole. In the end these have to be the same, to the bit: weights, optimizers'
state, every row of the metrics and the record, but for seconds and what they name.

    python scripts/kill_ranks.py --kills 20 --out records/benchmarks/kill-ranks.json

Rank and moment are drawn from --seed, the moment as a share of the time that a run takes when nobody kills it; what
the ranks were doing then depends on the machine.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from figures import write_figures
from kill_runs import Case, a_place, differences, forget, lost

CASE = Case("muon", "accumulation")
SECONDS_PER_PART = 120.0
"""No part of a tiny run takes longer unless it hangs."""


class Kill(NamedTuple):
    """One rank killed."""

    rank: int
    after_seconds: float
    """Since its process was there."""
    seconds_to_restart: float
    """Until all ranks had new processes."""


def torchrun(n_ranks: int, restarts: int, run: str, steps: int, log: Path) -> psutil.Popen:
    """Return the process of a torchrun whose ranks train the run in runs/RUN."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n_ranks)]
    words = [
        *launcher,
        "--max-restarts",
        str(restarts),
        "-m",
        "nanorun",
        *CASE.words(run),
        "--set",
        f"train.steps={steps}",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("w") as output:
        return psutil.Popen([sys.executable, *words], stdout=output, stderr=output, env=environment)


def ranks_of(process: psutil.Popen) -> dict[int, psutil.Process]:
    """Return the processes of torchrun's ranks."""
    found = {}
    for child in process.children():
        try:
            found[int(child.environ()["RANK"])] = child
        except (psutil.Error, KeyError):  # it ended, or has not become a rank yet
            continue
    return found


def wait_for_ranks(
    process: psutil.Popen, n_ranks: int, other_than: set[int]
) -> dict[int, psutil.Process] | None:
    """Return the ranks once all are there and new; None where torchrun ended."""
    ends = time.monotonic() + SECONDS_PER_PART
    while process.poll() is None:
        ranks = ranks_of(process)
        if len(ranks) == n_ranks and not other_than & {one.pid for one in ranks.values()}:
            return ranks
        if time.monotonic() > ends:
            process.kill()
            sys.exit(f"the ranks did not come back within {SECONDS_PER_PART:.0f} s")
        time.sleep(0.01)
    return None


def kill_some(
    process: psutil.Popen, n_ranks: int, n_kills: int, seconds: float, chance: random.Random
) -> list[Kill]:
    """Return the kills that came to pass before torchrun ended; at most `n_kills`, one in each start of the ranks."""
    kills: list[Kill] = []
    old: set[int] = set()
    while len(kills) < n_kills:
        ranks = wait_for_ranks(process, n_ranks, old)
        if ranks is None:
            break
        after, rank = chance.uniform(0.0, seconds), chance.randrange(n_ranks)
        time.sleep(after)
        old = {one.pid for one in ranks.values()}
        try:
            ranks[rank].kill()
        except psutil.NoSuchProcess:  # the run was faster
            break
        began = time.monotonic()
        if wait_for_ranks(process, n_ranks, old) is None:
            break
        kills.append(Kill(rank, round(after, 3), round(time.monotonic() - began, 3)))
    return kills


def ended_well(process: psutil.Popen, log: Path) -> None:
    try:
        code = process.wait(SECONDS_PER_PART)
    except psutil.TimeoutExpired:
        process.terminate()
        sys.exit(f"the run hangs:\n{log.read_text()[-3000:]}")
    if code:
        sys.exit(f"torchrun ended with {code}:\n{log.read_text()[-3000:]}")


def kill_and_compare(
    n_ranks: int, n_kills: int, per_run: int, steps: int, chance: random.Random, log: Path
) -> list[dict[str, Any]]:
    """Return what each run came to; the kills are dealt out to runs of at most `per_run` each."""
    began = time.monotonic()
    ended_well(torchrun(n_ranks, 0, "whole", steps, log), log)
    seconds = time.monotonic() - began
    print(f"never killed: {seconds:.1f} s on {n_ranks} ranks", flush=True)
    outcomes: list[dict[str, Any]] = []
    left = n_kills
    while left:
        process = torchrun(n_ranks, n_kills, "killed", steps, log)
        kills = kill_some(process, n_ranks, min(left, per_run), seconds, chance)
        ended_well(process, log)
        found = differences(Path("runs/whole"), Path("runs/killed"))
        left -= len(kills)
        slowest = max((kill.seconds_to_restart for kill in kills), default=0.0)
        outcomes.append(
            {"kills": [one._asdict() for one in kills], "lost_seconds": lost("killed"), "differs": found}
        )
        print(
            f"{len(kills)} kills, {n_kills - left} of {n_kills} in all, ranks back after at most {slowest:.1f} s, "
            f"{lost('killed'):.2f} s of work lost: {', '.join(found) or 'same bits'}",
            flush=True,
        )
        forget(Path("runs/killed"))
    return outcomes


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--per-run", type=int, default=4, help="kills of one torchrun, at most")
    parser.add_argument(
        "--steps", type=int, default=600, help="of the run; what else a run does takes seconds"
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    arguments = parser.parse_args(words)
    with a_place() as folder:
        sizes = (arguments.ranks, arguments.kills, arguments.per_run, arguments.steps)
        outcomes = kill_and_compare(*sizes, random.Random(arguments.seed), folder / "log")
    total = sum(len(one["kills"]) for one in outcomes)
    good = sum(len(one["kills"]) for one in outcomes if not one["differs"])
    print(f"{good} of {total} killed ranks left no trace")
    if arguments.out:
        write_figures(arguments.out, "kill_ranks.py", words, n_ranks=arguments.ranks, runs=outcomes)
    return 0 if good == total else 1


if __name__ == "__main__":
    sys.exit(main())
