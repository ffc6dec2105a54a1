"""SGD, plain, with momentum or Nesterov's, torch's, fused where torch has it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from nanorun.errors import UserError
from nanorun.optim.adam import GradientsInOrder, fused_params
from nanorun.optim.closures import loss_of
from nanorun.optim.options import REQUIRED, Option

SUMMARY = "The gradient times lr, or a sum of past gradients; weight decay is added to the gradient (L2)."
PAPER = "Robbins and Monro 1951, doi:10.1214/aoms/1177729586; https://proceedings.mlr.press/v28/sutskever13"
SOURCE = "torch.optim.SGD"
ROLES = ("embedding", "head", "matrix", "vector")
UNIT = "entry"
OPTIONS = {
    "lr": Option(REQUIRED, "learning rate", low=0.0),
    "momentum": Option(0.0, "weight of the past in the sum of gradients", low=0.0, high=1.0, below_high=True),
    "dampening": Option(0.0, "share of a new gradient kept out of the sum", low=0.0, high=1.0),
    "weight_decay": Option(0.0, "L2 penalty, added to the gradient", low=0.0),
    "nesterov": Option(False, "look ahead: the gradient plus momentum times the new sum"),
}


class SGD(GradientsInOrder, torch.optim.SGD):
    """torch.optim.SGD with a keyword-only signature and the fused kernel wherever it does the same.

    b ← momentum·b + (1 − dampening)·g, p ← p − lr·b, and the first b is g itself; Nesterov moves by
    g + momentum·b. Parameters are then those that Sutskever et al. 2013 look ahead to, θ + momentum·v.

    State per parameter: `momentum_buffer`, only with momentum. The gradient is not averaged: at momentum 0.9
    a step is ten times as long as without. With dampening torch's fused kernel is not used, bad steps are
    skipped by the host, and the reason is in `step`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        _check_nesterov(momentum, dampening, nesterov)
        params, fused = fused_params(params)
        super().__init__(
            params,
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            fused=fused,
        )
        self.skips_on_host = not all(group["fused"] for group in self.param_groups)
        self._step_supports_amp_scaling = not self.skips_on_host

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group after checking that its Nesterov, momentum and dampening go together."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        _check_nesterov(group["momentum"], group["dampening"], group["nesterov"])
        if group["momentum"] and group["dampening"]:
            group["fused"] = False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; return what `closure` returns."""
        loss = loss_of(closure)
        # Left to make its buffers, the fused kernel keeps uninitialised memory where found_inf skips the first
        # step, and fails where only some parameters have one. From zeros it gives the same bits, but for
        # dampening, which must not touch the first gradient.
        for group in self.param_groups:
            if group["fused"] and group["momentum"]:
                for parameter in group["params"]:
                    if parameter.grad is not None and "momentum_buffer" not in self.state[parameter]:
                        self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        super().step()
        return loss


def _check_nesterov(momentum: float, dampening: float, nesterov: bool) -> None:
    if nesterov and (momentum == 0 or dampening != 0):
        raise UserError(
            f"sgd: nesterov = true with momentum = {momentum} and dampening = {dampening} is not allowed: "
            "give it a momentum above 0, such as 0.9, and leave dampening at 0, or set nesterov = false"
        )


CLASS = SGD
