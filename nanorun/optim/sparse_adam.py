"""Adam that touches the rows of a table that a batch touched, and no others ("lazy" Adam)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from nanorun.errors import UserError
from nanorun.optim.closures import loss_of
from nanorun.optim.options import REQUIRED, Option

SUMMARY = (
    "Adam on the rows with a gradient alone: a step costs by the rows a batch read, not by the table's size."
)
PAPER = "arXiv:1412.6980; lazily as torch.optim.SparseAdam, with a step count for each row"
SOURCE = "nanorun"
ROLES = ("embedding",)
UNIT = "parameter"
OPTIONS = {
    "lr": Option(REQUIRED, "learning rate", low=0.0),
    "betas": Option(
        (0.9, 0.95), "weight of the past in the two averages", low=0.0, high=1.0, below_high=True
    ),
    "eps": Option(1e-10, "added to the root, outside it", low=0.0),
    "weight_decay": Option(0.0, "decoupled decay of the rows that are updated, a step", low=0.0),
}


class SparseAdam(torch.optim.Optimizer):
    """Adam whose averages, step count and decay of a row move only in the steps in which the row has a gradient.

    A row has one if any of its entries is not 0, so dense and sparse gradients of the same values give the same
    step, to rounding. Each row's averages are corrected for their start by the row's own count of steps, where
    torch.optim.SparseAdam takes the count of all steps and so begins a rare row with too small a step or, with
    β₂ > β₁², too large a one. State per parameter of shape (R, C): `exp_avg` and `exp_avg_sq`, (R, C), and
    `row_steps`, (R,).
    """

    takes_sparse = True
    # Which rows there are is read on the host as well, and a copy to put back would be of all rows.
    skips_on_host = True

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        for parameter in (one for group in self.param_groups for one in group["params"]):
            if parameter.ndim != 2:
                raise UserError(
                    f"sparse_adam was given a parameter of shape {tuple(parameter.shape)}: it takes matrices, row "
                    "by row; give vectors to another optimizer, such as adamw"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the rows that have a gradient; return what `closure` returns."""
        loss = loss_of(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_rows(parameter, group, *rows_of(parameter.grad))
        return loss

    def _step_rows(self, parameter: Tensor, group: dict[str, Any], rows_N: Tensor, grad_NC: Tensor) -> None:
        state = self.state[parameter]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
            # Of the parameter's dtype: torch casts it so when a state is loaded.
            state["row_steps"] = parameter.new_zeros(parameter.size(0))
        (beta1, beta2), lr = group["betas"], group["lr"]
        mean_NC = state["exp_avg"][rows_N].lerp_(grad_NC, 1 - beta1)
        square_NC = state["exp_avg_sq"][rows_N].mul_(beta2).addcmul_(grad_NC, grad_NC, value=1 - beta2)
        steps_N1 = state["row_steps"][rows_N, None] + 1
        state["exp_avg"][rows_N] = mean_NC
        state["exp_avg_sq"][rows_N] = square_NC
        state["row_steps"][rows_N] = steps_N1[:, 0]
        root_NC = (square_NC / (1 - beta2**steps_N1)).sqrt_().add_(group["eps"])
        size_N1 = -lr / (1 - beta1**steps_N1)
        update_NC = mean_NC.div_(root_NC).mul_(size_N1)
        if group["weight_decay"]:
            update_NC.add_(parameter[rows_N], alpha=-lr * group["weight_decay"])
        parameter.index_add_(0, rows_N, update_NC.to(parameter.dtype))


def rows_of(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return which rows of a gradient are not all 0, and these rows, each once; sparse or dense."""
    if grad.is_sparse:
        grad = grad.coalesce()
        rows_N, values_NC = grad.indices()[0], grad.values()
        touched_N = values_NC.any(dim=1)
        return (rows_N, values_NC) if bool(touched_N.all()) else (rows_N[touched_N], values_NC[touched_N])
    rows_N = grad.any(dim=1).nonzero()[:, 0]
    return rows_N, grad[rows_N]


CLASS = SparseAdam
