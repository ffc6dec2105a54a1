"""Your own text: files or folders of .txt and .md, or `-` for standard input.

Each file is one document; exact copies count once. Folders are searched through, names that begin with a
dot left out, in sorted order; a file named outright may have any ending. About one document in twenty is
held out, chosen by the hash of its content, so the choice depends on neither names nor order; with several
documents each split gets at least one. A single document is cut: its last tenth is held out, from the start
of a line where there is one nearby.

The default tokenizer is `byte`: it needs no vocabulary and takes any script.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from nanorun.data.sources import Document, Split
from nanorun.errors import UserError

NAME = "text"
SUMMARY = "your own .txt and .md files (--input FILE or FOLDER, - for standard input)"
EMBEDDED = False
DEFAULT_TOKENIZER = "byte"

SUFFIXES = (".txt", ".md")
HELD_OUT_EVERY = 20
STDIN = "-"


def documents(split: Split, inputs: Sequence[str] = ()) -> Iterator[Document]:
    """Yield the documents of `split` in the order of the inputs."""
    everything = _read_all(inputs)
    if len(everything) == 1:
        yield from _part_of_single(split, next(iter(everything.values())))
        return
    held_out = _held_out(list(everything))
    for digest, document in everything.items():
        if (digest in held_out) == (split == "val"):
            yield document


def source_sha256(inputs: Sequence[str] = ()) -> str:
    """Return the hash of the documents' hashes, in their order."""
    return hashlib.sha256("\n".join(_read_all(inputs)).encode()).hexdigest()


def _held_out(digests: list[str]) -> set[str]:
    """Return the digests that belong to validation: some, but never all of two or more."""
    chosen = {digest for digest in digests if int(digest[:16], 16) % HELD_OUT_EVERY == 0}
    if not chosen:
        return {min(digests)}
    if len(chosen) == len(digests):
        chosen.remove(max(digests))
    return chosen


def _part_of_single(split: Split, document: Document) -> Iterator[Document]:
    """Yield the first nine tenths or the last tenth of the only document; nothing if that part is empty."""
    text = document.text
    cut = int(0.9 * len(text))
    line_start = text.rfind("\n", cut - len(text) // 20, cut) + 1
    cut = line_start or cut
    part = text[:cut] if split == "train" else text[cut:]
    if part:
        yield Document(f"{document.name} ({split})", part)


def _read_all(inputs: Sequence[str]) -> dict[str, Document]:
    """Return all documents by the sha256 of their content, in the order in which they were first met."""
    if not inputs:
        raise UserError(
            "Corpus 'text' needs your files: nanorun prepare-data text --input PATH (- for standard input)"
        )
    found: dict[str, Document] = {}
    for given in inputs:
        for name, content in _contents(given):
            document = Document(name, _decode(name, content))
            found.setdefault(hashlib.sha256(content).hexdigest(), document)
    return found


def _contents(given: str) -> Iterator[tuple[str, bytes]]:
    """Yield name and bytes of each document under one `--input`, empty ones left out; all empty: an error."""
    if given == STDIN:
        files = [(given, _stdin())]
    else:
        path = Path(given).expanduser()
        if not path.exists():
            raise UserError(f"--input {given}: there is no such file or folder.")
        paths = _texts_under(path) if path.is_dir() else [path]
        files = [(str(path), _read(path)) for path in paths]
    filled = [(name, content) for name, content in files if content.strip()]
    if not filled:
        shown = "standard input" if given == STDIN else given
        raise UserError(f"--input {shown}: empty; expected some text.")
    yield from filled


def _texts_under(folder: Path) -> list[Path]:
    """Return the .txt and .md files under `folder`, sorted by their path within it."""
    found = [
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not found:
        raise UserError(
            f"--input {folder}: no .txt or .md file in this folder; name files outright if they end "
            "otherwise."
        )
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"--input {path}: cannot be read ({error.strerror}).") from error


@lru_cache(maxsize=1)
def _stdin() -> bytes:
    """Return standard input, which can be read only once but is asked for by each split."""
    return sys.stdin.buffer.read()


def _decode(name: str, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        shown = "standard input" if name == STDIN else name
        raise UserError(
            f"--input {shown}: not UTF-8 at byte {error.start} (0x{content[error.start]:02x}); "
            f"convert it first, for example: iconv -f LATIN1 -t UTF-8 FILE"
        ) from error
