"""Ranks: who this process is, how gradients are averaged and how all agree on one time."""

from __future__ import annotations

import os
import re
import secrets
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from nanorun.errors import RankLost, RunFailed, Stopped, UserError, first_line
from nanorun.optim.ownership import Pending
from nanorun.training.watch import DONE, LOST, PATIENCE, Watch, hang_seconds

MEETING_SECONDS = 300.0
"""How long the ranks wait for one another at the start, which one of them may spend importing."""

_watch: Watch | None = None


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

    def moved(self, step: int | None = None) -> None:
        """Note that this rank comes past a mark that every rank comes past, the beginning of `step` perhaps."""
        if _watch is not None:
            _watch.moved(step)

    def works(self) -> None:
        """Note that this rank is at work, in what the others may have more or less of."""
        if _watch is not None:
            _watch.works()

    def warmed_up(self, seconds: float) -> None:
        """Note what the passes and the update of a warm-up took: a micro-batch may take as long."""
        if _watch is not None:
            _watch.warmed_up(seconds)

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add `tensor` up over all ranks, in place."""
        if self.n_ranks > 1:
            self.moved()
            dist.all_reduce(tensor)
            self.moved()
        return tensor

    def slowest(self, seconds: float) -> float:
        """Return the largest of all ranks' seconds."""
        if self.n_ranks == 1:
            return seconds
        largest = torch.tensor(seconds, dtype=torch.float64, device=_collective_device())
        self.moved()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        highest = float(largest)
        self.moved()
        return highest

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
        self.moved()
        dist.broadcast_object_list(box, src=0, device=_collective_device())
        self.moved()
        return str(box[0])

    def start_sum(self, tensor: torch.Tensor) -> Pending:
        """Begin to add `tensor` up over all ranks, in place."""
        self.moved()
        return dist.all_reduce(tensor, async_op=True)

    def broadcast(self, tensor: torch.Tensor, source: int) -> Pending:
        """Begin to write rank `source`'s tensor into every rank's."""
        self.moved()
        return dist.broadcast(tensor, source, async_op=True)

    def gather(self, thing: Any) -> list[Any]:
        """Return what each rank gave, by rank; it travels pickled."""
        if self.n_ranks == 1:
            return [thing]
        things: list[Any] = [None] * self.n_ranks
        self.moved()
        dist.all_gather_object(things, thing)
        self.moved()
        return things


def join(device_type: str) -> Ranks:
    """Return this process's place, joining the others when torchrun set the environment for it."""
    global _watch
    n_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if n_ranks == 1:
        return Ranks()
    if "RANK" not in os.environ:
        raise UserError(
            f"WORLD_SIZE is {n_ranks} and RANK is not set: start many ranks with torchrun, or unset WORLD_SIZE"
        )
    ranks = Ranks(int(os.environ["RANK"]), n_ranks, int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        _watch = _join(ranks, device_type, hang_seconds())
    return ranks


def _join(ranks: Ranks, device_type: str, patience: float) -> Watch:
    """Return the watch over the ranks after making them one process group."""
    try:
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=MEETING_SECONDS)))
        prefix = _meet(store, ranks)
        # A connection of its own: the watch must not wait behind what the process group asks the store.
        own = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=MEETING_SECONDS),
        )
        watch = Watch(dist.PrefixStore(f"{prefix}/watch", own), ranks.rank, ranks.n_ranks, patience)
        dist.init_process_group(
            "nccl" if device_type == "cuda" else "gloo",
            store=dist.PrefixStore(prefix, store),
            rank=ranks.rank,
            world_size=ranks.n_ranks,
            # The watch speaks first, and names the rank.
            timeout=timedelta(seconds=patience * (PATIENCE + 1)) if patience else timedelta(days=7),
            device_id=torch.device("cuda", torch.cuda.current_device()) if device_type == "cuda" else None,
        )
    except ValueError as error:
        raise UserError(f"the ranks can't meet ({error}): start them with torchrun") from None
    except RuntimeError as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RunFailed(
            f"rank {ranks.rank} of {ranks.n_ranks} did not get to the others by way of {place} ({_reason(error)}). "
            "Between hosts, GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names the network interface to use"
        ) from None
    watch.begin()
    return watch


def _meet(store: dist.Store, ranks: Ranks) -> str:
    """Return a prefix for keys of the store that only the ranks that are started now share.

    torchrun keeps one store over its restarts, where keys of ranks that are dead stand for those of ranks that are
    yet to come (pytorch issue 135712: NCCL and gloo then connect to nobody), and its count of restarts differs
    between hosts. So every rank puts down a word that was never used, and the first one answers that word: nobody
    dead can have.
    """
    word, place = secrets.token_hex(8), "nanorun/here"
    if ranks.rank:
        store.set(f"{place}/{ranks.rank}", word)
        answer = f"nanorun/answer/{word}"
        store.wait([answer], timedelta(seconds=MEETING_SECONDS))
        prefix = store.get(answer).decode()
        store.set(f"{prefix}/joined/{ranks.rank}", "")
        return prefix
    prefix, answered = f"nanorun/{word}", set[bytes]()
    missing = set(range(1, ranks.n_ranks))
    last = time.monotonic() + MEETING_SECONDS
    while missing:
        for rank in list(missing):
            if store.check([f"{prefix}/joined/{rank}"]):
                missing.remove(rank)
            elif store.check([f"{place}/{rank}"]):
                found = store.get(f"{place}/{rank}")
                if found not in answered:
                    store.set(f"nanorun/answer/{found.decode()}", prefix)
                    answered.add(found)
        if missing and time.monotonic() > last:
            raise RunFailed(
                f"{len(missing)} of {ranks.n_ranks} ranks did not come within {MEETING_SECONDS:.0f} s: "
                f"{', '.join(map(str, sorted(missing)[:8]))}"
            )
        time.sleep(0.02)
    return prefix


def tell_phase(phase: Callable[[], str]) -> None:
    """Let the watch ask what the main thread is at: `train`, or what takes longer than a step may."""
    if _watch is not None:
        _watch.phase = phase


@contextmanager
def taking_part() -> Iterator[None]:
    """Leave the process group at the end, if there is one, and tell the other ranks why where they can't know.

    Raises RankLost that names the rank in place of the error that another rank's end made.
    """
    try:
        yield
    except Stopped:
        leave()
        _stop_torchrun()
        raise
    except BaseException as error:
        lost = ""
        if _watch is not None and _may_come_of_another_rank(error):
            # torchrun, which has seen it too, ends this rank by SIGTERM: first it says whose end it was.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            lost = _watch.lost()
        leave(LOST if lost else f"{type(error).__name__}: {_reason(error)}")
        if lost:
            raise RankLost(f"{lost} (seen from rank {os.environ['RANK']}: {_reason(error)})") from None
        raise
    leave()


def leave(ending: str = DONE) -> None:
    """Leave the process group, if there is one: after all others if this rank is done, at once if it failed."""
    global _watch
    if _watch is not None:
        _watch.end(ending)
        _watch = None
    if dist.is_initialized() and ending == DONE:
        dist.destroy_process_group()


def _may_come_of_another_rank(error: BaseException) -> bool:
    """Return whether a collective may have failed: what it raises may have been made another error since."""
    if isinstance(error, RunFailed):
        return False
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, RuntimeError):
        cause = cause.__cause__ or cause.__context__
    return cause is not None


def _stop_torchrun() -> None:
    """Ask the torchrun that started this rank to end, once a run has stopped because it was asked to.

    It takes exit code 75 for a failure like others, and would start the ranks again while it has restarts left.
    """
    if not _torchrun_is_parent():
        return
    # It passes the signal on to its ranks, which are about to say how to go on.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    restarts, allowed = (int(os.environ[f"TORCHELASTIC_{key}"]) for key in ("RESTART_COUNT", "MAX_RESTARTS"))
    if os.environ["LOCAL_RANK"] == "0" and restarts < allowed:
        os.kill(os.getppid(), signal.SIGTERM)


def _torchrun_is_parent() -> bool:
    """Return whether torchrun started this very process, and not a shell or program that a rank started."""
    mark = "TORCHELASTIC_RUN_ID"
    if mark not in os.environ:
        return False
    try:
        # What torchrun sets for its ranks it does not have itself, and what they start inherits it.
        return mark not in psutil.Process(os.getppid()).environ()
    except (psutil.Error, OSError):
        return False


def _reason(error: BaseException) -> str:
    """Return an error in one sentence; gloo's begin with a place in its source and end with advice."""
    line = first_line(error)
    return re.sub(r"^\[\S+:\d+\] ", "", line).partition(". ")[0][:300]


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
