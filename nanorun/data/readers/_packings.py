"""What gzip and zstd files hold, in blocks, every check of theirs made."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from nanorun.errors import UserError

BLOCK_BYTES = 1 << 18
"""Read at a time: more is no faster, and memory for it is slower to get."""
UNPACKED_BLOCK_BYTES = 4 << 20
"""At most so much is unpacked at a time, however well it was packed."""
ZSTD_BLOCK_BYTES = 1 << 17
"""Of zstd just its own block: when a file breaks off, no whole one before that is lost."""

FETCH_AGAIN = "fetch or make it again"


class Broken(Exception):
    """A file that cannot be read on: what was found, and what to do."""

    def __init__(self, found: str, mend: str) -> None:
        super().__init__(found)
        self.found, self.mend = found, mend


def unpacked(raw: BinaryIO, packing: str, name: str) -> Iterator[bytes]:
    """Yield what `raw` holds, unpacked; `Broken` if it is damaged or ends in the middle."""
    if packing == "gz":
        return _gunzip(raw)
    if packing == "zst":
        return _unzstd(raw, name)
    return iter(lambda: raw.read(BLOCK_BYTES), b"")


def import_pyarrow(name: str, what: str) -> Any:
    """Return pyarrow; `UserError` that says how to get it for `what`, the kind of file that `name` is."""
    try:
        import pyarrow
    except ImportError as error:
        raise UserError(f"{name}: reading {what} takes pyarrow: pip install 'nanorun[data]'") from error
    return pyarrow


def _gunzip(raw: BinaryIO) -> Iterator[bytes]:
    """Yield the content of all members; zlib checks the length and the CRC-32 of each."""
    member = None
    first = True
    while packed := raw.read(BLOCK_BYTES):
        while packed:
            if member is None:
                # members may be followed by zeros, which pad them to a device's blocks
                packed = packed if first else packed.lstrip(b"\0")
                if not packed:
                    break
                member, first = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16), False
            try:
                block = member.decompress(packed, UNPACKED_BLOCK_BYTES)
            except zlib.error as error:
                raise Broken(f"broken gzip ({_reason(error)})", FETCH_AGAIN) from error
            if block:
                yield block
            packed = member.unused_data if member.eof else member.unconsumed_tail
            if member.eof:
                member = None
    if member is not None:
        raise Broken("gzip that ends in the middle", FETCH_AGAIN)


def _unzstd(raw: BinaryIO, name: str) -> Iterator[bytes]:
    """Yield the content of all frames; the library checks the checksums of those that have one."""
    pyarrow = import_pyarrow(name, "zstd")
    with pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd") as stream:
        while True:
            try:
                block = stream.read(ZSTD_BLOCK_BYTES)
            except (OSError, pyarrow.ArrowException) as error:
                raise _broken_zstd(str(error)) from error
            if not block:
                return
            yield block


def _broken_zstd(reason: str) -> Broken:
    if "Truncated" in reason:
        return Broken("zstd that ends in the middle", FETCH_AGAIN)
    if "too much memory" in reason:
        return Broken(
            "zstd packed with a window of more than 128 MB", "unpack it first: zstd -d --long=31 FILE"
        )
    return Broken(f"broken zstd ({reason.rpartition(': ')[2]})", FETCH_AGAIN)


def _reason(error: zlib.error) -> str:
    """Return `incorrect data check` of `Error -3 while decompressing data: incorrect data check`."""
    return str(error).rpartition(": ")[2]
