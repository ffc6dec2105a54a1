"""Products of a matrix with its transpose by a Triton kernel that computes half of the result, the other half being
its mirror image.

Imported by whoever asks for it alone: Triton is there where torch is built for CUDA. TRITON_INTERPRET=1 runs the kernel
on a CPU, slowly. Its block sizes are unmeasured; scripts/gpu_suite.py sets it beside torch.bmm.

Shapes: K matrices of S rows and L columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanorun.operators import operator

BLOCK = 128
"""Rows and columns of the result that one program computes."""
DEPTH = 64
"""Columns of the matrix that it takes at a time."""


@triton.jit
def kernel(
    x, addend, out, size, stride_k, stride_row, stride_col, alpha, beta,
    depth: tl.constexpr, HAS_ADDEND: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    i, j = tl.program_id(0), tl.program_id(1)
    # The blocks above the diagonal are written by those below it.
    if i >= j:
        k = tl.program_id(2).to(tl.int64)
        rows, cols = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
        steps = tl.arange(0, DEPTH)
        left = x + k * stride_k + rows[:, None] * stride_row + steps[None, :] * stride_col
        right = x + k * stride_k + cols[:, None] * stride_row + steps[None, :] * stride_col
        total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
        for first in range(0, depth, DEPTH):
            inside = steps[None, :] < depth - first
            a = tl.load(left, mask=(rows[:, None] < size) & inside, other=0.0)
            b = tl.load(right, mask=(cols[:, None] < size) & inside, other=0.0)
            total = tl.dot(a, tl.trans(b), total)
            left += DEPTH * stride_col
            right += DEPTH * stride_col
        total = total * alpha
        begin = k * size * size
        inside = (rows[:, None] < size) & (cols[None, :] < size)
        places = begin + rows[:, None] * size + cols[None, :]
        if HAS_ADDEND:
            total += beta * tl.load(addend + places, mask=inside, other=0.0).to(tl.float32)
        result = total.to(out.dtype.element_ty)
        tl.store(out + places, result, mask=inside)
        if i > j:
            mirrored = begin + cols[:, None] * size + rows[None, :]
            tl.store(out + mirrored, tl.trans(result), mask=(cols[:, None] < size) & (rows[None, :] < size))


@operator("symmetric_product")
def symmetric_product(x_KSL: Tensor, addend_KSS: Tensor | None, alpha: float, beta: float) -> Tensor:
    """Return alpha·XXᵀ + beta·A of each matrix, KSS and symmetric; A is symmetric as well, or nothing.

    X may lie in memory in any way, a transposed view included. Sums are kept in fp32. An operator of its own, so that
    compiled code leaves it alone.
    """
    n_matrices, size, depth = x_KSL.shape
    out_KSS = x_KSL.new_empty((n_matrices, size, size))
    n_blocks = triton.cdiv(size, BLOCK)
    kernel[(n_blocks, n_blocks, n_matrices)](
        x_KSL,
        out_KSS if addend_KSS is None else addend_KSS.contiguous(),
        out_KSS,
        size,
        *x_KSL.stride(),
        alpha,
        beta,
        depth=depth,
        HAS_ADDEND=addend_KSS is not None,
        BLOCK=BLOCK,
        DEPTH=DEPTH,
        num_warps=8,
        num_stages=3,
    )
    return out_KSS


@torch.library.register_fake("nanorun::symmetric_product")
def _(x_KSL: Tensor, addend_KSS: Tensor | None, alpha: float, beta: float) -> Tensor:
    n_matrices, size, _ = x_KSL.shape
    return x_KSL.new_empty((n_matrices, size, size))
