"""Train a run: set up, warm up, loop, record."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from nanorun import kernels
from nanorun.config import RunConfig
from nanorun.errors import RunFailed, Stopped, UserError
from nanorun.files import write_whole
from nanorun.optim.schedules import scale_at
from nanorun.tracks import Track
from nanorun.training import checkpoint, distributed, machine, recording, sharding, threads
from nanorun.training.alone import alone
from nanorun.training.clock import TrainingClock
from nanorun.training.compilation import compile_if_it_pays
from nanorun.training.distributed import Ranks
from nanorun.training.evaluate import validation_loss
from nanorun.training.outcome import as_json
from nanorun.training.progress import MetricsFile, RunProgress, WandbRun
from nanorun.training.setup import (
    Options,
    Run,
    begin_again,
    choices,
    choose,
    choose_as_before,
    mix_of,
    read_saved,
    restore,
    resume_command,
    say,
    set_up,
)
from nanorun.training.step import StepResult
from nanorun.training.taking_up import METRICS, Begun, begun_before, leaving_no_empty_folder

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""The signals that ask a run to save and stop."""


def train(
    config: RunConfig,
    track: Track,
    options: Options,
    console: Console,
    *,
    resume: Path | None = None,
    more_follow: bool = False,
) -> dict[str, Any]:
    """Return what `--json` prints of a run trained to its declared last step.

    `resume` is the folder of a run to take up again. Where more runs follow, a signal that came when this one was
    all but finished raises Stopped once it is. Raises UserError, RunFailed (not finite, target missed under
    `require_target`) or Stopped (a signal came; a checkpoint was saved).
    """
    with machine.deterministic_algorithms(options.deterministic), kernels.allowed(options.kernels):
        return _train(config, track, options, console, resume, more_follow)


def _train(
    config: RunConfig,
    track: Track,
    options: Options,
    console: Console,
    resume: Path | None,
    more_follow: bool,
) -> dict[str, Any]:
    device = distributed.pick_device(options.device)
    ranks = distributed.join(device.type)
    if not ranks.leads:
        console = Console(quiet=True)
    place = options.runs / options.run if resume is None and options.run else resume
    watcher = threads.Watcher()
    with ExitStack() as held:
        if place is not None:
            held.enter_context(alone(place, ranks))
        begun = Begun(str(resume), resumes=True)
        if resume is None:
            begun = begun_before(config, runs=options.runs, name=options.run, ranks=ranks)
            if begun.result is not None:
                return _say_again(begun.folder, begun.result, track, options, console)
            if place is None and begun.folder:
                place = Path(begun.folder)
                held.enter_context(alone(place, ranks))
        clock = TrainingClock(synchronise=torch.cuda.synchronize if device.type == "cuda" else _nothing)
        distributed.tell_phase(lambda: clock.reason)
        naming = _naming_what_is_saved(Path(begun.folder), config, ranks) if begun.resumes else nullcontext()
        with clock.paused("setup"), naming:
            saved = read_saved(begun, console, ranks)
            run = set_up(config, track, options, console, clock, device, ranks, begun)
            if device.type == "cpu":
                machine.keep_memory()  # behind the preparing of data, which sets limits of its own
        if place is None:
            held.enter_context(alone(run.folder, ranks))
        return _carry_out(run, saved, begun, more_follow, watcher)


def _carry_out(
    run: Run,
    saved: checkpoint.Checkpoint | None,
    begun: Begun,
    more_follow: bool,
    watcher: threads.Watcher,
) -> dict[str, Any]:
    """Return what `train` does of a run that is set up and whose folder is held."""
    told = _naming_what_is_saved(run.folder, run.config, run.ranks, run)
    with _listening(run), told, ExitStack() as stack:
        stack.push(lambda kind, error, trace: run.saver.close() if kind else None)
        with leaving_no_empty_folder(run.folder, run.ranks, begun):
            with run.clock.paused("setup"):
                asked = choose_as_before(run, saved) if saved else choose(run)
            with run.clock.paused("compile"):
                with run.stepper.rehearsing():
                    settled = threads.Settled()
                    if run.device.type == "cpu" and not saved:
                        settled = threads.settle(run.stepper, watcher, run.options.threads)
                    say(run.console, settled.line)
                    run.compiled, line = compile_if_it_pays(
                        run.stepper, asked, steps=run.config.train.steps, eager=settled.step_seconds
                    )
                say(run.console, line)
                say(run.console, run.stepper.halved)
                machine.forget_peak_memory(run.device)
            with run.clock.paused("setup"):
                if saved:
                    restore(run, saved)
                elif begun.again:
                    begin_again(run)
                progress, rows = _open_outputs(run, stack)
                gc.collect()  # what is not collected now never is
                run.ranks.wait()
        with machine.nothing_old_collected():
            _loop(run, progress, rows)
        stack.pop_all().close()
        return _finish(run, more_follow)


@contextmanager
def _naming_what_is_saved(
    folder: Path, config: RunConfig, ranks: Ranks, run: Run | None = None
) -> Iterator[None]:
    """Say from where a run can be taken up again that Ctrl-C stopped at once: before its steps, or the second time."""
    try:
        yield
    except KeyboardInterrupt:
        where = ""
        if run is not None:
            run.saver.close()
            where = f", after step {run.done} of {config.train.steps}"
        if not checkpoint.checkpoints(folder / "checkpoints"):
            raise
        raise Stopped(
            f"stopped at once{where}. Resume from the newest checkpoint with: "
            f"{resume_command(folder, config, ranks)}"
        ) from None


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
        run.bad_steps[step] = result.bad
        if _reads_flags(run):
            _count_bad_steps(run, result, rows)
        if run.done % run.config.log.every_steps == 0 or step == 0:
            seconds = run.clock.train_seconds()
            row = {"step": run.done, "tokens": run.done * plan.batch_tokens, "train_seconds": seconds}
            loss, grad_norm = float(result.loss), float(result.grad_norm)
            if math.isfinite(loss) and math.isfinite(grad_norm):
                rows({**row, "loss": loss, "grad_norm": grad_norm, "lr_scale": scale})
            progress.train(run.done, loss, seconds)
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
            _count_bad_steps(run, result, rows)
            with run.clock.paused("checkpoint"):
                _save(run, wait=asked_to_stop)
                run.ranks.wait()
        if asked_to_stop:
            raise Stopped(
                f"stopped after step {run.done} of {plan.steps}; a checkpoint is saved. "
                f"Resume with: {resume_command(run.folder, run.config, run.ranks)}"
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
    if not math.isfinite(val_loss):
        run.stepper.to_training()
        kept = _keep_to_look_at(run, f"bad-validation-{run.done:08d}", {"val_loss": str(val_loss)})
        raise RunFailed(
            f"the validation loss after step {run.done} is {val_loss}. {kept}Lower the learning rate"
        )
    tokens = run.done * run.config.train.batch_tokens
    run.outcome.add(run.done, tokens, seconds, val_loss, run.track.target_val_loss)
    row = {"step": run.done, "tokens": tokens, "train_seconds": seconds, "val_loss": val_loss}
    rows({**row, "bits_per_byte": run.predicted.bits_per_byte(val_loss)})
    progress.validation(run.done, val_loss, seconds, run.predicted.describe(val_loss))


def _count_bad_steps(run: Run, result: StepResult, rows: Callable[[dict[str, Any]], None]) -> None:
    """Note the steps whose updates were left out since the flags were read last; raise RunFailed at one too many."""
    first = run.flags_read
    run.flags_read = run.done
    for step in (run.bad_steps[first : run.done].nonzero().flatten() + first).tolist():
        now = step == run.done - 1
        n_skipped = len(run.outcome.skipped_steps) + 1
        if n_skipped > run.options.skip_bad_steps:
            raise _bad_step(run, step, result if now else None)
        run.outcome.skipped_steps.append(step + 1)
        rows({"step": step + 1, "tokens": (step + 1) * run.config.train.batch_tokens, "skipped": True})
        allowed = run.options.skip_bad_steps
        say(
            run.console,
            f"step {step + 1} was not finite, and its update left out ({n_skipped} of {allowed} allowed)",
        )


def _bad_step(run: Run, step: int, result: StepResult | None) -> RunFailed:
    """Return the failure of a step that was not finite, after leaving a checkpoint to look at."""
    per_step = run.config.rows_per_step
    first, last = step * per_step, (step + 1) * per_step - 1
    what = "loss or gradient"
    if result is not None:
        what = f"loss {float(result.loss)}, gradient norm {float(result.grad_norm)}"
    skipped = run.outcome.skipped_steps
    before = f" after {len(skipped)} others were left out" if skipped else ""
    with run.clock.paused("checkpoint"):
        kept = _keep_to_look_at(
            run, f"bad-step-{step + 1:08d}", {"bad_step": step + 1, "rows": [first, last]}
        )
    return RunFailed(
        f"not finite at step {step + 1} of {run.config.train.steps}{before} ({what}; training rows {first} to {last} "
        f"of seed {run.config.seed}): its update was left out and the run stopped. {kept}"
        "Lower the learning rate, lengthen train.warmup_steps, set train.grad_clip, or let such steps pass with "
        "--skip-bad-steps N"
    )


def _keep_to_look_at(run: Run, name: str, what: dict[str, Any]) -> str:
    """Write a checkpoint that is none to resume from, and return the sentence that names it."""
    snapshot = _snapshot(run, what)
    kept = "" if snapshot is None else _written_to_look_at(run, name, snapshot)
    run.ranks.wait()  # torchrun gives the rank that writes 30 s once another has failed
    return kept


def _written_to_look_at(run: Run, name: str, snapshot: checkpoint.Snapshot) -> str:
    with suppress(UserError):  # a full disk is not what this run failed of
        run.saver.wait()
    try:
        path = checkpoint.write(run.folder, snapshot, run=run.saver.run, keep=run.saver.keep, name=name)
    except UserError as error:
        return f"{error}. "
    return f"The weights and the optimizers as they are now lie in {path}. "


def _save(run: Run, *, wait: bool) -> None:
    """Begin to save a checkpoint; with `wait` it is on disk afterwards, or a UserError says why not.

    Where the one before could not be written, a line says so and the run goes on.
    """
    snapshot = _snapshot(run, {})
    if snapshot is None:
        return
    try:
        run.saver.wait()
    except UserError as error:
        say(run.console, f"{error}. The run goes on")
    run.saver.begin(snapshot)
    if wait:
        run.saver.wait()


def _snapshot(run: Run, extra: dict[str, Any]) -> checkpoint.Snapshot | None:
    """Return the run as it is, on the rank that leads; all ranks have to ask."""
    manifest = run.validation_tokens.manifest
    # What lies on several ranks is put together by all of them.
    model = sharding.whole_weights(run.model, keep=run.ranks.leads)
    if isinstance(run.optimizers, sharding.ShardedOptimizers):
        optimizer = run.optimizers.whole_state()
    else:
        optimizer = run.optimizers.state_dict()
    evaluation = _evaluation_weights(run)
    if not run.ranks.leads:
        return None
    state = {
        "step": run.done,
        "saved": time.time(),
        "clock": run.clock.state_dict(),
        "outcome": dataclasses.asdict(run.outcome),
        "choices": choices(run),
        "corpus_sha256": manifest.sha256 if manifest else None,
        "mix": mix_of(run),
        "tokenizer": manifest.tokenizer if manifest else None,
        **extra,
    }
    return checkpoint.Snapshot.of(
        run.done, model=model, optimizer=optimizer, state=state, evaluation=evaluation
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
    """Let SIGINT, SIGTERM and SIGUSR1 (Slurm's warning) end the run after its step; a second SIGINT stops at once."""

    def ask(number: int, frame: object) -> None:
        if run.stop_asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked_before, run.stop_asked = run.stop_asked, True
        if not asked_before:
            with suppress(RuntimeError, OSError):  # the signal came while a line was being written
                say(run.console, "stopping after this step, with a checkpoint (Ctrl-C again stops at once)")

    try:
        before = {number: signal.signal(number, ask) for number in STOPPING}
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
        sinks.append(MetricsFile(run.folder / METRICS, after_step=run.done))
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


def _finish(run: Run, more_follow: bool) -> dict[str, Any]:
    if run.done != run.taken_up_at:
        with run.clock.paused("checkpoint"):
            _save(run, wait=True)
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
            mend=f"free some disk, then {resume_command(run.folder, run.config, run.ranks)}",
        )
    # Nobody leaves the group while another still writes.
    stop_asked = run.ranks.any(run.stop_asked)
    _say_result(run, result)
    _checked(result, run.track, run.options)
    if stop_asked and more_follow:
        raise Stopped(f"stopped when {run.folder} was finished")
    return result


def _say_again(
    folder: str, result: dict[str, Any], track: Track, options: Options, console: Console
) -> dict[str, Any]:
    """Return what a finished run ended with, after saying it once more; it fails once more if it failed."""
    record = f", record {result['record']}" if result.get("record") else ""
    say(
        console,
        f"{folder} is finished already: {result['final_val_loss']:.4f} nats a token after {result.get('steps')} steps"
        f"{record}",
    )
    return _checked(result, track, options)


def _checked(result: dict[str, Any], track: Track, options: Options) -> dict[str, Any]:
    """Return a result; RunFailed where it misses a target that it was to reach."""
    if options.require_target and not result["final_val_loss"] <= track.target_val_loss:
        missed = RunFailed(
            f"the last validation reads {result['final_val_loss']:.4f}, above the required {track.target_val_loss}"
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
    lost = f", lost to interruptions {clock['lost_seconds']:.1f} s" if clock.get("lost_seconds") else ""
    say(
        run.console,
        f"{run.config.name}, seed {run.config.seed}: {result['final_val_loss']:.4f} nats a token"
        f"{f' ({bits})' if bits else ''} after {result['steps']} steps and {clock['train_seconds']:.1f} s counted; "
        f"{where} (validation {clock['validation_seconds']:.1f} s, compile and warm-up "
        f"{clock['compile_seconds']:.1f} s{lost}, in all {clock['total_seconds']:.1f} s)",
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
