"""Your own text: files, folders and globs of them, or `-` for standard input.

What is read how, and in which order, say nanorun/data/readers and its `_listing`: plain text a document a
file or cut at `--separator`; JSON lines, csv and parquet a document a row, the text under `--column`.

The default tokenizer is `byte`: it needs no vocabulary and takes any script.
"""

from __future__ import annotations

from collections.abc import Iterator

from nanorun.data.readers import documents_in, find_files, load_reader
from nanorun.data.sources import Document, InputFile, Reading
from nanorun.errors import UserError, shown

NAME = "text"
SUMMARY = "your own files, plain, jsonl, csv or parquet (--input FILE, FOLDER or GLOB, - for standard input)"
EMBEDDED = False
TAKES_INPUT = True
OPTIONS: tuple[str, ...] = ("input", "format", "column", "separator", "skip-bad", "keep-duplicates")
DEFAULT_TOKENIZER = "byte"
SOURCE_SHA256 = None

HEEDED_BY = {"column": "jsonl, csv and parquet", "separator": "plain text"}


def files(reading: Reading) -> list[InputFile]:
    """Return the files that would be read, in their order. Of standard input's nothing is known before it is read."""
    _check_asked(reading)
    return [file.as_input() for file in find_files(reading)]


def documents(reading: Reading) -> Iterator[Document]:
    """Yield the documents of all files; no text in any of them is a `UserError`."""
    _check_asked(reading)
    n_documents = 0
    for file in find_files(reading, spool=True):
        for document in documents_in(file, reading):
            n_documents += 1
            yield document
    if not n_documents:
        given = ", ".join(shown(given) for given in reading.inputs[:3]) + (
            ", …" if reading.inputs[3:] else ""
        )
        left_out = f" and {reading.n_skipped} things left out as bad" if reading.n_skipped else ""
        raise UserError(
            f"--input {given}: empty ({reading.empty} empty documents{left_out}); expected some text."
        )


def _check_asked(reading: Reading) -> None:
    """Raise `UserError` for no inputs, and for an option that none of the files heeds."""
    if not reading.inputs:
        raise UserError(
            "Corpus 'text' needs your files: nanorun prepare-data text --input PATH (- for standard input)"
        )
    for option, formats in HEEDED_BY.items():
        said = getattr(reading, option)
        if said is None:
            continue
        if all(option != load_reader(file.kind.format).OPTION for file in find_files(reading)):
            raise UserError(
                f"--{option} {shown(said)}: is for {formats}, and none of the inputs is; say which they are with "
                "--format, or leave the option out."
            )
