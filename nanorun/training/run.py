"""From what the command line says to runs: presets, seeds, resuming."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from nanorun.config import RunConfig, make_config, resolve, resolve_values
from nanorun.errors import Stopped, UserError
from nanorun.optim.build import ROLE_NAMES, find_algorithm
from nanorun.tables import read_toml
from nanorun.tracks import DEFAULT_PRESET, DEFAULT_TRACK, Track, load_track, preset_names
from nanorun.training import distributed
from nanorun.training.setup import Options, write_options
from nanorun.training.taking_up import check_run_name
from nanorun.training.train import train

BASE_PRESET = "adamw"
"""What an outside optimizer's run takes model, schedule and steps from."""


def train_seeds(
    track_name: str | None,
    preset: str | None,
    settings: Sequence[str],
    seed: int | None,
    n_seeds: int,
    options: dict[str, Any],
    console: Console,
) -> list[dict[str, Any]]:
    """Return the results of `n_seeds` runs of one preset, one after the other, from `seed` on.

    0 seeds are as many as the track's rule asks for.
    """
    if options.get("run"):
        check_run_name(options["run"])
    track = load_track(track_name or DEFAULT_TRACK)
    n_seeds = n_seeds or track.significance.n
    if preset is None:
        names = preset_names(track)
        if not names:
            raise UserError(
                f"track {track.name!r} has no preset: add {track.folder}/NAME.toml with the config of a run"
            )
        preset = DEFAULT_PRESET if DEFAULT_PRESET in names else names[0]
    top = {} if seed is None else {"seed": seed}
    read = _resolve_outside if ":" in preset else resolve
    first = read(track, preset, settings, **top).seed
    configs = [read(track, preset, settings, seed=first + k) for k in range(n_seeds)]
    results: list[dict[str, Any]] = []
    try:
        with distributed.taking_part():
            for config in configs:
                several = f"-s{config.seed}" if options.get("run") and n_seeds > 1 else ""
                mine = {**options, "run": f"{options['run']}{several}"} if several else options
                results.append(train(config, track, Options(**mine), console))
        return results
    except Stopped as stopped:
        left = n_seeds - len(results) - 1
        more = f"; then the {left} seeds left, from --seed {first + len(results) + 1} on" if left else ""
        raise Stopped(f"{stopped}{more}") from None


def _resolve_outside(track: Track, optim: str, settings: Sequence[str], **top: Any) -> RunConfig:
    """Return the config of an outside optimizer, "package.module:Class" or "path/to/file.py:Class".

    Everything but the optimizer is taken from the track's preset `adamw`, or its first one where there is none,
    and so are the optimizers of the roles that the class does not take. Its options come with
    `--set optim.default.lr=…`, or `optim.matrix.lr=…` and so on, role by role.
    """
    names = preset_names(track)
    if not names:
        raise UserError(
            f"track {track.name!r} has no preset to take model and schedule from: add {track.folder}/adamw.toml"
        )
    base = BASE_PRESET if BASE_PRESET in names else names[0]
    path = track.folder / f"{base}.toml"
    values = read_toml(path)
    roles = find_algorithm(optim).roles
    theirs = {role: {"name": optim} for role in roles} if len(roles) < len(ROLE_NAMES) else {}
    rest = values.get("optim", {}).get("default") if theirs else {"name": optim}
    if rest is None:
        raise UserError(
            f"{optim} takes {', '.join(roles)} alone, and {path} has no [optim.default] for the rest: add one"
        )
    values["optim"] = {**theirs, "default": rest}
    name = optim.rpartition(":")[2].lower()
    return resolve_values(track, name, values, settings, where=f"{optim} over {path}", **top)


def resume_run(folder: Path, console: Console, anew: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the result of a run taken up again from its newest checkpoint that verifies.

    `anew` holds the options of `Options` that are not those the run was started with.
    """
    if not (folder / "config.toml").is_file():
        raise UserError(f"{folder}: no run here (no config.toml); runs lie under ./runs, one folder each")
    config = make_config(read_toml(folder / "config.toml"), where=str(folder / "config.toml"))
    try:
        kept = json.loads((folder / "options.json").read_text())
        paths = {key: Path(kept[key]) for key in ("runs", "data", "records")}
        # Options of runs from before mixes do not have it.
        paths["start"] = Path(kept.get("start", "."))
        options = Options(**{**kept, **paths, **(anew or {})})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}/options.json is missing or broken ({error}); it says where data and records lie"
        ) from None
    if anew:
        write_options(folder, options)
    with distributed.taking_part():
        return train(config, load_track(config.track), options, console, resume=folder)
