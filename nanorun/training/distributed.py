"""Ranks: who this process is, how gradients are averaged and how all agree on one time."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from nanorun.errors import UserError
from nanorun.optim.ownership import Pending


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started; one rank when nobody started more."""

    rank: int = 0
    n_ranks: int = 1
    local_rank: int = 0

    @property
    def leads(self) -> bool:
        """Whether this rank prints and writes."""
        return self.rank == 0

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add `tensor` up over all ranks, in place."""
        if self.n_ranks > 1:
            dist.all_reduce(tensor)
        return tensor

    def slowest(self, seconds: float) -> float:
        """Return the largest of all ranks' seconds."""
        if self.n_ranks == 1:
            return seconds
        largest = torch.tensor(seconds, dtype=torch.float64, device=_collective_device())
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return float(largest)

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank."""
        return self.slowest(float(flag)) > 0

    def wait(self) -> None:
        """Wait for all ranks: at the end of a pause, so that nobody's waiting counts as training."""
        self.any(False)

    def broadcast_text(self, text: str) -> str:
        """Return rank 0's text."""
        if self.n_ranks == 1:
            return text
        box = [text]
        dist.broadcast_object_list(box, src=0, device=_collective_device())
        return str(box[0])

    def start_sum(self, tensor: torch.Tensor) -> Pending:
        """Begin to add `tensor` up over all ranks, in place."""
        return dist.all_reduce(tensor, async_op=True)

    def broadcast(self, tensor: torch.Tensor, source: int) -> Pending:
        """Begin to write rank `source`'s tensor into every rank's."""
        return dist.broadcast(tensor, source, async_op=True)

    def gather(self, thing: Any) -> list[Any]:
        """Return what each rank gave, by rank; it travels pickled."""
        if self.n_ranks == 1:
            return [thing]
        things: list[Any] = [None] * self.n_ranks
        dist.all_gather_object(things, thing)
        return things


def join(device_type: str) -> Ranks:
    """Return this process's place, joining the others when torchrun set the environment for it."""
    n_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if n_ranks == 1:
        return Ranks()
    if "RANK" not in os.environ:
        raise UserError(
            f"WORLD_SIZE is {n_ranks} and RANK is not set: start many ranks with torchrun, or unset WORLD_SIZE"
        )
    ranks = Ranks(int(os.environ["RANK"]), n_ranks, int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    return ranks


def leave() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def pick_device(name: str) -> torch.device:
    """Return the device of `auto`, `cpu`, `cuda` or `cuda:N`; raises UserError if it is not there."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise UserError(f"--device {name!r}: wanted auto, cpu, cuda or cuda:N")
    if kind == "cpu":
        return torch.device("cpu")
    n_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    wanted = int(index) if index else local_rank
    if wanted >= n_devices:
        raise UserError(
            f"--device {name}: this machine shows {n_devices} CUDA devices, and device {wanted} was wanted; "
            "use --device cpu, or see `nanorun doctor`"
        )
    device = torch.device("cuda", wanted)
    torch.cuda.set_device(device)
    return device


def _collective_device() -> torch.device:
    on_gpu = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
