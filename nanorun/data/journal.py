"""What a preparation has done so far, in lines that are added and never changed.

`journal.jsonl` lies beside the shards until the manifest is written. A line that a killed process left unfinished is
not counted.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nanorun.data.shards import JOURNAL_NAME, ShardEntry, cannot_write

JOURNAL_VERSION = 1


@dataclass
class Position:
    """How much of one split has been written."""

    shard: int = 0
    """The number of the shard that is being filled."""
    tokens: int = 0
    """In that shard; so are the next two."""
    bytes: int = 0
    documents: int = 0


@dataclass
class Progress:
    """What a journal says."""

    request: dict[str, Any]
    """What was asked for: corpus, tokenizer, options."""
    rule: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] | None = None
    documents: int = 0
    """Read up to here."""
    sha256: str = ""
    """Of what was read."""
    positions: dict[str, Position] = field(default_factory=lambda: {"train": Position(), "val": Position()})
    shards: list[ShardEntry] = field(default_factory=list)
    """Finished."""

    @property
    def has_begun(self) -> bool:
        return bool(self.documents or self.shards)


class Journal:
    """Adds lines to `journal.jsonl` in a folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / JOURNAL_NAME

    def read(self) -> Progress | None:
        """Return what the journal says, up to a line that is broken; None where there is none that can be used."""
        try:
            content = self.path.read_bytes()
        except OSError:
            return None
        progress: Progress | None = None
        whole = 0
        for line in content.splitlines(keepends=True):
            try:
                entry = json.loads(line) if line.endswith(b"\n") else None
                progress = _after(progress, entry)
            except (ValueError, TypeError, KeyError):
                break
            whole += len(line)
        if whole < len(content) and progress is not None:
            os.truncate(self.path, whole)
        return progress

    def begin(self, request: dict[str, Any], rule: dict[str, Any], tokenizer: dict[str, Any] | None) -> None:
        """Start a new journal in place of an old one."""
        self.path.unlink(missing_ok=True)
        self._add({"version": JOURNAL_VERSION, "request": request, "rule": rule, "tokenizer": tokenizer})

    def finished(self, shard: ShardEntry) -> None:
        self._add({"shard": asdict(shard)})

    def reached(self, documents: int, sha256: str, positions: dict[Any, Position]) -> None:
        at = {split: asdict(position) for split, position in positions.items()}
        self._add({"documents": documents, "sha256": sha256, "at": at})

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def _add(self, entry: dict[str, Any]) -> None:
        try:
            with open(self.path, "ab") as file:
                file.write(json.dumps(entry).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise cannot_write(self.path, error) from error


def _after(progress: Progress | None, entry: Any) -> Progress:
    """Return what is known after one more line; ValueError, TypeError or KeyError for a line that is none of ours."""
    if progress is None:
        if entry["version"] != JOURNAL_VERSION:
            raise ValueError("another version")
        return Progress(dict(entry["request"]), dict(entry["rule"]), entry["tokenizer"])
    if "shard" in entry:
        shard = ShardEntry(**entry["shard"])
        # One that had to be made again is told of twice.
        progress.shards = [*(one for one in progress.shards if one.file != shard.file), shard]
    else:
        positions = {split: Position(**entry["at"][split]) for split in ("train", "val")}
        progress.documents, progress.sha256 = int(entry["documents"]), str(entry["sha256"])
        progress.positions = positions
    return progress
