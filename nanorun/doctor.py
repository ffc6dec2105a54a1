"""What this machine can do, what is missing, and the mend of each."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import time
from pathlib import Path
from typing import NamedTuple


class Finding(NamedTuple):
    topic: str
    ok: bool
    found: str
    mend: str
    """What to do about it; empty where nothing is needed."""


def examine(folder: Path) -> list[Finding]:
    """Return what was found, one line a topic; `folder` is where runs and data would lie."""
    return [
        _device(),
        _precision(),
        _compiler(),
        _kernels(),
        _rate(),
        _neighbours(),
        _vocabulary(),
        _wandb(),
        _disk(folder),
    ]


def _device() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Finding("device", True, f"{len(names)} CUDA: {', '.join(dict.fromkeys(names))}", "")
    from nanorun.training.machine import cpu_name

    found = f"CPU: {cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"
    return Finding("device", True, found, "")


def _precision() -> Finding:
    import torch

    if torch.cuda.is_available():
        bf16 = torch.cuda.is_bf16_supported()
        mend = "" if bf16 else "--set train.precision=fp32"
        return Finding("precision", bf16, "bf16 autocast" if bf16 else "no bf16 on this GPU", mend)
    return Finding("precision", True, "fp32 (on a CPU everything runs in fp32)", "")


def _compiler() -> Finding:
    import torch

    compiler = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    if torch.cuda.is_available():
        return Finding("compile", True, "torch.compile for CUDA", "")
    if compiler:
        return Finding(
            "compile",
            True,
            f"torch.compile with {compiler}; `auto` tries it on long runs without fused blocks",
            "",
        )
    return Finding(
        "compile", False, "no C++ compiler: training runs eager", "install g++ to let long runs be compiled"
    )


def _kernels() -> Finding:
    from nanorun.kernels import why_not

    if why := why_not():
        return Finding(
            "CPU kernels", False, why, "install gcc, on Linux: a CPU's step is up to 1.4 times as fast"
        )
    return Finding("CPU kernels", True, "nanorun's own, in C: fused blocks of eager passes in fp32", "")


def _rate() -> Finding:
    rate = gemm_gflops()
    return Finding("matrix rate", True, f"{rate:.0f} GFLOP/s (fp32, 2048 x 512 x 2048)", "")


def gemm_gflops(m: int = 2048, k: int = 512, n: int = 2048, repeats: int = 15) -> float:
    """Return the best fp32 rate of an (m, k) by (k, n) product on the CPU, in 1e9 operations a second."""
    import torch

    a_MK, b_KN = torch.randn(m, k), torch.randn(k, n)
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        torch.mm(a_MK, b_KN)
        best = min(best, time.perf_counter() - began)
    return 2 * m * k * n / best / 1e9


def _neighbours() -> Finding:
    import psutil

    cores = os.cpu_count() or 1
    others = psutil.cpu_percent(interval=0.5) / 100 * cores
    quiet = others < 0.25
    mend = (
        ""
        if quiet
        else "times will not be comparable: wait, or stop what else runs (a busy core can cost ten times)"
    )
    return Finding("neighbours", quiet, f"{others:.1f} of {cores} cores busy with other work", mend)


def _vocabulary() -> Finding:
    from nanorun.data.tokenizers.tiktoken_files import gpt2_vocabulary_status

    ok, found = gpt2_vocabulary_status()
    return Finding(
        "gpt2 vocabulary", ok, found, "" if ok else "pip install 'nanorun[offline]', or go online once"
    )


def _wandb() -> Finding:
    try:
        version = importlib.metadata.version("wandb")
    except importlib.metadata.PackageNotFoundError:
        return Finding("wandb", False, "not installed", "pip install wandb, or leave --wandb off")
    key = bool(os.environ.get("WANDB_API_KEY")) or (Path.home() / ".netrc").exists()
    found = f"wandb {version}, " + ("a login is set" if key else "no login: --wandb offline works")
    return Finding("wandb", True, found, "")


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free / 2**30
    mend = "" if free > 2 else "free some disk: a checkpoint takes 12 bytes a parameter under Adam"
    return Finding("free disk", free > 2, f"{free:.1f} GiB under {folder.resolve()}", mend)
