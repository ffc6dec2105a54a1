"""How long reading a folder of foreign logs takes, and how much memory.

    python scripts/bench_records.py FOLDER [--repeats 3] [--json OUT]

Each repeat is a process of its own, because the peak memory of a process never falls. The public repository's
`records` folder (1,900 files, 262 MB) is to take less than 60 s on two cores and less than 500 MB.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def measure(folder: Path) -> dict[str, Any]:
    """Return what one reading of the folder takes, in this process."""
    from nanorun.records.reading import read_logs

    start, start_cpu = time.perf_counter(), time.process_time()
    found = read_logs([folder])
    return {
        "seconds": round(time.perf_counter() - start, 3),
        "cpu_seconds": round(time.process_time() - start_cpu, 3),
        "peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "files_read": found.n_files,
        "runs": len(found.runs),
        "skipped": len(found.skipped),
    }


def size_of(folder: Path) -> dict[str, int]:
    """Return how many files the folder holds, and their bytes."""
    sizes = [os.path.getsize(os.path.join(at, name)) for at, _, names in os.walk(folder) for name in names]
    return {"files": len(sizes), "bytes": sum(sizes)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the result to this file as well")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.folder.is_dir():
        parser.error(f"{options.folder} is no folder")
    if options.once:
        print(json.dumps(measure(options.folder)))
        return
    command = [sys.executable, __file__, str(options.folder), "--once"]
    repeats = [
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for _ in range(max(1, options.repeats))
    ]
    result = {
        **size_of(options.folder),
        "seconds": statistics.median(one["seconds"] for one in repeats),
        "peak_memory_mib": max(one["peak_memory_mib"] for one in repeats),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "repeats": repeats,
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
