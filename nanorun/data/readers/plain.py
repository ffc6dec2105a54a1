"""Plain text: each file is one document, or several cut at `reading.separator`.

A separator takes the line break right before it and the one right after it along, so
`story\n<|endoftext|>\nstory` is two documents without stray line breaks. Line breaks are otherwise kept as
they are.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

from nanorun.data.pieces import LONG_CHARS, cut_stream
from nanorun.data.readers._input import BOM_BYTES, FileInput, decoded, not_utf8
from nanorun.data.readers._packings import BLOCK_BYTES, Broken
from nanorun.data.sources import Document, LongText, Reading
from nanorun.errors import UserError, shown

SUMMARY = "plain text, a document a file, or cut at --separator"
SUFFIXES: tuple[str, ...] = (".txt", ".md")
NAMED_SUFFIXES: tuple[str, ...] = ()
PACKABLE = True
EXPANDS = 1.0
OPTION = "separator"

LONG_BYTES = LONG_CHARS
FIRST_SHARE = 0.05
"""How much of a long text's file its first reading counts for: it is hashed then, and tokenized in the second."""


def documents(file: FileInput) -> Iterator[Document]:
    """Yield the document, or those between separators."""
    separator = file.reading.separator
    if separator is None:
        return _whole(file)
    if not separator:
        raise UserError(
            "--separator is empty; expected what stands between documents, such as '<|endoftext|>'."
        )
    return _separated(file, separator.encode("utf-8", "surrogateescape"))


def _whole(file: FileInput) -> Iterator[Document]:
    """Yield the file as one document, a `LongText` if it is long."""
    held: list[str] = []
    n_chars = 0
    for text in file.texts(FIRST_SHARE):
        held.append(text)
        n_chars += len(text)
        if n_chars > LONG_CHARS:
            break
    else:
        text = "".join(held)
        if _is_empty(text):
            file.reading.empty += 1
        else:
            yield Document(file.name, text)
        return
    del held, text
    if file.reading.skip_bad:
        # whoever takes a long text is to have all of it, so what is bad in it is to be known before
        for _ in file.texts(0.0):
            pass
    yield Document(file.name, LongText(_PiecesOfFile(file)))


class _PiecesOfFile:
    """The pieces of a whole file, which is opened anew each time."""

    def __init__(self, file: FileInput) -> None:
        self._file = file
        self._share = FIRST_SHARE

    def __call__(self) -> Iterator[str]:
        share, self._share = self._share, 1.0
        try:
            yield from cut_stream(self._file.texts(share))
        except Broken as error:
            # under skip_bad it was read to its end before, so it has changed since, or its disk fails
            self._file.reading.bad(self._file.name, error.found, error.mend)
            raise UserError(f"{self._file.name}: {error.found}, which it was not a moment ago.") from error


def _separated(file: FileInput, separator: bytes) -> Iterator[Document]:
    """Yield the documents between separators."""
    with closing(_Growing(file, separator)) as growing:
        for block in file.blocks():
            for content in growing.grow(block):
                file.reading.separated += 1
                document = growing.end(content)
                if document:
                    yield document
        document = growing.end_of_file()
        if document:
            yield document


class _Growing:
    """The document that is being read, and its place in the file.

    Its bytes are held until they are many, then put into a temporary file: a wrong separator must not
    take the memory that a whole file would.
    """

    def __init__(self, file: FileInput, separator: bytes) -> None:
        self._file = file
        self._separator = separator
        self._number = 1
        self._begin = 0
        self._held: list[bytes] = []
        """The document so far, but for what follows."""
        self._end = b""
        """The last of its bytes, among which a separator may have begun."""
        self._n_spilled = 0
        self._spill: _Spill | None = None

    def grow(self, block: bytes) -> list[bytes]:
        """Add `block`; return the ends of the documents that end in it, each to be passed to `end`."""
        if len(self._end) >= BLOCK_BYTES:
            n_kept = len(self._separator) + len(b"\r\n")
            self._held.append(self._end[:-n_kept])
            self._end = self._end[-n_kept:]
        *whole, self._end = (self._end + block).split(self._separator)
        if whole and self._held:
            whole[0] = b"".join([*self._held, whole[0]])
            self._held.clear()
        elif sum(map(len, self._held)) > LONG_BYTES:
            self._put_aside()
        return whole

    def _put_aside(self) -> None:
        """Put what is held into a file."""
        content = b"".join(self._held)
        self._held.clear()
        if self._spill is None:
            content = self._without_beginning(content)
            self._spill = _Spill(self._file.reading)
        self._n_spilled += len(content)
        self._spill.write(content)

    def end_of_file(self) -> Document | None:
        """Return the last document, or None."""
        return self.end(b"".join([*self._held, self._end]), last=True)

    def end(self, content: bytes, *, last: bool = False) -> Document | None:
        """Return the document that ends with `content`, or None if it is empty or bad; begin the next."""
        if self._spill is None:
            content = self._without_beginning(content)
        begin = self._begin
        self._begin += self._n_spilled + len(content) + len(self._separator)
        if not last and content.endswith(b"\n"):
            content = content[:-1].removesuffix(b"\r")
        name = f"{self._file.name} document {self._number}"
        if self._spill is None:
            document = self._short(name, content, begin, counted=not last or self._number == 1)
        else:
            document = self._long(name, self._spill, content, begin)
        self._number += 1
        self._n_spilled, self._spill = 0, None
        return document

    def close(self) -> None:
        """Remove what was begun and not ended."""
        if self._spill is not None:
            _remove(self._spill.finished())

    def _short(self, name: str, content: bytes, begin: int, *, counted: bool) -> Document | None:
        reading = self._file.reading
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            at = begin + error.start
            reading.bad(name, *not_utf8(error, self._file.place_of(at), at_start=at == 0))
            return None
        if not _is_empty(text):
            return Document(name, text)
        reading.empty += counted
        return None

    def _long(self, name: str, spill: _Spill, content: bytes, begin: int) -> Document | None:
        spill.write(content)
        pieces = _PiecesOfSpill(spill.finished())
        try:
            for _ in decoded(pieces.blocks(), lambda byte: self._file.place_of(begin + byte)):
                pass
        except Broken as error:
            self._file.reading.bad(name, error.found, error.mend)
            return None
        return Document(name, LongText(pieces))

    def _without_beginning(self, content: bytes) -> bytes:
        """Return the document's first bytes without a byte order mark or the line break after a separator."""
        if self._number == 1:
            kept = content.removeprefix(BOM_BYTES)
        else:
            kept = content[1:] if content.startswith(b"\n") else content.removeprefix(b"\r\n")
        self._begin += len(content) - len(kept)
        return kept


class _Spill:
    """A temporary file that a long document is put into."""

    def __init__(self, reading: Reading) -> None:
        self._folder = reading.scratch
        try:
            reading.scratch.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix="document-", dir=reading.scratch)
        except OSError as error:
            raise self._cannot(error) from error
        self._path = Path(name)
        self._file = open(handle, "wb", buffering=0)  # noqa: SIM115

    def write(self, content: bytes) -> None:
        try:
            while content:
                content = content[self._file.write(content) :]
        except OSError as error:
            raise self._cannot(error) from error

    def finished(self) -> Path:
        """Return the file, which is to be removed by whoever gets it."""
        self._file.close()
        return self._path

    def _cannot(self, error: OSError) -> UserError:
        return UserError(
            f"A document of more than {LONG_BYTES // 1_000_000} MB cannot be kept in {shown(self._folder)} while it "
            f"is read ({error.strerror}); make room there, or is --separator what it should be?"
        )


class _PiecesOfSpill:
    """The pieces of a document in a temporary file, which goes when nobody holds this any more."""

    def __init__(self, path: Path) -> None:
        self._path = path
        weakref.finalize(self, _remove, path)

    def blocks(self) -> Iterator[bytes]:
        """Yield what the file holds."""
        with open(self._path, "rb", buffering=0) as file:
            while block := file.read(BLOCK_BYTES):
                yield block

    def __call__(self) -> Iterator[str]:
        return cut_stream(decoded(self.blocks(), str))


def _remove(path: Path) -> None:
    with suppress(OSError):
        os.unlink(path)


def _is_empty(text: str) -> bool:
    return not text or text.isspace()
