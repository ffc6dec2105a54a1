"""Distributed Shampoo: blocks of the gradient between two inverse roots, with the size of Adam's step.

Shi et al. 2023, arXiv:2309.06497, as the winner of AlgoPerf's external tuning ran it
(mlcommons/submissions_algorithms, algoperf_v05, external_tuning/shampoo_submission). One step, for each block
G of a matrix:

    L ← β₂L + (1-β₂)GGᵀ,  R ← β₂R + (1-β₂)GᵀG,  v ← β₂'v + (1-β₂')G²,  m ← β₁m + (1-β₁)G
    m̂ = m / (1-β₁ᵗ), or under use_nadam (β₁m + (1-β₁)G) / (1-β₁ᵗ)
    A = m̂ / (√(v / (1-β₂'ᵗ)) + grafting_eps)
    D = L̂ m̂ R̂,  D ← D · |A| / (|D| + 1e-16),  W ← W - lr·(D + weight_decay·W)

L̂ = (L / (1-β₂ᵗ) + eps·I)^(-1/4), R̂ alike; both are computed at `start_preconditioning_step` and at every later
multiple of `precondition_frequency`, and are stale in between. Before the first of them D is A. Adam's size is
transplanted block by block, not parameter by parameter; A holds the same averaged gradient m̂ as D. A vector has
the factor L only, with the power -1/2: Adagrad's full matrix, block by block.

Shapes: K blocks of M rows and N columns in a stack, of all parameters together; S = M or N.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanorun.errors import UserError
from nanorun.optim.closures import loss_of
from nanorun.optim.inverse_roots import ROOT_PRODUCTS, inverse_root, two_sided_cost
from nanorun.optim.muon import stacked_counts
from nanorun.optim.options import REQUIRED, Option

SUMMARY = "Shampoo on blocks, its roots renewed every few steps, each block's step as long as Adam's."
PAPER = "arXiv:2309.06497"
SOURCE = "nanorun"
ROLES = ("embedding", "head", "matrix", "vector")
UNIT = "parameter"
OPTIONS = {
    "lr": Option(REQUIRED, "learning rate", low=0.0),
    "betas": Option(
        (0.9, 0.999),
        "weight of the past in the average gradient and in the statistics",
        low=0.0,
        high=1.0,
        below_high=True,
    ),
    "eps": Option(1e-8, "added to the statistics' eigenvalues before the root", low=0.0),
    "grafting_beta2": Option(
        None,
        "weight of the past in Adam's average square; betas[1] if unset",
        low=0.0,
        high=1.0,
        below_high=True,
    ),
    "grafting_eps": Option(1e-8, "Adam's: added to the root, outside it", low=0.0),
    "momentum": Option(
        0.0,
        "weight of the past in the average update, with Nesterov's look ahead",
        low=0.0,
        high=1.0,
        below_high=True,
    ),
    "weight_decay": Option(0.0, "decay per step is lr times this", low=0.0),
    "use_nadam": Option(False, "look ahead: average the gradient once more with betas[0]"),
    "precondition_frequency": Option(20, "steps from one computation of the roots to the next", low=1),
    "start_preconditioning_step": Option(
        -1, "step of the first roots, before it Adam alone; -1 for precondition_frequency", low=-1
    ),
    "block_size": Option(1024, "rows and columns of a block at most", low=1),
    "inv_root_override": Option(0, "r of the power -1/r; 0 for 4 with two factors and 2 with one", low=0),
}

TINY = 1e-16
"""Added to a norm before dividing by it, as in the original."""


class Tile(NamedTuple):
    """Where all blocks of one shape lie in a parameter taken as stacked matrices."""

    n_stacked: int
    matrix: tuple[int, int]
    """Rows and columns of each stacked matrix."""
    rows: tuple[int, int, int]
    """First row, how many blocks from there, rows in each."""
    cols: tuple[int, int, int]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of each block."""
        return self.rows[2], self.cols[2]

    @property
    def n_blocks(self) -> int:
        """How many blocks."""
        return self.n_stacked * self.rows[1] * self.cols[1]

    def view(self, tensor: Tensor) -> Tensor:
        """Return the blocks of a tensor of the parameter's shape: stacked matrix, row, column, M, N."""
        (row, n_rows, m), (col, n_cols, n) = self.rows, self.cols
        # Not reshape: a copy could not be written through.
        stack = tensor.view(self.n_stacked, *self.matrix)
        part = stack[:, row : row + n_rows * m, col : col + n_cols * n]
        return part.unflatten(2, (n_cols, n)).unflatten(1, (n_rows, m)).transpose(2, 3)


@lru_cache(maxsize=4096)
def tiles_of(shape: tuple[int, ...], n_stacked: int, block_size: int) -> tuple[Tile, ...]:
    """Return the tiles that cover a parameter: up to four, since the last row and column may be shorter.

    A vector is a matrix of one column; dimensions behind the second are flattened into it.
    """
    rows = shape[0] if shape else 1
    matrix = (rows // n_stacked, torch.Size(shape[1:]).numel())
    return tuple(
        Tile(n_stacked, matrix, row_cut, col_cut)
        for row_cut in _cuts(matrix[0], block_size)
        for col_cut in _cuts(matrix[1], block_size)
    )


def _cuts(length: int, block_size: int) -> list[tuple[int, int, int]]:
    whole, rest = divmod(length, block_size)
    cuts = [(0, whole, block_size), (whole * block_size, 1, rest)]
    return [cut for cut in cuts if cut[1] and cut[2]]


class Member(NamedTuple):
    """A parameter that takes part in a step."""

    parameter: Tensor
    grad: Tensor
    state: dict[str, Any]
    tiles: tuple[Tile, ...]


class Bucket(NamedTuple):
    """All blocks of one shape in a step."""

    members: Sequence[Member]
    sides: tuple[str, ...]
    """The names of the factors: "left" alone for vectors, "left" and "right" for matrices."""
    places: list[tuple[int, int]]
    """Which member and which of its tiles, in the stack's order."""

    @property
    def counts(self) -> list[int]:
        """How many blocks of the stack come from each place."""
        return [self.members[member].tiles[tile].n_blocks for member, tile in self.places]

    def gather(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return stack_KMN of the blocks of one tensor per member; a view where no copy is needed."""
        views = [self.members[i].tiles[tile].view(tensors[i]).flatten(0, 2) for i, tile in self.places]
        return views[0] if len(views) == 1 else torch.cat(views)

    def scatter(self, stack_KMN: Tensor, tensors: Sequence[Tensor]) -> None:
        """Write the blocks to their places in one tensor per member."""
        for (i, tile), blocks in zip(self.places, stack_KMN.split(self.counts), strict=True):
            target = self.members[i].tiles[tile].view(tensors[i])
            target.copy_(blocks.view(target.shape))

    def load(self, key: str) -> Tensor:
        """Return stack_KSS of a state; the state itself where one parameter has it all."""
        return _cat(self.each(key))

    def each(self, key: str) -> list[Tensor]:
        """Return a state of each place."""
        return [self.members[i].state[f"{key}_{tile}"] for i, tile in self.places]

    def store(self, key: str, stack: Tensor) -> None:
        """Write stack_KSS to the states it came from."""
        torch._foreach_copy_(self.each(key), list(stack.split(self.counts)))

    def average(self, key: str, stack_KSS: Tensor, weight: float) -> None:
        """Move a state by `weight` of the way to the stack's values."""
        torch._foreach_lerp_(self.each(key), list(stack_KSS.split(self.counts)), weight)


def sides_of(parameter: Tensor) -> tuple[str, ...]:
    """Return the names of the factors that a parameter's blocks have."""
    return ("left",) if parameter.ndim < 2 else ("left", "right")


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def buckets_of(members: Sequence[Member]) -> list[Bucket]:
    """Return the members' blocks by shape, sides, dtype and device."""
    found: dict[tuple[Any, ...], Bucket] = {}
    for i, member in enumerate(members):
        grad = member.grad
        for k, tile in enumerate(member.tiles):
            sides = sides_of(member.parameter)
            key = (tile.shape, sides, grad.dtype, grad.device)
            found.setdefault(key, Bucket(members, sides, [])).places.append((i, k))
    return list(found.values())


def adam_directions(
    members: Sequence[Member], step: int, *, betas: tuple[float, float], eps: float, nesterov: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the average gradients and Adam's updates, both bias corrected; the averages in the states move."""
    grads = [member.grad for member in members]
    exp_avgs = [member.state["exp_avg"] for member in members]
    exp_avg_sqs = [member.state["exp_avg_sq"] for member in members]
    torch._foreach_lerp_(exp_avgs, grads, 1 - betas[0])
    torch._foreach_mul_(exp_avg_sqs, betas[1])
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, value=1 - betas[1])
    filtered = torch._foreach_lerp(grads, exp_avgs, betas[0]) if nesterov else exp_avgs
    filtered = torch._foreach_div(filtered, 1 - betas[0] ** step)
    roots = torch._foreach_div(exp_avg_sqs, 1 - betas[1] ** step)
    torch._foreach_sqrt_(roots)
    torch._foreach_add_(roots, eps)
    return list(filtered), list(torch._foreach_div(filtered, roots))


def members_by_step(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], set_up: Callable[[Member], None]
) -> dict[int, list[Member]]:
    """Return the group's parameters that have a gradient, by the number of the step they take now.

    Counts the step. `set_up` fills the state of a parameter that comes for the first time.
    """
    members: dict[int, list[Member]] = {}
    for parameter, n_stacked in zip(group["params"], stacked_counts(group), strict=True):
        if parameter.grad is None:
            continue
        state = optimizer.state[parameter]
        tiles = tiles_of(tuple(parameter.shape), n_stacked, group["block_size"])
        grad = parameter.grad.to(parameter.dtype).contiguous()
        member = Member(parameter, grad, state, tiles)
        if not state:
            # On the CPU, as torch's Adam has it: read at each step, without waiting for a device.
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(grad)
            state["exp_avg_sq"] = torch.zeros_like(grad)
            set_up(member)
        state["step"] += 1
        members.setdefault(int(state["step"].item()), []).append(member)
    return members


def check_stacks(group: dict[str, Any]) -> None:
    """Raise UserError if a parameter's rows cannot be divided among its stacked matrices."""
    for parameter, n_stacked in zip(group["params"], stacked_counts(group), strict=True):
        shape = tuple(parameter.shape)
        if n_stacked < 1 or (shape[0] if shape else 1) % n_stacked:
            raise UserError(f"a parameter of shape {shape} does not hold {n_stacked} stacked matrices")


def blocked_cost(group: dict[str, Any], rows: int, cols: int, *, products: float) -> float:
    """Return `two_sided_cost` summed over the blocks of one matrix."""
    longest, roots = group["block_size"], (ROOT_PRODUCTS + 1) / group["precondition_frequency"]
    return sum(
        tile.n_blocks * two_sided_cost(*tile.shape, longest=longest, products=products, roots=roots)
        for tile in tiles_of((rows, cols), 1, longest)
    )


def eyes(tile: Tile, size: int, like: Tensor) -> Tensor:
    """Return one identity matrix per block of the tile."""
    return torch.eye(size, dtype=like.dtype, device=like.device).repeat(tile.n_blocks, 1, 1)


class DistributedShampoo(torch.optim.Optimizer):
    """Distributed Shampoo on one device, with all blocks of one shape of a group stacked.

    A parameter group may hold `n_stacked`, as for Muon: a fused (3C, C) weight with 3 is Q, K and V apart.

    State per parameter: `step`, `exp_avg` (m), `exp_avg_sq` (v), `momentum_buffer` if there is momentum, and
    for each shape of its blocks, numbered i, stacks `left_i`, `right_i` of the statistics and `left_root_i`,
    `right_root_i` of the roots. With blocks of S by S that is 4 numbers a weight besides m and v.

    Differs from the original in these: statistics have the parameter's dtype; negative eigenvalues are cut
    off at 0 where it lifts all of them by the lowest, and in fp32 those below 2e-7 of the largest are raised to
    that; small dimensions are not merged (it takes a matrix of at most 1,024 numbers for one vector); each
    parameter counts its own steps; `start_preconditioning_step` may be less than `precondition_frequency`. The
    submission has `precondition_frequency` 100 and `grafting_beta2` = betas[1]; of its five settings four have
    `use_nadam`, two `momentum`, and one an `inv_root_override` of 2 in place of 0.
    """

    skips_on_host = True

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        grafting_beta2: float | None = None,
        grafting_eps: float = 1e-8,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        use_nadam: bool = False,
        precondition_frequency: int = 20,
        start_preconditioning_step: int = -1,
        block_size: int = 1024,
        inv_root_override: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "grafting_beta2": grafting_beta2,
            "grafting_eps": grafting_eps,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "use_nadam": use_nadam,
            "precondition_frequency": precondition_frequency,
            "start_preconditioning_step": start_preconditioning_step,
            "block_size": block_size,
            "inv_root_override": inv_root_override,
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
        return blocked_cost(group, rows, cols, products=2)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; return what `closure` returns."""
        loss = loss_of(closure)
        for group in self.param_groups:
            for step, members in members_by_step(self, group, _set_up).items():
                self._step_members(group, members, step)
        return loss

    def _step_members(self, group: dict[str, Any], members: list[Member], step: int) -> None:
        beta2 = group["grafting_beta2"]
        filtered, directions = adam_directions(
            members,
            step,
            betas=(group["betas"][0], group["betas"][1] if beta2 is None else beta2),
            eps=group["grafting_eps"],
            nesterov=group["use_nadam"],
        )
        every, start = group["precondition_frequency"], group["start_preconditioning_step"]
        start = every if start < 0 else max(start, 1)
        for bucket in buckets_of(members):
            grad_KMN = bucket.gather([member.grad for member in members])
            _update_statistics(bucket, grad_KMN, 1 - group["betas"][1])
            if step == start or (step > start and step % every == 0):
                _update_roots(bucket, group, step)
            if step >= start:
                # Adam's blocks are read before Shampoo's are written over them.
                adam_KMN = bucket.gather(directions)
                bucket.scatter(_graft(_precondition(bucket, bucket.gather(filtered)), adam_KMN), directions)
        _apply(group, members, directions)


def _set_up(member: Member) -> None:
    for i, tile in enumerate(member.tiles):
        for side, size in zip(sides_of(member.parameter), tile.shape):
            member.state[f"{side}_{i}"] = member.parameter.new_zeros(tile.n_blocks, size, size)
            member.state[f"{side}_root_{i}"] = eyes(tile, size, member.parameter)


def _update_statistics(bucket: Bucket, grad_KMN: Tensor, weight: float) -> None:
    for side in bucket.sides:
        tall = grad_KMN if side == "left" else grad_KMN.mT
        bucket.average(side, torch.bmm(tall, tall.mT), weight)


def _update_roots(bucket: Bucket, group: dict[str, Any], step: int) -> None:
    power = group["inv_root_override"] or 2 * len(bucket.sides)
    for side in bucket.sides:
        corrected_KSS = bucket.load(side) / (1 - group["betas"][1] ** step)
        bucket.store(f"{side}_root", inverse_root(corrected_KSS, power, ridge=group["eps"]))


def _precondition(bucket: Bucket, filtered_KMN: Tensor) -> Tensor:
    """Return the filtered gradient between the roots."""
    direction_KMN = torch.bmm(bucket.load("left_root"), filtered_KMN)
    if "right" in bucket.sides:
        direction_KMN = torch.bmm(direction_KMN, bucket.load("right_root"))
    return direction_KMN


def _graft(direction_KMN: Tensor, adam_KMN: Tensor) -> Tensor:
    """Return each direction with the norm of Adam's update; works in the direction's memory."""
    norm_K11 = torch.linalg.vector_norm(direction_KMN, dim=(1, 2), keepdim=True).add_(TINY)
    return direction_KMN.mul_(torch.linalg.vector_norm(adam_KMN, dim=(1, 2), keepdim=True).div_(norm_K11))


def _apply(group: dict[str, Any], members: list[Member], directions: list[Tensor]) -> None:
    """Move the parameters; the decay passes through the momentum, as in the original."""
    parameters, momentum = [member.parameter for member in members], group["momentum"]
    if group["weight_decay"]:
        torch._foreach_add_(directions, parameters, alpha=group["weight_decay"])
    if momentum:
        for member in members:
            if "momentum_buffer" not in member.state:
                member.state["momentum_buffer"] = torch.zeros_like(member.grad)
        buffers = [member.state["momentum_buffer"] for member in members]
        torch._foreach_lerp_(buffers, directions, 1 - momentum)
        torch._foreach_lerp_(directions, buffers, momentum)
    torch._foreach_add_(parameters, directions, alpha=-group["lr"])


CLASS = DistributedShampoo
