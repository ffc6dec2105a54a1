"""Milliseconds of a Muon step beside a plain per-matrix fp32 loop of the same algorithm, interleaved.

    python scripts/bench_muon.py [--widths 128 256 384] [--layers 4] [--seconds 6] [--threads N]

Each width trains the matrices of `layers` blocks (qkv, attention out, MLP in, MLP out). The two take turns
step by step, so a busy neighbour slows both; medians and their ratio are printed.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time

import torch
from torch import Tensor

from nanorun.optim.muon import Muon


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


def measure(width: int, layers: int, seconds: float) -> tuple[float, float, int]:
    """Return the median milliseconds of our step and of the plain one, and how many of each were timed."""
    parameters, n_stacked = block_parameters(width, layers)
    optimizer = Muon([{"params": parameters, "n_stacked": n_stacked}], lr=0.02)
    plain = [part.clone() for p, n in zip(parameters, n_stacked) for part in p.detach().chunk(n)]
    grads = [part for p, n in zip(parameters, n_stacked) for part in p.grad.chunk(n)]
    momenta = [torch.zeros_like(matrix) for matrix in plain]
    steps = {"ours": optimizer.step, "plain": lambda: plain_step(plain, grads, momenta, 0.02)}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["ours"]) < 3:
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(1000 * (time.perf_counter() - start))
    return statistics.median(times["ours"]), statistics.median(times["plain"]), len(times["ours"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 384])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=6.0, help="in all, shared by the widths")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{arguments.layers} layers, {arguments.threads} threads, torch {torch.__version__}")
    print("width   muon ms   per-matrix ms   ratio   steps timed")
    for width in arguments.widths:
        ours, plain, count = measure(width, arguments.layers, arguments.seconds / len(arguments.widths))
        print(f"{width:5d} {ours:9.2f} {plain:15.2f} {ours / plain:7.2f} {count:13d}")


if __name__ == "__main__":
    main()
