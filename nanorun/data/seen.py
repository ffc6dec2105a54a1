"""Which documents have been met before, at eight bytes each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.uint64]

LONGEST_RUN = 1 << 24
"""Keys of a sorted run; a full one, 128 MiB, is kept on disk."""


class Seen:
    """A set of 64-bit keys in sorted runs, the longest of them in files under `scratch`.

    The keys are the first 64 bits of a sha256. Of n documents about n² / 2^65 are taken for copies by mistake: of
    15 million, the number in FineWeb's sample of 10 billion tokens, one with a chance of 6 in a million.
    """

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._runs: list[Keys] = []
        self._files: list[Path] = []

    def add(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """Add `keys`, and return which of them are there for the first time."""
        new = np.zeros(len(keys), dtype=np.bool_)
        new[np.unique(keys, return_index=True)[1]] = True
        for run in self._runs:
            places = np.searchsorted(run, keys)
            new &= run[np.minimum(places, len(run) - 1)] != keys
        if new.any():
            self._runs.append(np.sort(keys[new]))
            self._merge()
        return new

    def _merge(self) -> None:
        """Join runs of like length, so that there are few of them."""
        while len(self._runs) > 1 and len(self._runs[-2]) <= 2 * len(self._runs[-1]):
            if len(self._runs[-2]) >= LONGEST_RUN:
                break
            # A stable sort finds the two runs and merges them.
            merged = np.sort(np.concatenate([self._runs.pop(), self._runs.pop()]), kind="stable")
            self._runs.append(self._on_disk(merged) if len(merged) >= LONGEST_RUN else merged)

    def _on_disk(self, run: Keys) -> Keys:
        path = self._scratch / f"seen_{len(self._files):06d}.npy"
        np.save(path, run)
        self._files.append(path)
        return np.asarray(np.load(path, mmap_mode="r"))

    def close(self) -> None:
        """Delete the files."""
        self._runs.clear()
        for path in self._files:
            path.unlink(missing_ok=True)
