"""How many threads a run on a CPU computes with, and whether other programs want the same cores.

The number is settled once, before the clock starts: it moves a run's bits as well as its speed. Waiting threads spin,
as OpenMP has them by default; letting them sleep (GOMP_SPINCOUNT=0) helps beside a busy program no more than one
thread fewer does, and costs a fifth to two fifths of a step without one (docs/performance.md).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from statistics import median_high
from typing import NamedTuple

import psutil
import torch

from nanorun.training.step import Stepper

STATED_IN = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Where a user, or torchrun, states the number of threads."""
LEAST_GAIN = 0.1
"""Share of the step that another number of threads has to save before it is taken: less may be chance, and chance
would give two runs of one command other bits."""
CLEARLY_SLOWER = 1.25
"""How many times as long one step with fewer threads takes where that alone rules them out."""
LONG_STEP_SECONDS = 1.0
"""A step of so long a time gains from every core, and trying fewer would take longer still."""
READINGS = 3
"""Of each of two numbers, at most; their medians are compared."""
BUSY_SHARE = 0.1
"""Share of a core that makes another program one of the busy ones."""


class Cores(NamedTuple):
    """What this process may compute on."""

    physical: int
    logical: int
    """With the second threads of cores that have two."""


class Others(NamedTuple):
    """What other programs took of the machine for a while."""

    cores: float
    """So many cores' time."""
    n_busy: int
    """Programs that took a tenth of a core or more."""


class Settled(NamedTuple):
    """What came of settling the number of threads."""

    line: str = ""
    """What is to be said of it."""
    step_seconds: float | None = None
    """Of a step with the number settled on, of the slowest rank; None where none was tried."""


class Watcher:
    """Reads what other programs take of the machine from when it was made."""

    def __init__(
        self,
        read: Callable[[], Mapping[int, float]] | None = None,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._read, self._now = read or seconds_of_others, now
        self._began, self._before = self._now(), self._read()

    def others(self) -> Others:
        """Return what was taken since then by the programs that were there all along."""
        seconds = max(self._now() - self._began, 1e-9)
        after = self._read()
        shares = [(after[pid] - self._before[pid]) / seconds for pid in after.keys() & self._before.keys()]
        return Others(sum(shares), sum(share >= BUSY_SHARE for share in shares))


def seconds_of_others() -> dict[int, float]:
    """Return the CPU seconds of every process by its id, this one and its fellow ranks left out."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1
    found = {}
    for one in psutil.process_iter(["pid", "ppid", "cpu_times"]):
        of = one.info
        ours = of["pid"] == os.getpid() or (ranks and of["ppid"] == os.getppid())
        if not ours and of["cpu_times"] is not None:
            found[of["pid"]] = of["cpu_times"].user + of["cpu_times"].system
    return found


def usable_cores() -> Cores:
    """Return the cores that affinity and control groups leave this process, shared with the ranks beside it."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    siblings = set()
    for cpu in allowed:
        place = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        with suppress(OSError):
            siblings.add(place.read_text().strip())
    physical = len(siblings) or psutil.cpu_count(logical=False) or len(allowed)
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    logical = max(1, int(min(len(allowed), quota())) // ranks)
    return Cores(min(max(1, physical // ranks), logical), logical)


def quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """Return how many cores' time this process's control groups allow it; inf where they set no limit."""
    found = [math.inf]
    with suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            base = root / "cpu" if controllers else root
            folder = base / path.lstrip("/")
            # In a container the path may be the host's, and what is mounted is the container's own group.
            places = [place for place in (folder, *folder.parents) if place.is_relative_to(base)]
            found += [_limit(place) for place in places]
    return min(found)


def _limit(group: Path) -> float:
    with suppress(OSError, ValueError):
        allowed, period = map(float, (group / "cpu.max").read_text().split())
        return allowed / period
    with suppress(OSError, ValueError):
        allowed, period = (float((group / f"cpu.cfs_{what}_us").read_text()) for what in ("quota", "period"))
        return allowed / period if allowed > 0 else math.inf
    return math.inf


def fastest(step_seconds: Callable[[int], float], cores: Cores, taken: int = 0) -> tuple[int, float]:
    """Return the number of threads whose steps are shortest, and the seconds of the best of those steps.

    It is one thread for each physical core unless another number is clearly better. `step_seconds` times one step
    with a number of threads. Tried are one thread for each logical core, the cores that `taken` others leave, and
    halves for as long as they are no slower.
    """
    usual = cores.physical
    # The first one makes buffers. On cores that others compute on it would take many times as long.
    step_seconds(usual - taken if 0 < taken < usual else usual)
    best, seconds = usual, [step_seconds(usual)]
    if seconds[0] > LONG_STEP_SECONDS and not taken:
        return usual, seconds[0]
    others = [n for n in dict.fromkeys((cores.logical, usual - taken)) if 0 < n != usual]
    halves = [usual >> k for k in range(1, usual.bit_length())]
    for n in dict.fromkeys([*others, *halves]):
        mine, theirs = [step_seconds(n)], seconds[-1:]
        if mine[0] > CLEARLY_SLOWER * median_high(seconds):
            if n in others:
                continue
            break
        while len(mine) < READINGS and not _decided(mine, theirs):
            theirs.append(step_seconds(best))
            mine.append(step_seconds(n))
        if median_high(mine) < (1 - LEAST_GAIN) * median_high(theirs):
            best, seconds = n, mine
        else:
            seconds = theirs
    return best, min(seconds)


def _decided(mine: list[float], theirs: list[float]) -> bool:
    """Whether a third reading of each could not change what their medians say: it is never beyond the first two."""
    if len(mine) < READINGS - 1:
        return False
    clear = max(mine) < (1 - LEAST_GAIN) * min(theirs)
    return clear or min(mine) >= (1 - LEAST_GAIN) * max(theirs)


def settle(stepper: Stepper, watcher: Watcher, asked: int = 0) -> Settled:
    """Set the number of threads that a new run computes with, the same on all ranks; return what came of it.

    `asked` is taken as it is; without it (0) what the environment states stays. Beside other programs that want the
    same cores the line warns of them.
    """
    ranks, usual, others = stepper.ranks, torch.get_num_threads(), watcher.others()
    cores, seconds = Cores(*(round(-ranks.slowest(-float(n))) for n in usable_cores())), None
    if asked:
        torch.set_num_threads(asked)
        usual = asked
    # Stated on one host, it is tried on none: a rank that tries waits for all others.
    elif not ranks.any(any(os.environ.get(name) for name in STATED_IN)):

        def step_seconds(n: int) -> float:
            torch.set_num_threads(n)
            return ranks.slowest(stepper.warm_up())

        with stepper.rehearsing():
            chosen, seconds = fastest(step_seconds, cores, taken=round(ranks.slowest(others.cores)))
        torch.set_num_threads(chosen)
    return Settled(told(others, cores, usual=usual, chosen=torch.get_num_threads()), seconds)


def told(others: Others, cores: Cores, *, usual: int, chosen: int) -> str:
    """Return what is to be said of the number of threads, and of programs on the cores that torch would have used."""
    threads = f"{chosen} thread{'s' if chosen != 1 else ''}"
    line = "" if chosen == usual else f"training with {threads}, which is faster here than torch's {usual}"
    if not others.n_busy or others.cores + usual <= cores.logical + BUSY_SHARE:
        return line
    programs = "1 other program takes" if others.n_busy == 1 else f"{others.n_busy} other programs take"
    return (
        f"note: {programs} {others.cores:.1f} of the {cores.logical} cores: {line or f'training with {threads}'}; "
        "seconds will not compare with those of a quiet machine"
    )
