"""Text to token ids and back: bytes, the corpus' own characters, or GPT-2's vocabulary.

Where a tokenizer has an end-of-text token, `prepare` puts it BEFORE each document, as llm.c and
modded-nanogpt do: then the first prediction of every document is made from that token. `char` has none, as
in nanoGPT.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from nanorun.data import gpt2_vocabulary
from nanorun.errors import UserError, nearest

Tokens = npt.NDArray[np.uint16]

TOKENIZER_NAMES = ("byte", "char", "gpt2")
MOST_TOKENS = 1 << 16
"""Shards hold uint16."""


class Tokenizer(Protocol):
    """What every tokenizer here offers."""

    name: str
    vocab_size: int
    eot: int | None
    """The id of the end-of-text token, or None where there is none."""
    counts_bytes: bool
    """Whether `bytes_of` is exact for any run of ids, not only for a whole document's."""

    def encode(self, text: str) -> Tokens:
        """Return the ids of `text` as ordinary text: nothing in it is special."""

    def encode_batch(self, texts: Sequence[str], workers: int) -> list[Tokens]:
        """Return `encode` of each text, on `workers` threads where that helps."""

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; bytes that are no UTF-8 become U+FFFD."""

    def bytes_of(self, ids: npt.NDArray[Any]) -> int:
        """Return how many UTF-8 bytes of text `ids` stand for; the end-of-text token for none."""

    def to_manifest(self) -> dict[str, Any]:
        """Return what `tokenizer_from_manifest` needs to make this tokenizer again."""


class ByteTokenizer:
    """The 256 bytes of UTF-8 and the end of text, 256."""

    name = "byte"
    vocab_size = 257
    eot: int | None = 256
    counts_bytes = True

    def encode(self, text: str) -> Tokens:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.uint16)

    def encode_batch(self, texts: Sequence[str], workers: int) -> list[Tokens]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """As `Tokenizer.decode`; the end of text is shown as <|endoftext|>, as GPT-2's is."""
        pieces = (b"<|endoftext|>" if i == self.eot else bytes([i]) for i in map(int, ids))
        return b"".join(pieces).decode("utf-8", errors="replace")

    def bytes_of(self, ids: npt.NDArray[Any]) -> int:
        return int(np.count_nonzero(ids != self.eot))

    def to_manifest(self) -> dict[str, Any]:
        return {"name": self.name, "vocab_size": self.vocab_size, "eot": self.eot}


class CharTokenizer:
    """Ids 0, 1, … for `chars` in sorted order; no end of text."""

    name = "char"
    eot: int | None = None
    counts_bytes = True

    def __init__(self, chars: str) -> None:
        self.chars = "".join(sorted(set(chars)))
        self.vocab_size = len(self.chars)
        if not 0 < self.vocab_size <= MOST_TOKENS:
            raise UserError(
                f"Tokenizer 'char' found {self.vocab_size} distinct characters, expected 1 to {MOST_TOKENS}; "
                "use --tokenizer byte."
            )
        self._code_points = _code_points(self.chars)
        self._char_bytes = np.array([len(c.encode("utf-8")) for c in self.chars], dtype=np.int64)

    def encode(self, text: str) -> Tokens:
        """As `Tokenizer.encode`; a character outside the vocabulary is a `UserError`."""
        points = _code_points(text)
        ids = np.searchsorted(self._code_points, points)
        known = self._code_points[np.minimum(ids, self.vocab_size - 1)] == points
        if not known.all():
            place = int(np.argmin(known))
            raise UserError(
                f"The character {text[place]!r} (U+{ord(text[place]):04X}, place {place}) is not among the "
                f"{self.vocab_size} of this corpus' vocabulary; leave it out, or use tokenizer byte."
            )
        return ids.astype(np.uint16)

    def encode_batch(self, texts: Sequence[str], workers: int) -> list[Tokens]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.chars[i] for i in ids)

    def bytes_of(self, ids: npt.NDArray[Any]) -> int:
        return int(self._char_bytes[ids].sum())

    def to_manifest(self) -> dict[str, Any]:
        return {"name": self.name, "vocab_size": self.vocab_size, "eot": None, "chars": self.chars}


class Gpt2Tokenizer:
    """GPT-2's 50,256 byte pairs and the end of text, 50256, by tiktoken."""

    name = "gpt2"
    vocab_size = 50257
    eot: int | None = 50256
    counts_bytes = True

    def __init__(self) -> None:
        self._encoding = gpt2_vocabulary.load_encoding()
        pieces = [self._encoding.decode_single_token_bytes(i) for i in range(50256)]
        self._token_bytes = np.array([len(piece) for piece in pieces] + [0], dtype=np.int64)

    def encode(self, text: str) -> Tokens:
        return np.array(self._encoding.encode_ordinary(text), dtype=np.uint16)

    def encode_batch(self, texts: Sequence[str], workers: int) -> list[Tokens]:
        encoded = self._encoding.encode_ordinary_batch(list(texts), num_threads=workers)
        return [np.array(ids, dtype=np.uint16) for ids in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        return self._encoding.decode([int(i) for i in ids], errors="replace")

    def bytes_of(self, ids: npt.NDArray[Any]) -> int:
        return int(self._token_bytes[ids].sum())

    def to_manifest(self) -> dict[str, Any]:
        return {"name": self.name, "vocab_size": self.vocab_size, "eot": self.eot}


def make_tokenizer(name: str, texts: Iterable[str] = ()) -> Tokenizer:
    """Return the tokenizer `name`; `char` takes its vocabulary from `texts`."""
    check_tokenizer_name(name)
    if name == "byte":
        return ByteTokenizer()
    if name == "gpt2":
        return Gpt2Tokenizer()
    chars: set[str] = set()
    for text in texts:
        chars.update(text)
    return CharTokenizer("".join(chars))


def tokenizer_from_manifest(entry: dict[str, Any], folder: Path | None = None) -> Tokenizer:
    """Return the tokenizer that a manifest's `tokenizer` entry describes; `folder` is where the manifest lies."""
    return make_tokenizer(str(entry.get("name")), [str(entry.get("chars", ""))])


def check_tokenizer_name(name: str) -> None:
    """Raise `UserError` unless `name` is a tokenizer's."""
    if name not in TOKENIZER_NAMES:
        known = list(TOKENIZER_NAMES)
        raise UserError(
            f"There is no tokenizer {name!r}; there are {', '.join(known)}.{nearest(name, known)}"
        )


def _code_points(text: str) -> npt.NDArray[np.uint32]:
    # surrogatepass: a text made by hand may hold a lone surrogate, which is to be an unknown character,
    # not a crash
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")
