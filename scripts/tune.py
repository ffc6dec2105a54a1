"""Search the options of a preset: quasi-random trials, the same number for whoever is to be compared.

The space is a TOML file, `configs/<track>/search/<preset>.toml`, with one table per dotted key:

    [space."optim.matrix.lr"]
    low = 0.005
    high = 0.08
    scale = "log"        # or "linear", or "log1m": 1 - value is spread evenly in the logarithm

    [space."model.zero_init_projections"]
    choices = [true, false]

A `[preset]` table there is the config that the trials vary; without one it is `configs/<track>/<preset>.toml`.
What all searches of a track share stands in `search/common.toml`, and each search's own file lies over it.

`--set` may contradict what the track fixes, which makes the trials runs on a shortened track; the JSON says how.
`--write STEPS` ends by writing the best trial as `configs/<track>/<preset>.toml`, to run STEPS steps.

Whole numbers for `low` and `high` give whole values. A key may end in a list's index, as in
"optim.default.betas.1". The points are the first of scipy's scrambled Sobol sequence (seed 0), as AlgoPerf's
external tuning draws its own. Trials are written as JSON after each one; the same command goes on where it was
stopped. The score is the validation loss at the declared last step.

`--around FILE` tries the best trial of an earlier search again, then a smaller box around it: each dimension
keeps `--shrink` of its width, moved inwards where it would leave the space, and each choice is the best trial's.

    python scripts/tune.py --track sotu --optim muon --trials 16 --set train.steps=80 \
        --set train.batch_tokens=2048 --out records/benchmarks/tune-sotu/muon.json
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mistakes import telling_mistakes

from nanorun.config import make_config
from nanorun.errors import RunFailed, UserError
from nanorun.tables import flattened, merged, nested, parse_setting, read_toml, to_toml
from nanorun.tracks import Track, load_track


def points(
    space: dict[str, dict[str, Any]], n: int, around: dict[str, Any] | None = None, shrink: float = 0.4
) -> list[dict[str, Any]]:
    """Return the first `n` Sobol points of the space, or a point and `n - 1` around it; three digits each."""
    from scipy.stats import qmc

    drawn = qmc.Sobol(len(space), scramble=True, rng=0).random(2 ** math.ceil(math.log2(max(n, 2))))[:n]
    found = [] if around is None else [{key: around[key] for key in space}]
    for row in drawn.tolist():
        point = {}
        for (key, dimension), u in zip(space.items(), row):
            if around is None:
                point[key] = value_at(dimension, u)
            elif "choices" in dimension:
                point[key] = around[key]
            else:
                start = min(max(place_of(dimension, around[key]) - shrink / 2, 0.0), 1.0 - shrink)
                point[key] = value_at(dimension, start + shrink * u)
        found.append(point)
    return found[:n]


def value_at(dimension: dict[str, Any], u: float) -> Any:
    """Return the value at `u` in [0, 1) of one dimension."""
    if "choices" in dimension:
        return dimension["choices"][int(u * len(dimension["choices"]))]
    to, back = _scale(dimension)
    value = back(to(dimension["low"]) + u * (to(dimension["high"]) - to(dimension["low"])))
    if isinstance(dimension["low"], int):
        return round(value)
    return round(value, 5) if dimension.get("scale") == "log1m" else float(f"{value:.3g}")


def place_of(dimension: dict[str, Any], value: float) -> float:
    """Return the place in [0, 1] of a value of one dimension: the inverse of `value_at`."""
    to, _ = _scale(dimension)
    low, high = to(dimension["low"]), to(dimension["high"])
    return (to(value) - low) / (high - low)


def _scale(dimension: dict[str, Any]) -> tuple[Callable[[float], float], Callable[[float], float]]:
    name = dimension.get("scale", "linear")
    scales: dict[str, tuple[Callable[[float], float], Callable[[float], float]]] = {
        "linear": (lambda x: x, lambda y: y),
        "log": (math.log, math.exp),
        "log1m": (lambda x: math.log(1 - x), lambda y: 1 - math.exp(y)),
    }
    if name not in scales:
        raise UserError(f"scale {name!r}: wanted one of {', '.join(scales)}, or a list of choices")
    return scales[name]


def as_settings(point: dict[str, Any], preset: dict[str, Any]) -> list[str]:
    """Return `--set` texts of a point; indices into a list are laid over the preset's own list."""
    lists: dict[str, list[float]] = {}
    settings = []
    for key, value in point.items():
        stem, _, index = key.rpartition(".")
        if not index.isdigit():
            settings.append(f"{key}={str(value).lower() if isinstance(value, bool) else value}")
            continue
        if stem not in lists:
            node: Any = preset
            for part in stem.split("."):
                node = node[part]
            lists[stem] = list(node)
        lists[stem][int(index)] = value
    return settings + [f"{stem}={values}" for stem, values in lists.items()]


@telling_mistakes("tune")
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--track", default="sotu")
    parser.add_argument("--optim", required=True)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--set", dest="settings", action="append", default=[], help="held for all trials")
    parser.add_argument("--write", type=int, metavar="STEPS", help="write the best trial as the preset")
    parser.add_argument("--around", type=Path, help="an earlier search: look near its best trial")
    parser.add_argument("--shrink", type=float, default=0.4, help="share of each dimension's width kept then")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument(
        "--seed", type=int, default=100, help="seed of every trial; not one of the finals' seeds"
    )
    parser.add_argument(
        "--threads", type=int, default=0, help="threads of a trial; 0 leaves the choice to train"
    )
    search(parser.parse_args())


def search(arguments: argparse.Namespace) -> None:
    track = load_track(arguments.track)
    preset, space = read_search(track, arguments.optim)
    around = best_trial(json.loads(arguments.around.read_text()))["point"] if arguments.around else None
    document: dict[str, Any] = {
        "track": arguments.track,
        "optim": arguments.optim,
        "held": arguments.settings,
        "seed": arguments.seed,
        "around": around,
        "preset": preset,
        "space": space,
        "trials": [],
    }
    if arguments.out.exists():
        found = json.loads(arguments.out.read_text())
        for key in ("track", "optim", "held", "seed", "around", "preset", "space"):
            if found.get(key) != document[key]:
                raise UserError(
                    f"{arguments.out} holds trials of another search (its {key} differs): move it away, or go on "
                    "with the options, the preset and the space it began with"
                )
        document = found
    for number, point in enumerate(points(space, arguments.trials, around, arguments.shrink)):
        if number < len(document["trials"]):
            continue
        trial = {"trial": number, "point": point, **run_trial(arguments, track, preset, point)}
        document["trials"].append(trial)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        beside = arguments.out.with_suffix(".partial")
        beside.write_text(json.dumps(document, indent=1))
        beside.replace(arguments.out)
        print(json.dumps(trial), flush=True)
    best = best_trial(document)
    if best["final_val_loss"] is None:
        raise UserError("every trial failed: lower the learning rates of the space")
    print(
        f"best of {len(document['trials'])}: trial {best['trial']}, {best['final_val_loss']}: {best['point']}"
    )
    if arguments.write:
        print(f"written: {write_preset(arguments, track, preset, best)}")


def read_search(track: Track, optim: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return the config that the trials of a search vary, and the space they vary it in."""
    folder = track.folder / "search"
    common = folder / "common.toml"
    found = merged(read_toml(common) if common.exists() else {}, read_toml(folder / f"{optim}.toml"))
    preset = found["preset"] if "preset" in found else read_toml(track.folder / f"{optim}.toml")
    # An empty table takes a dimension of common.toml out.
    return preset, {key: dimension for key, dimension in found["space"].items() if dimension}


def write_preset(
    arguments: argparse.Namespace, track: Track, preset: dict[str, Any], best: dict[str, Any]
) -> Path:
    """Write the best trial as the track's preset, under a comment with the command that found it."""
    changes = [parse_setting(text) for text in as_settings(best["point"], preset)]
    values = merged(preset, nested(changes), {"train": {"steps": arguments.write}})
    comment = (
        f"# Trial {best['trial']} of {arguments.trials}, the best, at {best['final_val_loss']:.4f}, found by\n"
        f"# python scripts/tune.py {shlex.join(sys.argv[1:])}\n"
    )
    path = track.folder / f"{arguments.optim}.toml"
    path.write_text(comment + to_toml(values))
    return path


def best_trial(document: dict[str, Any]) -> dict[str, Any]:
    """Return the trial with the least loss of a search."""
    found: dict[str, Any] = min(document["trials"], key=lambda t: t["final_val_loss"] or math.inf)
    return found


def run_trial(
    arguments: argparse.Namespace, track: Track, preset: dict[str, Any], point: dict[str, Any]
) -> dict[str, Any]:
    from rich.console import Console

    from nanorun.training.train import Options, train

    changes = [parse_setting(text) for text in [*arguments.settings, *as_settings(point, preset)]]
    top = {"track": track.name, "name": arguments.optim, "seed": arguments.seed}
    values = merged(track.fixed, preset, nested(changes), top)
    # The trial's single reading is at its last step.
    values["validation"]["from_step"] = values["train"]["steps"]
    config = make_config(values, where=f"the search of {arguments.optim}")
    with tempfile.TemporaryDirectory() as folder:
        options = Options(runs=Path(folder), data=arguments.data, record=False, threads=arguments.threads)
        shortened = track.model_copy(update={"fixed": _what_is_fixed(track, values)})
        try:
            result = train(config, shortened, options, Console(quiet=True))
        except RunFailed as error:
            return {"final_val_loss": None, "failed": str(error)}
    return {"final_val_loss": result["final_val_loss"], "train_seconds": result["clock"]["train_seconds"]}


def _what_is_fixed(track: Track, values: dict[str, Any]) -> dict[str, Any]:
    """Return the track's fixed tables with the values that the trials run under."""
    there = flattened(values)
    return nested((key, there[key]) for key in flattened(track.fixed))


if __name__ == "__main__":
    main()
