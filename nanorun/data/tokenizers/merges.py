"""Byte pair encoding by tiktoken: gpt2, tiktoken's other encodings, and merges out of a tokenizer.json.

A text is encoded by itself and as ordinary text: `<|endoftext|>` in it is not the end-of-text token. Where the
pattern of an encoding gives up on a text (a million spaces in a row are too many for its stack), the text is halved
until it goes, before the space of a word where one is near; its bytes stay what they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nanorun.data.shards import Tokens, token_dtype
from nanorun.data.tokenizers.base import Encoded, concatenated, sum_at, surrogate_error
from nanorun.errors import UserError

if TYPE_CHECKING:
    import tiktoken

END_OF_TEXT = "<|endoftext|>"
NEAR_CHARS = 1000
"""How far from the middle of a text a space is looked for, when it has to be halved."""


class TiktokenTokenizer:
    """An encoding of tiktoken.

    An encoding without an end of text has none: then nothing marks where a document begins.
    """

    counts_bytes = True

    def __init__(
        self,
        name: str,
        encoding: tiktoken.Encoding,
        *,
        end_of_text: str = END_OF_TEXT,
        fingerprint: str | None = None,
    ) -> None:
        """`fingerprint` is a hash of the vocabulary, for encodings that the name alone does not tell."""
        self.name = name
        self.fingerprint = fingerprint
        self.vocab_size: int = encoding.max_token_value + 1
        has_end = end_of_text in encoding.special_tokens_set
        self.eot: int | None = encoding.encode_single_token(end_of_text) if has_end else None
        self._encoding = encoding
        self._end_of_text = end_of_text
        self._has_special = bool(encoding.special_tokens_set)
        self._dtype = token_dtype(self.vocab_size)

    @cached_property
    def _token_bytes(self) -> npt.NDArray[np.uint16]:
        """The length of each token; 0 for ids that ordinary text does not give."""
        lengths = np.zeros(self.vocab_size, dtype=np.uint16)
        special = {self._encoding.encode_single_token(token) for token in self._encoding.special_tokens_set}
        for i in range(self.vocab_size):
            if i not in special:
                try:
                    lengths[i] = len(self._encoding.decode_single_token_bytes(i))
                except KeyError:
                    continue  # a hole in the vocabulary
        return lengths

    def encode(self, text: str) -> Tokens:
        return self._ordinary(text).astype(self._dtype)

    def encode_pieces(self, texts: Sequence[str], begins: Sequence[bool]) -> Encoded:
        return self._joined(texts, begins) or concatenated(
            [self._ordinary(text) for text in texts], begins, self.eot, self._dtype
        )

    def _joined(self, texts: Sequence[str], begins: Sequence[bool]) -> Encoded | None:
        """Return the ids from a single call for all texts, which leaves other threads alone meanwhile.

        The end-of-text token between texts cuts them as it does for tiktoken itself. None where that cannot be: a
        text holds its name, or is too much for the pattern.
        """
        if self.eot is None or not texts:
            return None
        end = self._end_of_text
        joined = end + end.join(texts)
        if joined.count(end) != len(texts):
            return None
        try:
            ids = self._encoding.encode_to_numpy(joined, allowed_special={end}, disallowed_special=())
        except ValueError:
            return None
        starts = np.flatnonzero(ids == self.eot)
        if len(starts) != len(texts):
            return None
        tokens = ids.astype(self._dtype)
        unmarked = ~np.array(begins, dtype=np.bool_)
        if unmarked.any():
            tokens = np.delete(tokens, starts[unmarked])
            starts = starts - (np.cumsum(unmarked) - unmarked)
        return Encoded(tokens, starts)

    def _ordinary(self, text: str) -> npt.NDArray[np.uint32]:
        try:
            return self._whole(text)
        except UnicodeEncodeError:
            raise surrogate_error([text]) from None
        except ValueError as error:
            if len(text) < 2:
                raise UserError(f"tiktoken cannot encode {text!a} with {self.name} ({error}).") from error
        return np.concatenate([self._ordinary(half) for half in _halves(text)])

    def _whole(self, text: str) -> npt.NDArray[np.uint32]:
        """Return tiktoken's ids of a whole text; ValueError where its pattern gives up."""
        if self._has_special:
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        # Without special tokens encode_to_numpy searches at every character; encode_ordinary would put U+FFFD for half
        # a surrogate pair, and panics where the pattern gives up.
        text.encode()
        try:
            return np.array(self._encoding.encode_ordinary(text), dtype=np.uint32)
        except BaseException as error:
            if not is_panic(error):
                raise
            raise ValueError(str(error)) from error

    def decode(self, ids: Iterable[int]) -> str:
        return self._encoding.decode([int(i) for i in ids], errors="replace")

    def bytes_of(self, ids: npt.NDArray[Any]) -> int:
        return sum_at(self._token_bytes, ids)

    def to_manifest(self) -> dict[str, Any]:
        entry = {"name": self.name, "vocab_size": self.vocab_size, "eot": self.eot}
        return entry if self.fingerprint is None else {**entry, "vocabulary_sha256": self.fingerprint}

    def files(self) -> dict[str, bytes]:
        return {}


def fingerprint_of(encoding: tiktoken.Encoding) -> str:
    """Return a sha256 of everything that makes an encoding: pattern, tokens and special tokens."""
    pattern, ranks, special = encoding._pat_str, encoding._mergeable_ranks, encoding._special_tokens
    tokens = sorted((rank, token.hex()) for token, rank in ranks.items())
    return hashlib.sha256(json.dumps([pattern, tokens, sorted(special.items())]).encode()).hexdigest()


def gpt2_like_encoding(name: str, content: dict[str, Any]) -> tiktoken.Encoding | None:
    """Return the encoding that gives the ids of a tokenizer.json, if that works as GPT-2's does.

    tiktoken joins any two neighbours that are a token together, the earliest token first; the package tokenizers
    joins the pairs of its list. They agree where each token, spelled out and joined by the merges before its own,
    ends as the two parts of its merge: then no other two parts of it ever meet.
    """
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    model, added = content.get("model") or {}, content.get("added_tokens") or []
    switched_on = [
        model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    ]
    steps = content.get("pre_tokenizer") or {}
    if (
        content.get("normalizer")
        or any(switched_on)
        or not all(token["special"] for token in added)
        or (model.get("type"), steps.get("type")) != ("BPE", "ByteLevel")
        or steps.get("add_prefix_space", True)
        or not steps.get("use_regex", True)
    ):
        return None
    ranks = _ranks(model["vocab"], [m.split(" ") if isinstance(m, str) else m for m in model["merges"]])
    special = {token["content"]: token["id"] for token in added}
    if ranks is None or not set(special.values()).isdisjoint(ranks.values()):
        return None
    return tiktoken.Encoding(name, pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)


def _ranks(vocab: dict[str, int], merges: list[list[str]]) -> dict[bytes, int] | None:
    """Return tiktoken's ranks of a byte-level vocabulary, or None where tiktoken would join otherwise."""
    byte_of = byte_of_char()
    if not byte_of.keys() <= vocab.keys() or any(
        char not in byte_of for pair in merges for char in "".join(pair)
    ):
        return None
    ranks = {bytes([byte]): vocab[char] for char, byte in byte_of.items()}
    newest = -1
    for left_chars, right_chars in merges:
        left, right = (bytes(byte_of[char] for char in chars) for chars in (left_chars, right_chars))
        rank = vocab[left_chars + right_chars]
        parts_are_older = all(len(part) == 1 or part in ranks for part in (left, right))
        if rank <= newest or not parts_are_older or _joined_parts(left + right, ranks) != [left, right]:
            return None
        ranks[left + right] = newest = rank
    return ranks


def _joined_parts(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Return what is left of a token's bytes when everything in `ranks` has been joined."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while True:
        found = [
            (ranks[pair], i) for i, pair in enumerate(map(bytes.__add__, parts, parts[1:])) if pair in ranks
        ]
        if not found:
            return parts
        _, i = min(found)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def byte_of_char() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for.

    Bytes that Latin-1 shows as a visible character stand as that, the others as U+0100 and on, in their order.
    """
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def is_panic(error: BaseException) -> bool:
    """Return whether an exception is a panic of a library written in Rust, which is no `Exception`."""
    return type(error).__name__ == "PanicException"


def _halves(text: str) -> tuple[str, str]:
    """Return a text in two parts, cut before a space near its middle: there every pattern cuts too."""
    middle = len(text) // 2
    space = text.find(" ", middle, middle + NEAR_CHARS)
    if space > 0 and not text[space - 1].isspace() and not text[space + 1 : space + 2].isspace():
        middle = space
    return text[:middle], text[middle:]
