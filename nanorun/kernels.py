"""Fused passes of the training step on a CPU, fp32: nanorun/kernels.c, compiled once for the machine by its C compiler.

A step of a small model spends a third of its seconds beside the matrix products, mostly in reading and writing the
same activations again and again. Each function here does in one pass what plain torch operations do in up to ten
(nanorun/block.py has the largest), and `nanorun.model` asks `suit` whether they can stand in for those. They can't
under autocast, torch.compile or a tensor subclass, on a GPU, or where there is no C compiler; NANORUN_KERNELS=0 turns
them off. On stand-ins for tensors (nanorun/training/memory.py) they compute nothing, and what they would hold is
counted.

Shapes: as in nanorun/model.py; N rows of any kind.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

SOURCE = Path(__file__).with_name("kernels.c")
FLAGS = [
    *("-O3", "-march=native", "-std=gnu11", "-shared", "-fPIC", "-fopenmp"),
    # What turns sums into vector code; -ffast-math would flush denormals in the whole process, and lose NaN.
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"),
]
ROW_RANGES = 16
"""Ranges of rows whose sums make the gradient of a norm's weight, however many threads there are."""


_PLAIN = (nn.Parameter, Tensor, FakeTensor)
_allowed = True


@contextmanager
def allowed(on: bool) -> Iterator[None]:
    """Let the kernels run inside the block, or not; `allow` changes it until the block ends."""
    before = _allowed
    allow(on)
    try:
        yield
    finally:
        allow(before)


def allow(on: bool) -> None:
    """Let the kernels run from now on where they can, or not."""
    global _allowed
    _allowed = on


def why_not() -> str:
    """Return why the kernels don't run on this machine's CPU; empty where they do."""
    return _loaded()[1] if _allowed else "they were turned off"


def library() -> ctypes.CDLL | None:
    """Return the compiled kernels; None where they are turned off or cannot be made here."""
    return _loaded()[0] if _allowed else None


@functools.cache
def _loaded() -> tuple[ctypes.CDLL | None, str]:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if os.environ.get("NANORUN_KERNELS") == "0":
        return None, "NANORUN_KERNELS is 0"
    if platform.system() != "Linux":
        return None, f"they are made on Linux alone, and this is {platform.system()}"
    if not compiler:
        return None, "no C compiler here: install gcc"
    runtimes = _openmp_runtimes()
    try:
        loaded = ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        return None, f"{compiler} could not make them: {error}"
    # Two OpenMP runtimes in a process would fight for the cores with their waiting threads.
    if _openmp_runtimes() != runtimes:
        return None, f"{compiler} has another OpenMP runtime than torch"
    return loaded, ""


def _compiled(compiler: str) -> Path:
    """Return the library that a compiler makes of the source for this processor, made before or now."""
    processor = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    kind = "\n".join(line for line in processor if line.startswith(("model name", "flags", "Features")))
    made_by = f"{Path(compiler).resolve()} {FLAGS} {kind}".encode()
    cache = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(cache) if cache else Path.home() / ".cache") / "nanorun" / "kernels"
    path = folder / (hashlib.sha256(SOURCE.read_bytes() + made_by).hexdigest()[:16] + ".so")
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder) as fresh:
            made = Path(fresh) / path.name
            words = [compiler, *FLAGS, "-o", str(made), str(SOURCE), "-lm"]
            subprocess.run(words, check=True, capture_output=True, timeout=60)
            made.replace(path)  # whole or not at all, whichever rank is first
    return path


def _openmp_runtimes() -> set[str]:
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    return {path for path in mapped if any(name in path for name in ("libgomp", "libomp", "libiomp"))}


def suit(*tensors: Tensor | None) -> bool:
    """Return whether the kernels can take these tensors here and now."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    for tensor in tensors:
        if tensor is not None and not (
            type(tensor) in _PLAIN
            and tensor.dtype is torch.float32
            and tensor.is_cpu
            and tensor.is_contiguous()
            and tensor.numel()
        ):
            return False
    return library() is not None


def _call(name: str, *arguments: Tensor | float | None) -> int:
    """Call a kernel, unless on stand-ins; numbers with a point are floats, others int64."""
    if any(isinstance(one, FakeTensor) for one in arguments):
        return 0
    given: list[Any] = []
    for one in arguments:
        if isinstance(one, Tensor):
            given.append(ctypes.c_void_p(one.data_ptr()))
        elif isinstance(one, float):
            given.append(ctypes.c_float(one))
        else:
            given.append(one if one is None else ctypes.c_int64(one))
    return int(getattr(library(), name)(*given))


class RMSNorm(torch.autograd.Function):
    """x / √(mean(x²) + eps) over the last dimension."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        y, scale_N = torch.empty_like(x), x.new_empty(x.numel() // x.size(-1))
        _call("rms_norm", scale_N.numel(), x.size(-1), eps, x, y, scale_N)
        ctx.save_for_backward(x, scale_N)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, scale_N = ctx.saved_tensors
        dx = torch.empty_like(x)
        _call("rms_norm_backward", scale_N.numel(), x.size(-1), x, scale_N, grad.contiguous(), dx)
        return dx, None


class LayerNorm(torch.autograd.Function):
    """(x − mean) / √(variance + eps) · weight + bias over the last dimension; the bias may be None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        n_rows, width = x.numel() // x.size(-1), x.size(-1)
        y, mean_N, scale_N = torch.empty_like(x), x.new_empty(n_rows), x.new_empty(n_rows)
        _call("layer_norm", n_rows, width, eps, x, weight, bias, y, mean_N, scale_N)
        ctx.save_for_backward(x, weight, mean_N, scale_N)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        x, weight, mean_N, scale_N = ctx.saved_tensors
        dx, sums_2PC = torch.empty_like(x), x.new_empty(2, ROW_RANGES, x.size(-1))
        shape = mean_N.numel(), x.size(-1), ROW_RANGES
        _call("layer_norm_backward", *shape, x, weight, mean_N, scale_N, grad.contiguous(), dx, *sums_2PC)
        dw_C, db_C = sums_2PC.sum(1)
        return dx, dw_C, db_C if ctx.needs_input_grad[2] else None, None


class Activation(torch.autograd.Function):
    """An activation by its name in config and kernels: `gelu` (the tanh form), `gelu_exact`, or `relu2`, relu(x)²."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str) -> Tensor:
        y = torch.empty_like(x)
        _call(name, x.numel(), x, y)
        ctx.save_for_backward(x)
        ctx.name = name
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        _call(f"{ctx.name}_backward", x.numel(), x, grad.contiguous(), dx)
        return dx, None


class CrossEntropy(torch.autograd.Function):
    """Summed loss in nats, logits bent under ±cap first; the logits' memory holds their gradient after."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor, cap: float, ignored: int) -> Tensor:
        losses_N = logits_NV.new_empty(logits_NV.size(0))
        wants = int(ctx.needs_input_grad[0])
        shape = logits_NV.shape
        if _call("cross_entropy", *shape, cap, logits_NV, targets_N.contiguous(), ignored, wants, losses_N):
            raise IndexError(f"a target is outside the vocabulary of {logits_NV.size(1)}")
        ctx.grad_NV = logits_NV.detach() if wants else None
        return losses_N.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        assert ctx.grad_NV is not None, "the memory of the logits was used by a backward pass before"
        grad_NV, ctx.grad_NV = ctx.grad_NV.mul_(grad), None
        return grad_NV, None, None, None
