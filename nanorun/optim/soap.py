"""SOAP: Adam in the eigenbasis of Shampoo's statistics.

Vyas et al. 2024, arXiv:2409.11321. This implementation is nanorun's.

Shapes: K matrices of M rows and N columns in a stack; S = M or N.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from nanorun.optim.closures import loss_of
from nanorun.optim.inverse_roots import ROOT_PRODUCTS, eigenbasis, refine_eigenbasis, two_sided_cost
from nanorun.optim.options import REQUIRED, Option
from nanorun.optim.shampoo import Alike, accumulate_, alike, check_shapes

SUMMARY = "Adam in the eigenbasis of Shampoo's statistics, which turns slowly; AdamW for vectors."
PAPER = "arXiv:2409.11321"
SOURCE = "nanorun"
ROLES = ("embedding", "head", "matrix", "vector")
UNIT = "parameter"
OPTIONS = {
    "lr": Option(REQUIRED, "learning rate", low=0.0),
    "betas": Option(
        (0.95, 0.95), "weight of the past in Adam's two averages", low=0.0, high=1.0, below_high=True
    ),
    "shampoo_beta": Option(
        None,
        "weight of the past in Shampoo's statistics; unset means the second of betas",
        low=0.0,
        high=1.0,
        below_high=True,
    ),
    "eps": Option(1e-8, "added to the root, outside it", low=0.0),
    "weight_decay": Option(0.01, "decay per step is lr times this", low=0.0),
    "precondition_frequency": Option(10, "steps from one turn of the eigenbasis to the next", low=1),
    "max_precond_dim": Option(10000, "longest side with an eigenbasis; a longer one is not turned", low=1),
    "normalize_grads": Option(False, "divide the update of each matrix by its root mean square"),
    "correct_bias": Option(True, "correct the averages for their start at zero, as Adam does"),
}


def adam_updates(
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    step: int,
    *,
    betas: tuple[float, float],
    eps: float,
    correct_bias: bool,
) -> list[Tensor]:
    """Return m̂ / (√v̂ + eps) of each gradient after averaging it into the moments, which are written to."""
    beta1, beta2 = betas
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, value=1 - beta2)
    roots = torch._foreach_sqrt(exp_avg_sqs)
    if correct_bias:
        torch._foreach_div_(roots, math.sqrt(1 - beta2**step))
    torch._foreach_add_(roots, eps)
    updates = torch._foreach_div(exp_avgs, roots)
    if correct_bias:
        torch._foreach_div_(updates, 1 - beta1**step)
    return list(updates)


def turn(x_KMN: Tensor, bases: dict[str, Tensor], *, back: bool = False) -> Tensor:
    """Return QₗᵀXQᵣ of each matrix, or QₗXQᵣᵀ if `back`; a side without a basis stays as it is."""
    if "left" in bases:
        x_KMN = torch.bmm(bases["left"] if back else bases["left"].mT, x_KMN)
    if "right" in bases:
        x_KMN = torch.bmm(x_KMN, bases["right"].mT if back else bases["right"])
    return x_KMN


class SOAP(torch.optim.Optimizer):
    """SOAP on stacks: all matrices of one shape and group are turned, and their bases refined, together.

    A matrix G has L ← βL + (1−β)GGᵀ and R ← βR + (1−β)GᵀG from zero on. Adam's moments are kept in the bases
    of their eigenvectors, Qₗ and Qᵣ; the update is turned back. After every `precondition_frequency` updates
    one step of orthogonal iteration refines the bases: the second moments' rows and columns follow the new
    order of the eigenvectors, the first moment is turned from the old bases to the new, which is the paper's
    average of plain gradients. A side longer than `max_precond_dim` has no basis and is not turned.

    A matrix's first gradient only makes its bases, as in the authors' code: in the basis of a single gradient
    that gradient is diagonal, and Adam would blow up the rounding beside the diagonal to the full step. The
    parameter does not move then, and Adam's bias correction counts from the second gradient on.

    Vectors, scalars and matrices without a basis on either side take AdamW's step, from the first gradient
    on (the authors' code makes them wait, too). Differs from that code also in three orders: eps is added to
    the bias-corrected root, as in torch; the decay comes before the update; and `normalize_grads` comes after
    the bias correction, so that an update has a root mean square of exactly lr. A parameter group may hold
    `n_stacked`, as in Muon.

    State per parameter: `step` (gradients seen), `exp_avg`, `exp_avg_sq`; of a matrix `statistics_left`,
    `basis_left`, `statistics_right`, `basis_right`, each of shape (n_stacked, side, side).
    """

    skips_on_host = True

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        precondition_frequency: int = 10,
        max_precond_dim: int = 10000,
        normalize_grads: bool = False,
        correct_bias: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "shampoo_beta": shampoo_beta,
            "eps": eps,
            "weight_decay": weight_decay,
            "precondition_frequency": precondition_frequency,
            "max_precond_dim": max_precond_dim,
            "normalize_grads": normalize_grads,
            "correct_bias": correct_bias,
            "n_stacked": 1,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group after checking that its parameters are matrices, vectors or scalars."""
        super().add_param_group(param_group)
        check_shapes(self.param_groups[-1], "SOAP")

    @staticmethod
    def cost_of(group: dict[str, Any], rows: int, cols: int) -> float:
        """Return the multiply-adds of an average step on a matrix, or a vector of one column; see ownership.py."""
        longest = group["max_precond_dim"] if cols > 1 else 0
        every = group["precondition_frequency"]
        # The statistic, there and back; when the basis is refined also the average, from the old to the new.
        products, roots = 3 + 2 / every, (ROOT_PRODUCTS / 2 + 1) / every
        return two_sided_cost(rows, cols, longest=longest, products=products, roots=roots)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; return what `closure` returns."""
        loss = loss_of(closure)
        for group in self.param_groups:
            with_grad = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in with_grad:
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
            if with_grad:
                torch._foreach_add_([self.state[parameter]["step"] for parameter in with_grad], 1.0)
            for members in alike(group, with_grad, self.state):
                self._step_alike(group, members)
        return loss

    def _step_alike(self, group: dict[str, Any], members: Alike) -> None:
        grads = members.split([one.grad for one in members.parameters if one.grad is not None])
        sides = _sides(members, group["max_precond_dim"])
        if not sides:
            self._move(group, members, self._adam(group, members, grads, members.step))
            return
        grad_KMN = torch.stack(grads)
        if members.step == 1:
            self._learn(group, members, sides, grad_KMN)
            for side in sides:
                self._keep(members, f"basis_{side}", eigenbasis(self._gather(members, f"statistics_{side}")))
            return
        bases = {side: self._gather(members, f"basis_{side}") for side in sides}
        updates = self._adam(group, members, list(turn(grad_KMN, bases).unbind()), members.step - 1)
        self._move(group, members, list(turn(torch.stack(updates), bases, back=True).unbind()))
        self._learn(group, members, sides, grad_KMN)
        if (members.step - 1) % group["precondition_frequency"] == 0:
            self._refine(members, bases)

    def _adam(self, group: dict[str, Any], members: Alike, grads: list[Tensor], step: int) -> list[Tensor]:
        """Return Adam's update of each matrix or vector, moving its moments."""
        states = [self.state[parameter] for parameter in members.parameters]
        return adam_updates(
            grads,
            members.split([state["exp_avg"] for state in states]),
            members.split([state["exp_avg_sq"] for state in states]),
            step,
            betas=group["betas"],
            eps=group["eps"],
            correct_bias=group["correct_bias"],
        )

    def _move(self, group: dict[str, Any], members: Alike, updates: list[Tensor]) -> None:
        """Decay the parameters and take the updates from them."""
        if group["normalize_grads"]:
            for update in updates:
                mean_square = update.square().mean()
                update.mul_(mean_square.clamp(min=torch.finfo(update.dtype).tiny).rsqrt())
        if group["lr"] * group["weight_decay"] != 0:
            torch._foreach_mul_(members.parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(members.split(members.parameters), updates, alpha=-group["lr"])

    def _learn(self, group: dict[str, Any], members: Alike, sides: list[str], grad_KMN: Tensor) -> None:
        """Average the gradients' squares into the statistics of these sides."""
        beta = group["betas"][1] if group["shampoo_beta"] is None else group["shampoo_beta"]
        for side in sides:
            tall_KMN = grad_KMN if side == "left" else grad_KMN.mT
            square_KSS = torch.bmm(tall_KMN, tall_KMN.mT)
            if members.step == 1:
                self._keep(members, f"statistics_{side}", torch.zeros_like(square_KSS))
            statistics = [self.state[parameter][f"statistics_{side}"] for parameter in members.parameters]
            accumulate_(statistics, list(square_KSS.split(members.counts)), beta)

    def _refine(self, members: Alike, bases: dict[str, Tensor]) -> None:
        """Bring the bases nearer to the eigenvectors, and the moments into the new bases."""
        states = [self.state[parameter] for parameter in members.parameters]
        averages = members.split([state["exp_avg"] for state in states])
        squares = members.split([state["exp_avg_sq"] for state in states])
        square_KMN = torch.stack(squares)
        new_bases = {}
        for side, basis_KSS in bases.items():
            statistics_KSS = self._gather(members, f"statistics_{side}")
            new_bases[side], order_KS = refine_eigenbasis(statistics_KSS, basis_KSS)
            order_KMN = order_KS[:, :, None] if side == "left" else order_KS[:, None, :]
            dim = 1 if side == "left" else 2
            square_KMN = square_KMN.gather(dim, order_KMN.expand_as(square_KMN))
            self._keep(members, f"basis_{side}", new_bases[side])
        average_KMN = turn(turn(torch.stack(averages), bases, back=True), new_bases)
        torch._foreach_copy_(averages, list(average_KMN.unbind()))
        torch._foreach_copy_(squares, list(square_KMN.unbind()))

    def _gather(self, members: Alike, key: str) -> Tensor:
        return torch.cat([self.state[parameter][key] for parameter in members.parameters])

    def _keep(self, members: Alike, key: str, stack_KSS: Tensor) -> None:
        for parameter, part_kSS in zip(members.parameters, stack_KSS.split(members.counts), strict=True):
            # A copy, so that the state does not hold on to the whole stack; contiguous, as safetensors wants it,
            # where eigh returns columns first.
            self.state[parameter][key] = part_kSS.clone(memory_format=torch.contiguous_format)


def _sides(members: Alike, longest: int) -> list[str]:
    """Return the sides of these matrices that have a basis; none for vectors."""
    if not members.are_matrices:
        return []
    rows, cols = members.parameters[0].shape
    lengths = {"left": rows // members.counts[0], "right": cols}
    return [side for side, length in lengths.items() if length <= longest]


CLASS = SOAP
