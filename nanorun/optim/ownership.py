"""Who updates which parameter: each rank its own, which the others then receive.

An optimizer shares its work if it has `cost_of(group, rows, cols)`: the cost of one step on one matrix, in
multiply-adds. With it the class promises that what a step does to a parameter depends on that parameter, its
gradient and its state alone, that state is made with a parameter's first gradient, and that a parameter without a
gradient is left alone. A rank then takes the gradients of the others' parameters away before the step, so that
neither their arithmetic is done nor their state exists there.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from nanorun.optim.muon import stacked_counts


class Pending(Protocol):
    """Something on its way."""

    def wait(self) -> Any: ...


class Peers(Protocol):
    """The ranks that share the work (nanorun.training.distributed.Ranks)."""

    @property
    def rank(self) -> int: ...
    @property
    def n_ranks(self) -> int: ...
    def broadcast(self, tensor: Tensor, source: int) -> Pending:
        """Begin to write rank `source`'s tensor into every rank's."""

    def gather(self, thing: Any) -> list[Any]:
        """Return what each rank gave, by rank."""


class Item(NamedTuple):
    """Something to be dealt out."""

    cost: float
    size: int
    """How much room it takes, on which its state depends."""
    kind: Hashable
    """Items of one kind are cheaper together."""


def assign_owners(items: Sequence[Item], n_ranks: int) -> list[int]:
    """Return the rank that each item belongs to, the same on all ranks: the dearest first, to the least loaded.

    So no rank bears more than 4/3 of what the best deal's most loaded one does (Graham 1969). Items of one kind
    stay together where no rank bears more for it than the most loaded one otherwise, in cost and in size.
    """
    numbers = {kind: number for number, kind in enumerate(dict.fromkeys(item.kind for item in items))}
    order = sorted(range(len(items)), key=lambda i: (-items[i].cost, numbers[items[i].kind], i))
    dealt, most = _deal(items, order, n_ranks, most=(0.0, 0.0))
    together, most_together = _deal(items, order, n_ranks, most=most)
    return together if all(one <= other for one, other in zip(most_together, most)) else dealt


def _deal(
    items: Sequence[Item], order: Sequence[int], n_ranks: int, *, most: tuple[float, float]
) -> tuple[list[int], tuple[float, float]]:
    """Return owners, and the largest cost and size of a rank.

    An item goes to the rank with most of its kind among those that then bear at most `most`, else to the least
    loaded.
    """
    costs, sizes = [0.0] * n_ranks, [0.0] * n_ranks
    counts: dict[tuple[int, Hashable], int] = {}
    owners = [0] * len(items)
    for i in order:
        cost, size, kind = items[i]
        fitting = [
            rank
            for rank in range(n_ranks)
            if (rank, kind) in counts and costs[rank] + cost <= most[0] and sizes[rank] + size <= most[1]
        ]
        if fitting:
            owner = max(fitting, key=lambda rank: (counts[rank, kind], -rank))
        else:
            owner = min(range(n_ranks), key=lambda rank: (costs[rank], rank))
        costs[owner] += cost
        sizes[owner] += size
        counts[owner, kind] = counts.get((owner, kind), 0) + 1
        owners[i] = owner
    return owners, (max(costs), max(sizes))


def cost_of_parameter(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: Tensor, n_stacked: int
) -> float:
    """Return what a step on the parameter costs; a vector counts as a matrix of one column."""
    rows = parameter.size(0) // n_stacked if parameter.ndim else 1
    cols = max(1, parameter.numel()) // max(1, rows * n_stacked)
    return n_stacked * float(optimizer.cost_of(group, rows, cols))  # type: ignore[attr-defined]


class _Parcel(NamedTuple):
    """One owner's parameters of one dtype on their way."""

    pending: Pending
    flat: Tensor
    targets: list[Tensor]
    """Where they are to be written; nothing on the rank that sends."""

    @torch.no_grad()
    def receive(self) -> None:
        """Wait for them, and write them where they belong."""
        self.pending.wait()
        if self.targets:
            parts = self.flat.split([target.numel() for target in self.targets])
            views = [part.view_as(target) for part, target in zip(parts, self.targets)]
            torch._foreach_copy_(self.targets, views)


class _Outline(NamedTuple):
    """A tensor of some rank's state, as the others need to know it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _outline(value: Any) -> Any:
    return _Outline(tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value


class Sharing:
    """The parameters of those optimizers that can share, dealt out over the ranks."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], peers: Peers) -> None:
        self.peers = peers
        self.shared = [one for one in optimizers if can_share(one)]
        members = [
            (
                parameter,
                Item(
                    cost_of_parameter(optimizer, group, parameter, count),
                    parameter.numel(),
                    (tuple(parameter.shape), count),
                ),
            )
            for optimizer in self.shared
            for group in optimizer.param_groups
            for parameter, count in zip(
                group["params"], stacked_counts({"n_stacked": 1, **group}), strict=True
            )
        ]
        owners = assign_owners([item for _, item in members], peers.n_ranks)
        self.owner_of = {id(parameter): owner for (parameter, _), owner in zip(members, owners)}
        self.loads = [0.0] * peers.n_ranks
        """What each rank's parameters cost a step, in the unit of `cost_of`."""
        for (_, item), owner in zip(members, owners):
            self.loads[owner] += item.cost
        self._bytes_elsewhere: dict[int, int] = {}

    def bytes_elsewhere(self) -> int:
        """Return the bytes of state that other ranks alone hold, as of the last `whole_state` of each optimizer."""
        return sum(self._bytes_elsewhere.values())

    def owns(self, parameter: Tensor) -> bool:
        """Whether this rank updates the parameter."""
        return self.owner_of[id(parameter)] == self.peers.rank

    def drop_others_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Leave the optimizer the gradients of this rank's own parameters alone."""
        for parameter in parameters_of(optimizer):
            if not self.owns(parameter):
                parameter.grad = None

    @torch.no_grad()
    def send(self, optimizer: torch.optim.Optimizer) -> list[_Parcel]:
        """Begin to send each owner's parameters to the others, in the same order on all ranks."""
        parcels = []
        for (owner, _), members in self._by_owner(optimizer).items():
            if owner == self.peers.rank:
                flat, targets = torch.cat([parameter.flatten() for parameter in members]), []
            else:
                flat, targets = members[0].new_empty(sum(one.numel() for one in members)), members
            parcels.append(_Parcel(self.peers.broadcast(flat, owner), flat, targets))
        return parcels

    def _by_owner(self, optimizer: torch.optim.Optimizer) -> dict[tuple[int, torch.dtype], list[Tensor]]:
        found: dict[tuple[int, torch.dtype], list[Tensor]] = {}
        for parameter in parameters_of(optimizer):
            found.setdefault((self.owner_of[id(parameter)], parameter.dtype), []).append(parameter)
        return found

    def whole_state(
        self, optimizer: torch.optim.Optimizer, own: Mapping[int, dict[str, Any]]
    ) -> dict[int, Any]:
        """Return on rank 0 the state of all parameters by their numbers, elsewhere `own`; all ranks must call it.

        `own` is this rank's part. The others' arrives on the CPU, tensor by tensor, by the collective that
        updates use, so that no device needs room for the whole.
        """
        outlines = {
            number: {key: _outline(value) for key, value in state.items()} for number, state in own.items()
        }
        device = parameters_of(optimizer)[0].device
        whole, elsewhere = dict(own), 0
        for owner, outline in enumerate(self.peers.gather(outlines)):
            for number, entries in outline.items():
                mine = own[number] if owner == self.peers.rank else {}
                state = {
                    key: self._travelled(entry, mine.get(key), owner, device)
                    for key, entry in entries.items()
                }
                if owner != self.peers.rank:
                    elsewhere += sum(
                        entry.nbytes for entry in entries.values() if isinstance(entry, _Outline)
                    )
                    if self.peers.rank == 0:
                        whole[number] = state
        self._bytes_elsewhere[id(optimizer)] = elsewhere
        return dict(sorted(whole.items()))

    def _travelled(self, entry: Any, own: Tensor | None, owner: int, device: torch.device) -> Any:
        """Return what the owner has under an outline, on the CPU where this rank is another."""
        if not isinstance(entry, _Outline):
            return entry
        tensor = torch.empty(entry.shape, dtype=entry.dtype, device=device) if own is None else own
        # A step count may lie on the CPU, and NCCL carries nothing from there.
        tensor = tensor.to(device).contiguous()
        self.peers.broadcast(tensor, owner).wait()
        return tensor.cpu() if own is None and self.peers.rank == 0 else own

    def own_part(self, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> dict[str, Any]:
        """Return a whole optimizer's saved state with the states of this rank's parameters alone."""
        mine = {number for number, parameter in enumerate(parameters_of(optimizer)) if self.owns(parameter)}
        return {
            **saved,
            "state": {number: state for number, state in saved["state"].items() if number in mine},
        }


def can_share(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether each rank may update a part of the parameters."""
    # One with modes moves all parameters in eval() too, and for that needs the state of all.
    has_modes = hasattr(optimizer, "eval") and hasattr(optimizer, "train")
    return hasattr(optimizer, "cost_of") and not has_modes


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the parameters of all groups, numbered as in the optimizer's state_dict."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
