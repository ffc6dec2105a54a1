"""How much disk a preparation will need, and whether there is as much."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from nanorun.data.shards import HEADER_BYTES
from nanorun.data.sources import InputFile

if TYPE_CHECKING:
    from nanorun.data.prepare import Request

BYTES_PER_TOKEN = {"byte": 1.0, "char": 1.0, "gpt2": 4.4}
"""Of English text. gpt2: 4.4 in 1 GB of web text and 5.1 in the State of the Union addresses."""
OTHER_BYTES_PER_TOKEN = 4.0
BPE_BYTES_PER_TOKEN = {256: 1.0, 512: 2.3, 1024: 2.9, 2048: 3.6, 4096: 4.2, 8192: 4.7}
"""Of the State of the Union addresses, by the size of a vocabulary that was trained on others of them."""
NARROW = ("byte", "char", "gpt2", "r50k_base", "p50k_base", "p50k_edit")
"""Tokenizers that are known to have no more than 65,536 entries; so has bpeN up to there."""


class Need(NamedTuple):
    """What a preparation will take, by a guess where texts are still to be read."""

    text_bytes: int
    """0 where tokens are fetched ready-made."""
    tokens: int
    disk_bytes: int


def needed(files: list[InputFile], tokenizer: str, *, ready: bool) -> Need:
    """Return what preparing `files` will take in shards."""
    if ready:
        return Need(0, sum(map(_tokens_in, files)), sum(file.size for file in files))
    text_bytes = int(sum(file.size * file.expands for file in files))
    tokens = int(text_bytes / _bytes_per_token(tokenizer))
    is_narrow = tokenizer in NARROW or (tokenizer.startswith("bpe") and int(tokenizer[3:]) <= 65536)
    return Need(text_bytes, tokens, tokens * (2 if is_narrow else 4))


def _tokens_in(file: InputFile) -> int:
    """Return the tokens of a file of tokens; of one on the hub, which was not looked into, as uint16 under a header."""
    return max(0, file.size - HEADER_BYTES) // 2 if file.tokens is None else file.tokens


def _bytes_per_token(tokenizer: str) -> float:
    if tokenizer.startswith("bpe"):
        return float(np.interp(int(tokenizer[3:]), [*BPE_BYTES_PER_TOKEN], [*BPE_BYTES_PER_TOKEN.values()]))
    return BYTES_PER_TOKEN.get(tokenizer, OTHER_BYTES_PER_TOKEN)


def free_bytes(folder: Path) -> int:
    """Return the free bytes of the disk that `folder` lies on, or would lie on."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def human_bytes(n: float) -> str:
    """Return a size as people say it: 812 bytes, 2.8 MB, 27.6 GB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n:.0f} bytes"


def warn_if_full(request: Request) -> str:
    """Return a sentence where the disk seems to have too little room for a corpus of texts; empty otherwise.

    Nothing is refused: how much text lies beside other columns, and how often the same, is known only afterwards. What
    earlier, interrupted runs have left in the folder is counted as done.
    """
    need = needed(request.source.files(request.reading), request.tokenizer_name, ready=False)
    done = sum(path.stat().st_size for path in request.out.glob("*.bin*"))
    free = free_bytes(request.out)
    if free >= need.disk_bytes - done:
        return ""
    return (
        f"{request.out}: about {human_bytes(need.disk_bytes - done)} may be needed and {human_bytes(free)} are free; "
        "if the disk fills up, what is done stays, and with more space the same command goes on"
    )
