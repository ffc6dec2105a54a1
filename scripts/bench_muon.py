"""Milliseconds of a Muon step beside a plain per-matrix fp32 loop of the same algorithm, interleaved.

    python scripts/bench_muon.py [--widths 128 256 384 512 768 1024] [--layers 4] [--seconds 10] [--threads N]
        [--coefficients original] [--normalize-rows] [--json records/benchmarks/muon.json]

Each width trains the matrices of `layers` blocks (qkv, attention out, MLP in, MLP out). Ours and the loop take
turns step by step, each first in every other round, so a busy neighbour slows both. Printed are the medians of
the milliseconds, and the median over the rounds of ours over the loop's with the quartiles beside it. The loop
is torch.optim.Muon's algorithm in fp32; torch's own class forces bf16, which a CPU without bf16 products makes
a hundred times slower. It always takes five steps of the original coefficients, whatever ours takes.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanorun.optim.matrix_functions import COEFFICIENTS
from nanorun.optim.muon import Muon

LEAST_ROUNDS = 5
"""Rounds timed at least, however long they take: at width 1024 a step is seconds."""


@torch.no_grad()
def plain_step(matrices: list[Tensor], grads: list[Tensor], momenta: list[Tensor], lr: float) -> None:
    """One Muon step, matrix by matrix, as torch.optim.Muon does it but in fp32."""
    for matrix, grad, momentum in zip(matrices, grads, momenta, strict=True):
        momentum.lerp_(grad, 0.05)
        x = grad.lerp(momentum, 0.95)
        tall = x.size(0) > x.size(1)
        x = x.T if tall else x
        x = x / x.norm().clamp(min=1e-7)
        for _ in range(5):
            gram = x @ x.T
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
        size = math.sqrt(max(1.0, matrix.size(0) / matrix.size(1)))
        matrix.add_(x.T if tall else x, alpha=-lr * size)


def block_parameters(width: int, layers: int) -> tuple[list[torch.nn.Parameter], list[int]]:
    """Return the matrices of the blocks with gradients set, and how many each stacks."""
    generator = torch.Generator().manual_seed(0)
    parameters, n_stacked = [], []
    for rows, cols, count in [(3, 1, 3), (1, 1, 1), (4, 1, 1), (1, 4, 1)] * layers:
        shape = (rows * width, cols * width)
        parameters.append(torch.nn.Parameter(torch.randn(shape, generator=generator)))
        parameters[-1].grad = torch.randn(shape, generator=generator)
        n_stacked.append(count)
    return parameters, n_stacked


def measure(width: int, layers: int, seconds: float, options: dict[str, Any]) -> dict[str, Any]:
    """Return the medians of our step and of the loop's, their ratio with its quartiles, and the rounds timed."""
    parameters, n_stacked = block_parameters(width, layers)
    optimizer = Muon([{"params": parameters, "n_stacked": n_stacked}], lr=0.02, **options)
    plain = [part.clone() for p, n in zip(parameters, n_stacked) for part in p.detach().chunk(n)]
    grads = [part for p, n in zip(parameters, n_stacked) for part in p.grad.chunk(n)]
    momenta = [torch.zeros_like(matrix) for matrix in plain]
    turns = [("ours", optimizer.step), ("loop", lambda: plain_step(plain, grads, momenta, 0.02))]
    times: dict[str, list[float]] = {name: [] for name, _ in turns}
    for _, step in turns:
        step()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["ours"]) < LEAST_ROUNDS:
        for name, step in turns:
            start = time.perf_counter()
            step()
            times[name].append(1000 * (time.perf_counter() - start))
        turns.reverse()
    ratios = [ours / loop for ours, loop in zip(times["ours"], times["loop"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "width": width,
        "ours_ms": statistics.median(times["ours"]),
        "loop_ms": statistics.median(times["loop"]),
        "ratio": middle,
        "ratio_quartiles": [low, high],
        "rounds": len(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 384, 512, 768, 1024])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each width, at least")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--coefficients", choices=list(COEFFICIENTS), default="original")
    parser.add_argument("--normalize-rows", action="store_true")
    parser.add_argument("--json", type=Path, help="a file to write the figures to")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    options = {"coefficients": arguments.coefficients, "normalize_rows": arguments.normalize_rows}
    setting = {
        "layers": arguments.layers,
        "threads": arguments.threads,
        "torch": torch.__version__,
        **options,
    }
    print(", ".join(f"{name} {value}" for name, value in setting.items()))
    print("width    ours ms    loop ms   ratio   quartiles   rounds")
    rows = []
    for width in arguments.widths:
        row = measure(width, arguments.layers, arguments.seconds, options)
        rows.append(row)
        low, high = row["ratio_quartiles"]
        print(
            f"{width:5d} {row['ours_ms']:10.2f} {row['loop_ms']:10.2f} {row['ratio']:7.2f}   "
            f"{low:.2f}–{high:.2f} {row['rounds']:8d}",
            flush=True,
        )
    if arguments.json is not None:
        report = {**setting, "machine": platform.processor() or platform.machine(), "widths": rows}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
