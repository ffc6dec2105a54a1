"""Foreign logs from files and folders: every run in them once, and every file that gave none, with why.

Nothing here trusts a file. It is read in pieces of bounded size; what is no text, no file or not readable ends
in a sentence, never in a traceback or a wait.
"""

from __future__ import annotations

import codecs
import dataclasses
import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from nanorun.errors import UserError
from nanorun.records.imported import read_import
from nanorun.records.importers import IMPORTERS, Importer
from nanorun.records.importers._runs import TooManyReadings
from nanorun.records.logs import LoggedPoint, LoggedRun, SkippedLog
from nanorun.records.record import IMPORT_FILE, RecordError

SUFFIXES = frozenset({"", ".txt", ".log", ".out", ".stdout"})
"""Of the files in a folder, those with other suffixes are not read, a number behind them aside (`run.log.1`)."""
NOT_A_LOGS_NAME = "its ending is not a log's; name the file itself to have it read"
LONGEST_LINE = 65_536
"""Characters; a longer line is no reading and no header, and is passed over."""
MAX_PREAMBLE_CHARS = 64 * 2**20
"""A file without a reading in so much text is no log."""
_BUFFER_BYTES = 2**18
_PREFIXES = tuple(prefix for importer in IMPORTERS for prefix in importer.PREFIXES)
_MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
"""What a text may begin with to say its encoding; Windows shells write the second."""


class LogReading(NamedTuple):
    """All that was found under some paths."""

    runs: tuple[LoggedRun, ...]
    """In order of the paths, then of the files' names, then of the files; each run once."""
    skipped: tuple[SkippedLog, ...]
    """Files without a run, then copies of runs that are kept, then files whose names are not a log's."""
    n_files: int
    """Files that hold at least one run, those that hold only copies included."""


def read_logs(paths: Sequence[Path]) -> LogReading:
    """Return the runs in files, and in folders with all that lies below them.

    Of a folder only files with `SUFFIXES` are read, and imports of ours; links that lead out of it are not
    followed. Raises UserError for a path that is not there.
    """
    runs: list[LoggedRun] = []
    skipped: list[SkippedLog] = []
    other: list[SkippedLog] = []
    sources: dict[str, str] = {}
    n_files = 0
    for path, why in _files_under(paths):
        if why == NOT_A_LOGS_NAME:
            other.append(SkippedLog(str(path), why))
            continue
        found = [] if why else _runs_in(path)
        if isinstance(found, str):
            why, found = found, []
        if why:
            skipped.append(SkippedLog(str(path), why))
        n_files += bool(found)
        runs += (_sharing_source(run, sources) for run in found)
    kept, copies = _without_copies(runs)
    return LogReading(tuple(kept), tuple(skipped + copies + other), n_files)


def _sharing_source(run: LoggedRun, sources: dict[str, str]) -> LoggedRun:
    """The run with its source taken from `sources`, so that a thousand logs of one script hold it once."""
    if run.source is None or run.source_sha256 is None:
        return run
    return dataclasses.replace(run, source=sources.setdefault(run.source_sha256, run.source))


def _files_under(paths: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """Each file to read once, with an empty text, or why it cannot be read."""
    seen: set[Path] = set()
    for path in paths:
        if not os.path.lexists(path):
            raise UserError(f"{path}: no such file or folder; name logs, or folders that hold logs")
        for found, why in _walk(path) if path.is_dir() else ((path, ""),):
            real = Path(os.path.realpath(found))
            if real not in seen:
                seen.add(real)
                yield found, why


def _walk(folder: Path) -> Iterator[tuple[Path, str]]:
    """The visible files below a folder in order of their names, and what of it cannot be looked into."""
    root = os.path.realpath(folder)
    waiting = [folder]
    while waiting:
        path = waiting.pop()
        if os.path.isdir(path) and (path is folder or not path.is_symlink()):
            try:
                names = sorted(os.listdir(path), reverse=True)
            except OSError as error:
                yield path, f"the folder cannot be read: {error.strerror}"
                continue
            # An import's other files are parts of it, and its source only quotes what it never ran.
            names = [IMPORT_FILE] if IMPORT_FILE in names else names
            waiting += (path / name for name in names if not name.startswith("."))
        elif os.path.isdir(path):
            continue
        elif not (_is_named_as_a_log(path) or path.name == IMPORT_FILE):
            yield path, NOT_A_LOGS_NAME
        elif path.is_symlink() and not os.path.realpath(path).startswith(root + os.sep):
            yield path, "is a link that leads out of the folder; name it to have it read"
        else:
            yield path, ""


def _is_named_as_a_log(path: Path) -> bool:
    suffixes = [suffix.lower() for suffix in path.suffixes] or [""]
    is_numbered = len(suffixes) > 1 and suffixes[-1][1:].isdecimal()
    return suffixes[-2 if is_numbered else -1] in SUFFIXES


def _runs_in(path: Path) -> list[LoggedRun] | str:
    """The runs of one file, or why it holds none."""
    try:
        # A pipe without a writer would be waited for, were it opened in the usual way.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return "is no regular file"
        if path.name == IMPORT_FILE:
            return [_imported_run(path)]
        return _read(descriptor, path)
    except (TooManyReadings, RecordError) as error:
        return str(error)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    finally:
        os.close(descriptor)


def _imported_run(path: Path) -> LoggedRun:
    """The run that was imported into the folder of an import.json, under that file's name."""
    folder = Path(os.path.abspath(path.parent))
    return dataclasses.replace(read_import(folder).to_logged_run(), file=str(path))


def _read(descriptor: int, path: Path) -> list[LoggedRun] | str:
    start = os.pread(descriptor, 8192, 0)
    encoding = next((name for mark, name in _MARKS.items() if start.startswith(mark)), "utf-8")
    if not start:
        return "is empty"
    if b"\0" in start and encoding != "utf-16":
        return "is no text"
    formats = _formats(_lines(descriptor, encoding, hashlib.sha256()))
    if isinstance(formats, str):
        return formats
    for importer in formats:
        digest = hashlib.sha256()
        runs = importer.read(_lines(descriptor, encoding, digest), str(path))
        if runs:
            return [dataclasses.replace(run, file_sha256=digest.hexdigest()) for run in runs]
    return "holds training steps and no validation that can be read"


def _formats(lines: Iterator[str]) -> list[Importer] | str:
    """The importers that may read a log, by its first reading; or why there are none."""
    n_chars = 0
    for line in lines:
        n_chars += len(line)
        if line.startswith(_PREFIXES):
            found = [importer for importer in IMPORTERS if importer.recognises(line)]
            if found:
                return found + [importer for importer in IMPORTERS if importer not in found]
        elif n_chars > MAX_PREAMBLE_CHARS:
            return f"holds no reading of a format we know in its first {MAX_PREAMBLE_CHARS:,} characters"
    return "holds no reading of a format we know"


def _lines(descriptor: int, encoding: str, digest: hashlib._Hash) -> Iterator[str]:
    """The lines of a file with their ends, `\\n` alone; over-long ones are left out. All bytes go to `digest`."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    decode = codecs.getincrementaldecoder(encoding)("replace").decode
    begun, too_long = "", False
    while data := os.read(descriptor, _BUFFER_BYTES):
        digest.update(data)
        *whole, begun = (begun + decode(data)).split("\n")
        for line in whole:
            if not too_long and len(line) < LONGEST_LINE:
                yield line + "\n"
            too_long = False
        if too_long or len(begun) >= LONGEST_LINE:
            begun, too_long = "", True
    begun += decode(b"", True)
    if begun and not too_long:
        yield begun


def _without_copies(runs: Sequence[LoggedRun]) -> tuple[list[LoggedRun], list[SkippedLog]]:
    """The runs that are kept, and those that only repeat one of them, or a part of one.

    A run is a copy when the validations of a kept one hold all of its own, seconds included, its last one too.
    Of several names of one run the one that says most is kept; of those, the first.
    """
    by_last: dict[tuple[object, ...], list[LoggedRun]] = {}
    for run in runs:
        by_last.setdefault((run.format, run.points[-1]), []).append(run)
    copies: dict[int, LoggedRun] = {}
    for alike in by_last.values():
        kept = _Kept()
        for run in sorted(alike, key=_says, reverse=True):
            original = kept.original_of(run)
            if original is None:
                kept.add(run)
            else:
                copies[id(run)] = original
    return (
        [run for run in runs if id(run) not in copies],
        [SkippedLog(run.file, _copy_text(run, copies[id(run)])) for run in runs if id(run) in copies],
    )


class _Kept:
    """Runs that are kept, found by what they hold: a file may have been made to hold a hundred thousand of them."""

    def __init__(self) -> None:
        self._exact: dict[object, LoggedRun] = {}
        self._holding: dict[LoggedPoint, list[tuple[LoggedRun, frozenset[LoggedPoint]]]] = {}

    def add(self, run: LoggedRun) -> None:
        self._exact.setdefault(_exact_key(run), run)
        held = (run, frozenset(run.points))
        for point in run.points:
            self._holding.setdefault(point, []).append(held)

    def original_of(self, run: LoggedRun) -> LoggedRun | None:
        """The first kept run that `run` repeats, or None."""
        original = self._exact.get(_exact_key(run))
        if original is not None or run.train_seconds is None:
            return original
        rarest = min((self._holding.get(point, []) for point in run.points), key=len)
        return next((other for other, points in rarest if points.issuperset(run.points)), None)


def _says(run: LoggedRun) -> tuple[int, bool, int]:
    """How much a log says of a run."""
    machine = run.machine
    known = [
        machine.gpu,
        machine.world_size,
        machine.driver,
        machine.torch,
        machine.peak_memory_mib,
        run.seed,
    ]
    return len(run.points), run.source is not None, sum(value is not None for value in known)


def _exact_key(run: LoggedRun) -> object:
    """What whole copies have in common; without a clock a few equal losses are no proof, so there the file counts."""
    if run.train_seconds is None and len(run.points) < 3:
        return run.file_sha256, run.run
    return run.points


def _copy_text(run: LoggedRun, original: LoggedRun) -> str:
    what = "a copy" if run.points == original.points else f"{len(run.points)} of the validations"
    which = f"run {run.run} " if run.run else ""
    of = f"run {original.run} of {original.file}" if original.run else original.file
    return f"{which}holds {what} of {of}"
