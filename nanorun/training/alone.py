"""One run in a folder at a time: the second is refused with the first one's name."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from nanorun.errors import UserError
from nanorun.files import locked
from nanorun.training.distributed import Ranks

PATIENCE_SECONDS = 3.0
"""How long a run that was killed a moment ago may take to let go of its folder."""


@contextmanager
def alone(folder: Path, ranks: Ranks, *, sleep: Callable[[float], None] = time.sleep) -> Iterator[None]:
    """Hold a run's folder, by the rank that leads, while what is inside runs; UserError on every rank if it is held.

    The lock goes with the process that has it, so neither a kill nor a restart by torchrun leaves one behind.
    """
    with ExitStack() as stack:
        refusal = ""
        if ranks.leads:
            try:
                stack.enter_context(_held(folder, sleep))
            except UserError as error:
                refusal = str(error)
        # The others must not wait in a collective for a rank that was refused.
        if refusal := ranks.broadcast_text(refusal):
            raise UserError(refusal)
        yield


@contextmanager
def _held(folder: Path, sleep: Callable[[float], None]) -> Iterator[None]:
    holders: list[str] = []
    waited = 0.0

    def nap(seconds: float) -> None:
        nonlocal waited
        if waited >= PATIENCE_SECONDS:
            raise UserError(
                f"{folder}: another run is in this folder, {holders[0]}: wait for it or stop it, or start a run of "
                "its own"
            )
        sleep(seconds)
        waited += seconds

    try:
        with locked(folder, on_wait=holders.append, sleep=nap):
            yield
    finally:
        with suppress(OSError):  # of a run that came to nothing, and left nothing
            folder.rmdir()
