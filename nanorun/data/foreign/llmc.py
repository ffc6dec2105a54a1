"""The shards of llm.c, which modded-nanogpt reads and writes too.

256 little-endian int32, of which the first three are a magic number, a version and the count of tokens and the others
0; then the tokens. 20240520 and 1 stand before uint16, 20240801 and 7 before uint32. Nothing says which tokenizer made
them. Files of multiple-choice questions begin with 20240522 and are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanorun.data.foreign import Found, TokenFile, head_of, part_of, shown, size_of
from nanorun.data.shards import HEADER_BYTES, MAGIC, SHARD_VERSION, WIDE_MAGIC, WIDE_VERSION
from nanorun.errors import UserError

NAME = "llm.c"
HAS_NO_HASH = (
    "files of this form keep no hash of their tokens: a changed byte that gives another id of the vocabulary cannot "
    "be found"
)
EVAL_MAGIC = 20240522
_VERSIONS = {MAGIC: SHARD_VERSION, WIDE_MAGIC: WIDE_VERSION}
_SIZES = {MAGIC: 2, WIDE_MAGIC: 4}
_SIZES_BY_VERSION = {SHARD_VERSION: 2, WIDE_VERSION: 4}
_MEND = "fetch it or make it again"


class _Header(NamedTuple):
    magic: int
    version: int
    n_tokens: int
    fourth: int
    rest_is_zero: bool
    """From the fourth number on."""
    n_bytes: int
    """How much of it there is."""

    @property
    def is_of_questions(self) -> bool:
        # The fourth number, of the longest question, tells them from a shard whose magic number has one bit wrong.
        return self.magic == EVAL_MAGIC and self.fourth > 0


def _header(path: Path) -> _Header:
    head = head_of(path, HEADER_BYTES)
    ints = np.frombuffer(head.ljust(HEADER_BYTES, b"\0"), dtype="<i4")
    magic, version, n_tokens, fourth = (int(value) for value in ints[:4])
    return _Header(magic, version, n_tokens, fourth, not ints[3:].any(), len(head))


def is_llmc(path: Path) -> bool:
    """Return whether a file begins with such a header, or with what was one before it was damaged."""
    try:
        header, size = _header(path), size_of(path)
    except UserError:
        return False
    if header.n_bytes < 12 or header.is_of_questions:
        return False
    item = _SIZES.get(header.magic) or _SIZES_BY_VERSION.get(header.version, 2)
    signs = (
        header.magic in _VERSIONS,
        header.version in _SIZES_BY_VERSION,
        header.n_tokens > 0 and size == HEADER_BYTES + item * header.n_tokens,
        header.rest_is_zero and header.n_bytes == HEADER_BYTES,
    )
    return header.magic in _VERSIONS or sum(signs) >= 2


def claims(files: Sequence[Path]) -> bool:
    return any(is_llmc(path) for path in files)


def look(files: Sequence[Path]) -> Found:
    """As `Format.look`; beside such shards a `.bin` file of another kind is a fault."""
    found = Found(NAME, "")
    for path in files:
        try:
            header = _header(path)
        except UserError as error:
            found.faults += [str(error)] if path.suffix == ".bin" else []
            continue
        if header.is_of_questions:
            found.notes.append(f"{shown(path)}: multiple-choice questions of llm.c, no text: left out")
        elif is_llmc(path):
            file, faults = _examined(path, header)
            found.faults += faults
            found.files += [file] if file else []
        elif path.suffix == ".bin":
            found.faults.append(
                f"{shown(path)}: begins with {header.magic}, where {MAGIC} or {WIDE_MAGIC} is expected; {_MEND}, or "
                "move it elsewhere."
            )
    is_narrow = all(file.dtype.itemsize == 2 for file in found.files)
    found.title = "shards of llm.c and modded-nanogpt" if is_narrow else "shards of llm.c in uint32"
    return found


def _examined(path: Path, header: _Header) -> tuple[TokenFile | None, list[str]]:
    """Return a shard as far as it can be read, and what is wrong with it."""
    size, where = size_of(path), shown(path)
    faults: list[str] = []
    if header.n_bytes < HEADER_BYTES:
        return None, [f"{where}: {size:,} bytes, too few for a header of {HEADER_BYTES:,}; {_MEND}."]
    if header.magic not in _VERSIONS:
        faults.append(
            f"{where}: its header begins with {header.magic}, where {MAGIC} or {WIDE_MAGIC} is expected; {_MEND}."
        )
    elif header.version != _VERSIONS[header.magic]:
        faults.append(
            f"{where}: version {header.version} in its header, where {_VERSIONS[header.magic]} is expected; {_MEND}."
        )
    if not header.rest_is_zero:
        faults.append(f"{where}: its header is not 0 after the first three numbers; {_MEND}.")
    item = _SIZES.get(header.magic) or _SIZES_BY_VERSION.get(header.version, 2)
    expected = HEADER_BYTES + item * header.n_tokens
    if header.n_tokens <= 0:
        faults.append(f"{where}: holds {header.n_tokens:,} tokens by its header; {_MEND}, or delete it.")
    elif size != expected:
        fault = "truncated" if size < expected else "too long"
        faults.append(
            f"{where}: {fault}: {size:,} bytes, but its header's {header.n_tokens:,} tokens take {expected:,}; "
            f"{_MEND}."
        )
    # What is there is read all the same, so that everything wrong with it is told at once.
    n_there = (size - HEADER_BYTES) // item
    n_tokens = min(header.n_tokens, n_there) if header.n_tokens > 0 else n_there
    return TokenFile(path, part_of(path), HEADER_BYTES, np.dtype(f"<u{item}"), n_tokens), faults


def closer_look(file: TokenFile) -> list[str]:
    return []
