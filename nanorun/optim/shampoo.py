"""Shampoo: the gradient between inverse fourth roots of its summed row and column statistics.

Gupta, Koren, Singer 2018, arXiv:1802.09568. This implementation is nanorun's.

Shapes: K matrices of M rows and N columns in a stack; S rows and T columns of a matrix or its transpose,
whichever side is worked on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanorun.errors import UserError
from nanorun.optim.closures import loss_of
from nanorun.optim.inverse_roots import ROOT_PRODUCTS, inverse_root, two_sided_cost
from nanorun.optim.muon import stacked_counts
from nanorun.optim.options import REQUIRED, Option

SUMMARY = "AdaGrad with a matrix for each side of the gradient: L^(-1/4) G R^(-1/4)."
PAPER = "arXiv:1802.09568"
SOURCE = "nanorun"
ROLES = ("embedding", "head", "matrix", "vector")
UNIT = "parameter"
OPTIONS = {
    "lr": Option(REQUIRED, "learning rate", low=0.0),
    "momentum": Option(0.9, "weight of the past in the average gradient", low=0.0, high=1.0, below_high=True),
    "weight_decay": Option(0.0, "decay per step is lr times this", low=0.0),
    "eps": Option(1e-4, "what the statistics start from: this times the identity", low=0.0),
    "beta": Option(
        None,
        "weight of the past in averaged statistics; unset sums them",
        low=0.0,
        high=1.0,
        below_high=True,
    ),
    "precondition_frequency": Option(10, "steps from one computation of the roots to the next", low=1),
    "max_preconditioner_dim": Option(
        768, "longest side with a full matrix; a longer one keeps its diagonal", low=1
    ),
}


def refresh_due(step: int, every: int) -> bool:
    """Return whether the roots are computed at this step, counted from 1: every so often, and early on.

    Early means at 1, 2, 4, 8… before the first multiple of `every`. The statistics of one step know few of
    the directions that gradients take, and when summed they double with each of these steps.
    """
    return step % every == 0 or (step < every and step & (step - 1) == 0)


def accumulate_(statistics: list[Tensor], squares: list[Tensor], beta: float | None) -> None:
    """Add the squares to the statistics in place, or average them in where `beta` is a number."""
    if beta is None:
        torch._foreach_add_(statistics, squares)
    else:
        torch._foreach_lerp_(statistics, squares, 1 - beta)


def diagonal_root(statistics: Tensor, power: float) -> Tensor:
    """Return the statistics^(-1/power) of each entry; a finite one for zero."""
    return statistics.clamp(min=torch.finfo(statistics.dtype).tiny).pow(-1 / power)


class Shampoo(torch.optim.Optimizer):
    """Shampoo on stacks: all matrices of one shape and group go through the roots together.

    A matrix G has L += GGᵀ and R += GᵀG, both starting at eps·I, and moves by -lr·L^(-1/4) M R^(-1/4). A side
    longer than `max_preconditioner_dim` keeps the diagonal of its statistics only, as in the paper's
    experiments. Vectors and scalars are preconditioned by the diagonal too, with the exponent -1/2 of an
    order-1 tensor, which is AdaGrad; the paper's full matrix would be as wide as the vector is long.

    `beta` unset sums the statistics as the paper does; a number averages them, L ← βL + (1−β)GGᵀ, from eps·I
    on and without bias correction. Momentum is on the gradient, M ← μM + (1−μ)G, and the statistics are of
    the gradient itself, as in the authors' code for TensorFlow; eps and the longest full side have the
    defaults they have there. Weight decay is decoupled and applied first.

    Roots are computed at the steps that `refresh_due` names and kept between them; diagonals have a fresh
    root at each step. A parameter group may hold `n_stacked`, as in Muon.

    State per parameter: `step`, `momentum_buffer` where momentum is not zero; of a matrix `statistics_left`
    and `statistics_right`, each of shape (n_stacked, side, side) with a `root_left` and `root_right` of the
    same shape, or (n_stacked, side) without where only the diagonal is kept; of a vector `statistics`.
    """

    skips_on_host = True

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eps: float = 1e-4,
        beta: float | None = None,
        precondition_frequency: int = 10,
        max_preconditioner_dim: int = 768,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "eps": eps,
            "beta": beta,
            "precondition_frequency": precondition_frequency,
            "max_preconditioner_dim": max_preconditioner_dim,
            "n_stacked": 1,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group after checking that its parameters are matrices, vectors or scalars."""
        super().add_param_group(param_group)
        check_shapes(self.param_groups[-1], "Shampoo")

    @staticmethod
    def cost_of(group: dict[str, Any], rows: int, cols: int) -> float:
        """Return the multiply-adds of an average step on a matrix, or a vector of one column; see ownership.py."""
        longest = group["max_preconditioner_dim"] if cols > 1 else 0
        roots = (ROOT_PRODUCTS + 1) / group["precondition_frequency"]
        return two_sided_cost(rows, cols, longest=longest, products=2, roots=roots)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; return what `closure` returns."""
        loss = loss_of(closure)
        for group in self.param_groups:
            with_grad = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not with_grad:
                continue
            for parameter in with_grad:
                if not self.state[parameter]:
                    self.state[parameter]["step"] = torch.zeros((), dtype=torch.float32)
            torch._foreach_add_([self.state[parameter]["step"] for parameter in with_grad], 1.0)
            if group["lr"] * group["weight_decay"] != 0:
                torch._foreach_mul_(with_grad, 1 - group["lr"] * group["weight_decay"])
            for members in alike(group, with_grad, self.state):
                if members.are_matrices:
                    self._step_matrices(group, members)
                else:
                    self._step_vectors(group, members.parameters)
        return loss

    def _step_vectors(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for parameter in parameters:
            if "statistics" not in self.state[parameter]:
                self.state[parameter]["statistics"] = torch.full_like(parameter, group["eps"])
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        statistics = [self.state[parameter]["statistics"] for parameter in parameters]
        accumulate_(statistics, list(torch._foreach_mul(grads, grads)), group["beta"])
        roots = [diagonal_root(statistic, 2) for statistic in statistics]
        torch._foreach_addcmul_(parameters, self._average(group, parameters), roots, value=-group["lr"])

    def _step_matrices(self, group: dict[str, Any], members: Alike) -> None:
        grad_KMN = members.stack([one.grad for one in members.parameters if one.grad is not None])
        update_KMN = members.stack(self._average(group, members.parameters))
        update_KMN = self._precondition(group, members, "left", grad_KMN, update_KMN)
        update_KMN = self._precondition(group, members, "right", grad_KMN.mT, update_KMN.mT).mT
        torch._foreach_add_(members.split(members.parameters), list(update_KMN.unbind()), alpha=-group["lr"])

    def _average(self, group: dict[str, Any], parameters: list[Tensor]) -> list[Tensor]:
        """Return the average gradients after this step's: the momentum buffers, or the gradients themselves."""
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if group["momentum"] == 0:
            return grads
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        return buffers

    def _precondition(
        self, group: dict[str, Any], members: Alike, side: str, grad_KST: Tensor, update_KST: Tensor
    ) -> Tensor:
        """Return the update with L^(-1/4) applied from the left, after adding the gradient to L.

        Of the right side it is given the transposes, and R is its L.
        """
        states = [self.state[parameter] for parameter in members.parameters]
        full = grad_KST.size(1) <= group["max_preconditioner_dim"]
        for state, count in zip(states, members.counts, strict=True):
            if f"statistics_{side}" not in state:
                start_kS = grad_KST.new_full((count, grad_KST.size(1)), group["eps"])
                state[f"statistics_{side}"] = torch.diag_embed(start_kS) if full else start_kS
        statistics = [state[f"statistics_{side}"] for state in states]
        square = torch.bmm(grad_KST, grad_KST.mT) if full else grad_KST.square().sum(dim=2)
        accumulate_(statistics, list(square.split(members.counts)), group["beta"])
        if not full:
            return update_KST * diagonal_root(torch.cat(statistics), 4)[:, :, None]
        if refresh_due(members.step, group["precondition_frequency"]):
            roots = inverse_root(torch.cat(statistics), 4).split(members.counts)
            for state, root_kSS in zip(states, roots, strict=True):
                # A copy, so that the state does not hold on to the whole stack.
                state[f"root_{side}"] = root_kSS.clone()
        return torch.bmm(torch.cat([state[f"root_{side}"] for state in states]), update_KST)


class Alike(NamedTuple):
    """Parameters that take a step together: matrices of one shape, or vectors and scalars of any."""

    parameters: list[Tensor]
    counts: list[int]
    """How many matrices each parameter stacks along its first dimension."""
    step: int
    """Which step of theirs this is, counted from 1."""
    are_matrices: bool

    def split(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return a view of each matrix in tensors of the parameters' shapes; vectors as they are."""
        if not self.are_matrices:
            return list(tensors)
        pairs = zip(tensors, self.counts, strict=True)
        return [matrix for tensor, count in pairs for matrix in tensor.chunk(count)]

    def stack(self, tensors: list[Tensor]) -> Tensor:
        """Return a new stack_KMN of the matrices in tensors of the parameters' shapes."""
        return torch.stack(self.split(tensors))


def alike(group: dict[str, Any], parameters: list[Tensor], state: Mapping[Tensor, Any]) -> list[Alike]:
    """Return the parameters, all of the group, by the shape of their matrices, dtype, device and step."""
    counts = dict(zip(map(id, group["params"]), stacked_counts(group), strict=True))
    found: dict[Any, Alike] = {}
    for parameter in parameters:
        step, count = int(state[parameter]["step"]), counts[id(parameter)]
        are_matrices = parameter.ndim == 2
        shape = (parameter.size(0) // count, parameter.size(1)) if are_matrices else None
        key = (shape, parameter.dtype, parameter.device, step)
        members = found.setdefault(key, Alike([], [], step, are_matrices))
        members.parameters.append(parameter)
        members.counts.append(count)
    return list(found.values())


def check_shapes(group: dict[str, Any], algorithm: str) -> None:
    """Raise UserError unless all parameters have at most two dimensions and matrices divide into their stack."""
    for parameter, count in zip(group["params"], stacked_counts(group), strict=True):
        shape = tuple(parameter.shape)
        if parameter.ndim > 2:
            raise UserError(
                f"{algorithm} takes matrices, vectors and scalars and was given a parameter of shape {shape}: "
                "flatten it to a matrix, or give it to another optimizer, such as adamw"
            )
        if parameter.ndim == 2 and (count < 1 or shape[0] % count):
            raise UserError(f"a parameter of shape {shape} does not hold {count} stacked matrices")


CLASS = Shampoo
