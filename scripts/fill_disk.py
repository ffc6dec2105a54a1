"""Train on disks that are too small, then on the same disks made larger, and compare with a run that had room.

Each disk is a tmpfs of a few KiB more than the one before, so that it fills in another write each time: of the
config, the metrics, a checkpoint's weights, optimizer or manifest, the result. A run on a full disk goes on or ends
with a sentence and exit code 2; the checkpoints that it has stay whole; and the same command, once there is room, ends
with the bits of a run that never wanted any.

    sudo python scripts/fill_disk.py --disks 24 --out records/benchmarks/full-disks.json

Mounting takes root; without it the script says so and ends with 0, or with 1 under --require.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from figures import write_figures
from kill_runs import Case, a_place, differences, run_to_the_end, start, wait

from nanorun.errors import UserError
from nanorun.training import checkpoint

CASE = Case("muon", "ema")
ROOMY_KIB = 65536


class Outcome(NamedTuple):
    """What became of a run on one disk."""

    kib: int
    code: int
    says: str
    checkpoints: int
    """Whole ones that it left."""
    faults: list[str]


def mount(folder: Path, kib: int, *options: str) -> None:
    words = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={kib}k", *options]), "tmpfs", str(folder)]
    subprocess.run(words, check=True, capture_output=True, text=True)


def why_not(folder: Path) -> str:
    """Return why no disk can be mounted here, or ''."""
    try:
        mount(folder, 64)
    except (subprocess.CalledProcessError, OSError) as error:
        return (getattr(error, "stderr", "") or str(error)).strip()
    subprocess.run(["umount", str(folder)], check=True)
    return ""


def try_disk(kib: int, disk: Path, whole: Path, log: Path) -> Outcome:
    """Return what became of a run whose folder of runs is a disk of `kib` KiB."""
    words = [*CASE.words("small"), "--runs", str(disk)]
    mount(disk, kib)
    try:
        code = wait(start(words, log), None) or 0
        text = log.read_text()
        faults = ["a traceback"] if "Traceback" in text else []
        if code not in (0, 2):
            faults.append(f"exit code {code}")
        if code == 2 and "disk" not in text:
            faults.append("no word of the disk")
        folders, n_whole = checkpoint.checkpoints(disk / "small" / "checkpoints"), 0
        for folder in folders:
            try:
                checkpoint.load(folder, run=checkpoint.identity(disk / "small"))
                n_whole += 1
            except UserError as error:
                faults.append(str(error))
        mount(disk, ROOMY_KIB, "remount")
        run_to_the_end(words, log)
        faults += differences(whole, disk / "small")
        said = [line for line in text.splitlines() if "disk" in line]
        return Outcome(kib, code, said[-1][:200] if said else "", n_whole, faults)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def try_disks(sizes: Sequence[int], folder: Path) -> list[Outcome]:
    disk, log = folder / "disk", folder / "log"
    run_to_the_end(CASE.words("whole"), log)
    outcomes = []
    for kib in sizes:
        outcome = try_disk(kib, disk, folder / "runs" / "whole", log)
        outcomes.append(outcome)
        says = "; ".join(outcome.faults) or "same bits once there is room"
        print(f"{kib:6} KiB: exit code {outcome.code}, {outcome.checkpoints} checkpoints: {says}", flush=True)
    return outcomes


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--disks", type=int, default=24)
    parser.add_argument("--first", type=int, default=8, help="KiB of the smallest")
    parser.add_argument("--last", type=int, default=1800, help="KiB of the largest")
    parser.add_argument("--require", action="store_true", help="fail where nothing can be mounted")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    arguments = parser.parse_args(words)
    step = (arguments.last - arguments.first) / max(1, arguments.disks - 1)
    sizes = [round(arguments.first + step * index) for index in range(arguments.disks)]
    with a_place() as folder:
        (folder / "disk").mkdir()
        if reason := why_not(folder / "disk"):
            print(f"skipped: no disk can be mounted here ({reason})")
            return int(arguments.require)
        outcomes = try_disks(sizes, folder)
    good = sum(not one.faults for one in outcomes)
    print(f"{len(outcomes)} disks, {sum(one.code == 2 for one in outcomes)} too small; {good} lost nothing")
    if arguments.out:
        write_figures(arguments.out, "fill_disk.py", words, disks=[one._asdict() for one in outcomes])
    return 0 if good == len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
