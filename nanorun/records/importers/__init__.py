"""One foreign log format per file; what each offers is `Importer`.

A reader is handed the lines of one file, in order and with their line ends, and gives back the runs it found.
It never raises for what a line says, and keeps no more of a file than its readings and one embedded source.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, cast

from nanorun.records.importers import llmc, modded_nanogpt, nanogpt
from nanorun.records.logs import LoggedRun


class Importer(Protocol):
    """A module of this folder."""

    NAME: str
    PREFIXES: tuple[str, ...]
    """What the lines that hold readings begin with."""

    def recognises(self, line: str) -> bool:
        """Whether `line` can only be a reading of this format."""

    def read(self, lines: Iterable[str], file: str) -> list[LoggedRun]:
        """The runs in the lines of `file`."""


IMPORTERS = tuple(cast(Importer, module) for module in (modded_nanogpt, llmc, nanogpt))
