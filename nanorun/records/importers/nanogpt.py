"""The stdout of nanoGPT: `step 250: train loss 2.4, val loss 2.5` and `iter 10: loss 3.0, time 12.3ms, mfu …`.

It has no clock of its own: the times of its iterations leave evaluation in and are rounded, so they are not
summed up to one. The last step is known only where the config was printed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from nanorun.records.importers._header import HeaderReader
from nanorun.records.importers._runs import Reading, RunCollector
from nanorun.records.importers._values import STEP
from nanorun.records.logs import LoggedRun

NAME = "nanogpt"
PREFIXES = ("step ", "iter ")

_VALIDATION = re.compile(rf"step ({STEP}): train loss [^ ,\r\n]+, val loss ([^ ,\r\n]+)[ \r]*\n?$")
_ITERATION = re.compile(rf"iter ({STEP}): loss [^ ,\r\n]+, time ")


def recognises(line: str) -> bool:
    """Whether `line` is a reading of this format."""
    return bool(_VALIDATION.match(line) or _ITERATION.match(line))


def read(lines: Iterable[str], file: str) -> list[LoggedRun]:
    """Return the runs in the lines of a log."""
    header, runs = HeaderReader(), RunCollector(file, NAME)
    header.take_back_code()
    for line in lines:
        reading = _reading(line, header.facts.total_steps) if line.startswith(PREFIXES) else None
        if reading is None:
            header.line(line)
            continue
        if header.waits:
            header.flush()
            reading = reading._replace(total_steps=header.facts.total_steps)
        runs.add(reading, header.facts)
    return runs.finish()


def _reading(line: str, total_steps: int | None) -> Reading | None:
    if found := _VALIDATION.match(line):
        return Reading(int(found[1]), total_steps, loss=found[2], is_last_and_cut=not line.endswith("\n"))
    if found := _ITERATION.match(line):
        return Reading(int(found[1]), total_steps)
    return None
