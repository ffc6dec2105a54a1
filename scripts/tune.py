"""Search the options of a preset: quasi-random trials, the same number for whoever is to be compared.

The space is a TOML file, `configs/<track>/search/<preset>.toml`, with one table per dotted key:

    [space."optim.matrix.lr"]
    low = 0.005
    high = 0.08
    scale = "log"        # or "linear", or "log1m": 1 - value is spread evenly in the logarithm

A key may end in a list's index, as in "optim.default.betas.1". The points are the first of scipy's scrambled
Sobol sequence (seed 0), as AlgoPerf's external tuning draws its own. Trials are written as JSON after each one;
the same command goes on where it was stopped. The score is the validation loss at the declared last step.

    python scripts/tune.py --track sotu --optim muon --trials 16 --set train.steps=120 \
        --out records/benchmarks/tune-sotu-muon.json
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

from nanorun.config import resolve
from nanorun.errors import RunFailed, UserError
from nanorun.tables import read_toml
from nanorun.tracks import load_track


def points(space: dict[str, dict[str, Any]], n: int) -> list[dict[str, float]]:
    """Return the first `n` Sobol points of the space, values rounded to three digits."""
    from scipy.stats import qmc

    unit = qmc.Sobol(len(space), scramble=True, rng=0).random(2 ** math.ceil(math.log2(max(n, 2))))[:n]
    keys = list(space)
    return [{key: value_at(space[key], float(u)) for key, u in zip(keys, row)} for row in unit]


def value_at(dimension: dict[str, Any], u: float) -> float:
    """Return the value at `u` in [0, 1] of one dimension."""
    low, high, scale = dimension["low"], dimension["high"], dimension.get("scale", "linear")
    if scale == "log":
        value = math.exp(math.log(low) + u * (math.log(high) - math.log(low)))
    elif scale == "log1m":
        value = 1 - math.exp(math.log(1 - low) + u * (math.log(1 - high) - math.log(1 - low)))
    elif scale == "linear":
        value = low + u * (high - low)
    else:
        raise UserError(f"scale {scale!r}: wanted log, linear or log1m")
    digits = 5 if scale == "log1m" else 3
    return round(value, digits) if scale == "log1m" else float(f"{value:.{digits}g}")


def as_settings(point: dict[str, float], preset: dict[str, Any]) -> list[str]:
    """Return `--set` texts of a point; indices into a list are laid over the preset's own list."""
    lists: dict[str, list[float]] = {}
    settings = []
    for key, value in point.items():
        stem, _, index = key.rpartition(".")
        if not index.isdigit():
            settings.append(f"{key}={value}")
            continue
        if stem not in lists:
            node: Any = preset
            for part in stem.split("."):
                node = node[part]
            lists[stem] = list(node)
        lists[stem][int(index)] = value
    return settings + [f"{stem}={values}" for stem, values in lists.items()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--track", default="sotu")
    parser.add_argument("--optim", required=True)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--set", dest="settings", action="append", default=[], help="held for all trials")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument(
        "--seed", type=int, default=100, help="seed of every trial; not one of the finals' seeds"
    )
    parser.add_argument("--threads", type=int, default=0, help="threads of a trial; 0 leaves torch's choice")
    arguments = parser.parse_args()
    try:
        search(arguments)
    except UserError as error:
        sys.exit(f"tune: {error}")


def search(arguments: argparse.Namespace) -> None:
    track = load_track(arguments.track)
    space = read_toml(track.folder / "search" / f"{arguments.optim}.toml")["space"]
    preset = read_toml(track.folder / f"{arguments.optim}.toml")
    document: dict[str, Any] = {
        "track": arguments.track,
        "optim": arguments.optim,
        "held": arguments.settings,
        "seed": arguments.seed,
        "space": space,
        "trials": [],
    }
    if arguments.out.exists():
        document = json.loads(arguments.out.read_text())
    for number, point in enumerate(points(space, arguments.trials)):
        if number < len(document["trials"]):
            continue
        settings = [*arguments.settings, *as_settings(point, preset)]
        trial = {"trial": number, "point": point, **run_trial(arguments, track, settings)}
        document["trials"].append(trial)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        beside = arguments.out.with_suffix(".partial")
        beside.write_text(json.dumps(document, indent=1))
        beside.replace(arguments.out)
        print(json.dumps(trial), flush=True)
    best = min(document["trials"], key=lambda t: t["final_val_loss"] or math.inf)
    print(
        f"best of {len(document['trials'])}: trial {best['trial']}, {best['final_val_loss']}: {best['point']}"
    )


def run_trial(arguments: argparse.Namespace, track: Any, settings: list[str]) -> dict[str, Any]:
    import torch
    from rich.console import Console

    from nanorun.training.train import Options, train

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    config = resolve(track, arguments.optim, settings, seed=arguments.seed)
    # The trial's single reading is at its last step.
    validation = config.validation.model_copy(update={"from_step": config.train.steps})
    config = config.model_copy(update={"validation": validation})
    with tempfile.TemporaryDirectory() as folder:
        options = Options(runs=Path(folder), data=arguments.data, record=False)
        unfixed = track.model_copy(
            update={"fixed": {k: v for k, v in track.fixed.items() if k != "validation"}}
        )
        try:
            result = train(config, unfixed, options, Console(quiet=True))
        except RunFailed as error:
            return {"final_val_loss": None, "failed": str(error)}
    return {"final_val_loss": result["final_val_loss"], "train_seconds": result["clock"]["train_seconds"]}


if __name__ == "__main__":
    main()
