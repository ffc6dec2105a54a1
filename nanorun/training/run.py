"""From what the command line says to runs: presets, seeds, resuming."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from nanorun.config import RunConfig, make_config, resolve, resolve_values
from nanorun.errors import Stopped, StoppedEarly, UserError
from nanorun.optim.build import ROLE_NAMES, find_algorithm
from nanorun.records.record import RecordError, load_json
from nanorun.tables import read_toml
from nanorun.tracks import DEFAULT_PRESET, DEFAULT_TRACK, Track, load_track, preset_names
from nanorun.training import distributed
from nanorun.training.setup import Options, say
from nanorun.training.taking_up import check_run_name
from nanorun.training.train import train
from nanorun.training.trust import check_trusted, names_on_the_command_line

WANDB_MODES = ("off", "offline", "online")

BASE_PRESET = "adamw"
"""What an outside optimizer's run takes model, schedule and steps from."""


def configs_of(
    track_name: str | None, preset: str | None, settings: Sequence[str], seed: int | None, n_seeds: int
) -> tuple[Track, list[RunConfig]]:
    """Return the track, and the configs of `n_seeds` runs of one preset from `seed` on.

    0 seeds are as many as the track's rule asks for.
    """
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
    return track, [read(track, preset, settings, seed=first + k) for k in range(n_seeds)]


def train_seeds(
    track_name: str | None,
    preset: str | None,
    settings: Sequence[str],
    seed: int | None,
    n_seeds: int,
    options: dict[str, Any],
    console: Console,
    *,
    trust_code: bool = False,
) -> list[dict[str, Any]]:
    """Return the results of the runs of `configs_of`, one after the other.

    Code from outside that `preset` and `settings` do not name runs only with `trust_code`.
    """
    if options.get("run"):
        check_run_name(options["run"])
    track, configs = configs_of(track_name, preset, settings, seed, n_seeds)
    named = names_on_the_command_line(preset, settings)
    where = f"preset {configs[0].name!r} of track {track.name!r}"
    say(console, check_trusted(configs[0], named=named, trust_code=trust_code, where=where))
    results: list[dict[str, Any]] = []
    try:
        with distributed.taking_part():
            for config in configs:
                several = f"-s{config.seed}" if options.get("run") and len(configs) > 1 else ""
                mine = {**options, "run": f"{options['run']}{several}"} if several else options
                more_follow = len(results) + 1 < len(configs)
                results.append(train(config, track, Options(**mine), console, more_follow=more_follow))
                # All seeds compute alike, or their seconds would be those of several machines.
                options = {**options, "threads": torch.get_num_threads()}
        return results
    except Stopped as stopped:
        left = len(configs) - len(results) - 1
        more = (
            f"; then the {left} seeds left, from --seed {configs[0].seed + len(results) + 1} on"
            if left
            else ""
        )
        raise Stopped(f"{stopped}{more}") from None
    except StoppedEarly as early:
        if not results:
            raise
        done = len(results)
        raise Stopped(
            f"stopped by {early} after {done} of {len(configs)} seeds; go on with --seed {configs[done].seed} "
            f"--seeds {len(configs) - done}"
        ) from None


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


def resume_run(
    folder: Path, console: Console, anew: Mapping[str, Any] | None = None, *, trust_code: bool = False
) -> dict[str, Any]:
    """Return the result of a run taken up again from its newest checkpoint that verifies.

    `anew` holds the options of `Options` that are not those the run was started with. Code from outside that the
    run's config names runs only with `trust_code`.
    """
    if not (folder / "config.toml").is_file():
        raise UserError(f"{folder}: no run here (no config.toml); runs lie under ./runs, one folder each")
    config = make_config(read_toml(folder / "config.toml"), where=str(folder / "config.toml"))
    options = _options_of(folder, anew or {})
    where = f"the config of {folder}"
    say(console, check_trusted(config, named=(), trust_code=trust_code, where=where))
    with distributed.taking_part():
        return train(config, load_track(config.track), options, console, resume=folder)


def _options_of(folder: Path, anew: Mapping[str, Any]) -> Options:
    """Return the options that the run in `folder` was started with, but for those given anew. Raises UserError.

    A folder that was made elsewhere, told by the folder of runs that it names, does not say where to write on this
    machine, nor that anything is sent to wandb: that has to be said anew.
    """
    try:
        kept = _checked_options(load_json(folder / "options.json"))
    except RecordError as error:
        raise UserError(
            f"{folder}/options.json is missing or broken ({error}); it says where data and records lie"
        ) from None
    here = folder.parent.resolve()
    if kept.runs not in (here, folder.resolve().parent):
        missing = [f"--{key}" for key in ("data", "records") if key not in anew]
        if missing:
            raise UserError(
                f"{folder} was made under {kept.runs}, so the places that its options.json names are not taken for "
                f"yours: give {' and '.join(missing)} anew"
            )
        kept = replace(kept, runs=here, wandb=Options.wandb, start=Options.start)
    return replace(kept, **anew)


def _checked_options(content: object) -> Options:
    """Return options out of their JSON, each of its own type. Raises RecordError."""
    if not isinstance(content, dict):
        raise RecordError("is no object")
    values: dict[str, Any] = {}
    defaults: dict[str, Any] = {field.name: field.default for field in fields(Options)}
    for name, value in content.items():
        if name not in defaults:
            raise RecordError(
                f"is no option that this nanorun knows; wanted {', '.join(defaults)}", ascii(name)
            )
        kind = str if isinstance(defaults[name], Path) else type(defaults[name])
        if type(value) is not kind or "\0" in str(value):
            raise RecordError(f"is {ascii(value)[:60]}; wanted a {kind.__name__}", name)
        values[name] = Path(value) if isinstance(defaults[name], Path) else value
    for name in ("runs", "data", "records"):
        if name not in values:
            raise RecordError("is missing", name)
    if values.get("wandb", Options.wandb) not in WANDB_MODES:
        raise RecordError(f"is {ascii(values['wandb'])[:60]}; wanted {', '.join(WANDB_MODES)}", "wandb")
    return Options(**values)
