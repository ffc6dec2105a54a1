"""Muon: momentum, orthogonalised by Newton–Schulz, for the matrices between embedding and head.

Keller Jordan et al., https://kellerjordan.github.io/posts/muon/; the scale rule `match_rms_adamw` and the
decoupled decay from "Muon is Scalable for LLM Training", arXiv:2502.16982; the coefficient sets from the papers
named in matrix_functions.py; the cautious decay from arXiv:2510.12402; NorMuon's rows from arXiv:2510.05491.
This implementation is nanorun's.

Shapes: K matrices of M rows and N columns in a stack; P parameters, each of `n_stacked` matrices.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanorun.errors import UserError
from nanorun.optim.closures import loss_of
from nanorun.optim.matrix_functions import (
    COEFFICIENTS,
    cache_sized,
    dtype_of_products,
    newton_schulz,
    newton_schulz_cost,
    shape_groups,
)
from nanorun.optim.options import REQUIRED, Option, Variant

SUMMARY = "Momentum whose singular values are all brought near 1; for matrices, beside AdamW for the rest."
PAPER = "https://kellerjordan.github.io/posts/muon/, arXiv:2502.16982"
SOURCE = "nanorun"
ROLES = ("matrix",)
UNIT = "parameter"
OPTIONS = {
    "lr": Option(REQUIRED, "learning rate", low=0.0),
    "momentum": Option(
        0.95, "weight of the past in the average gradient", low=0.0, high=1.0, below_high=True
    ),
    "nesterov": Option(True, "look ahead: average the gradient once more with the momentum"),
    "weight_decay": Option(0.0, "decay per step is lr times this", low=0.0),
    "cautious_weight_decay": Option(False, "decay only the entries that the update shrinks as well"),
    "ns_steps": Option(
        5, "Newton–Schulz steps; the rescaling of turbo and schatten is the first of them", low=1, high=20
    ),
    "coefficients": Option(
        "original", "polynomials of the Newton–Schulz steps, and how they start", choices=tuple(COEFFICIENTS)
    ),
    "scale_rule": Option(
        "original",
        "size of the update: √max(1, rows/cols), or 0.2·√max(rows, cols) to share AdamW's lr",
        choices=("original", "match_rms_adamw"),
    ),
    "momentum_warmup_steps": Option(0, "steps over which momentum rises from momentum_start", low=0),
    "momentum_start": Option(
        0.85, "momentum at the first step of its warm-up", low=0.0, high=1.0, below_high=True
    ),
    "momentum_cooldown_start": Option(
        0, "step after which momentum falls: the run's steps less momentum_cooldown_steps", low=0
    ),
    "momentum_cooldown_steps": Option(0, "steps over which momentum falls to momentum_end", low=0),
    "momentum_end": Option(0.85, "momentum at the end of its cool-down", low=0.0, high=1.0, below_high=True),
    "normalize_rows": Option(False, "divide each row by the root of its average mean square (NorMuon)"),
    "beta2": Option(
        0.95, "weight of the past in the rows' average mean square", low=0.0, high=1.0, below_high=True
    ),
    "eps": Option(1e-30, "Frobenius norm below which a gradient counts as noise", low=0.0),
    "triton_products": Option(
        False,
        "on CUDA, half of each symmetric product by a Triton kernel; unmeasured, see scripts/gpu_suite.py",
    ),
}
VARIANTS = {
    "normuon": Variant(
        "Muon whose rows, one per neuron, are divided by the root of their average mean square.",
        "arXiv:2510.05491",
        held={"normalize_rows": True},
        defaults={"scale_rule": "match_rms_adamw"},
    ),
}

ROW_EPS = 1e-10
"""Added to the root of a row's average mean square, as in NorMuon's own code, so that a row of zeros stays one."""


def orthogonal_momentum(
    grad_KMN: Tensor,
    momentum_KMN: Tensor,
    momentum: float | Tensor,
    *,
    nesterov: bool,
    ns_steps: int,
    coefficients: str,
    eps: float,
    triton: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the new momentum and the orthogonalised update, both KMN; `momentum` is a number or K11.

    The memory of `grad_KMN` is used up.
    """
    momentum_KMN = torch.lerp(momentum_KMN, grad_KMN, 1 - momentum)
    update_KMN = grad_KMN.lerp_(momentum_KMN, momentum) if nesterov else momentum_KMN
    orthogonal_KMN = newton_schulz(
        update_KMN,
        steps=ns_steps,
        coefficients=COEFFICIENTS[coefficients],
        eps=eps,
        overwrite=nesterov,
        triton=triton,
    )
    return momentum_KMN, orthogonal_KMN


@functools.cache
def compiled_momentum(backend: str = "inductor") -> Callable[..., tuple[Tensor, Tensor]]:
    """Return `orthogonal_momentum` compiled, one graph for each shape of stack; `momentum` must be a tensor.

    As a number it would be a constant of the graph, which another value compiles anew.
    """

    def kept(grad_KMN: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        # The compiler drops this copy, and would else write what is left in the gradient's memory back to it.
        return orthogonal_momentum(grad_KMN.clone(), *arguments, **options)

    return torch.compile(kept, dynamic=False, backend=backend)


def update_scale(scale_rule: str, rows: int, cols: int) -> float:
    """Return what an orthogonal update of this shape is multiplied by before lr."""
    if scale_rule == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, cols))
    return math.sqrt(max(1.0, rows / cols))


def normalize_rows(
    update_KMN: Tensor, mean_square_KM1: Tensor, beta2: float, *, norm: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return the rows' new average mean square, KM1, and the update with each row divided by its root.

    The whole is then scaled to the Frobenius norm `norm`, or to the one it had. So a bias correction of the
    average would cancel, and there is none. The memory of `update_KMN` is used up.
    """
    square_KM1 = torch.linalg.vector_norm(update_KMN, dim=2, keepdim=True).square_()
    mean_square_KM1 = torch.lerp(mean_square_KM1, square_KM1 / update_KMN.size(2), 1 - beta2)
    scale_KM1 = 1 / (mean_square_KM1.sqrt() + ROW_EPS)
    new_norm_K11 = (square_KM1 * scale_KM1.square()).sum(dim=1, keepdim=True).sqrt_().clamp_(min=ROW_EPS)
    norm_K11 = square_KM1.sum(dim=1, keepdim=True).sqrt_() if norm is None else norm
    return mean_square_KM1, update_KMN.mul_(scale_KM1 * (norm_K11 / new_norm_K11))


def with_cautious_decay(update_KMN: Tensor, parameter_KMN: Tensor, decay: float) -> Tensor:
    """Return the update plus `decay` times the parameter, added only where the two do not differ in sign."""
    same_sign_KMN = update_KMN * parameter_KMN >= 0
    return torch.where(same_sign_KMN, update_KMN.add(parameter_KMN, alpha=decay), update_KMN)


class _Matrix(NamedTuple):
    """Views of one matrix, its gradient and its state, and the parameter that they are parts of."""

    parameter: Tensor
    grad: Tensor
    momentum: Tensor
    mean_square: Tensor | None
    owner: Tensor


class Muon(torch.optim.Optimizer):
    """Muon on stacks: matrices of one shape and group go through Newton–Schulz together, as the cache allows.

    A parameter group may hold `n_stacked`: how many matrices lie on top of each other in its parameters (one
    number, or a list with one per parameter). A fused (3C, C) weight with 3 is treated as Q, K and V apart,
    the scale rule included.

    `coefficients` names the set of COEFFICIENTS that the Newton–Schulz steps use; newton_schulz says how near
    to UVᵀ each comes. The first step of `turbo` and `schatten` is a rescaling without a product of its own: they are
    a step cheaper, and `schatten` with `ns_steps` = 4 is about as near as `polar_express` with 5, at 0.6 of the work.

    Momentum rises linearly from `momentum_start` over the first `momentum_warmup_steps` and falls linearly to
    `momentum_end` over the `momentum_cooldown_steps` that follow step `momentum_cooldown_start`. An optimizer
    does not know how long a run is, so the start is given: modded-nanogpt's 50 last steps of a run of T are
    `momentum_cooldown_start` = T - 50 and `momentum_cooldown_steps` = 50.

    `cautious_weight_decay` decays an entry only where update and parameter do not differ in sign, that is
    where the update shrinks it as well.

    `normalize_rows` is NorMuon: each row is divided by the root of its average mean square over the steps. Then
    the whole is scaled: under `match_rms_adamw` to a root mean square of 0.2, which is the paper's rule; under
    `original` to the norm it had before, as its authors' code does. modded-nanogpt's version differs: it takes
    the columns instead of the rows where there are more of them.

    State per parameter: `momentum_buffer`, an exponential average as in torch.optim.Muon; `exp_avg_sq`, one
    number a row, only under `normalize_rows`; `step` only where momentum changes. If `found_inf` is set to a
    tensor on the parameters' device, an update for which it is not zero changes neither parameters nor state,
    without the host waiting for it.

    On CUDA a step runs compiled code where `compiled` is set (OptimizerSet.compile), and `triton_products` acts there
    alone.
    """

    supports_found_inf = True
    compiled = False

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        cautious_weight_decay: bool = False,
        ns_steps: int = 5,
        coefficients: str = "original",
        scale_rule: str = "original",
        momentum_warmup_steps: int = 0,
        momentum_start: float = 0.85,
        momentum_cooldown_start: int = 0,
        momentum_cooldown_steps: int = 0,
        momentum_end: float = 0.85,
        normalize_rows: bool = False,
        beta2: float = 0.95,
        eps: float = 1e-30,
        triton_products: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "cautious_weight_decay": cautious_weight_decay,
            "ns_steps": ns_steps,
            "coefficients": coefficients,
            "scale_rule": scale_rule,
            "momentum_warmup_steps": momentum_warmup_steps,
            "momentum_start": momentum_start,
            "momentum_cooldown_start": momentum_cooldown_start,
            "momentum_cooldown_steps": momentum_cooldown_steps,
            "momentum_end": momentum_end,
            "normalize_rows": normalize_rows,
            "beta2": beta2,
            "eps": eps,
            "triton_products": triton_products,
            "n_stacked": 1,
        }
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, with the defaults for options that the state's groups do not know yet."""
        super().__setstate__(state)
        for group in self.param_groups:
            for option, default in self.defaults.items():
                group.setdefault(option, default)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group after checking its options, and that it holds matrices divisible by their `n_stacked`."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        start, warmup_steps = group["momentum_cooldown_start"], group["momentum_warmup_steps"]
        if group["momentum_cooldown_steps"] and start < max(1, warmup_steps):
            raise UserError(
                f"momentum_cooldown_steps = {group['momentum_cooldown_steps']} needs a momentum_cooldown_start of "
                f"at least {max(1, warmup_steps)}, after momentum has risen, and it is {start}: give it the run's "
                "steps less momentum_cooldown_steps"
            )
        for parameter, n_stacked in zip(group["params"], stacked_counts(group), strict=True):
            shape = tuple(parameter.shape)
            if parameter.ndim != 2:
                raise UserError(
                    f"Muon takes matrices and was given a parameter of shape {shape}: give the roles "
                    "embedding, head and vector to another optimizer, such as adamw"
                )
            if n_stacked < 1 or shape[0] % n_stacked:
                raise UserError(f"a parameter of shape {shape} does not hold {n_stacked} stacked matrices")

    @staticmethod
    def cost_of(group: dict[str, Any], rows: int, cols: int) -> float:
        """Return the multiply-adds of one matrix's Newton–Schulz steps; see ownership.py."""
        dtype = dtype_of_products(group["params"][0])
        polynomials = COEFFICIENTS[group["coefficients"]].for_steps(group["ns_steps"])
        return newton_schulz_cost(rows, cols, max(1, len(polynomials)), dtype=dtype)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; return what `closure` returns."""
        loss = loss_of(closure)
        found_inf = getattr(self, "found_inf", None)
        for group in self.param_groups:
            self._step_group(group, None if found_inf is None else found_inf != 0)
        return loss

    def _step_group(self, group: dict[str, Any], skip: Tensor | None) -> None:
        matrices = self._matrices(group)
        if not matrices:
            return
        owners = list({id(matrix.owner): matrix.owner for matrix in matrices}.values())
        if not group["cautious_weight_decay"]:
            self._decay(group, owners, skip)
        for indices in shape_groups([matrix.parameter for matrix in matrices]):
            for piece in cache_sized(indices, matrices[indices[0]].parameter):
                self._step_stack(group, [matrices[i] for i in piece], skip)
        if _momentum_changes(group):
            steps = [self.state[owner]["step"] for owner in owners]
            # One tensor many times: of a single one torch may read the value on the host.
            torch._foreach_add_(steps, 1.0 if skip is None else [(~skip).float()] * len(steps))

    def _step_stack(self, group: dict[str, Any], stack: list[_Matrix], skip: Tensor | None) -> None:
        """Update matrices of one shape."""
        parameters = [matrix.parameter for matrix in stack]
        old_KMN = torch.stack([matrix.momentum for matrix in stack])
        momentum, orthogonal = self._momentum(group, stack), orthogonal_momentum
        triton = group["triton_products"] and old_KMN.is_cuda
        if triton:
            importlib.import_module("nanorun.optim.symmetric_products")
        if self.compiled and old_KMN.is_cuda:
            orthogonal = compiled_momentum()
            if not isinstance(momentum, Tensor):
                momentum = torch.full((), momentum, dtype=old_KMN.dtype, device=old_KMN.device)
        new_KMN, update_KMN = orthogonal(
            torch.stack([matrix.grad for matrix in stack]),
            old_KMN,
            momentum,
            nesterov=group["nesterov"],
            ns_steps=group["ns_steps"],
            coefficients=group["coefficients"],
            eps=group["eps"],
            triton=triton,
        )
        _write([matrix.momentum for matrix in stack], old_KMN, new_KMN, skip)
        rows, cols = update_KMN.shape[1:]
        if group["normalize_rows"]:
            kept = [matrix.mean_square for matrix in stack if matrix.mean_square is not None]
            old_KM1 = torch.stack(kept)
            # 0.2·√max(rows, cols) times this norm is the paper's 0.2·√(rows·cols).
            norm = math.sqrt(min(rows, cols)) if group["scale_rule"] == "match_rms_adamw" else None
            new_KM1, update_KMN = normalize_rows(update_KMN, old_KM1, group["beta2"], norm=norm)
            _write(kept, old_KM1, new_KM1, skip)
        size = update_scale(group["scale_rule"], rows, cols)
        if group["cautious_weight_decay"] and group["weight_decay"]:
            decay = group["weight_decay"] / size
            update_KMN = with_cautious_decay(update_KMN, torch.stack(parameters), decay)
        if skip is not None:
            update_KMN = update_KMN.masked_fill_(skip, 0.0)
        torch._foreach_add_(parameters, list(update_KMN.unbind()), alpha=-group["lr"] * size)

    def _matrices(self, group: dict[str, Any]) -> list[_Matrix]:
        """Return every matrix that has a gradient, with its state, which is made where it is missing."""
        matrices = []
        for parameter, n_stacked in zip(group["params"], stacked_counts(group), strict=True):
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            if group["normalize_rows"] and "exp_avg_sq" not in state:
                state["exp_avg_sq"] = torch.zeros_like(parameter[:, :1])
            if _momentum_changes(group):
                # A loaded step count may lie on the CPU; elsewhere this moves nothing.
                step = state.get("step", torch.zeros((), dtype=torch.float32))
                state["step"] = step.to(parameter.device)
            parts = (parameter, parameter.grad.to(parameter.dtype), state["momentum_buffer"])
            views = [part.chunk(n_stacked) for part in parts]
            squares = state["exp_avg_sq"].chunk(n_stacked) if group["normalize_rows"] else [None] * n_stacked
            matrices += [_Matrix(p, g, m, s, parameter) for p, g, m, s in zip(*views, squares, strict=True)]
        return matrices

    def _decay(self, group: dict[str, Any], owners: list[Tensor], skip: Tensor | None) -> None:
        keep = 1 - group["lr"] * group["weight_decay"]
        if keep == 1:
            return
        if skip is None:
            torch._foreach_mul_(owners, keep)
        else:
            # The dtype in which the scalar path multiplies, so that both give the same bits.
            dtype = torch.promote_types(owners[0].dtype, torch.float32)
            factor = torch.full((), keep, dtype=dtype, device=skip.device).masked_fill_(skip, 1.0)
            torch._foreach_mul_(owners, factor)

    def _momentum(self, group: dict[str, Any], stack: list[_Matrix]) -> float | Tensor:
        """Return the momentum, or that of each matrix at its parameter's step, K11, on the device."""
        if not _momentum_changes(group):
            return group["momentum"]
        dtype = stack[0].parameter.dtype
        step_K = torch.stack([self.state[matrix.owner]["step"] for matrix in stack])
        step_K = step_K.to(torch.promote_types(dtype, torch.float32))
        momentum_K = torch.full_like(step_K, group["momentum"])
        if group["momentum_warmup_steps"]:
            progress_K = (step_K / group["momentum_warmup_steps"]).clamp(max=1.0)
            momentum_K = group["momentum_start"] + (group["momentum"] - group["momentum_start"]) * progress_K
        if group["momentum_cooldown_steps"]:
            fallen_K = (step_K - group["momentum_cooldown_start"]) / group["momentum_cooldown_steps"]
            momentum_K = momentum_K - (group["momentum"] - group["momentum_end"]) * fallen_K.clamp(0.0, 1.0)
        return momentum_K[:, None, None].to(dtype)


def _momentum_changes(group: dict[str, Any]) -> bool:
    return group["momentum_warmup_steps"] > 0 or group["momentum_cooldown_steps"] > 0


def _write(targets: list[Tensor], old_K: Tensor, new_K: Tensor, skip: Tensor | None) -> None:
    """Copy the new state into its tensors; the old one where `skip`."""
    if skip is not None:
        # Selected, not multiplied: 0 times NaN is NaN.
        new_K = torch.where(skip, old_K, new_K)
    torch._foreach_copy_(targets, list(new_K.unbind()))


def stacked_counts(group: dict[str, Any]) -> list[int]:
    """Return how many matrices each parameter of the group holds."""
    n_stacked = group["n_stacked"]
    if isinstance(n_stacked, int):
        return [n_stacked] * len(group["params"])
    if len(n_stacked) != len(group["params"]):
        raise UserError(f"n_stacked lists {len(n_stacked)} numbers for {len(group['params'])} parameters")
    return list(n_stacked)


CLASS = Muon
