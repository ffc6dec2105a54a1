"""Micro-batches on their way to the device, the next one prepared while the pass on this one runs."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from nanorun.data.batches import Rows
from nanorun.data.prefetch import OneAhead


class Span(NamedTuple):
    """Rows of one micro-batch, counted over the whole run."""

    first_row: int
    n_rows: int


Pair = tuple[torch.Tensor, torch.Tensor]


class Read(Protocol):
    """Returns inputs and targets of training rows, int64."""

    def __call__(self, *, first_row: int, n_rows: int) -> tuple[Rows, Rows]: ...


class _Prepared(NamedTuple):
    pair: Pair
    """Inputs and targets on the device, or on their way there."""
    copied: torch.cuda.Event | None
    """When they are there; None where nothing had to be copied."""


class Feed:
    """Gives a rank its micro-batches. What a span holds is a function of it alone, prepared ahead or not.

    A thread reads the rows of the span that was announced. On CUDA it also puts them into pinned memory and starts
    the copy, on a stream of its own: the copy runs beside the pass before it, and the next pass waits for it on the
    device, not here. One micro-batch at most waits to be taken.
    """

    def __init__(self, read: Read, device: torch.device, *, ahead: bool = True) -> None:
        """Without `ahead` no row is read before it is asked for."""
        self.read, self.device, self.ahead = read, device, ahead
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._prepared: OneAhead[Span, _Prepared] = OneAhead(self.prepare)

    def take(self, span: Span, then: Span | None = None) -> Pair:
        """Return inputs and targets of `span` on the device; `then` is the span that will be asked for next."""
        pair, copied = self._prepared.take(span, then if self.ahead else None)
        if copied is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(copied)
            for rows in pair:
                # Their memory is the copying stream's: it must not be used again before this stream is done with it.
                rows.record_stream(stream)
        return pair

    def prepare(self, span: Span) -> _Prepared:
        """Return the rows of a span, on the device or on their way there; called on the thread."""
        idx_BT, targets_BT = map(torch.from_numpy, self.read(**span._asdict()))
        if self._copies is None:
            return _Prepared((idx_BT, targets_BT), None)
        # The stream of a thread, and its device, are its own to set.
        with torch.cuda.stream(self._copies):
            idx_BT, targets_BT = (
                rows.pin_memory().to(self.device, non_blocking=True) for rows in (idx_BT, targets_BT)
            )
            return _Prepared((idx_BT, targets_BT), self._copies.record_event())

    def close(self) -> None:
        """End the thread; what it has prepared is dropped."""
        self._prepared.close()
