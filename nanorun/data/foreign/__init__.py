"""Token files that other programs made: one module per format, found by what lies in a folder.

A format is a module with the names of `Format`. Nothing here changes a file, executes what one holds, or opens
a path that one names.
"""

from __future__ import annotations

import glob
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import IO, Any, Literal, Protocol, cast

import numpy as np
import numpy.typing as npt

from nanorun.errors import UserError, printable

CHUNK_TOKENS = 1 << 22
"""Files are read by so many tokens at a time, whatever their size."""
FORMATS = ("datatrove", "llmc", "nanogpt")
"""In the order in which they are tried."""

Part = Literal["train", "val", "test"]
_PART_WORDS: dict[str, Part] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
}


@dataclass(frozen=True, eq=False)
class TokenFile:
    """One file of tokens."""

    path: Path
    part: Part | None
    """None where its name does not tell."""
    offset: int
    """Bytes before the first token."""
    dtype: np.dtype[Any]
    n_tokens: int
    ends: npt.NDArray[np.uint64] | None = None
    """Where each document ends, in tokens, where an index beside the file says it."""

    @property
    def n_bytes(self) -> int:
        return self.offset + self.n_tokens * self.dtype.itemsize


@dataclass(frozen=True)
class Vocabulary:
    """What the files themselves say of their tokenizer."""

    name: str | None = None
    """As whoever made them calls it."""
    size: int | None = None
    chars: str | None = None
    """The characters that the ids 0, 1, … stand for."""


@dataclass
class Found:
    """What a look at some files has shown: their headers and what lies beside them, not yet their tokens."""

    format: str
    title: str
    """Whose files they are, for people."""
    files: list[TokenFile] = field(default_factory=list)
    vocabulary: Vocabulary = Vocabulary()
    faults: list[str] = field(default_factory=list)
    """One sentence each: the file, what was found, how to mend it."""
    notes: list[str] = field(default_factory=list)


class Format(Protocol):
    """What a module in this folder offers."""

    NAME: str
    HAS_NO_HASH: str
    """A sentence on what no check of such files can find."""

    def claims(self, files: Sequence[Path]) -> bool:
        """Return whether some of `files` are of this format, sound or not."""

    def look(self, files: Sequence[Path]) -> Found:
        """Return what those of `files` are that are of this format."""

    def closer_look(self, file: TokenFile) -> list[str]:
        """Return the faults that only the tokens of a file show, ids beyond the vocabulary left to others."""


def load_format(name: str) -> Format:
    """Return the format `name`, one of `FORMATS`."""
    return cast(Format, import_module(f"{__name__}.{name}"))


def shown(path: Path | str) -> str:
    """Return a path fit for a line of text: control codes and line breaks as escapes."""
    return printable(str(path)).replace("\n", "\\n")


def recognise(files: Sequence[Path]) -> list[Format]:
    """Return the formats that some of `files` are of."""
    return [found for name in FORMATS if (found := load_format(name)).claims(files)]


def gather(inputs: Sequence[str]) -> list[Path]:
    """Return the files that inputs name: files themselves, folders' own files, and what globs match, each once."""
    paths: dict[Path, None] = {}
    for given in inputs:
        path = Path(given).expanduser()
        matches = [path] if os.path.lexists(path) else [Path(m) for m in sorted(glob.glob(str(path)))]
        if not matches:
            raise UserError(
                f"--input {shown(given)}: there is no such file or folder; see that it is spelled right."
            )
        for match in matches:
            if not match.is_dir():
                head_of(match, 0)  # says why, where it cannot be read
            paths.update(dict.fromkeys(plain_files(match) if match.is_dir() else [match]))
    return list(paths)


def plain_files(folder: Path) -> list[Path]:
    """Return the files in a folder, not those below it, by name; neither hidden ones nor folders, pipes and devices.

    A link that leads nowhere is among them: it may stand for a file that is missed.
    """
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise cannot_read(folder, error) from error
    return [
        path
        for path in entries
        if not path.name.startswith(".")
        and (is_plain(path) or (path.is_symlink() and not _leads_somewhere(path)))
    ]


def _leads_somewhere(path: Path) -> bool:
    try:
        path.stat()
    except OSError:
        return False
    return True


def is_plain(path: Path) -> bool:
    """Return whether there is a plain file: opening a pipe would wait for ever."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False


def cannot_read(path: Path, error: OSError) -> UserError:
    """Return the error of what could not be read."""
    return UserError(
        f"{shown(path)}: cannot be read ({error.strerror or error}); see that it is there and that you may read it."
    )


def head_of(path: Path, n_bytes: int) -> bytes:
    """Return the first bytes of a file, fewer if it is shorter; UserError if it cannot be read."""
    try:
        if not is_plain(path):
            path.stat()  # says why, where it cannot even be looked at
            raise UserError(f"{shown(path)}: no plain file; name a file or a folder.")
        with open(path, "rb") as file:
            return file.read(n_bytes)
    except OSError as error:
        raise cannot_read(path, error) from error


def size_of(path: Path) -> int:
    """Return a file's size in bytes; UserError if it cannot be looked at."""
    try:
        return path.stat().st_size
    except OSError as error:
        raise cannot_read(path, error) from error


def part_of(path: Path) -> Part | None:
    """Return what the name of a file says it is for, `fineweb_val_000000.bin` say; else that of its folder.

    The last such word in a file's name counts; a folder has to be called by one alone.
    """
    words = re.findall(r"[a-z]+", path.stem.lower())
    said = [_PART_WORDS[word] for word in words if word in _PART_WORDS]
    return said[-1] if said else _PART_WORDS.get(path.absolute().parent.name.lower())


def tokens_of(file: TokenFile) -> npt.NDArray[Any]:
    """Return all tokens of a file, mapped from disk."""
    if not file.n_tokens:
        return np.empty(0, dtype=file.dtype)
    return np.asarray(
        np.memmap(file.path, dtype=file.dtype, mode="r", offset=file.offset, shape=(file.n_tokens,))
    )


def chunks_of(file: TokenFile, first: int = 0, last: int | None = None) -> Iterator[npt.NDArray[Any]]:
    """Yield the tokens from `first` to before `last`, some millions at a time.

    They are read and not mapped: a file that is cut meanwhile is then a `UserError` and not the end of the process.
    """
    left = (file.n_tokens if last is None else last) - first
    size = file.dtype.itemsize
    with opened(file.path) as handle:
        handle.seek(file.offset + first * size)
        while left:
            data = _read(handle, file.path, min(left, CHUNK_TOKENS) * size)
            left -= len(data) // size
            yield np.frombuffer(data, dtype=file.dtype)


def opened(path: Path) -> IO[bytes]:
    """Return a file open for reading; UserError if it cannot be opened."""
    try:
        return open(path, "rb")
    except OSError as error:
        raise cannot_read(path, error) from error


def _read(handle: IO[bytes], path: Path, n_bytes: int) -> bytes:
    try:
        data = handle.read(n_bytes)
    except OSError as error:
        raise cannot_read(path, error) from error
    if len(data) < n_bytes:
        raise UserError(f"{shown(path)}: became shorter while it was read; leave it alone and start again.")
    return data


def documents_between(file: TokenFile, first: int, last: int) -> int | None:
    """Return how many documents begin in the tokens from `first` to before `last`; None where no index says it.

    Documents without a token are not counted.
    """
    if file.ends is None:
        return None
    # A document begins where the one before it ends. The last end is where none begins any more.
    low = int(np.searchsorted(file.ends, first, side="left"))
    high = int(np.searchsorted(file.ends, last, side="left"))
    n_distinct = _n_distinct(file.ends[low:high])
    begins_at_0 = first == 0 < last
    ends_at_0 = bool(begins_at_0 and len(file.ends) and file.ends[0] == 0)
    return n_distinct + int(begins_at_0) - int(ends_at_0)


def _n_distinct(ordered: npt.NDArray[np.uint64]) -> int:
    step, n = 1 << 20, 0
    for start in range(0, len(ordered), step):
        piece = np.asarray(ordered[max(0, start - 1) : start + step])
        n += int(np.count_nonzero(piece[1:] != piece[:-1])) + (start == 0)
    return n
