"""Train a run: set up, warm up, loop, record."""

from __future__ import annotations

import dataclasses
import datetime
import json
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from nanorun.config import RunConfig
from nanorun.data.batches import TokenSet, open_tokens
from nanorun.data.prepare import default_out, prepare
from nanorun.data.shards import Manifest
from nanorun.data.sources import load_source
from nanorun.errors import RunFailed, Stopped, UserError
from nanorun.model import GPT
from nanorun.optim.build import OptimizerSet, build_optimizers
from nanorun.optim.schedules import scale_at
from nanorun.tables import to_toml
from nanorun.tracks import Track
from nanorun.training import checkpoint, distributed
from nanorun.training.clock import TrainingClock
from nanorun.training.compilation import compile_if_it_pays
from nanorun.training.distributed import Ranks
from nanorun.training.evaluate import validation_loss
from nanorun.training.outcome import Outcome, as_json, write
from nanorun.training.progress import MetricsFile, RunProgress, WandbRun
from nanorun.training.step import Stepper


@dataclasses.dataclass(frozen=True)
class Options:
    """Where a run's files go and how it behaves; nothing here moves a weight."""

    runs: Path = Path("runs")
    data: Path = Path("data")
    records: Path = Path("records")
    device: str = "auto"
    wandb: str = "off"
    record: bool = True
    stop_at_target: bool = False
    """End the run at its first validation under the target; its record says so and does not count."""
    require_target: bool = False
    """Fail, with exit code 1, if the last validation is above the target."""


@dataclasses.dataclass
class Run:
    """A run that is set up: everything the loop works with."""

    config: RunConfig
    track: Track
    options: Options
    folder: Path
    ranks: Ranks
    device: torch.device
    clock: TrainingClock
    model: GPT
    optimizers: OptimizerSet
    stepper: Stepper
    validation_tokens: TokenSet
    console: Console
    outcome: Outcome = dataclasses.field(default_factory=Outcome)
    done: int = 0
    """Steps finished."""
    compiled: bool = False
    stop_asked: bool = False
    bad_step: torch.Tensor = dataclasses.field(default_factory=lambda: torch.tensor(-1))


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
        saved = _saved(resume, console)
        run = _set_up(config, track, options, console, clock, device, ranks, resume)
        asked = _choose_as_before(run, saved) if saved else config.train.compile
    with clock.paused("compile"):
        run.compiled, line = compile_if_it_pays(run.stepper, asked, steps=config.train.steps)
        _say(console, line)
    with clock.paused("setup"):
        if saved:
            _restore(run, saved)
    with _listening(run), ExitStack() as stack:
        progress, rows = _open_outputs(run, stack)
        _loop(run, progress, rows)
    return _finish(run)


def _loop(run: Run, progress: RunProgress, rows: Callable[[dict[str, Any]], None]) -> None:
    plan, checks = run.config.train, run.config.checkpoint
    for step in range(run.done, plan.steps):
        scale = scale_at(
            plan.schedule,
            step,
            steps=plan.steps,
            warmup_steps=plan.warmup_steps,
            cooldown_fraction=plan.cooldown_fraction,
            final_scale=plan.final_scale,
        )
        result = run.stepper.step(step, scale, stop_vote=run.stop_asked)
        run.done = step + 1
        run.bad_step = torch.where((run.bad_step < 0) & result.bad, step, run.bad_step)
        looks = run.done % run.config.log.every_steps == 0 or _validates(run)
        if looks or run.device.type == "cpu":
            _raise_if_bad(run, float(result.loss), float(result.grad_norm))
        if run.done % run.config.log.every_steps == 0 or step == 0:
            seconds = run.clock.train_seconds()
            row = {"step": run.done, "tokens": run.done * plan.batch_tokens, "train_seconds": seconds}
            rows({**row, "loss": float(result.loss), "grad_norm": float(result.grad_norm), "lr_scale": scale})
            progress.train(run.done, float(result.loss), seconds)
        if _validates(run):
            with run.clock.paused("validation"):
                _validate(run, progress, rows)
        if run.outcome.reached and run.options.stop_at_target:
            break
        asked_to_stop = looks_at_votes(run, result.stop_votes)
        if asked_to_stop or (
            checks.every_steps and run.done % checks.every_steps == 0 and run.done < plan.steps
        ):
            with run.clock.paused("checkpoint"):
                _save(run)
        if asked_to_stop:
            raise Stopped(
                f"stopped after step {run.done} of {plan.steps}; a checkpoint is saved. "
                f"Resume with: nanorun train --resume {run.folder}"
            )


def looks_at_votes(run: Run, stop_votes: torch.Tensor) -> bool:
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
    rows({"step": run.done, "tokens": tokens, "train_seconds": seconds, "val_loss": val_loss})
    progress.validation(run.done, val_loss, seconds)


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


def _set_up(
    config: RunConfig,
    track: Track,
    options: Options,
    console: Console,
    clock: TrainingClock,
    device: torch.device,
    ranks: Ranks,
    resume: Path | None,
) -> Run:
    track.check(config.model_dump())
    folder = _data_folder(config, options)
    _prepare_if_embedded(config, folder, console, ranks)
    tokens, validation_tokens = open_tokens(folder, "train"), open_tokens(folder, "val")
    manifest = _checked_manifest(config, tokens, folder)
    model = GPT(config.model, manifest.vocab_size)
    model.initialise(config.seed)
    model.checkpoint_activations = config.train.checkpoint_activations
    model.to(device)
    optimizers = build_optimizers(model, config.optim_by_role)
    stepper = Stepper(model, optimizers, tokens, config, device=device, ranks=ranks)
    run_folder = resume or Path(
        ranks.broadcast_text(str(_new_folder(config, options)) if ranks.leads else "")
    )
    run = Run(
        config,
        track,
        options,
        run_folder,
        ranks,
        device,
        clock,
        model,
        optimizers,
        stepper,
        validation_tokens,
        console,
    )
    run.bad_step = run.bad_step.to(device)
    run.outcome.initial_weights_sha256 = checkpoint.weights_sha256(model)
    _print_groups(run, tokens)
    return run


def _data_folder(config: RunConfig, options: Options) -> Path:
    if (options.data / "manifest.json").exists():
        return options.data
    return default_out(config.data.corpus, config.data.tokenizer, root=options.data)


def _prepare_if_embedded(config: RunConfig, folder: Path, console: Console, ranks: Ranks) -> None:
    if not (folder / "manifest.json").exists():
        corpus, tokenizer = config.data.corpus, config.data.tokenizer
        source = load_source(corpus)
        command = f"nanorun prepare-data {corpus} --tokenizer {tokenizer}"
        if not source.EMBEDDED:
            raise UserError(
                f"{folder}: no prepared data of {corpus!r} here; make it with: {command} --input PATH"
            )
        _say(
            console, f"{folder} is not there yet: preparing the embedded corpus {corpus!r} first ({command})"
        )
        if ranks.leads:
            prepare(corpus, out=folder, tokenizer=tokenizer)
    ranks.any(False)  # the others wait here until the files exist


def _checked_manifest(config: RunConfig, tokens: TokenSet, folder: Path) -> Manifest:
    manifest = tokens.manifest
    assert manifest is not None
    found = (manifest.corpus, manifest.tokenizer["name"])
    wanted = (config.data.corpus, config.data.tokenizer)
    if found != wanted:
        raise UserError(
            f"{folder} holds {found[0]!r} in {found[1]!r} tokens, and the run wants {wanted[0]!r} in {wanted[1]!r}: "
            "move that folder away, or name another with --data"
        )
    return manifest


def _new_folder(config: RunConfig, options: Options) -> Path:
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    base = options.runs / f"{stamp}-{config.track}-{config.name}-s{config.seed}"
    for n in range(1, 1000):
        folder = base if n == 1 else base.with_name(f"{base.name}-{n}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        (folder / "config.toml").write_text(to_toml(config.model_dump()))
        kept = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(options).items()}
        (folder / "options.json").write_text(json.dumps(kept, indent=1))
        return folder
    raise UserError(f"{base}: a thousand runs began in this second; start again")


def _print_groups(run: Run, tokens: TokenSet) -> None:
    config, model = run.config, run.model
    _say(
        run.console,
        f"track {run.track.name}: {config.data.corpus} in {config.data.tokenizer} tokens "
        f"({tokens.n_tokens:,} to train on), target {run.track.target_val_loss} nats a token\n"
        f"run {run.folder}: seed {config.seed}, {model.n_parameters():,} parameters, {config.train.steps} steps of "
        f"{config.train.batch_tokens:,} tokens on {run.device}, {run.stepper.precision}",
    )
    table = Table("role", "tensors", "parameters", "optimizer", "lr", box=None, pad_edge=False)
    for row in run.optimizers.table():
        table.add_row(row.role, str(row.tensors), f"{row.parameters:,}", row.optimizer, f"{row.lr:g}")
    run.console.print(table)


def _saved(resume: Path | None, console: Console) -> checkpoint.Checkpoint | None:
    if resume is None:
        return None
    if (resume / "result.json").exists():
        raise UserError(f"{resume} is finished: its result is in result.json there; start a new run instead")
    found, passed_over = checkpoint.load_newest(resume / "checkpoints")
    for line in passed_over:
        _say(console, f"passed over: {line}")
    return found


def _choose_as_before(run: Run, saved: checkpoint.Checkpoint) -> str:
    """Take the machine's choices from the checkpoint, and return whether to compile, `on` or `off`."""
    choices = saved.state["choices"]
    run.stepper.micro_batch_rows = min(int(choices["micro_batch_rows"]), run.stepper.rows_of_rank)
    if run.device.type == "cpu":
        torch.set_num_threads(int(choices["n_threads"]))
    return "on" if choices["compiled"] else "off"


def _restore(run: Run, saved: checkpoint.Checkpoint) -> None:
    run.model.load_state_dict(saved.model, strict=True)
    run.optimizers.load_state_dict(saved.optimizer)
    run.stepper.refresh_working_copy()
    run.done = int(saved.state["step"])
    run.outcome = Outcome(**saved.state["outcome"])
    run.outcome.resumed += 1
    run.clock.load_state_dict(saved.state["clock"])
    then, now = saved.state["choices"], _choices(run)
    if then != now:
        changed = ", ".join(
            f"{key} {then.get(key)} then, {now[key]} now" for key in now if then.get(key) != now[key]
        )
        _say(run.console, f"note: the bits will differ from a run never stopped ({changed})")
    _say(run.console, f"resumed after step {run.done} of {run.config.train.steps} from {saved.path}")


def _choices(run: Run) -> dict[str, Any]:
    return {
        "micro_batch_rows": run.stepper.micro_batch_rows,
        "compiled": run.compiled,
        "n_threads": torch.get_num_threads(),
        "n_ranks": run.ranks.n_ranks,
        "torch": str(torch.__version__),
    }


def _save(run: Run) -> None:
    state = {
        "step": run.done,
        "clock": run.clock.state_dict(),
        "outcome": dataclasses.asdict(run.outcome),
        "choices": _choices(run),
        "tokenizer": run.stepper.tokens.manifest.tokenizer if run.stepper.tokens.manifest else None,
    }
    if run.ranks.leads:
        checkpoint.save(
            run.folder / "checkpoints",
            run.done,
            model=run.model,
            optimizer=run.optimizers.state_dict(),
            state=state,
            keep=run.config.checkpoint.keep,
        )


@contextmanager
def _listening(run: Run) -> Iterator[None]:
    """Let SIGINT and SIGTERM end the run after its step; a second SIGINT stops at once."""

    def ask(number: int, frame: object) -> None:
        if run.stop_asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        run.stop_asked = True
        _say(run.console, "stopping after this step, with a checkpoint (Ctrl-C again stops at once)")

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
            with run.clock.paused("setup"):
                sinks.append(WandbRun(run.options.wandb, run.folder, run.config.model_dump()))
    for sink in sinks:
        stack.callback(sink.close)

    def write_row(row: dict[str, Any]) -> None:
        for sink in sinks:
            sink.write(row)

    return progress, write_row


def _finish(run: Run) -> dict[str, Any]:
    with run.clock.paused("checkpoint"):
        _save(run)
    clock = run.clock.seconds()
    weights = checkpoint.weights_sha256(run.model)
    result = as_json(run.outcome, run=run.folder, record=None, steps=run.done, weights=weights, clock=clock)
    if run.ranks.leads and run.options.record:
        folder = write(
            run.outcome,
            run.config,
            run.track,
            result,
            run.stepper.tokens,
            run.validation_tokens,
            run.options.records,
            device=run.device,
            n_ranks=run.ranks.n_ranks,
            compiled=run.compiled,
            stop_at_target=run.options.stop_at_target,
            n_parameters=run.model.n_parameters(),
            optimizer_state_bytes=run.optimizers.state_bytes(),
        )
        result["record"] = str(folder)
    if run.ranks.leads:
        (run.folder / "result.json").write_text(json.dumps(result, indent=1))
    _say_result(run, result)
    if run.options.require_target and not result["final_val_loss"] <= run.track.target_val_loss:
        raise RunFailed(
            f"the last validation reads {result['final_val_loss']:.4f}, above the required {run.track.target_val_loss}"
        )
    return result


def _say_result(run: Run, result: dict[str, Any]) -> None:
    target, reached, clock = run.track.target_val_loss, result["reached"], result["clock"]
    where = (
        f"first at or under {target} after step {reached['step']}, {reached['seconds']:.1f} s counted"
        if reached
        else f"{target} was not reached"
    )
    _say(
        run.console,
        f"{run.config.name}, seed {run.config.seed}: {result['final_val_loss']:.4f} after {result['steps']} steps and "
        f"{clock['train_seconds']:.1f} s counted; {where} (validation {clock['validation_seconds']:.1f} s, "
        f"compile and warm-up {clock['compile_seconds']:.1f} s, in all {clock['total_seconds']:.1f} s)",
    )
    if result["record"]:
        _say(run.console, f"record {result['record']}\nnext: nanorun report --track {run.track.name}")
    else:
        _say(run.console, f"no record, as asked\nnext: nanorun sample {run.folder}")


def _say(console: Console, text: str) -> None:
    if text:
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def _nothing() -> None:
    pass
