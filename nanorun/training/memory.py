"""What a run holds in memory, found by running its own code.

The model, the optimizers and two steps are gone through three ways, by the same lines of code:

- on stand-ins for tensors, which have shapes and no memory: the prediction. Nothing of the model's size is allocated,
  and nobody has to remember to change a formula when the model changes. What a kernel takes inside itself is not seen.
- for real, with the CPU allocator's own events (torch.profiler) or the statistics of CUDA's: the measurement.
- for real with a stopwatch.

Each goes by marks, and reads at a mark what is held and the most that was held since the one before.
"""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import psutil
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from nanorun.config import RunConfig
from nanorun.data.batches import token_set
from nanorun.errors import UserError
from nanorun.model import CHEAPEST_FIRST, GPT, Recomputed
from nanorun.optim.averaging import make_average
from nanorun.optim.build import build_optimizers
from nanorun.optim.ownership import parameters_of
from nanorun.training.clock import now
from nanorun.training.distributed import Ranks
from nanorun.training.feed import Span
from nanorun.training.step import Stepper

HEADROOM = 0.1
"""Share of the memory at hand that `auto` leaves free, for what the allocator loses and kernels take inside."""
TOKENS_OF_A_FULL_PASS_CUDA = 16384
"""A pass of so many tokens keeps a GPU busy: a micro-batch is cut down to them before anything is computed again."""
_PREFIX = "nanorun memory: "
_aten: Any = torch.ops.aten


class Reading(NamedTuple):
    """What is held at a mark, and the most that was held since the one before, in bytes."""

    live: int
    peak: int


class Meter(Protocol):
    """Something that reads memory, or the clock, at marks."""

    def mark(self, name: str) -> None: ...


class Foreseen(TorchDispatchMode):
    """Counts what tensors would hold, where operations run on stand-ins for them."""

    def __init__(self) -> None:
        super().__init__()
        self.readings: dict[str, Reading] = {}
        self._live = self._peak = 0
        self._seen: dict[int, weakref.ref[Any]] = {}

    def mark(self, name: str) -> None:
        self.readings[name] = Reading(self._live, self._peak)
        self._peak = self._live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [one for one in tree_iter((args, kwargs)) if isinstance(one, Tensor)]
        out: Any
        if func is _aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return _as_read_by_the_host(args[0])
        if func is _aten._embedding_bag_backward.default:
            args = _with_the_bag_of_each(args)
        if func in _OF_SPARSE and given[0].is_sparse:
            out = _with_as_many_rows(func, given[0])
        elif func in _WITH_UNKNOWN_SHAPES:
            out = _as_large_as_can_be(func, args[0])
        elif _is_a_counter(given, args, kwargs):
            with no_dispatch():
                out = func(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        if func is _aten.bitwise_not.default:
            out.is_negation = True
        for one in tree_iter(out):
            if isinstance(one, Tensor):
                for part in (one._indices(), one._values()) if one.is_sparse else (one,):
                    self._note(part)
        return out

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, n_bytes = id(storage), storage.nbytes()
        if key in self._seen:
            return
        self._live += n_bytes
        self._peak = max(self._peak, self._live)

        def gone(_: object) -> None:
            self._live -= n_bytes
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, gone)


def _as_read_by_the_host(stand_in: Tensor) -> bool | float:
    """Return 1, or true, for a number that nobody knows; a negation, as of "all is finite", is false."""
    if stand_in.dtype == torch.bool:
        return not hasattr(stand_in, "is_negation")
    return 1.0 if stand_in.is_floating_point() else 1


def _with_the_bag_of_each(args: Any) -> Any:
    """Return what an embedding bag's backward pass is given, with the list that a CPU's pass makes for itself.

    Its stand-in is empty as the tensor is there, but a stand-in's pass does not make it: the gradient had no rows.
    """
    grad, indices, offsets, bags, *rest = args
    return grad, indices, offsets, bags if bags.numel() else torch.empty_like(indices), *rest


_OF_SPARSE = {_aten.clone.default, _aten._coalesce.default}


def _with_as_many_rows(func: Any, x: Tensor) -> Tensor:
    """Return the stand-in of a sparse gradient as autograd hands it over, or with its rows made one each.

    torch's own has no rows. All are taken to differ; a step's later micro-batches add none.
    """
    rows, values = x._indices(), x._values()
    made_one_each = func is _aten._coalesce.default
    if made_one_each:
        rows, values = rows.clone(), values.clone()
    return torch.sparse_coo_tensor(rows, values, x.shape, is_coalesced=made_one_each, check_invariants=False)


def _is_a_counter(given: Sequence[Tensor], args: Any, kwargs: Any) -> bool:
    """Return whether an operation makes or moves single numbers on the host, such as an optimizer's count of steps.

    These are kept for real: optimizers read them to choose what to do.
    """
    if given:
        return not any(isinstance(one, FakeTensor) or one.ndim for one in given)
    of_one_number = bool(args) and isinstance(args[0], (list, tuple)) and not args[0]
    return of_one_number and torch.device(kwargs.get("device") or "cpu").type == "cpu"


_WITH_UNKNOWN_SHAPES = {
    _aten._unique2.default,
    _aten.unique_consecutive.default,
    _aten.unique_dim.default,
    _aten.nonzero.default,
}


def _as_large_as_can_be(func: Any, x: Tensor) -> Any:
    """Return stand-ins for results whose shapes depend on numbers: as if these were all different, or not zero."""
    if func is _aten.nonzero.default:
        return x.new_empty((x.numel(), x.ndim), dtype=torch.int64)
    values = torch.empty_like(x) if func is _aten.unique_dim.default else x.new_empty(x.numel())
    n = len(values)
    return values, x.new_empty(n, dtype=torch.int64), x.new_empty(n, dtype=torch.int64)


@contextmanager
def foreseeing() -> Iterator[Foreseen]:
    """Have the operations inside the block run on stand-ins, and yield the meter that counts them."""
    with warnings.catch_warnings():
        # copy.deepcopy asks where a tensor's memory lies, and does without an answer.
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        with FakeTensorMode(allow_non_fake_inputs=True), Foreseen() as meter:
            yield meter


class Allocated:
    """Reads what the device's allocator says that it gave out."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.readings = device, dict[str, Reading]()

    def mark(self, name: str) -> None:
        if self.device.type == "cuda":
            live, peak = (
                read(self.device) for read in (torch.cuda.memory_allocated, torch.cuda.max_memory_allocated)
            )
            self.readings[name] = Reading(live, peak)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with torch.profiler.record_function(_PREFIX + name):
                pass

    def read_events(self, events: Sequence[Any]) -> None:
        """Take the readings of a CPU from a profile's events."""
        live = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU:
                live += event.nbytes()
                peak = max(peak, live)
            elif event.name().startswith(_PREFIX):
                self.readings[event.name().removeprefix(_PREFIX)] = Reading(live, peak)
                peak = live


@contextmanager
def measuring(device: torch.device) -> Iterator[Allocated]:
    """Yield a meter of what the block allocates on the device; it can be read after the block."""
    meter = Allocated(device)
    if device.type == "cuda":
        yield meter
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # some builds tell of every profile on stderr
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        yield meter
    meter.read_events(profile.profiler.kineto_results.events())


class Stopwatch:
    """Reads the clock at marks."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, dict[str, float]()

    def mark(self, name: str) -> None:
        self.seconds[name] = now(self.device)


class Passes(NamedTuple):
    """What forward and backward passes take under one way to keep activations, in bytes."""

    activations: int
    """Held for the backward pass when a micro-batch's forward pass has ended."""
    buffers: int
    """The most beyond that, states and activations aside, at any moment of the passes."""
    peak: int
    """The most held at once."""


class Account(NamedTuple):
    """What a run holds, in bytes."""

    parameters: int
    copy: int
    """Of the parameters in bf16, under `bf16_master`."""
    gradients: int
    state: int
    """Of all optimizers."""
    average: int
    passes: dict[str, Passes]
    update_buffers: int
    """The most that an update takes for itself."""
    update_peak: int


def account(readings: dict[str, Reading], ways: Sequence[str]) -> Account:
    """Return the account that a rehearsal's readings come to."""
    at = {name: one.live for name, one in readings.items()}
    growth = at["step 2 updated"] - at["averaged"]
    starts = [at[f"step {n} passed"] for n in (1, 2)]
    gradients = at["step 1 pass 1 ends"] - at["step 1 pass 1 begins"]
    ends = [at[f"step {n} updated"] + gradients for n in (1, 2)]
    peaks = [readings[f"step {n} updated"].peak for n in (1, 2)]
    return Account(
        parameters=at["model"] - at["begin"],
        copy=at["stepper"] - at["optimizers"],
        gradients=gradients,
        state=at["optimizers"] - at["model"] + growth,
        average=at["averaged"] - at["stepper"],
        passes={way: _passes_of(readings, way, at["begin"]) for way in ways},
        update_buffers=max(p - max(*both) for p, *both in zip(peaks, starts, ends, strict=True)),
        update_peak=max(peaks) - at["begin"],
    )


def _passes_of(readings: dict[str, Reading], way: str, base: int) -> Passes:
    last = max(n for n in (1, 2) if f"{way} pass {n} begins" in readings)
    mine = {mark: readings[f"{way} pass {last} {mark}"] for mark in ("begins", "keeps", "ends")}
    peak = max(mine["keeps"].peak, mine["ends"].peak)
    kept = mine["keeps"].live
    return Passes(kept - mine["begins"].live, peak - kept, peak - base)


class Rehearsal:
    """A run of one rank up to the steps' edge, on made-up tokens, read by a meter."""

    def __init__(self, config: RunConfig, vocab_size: int, device: torch.device, meter: Meter) -> None:
        self.config, self.meter, self.vocab_size, self.device = config, meter, vocab_size, device
        asked = config.train.checkpoint_activations
        self.way_of_steps: Recomputed = "none" if asked == "auto" else asked
        meter.mark("begin")
        with device:
            model = GPT(config.model, vocab_size)
        meter.mark("model")
        average = make_average(**config.average.model_dump())
        optimizers = build_optimizers(model, config.optim_by_role, average)
        meter.mark("optimizers")
        nothing = token_set([np.zeros(1, dtype=np.uint16)])
        self.stepper = Stepper(model, optimizers, nothing, config, device=device, ranks=Ranks())
        meter.mark("stepper")
        for _ in range(0 if average is None else getattr(average, "snapshots", 1)):
            average.take(optimizers.parameters())  # type: ignore[union-attr]
        meter.mark("averaged")

    def steps(self) -> None:
        """Go through two steps: in the second all states are there."""
        self.stepper.recompute(self.way_of_steps)
        for n in (1, 2):
            loss = self._pass_all("step 1" if n == 1 else self.way_of_steps)
            self.meter.mark(f"step {n} passed")
            self.stepper.update(loss, 1.0, torch.zeros((), device=self.device))
            del loss
            self.meter.mark(f"step {n} updated")

    def passes(self, way: Recomputed) -> None:
        """Go through the passes alone under one way to keep activations, all states being there."""
        self.stepper.recompute(way)
        self._pass_all(way)
        self.stepper.optimizers.zero_grad()
        for parameter in self.stepper.working.parameters():
            parameter.grad = None

    def _pass_all(self, name: str) -> Tensor:
        """Go through a micro-batch, or two where a step has more than one: the second finds the first's gradients."""
        stepper, forward = self.stepper, self.stepper.forward
        rows, longest = stepper.micro_batch_rows, stepper.lengths[-1]
        idx_BT = torch.randint(self.vocab_size, (rows, self.config.model.context_len), device=self.device)
        for n in range(1, 3 if stepper.rows_of_rank > rows else 2):

            def watched(*args: Any, n: int = n) -> Any:
                self.meter.mark(f"{name} pass {n} begins")
                found = forward(*args)
                self.meter.mark(f"{name} pass {n} keeps")
                return found

            stepper.forward = watched
            try:
                loss = stepper.backward(*stepper._cut(longest, Span(0, rows), (idx_BT, idx_BT)))
            finally:
                stepper.forward = forward
            self.meter.mark(f"{name} pass {n} ends")
        return loss

    def by_optimizer(self) -> dict[str, int]:
        """Return the bytes of each optimizer's state."""
        optimizers = self.stepper.optimizers
        found: dict[str, int] = {}
        for name, one in zip(optimizers.names, optimizers.optimizers, strict=True):
            tensors = [
                value for state in one.state.values() for value in state.values() if isinstance(value, Tensor)
            ]
            found[name] = found.get(name, 0) + sum(tensor.nbytes for tensor in tensors)
        return found


def foreseen_states(
    config: RunConfig, vocab_size: int, device: torch.device
) -> list[dict[int, dict[str, torch.Size]]]:
    """Return the shapes of each optimizer's state tensors, by the parameter's number and by key.

    Nothing is known where one is from outside, or of a kind that does not run on stand-ins.
    """
    if any(":" in str(options.get("name")) for options in config.optim.values()):
        return []
    with suppress(Exception), foreseeing(), device:
        optimizers = build_optimizers(GPT(config.model, vocab_size), config.optim_by_role)
        found = []
        for one in optimizers.optimizers:
            for _ in range(2):  # some keep more from the second step on
                for parameter in parameters_of(one):
                    parameter.grad = torch.empty_like(parameter)
                one.step()
            states = one.state_dict()["state"].items()
            found.append({number: shapes_of(state) for number, state in states})
        return found
    return []


def shapes_of(state: dict[str, Any]) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in state.items() if isinstance(value, Tensor)}


def rehearse(
    config: RunConfig, vocab_size: int, device: torch.device, meter: Meter, rows: int = 0
) -> Rehearsal:
    """Return a rehearsal gone through: two steps, then the passes of a third each other way, `rows` at a time."""
    rehearsal = Rehearsal(config, vocab_size, device, meter)
    rehearsal.stepper.micro_batch_rows = rows or rehearsal.stepper.micro_batch_rows
    rehearsal.steps()
    for way in CHEAPEST_FIRST:
        if way != rehearsal.way_of_steps:
            rehearsal.passes(way)
    rehearsal.stepper.close()
    return rehearsal


class Choice(NamedTuple):
    """How activations are kept, and how many rows are taken at a time."""

    way: Recomputed
    rows: int
    peak: int
    """Bytes that a step is foreseen to take at most."""
    room: int
    """Bytes at hand."""

    @property
    def fits(self) -> bool:
        """Whether it leaves the headroom free."""
        return self.peak <= self.room * (1 - HEADROOM)


def choose(config: RunConfig, vocab_size: int, device: torch.device, rows: int, room: int) -> Choice:
    """Return how a step of micro-batches of `rows` fits `room` bytes: the cheapest way, and the rows if halved.

    Under "auto" ways that compute more again are tried in turn, and the last of them with fewer rows. A smaller
    micro-batch costs less time than computing again as long as the device is kept busy: where the machine chooses
    the micro-batch too, it is halved down to that first. What does not fit at all is returned as it is.
    """
    asked, least = config.train.checkpoint_activations, rows
    if device.type == "cuda" and not config.train.micro_batch_rows:
        least = min(rows, max(1, TOKENS_OF_A_FULL_PASS_CUDA // config.model.context_len))
    ways = CHEAPEST_FIRST if asked == "auto" else (asked,)
    tries = [(way, n) for way in ways for n in _halved(rows, least)]
    tries += [(ways[-1], n) for n in _halved(tries[-1][1] // 2, 1)]
    with foreseeing() as meter:
        rehearsal = Rehearsal(config, vocab_size, device, meter)
        stepper = rehearsal.stepper
        stepper.micro_batch_rows = 1
        rehearsal.steps()
        update = max(meter.readings[f"step {n} updated"].peak for n in (1, 2))
        # The warm-up keeps the weights to put them back.
        kept = meter.readings["model"].live - meter.readings["begin"].live
        states = kept + meter.readings["step 2 passed"].live
        choice = Choice(ways[0], rows, 0, room)
        for way, n in tries:
            # At least this, in proportion to what more rows were found to take.
            expected = states + (choice.peak - states) * n // choice.rows
            if n > 1 and way == choice.way and not choice._replace(peak=expected).fits:
                continue
            # More rows may be one pass where fewer were two.
            meter.readings = {mark: one for mark, one in meter.readings.items() if f"{way} pass" not in mark}
            stepper.micro_batch_rows = n
            rehearsal.passes(way)
            peak = kept + max(update, _passes_of(meter.readings, way, meter.readings["begin"].live).peak)
            if (choice := Choice(way, n, peak, room)).fits:
                break
        stepper.close()
    return choice


def _halved(rows: int, least: int) -> list[int]:
    """Return `rows`, its half, and so on, none under `least`."""
    found = []
    while rows >= max(1, least):
        found.append(rows)
        rows //= 2
    return found


def choose_activations(stepper: Stepper) -> str:
    """Set how a run keeps activations, and its micro-batch; return the line that says so. All ranks take the same."""
    if stepper.sharded:
        raise UserError(
            "checkpoint_activations = 'auto' cannot foresee a model that is shared out over ranks: wanted none, "
            "selective or block"
        )
    held = sum(one.nbytes for model in {stepper.model, stepper.working} for one in model.parameters())
    room = memory_at_hand(stepper.device) + held
    mine = choose(stepper.config, stepper.model.vocab_size, stepper.device, stepper.micro_batch_rows, room)
    ranks = stepper.ranks
    way = CHEAPEST_FIRST[round(ranks.slowest(CHEAPEST_FIRST.index(mine.way)))]
    stepper.recompute(way)
    stepper.micro_batch_rows = round(-ranks.slowest(-float(mine.rows)))
    return (
        f"activations: {way}, foreseen to take {mine.peak / 2**20:,.0f} MiB at most of the {room / 2**20:,.0f} MiB at "
        "hand (--checkpoint-activations auto)"
    )


def memory_at_hand(device: torch.device) -> int:
    """Return the bytes that this process can still take: of the GPU, or its share of the machine's or container's."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = psutil.virtual_memory().available
    with suppress(OSError, ValueError, StopIteration):
        group = Path("/sys/fs/cgroup")
        lines = (group / "memory.stat").read_text().splitlines()
        used = int(next(line for line in lines if line.startswith("anon ")).split()[1])
        free = min(free, int((group / "memory.max").read_text()) - used)
    return max(0, free) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
