"""What a record says of the machine, its software and the code that ran."""

from __future__ import annotations

import functools
import gc
import os
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

import nanorun
from nanorun import kernels
from nanorun.data.freed import give_back_freed_memory, keep_freed_memory
from nanorun.errors import UserError

MAX_PATCH_BYTES = 2_000_000


@functools.cache
def cpu_name() -> str:
    """Return the processor's name as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"


def hardware(device: torch.device, n_ranks: int) -> dict[str, Any]:
    """Return the record's `hardware`: device, counts, memory."""
    import psutil

    on_gpu = device.type == "cuda"
    return {
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        "n_devices": n_ranks,
        "cpu_name": cpu_name(),
        "n_cpus": os.cpu_count() or 1,
        "n_threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }


def keep_memory() -> None:
    """Have the C library keep what a step frees for the next one, in place of giving it back to the system.

    A step on a CPU frees and takes the same tens of MiB again; given back, each page of them is fetched and zeroed
    anew: 650 to 1,600 page faults in a step of 30 ms, which took up to a fifth longer (docs/performance.md).
    """
    give_back_freed_memory()
    keep_freed_memory(largest=2**30, most=2**31 - 1)


@contextmanager
def nothing_old_collected() -> Iterator[None]:
    """Leave what exists now out of Python's search for circles, a tenth of a second each, until the block ends."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def runs_kernels(device: torch.device) -> bool:
    """Return whether eager passes in fp32 run by nanorun's own kernels there."""
    return device.type == "cpu" and not kernels.why_not()


def software(compiled: bool, deterministic: bool = False, kernels: bool = False) -> dict[str, Any]:
    """Return the record's `software`: versions that can move a result."""
    import numpy

    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "compiled": compiled,
        "deterministic": deterministic,
        "kernels": kernels,
    }


@contextmanager
def deterministic_algorithms(asked: bool) -> Iterator[None]:
    """Let torch use deterministic algorithms alone inside the block, where that was asked for.

    Raises UserError naming the operation that has none.
    """
    if not asked:
        yield
        return
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark
    # cuBLAS reads it when it is first used, and torch refuses matrix products on CUDA without it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    except (RuntimeError, UserError) as error:
        # An outside optimizer's first step has it as the cause.
        found = re.search(r"(\S+) does not have a deterministic implementation", f"{error} {error.__cause__}")
        if not found:
            raise
        raise UserError(
            f"--deterministic: torch's {found[1]} has no deterministic form on this device; start the run without "
            "--deterministic, or with another optimizer or device"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0])
        cudnn.deterministic, cudnn.benchmark = before[1:]


def forget_peak_memory(device: torch.device) -> None:
    """Begin to measure the peak anew, so that what went before a run is not its own; on Linux and CUDA."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    give_back_freed_memory()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mib(device: torch.device) -> float:
    """Return the most memory held since `forget_peak_memory`.

    The allocator's on CUDA, the process's resident size on a CPU; on a CPU without /proc since the process began.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


@functools.cache
def code_identity() -> tuple[dict[str, Any], str | None]:
    """Return the record's `code` and, in a clone with changes, the patch from its commit.

    As they are when first asked for: a tree that is edited while the process runs is not what it runs.
    """
    package = Path(nanorun.__file__).resolve().parent
    commit = _git(package, "rev-parse", "HEAD")
    tracked = commit and _git(package, "ls-files", "__init__.py")
    if not tracked:
        return {"version": nanorun.__version__, "commit": None, "dirty": False, "patch": None}, None
    top = Path(_git(package, "rev-parse", "--show-toplevel") or package)
    # A patch with a rename, which git's settings may ask for, does not show the code that it moves.
    patch = _git(top, "diff", "--no-renames", "HEAD", "--", "nanorun", "configs") or ""
    new = _git(top, "ls-files", "--others", "--exclude-standard", "--", "nanorun", "configs") or ""
    whole = patch and len(patch) <= MAX_PATCH_BYTES
    code = {
        "version": nanorun.__version__,
        "commit": commit,
        "dirty": bool(patch or new),
        "patch": "source.patch" if whole else None,
    }
    return code, patch + "\n" if whole else None


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.rstrip("\n") if done.returncode == 0 else None
