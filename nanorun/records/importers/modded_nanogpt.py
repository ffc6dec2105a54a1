"""Logs of modded-nanogpt, of all three tracks since 2024: `step:125/3000 val_loss:4.5 train_time:22.1s …`.

A reading is a line that begins with `step:N/M`; one that only holds such a text is none. Keys may stand
in any order, and ones we do not know are passed over. The suffix of `train_time` says its unit.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from nanorun.records.importers._header import HeaderReader, is_separator
from nanorun.records.importers._runs import RESTARTS_BEFORE, Reading, RunCollector
from nanorun.records.importers._values import STEP, seconds, shown
from nanorun.records.logs import LoggedRun

NAME = "modded_nanogpt"
PREFIXES = ("step:",)

_LINE = re.compile(rf"step:({STEP})/({STEP})((?: +[^ \r\n]+)+)[ \r]*\n?$")
_OTHER_LOSS = re.compile(r"(?=[a-z0-9_]{0,40}val)[a-z][a-z0-9_]{1,40}loss")


def recognises(line: str) -> bool:
    """Whether `line` is a reading of this format."""
    return line.startswith("step:") and bool(_LINE.match(line))


def read(lines: Iterable[str], file: str) -> list[LoggedRun]:
    """Return the runs in the lines of a log."""
    reader = _Reader(file)
    for line in lines:
        reader.take(line)
    return reader.finish()


class _Reader:
    """The place in a log: in the code that it embeds, in a header, or among its readings."""

    def __init__(self, file: str) -> None:
        self._header = HeaderReader()
        self._runs = RunCollector(file, NAME)
        self._separators = 0

    def take(self, line: str) -> None:
        if is_separator(line):
            self._take_separator()
        elif self._header.in_code:
            self._header.line(line)
            if self._header.is_full:
                self._read_code_as_log()
        else:
            self._take_outside_code(line)

    def finish(self) -> list[LoggedRun]:
        if self._header.in_code:
            self._read_code_as_log()
        self._flush()
        return self._runs.finish()

    def _take_outside_code(self, line: str) -> None:
        if line.startswith("step:") and (reading := _reading(line)):
            if self._header.waits:
                self._flush()
            self._runs.add(reading, self._header.facts)
        else:
            self._header.line(line)

    def _take_separator(self) -> None:
        ended_code = self._header.separator()
        quoted = self._runs.forget_all() if ended_code and not self._separators else 0
        if quoted:
            self._header.facts.notes += (
                f"{quoted} readings before the end of the embedded code were taken for a part of it",
            )
        # A log may begin with such a line, which is then the first of two around the code.
        self._separators += 1 if ended_code or self._separators else 0

    def _read_code_as_log(self) -> None:
        """Read again, as anything else, what was held for code and did not end as embedded code does."""
        for line in self._header.take_back_code():
            self._take_outside_code(line)

    def _flush(self) -> None:
        self._header.flush()
        self._runs.set_peak_memory(self._header.take_peak_memory())


def _reading(line: str) -> Reading | None:
    """The reading that a line is, or None for a line that only begins like one."""
    found = _LINE.match(line)
    if not found:
        return None
    step, total_steps, rest = int(found[1]), int(found[2]), found[3]
    if "val_loss:" in rest:
        return _validation(step, total_steps, _fields(rest), is_cut=not line.endswith("\n"))
    # Where a clock is set back, it is in the first steps; the later ones are two million in the public logs.
    time = _time_of(_fields(rest)) if step <= RESTARTS_BEFORE else ""
    return Reading(step, total_steps, seconds(time))


def _validation(step: int, total_steps: int, fields: list[str], *, is_cut: bool) -> Reading:
    losses = [field[9:] for field in fields if field.startswith("val_loss:")]
    time = _time_of(fields)
    others = []
    for field in fields[:-1] if is_cut else fields:
        key, _, text = field.partition(":")
        if key != "val_loss" and _OTHER_LOSS.fullmatch(key):
            others.append((key, text))
    counted = seconds(time)
    return Reading(
        step,
        total_steps,
        counted,
        " and ".join(losses) or None,
        tuple(others),
        is_last_and_cut=is_cut and fields[-1].startswith("val_loss:"),
        note=None if counted is not None or not time else f"the time {shown(time)} is not one in s or ms",
    )


def _fields(rest: str) -> list[str]:
    """What stands between blanks; a tab within a number makes it no number."""
    return [field for field in rest.split(" ") if field]


def _time_of(fields: list[str]) -> str:
    times = [field[11:] for field in fields if field.startswith("train_time:")]
    return " and ".join(times)
