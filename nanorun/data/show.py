"""prepare-data as a person sees it: a progress bar, and what to type next."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TaskID, TextColumn, TimeElapsedColumn

from nanorun.data.prepare import Prepared, default_out, prepare
from nanorun.tracks import DEFAULT_TRACK, load_track, track_names


def prepare_and_show(
    corpus: str,
    *,
    out: Path | None,
    root: Path,
    tokenizer: str | None,
    inputs: Sequence[str],
    workers: int,
    console: Console,
) -> dict[str, Any]:
    """Prepare a corpus under a progress bar with tokens/s; return the summary that `--json` prints."""
    done = _prepare_under_a_bar(
        console,
        corpus,
        out=out or default_out(corpus, tokenizer, root=root),
        tokenizer=tokenizer,
        inputs=inputs,
        workers=workers,
    )
    manifest, folder = done.manifest, done.out
    counts = {split: manifest.n_tokens(split) for split in ("train", "val")}
    verb = f"prepared at {_rate(done.tokens_per_second)} tokens/s" if done.wrote else "already prepared"
    lines = [
        f"{folder}: {corpus} in {manifest.tokenizer['name']} tokens, {counts['train']:,} to train on and "
        f"{counts['val']:,} to validate on, {verb}",
        f"next: {next_command(corpus, manifest.tokenizer['name'], root, out)}",
    ]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    return {
        "out": str(folder),
        "corpus": corpus,
        "tokenizer": manifest.tokenizer["name"],
        "vocab_size": manifest.vocab_size,
        "tokens": counts,
        "bytes": {split: manifest.n_bytes(split) for split in ("train", "val")},
        "documents": {split: manifest.n_documents(split) for split in ("train", "val")},
        "wrote": done.wrote,
        "seconds": done.seconds,
        "tokens_per_second": done.tokens_per_second,
        "manifest_sha256": manifest.sha256,
    }


def _prepare_under_a_bar(console: Console, corpus: str, **options: Any) -> Prepared:
    columns = (
        TextColumn("{task.description}"),
        TextColumn("{task.completed:,.0f} tokens"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        tasks: dict[str, TaskID] = {}

        def on_progress(split: str, n_tokens: int) -> None:
            if split not in tasks:
                tasks[split] = progress.add_task(f"{corpus} {split}", total=None, rate="")
            progress.update(tasks[split], advance=n_tokens)
            speed = progress.tasks[-1].speed
            progress.update(tasks[split], rate=f"{_rate(speed)} tokens/s" if speed else "")

        return prepare(corpus, on_progress=on_progress, **options)


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
            f"a track of your own for it: ./configs/NAME/track.toml with [fixed.data] corpus = {corpus!r}, "
            f"tokenizer = {tokenizer!r}, and a preset beside it; then nanorun train --track NAME{place}"
        )
    # The quickest of several is the one to begin with.
    name = (
        DEFAULT_TRACK
        if DEFAULT_TRACK in found
        else max(found, key=lambda one: load_track(one).target_val_loss)
    )
    return "nanorun train" + ("" if name == DEFAULT_TRACK else f" --track {name}") + place


def _rate(tokens_per_second: float) -> str:
    million = tokens_per_second / 1e6
    return f"{million:.1f}M" if million >= 1 else f"{tokens_per_second:,.0f}"
