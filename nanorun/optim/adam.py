"""Adam and AMSGrad, torch's, fused where torch has it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from nanorun.optim.options import REQUIRED, Option

SUMMARY = "Gradient over the root of its average square; weight decay is added to the gradient (L2)."
PAPER = "arXiv:1412.6980; AMSGrad: Reddi et al. 2018, arXiv:1904.09237"
ROLES = ("embedding", "head", "matrix", "vector")
OPTIONS = {
    "lr": Option(REQUIRED, "learning rate", low=0.0),
    "betas": Option(
        (0.9, 0.999), "weight of the past in the two averages", low=0.0, high=1.0, below_high=True
    ),
    "eps": Option(1e-8, "added to the root, outside it", low=0.0),
    "weight_decay": Option(0.0, "L2 penalty, added to the gradient", low=0.0),
    "amsgrad": Option(False, "divide by the largest average square so far"),
}

FUSED_DEVICES = frozenset({"cpu", "cuda", "mps", "xpu"})
"""Devices for which torch 2.9 and later have a fused Adam kernel."""


def fused_params(params: Iterable[Any]) -> tuple[list[Any], bool]:
    """Return the parameters or groups as a list, and whether torch's fused kernel takes them all."""
    listed = [
        dict(entry, params=_as_list(entry["params"])) if isinstance(entry, dict) else entry
        for entry in params
    ]
    entries: list[Any] = []
    for entry in listed:
        entries += entry["params"] if isinstance(entry, dict) else [entry]
    tensors = [entry[1] if isinstance(entry, tuple) else entry for entry in entries]
    return listed, all(t.device.type in FUSED_DEVICES and t.is_floating_point() for t in tensors)


def _as_list(params: Any) -> list[Any]:
    return [params] if isinstance(params, torch.Tensor) else list(params)


class Adam(torch.optim.Adam):
    """torch.optim.Adam with a keyword-only signature and the fused kernel wherever there is one."""

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
