"""How long `nanorun report` takes on many records, start-up included.

    python scripts/bench_report.py --records 10000

Writes made-up records (about 20 kB each) to a temporary folder and runs the command as a whole process: without an
index of the records, with one, and after a record changed. Fails if the tables differ.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(HERE), str(HERE / "tests")]

from mistakes import telling_mistakes  # noqa: E402
from records_samples import a_dict  # noqa: E402

from nanorun.tracks import load_track  # noqa: E402


def write_records(folder: Path, n: int, track: str, points: int) -> int:
    """Fill `folder` with `n` records of `track` and return their bytes."""
    total = 0
    for index in range(n):
        content = a_dict(
            name=f"preset{index % 20}",
            seed=index // 20,
            seconds=30 + index % 20 + index % 7 / 10,
            final=1.53 + index % 11 / 1000,
            points=points,
            track=track,
        )
        place = folder / track / content["id"]
        place.mkdir(parents=True)
        text = json.dumps(content)
        (place / "record.json").write_text(text, encoding="utf-8")
        total += len(text)
    return total


def run(command: list[str], cache: Path) -> tuple[float, dict[str, Any]]:
    """Return the seconds of a whole process and the table it printed."""
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "XDG_CACHE_HOME": str(cache)}
    start = time.perf_counter()
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return seconds, json.loads(done.stdout)


@telling_mistakes("bench_report")
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=1000, help="how many records")
    parser.add_argument("--points", type=int, default=190, help="validation points of each")
    parser.add_argument("--repeats", type=int, default=5, help="times the command is run with an index")
    parser.add_argument("--track", default="sotu")
    asked = parser.parse_args()
    load_track(asked.track)
    with tempfile.TemporaryDirectory() as name:
        folder, cache = Path(name) / "records", Path(name) / "cache"
        size = write_records(folder, asked.records, asked.track, asked.points)
        command = [sys.executable, "-m", "nanorun", "report", "--records", str(folder)]
        command += ["--track", asked.track, "--json"]
        # Files that changed a moment ago are not indexed yet.
        time.sleep(2.5)
        cold, first = run(command, cache)
        timed = [run(command, cache) for _ in range(asked.repeats)]
        next((folder / asked.track).glob("*/record.json")).touch()
        changed, last = run(command, cache)
        if any(table != first for table in (last, *(table for _, table in timed))):
            sys.exit("the table with the index is another one than without")
        index = sum(path.stat().st_size for path in cache.rglob("*.json"))
    warm = [seconds for seconds, _ in timed]
    print(f"{asked.records} records, {size // max(asked.records, 1)} bytes each, {len(first['rows'])} rows")
    print(f"without an index, which is then written ({index:,} bytes): {cold:.2f} s")
    print(f"with it: {' '.join(f'{seconds:.2f}' for seconds in warm)} s; least {min(warm):.2f} s")
    print(f"after one record changed: {changed:.2f} s")


if __name__ == "__main__":
    main()
