"""Long texts in pieces that can be tokenized by themselves.

Where a piece ends depends on the text alone, never on how it was read, so a text gives the same pieces from
memory, from a file and from an archive. A text of up to `LONG_CHARS` is one piece. From a longer one a piece
is taken that ends, at the first such place from `PIECE_CHARS` on and before `LONG_CHARS`,

1. between an ASCII letter and a space that another ASCII letter follows: the patterns of GPT-2 and of
   tiktoken's cl100k and o200k end a token there whatever stands around, so the tokens of the pieces are
   those of the text;
2. or, in text without such a place, between anything else and white space;
3. or, in text without white space, after `LONG_CHARS` characters.

Then the same again with what is left.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

PIECE_CHARS = 4_000_000
LONG_CHARS = 2 * PIECE_CHARS
"""Readers give a text above this as `LongText` where they need not hold it whole."""

_BETWEEN_WORDS = re.compile("[A-Za-z] [A-Za-z]")
_BEFORE_SPACE = re.compile(r"\S\s")


def cut(text: str, piece_chars: int = PIECE_CHARS) -> Iterator[str]:
    """Yield the pieces of `text`; joined they are the text."""
    begin = 0
    while len(text) - begin > 2 * piece_chars:
        end = _end_of_piece(text, begin, piece_chars)
        yield text[begin:end]
        begin = end
    if begin < len(text):
        yield text[begin:]


def cut_stream(blocks: Iterable[str], piece_chars: int = PIECE_CHARS) -> Iterator[str]:
    """Yield the pieces of the text that `blocks` make up, as `cut` would, with about two of them in memory."""
    held: list[str] = []
    n_chars = 0
    for block in blocks:
        held.append(block)
        n_chars += len(block)
        if n_chars <= 2 * piece_chars:
            continue
        text, begin = "".join(held), 0
        while len(text) - begin > 2 * piece_chars:
            end = _end_of_piece(text, begin, piece_chars)
            yield text[begin:end]
            begin = end
        held = [text[begin:]]
        n_chars = len(held[0])
    if n_chars:
        yield "".join(held)


def _end_of_piece(text: str, begin: int, piece_chars: int) -> int:
    """Return where the piece from `begin` ends; more than two pieces' characters are left there."""
    first, last = begin + piece_chars, begin + 2 * piece_chars
    # from the character before the first possible end to the one after the last
    found = _BETWEEN_WORDS.search(text, first - 1, last + 1) or _BEFORE_SPACE.search(
        text, first - 1, last + 1
    )
    return found.start() + 1 if found else last
