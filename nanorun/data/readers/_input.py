"""One file while documents are read from it."""

from __future__ import annotations

import codecs
import io
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import BinaryIO, cast

from nanorun.data.readers._listing import TextFile
from nanorun.data.readers._packings import Broken, unpacked
from nanorun.data.sources import Reading
from nanorun.errors import UserError

FOREIGN = (
    (b"\x1f\x8b", "gzip", "gz"),
    (b"\x28\xb5\x2f\xfd", "zstd", "zst"),
    (b"PAR1\x15", "parquet", "parquet"),
    (b"BZh91AY&SY", "bzip2", ""),
    (b"\xfd7zXZ\0", "xz", ""),
    (b"PK\x03\x04", "a zip archive, or an office document", ""),
    (b"%PDF-", "a PDF", ""),
    (b"\x89PNG", "a PNG image", ""),
    (b"\xff\xd8\xff", "a JPEG image", ""),
    (b"SQLite format 3\0", "an SQLite database", ""),
)
"""How files begin that are no text, what they are, and what `--format` calls them where they can be read."""
BOM = "\ufeff"
BOM_BYTES = BOM.encode()
MOST_LINE_BYTES = 256_000_000
"""A longer line would not fit the memory that reading may take."""
DEFAULT_COLUMN = "text"


class FileInput:
    """One file's bytes, lines and text, unpacked; how far it is; whether it has changed since it was listed.

    A byte order mark at its start is no text and is left out.
    """

    def __init__(self, file: TextFile, reading: Reading) -> None:
        self.name = file.name
        self.kind = file.kind
        self.size = file.size
        self.reading = reading
        self._file = file
        self._before = reading.bytes_done

    def advance(self, n_bytes: float) -> None:
        """Say that the first `n_bytes` of the file as it lies on disk are done."""
        done = self._before + min(int(n_bytes), self.size)
        self.reading.bytes_done = max(self.reading.bytes_done, done)

    def finish(self) -> None:
        """Say that the file is done, read to its end or not."""
        self.reading.bytes_done = self._before + self.size

    @contextmanager
    def opened(self) -> Iterator[io.FileIO]:
        """Open the file; `Broken` if it cannot be, `UserError` if it has changed, or does before it is closed."""
        assert self._file.path, "standard input is put into a file first"
        try:
            raw = io.FileIO(self._file.path, "r")
        except FileNotFoundError as error:
            raise UserError(
                f"{self.name}: was there when the inputs were listed, and is gone; start again."
            ) from error
        except OSError as error:
            raise Broken(f"cannot be read ({error.strerror})", "make it readable") from error
        with raw:
            self._refuse_changed(raw)
            try:
                yield raw
            except Broken:
                self._refuse_changed(raw)
                raise
            self._refuse_changed(raw)

    def blocks(self, share: float = 1.0) -> Iterator[bytes]:
        """Yield the content, unpacked; reading all of it counts as `share` of the file."""
        with self.opened() as raw:
            watched = _Watched(raw, self.name, self.size, lambda n_bytes: self.advance(share * n_bytes))
            blocks = unpacked(cast(BinaryIO, watched), self.kind.packing, self.name)
            if first := next(blocks, b""):
                self._refuse_foreign(first)
                yield first
            yield from blocks

    def _refuse_foreign(self, first: bytes) -> None:
        """Raise `Broken` if the content begins as a file that is no text does."""
        for beginning, what, format in FOREIGN:
            if first.startswith(beginning):
                said = format if format == "parquet" else f"{self.kind.format}.{format}"
                mend = (
                    f"say --format {said}"
                    if format and not self.kind.packing
                    else "take the text out of it first"
                )
                raise Broken(f"{what}, not text", mend)

    def lines(self) -> Iterator[list[bytes]]:
        """Yield the lines, many at a time, without their line feeds."""
        pieces: list[bytes] = []
        n_bytes = 0
        mark = BOM_BYTES
        for block in self.blocks():
            lines = block.split(b"\n")
            pieces.append(lines[0])
            n_bytes += len(lines[0])
            if n_bytes > MOST_LINE_BYTES:
                raise Broken(
                    f"a line of more than {MOST_LINE_BYTES // 1_000_000} MB",
                    "expected one row, or object, a line",
                )
            if len(lines) == 1:
                continue
            lines[0] = b"".join(pieces).removeprefix(mark)
            mark = b""
            pieces = [lines.pop()]
            n_bytes = len(pieces[0])
            yield lines
        if n_bytes:
            yield [b"".join(pieces).removeprefix(mark)]

    def texts(self, share: float = 1.0) -> Iterator[str]:
        """Yield the content as text in blocks; `Broken` where it is not UTF-8."""
        mark = BOM
        for text in decoded(self.blocks(share), self.place_of):
            yield text.removeprefix(mark)
            mark = ""

    def place_of(self, byte: int) -> str:
        """Return how a message names a place in the file."""
        return f"byte {byte} of its unpacked text" if self.kind.packing else f"byte {byte}"

    def _refuse_changed(self, raw: io.FileIO) -> None:
        status = os.fstat(raw.fileno())
        if (status.st_size, status.st_mtime_ns) != (self.size, self._file.mtime_ns):
            was = (
                f"had {self.size:,} bytes, has {status.st_size:,}"
                if status.st_size != self.size
                else "same size"
            )
            raise UserError(
                f"{self.name}: was changed while it was read ({was}); start again when nothing writes to it."
            )


class _Watched(io.RawIOBase):
    """A file that tells how far it was read, and whose errors are the user's to mend."""

    def __init__(self, raw: io.FileIO, name: str, size: int, advance: Callable[[int], None]) -> None:
        self._raw, self._name, self._size, self._advance = raw, name, size, advance
        self._n_bytes = 0

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1, /) -> bytes:
        # no more memory than there is to read: most files are small
        n_left = max(1, self._size - self._n_bytes)
        try:
            block = self._raw.read(n_left if size is None or size < 0 else min(size, n_left))
        except OSError as error:
            raise UserError(
                f"{self._name}: cannot be read on after byte {self._n_bytes} ({error.strerror}); is its disk whole, "
                "and reachable?"
            ) from error
        self._n_bytes += len(block)
        self._advance(self._n_bytes)
        return block


def decoded(blocks: Iterable[bytes], place_of: Callable[[int], str]) -> Iterator[str]:
    """Yield the text of `blocks`; `Broken` names the first byte that is not UTF-8."""
    rest, place = b"", 0
    for block in blocks:
        content = rest + block if rest else block
        text, n_used = _decode(content, place, place_of, final=False)
        rest = content[n_used:]
        place += n_used
        if text:
            yield text
    _decode(rest, place, place_of, final=True)


def not_utf8(error: UnicodeDecodeError, where: str, *, at_start: bool = False) -> tuple[str, str]:
    """Return what was found and how to mend it, for bytes that are not UTF-8."""
    byte = error.object[error.start]
    if b"\0" in error.object[: error.start + 1000] and not (at_start and byte in (0xFE, 0xFF)):
        return (
            f"not UTF-8 at {where} (0x{byte:02x}), and with zero bytes",
            "it looks like no text at all: leave it out",
        )
    encoding = "UTF-16" if at_start and byte in (0xFE, 0xFF) else "LATIN1"
    return (
        f"not UTF-8 at {where} (0x{byte:02x})",
        f"convert it first, for example: iconv -f {encoding} -t UTF-8 FILE",
    )


def lone_surrogate(text: str) -> str:
    """Return the first half of a surrogate pair that stands alone in `text`, or an empty string."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return text[error.start]
    return ""


def _decode(content: bytes, place: int, place_of: Callable[[int], str], *, final: bool) -> tuple[str, int]:
    try:
        return codecs.utf_8_decode(content, "strict", final)
    except UnicodeDecodeError as error:
        at = place + error.start
        raise Broken(*not_utf8(error, place_of(at), at_start=at == 0)) from error
