"""Comma- or tab-separated rows under a row of names, the text in one of the columns.

Quoting is that of RFC 4180: a field in double quotes may hold line breaks, and a quote as two.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator

from nanorun.data.pieces import LONG_CHARS
from nanorun.data.readers._columns import missing
from nanorun.data.readers._input import DEFAULT_COLUMN, FileInput, lone_surrogate
from nanorun.data.readers._packings import Broken
from nanorun.data.sources import Document

SUMMARY = "rows under a row of names, the text in --column"
SUFFIXES: tuple[str, ...] = (".csv", ".tsv")
NAMED_SUFFIXES: tuple[str, ...] = ()
PACKABLE = True
EXPANDS = 1.0
OPTION = "column"

MOST_FIELD_CHARS = 1 << 27
"""The csv module takes four bytes for each character of a field."""


def documents(file: FileInput) -> Iterator[Document]:
    """Yield the text of each row that has some."""
    reading, name = file.reading, file.name
    rows = _Rows(file)
    header = rows.header()
    if header is None:
        reading.empty += 1
        return
    column = reading.column or DEFAULT_COLUMN
    if column not in header:
        raise Broken(*(_other_separator(header) or missing("column", column, header)))
    place, width = header.index(column), len(header)
    while (row := rows.next()) is not None:
        if len(row) != width:
            if row:
                found = f"{len(row)} fields, expected {width} as in the first row"
                reading.bad(
                    f"{name} line {rows.line}", found, "put quotes around fields that hold a separator"
                )
            continue
        text = row[place]
        if not text or text.isspace():
            reading.empty += 1
        elif not text.isascii() and (byte := lone_surrogate(text)):
            found = f"not UTF-8 (0x{ord(byte) - 0xDC00:02x})"
            mend = "convert it first, for example: iconv -f LATIN1 -t UTF-8 FILE"
            reading.bad(f"{name} line {rows.line}", found, mend)
        else:
            yield Document(f"{name} line {rows.line}", text)


def _other_separator(header: list[str]) -> tuple[str, str] | None:
    """Return what is wrong with a row of names that another sign holds apart, and the mend; None if none does."""
    for sign, said in ((";", "';'"), ("\t", "tabs"), ("|", "'|'"), (",", "','")):
        if len(header) == 1 and sign in header[0]:
            mend = "say --format tsv" if sign == "\t" else "say --format csv"
            if sign in ";|":
                mend = "write it again with ',' or tabs between them"
            return f"its columns are separated by {said}", mend
    return None


class _Rows:
    """The rows of a file, and the line on which the last one began. Those that break the rules are bad."""

    def __init__(self, file: FileInput) -> None:
        self.line = 0
        self._file = file
        self._lines = _strings(file)
        self._delimiter = "\t" if file.kind.suffix == ".tsv" else ","
        self._n_before = 0
        self._begin()

    def header(self) -> list[str] | None:
        """Return the first row that is not blank, or None."""
        while True:
            try:
                row = self._read()
            except StopIteration:
                return None
            except csv.Error as error:
                raise Broken(
                    f"its first row cannot be read ({error})", "expected the columns' names"
                ) from error
            if row:
                return row

    def next(self) -> list[str] | None:
        """Return the next row, blank ones as empty lists, or None at the end."""
        while True:
            self.line = self._n_before + self._reader.line_num + 1
            try:
                row = self._read()
            except StopIteration:
                return None
            except csv.Error as error:
                found, mend = _why(error)
                self._file.reading.bad(f"{self._file.name} line {self.line}", found, mend)
                continue
            if sum(map(len, row)) > LONG_CHARS:
                # the module's buffer stays as large as the largest field: begin with another
                self._n_before += self._reader.line_num
                self._begin()
            return row

    def _read(self) -> list[str]:
        # The limit is the whole process': others keep theirs.
        before = csv.field_size_limit(MOST_FIELD_CHARS)
        try:
            return next(self._reader)
        finally:
            csv.field_size_limit(before)

    def _begin(self) -> None:
        self._reader = csv.reader(self._lines, delimiter=self._delimiter, strict=True)


def _strings(file: FileInput) -> Iterator[str]:
    """Yield the lines as text, line feeds included; bytes that are not UTF-8 become lone surrogates."""
    for lines in file.lines():
        lines.reverse()
        while lines:
            # popped, not held: the bytes of a huge line would lie beside its text while that is parsed
            yield lines.pop().decode("utf-8", "surrogateescape") + "\n"


def _why(error: csv.Error) -> tuple[str, str]:
    reason = str(error)
    if "unexpected end" in reason:
        return "a quote that begins a field and is not closed to the end of the file", "close it"
    if "field limit" in reason:
        return f"a field of more than {MOST_FIELD_CHARS:,} characters", "close the quote that is open there"
    if "new-line" in reason:
        return "a carriage return in the middle of a row", "put quotes around such fields"
    return (
        f"a row that cannot be read ({reason})",
        "put quotes around whole fields, and write a quote in them as two",
    )
