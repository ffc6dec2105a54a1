"""Train a run: set up, warm up, loop, record."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from nanorun.config import RunConfig
from nanorun.errors import RunFailed, Stopped
from nanorun.files import write_whole
from nanorun.optim.schedules import scale_at
from nanorun.tracks import Track
from nanorun.training import checkpoint, distributed, machine, recording, sharding
from nanorun.training.clock import TrainingClock
from nanorun.training.compilation import compile_if_it_pays
from nanorun.training.evaluate import validation_loss
from nanorun.training.outcome import as_json
from nanorun.training.progress import MetricsFile, RunProgress, WandbRun
from nanorun.training.setup import (
    Options,
    Run,
    choices,
    choose_as_before,
    mix_of,
    read_saved,
    restore,
    say,
    set_up,
)


def train(
    config: RunConfig, track: Track, options: Options, console: Console, *, resume: Path | None = None
) -> dict[str, Any]:
    """Return what `--json` prints of a run trained to its declared last step.

    Raises UserError, RunFailed (not finite, target missed under `require_target`) or Stopped (a signal came;
    a checkpoint was saved).
    """
    device = distributed.pick_device(options.device)
    ranks = distributed.join(device.type)
    if not ranks.leads:
        console = Console(quiet=True)
    clock = TrainingClock(synchronise=torch.cuda.synchronize if device.type == "cuda" else _nothing)
    with clock.paused("setup"):
        saved = read_saved(resume, console)
        run = set_up(config, track, options, console, clock, device, ranks, resume)
    with _listening(run), ExitStack() as stack:
        with _leaving_no_empty_folder(run, resume):
            asked = choose_as_before(run, saved) if saved else config.train.compile
            with clock.paused("compile"):
                run.compiled, line = compile_if_it_pays(run.stepper, asked, steps=config.train.steps)
                say(console, line)
                machine.forget_peak_memory(device)
            with clock.paused("setup"):
                if saved:
                    restore(run, saved)
                progress, rows = _open_outputs(run, stack)
                ranks.wait()
        with _naming_what_is_saved(run):
            _loop(run, progress, rows)
    return _finish(run)


@contextmanager
def _naming_what_is_saved(run: Run) -> Iterator[None]:
    """Say from where a run can be taken up again that a second Ctrl-C stopped at once."""
    try:
        yield
    except KeyboardInterrupt:
        if not checkpoint.checkpoints(run.folder / "checkpoints"):
            raise
        raise Stopped(
            f"stopped at once, after step {run.done} of {run.config.train.steps}. Resume from the newest checkpoint "
            f"with: nanorun train --resume {run.folder}"
        ) from None


@contextmanager
def _leaving_no_empty_folder(run: Run, resume: Path | None) -> Iterator[None]:
    """Remove the folder of a new run that ends before its first step: it holds nothing to resume."""
    try:
        yield
    except BaseException:
        if run.ranks.leads and resume is None:
            shutil.rmtree(run.folder, ignore_errors=True)
        raise


def _loop(run: Run, progress: RunProgress, rows: Callable[[dict[str, Any]], None]) -> None:
    plan, checks = run.config.train, run.config.checkpoint
    for step in range(run.done, plan.steps):
        if run.outcome.reached and run.options.stop_at_target:
            break
        scale = scale_at(
            plan.schedule,
            step,
            steps=plan.steps,
            warmup_steps=plan.warmup_steps,
            cooldown_fraction=plan.cooldown_fraction,
            final_scale=plan.final_scale,
            cycles=plan.cycles,
        )
        result = run.stepper.step(step, scale, stop_vote=run.stop_asked)
        run.done = step + 1
        run.optimizers.after_step(run.done)
        run.bad_step = torch.where((run.bad_step < 0) & result.bad, step, run.bad_step)
        if _reads_flags(run):
            _raise_if_bad(run, float(result.loss), float(result.grad_norm))
        if run.done % run.config.log.every_steps == 0 or step == 0:
            seconds = run.clock.train_seconds()
            row = {"step": run.done, "tokens": run.done * plan.batch_tokens, "train_seconds": seconds}
            rows({**row, "loss": float(result.loss), "grad_norm": float(result.grad_norm), "lr_scale": scale})
            progress.train(run.done, float(result.loss), seconds)
        if _validates(run):
            # The swap counts, as in AlgoPerf: whoever needs other weights to be judged by pays for them.
            run.stepper.to_evaluation()
            with run.clock.paused("validation"):
                _validate(run, progress, rows)
            run.stepper.to_training()
        asked_to_stop = _is_voted_to_stop(run, result.stop_votes)
        if asked_to_stop or (
            checks.every_steps and run.done % checks.every_steps == 0 and run.done < plan.steps
        ):
            _raise_if_bad(run, float(result.loss), float(result.grad_norm))
            with run.clock.paused("checkpoint"):
                _save(run)
                run.ranks.wait()
        if asked_to_stop:
            raise Stopped(
                f"stopped after step {run.done} of {plan.steps}; a checkpoint is saved. "
                f"Resume with: nanorun train --resume {run.folder}"
            )


def _reads_flags(run: Run) -> bool:
    """Return whether this step's flags are read: always on a CPU, else where the loop synchronises anyway."""
    return run.device.type == "cpu" or run.done % run.config.log.every_steps == 0 or _validates(run)


def _is_voted_to_stop(run: Run, stop_votes: torch.Tensor) -> bool:
    """Return whether any rank was asked to stop; on CUDA looked at only where the loop synchronises anyway."""
    synchronised = (
        run.device.type == "cpu" or run.ranks.n_ranks == 1 or run.done % run.config.log.every_steps == 0
    )
    if not synchronised:
        return False
    return run.stop_asked if run.ranks.n_ranks == 1 else bool(stop_votes > 0)


def _validates(run: Run) -> bool:
    plan = run.config.validation
    last = run.done == run.config.train.steps
    return last or bool(plan.every_steps and run.done >= plan.from_step and run.done % plan.every_steps == 0)


def _validate(run: Run, progress: RunProgress, rows: Callable[[dict[str, Any]], None]) -> None:
    seconds = run.clock.agree(run.ranks.slowest)
    val_loss, run.outcome.validation_tokens = validation_loss(
        run.stepper.working,
        run.validation_tokens,
        n_tokens=run.config.validation.tokens,
        context_len=run.config.model.context_len,
        stride=run.config.validation.stride or run.config.model.context_len,
        device=run.device,
        ranks=run.ranks,
        autocast=run.stepper.autocast,
    )
    if not val_loss < float("inf"):
        raise RunFailed(f"the validation loss after step {run.done} is {val_loss}; lower the learning rate")
    tokens = run.done * run.config.train.batch_tokens
    run.outcome.add(run.done, tokens, seconds, val_loss, run.track.target_val_loss)
    row = {"step": run.done, "tokens": tokens, "train_seconds": seconds, "val_loss": val_loss}
    rows({**row, "bits_per_byte": run.predicted.bits_per_byte(val_loss)})
    progress.validation(run.done, val_loss, seconds, run.predicted.describe(val_loss))


def _raise_if_bad(run: Run, loss: float, grad_norm: float) -> None:
    step = int(run.bad_step)
    if step < 0:
        return
    rows = run.config.rows_per_step
    what = f"loss {loss}, gradient norm {grad_norm}" if step == run.done - 1 else "loss or gradient"
    raise RunFailed(
        f"not finite at step {step + 1} of {run.config.train.steps} ({what}; training rows {step * rows} to "
        f"{(step + 1) * rows - 1} of seed {run.config.seed}): its update was left out and the run stopped. "
        "Lower the learning rate, lengthen train.warmup_steps, or set train.grad_clip"
    )


def _save(run: Run) -> None:
    manifest = run.validation_tokens.manifest
    state = {
        "step": run.done,
        "clock": run.clock.state_dict(),
        "outcome": dataclasses.asdict(run.outcome),
        "choices": choices(run),
        "corpus_sha256": manifest.sha256 if manifest else None,
        "mix": mix_of(run),
        "tokenizer": manifest.tokenizer if manifest else None,
    }
    # A model that is shared out over the ranks is put together by all of them.
    model = sharding.whole_weights(run.model, keep=run.ranks.leads)
    sharded = isinstance(run.optimizers, sharding.ShardedOptimizers)
    evaluation = _evaluation_weights(run) if sharded or run.ranks.leads else None
    optimizer = run.optimizers.whole_state() if sharded else run.optimizers.state_dict()
    if run.ranks.leads:
        checkpoint.save(
            run.folder / "checkpoints",
            run.done,
            model=model,
            optimizer=optimizer,
            state=state,
            evaluation=evaluation,
            keep=run.config.checkpoint.keep,
        )


def _evaluation_weights(run: Run) -> dict[str, torch.Tensor] | None:
    """Return a copy of the weights that the run is judged by, where they are not those it trains."""
    if not run.optimizers.evaluates_other_weights:
        return None
    run.optimizers.to_evaluation()
    weights = sharding.whole_weights(run.model, keep=run.ranks.leads)
    weights = {name: tensor.detach().cpu().clone() for name, tensor in weights.items()}
    run.optimizers.to_training()
    return weights


@contextmanager
def _listening(run: Run) -> Iterator[None]:
    """Let SIGINT and SIGTERM end the run after its step; a second SIGINT stops at once."""

    def ask(number: int, frame: object) -> None:
        if run.stop_asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        run.stop_asked = True
        say(run.console, "stopping after this step, with a checkpoint (Ctrl-C again stops at once)")

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: whoever started it handles the signals
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _open_outputs(run: Run, stack: ExitStack) -> tuple[RunProgress, Callable[[dict[str, Any]], None]]:
    progress = stack.enter_context(
        RunProgress(
            run.console,
            steps=run.config.train.steps,
            first_step=run.done,
            batch_tokens=run.config.train.batch_tokens,
            target=run.track.target_val_loss,
        )
    )
    sinks: list[MetricsFile | WandbRun] = []
    if run.ranks.leads:
        sinks.append(MetricsFile(run.folder / "metrics.jsonl", after_step=run.done))
        if run.options.wandb != "off":
            sinks.append(WandbRun(run.options.wandb, run.folder, run.config.model_dump()))
    stack.callback(_close, run, sinks)

    def write_row(row: dict[str, Any]) -> None:
        for sink in sinks:
            sink.write(row)

    return progress, write_row


def _close(run: Run, sinks: Sequence[MetricsFile | WandbRun]) -> None:
    with run.clock.paused("setup"):
        run.stepper.close()
        for sink in sinks:
            sink.close()


def _finish(run: Run) -> dict[str, Any]:
    with run.clock.paused("checkpoint"):
        _save(run)
    clock = run.clock.seconds()
    run.optimizers.to_evaluation()
    weights = checkpoint.weights_sha256(run.model)
    run.optimizers.to_training()
    result = as_json(run.outcome, run=run.folder, record=None, steps=run.done, weights=weights, clock=clock)
    result["bits_per_byte"] = run.predicted.bits_per_byte(result["final_val_loss"])
    if run.ranks.leads and run.options.record:
        result["record"] = str(recording.write(run, result))
    if run.ranks.leads:
        write_whole(
            run.folder / "result.json",
            json.dumps(result, indent=1),
            mend=f"free some disk, then nanorun train --resume {run.folder}",
        )
    run.ranks.wait()  # nobody leaves the group while another still writes
    _say_result(run, result)
    if run.options.require_target and not result["final_val_loss"] <= run.track.target_val_loss:
        missed = RunFailed(
            f"the last validation reads {result['final_val_loss']:.4f}, above the required {run.track.target_val_loss}"
        )
        missed.result = result
        raise missed
    return result


def _say_result(run: Run, result: dict[str, Any]) -> None:
    target, reached, clock = run.track.target_val_loss, result["reached"], result["clock"]
    where = (
        f"first at or under {target} after step {reached['step']}, {reached['seconds']:.1f} s counted"
        if reached
        else f"{target} was not reached"
    )
    bits = run.predicted.describe(result["final_val_loss"])
    say(
        run.console,
        f"{run.config.name}, seed {run.config.seed}: {result['final_val_loss']:.4f} nats a token"
        f"{f' ({bits})' if bits else ''} after {result['steps']} steps and {clock['train_seconds']:.1f} s counted; "
        f"{where} (validation {clock['validation_seconds']:.1f} s, compile and warm-up "
        f"{clock['compile_seconds']:.1f} s, in all {clock['total_seconds']:.1f} s)",
    )
    if run.options.reproduces:
        return
    if result["record"]:
        records = run.options.records
        elsewhere = "" if records.resolve() == Options.records.resolve() else f" --records {records}"
        say(
            run.console,
            f"record {result['record']}\nnext: nanorun report --track {run.track.name}{elsewhere}",
        )
    else:
        say(run.console, f"no record, as asked\nnext: nanorun sample {run.folder}")


def _nothing() -> None:
    pass
