"""Race recipes of one track: the runs of several presets in turn, and what `nanorun compare` says of them.

    python scripts/bench_recipes.py --track sotu --a fast --b muon --seeds 5 --keep FOLDER --out figures.json
    python scripts/bench_recipes.py --track sotu --a fast --b "fast --set train.length_schedule=[]" --keep FOLDER

`--a` and each `--b` are a preset and, behind it, whatever else `nanorun train` is to be told. Seed by seed A runs, then
every B, each in a process of its own, so that a machine whose speed drifts moves all alike. Records and runs lie under
`--keep`, and the same command again does only what is not done. A's seconds are those at its declared last step, less
than B's if the ratio is under 1; "worth" is what A's lead in loss would take B's place of A's own steps near its end
(the step exchange of `nanorun compare`) plus the seconds saved. The table is markdown.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from figures import write_figures
from mistakes import telling_mistakes
from rich.console import Console

from nanorun.records.compare import Comparison, compare, print_comparison
from nanorun.records.report import TrackView
from nanorun.records.significance import judge
from nanorun.tracks import load_track

TITLES = (
    "Recipe",
    "Seeds",
    "Steps",
    "Last loss",
    "Counts",
    "Seconds",
    "A's seconds over its",
    "p",
    "A is worth, s",
)


class Side(NamedTuple):
    """One recipe."""

    name: str
    """`a`, or `b1`, `b2` and so on: its folder."""
    recipe: str
    """A preset and more words for `nanorun train`."""

    def words(self, track: str, seed: int, keep: Path, data: Path) -> list[str]:
        """Return the words of `nanorun` that train this recipe with one seed, or find it trained already."""
        preset, *rest = shlex.split(self.recipe)
        places = ["--runs", keep / "runs", "--records", keep / self.name, "--data", data]
        named = ["--run-name", f"{self.name}-s{seed}", "--seed", seed, "--json"]
        return ["train", "--track", track, "--optim", preset, *rest, *map(str, [*places, *named])]


def train(words: list[str]) -> dict[str, Any]:
    """Return what `nanorun WORDS` ended with; SystemExit with its own last words where it failed."""
    done = subprocess.run([sys.executable, "-m", "nanorun", *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"nanorun {shlex.join(words)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def race(sides: list[Side], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Train every recipe with every seed, in turn, and return a line of each run."""
    runs = []
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        for side in sides:
            result = train(side.words(arguments.track, seed, arguments.keep, arguments.data))
            line = {"side": side.name, "seed": seed, "final_val_loss": result["final_val_loss"]}
            runs.append({**line, "train_seconds": result["clock"]["train_seconds"]})
            print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
    return runs


def cells(side: Side, found: Comparison, place: str, track: TrackView) -> list[str]:
    """Return the line of one side of a comparison with A; of A itself without what is told against it."""
    told = found.to_dict()[place]
    verdict = judge(track.rule, told["losses"], track.target_val_loss)
    spread = "" if told["std_loss"] is None else f" ±{told['std_loss']:.4f}"
    line = [f"`{side.recipe}`", str(told["n"]), str(told["step"]), f"{told['mean_loss']:.4f}{spread}"]
    line += ["yes" if verdict.passes else "no", f"{told['seconds_mean']:.1f}"]
    ratio = found.ratios["seconds"]
    if place == "a" or ratio is None:
        return [*line, "", "", ""]
    interval = "" if ratio.low is None else f" ({ratio.low:.3f} to {ratio.high:.3f})"
    p_value = "" if ratio.p_value is None else f"{ratio.p_value:.2g}"
    seconds = seconds_worth(found)
    return [*line, f"{ratio.ratio:.3f}{interval}", p_value, "" if seconds is None else f"{seconds:+.1f}"]


def seconds_worth(found: Comparison) -> float | None:
    """Return the seconds that A saves, its lead in loss counted at the price of its last steps."""
    a, b = (found.to_dict()[place] for place in "ab")
    if found.exchange is None or not a["step"]:
        return None
    saved: float = b["seconds_mean"] - a["seconds_mean"]
    return saved - found.exchange.steps * a["seconds_mean"] / a["step"]


@telling_mistakes("bench_recipes")
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--track", default="sotu")
    parser.add_argument("--a", required=True, metavar="RECIPE", help='"PRESET [--set key=value …]"')
    parser.add_argument("--b", required=True, metavar="RECIPE", action="append", help="repeatable")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--keep", type=Path, required=True, help="where runs and records lie")
    parser.add_argument("--out", type=Path, help="figures, as JSON")
    arguments = parser.parse_args(argv)
    sides = [Side("a", arguments.a), *(Side(f"b{n + 1}", recipe) for n, recipe in enumerate(arguments.b))]
    track = TrackView.of(load_track(arguments.track))
    runs = race(sides, arguments)
    found = [compare(str(arguments.keep / "a"), str(arguments.keep / side.name)) for side in sides[1:]]
    for one in found:
        print_comparison(one, Console(stderr=True))
    rows = [cells(sides[0], found[0], "a", track)]
    rows += [cells(side, one, "b", track) for side, one in zip(sides[1:], found)]
    for line in (TITLES, ["---"] * len(TITLES), *rows):
        print(f"| {' | '.join(line)} |")
    if arguments.out:
        compared = {side.name: one.to_dict() for side, one in zip(sides[1:], found)}
        recipes = {side.name: side.recipe for side in sides}
        write_figures(arguments.out, "bench_recipes.py", argv, recipes=recipes, runs=runs, compared=compared)


if __name__ == "__main__":
    main()
