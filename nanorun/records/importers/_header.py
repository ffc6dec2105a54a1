"""What a log says besides its readings: the machine, the seed, the day, and the code it embeds."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import re
from collections.abc import Callable
from contextlib import suppress

from nanorun.records.logs import LoggedMachine

SEPARATOR = "=" * 100
MAX_SOURCE_CHARS = 2_000_000
"""An embedded source longer than this is hashed no more and left out."""
MAX_GPUS = 4096
MAX_KINDS = 8
LONGEST_HEADER_LINE = 1000

_IMPORT = re.compile(r"import [A-Za-z_]|from [A-Za-z_.][A-Za-z0-9_.]* import ")
_MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]


@dataclasses.dataclass
class Facts:
    """What was said up to some line of a log."""

    gpus: dict[int, str] = dataclasses.field(default_factory=dict)
    """Listed devices by their index."""
    device_name: str | None = None
    world_size: int | None = None
    driver: str | None = None
    torch: str | None = None
    seed: int | None = None
    total_steps: int | None = None
    date: str | None = None
    source: str | None = None
    source_sha256: str | None = None
    notes: tuple[str, ...] = ()
    """Facts that no other field holds."""

    def copy(self) -> Facts:
        """The facts as they stand, not to change with what follows in the file."""
        return dataclasses.replace(self, gpus=dict(self.gpus))

    def machine(self, peak_memory_mib: float | None) -> LoggedMachine:
        """The machine of a run; what is stated goes before what is only listed."""
        names = list(dict.fromkeys(self.gpus[index] for index in sorted(self.gpus)))
        implied = self.world_size is None and bool(self.gpus)
        return LoggedMachine(
            gpu=self.device_name or " + ".join(names[:MAX_KINDS]) or None,
            n_gpus=len(self.gpus) or None,
            world_size=len(self.gpus) if implied else self.world_size,
            world_size_is_implied=implied,
            driver=self.driver,
            torch=self.torch,
            peak_memory_mib=peak_memory_mib,
        )


def _gpu(facts: Facts, found: re.Match[str]) -> None:
    index = int(found[1])
    if index in facts.gpus and index == min(facts.gpus):
        facts.gpus.clear()
    if len(facts.gpus) < MAX_GPUS:
        facts.gpus[index] = found[2].strip()


def _device(facts: Facts, found: re.Match[str]) -> None:
    facts.device_name = found[1].strip()
    facts.world_size = int(found[2])


def _smi_date(facts: Facts, found: re.Match[str]) -> None:
    _set_date(facts, f"{found[3]}-{_MONTHS.index(found[1]) + 1:02d}-{int(found[2]):02d}")


def _iso_date(facts: Facts, found: re.Match[str]) -> None:
    _set_date(facts, found[1])


def _set_date(facts: Facts, day: str) -> None:
    with suppress(ValueError):  # the 31st of February
        facts.date = datetime.date.fromisoformat(day).isoformat()


def _warm_up(facts: Facts, found: re.Match[str]) -> None:
    facts.notes = (*facts.notes, "compilation and warming up come before the clock starts")


def _set(name: str, kind: Callable[[str], object] = str) -> Callable[[Facts, re.Match[str]], None]:
    return lambda facts, found: setattr(facts, name, kind(found[1]))


_SIZE = r"([1-9][0-9]{0,5})(?![0-9])"
_SEED = r"([0-9]{1,18})(?![0-9.])"
_DAY = r"([12][0-9]{3}-[01][0-9]-[0-3][0-9])T"
_VERSION = r"([0-9][0-9A-Za-z.+_-]{0,60})"

_RULES: tuple[tuple[str, str, Callable[[Facts, re.Match[str]], None]], ...] = (
    (
        "| ",
        r"\|\s+([0-9]{1,4})\s+(\S.{0,80}?)\s+(?:On|Off|N/A)\s*\|\s*[0-9A-Fa-f]{4,8}:[0-9A-Fa-f]{2}:",
        _gpu,
    ),
    ("%", r"([0-9]{1,4})\s+(\S.{0,80}?)\s{2,}[0-9]+\s+[0-9]+\s+[0-9]+\s+[0-9]+\s+[0-9]+\s+%\s*$", _gpu),
    ("GPU ", r"GPU ([0-9]{1,4}): (.{1,80}?) \(UUID: ", _gpu),
    ("device_name=", rf"(?:.{{0,80}} )?device_name=(.{{1,80}}?) with world_size[= ]{_SIZE}", _device),
    (" with world_size ", rf"Running PyTorch .{{1,120}} on (.{{1,80}}?) with world_size {_SIZE}", _device),
    ("world_size", rf"(?:.{{0,200}} )?world_size[=: ] ?{_SIZE}", _set("world_size", int)),
    (
        "nproc",
        rf"(?=.*--standalone)(?:.{{0,200}} )?--nproc[_-]per[_-]node[= ]{_SIZE}",
        _set("world_size", int),
    ),
    ("Driver Version", rf".{{0,80}}Driver Version: {_VERSION}", _set("driver")),
    ("ytorch ", rf"Running pytorch {_VERSION}", _set("torch")),
    ("PyTorch ", rf"Running PyTorch {_VERSION}", _set("torch")),
    ("torch ", rf"torch {_VERSION}\s*$", _set("torch")),
    ("seed", rf"Using seed(?:_env)?[=:] ?{_SEED}\s*$", _set("seed", int)),
    ("seed ", rf"=== seed {_SEED} start", _set("seed", int)),
    ("seed", rf"(?:Overriding: )?seed ?[=:] ?{_SEED}\s*$", _set("seed", int)),
    ("seed", rf"trial:[0-9]{{1,9}}/[0-9]{{1,9}} seed:{_SEED}\s*$", _set("seed", int)),
    ("--seed", rf"command=.{{0,2000}} --seed[= ]{_SEED}", _set("seed", int)),
    ("warming up", r"Compiling model and warming up kernels", _warm_up),
    ("max_iters", r"(?:Overriding: )?max_iters = ([0-9]{1,12})(?![0-9.e])", _set("total_steps", int)),
    ("T", rf"(?:Run UTC timestamp|batch_start|started_at)={_DAY}", _iso_date),
    (" start ", rf"=== seed [0-9]{{1,18}} start {_DAY}", _iso_date),
    (
        ":",
        rf"[A-Z][a-z]{{2}} ({'|'.join(_MONTHS)}) {{1,2}}([0-3]?[0-9]) [0-9:]{{8}} ([12][0-9]{{3}})\s*$",
        _smi_date,
    ),
)
_COMPILED = tuple((word, re.compile(pattern), act) for word, pattern, act in _RULES)

_PEAK = re.compile(r"peak memory (?:consumption|allocated): ([0-9]{1,9}) MiB")


class HeaderReader:
    """Takes the lines of a log that are no readings, and keeps what they say.

    The code that a log embeds is told from a header by its imports, and ends at the first line of 100 `=`.
    Code that no such line ends was printed by something else, and is handed back to be read like the rest.
    """

    def __init__(self) -> None:
        self.facts = Facts()
        self.in_code = False
        self._pending: list[str] = []
        self._n_chars = 0
        self._peak: float | None = None
        self._takes_code = True

    @property
    def waits(self) -> bool:
        """Whether there is anything that `flush` and `take_peak_memory` would tell."""
        return bool(self._pending) or self._peak is not None

    @property
    def is_full(self) -> bool:
        """Whether more text waits than any embedded source has."""
        return self._n_chars > MAX_SOURCE_CHARS

    def line(self, line: str) -> None:
        """Take a line that is no reading, or any line while `in_code`."""
        if not self.in_code and self._takes_code and line.startswith(("import ", "from ")):
            self.in_code = bool(_IMPORT.match(line))
            if self.in_code:
                self._cut_after_peak_memory()
        self._pending.append(line)
        self._n_chars += len(line)
        if self.is_full and not self.in_code:
            self.flush()

    def separator(self) -> bool:
        """Take a line of 100 `=`, and return whether what stood before it was code and not a header."""
        ends_code = self.in_code
        if ends_code:
            text = "".join(self._pending)
            self.facts = Facts(source=text, source_sha256=hashlib.sha256(text.encode()).hexdigest())
            self._clear()
        else:
            self.flush()
        self._takes_code = True
        return ends_code

    def flush(self) -> None:
        """Read what waits as a header."""
        for line in self._pending:
            if len(line) <= LONGEST_HEADER_LINE:
                self._see(line)
        self._clear()

    def take_back_code(self) -> list[str]:
        """Return the lines that were held for code, and hold none before the next line of 100 `=`."""
        lines = self._pending
        self._clear()
        self._takes_code = False
        return lines

    def take_peak_memory(self) -> float | None:
        """Return the peak memory said since the last call, in MiB, after a `flush`."""
        peak, self._peak = self._peak, None
        return peak

    def _cut_after_peak_memory(self) -> None:
        """Keep the last words of the log before, in a file of several, out of the next one's code."""
        for index in range(len(self._pending) - 1, -1, -1):
            if found := _PEAK.match(self._pending[index]):
                self._peak = float(found[1])
                del self._pending[: index + 1]
                return

    def _clear(self) -> None:
        self._pending, self._n_chars, self.in_code = [], 0, False

    def _see(self, line: str) -> None:
        if line.startswith("peak memory") and (found := _PEAK.match(line)):
            self._peak = float(found[1])
        for word, pattern, act in _COMPILED:
            if word in line and (found := pattern.match(line)):
                act(self.facts, found)


def is_separator(line: str) -> bool:
    """Whether a line is the 100 `=` that end an embedded source."""
    return line.startswith(SEPARATOR) and line.rstrip("\r\n ") == SEPARATOR
