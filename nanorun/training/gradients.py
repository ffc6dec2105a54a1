"""Gradients added up over the ranks while the backward pass goes on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from nanorun.optim.ownership import Pending
from nanorun.training.distributed import Ranks

BUCKET_BYTES = 25 * 2**20
"""Bytes of gradients that travel together: what torch's DistributedDataParallel sends by default."""


class GradientSum:
    """Adds up the gradients of all ranks, in buckets that leave as soon as they are full.

    The buckets are fixed: all parameters from the last to the first, which is about the order in which a backward
    pass is done with them. They leave in that order, whatever the order is in which they fill, so all ranks send
    the same one next, and the same number of ranks gives the same bits again. Code that is compiled as a whole
    hands over all gradients at its end, and then nothing overlaps.
    """

    def __init__(
        self, parameters: Iterable[Parameter], ranks: Ranks, *, bucket_bytes: int = BUCKET_BYTES
    ) -> None:
        self.ranks = ranks
        self.buckets = make_buckets(list(parameters), bucket_bytes) if ranks.n_ranks > 1 else []
        self._missing: list[int] = []
        """How many gradients each bucket waits for."""
        self._sent: list[_Sent] = []

    @contextmanager
    def travelling(self) -> Iterator[None]:
        """Send each bucket when the backward pass within has made its last gradient: the step's last pass."""
        self._sent, self._missing = [], [len(bucket) for bucket in self.buckets]
        # For this pass alone: hooks that stay would hold on to the model, and count the passes before.
        hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._made, number))
            for number, bucket in enumerate(self.buckets)
            for parameter in bucket
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _made(self, number: int, parameter: Tensor) -> None:
        self._missing[number] -= 1
        assert self._missing[number] >= 0, "a gradient was made twice in one pass"
        while len(self._sent) < len(self.buckets) and not self._missing[len(self._sent)]:
            self._send()

    @torch.no_grad()
    def _send(self) -> None:
        """Begin to add up the next bucket; its gradients are gone until `finish`."""
        bucket = self.buckets[len(self._sent)]
        grads = [parameter.grad for parameter in bucket]
        # What has no gradient keeps its place, so that a bucket is as long on every rank.
        flat = torch.cat(
            [(torch.zeros_like(one) if grad is None else grad).flatten() for one, grad in zip(bucket, grads)]
        )
        for parameter in bucket:
            parameter.grad = None
        self._sent.append(_Sent(self.ranks.start_sum(flat), flat, [grad is not None for grad in grads]))

    def finish(self, numbers: Tensor) -> None:
        """Send what is left, add `numbers` up over the ranks too, in place, and wait for all of it."""
        if self.ranks.n_ranks == 1:
            return
        while len(self._sent) < len(self.buckets):
            self._send()
        numbers_pending = self.ranks.start_sum(numbers)
        for bucket, sent in zip(self.buckets, self._sent, strict=True):
            sent.pending.wait()
            parts = sent.flat.split([parameter.numel() for parameter in bucket])
            for parameter, part, had_grad in zip(bucket, parts, sent.had_grad, strict=True):
                parameter.grad = part.view_as(parameter) if had_grad else None
        numbers_pending.wait()
        self._sent = []  # the gradients alone hold on to the memory


class _Sent(NamedTuple):
    """A bucket on its way."""

    pending: Pending
    flat: Tensor
    had_grad: list[bool]


def make_buckets(parameters: list[Parameter], bucket_bytes: int) -> list[list[Parameter]]:
    """Return the parameters from the last to the first, cut where the dtype changes or `bucket_bytes` are full."""
    buckets: list[list[Parameter]] = []
    room, dtype = 0, None
    for parameter in reversed(parameters):
        if not parameter.requires_grad:
            continue
        if parameter.nbytes > room or parameter.dtype != dtype:
            buckets.append([])
            room, dtype = bucket_bytes, parameter.dtype
        buckets[-1].append(parameter)
        room -= parameter.nbytes
    return buckets
