"""The table of all optimizers on one track: the records of each preset as it stands now, beside what a step costs.

    python scripts/fair_table.py --track sotu --bench records/benchmarks/optim-sotu.json > table.md

Steps, seconds and losses come from the records under `records/<track>` whose config is the preset's of today;
milliseconds of the optimizer's step from `scripts/bench_optim.py --json`; bytes of state from the records; the
search's best loss from `records/benchmarks/tune-<track>/<preset>.json`. A preset that misses the target says by
how much.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from mistakes import telling_mistakes

from nanorun.config import make_config, resolve
from nanorun.errors import UserError
from nanorun.records.record import Record, read_records
from nanorun.records.report import MACHINE_ONLY, MACHINE_ONLY_TABLES, Row, TrackView, build_table
from nanorun.tables import flattened
from nanorun.tracks import Track, load_track, preset_names

TITLES = (
    *("Optimizer", "Seeds", "Steps", "Seconds", "First at or under the target", "Last loss", "p", "Counts"),
    *("Optimizer, ms a step", "State, bytes a parameter", "Best of its search"),
)


def of_today(record: Record, track: Track) -> bool:
    """Whether a record was made by the preset of its name as it stands now, seeds and the machine's choices aside."""
    if record.name not in preset_names(track):
        return False
    now = resolve(track, record.name).model_dump()
    try:
        # A record made before a key was added has the key's default.
        then = make_config(record.config, where=record.id).model_dump()
    except UserError:
        return False
    then_flat, now_flat = flattened(then), flattened(now)
    return all(
        then_flat.get(key) == now_flat.get(key)
        for key in {*then_flat, *now_flat}
        if key not in MACHINE_ONLY and not key.startswith(MACHINE_ONLY_TABLES)
    )


def cells(row: Row, record: Record, bench: dict[str, Any], best: float | None) -> list[str]:
    """Return one line of the table."""
    spread = "" if row.seconds_std is None else f" ±{row.seconds_std:.1f}"
    loss_spread = "" if row.loss_std is None else f" ±{row.loss_std:.4f}"
    if row.reached_n:
        share = "" if row.reached_n == row.seeds else f", {row.reached_n} of {row.seeds} seeds"
        crossing = f"step {row.reached_step_mean:.0f}, {row.reached_seconds_mean:.1f} s{share}"
    else:
        crossing = f"misses by {row.distance:.4f}"
    measured = bench.get(row.preset)
    assert row.loss_mean is not None
    return [
        f"`{row.preset}`",
        str(row.n),
        f"{row.steps_mean:.0f}",
        f"{row.seconds_mean:.1f}{spread}",
        crossing,
        f"{row.loss_mean:.4f}{loss_spread}",
        shown_p(row.p_value),
        "yes" if row.counts else "no",
        "" if measured is None else f"{measured['step_ms']:.1f}",
        f"{record.optimizer_state_bytes / record.n_parameters:.1f}",
        "" if best is None else f"{best:.4f}",
    ]


def shown_p(p: float | None) -> str:
    if p is None:
        return ""
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}" if p < 0.1 else f"{p:.2f}"


def best_of_search(folder: Path, preset: str) -> float | None:
    """Return the least loss among the trials of a preset's search; None without a search."""
    path = folder / f"{preset}.json"
    if not path.exists():
        return None
    losses = [trial["final_val_loss"] for trial in json.loads(path.read_text())["trials"]]
    return min((loss for loss in losses if loss is not None), default=None)


@telling_mistakes("fair_table")
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--track", default="sotu")
    parser.add_argument("--records", type=Path, default=Path("records"))
    parser.add_argument(
        "--bench", type=Path, help="what scripts/bench_optim.py --json wrote for this track's size"
    )
    parser.add_argument("--size", default="1M", help="which of the sizes in --bench is the track's model")
    parser.add_argument("--hardware", help="only machines whose name contains this")
    arguments = parser.parse_args()
    track = load_track(arguments.track)
    records = [r for r in read_records(arguments.records, track.name)[0] if of_today(r, track)]
    if not records:
        raise UserError(
            f"no record of a preset as it stands now under {arguments.records / track.name}: make some with nanorun "
            f"train --track {track.name}, or name another folder with --records"
        )
    bench: dict[str, Any] = {}
    if arguments.bench:
        parts = json.loads(arguments.bench.read_text())
        bench = {row["name"]: row for part in parts if part["size"] == arguments.size for row in part["rows"]}
    table = build_table(TrackView.of(track), records, hardware=arguments.hardware)
    search = arguments.records / "benchmarks" / f"tune-{track.name}"
    print(f"| {' | '.join(TITLES)} |\n|{'---|' * len(TITLES)}")
    for row in sorted(
        table.rows, key=lambda row: (row.reached_seconds_mean is None, row.reached_seconds_mean or 0)
    ):
        record = next(r for r in records if r.name == row.preset)
        line = cells(row, record, bench, best_of_search(search, row.preset))
        print(f"| {' | '.join(line)} |")


if __name__ == "__main__":
    main()
