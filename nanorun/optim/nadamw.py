"""NAdamW: Adam with Nesterov's look-ahead and decoupled weight decay, AlgoPerf's baseline.

With gradient g at step t and the averages of Adam, m ← β₁m + (1−β₁)g and v ← β₂v + (1−β₂)g²:

    n = (β₁m + (1−β₁)g) / (1−β₁ᵗ)          the look-ahead: m averaged with g once more
    p ← p·(1 − lr·weight_decay) − lr·n / ((v / (1−β₂ᵗ))^(1/power) + ε)

Table 1 of arXiv:1910.05446, with the decay of AdamW. torch.optim.NAdam is another algorithm: Dozat's, whose
momentum rises by a schedule of its own, β₁(1 − ½·0.96^(0.004t)), whose two parts of n are corrected by products
of that schedule, and whose weight decay goes into the gradient unless told otherwise.

The options beyond AdamW's are those of two AlgoPerf submissions of 2024, `nadamp` and `generalized_adam`; this
implementation is nanorun's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanorun.optim.closures import loss_of
from nanorun.optim.options import REQUIRED, Option, Variant

SUMMARY = "AdamW with Nesterov's look-ahead in place of the plain average gradient; AlgoPerf's baseline."
PAPER = "arXiv:1910.05446, table 1; decay arXiv:1711.05101"
SOURCE = "nanorun"
ROLES = ("embedding", "head", "matrix", "vector")
UNIT = "entry"
OPTIONS = {
    "lr": Option(REQUIRED, "learning rate", low=0.0),
    "betas": Option(
        (0.9, 0.999), "weight of the past in the two averages", low=0.0, high=1.0, below_high=True
    ),
    "eps": Option(1e-8, "added to the root, outside it", low=0.0),
    "weight_decay": Option(0.01, "decay per step is lr times this", low=0.0),
    "power": Option(2.0, "p: the average square is raised to the power 1/p", low=1.0),
    "nesterov": Option(True, "look ahead: average the gradient once more with the momentum"),
    "bias_correction": Option(
        "always",
        "divide the average gradient by 1 − β₁ᵗ always, or under nesterov alone",
        choices=("always", "nesterov_only"),
    ),
    "disable_preconditioning": Option(
        False, "momentum alone: sum gradients with weights β₁ᵏ, divide by no root (lr as for sgd)"
    ),
}
VARIANTS = {
    "nadamp": Variant(
        "NAdamW with the average square to the power 1/p in place of the root.",
        "AlgoPerf v0.5 submission nadamp",
        held={"bias_correction": "nesterov_only", "disable_preconditioning": False},
        # The one value besides 2 among the five points that the submission tries.
        defaults={"power": 1.5},
    ),
    "generalized_adam": Variant(
        "NAdamW that may drop the look-ahead, with its bias correction, or the division by the root.",
        "AlgoPerf v0.5 submission generalized_adam",
        held={"bias_correction": "nesterov_only", "power": 2.0},
    ),
}

TILE_ELEMENTS = {"cpu": 2**19, "cuda": 2**23}
"""Elements of the parameters that go through all passes of the update before the next ones do.

On the CPU the second pass then finds gradient and momentum in the cache: half a million fp32 elements are 8 MiB
over the four tensors. On CUDA this bounds the memory of the passing copies, to 64 MiB. See `tiles`."""


class Slot(NamedTuple):
    """One parameter, or a piece of one, with all that its update reads and writes."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    """Steps with the present one, 0-dim."""


Columns = Sequence[list[Tensor]]
"""Slots turned on their side: five lists, of parameters, of gradients and so on."""


def plain_update(
    slots: Columns,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    power: float = 2.0,
    nesterov: bool = True,
    bias_correction: str = "always",
    skip: Tensor | None = None,
) -> None:
    """Update parameters and state in place by the formula, pass after pass: the reference, with all options.

    Where `skip` (0-dim bool) is true nothing changes.
    """
    params, grads, exp_avgs, exp_avg_sqs, steps = slots
    beta1, beta2 = betas
    # In float64: in float32, 1 − 0.999 alone is wrong in the fifth digit.
    step_P = torch.stack(steps).double()
    new_exp_avgs = torch._foreach_lerp(exp_avgs, grads, 1 - beta1)
    new_exp_avg_sqs = torch._foreach_mul(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(new_exp_avg_sqs, grads, grads, value=1 - beta2)
    denominators = torch._foreach_div(new_exp_avg_sqs, list((1 - beta2**step_P).unbind()))
    if power == 2.0:
        torch._foreach_sqrt_(denominators)
    else:
        torch._foreach_pow_(denominators, 1 / power)
    torch._foreach_add_(denominators, eps)
    numerators = torch._foreach_lerp(new_exp_avgs, grads, 1 - beta1) if nesterov else new_exp_avgs
    if nesterov or bias_correction == "always":
        numerators = torch._foreach_div(numerators, list((1 - beta1**step_P).unbind()))
    new_params = torch._foreach_mul(params, 1 - lr * weight_decay)
    torch._foreach_addcdiv_(new_params, numerators, denominators, value=-lr)
    _replace(params, new_params, skip)
    _replace(exp_avgs, new_exp_avgs, skip)
    _replace(exp_avg_sqs, new_exp_avg_sqs, skip)


def fused_update(
    slots: Columns,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    skip: Tensor | None = None,
) -> None:
    """Update in place as `plain_update` does with its default options, by torch's fused AdamW.

    That kernel averages g into what it is given as m and steps along the result: given a copy of the new m, it
    steps along the look-ahead.
    """
    params, grads, exp_avgs, exp_avg_sqs, steps = slots
    ahead = torch._foreach_lerp(exp_avgs, grads, 1 - betas[0])
    _replace(exp_avgs, ahead, skip)
    torch._fused_adamw_(
        params,
        grads,
        ahead,
        exp_avg_sqs,
        [],
        steps,
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
        # The kernel heeds the number 1 alone.
        found_inf=None if skip is None else skip.float(),
    )


def fused_update_without_copy(
    slots: Columns, count: float, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> None:
    """Update as `fused_update` does, one pass over the memory shorter; all slots are at step `count`.

    The look-ahead is β₁²m + (1−β₁²)g of the old m, so the kernel leaves it in m's place when told β₁²; then
    m = (ahead − (1−β₁)g) / β₁ puts the momentum back. The division makes an error of rounding 1/β₁ times
    larger and the next average β₁ times smaller, so errors die out as they do in Adam. Where β₁ is below a half
    or the numbers shorter than fp32, though, the stored m would lose digits that count.
    """
    params, grads, exp_avgs, exp_avg_sqs, steps = slots
    beta1, beta2 = betas
    # The kernel corrects by 1 − β₁²ᵗ and should by 1 − β₁ᵗ: their ratio goes into lr, and out of the decay.
    ratio = 1 + beta1**count
    torch._fused_adamw_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        lr=lr * ratio,
        beta1=beta1 * beta1,
        beta2=beta2,
        weight_decay=weight_decay / ratio,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )
    torch._foreach_lerp_(exp_avgs, grads, 1 - 1 / beta1)


def momentum_update(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    skip: Tensor | None = None,
) -> None:
    """Update in place by momentum alone: buffer ← momentum·buffer + g, as torch.optim.SGD's."""
    new_buffers = torch._foreach_mul(buffers, momentum)
    torch._foreach_add_(new_buffers, grads)
    new_params = torch._foreach_mul(params, 1 - lr * weight_decay)
    torch._foreach_add_(new_params, new_buffers, alpha=-lr * (momentum if nesterov else 1.0))
    if nesterov:
        torch._foreach_add_(new_params, grads, alpha=-lr)
    _replace(params, new_params, skip)
    _replace(buffers, new_buffers, skip)


def _replace(old: list[Tensor], new: list[Tensor] | tuple[Tensor, ...], skip: Tensor | None) -> None:
    """Write the new values over the old ones, or where `skip` leave these as they are."""
    if skip is None:
        torch._foreach_copy_(old, new)
        return
    for old_value, new_value in zip(old, new, strict=True):
        # Selected, not multiplied: 0 times NaN is NaN.
        old_value.copy_(torch.where(skip, old_value, new_value))


def tiles(slots: Iterable[Slot], limit: int) -> Iterator[Columns]:
    """Yield all slots in columns of about `limit` elements a list, a multiple of 16.

    A parameter of up to twice the limit makes a tile of its own, a larger one is cut into flat pieces that do:
    a cut takes the CPU about 30 µs for four views, with the interpreter pushed out of the cache, and so must
    not be small. A parameter that is not contiguous, or whose gradient or state is not, stays whole.
    """
    tile: list[Slot] = []
    size = 0
    for slot in slots:
        elements = slot.param.numel()
        if elements > 2 * limit and is_contiguous(slot):
            # Equal pieces, each beginning on a cache line.
            pieces = math.ceil(elements / (2 * limit))
            length = math.ceil(elements / (16 * pieces)) * 16
            for piece in zip(*(tensor.view(-1).split(length) for tensor in slot[:4]), strict=True):
                yield [*([part] for part in piece), [slot.step]]
            continue
        if tile and size + elements > limit:
            yield [list(column) for column in zip(*tile, strict=True)]
            tile, size = [], 0
        tile.append(slot)
        size += elements
    if tile:
        yield [list(column) for column in zip(*tile, strict=True)]


def is_contiguous(slot: Slot) -> bool:
    """Return whether element i of the flat parameter meets element i of its gradient and of its state."""
    return (
        slot.param.is_contiguous()
        and slot.grad.is_contiguous()
        and slot.exp_avg.is_contiguous()
        and slot.exp_avg_sq.is_contiguous()
    )


def by_way(slots: Iterable[Slot], group: dict[str, Any]) -> dict[tuple[Any, ...], list[Slot]]:
    """Return the slots by the way to update them, step count where that matters, device and dtype.

    The ways are "plain", "fused" and "fused without copy".
    """
    fused = group["nesterov"] and group["power"] == 2.0
    found: dict[tuple[Any, ...], list[Slot]] = {}
    for slot in slots:
        device, dtype = slot.param.device, slot.param.dtype
        way, count = "plain", 0.0
        # The kernel walks through memory: in two layouts it would pair the wrong elements.
        if fused and device.type in TILE_ELEMENTS and dtype.is_floating_point and is_contiguous(slot):
            way = "fused"
            if device.type == "cpu" and dtype.itemsize >= 4 and group["betas"][0] >= 0.5:
                way, count = "fused without copy", slot.step.item()
        found.setdefault((way, count, device, dtype), []).append(slot)
    return found


class NAdamW(torch.optim.Optimizer):
    """NAdamW on torch's fused AdamW kernel where the options allow it, else by plain passes.

    State per parameter: `step`, `exp_avg` and `exp_avg_sq` as in torch.optim.AdamW; `momentum_buffer` alone
    under `disable_preconditioning`. If `found_inf` is set to a tensor on the parameters' device, an update for
    which it is not zero changes neither parameters nor state, without the host waiting for it.
    """

    supports_found_inf = True

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        power: float = 2.0,
        nesterov: bool = True,
        bias_correction: str = "always",
        disable_preconditioning: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "power": power,
            "nesterov": nesterov,
            "bias_correction": bias_correction,
            "disable_preconditioning": disable_preconditioning,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; return what `closure` returns."""
        loss = loss_of(closure)
        found_inf = getattr(self, "found_inf", None)
        skip = None if found_inf is None else found_inf != 0
        if skip is not None and skip.device.type == "cpu":
            # The host knows already.
            if skip:
                return loss
            skip = None
        for group in self.param_groups:
            if group["disable_preconditioning"]:
                self._step_momentum(group, skip)
            else:
                self._step_adam(group, skip)
        return loss

    def _step_adam(self, group: dict[str, Any], skip: Tensor | None) -> None:
        slots = self._slots(group)
        if not slots:
            return
        torch._foreach_add_([slot.step for slot in slots], 1.0 if skip is None else (~skip).float())
        options = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
        others = {name: group[name] for name in ("power", "nesterov", "bias_correction")}
        for (way, count, device, _), members in by_way(slots, group).items():
            for tile in tiles(members, TILE_ELEMENTS.get(device.type, 2**24)):
                if way == "plain":
                    plain_update(tile, **options, **others, skip=skip)
                elif way == "fused":
                    fused_update(tile, **options, skip=skip)
                else:
                    fused_update_without_copy(tile, count, **options)

    def _slots(self, group: dict[str, Any]) -> list[Slot]:
        """Return a slot for each parameter with a gradient, its state made if there was none."""
        slots = []
        for param in group["params"]:
            if param.grad is None:
                continue
            state = self.state[param]
            if "exp_avg" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
                state["exp_avg"] = torch.zeros_like(param)
                state["exp_avg_sq"] = torch.zeros_like(param)
            if state["step"].device != param.device:
                # A loaded step count may lie on the CPU.
                state["step"] = state["step"].to(param.device)
            grad = param.grad if param.grad.dtype == param.dtype else param.grad.to(param.dtype)
            slots.append(Slot(param, grad, state["exp_avg"], state["exp_avg_sq"], state["step"]))
        return slots

    def _step_momentum(self, group: dict[str, Any], skip: Tensor | None) -> None:
        params = [param for param in group["params"] if param.grad is not None]
        if not params:
            return
        for param in params:
            if "momentum_buffer" not in self.state[param]:
                self.state[param]["momentum_buffer"] = torch.zeros_like(param)
        momentum_update(
            params,
            [param.grad.to(param.dtype) for param in params],
            [self.state[param]["momentum_buffer"] for param in params],
            lr=group["lr"],
            momentum=group["betas"][0],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            skip=skip,
        )


CLASS = NAdamW
