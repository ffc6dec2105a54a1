"""CASPR as submitted to AlgoPerf: the right factor learns from what the left one has preconditioned.

mlcommons/submissions_algorithms, algoperf_v05, external_tuning/caspr_adaptive, which is named after Duvvuri et
al., "Combining Axes Preconditioners through Kronecker Approximation for Deep Learning", ICLR 2024. One step, for
each block G of a matrix with M rows:

    m ← β₁m + (1-β₁)G,  v ← β₂v + (1-β₂)G²
    L ← β₂L + (1-β₂)GGᵀ,  R ← β₂R + (1-β₂)(L̂G)ᵀ(L̂G)/M
    every `precondition_frequency` steps: L̂ = (L + matrix_eps·λ(L)·I)^(-1/2), R̂ alike, and then
        R ← R · tr(L̂²(L' + matrix_eps·λ(L')·I))/M, L' being the L of the roots before
    m̂ = (β₁m + (1-β₁)G) / (1-β₁ᵗ), or under nesterov = false m / (1-β₁ᵗ)
    A = m̂ / (√(v / (1-β₂ᵗ)) + eps)
    D = L̂ m̂ R̂,  D ← D · |A| / |D|,  W ← W - lr·(D + weight_decay·W)

λ is the largest eigenvalue. L and L' start at matrix_eps·I; R, L̂ and R̂ start at I; nothing corrects L and R
for that. R's factor makes up for the change of L̂, with which R's past was measured. Until
`start_preconditioning_step` has passed D is A. Adam's size is transplanted matrix by matrix (all blocks of a
matrix together). Vectors, and matrices with a side of more than 40,000, take A.

It is not the paper's algorithm. There L and R both come from G, and D = ¼(L^(-½)G + 2·L^(-¼)GR^(-¼) + GR^(-½)),
the square of a Kronecker sum. Here the two factors are multiplied, as in Shampoo, with the power -1/2 each.

Shapes: K blocks of M rows and N columns in a stack, of all parameters together; S = M or N.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from nanorun.optim.closures import loss_of
from nanorun.optim.distributed_shampoo import (
    Bucket,
    Member,
    adam_directions,
    blocked_cost,
    buckets_of,
    check_stacks,
    eyes,
    members_by_step,
)
from nanorun.optim.inverse_roots import damped_inverse_root
from nanorun.optim.options import REQUIRED, Option

SUMMARY = (
    "Shampoo's blocks with powers -1/2, the right factor learnt behind the left; as long as Adam's step."
)
PAPER = (
    "Duvvuri et al., ICLR 2024, https://openreview.net/forum?id=8j9hz8DVi8; the AlgoPerf submission differs"
)
SOURCE = "nanorun"
ROLES = ("embedding", "head", "matrix", "vector")
UNIT = "parameter"
OPTIONS = {
    "lr": Option(REQUIRED, "learning rate", low=0.0),
    "betas": Option(
        (0.9, 0.999),
        "weight of the past in the average gradient and in all statistics",
        low=0.0,
        high=1.0,
        below_high=True,
    ),
    "eps": Option(1e-8, "Adam's: added to the root, outside it", low=0.0),
    "matrix_eps": Option(1e-6, "added to a statistic before its root, times its largest eigenvalue", low=0.0),
    "weight_decay": Option(0.0, "decay per step is lr times this", low=0.0),
    "nesterov": Option(True, "look ahead: average the gradient once more with betas[0]"),
    "precondition_frequency": Option(20, "steps from one computation of the roots to the next", low=1),
    "start_preconditioning_step": Option(20, "steps that Adam takes alone", low=0),
    "block_size": Option(1024, "rows and columns of a block at most", low=1),
}

LONGEST_SIDE = 40_000
"""Matrices with a longer side take Adam's step, as in the submission."""


class CASPR(torch.optim.Optimizer):
    """CASPR as submitted, with all blocks of one shape of a group stacked.

    A parameter group may hold `n_stacked`, as for Muon: a fused (3C, C) weight with 3 is Q, K and V apart.

    State per parameter: `step`, `exp_avg` (m), `exp_avg_sq` (v), and for each shape of a matrix's blocks,
    numbered i, stacks `left_i` (L), `right_i` (R), `left_root_i`, `right_root_i` (L̂, R̂) and `left_damped_i`
    (the matrix of which L̂ is the root). With blocks of S by S that is 5 numbers a weight besides m and v.

    Differs from the submission in these: L stands on the left of the weight as torch has it, outputs by inputs,
    and the submission's kernels are inputs by outputs; roots by eigh where it takes a coupled Newton iteration
    and keeps the old root if that fails, λ therefore exact; blocks in both directions at once, where it stops
    with an error; a direction of zeros stays zero; with `precondition_frequency` 1 it also scales R once before
    the first root. It calls that option `preconditioning_compute_steps` and `matrix_eps` `matrix_epsilon`, and
    has a `start_preconditioning_step` of 101.
    """

    skips_on_host = True

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        matrix_eps: float = 1e-6,
        weight_decay: float = 0.0,
        nesterov: bool = True,
        precondition_frequency: int = 20,
        start_preconditioning_step: int = 20,
        block_size: int = 1024,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "matrix_eps": matrix_eps,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "precondition_frequency": precondition_frequency,
            "start_preconditioning_step": start_preconditioning_step,
            "block_size": block_size,
            "n_stacked": 1,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group after checking that each parameter is divisible by its `n_stacked`."""
        super().add_param_group(param_group)
        check_stacks(self.param_groups[-1])

    @staticmethod
    def cost_of(group: dict[str, Any], rows: int, cols: int) -> float:
        """Return the multiply-adds of an average step on a matrix, or a vector of one column; see ownership.py."""
        if cols == 1 or max(rows, cols) > LONGEST_SIDE:
            return float(rows * cols)
        # Left three products, right two.
        return blocked_cost(group, rows, cols, products=2.5)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; return what `closure` returns."""
        loss = loss_of(closure)
        for group in self.param_groups:

            def set_up(member: Member, matrix_eps: float = group["matrix_eps"]) -> None:
                _set_up(member, matrix_eps)

            for step, members in members_by_step(self, group, set_up).items():
                self._step_members(group, members, step)
        return loss

    def _step_members(self, group: dict[str, Any], members: list[Member], step: int) -> None:
        filtered, adam = adam_directions(
            members, step, betas=group["betas"], eps=group["eps"], nesterov=group["nesterov"]
        )
        blocked = [i for i, member in enumerate(members) if _has_factors(member)]
        matrices = [members[i] for i in blocked]
        directions = [torch.empty_like(adam[i]) for i in blocked]
        starts = step > group["start_preconditioning_step"]
        for bucket in buckets_of(matrices):
            grad_KMN = bucket.gather([member.grad for member in matrices])
            _update_statistics(bucket, grad_KMN, 1 - group["betas"][1])
            if step % group["precondition_frequency"] == 0:
                _update_roots(bucket, group["matrix_eps"])
            if starts:
                filtered_KMN = bucket.gather([filtered[i] for i in blocked])
                product_KMN = torch.bmm(bucket.load("left_root"), filtered_KMN)
                bucket.scatter(torch.bmm(product_KMN, bucket.load("right_root")), directions)
        if starts:
            for i, direction in zip(blocked, directions, strict=True):
                adam[i] = _graft(direction, adam[i], members[i].tiles[0].n_stacked)
        parameters = [member.parameter for member in members]
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, adam, alpha=-group["lr"])


def _has_factors(member: Member) -> bool:
    matrix = member.tiles[0].matrix
    return member.parameter.ndim >= 2 and max(matrix) <= LONGEST_SIDE


def _set_up(member: Member, matrix_eps: float) -> None:
    if not _has_factors(member):
        return
    for i, tile in enumerate(member.tiles):
        left, right = (eyes(tile, size, member.grad) for size in tile.shape)
        member.state[f"left_{i}"] = left * matrix_eps
        # What the submission's ridge makes of its start, λ(matrix_eps·I) being matrix_eps.
        member.state[f"left_damped_{i}"] = left * (matrix_eps + matrix_eps**2)
        member.state[f"right_{i}"] = right.clone()
        member.state[f"left_root_{i}"] = left
        member.state[f"right_root_{i}"] = right


def _update_statistics(bucket: Bucket, grad_KMN: Tensor, weight: float) -> None:
    bucket.average("left", torch.bmm(grad_KMN, grad_KMN.mT), weight)
    whitened_KMN = torch.bmm(bucket.load("left_root"), grad_KMN)
    outer_KNN = torch.bmm(whitened_KMN.mT, whitened_KMN).div_(grad_KMN.size(1))
    bucket.average("right", outer_KNN, weight)


def _update_roots(bucket: Bucket, matrix_eps: float) -> None:
    """Renew both roots and put the past of the right statistic on the new left root's scale."""
    left_KSS, right_KSS = bucket.load("left"), bucket.load("right")
    bucket.store("right_root", damped_inverse_root(right_KSS, 2, matrix_eps)[0])
    root_KSS, damping_K = damped_inverse_root(left_KSS, 2, matrix_eps)
    product_KSS = torch.bmm(bucket.load("left_damped"), root_KSS)
    scale_K = (root_KSS * product_KSS).sum(dim=(1, 2)).clamp_(min=0.0) / left_KSS.size(1)
    bucket.store("right", right_KSS * scale_K[:, None, None])
    bucket.store("left_root", root_KSS)
    damped_KSS = left_KSS.clone()
    damped_KSS.diagonal(dim1=1, dim2=2).add_(damping_K[:, None])
    bucket.store("left_damped", damped_KSS)


def _graft(direction: Tensor, adam: Tensor, n_stacked: int) -> Tensor:
    """Return the direction with the norm of Adam's update in each stacked matrix; works in its memory."""
    matrices = direction.view(n_stacked, -1)
    norm = torch.linalg.vector_norm(matrices, dim=1, keepdim=True)
    wanted = torch.linalg.vector_norm(adam.view(n_stacked, -1), dim=1, keepdim=True)
    # A direction of zeros, which the submission would divide by its norm, stays zero.
    matrices.mul_(torch.where(norm > 0, wanted / norm, 0.0))
    return direction


CLASS = CASPR
