"""A model that no device holds whole: each rank keeps a share of weights, gradients and optimizer state (FSDP2).

torch's `fully_shard` cuts every parameter along its rows. A block's weights are gathered for its forward and its
backward pass and let go after each; so are embeddings, head and last norm, which make one more unit. Gradients are
summed over the ranks as every micro-batch's backward pass goes, and only a rank's rows of the sum are kept.

The optimizers see plain tensors, and so stay what they are on one device. A module of nanorun/optim says with UNIT
what its update treats by itself:

- "entry": each number. Every rank updates its own rows.
- "parameter": each whole parameter, as Muon must. One rank owns it: it receives the rows of the gradient, updates
  a copy of the whole that it keeps with the state, and sends the rows back.

An algorithm without UNIT, such as Prodigy, whose step size depends on all parameters together, is refused.

Verified by tests: CPU and gloo, 2 and 4 ranks, torch 2.13. Not verified: CUDA, NCCL, several hosts, and so what a
device's memory holds and how gathering overlaps with work.

Shapes: R rows of a parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanorun.errors import UserError
from nanorun.model import GPT
from nanorun.optim.averaging import WeightAverage
from nanorun.optim.build import GroupRow, OptimizerSet, build_optimizers, entry_of, find_algorithm
from nanorun.optim.ownership import Item, assign_owners
from nanorun.training.distributed import Ranks

if TYPE_CHECKING:
    from nanorun.config import RunConfig


def applies(config: RunConfig, ranks: Ranks) -> bool:
    """Return whether the run's model is shared out; a single rank keeps it whole whatever the config says."""
    return config.train.shard == "fsdp" and ranks.n_ranks > 1


def new_model(config: RunConfig, vocab_size: int, device: torch.device, ranks: Ranks, precision: str) -> GPT:
    """Return the model that `GPT.initialise` would make, with this rank's rows on the device and nothing else.

    The host draws one parameter at a time, whole, so the weights do not depend on the number of ranks.
    Under "bf16" the blocks are gathered in bf16, as autocast would cast them, unless they hold a LayerNorm, whose
    weights autocast leaves in fp32; the rest is gathered in fp32. Under "bf16_master" all is gathered in bf16.
    Kept weights and summed gradients are fp32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    with torch.device("meta"):
        model = GPT(config.model, vocab_size)
    in_bf16 = precision == "bf16" and config.model.norm == "rmsnorm"
    mesh = init_device_mesh(device.type, (ranks.n_ranks,))
    for unit in (*model.blocks, model):
        low = precision == "bf16_master" or (in_bf16 and unit is not model)
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if low else None,
            reduce_dtype=torch.float32,
            # The residual stream and the rotary tables keep their dtype, as in a model that is not shared out.
            cast_forward_inputs=False,
        )
        fully_shard(unit, mesh=mesh, mp_policy=policy)
        assert isinstance(unit, FSDPModule)
        # The loss is divided by all of the step's tokens: gradients are summed, where FSDP would average. A plain
        # sum, because gloo cannot scale on the way.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    model.to_empty(device=device)

    def put_rows(parameter: Tensor, drawn: Tensor) -> None:
        rows(parameter).copy_(drawn[_rows_of(len(drawn), ranks.rank, ranks.n_ranks)])

    model.initialise(config.seed, put=put_rows)
    return model


def rows(tensor: Any) -> Tensor:
    """Return this rank's rows of a tensor, in its memory; the tensor itself where it is not shared out."""
    return tensor.detach().to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Any) -> Tensor:
    """Return a tensor put together from all ranks' rows, which all ranks must ask for; else the tensor itself."""
    return tensor.detach().full_tensor() if hasattr(tensor, "full_tensor") else tensor


def whole_weights(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """Return a copy on the CPU of the model's whole weights, or nothing unless `keep`; all ranks must ask for it."""
    weights: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        copy = whole(tensor)
        if keep:
            weights[name] = copy.detach().cpu() if copy is not tensor else tensor
    return weights


def norm_over_ranks(norm: Tensor, ranks: Ranks) -> Tensor:
    """Return the norm of all ranks' entries together, each rank giving the norm of its own."""
    # float64: the square of a norm that fp32 holds may not fit fp32.
    return ranks.sum_(norm.double().square()).sqrt().to(norm.dtype)


class Part(NamedTuple):
    """One parameter of the model, and what this rank's optimizer sees of it."""

    sharded: Tensor
    """The model's parameter, this rank's rows of it in memory."""
    seen: nn.Parameter
    """Those same rows, or the whole where this rank owns it, or no row where another does."""
    owner: int | None
    """The rank that updates the whole; None where each updates its rows."""


class _Seen(NamedTuple):
    """A stand-in for the model, from which optimizers are built."""

    model: GPT
    parts: Mapping[str, Part]

    def roles(self) -> dict[str, Any]:
        return self.model.roles()

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, part.seen) for name, part in self.parts.items())


def build_sharded(
    model: GPT,
    optim: Mapping[str, Mapping[str, Any]],
    average: WeightAverage | None,
    ranks: Ranks,
) -> ShardedOptimizers:
    """Return the optimizers of a model made by `new_model`; UserError where one needs all parameters together."""
    parts = _parts(model, optim, ranks)
    plain = build_optimizers(_Seen(model, parts), optim, average)
    return ShardedOptimizers(plain, model, list(parts.values()), ranks)


def _parts(model: GPT, optim: Mapping[str, Mapping[str, Any]], ranks: Ranks) -> dict[str, Part]:
    units = {name: unit_of(role.role, optim) for name, role in model.roles().items()}
    named = dict(model.named_parameters())
    owned = [name for name in named if units[name] == "parameter"]
    sizes = [(named[name].numel(), tuple(named[name].shape)) for name in owned]
    owners = assign_owners([Item(size, size, shape) for size, shape in sizes], ranks.n_ranks)
    owner = dict(zip(owned, owners, strict=True))
    parts = {}
    for name, parameter in named.items():
        seen = rows(parameter)
        if name in owner:
            # All ranks take part in putting it together, and the owner keeps it.
            full = whole(parameter)
            seen = full if owner[name] == ranks.rank else seen[:0].clone()
        parts[name] = Part(parameter, nn.Parameter(seen), owner.get(name))
    return parts


def unit_of(role: str, optim: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the UNIT of the algorithm that a role is mapped to."""
    name = optim.get(entry_of(role, optim), {}).get("name")
    if name is None:
        return "entry"  # build_optimizers says what is missing
    unit = getattr(find_algorithm(name).module, "UNIT", None)
    if unit not in ("entry", "parameter"):
        raise UserError(
            f'{name} cannot train a model that is shared out over ranks (train.shard = "fsdp"): it needs all '
            "parameters together, or does not say with UNIT what it treats by itself (docs/optimizers.md). Take "
            'another, such as adamw or muon, or train.shard = "none"'
        )
    return str(unit)


class ShardedOptimizers(OptimizerSet):
    """The optimizers of a sharded model: what they do to the parts is carried to the model's shards.

    `state_dict` and `load_state_dict` are this rank's alone; `whole_state` and `load_whole` are those of a run
    that is not shared out. All ranks must call each method alike.
    """

    def __init__(self, plain: OptimizerSet, model: GPT, parts: Sequence[Part], ranks: Ranks) -> None:
        super().__init__(plain.optimizers, plain.names, plain.average)
        self.model, self.parts, self.ranks = model, list(parts), ranks
        self.device = parts[0].seen.device
        self._part_of = {id(part.seen): part for part in parts}
        self._owned = [part for part in parts if part.owner is not None]
        self._whole_bytes = 0

    def step(self, skip: Tensor | None = None, *, send: bool = True) -> None:
        """Update all parameters from the gradients of the model's shards, as OptimizerSet.step; they always travel."""
        for part in self.parts:
            if part.owner is None and part.sharded.grad is not None:
                part.seen.grad = rows(part.sharded.grad)
        self._gradients_to_owners()
        super().step(skip, send=send)
        self._rows_from_owners()

    def zero_grad(self) -> None:
        """Drop all gradients, the shards' too."""
        super().zero_grad()
        for part in self.parts:
            part.sharded.grad = None

    def to_evaluation(self) -> None:
        """Put the weights that the run is judged by into the shards."""
        super().to_evaluation()
        if self.evaluates_other_weights:
            self._rows_from_owners()

    def to_training(self) -> None:
        """Put the trained weights back into the shards."""
        super().to_training()
        if self.evaluates_other_weights:
            self._rows_from_owners()
        # After a forward pass alone the root stays gathered, and would go on with the weights that were judged.
        self.model.reshard()  # type: ignore[operator]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore this rank's state; the weights, put back before, go from their owners to the shards."""
        super().load_state_dict(state)
        self._rows_from_owners()

    def table(self) -> list[GroupRow]:
        """Return one row per group, with the numbers of all ranks together."""
        sizes = [
            sum(self._part_of[id(p)].sharded.numel() for p in group["params"]) for group in self.groups()
        ]
        return [row._replace(parameters=size) for row, size in zip(super().table(), sizes, strict=True)]

    def whole_state(self) -> dict[str, Any]:
        """Return, on rank 0, the state dict of a run that is not shared out, on the CPU; elsewhere less of it."""
        state = self.state_dict()
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            entries = {
                k: self._whole_entry(part, saved["state"].get(k)) for k, part in self._numbered(optimizer)
            }
            saved["state"] = {k: entry for k, entry in entries.items() if entry}
        if state["average"]:
            state["average"] = self._mapped(state["average"], self._whole_value)
        self._whole_bytes = _n_bytes(state)
        return state

    def state_bytes(self) -> int:
        """Return, on rank 0, the bytes of all ranks' state as of the last `whole_state`; before it this rank's."""
        return self._whole_bytes or super().state_bytes()

    def load_whole(self, weights: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Restore weights by name and what `whole_state` returned, or an OptimizerSet's state_dict."""
        names = [name for name, _ in self.model.named_parameters()]
        if sorted(names) != sorted(weights):
            raise UserError("these weights are not this model's: resume with the config that wrote them")
        with torch.no_grad():
            for name, part in zip(names, self.parts, strict=True):
                rows(part.sharded).copy_(weights[name][self._slice(part, self.ranks.rank)])
                if part.owner is not None:
                    part.seen.copy_(self._own_value(part, weights[name]))
        optimizers = []
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            entries = {
                k: {key: self._own_value(part, value) for key, value in saved["state"][k].items()}
                for k, part in self._numbered(optimizer)
                if k in saved["state"] and part.owner in (None, self.ranks.rank)
            }
            optimizers.append({**saved, "state": entries})
        average = state.get("average") and self._mapped(state["average"], self._own_value)
        self.load_state_dict({**state, "optimizers": optimizers, "average": average})

    def _numbered(self, optimizer: torch.optim.Optimizer) -> Iterable[tuple[int, Part]]:
        """Return the parts of an optimizer by the numbers that its state dict gives them."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        return enumerate(self._part_of[id(p)] for p in parameters)

    def _whole_entry(self, part: Part, entry: dict[str, Any] | None) -> dict[str, Any] | None:
        if part.owner is not None:
            found: dict[str, Any] | None = self._from_owner(part, entry)
            return found
        return entry and {key: self._whole_value(part, value) for key, value in entry.items()}

    def _whole_value(self, part: Part, value: Any) -> Any:
        """Return the whole of a value that lies along a part's entries; any other value as it is."""
        if part.owner is not None:
            return self._from_owner(part, value)
        if not isinstance(value, Tensor) or value.shape != part.seen.shape:
            return _on_cpu(value)
        from torch.distributed.tensor import DTensor

        sharded: Any = part.sharded
        full = DTensor.from_local(
            value,
            sharded.device_mesh,
            sharded.placements,
            run_check=False,
            shape=sharded.shape,
            stride=sharded.stride(),
        ).full_tensor()
        return full.cpu() if self.ranks.leads else None

    def _from_owner(self, part: Part, value: Any) -> Any:
        """Return, on rank 0, the owner's value, its tensors on the CPU."""
        box = [_on_cpu(value) if part.owner == self.ranks.rank else None]
        assert part.owner is not None
        dist.broadcast_object_list(box, src=part.owner, device=self.device)
        return box[0] if self.ranks.leads else None

    def _own_value(self, part: Part, value: Any) -> Any:
        """Return this rank's part of a whole value that lies along a part's entries; any other as it is."""
        if (
            not isinstance(value, Tensor)
            or value.shape != part.sharded.shape
            or part.owner == self.ranks.rank
        ):
            return value
        # A copy, which does not keep the whole in memory.
        return value[self._slice(part, self.ranks.rank) if part.owner is None else slice(0)].clone()

    def _mapped(self, average: Mapping[str, Any], change: Callable[[Part, Any], Any]) -> dict[str, Any]:
        """Return an average's state with each snapshot changed, tensor by tensor."""
        parts = [self._part_of[id(parameter)] for parameter in self.parameters()]

        def mapped(value: Any) -> Any:
            if not isinstance(value, list):
                return value
            if value and isinstance(value[0], list):
                return [mapped(snapshot) for snapshot in value]
            return [change(part, tensor) for part, tensor in zip(parts, value, strict=True)] if value else []

        return {key: mapped(value) for key, value in average.items()}

    def _gradients_to_owners(self) -> None:
        """Give each owner the whole gradients of what it owns, put together from all ranks' rows."""
        if not self._owned:
            return
        every, mine = range(self.ranks.n_ranks), self._owned_by(self.ranks.rank)
        send = [[rows(part.sharded.grad) for part in self._owned_by(rank)] for rank in every]
        received = _exchange(
            send, [[self._shape(part, rank) for part in mine] for rank in every], self.device
        )
        for part, *pieces in zip(mine, *received, strict=True):
            part.seen.grad = torch.cat(pieces)

    @torch.no_grad()
    def _rows_from_owners(self) -> None:
        """Give each rank its rows of what others, and it itself, own."""
        if not self._owned:
            return
        every, rank = range(self.ranks.n_ranks), self.ranks.rank
        mine = self._owned_by(rank)
        send = [[part.seen[self._slice(part, other)] for part in mine] for other in every]
        received = _exchange(
            send, [[self._shape(part, rank) for part in self._owned_by(o)] for o in every], self.device
        )
        for owner, pieces in enumerate(received):
            for part, piece in zip(self._owned_by(owner), pieces, strict=True):
                rows(part.sharded).copy_(piece)

    def _owned_by(self, rank: int) -> list[Part]:
        return [part for part in self._owned if part.owner == rank]

    def _slice(self, part: Part, rank: int) -> slice:
        return _rows_of(part.sharded.size(0), rank, self.ranks.n_ranks)

    def _shape(self, part: Part, rank: int) -> torch.Size:
        """Return the shape of a rank's rows of a part."""
        kept = self._slice(part, rank)
        return torch.Size((kept.stop - kept.start, *part.sharded.shape[1:]))


def _exchange(
    send: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[torch.Size]], device: torch.device
) -> list[list[Tensor]]:
    """Return the tensors that came from each rank, in those shapes, for the fp32 ones that were sent to each."""
    # A rank that owns nothing still sends nothing.
    flat = torch.cat([torch.empty(0, device=device), *(t.flatten() for tensors in send for t in tensors)])
    sizes = [[shape.numel() for shape in some] for some in shapes]
    received = torch.empty(sum(map(sum, sizes)), device=device)
    dist.all_to_all_single(
        received, flat, [sum(some) for some in sizes], [sum(t.numel() for t in tensors) for tensors in send]
    )
    pieces = iter(received.split([size for some in sizes for size in some]))
    return [[next(pieces).view(shape) for shape in some] for some in shapes]


def _rows_of(n_rows: int, rank: int, n_ranks: int) -> slice:
    """Return the rows that a rank keeps, as torch.chunk deals them out: the last ranks may have fewer, or none."""
    size = -(-n_rows // n_ranks)
    return slice(min(rank * size, n_rows), min((rank + 1) * size, n_rows))


def _n_bytes(value: Any) -> int:
    """Return the bytes of all tensors in nested containers."""
    if isinstance(value, Mapping):
        return sum(map(_n_bytes, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(_n_bytes, value))
    return value.nbytes if isinstance(value, Tensor) else 0


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _on_cpu(one) for key, one in value.items()}
    return value.detach().cpu() if isinstance(value, Tensor) else value
