"""How long `nanorun report` takes on many records, start-up included.

    python scripts/bench_report.py --records 1000

Writes made-up records (about 20 kB each) to a temporary folder and runs the command as a whole process.
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

HERE = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(HERE), str(HERE / "tests")]

from records_samples import a_dict  # noqa: E402


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=1000, help="how many records")
    parser.add_argument("--points", type=int, default=190, help="validation points of each")
    parser.add_argument("--repeats", type=int, default=5, help="times the command is run")
    parser.add_argument("--track", default="sotu")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        size = write_records(Path(name), asked.records, asked.track, asked.points)
        command = [
            sys.executable,
            "-m",
            "nanorun",
            "report",
            "--records",
            name,
            "--track",
            asked.track,
            "--json",
        ]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
        seconds = []
        for _ in range(asked.repeats):
            start = time.perf_counter()
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            seconds.append(time.perf_counter() - start)
            if done.returncode:
                sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
        table = json.loads(done.stdout)
    print(f"{asked.records} records, {size // max(asked.records, 1)} bytes each, {len(table['rows'])} rows")
    print(f"seconds: {' '.join(f'{value:.2f}' for value in seconds)}; least {min(seconds):.2f}")


if __name__ == "__main__":
    main()
