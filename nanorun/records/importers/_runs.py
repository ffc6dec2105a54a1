"""Readings in the order of a file, put together to runs."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from statistics import median
from typing import NamedTuple

from nanorun.records.importers._header import Facts
from nanorun.records.importers._values import is_not_finite, loss, n_decimals, shown
from nanorun.records.logs import LoggedPoint, LoggedRun

MAX_READINGS = 200_000
"""Validations of one file that are kept; no honest log has a hundredth of them."""
MAX_OTHER_LOSSES = 16
MAX_NOTES = 20
RESTARTS_BEFORE = 32
"""Old logs set their clock back at step 10; a clock that goes back later is told of from the validations."""


class TooManyReadings(ValueError):
    """A file with more validations than a reader keeps."""


class Reading(NamedTuple):
    """One data line, its loss still as the log has it; a line without a validation has none."""

    step: int
    total_steps: int | None = None
    seconds: float | None = None
    loss: str | None = None
    other_losses: tuple[tuple[str, str], ...] = ()
    is_last_and_cut: bool = False
    """The loss ends the file, and no line end follows: it may have lost digits."""
    note: str | None = None
    """What is odd about the line."""


@dataclasses.dataclass
class _Draft:
    """A run that is still being read."""

    facts: Facts
    points: dict[int, LoggedPoint] = dataclasses.field(default_factory=dict)
    other_losses: dict[str, dict[int, float]] = dataclasses.field(default_factory=dict)
    first_validation: int | None = None
    first_train: int | None = None
    last_step: int = 0
    total_steps: int | None = None
    peak_memory_mib: float | None = None
    diverged: bool = False
    decimals: int = -1
    """Of the latest loss; fewer at the end of a file are a sign that it was cut."""
    early_seconds: tuple[int, float] = (0, 0.0)
    """The latest reading of the clock up to `RESTARTS_BEFORE`: (step, seconds)."""
    notes: dict[str, None] = dataclasses.field(default_factory=dict)
    """In order, each once."""

    def note(self, text: str) -> None:
        if len(self.notes) < MAX_NOTES:
            self.notes[text] = None
        else:
            self.notes["more was odd than is told here"] = None


class RunCollector:
    """Gathers readings, and begins a new run only where a step is at or below the current run's first.

    Validations and training steps are compared each with their own kind, because a log may print both of one
    step. Of readings repeated for one step the first stays.
    """

    def __init__(self, file: str, format: str) -> None:
        self._file, self._format = file, format
        self._drafts: list[_Draft] = []
        self._n_readings = 0
        self._before: Reading | None = None

    def add(self, reading: Reading, facts: Facts) -> None:
        """Take the next reading of the file; `facts` are what the header says of a run that begins here."""
        if reading == self._before:
            return
        self._before = reading
        draft = self._draft_of(reading, facts)
        draft.last_step = max(draft.last_step, reading.step)
        if reading.step <= RESTARTS_BEFORE and reading.seconds is not None:
            self._watch_clock(draft, reading.step, reading.seconds)
        if reading.loss is not None:
            self._add_validation(draft, reading, reading.loss)
        elif draft.total_steps is None:
            draft.total_steps = reading.total_steps

    def set_peak_memory(self, mib: float | None) -> None:
        """Note the peak memory that follows the readings so far."""
        if mib is not None and self._drafts:
            self._drafts[-1].peak_memory_mib = mib

    def forget_all(self) -> int:
        """Drop what was read, and return how many validations that were."""
        dropped = sum(len(draft.points) for draft in self._drafts)
        self._drafts.clear()
        self._before = None
        return dropped

    def note(self, text: str) -> None:
        """Say something of the run that is being read."""
        if self._drafts:
            self._drafts[-1].note(text)

    def finish(self) -> list[LoggedRun]:
        """Return the runs that hold a validation, in order of the file."""
        whole = [draft for draft in self._drafts if draft.points]
        return [self._finished(draft, index) for index, draft in enumerate(whole)]

    def _draft_of(self, reading: Reading, facts: Facts) -> _Draft:
        draft = self._drafts[-1] if self._drafts else None
        if draft is not None:
            first = draft.first_train if reading.loss is None else draft.first_validation
        if draft is None or (first is not None and reading.step <= first):
            if draft is not None and not draft.points and not draft.notes:
                self._drafts.pop()
            draft = _Draft(facts.copy())
            self._drafts.append(draft)
        if reading.loss is None:
            if draft.first_train is None:
                draft.first_train = reading.step
        elif draft.first_validation is None:
            draft.first_validation = reading.step
        return draft

    def _watch_clock(self, draft: _Draft, step: int, seconds: float) -> None:
        before_step, before = draft.early_seconds
        if step > before_step and seconds < before:
            draft.note(
                f"the clock is set back at step {step}, from {before:g} s to {seconds:g} s: "
                "the steps before it are not counted"
            )
        draft.early_seconds = (step, seconds)

    def _add_validation(self, draft: _Draft, reading: Reading, text: str) -> None:
        if draft.diverged:
            return
        if reading.note:
            draft.note(f"step {reading.step}: {reading.note}")
        value = loss(text)
        if value is None:
            if is_not_finite(text):
                draft.diverged = True
                draft.note(f"the validation loss is {text} at step {reading.step}: kept up to there")
            else:
                draft.note(f"step {reading.step}: the loss {shown(text)} is no loss; the reading is left out")
            return
        # Digits may be lost but none can be won: a loss with as many as the readings before it is whole.
        if reading.is_last_and_cut and (not draft.points or n_decimals(text) < draft.decimals):
            draft.note(f"the file ends within the loss of step {reading.step}; the reading is left out")
            return
        draft.decimals = max(draft.decimals, n_decimals(text))
        point = LoggedPoint(reading.step, reading.seconds, value)
        known = draft.points.get(reading.step)
        if known is not None:
            if known != point:
                draft.note(f"step {reading.step} is read again with other numbers; the first reading stays")
            return
        self._n_readings += 1
        if self._n_readings > MAX_READINGS:
            raise TooManyReadings(f"holds more than {MAX_READINGS:,} validation readings")
        if draft.total_steps not in (None, reading.total_steps) and draft.points:
            draft.note(
                f"the declared last step changes from {draft.total_steps} to {reading.total_steps} "
                f"at step {reading.step}"
            )
        draft.total_steps = reading.total_steps
        draft.points[reading.step] = point
        self._add_other_losses(draft, reading)

    def _add_other_losses(self, draft: _Draft, reading: Reading) -> None:
        for key, text in reading.other_losses:
            value = loss(text)
            if key not in draft.other_losses and len(draft.other_losses) >= MAX_OTHER_LOSSES:
                draft.note(f"more than {MAX_OTHER_LOSSES} other losses; the rest is left out")
            elif value is None:
                draft.note(f"step {reading.step}: {key} {shown(text)} is no loss, and is left out")
            else:
                draft.other_losses.setdefault(key, {})[reading.step] = value

    def _finished(self, draft: _Draft, index: int) -> LoggedRun:
        points = tuple(sorted(draft.points.values()))
        facts = draft.facts
        notes = [*facts.notes, *draft.notes, *_clock_notes(points)]
        others = {key: tuple(sorted(values.items())) for key, values in draft.other_losses.items()}
        return LoggedRun(
            file=self._file,
            run=index,
            format=self._format,
            points=points,
            last_step=draft.last_step,
            total_steps=draft.total_steps,
            machine=facts.machine(draft.peak_memory_mib),
            seed=facts.seed,
            other_losses=others,
            source=facts.source,
            source_sha256=facts.source_sha256,
            notes=tuple(notes),
            date=facts.date,
        )


def _clock_notes(points: tuple[LoggedPoint, ...]) -> list[str]:
    """What the seconds of a run leave in or out, as far as its own readings show it."""
    timed = [(point.step, point.train_seconds) for point in points if point.train_seconds is not None]
    notes = []
    rates = []
    for (step, seconds), (next_step, next_seconds) in pairwise(timed):
        if next_seconds < seconds and next_step > RESTARTS_BEFORE:
            notes.append(
                f"the clock goes back between steps {step} and {next_step}, "
                f"from {seconds:g} s to {next_seconds:g} s: its seconds are not those of the whole run"
            )
            break
        rates.append((next_seconds - seconds) / (next_step - step))
    if len(rates) < 3:
        return notes
    step, seconds = timed[0]
    usual = median(rates[1:])
    if step > 0 and seconds < 0.5 * usual * step:
        notes.append(
            f"the run is resumed: its first validation is at step {step}, with {seconds:g} s on the clock"
        )
    first_step, first_seconds = (step, seconds) if step > 0 else timed[1]
    extra = first_seconds - usual * first_step
    if extra > max(2.0, 0.1 * usual * first_step):
        notes.append(f"the clock counts compilation: about {extra:.0f} s more up to step {first_step}")
    return notes
