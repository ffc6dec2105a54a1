"""Adam and AMSGrad, torch's, fused where torch has it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch

from nanorun.optim.closures import loss_of
from nanorun.optim.options import REQUIRED, Option, Variant

SUMMARY = "Gradient over the root of its average square; weight decay is added to the gradient (L2)."
PAPER = "arXiv:1412.6980; AMSGrad: Reddi et al. 2018, arXiv:1904.09237"
SOURCE = "torch.optim.Adam"
ROLES = ("embedding", "head", "matrix", "vector")
UNIT = "entry"
OPTIONS = {
    "lr": Option(REQUIRED, "learning rate", low=0.0),
    "betas": Option(
        (0.9, 0.999), "weight of the past in the two averages", low=0.0, high=1.0, below_high=True
    ),
    "eps": Option(1e-8, "added to the root, outside it", low=0.0),
    "weight_decay": Option(0.0, "L2 penalty, added to the gradient", low=0.0),
    "amsgrad": Option(False, "divide by the largest average square so far"),
}
VARIANTS = {
    "amsgrad": Variant(
        summary="Adam divided by the root of the largest average square so far, which never shrinks.",
        paper="Reddi et al. 2018, arXiv:1904.09237",
        held={"amsgrad": True},
    )
}

FUSED_DEVICES = frozenset({"cpu", "cuda", "mps", "xpu"})
"""Devices for which torch 2.9 and later have fused kernels of Adam, AdamW and SGD."""


def fused_params(params: Iterable[Any], devices: frozenset[str] = FUSED_DEVICES) -> tuple[list[Any], bool]:
    """Return the parameters or groups as a list, and whether torch's fused kernel for `devices` takes all."""
    listed = [
        dict(entry, params=_as_list(entry["params"])) if isinstance(entry, dict) else entry
        for entry in params
    ]
    entries: list[Any] = []
    for entry in listed:
        entries += entry["params"] if isinstance(entry, dict) else [entry]
    tensors = [entry[1] if isinstance(entry, tuple) else entry for entry in entries]
    return listed, all(t.device.type in devices and t.is_floating_point() for t in tensors)


def _as_list(params: Any) -> list[Any]:
    return [params] if isinstance(params, torch.Tensor) else list(params)


class GradientsInOrder(torch.optim.Optimizer):
    """Before one of torch's classes: its step, on gradients that lie in memory as their parameters do.

    The fused kernels on the CPU walk through memory in order, and so misread a gradient with other strides
    without a word. A backward pass leaves none, but a gradient set by hand may be transposed or expanded.
    """

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; return what `closure` returns."""
        loss = loss_of(closure)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        odd = [(p, p.grad) for p in parameters if p.grad is not None and p.grad.stride() != p.stride()]
        for parameter, grad in odd:
            parameter.grad = torch.empty_like(parameter, requires_grad=False).copy_(grad)
        # The function inside its decorators, which would import torch's compiler to tell it what it is not to trace.
        decorated: Any = super().step
        update = inspect.unwrap(decorated.__func__)
        try:
            with torch.no_grad():
                update(self)
        finally:
            for parameter, grad in odd:
                parameter.grad = grad
        return loss


class Adam(GradientsInOrder, torch.optim.Adam):
    """torch.optim.Adam with a keyword-only signature and the fused kernel wherever there is one.

    ε stands outside the root, √v̂ + ε, as in the paper. Under `amsgrad` torch keeps the largest v, the average
    square before its correction for the start from 0, and corrects that; Reddi et al. correct nothing.
    State per parameter: `exp_avg`, `exp_avg_sq`, `step`, and `max_exp_avg_sq` under `amsgrad`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
    ) -> None:
        params, fused = fused_params(params)
        super().__init__(
            params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, fused=fused
        )


CLASS = Adam
