"""Schedule-Free AdamW: an average of the iterates in place of a decaying learning rate.

Defazio et al. 2024, "The Road Less Scheduled", arXiv:2405.15682. The update is the package schedulefree's;
here are its mode from the start, clear refusals and gradients that stay as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import schedulefree
import torch
from torch import Tensor

from nanorun.errors import UserError
from nanorun.optim.closures import loss_of
from nanorun.optim.options import REQUIRED, Option

SUMMARY = "AdamW without momentum, evaluated at a running average of its iterates; needs no decay of lr."
PAPER = "arXiv:2405.15682"
SOURCE = "package schedulefree"
ROLES = ("embedding", "head", "matrix", "vector")
UNIT = "entry"
OPTIONS = {
    "lr": Option(REQUIRED, "learning rate; larger than AdamW's as a rule", low=0.0),
    "betas": Option(
        (0.9, 0.999),
        "share of the average x in the point of the gradient (above 0), and weight of the past squares",
        low=0.0,
        high=1.0,
        below_high=True,
    ),
    "eps": Option(1e-8, "added to the root, outside it", low=0.0),
    "weight_decay": Option(0.0, "decay per step is lr times this, of y", low=0.0),
    "warmup_steps": Option(0, "steps of linear warm-up, besides the schedule's", low=0),
    "r": Option(0.0, "weight of step t in the average grows as t to this power", low=0.0),
    "weight_lr_power": Option(2.0, "weight in the average is the largest lr so far to this power", low=0.0),
}


def refuse_beta1_zero(algorithm: str, group: dict[str, Any]) -> None:
    """Raise UserError where the average x cannot be worked out from y and z."""
    if not group["betas"][0] > 0:
        raise UserError(
            f"{algorithm}: betas = {tuple(group['betas'])!r} is not allowed: the first must be above 0, since "
            "it is the share of the averaged weights in the trained ones; its default is 0.9"
        )


def refuse_evaluation_mode(algorithm: str, groups: Iterable[dict[str, Any]]) -> None:
    """Raise RuntimeError where the parameters hold the averaged weights, from which no step may start."""
    if not all(group["train_mode"] for group in groups):
        raise RuntimeError(
            f"{algorithm} was asked for a step in evaluation mode: call its train() before step()"
        )


@contextmanager
def lent_gradients(groups: Iterable[dict[str, Any]]) -> Iterator[None]:
    """Put copies in the place of all gradients for the length of the block, for a step that writes to them."""
    owners = [p for group in groups for p in group["params"] if p.grad is not None]
    kept = [owner.grad for owner in owners]
    try:
        for owner, grad in zip(owners, kept, strict=True):
            owner.grad = grad.clone()
        yield
    finally:
        for owner, grad in zip(owners, kept, strict=True):
            owner.grad = grad


class ScheduleFreeAdamW(schedulefree.AdamWScheduleFree):
    """AdamWScheduleFree of the package schedulefree, in training mode from the start.

    Three sequences: z takes the steps, x averages them, and the gradient is taken at y between the two.

        y = (1 − β₁)·z + β₁·x
        z ← z − γ·(g(y)/(√v̂ + ε) + λ·y)
        x ← (1 − c)·x + c·z,   c = w_t / Σ w,   w_t = t^r · (max γ)^weight_lr_power

    with γ = group["lr"], times the warm-up of `warmup_steps`, and v̂ = v/(1 − β₂^t). The paper puts the root of
    that correction into γ, and so into c and the decay; the package corrects v. A schedule that sets
    group["lr"] gives the same bits as that warm-up would. A schedule that lets lr decay works too, but the
    weights of the average follow the largest γ so far, so late small steps count as much as the others.

    In training mode the parameters hold y, and after `eval()` they hold x; `train()` goes back. Both are one
    interpolation with z, so a round trip is true to rounding only: who wants the same bits keeps a copy of
    the weights and writes it back after `train()`. A saved state remembers its mode (`train_mode` in each
    group) and belongs to the weights of that mode.

    State per parameter: `z` and `exp_avg_sq`. The counters `k`, `weight_sum` and `lr_max` are numbers in the
    groups, so a bad step must be skipped on the host.
    """

    skips_on_host = True

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            warmup_steps=warmup_steps,
            r=r,
            weight_lr_power=weight_lr_power,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group in the mode of those before it; the first starts in training mode."""
        mode = self.param_groups[0]["train_mode"] if self.param_groups else True
        super().add_param_group({"train_mode": mode, **param_group})
        group = self.param_groups[-1]
        # On a CPU one parameter at a time stays in the cache: 0.6 of the time of all together at 0.9M numbers.
        group["foreach"] = any(p.device.type != "cpu" for p in group["params"])
        refuse_beta1_zero("schedulefree_adamw", group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; return what `closure` returns.

        Raises RuntimeError in evaluation mode.
        """
        refuse_evaluation_mode("schedulefree_adamw", self.param_groups)
        loss = loss_of(closure)
        # The package divides the gradients in place.
        with lent_gradients(self.param_groups):
            super().step()
        return loss


CLASS = ScheduleFreeAdamW
