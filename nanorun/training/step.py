"""One optimizer step: micro-batches, gradients over all ranks, clipping, update."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from nanorun.config import RunConfig
from nanorun.data.batches import TokenSet
from nanorun.data.mix import Mix, training_rows
from nanorun.dropout import row_keys
from nanorun.errors import UserError, first_line
from nanorun.model import GPT, Recomputed
from nanorun.optim.build import OptimizerSet
from nanorun.training import sharding
from nanorun.training.clock import now
from nanorun.training.distributed import Ranks
from nanorun.training.feed import Feed, Pair, Span
from nanorun.training.gradients import GradientSum

MICRO_BATCH_TOKENS_CPU = 2048
"""Tokens of one forward pass on a CPU under `micro_batch_rows = 0`; found by scripts/bench_step.py --micro."""
WARM_UP_SCALE = 1e-3
"""Of the learning rates in a warm-up: many whole steps on the same tokens could end in what is not finite, and a step
that is left out takes no time."""


class StepResult(NamedTuple):
    """Tensors of one step, on the device: reading one waits for it."""

    loss: torch.Tensor
    """Mean loss over all tokens of the step, nats a token, before the update."""
    grad_norm: torch.Tensor
    """Norm of all gradients together, before clipping."""
    bad: torch.Tensor
    """Whether loss or gradient was not finite, so that the update did nothing."""
    stop_votes: torch.Tensor
    """How many ranks were asked to stop."""


class Stepper:
    """Carries out optimizer steps of one run on one rank.

    `model` holds the weights that are kept. Under `bf16_master` the passes run on a bf16 copy, and `model` is
    the fp32 master: 2 bytes a parameter of weights, 2 of gradients, 4 of master, and 8 more of moments where the
    optimizer is Adam.
    """

    def __init__(
        self,
        model: GPT,
        optimizers: OptimizerSet,
        tokens: TokenSet | Mix,
        config: RunConfig,
        *,
        device: torch.device,
        ranks: Ranks,
    ) -> None:
        if config.rows_per_step % ranks.n_ranks:
            raise UserError(
                f"train.batch_tokens holds {config.rows_per_step} rows, which {ranks.n_ranks} ranks can't share "
                "evenly: start a number of ranks that divides it"
            )
        self.model, self.optimizers, self.tokens, self.config = model, optimizers, tokens, config
        self.device, self.ranks = device, ranks
        self.sharded = isinstance(optimizers, sharding.ShardedOptimizers)
        self.rows_of_rank = config.rows_per_step // ranks.n_ranks
        self.asked_rows = first_micro_batch(config, device, self.rows_of_rank, sharded=self.sharded)
        self.micro_batch_rows = self.asked_rows
        self.lengths = sorted({*config.train.length_schedule} or {config.model.context_len})
        self.precision = chosen_precision(config.train.precision, device)
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16")
        copies = self.precision == "bf16_master" and not self.sharded
        self.working = _bf16_copy(model) if copies else model
        self._set_sparse(True)
        self.gradients = GradientSum([] if self.sharded else self.working.parameters(), ranks)
        self.forward: Callable[..., tuple[torch.Tensor, torch.Tensor]] = self.working
        # No method of this object: a circle would keep the model's memory after the run.
        read = partial(training_rows, tokens, seed=config.seed, context_len=config.model.context_len)
        self.feed = Feed(read, device)
        self._rehearses = False
        self._met_rows = 0
        """The size of micro-batches whose every shape the code at hand has met."""

    def _set_sparse(self, wanted: bool) -> None:
        """Have the tables of n-grams make sparse gradients, or not; never where something could not read them.

        Ranks add up dense gradients, compiled code makes no others, and most optimizers take no others.
        """
        tables = self.working.ngrams
        if tables is not None:
            reads = any(
                parameter is tables.weight and getattr(optimizer, "takes_sparse", False)
                for optimizer in self.optimizers.optimizers
                for group in optimizer.param_groups
                for parameter in group["params"]
            )
            tables.sparse = wanted and reads and self.ranks.n_ranks == 1 and not self.sharded

    def batch(self, step: int, first: int, n_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and targets of `n_rows` rows of this rank's share of a step, on the device."""
        return self.feed.take(Span(self._first_row(step) + first, n_rows))

    def _first_row(self, step: int) -> int:
        """Return the first of this rank's rows in a step."""
        return step * self.config.rows_per_step + self.ranks.rank * self.rows_of_rank

    def _spans(self, step: int) -> list[Span]:
        """Return the rows of this rank's micro-batches in a step."""
        start, size = self._first_row(step), self.micro_batch_rows
        return [
            Span(start + first, min(size, self.rows_of_rank - first))
            for first in range(0, self.rows_of_rank, size)
        ]

    def to_device(self, idx_BT: torch.Tensor, targets_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.device.type == "cuda":
            idx_BT, targets_BT = idx_BT.pin_memory(), targets_BT.pin_memory()
        return idx_BT.to(self.device, non_blocking=True), targets_BT.to(self.device, non_blocking=True)

    def _cut(self, length: int, span: Span, pair: Pair) -> tuple[torch.Tensor, ...]:
        """Return inputs and targets of a span's rows, cut to `length`, and with dropout the keys of the pieces' masks.

        A piece's number is as much a function of (step, row) as a row's is, and no piece of another length has it.
        """
        idx_BT, targets_BT = pair[0].view(-1, length), pair[1].view(-1, length)
        if not self.config.model.drops:
            return idx_BT, targets_BT
        n_pieces = self.config.model.context_len // length
        first, count = span.first_row * n_pieces + (n_pieces - 1 << 40), span.n_rows * n_pieces
        return idx_BT, targets_BT, row_keys(self.config.seed, first, count, self.device)

    def backward(
        self, idx_BT: torch.Tensor, targets_BT: torch.Tensor, drop_keys_B: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Add one micro-batch's gradients of the step's mean loss; return its summed loss."""
        with self.autocast:
            loss_sum, _ = self.forward(idx_BT, targets_BT, drop_keys_B)
        (loss_sum / self.config.train.batch_tokens).backward()
        self.ranks.works()
        return loss_sum.detach()

    def step(self, step: int, scale: float, *, stop_vote: bool = False) -> StepResult:
        """Train on step `step` with learning rates scaled by `scale`."""
        self.ranks.moved(step + 1)
        loss_sum = torch.zeros((), device=self.device)
        spans, length = self._spans(step), self.config.length_at(step)
        after = self._spans(step + 1)[:1] if step + 1 < self.config.train.steps else []
        for span, then in pairwise(spans):
            if self.sharded:
                self.model.set_is_last_backward(False)  # type: ignore[operator]
            loss_sum += self.backward(*self._cut(length, span, self.feed.take(span, then)))
        if self.sharded:
            self.model.set_is_last_backward(True)  # type: ignore[operator]
        with self.gradients.travelling():
            loss_sum += self.backward(*self._cut(length, spans[-1], self.feed.take(spans[-1], *after)))
        self.ranks.moved()
        shared = torch.stack([loss_sum, torch.full_like(loss_sum, float(stop_vote))])
        self.gradients.finish(shared)
        result = self.update(shared[0] / self.config.train.batch_tokens, scale, shared[1])
        self.ranks.moved()
        return result

    def update(
        self, loss: torch.Tensor, scale: float, stop_votes: torch.Tensor, *, send: bool = True
    ) -> StepResult:
        """Clip, flag what is not finite, and let the optimizers move the weights unless flagged."""
        if self.working is not self.model:
            for master, low in zip(self.model.parameters(), self.working.parameters()):
                master.grad = None if low.grad is None else low.grad.float()
                low.grad = None
        grads = [_numbers(p) for p in self.model.parameters() if p.grad is not None]
        grad_norm = torch.stack(torch._foreach_norm(grads)).norm()
        if self.sharded:
            grad_norm = sharding.norm_over_ranks(grad_norm, self.ranks)
        bad = ~(torch.isfinite(loss) & torch.isfinite(grad_norm))
        if self.config.train.grad_clip:
            factor = (self.config.train.grad_clip / (grad_norm + 1e-6)).clamp(max=1.0)
            # A pass over all gradients, in vain where the factor is 1; on a GPU, to look would be to wait for it.
            if self.device.type != "cpu" or bool(factor < 1.0):
                torch._foreach_mul_(grads, factor)
        self.optimizers.set_scale(scale)
        self.optimizers.step(skip=bad, send=send)
        self.optimizers.zero_grad()
        self.refresh_working_copy()
        return StepResult(loss, grad_norm, bad, stop_votes)

    @torch.no_grad()
    def refresh_working_copy(self) -> None:
        """Round the master weights into the bf16 copy, if there is one."""
        if self.working is not self.model:
            torch._foreach_copy_(list(self.working.parameters()), list(self.model.parameters()))

    def recompute(self, what: Recomputed) -> None:
        """Have the backward passes compute that again from now on, instead of keeping it."""
        self.model.checkpoint_activations = self.working.checkpoint_activations = what

    @property
    def halved(self) -> str:
        """A line that says so where a micro-batch of the size asked for did not fit; else ''."""
        if self.micro_batch_rows == self.asked_rows:
            return ""
        return (
            f"{self.asked_rows:,} rows do not fit the memory at once: {self.micro_batch_rows:,} are taken at a time, "
            f"and their gradients added up to the same {self.config.train.batch_tokens:,} tokens a step"
        )

    def is_fused(self) -> bool:
        """Return whether eager code has one operation for each block, whatever the length of the rows."""
        with self.autocast:
            return all(self.working.is_fused(length) for length in self.lengths)

    def compile(self) -> None:
        """Have the passes run compiled code: of the whole model, or where it is sharded of each block.

        Gathering stays outside what is compiled, and all blocks share one graph, so one code has a graph for each
        length and size of the micro-batches, and sharded for the two of a validation. On CUDA so do the optimizers.
        """
        self.optimizers.compile()
        self._met_rows = 0
        n_shapes = len(self.lengths) * len(self._micro_batches()) + 2
        if self.sharded:
            for block in self.model.blocks:
                block.compile(dynamic=False)
                compiled: Callable[..., Any] = block._compiled_call_impl  # type: ignore[assignment]
                block._compiled_call_impl = _with_room(compiled, n_shapes)
        else:
            self._set_sparse(False)
            self.forward = _with_room(torch.compile(self.working, dynamic=False), n_shapes)

    def forget_compiled(self) -> None:
        """Have the passes run eager code again."""
        self.optimizers.compile(False)
        self._met_rows = 0
        self.forward = self.working
        self._set_sparse(True)
        for block in self.model.blocks:
            block._compiled_call_impl = None

    def close(self) -> None:
        """End what runs beside the steps."""
        self.feed.close()

    def to_evaluation(self) -> None:
        """Put the weights that the run is judged by in place of those it trains."""
        self.optimizers.to_evaluation()
        if self.optimizers.evaluates_other_weights:
            self.refresh_working_copy()

    def to_training(self) -> None:
        """Put the weights back that the run trains."""
        self.optimizers.to_training()
        if self.optimizers.evaluates_other_weights:
            self.refresh_working_copy()

    @contextmanager
    def rehearsing(self) -> Iterator[None]:
        """Have all warm-ups inside undone at the end, by one copy of weights and state; not where an error ends it.

        From one to the next the optimizers go on as in a run, so that only the first makes their state.
        """
        if self._rehearses:
            yield
            return
        parameters: list[torch.Tensor] = list(self.model.parameters())
        if self.sharded:
            parameters = self.optimizers.parameters()
        weights = [p.detach().clone() for p in parameters]
        blank = copy.deepcopy(self.optimizers.own_state_dict())
        self._rehearses = True
        try:
            yield
        finally:
            self._rehearses = False
        with torch.no_grad():
            torch._foreach_copy_(parameters, weights)
        self.optimizers.load_state_dict(blank)
        self.refresh_working_copy()

    def warm_up(self) -> float:
        """Run one step on made-up tokens, so that buffers, kernels and compiled code exist; undo its effects.

        Returns the seconds that a step takes by it: what it ran, for as many rows as a step has. Under `rehearsing`
        the first runs a micro-batch of each size and length, and those after it one micro-batch as long as in the
        middle of the run. A micro-batch that does not fit is halved until it does, here and never later, and the
        tokens of the step stay.
        """
        with self.rehearsing():
            while (seconds := self._seconds_if_it_fits()) is None:
                self.optimizers.zero_grad()
                gc.collect()
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                if self.sharded and self.micro_batch_rows > 1:
                    raise UserError(
                        f"{self.micro_batch_rows} rows do not fit the device's memory beside this rank's share of "
                        "the model: set train.micro_batch_rows smaller"
                    )
                if self.micro_batch_rows == 1:
                    raise UserError(
                        "not one row fits the device's memory: try --checkpoint-activations block, or a smaller model"
                    )
                self.micro_batch_rows //= 2
            self._met_rows = self.micro_batch_rows
        # All ranks take the size that fits the smallest of them.
        self.micro_batch_rows = round(-self.ranks.slowest(-float(self.micro_batch_rows)))
        return seconds

    def _seconds_if_it_fits(self) -> float | None:
        """Return the seconds of a step of made-up tokens; None where it does not fit the memory."""
        try:
            return self._dummy_step()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            # The error holds on to what the pass had in memory, until here.
            return None

    def _micro_batches(self) -> list[int]:
        """Return the sizes in rows that a step's micro-batches have, the largest first."""
        sizes = {min(self.micro_batch_rows, self.rows_of_rank), self.rows_of_rank % self.micro_batch_rows}
        return sorted(sizes - {0}, reverse=True)

    def _dummy_step(self) -> float:
        generator = torch.Generator().manual_seed(0)
        sizes, lengths = self._micro_batches(), self.lengths
        if self._met_rows == self.micro_batch_rows:
            sizes, lengths = sizes[:1], [self.config.length_at(self.config.train.steps // 2)]
        loss = torch.zeros((), device=self.device)
        began = now(self.device)
        for n_rows in sizes:
            shape = (n_rows, self.config.model.context_len)
            idx_BT = torch.randint(self.model.vocab_size, shape, generator=generator)
            pair = self.to_device(idx_BT, idx_BT.clone())
            for length in lengths:
                loss = self.backward(*self._cut(length, Span(0, n_rows), pair))
        passed = now(self.device)
        try:
            # Nothing travels: a rank that runs out of memory and tries again would have the others wait.
            self.update(loss, WARM_UP_SCALE, torch.zeros((), device=self.device), send=False)
        except (TypeError, RuntimeError, NotImplementedError) as error:
            outside = [name for name in self.optimizers.names if ":" in name]
            if not outside or is_out_of_memory(error):
                raise
            reason = first_line(error)
            raise UserError(
                f"{', '.join(outside)} failed in its first step ({type(error).__name__}: {reason}): an optimizer must "
                "step without a closure on dense gradients; docs/optimizers.md says what else it must do"
            ) from error
        ended = now(self.device)
        self.ranks.warmed_up(ended - began)
        a_row = (passed - began) / (sum(sizes) * len(lengths))
        return a_row * self.rows_of_rank + ended - passed


def _with_room(call: Callable[..., Any], n_shapes: int) -> Callable[..., Any]:
    """Return compiled code that has a graph for each of so many shapes, beside what torch allows for all else.

    Past torch's limit, 8 graphs of one code, it would run eager code and say nothing to whoever trains.
    """
    config = torch._dynamo.config
    room = config.patch(recompile_limit=config.recompile_limit + n_shapes)

    def roomy(*arguments: Any) -> Any:
        with room:
            return call(*arguments)

    return roomy


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out; the CPU's allocator has no class of its own for it."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def first_micro_batch(
    config: RunConfig, device: torch.device, rows_of_rank: int, *, sharded: bool = False
) -> int:
    """Return the rows of a micro-batch that are tried first: those asked for, else as many as the device likes."""
    asked = config.train.micro_batch_rows
    if not asked:
        on_cpu = max(1, MICRO_BATCH_TOKENS_CPU // config.model.context_len)
        # A rank without memory cannot tell those that wait for it in the same pass to try a smaller one.
        on_cuda = 1 if sharded else rows_of_rank
        asked = on_cpu if device.type == "cpu" else on_cuda
    return min(asked, rows_of_rank)


def chosen_precision(asked: str, device: torch.device) -> str:
    """Return `fp32`, `bf16` or `bf16_master`; `auto` is bf16 autocast on CUDA and fp32 elsewhere."""
    if asked == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    return asked


def _numbers(parameter: torch.Tensor) -> torch.Tensor:
    """Return what a parameter's gradient holds on this rank, in place: of a sparse one the rows that were read."""
    assert parameter.grad is not None
    if not parameter.grad.is_sparse:
        return sharding.rows(parameter.grad)
    parameter.grad = parameter.grad.coalesce()
    return parameter.grad.values()


def _bf16_copy(model: GPT) -> GPT:
    # Parameters alone: the rotary tables stay in fp32.
    low = copy.deepcopy(model)
    for parameter in low.parameters():
        parameter.data = parameter.data.bfloat16()
    return low
