"""A byte-level BPE vocabulary trained on a corpus: a small model has no use for the 50,257 entries of GPT-2's.

It is made as GPT-2's was: the text is cut into words by GPT-2's pattern, and the most frequent pair of neighbours
becomes an entry, again and again. The 256 bytes come first, the end of text last. The same texts give the same file,
byte for byte, on any number of threads.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from nanorun.data.tokenizers.base import environment, surrogate_error
from nanorun.data.tokenizers.json_file import import_tokenizers
from nanorun.data.tokenizers.merges import END_OF_TEXT
from nanorun.errors import UserError

N_BYTES = 256
SMALLEST = N_BYTES + 1
"""The bytes and the end of text."""
LARGEST = 1 << 18
"""As large as the vocabularies of the largest models; counting takes minutes and gigabytes beyond."""
LEAST_COUNT = 2
"""A pair that occurs once becomes no entry."""
PIECE_CHARS = 1 << 15
"""Texts are handed on in pieces: the package holds 256 of them at a time."""
MOST_BYTES = 200_000_000
"""Of text that is read: the package takes in some 6 MB a second, and counts pairs in 32 bits."""
MOST_WORD_BYTES = 5_000_000
"""Of words that differ, as `WORD` tells them; 12 MB of speeches hold 0.24. The package takes about 110 bytes of memory
for each byte of them, measured from 0.9 to 6.8 million bytes."""
WORD = re.compile(r"[^\W\d_]+|\d+|[^\w\s]+|_+")
"""About what the pattern of GPT-2 cuts out, without the space before it."""
MOST_FAMILIAR = 100_000
"""Words with their punctuation that need not be looked into again."""
WORD_CHARS = 1000
"""A piece without such a space is cut after so many characters: joining pairs in a long word is slow."""


def train_bpe(texts: Iterable[str], vocab_size: int) -> bytes:
    """Return the tokenizer.json of a byte-level BPE of `vocab_size` entries, trained on `texts`.

    Of the texts the first 200 MB are read, or less, always the same, where their words would take more than about 600
    MB of memory: what comes later would change few of the merges. They are read once, in other threads; what they
    raise is raised here. UserError for a size that makes no sense, for texts in which too few pairs occur twice, and
    where the package tokenizers is missing.
    """
    if not SMALLEST <= vocab_size <= LARGEST:
        raise UserError(
            f"--train-bpe {vocab_size}: expected {SMALLEST} (the bytes and the end of text) to {LARGEST:,}, "
            "such as 4096."
        )
    package = import_tokenizers()
    tokenizer = package.Tokenizer(package.models.BPE())
    tokenizer.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = package.decoders.ByteLevel()
    trainer = package.trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=LEAST_COUNT,
        initial_alphabet=package.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    _train(tokenizer, trainer, texts)
    found = tokenizer.get_vocab_size() + 1
    if found < vocab_size:
        raise UserError(
            f"--train-bpe {vocab_size}: the training text gives no more than {found} entries (only pairs that occur "
            f"twice become one); use --train-bpe {found} or less, or add text."
        )
    tokenizer.add_special_tokens([END_OF_TEXT])
    return str(tokenizer.to_str()).encode()


def _train(tokenizer: Any, trainer: Any, texts: Iterable[str]) -> None:
    """Train in a thread, so that Ctrl-C is heard at once and the thread is told to end."""
    stopped = threading.Event()
    with environment("TOKENIZERS_PARALLELISM", "true"), ThreadPoolExecutor(1) as pool:
        try:
            pool.submit(tokenizer.train_from_iterator, _pieces(texts, stopped), trainer=trainer).result()
        except BaseException:
            stopped.set()
            raise


def _pieces(texts: Iterable[str], stopped: threading.Event) -> Iterator[str]:
    """Yield the texts in pieces until their words are as many as memory should hold."""
    words: set[str] = set()
    familiar: set[str] = set()
    bytes_left, word_bytes_left = MOST_BYTES, MOST_WORD_BYTES
    for text in texts:
        for piece in cut_at_words(text):
            if stopped.is_set():
                raise RuntimeError("training was interrupted")
            unfamiliar = set(piece.split()).difference(familiar)
            if len(familiar) > MOST_FAMILIAR:
                familiar.clear()
            familiar |= unfamiliar
            new = set(WORD.findall(" ".join(unfamiliar))).difference(words)
            words |= new
            try:
                bytes_left -= len(piece.encode())
            except UnicodeEncodeError:
                raise surrogate_error([text]) from None
            word_bytes_left -= len("".join(new).encode())
            if min(bytes_left, word_bytes_left) < 0:
                return
            yield piece


def cut_at_words(text: str) -> Iterator[str]:
    """Yield a text in pieces of at most `PIECE_CHARS`, cut before the space of a word where there is one.

    Cut there, the pattern finds the same words as in the whole text.
    """
    start = 0
    while len(text) - start > PIECE_CHARS:
        end = start + PIECE_CHARS
        word = _last_word(text, start, end)
        if word is not None:
            yield text[start:word]
        else:
            yield from (text[i : min(i + WORD_CHARS, end)] for i in range(start, end, WORD_CHARS))
        start = word or end
    yield text[start:]


def _last_word(text: str, start: int, end: int) -> int | None:
    """Return the last place in `text[start:end]` where a space stands alone, which is not its first."""
    place = text.rfind(" ", start + 1, end)
    while place > 0 and (text[place - 1].isspace() or text[place + 1].isspace()):
        place = text.rfind(" ", start + 1, place)
    return place if place > 0 else None
