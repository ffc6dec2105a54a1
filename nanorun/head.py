"""The product of the last hidden state with the vocabulary, in shapes and types that a GPU is fast at.

Shapes: N tokens, C channels, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanorun.errors import UserError

ROWS = 64
"""The vocabulary is filled up with zeros to a multiple of this on CUDA: rows of GPT-2's 50,257 scores begin at
addresses that the fast matrix kernels cannot read."""
FP8_CAPABILITY = (8, 9)
"""CUDA's compute capability from which on there are FP8 units: Ada, Hopper and later."""


def scores(x_C: Tensor, weight_VC: Tensor, *, fp8: bool = False) -> Tensor:
    """Return x·Wᵀ, (…, V); where `fp8`, of operands rounded to 8 bits (see `_FP8Product`)."""
    if not fp8 and not x_C.is_cuda:
        return F.linear(x_C, weight_VC)
    padded_VC = F.pad(weight_VC, (0, 0, 0, -weight_VC.size(0) % ROWS))
    scores_V = _FP8Product.apply(x_C, padded_VC) if fp8 else F.linear(x_C, padded_VC)
    return scores_V[..., : weight_VC.size(0)]


def refuse_without_fp8(device: torch.device, n_embd: int) -> None:
    """Raise UserError where train.fp8_head cannot be had."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"this {device.type} device"
        raise UserError(
            f"train.fp8_head = true needs a GPU with FP8 units (compute capability 8.9 or more: an H100, an L4), and "
            f"{name} has none: leave train.fp8_head out"
        )
    if n_embd % 16:
        raise UserError(
            f"train.fp8_head = true needs a model.n_embd that is a multiple of 16, not {n_embd}: change it, or leave "
            "train.fp8_head out"
        )


class _FP8Product(torch.autograd.Function):
    """x·Wᵀ and the gradient of x from FP8 operands, each scaled as a whole to its format's range.

    Scores and weights are e4m3, which has the finer steps, the gradient of the scores e5m2, which has the wider range
    (arXiv:2209.05433). The weight's gradient is a bf16 product: in FP8 both operands would have to be turned around
    in memory first, which costs about what the faster product saves.
    """

    @staticmethod
    def forward(ctx: Any, x_C: Tensor, weight_VC: Tensor) -> Tensor:
        x_NC = x_C.flatten(0, -2)
        x8_NC, x_scale = to_fp8(x_NC, torch.float8_e4m3fn)
        weight8_VC, weight_scale = to_fp8(weight_VC, torch.float8_e4m3fn)
        ctx.save_for_backward(x_NC.bfloat16(), weight8_VC, weight_scale)
        ctx.shape, ctx.dtypes = x_C.shape, (x_C.dtype, weight_VC.dtype)
        scores_NV = _product(x8_NC, x_scale, weight8_VC.t(), weight_scale)
        return scores_NV.view(*x_C.shape[:-1], weight_VC.size(0))

    @staticmethod
    def backward(ctx: Any, grad_V: Tensor) -> tuple[Tensor, Tensor]:
        x_NC, weight8_VC, weight_scale = ctx.saved_tensors
        grad_NV = grad_V.flatten(0, -2)
        grad8_NV, grad_scale = to_fp8(grad_NV, torch.float8_e5m2)
        # The second operand has to lie column by column.
        by_columns_VC = weight8_VC.t().contiguous().t()
        grad_x_NC = _product(grad8_NV, grad_scale, by_columns_VC, weight_scale)
        grad_weight_VC = grad_NV.bfloat16().t() @ x_NC
        return grad_x_NC.view(ctx.shape).to(ctx.dtypes[0]), grad_weight_VC.to(ctx.dtypes[1])


def to_fp8(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return x over its scale in an FP8 format, and the scale, fp32: the largest entry becomes the format's."""
    largest = torch.finfo(dtype).max
    scale = x.abs().amax().clamp(min=torch.finfo(torch.bfloat16).tiny * largest) / largest
    # Clamped, because what rounds to above the largest becomes no number.
    return (x / scale).clamp(-largest, largest).to(dtype), scale.float()


def _product(left: Tensor, left_scale: Tensor, right: Tensor, right_scale: Tensor) -> Tensor:
    """Return the product of two FP8 matrices times their scales, bf16; `right` lies column by column."""
    if left.is_cuda:
        product: Tensor = torch._scaled_mm(
            left, right, scale_a=left_scale, scale_b=right_scale, out_dtype=torch.bfloat16
        )
        return product
    return ((left.float() @ right.float()) * (left_scale * right_scale)).bfloat16()
