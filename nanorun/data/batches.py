"""Prepared tokens, and the rows that training and validation read from them, as pure functions.

Which tokens a training row holds depends on (seed, row) alone, so resuming needs one integer and ranks only
slice.

B: rows, T: context_len tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nanorun.data.shards import PREPARE_AGAIN, Manifest, load_manifest, open_shard, sha256_of
from nanorun.errors import UserError

Rows = npt.NDArray[np.int64]

NOT_PREDICTED = -1
"""The target where a row asks for no prediction."""


@dataclass(frozen=True)
class TokenSet:
    """The tokens of one split, its shards read as one sequence."""

    shards: tuple[npt.NDArray[Any], ...]
    """uint16 or uint32, by the vocabulary."""
    n_bytes: int
    """UTF-8 bytes of text that the tokens stand for."""
    name: str = "tokens"
    """For error messages."""
    manifest: Manifest | None = None

    @property
    def n_tokens(self) -> int:
        return sum(len(shard) for shard in self.shards)

    def slice(self, start: int, length: int) -> Rows:
        """Return `length` tokens from `start` on, across shards; IndexError outside the sequence."""
        if start < 0 or length < 0 or start + length > self.n_tokens:
            raise IndexError(f"tokens {start} to {start + length} of {self.n_tokens}")
        tokens = np.empty(length, dtype=np.int64)
        filled = 0
        for shard in self.shards:
            if start < len(shard) and filled < length:
                part = shard[start : start + length - filled]
                tokens[filled : filled + len(part)] = part
                filled += len(part)
            start = max(0, start - len(shard))
        return tokens


def token_set(shards: Sequence[npt.NDArray[Any]], *, n_bytes: int = 0, name: str = "tokens") -> TokenSet:
    """Return a `TokenSet` of arrays in memory."""
    return TokenSet(tuple(np.asarray(shard) for shard in shards), n_bytes, name)


def open_tokens(folder: Path, split: str, *, verify: bool = True) -> TokenSet:
    """Return the tokens of a prepared corpus' split.

    `UserError` for a missing or altered manifest, a shard whose size or count does not fit, and, unless
    `verify` is false, a shard whose sha256 is not the manifest's or that holds tokens beyond the
    vocabulary.
    """
    manifest = load_manifest(folder)
    entries = manifest.of_split(split)
    if not entries:
        raise UserError(f"{folder}: the manifest names no {split} shards; {PREPARE_AGAIN}.")
    shards: list[npt.NDArray[Any]] = []
    for entry in entries:
        path = folder / entry.file
        # The range is looked at before the hash: it tells more of what is wrong.
        mapped = open_shard(path, manifest.vocab_size if verify else None)
        if len(mapped) != entry.tokens:
            raise UserError(
                f"{path}: {len(mapped):,} tokens, its manifest says {entry.tokens:,}; {PREPARE_AGAIN}."
            )
        if verify and (found := sha256_of(path)) != entry.sha256:
            raise UserError(
                f"{path}: sha256 {found}, its manifest says {entry.sha256}: damaged or altered; "
                f"{PREPARE_AGAIN}."
            )
        # A plain view of the map: slicing np.memmap itself costs several times as much.
        shards.append(np.asarray(mapped))
    return TokenSet(tuple(shards), manifest.n_bytes(split), f"{manifest.corpus} ({split})", manifest)


def rows_per_epoch(tokens: TokenSet, context_len: int) -> int:
    """Return how many training rows one pass over `tokens` has; `UserError` if not one fits.

    Rows do not overlap and each needs one token more than `context_len` for its last target. Wherever the
    phase of an epoch lies, the same number fits: hence one row fewer than at phase 0.
    """
    n_rows = (tokens.n_tokens - context_len) // context_len
    if context_len < 1 or n_rows < 1:
        raise UserError(
            f"{tokens.name}: {tokens.n_tokens:,} tokens are too few for a context of {context_len:,}, which "
            "needs at "
            f"least {2 * context_len:,}; choose a longer text or a smaller model.context_len."
        )
    return n_rows


def train_rows(
    tokens: TokenSet, *, seed: int, first_row: int, n_rows: int, context_len: int
) -> tuple[Rows, Rows]:
    """Return (idx_BT, targets_BT), int64, of the training rows `first_row` to `first_row + n_rows`.

    Rows are counted over the whole run: step * rows_per_step + place within the step. Each epoch visits its
    windows once, in an order and from a phase in [0, context_len) drawn from (seed, epoch).
    """
    per_epoch = rows_per_epoch(tokens, context_len)
    windows_BT = np.empty((n_rows, context_len + 1), dtype=np.int64)
    for i in range(n_rows):
        epoch, place = divmod(first_row + i, per_epoch)
        phase, order = _epoch(seed, epoch, per_epoch, context_len)
        windows_BT[i] = tokens.slice(phase + int(order[place]) * context_len, context_len + 1)
    return np.ascontiguousarray(windows_BT[:, :-1]), np.ascontiguousarray(windows_BT[:, 1:])


@lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, n_rows: int, context_len: int) -> tuple[int, npt.NDArray[np.int64]]:
    """Return the phase and the order of the windows in one epoch.

    Sorting raw Philox draws, not `Generator.permutation`: numpy promises the same raw draws in every
    release, but not the same permutation.
    """
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    draws = np.random.Philox(key=key).random_raw(n_rows + 1)
    return int(draws[0] % np.uint64(context_len)), np.argsort(draws[1:], kind="stable")


def n_validation_windows(tokens: TokenSet, *, n_tokens: int | None, context_len: int, stride: int) -> int:
    """Return how many windows `validation_rows` needs for the first `n_tokens` (None: all)."""
    n_tokens = _validation_tokens(tokens, n_tokens)
    if not 1 <= stride <= context_len:
        raise UserError(
            f"A validation stride of {stride} does not fit a context of {context_len}; expected 1 to "
            f"{context_len}."
        )
    beyond_first_window = max(0, n_tokens - 1 - context_len)
    return 1 + -(-beyond_first_window // stride)


def validation_rows(
    tokens: TokenSet,
    *,
    n_tokens: int | None,
    context_len: int,
    stride: int,
    first_window: int,
    n_windows: int,
) -> tuple[Rows, Rows]:
    """Return (idx_BT, targets_BT), int64, of some validation windows.

    Over all windows each of the first `n_tokens` tokens but the very first is a target exactly once,
    predicted from earlier tokens only; -1 marks where no prediction is asked for. `stride == context_len`
    gives windows that do not overlap; a smaller one gives every prediction at least `context_len - stride`
    earlier tokens, except at the start. Past the last token inputs are 0; windows past the last are all
    padding, so all ranks can ask for as many.
    """
    n_all = n_validation_windows(tokens, n_tokens=n_tokens, context_len=context_len, stride=stride)
    n_used = _validation_tokens(tokens, n_tokens)
    idx_BT = np.zeros((n_windows, context_len), dtype=np.int64)
    targets_BT = np.full((n_windows, context_len), NOT_PREDICTED, dtype=np.int64)
    for i, window in enumerate(range(first_window, min(first_window + n_windows, n_all))):
        start = window * stride
        read = tokens.slice(start, min(context_len + 1, n_used - start))
        already = 0 if window == 0 else context_len - stride
        idx_BT[i, : len(read) - 1] = read[:-1]
        targets_BT[i, already : len(read) - 1] = read[1 + already :]
    return idx_BT, targets_BT


def _validation_tokens(tokens: TokenSet, n_tokens: int | None) -> int:
    """Return the number of tokens to validate on, checked."""
    wanted = tokens.n_tokens if n_tokens is None else n_tokens
    if wanted < 2 or wanted > tokens.n_tokens:
        raise UserError(
            f"{tokens.name}: validation on {wanted:,} tokens does not work: it needs at least 2 and there "
            "are "
            f"{tokens.n_tokens:,}; prepare a longer text or ask for fewer."
        )
    return wanted
