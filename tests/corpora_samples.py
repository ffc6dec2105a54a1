"""Small prepared corpora made up for tests, in memory and on disk, without going through `prepare`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanorun.data.batches import TokenSet, token_set
from nanorun.data.shards import Manifest, ShardEntry, sha256_of, write_shard

BYTE: Mapping[str, Any] = {"name": "byte", "vocab_size": 257, "eot": 256}


def a_manifest(
    corpus: str, tokenizer: Mapping[str, Any] = BYTE, shards: Sequence[ShardEntry] = ()
) -> Manifest:
    """Return a manifest whose hash depends on the corpus' name and what else is given."""
    return Manifest(corpus, "0" * 64, dict(tokenizer), tuple(shards))


def a_corpus(corpus: str, tokens: Any, tokenizer: Mapping[str, Any] = BYTE) -> TokenSet:
    """Return tokens in memory under a manifest of that corpus."""
    return dataclasses.replace(token_set([tokens], name=corpus), manifest=a_manifest(corpus, tokenizer))


def put_corpus(
    folder: Path, corpus: str, train: Any, val: Any, *, tokenizer: Mapping[str, Any] = BYTE, n_bytes: int = 0
) -> Manifest:
    """Write a corpus of one shard a split into `folder`; `n_bytes` is what the manifest says of each."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for split, tokens in (("train", train), ("val", val)):
        path = folder / f"{corpus}_{split}_000000.bin"
        write_shard(path, np.asarray(tokens, dtype=np.uint16))
        entries.append(ShardEntry(path.name, split, len(tokens), n_bytes or len(tokens), 1, sha256_of(path)))
    manifest = a_manifest(corpus, tokenizer, entries)
    manifest.write(folder)
    return manifest


def learnable(seed: int, n: int, vocab_size: int = 257) -> Any:
    """Return `n` made-up tokens in which the more frequent ones can be learned."""
    numbers = np.random.default_rng(seed).integers(0, min(vocab_size, 256), n)
    return np.minimum(numbers, np.roll(numbers, 1))
