"""Milliseconds of a Muon step beside a plain per-matrix fp32 loop of the same algorithm, interleaved.

    python scripts/bench_muon.py [--widths 128 256 384 512 768 1024] [--layers 4] [--seconds 10] [--threads N]
        [--coefficients original] [--normalize-rows] [--json records/benchmarks/muon.json]

Each width trains the matrices of `layers` blocks (qkv, attention out, MLP in, MLP out). Ours and the loop take
turns step by step, each first in every other round, so a busy neighbour slows both. Printed are the medians of
the milliseconds, and the median over the rounds of ours over the loop's with the quartiles beside it. The loop
is torch.optim.Muon's algorithm in fp32; torch's own class forces bf16, which a CPU without bf16 products makes
a hundred times slower. It always takes five steps of the original coefficients, whatever ours takes.

    python scripts/bench_muon.py --share [--widths 128 192 384 768] [--layers 3] [--seconds 10] [--json PATH]
        [--shapes 128x3x1536 192x3x4096]

prints the optimizer's share of the training step instead: of a GPT of that width, `layers` and 256 bytes of vocabulary,
25 tokens a step for each unit of width, or of the shapes (width x layers x tokens) given: those of the presets
`shakespeare-sprint`, `sotu` and `shakespeare` unless told. Five original steps with whole and with halved symmetric
products, and four of `schatten`, AdamW's part included, take turns with forward and backward passes of 2,048 tokens.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from figures import write_figures
from torch import Tensor

from nanorun.config import ModelConfig
from nanorun.doctor import gemm_gflops
from nanorun.model import GPT
from nanorun.optim import matrix_functions
from nanorun.optim.build import build_optimizers
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


VARIANTS = {
    "whole": ({}, math.inf),
    "original": ({}, matrix_functions.LEAST_SYMMETRIC),
    "schatten": ({"coefficients": "schatten", "ns_steps": 4}, matrix_functions.LEAST_SYMMETRIC),
}
"""Muon's options, and from how many multiply-adds symmetric products are halved; the first is what was there before."""

PRESET_SHAPES = ((128, 3, 1536), (192, 3, 4096))
"""Width, layers and tokens a step of the presets on embedded corpora; sotu's is shakespeare's."""


def tokens_for(width: int) -> int:
    """Return 25 tokens for each unit of width, in whole rows of 128."""
    return -(-25 * width // 128) * 128


def a_shape(word: str) -> tuple[int, int, int]:
    """Return width, layers and tokens of "192x3x4096"."""
    try:
        width, layers, tokens = map(int, word.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{word!r}: wanted WIDTHxLAYERSxTOKENS, as 192x3x4096") from None
    if tokens % 128 or min(width, layers, tokens) < 1:
        raise argparse.ArgumentTypeError(
            f"{word!r}: wanted tokens in whole rows of 128, and none of the three 0"
        )
    return width, layers, tokens


def share(width: int, layers: int, tokens: int, seconds: float) -> dict[str, Any]:
    """Return the medians of the passes' and of each optimizer step's milliseconds, and the optimizer's shares."""
    context = 128 if tokens % 256 else 256
    config = ModelConfig(n_layer=layers, n_head=max(1, width // 64), n_embd=width, context_len=context)
    model = GPT(config, vocab_size=256)
    model.initialise(0)
    rows = max(1, 2048 // context)
    batches_BT = torch.randint(256, (tokens // context, context)).split(rows)

    def passes() -> None:
        for idx_BT in batches_BT:
            (model(idx_BT, idx_BT)[0] / tokens).backward()

    def update(options: dict[str, Any], least: float) -> Any:
        optim = {"matrix": {"name": "muon", "lr": 1e-4, **options}, "default": {"name": "adamw", "lr": 1e-4}}
        optimizers = build_optimizers(model, optim)

        def step() -> None:
            matrix_functions.LEAST_SYMMETRIC = least
            optimizers.step()

        return step

    turns = [("passes", passes)] + [(name, update(*variant)) for name, variant in VARIANTS.items()]
    times: dict[str, list[float]] = {name: [] for name, _ in turns}
    end = None
    while end is None or time.perf_counter() < end or len(times["passes"]) < LEAST_ROUNDS:
        for name, turn in turns:
            start = time.perf_counter()
            turn()
            if end is not None:
                times[name].append(1000 * (time.perf_counter() - start))
        model.zero_grad()
        if end is None:
            end = time.perf_counter() + seconds
    ms = {name: statistics.median(found) for name, found in times.items()}
    gflops = model.flops_per_token() * tokens / ms["passes"] / 1e6
    shares = {name: ms[name] / (ms["passes"] + ms[name]) for name in VARIANTS}
    about = {"width": width, "layers": layers, "tokens": tokens, "rounds": len(times["passes"])}
    return {**about, "ms": ms, "share": shares, "passes_gflops": gflops}


def print_shares(arguments: argparse.Namespace) -> None:
    """Measure the optimizer's share for the widths and shapes asked for; print a table, and write it if told to."""
    asked = [(width, arguments.layers, tokens_for(width)) for width in arguments.widths]
    asked += arguments.shapes
    print("width layers tokens   passes ms", *(f"{name} ms share" for name in VARIANTS), sep="   ")
    rows = []
    for width, layers, tokens in asked:
        rows.append(share(width, layers, tokens, arguments.seconds))
        cells = [f"{rows[-1]['ms'][name]:8.1f} {rows[-1]['share'][name]:6.1%}" for name in VARIANTS]
        print(
            f"{width:5d} {layers:6d} {tokens:6d} {rows[-1]['ms']['passes']:11.1f}",
            *cells,
            sep="   ",
            flush=True,
        )
    if arguments.json is not None:
        write_figures(arguments.json, "bench_muon.py", None, gemm_gflops=gemm_gflops(), rows=rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--share", action="store_true", help="print the optimizer's share of the training step"
    )
    parser.add_argument(
        "--shapes",
        type=a_shape,
        nargs="*",
        default=PRESET_SHAPES,
        metavar="WxLxT",
        help="width x layers x tokens, for --share",
    )
    parser.add_argument("--widths", type=int, nargs="*")
    parser.add_argument("--layers", type=int, help="4, or 3 with --share")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each width, at least")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--coefficients", choices=list(COEFFICIENTS), default="original")
    parser.add_argument("--normalize-rows", action="store_true")
    parser.add_argument("--json", type=Path, help="a file to write the figures to")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.layers is None:
        arguments.layers = 3 if arguments.share else 4
    if arguments.widths is None:
        arguments.widths = [128, 192, 384, 768] if arguments.share else [128, 256, 384, 512, 768, 1024]
    if arguments.share:
        print_shares(arguments)
        return
    options = {"coefficients": arguments.coefficients, "normalize_rows": arguments.normalize_rows}
    setting = {"layers": arguments.layers, "threads": arguments.threads, **options}
    print(f"torch {torch.__version__}, " + ", ".join(f"{name} {value}" for name, value in setting.items()))
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
        write_figures(arguments.json, "bench_muon.py", None, **setting, widths=rows)


if __name__ == "__main__":
    main()
