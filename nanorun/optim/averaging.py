"""Averages of the weights that a run is judged by, around any optimizer.

LAWA: Kaddour 2022, "Stop Wasting My Time! Saving Days of ImageNet and BERT Training with Latest Weight
Averaging", arXiv:2209.14981. The run trains on with the raw weights; the average is a reading of them.
Around a schedule-free optimizer it averages y, where the gradients are taken, in place of that one's own x.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nanorun.errors import UserError, nearest

KINDS = ("none", "queue", "ema")


class WeightAverage:
    """An average of snapshots of the weights, one taken every `every_steps` steps from `from_step` on."""

    kind = ""

    def __init__(self, *, every_steps: int, from_step: int = 0) -> None:
        self.every_steps, self.from_step = every_steps, from_step

    def after_step(self, done: int, parameters: Sequence[Tensor]) -> None:
        """Take a snapshot if one is due after `done` finished steps."""
        if done >= self.from_step and done % self.every_steps == 0:
            self.take(parameters)

    def take(self, parameters: Sequence[Tensor]) -> None:
        """Take a snapshot of the weights now."""
        raise NotImplementedError

    def copy_to(self, parameters: Sequence[Tensor]) -> None:
        """Write the average into the parameters; before the first snapshot they stay as they are."""
        raise NotImplementedError

    def tensors(self) -> list[Tensor]:
        """Return all memory that the average holds."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, plain containers and tensors."""
        raise NotImplementedError

    def load_state_dict(self, state: Mapping[str, Any], parameters: Sequence[Tensor]) -> None:
        """Restore what `state_dict` returned, on the parameters' device; UserError where it fits no longer."""
        raise NotImplementedError


class QueueAverage(WeightAverage):
    """The mean of the last `snapshots` snapshots: LAWA as in the paper, `lawa_queue` in AlgoPerf.

    It holds 4 · snapshots bytes a parameter in fp32. Until the queue is full it is the mean of those there are,
    where AlgoPerf's submission evaluates the raw weights.
    """

    kind = "queue"

    def __init__(self, *, snapshots: int, every_steps: int, from_step: int = 0) -> None:
        super().__init__(every_steps=every_steps, from_step=from_step)
        self.snapshots = snapshots
        self.queue: list[list[Tensor]] = []

    @torch.no_grad()
    def take(self, parameters: Sequence[Tensor]) -> None:
        if len(self.queue) == self.snapshots:
            # The oldest one's memory is used again.
            oldest = self.queue.pop(0)
            torch._foreach_copy_(oldest, list(parameters))
            self.queue.append(oldest)
        else:
            self.queue.append([parameter.detach().clone() for parameter in parameters])

    @torch.no_grad()
    def copy_to(self, parameters: Sequence[Tensor]) -> None:
        if not self.queue:
            return
        mean = [tensor.clone() for tensor in self.queue[0]]
        for snapshot in self.queue[1:]:
            torch._foreach_add_(mean, snapshot)
        torch._foreach_div_(mean, float(len(self.queue)))
        torch._foreach_copy_(list(parameters), mean)

    def tensors(self) -> list[Tensor]:
        return [tensor for snapshot in self.queue for tensor in snapshot]

    def state_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "queue": [list(snapshot) for snapshot in self.queue]}

    def load_state_dict(self, state: Mapping[str, Any], parameters: Sequence[Tensor]) -> None:
        _check_kind(self, state)
        self.queue = [_fitted(snapshot, parameters) for snapshot in state.get("queue", [])]


class EmaAverage(WeightAverage):
    """The exponential average of the snapshots: after n of them a · Σ βⁿ⁻ⁱ wᵢ with a = (1 − β) / (1 − βⁿ).

    The first factor makes the weights add up to 1, as Adam's bias correction does, so the first snapshots count
    no more than later ones. AlgoPerf's `lawa_ema` submission meant β = 0.2 and rounded it to the whole number 0,
    so it evaluated the newest snapshot; this one takes β as it is given. It holds 4 bytes a parameter in fp32.
    """

    kind = "ema"

    def __init__(self, *, beta: float, every_steps: int, from_step: int = 0) -> None:
        super().__init__(every_steps=every_steps, from_step=from_step)
        self.beta, self.taken = beta, 0
        self.mean: list[Tensor] = []

    @torch.no_grad()
    def take(self, parameters: Sequence[Tensor]) -> None:
        self.taken += 1
        if not self.mean:
            self.mean = [parameter.detach().clone() for parameter in parameters]
        else:
            share = (1 - self.beta) / (1 - self.beta**self.taken)
            torch._foreach_lerp_(self.mean, list(parameters), share)

    @torch.no_grad()
    def copy_to(self, parameters: Sequence[Tensor]) -> None:
        if self.mean:
            torch._foreach_copy_(list(parameters), self.mean)

    def tensors(self) -> list[Tensor]:
        return list(self.mean)

    def state_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "mean": list(self.mean), "taken": self.taken}

    def load_state_dict(self, state: Mapping[str, Any], parameters: Sequence[Tensor]) -> None:
        _check_kind(self, state)
        self.mean = _fitted(state["mean"], parameters) if state.get("mean") else []
        self.taken = int(state.get("taken", 0))


def make_average(
    kind: str, *, snapshots: int, beta: float, every_steps: int, from_step: int
) -> WeightAverage | None:
    """Return the average of that kind, None for "none"."""
    if kind == "none":
        return None
    if kind == "queue":
        return QueueAverage(snapshots=snapshots, every_steps=every_steps, from_step=from_step)
    if kind == "ema":
        return EmaAverage(beta=beta, every_steps=every_steps, from_step=from_step)
    raise UserError(f"average.kind = {kind!r}: wanted one of {', '.join(KINDS)}.{nearest(kind, list(KINDS))}")


def _check_kind(average: WeightAverage, state: Mapping[str, Any]) -> None:
    if state and state["kind"] != average.kind:
        raise UserError(
            f"this state holds an average of kind {state['kind']!r}, and the run has {average.kind!r}: resume with "
            "the config that wrote it"
        )


def _fitted(saved: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    shapes = [tuple(tensor.shape) for tensor in saved]
    if shapes != [tuple(parameter.shape) for parameter in parameters]:
        raise UserError("the saved average does not fit this model: resume with the config that wrote it")
    return [tensor.to(device=p.device, dtype=p.dtype, copy=True) for tensor, p in zip(saved, parameters)]
