"""prepare-data as a person sees it: a progress bar, a plan, and what to type next."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from nanorun.data.prepare import Prepared, Request, carry_out, default_out, make_request, short_count
from nanorun.data.sources import Step, is_ready
from nanorun.data.space import free_bytes, human_bytes, needed
from nanorun.data.tokenizers import tokenizer_name
from nanorun.tracks import DEFAULT_TRACK, load_track, track_names

SHOWN_SKIPS = 20
"""So many of the things left out are listed on the console."""
SHOWN_FILES = 10


def prepare_and_show(
    corpus: str, *, out: Path | None, root: Path, console: Console, dry_run: bool = False, **options: Any
) -> dict[str, Any]:
    """Prepare a corpus under a progress bar; return the summary that `--json` prints. The rest as `make_request`."""
    with _bars(console) as report, _terminated_as_interrupted():
        folder = out or default_out(corpus, _tokenizer_of(options), root=root)
        request = make_request(corpus, out=folder, report=report, **options)
        if dry_run:
            return _plan(request, console)
        done = carry_out(request)
    next_one = next_command(corpus, done.manifest.tokenizer["name"], root, out)
    _say(console, [*_summary_lines(done), f"next: {next_one}"])
    return _summary(done)


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM end the work as Ctrl-C does: with what is done noted, and a sentence."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _tokenizer_of(options: dict[str, Any]) -> str | None:
    """Return the name of the tokenizer that is asked for, or None."""
    if options.get("train_bpe"):
        return f"bpe{options['train_bpe']}"
    return tokenizer_name(options["tokenizer"]) if options.get("tokenizer") else None


def _summary_lines(done: Prepared) -> Iterator[str]:
    manifest = done.manifest
    if done.resumed_at:
        yield f"went on after {done.resumed_at:,} documents that were done before"
    verb = "already prepared"
    if done.wrote:
        verb = (
            f"prepared at {short_count(done.tokens_per_second)} tokens/s"
            if done.tokens_per_second
            else "prepared"
        )
    yield (
        f"{done.out}: {manifest.corpus} in {manifest.tokenizer['name']} tokens, {manifest.n_tokens('train'):,} to "
        f"train on and {manifest.n_tokens('val'):,} to validate on, {verb}"
    )
    yield from (f"note: {note}" for note in done.notes)
    if done.duplicates:
        yield f"{done.duplicates:,} exact copies of documents left out (--keep-duplicates keeps them)"
    if done.empty:
        yield f"{done.empty:,} documents without text left out"
    if done.n_skipped:
        yield f"{done.n_skipped:,} bad things left out:"
        yield from (f"  {line}" for line in done.skipped[:SHOWN_SKIPS])
        if done.n_skipped > SHOWN_SKIPS:
            yield f"  and {done.n_skipped - SHOWN_SKIPS:,} more (--json lists the first thousand)"


def _summary(done: Prepared) -> dict[str, Any]:
    manifest = done.manifest
    return {
        "out": str(done.out),
        "corpus": manifest.corpus,
        "tokenizer": manifest.tokenizer["name"],
        "vocab_size": manifest.vocab_size,
        "tokens": {split: manifest.n_tokens(split) for split in ("train", "val")},
        "bytes": {split: manifest.n_bytes(split) for split in ("train", "val")},
        "documents": {split: manifest.n_documents(split) for split in ("train", "val")},
        "shards": len(manifest.shards),
        "duplicates": done.duplicates,
        "empty": done.empty,
        "n_skipped": done.n_skipped,
        "skipped": list(done.skipped),
        "notes": list(done.notes),
        "resumed_at": done.resumed_at,
        "wrote": done.wrote,
        "seconds": done.seconds,
        "tokens_per_second": done.tokens_per_second,
        "manifest_sha256": manifest.sha256,
    }


def _plan(request: Request, console: Console) -> dict[str, Any]:
    """Say what would be read or fetched, how large it is and what it would become; return the same as a document."""
    ready = is_ready(request.source)
    files = request.source.files(request.reading)
    need = needed(files, request.tokenizer_name, ready=ready)
    free = free_bytes(request.out)
    size = sum(file.size for file in files)
    has_manifest = (request.out / "manifest.json").exists()
    lines = [f"{request.corpus}: {len(files):,} files, {human_bytes(size)}"]
    lines += [
        f"  {file.name!a:.100}  {human_bytes(file.size)}".replace("'", "") for file in files[:SHOWN_FILES]
    ]
    lines += [f"  and {len(files) - SHOWN_FILES:,} more"] if len(files) > SHOWN_FILES else []
    if left_out := getattr(request.source, "left_out", None):
        lines += (
            [f"  {len(others):,} files of other splits left out"]
            if (others := left_out(request.reading))
            else []
        )
    about = "" if ready else f"about {human_bytes(need.text_bytes)} of text, "
    lines += [
        f"would become {about}about {short_count(need.tokens)} {request.tokenizer_name} tokens in {request.out}"
        + (", which holds a prepared corpus already" if has_manifest else ""),
        f"disk: about {human_bytes(need.disk_bytes)} needed, {human_bytes(free)} free",
    ]
    _say(console, lines)
    return {
        "out": str(request.out),
        "corpus": request.corpus,
        "tokenizer": request.tokenizer_name,
        "files": [{"name": file.name, "bytes": file.size} for file in files],
        "bytes": size,
        "text_bytes_estimate": need.text_bytes,
        "tokens_estimate": need.tokens,
        "disk_bytes_estimate": need.disk_bytes,
        "free_bytes": free,
        "holds_a_corpus": has_manifest,
    }


def _say(console: Console, lines: list[str]) -> None:
    text = "\n".join(lines).encode(console.encoding, "backslashreplace").decode(console.encoding)
    console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _bars(console: Console) -> Iterator[Callable[[Step], None]]:
    """Yield what shows how far each stage is: its share done, rate, time passed and time left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[how_far]}"),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        tasks: dict[str, TaskID] = {}

        said = ""

        def report(step: Step) -> None:
            nonlocal said
            is_waiting = step.stage in ("wait", "fetch") and not progress.live.is_started
            if step.note not in ("", said) and (is_waiting or step.stage == "note"):
                said = step.note
                _say(console, [f"{'waiting' if step.stage == 'wait' else step.stage}: {step.note}"])
            if not progress.live.is_started or step.stage == "note":
                return
            if step.stage not in tasks:
                tasks[step.stage] = progress.add_task(step.stage, total=step.total, how_far="", note="")
            progress.update(
                tasks[step.stage],
                completed=step.done,
                total=step.total,
                how_far=_how_far(step),
                note=step.note or _rate(progress, tasks[step.stage], step),
            )

        yield report


def _how_far(step: Step) -> str:
    show = human_bytes if step.unit == "bytes" else short_count
    unit = "" if step.unit == "bytes" else f" {step.unit}"
    return f"{show(step.done)}{unit}" + (f" of {show(step.total)}" if step.total else "")


def _rate(progress: Progress, task: TaskID, step: Step) -> str:
    speed = next((one.speed for one in progress.tasks if one.id == task), None)
    if not speed:
        return ""
    return f"{human_bytes(speed)}/s" if step.unit == "bytes" else f"{short_count(speed)} {step.unit}/s"


def next_command(corpus: str, tokenizer: str, root: Path, out: Path | None) -> str:
    """Return the train command that reads what was just prepared, or what it takes where no track does."""
    found = [
        name
        for name in track_names()
        if load_track(name).fixed.get("data") == {"corpus": corpus, "tokenizer": tokenizer}
    ]
    place = f" --data {out or root}" if out or root != Path("data") else ""
    if not found:
        return (
            f"a track of your own for it: copy {load_track('text').folder} to ./configs/NAME and set there, in "
            f"track.toml, [fixed.data] corpus = {corpus!r}, tokenizer = {tokenizer!r} and target_val_loss; then "
            f"nanorun train --track NAME{place}"
        )
    # The quickest of several is the one to begin with.
    name = (
        DEFAULT_TRACK
        if DEFAULT_TRACK in found
        else max(found, key=lambda one: load_track(one).target_val_loss)
    )
    return "nanorun train" + ("" if name == DEFAULT_TRACK else f" --track {name}") + place
