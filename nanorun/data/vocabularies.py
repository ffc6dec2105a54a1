"""Tokenizers that are made from the corpus: its characters, or byte pairs trained on it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from nanorun.data.sources import LongText
from nanorun.data.tokenizers import Tokenizer

N_CODE_POINTS = 0x110000


def characters(texts: Iterable[str | LongText]) -> str:
    """Return the distinct characters of all texts, in the order of their code points."""
    known = np.zeros(N_CODE_POINTS, dtype=np.bool_)
    ascii_known = b""
    for text in texts:
        for piece in (text,) if isinstance(text, str) else text.pieces():
            if piece.isascii():
                if left := piece.encode().translate(None, ascii_known):
                    ascii_known += bytes(set(left))
            else:
                known[np.frombuffer(piece.encode("utf-32-le", "surrogatepass"), dtype="<u4")] = True
    known[np.frombuffer(ascii_known, dtype=np.uint8)] = True
    return "".join(map(chr, np.flatnonzero(known).tolist()))


def trained_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Return a byte-level BPE of `vocab_size` entries, trained on the first of `texts`: see `train_bpe`."""
    from nanorun.data.bpe import train_bpe
    from nanorun.data.tokenizers import tokenizer_of_file

    return tokenizer_of_file(train_bpe(texts, vocab_size), f"bpe{vocab_size}")
