"""An index of records, so that a report on ten thousand of them starts in a moment.

One file for each track of each folder of records, in the user's own cache (`$XDG_CACHE_HOME/nanorun/records`, else
`~/.cache/nanorun/records`), never beside the records: what comes with someone's records must not be able to say
what is in them. It can be deleted at any time. A record is taken from it only while its record.json has the same
device, inode, size, and times of modification and of change; so an edit that puts the time of modification back is
seen (on Windows, whose files have no time of change, it is not). Anything wrong with the index itself leads to the
records being read as if there were none.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nanorun.errors import UserError
from nanorun.files import write_whole
from nanorun.names import is_track_name
from nanorun.records.record import (
    FORMAT_VERSION,
    Record,
    RecordError,
    Skipped,
    ValidationPoint,
    check_sense,
    field_checks,
    holds_import,
    plain_fields,
    read_record,
    track_folders,
    visible_folders,
)

INDEX_FORMAT = 1
LEAST_RECORDS = 200
"""Fewer than this are read as quickly without an index."""
MAX_BYTES = 1_000_000_000
SETTLED_NS = 2_000_000_000
"""A file that changed less than this ago may change again within the same tick of its clock."""
SHARED = ("corpus", "code", "hardware", "software")
"""Fields that many records have in common; so are the tables of `config`."""

Key = list[int]
Entry = tuple[Key, list[Any]]
"""The key of a record.json, and the record's fields in their order, shared ones as places in the pool."""


def indexed_records(
    root: Path, track: str | None, target_of: Callable[[str], float | None]
) -> tuple[list[Record], list[Skipped]]:
    """Return what `read_records` returns, with curves thinned to the points that a table needs.

    Those are the first crossing of the record's own target and of the track's (`target_of` its name), the best
    point and the last; `validation_left_out` counts the others.
    """
    records: list[Record] = []
    skipped: list[Skipped] = []
    with _without_collections():
        for track_folder in track_folders(root, track):
            found, broken = _records_of(track_folder, target_of(track_folder.name))
            records += found
            skipped += broken
    return records, skipped


@contextmanager
def _without_collections() -> Iterator[None]:
    """Keep the garbage collector from searching a million new objects, none of which is garbage: half the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _records_of(track_folder: Path, target: float | None) -> tuple[list[Record], list[Skipped]]:
    folders = visible_folders(track_folder)
    place = _index_place(track_folder) if len(folders) >= LEAST_RECORDS else None
    index = _read_index(place, track_folder.name, target) if place else _Index()
    fresh = _Index()
    skipped: list[Skipped] = []
    for folder in folders:
        key = _key(folder)
        known = index.records.get(folder.name)
        if known is not None and key == known[0]:
            fresh.records[folder.name] = known
            continue
        began = time.time_ns()
        try:
            record = thinned(read_record(folder), target)
        except RecordError as error:
            if not holds_import(folder):
                skipped.append(Skipped(folder, str(error)))
            continue
        # Whatever changed while it was read, or a moment before, is read again next time.
        settled = key is not None and key == _key(folder) and began - max(key[3:]) > SETTLED_NS
        fresh.records[folder.name] = (key if settled else None, record)
    if place and fresh.keys() != index.keys():
        with suppress(UserError):
            write_whole(place, _index_text(fresh, target), mend="")
    return [record for _, record in fresh.records.values()], skipped


@dataclasses.dataclass
class _Index:
    """Records by their id, in order, each with the key of its file; None for one that is not to be kept."""

    records: dict[str, tuple[Key | None, Record]] = dataclasses.field(default_factory=dict)

    def keys(self) -> dict[str, Key]:
        """The key of each record that is to be kept."""
        return {name: key for name, (key, _) in self.records.items() if key is not None}


def _index_place(track_folder: Path) -> Path | None:
    """Where the index of a track's folder lies; None where there can be none."""
    if not is_track_name(track_folder.name):
        return None
    cache = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = (Path(cache) if cache else Path.home() / ".cache") / "nanorun" / "records"
        where = os.fsencode(os.path.realpath(track_folder))
    except (OSError, RuntimeError, ValueError):
        return None
    return folder / f"{track_folder.name}-{hashlib.sha256(where).hexdigest()[:16]}.json"


def _key(folder: Path) -> Key | None:
    """What tells whether a record.json is still the file it was; None for no regular file."""
    try:
        found = os.stat(f"{folder}/record.json")
    except (OSError, ValueError):
        return None
    if not stat.S_ISREG(found.st_mode):
        return None
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def thinned(record: Record, target: float | None) -> Record:
    """Return the record with only those points of its curve that a table of its track needs."""
    points = record.validation
    if not points:
        return record
    crossings = (
        next((point for point in points if point.val_loss <= limit), None)
        for limit in (record.target_val_loss, target)
        if limit is not None
    )
    best = min(points, key=lambda point: point.val_loss)
    needed = {point.step for point in (*crossings, best, points[-1]) if point is not None}
    kept = tuple(point for point in points if point.step in needed)
    left_out = record.validation_left_out + len(points) - len(kept)
    return dataclasses.replace(record, validation=kept, validation_left_out=left_out)


def _index_text(index: _Index, target: float | None) -> str:
    """The index as a file: a line with the hash of the rest, then JSON."""
    pool = _Pool()
    entries = [(key, pool.packed(record)) for key, record in index.records.values() if key is not None]
    body = json.dumps(
        {
            "format": INDEX_FORMAT,
            "target": target,
            "fields": list(field_checks()),
            "pool": pool.values,
            "entries": entries,
        },
        separators=(",", ":"),
        allow_nan=False,
    )
    return f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}"


class _Pool:
    """Values that several records have in common, each held once: (field, value)."""

    def __init__(self) -> None:
        self.values: list[tuple[str, Any]] = []
        self._by_id: dict[int, int] = {}
        self._by_text: dict[str, int] = {}

    def packed(self, record: Record) -> list[Any]:
        """The fields of a record in their order, shared ones as places in the pool."""
        fields = {name: getattr(record, name) for name in field_checks()}
        for name in SHARED:
            fields[name] = self._place(name, fields[name])
        # Tables become places, and all else stays; the two lists keep the order of the keys.
        config = fields["config"]
        fields["config"] = [
            list(config),
            [
                self._place("config", value) if isinstance(value, dict) else [value]
                for value in config.values()
            ],
        ]
        if fields["reached"] is not None:
            fields["reached"] = vars(fields["reached"])
        return list(fields.values())

    def _place(self, name: str, value: Any) -> int:
        """Where a value lies in the pool, put there if it is new."""
        # The address is only a short cut: the record that holds the value outlives the pool.
        if id(value) not in self._by_id:
            plain = plain_fields(value) if dataclasses.is_dataclass(value) else value
            text = f"{name} {json.dumps(plain)}"
            if text not in self._by_text:
                self._by_text[text] = len(self.values)
                self.values.append((name, plain))
            self._by_id[id(value)] = self._by_text[text]
        return self._by_id[id(value)]


def _read_index(place: Path, track: str, target: float | None) -> _Index:
    """The index in a file; an empty one where it is missing, broken, of another format or of another target."""
    try:
        with open(place, "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_BYTES:
                return _Index()
            digest, _, body = file.read(MAX_BYTES).partition(b"\n")
        if hashlib.sha256(body).hexdigest().encode() != digest:
            return _Index()
        content = json.loads(body)
        checks = field_checks()
        if (content["format"], content["target"], content["fields"]) != (INDEX_FORMAT, target, list(checks)):
            return _Index()
        pool = [(name, checks[name](value)) for name, value in content["pool"]]
        return _Index(dict(_unpacked(content["entries"], track, pool, checks)))
    # The hash holds for what we wrote; what someone else wrote under it may be anything.
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError):
        return _Index()


def _unpacked(
    entries: Iterable[Entry],
    track: str,
    pool: Sequence[tuple[str, Any]],
    checks: dict[str, Callable[[Any], Any]],
) -> Iterable[tuple[str, tuple[Key | None, Record]]]:
    """The records of an index, each field checked as if it came from a record.json."""
    names = list(checks)
    own = [(name, check) for name, check in checks.items() if name not in (*SHARED, "config", "validation")]
    for key, values in entries:
        fields = dict(zip(names, values, strict=True))
        for name in SHARED:
            fields[name] = _from_pool(pool, name, fields[name])
        fields["config"] = _config(fields["config"], pool, checks["config"])
        points = [dict(zip(ValidationPoint._fields, point, strict=True)) for point in fields["validation"]]
        fields["validation"] = checks["validation"](points)
        for name, check in own:
            fields[name] = check(fields[name])
        record = Record(**fields)
        check_sense(record)
        if record.track != track or not 1 <= record.format_version <= FORMAT_VERSION:
            raise ValueError(f"{record.id} is of track {record.track}, version {record.format_version}")
        yield record.id, (key, record)


def _config(
    packed: Sequence[Any], pool: Sequence[tuple[str, Any]], check: Callable[[Any], Any]
) -> dict[str, Any]:
    """A config from its titles and their values: places of tables in the pool, all else in lists of one."""
    titles, values = packed
    pairs = dict(zip(titles, values, strict=True))
    check({title: one[0] if type(one) is list else None for title, one in pairs.items()})
    return {
        title: one[0] if type(one) is list else _from_pool(pool, "config", one)
        for title, one in pairs.items()
    }


def _from_pool(pool: Sequence[tuple[str, Any]], name: str, place: int) -> Any:
    kind, value = pool[place]
    if kind != name:
        raise ValueError(f"place {place} holds {kind}, not {name}")
    return value
