"""Adadelta, torch's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from nanorun.optim.options import Option

SUMMARY = "Gradient times the root of the average square update over that of the average square gradient."
PAPER = "arXiv:1212.5701"
SOURCE = "torch.optim.Adadelta"
ROLES = ("embedding", "head", "matrix", "vector")
UNIT = "entry"
OPTIONS = {
    "lr": Option(1.0, "what the update is multiplied by; the paper has no such factor", low=0.0),
    "rho": Option(0.9, "weight of the past in both averages", low=0.0, high=1.0, below_high=True),
    "eps": Option(
        1e-6, "added to both averages, inside their roots; sets the size of the first steps", low=0.0
    ),
    "weight_decay": Option(0.0, "L2 penalty, added to the gradient", low=0.0),
}


class Adadelta(torch.optim.Adadelta):
    """torch.optim.Adadelta with a keyword-only signature.

    ε stands inside both roots, √(u + ε) and √(v + ε), in the paper as in torch: it is what the first update
    is made of, since u starts at 0. torch has no fused kernel for it on any device, so bad steps are skipped
    by the host. State per parameter: `square_avg` (v), `acc_delta` (u) and `step`.
    """

    skips_on_host = True

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr=lr, rho=rho, eps=eps, weight_decay=weight_decay)


CLASS = Adadelta
