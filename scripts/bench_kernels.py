"""Time the CPU training step with nanorun's kernels and without, and set both beside the machine's GEMM rate.

    python scripts/bench_kernels.py [--widths 128 192 384 768] [--archs gpt2 modern] [--seconds 8] [--json OUT]

A step is one forward and backward pass of a four-layer model on made-up tokens, the gradient clipped at norm 1, torch's
fused AdamW. Sides take turns within a case; the medians are quoted, and `share` is GPT.flops_per_token times the
tokens over the median, over the best fp32 GEMM rate of the same process, measured before and after each case.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from figures import write_figures

from nanorun import kernels
from nanorun.config import ModelConfig
from nanorun.doctor import gemm_gflops
from nanorun.model import GPT
from nanorun.training.machine import keep_memory

SHAPES = {128: (64, 1536, 65), 192: (256, 2048, 256), 384: (256, 2048, 256), 768: (256, 1024, 256)}
"""Context, tokens of a step and vocabulary of each width."""


def make_step(arch: str, width: int) -> tuple[Callable[[], None], float]:
    """Return a training step of a model, and the 1e9 operations that it takes by the formula."""
    context_len, n_tokens, vocab_size = SHAPES[width]
    config = ModelConfig(arch=arch, n_head=width // 32, n_embd=width, context_len=context_len, bias=False)  # type: ignore[arg-type]
    model = GPT(config, vocab_size)
    model.initialise(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.99), fused=True)
    idx_BT = torch.randint(vocab_size, (n_tokens // context_len, context_len))

    def step() -> None:
        loss_sum, _ = model(idx_BT, idx_BT.roll(-1, 1))
        (loss_sum / n_tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, model.flops_per_token() * n_tokens / 1e9


def measure(arch: str, width: int, seconds: float) -> dict[str, Any]:
    step, gflop = make_step(arch, width)
    sides: dict[str, list[float]] = {"plain": [], "kernels": []}
    rate, began = gemm_gflops(), time.perf_counter()
    while time.perf_counter() - began < seconds or len(sides["plain"]) < 5:
        for side, taken in sides.items():
            with kernels.allowed(side == "kernels"):
                start = time.perf_counter()
                step()
                taken.append(time.perf_counter() - start)
    rate = max(rate, gemm_gflops())
    medians = {side: statistics.median(taken[2:]) for side, taken in sides.items()}
    return {
        "arch": arch,
        "width": width,
        "context_len": SHAPES[width][0],
        "tokens": SHAPES[width][1],
        "gemm_gflops": rate,
        "gflop_per_step": gflop,
        **{f"{side}_ms": median * 1e3 for side, median in medians.items()},
        **{f"{side}_share": gflop / median / rate for side, median in medians.items()},
        "times_faster": medians["plain"] / medians["kernels"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--widths", type=int, nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--archs", nargs="+", choices=("gpt2", "modern"), default=["gpt2", "modern"])
    parser.add_argument("--seconds", type=float, default=8.0, help="of each case")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    keep_memory()
    rows = []
    for width in arguments.widths:
        for arch in arguments.archs:
            row = measure(arch, width, arguments.seconds)
            rows.append(row)
            print(
                f"{arch:7s}{width:4d} wide, context {row['context_len']}, {row['tokens']} tokens: plain "
                f"{row['plain_ms']:.1f} ms ({row['plain_share']:.2f} of {row['gemm_gflops']:.0f} GFLOP/s), kernels "
                f"{row['kernels_ms']:.1f} ms ({row['kernels_share']:.2f}), {row['times_faster']:.2f} times faster",
                flush=True,
            )
    if arguments.json:
        write_figures(arguments.json, "bench_kernels.py", None, rows=rows)


if __name__ == "__main__":
    main()
