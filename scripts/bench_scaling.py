"""Time, memory and tokens/s of the training step from 1M to 350M parameters, context 64 to 4,096 and 1 to 4 ranks.

    python scripts/bench_scaling.py --json records/benchmarks/scaling.json --again --write-docs docs/performance.md

Each point is a process of its own (for many ranks a torchrun), so that its peak memory is its own: a first step, which
makes the optimizer's state, then as many as fit in --seconds, at least one; the medians are kept. Points that the
file holds already are left out, so the sweep can be run in pieces (--points '14M-*') and resumed; --again takes all
anew. Then a law is fitted (scaling_law.py), --write-docs writes its tables between the marks in a document, and
scaling.svg and scaling-context.svg beside it.

A point's name is SIZE-CONTEXT-OPTIMIZER, with -xN for N ranks and -fsdp where they share the model out. All sizes are
the `modern` architecture with a tied head. Ranks on a CPU share its cores: there the bytes, the seconds of a sum
alone and each rank's memory tell something, and the step's time does not.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from figures import write_figures
from scaling_law import summary, write_docs

from nanorun.config import RunConfig, make_config
from nanorun.data.batches import token_set
from nanorun.model import GPT
from nanorun.optim.build import OptimizerSet, build_optimizers
from nanorun.optim.ownership import cost_of_parameter
from nanorun.training import distributed, machine, sharding
from nanorun.training.clock import now
from nanorun.training.distributed import Ranks
from nanorun.training.step import Stepper, chosen_precision


class Size(NamedTuple):
    """A model, and the tokens of a step that a CPU takes a few seconds for."""

    n_layer: int
    n_embd: int
    n_head: int
    vocab_size: int
    batch_tokens: int


SIZES = {
    "1M": Size(3, 192, 3, 256, 4096),
    "4M": Size(5, 256, 4, 256, 4096),
    "14M": Size(8, 384, 6, 256, 4096),
    "38M": Size(12, 512, 8, 256, 2048),
    "124M": Size(12, 768, 12, 50304, 512),
    "350M": Size(24, 1024, 16, 50304, 256),
}
"""By millions of parameters: sotu's model, three by bytes between, GPT-2 small's and medium's shapes."""
BATCH_TOKENS_CUDA = 65536
"""Tokens of a step on CUDA, where the same sizes take milliseconds."""
OPTIMIZERS = {
    "adamw": {"default": {"name": "adamw", "lr": 1e-3}},
    "muon": {"default": {"name": "adamw", "lr": 1e-3}, "matrix": {"name": "muon", "lr": 0.02}},
}
MOST_STEPS = 20


class Point(NamedTuple):
    """What one process, or one torchrun, measures."""

    size: str
    context_len: int
    optim: str = "adamw"
    n_ranks: int = 1
    shard: str = "none"

    @property
    def name(self) -> str:
        ranks = f"-x{self.n_ranks}" if self.n_ranks > 1 else ""
        return f"{self.size}-{self.context_len}-{self.optim}{ranks}" + ("-fsdp" * (self.shard == "fsdp"))


POINTS = {
    point.name: point
    for point in (
        *(Point(size, context_len) for size in ("1M", "14M") for context_len in (64, 256, 1024, 4096)),
        *(Point(size, 256) for size in ("4M", "38M", "124M", "350M")),
        *(Point(size, 256, "muon") for size in ("1M", "4M", "14M", "38M")),
        Point("1M", 256, "muon", 2),
        *(Point("14M", 256, "muon", n_ranks) for n_ranks in (2, 4)),
        *(Point("14M", 256, "adamw", n_ranks) for n_ranks in (2, 4)),
        *(Point("14M", 256, "muon", n_ranks, "fsdp") for n_ranks in (2, 4)),
    )
}


def make_stepper(point: Point, device: torch.device, ranks: Ranks) -> Stepper:
    """Return the stepper of a run of the point's shape on made-up tokens."""
    size = SIZES[point.size]
    tokens = size.batch_tokens if device.type == "cpu" else BATCH_TOKENS_CUDA
    config = _config(point, size, tokens)
    if sharding.applies(config, ranks):
        precision = chosen_precision(config.train.precision, device)
        model = sharding.new_model(config, size.vocab_size, device, ranks, precision)
        optimizers: OptimizerSet = sharding.build_sharded(model, config.optim_by_role, None, ranks)
    else:
        model = GPT(config.model, size.vocab_size)
        model.initialise(0)
        model.to(device)
        optimizers = build_optimizers(model, config.optim_by_role, peers=ranks)
    made_up = np.random.default_rng(0).integers(
        0, size.vocab_size, 4 * max(tokens, 4096) + 1, dtype=np.uint16
    )
    return Stepper(model, optimizers, token_set([made_up]), config, device=device, ranks=ranks)


def _config(point: Point, size: Size, tokens: int) -> RunConfig:
    return make_config(
        {
            "track": "scaling",
            "name": point.name,
            "data": {"corpus": "made-up", "tokenizer": "byte"},
            "model": {
                "n_layer": size.n_layer,
                "n_embd": size.n_embd,
                "n_head": size.n_head,
                "context_len": point.context_len,
                "tied_head": True,
            },
            # One more than are run: the rows of the next step are prepared all the while, as in a run.
            "train": {"batch_tokens": tokens, "steps": MOST_STEPS + 2, "shard": point.shard},
            "optim": OPTIMIZERS[point.optim],
        },
        where=point.name,
    )


def measure(point: Point, seconds: float) -> dict[str, Any]:
    """Return the point's row; all ranks must call it."""
    device = distributed.pick_device("auto")
    if device.type == "cpu" and point.n_ranks > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // point.n_ranks))
    ranks = distributed.join(device.type)
    before_mib = psutil.Process().memory_info().rss / 2**20 if device.type == "cpu" else 0.0
    stepper = make_stepper(point, device, ranks)
    steps, updates = time_steps(stepper, seconds)
    own = {
        "peak_mib": machine.peak_memory_mib(device),
        "before_mib": before_mib,
        "state_bytes": stepper.optimizers.state_bytes(),
    }
    row = {
        **point._asdict(),
        "name": point.name,
        "n_parameters": stepper.model.n_parameters(),
        "batch_tokens": stepper.config.train.batch_tokens,
        "steps": len(steps),
        "n_threads": torch.get_num_threads(),
        "step_seconds": statistics.median(steps),
        "update_seconds": statistics.median(updates),
        "tokens_per_second": stepper.config.train.batch_tokens / statistics.median(steps),
        "amounts": amounts(stepper),
        "ranks": ranks.gather(own),
        **time_travel(stepper),
    }
    stepper.close()
    return row


def time_steps(stepper: Stepper, seconds: float) -> tuple[list[float], list[float]]:
    """Return the seconds of steps after the first, and of the update in each."""
    updates: list[float] = []
    stepper.update = _timed(stepper.update, updates, stepper.device)  # type: ignore[method-assign]
    step = _timed(stepper.step, steps := [], stepper.device)
    step(0, 1.0)
    # Each rank takes the same number.
    count = min(MOST_STEPS, max(1, round(seconds / stepper.ranks.slowest(steps[0]))))
    for number in range(1, count + 1):
        step(number, 1.0)
    return steps[1:], updates[1:]


def _timed(call: Callable[..., Any], into: list[float], device: torch.device) -> Callable[..., Any]:
    def timed(*arguments: Any) -> Any:
        began = now(device)
        result = call(*arguments)
        into.append(now(device) - began)
        return result

    return timed


def time_travel(stepper: Stepper, repeats: int = 3) -> dict[str, float]:
    """Return the fewest seconds that a step's sums and broadcasts take with nothing beside them, and their bytes.

    Empty where nothing travels, and where the ranks share the model out, whose gathers are the blocks' own.
    """
    sharing = stepper.optimizers.sharing
    if stepper.ranks.n_ranks == 1 or stepper.sharded:
        return {}
    sums, broadcasts = [], []
    shared = sharing.shared if sharing else []
    for _ in range(repeats):
        stepper.ranks.wait()
        began = now(stepper.device)
        with stepper.gradients.travelling():
            pass
        stepper.gradients.finish(torch.zeros(2, device=stepper.device))
        sums.append(now(stepper.device) - began)
        stepper.ranks.wait()
        began = now(stepper.device)
        for optimizer in shared:
            for parcel in sharing.send(optimizer):
                parcel.receive()
        broadcasts.append(now(stepper.device) - began)
    n_ranks = stepper.ranks.n_ranks
    broadcast = sum(p.nbytes for one in shared for group in one.param_groups for p in group["params"])
    return {
        "sum_seconds": stepper.ranks.slowest(min(sums)),
        "sum_bytes": 2 * (n_ranks - 1) / n_ranks * sum(p.nbytes for p in stepper.working.parameters()),
        "broadcast_seconds": stepper.ranks.slowest(min(broadcasts)),
        "broadcast_bytes": (n_ranks - 1) / n_ranks * broadcast,
    }


def amounts(stepper: Stepper) -> dict[str, float]:
    """Return what a step of one rank has to do, in the units of scaling_law's terms."""
    config, model = stepper.config.model, stepper.model
    tokens = stepper.rows_of_rank * config.context_len
    micro_tokens = min(stepper.micro_batch_rows, stepper.rows_of_rank) * config.context_len
    attention = 12 * config.n_layer * config.n_embd * config.context_len
    n_parameters, muon = model.n_parameters(), [0, 0.0]
    for optimizer, name in zip(stepper.optimizers.optimizers, stepper.optimizers.names):
        for group in optimizer.param_groups if name == "muon" else []:
            for parameter, count in zip(group["params"], group["n_stacked"]):
                muon[0] += parameter.numel()
                muon[1] += 2 * cost_of_parameter(optimizer, group, parameter, count)
    return {
        "layer_passes": config.n_layer * -(-tokens // micro_tokens),
        "matmul_flops": (model.flops_per_token() - attention) * tokens,
        "attention_flops": attention * tokens,
        "stream_bytes": 4 * tokens * config.n_layer * config.n_embd,
        "logits_bytes": 4 * tokens * model.vocab_size,
        "gradient_bytes": 4 * n_parameters * -(-tokens // micro_tokens),
        "tensors": len(stepper.optimizers.parameters()),
        # Weight, gradient and moments read, weight and moments written, in fp32.
        "update_bytes": 28 * (n_parameters - muon[0]) + 20 * muon[0],
        "newton_schulz_flops": muon[1],
        "micro_stream_bytes": 4 * micro_tokens * config.n_layer * config.n_embd,
        "micro_logits_bytes": 4 * micro_tokens * model.vocab_size,
        "process": 1,
    }


def measure_apart(point: Point, seconds: float) -> dict[str, Any]:
    """Return the point's row, measured in processes of its own."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "row.json"
        start = [sys.executable]
        if point.n_ranks > 1:
            start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={point.n_ranks}"]
        words = [
            str(Path(__file__).resolve()),
            "--one",
            point.name,
            "--json",
            str(result),
            f"--seconds={seconds}",
        ]
        done = subprocess.run([*start, *words], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{point.name} failed:\n{done.stderr}")
        row: dict[str, Any] = json.loads(result.read_text())
        return row


def sweep(points: Sequence[Point], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return all rows, those of the file first; the file is written after each new one."""
    out: Path = arguments.json
    known = json.loads(out.read_text())["rows"] if out.exists() else []
    rows = {row["name"]: row for row in known}
    for point in points:
        if point.name in rows and not arguments.again:
            continue
        rows[point.name] = row = measure_apart(point, arguments.seconds)
        peak = max(one["peak_mib"] for one in row["ranks"])
        print(
            f"{point.name:20} {row['step_seconds']:8.3f} s  {row['tokens_per_second']:9,.0f} tokens/s  "
            f"update {row['update_seconds']:7.3f} s  peak {peak:7,.0f} MiB  {row['steps']} steps",
            flush=True,
        )
        # The command of the whole, whatever the pieces were.
        words = ["--json", str(out)]
        hardware = machine.hardware(distributed.pick_device("auto"), 1)
        write_figures(out, "bench_scaling.py", words, hardware=hardware, rows=list(rows.values()))
    return list(rows.values())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", required=True)
    parser.add_argument(
        "--points", nargs="+", metavar="NAME", default=["*"], help="names, or patterns such as '14M-*'"
    )
    parser.add_argument("--again", action="store_true", help="measure points anew that the file holds")
    parser.add_argument("--seconds", type=float, default=5.0, help="of steps at a point, about")
    parser.add_argument("--write-docs", type=Path, metavar="FILE")
    parser.add_argument("--one", choices=list(POINTS), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.one:
        row = measure(POINTS[arguments.one], arguments.seconds)
        if not int(os.environ.get("RANK", "0")):
            arguments.json.write_text(json.dumps(row))
        distributed.leave()
        return
    there = {point.name: point for point in POINTS.values() if point.n_ranks <= most_ranks()}
    chosen = [
        point for name, point in there.items() if any(fnmatch.fnmatch(name, p) for p in arguments.points)
    ]
    if not chosen:
        parser.error(f"--points {' '.join(arguments.points)}: there are {', '.join(there)}")
    rows = sweep(chosen, arguments)
    missing = there.keys() - {row["name"] for row in rows}
    if missing:
        print(f"{len(missing)} of {len(there)} points are missing: the law waits for them")
        return
    document = json.loads(arguments.json.read_text())
    print(summary(document))
    if arguments.write_docs:
        write_docs(document, arguments.write_docs)


def most_ranks() -> int:
    """Return how many ranks this machine can start: on a CPU as many as are asked for."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 4


if __name__ == "__main__":
    main()
