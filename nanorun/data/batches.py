"""Prepared tokens, and the rows that training and validation read from them, as pure functions.

Which tokens a training row holds depends on (seed, row) alone, so resuming needs one integer and ranks only
slice. Rows of several corpora: `nanorun.data.mix`.

B: rows, T: context_len tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from nanorun.data.readahead import MappedArray, mapped_array
from nanorun.data.shards import MAKE_AGAIN, PREPARE_AGAIN, Manifest, load_manifest, open_shard, sha256_of
from nanorun.errors import UserError

Rows = npt.NDArray[np.int64]

NOT_PREDICTED = -1
"""The target where a row asks for no prediction."""
ORDERS_KEPT = 64
"""Epochs' orders kept in memory, 4 bytes a row each; as many as two for each corpus of the largest mix."""


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

    @cached_property
    def starts(self) -> Rows:
        """Where each shard begins in the sequence; then where the last one ends."""
        return np.cumsum([0, *(len(shard) for shard in self.shards)], dtype=np.int64)

    @property
    def n_tokens(self) -> int:
        return int(self.starts[-1])

    def slice(self, start: int, length: int) -> Rows:
        """Return `length` tokens from `start` on, across shards; IndexError outside the sequence."""
        if start < 0 or length < 0 or start + length > self.n_tokens:
            raise IndexError(f"tokens {start} to {start + length} of {self.n_tokens}")
        tokens = np.empty(length, dtype=np.int64)
        filled = 0
        number = int(np.searchsorted(self.starts, start, side="right")) - 1
        while filled < length:
            within = start + filled - int(self.starts[number])
            part = self.shards[number][within : within + length - filled]
            tokens[filled : filled + len(part)] = part
            filled += len(part)
            number += 1
        return tokens

    def windows(self, places: Rows, length: int) -> npt.NDArray[Any]:
        """Return a row of `length` tokens from each of `places` on, in the shards' own type.

        All are asked for from disk before the first is read. The rows of a shard are gathered at once, mostly
        without holding up other threads; a row that runs into the next shard is sliced.
        """
        number_of = np.searchsorted(self.starts, places, side="right") - 1
        self._ask_for(number_of, places - self.starts[number_of], length)
        whole = places + length <= self.starts[number_of + 1]
        numbers = [int(number) for number in np.unique(number_of[whole])]
        if whole.all() and len(numbers) == 1:
            return self._gathered(numbers[0], places, length)
        rows = np.empty((len(places), length), dtype=np.result_type(*(shard.dtype for shard in self.shards)))
        for number in numbers:
            mine = np.flatnonzero(whole & (number_of == number))
            rows[mine] = self._gathered(number, places[mine], length)
        for row in np.flatnonzero(~whole):
            rows[row] = self.slice(int(places[row]), length)
        return rows

    def _ask_for(self, number_of: Rows, within: Rows, length: int) -> None:
        for number, place in zip(number_of.tolist(), within.tolist()):
            mapped, size = self._mapped[number], self.shards[number].itemsize
            if mapped is not None:
                mapped.ask_for(place * size, length * size)

    @cached_property
    def _mapped(self) -> tuple[MappedArray | None, ...]:
        return tuple(map(mapped_array, self.shards))

    def _gathered(self, number: int, places: Rows, length: int) -> npt.NDArray[Any]:
        if (number, length) not in self._views:
            self._views[number, length] = sliding_window_view(self.shards[number], length)
        rows: npt.NDArray[Any] = self._views[number, length][places - self.starts[number]]
        return rows

    @cached_property
    def _views(self) -> dict[tuple[int, int], npt.NDArray[Any]]:
        """Every window of a length in a shard, as views: making one takes longer than reading a few rows."""
        return {}


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
                f"{path}: {len(mapped):,} tokens, its manifest says {entry.tokens:,}; {MAKE_AGAIN}."
            )
        if verify and (found := sha256_of(path)) != entry.sha256:
            raise UserError(
                f"{path}: sha256 {found}, its manifest says {entry.sha256}: damaged or altered; {MAKE_AGAIN}."
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
    tokens: TokenSet, *, seed: int, first_row: int, n_rows: int, context_len: int, stream: int = 0
) -> tuple[Rows, Rows]:
    """Return (idx_BT, targets_BT), int64, of the training rows `first_row` to `first_row + n_rows`.

    Rows are counted over the whole run: step * rows_per_step + place within the step. Each epoch visits its
    windows once, in an order and from a phase in [0, context_len) drawn from (seed, epoch). Each `stream`, below
    2**64, has orders of its own.
    """
    per_epoch = rows_per_epoch(tokens, context_len)
    places = np.empty(n_rows, dtype=np.int64)
    filled = 0
    while filled < n_rows:
        epoch, place = divmod(first_row + filled, per_epoch)
        phase, order = _epoch(seed, epoch, per_epoch, context_len, stream)
        part = order[place : place + n_rows - filled]
        places[filled : filled + len(part)] = phase + part.astype(np.int64) * context_len
        filled += len(part)
    windows_BT = tokens.windows(places, context_len + 1)
    return (
        windows_BT[:, :-1].astype(np.int64, order="C"),
        windows_BT[:, 1:].astype(np.int64, order="C"),
    )


@lru_cache(maxsize=ORDERS_KEPT)
def _epoch(
    seed: int, epoch: int, n_rows: int, context_len: int, stream: int
) -> tuple[int, npt.NDArray[np.integer[Any]]]:
    """Return the phase and the order of the windows in one epoch.

    Sorting raw Philox draws, not `Generator.permutation`: numpy promises the same raw draws in every
    release, but not the same permutation. The stream is the third word of the counter, so that no two streams
    ever draw alike; the fourth is left to the order of corpora in a mix.
    """
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    counter = np.array([0, 0, stream, 0], dtype=np.uint64)
    draws = np.random.Philox(key=key, counter=counter).random_raw(n_rows + 1)
    order = np.argsort(draws[1:], kind="stable")
    return int(draws[0] % np.uint64(context_len)), order.astype(np.uint32 if n_rows <= 2**32 else np.int64)


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
