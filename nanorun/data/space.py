"""How much disk a preparation will need, and whether there is as much."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from nanorun.data.sources import InputFile, is_ready
from nanorun.errors import UserError

if TYPE_CHECKING:
    from nanorun.data.prepare import Request

BYTES_PER_TOKEN = {"byte": 1.0, "char": 1.0, "gpt2": 4.4}
"""Of English text. gpt2: 4.4 in 1 GB of web text and 5.1 in the State of the Union addresses."""
OTHER_BYTES_PER_TOKEN = 4.0
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
    on_disk = sum(file.size for file in files)
    if ready:
        return Need(0, on_disk // 2, on_disk)
    text_bytes = int(sum(file.size * file.expands for file in files))
    tokens = int(text_bytes / BYTES_PER_TOKEN.get(tokenizer, OTHER_BYTES_PER_TOKEN))
    is_narrow = tokenizer in NARROW or (tokenizer.startswith("bpe") and int(tokenizer[3:]) <= 65536)
    return Need(text_bytes, tokens, tokens * (2 if is_narrow else 4))


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


def refuse_if_full(request: Request) -> None:
    """Raise `UserError` where the disk surely has too little room for what is asked.

    What earlier, interrupted runs have left in the folder is counted as done.
    """
    need = needed(
        request.source.files(request.reading), request.tokenizer_name, ready=is_ready(request.source)
    )
    done = sum(path.stat().st_size for path in request.out.glob("*.bin*"))
    free = free_bytes(request.out)
    if free < need.disk_bytes - done:
        raise UserError(
            f"{request.out}: about {human_bytes(need.disk_bytes - done)} are needed and {human_bytes(free)} are free; "
            "free some space, or choose a folder on another disk with --out."
        )
