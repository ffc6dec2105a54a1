"""Any text dataset on the Hugging Face hub: `hub:OWNER/NAME`, its parquet or JSON lines tokenized here.

Which commit: `--revision`, else the newest when the preparation was begun, which it then keeps to. Which files: those
that `--include GLOB` matches (`*` goes across folders), else every parquet file, else every JSON lines file (plain, .gz
or .zst); where some of them are named as training data, those named as another split are left out. They are read in the
order of their paths, fetched into the hub's own cache and checked there, the next one while the current one is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar

from nanorun.data import hub
from nanorun.data.hub import HubFile, Snapshot
from nanorun.data.hub_cache import cache_job, pointer
from nanorun.data.hub_fetch import MOST_NAMED, fetch, telling
from nanorun.data.shards import replacing
from nanorun.data.sources import Document, InputFile, Reading, Step
from nanorun.errors import UserError, printable

USAGE = "hub:OWNER/NAME"
OPTIONS = ("format", "column", "separator", "include", "revision", "skip-bad", "keep-duplicates")
SUMMARY = "any text dataset on the hub in parquet or JSON lines (--column, --include GLOB, --revision)"

KINDS = ((".parquet",), (".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".ndjson.gz", ".ndjson.zst"))
"""Endings that are looked for without `--include`: the first kind that occurs is taken."""
TRAINING = frozenset({"train", "training"})
OTHER_SPLITS = frozenset({"validation", "valid", "val", "test", "dev"})
EXPANDS = {".parquet": 2.5, ".gz": 3.0, ".zst": 3.5}
"""About how many bytes of text a byte of such a file holds; others 1.0."""
AHEAD = 2
"""Files on their way at a time: the one to be read next and the one after it."""
PIN_NAME = "hub.json"
"""Which commit a folder is made from, and what the dataset holds there: it is asked once, also by later runs."""


def named(argument: str) -> HubText:
    """Return the corpus of the dataset OWNER/NAME; `UserError` for what cannot be one."""
    return HubText(hub.check_repository(argument))


@dataclass
class HubText:
    """The text of one dataset on the hub: a `Source`."""

    repository: str
    _snapshots: dict[str | None, Snapshot] = field(default_factory=dict, repr=False)
    """By the revision asked for: within a process a branch stays where it was."""

    SUMMARY = SUMMARY
    EMBEDDED = False
    TAKES_INPUT = False
    OPTIONS = OPTIONS
    DEFAULT_TOKENIZER = "gpt2"
    SOURCE_SHA256: ClassVar[str | None] = None

    @property
    def NAME(self) -> str:
        return f"hub:{self.repository}"

    def commit(self, reading: Reading) -> str:
        """Return the commit that is read."""
        return self._snapshot(reading).commit

    def files(self, reading: Reading) -> list[InputFile]:
        """Return the files that would be fetched, in the order of reading; asks the hub, once."""
        return [
            InputFile(file.path, file.size, _expands(file.path), file.etag)
            for file in self._chosen(reading)[0]
        ]

    def left_out(self, reading: Reading) -> list[str]:
        """Return the files of the kind that is read which are not: another split's."""
        return [file.path for file in self._chosen(reading)[1]]

    def documents(self, reading: Reading) -> Iterator[Document]:
        """Yield the documents of every file, fetched first where it is not in the hub's cache."""
        from nanorun.data.readers import documents_of

        snapshot = self._snapshot(reading)
        chosen, left_out = self._chosen(reading)
        if left_out:
            named = ", ".join(printable(file.path) for file in left_out[:MOST_NAMED])
            more = ", …" if len(left_out) > MOST_NAMED else ""
            note = f"{len(left_out):,} files of other splits are left out: {named}{more}"
            reading.report(Step("fetch", 0, sum(file.size for file in chosen), "bytes", note))
        by_hand = (
            f"Where there is no network: fetch them elsewhere from {snapshot.page} and prepare them as your own files "
            "with `nanorun prepare-data text --input FOLDER`, or bring along the hub's cache (HF_HUB_CACHE)."
        )
        jobs = [cache_job(snapshot, file) for file in chosen]
        with closing(fetch(snapshot, jobs, report=reading.report, by_hand=by_hand, ahead=AHEAD)) as fetched:
            for file, _ in zip(chosen, fetched):
                yield from documents_of(pointer(snapshot, file), reading, f"{self.NAME}/{file.path}")

    def _snapshot(self, reading: Reading) -> Snapshot:
        """Return what the dataset holds at the commit that this preparation was begun with."""
        if reading.inputs:
            raise UserError(
                f"Corpus {self.NAME!r} comes from the hub and takes no --input (found {reading.inputs[0]!r})."
            )
        if reading.revision not in self._snapshots:
            pin = reading.home / PIN_NAME if reading.home is not None and reading.home.is_dir() else None
            found = _read_pin(pin, self.repository, reading.revision)
            if found is None:
                tell = telling(reading)
                found = hub.snapshot(
                    self.repository, hub.resolve(self.repository, reading.revision, tell), tell
                )
                if pin is not None:
                    _write_pin(pin, found, reading.revision)
            self._snapshots[reading.revision] = found
        return self._snapshots[reading.revision]

    def _chosen(self, reading: Reading) -> tuple[list[HubFile], list[HubFile]]:
        """Return the files to read and those of other splits; `UserError` where there is nothing to read."""
        snapshot = self._snapshot(reading)
        if reading.include is not None:
            chosen = [file for file in snapshot.files if fnmatchcase(file.path, reading.include)]
            if not chosen:
                raise UserError(
                    f"--include {reading.include!r} matches none of the {len(snapshot.files):,} files of "
                    f"{self.repository} at {snapshot.commit}; {snapshot.page} shows them."
                )
            return chosen, []
        for kind in KINDS:
            if of_kind := [file for file in snapshot.files if file.path.lower().endswith(kind)]:
                return _without_other_splits(of_kind)
        raise UserError(
            f"{self.repository} has no .parquet and no .jsonl file at {snapshot.commit} ({snapshot.page}); choose "
            "others with --include GLOB (and --format), or try --revision refs/convert/parquet, where the hub keeps "
            "many datasets as parquet."
        )


def _without_other_splits(files: list[HubFile]) -> tuple[list[HubFile], list[HubFile]]:
    """Return the files to train on and the others, told by the words of their paths; all, if none says `train`."""
    words = [set(re.split(r"[^a-z0-9]+", file.path.lower())) for file in files]
    if not any(TRAINING & of_path for of_path in words):
        return files, []
    others = [bool(OTHER_SPLITS & of_path) and not TRAINING & of_path for of_path in words]
    return (
        [file for file, other in zip(files, others) if not other],
        [file for file, other in zip(files, others) if other],
    )


def _expands(path: str) -> float:
    return EXPANDS.get(Path(path).suffix.lower(), 1.0)


def _write_pin(path: Path, snapshot: Snapshot, asked: str | None) -> None:
    content = {
        "repository": snapshot.repository,
        "asked": asked,
        "commit": snapshot.commit,
        "files": [[file.path, file.size, file.etag] for file in snapshot.files],
    }
    with replacing(path) as file:
        file.write(json.dumps(content).encode())


def _read_pin(path: Path | None, repository: str, asked: str | None) -> Snapshot | None:
    """Return what an earlier run of the same preparation has written down; None if there was none."""
    content: Any = None
    if path is not None:
        with suppress(OSError, ValueError):
            content = json.loads(path.read_bytes())
    try:
        if (content["repository"], content["asked"]) != (repository, asked):
            return None
        files = tuple(HubFile(str(name), int(size), str(etag)) for name, size, etag in content["files"])
        return Snapshot(repository, str(content["commit"]), files)
    except (KeyError, TypeError, ValueError):
        return None
