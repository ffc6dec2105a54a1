"""Tokenizers out of a tokenizer.json, as the package `tokenizers` writes it and models on the hub carry it.

Of such a file only the way from text to ids is used: no tokens are added at the ends, nothing is cut short or padded,
BPE dropout is off, and special tokens are not looked for in the text. (Added tokens that are not special are: they
belong to the vocabulary. And a vocabulary may hold the spelling of a special token as an ordinary entry.)
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nanorun.data.pieces import cut
from nanorun.data.shards import Tokens, token_dtype
from nanorun.data.tokenizers.base import Encoded, concatenated, sum_at, surrogate_error
from nanorun.data.tokenizers.merges import TiktokenTokenizer, byte_of_char, gpt2_like_encoding, is_panic
from nanorun.errors import UserError

if TYPE_CHECKING:
    import tokenizers

FILE_NAME = "tokenizer.json"
ENDS_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
"""What ends a text in the vocabularies of GPT-2, Llama 3, Llama 2, Gemma and BERT; the first that is there counts."""
PIECE_CHARS = 1_000_000
"""A text of more than twice as many characters goes to the package in pieces: it takes some 100 bytes for each."""
KEEPING_STEPS = ("Split", "Digits", "Punctuation")
"""Pre-tokenizers that cut a text and keep all of it, unless they are told to remove what they cut at."""


class JsonTokenizer:
    """The tokenizer of a tokenizer.json.

    `counts_bytes` holds for byte-level BPE that takes a text as it is, without a normalizer or a space put before it;
    elsewhere `bytes_of` counts the UTF-8 bytes that each token seems to spell.
    """

    def __init__(self, content: bytes, name: str | None = None, *, where: str = FILE_NAME) -> None:
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.name = name or json_name(content)
        self._content = content
        parsed = _parsed(content, where)
        library = LibraryCodec(parsed, where)
        self._codec: LibraryCodec | TiktokenTokenizer = library
        encoding = gpt2_like_encoding(self.name, parsed)
        if encoding is not None:
            faster = TiktokenTokenizer(self.name, encoding, end_of_text=library.end_of_text or "")
            if (faster.vocab_size, faster.eot) == (library.vocab_size, library.eot):
                self._codec = faster
        self.vocab_size = self._codec.vocab_size
        self.eot = self._codec.eot
        self.counts_bytes = self._codec.counts_bytes

    def encode(self, text: str) -> Tokens:
        return self._codec.encode(text)

    def encode_pieces(self, texts: Sequence[str], begins: Sequence[bool]) -> Encoded:
        return self._codec.encode_pieces(texts, begins)

    def decode(self, ids: Iterable[int]) -> str:
        return self._codec.decode(ids)

    def bytes_of(self, ids: npt.NDArray[Any]) -> int:
        return self._codec.bytes_of(ids)

    def to_manifest(self) -> dict[str, Any]:
        entry = {"name": self.name, "vocab_size": self.vocab_size, "eot": self.eot}
        return {**entry, "file": FILE_NAME, "sha256": self.sha256}

    def files(self) -> dict[str, bytes]:
        return {FILE_NAME: self._content}


class LibraryCodec:
    """Text to ids and back by the package `tokenizers`."""

    def __init__(self, parsed: dict[str, Any], where: str) -> None:
        self._parsed = parsed
        self._library = _library(parsed, where)
        vocab = self._library.get_vocab(with_added_tokens=True)
        if not vocab:
            raise UserError(f"{where}: its vocabulary is empty; expected a trained tokenizer.")
        self.vocab_size = max(vocab.values()) + 1
        self.end_of_text = next((token for token in ENDS_OF_TEXT if token in vocab), None)
        self.eot: int | None = vocab[self.end_of_text] if self.end_of_text else None
        self.counts_bytes = _keeps_bytes(parsed)
        self._dtype = token_dtype(self.vocab_size)

    @cached_property
    def _token_bytes(self) -> npt.NDArray[np.uint16]:
        lengths = np.zeros(self.vocab_size, dtype=np.uint16)
        for token, i in self._library.get_vocab(with_added_tokens=False).items():
            lengths[i] = (
                len(token) if self.counts_bytes else _about_bytes(token, self._parsed["model"].get("type"))
            )
        for i, added in self._library.get_added_tokens_decoder().items():
            lengths[i] = 0 if added.special else len(added.content.encode())
        return lengths

    def encode(self, text: str) -> Tokens:
        return self.encode_pieces([text], [False]).tokens

    def encode_pieces(self, texts: Sequence[str], begins: Sequence[bool]) -> Encoded:
        if all(len(text) <= 2 * PIECE_CHARS for text in texts):
            ids: Sequence[Sequence[int]] = self._ids(texts)
        else:
            ids = [[i for piece in cut(text, PIECE_CHARS) for i in self._ids([piece])[0]] for text in texts]
        return concatenated(ids, begins, self.eot, self._dtype)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        try:
            return [
                found.ids for found in self._library.encode_batch_fast(list(texts), add_special_tokens=False)
            ]
        except BaseException as error:
            if not isinstance(error, Exception) and not is_panic(error):
                raise
            if any("\ud800" <= c <= "\udfff" for text in texts for c in text):
                raise surrogate_error(texts) from None
            raise UserError(
                f"The package tokenizers cannot encode a text with this {FILE_NAME}: {error}."
            ) from error

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._library.decode([int(i) for i in ids], skip_special_tokens=False))

    def bytes_of(self, ids: npt.NDArray[Any]) -> int:
        return sum_at(self._token_bytes, ids)


def json_name(content: bytes) -> str:
    """Return what a tokenizer.json is called: `json-` and the beginning of its sha256."""
    return f"json-{hashlib.sha256(content).hexdigest()[:8]}"


def import_tokenizers() -> Any:
    """Return the package `tokenizers`; `UserError` where it is not installed."""
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(
            "A tokenizer.json needs the package tokenizers, which is not installed: pip install 'nanorun[data]'"
        ) from error
    return tokenizers


def _parsed(content: bytes, where: str) -> dict[str, Any]:
    """Return a tokenizer.json with what would change a text's ids by chance or length switched off."""
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); expected the tokenizer.json of a model.") from error
    if not isinstance(parsed, dict) or not isinstance(parsed.get("model"), dict):
        raise UserError(
            f"{where}: JSON, but not a tokenizer: it has no `model`; expected the tokenizer.json of a model."
        )
    return {**parsed, "truncation": None, "padding": None, "model": _without_dropout(parsed["model"])}


def _without_dropout(model: dict[str, Any]) -> dict[str, Any]:
    return {**model, "dropout": None} if model.get("dropout") else model


def _library(parsed: dict[str, Any], where: str) -> tokenizers.Tokenizer:
    package = import_tokenizers()
    # nanorun has threads of its own; the package's would come on top of them.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        library: tokenizers.Tokenizer = package.Tokenizer.from_str(json.dumps(parsed))
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise UserError(
            f"{where}: the package tokenizers {package.__version__} cannot read it ({error}); expected the "
            "tokenizer.json of a model, of a version that it knows."
        ) from error
    library.encode_special_tokens = True
    return library


def _keeps_bytes(parsed: dict[str, Any]) -> bool:
    """Return whether the tokens of any text spell its bytes, each character of a token one of them."""
    model, steps = parsed["model"], parsed.get("pre_tokenizer") or {}
    chain = steps.get("pretokenizers", []) if steps.get("type") == "Sequence" else [steps]
    if parsed.get("normalizer") or not chain or model.get("type") != "BPE":
        return False
    *before, last = chain
    cuts_only = all(
        step.get("type") in KEEPING_STEPS and step.get("behavior") != "Removed" for step in before
    )
    whole = byte_of_char().keys() <= model.get("vocab", {}).keys()
    swallows = any(token.get("lstrip") or token.get("rstrip") for token in parsed.get("added_tokens") or [])
    affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    byte_level = last.get("type") == "ByteLevel" and not last.get("add_prefix_space", True)
    return bool(cuts_only and whole and byte_level and not swallows and not affixes)


def _about_bytes(token: str, model: str | None) -> int:
    """Return how many UTF-8 bytes a token seems to spell, of a vocabulary that is not byte-level."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return 1
    if model == "WordPiece":
        return len(token[2:].encode()) if token.startswith("##") else 1 + len(token.encode())
    return len(token.replace("▁", " ").encode())
