"""Schedule-Free AdamW whose step size is Prodigy's estimate: neither a learning rate nor a schedule.

Defazio et al. 2024, arXiv:2405.15682, with Mishchenko and Defazio 2023, arXiv:2306.06101. No paper puts the
two together; the AlgoPerf submission of that name does, and `ScheduleFreeProdigy` says where this differs.
This implementation is nanorun's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanorun.optim.closures import loss_of
from nanorun.optim.options import Option
from nanorun.optim.prodigy import OPTIONS as PRODIGY_OPTIONS
from nanorun.optim.prodigy import refuse_two_estimates
from nanorun.optim.schedulefree_adamw import OPTIONS as SCHEDULEFREE_OPTIONS
from nanorun.optim.schedulefree_adamw import refuse_beta1_zero, refuse_evaluation_mode

SUMMARY = "Schedule-Free AdamW with Prodigy's estimate as its learning rate; leave lr at 1."
PAPER = "arXiv:2405.15682 with arXiv:2306.06101"
SOURCE = "nanorun"
ROLES = ("embedding", "head", "matrix", "vector")
OPTIONS = {
    "lr": PRODIGY_OPTIONS["lr"],
    "betas": SCHEDULEFREE_OPTIONS["betas"],
    "beta3": PRODIGY_OPTIONS["beta3"],
    "eps": PRODIGY_OPTIONS["eps"],
    "weight_decay": Option(0.0, "decay per step is lr times the estimate times this, of y", low=0.0),
    "r": SCHEDULEFREE_OPTIONS["r"],
    "weight_lr_power": Option(
        2.0, "weight in the average is the largest step size so far to this power", low=0.0
    ),
    "use_bias_correction": Option(False, "correct the start of the average square as Adam does"),
    "safeguard_warmup": PRODIGY_OPTIONS["safeguard_warmup"],
    "d0": PRODIGY_OPTIONS["d0"],
    "d_coef": PRODIGY_OPTIONS["d_coef"],
    "growth_rate": PRODIGY_OPTIONS["growth_rate"],
}

_OF_ONE_GROUP = frozenset({"weight_decay", "eps"})


class Tensors(NamedTuple):
    """Some parameters of a group that have a gradient, and what belongs to them, in one order."""

    y: list[Tensor]
    """The parameters themselves, in training mode."""
    grad: list[Tensor]
    z: list[Tensor]
    exp_avg_sq: list[Tensor]
    s: list[Tensor]
    p0: list[Tensor]


def portions(parameters: list[Tensor]) -> list[list[Tensor]]:
    """Return the parameters in lists that are updated together: all in one, but each alone on a CPU."""
    if any(parameter.device.type != "cpu" for parameter in parameters):
        return [parameters]
    # One at a time stays in the cache: half the time of all together at 0.9M numbers.
    return [[parameter] for parameter in parameters]


def measure_(
    tensors: Tensors, *, d: float, weight: float, s_weight: float, beta2: float, beta3: float
) -> list[Tensor]:
    """Return the parts of r's growth and of ‖s‖₁, first all of one and then all of the other, 0-dim each.

    Changes `exp_avg_sq` and `s`.
    """
    torch._foreach_mul_(tensors.s, beta3)
    torch._foreach_add_(tensors.s, tensors.grad, alpha=s_weight)
    torch._foreach_mul_(tensors.exp_avg_sq, beta2)
    torch._foreach_addcmul_(tensors.exp_avg_sq, tensors.grad, tensors.grad, value=d * d * (1 - beta2))
    way_back = torch._foreach_sub(tensors.p0, tensors.z)
    dots = [torch.dot(g.flatten(), w.flatten()) for g, w in zip(tensors.grad, way_back, strict=True)]
    return [*torch._foreach_mul(dots, weight), *torch._foreach_norm(tensors.s, 1)]


def next_estimate(
    d: float, d_max: float, d_hat: float, *, d0: float, growth_rate: float | None
) -> tuple[float, float]:
    """Return the next d and the largest estimate so far; d follows it as fast as `growth_rate` allows."""
    if d == d0:
        # The start is a guess far too low, so the first true estimate replaces it at once.
        d = max(d, d_hat)
    d_max = max(d_max, d_hat)
    return (d_max if growth_rate is None else min(d_max, d * growth_rate)), d_max


def schedule_free_step_(
    tensors: Tensors,
    *,
    step_size: float,
    d: float,
    new_d: float,
    eps: float,
    weight_decay: float,
    beta1: float,
    c: float,
) -> None:
    """Take the step of z, its part in the average, and the next y. Changes `y` and `z`.

    x is nowhere: from y = (1 − β₁)·z + β₁·x follows y' = (1 − c)·y + c·z + (β₁·(1 − c) − 1)·γ·u, where γ·u is
    the step of z.
    """
    denominator = torch._foreach_sqrt(tensors.exp_avg_sq)
    torch._foreach_add_(denominator, new_d * eps)
    update = torch._foreach_div(tensors.grad, denominator)
    torch._foreach_mul_(update, d)
    if weight_decay:
        torch._foreach_add_(update, tensors.y, alpha=weight_decay)
    torch._foreach_lerp_(tensors.y, tensors.z, c)
    torch._foreach_add_(tensors.y, update, alpha=step_size * (beta1 * (1 - c) - 1))
    torch._foreach_sub_(tensors.z, update, alpha=step_size)


class ScheduleFreeProdigy(torch.optim.Optimizer):
    """Schedule-Free AdamW with γ = lr·d, where d is Prodigy's estimate of the distance to the minimum.

        y = (1 − β₁)·z + β₁·x,  g = the gradient at y,  γ = lr·d
        r ← β₃·r + γ·d·⟨g, x₀ − z⟩            s ← β₃·s + γ·d·g
        v ← β₂·v + (1 − β₂)·d²·g²
        d̂ = d_coef · r / ‖s‖₁,  d' = max(d, d̂)
        z ← z − γ·(d·g / (√v + d'·ε) + λ·y)
        x ← (1 − c)·x + c·z,    c = w_t / Σ w,  w_t = t^r · (max γ)^weight_lr_power

    What was decided, and why:

    - The way back to the start is measured from z, as in the AlgoPerf submission, though the gradient is
      taken at y. z is where the steps go, and Schedule-Free's theorem bounds the loss at x by the sum of
      ⟨g, z − x*⟩, so r/‖s‖₁ stays a lower bound of the distance as it does in Prodigy.
    - The average's weights follow γ, as in the package schedulefree. d starts at 1e-6 and grows by powers of
      ten, so the iterates from before drop out of the average by themselves. The submission weights by t^0.75
      alone: that is r = 0.75 and weight_lr_power = 0, with betas = (0.9, 0.9955).
    - Decay is taken at y, as in the package; the submission takes it at x.
    - `use_bias_correction` multiplies γ by √(1 − β₂^t). Prodigy divides by 1 − β₁^t too, for a momentum that
      is not here. There is no warm-up option: schedules scale lr, and γ with it.

    In training mode the parameters hold y, and after `eval()` they hold x; `train()` goes back, true to
    rounding. A saved state remembers its mode and belongs to the weights of that mode.

    All groups share one d, so they may differ in `weight_decay` and `eps` alone. At lr = 0, or if all
    gradients are zero, nothing moves. State per parameter: `z`, `exp_avg_sq`, `s`, `p0`. The estimate and the
    counters are numbers in the groups, so the host waits once a step and a bad step must be skipped there.
    """

    skips_on_host = True

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        beta3: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        use_bias_correction: bool = False,
        safeguard_warmup: bool = False,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        growth_rate: float | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "beta3": beta3,
            "eps": eps,
            "weight_decay": weight_decay,
            "r": r,
            "weight_lr_power": weight_lr_power,
            "use_bias_correction": use_bias_correction,
            "safeguard_warmup": safeguard_warmup,
            "d0": d0,
            "d_coef": d_coef,
            "growth_rate": growth_rate,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; raise UserError if it differs from the first in what all groups share."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        start = {
            "d": group["d0"],
            "d_max": group["d0"],
            "d_numerator": 0.0,
            "k": 0,
            "weight_sum": 0.0,
            "lr_max": 0.0,
            "train_mode": True,
        }
        # A group that comes later joins the estimate and the average where they are.
        group.update({key: self.param_groups[0].get(key, value) for key, value in start.items()})
        refuse_beta1_zero("schedulefree_prodigy", group)
        refuse_two_estimates("schedulefree_prodigy", self.param_groups, OPTIONS, _OF_ONE_GROUP)

    def eval(self) -> None:
        """Make the parameters hold x, the average; does nothing in evaluation mode."""
        self._interpolate(train_mode=False)

    def train(self) -> None:
        """Make the parameters hold y, where gradients are taken; does nothing in training mode."""
        self._interpolate(train_mode=True)

    @torch.no_grad()
    def _interpolate(self, *, train_mode: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] == train_mode:
                continue
            beta1 = group["betas"][0]
            # Before its first step a parameter has no z, and x = y.
            moved = [p for p in group["params"] if "z" in self.state.get(p, {})]
            if moved:
                z = [self.state[p]["z"] for p in moved]
                torch._foreach_lerp_(moved, z, 1 - beta1 if train_mode else 1 - 1 / beta1)
            group["train_mode"] = train_mode

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; return what `closure` returns.

        Raises RuntimeError in evaluation mode.
        """
        refuse_evaluation_mode("schedulefree_prodigy", self.param_groups)
        loss = loss_of(closure)
        refuse_two_estimates("schedulefree_prodigy", self.param_groups, OPTIONS, _OF_ONE_GROUP)
        active = [(group, tensors) for group in self.param_groups for tensors in self._tensors(group)]
        if active and self.param_groups[0]["lr"] > 0:
            self._step(active)
        return loss

    def _tensors(self, group: dict[str, Any]) -> list[Tensors]:
        """Return the group's parameters in the portions in which they are updated, new state included."""
        parameters = [p for p in group["params"] if p.grad is not None]
        for parameter in parameters:
            state = self.state[parameter]
            if "z" not in state:
                state["z"] = parameter.detach().clone()
                state["exp_avg_sq"] = torch.zeros_like(parameter)
                state["s"] = torch.zeros_like(parameter)
                state["p0"] = parameter.detach().clone()
        return [
            Tensors(
                portion,
                [p.grad.to(p.dtype) for p in portion if p.grad is not None],
                *([self.state[p][key] for p in portion] for key in ("z", "exp_avg_sq", "s", "p0")),
            )
            for portion in portions(parameters)
        ]

    def _step(self, active: list[tuple[dict[str, Any], Tensors]]) -> None:
        shared = self.param_groups[0]
        d, step_size = shared["d"], shared["lr"] * shared["d"]
        if shared["use_bias_correction"]:
            step_size *= math.sqrt(1 - shared["betas"][1] ** (shared["k"] + 1))
        estimate = self._estimate([tensors for _, tensors in active], step_size)
        if estimate is None:
            return
        c, average = self._weigh(step_size)
        for group, tensors in active:
            schedule_free_step_(
                tensors,
                step_size=step_size,
                d=d,
                new_d=estimate["d"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                beta1=shared["betas"][0],
                c=c,
            )
        for group in self.param_groups:
            group.update(**estimate, **average, k=group["k"] + 1)

    def _estimate(self, active: list[Tensors], step_size: float) -> dict[str, float] | None:
        """Return the next d and its company, or None while every gradient so far was zero."""
        shared = self.param_groups[0]
        d, d0, beta2 = shared["d"], shared["d0"], shared["betas"][1]
        beta3 = math.sqrt(beta2) if shared["beta3"] is None else shared["beta3"]
        # The factor 1/d0 cancels in the estimate; without it s would be too small for fp32.
        weight = d / d0 * step_size
        s_weight = d / d0 * d if shared["safeguard_warmup"] else weight
        parts = [
            measure_(tensors, d=d, weight=weight, s_weight=s_weight, beta2=beta2, beta3=beta3)
            for tensors in active
        ]
        growth, norm = self._sums(parts)
        if norm == 0:
            return None
        numerator = beta3 * shared["d_numerator"] + growth
        d_hat = shared["d_coef"] * numerator / norm
        new_d, d_max = next_estimate(d, shared["d_max"], d_hat, d0=d0, growth_rate=shared["growth_rate"])
        return {"d": new_d, "d_max": d_max, "d_numerator": numerator}

    def _weigh(self, step_size: float) -> tuple[float, dict[str, float]]:
        """Return this step's share of the average, and the sum of weights and largest step size with it."""
        shared = self.param_groups[0]
        lr_max = max(shared["lr_max"], step_size)
        # Relative to d0, so that no power of it underflows; their ratio is the same.
        weight = (shared["k"] + 1) ** shared["r"] * (lr_max / shared["d0"]) ** shared["weight_lr_power"]
        weight_sum = shared["weight_sum"] + weight
        return (weight / weight_sum if weight_sum else 0.0), {"weight_sum": weight_sum, "lr_max": lr_max}

    @staticmethod
    def _sums(parts: list[list[Tensor]]) -> tuple[float, float]:
        """Return the sum of all first halves and of all second halves; the step's one wait for the device."""
        firsts = [number for part in parts for number in part[: len(part) // 2]]
        seconds = [number for part in parts for number in part[len(part) // 2 :]]
        numbers = torch.stack([*firsts, *seconds]).tolist()
        return math.fsum(numbers[: len(firsts)]), math.fsum(numbers[len(firsts) :])


CLASS = ScheduleFreeProdigy
