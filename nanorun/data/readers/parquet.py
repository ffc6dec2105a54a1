"""Parquet: the text in one column, read in small batches of rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nanorun.data.readers._columns import missing
from nanorun.data.readers._input import DEFAULT_COLUMN, FileInput, not_utf8
from nanorun.data.readers._packings import BLOCK_BYTES, FETCH_AGAIN, Broken, import_pyarrow
from nanorun.data.sources import Document

SUMMARY = "parquet, the text in --column"
SUFFIXES: tuple[str, ...] = (".parquet",)
NAMED_SUFFIXES: tuple[str, ...] = (".pq",)
PACKABLE = False
EXPANDS = 2.0
OPTION = "column"

BATCH_BYTES = 1 << 20
"""Of text, by the average of the row group; one batch is in memory, once as arrow's and once as ours."""
BATCH_ROWS = 1024


def documents(file: FileInput) -> Iterator[Document]:
    """Yield the text of each row that has some."""
    reading, name = file.reading, file.name
    number = 0
    for values, share in _batches(file):
        for value in values:
            number += 1
            if not value:
                reading.empty += 1
                continue
            try:
                text = value.decode()
            except UnicodeDecodeError as error:
                reading.bad(f"{name} row {number}", *not_utf8(error, f"byte {error.start} of the text"))
                continue
            if text.isspace():
                reading.empty += 1
            else:
                yield Document(f"{name} row {number}", text)
        file.advance(share * file.size)


def _batches(file: FileInput) -> Iterator[tuple[list[bytes | None], float]]:
    """Yield the column's values, some rows at a time, and what share of all rows is done then."""
    pyarrow = import_pyarrow(file.name, "parquet")
    from pyarrow.parquet import ParquetFile

    # arrow raises these for damaged files, beside its own, which are among them for the most part
    broken = (pyarrow.ArrowException, OSError, ValueError, LookupError, MemoryError, OverflowError)
    with file.opened() as raw:
        try:
            # a small buffer, or a whole row group's column would be read at once; a page's checksum, where
            # it has one, costs next to nothing
            content = ParquetFile(
                raw, buffer_size=BLOCK_BYTES, pre_buffer=False, page_checksum_verification=True
            )
            schema = content.schema_arrow
        except broken as error:
            raise _broken(file, error) from error
        column = file.reading.column or DEFAULT_COLUMN
        if column not in schema.names:
            raise Broken(*missing("column", column, schema.names))
        held = schema.types[schema.names.index(column)]
        if not _is_text(pyarrow, held):
            raise Broken(
                f"column {column!r} holds {held}, not text", "name one that holds text with --column"
            )
        n_rows = content.metadata.num_rows
        n_done = 0
        batches = _record_batches(content, column)
        while True:
            try:
                batch = next(batches, None)
                if batch is None:
                    return
                values = _as_bytes(pyarrow, batch.column(0))
            except broken as error:
                raise _broken(file, error) from error
            n_done += len(values)
            yield values, n_done / max(1, n_rows)


def _record_batches(content: Any, column: str) -> Iterator[Any]:
    """Yield batches of the column, their rows by the average size of a row in the row group.

    Of all columns together: looking at the metadata of one aborts the process in some damaged files. Rows
    are counted, because a flipped bit in the header of a page, which no checksum covers, loses some silently.
    """
    n_total = 0
    for group in range(content.metadata.num_row_groups):
        metadata = content.metadata.row_group(group)
        n_rows = BATCH_BYTES * metadata.num_rows // max(1, metadata.total_byte_size)
        n_read = 0
        for batch in content.iter_batches(
            min(max(1, n_rows), BATCH_ROWS), row_groups=[group], columns=[column], use_threads=False
        ):
            n_read += batch.num_rows
            yield batch
        _check_rows(n_read, metadata.num_rows, f"in row group {group}")
        n_total += n_read
    _check_rows(n_total, content.metadata.num_rows, "in all")


def _check_rows(found: int, expected: int, where: str) -> None:
    if found != expected:
        raise Broken(f"broken parquet ({found} rows {where}, expected {expected})", FETCH_AGAIN)


def _is_text(pyarrow: Any, held: Any) -> bool:
    types = pyarrow.types
    if types.is_dictionary(held):
        held = held.value_type
    return any(
        is_such(held)
        for is_such in (
            types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary,
            types.is_binary_view, types.is_null,
        )
    )  # fmt: skip


def _as_bytes(pyarrow: Any, values: Any) -> list[bytes | None]:
    """Return the values of an array of any of the types that hold text."""
    if pyarrow.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    as_bytes: list[bytes | None] = values.cast(pyarrow.large_binary()).to_pylist()
    return as_bytes


def _broken(file: FileInput, error: Exception) -> Broken:
    if not file.size:
        return Broken("empty, not even parquet's frame is there", FETCH_AGAIN)
    reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
    return Broken(f"broken parquet ({reason[:200]})", FETCH_AGAIN)
