"""A run before its first step: data, model, optimizers and folder, new or taken up again."""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import json
import os
import shlex
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nanorun import kernels
from nanorun.config import RunConfig, check_fixed
from nanorun.data.batches import TokenSet, n_validation_windows, open_tokens, rows_per_epoch
from nanorun.data.mix import Mix, make_mix
from nanorun.data.prepare import default_out, prepare, prepare_command
from nanorun.data.shards import JOURNAL_NAME, PARTIAL, Manifest
from nanorun.data.sources import load_source, source_names
from nanorun.data.text_bytes import PredictedText, predicted_text
from nanorun.errors import UserError, nearest, printable, shown
from nanorun.files import new_folder, write_whole
from nanorun.head import refuse_without_fp8
from nanorun.model import GPT
from nanorun.names import path_word
from nanorun.optim.averaging import make_average
from nanorun.optim.build import OptimizerSet, build_optimizers
from nanorun.records.record import Hardware
from nanorun.records.report import TrackView
from nanorun.tables import to_toml
from nanorun.tracks import Track
from nanorun.training import checkpoint, machine, sharding
from nanorun.training.clock import TrainingClock
from nanorun.training.distributed import Ranks
from nanorun.training.memory import choose_activations, foreseen_states
from nanorun.training.outcome import Outcome
from nanorun.training.saved import check_optimizer, check_state, check_weights, refused
from nanorun.training.step import Stepper, chosen_precision
from nanorun.training.taking_up import (
    METRICS,
    Begun,
    leaving_no_empty_folder,
    note_for_restarts,
    note_interruption,
    remove_new_run,
)
from nanorun.training.trust import trust_flag

PATCH = "source.patch"
DETERMINISTIC_COST = (
    "no time that could be measured on a CPU, where a step takes as long within 2 %; not measured on CUDA"
)
"""Found by scripts/bench_step.py --deterministic, on sotu and shakespeare-sprint."""
ELSEWHERE = "free some disk, or choose another folder with --runs"


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
    deterministic: bool = False
    """Let torch use deterministic algorithms alone; an operation that has none ends the run."""
    reproduces: str = ""
    """Id of the record whose run this is once more; what it leaves is then no record of the track."""
    start: Path = Path()
    """The folder that relative paths in data.mix begin at."""
    run: str = ""
    """Name of the run's folder under `runs`; "" makes one of time, track, preset and seed."""
    skip_bad_steps: int = 0
    """How many steps whose loss or gradient is not finite are left out before the run fails."""
    allow_inexact: bool = False
    """Take a run up where the bits will differ from one that was never stopped."""
    kernels: bool = True
    """Let a CPU run by nanorun's own kernels where it can; a record made without them is reproduced without."""
    threads: int = 0
    """Threads to compute with on a CPU; 0: what the environment states, or else what is fastest."""


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
    saver: checkpoint.Saver
    bad_steps: torch.Tensor
    """For each step whether its update was left out; on the device, so that setting one waits for nothing."""
    validation_tokens: TokenSet
    predicted: PredictedText
    """What each validation predicts."""
    console: Console
    outcome: Outcome = dataclasses.field(default_factory=Outcome)
    done: int = 0
    """Steps finished."""
    compiled: bool = False
    stop_asked: bool = False
    flags_read: int = 0
    """Steps whose flags in `bad_steps` were read."""
    taken_up_at: int = -1
    """The step of the checkpoint that the run was taken up from."""


def set_up(
    config: RunConfig,
    track: Track,
    options: Options,
    console: Console,
    clock: TrainingClock,
    device: torch.device,
    ranks: Ranks,
    begun: Begun,
) -> Run:
    check_fixed(track, config)
    folder = _data_folder(config, options)
    _prepare_if_embedded(config.data.corpus, config.data.tokenizer, folder, console, ranks)
    validation_tokens = open_tokens(folder, "val")
    manifest = _checked_manifest(config.data.corpus, config, validation_tokens, folder)
    tokens = (
        _open_mix(config, options, folder, manifest, console, ranks)
        if config.data.mix
        else open_tokens(folder, "train")
    )
    _check_lengths(config, tokens, validation_tokens)
    predicted = _predicted(config, validation_tokens, folder, ranks)
    if config.train.fp8_head:
        refuse_without_fp8(device, config.model.n_embd)
    model = _new_model(config, manifest.vocab_size, device, ranks)
    model.fp8_head = config.train.fp8_head
    if config.model.document_mask:
        model.document_token = document_token(manifest.tokenizer["name"], manifest.tokenizer.get("eot"))
    average = make_average(**config.average.model_dump())
    optimizers = (
        sharding.build_sharded(model, config.optim_by_role, average, ranks)
        if sharding.applies(config, ranks)
        else build_optimizers(model, config.optim_by_role, average, ranks)
    )
    stepper = Stepper(model, optimizers, tokens, config, device=device, ranks=ranks)
    run_folder = Path(begun.folder)
    if not begun.resumes:
        run_folder = Path(
            ranks.broadcast_text(str(_new_folder(config, options, begun)) if ranks.leads else "")
        )
    with leaving_no_empty_folder(run_folder, ranks, begun):
        saver = checkpoint.Saver(
            run_folder / "checkpoints",
            run=checkpoint.identity(run_folder) if ranks.leads else "",
            keep=config.checkpoint.keep,
            also=run_folder / METRICS,
        )
        if ranks.leads:
            saver.clear()
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
            saver,
            torch.zeros(config.train.steps, dtype=torch.bool, device=device),
            validation_tokens,
            predicted,
            console,
        )
        run.outcome.initial_weights_sha256 = checkpoint.weights_sha256(model)
        run.outcome.code = _keep_code(run, begun.resumes)
        _print_groups(run)
        return run


def _predicted(config: RunConfig, validation_tokens: TokenSet, folder: Path, ranks: Ranks) -> PredictedText:
    """Return what a validation predicts, counted by the rank alone that tells it."""
    if not ranks.leads:
        return PredictedText(0, 0, exact=False)
    return predicted_text(validation_tokens, config.validation.tokens, folder)


def _check_lengths(config: RunConfig, tokens: TokenSet | Mix, validation_tokens: TokenSet) -> None:
    """Raise UserError where a corpus is too small for its context, or for its validation."""
    for one in [part.tokens for part in tokens.parts] if isinstance(tokens, Mix) else [tokens]:
        rows_per_epoch(one, config.model.context_len)
    n_validation_windows(
        validation_tokens,
        n_tokens=config.validation.tokens or None,
        context_len=config.model.context_len,
        stride=config.validation.stride or config.model.context_len,
    )


def _new_model(config: RunConfig, vocab_size: int, device: torch.device, ranks: Ranks) -> GPT:
    try:
        if sharding.applies(config, ranks):
            precision = chosen_precision(config.train.precision, device)
            model = sharding.new_model(config, vocab_size, device, ranks, precision)
        else:
            model = GPT(config.model, vocab_size)
            model.initialise(config.seed)
            model.to(device)
    except (RuntimeError, MemoryError, TypeError, OverflowError) as error:
        # Out of memory on either device, or a size that is no 64-bit integer.
        reason = (str(error).splitlines() or ["out of memory"])[0]
        smaller = f"model.n_embd{', model.ngram_buckets' * bool(config.model.ngrams)} or model.n_layer"
        raise UserError(
            f"a model of {config.model.n_layer} layers, {config.model.n_embd} wide, does not fit this machine "
            f"({reason[:200]}); make {smaller} smaller"
        ) from None
    if config.train.checkpoint_activations != "auto":
        model.checkpoint_activations = config.train.checkpoint_activations
    return model


def document_token(tokenizer: str, eot: int | None) -> int:
    """Return the token that begins a document; UserError where a tokenizer has none."""
    if eot is None:
        raise UserError(
            f"model.document_mask = true needs a token between documents, and the tokenizer {tokenizer!r} has none: "
            "take one that has, such as gpt2, or leave model.document_mask out"
        )
    return eot


def _data_folder(config: RunConfig, options: Options) -> Path:
    if (options.data / "manifest.json").exists():
        return options.data
    if (options.data / JOURNAL_NAME).exists() or any(options.data.glob(f"*{PARTIAL}")):
        raise UserError(
            f"{options.data}: its preparation was interrupted; run the same `nanorun prepare-data` command again, "
            "which goes on where it was"
        )
    if not _is_corpus(config.data.corpus):
        raise UserError(
            f"{options.data}: no prepared {config.data.corpus!r} here, and this version of nanorun can't make it "
            f"(it prepares {', '.join(source_names())}); pick a track on one of those, such as sotu"
        )
    return default_out(config.data.corpus, config.data.tokenizer, root=options.data)


def _is_corpus(name: str) -> bool:
    """Whether `name` is a corpus', or one of a family's such as `family:argument`; otherwise it is a path."""
    return name.partition(":")[0] in source_names()


def _open_mix(
    config: RunConfig, options: Options, folder: Path, manifest: Manifest, console: Console, ranks: Ranks
) -> Mix:
    """Return the corpora that data.mix names, embedded ones prepared first; `folder` holds the run's own corpus."""
    tokens = {}
    for name in config.data.mix:
        place = _mix_folder(name, config, options, folder)
        if _is_corpus(name):
            _prepare_if_embedded(name, config.data.tokenizer, place, console, ranks)
        tokens[name] = open_tokens(place, "train")
        if _is_corpus(name):
            _checked_manifest(name, config, tokens[name], place)
    return make_mix(config.data.mix, tokens, validated_on=manifest)


def _mix_folder(name: str, config: RunConfig, options: Options, folder: Path) -> Path:
    """Return where a corpus of the mix lies, which `name` calls by its name or by its folder."""
    if name == config.data.corpus:
        return folder
    if not _is_corpus(name):
        place = options.start / name
        if not place.is_dir():
            raise UserError(
                f"data.mix: {name!r} is neither a corpus ({', '.join(source_names())}) nor a folder of prepared data"
                f"; prepare one with: nanorun prepare-data text --input PATH --tokenizer {config.data.tokenizer} --out "
                f"DIR.{nearest(name, source_names())}"
            )
        return place
    if folder == options.data:
        raise UserError(
            f"data.mix: --data {options.data} is the folder of {config.data.corpus!r} alone, and the mix wants "
            f"{name!r} too: name the folder above it with --data, or give the folder of {name!r} in the mix"
        )
    return default_out(name, config.data.tokenizer, root=options.data)


def _prepare_if_embedded(corpus: str, tokenizer: str, folder: Path, console: Console, ranks: Ranks) -> None:
    if not (folder / "manifest.json").exists():
        source = load_source(corpus)
        command = prepare_command(corpus, tokenizer)
        if not source.EMBEDDED:
            raise UserError(f"{folder}: no prepared data of {corpus!r} here; make it with: {command}")
        say(console, f"{folder} is not there yet: preparing the embedded corpus {corpus!r} first ({command})")
        if ranks.leads:
            prepare(corpus, out=folder, tokenizer=tokenizer)
    ranks.wait()  # the others wait here until the files exist


def _checked_manifest(corpus: str, config: RunConfig, tokens: TokenSet, folder: Path) -> Manifest:
    manifest = tokens.manifest
    assert manifest is not None
    found = (manifest.corpus, manifest.tokenizer["name"])
    wanted = (corpus, config.data.tokenizer)
    if found != wanted:
        raise UserError(
            f"{folder} holds {found[0]!r} in {found[1]!r} tokens, and the run wants {wanted[0]!r} in {wanted[1]!r}: "
            "move that folder away, or name another with --data"
        )
    return manifest


def _new_folder(config: RunConfig, options: Options, begun: Begun) -> Path:
    """Return the folder of a run that begins; it may lie there already, of one that ended before it saved anything."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    base = options.runs / f"{stamp}-{config.track}-{path_word(config.name)}-s{config.seed}"
    folder = Path(begun.folder) if begun.folder else new_folder(base, mend=ELSEWHERE)
    try:
        if not begun.again:
            write_whole(folder / "config.toml", to_toml(config.model_dump()), mend=ELSEWHERE)
        write_options(folder, options)
        note_for_restarts(folder, config)
    except UserError:
        if not begun.again:
            remove_new_run(folder)
        raise
    return folder


def _keep_code(run: Run, resumed: bool) -> dict[str, Any]:
    """Return the record's `code`, its patch left in the folder of a new run.

    The patch holds the files of outside optimizers as new ones, so that a record says what it trained with.
    """
    code, patch = machine.code_identity()
    sources = run.optimizers.outside_sources()
    if sources:
        # A patch of the tree that was too long to keep is not to be taken for whole.
        if code["patch"] or not code["dirty"]:
            patch = (patch or "") + "".join(_as_new_file(*item) for item in sources.items())
        names = [f"{name} {checkpoint.hash_of_text(text)[:12]}" for name, text in sources.items()]
        code = {**code, "dirty": True, "patch": PATCH if patch else None, "outside": ", ".join(names)}
    if run.ranks.leads and patch is not None and not resumed:
        write_whole(run.folder / PATCH, patch, mend=ELSEWHERE)
    return code


def _as_new_file(name: str, text: str) -> str:
    """Return the patch that makes `outside/<name>` with that text."""
    # Not splitlines: it takes a form feed for the end of a line, and git does not.
    source = [f"{line}\n" for line in text.removesuffix("\n").split("\n")]
    lines = difflib.unified_diff([], source, "/dev/null", f"b/outside/{name}")
    return f"diff --git a/outside/{name} b/outside/{name}\nnew file mode 100644\n" + "".join(lines)


def read_patch(folder: Path) -> str | None:
    """Return how the code that a run began with differed from its commit; None where it did not."""
    path = folder / PATCH
    return path.read_text(encoding="utf-8") if path.exists() else None


def write_options(folder: Path, options: Options) -> None:
    """Keep the options beside the config, so that `--resume` needs nothing but the run's folder."""
    # Whole paths: a run may be taken up again from another folder.
    kept = {k: str(v.resolve()) if isinstance(v, Path) else v for k, v in dataclasses.asdict(options).items()}
    write_whole(folder / "options.json", json.dumps(kept, indent=1), mend=ELSEWHERE)


def _print_groups(run: Run) -> None:
    config, model, tokens = run.config, run.model, run.stepper.tokens
    what = f"{config.data.corpus} in {config.data.tokenizer} tokens ({tokens.n_tokens:,} to train on)"
    if isinstance(tokens, Mix):
        what = (
            f"a mix of {tokens.describe()} in {config.data.tokenizer} tokens ({tokens.n_tokens:,} to train on), "
            f"validated on {config.data.corpus}"
        )
        if not TrackView.of(run.track).mixes_count:
            say(
                run.console,
                f"note: track {run.track.name} fixes its corpus, so a run on a mix does not count there",
            )
    say(
        run.console,
        f"track {run.track.name}: {what}, target {run.track.target_val_loss} nats a token\n"
        f"run {run.folder}: seed {config.seed}, {model.n_parameters():,} parameters, {config.train.steps} steps of "
        f"{config.train.batch_tokens:,} tokens on {run.device}, {run.stepper.precision}",
    )
    if run.options.deterministic:
        say(run.console, f"deterministic algorithms alone: {DETERMINISTIC_COST}")
    if run.device.type == "cpu" and (why := kernels.why_not()):
        say(
            run.console,
            f"plain operations, without the kernels that make a step up to 1.4 times as fast: {why}",
        )
    table = Table("role", "tensors", "parameters", "optimizer", "lr", box=None, pad_edge=False)
    for row in run.optimizers.table():
        # A name may be a path, which is no markup.
        name = Text(shown(row.optimizer))
        table.add_row(row.role, str(row.tensors), f"{row.parameters:,}", name, f"{row.lr:g}")
    run.console.print(table)


def read_saved(begun: Begun, console: Console, ranks: Ranks) -> checkpoint.Checkpoint | None:
    """Return the newest checkpoint that verifies, the same on all ranks, and say which were passed over.

    None for a run that begins.
    """
    if not begun.resumes:
        return None
    folder = Path(begun.folder)
    if (folder / "result.json").exists():
        raise UserError(f"{folder} is finished: its result is in result.json there; start a new run instead")
    found, passed_over = checkpoint.newest_of(folder)
    for line in passed_over:
        say(console, f"passed over: {line}")
    # A disk that hosts share may show each of them another moment of it.
    agreed = ranks.broadcast_text(found.path.name)
    if found.path.name == agreed:
        return found
    return checkpoint.load(found.path.with_name(agreed), run=checkpoint.identity(folder))


def choose_as_before(run: Run, saved: checkpoint.Checkpoint) -> str:
    """Take the machine's choices from the checkpoint, and return whether to compile, `on` or `off`."""
    check_state(saved.state, saved.path, steps=run.config.train.steps)
    before = saved.state["choices"]
    if run.config.train.checkpoint_activations == "auto":
        run.stepper.recompute(before.get("checkpoint_activations", "none"))
    run.stepper.micro_batch_rows = min(int(before["micro_batch_rows"]), run.stepper.rows_of_rank)
    run.stepper.asked_rows = run.stepper.micro_batch_rows
    if run.device.type == "cpu":
        torch.set_num_threads(int(before["n_threads"]))
    if not before.get("kernels", False):
        kernels.allow(False)
    return "on" if before["compiled"] else "off"


def choose(run: Run) -> str:
    """Choose what a new run leaves to the machine, saying so, and return whether to compile as the config has it."""
    if run.config.train.checkpoint_activations == "auto":
        say(run.console, choose_activations(run.stepper))
    return run.config.train.compile


def restore(run: Run, saved: checkpoint.Checkpoint) -> None:
    """Put the run where the checkpoint left it; UserError where the corpus is not the one it trained on."""
    _check_same_data(run, saved)
    check_weights(saved.model, run.model, saved.path)
    shapes = foreseen_states(run.config, run.model.vocab_size, run.device)
    check_optimizer(saved.optimizer, run.optimizers, saved.path, shapes)
    with refused(saved.path):
        if isinstance(run.optimizers, sharding.ShardedOptimizers):
            run.optimizers.load_whole(saved.model, saved.optimizer)
        else:
            run.model.load_state_dict(saved.model, strict=True)
            run.optimizers.load_state_dict(saved.optimizer)
    run.stepper.refresh_working_copy()
    run.done = run.flags_read = run.taken_up_at = int(saved.state["step"])
    newer = (one.name for one in checkpoint.checkpoints(saved.path.parent) if one.name > saved.path.name)
    run.saver.passed_over.update(newer)
    now_code = run.outcome.code
    run.outcome = Outcome(**saved.state["outcome"])
    run.clock.load_state_dict(saved.state["clock"])
    if run.outcome.code != now_code:
        say(run.console, "note: the run began with other code than this; its record names that code")
    then, now = {"kernels": False, **saved.state["choices"]}, choices(run)
    if then["hardware"] != now["hardware"]:
        before = [run.outcome.earlier_hardware] if run.outcome.earlier_hardware else []
        run.outcome.earlier_hardware = " then ".join([*before, then["hardware"]])
    if then != now:
        _allow_other_bits(run, then, now)
    if run.ranks.leads:
        write_options(run.folder, run.options)
    lost = _note_interruption(run, float(saved.state.get("saved", 0.0)))
    say(
        run.console,
        f"resumed after step {run.done} of {run.config.train.steps} from {saved.path}; {lost:.1f} s of work lost "
        "so far",
    )


def begin_again(run: Run) -> None:
    """Count what an earlier part of the run took that ended before it saved anything as lost."""
    began = (run.folder / "config.toml").stat().st_mtime if run.ranks.leads else 0.0
    lost = _note_interruption(run, began)
    say(run.console, f"no checkpoint in {run.folder}: the run begins again; {lost:.1f} s of work lost so far")


def _note_interruption(run: Run, saved: float) -> float:
    """Tell the seconds lost to interruptions apart from those counted, and return them."""
    lost, times = 0.0, 0
    if run.ranks.leads:
        lost, times = note_interruption(run.folder, after_step=run.done, saved=saved)
    lost = run.ranks.slowest(lost)
    run.outcome.resumed = round(run.ranks.slowest(times))
    run.clock.set("lost", lost)
    return lost


def _allow_other_bits(run: Run, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise UserError where a run goes on otherwise than it was begun, unless that was allowed; then keep it."""
    changed = ", ".join(
        f"{key} {then.get(key)} then, {now[key]} now" for key in now if then.get(key) != now[key]
    )
    if not run.options.allow_inexact:
        raise UserError(
            f"the bits would differ from those of a run never stopped ({changed}): go on where it was begun, or add "
            "--allow-inexact, and the record will say so"
        )
    say(run.console, f"note: the bits will differ from a run never stopped ({changed})")
    changes = [run.outcome.inexact] if run.outcome.inexact else []
    run.outcome.inexact = "; ".join([*changes, f"after step {run.done}: {changed}"])


def resume_command(folder: Path, config: RunConfig, ranks: Ranks) -> str:
    """Return the command that takes the run in a folder up again."""
    words = f"nanorun train --resume {shlex.quote(str(folder))}{trust_flag(config)}"
    if ranks.n_ranks == 1:
        return words
    here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.n_ranks))
    hosts = f"--nnodes {ranks.n_ranks // here} … " if here < ranks.n_ranks else ""
    return f"torchrun {hosts}--nproc-per-node {here} -m {words}"


def _check_same_data(run: Run, saved: checkpoint.Checkpoint) -> None:
    """Raise UserError where a corpus is not the one that the checkpoint was trained on."""
    manifest = run.validation_tokens.manifest
    found, wanted = manifest.sha256 if manifest else None, saved.state["corpus_sha256"]
    if found != wanted:
        raise UserError(
            f"{saved.path} was trained on a prepared corpus with sha256 {wanted}, and the one here has {found}: "
            "name the folder it was trained on with --data, or start a new run"
        )
    then, now = (
        {one["manifest_sha256"]: one for one in mix} for mix in (saved.state.get("mix", []), mix_of(run))
    )
    changed = [one["name"] for sha256, one in then.items() if now.get(sha256) != one]
    changed += [one["name"] for sha256, one in now.items() if sha256 not in then]
    if changed:
        raise UserError(
            f"{saved.path} was trained on another mix: what is here of {', '.join(dict.fromkeys(changed))} has other "
            "content or another share; put the corpora back that it was trained on, or start a new run"
        )


def mix_of(run: Run) -> list[dict[str, Any]]:
    """Return name, share and manifest_sha256 of each corpus of the run's mix; nothing where there is none."""
    tokens = run.stepper.tokens
    return tokens.identity() if isinstance(tokens, Mix) else []


def choices(run: Run) -> dict[str, Any]:
    asked = run.config.train.checkpoint_activations
    return {
        **({"checkpoint_activations": run.model.checkpoint_activations} if asked == "auto" else {}),
        "micro_batch_rows": run.stepper.micro_batch_rows,
        "compiled": run.compiled,
        "deterministic": run.options.deterministic,
        "kernels": machine.runs_kernels(run.device),
        "n_threads": torch.get_num_threads(),
        "n_ranks": run.ranks.n_ranks,
        "torch": str(torch.__version__),
        "hardware": Hardware(**machine.hardware(run.device, run.ranks.n_ranks)).label,
    }


def say(console: Console, text: str) -> None:
    """Print lines as they are, but for what the terminal would not print: names in them come from files."""
    if text:
        text = printable(text).encode(console.encoding, "backslashreplace").decode(console.encoding)
        console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)
