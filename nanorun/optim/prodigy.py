"""Prodigy: Adam that estimates its own learning rate from how far the weights have come.

Mishchenko and Defazio 2023, "Prodigy: An Expeditiously Adaptive Parameter-Free Learner", arXiv:2306.06101.
The update is the package prodigyopt's; here are refusals of what it would read wrongly or only half.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterable
from typing import Any

import prodigyopt
import torch
from torch import Tensor

from nanorun.errors import UserError
from nanorun.optim.closures import loss_of
from nanorun.optim.options import Option
from nanorun.optim.schedulefree_adamw import lent_gradients

SUMMARY = "Adam whose step size is estimated while it runs; leave lr at 1."
PAPER = "arXiv:2306.06101"
SOURCE = "package prodigyopt"
ROLES = ("embedding", "head", "matrix", "vector")
OPTIONS = {
    "lr": Option(1.0, "factor on the estimated step size, the same for all roles", low=1e-30),
    "betas": Option(
        (0.9, 0.999), "weight of the past in the two averages", low=0.0, high=1.0, below_high=True
    ),
    "beta3": Option(
        None,
        "weight of the past in the estimate; unset, the root of the second beta",
        low=0.0,
        high=1.0,
        below_high=True,
    ),
    "eps": Option(1e-8, "added to the root, outside it, times the estimate", low=1e-30),
    "weight_decay": Option(0.0, "decay per step is lr times the estimate times this", low=0.0),
    "decouple": Option(True, "decay apart from the gradient, as AdamW; if false, add it to the gradient"),
    "use_bias_correction": Option(False, "correct the start of the averages as Adam does"),
    "safeguard_warmup": Option(False, "leave lr out of the estimate's denominator; for a slow warm-up"),
    "d0": Option(1e-6, "the estimate at the start", low=1e-30),
    "d_coef": Option(1.0, "factor on the estimate", low=0.0),
    "growth_rate": Option(None, "largest factor by which the estimate may grow in a step", low=1.0),
    "slice_p": Option(1, "estimate from every p-th entry of each parameter only, to save memory", low=1),
}

_OF_ONE_GROUP = frozenset({"weight_decay", "eps", "slice_p"})


def refuse_two_estimates(
    algorithm: str, groups: list[dict[str, Any]], options: Iterable[str], apart: frozenset[str]
) -> None:
    """Raise UserError where groups differ in an option that is not in `apart`.

    There is one distance and so one step size for all parameters; an option that enters it has one value.
    """
    first = groups[0]
    for group in groups[1:]:
        for name in options:
            if name in apart or group[name] == first[name]:
                continue
            roles = [str(entry.get("role", "unnamed")) for entry in (first, group)]
            raise UserError(
                f"{algorithm} estimates one step size for all its parameters, so {name} must be the same in "
                f"all its roles: found {first[name]!r} ({roles[0]}) and {group[name]!r} ({roles[1]}). Give "
                f"them one [optim.default] with one {name}, or one of them another optimizer, such as adamw"
            )


class Prodigy(prodigyopt.Prodigy):
    """Prodigy of the package prodigyopt, with groups that may differ only where it is able to keep them apart.

        r ← β₃·r + γ·d²·⟨g, x₀ − x⟩          s ← β₃·s + γ·d²·g
        m ← β₁·m + (1 − β₁)·d·g              v ← β₂·v + (1 − β₂)·d²·g²
        d̂ = d_coef · r / ‖s‖₁,  d' = max(d, d̂)
        x ← x − γ·d·m / (√v + d'·ε) − γ·d·λ·x

    with γ = group["lr"] and one d for all parameters. The paper has d·ε where the package has d'·ε, and
    d·g for m at β₁ = 0 where the package has d'·g. At the first step x = x₀, so d stays d₀; then it grows as
    fast as `growth_rate` allows, and it never falls.

    All groups share one d, and the package reads most options in the first group alone. So groups may differ
    in `weight_decay`, `eps` and `slice_p`, and any other difference is refused, lr's among them. A schedule
    that scales all lr alike is fine; at a scale of 0, or if all gradients are zero, nothing moves.

    State per parameter: `exp_avg`, `exp_avg_sq`, `s`, `p0` (the weights at the start) and `step`. The
    estimate (`d`, `d_max`, `d_numerator`) and `k` are numbers in the groups, so the host waits for each
    step and a bad step must be skipped there.
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
        decouple: bool = True,
        use_bias_correction: bool = False,
        safeguard_warmup: bool = False,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        growth_rate: float | None = None,
        slice_p: int = 1,
    ) -> None:
        # The package prints a remark on weight decay, which would end up in the middle of --json.
        with contextlib.redirect_stdout(io.StringIO()):
            super().__init__(
                params,
                lr=lr,
                betas=betas,
                beta3=beta3,
                eps=eps,
                weight_decay=weight_decay,
                decouple=decouple,
                use_bias_correction=use_bias_correction,
                safeguard_warmup=safeguard_warmup,
                d0=d0,
                d_coef=d_coef,
                growth_rate=math.inf if growth_rate is None else growth_rate,
                slice_p=slice_p,
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; raise UserError if it differs from the first in what all groups share."""
        if param_group.get("growth_rate", 1.0) is None:
            param_group = {**param_group, "growth_rate": math.inf}
        super().add_param_group(param_group)
        refuse_two_estimates("prodigy", self.param_groups, OPTIONS, _OF_ONE_GROUP)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; return what `closure` returns."""
        loss = loss_of(closure)
        refuse_two_estimates("prodigy", self.param_groups, OPTIONS, _OF_ONE_GROUP)
        decay_enters_gradient = any(g["weight_decay"] and not g["decouple"] for g in self.param_groups)
        with lent_gradients(self.param_groups) if decay_enters_gradient else contextlib.nullcontext():
            super().step()
        for state in self.state.values():
            # The package starts with a Python number; a tensor is what torch's own optimizers keep.
            if isinstance(state.get("step"), int):
                state["step"] = torch.tensor(float(state["step"]), dtype=torch.float32)
        return loss


CLASS = Prodigy
