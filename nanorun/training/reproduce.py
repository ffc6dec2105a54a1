"""A record's run made again on this machine, and what comes of it.

The run is set up from the record alone: config, seed, target, number of threads, compiled or not. It leaves a run's
folder of its own under `runs` and no record of the track, whose records are independent runs; what it found is
written beside the record as `reproductions/<date>-<id8>.json`.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from nanorun.config import RunConfig, make_config
from nanorun.data.prepare import default_out, prepare_command
from nanorun.data.shards import load_manifest
from nanorun.data.sources import source_names
from nanorun.data.tokenizers import check_tokenizer_name
from nanorun.errors import RunFailed, Stopped, UserError, printable
from nanorun.files import new_folder
from nanorun.names import path_word
from nanorun.records.agreement import Agreement, compare_runs, differences
from nanorun.records.record import Code, Hardware, Record, Software, load_json, read_record, read_records
from nanorun.records.report import row_groups
from nanorun.records.states import (
    STATES_VERSION,
    Reproduction,
    content_sha256,
    find_record,
    short,
    state_of,
    who,
    write_beside,
)
from nanorun.tables import flattened, read_toml, to_toml
from nanorun.tracks import Significance, Track, load_track, track_names
from nanorun.training import distributed, machine, recorded_code
from nanorun.training.setup import ELSEWHERE, Options, say
from nanorun.training.train import train

BUSY_LOAD = 0.5
"""Processes that wanted a core beside the run, over the last minute: above this the machine was not quiet."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What `nanorun reproduce` was asked for."""

    record: str
    records: Path = Path("records")
    data: Path = Path("data")
    runs: Path = Path("runs")
    device: str = "auto"
    seed: int | None = None
    by: str | None = None
    trust_code: bool = False
    at_commit: bool = False
    dry_run: bool = False
    resume: Path | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """A reproduction that may begin: everything that was looked at before it."""

    request: Request
    folder: Path
    record: Record
    record_sha256: str
    config: RunConfig
    data: Path
    device: torch.device
    n_threads: int
    by: str
    repository: Path | None
    """Where the record's commit is checked out from; None to run the code that is here."""
    patch: str | None
    same_code: bool


def reproduce(request: Request, console: Console) -> dict[str, Any]:
    """Return what `--json` prints of a record's run made again, after writing it beside the record.

    Raises UserError, Stopped, and RunFailed where the run fails or does not agree with the record.
    """
    if not _leads():
        console = Console(quiet=True)
    load_before = _load()
    plan = _planned(request, console)
    notes = (*differences(plan.record, *_setting(plan)), *_notes(plan))
    _say_plan(plan, notes, console)
    if request.dry_run:
        say(console, "nothing was run, as asked")
        return _document(plan, notes=notes)
    private = _private_folder(plan)
    with _with_threads(plan.n_threads):
        again = _run_again(plan, private, console)
    if again is None:  # a rank that only computed
        return {}
    busy = _busy(plan, again, load_before, _load())
    found = compare_runs(plan.record, again, _row_of(plan), same_code=plan.same_code, busy=busy)
    told = (*differences(plan.record, again.code, again.hardware, again.software), *_notes(plan))
    file = _write(plan, _reproduction(plan, again, found, told), private)
    _say_outcome(plan, found, file, console)
    result = _document(plan, notes=told, again=again, found=found, file=file, private=private)
    if found.verdict != "agrees":
        failed = RunFailed(f"{plan.record.id} was not reproduced; {file} says why, and it is contested now")
        failed.result = result
        raise failed
    return result


def _write(plan: Plan, one: Reproduction, private: Path) -> Path:
    try:
        return write_beside(plan.folder, one).path
    except UserError as error:
        raise UserError(
            f"{error}. The run is kept; write it once more with: {_command_to_go_on(plan, private)}"
        ) from None


def _planned(request: Request, console: Console) -> Plan:
    """Return the plan of a reproduction that may begin. Raises UserError for all that stands in its way."""
    folder = find_record(request.record, request.records)
    record = read_record(folder)
    if not request.dry_run and not os.access(folder, os.W_OK):
        raise UserError(
            f"{folder} cannot be written to, and the reproduction goes there: copy it to where you may write, under "
            "its track's name"
        )
    by = who(request.by)
    config = _config_of(record, request.seed)
    patch = recorded_code.read_recorded_patch(folder, record)
    same_code = recorded_code.same_code(record, patch)
    repository = _repository(request, folder, record, patch, same_code, console)
    data = _data_of(record, request.data)
    config = _with_its_mix(config, record, request.data, data)
    device = distributed.pick_device(_device_name(request.device, record))
    if device.type == record.hardware.device and config.train.compile == "auto":
        compiled = "on" if record.software.compiled else "off"
        config = config.model_copy(update={"train": config.train.model_copy(update={"compile": compiled})})
    return Plan(
        request=request,
        folder=folder,
        record=record,
        record_sha256=content_sha256(load_json(folder / "record.json")),
        config=config,
        data=data,
        device=device,
        n_threads=_n_threads(record, device),
        by=by,
        repository=repository,
        patch=patch,
        same_code=same_code or (repository is not None and not (record.code.dirty and patch is None)),
    )


def _config_of(record: Record, seed: int | None) -> RunConfig:
    """Return the config to run: the record's, under a name fit for a folder. Raises UserError."""
    config = make_config(record.config, where=f"the record {record.id}")
    claimed = {
        "track": (config.track, record.track),
        "seed": (config.seed, record.seed),
        "steps": (config.train.steps, record.declared_steps),
    }
    for key, (in_config, in_record) in claimed.items():
        if in_config != in_record:
            raise UserError(
                f"{record.id} contradicts itself: its config has {key} {ascii(in_config)[:60]}, and the record says "
                f"{ascii(in_record)[:60]}; there is no telling what ran"
            )
    if record.target_val_loss <= 0:
        raise UserError(
            f"{record.id} has the target {record.target_val_loss:g}, and a loss is above 0: no run was made for it"
        )
    # A name becomes a folder; one that could not be a preset's is made into one.
    changes: dict[str, Any] = {"name": path_word(config.name), **({} if seed is None else {"seed": seed})}
    return make_config({**config.model_dump(), **changes}, where=f"the record {record.id}")


def _repository(
    request: Request, folder: Path, record: Record, patch: str | None, same_code: bool, console: Console
) -> Path | None:
    """Return where to check the record's code out from, None for the code here; refuse what is not trusted."""
    outside = recorded_code.outside_names(record) or record.code.outside
    foreign = bool(outside) or (patch is not None and not same_code)
    if foreign:
        recorded_code.show_code(console, record, patch, folder / "source.patch")
        what = "an optimizer from outside nanorun" if outside else "a patch of nanorun's code"
        if not request.trust_code:
            whole = "" if recorded_code.is_in_history(record) else f"; {_all_of_its_commit(record)}"
            raise UserError(
                f"{record.id} ran with {what}, and running it runs somebody else's program with your rights: read it "
                f"above and in {folder / 'source.patch'}, then add --trust-code{whole}"
            )
    elif not request.at_commit:
        return None
    _check_history(request, record, console)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("code that is checked out for the run takes one rank: start it without torchrun")
    return recorded_code.repository_of(record)


def _check_history(request: Request, record: Record, console: Console) -> None:
    """Say that a commit from elsewhere runs, before it does. Raises UserError where it is not trusted."""
    if recorded_code.is_in_history(record):
        return
    if not request.trust_code:
        raise UserError(f"{record.id}: {_all_of_its_commit(record)}, then add --trust-code to run it")
    say(console, f"note: {_all_of_its_commit(record)}")


def _all_of_its_commit(record: Record) -> str:
    commit = printable(str(record.code.commit))
    return (
        f"all code of commit {commit} runs, not a patch alone, and that commit is not in the history of the code "
        f"here: look at it with: git diff HEAD...{commit}"
    )


def _data_of(record: Record, root: Path) -> Path:
    """Return the folder of the corpus that the record trained on. Raises UserError where it is not here."""
    wanted = record.corpus
    known = _is_known(wanted.name)
    if (root / "manifest.json").exists() or not known:
        folder = root
    else:
        check_tokenizer_name(wanted.tokenizer)
        folder = default_out(wanted.name, wanted.tokenizer, root=root)
    if not (folder / "manifest.json").exists():
        if not known:
            mend = (
                f"this version of nanorun cannot prepare {short(wanted.name)!r}; name its folder with --data"
            )
        else:
            place = "" if root == Path("data") else f" --data {root}"
            mend = f"make it with: {prepare_command(wanted.name, wanted.tokenizer)}{place}"
        raise UserError(
            f"{folder}: no prepared corpus here, and the record needs {short(wanted.name)!r}; {mend}"
        )
    manifest = load_manifest(folder)
    if manifest.sha256 == wanted.manifest_sha256:
        return folder
    pairs = {
        "corpus": (wanted.name, manifest.corpus),
        "tokenizer": (wanted.tokenizer, str(manifest.tokenizer["name"])),
        "vocabulary": (wanted.vocab_size, manifest.vocab_size),
        "training tokens": (wanted.train_tokens, manifest.n_tokens("train")),
        "validation tokens": (wanted.val_tokens, manifest.n_tokens("val")),
    }
    differing = [
        f"{key} {short(str(then))} there, {short(str(here))} here"
        for key, (then, here) in pairs.items()
        if then != here
    ]
    raise UserError(
        f"{folder} is not the corpus of {record.id}: manifest {wanted.manifest_sha256[:12]} there, "
        f"{manifest.sha256[:12]} here ({'; '.join(differing) or 'as many tokens, of another text'}). Name that "
        "corpus' folder with --data, or prepare it from the texts that the record was made from"
    )


def _with_its_mix(config: RunConfig, record: Record, root: Path, data: Path) -> RunConfig:
    """Return the config with the corpora of its mix by the folders that hold them here. Raises UserError.

    A corpus is known by its manifest's hash, wherever it lies: under the name or the path that the config has, or in
    any folder of `root`; `data` holds the corpus that the run is validated on.
    """
    if bool(config.data.mix) != bool(record.corpus.mix):
        raise UserError(
            f"{record.id} contradicts itself: its config {'names' if config.data.mix else 'names no'} mix, and its "
            f"corpus {'holds one' if record.corpus.mix else 'holds none'}; there is no telling what ran"
        )
    folders: dict[str, Path] = {}
    named = [
        default_out(name, config.data.tokenizer, root=root) if _is_known(name) else Path(name)
        for name in config.data.mix
    ]
    beside = sorted(path.parent for path in root.glob("*/manifest.json"))
    for folder in [data, *named, *beside] if config.data.mix else []:
        if (folder / "manifest.json").exists():
            folders.setdefault(load_manifest(folder).sha256, folder)
    for part in record.corpus.mix:
        if part.manifest_sha256 not in folders:
            tokenizer = config.data.tokenizer
            mend = (
                f"make it with: {prepare_command(part.name, tokenizer)}"
                if _is_known(part.name)
                else "copy it there"
            )
            raise UserError(
                f"{record.id} trained on a mix, and its part {short(part.name)!r} (manifest "
                f"{short(part.manifest_sha256)[:12]}) is in no folder of {root}; {mend}, or name the folder above it "
                "with --data"
            )
    mix = {str(folders[one.manifest_sha256].resolve()): one.share for one in record.corpus.mix}
    return make_config(
        {**config.model_dump(), "data": {**config.data.model_dump(), "mix": mix}},
        where=f"the record {record.id}",
    )


def _is_known(corpus: str) -> bool:
    return corpus.partition(":")[0] in source_names()


def _device_name(asked: str, record: Record) -> str:
    """Return the device to use: for `auto` the record's kind of device."""
    if asked != "auto":
        return asked
    return "cpu" if record.hardware.device == "cpu" or not torch.cuda.is_available() else "auto"


def _n_threads(record: Record, device: torch.device) -> int:
    """Return the threads to compute with: the record's, where both run on a CPU and this one has as many."""
    wanted, there_are = record.hardware.n_threads, os.cpu_count() or 1
    alike = device.type == record.hardware.device == "cpu" and 1 <= wanted <= there_are
    return wanted if alike else torch.get_num_threads()


@contextmanager
def _with_threads(n_threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _setting(plan: Plan) -> tuple[Code, Hardware, Software]:
    """Return code, hardware and software that the run will have, as far as they are known before it."""
    code = _code_here() if plan.repository is None else plan.record.code
    n_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    hardware = {**machine.hardware(plan.device, n_ranks), "n_threads": plan.n_threads}
    then = plan.record.software
    kernels = then.kernels and machine.runs_kernels(plan.device)
    software = machine.software(then.compiled, then.deterministic, kernels)
    return code, Hardware(**hardware), Software(**software)


def _code_here() -> Code:
    # A reproduction keeps no patch beside it.
    return Code(**{**machine.code_identity()[0], "patch": None})


def _notes(plan: Plan) -> tuple[str, ...]:
    """Return what else may set the two runs apart."""
    record, notes = plan.record, []
    if plan.repository is None and plan.same_code and _code_here().commit != record.code.commit:
        notes.append("nanorun/ is the same at both commits")
    if record.code.dirty and plan.patch is None:
        notes.append("the code then had changes that the record does not hold")
    if record.resumed:
        notes.append(f"the record's run was stopped and resumed {record.resumed} times")
    if plan.config.seed != record.seed:
        notes.append(f"seed: {record.seed} then, {plan.config.seed} here")
    if plan.device.type != record.hardware.device and plan.config.train.precision == "auto":
        notes.append("train.precision = auto means fp32 on a CPU and bf16 on CUDA")
    notes += _track_notes(record)
    return tuple(notes)


def _track_notes(record: Record) -> list[str]:
    """Return how the track here differs from what the record ran under."""
    if record.track not in track_names():
        return [f"there is no track {record.track} here; the record's own target is used"]
    track = load_track(record.track)
    notes = []
    if track.target_val_loss != record.target_val_loss:
        notes.append(f"target: {record.target_val_loss:g} then, {track.target_val_loss:g} in the track here")
    values = flattened(record.config)
    for key, wanted in flattened(track.fixed).items():
        if values.get(key) != wanted:
            notes.append(f"{key}: {ascii(values.get(key))[:60]} then, fixed to {wanted!r} in the track here")
    return notes


def _say_plan(plan: Plan, notes: tuple[str, ...], console: Console) -> None:
    record = plan.record
    state = state_of(plan.folder)
    say(
        console,
        f"{record.id} ({state.name}): {short(record.name)}, seed {record.seed}, track {record.track}: "
        f"{record.final_val_loss:.4f} after {record.steps} steps, {record.clock['train_seconds']:.1f} s counted on "
        f"{short(record.hardware.label)}",
    )
    for note in notes or ("nothing that a record holds differs between then and here",):
        say(console, f"  {printable(note)}")
    if plan.repository is not None:
        patched = " with its patch" if plan.patch else ""
        say(console, f"  its commit {record.code.commit}{patched} is checked out for the run")


def _private_folder(plan: Plan) -> Path:
    """Return the folder that holds all of this reproduction's own files, made by the leading rank for it alone."""
    if plan.request.resume is not None:
        return plan.request.resume.resolve()
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    base = plan.request.runs.resolve() / f"{stamp}-reproduce-{plan.record.id}"
    if not _leads():
        return base  # it writes nothing there
    return new_folder(base, mend=ELSEWHERE)


def _leads() -> bool:
    """Whether this process is the only one, or torchrun's first."""
    return os.environ.get("RANK", "0") == "0"


def _run_again(plan: Plan, private: Path, console: Console) -> Record | None:
    """Return the record of the new run, which lies in `private`; None on ranks that do not lead."""
    resume = _run_to_resume(plan, private) if plan.request.resume is not None else None
    try:
        if resume is None or not (resume / "result.json").exists():
            if plan.repository is None:
                _run_here(plan, private, resume, console)
            else:
                _run_there(plan, plan.repository, private, resume, console)
    except Stopped as stopped:
        raise Stopped(
            f"{str(stopped).partition(' Resume ')[0]} Nothing was written beside the record. Go on with: "
            f"{_command_to_go_on(plan, private)}"
        ) from None
    except RunFailed as failed:
        raise RunFailed(
            f"{failed}. The record's run did not end so; nothing was written beside it. If you are sure of this "
            f"machine: nanorun contest {plan.record.id} --reason TEXT"
        ) from None
    finally:
        if _leads():
            with suppress(OSError):
                private.rmdir()  # of a run that ended before its first step
    if not _leads():
        return None
    found, skipped = read_records(private / "records", plan.record.track)
    if len(found) != 1:
        why = "; ".join(one.why for one in skipped) or f"it left {len(found)}"
        raise UserError(f"{private}: the run was to leave one record there, and did not ({printable(why)})")
    return found[0]


def _track_of(record: Record) -> Track:
    """Return a track with the record's target that fixes nothing: what ran is what the record holds."""
    return Track(
        name=record.track,
        summary=f"what {record.id} ran under",
        kind="open",
        target_val_loss=record.target_val_loss,
        scored_in="seconds",
        significance=Significance(rule="t", n=3, alpha=0.05),
        fixed={},
        folder=Path("configs") / record.track,
    )


def _run_here(plan: Plan, private: Path, resume: Path | None, console: Console) -> None:
    options = Options(
        runs=private,
        data=plan.data.resolve(),
        records=private / "records",
        device=str(plan.device) if int(os.environ.get("WORLD_SIZE", "1")) == 1 else plan.device.type,
        stop_at_target=plan.record.stop_at_target,
        skip_bad_steps=plan.record.skipped_steps,
        deterministic=plan.record.software.deterministic,
        kernels=plan.record.software.kernels,
        reproduces=plan.record.id,
        threads=plan.n_threads,
    )
    with distributed.taking_part():
        train(plan.config, _track_of(plan.record), options, console, resume=resume)


def _run_there(plan: Plan, repository: Path, private: Path, resume: Path | None, console: Console) -> None:
    """Run `nanorun train` from a checkout of the record's commit, in a process of its own."""
    record = plan.record
    commit = str(record.code.commit)
    with recorded_code.worktree(repository, commit, plan.patch, private / "worktree") as tree:
        if resume is None:
            words = _words_of_a_new_run(plan, private, tree)
        else:
            words = ["--resume", str(resume)]
        words += recorded_code.trusting(tree)
        places = ["--data", str(plan.data.resolve()), "--records", str(private / "records")]
        command = [sys.executable, "-P", "-m", "nanorun", "train", *words, *places]
        paths = [str(tree), *filter(None, [os.environ.get("PYTHONPATH")])]
        surroundings = {
            # A job waits for this command's exit code, not for that of the run within.
            **{key: value for key, value in os.environ.items() if key != "NANORUN_EXIT_CODE"},
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": str(plan.n_threads),
            "NANORUN_KERNELS": "1" if record.software.kernels else "0",
        }
        say(console, f"running in {tree}: nanorun train {shlex.join(words)}")
        code = _wait_for([*command, "--json", "--device", str(plan.device)], private, surroundings)
    saved = any(private.glob("*/checkpoints/step-*"))
    if code == 75 and saved:
        raise Stopped("stopped, with a checkpoint saved.")
    if code in (75, 130):
        raise KeyboardInterrupt
    if code == 2:
        raise UserError("the record's own code refused the run; its reason stands above")
    if code:
        raise RunFailed(f"the run ended with exit code {code}; what it said stands above")
    ran = read_records(private / "records", record.track)[0]
    if any(one.code.commit != commit for one in ran):
        raise UserError(
            f"the run took nanorun from elsewhere than the checkout of {commit[:8]}: unset PYTHONPATH and PYTHONHOME"
        )


def _words_of_a_new_run(plan: Plan, private: Path, tree: Path) -> list[str]:
    """Return the options of `nanorun train`, after writing a track and a preset that hold what the record holds."""
    record, config = plan.record, plan.config
    track = _track_of(record).model_dump(exclude={"name", "folder"}, exclude_none=True)
    # As the record has it, without the keys that came later: an older commit does not know them.
    preset = {key: value for key, value in record.config.items() if key not in ("track", "name", "seed")}
    preset = recorded_code.with_recorded_optimizers(preset, tree)
    preset["train"] = {**preset.get("train", {}), "compile": config.train.compile}
    if config.data.mix:
        preset["data"] = {**preset["data"], "mix": dict(config.data.mix)}
    folder = private / "configs" / record.track
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "track.toml").write_text(to_toml(track), encoding="utf-8")
    (folder / f"{config.name}.toml").write_text(to_toml(preset), encoding="utf-8")
    words = [
        "--track",
        record.track,
        "--optim",
        config.name,
        "--seed",
        str(config.seed),
        "--runs",
        str(private),
    ]
    flags = {
        "--stop-at-target": record.stop_at_target,
        "--deterministic": record.software.deterministic,
    }
    words += [flag for flag, is_on in flags.items() if is_on]
    return words + (["--skip-bad-steps", str(record.skipped_steps)] if record.skipped_steps else [])


def _wait_for(command: list[str], folder: Path, surroundings: dict[str, str]) -> int:
    """Return the exit code of a command whose words go to stderr; SIGINT and SIGTERM reach it once each.

    SIGUSR1, of which code of an older commit would die, reaches it as SIGTERM. So does a terminal that closes, unless
    that is to be ignored, as under nohup: it has no terminal, and would go on without anybody.
    """
    child = subprocess.Popen(
        command, cwd=folder, env=surroundings, stdout=subprocess.DEVNULL, start_new_session=True
    )

    def pass_on(number: int, frame: object) -> None:
        with suppress(ProcessLookupError):
            child.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    passed_on = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        passed_on.append(signal.SIGHUP)
    try:
        before = {number: signal.signal(number, pass_on) for number in passed_on}
    except ValueError:  # not the main thread: whoever started it handles the signals
        before = {}
    try:
        return child.wait()
    finally:
        if child.poll() is None:
            child.kill()
        for number, handler in before.items():
            signal.signal(number, handler)


def _run_to_resume(plan: Plan, private: Path) -> Path:
    """Return the run's folder in a reproduction's that was stopped. Raises UserError."""
    found = sorted(path.parent for path in private.glob("*/config.toml"))
    if len(found) != 1:
        raise UserError(
            f"{private} holds no run of a reproduction that was stopped: leave --resume out to start anew"
        )
    path = found[0] / "config.toml"
    kept, wanted = (
        flattened(one.model_dump()) for one in (make_config(read_toml(path), where=str(path)), plan.config)
    )
    differing = [key for key in wanted if kept.get(key) != wanted[key] and not _is_outside(key, wanted[key])]
    if differing:
        key = differing[0]
        raise UserError(
            f"{private} is a run with {key} = {ascii(kept.get(key))[:60]}, and this one has {ascii(wanted[key])[:60]}: "
            "it reproduces another record, or another seed of it"
        )
    return found[0]


def _is_outside(key: str, value: object) -> bool:
    """Whether a key names an optimizer from outside, whose path is another one in a checkout."""
    return key.startswith("optim.") and key.endswith(".name") and ":" in str(value)


def _command_to_go_on(plan: Plan, private: Path) -> str:
    asked, usual = plan.request, Request("")
    words = ["nanorun", "reproduce", str(plan.folder), "--resume", str(private)]
    for field in dataclasses.fields(Request):
        value = getattr(asked, field.name)
        if field.name in ("record", "records", "runs", "resume") or value == getattr(usual, field.name):
            continue
        flag = f"--{field.name.replace('_', '-')}"
        words += [flag] if value is True else [flag, str(value)]
    return shlex.join(words)


def _row_of(plan: Plan) -> list[Record]:
    """Return the records that the report averages with the plan's."""
    records, _ = read_records(plan.folder.parent.parent, plan.record.track)
    groups = row_groups(records)
    return next((group for group in groups if any(one.id == plan.record.id for one in group)), [plan.record])


def _load() -> float | None:
    """Return how many processes wanted a core, averaged over the last minute; None where nobody counts them."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def _busy(plan: Plan, again: Record, before: float | None, after: float | None) -> str:
    """Return why this machine was not quiet; empty where it was."""
    if before is None or after is None:
        return "this system does not tell how busy it was"
    n_ranks = again.hardware.n_devices
    own = n_ranks * (2 if plan.device.type == "cuda" else plan.n_threads)
    if before > BUSY_LOAD:
        return f"this machine was not quiet (load {before:.1f} before the run, wanted at most {BUSY_LOAD:g})"
    if after > own + BUSY_LOAD:
        return (
            f"this machine was not quiet (load {after:.1f} after the run, wanted at most {own + BUSY_LOAD:g})"
        )
    return ""


def _reproduction(plan: Plan, again: Record, found: Agreement, notes: tuple[str, ...]) -> Reproduction:
    return Reproduction(
        format_version=STATES_VERSION,
        kind="reproduction",
        record=plan.record.id,
        record_sha256=plan.record_sha256,
        by=plan.by,
        created=again.created,
        seed=again.seed,
        hardware=again.hardware,
        software=again.software,
        code=dataclasses.replace(again.code, patch=None),
        differences=notes,
        initial_weights_sha256=again.initial_weights_sha256,
        final_weights_sha256=again.final_weights_sha256,
        steps=again.steps,
        validation=again.validation,
        final_val_loss=again.final_val_loss,
        clock=again.clock,
        peak_memory_mib=again.peak_memory_mib,
        agreement=found,
    )


def _say_outcome(plan: Plan, found: Agreement, file: Path, console: Console) -> None:
    same = {True: "the same", False: "not the same"}
    times = "" if found.seconds_ratio is None else f", {found.seconds_ratio:.2f} times as many"
    lines = [
        f"{plan.record.id}: {found.verdict}",
        *(f"  {reason}" for reason in found.reasons),
        f"  criterion: {found.loss_test}",
        f"  largest difference of {found.points_compared} validations: {found.largest_difference:.6f}, after step "
        f"{found.largest_difference_step}",
        f"  initial weights {same[found.same_initial_weights]}, final weights {same[found.same_final_weights]}, to "
        "the bit",
        f"  {found.recorded_seconds:.1f} s recorded, {found.reproduced_seconds:.1f} s here{times}",
        f"  {found.seconds_test}",
        f"written: {file}",
    ]
    if found.verdict == "agrees":
        lines += [state_of(plan.folder).describe(), f"next: nanorun report --track {plan.record.track}"]
    say(console, printable("\n".join(lines)))


def _document(
    plan: Plan,
    *,
    notes: tuple[str, ...],
    again: Record | None = None,
    found: Agreement | None = None,
    file: Path | None = None,
    private: Path | None = None,
) -> dict[str, Any]:
    """Return what `--json` prints; null where nothing was run."""
    document: dict[str, Any] = {
        "record": str(plan.folder),
        "state": state_of(plan.folder).name,
        "by": plan.by,
        "differences": list(notes),
        "verdict": found and found.verdict,
        "final_val_loss": again and again.final_val_loss,
        "train_seconds": again and again.clock["train_seconds"],
        "seconds_ratio": found and found.seconds_ratio,
        "agreement": found and dataclasses.asdict(found),
        "file": file and str(file),
        "run": private and str(private),
    }
    plain: dict[str, Any] = json.loads(json.dumps(document))
    return plain
