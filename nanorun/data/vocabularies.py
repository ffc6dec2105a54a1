"""Tokenizers that are made from the corpus: its characters, or byte pairs trained on it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from nanorun.data.sources import LongText
from nanorun.data.tokenizers import Tokenizer
from nanorun.data.tokenizers.plain import N_CODE_POINTS, code_points

N_ASCII = 128


def characters(texts: Iterable[str | LongText]) -> str:
    """Return the distinct characters of all texts, in the order of their code points."""
    known = np.zeros(N_CODE_POINTS, dtype=np.bool_)
    ascii_known = b""
    for text in texts:
        for piece in (text,) if isinstance(text, str) else text.pieces():
            # Of most pieces nothing is left but the few characters beyond ASCII.
            if left := piece.encode("utf-8", "surrogatepass").translate(None, ascii_known):
                known[code_points(left.decode("utf-8", "surrogatepass"))] = True
                ascii_known = np.flatnonzero(known[:N_ASCII]).astype(np.uint8).tobytes()
    return "".join(map(chr, np.flatnonzero(known).tolist()))


def trained_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Return a byte-level BPE of `vocab_size` entries, trained on the first of `texts`: see `train_bpe`."""
    from nanorun.data.bpe import train_bpe
    from nanorun.data.tokenizers import tokenizer_of_file

    return tokenizer_of_file(train_bpe(texts, vocab_size), f"bpe{vocab_size}")
