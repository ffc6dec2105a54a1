"""A template of an optimizer of your own, complete and working: copy it, change `new_momentum_and_update`.

    nanorun train --track sotu --optim docs/my_optimizer.py:SignMomentum --set optim.default.lr=0.001

It is laid out as the optimizers in nanorun/optim are: put it there under the algorithm's name and it is one of
them. What it does is Lion (arXiv:2302.06675): the sign of an average of the gradient.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from nanorun.optim.options import REQUIRED, Option

SUMMARY = "The sign of a look-ahead average of the gradient, with decoupled decay (Lion)."
PAPER = "arXiv:2302.06675"
SOURCE = "docs/my_optimizer.py"
ROLES = ("embedding", "head", "matrix", "vector")
"""Which parameters it takes. Leave one out, and adamw trains those: see nanorun/model.py for the roles."""
OPTIONS = {
    "lr": Option(REQUIRED, "learning rate: how far every weight moves in a step", low=0.0),
    "betas": Option(
        (0.9, 0.99), "weight of the past in the update and in the average", low=0.0, high=1.0, below_high=True
    ),
    "weight_decay": Option(0.0, "decay per step is lr times this", low=0.0),
}
"""Every option of the constructor, as configs, checks and `nanorun optimizers` know it."""


def new_momentum_and_update(
    grad: Tensor, momentum: Tensor, betas: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Return the new average and the update, both of the gradient's shape. The formula, and nothing else."""
    return torch.lerp(grad, momentum, betas[1]), torch.lerp(grad, momentum, betas[0]).sign_()


class SignMomentum(torch.optim.Optimizer):
    """Carries the state; state per parameter: `exp_avg`, 4 bytes a parameter in fp32."""

    skips_on_host = True
    """A step whose loss or gradient is not finite is left out by the training loop, at one synchronisation a step
    on a GPU. To save it, honour `found_inf` instead, as nanorun/optim/muon.py does."""

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every parameter that has a gradient; return what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                # The schedule has set group["lr"] for this step; group["base_lr"] is what the config says.
                momentum, update = new_momentum_and_update(parameter.grad, state["exp_avg"], group["betas"])
                state["exp_avg"].copy_(momentum)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"])
        return loss


CLASS = SignMomentum
