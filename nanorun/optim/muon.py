"""Muon: momentum, orthogonalised by Newton–Schulz, for the matrices between embedding and head.

Keller Jordan et al., https://kellerjordan.github.io/posts/muon/; the scale rule `match_rms_adamw` and the
decoupled decay from "Muon is Scalable for LLM Training", arXiv:2502.16982. This implementation is nanorun's.

Shapes: K matrices of M rows and N columns in a stack; P parameters, each of `n_stacked` matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from nanorun.errors import UserError
from nanorun.optim.matrix_functions import newton_schulz, shape_groups
from nanorun.optim.options import REQUIRED, Option

SUMMARY = "Momentum whose singular values are all brought near 1; for matrices, beside AdamW for the rest."
PAPER = "https://kellerjordan.github.io/posts/muon/, arXiv:2502.16982"
ROLES = ("matrix",)
OPTIONS = {
    "lr": Option(REQUIRED, "learning rate", low=0.0),
    "momentum": Option(
        0.95, "weight of the past in the average gradient", low=0.0, high=1.0, below_high=True
    ),
    "nesterov": Option(True, "look ahead: average the gradient once more with the momentum"),
    "weight_decay": Option(0.0, "decay per step is lr times this", low=0.0),
    "ns_steps": Option(5, "Newton–Schulz steps", low=1, high=20),
    "scale_rule": Option(
        "original",
        "size of the update: √max(1, rows/cols), or 0.2·√max(rows, cols) to share AdamW's lr",
        choices=("original", "match_rms_adamw"),
    ),
    "momentum_warmup_steps": Option(0, "steps over which momentum rises from momentum_start", low=0),
    "momentum_start": Option(
        0.85, "momentum at the first step of its warm-up", low=0.0, high=1.0, below_high=True
    ),
    "eps": Option(1e-30, "Frobenius norm below which a gradient counts as noise", low=0.0),
}


def orthogonal_momentum(
    grad_KMN: Tensor,
    momentum_KMN: Tensor,
    momentum: float | Tensor,
    *,
    nesterov: bool,
    ns_steps: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return the new momentum and the orthogonalised update, both KMN; `momentum` is a number or K11.

    The memory of `grad_KMN` is used up.
    """
    momentum_KMN = torch.lerp(momentum_KMN, grad_KMN, 1 - momentum)
    update_KMN = grad_KMN.lerp_(momentum_KMN, momentum) if nesterov else momentum_KMN
    return momentum_KMN, newton_schulz(update_KMN, steps=ns_steps, eps=eps, overwrite=nesterov)


def update_scale(scale_rule: str, rows: int, cols: int) -> float:
    """Return what an orthogonal update of this shape is multiplied by before lr."""
    if scale_rule == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, cols))
    return math.sqrt(max(1.0, rows / cols))


class Muon(torch.optim.Optimizer):
    """Muon on stacks: all matrices of one shape and group go through Newton–Schulz together.

    A parameter group may hold `n_stacked`: how many matrices lie on top of each other in its parameters (one
    number, or a list with one per parameter). A fused (3C, C) weight with 3 is treated as Q, K and V apart,
    the scale rule included.

    State per parameter: `momentum_buffer`, an exponential average as in torch.optim.Muon; `step` only under a
    momentum warm-up. If `found_inf` is set to a tensor on the parameters' device, an update for which it is
    not zero changes neither parameters nor state, without the host waiting for it.
    """

    supports_found_inf = True

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        ns_steps: int = 5,
        scale_rule: str = "original",
        momentum_warmup_steps: int = 0,
        momentum_start: float = 0.85,
        eps: float = 1e-30,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "ns_steps": ns_steps,
            "scale_rule": scale_rule,
            "momentum_warmup_steps": momentum_warmup_steps,
            "momentum_start": momentum_start,
            "eps": eps,
            "n_stacked": 1,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group after checking that it holds matrices only, each divisible by its `n_stacked`."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for parameter, n_stacked in zip(group["params"], stacked_counts(group), strict=True):
            shape = tuple(parameter.shape)
            if parameter.ndim != 2:
                raise UserError(
                    f"Muon takes matrices and was given a parameter of shape {shape}: give the roles "
                    "embedding, head and vector to another optimizer, such as adamw"
                )
            if n_stacked < 1 or shape[0] % n_stacked:
                raise UserError(f"a parameter of shape {shape} does not hold {n_stacked} stacked matrices")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; return what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = getattr(self, "found_inf", None)
        for group in self.param_groups:
            self._step_group(group, None if found_inf is None else found_inf != 0)
        return loss

    def _step_group(self, group: dict[str, Any], skip: Tensor | None) -> None:
        parameters, grads, momenta, owners = self._matrices(group)
        if not parameters:
            return
        warms_up = group["momentum_warmup_steps"] > 0
        self._decay(group, owners, skip)
        for indices in shape_groups(parameters):
            old_KMN = torch.stack([momenta[i] for i in indices])
            new_KMN, update_KMN = orthogonal_momentum(
                torch.stack([grads[i] for i in indices]),
                old_KMN,
                self._warm_momentum(group, [owners[i] for i in indices]) if warms_up else group["momentum"],
                nesterov=group["nesterov"],
                ns_steps=group["ns_steps"],
                eps=group["eps"],
            )
            if skip is not None:
                # Selected, not multiplied: 0 times NaN is NaN.
                new_KMN = torch.where(skip, old_KMN, new_KMN)
                update_KMN = update_KMN.masked_fill_(skip, 0.0)
            torch._foreach_copy_([momenta[i] for i in indices], list(new_KMN.unbind()))
            size = update_scale(group["scale_rule"], *update_KMN.shape[1:])
            chosen = [parameters[i] for i in indices]
            torch._foreach_add_(chosen, list(update_KMN.unbind()), alpha=-group["lr"] * size)
        if warms_up:
            counted = list({id(owner): self.state[owner]["step"] for owner in owners}.values())
            torch._foreach_add_(counted, 1.0 if skip is None else (~skip).float())

    def _matrices(
        self, group: dict[str, Any]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """Return views of each matrix with a gradient, of its gradient and momentum, and whose it is."""
        parameters, grads, momenta, owners = [], [], [], []
        for parameter, n_stacked in zip(group["params"], stacked_counts(group), strict=True):
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            if group["momentum_warmup_steps"]:
                # A loaded step count may lie on the CPU; elsewhere this moves nothing.
                step = state.get("step", torch.zeros((), dtype=torch.float32))
                state["step"] = step.to(parameter.device)
            parameters += parameter.chunk(n_stacked)
            grads += parameter.grad.to(parameter.dtype).chunk(n_stacked)
            momenta += state["momentum_buffer"].chunk(n_stacked)
            owners += [parameter] * n_stacked
        return parameters, grads, momenta, owners

    def _decay(self, group: dict[str, Any], owners: list[Tensor], skip: Tensor | None) -> None:
        keep = 1 - group["lr"] * group["weight_decay"]
        if keep == 1:
            return
        unique = list({id(owner): owner for owner in owners}.values())
        if skip is None:
            torch._foreach_mul_(unique, keep)
        else:
            # The dtype in which the scalar path multiplies, so that both give the same bits.
            dtype = torch.promote_types(unique[0].dtype, torch.float32)
            factor = torch.full((), keep, dtype=dtype, device=skip.device).masked_fill_(skip, 1.0)
            torch._foreach_mul_(unique, factor)

    def _warm_momentum(self, group: dict[str, Any], owners: list[Tensor]) -> Tensor:
        """Return the momentum of each matrix at its parameter's step, K11, without a host synchronisation."""
        step_K = torch.stack([self.state[owner]["step"] for owner in owners])
        progress_K = (step_K / group["momentum_warmup_steps"]).clamp(max=1.0)
        momentum_K = group["momentum_start"] + (group["momentum"] - group["momentum_start"]) * progress_K
        return momentum_K[:, None, None].to(owners[0].dtype)


def stacked_counts(group: dict[str, Any]) -> list[int]:
    """Return how many matrices each parameter of the group holds."""
    n_stacked = group["n_stacked"]
    if isinstance(n_stacked, int):
        return [n_stacked] * len(group["params"])
    if len(n_stacked) != len(group["params"]):
        raise UserError(f"n_stacked lists {len(n_stacked)} numbers for {len(group['params'])} parameters")
    return list(n_stacked)


CLASS = Muon
