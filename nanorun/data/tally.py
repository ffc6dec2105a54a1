"""What is counted of tokens as they go by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt


class Tally:
    """Counts tokens, ends of text and bytes of text, and keeps the largest id and where it first stood."""

    def __init__(
        self, eot: int | None = None, bytes_of: Callable[[npt.NDArray[Any]], int] | None = None
    ) -> None:
        self._eot, self._bytes_of = eot, bytes_of
        self.tokens = 0
        self.eots = 0
        self.bytes = 0
        """0 without `bytes_of`."""
        self.largest = -1
        self.largest_at = -1

    def see(self, tokens: npt.NDArray[Any]) -> int:
        """Look at the next tokens for the largest id, before anything is done with them; return the largest so far."""
        largest = int(tokens.max(initial=0)) if len(tokens) else -1
        if largest > self.largest:
            self.largest, self.largest_at = largest, self.tokens + int(tokens.argmax())
        return self.largest

    def count(self, tokens: npt.NDArray[Any]) -> None:
        """Count what `see` has seen."""
        if self._eot is not None:
            self.eots += int(np.count_nonzero(tokens == self._eot))
        if self._bytes_of is not None:
            self.bytes += self._bytes_of(tokens)
        self.tokens += len(tokens)
