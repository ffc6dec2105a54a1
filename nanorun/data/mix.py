"""Training rows drawn from several corpora by weight, as a pure function of their number.

The rows of a run come in blocks of 65,536. In each block every corpus has the same number of rows, its share by
largest remainder, at places drawn from (seed, block); its rows in the order of those places are the next rows of
that corpus, whose own epochs, orders and phases `train_rows` draws. So the corpus of a row, and the row within it,
depend on (seed, row, shares, what the corpora hold) alone: resuming needs one integer, and ranks only slice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from nanorun.data.batches import Rows, TokenSet, train_rows
from nanorun.data.shards import Manifest
from nanorun.errors import UserError

BLOCK_ROWS = 65_536
BLOCKS_KEPT = 4
"""Blocks' orders kept in memory, half a megabyte each."""


@dataclass(frozen=True)
class MixPart:
    """One corpus of a mix."""

    name: str
    """The corpus' own, as its manifest has it."""
    share: float
    """Of all rows; those of a mix add up to 1."""
    manifest_sha256: str
    rows: int
    """Of each block."""
    tokens: TokenSet

    @property
    def stream(self) -> int:
        """What tells its orders from those of other corpora, and of a run on it alone, which has stream 0."""
        return int(self.manifest_sha256[:16], 16) or 1


@dataclass(frozen=True)
class Mix:
    """Several corpora to train on, in the order of their manifests' hashes: what they are called moves no row."""

    parts: tuple[MixPart, ...]

    @property
    def n_tokens(self) -> int:
        return sum(part.tokens.n_tokens for part in self.parts)

    def describe(self) -> str:
        """Return the corpora and their shares in few words, the largest share first.

        Of several that have one name, such as two folders of `text`, the hash of the manifest follows.
        """
        parts = sorted(self.parts, key=lambda part: (-part.share, part.name))
        names = [part.name for part in parts]
        return ", ".join(
            part.name
            + (f" ({part.manifest_sha256[:8]})" if names.count(part.name) > 1 else "")
            + f" {100 * part.share:.4g} %"
            for part in parts
        )

    def identity(self) -> list[dict[str, object]]:
        """Return name, share and manifest_sha256 of each corpus: what a record and a checkpoint hold."""
        return [
            {"name": part.name, "share": part.share, "manifest_sha256": part.manifest_sha256}
            for part in self.parts
        ]


def make_mix(shares: Mapping[str, float], tokens: Mapping[str, TokenSet], *, validated_on: Manifest) -> Mix:
    """Return the mix of the training tokens that `shares` weights; both are keyed by what the user wrote.

    `UserError` where a corpus is there twice, has less than one row in a block, or has another vocabulary than
    the corpus that the run is validated on.
    """
    manifests: dict[str, tuple[str, Manifest]] = {}
    for key, one in tokens.items():
        manifest = one.manifest
        assert manifest is not None
        _check_vocabulary(key, manifest, validated_on)
        first, _ = manifests.setdefault(manifest.sha256, (key, manifest))
        if first != key:
            raise UserError(
                f"data.mix: {first!r} and {key!r} are the same corpus; name it once, with both shares added up"
            )
    ordered = [(sha256, *manifests[sha256]) for sha256 in sorted(manifests)]
    share_of = normalised(shares)
    rows = rows_of_block([share_of[key] for _, key, _ in ordered])
    for n_rows, (_, key, _) in zip(rows, ordered):
        if n_rows == 0:
            raise UserError(
                f"data.mix: {key!r} has a share of {share_of[key]:.2g}, less than one row in {BLOCK_ROWS:,}; give it "
                "more, or leave it out"
            )
    return Mix(
        tuple(
            MixPart(manifest.corpus, share_of[key], sha256, n_rows, tokens[key])
            for n_rows, (sha256, key, manifest) in zip(rows, ordered)
        )
    )


def normalised(shares: Mapping[str, float]) -> dict[str, float]:
    """Return the shares over their sum; those that add up to 1 already stay as they are, to the bit."""
    total = math.fsum(shares.values())
    return {key: share if abs(total - 1) < 1e-9 else share / total for key, share in shares.items()}


def rows_of_block(shares: Sequence[float]) -> list[int]:
    """Return how many rows of a block each share has, by largest remainder; `shares` add up to 1.

    Of two remainders that are the same, to the last bit, the first counts as the larger.
    """
    exact = [Fraction(share) * BLOCK_ROWS for share in shares]
    rows = [int(one) for one in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (rows[i] - exact[i], i))
    for place in by_remainder[: BLOCK_ROWS - sum(rows)]:
        rows[place] += 1
    return rows


def training_rows(
    tokens: TokenSet | Mix, *, seed: int, first_row: int, n_rows: int, context_len: int
) -> tuple[Rows, Rows]:
    """Return (idx_BT, targets_BT), int64, of the training rows `first_row` to `first_row + n_rows`."""
    if isinstance(tokens, TokenSet):
        return train_rows(tokens, seed=seed, first_row=first_row, n_rows=n_rows, context_len=context_len)
    return mixed_rows(tokens, seed=seed, first_row=first_row, n_rows=n_rows, context_len=context_len)


def mixed_rows(mix: Mix, *, seed: int, first_row: int, n_rows: int, context_len: int) -> tuple[Rows, Rows]:
    """Return (idx_BT, targets_BT), int64, of the training rows `first_row` to `first_row + n_rows` of a mix."""
    idx_BT = np.empty((n_rows, context_len), dtype=np.int64)
    targets_BT = np.empty((n_rows, context_len), dtype=np.int64)
    filled = 0
    while filled < n_rows:
        block, first = divmod(first_row + filled, BLOCK_ROWS)
        last = min(BLOCK_ROWS, first + n_rows - filled)
        part_of, rank_of = _block(seed, block, tuple(part.rows for part in mix.parts))
        for number, part in enumerate(mix.parts):
            mine = np.flatnonzero(part_of[first:last] == number)
            if not len(mine):
                continue
            # Its rows of a stretch follow one another, wherever they stand in it.
            idx_BT[filled + mine], targets_BT[filled + mine] = train_rows(
                part.tokens,
                seed=seed,
                first_row=block * part.rows + int(rank_of[first + mine[0]]),
                n_rows=len(mine),
                context_len=context_len,
                stream=part.stream,
            )
        filled += last - first
    return idx_BT, targets_BT


@lru_cache(maxsize=BLOCKS_KEPT)
def _block(
    seed: int, block: int, rows: tuple[int, ...]
) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.int32]]:
    """Return for each row of a block the number of its corpus, and which of that corpus' rows in the block it is.

    Sorted Philox draws, as for the orders of `train_rows`, and under a counter that those never have.
    """
    key = np.array([seed % 2**64, block], dtype=np.uint64)
    counter = np.array([0, 0, 0, 1], dtype=np.uint64)
    draws = np.random.Philox(key=key, counter=counter).random_raw(BLOCK_ROWS)
    part_of = np.repeat(np.arange(len(rows), dtype=np.uint16), rows)[np.argsort(draws, kind="stable")]
    rank_of = np.empty(BLOCK_ROWS, dtype=np.int32)
    for number, n_rows in enumerate(rows):
        rank_of[part_of == number] = np.arange(n_rows)
    return part_of, rank_of


def _check_vocabulary(key: str, found: Manifest, wanted: Manifest) -> None:
    """Raise `UserError`, with the command that mends it, where two corpora do not read their ids alike."""
    if found.tokenizer == wanted.tokenizer:
        return
    theirs, ours = str(found.tokenizer["name"]), str(wanted.tokenizer["name"])
    inputs = " --input PATH" if found.corpus == "text" else ""
    start = (
        f"data.mix: the corpora of a mix share one vocabulary, and {key!r} holds {found.corpus!r} in {theirs!r} "
        f"tokens ({found.vocab_size:,} entries), while the run is validated on {wanted.corpus!r} in {ours!r} tokens "
        f"({wanted.vocab_size:,} entries)"
    )
    if theirs == ours == "char":
        raise UserError(
            f"{start}: 'char' has those characters that occur in a corpus. Use bytes for all of them, with --set "
            f"data.tokenizer=byte and: nanorun prepare-data {found.corpus} --tokenizer byte{inputs}"
        )
    # A vocabulary out of a tokenizer.json has a name that says nothing of where the file is.
    from_file = "file" in wanted.tokenizer
    option = f"--tokenizer {'FOLDER/tokenizer.json' if from_file else ours}{inputs} --out DIR"
    where = f" (FOLDER: where {wanted.corpus!r} lies)" if from_file else ""
    another = ", another vocabulary of that name" if theirs == ours else ""
    raise UserError(
        f"{start}{another}. Prepare it again, and name that folder in the mix: nanorun prepare-data {found.corpus} "
        f"{option}{where}"
    )
