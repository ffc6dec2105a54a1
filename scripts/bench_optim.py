"""Milliseconds of each optimizer's step and bytes of its state, beside torch's, its package's or Muon's own.

    python scripts/bench_optim.py --size 14M [--only nadamw muon soap] [--seconds 10] [--threads N] [--json OUT]

A step moves every weight of a GPT of 1M, 14M or 124M parameters, with each optimizer's options as
configs/sotu/<name>.toml has them (else its defaults): matrices by what is measured and, where that takes
matrices only or its preset says so, the rest by AdamW. The reference moves weights of the same shapes by the
same gradients. The two take turns step by step, A B A B, so a busy neighbour slows both. A round is one step
of each, or as many as lie from one computation of roots to the next; its figure is the mean step. Printed are
the medians over the rounds, and the median of each round's ratio; "own" leaves the AdamW of the rest out.

References, all fp32: for the algorithms of torch, torch's class (fused where it has a kernel for the CPU); for
NAdamW and its variants torch's fused AdamW; for a package's algorithm and Amos the package's class; for Muon
and NorMuon a loop over single matrices by torch.optim.Muon's algorithm, which itself forces bf16; for the
algorithms with matrix roots our Muon, beside fused AdamW for the rest.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bench_muon import plain_step
from mistakes import telling_mistakes
from rich.console import Console
from rich.table import Table
from torch import Tensor

from nanorun.config import ModelConfig, resolve
from nanorun.model import GPT
from nanorun.optim.averaging import make_average
from nanorun.optim.build import ELSEWHERE, OptimizerSet, build_optimizers, find_algorithm, optimizer_names
from nanorun.optim.options import REQUIRED
from nanorun.tracks import load_track, preset_names
from nanorun.training.machine import hardware, software

TRACK = "sotu"

SIZES: dict[str, tuple[int, dict[str, Any]]] = {
    "1M": (256, {"arch": "modern", "n_layer": 3, "n_head": 3, "n_embd": 192, "context_len": 256}),
    "14M": (256, {"arch": "modern", "n_layer": 8, "n_head": 6, "n_embd": 384, "context_len": 256}),
    "124M": (50257, {"arch": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768, "context_len": 1024}),
}
"""Vocabulary and model: the sotu track's, one of 14.4 million parameters, and GPT-2."""

WITH_ROOTS = ("shampoo", "distributed_shampoo", "caspr", "soap")

OUTSIDE = {
    "sgd": "torch.optim.SGD",
    "adagrad": "torch.optim.Adagrad",
    "rmsprop": "torch.optim.RMSprop",
    "adadelta": "torch.optim.Adadelta",
    "adam": "torch.optim.Adam",
    "amsgrad": "torch.optim.Adam",
    "amos": "pytorch_optimizer.Amos",
    "schedulefree_adamw": "schedulefree.AdamWScheduleFree",
    "prodigy": "prodigyopt.Prodigy",
    "schedulefree_prodigy": "prodigyopt.Prodigy",
}
"""Whose class stands beside ours; torch.optim.AdamW for those without an entry."""

FUSED = ("SGD", "Adagrad", "Adam", "AdamW")


@dataclass
class Contender:
    """Something that moves all weights of a model, in two parts."""

    label: str
    own: list[Callable[[], Any]]
    """What is measured."""
    rest: list[Callable[[], Any]]
    """What moves the weights that it does not take."""
    state_bytes: Callable[[], int]
    own_ms: list[float] = field(default_factory=list)
    all_ms: list[float] = field(default_factory=list)

    def step(self) -> None:
        """Move everything once and note how long it took."""
        began = time.perf_counter()
        for call in self.own:
            call()
        own_done = time.perf_counter()
        for call in self.rest:
            call()
        self.own_ms.append(1e3 * (own_done - began))
        self.all_ms.append(1e3 * (time.perf_counter() - began))


def optim_tables(name: str) -> tuple[dict[str, dict[str, Any]], str]:
    """Return an optimizer's table by role, and where it is from: its preset of the track, or defaults."""
    track = load_track(TRACK)
    if name in preset_names(track):
        tables = resolve(track, name).optim_by_role
        if name in ELSEWHERE or name in {table["name"] for table in tables.values()}:
            return tables, f"configs/{TRACK}/{name}.toml"
    algorithm = find_algorithm(name)
    options = {"lr": 1e-3} if algorithm.table["lr"].default is REQUIRED else {}
    # As Muon is used: roots of an embedding's rows would be large, and dear.
    roles = ("matrix",) if name in WITH_ROOTS else algorithm.roles
    tables = {role: {"name": name, **options} for role in roles}
    return {"default": {"name": "adamw", "lr": 1e-3}, **tables}, "defaults"


def make_model(size: str) -> GPT:
    vocab_size, config = SIZES[size]
    return GPT(ModelConfig.model_validate(config), vocab_size)


def set_gradients(model: GPT) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = 1e-2 * torch.randn(parameter.shape, generator=generator)


def ours(name: str, model: GPT, tables: dict[str, dict[str, Any]]) -> tuple[Contender, OptimizerSet]:
    average = (
        make_average(**resolve(load_track(TRACK), name).average.model_dump()) if name in ELSEWHERE else None
    )
    optimizers = build_optimizers(model, tables, average)
    own = [
        o for o, called in zip(optimizers.optimizers, optimizers.names) if called == name or name in ELSEWHERE
    ]
    rest = [o for o in optimizers.optimizers if o not in own]
    steps = [[optimizer.step for optimizer in part] for part in (own, rest)]
    if average is not None:
        counter = itertools.count(1)
        steps[0].append(lambda: optimizers.after_step(next(counter)))
    return Contender(name, *steps, optimizers.state_bytes), optimizers


def reference(name: str, model: GPT, optimizers: OptimizerSet) -> Contender:
    """Return what stands beside `name`: the same groups of another model's parameters, moved by the reference."""
    if name in WITH_ROOTS:
        contender, _ = ours("muon", model, optim_tables("muon")[0])
        contender.label = "nanorun's muon"
        return contender
    twins = dict(zip(optimizers.parameters(), twin_parameters(model, optimizers), strict=True))
    own, rest = [], []
    for optimizer, called in zip(optimizers.optimizers, optimizers.names):
        for group in optimizer.param_groups:
            twin = {**group, "params": [twins[parameter] for parameter in group["params"]]}
            (own if called == name or name in ELSEWHERE else rest).append(twin)
    others = [outside("torch.optim.AdamW", rest)] if rest else []
    if name in ("muon", "normuon"):
        return plain_muon(own, others)
    label = OUTSIDE.get(name, "torch.optim.AdamW")
    main = outside(label, own)
    if hasattr(main, "train"):
        main.train()
    fused = "fused " if main.defaults.get("fused") else ""
    steps = [[main.step], [other.step for other in others]]
    return Contender(fused + label, *steps, lambda: state_bytes([main, *others]))


def twin_parameters(model: GPT, optimizers: OptimizerSet) -> list[Tensor]:
    """Return another model's parameters in the order of the optimizers' own, which has the same roles."""
    roles = model.roles()
    by_role: dict[str, list[Tensor]] = {}
    for called, parameter in model.named_parameters():
        by_role.setdefault(roles[called].role, []).append(parameter)
    return [parameter for group in optimizers.groups() for parameter in by_role[group["role"]]]


def outside(label: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return the optimizer of that class over the groups, with those of their options that it knows."""
    module, _, class_name = label.rpartition(".")
    cls = getattr(importlib.import_module(module), class_name)
    known = {n: p.default for n, p in inspect.signature(cls).parameters.items() if n != "params"}
    # Where ours takes "unset" and the class a number, its own default stands.
    taken = [
        {
            name: group[name]
            for name in known
            if name in group and (group[name] is not None or known[name] is None)
        }
        for group in groups
    ]
    entries = [{**options, "params": group["params"]} for options, group in zip(taken, groups)]
    has_kernel = module == "torch.optim" and class_name in FUSED
    return cls(
        entries,
        **taken[0] | ({"fused": True} if has_kernel else {"fused": False} if "fused" in known else {}),
    )


def plain_muon(groups: list[dict[str, Any]], others: list[torch.optim.Optimizer]) -> Contender:
    """Return Muon as a loop over single matrices, and AdamW for the rest."""
    pairs = [(p, n) for group in groups for p, n in zip(group["params"], group["n_stacked"], strict=True)]
    matrices = [part for p, n in pairs for part in p.detach().chunk(n)]
    momenta = [torch.zeros_like(matrix) for matrix in matrices]

    def step() -> None:
        grads = [part for p, n in pairs for part in p.grad.chunk(n)]
        plain_step(matrices, grads, momenta, groups[0]["lr"])

    def held() -> int:
        return sum(momentum.nbytes for momentum in momenta) + state_bytes(others)

    return Contender("per-matrix fp32 loop", [step], [other.step for other in others], held)


def state_bytes(optimizers: list[torch.optim.Optimizer]) -> int:
    """Return the bytes of all state tensors."""
    values = [value for one in optimizers for state in one.state.values() for value in state.values()]
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


def root_period(optimizers: OptimizerSet) -> int:
    """Return the steps from one computation of roots or snapshot to the next; 1 where there are none."""
    snapshots = optimizers.average.every_steps if optimizers.average else 1
    return math.lcm(snapshots, *(group.get("precondition_frequency", 1) for group in optimizers.groups()))


def names() -> list[str]:
    """Return what is measured unless told otherwise: every optimizer, and the schedules and averages with a preset."""
    return sorted([*optimizer_names(), *(ELSEWHERE.keys() & set(preset_names(load_track(TRACK))))])


def measure(name: str, size: str, seconds: float, least_rounds: int) -> dict[str, Any]:
    """Return one row: medians over rounds of our mean step, the reference's, and their ratios."""
    models = [make_model(size), make_model(size)]
    tables, source = optim_tables(name)
    mine, optimizers = ours(name, models[0], tables)
    theirs = reference(name, models[1], optimizers)
    for model in models:
        set_gradients(model)
    period = root_period(optimizers)

    def run_steps(count: int) -> None:
        for _ in range(count):
            for model, contender in zip(models, (mine, theirs)):
                # Turned about, so that no weight runs away, and as fresh in the cache as a backward pass leaves it.
                torch._foreach_neg_([parameter.grad for parameter in model.parameters()])
                contender.step()

    # Past the first step, which makes the state, and past where roots first exist: -1 stands for a period.
    starts = [group.get("start_preconditioning_step", 0) for group in optimizers.groups()]
    run_steps(2 + max(period if start < 0 else start for start in starts))
    for contender in (mine, theirs):
        contender.own_ms.clear()
        contender.all_ms.clear()
    rounds, end = 0, time.perf_counter() + seconds
    while rounds < least_rounds or time.perf_counter() < end:
        run_steps(period)
        rounds += 1
    n_parameters = models[0].n_parameters()
    return {
        "name": name,
        "options": source,
        "reference": theirs.label,
        "steps_a_round": period,
        "rounds": rounds,
        **compared("step", mine.all_ms, theirs.all_ms, period),
        **compared("own", mine.own_ms, theirs.own_ms, period),
        "state_bytes_a_parameter": mine.state_bytes() / n_parameters,
        "reference_state_bytes_a_parameter": theirs.state_bytes() / n_parameters,
    }


def compared(part: str, mine: list[float], theirs: list[float], period: int) -> dict[str, float]:
    """Return the medians of both over the rounds, and of the rounds' ratios."""
    rounds = [
        [statistics.fmean(ms[start : start + period]) for ms in (mine, theirs)]
        for start in range(0, len(mine), period)
    ]
    return {
        f"{part}_ms": statistics.median(first for first, _ in rounds),
        f"reference_{part}_ms": statistics.median(second for _, second in rounds),
        f"{part}_ratio": statistics.median(first / second for first, second in rounds),
    }


def make_table(document: dict[str, Any]) -> Table:
    title = f"{document['size']}: {document['n_parameters']:,} parameters, {document['hardware']['n_threads']} threads"
    table = Table(title=title)
    for column in (
        "optimizer",
        "ms/step",
        "beside",
        "its ms",
        "ratio",
        "own ratio",
        "B/param",
        "its B",
        "rounds",
    ):
        table.add_column(column, justify="left" if column in ("optimizer", "beside") else "right")
    for row in document["rows"]:
        per_round = f" of {row['steps_a_round']}" if row["steps_a_round"] > 1 else ""
        table.add_row(
            row["name"],
            f"{row['step_ms']:.2f}",
            row["reference"],
            f"{row['reference_step_ms']:.2f}",
            f"{row['step_ratio']:.2f}",
            f"{row['own_ratio']:.2f}",
            f"{row['state_bytes_a_parameter']:.2f}",
            f"{row['reference_state_bytes_a_parameter']:.2f}",
            f"{row['rounds']}{per_round}",
        )
    return table


@telling_mistakes("bench_optim")
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", nargs="+", choices=list(SIZES), default=["1M"])
    parser.add_argument("--only", nargs="+", metavar="NAME", default=names())
    parser.add_argument("--seconds", type=float, default=10.0, help="for each optimizer with its reference")
    parser.add_argument("--rounds", type=int, default=3, help="at least so many, however long they take")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="OUT")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    console, documents = Console(), []
    if not console.is_terminal:
        console = Console(width=140)
    for size in arguments.size:
        documents.append(
            {
                "size": size,
                "n_parameters": make_model(size).n_parameters(),
                "hardware": hardware(torch.device("cpu"), 1),
                "software": software(compiled=False),
                "rows": [],
            }
        )
        for name in arguments.only:
            documents[-1]["rows"].append(measure(name, size, arguments.seconds, arguments.rounds))
            if arguments.json:
                # After each row: a long run that is stopped keeps what it measured.
                arguments.json.write_text(json.dumps(documents, indent=1) + "\n")
        console.print(make_table(documents[-1]))


if __name__ == "__main__":
    main()
