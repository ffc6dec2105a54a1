"""Documents to tokens to shards and a manifest, in one folder.

The manifest is written last: a folder without one is not a prepared corpus, whatever shards a killed run
left in it. Preparing the same corpus again finds the manifest, checks the shards against it, and does
nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanorun.data.shards import (
    MANIFEST_NAME,
    Manifest,
    ShardEntry,
    ShardWriter,
    Tokens,
    cannot_write,
    load_manifest,
    replacing,
    sha256_of,
)
from nanorun.data.sources import SPLITS, Document, Source, Split, load_source
from nanorun.data.tokenizers import Tokenizer, check_tokenizer_name, make_tokenizer
from nanorun.errors import UserError

SHARD_TOKENS = 100_000_000
"""At most this many in a shard; a document may run on into the next."""
BATCH_CHARS = 4_000_000
"""Documents are tokenized together up to this size, so that threads have something to share."""
STALE_SECONDS = 600.0
"""A temporary file that nobody has written to for so long was left by a run that was killed."""

Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class Prepared:
    """What `prepare` left behind."""

    out: Path
    manifest: Manifest
    wrote: bool
    """False when everything was there already and nothing was done."""
    seconds: float
    tokens_per_second: float
    """0.0 when nothing was done."""


def default_out(corpus: str, tokenizer: str | None = None, root: Path = Path("data")) -> Path:
    """Return the folder for `corpus`: its name, and the tokenizer's where that is not the corpus' default."""
    default = load_source(corpus).DEFAULT_TOKENIZER
    return root / (corpus if tokenizer in (None, default) else f"{corpus}-{tokenizer}")


def prepare(
    corpus: str,
    *,
    out: Path,
    tokenizer: str | None = None,
    inputs: Sequence[str] = (),
    workers: int = 1,
    on_progress: Progress | None = None,
) -> Prepared:
    """Leave the shards `<corpus>_<split>_<number>.bin` and a manifest in `out`, and return what is there.

    `on_progress(split, n)` is called as tokens are written, with the number since the last call. A folder
    that holds anything else than this corpus with this tokenizer, a full disk and a corpus with an empty
    split are `UserError`s; after those, and after Ctrl-C, nothing that was begun stays.
    """
    source = load_source(corpus)
    tokenizer_name = tokenizer or source.DEFAULT_TOKENIZER
    check_tokenizer_name(tokenizer_name)
    if workers < 1:
        raise UserError(f"--workers {workers}: expected 1 or more.")
    started = time.perf_counter()
    source_sha256 = source.source_sha256(inputs)
    found = _already_there(out, corpus, tokenizer_name, source_sha256)
    if found:
        return Prepared(out, found, False, time.perf_counter() - started, 0.0)

    texts = (document.text for split in SPLITS for document in source.documents(split, inputs))
    chosen = make_tokenizer(tokenizer_name, texts)
    with ExitStack() as undo:
        _make_folder(out, undo)
        (out / MANIFEST_NAME).unlink(missing_ok=True)
        undo.callback((out / MANIFEST_NAME).unlink, missing_ok=True)
        _remove_leftovers(out)
        shards: list[ShardEntry] = []
        for split in SPLITS:
            writing = _SplitWriter(out, corpus, split, chosen, on_progress, undo)
            shards += writing.write(_encoded(source, split, inputs, chosen, workers))
        manifest = Manifest(corpus, source_sha256, chosen.to_manifest(), tuple(shards))
        _remove_other_shards(out, corpus, manifest)
        manifest.write(out)
        undo.pop_all()
    seconds = time.perf_counter() - started
    n_tokens = sum(shard.tokens for shard in shards)
    return Prepared(out, manifest, True, seconds, n_tokens / seconds)


def _already_there(out: Path, corpus: str, tokenizer: str, source_sha256: str) -> Manifest | None:
    """Return the manifest in `out` if it is of this corpus and its shards are whole; None if there is work.

    A manifest of anything else is a `UserError`: what the user keeps there is not ours to overwrite.
    """
    if not (out / MANIFEST_NAME).exists():
        return None
    manifest = load_manifest(out)
    held = (manifest.corpus, str(manifest.tokenizer["name"]))
    if held != (corpus, tokenizer):
        raise UserError(
            f"{out} already holds corpus {held[0]!r} with tokenizer {held[1]!r}, not {corpus!r} with "
            f"{tokenizer!r}; choose another --out or delete that folder."
        )
    if manifest.source_sha256 != source_sha256:
        raise UserError(
            f"{out} already holds corpus {corpus!r}, made from other texts than those given now; "
            "choose another --out or delete that folder."
        )
    whole = all(_is_whole(out / shard.file, shard) for shard in manifest.shards)
    return manifest if whole else None


def _is_whole(path: Path, shard: ShardEntry) -> bool:
    return path.is_file() and sha256_of(path) == shard.sha256


def _encoded(
    source: Source, split: Split, inputs: Sequence[str], tokenizer: Tokenizer, workers: int
) -> Iterator[list[Tokens]]:
    """Yield the documents' tokens, a batch of documents at a time, none with its end-of-text token yet."""
    batch: list[Document] = []
    n_chars = 0
    for document in source.documents(split, inputs):
        batch.append(document)
        n_chars += len(document.text)
        if n_chars >= BATCH_CHARS:
            yield tokenizer.encode_batch([d.text for d in batch], workers)
            batch, n_chars = [], 0
    if batch:
        yield tokenizer.encode_batch([d.text for d in batch], workers)


class _SplitWriter:
    """Cuts one split's tokens into shards. What it has written is undone by `undo`."""

    def __init__(
        self,
        out: Path,
        corpus: str,
        split: Split,
        tokenizer: Tokenizer,
        on_progress: Progress | None,
        undo: ExitStack,
    ) -> None:
        self._out, self._corpus, self._split, self._undo = out, corpus, split, undo
        self._tokenizer = tokenizer
        self._on_progress = on_progress or (lambda split, n_tokens: None)

    def write(self, batches: Iterator[list[Tokens]]) -> list[ShardEntry]:
        """Write all shards of the split and return their entries."""
        pieces = self._pieces(batches)
        entries: list[ShardEntry] = []
        piece = next(pieces, None)
        if piece is None:
            raise UserError(
                f"Corpus {self._corpus!r} has no text for its "
                f"{'validation' if self._split == 'val' else 'training'} "
                "split; it needs a longer text, or several files."
            )
        while piece is not None:
            path = self._out / f"{self._corpus}_{self._split}_{len(entries):06d}.bin"
            entry, piece = self._write_one(path, piece, pieces)
            entries.append(entry)
        return entries

    def _write_one(
        self, path: Path, piece: tuple[Tokens, bool] | None, pieces: Iterator[tuple[Tokens, bool]]
    ) -> tuple[ShardEntry, tuple[Tokens, bool] | None]:
        """Write one shard, beginning with `piece`; return its entry and what is left for the next."""
        n_bytes = n_documents = 0
        with replacing(path) as file:
            writer = ShardWriter(file)
            while piece is not None and writer.n_tokens < SHARD_TOKENS:
                tokens, begins = piece
                room = SHARD_TOKENS - writer.n_tokens
                fitting, rest = tokens[:room], tokens[room:]
                writer.append(fitting)
                n_bytes += self._tokenizer.bytes_of(fitting)
                n_documents += begins
                self._on_progress(self._split, len(fitting))
                piece = (rest, False) if len(rest) else next(pieces, None)
            writer.finish()
        self._undo.callback(path.unlink, missing_ok=True)
        entry = ShardEntry(path.name, self._split, writer.n_tokens, n_bytes, n_documents, sha256_of(path))
        return entry, piece

    def _pieces(self, batches: Iterator[list[Tokens]]) -> Iterator[tuple[Tokens, bool]]:
        """Yield (tokens, whether a document begins with them), the end-of-text token before each document."""
        eot = self._tokenizer.eot
        for batch in batches:
            for tokens in batch:
                if eot is not None:
                    tokens = np.concatenate([np.array([eot], dtype=np.uint16), tokens])
                if len(tokens):
                    yield tokens, True


def _make_folder(out: Path, undo: ExitStack) -> None:
    """Create `out`; folders that were not there before go again if `undo` runs and they are empty."""
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(out, error) from error
    for folder in reversed(missing):
        undo.callback(_remove_if_empty, folder)


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _remove_leftovers(out: Path) -> None:
    """Delete temporary files of runs that were killed; a younger one may belong to a run beside this one."""
    for path in (*out.glob("*.bin.*.tmp"), *out.glob(f"{MANIFEST_NAME}.*.tmp")):
        if time.time() - path.stat().st_mtime > STALE_SECONDS:
            path.unlink(missing_ok=True)


def _remove_other_shards(out: Path, corpus: str, manifest: Manifest) -> None:
    """Delete shards of an earlier, interrupted preparation that this one has not overwritten."""
    ours = {shard.file for shard in manifest.shards}
    for split in SPLITS:
        for path in out.glob(f"{corpus}_{split}_[0-9][0-9][0-9][0-9][0-9][0-9].bin"):
            if path.name not in ours:
                path.unlink()
