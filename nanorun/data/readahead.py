"""Asking the system for parts of a mapped file before they are read.

A page that is not in memory is fetched when it is touched, one after another, each with as much of what lies around
it as the disk's settings say (some machines' say 8 MB). Rows lie all over a corpus: asked for beforehand they come
all at once, and nothing else with them. On a disk of this kind 64 rows took 1 ms instead of 380.
"""

from __future__ import annotations

import mmap
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt


class MappedArray(NamedTuple):
    """An array that is a view of a mapped file."""

    mapping: mmap.mmap
    start: int
    """Bytes in the mapping before the array."""

    def ask_for(self, first_byte: int, n_bytes: int) -> None:
        """Have the system begin to fetch that part of the array; nothing happens where it cannot."""
        begin = self.start + first_byte
        page = begin - begin % mmap.PAGESIZE
        with suppress(OSError, ValueError):
            self.mapping.madvise(mmap.MADV_WILLNEED, page, begin + n_bytes - page)


def mapped_array(array: npt.NDArray[Any]) -> MappedArray | None:
    """Return what `array` is mapped from; None where it lies in memory, or the system takes no such requests."""
    owner: Any = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if not isinstance(owner, mmap.mmap) or not hasattr(mmap, "MADV_WILLNEED"):
        return None
    beginning = np.frombuffer(owner, dtype=np.uint8)
    return MappedArray(owner, array.ctypes.data - beginning.ctypes.data)
