"""The page of truth of each optimizer: options, state, paper, and whose code it is."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from nanorun.config import AverageConfig, TrainConfig
from nanorun.errors import UserError, nearest
from nanorun.optim.build import ELSEWHERE, Algorithm, find_algorithm, optimizer_names
from nanorun.optim.options import REQUIRED, Option
from nanorun.tracks import DEFAULT_TRACK, load_track, preset_names, track_names

SHAPES = (((144, 48), 3), ((48, 48), 1), ((192, 48), 1), ((48, 192), 1))
"""Matrices of a block of a GPT and how many each stacks, a quarter of the width of the track sotu: the state that
an optimizer keeps for a parameter depends on the ratios of the sides alone, until a limit on a side is met."""

WRAPPERS: dict[str, dict[str, Any]] = {
    "cyclic_lr": {
        "summary": "NAdamW under K equal cycles, each of a linear warm-up and half a cosine.",
        "paper": "AlgoPerf's submission cyclic_lr; cosine: arXiv:1608.03983",
        "keys": {
            "train.cycles": "equal parts of the run",
            "train.warmup_steps": "steps of each cycle's warm-up",
            "train.final_scale": "scale of the learning rate at the end of each cycle",
        },
    },
    "lawa_queue": {
        "summary": "The mean of the last snapshots of the weights is evaluated; training goes on with the raw ones.",
        "paper": "arXiv:2209.14981",
        "keys": {
            "average.snapshots": "length of the queue; 4 bytes a parameter for each",
            "average.every_steps": "steps between snapshots",
            "average.from_step": "the first step after which one may be taken",
        },
    },
    "lawa_ema": {
        "summary": "An exponential average of snapshots is evaluated; its beta is used as given, where AlgoPerf's "
        "submission rounded it to 0.",
        "paper": "AlgoPerf's submission lawa_ema, after arXiv:2209.14981",
        "keys": {
            "average.beta": "weight of the past, per snapshot",
            "average.every_steps": "steps between snapshots",
            "average.from_step": "the first step after which one may be taken",
        },
    },
}
"""What bears an optimizer's name and is a schedule or an average around one."""


def all_names() -> list[str]:
    """Return every name that has a page."""
    return sorted([*optimizer_names(), *ELSEWHERE])


def describe(name: str) -> dict[str, Any]:
    """Return the page of an optimizer as plain data; raises UserError for a name that has none."""
    if name in WRAPPERS:
        return _describe_wrapper(name)
    if ":" not in name and name not in optimizer_names():
        raise UserError(
            f"unknown optimizer {name!r}: wanted one of {', '.join(all_names())}.{nearest(name, all_names())}"
        )
    algorithm = find_algorithm(name)
    return {
        "name": name,
        "summary": _text_of(algorithm, "SUMMARY", "summary"),
        "paper": _text_of(algorithm, "PAPER", "paper"),
        "source": getattr(algorithm.module, "SOURCE", "outside" if algorithm.outside else "nanorun"),
        "roles": list(algorithm.roles),
        "held": dict(algorithm.held),
        "options": _signature(algorithm)
        if algorithm.table is None
        else [_describe_option(key, one) for key, one in algorithm.table.items()],
        "state_bytes_per_parameter": None if algorithm.outside else state_bytes(algorithm),
        "presets": _presets(name),
    }


def _text_of(algorithm: Algorithm, constant: str, field: str) -> str:
    variant = getattr(algorithm.module, "VARIANTS", {}).get(algorithm.name)
    return str(getattr(variant, field) if variant else getattr(algorithm.module, constant, ""))


def _describe_option(name: str, option: Option) -> dict[str, Any]:
    return {
        "name": name,
        "default": _shown(option.default),
        "allowed": option.allowed,
        "meaning": option.meaning,
    }


def _signature(algorithm: Algorithm) -> list[dict[str, str]]:
    """Return what the constructor of an outside class without a table of options takes."""
    takes = list(inspect.signature(algorithm.cls).parameters.values())[1:]
    return [
        {
            "name": one.name,
            "default": "required" if one.default is one.empty else _shown(one.default),
            "allowed": "",
            "meaning": "",
        }
        for one in takes
        if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)
    ]


def _describe_wrapper(name: str) -> dict[str, Any]:
    page, tables = WRAPPERS[name], {"train": TrainConfig(), "average": AverageConfig()}
    options = []
    for key, meaning in page["keys"].items():
        table, _, field = key.partition(".")
        default = getattr(tables[table], field)
        # The config's own bounds, in the words of the optimizers' options.
        bounds = {
            bound: getattr(rule, bound)
            for rule in type(tables[table]).model_fields[field].metadata
            for bound in ("ge", "le", "lt")
            if hasattr(rule, bound)
        }
        high = bounds.get("lt", bounds.get("le", math.inf))
        option = Option(default, meaning, bounds.get("ge", -math.inf), high, below_high="lt" in bounds)
        options.append(_describe_option(key, option))
    return {
        "name": name,
        "summary": page["summary"],
        "paper": page["paper"],
        "source": f"nanorun; {ELSEWHERE[name]}",
        "roles": [],
        "held": {},
        "options": options,
        "state_bytes_per_parameter": None,
        "presets": _presets(name),
    }


def _shown(value: Any) -> str:
    if value is REQUIRED:
        return "required"
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(f"{number:g}" for number in value) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def state_bytes(algorithm: Algorithm, options: Mapping[str, Any] | None = None) -> float:
    """Return the bytes of state that an optimizer keeps for each parameter, measured after two steps on SHAPES."""
    given = dict(options or {})
    table = algorithm.table or {}
    if "lr" in table and table["lr"].default is REQUIRED:
        given.setdefault("lr", 1e-3)
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape, _ in SHAPES]
    group = {"params": parameters, "role": "matrix", "n_stacked": [stacked for _, stacked in SHAPES]}
    optimizer = algorithm.cls([group], **algorithm.options(given))
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    kept = [value for state in optimizer.state.values() for value in state.values()]
    n_bytes = sum(value.nbytes for value in kept if isinstance(value, torch.Tensor))
    return n_bytes / sum(parameter.numel() for parameter in parameters)


def _presets(name: str) -> list[str]:
    """Return the tracks that have a preset of that name, those with a broken file left out."""
    found = []
    for track in track_names():
        try:
            if name in preset_names(load_track(track)):
                found.append(track)
        except UserError:
            continue
    return found


def show_all(console: Console) -> None:
    """Print one line for each optimizer."""
    table = Table(box=None, pad_edge=False)
    for heading, whole in (("optimizer", True), ("bytes", True), ("from", False), ("what", False)):
        table.add_column(heading, no_wrap=whole, justify="right" if heading == "bytes" else "left")
    for name in all_names():
        page = describe(name)
        state = page["state_bytes_per_parameter"]
        shown = "" if state is None else f"{state:.1f}"
        table.add_row(name, shown, page["source"].partition(";")[0], page["summary"])
    console.print(table)
    console.print(
        "bytes: of state a parameter, measured on matrices of a GPT's block with default options; weights and "
        "gradients come on top\n"
        "one page each: nanorun optimizers NAME",
        markup=False,
        highlight=False,
    )


def show_one(name: str, console: Console) -> None:
    """Print the page of one optimizer."""
    page = describe(name)
    lines = [
        f"{page['name']}: {page['summary']}",
        f"paper    {page['paper'] or 'none named'}",
        f"code     {page['source']}",
    ]
    if page["roles"]:
        lines.append(f"takes    {', '.join(page['roles'])}")
    if page["held"]:
        lines.append(
            "stands for " + ", ".join(f"{key} = {_shown(value)}" for key, value in page["held"].items())
        )
    if page["state_bytes_per_parameter"] is not None:
        lines.append(
            f"state    {page['state_bytes_per_parameter']:.1f} bytes a parameter (matrices of a GPT's block, defaults)"
        )
    if page["presets"]:
        track = DEFAULT_TRACK if DEFAULT_TRACK in page["presets"] else page["presets"][0]
        lines.append(f"try      nanorun train --track {track} --optim {name}")
    for line in lines:
        console.print(line, markup=False, highlight=False)
    table = Table(box=None, pad_edge=False)
    for heading in ("option", "default", "allowed", "meaning"):
        table.add_column(heading, no_wrap=heading in ("option", "default"), overflow="fold")
    for one in page["options"]:
        table.add_row(one["name"], one["default"], one["allowed"], one["meaning"])
    if page["options"]:
        console.print()
        console.print(table)
