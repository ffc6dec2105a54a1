"""prepare-data as a person sees it: a progress bar, and what to type next."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TaskID, TextColumn, TimeElapsedColumn

from nanorun.data.prepare import default_out, prepare


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
    folder = out or default_out(corpus, tokenizer, root=root)
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
            progress.update(tasks[split], rate=f"{speed / 1e6:.1f}M tokens/s" if speed else "")

        done = prepare(
            corpus, out=folder, tokenizer=tokenizer, inputs=inputs, workers=workers, on_progress=on_progress
        )
    manifest = done.manifest
    counts = {split: manifest.n_tokens(split) for split in ("train", "val")}
    verb = f"prepared at {done.tokens_per_second / 1e6:.1f}M tokens/s" if done.wrote else "already prepared"
    lines = [
        f"{folder}: {corpus} in {manifest.tokenizer['name']} tokens, {counts['train']:,} to train on and "
        f"{counts['val']:,} to validate on, {verb}",
        f"next: {next_command(corpus, root, out)}",
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


def next_command(corpus: str, root: Path, out: Path | None) -> str:
    """Return the train command that reads what was just prepared."""
    track = {"shakespeare": " --track shakespeare-sprint", "text": " --track text"}.get(corpus, "")
    place = f" --data {out or root}" if out or root != Path("data") else ""
    return f"nanorun train{track}{place}"
