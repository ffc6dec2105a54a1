"""The formats that documents are read from: one module per format, found by its file name.

A format is a module here with the names of `Reader`; adding one touches no other file. Any of them that says
so may be packed as .gz or .zst on top. A file's ending tells its format, or `reading.format` does.

Empty documents, of white space alone, are passed over and counted. What cannot be read is refused by file
and line, or left out and listed under `skip_bad`: one line or row, or, where a file cannot be read on, the
rest of that file. A file that changes while it is read is refused always: nobody could say what was read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from nanorun.data.readers._input import FileInput
from nanorun.data.readers._kinds import Kind, Reader, kind_of, kind_said, load_reader, reader_names
from nanorun.data.readers._listing import STDIN, TextFile, find_files
from nanorun.data.readers._packings import Broken
from nanorun.data.sources import Document, Reading
from nanorun.errors import UserError, shown

__all__ = [
    "STDIN",
    "Kind",
    "Reader",
    "TextFile",
    "documents_in",
    "documents_of",
    "find_files",
    "kind_of",
    "kind_said",
    "load_reader",
    "reader_names",
]


def documents_of(path: Path, reading: Reading, name: str) -> Iterator[Document]:
    """Yield the documents of the file at `path`, called `name` in messages; its ending tells the format.

    `reading.bytes_done` grows by the size of the file.
    """
    kind = kind_said(reading.format, name) if reading.format is not None else kind_of(name, outright=True)
    assert kind, "outright has a kind always"
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"{shown(name)}: cannot be read ({error.strerror}).") from error
    return documents_in(TextFile(path, shown(name), kind, status.st_size, status.st_mtime_ns), reading)


def documents_in(file: TextFile, reading: Reading) -> Iterator[Document]:
    """Yield the documents of a file that was listed. Long texts are to be read before the next is asked for."""
    content = FileInput(file, reading)
    try:
        yield from load_reader(file.kind.format).documents(content)
    except Broken as error:
        reading.bad(file.name, error.found, error.mend)
    content.finish()
