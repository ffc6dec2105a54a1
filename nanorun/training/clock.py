"""The clock of a run: everything counts unless it happens inside `paused(reason)`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


def now(device: torch.device) -> float:
    """Return the seconds of a clock when the device is done with what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class TrainingClock:
    """Seconds since its creation, split into what counts and what each pause took.

    `now` gives seconds and `synchronise` waits for the device, at both edges of every pause, so that work
    queued on a GPU is charged to the part that asked for it.
    """

    def __init__(
        self,
        now: Callable[[], float] = time.perf_counter,
        synchronise: Callable[[], None] = lambda: None,
    ) -> None:
        self._now = now
        self._synchronise = synchronise
        self._mark = now()
        self._reasons = ["train"]
        self._seconds: dict[str, float] = {"train": 0.0}

    @contextmanager
    def paused(self, reason: str) -> Iterator[None]:
        """Charge what happens inside to `reason`; a pause inside a pause is charged to the inner one."""
        self._charge()
        self._reasons.append(reason)
        try:
            yield
        finally:
            self._charge()
            self._reasons.pop()

    @property
    def reason(self) -> str:
        """What seconds are charged to now: `train`, or the reason of the innermost pause."""
        return self._reasons[-1]

    def train_seconds(self) -> float:
        """Return the counted seconds so far, the device synchronised first."""
        self._charge()
        return self._seconds["train"]

    def seconds(self) -> dict[str, float]:
        """Return `<reason>_seconds` for each reason, `train_seconds` among them, and `total_seconds`."""
        self._charge()
        named = {f"{reason}_seconds": value for reason, value in self._seconds.items()}
        return {**named, "total_seconds": sum(self._seconds.values())}

    def agree(self, slowest: Callable[[float], float]) -> float:
        """Set the counted seconds to what `slowest` makes of them, the largest over all ranks; return it."""
        self._seconds["train"] = slowest(self.train_seconds())
        return self._seconds["train"]

    def set(self, reason: str, seconds: float) -> None:
        """Set a reason's total to what was counted elsewhere."""
        self._seconds[reason] = seconds

    def state_dict(self) -> dict[str, float]:
        """Return the seconds of each reason, for a checkpoint."""
        self._charge()
        return dict(self._seconds)

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from the seconds of an earlier part of the same run, what this part spent so far added."""
        self._charge()
        for reason, seconds in state.items():
            own = self._seconds.get(reason, 0.0) if reason != "train" else 0.0
            self._seconds[reason] = seconds + own

    def _charge(self) -> None:
        self._synchronise()
        now = self._now()
        reason = self._reasons[-1]
        self._seconds[reason] = self._seconds.get(reason, 0.0) + now - self._mark
        self._mark = now
