"""Show how an optimizer's state and arithmetic fall as ranks share them.

    python scripts/bench_ranks.py [--size 14M] [--only muon soap] [--ranks 1 2 4] [--json OUT]

For each optimizer and number of ranks, each rank's part is stepped in turn in this process; nothing travels. Printed
are the largest figures of any rank, and beside them their share of those of one rank: bytes of state and
floating-point operations of matrix products, counted by torch's FlopCounterMode over the steps between two
computations of roots, a step. eigh and QR it does not count; `cost`, the multiply-adds by which work is dealt out,
holds them. All are of the optimizer named; AdamW, which has the rest, is not shared, and is left out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench_optim import SIZES, make_model, optim_tables, root_period, set_gradients
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from nanorun.optim.build import build_optimizers
from nanorun.optim.ownership import parameters_of
from nanorun.training.machine import software

SHARED = ("muon", "normuon", "shampoo", "soap", "caspr", "distributed_shampoo")


class Apart(NamedTuple):
    """A rank whose peers are elsewhere: it can be dealt its part, and hears of nobody."""

    rank: int
    n_ranks: int


def measure_rank(name: str, size: str, rank: int, n_ranks: int) -> dict[str, float]:
    """Return bytes of state, matrix FLOPs a step and share of the cost of one rank's part of an optimizer."""
    model = make_model(size)
    # The matrices alone: what the rest has is AdamW's, or as cheap.
    tables = {"default": {"name": "adamw", "lr": 1e-3}, "matrix": optim_tables(name)[0]["matrix"]}
    optimizers = build_optimizers(model, tables, peers=Apart(rank, n_ranks))  # type: ignore[arg-type]
    (shared,) = (one for one in optimizers.optimizers if hasattr(one, "cost_of"))
    set_gradients(model)
    for parameter in parameters_of(shared):
        if optimizers.sharing is not None and not optimizers.sharing.owns(parameter):
            parameter.grad = None
    shared.step()
    period = root_period(optimizers)
    with FlopCounterMode(display=False) as counter:
        for _ in range(period):
            shared.step()
    states = shared.state.values()
    return {
        "state_bytes": sum(
            t.nbytes for state in states for t in state.values() if isinstance(t, torch.Tensor)
        ),
        "flops_a_step": counter.get_total_flops() / period,
        "cost_share": optimizers.sharing.loads[rank] / sum(optimizers.sharing.loads)
        if optimizers.sharing
        else 1.0,
        "tensors": sum(parameter.grad is not None for parameter in parameters_of(shared)),
    }


def measure(name: str, size: str, n_ranks: int) -> dict[str, Any]:
    """Return one row: each figure by rank."""
    by_rank = [measure_rank(name, size, rank, n_ranks) for rank in range(n_ranks)]
    return {"name": name, "n_ranks": n_ranks, **{key: [one[key] for one in by_rank] for key in by_rank[0]}}


def make_table(document: dict[str, Any]) -> Table:
    table = Table(title=f"{document['size']}: the largest part of any rank, and its share of one rank's")
    for column in (
        "optimizer",
        "ranks",
        "state MB",
        "share",
        "MFLOP/step",
        "share",
        "share of cost",
        "tensors",
    ):
        table.add_column(column, justify="left" if column == "optimizer" else "right")
    alone = {row["name"]: row for row in document["rows"] if row["n_ranks"] == 1}
    for row in document["rows"]:
        cells = []
        for key in ("state_bytes", "flops_a_step"):
            share = f"{max(row[key]) / max(alone[row['name']][key]):.3f}" if row["name"] in alone else ""
            cells += [f"{max(row[key]) / 1e6:,.1f}", share]
        counts = " ".join(map(str, row["tensors"]))
        table.add_row(row["name"], str(row["n_ranks"]), *cells, f"{max(row['cost_share']):.3f}", counts)
    return table


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(SIZES), default="14M")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=SHARED, default=list(SHARED))
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--json", type=Path, metavar="OUT")
    arguments = parser.parse_args(argv)
    rows = [measure(name, arguments.size, n_ranks) for name in arguments.only for n_ranks in arguments.ranks]
    document = {"size": arguments.size, "software": software(compiled=False), "rows": rows}
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    console.print(make_table(document))
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
