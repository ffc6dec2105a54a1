"""What a training step would take on 8 and 64 H100s, worked out on paper: nothing here was measured.

Counted by nanorun's own code on weights without memory: the operations of a token, the buckets in which gradients
travel, which rank owns which of Muon's matrices. Assumed are the figures of FIGURES. Printed by bench_scaling.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from bench_ranks import Apart

from nanorun.config import ModelConfig
from nanorun.model import GPT
from nanorun.optim.build import build_optimizers
from nanorun.optim.matrix_functions import newton_schulz_cost
from nanorun.training.gradients import BUCKET_BYTES, make_buckets

NVIDIA = "NVIDIA's H100 data sheet, SXM5"
NCCL = "NCCL's own model of a ring, src/graph/tuning.cc"

GEMM = 650e12
STEP_SHARE, MUON_SHARE = 0.55, 0.3
HBM, LINK, NODE_LINK = 0.8 * 3.35e12, 0.8 * 450e9, 0.8 * 8 * 50e9
HOP, NODE_HOP, START = 3.4e-6, 9.6e-6, 8.4e-6
PLATEAU = 1.9
"""What NCCL multiplies the latency of a ring's sum over several nodes by."""
MEMORY, MEMORY_SHARE = 80e9, 0.9
STREAM_BYTES, LOGIT_BYTES = 50, 18
GPUS_A_NODE = 8

FIGURES = (
    (
        "bf16 matrix products",
        "989 TFLOP/s dense peak, of which a large product reaches 650",
        NVIDIA + "; assumed",
    ),
    ("share of 650 that the passes reach", f"{STEP_SHARE:.0%}", "the target on one H100, not a result"),
    ("share that Newton–Schulz's batched products reach", f"{MUON_SHARE:.0%}", "assumed"),
    ("memory of a GPU", "80 GB at 3.35 TB/s, of which 80 %; 90 % of it can be filled", NVIDIA + "; assumed"),
    (
        "NVLink and NVSwitch",
        "450 GB/s a GPU and direction, of which 80 %",
        NVIDIA + " (900 both ways); assumed",
    ),
    (
        "InfiniBand",
        "400 Gb/s for each GPU of a node, 8 rings side by side: 400 GB/s, of which 80 %",
        "NVIDIA's DGX H100 data sheet (8 ConnectX-7); assumed",
    ),
    (
        "latency",
        "8.4 µs a collective, 3.4 µs a hop, 9.6 µs a hop between nodes; a sum over nodes 1.9 times that",
        NCCL + " (ring, Simple)",
    ),
    (
        "activations in bf16 beside an fp32 residual stream",
        f"{STREAM_BYTES} bytes a token, layer and channel, {LOGIT_BYTES} a logit",
        "counted by hand in model.py",
    ),
)


class Case(NamedTuple):
    name: str
    model: dict[str, Any]
    batch_tokens: int


SMALL = {"n_layer": 12, "n_head": 12, "n_embd": 768, "context_len": 1024, "tied_head": True}
MEDIUM = {"n_layer": 24, "n_head": 16, "n_embd": 1024, "context_len": 1024, "tied_head": True}
XL = {"n_layer": 48, "n_head": 25, "n_embd": 1600, "context_len": 1024, "tied_head": True}
CASES = (
    Case("124M", SMALL, 2**19),
    Case("124M", SMALL, 2**22),
    Case("350M", MEDIUM, 2**19),
    Case("1.6B", XL, 2**20),
)
VOCAB_SIZE = 50304


def ring_hops(steps: int, n_gpus: int) -> float:
    """Return the seconds of latency of a ring that `steps` times passes on along `n_gpus`."""
    between = steps * max(0, n_gpus // GPUS_A_NODE - (n_gpus <= GPUS_A_NODE)) / n_gpus
    return START + (steps - between) * HOP + between * NODE_HOP


def bandwidth(n_gpus: int) -> float:
    return LINK if n_gpus <= GPUS_A_NODE else min(LINK, NODE_LINK)


def sum_seconds(n_bytes: float, n_gpus: int) -> float:
    """Return what a ring all-reduce takes: each GPU sends 2·(n-1)/n of it, in 2·(n-1) hops."""
    if n_gpus == 1:
        return 0.0
    plateau = PLATEAU if n_gpus > GPUS_A_NODE else 1.0
    hops = 2 * (n_gpus - 1)
    return hops / n_gpus * n_bytes / bandwidth(n_gpus) + plateau * ring_hops(hops, n_gpus)


def broadcast_seconds(n_bytes: float, n_gpus: int) -> float:
    """Return what a broadcast along a ring takes, which each GPU passes on while it receives; an upper bound.

    NCCL reckons with one hop, because those after it follow along the ring.
    """
    return 0.0 if n_gpus == 1 else n_bytes / bandwidth(n_gpus) + ring_hops(n_gpus - 1, n_gpus)


class Counted(NamedTuple):
    """What nanorun's code says of a model on so many GPUs."""

    n_parameters: int
    flops_per_token: int
    buckets: list[int]
    """Bytes of each."""
    owned: list[int]
    """Parameters that each GPU updates by Muon."""
    newton_schulz: list[float]
    """FLOP of each GPU's matrices."""


def count(case: Case, n_gpus: int) -> Counted:
    with torch.device("meta"):
        model = GPT(ModelConfig.model_validate(case.model), VOCAB_SIZE)
    tables = {"default": {"name": "adamw", "lr": 1e-3}, "matrix": {"name": "muon", "lr": 0.02}}
    optimizers = build_optimizers(model, tables, peers=Apart(0, n_gpus))  # type: ignore[arg-type]
    owned, newton_schulz = [0] * n_gpus, [0.0] * n_gpus
    roles = model.roles()
    for name, parameter in model.named_parameters():
        if roles[name].role != "matrix":
            continue
        owner = optimizers.sharing.owner_of[id(parameter)] if optimizers.sharing else 0
        stacked = roles[name].n_stacked
        rows, cols = parameter.size(0) // stacked, parameter.size(1)
        owned[owner] += parameter.numel()
        # Plain steps in bf16, as on CUDA.
        newton_schulz[owner] += 2 * stacked * newton_schulz_cost(rows, cols, 5, dtype=torch.bfloat16)
    buckets = [
        sum(p.nbytes for p in bucket) for bucket in make_buckets(list(model.parameters()), BUCKET_BYTES)
    ]
    return Counted(model.n_parameters(), model.flops_per_token(), buckets, owned, newton_schulz)


class Predicted(NamedTuple):
    """Seconds of the parts of a step, and bytes a GPU."""

    micro_rows: int
    n_buckets: int
    passes: float
    sum: float
    uncovered: float
    """What of the sum the last backward pass does not cover."""
    newton_schulz: float
    broadcast: float
    other: float
    """AdamW, norm and clipping."""
    memory: float

    @property
    def step(self) -> float:
        return self.passes + self.uncovered + self.newton_schulz + self.broadcast + self.other


def predict(case: Case, n_gpus: int) -> Predicted:
    """Return the parts of a step of nanorun's on so many H100s, every rank with all of the model."""
    counted = count(case, n_gpus)
    rows = case.batch_tokens // n_gpus // case.model["context_len"]
    kept = _kept_bytes(counted)
    micro_rows = _fitting(case, rows, MEMORY * MEMORY_SHARE - kept)
    passes = rows * case.model["context_len"] * counted.flops_per_token / (GEMM * STEP_SHARE)
    sums = [sum_seconds(n_bytes, n_gpus) for n_bytes in counted.buckets]
    # Two thirds of a pass are backward, and the last bucket leaves when that is over.
    covering = 2 / 3 * passes * micro_rows / rows
    uncovered = max(sum(sums) - covering, sums[-1])
    n_muon = sum(counted.owned)
    moved = 12 * counted.n_parameters + 28 * (counted.n_parameters - n_muon) + 20 * max(counted.owned)
    return Predicted(
        micro_rows,
        len(sums),
        passes,
        sum(sums),
        uncovered,
        max(counted.newton_schulz) / (GEMM * MUON_SHARE),
        sum(broadcast_seconds(4 * one, n_gpus) for one in counted.owned if one),
        moved / HBM,
        kept + micro_rows * _row_bytes(case),
    )


def _kept_bytes(counted: Counted) -> float:
    """Weights, their bf16 copies, gradients, moments, and what owners send to one another, all at once."""
    n_muon = sum(counted.owned)
    received = 4 * n_muon if len(counted.owned) > 1 else 0
    return 10 * counted.n_parameters + 8 * (counted.n_parameters - n_muon) + 4 * max(counted.owned) + received


def _row_bytes(case: Case) -> float:
    model = case.model
    return model["context_len"] * (
        STREAM_BYTES * model["n_layer"] * model["n_embd"] + LOGIT_BYTES * VOCAB_SIZE
    )


def _fitting(case: Case, rows: int, room: float) -> int:
    """Return the rows of a micro-batch: halved until they fit."""
    while rows > 1 and rows * _row_bytes(case) > room:
        rows //= 2
    return rows


def on_paper() -> str:
    """Return the section on H100s as Markdown."""
    lines = [
        "| model | tokens a step | H100s | rows at once | passes ms | sum ms (buckets) | of it uncovered | "
        "Newton–Schulz ms | broadcast ms | rest ms | step ms | tokens/s | of linear | GB a GPU |",
        "| --- " + "| --: " * 13 + "|",
    ]
    for case in CASES:
        one = predict(case, 1)
        for n_gpus in (1, 8, 64):
            it = predict(case, n_gpus)
            ms = [
                f"{1e3 * part:.1f}"
                for part in (it.uncovered, it.newton_schulz, it.broadcast, it.other, it.step)
            ]
            sums = f"{1e3 * it.sum:.1f} ({it.n_buckets})" if n_gpus > 1 else "–"
            lines.append(
                f"| {case.name} | {case.batch_tokens:,} | {n_gpus} | {it.micro_rows} | {1e3 * it.passes:.1f} | "
                f"{sums} | {' | '.join(ms)} | {case.batch_tokens / it.step / 1e6:.2f}M | "
                f"{one.step / n_gpus / it.step:.0%} | {it.memory / 1e9:.0f} |"
            )
    figures = [
        "| figure | taken as | from |",
        "| --- | --- | --- |",
        *(f"| {' | '.join(one)} |" for one in FIGURES),
    ]
    return (
        "### On paper: 8 and 64 H100s\n\nWorked out, not measured: no machine with one of these GPUs ran any of it. "
        "The law's parts with an H100's rates in place of the CPU's; the model's operations, the gradients' buckets "
        "and the owners of Muon's matrices are counted by nanorun's own code (`scripts/scaling_on_paper.py`).\n\n"
        + "\n".join(figures)
        + "\n\n"
        + "\n".join(lines)
        + "\n\n"
        + _breaks_first()
    )


def _breaks_first() -> str:
    case, eight, many = CASES[0], predict(CASES[0], 8), predict(CASES[0], 64)
    counted = count(case, 64)
    owners = sum(map(bool, counted.owned))
    at_least = sum(4 * one / bandwidth(64) + START + NODE_HOP for one in counted.owned if one)
    latency = many.n_buckets * PLATEAU * ring_hops(126, 64) / many.sum
    of_logits = case.model["context_len"] * LOGIT_BYTES * VOCAB_SIZE / _row_bytes(case)
    xl = predict(CASES[-1], 64)
    return "\n".join(
        (
            "What breaks first:\n",
            f"1. **What travels, at 64 GPUs and {case.batch_tokens:,} tokens a step.** The 124M model's passes take "
            f"{1e3 * many.passes:.0f} ms there ({1e3 * eight.passes:.0f} on 8). The sum of fp32 gradients takes "
            f"{1e3 * many.sum:.0f} ms in {many.n_buckets} buckets, {latency:.0%} of it latency; a backward pass covers "
            f"{2e3 / 3 * many.passes:.0f} of it. Owners send their matrices one after another: {owners} broadcasts of "
            f"63 hops, {1e3 * many.broadcast:.1f} ms if each waits for the one before, {1e3 * at_least:.1f} ms by "
            f"NCCL's estimate of one hop each, and AdamW beside them covers under {1e3 * many.other:.1f} ms. Larger "
            "buckets between nodes, sums in bf16, and one all-gather of equal shares in place of the broadcasts are "
            "the mend; so are trees, which NCCL may choose by itself: their latency grows with the nodes' logarithm.",
            f"2. **Muon's shares.** {4 * case.model['n_layer']} parameters can be owned, {64 - owners} of 64 GPUs own "
            f"none; Newton–Schulz ends at its dearest owner's {1e3 * many.newton_schulz:.2f} ms "
            f"({1e3 * eight.newton_schulz:.1f} on 8). That is small; it is the broadcasts that make sharing dear.",
            f"3. **Memory, on few GPUs.** Logits are {of_logits:.0%} of what a token of the 124M model holds in a "
            f"micro-batch, so {eight.micro_rows} rows of 1,024 fit 80 GB and 64 do not. States are no trouble yet: the "
            f"1.6B model's fit every GPU beside {xl.micro_rows} rows ({xl.memory / 1e9:.0f} GB), and sharing the model "
            'out (`train.shard = "fsdp"`) is for larger ones.',
            f"\nWith 8 times the tokens a step 64 GPUs keep {_linear(CASES[1]):.0%} of linear in place of "
            f"{_linear(case):.0%}, and take an eighth of the steps on the same tokens, which costs loss.",
        )
    )


def _linear(case: Case) -> float:
    return predict(case, 1).step / 64 / predict(case, 64).step


if __name__ == "__main__":
    print(on_paper())
