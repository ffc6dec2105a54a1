"""Watching over the ranks: who is gone or moves no more is named, and the others end instead of waiting for ever.

Once a second each rank tells through the store in which the ranks met how far its main thread has come, and reads how
far the others are. A rank that nothing is heard of, or that all others have waited for, for `hang_seconds` ends the
run on every rank that sees it: exit code 1, so that whoever started the ranks starts them again or gives up.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Protocol

import psutil

from nanorun.errors import UserError

HANG_SECONDS = 120.0
"""How long a rank may do nothing within its steps. NANORUN_HANG_SECONDS says otherwise; 0 never ends a run."""
WARM_UPS = 3
"""Times as long as its warm-up, a pass and an update, a rank may do nothing, where that is more than the above."""
PATIENCE = 10
"""Times as long it may take where a step is not what it is at: setting up, compiling, validating, saving."""
BEAT_SECONDS = 1.0
PARTING_SECONDS = 5.0
"""How long a rank that is done waits for the others to be, before it closes what they may still read from."""
GONE_SECONDS = 4.0
"""After how long without a beat a rank counts as gone once a collective has failed."""
DONE, LOST = "done", "lost"
"""How a rank ends that finished or was stopped, and one that another one's end has taken along."""


class Store(Protocol):
    """What is needed of a torch.distributed store."""

    def set(self, key: str, value: str) -> None: ...
    def multi_get(self, keys: list[str]) -> list[bytes]: ...


@dataclass(frozen=True)
class Beat:
    """What a rank tells of itself."""

    number: int
    signs: int
    """Of life, that its main thread has given."""
    marks: int
    """How many of the marks it has passed that all ranks pass: the rank with the fewest is the one waited for."""
    step: int
    phase: str
    host: str
    pid: int
    warm_up: float = 0.0
    """Seconds that the passes and the update of its warm-up took, the shortest there was."""
    ending: str = ""
    """Empty in a rank that works, else DONE, LOST or what it failed of."""


class Sightings:
    """What one rank has seen of all, by its own clock: `now` is in seconds and never runs backwards."""

    def __init__(self, beats: Sequence[Beat], hang_seconds: float, now: float) -> None:
        self.beats = list(beats)
        self.hang_seconds = hang_seconds
        self.answered = now
        """When the store answered last."""
        self._heard = [now] * len(beats)
        self._moved = [now] * len(beats)

    def see(self, beats: Sequence[Beat], now: float) -> None:
        """Take in what the store holds."""
        self.answered = now
        for rank, (before, beat) in enumerate(zip(self.beats, beats)):
            if beat.number != before.number:
                self._heard[rank] = now
            if beat.signs != before.signs:
                self._moved[rank] = now
        self.beats = list(beats)

    def forgive(self, seconds: float) -> None:
        """Leave out a time in which this process was itself stopped: it can't say what the others did."""
        self.answered += seconds
        self._heard = [then + seconds for then in self._heard]
        self._moved = [then + seconds for then in self._moved]

    def hung(self, now: float) -> tuple[str, list[int]]:
        """Return why the run has to end and the ranks to blame; an empty text while all is well."""
        limit = self.hang_seconds
        if now - self.answered >= limit:
            return self._unanswered(now), [0]
        silent = self._silent(limit)
        if silent:
            return self._told_silent(silent, now), silent
        failed = [rank for rank in self._failed() if now - self._heard[rank] >= limit]
        if failed:
            return self._told_failed(failed), failed
        working = [rank for rank, beat in enumerate(self.beats) if not beat.ending]
        fewest = min((self.beats[rank].marks for rank in working), default=0)
        slowest = [rank for rank in working if self.beats[rank].marks == fewest]
        if any(self.beats[rank].phase != "train" for rank in slowest):
            limit *= PATIENCE
        else:
            # A micro-batch of a large model on a slow device; beyond PATIENCE collectives run out of time.
            warm_up = max((self.beats[rank].warm_up for rank in slowest), default=0.0)
            limit = min(max(limit, WARM_UPS * warm_up), limit * PATIENCE)
        since = max((self._moved[rank] for rank in slowest), default=now)
        if now - since < limit:
            return "", []
        if any(rank in self._silent(GONE_SECONDS) for rank in slowest):
            return self._told_silent(slowest, now), slowest
        where = _place(self.beats[slowest[0]]) if slowest else ""
        others = "" if len(slowest) == len(working) else ", and the others wait for it"
        return (
            f"{self._have(slowest)} not moved since {where}, {now - since:.0f} s ago{others}",
            slowest,
        )

    def lost(self, now: float, gone: Sequence[int] = ()) -> str:
        """Return which ranks are gone, a collective having failed; empty while all are there.

        `gone` are those of this host that have no process any more.
        """
        if self._failed():
            return self._told_failed(self._failed())
        killed = [rank for rank in gone if not self.beats[rank].ending]
        if killed:
            return f"{self._have(killed)} been killed, last seen at {_place(self.beats[killed[0]])}"
        if now - self.answered >= GONE_SECONDS:
            return self._unanswered(now)
        silent = self._silent(GONE_SECONDS)
        return self._told_silent(silent, now) if silent else ""

    def _silent(self, limit: float) -> list[int]:
        # Counted up to the store's last answer: while that is silent, everyone seems to be.
        return [
            rank
            for rank, beat in enumerate(self.beats)
            if not beat.ending and self.answered - self._heard[rank] >= limit
        ]

    def _failed(self) -> list[int]:
        return [rank for rank, beat in enumerate(self.beats) if beat.ending not in ("", DONE, LOST)]

    def _told_silent(self, ranks: list[int], now: float) -> str:
        seconds = now - max(self._heard[rank] for rank in ranks)
        return (
            f"{self._have(ranks)} not been heard of for {seconds:.0f} s, last at {_place(self.beats[ranks[0]])}: "
            "killed, stopped, or on a host that can't be reached"
        )

    def _told_failed(self, ranks: list[int]) -> str:
        return f"{self._names(ranks)} failed: {self.beats[ranks[0]].ending}"

    def _unanswered(self, now: float) -> str:
        return (
            f"{self._names([0])}, or the launcher beside it that keeps the ranks' store, has not answered for "
            f"{now - self.answered:.0f} s: killed, stopped, or on a host that can't be reached"
        )

    def _have(self, ranks: list[int]) -> str:
        return f"{self._names(ranks)} {'has' if len(ranks) == 1 else 'have'}"

    def _names(self, ranks: list[int]) -> str:
        shown = [f"rank {rank} ({self.beats[rank].host}, pid {self.beats[rank].pid})" for rank in ranks[:8]]
        return " and ".join(shown) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def _place(beat: Beat) -> str:
    return f"step {beat.step}" if beat.phase == "train" else f"step {beat.step} ({beat.phase})"


class Watch:
    """The two threads that watch beside one rank's main thread, which says with `moved` that it moves.

    One talks to the store and may have to wait for it; the other one judges, and waits for nobody.
    """

    def __init__(self, store: Store, rank: int, n_ranks: int, hang_seconds: float) -> None:
        self.phase: Callable[[], str] = lambda: "setup"
        self._store, self._rank, self._n_ranks, self._hang_seconds = store, rank, n_ranks, hang_seconds
        self._number = self._signs = self._marks = self._step = 0
        self._warm_up = 0.0
        self._host = socket.gethostname()
        self._ending = ""
        self._over, self._lock = threading.Event(), threading.Lock()
        self._tell()

    def begin(self) -> None:
        """Watch from now on; every rank has told of itself by then."""
        self._sightings = Sightings(self._read(), self._hang_seconds, time.monotonic())
        self._teller = threading.Thread(target=self._exchange, name="watch: beats", daemon=True)
        self._judge = threading.Thread(target=self._look, name="watch: judge", daemon=True)
        self._teller.start()
        self._judge.start()

    def moved(self, step: int | None = None) -> None:
        """Note that the main thread passed a mark that every rank passes, the beginning of `step` perhaps."""
        self.works()
        self._marks += 1
        if step is not None:
            self._step = step

    def works(self) -> None:
        """Note that the main thread is at work."""
        self._signs += 1

    def warmed_up(self, seconds: float) -> None:
        """Note what a warm-up took; the first ones also make buffers and compile."""
        self._warm_up = min(self._warm_up or seconds, seconds)

    def lost(self) -> str:
        """Return which ranks are gone, a collective having failed; empty if they all still work."""
        began = now = time.monotonic()
        while now < began + GONE_SECONDS + 2 * BEAT_SECONDS:
            time.sleep(BEAT_SECONDS / 4)
            now = time.monotonic()
            with self._lock:
                # Whoever failed has had a beat's time to say so.
                gone = [] if now < began + 1.5 * BEAT_SECONDS else self._gone_from_here()
                found = self._sightings.lost(now, gone)
            if found:
                return found
        return ""

    def end(self, ending: str) -> None:
        """Stop watching and tell the others why this rank ends; if it is done, wait until they are."""
        self._over.set()
        # A thread that comes back from the store while Python goes down would abort the process.
        self._teller.join(GONE_SECONDS)
        self._judge.join(GONE_SECONDS)
        self._ending = ending
        if not self._teller.is_alive():
            with suppress(RuntimeError):  # the store is gone
                self._tell()
                last = time.monotonic() + PARTING_SECONDS
                while ending == DONE and time.monotonic() < last and not all(b.ending for b in self._read()):
                    time.sleep(0.02)

    def _gone_from_here(self) -> list[int]:
        beats = enumerate(self._sightings.beats)
        return [rank for rank, beat in beats if beat.host == self._host and not psutil.pid_exists(beat.pid)]

    def _tell(self) -> None:
        self._number += 1
        beat = Beat(
            self._number,
            self._signs,
            self._marks,
            self._step,
            self.phase(),
            self._host,
            os.getpid(),
            self._warm_up,
            self._ending[:500],
        )
        self._store.set(f"beat/{self._rank}", json.dumps(asdict(beat)))

    def _read(self) -> list[Beat]:
        beats = self._store.multi_get([f"beat/{rank}" for rank in range(self._n_ranks)])
        return [Beat(**json.loads(beat)) for beat in beats]

    def _exchange(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            with suppress(RuntimeError):  # then it has not answered, which is what counts
                self._tell()
                beats = self._read()
                with self._lock:
                    self._sightings.see(beats, time.monotonic())

    def _look(self) -> None:
        before = time.monotonic()
        while not self._over.wait(BEAT_SECONDS):
            now = time.monotonic()
            with self._lock:
                if now - before > GONE_SECONDS:
                    self._sightings.forgive(now - before)
                text, blamed = self._sightings.hung(now)
            before = now
            if text and self._hang_seconds:
                self._stop(text, blamed)

    def _stop(self, text: str, blamed: Sequence[int]) -> None:
        """End this process, the main thread of which may never come back."""
        if self._rank == min(set(range(self._n_ranks)) - set(blamed), default=0):
            how_long = "NANORUN_HANG_SECONDS says after how long"
            print(f"nanorun: failed: {text}; stopping ({how_long})", file=sys.stderr, flush=True)
        else:
            time.sleep(BEAT_SECONDS)  # one rank says it for all
        os._exit(1)


def hang_seconds() -> float:
    """Return how long a rank may do nothing, from NANORUN_HANG_SECONDS where that is set; 0 is for ever."""
    asked = os.environ.get("NANORUN_HANG_SECONDS", "")
    try:
        seconds = float(asked or HANG_SECONDS)
    except ValueError:
        seconds = -1.0
    if seconds == 0 or 2 * GONE_SECONDS <= seconds < float("inf"):
        return seconds
    raise UserError(
        f"NANORUN_HANG_SECONDS={asked!r}: wanted the seconds after which a rank that does nothing ends the run, "
        f"{2 * GONE_SECONDS:g} or more, or 0 to wait for ever"
    )
