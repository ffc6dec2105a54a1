"""The `main.log` of llm.c: `s:250 tel:6.1` is a validation, `s:250 trl:6.2` a training step, without a clock."""

from __future__ import annotations

import re
from collections.abc import Iterable

from nanorun.records.importers._header import Facts
from nanorun.records.importers._runs import Reading, RunCollector
from nanorun.records.importers._values import STEP
from nanorun.records.logs import LoggedRun

NAME = "llmc"
PREFIXES = ("s:",)

_LINE = re.compile(rf"s:({STEP}) (tel|trl|eval):([^ \r\n]+)((?: [^ \r\n]+)*)[ \r]*\n?$")


def recognises(line: str) -> bool:
    """Whether `line` is a reading of this format."""
    return line.startswith("s:") and bool(_LINE.match(line))


def read(lines: Iterable[str], file: str) -> list[LoggedRun]:
    """Return the runs in the lines of a log; `eval:` is HellaSwag's accuracy and no loss."""
    runs, nothing_said = RunCollector(file, NAME), Facts()
    for line in lines:
        if line.startswith("s:") and (found := _LINE.match(line)):
            is_validation = found[2] == "tel"
            runs.add(
                Reading(
                    int(found[1]),
                    loss=found[3] if is_validation else None,
                    is_last_and_cut=not line.endswith("\n") and not found[4],
                ),
                nothing_said,
            )
    return runs.finish()
