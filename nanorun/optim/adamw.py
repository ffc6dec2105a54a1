"""AdamW, torch's, fused where torch has it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from nanorun.optim.adam import GradientsInOrder, fused_params
from nanorun.optim.options import REQUIRED, Option

SUMMARY = "Adam with the weight decay apart from the gradient; the baseline that others must beat."
PAPER = "arXiv:1711.05101"
SOURCE = "torch.optim.AdamW"
ROLES = ("embedding", "head", "matrix", "vector")
UNIT = "entry"
OPTIONS = {
    "lr": Option(REQUIRED, "learning rate", low=0.0),
    "betas": Option(
        (0.9, 0.999), "weight of the past in the two averages", low=0.0, high=1.0, below_high=True
    ),
    "eps": Option(1e-8, "added to the root, outside it", low=0.0),
    "weight_decay": Option(0.01, "decay per step is lr times this", low=0.0),
    "amsgrad": Option(False, "divide by the largest average square so far"),
}


class AdamW(GradientsInOrder, torch.optim.AdamW):
    """torch.optim.AdamW with a keyword-only signature and the fused kernel wherever there is one."""

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        amsgrad: bool = False,
    ) -> None:
        params, fused = fused_params(params)
        super().__init__(
            params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, fused=fused
        )


CLASS = AdamW
