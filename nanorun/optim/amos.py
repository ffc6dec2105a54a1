"""Amos: Adam's step with a weight decay and a slowing that follow from how large each weight should become.

Ran Tian and Ankur P. Parikh, arXiv:2210.11693. This implementation is nanorun's.

Shapes: P parameters; R rows, those of all parameters of a group end to end. A parameter of one dimension or
none is one row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanorun.optim.closures import loss_of
from nanorun.optim.muon import stacked_counts
from nanorun.optim.options import REQUIRED, Option

SUMMARY = "Adam with one average square a row, and a decay that steers weights to the scale the model wants."
PAPER = "arXiv:2210.11693"
SOURCE = "nanorun"
ROLES = ("embedding", "head", "matrix", "vector")
UNIT = "parameter"
SMALLEST = 2.0**-125
OPTIONS = {
    "lr": Option(REQUIRED, "the paper's ξ: how much a weight of scale eta may change in a step", low=0.0),
    "beta": Option(0.999, "weight of the past in the average square", low=0.0, high=1.0, below_high=True),
    "momentum": Option(
        0.0, "weight of the past in an average of updates", low=0.0, high=1.0, below_high=True
    ),
    "extra_l2": Option(0.0, "decay per step beside the adaptive one; not scaled by lr", low=0.0),
    "c_coef": Option(0.25, "how soon the weight decay lets go", low=0.0),
    "d_coef": Option(0.25, "how soon the steps become smaller", low=0.0),
    "eta": Option(None, "scale that weights should come to; unset goes by role and shape", low=SMALLEST),
    "eps": Option(SMALLEST, "least value of the average square", low=SMALLEST),
}


def expected_scale(parameter: Tensor, role: str | None, n_stacked: int) -> Tensor:
    """Return eta, the size that the parameter's entries should come to, as a 0-dim tensor beside it.

    The rule of the paper's models, told by role and shape because optimizers see no names:

    - embedding: √(2 / cols);
    - a matrix reads cols inputs of size 1 and should write outputs of size 1: 1/√cols. Where it has more cols
      than rows it reads an activation that leaves half of its inputs at 0, as the second matrix of an MLP
      does: √(2 / cols);
    - a gain 1, a bias 1/2. A vector or scalar counts as a bias if it is all zero at its first step.
    """
    if parameter.ndim < 2:
        return torch.where(parameter.detach().any(), 1.0, 0.5).to(parameter.dtype)
    cols = parameter[0].numel()
    reads_activation = role != "head" and cols > parameter.size(0) // n_stacked
    scale = math.sqrt((2.0 if role == "embedding" or reads_activation else 1.0) / cols)
    return torch.full((), scale, dtype=parameter.dtype, device=parameter.device)


class Rows(NamedTuple):
    """What one step does to each row, all of shape R."""

    exp_avg_sq: Tensor
    decay: Tensor
    shrink: Tensor
    """Times the parameter, and subtracted from it."""
    scale: Tensor
    """Times the gradient, and subtracted from the parameter."""


def amos_rows(
    mean_square_R: Tensor,
    exp_avg_sq_R: Tensor,
    decay_R: Tensor,
    correction_R: Tensor,
    eta_R: Tensor,
    group: dict[str, Any],
) -> Rows:
    """Return the new state and the two factors of every row: algorithm 1 of the paper without its momentum.

    `decay` is the paper's b, `exp_avg_sq` its v before the correction by 1 − βᵗ.
    """
    xi = group["lr"]
    exp_avg_sq_R = torch.lerp(exp_avg_sq_R, mean_square_R, 1 - group["beta"])
    inverse_R = correction_R / exp_avg_sq_R.clamp(min=group["eps"])
    c_R = (1 + group["c_coef"] * math.sqrt(xi) * decay_R).rsqrt_()
    d_R = (1 + group["d_coef"] * math.sqrt(xi) * eta_R.sqrt() * decay_R).reciprocal_()
    gamma_R = c_R * xi**2 * (inverse_R * mean_square_R)
    return Rows(
        exp_avg_sq_R,
        decay_R + gamma_R * (1 + decay_R),
        d_R * (0.5 * gamma_R + group["extra_l2"]),
        d_R * xi * eta_R * inverse_R.sqrt_(),
    )


class Amos(torch.optim.Optimizer):
    """Amos with one average square per row: per output of a matrix and per token of an embedding.

    That is what the authors' code keeps for their models (jestimator's `shape_fn`; torch's weights lie the
    other way round): 1/cols of what Adam keeps. State per parameter: `exp_avg_sq` and `decay`
    (one number a row), `eta` and `step` (0-dim), and `momentum_buffer` under momentum. Setting `eta` on a
    group holds for all its steps to come; unset, the rule of `expected_scale` decides at the first step.

    Differs from pytorch_optimizer.Amos 4.1, which keeps one average square per tensor (equal to ours for
    vectors and one-row matrices), takes √(2 / cols) for every matrix and 1/2 for every vector, adds 1e-18 to
    the average square where we take the larger, and gives `extra_l2` the opposite sign: there it makes
    weights grow. The gradient clipping of the paper's algorithm is the training loop's `grad_clip`.

    If `found_inf` is set to a tensor on the parameters' device, an update for which it is not zero changes
    neither parameters nor state, without the host waiting for it.
    """

    supports_found_inf = True

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        beta: float = 0.999,
        momentum: float = 0.0,
        extra_l2: float = 0.0,
        c_coef: float = 0.25,
        d_coef: float = 0.25,
        eta: float | None = None,
        eps: float = SMALLEST,
    ) -> None:
        defaults = {
            "lr": lr,
            "beta": beta,
            "momentum": momentum,
            "extra_l2": extra_l2,
            "c_coef": c_coef,
            "d_coef": d_coef,
            "eta": eta,
            "eps": eps,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; return what `closure` returns."""
        loss = loss_of(closure)
        found_inf = getattr(self, "found_inf", None)
        skip = None if found_inf is None else found_inf != 0
        for group in self.param_groups:
            counts = stacked_counts({"n_stacked": 1, **group})
            alike: dict[Any, list[Tensor]] = {}
            for parameter, n_stacked in zip(group["params"], counts, strict=True):
                if parameter.grad is not None:
                    self._prepare(parameter, group, n_stacked)
                    alike.setdefault((parameter.device, parameter.dtype), []).append(parameter)
            for parameters in alike.values():
                self._step_alike(parameters, group, skip)
        return loss

    def _prepare(self, parameter: Tensor, group: dict[str, Any], n_stacked: int) -> None:
        """Make the parameter's state if it has none."""
        state = self.state[parameter]
        if "eta" not in state:
            slots = parameter.new_zeros(
                [parameter.size(0)] + [1] * (parameter.ndim - 1) if parameter.ndim > 1 else []
            )
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg_sq"], state["decay"] = slots, slots.clone()
            state["eta"] = expected_scale(parameter, group.get("role"), n_stacked)
        if group["momentum"] and "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        # A loaded step count may lie on the CPU; elsewhere this moves nothing.
        state["step"] = state["step"].to(parameter.device)

    def _step_alike(self, parameters: list[Tensor], group: dict[str, Any], skip: Tensor | None) -> None:
        """Update parameters of one dtype and device: one pass of small sums over the rows of all of them."""
        states = [self.state[parameter] for parameter in parameters]
        grads = [one.grad.to(one.dtype) for one in parameters if one.grad is not None]
        counts = [state["exp_avg_sq"].numel() for state in states]
        dtype = torch.promote_types(parameters[0].dtype, torch.float32)
        step_P = torch.stack([state["step"] for state in states]) + 1
        eta_P = torch.stack([state["eta"] for state in states]).to(dtype)
        if group["eta"] is not None:
            eta_P = torch.full_like(eta_P, group["eta"])
        old_R = [torch.cat([s[key].flatten() for s in states]).to(dtype) for key in ("exp_avg_sq", "decay")]
        rows = amos_rows(
            torch.cat([_mean_square(grad, dtype) for grad in grads]),
            old_R[0],
            old_R[1],
            _per_row(_correction(step_P.to(dtype), group["beta"]), counts),
            _per_row(eta_P, counts),
            group,
        )
        if skip is not None:
            # Selected, not multiplied: 0 times NaN is NaN.
            kept = [torch.where(skip, old, new) for old, new in zip(old_R, rows[:2])]
            rows = Rows(
                kept[0], kept[1], rows.shrink.masked_fill(skip, 0.0), rows.scale.masked_fill(skip, 0.0)
            )
            grads = [grad.masked_fill(skip, 0.0) for grad in grads]
            step_P = step_P - skip.to(step_P.dtype)
        for key, new_R in (("exp_avg_sq", rows.exp_avg_sq), ("decay", rows.decay)):
            torch._foreach_copy_([state[key].view(-1) for state in states], list(new_R.split(counts)))
        torch._foreach_copy_([state["step"] for state in states], list(step_P.unbind()))
        for number, (shrink, scale) in enumerate(zip(rows.shrink.split(counts), rows.scale.split(counts))):
            shape = states[number]["exp_avg_sq"].shape
            shrink, scale = (f.view(shape).to(parameters[0].dtype) for f in (shrink, scale))
            _apply(parameters[number], grads[number], shrink, scale, states[number], group["momentum"], skip)


def _apply(
    parameter: Tensor,
    grad: Tensor,
    shrink: Tensor,
    scale: Tensor,
    state: dict[str, Any],
    momentum: float,
    skip: Tensor | None,
) -> None:
    """Subtract the update, or its average under momentum; shrink and scale have one number a row."""
    if not momentum:
        # Not mul_(1 - shrink): near 1, fp32 would round a tenth of a typical shrink away.
        parameter.addcmul_(parameter, shrink, value=-1).addcmul_(grad, scale, value=-1)
        return
    buffer = state["momentum_buffer"]
    new = buffer.lerp(torch.addcmul(parameter * shrink, grad, scale), 1 - momentum)
    if skip is None:
        parameter.sub_(buffer.copy_(new))
    else:
        buffer.copy_(torch.where(skip, buffer, new))
        parameter.copy_(torch.where(skip, parameter, parameter - new))


def _mean_square(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mean square of each row, flat."""
    if grad.ndim < 2:
        return grad.to(dtype).square().mean().view(1)
    norm_R = torch.linalg.vector_norm(grad, dim=tuple(range(1, grad.ndim)), dtype=dtype)
    return norm_R.square_().div_(grad[0].numel())


def _correction(step_P: Tensor, beta: float) -> Tensor:
    """Return 1 − βᵗ, in a form that loses no digits in fp32 while t is small."""
    return -torch.expm1(step_P * (math.log(beta) if beta else -math.inf))


def _per_row(values_P: Tensor, counts: list[int]) -> Tensor:
    return torch.cat([value.expand(count) for value, count in zip(values_P.unbind(), counts)])


CLASS = Amos
