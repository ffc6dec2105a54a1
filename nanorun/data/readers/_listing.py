"""Which files the inputs stand for, in an order that no machine changes.

The inputs come in the order given; the files of a folder, or of a glob, sorted by their path part for part,
by the numbers of the characters. What begins with a dot is left out of folders, and globs match it only
where they say the dot. Symlinks are followed. Each file and each folder is taken once, where it is met first,
so a symlink that leads back up does no harm. Sockets, pipes and devices in a folder are passed over.

A glob stands for what it matches: files with any ending, and folders, which are searched through; `**` for
any number of folders.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from nanorun.data.readers._kinds import Kind, kind_of, kind_said, suffixes_in_folders
from nanorun.data.shards import JOURNAL_NAME, MANIFEST_NAME
from nanorun.data.sources import InputFile, Reading, Step
from nanorun.errors import UserError, shown

STDIN = "-"
STDIN_NAME = "standard input"
SPOOL_BLOCK_BYTES = 1 << 20


class TextFile(NamedTuple):
    """One file to take documents from, as it was when it was listed."""

    path: Path | None
    """None for standard input that has not been put into a file yet."""
    name: str
    """As messages show it."""
    kind: Kind
    size: int
    mtime_ns: int

    def as_input(self) -> InputFile:
        """Return what is told about it. Standard input has size 0 until it has been read, and no version."""
        version = "" if self.name == STDIN_NAME else str(self.mtime_ns)
        return InputFile(self.name, self.size, self.kind.expands, version)


def find_files(reading: Reading, *, spool: bool = False) -> list[TextFile]:
    """Return the files that `reading.inputs` stand for, found once for each reading.

    `spool` puts standard input, where it is among them, into a file first. What is not there, a folder or
    glob without a file, and what cannot be looked into are `UserError`s.
    """
    key = ("files", tuple(reading.inputs), reading.format)
    if key not in reading.kept:
        search = _Search(reading)
        for given in reading.inputs:
            search.add(given)
        reading.kept[key] = search.files
        reading.n_listed = reading.n_skipped
    files: list[TextFile] = reading.kept[key]
    if spool:
        files[:] = [file if file.path else _spooled(file, reading) for file in files]
    return files


class _Search:
    """Gathers files, none twice."""

    def __init__(self, reading: Reading) -> None:
        self.files: list[TextFile] = []
        self._reading = reading
        self._met: set[str] = set()
        """Real paths of the files so far."""
        self._gone_through: set[str] = set()
        """Real paths of the folders so far."""

    def add(self, given: str) -> None:
        """Add the files that one input stands for."""
        if given == STDIN:
            if not any(file.name == STDIN_NAME for file in self.files):
                kind = self._kind("", outright=True)
                assert kind, "outright has a kind always"
                self.files.append(TextFile(None, STDIN_NAME, kind, 0, 0))
            return
        path = os.path.expanduser(given)
        if "\0" in path:
            raise UserError(f"--input {shown(given)}: a name cannot hold a NUL character.")
        if not os.path.lexists(path) and _is_pattern(path):
            self._add_glob(path)
        else:
            self._add_named(path)

    def _add_named(self, path: str) -> None:
        """Add the file or the folder `path`, which is there."""
        try:
            status = os.stat(path)
        except OSError as error:
            raise UserError(f"--input {shown(path)}: {_why_not_there(path, error)}.") from error
        if stat.S_ISREG(status.st_mode):
            self._add_file(path, os.path.realpath(path), status, self._kind(path, outright=True))
        elif not stat.S_ISDIR(status.st_mode):
            raise UserError(
                f"--input {shown(path)}: a pipe or a device, expected a file or a folder; send a pipe to "
                f"standard input: nanorun prepare-data text --input - < {shown(path)}"
            )
        elif not self._add_folder(path):
            raise UserError(
                f"--input {shown(path)}: no file in this folder whose name ends in "
                f"{', '.join(suffixes_in_folders())}, packed as .gz or .zst or not; name files outright if they "
                "end otherwise, or say --format."
            )

    def _add_folder(self, folder: str) -> bool:
        """Add the files under `folder` whose endings are known; whether there are any."""
        found = False
        for entry, real in self._entries_under(folder):
            try:
                kind = self._kind(entry.name, outright=False)
                if kind is None:
                    continue
                if entry.is_file():
                    self._add_file(entry.path, real, entry.stat(), kind)
                    found = True
                elif entry.is_symlink() and not os.path.exists(entry.path):
                    self._bad(entry.path, "a symlink to something that is not there")
            except OSError as error:
                self._bad(entry.path, f"cannot be looked at ({error.strerror})")
        return found or self._met_under(folder)

    def _met_under(self, folder: str) -> bool:
        """Whether an earlier input led into `folder`: then it is no mistake that it gives nothing more."""
        real = os.path.realpath(folder)
        return any(met.startswith(os.path.join(real, "")) for met in self._met)

    def _entries_under(self, folder: str) -> Iterator[tuple[os.DirEntry[str], str]]:
        """Yield what is no folder under `folder`, and its real path. Each real folder is gone through once."""
        waiting = list(reversed(self._entries_of_new(folder)))
        while waiting:
            entry, real = waiting.pop()
            try:
                is_folder = entry.is_dir()
            except OSError as error:
                self._bad(entry.path, _why_not_there(entry.path, error))
                continue
            if is_folder:
                waiting.extend(reversed(self._entries_of_new(entry.path)))
            else:
                yield entry, real

    def _entries_of_new(self, folder: str) -> list[tuple[os.DirEntry[str], str]]:
        """Return the sorted entries of `folder` and their real paths; none if it was gone through before."""
        real_folder = os.path.realpath(folder)
        if real_folder in self._gone_through:
            return []
        self._gone_through.add(real_folder)
        entries = self._entries(folder)
        names = {entry.name for entry in entries}
        if {MANIFEST_NAME, JOURNAL_NAME} & names and any(".bin" in name for name in names):
            return []  # a corpus that is prepared, or about to be: no text
        return [
            (
                entry,
                os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real_folder, entry.name),
            )
            for entry in entries
            if not entry.name.startswith(".")
        ]

    def _entries(self, folder: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(folder) as entries:
                return sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            self._bad(folder, f"a folder that cannot be looked into ({error.strerror})")
            return []

    def _add_file(self, path: str, real: str, status: os.stat_result, kind: Kind | None) -> None:
        assert kind, "a file has a kind when it is named, and others were left out before"
        if real not in self._met:
            self._met.add(real)
            self.files.append(TextFile(Path(path), shown(path), kind, status.st_size, status.st_mtime_ns))

    def _kind(self, name: str, *, outright: bool) -> Kind | None:
        if self._reading.format is not None:
            return kind_said(self._reading.format, name)
        return kind_of(name, outright=outright)

    def _add_glob(self, pattern: str) -> None:
        """Add what `pattern` matches: files with any ending, and what is in folders."""
        root, parts = (os.sep, pattern.lstrip(os.sep)) if pattern.startswith(os.sep) else ("", pattern)
        matches = set(self._matches(root, [part for part in parts.split(os.sep) if part]))
        found = False
        for path in sorted(matches, key=lambda path: path.split(os.sep)):
            try:
                status = os.stat(path)
            except OSError as error:
                self._bad(path, _why_not_there(path, error))
                continue
            if stat.S_ISREG(status.st_mode):
                self._add_file(path, os.path.realpath(path), status, self._kind(path, outright=True))
                found = True
            elif stat.S_ISDIR(status.st_mode):
                found |= self._add_folder(path)
        if not found:
            raise UserError(f"--input {shown(pattern)}: no text file matches this pattern.")

    def _matches(self, folder: str, parts: list[str]) -> Iterator[str]:
        """Yield the paths that match `parts` below `folder`."""
        part, *rest = parts
        if part == "**":
            # at the end it stands for the folder, which is searched through
            for below in self._folders_under(folder):
                yield from self._matches(below, rest) if rest else [below or os.curdir]
            return
        if _is_pattern(part):
            names = [
                entry.name
                for entry in self._entries(folder or os.curdir)
                if fnmatch.fnmatchcase(entry.name, part)
                and not (entry.name.startswith(".") and not part.startswith("."))
            ]
        else:
            names = [part] if os.path.lexists(os.path.join(folder, part)) else []
        for name in names:
            path = os.path.join(folder, name)
            if not rest:
                yield path
            elif os.path.isdir(path):
                yield from self._matches(path, rest)

    def _folders_under(self, folder: str) -> Iterator[str]:
        """Yield `folder` and the folders in it, hidden ones left out, each real one once."""
        waiting, met = [folder], set()
        while waiting:
            folder = waiting.pop()
            real = os.path.realpath(folder or os.curdir)
            if real in met:
                continue
            met.add(real)
            yield folder
            waiting += [
                os.path.join(folder, entry.name)
                for entry in reversed(self._entries(folder or os.curdir))
                if not entry.name.startswith(".") and os.path.isdir(entry.path)
            ]

    def _bad(self, path: str, found: str) -> None:
        self._reading.bad(f"--input {shown(path)}", found, "mend or remove it")


def _is_pattern(path: str) -> bool:
    return any(character in path for character in "*?[")


def _why_not_there(path: str, error: OSError) -> str:
    if error.errno == errno.ELOOP:
        return "a symlink that leads to itself"
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        is_link = os.path.lexists(path)
        return "a symlink to something that is not there" if is_link else "there is no such file or folder"
    return f"cannot be looked at ({error.strerror})"


def _spooled(file: TextFile, reading: Reading) -> TextFile:
    """Return standard input as a file in the folder for temporary files: it can be read only once."""
    stream = getattr(sys.stdin, "buffer", None)
    if stream is None:
        raise UserError("--input -: there is no standard input here; name a file.")
    path = None
    try:
        reading.scratch.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix="stdin-", dir=reading.scratch)
        path = Path(name)
        n_bytes = 0
        with os.fdopen(handle, "wb") as spool:
            for block in _blocks_of_stdin(stream):
                spool.write(block)
                n_bytes += len(block)
                reading.report(Step(STDIN_NAME, n_bytes, None, "bytes"))
        status = path.stat()
    except BaseException as error:
        if path is not None:
            with suppress(OSError):
                path.unlink()
        if isinstance(error, OSError):
            raise UserError(
                f"{STDIN_NAME}: cannot be kept in {shown(reading.scratch)} while it is read "
                f"({error.strerror or error}); make room there, or put it into a file and name that."
            ) from error
        raise
    return file._replace(path=path, size=status.st_size, mtime_ns=status.st_mtime_ns)


def _blocks_of_stdin(stream: BinaryIO) -> Iterator[bytes]:
    try:
        while block := stream.read(SPOOL_BLOCK_BYTES):
            yield block
    except (OSError, ValueError) as error:
        raise UserError(
            f"{STDIN_NAME}: cannot be read ({error}); put it into a file and name that."
        ) from error
