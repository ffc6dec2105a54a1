"""Tokenizers without merges: the bytes of UTF-8, and a corpus' own characters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from nanorun.data.shards import Tokens, token_dtype
from nanorun.data.tokenizers.base import Encoded, layout, sum_at, surrogate_error
from nanorun.errors import UserError

NO_UTF8 = b"\xff"
"""A byte that occurs in no UTF-8: it holds the end of text's place."""
N_CODE_POINTS = 0x110000
LOOKED_UP_AT_ONCE = 1 << 16


class ByteTokenizer:
    """The 256 bytes of UTF-8 and the end of text, 256."""

    name = "byte"
    vocab_size = 257
    eot: int | None = 256
    counts_bytes = True

    def encode(self, text: str) -> Tokens:
        return self.encode_pieces([text], [False]).tokens

    def encode_pieces(self, texts: Sequence[str], begins: Sequence[bool]) -> Encoded:
        try:
            encoded = [text.encode() for text in texts]
        except UnicodeEncodeError:
            raise surrogate_error(texts) from None
        _, marks, starts = layout(map(len, encoded), begins, self.eot)
        if marks.all():
            joined = NO_UTF8 + NO_UTF8.join(encoded) if encoded else b""
        else:
            joined = b"".join(
                NO_UTF8 + piece if mark else piece for piece, mark in zip(encoded, begins, strict=True)
            )
        tokens = np.frombuffer(joined, dtype=np.uint8).astype(np.uint16)
        tokens[starts[marks]] = 256
        return Encoded(tokens, starts)

    def decode(self, ids: Iterable[int]) -> str:
        """As `Tokenizer.decode`; the end of text is shown as <|endoftext|>, as GPT-2's is."""
        pieces = (b"<|endoftext|>" if i == self.eot else bytes([i]) for i in map(int, ids))
        return b"".join(pieces).decode("utf-8", errors="replace")

    def bytes_of(self, ids: npt.NDArray[Any]) -> int:
        return int(np.count_nonzero(ids != self.eot))

    def to_manifest(self) -> dict[str, Any]:
        return {"name": self.name, "vocab_size": self.vocab_size, "eot": self.eot}

    def files(self) -> dict[str, bytes]:
        return {}


class CharTokenizer:
    """Ids 0, 1, … for `chars` in the order of their code points; no end of text."""

    name = "char"
    eot: int | None = None
    counts_bytes = True

    def __init__(self, chars: str) -> None:
        self.chars = "".join(sorted(set(chars)))
        self.vocab_size = len(self.chars)
        if not self.vocab_size:
            raise UserError(
                "Tokenizer 'char' found 0 distinct characters in the corpus, expected at least one; give it some text, "
                "or use --tokenizer byte."
            )
        chars_N = code_points(self.chars)
        self._dtype = token_dtype(self.vocab_size)
        # The table is as wide as "unknown", one above the last id, needs.
        self._id_of = np.full(N_CODE_POINTS, self.vocab_size, dtype=token_dtype(self.vocab_size + 1))
        self._id_of[chars_N] = np.arange(self.vocab_size)
        self._char_bytes = np.array([1, 2, 3, 4], dtype=np.uint8)[
            np.searchsorted([0x80, 0x800, 0x10000], chars_N, side="right")
        ]

    def encode(self, text: str) -> Tokens:
        """As `Tokenizer.encode`; a character outside the vocabulary is a `UserError`."""
        return self.encode_pieces([text], [False]).tokens

    def encode_pieces(self, texts: Sequence[str], begins: Sequence[bool]) -> Encoded:
        """As `Tokenizer.encode_pieces`; a character outside the vocabulary is a `UserError`."""
        starts = layout(map(len, texts), begins, None)[2]
        points = code_points("".join(texts))
        ids = np.empty(len(points), dtype=self._id_of.dtype)
        # Of numpy's ways of looking up, taking with "clip" is twice as fast as the others, and of a part at a time
        # the places, which it makes 64 bits wide, stay in the core's cache.
        for i in range(0, len(points), LOOKED_UP_AT_ONCE):
            part = slice(i, i + LOOKED_UP_AT_ONCE)
            np.take(self._id_of, points[part], mode="clip", out=ids[part])
        if len(ids) and int(ids.max()) == self.vocab_size:
            raise self._unknown(texts)
        return Encoded(ids.astype(self._dtype, copy=False), starts)

    def _unknown(self, texts: Iterable[str]) -> UserError:
        """Return the error of the first character that is not in the vocabulary, with its place in its text."""
        known = set(self.chars)
        text, place = next((text, i) for text in texts for i, c in enumerate(text) if c not in known)
        return UserError(
            f"The character {text[place]!r} (U+{ord(text[place]):04X}, place {place}) is not among the "
            f"{self.vocab_size} of this corpus' vocabulary; leave it out, or use --tokenizer byte."
        )

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.chars[i] for i in ids)

    def bytes_of(self, ids: npt.NDArray[Any]) -> int:
        return sum_at(self._char_bytes, ids)

    def to_manifest(self) -> dict[str, Any]:
        return {"name": self.name, "vocab_size": self.vocab_size, "eot": None, "chars": self.chars}

    def files(self) -> dict[str, bytes]:
        return {}


def code_points(text: str) -> npt.NDArray[np.uint32]:
    """Return the number of each character."""
    # surrogatepass: a text made by hand may hold a lone surrogate, which is to be an unknown character,
    # not a crash
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")
