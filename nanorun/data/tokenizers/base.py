"""What every tokenizer offers, and the few things they share."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from nanorun.data.shards import Tokens
from nanorun.errors import UserError

COUNTED_AT_ONCE = 1 << 20
"""Ids looked up together, so that counting the bytes of a whole shard takes little memory."""


class Encoded(NamedTuple):
    """Several texts' tokens after one another."""

    tokens: Tokens
    starts: npt.NDArray[np.int64]
    """Where each text's tokens begin, its end-of-text token included."""


class Tokenizer(Protocol):
    """What every tokenizer here offers. Ids are uint16, or uint32 where the vocabulary has above 65,536 entries."""

    name: str
    """What a manifest and a config call it."""
    vocab_size: int
    """One more than the largest id."""
    eot: int | None
    """The id of the end-of-text token, or None where there is none."""
    counts_bytes: bool
    """Whether `bytes_of` is exact for any run of ids, not only for a whole document's."""

    def encode(self, text: str) -> Tokens:
        """Return the ids of `text` as ordinary text: nothing in it is special."""

    def encode_pieces(self, texts: Sequence[str], begins: Sequence[bool]) -> Encoded:
        """Return the ids of all texts after one another, the end-of-text token before each that begins a document.

        Called on several threads at once, with a megabyte or so of text each time.
        """

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; bytes that are no UTF-8 become U+FFFD."""

    def bytes_of(self, ids: npt.NDArray[Any]) -> int:
        """Return how many UTF-8 bytes of text `ids` stand for; the end-of-text token for none."""

    def to_manifest(self) -> dict[str, Any]:
        """Return what `tokenizer_from_manifest` needs to make this tokenizer again, beside `files`."""

    def files(self) -> dict[str, bytes]:
        """Return what has to lie beside the manifest: name to content. Empty for most."""


def concatenated(
    pieces: Sequence[Sequence[int] | npt.NDArray[Any]],
    begins: Sequence[bool],
    eot: int | None,
    dtype: np.dtype[Any],
) -> Encoded:
    """Return the ids of several texts after one another, `eot` before each that begins a document."""
    lengths, marks, starts = layout(map(len, pieces), begins, eot)
    tokens = np.empty(int((lengths + marks).sum()), dtype=dtype)
    for piece, start, length in zip(pieces, (starts + marks).tolist(), lengths.tolist(), strict=True):
        tokens[start : start + length] = piece
    if eot is not None:
        tokens[starts[marks]] = eot
    return Encoded(tokens, starts)


def layout(
    lengths: Iterable[int], begins: Sequence[bool], eot: int | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """Return the texts' lengths, which of them an end-of-text token precedes, and where each starts with it."""
    lengths_N = np.fromiter(lengths, dtype=np.int64, count=len(begins))
    marks_N = np.array(begins, dtype=np.bool_) if eot is not None else np.zeros(len(begins), dtype=np.bool_)
    widths_N = lengths_N + marks_N
    return lengths_N, marks_N, np.cumsum(widths_N) - widths_N


def sum_at(values: npt.NDArray[Any], ids: npt.NDArray[Any]) -> int:
    """Return the sum of `values[ids]`, a part at a time."""
    parts = range(0, len(ids), COUNTED_AT_ONCE)
    return sum(int(values[ids[i : i + COUNTED_AT_ONCE]].sum(dtype=np.int64)) for i in parts)


def surrogate_error(texts: Iterable[str]) -> UserError:
    """Return the error of the first text that has no UTF-8: it holds half a surrogate pair."""
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            near = text[max(0, error.start - 20) : error.start]
            return UserError(
                f"A text holds U+{ord(text[error.start]):04X} at place {error.start:,} (after {near!a}): half a "
                "surrogate pair, which is no character; take it out, or read the file in its true encoding."
            )
    raise AssertionError("every text is UTF-8")


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """Set an environment variable for a while."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before
