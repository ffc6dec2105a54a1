"""RMSProp, torch's; with ε inside the root, ours."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from nanorun.optim.closures import loss_of
from nanorun.optim.options import REQUIRED, Option

SUMMARY = "Gradient over the root of its average square, or of its variance if centered."
PAPER = (
    "Hinton 2012, https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf; "
    "centered: Graves 2013, arXiv:1308.0850"
)
SOURCE = "torch.optim.RMSprop; nanorun under eps_inside"
ROLES = ("embedding", "head", "matrix", "vector")
UNIT = "entry"
OPTIONS = {
    "lr": Option(REQUIRED, "learning rate", low=0.0),
    "alpha": Option(0.99, "weight of the past in the averages", low=0.0, high=1.0, below_high=True),
    "eps": Option(1e-8, "added to the root, outside it unless eps_inside", low=0.0),
    "weight_decay": Option(0.0, "L2 penalty, added to the gradient", low=0.0),
    "momentum": Option(0.0, "weight of the past in the sum of updates", low=0.0, high=1.0, below_high=True),
    "centered": Option(False, "take the square of the average gradient off the average square"),
    "eps_inside": Option(False, "√(average + eps) in place of √average + eps"),
}


def rmsprop_eps_inside(
    parameters: list[Tensor],
    grads: list[Tensor],
    square_avgs: list[Tensor],
    grad_avgs: list[Tensor],
    buffers: list[Tensor],
    *,
    lr: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    momentum: float,
) -> None:
    """Update parameters and state in place, dividing by √(average square + eps).

    The lists run side by side; `grad_avgs` is empty unless centered, and `buffers` without momentum.
    """
    if weight_decay:
        grads = list(torch._foreach_add(grads, parameters, alpha=weight_decay))
    torch._foreach_mul_(square_avgs, alpha)
    torch._foreach_addcmul_(square_avgs, grads, grads, value=1 - alpha)
    roots = square_avgs
    if grad_avgs:
        torch._foreach_lerp_(grad_avgs, grads, 1 - alpha)
        roots = list(torch._foreach_addcmul(square_avgs, grad_avgs, grad_avgs, value=-1))
        # The variance of a gradient that hardly changes is rounding noise, of either sign.
        torch._foreach_clamp_min_(roots, 0.0)
    roots = list(torch._foreach_add(roots, eps))
    torch._foreach_sqrt_(roots)
    if buffers:
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_addcdiv_(buffers, grads, roots)
        torch._foreach_add_(parameters, buffers, alpha=-lr)
    else:
        torch._foreach_addcdiv_(parameters, grads, roots, value=-lr)


class RMSprop(torch.optim.RMSprop):
    """torch.optim.RMSprop with a keyword-only signature, and `eps_inside`.

    The default is torch's √v + ε; `eps_inside` gives √(v + ε), as Graves writes the centered form. Momentum
    sums the divided gradients and lr comes last. torch has no fused kernel for it on any device, so bad steps
    are skipped by the host. Centered with ε outside, a gradient that stays constant for hundreds of steps
    can get a variance below 0 by rounding, and torch's root of it is NaN; `eps_inside` stays finite.

    State per parameter: `square_avg`, `step`; `momentum_buffer` with momentum, `grad_avg` if centered.
    """

    skips_on_host = True

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        eps_inside: bool = False,
    ) -> None:
        self.eps_inside = eps_inside
        super().__init__(
            params,
            lr=lr,
            alpha=alpha,
            eps=eps,
            weight_decay=weight_decay,
            momentum=momentum,
            centered=centered,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with this optimizer's `eps_inside` unless it has its own."""
        super().add_param_group({"eps_inside": self.eps_inside, **param_group})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; return what `closure` returns."""
        loss = loss_of(closure)
        groups = self.param_groups
        for group in groups:
            if group["eps_inside"]:
                self._step_eps_inside(group)
        # torch's step takes the groups that it finds.
        self.param_groups = [group for group in groups if not group["eps_inside"]]
        try:
            super().step()
        finally:
            self.param_groups = groups
        return loss

    def _step_eps_inside(self, group: dict[str, Any]) -> None:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not parameters:
            return
        keys = ["square_avg"]
        if group["centered"]:
            keys.append("grad_avg")
        if group["momentum"]:
            keys.append("momentum_buffer")
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state.update({key: torch.zeros_like(parameter) for key in keys})
            state["step"] += 1
        lists = {key: [self.state[parameter][key] for parameter in parameters] for key in keys}
        rmsprop_eps_inside(
            parameters,
            [parameter.grad for parameter in parameters],
            lists["square_avg"],
            lists.get("grad_avg", []),
            lists.get("momentum_buffer", []),
            **{name: group[name] for name in ("lr", "alpha", "eps", "weight_decay", "momentum")},
        )


CLASS = RMSprop
