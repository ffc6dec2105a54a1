"""Tiny Shakespeare: 1,115,394 characters, 65 distinct; the text of nanoGPT's character-level quick start.

The first 90 % of the characters are for training and the rest for validation, each split one document. With
the `char` tokenizer the shards are token for token those of nanoGPT: 1,003,854 and 111,540 tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

from nanorun.data.sources import Document, InputFile, Reading, packed_file, read_packed, refuse_inputs

NAME = "shakespeare"
SUMMARY = "tiny Shakespeare, 1.1 MB; the last tenth of the characters held out, as in nanoGPT"
EMBEDDED = True
TAKES_INPUT = False
OPTIONS: tuple[str, ...] = ("keep-duplicates",)
DEFAULT_TOKENIZER = "char"

PACKED_SHA256 = "c7c8b43dd8646838f2a6feffffdd80f8db46ea44a9bba1c6a2490154d2a64c90"
SOURCE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TEXT_BYTES = 1_115_394
TRAIN_SHARE = 0.9


def files(reading: Reading) -> list[InputFile]:
    """Return the packed file."""
    refuse_inputs(NAME, reading)
    return [packed_file(NAME, PACKED_SHA256, TEXT_BYTES)]


def documents(reading: Reading) -> Iterator[Document]:
    """Yield the one document of each split."""
    refuse_inputs(NAME, reading)
    text = read_packed(NAME, PACKED_SHA256).decode("utf-8")
    cut = int(TRAIN_SHARE * len(text))
    yield Document(f"{NAME}-train", text[:cut], "train")
    yield Document(f"{NAME}-val", text[cut:], "val")
