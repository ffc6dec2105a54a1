"""What one run leaves behind: `records/<track>/<id>/`, written once and read back strictly.

Plain dataclasses, because `nanorun report` reads a thousand of these and still has to start in a moment.
Whatever a file holds, reading it ends in a `Record` or in one sentence that names the field; a broken record
never hides the good ones beside it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import stat
import types
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from nanorun.errors import UserError
from nanorun.names import NO_TRACK, is_track_name

FORMAT_VERSION = 1
IMPORT_FILE = "import.json"
"""What a folder holds instead of a record.json when it comes from a foreign log; see `imported`."""
MAX_BYTES = 100_000
"""A record.json is smaller than this, written or read."""

LARGEST_NUMBER = 1e50
"""No number of a record is as large: all that float32 can hold is far below, and a square is still a number."""

RECORD_ID = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}-[a-z0-9._-]{1,60}-[0-9a-f]{8}")
_CREATED = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?(Z|\+00:00)")
_CLOCK_KEYS = tuple(f"{what}_seconds" for what in ("train", "compile", "validation", "checkpoint", "total"))
_DEEPEST_CONFIG = 16


class RecordError(UserError):
    """A record that cannot be believed; the message names the field, what it holds and what was wanted."""

    def __init__(self, why: str, path: str = "") -> None:
        super().__init__(f"{path} {why}".strip())
        self.why, self.path = why, path

    def within(self, name: str) -> RecordError:
        """The same error, seen from the object that holds it."""
        joint = "." if self.path and not self.path.startswith("[") else ""
        return RecordError(self.why, f"{name}{joint}{self.path}")


class ValidationPoint(NamedTuple):
    """One reading of the validation loss; `train_seconds` are counted seconds."""

    step: int
    tokens: int
    train_seconds: float
    val_loss: float


@dataclasses.dataclass(frozen=True)
class Reached:
    """The first validation at or under the target."""

    step: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class MixedCorpus:
    """One of several corpora that a run trained on."""

    name: str
    share: float
    """Of the run's rows; those of a mix add up to 1."""
    manifest_sha256: str


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The data a run was made on, by the hash of its manifest."""

    name: str
    tokenizer: str
    vocab_size: int
    manifest_sha256: str
    train_tokens: int
    val_tokens: int
    mix: tuple[MixedCorpus, ...] = ()
    """What the run trained on instead, where it was a mix of corpora; it was validated on this one all the same."""

    @property
    def mix_label(self) -> str:
        """The mix in one short text, the largest share first; runs whose labels differ are never averaged."""
        ordered = sorted(self.mix, key=lambda one: (-one.share, one.manifest_sha256))
        return ", ".join(f"{one.name}:{one.share:.9g} ({one.manifest_sha256[:16]})" for one in ordered)


@dataclasses.dataclass(frozen=True)
class Code:
    """The code that ran: a commit and, where the tree differed from it, the patch beside the record."""

    version: str
    commit: str | None
    dirty: bool
    patch: str | None
    outside: str = ""
    """File and hash of each optimizer that came from outside; the patch holds its text."""
    patch_sha256: str = ""
    """Of the patch as the run left it; empty in records that are older than this key."""


@dataclasses.dataclass(frozen=True)
class Hardware:
    """The machine, as far as it decides how long a step takes."""

    device: str
    device_name: str
    n_devices: int
    cpu_name: str
    n_cpus: int
    n_threads: int
    memory_gib: float
    earlier: str = ""
    """Label of the machine that earlier parts of a resumed run were made on, where that was another."""

    @property
    def label(self) -> str:
        """One short text; runs whose labels differ are never averaged."""
        return f"{self.earlier} then {self._present}" if self.earlier else self._present

    @property
    def _present(self) -> str:
        if self.device == "cuda":
            return f"{self.n_devices} × {self.device_name}"
        name = " ".join(re.sub(r"\((R|TM|r|tm)\)|\bCPU\b", " ", self.cpu_name).split()) or "unnamed CPU"
        ranks = f", {self.n_devices} ranks" if self.n_devices > 1 else ""
        return f"{name}, {self.n_threads} of {self.n_cpus} cores{ranks}"


@dataclasses.dataclass(frozen=True)
class Software:
    """Versions, and how the training step was made of them."""

    python: str
    platform: str
    torch: str
    numpy: str
    compiled: bool
    deterministic: bool = False
    """Torch used deterministic algorithms alone (`--deterministic`); it was off where an older record does not say."""
    kernels: bool = False
    """Eager passes in fp32 on a CPU ran by nanorun's own kernels; older records are from before there were any."""


@dataclasses.dataclass(frozen=True)
class Record:
    """One run: what it was, where it ran, every reading of its loss and every total of its clock."""

    format_version: int
    id: str
    track: str
    name: str
    """The preset's name, as in `--optim muon`."""
    optimizer: str
    """The algorithms by role, a short text such as `muon + adamw`."""
    created: str
    """ISO 8601 in UTC."""
    seed: int
    config: dict[str, Any]
    """The whole resolved config."""
    n_parameters: int
    initial_weights_sha256: str
    final_weights_sha256: str
    corpus: Corpus
    code: Code
    hardware: Hardware
    software: Software
    target_val_loss: float
    validation_tokens: int
    """Validation tokens predicted in each reading."""
    stop_at_target: bool
    """The run was allowed to end on its own validation loss, so its last loss is no fair sample."""
    completed: bool
    """The declared last step was reached."""
    declared_steps: int
    steps: int
    tokens: int
    validation: tuple[ValidationPoint, ...]
    reached: Reached | None
    final_val_loss: float
    bits_per_byte: float | None
    clock: dict[str, float]
    """The totals of `_CLOCK_KEYS` and any other `*_seconds`, one for each reason the clock was paused."""
    peak_memory_mib: float
    resumed: int
    optimizer_state_bytes: int
    validation_left_out: int = 0
    """Points that only curve.csv holds, because record.json would have grown too large."""
    skipped_steps: int = 0
    """Steps whose loss or gradient was not finite and whose update was left out, as `--skip-bad-steps` allows."""
    inexact: str = ""
    """What changed when the run was taken up again, where its bits are not those of a run never stopped."""

    @classmethod
    def from_dict(cls, content: object) -> Record:
        """Return the record that `content` describes; it ignores keys it does not know.

        Raises RecordError.
        """
        check_version(content)
        record: Record = read_fields(cls, content)
        check_sense(record)
        return record

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON has it."""
        out: dict[str, Any] = {}
        for name in _names_of(Record):
            value = getattr(self, name)
            out[name] = plain_fields(value) if dataclasses.is_dataclass(value) else value
        out["validation"] = [point._asdict() for point in self.validation]
        return out


def plain_fields(value: Any) -> dict[str, Any]:
    """Return a part of a record as JSON has it; a corpus without a mix does not name one."""
    fields: dict[str, Any] = vars(value).copy()
    if isinstance(value, Corpus):
        del fields["mix"]
        if value.mix:
            fields["mix"] = [vars(one).copy() for one in value.mix]
    return fields


class Skipped(NamedTuple):
    """A folder that holds no record we can believe, and why."""

    path: Path
    why: str


def record_id(created: str, name: str, content: Mapping[str, Any]) -> str:
    """Return `2026-11-24-muon-1a2b3c4d`: the day, the name made safe for paths, and a hash of the content.

    An `id` in the content is left out of the hash.
    """
    body = {key: value for key, value in content.items() if key != "id"}
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    safe = re.sub(r"[^a-z0-9._-]+", "-", name.lower())[:60].strip("-.") or "run"
    return f"{created[:10]}-{safe}-{hashlib.sha256(canonical.encode()).hexdigest()[:8]}"


def write_record(root: Path, record: Record, *, config_toml: str, source_patch: str | None) -> Path:
    """Return `<root>/<track>/<id>`, filled with record.json, config.toml, curve.csv and any source.patch.

    Raises UserError when the disk refuses, or when the record exists or would not be readable.
    """
    if record.code.patch != (None if source_patch is None else "source.patch"):
        raise RecordError(f"is {record.code.patch!r}, which does not fit the patch handed over", "code.patch")
    text = _fitting_json(Record.from_dict(record.to_dict()))
    files = {"record.json": text, "config.toml": config_toml, "curve.csv": _curve_csv(record)}
    if source_patch is not None:
        files["source.patch"] = source_patch
    return write_folder(root / record.track / record.id, files)


def write_folder(folder: Path, files: Mapping[str, str]) -> Path:
    """Return the record's new folder with its files, all or nothing: it is filled beside its place and renamed.

    Never overwrites. Raises UserError when the disk refuses, or when the folder exists.
    """
    if os.path.lexists(folder):
        raise UserError(
            f"{folder} exists already, and a record is written once; move it away to write it again"
        )
    beside = folder.parent / f".writing-{folder.name}-{os.getpid()}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _fill(beside, files)
        beside.rename(folder)
    except OSError as error:
        raise UserError(
            f"the record could not be written to {folder}: {error.strerror or error}. Nothing of it was left "
            "there; make room or permission for it, or choose another folder with --records"
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def read_record(folder: Path) -> Record:
    """Return the record in `folder`, which must bear its id and lie under its track. Raises RecordError."""
    record = Record.from_dict(load_json(folder / "record.json"))
    if record.id != folder.name:
        raise RecordError(
            f"is {_shown(record.id)} in a folder named {_shown(folder.name)}; they must agree", "id"
        )
    if record.track != folder.parent.name:
        raise RecordError(
            f"is {_shown(record.track)}, in the folder of track {_shown(folder.parent.name)}; move it",
            "track",
        )
    return record


def read_records(root: Path, track: str | None = None) -> tuple[list[Record], list[Skipped]]:
    """Return the records under `root`, of one track or of all, and the folders that were skipped, with why.

    A root or a track that is not there holds no records.
    """
    records: list[Record] = []
    skipped: list[Skipped] = []
    for track_folder in track_folders(root, track):
        for folder in visible_folders(track_folder):
            try:
                records.append(read_record(folder))
            except RecordError as error:
                if not holds_import(folder):
                    skipped.append(Skipped(folder, str(error)))
    return records, skipped


def holds_import(folder: Path) -> bool:
    """Whether a folder holds what was imported from a foreign log, and no record of ours."""
    # Path.exists raises for a folder that may not be searched.
    return os.path.exists(folder / IMPORT_FILE) and not os.path.lexists(folder / "record.json")


def track_folders(root: Path, track: str | None = None) -> list[Path]:
    """Return the folder of one track, there or not, or those of all tracks under `root`."""
    folders = visible_folders(root) if track is None else [root / track]
    return [folder for folder in folders if folder.name not in NO_TRACK]


def visible_folders(parent: Path) -> list[Path]:
    """Return the visible folders in `parent`, in order of name; none when it is not there."""
    try:
        with os.scandir(parent) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir() and entry.name[0] not in "._")
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"{parent} cannot be read: {error.strerror}") from error
    return [parent / name for name in names]


def load_json(path: Path) -> object:
    """The JSON in `path`; a pipe, a giant or nonsense is an error, never a hang or a traceback."""
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise RecordError("is not a regular file")
        if found.st_size >= MAX_BYTES:
            raise RecordError(f"has {found.st_size:,} bytes; wanted fewer than {MAX_BYTES:,}")
        with open(path, "rb") as file:
            return _DECODER.decode(file.read(MAX_BYTES).decode("utf-8"))
    except FileNotFoundError:
        why = "is missing"
    except OSError as error:
        why = f"cannot be read: {error.strerror}"
    except UnicodeDecodeError as error:
        why = f"is not UTF-8 at byte {error.start}"
    except json.JSONDecodeError as error:
        why = f"is not whole JSON: {error}"
    except RecursionError:
        why = "is nested too deeply"
    except RecordError as error:
        why = error.why
    except ValueError as error:
        why = f"cannot be read: {error}"
    raise RecordError(why, path.name)


def _refuse_constant(name: str) -> float:
    raise RecordError(f"holds {name}, which is no JSON number")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def check_version(content: object, what: str = "the record") -> None:
    """Raise RecordError for another version; asked before all else, because it may differ in anything."""
    if not isinstance(content, dict):
        raise RecordError(f"is {_shown(content)}; wanted an object", what)
    if "format_version" not in content:
        raise RecordError("is missing", "format_version")
    version = content["format_version"]
    if type(version) is not int or version < 1:
        raise RecordError(f"is {_shown(version)}; wanted {FORMAT_VERSION}", "format_version")
    if version > FORMAT_VERSION:
        raise RecordError(
            f"is {version}, and this nanorun reads up to {FORMAT_VERSION}; upgrade nanorun to read it",
            "format_version",
        )


def check_sense(record: Record) -> None:
    """Return nothing, or raise RecordError where fields that are each well formed contradict one another."""
    _check_words(record)
    if record.steps > record.declared_steps:
        raise RecordError(f"is {record.steps}, beyond the declared {record.declared_steps}", "steps")
    if record.completed and record.steps != record.declared_steps:
        raise RecordError(
            f"is true after {record.steps} of {record.declared_steps} declared steps", "completed"
        )
    if not record.validation:
        return
    target = record.target_val_loss
    crossing = next((point for point in record.validation if point.val_loss <= target), None)
    step = crossing.step if crossing else None
    claimed = record.reached.step if record.reached else None
    if step != claimed:
        raise RecordError(f"says step {claimed}, and the validation points say step {step}", "reached")
    if crossing and record.reached and not _same_seconds(record.reached.seconds, crossing.train_seconds):
        raise RecordError(
            f"is {record.reached.seconds}, and the validation point of step {step} says {crossing.train_seconds}",
            "reached.seconds",
        )
    last = record.validation[-1]
    if last.step == record.steps and not math.isclose(last.val_loss, record.final_val_loss, rel_tol=1e-6):
        raise RecordError(
            f"is {record.final_val_loss}, and the last validation says {last.val_loss}", "final_val_loss"
        )


def _same_seconds(one: float, other: float) -> bool:
    """Whether two readings of one moment agree; clocks are written in tenths of milliseconds."""
    return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-3)


def _check_words(record: Record) -> None:
    """Raise RecordError for a text that is not of its form; ids and tracks become paths."""
    if not RECORD_ID.fullmatch(record.id):
        raise RecordError(f"is {_shown(record.id)}; wanted the form 2026-11-24-muon-1a2b3c4d", "id")
    if not is_track_name(record.track):
        raise RecordError(f"is {_shown(record.track)}; wanted a track's name", "track")
    if not record.name.strip():
        raise RecordError("is empty; wanted the preset's name", "name")
    if not is_utc_time(record.created):
        raise RecordError(f"is {_shown(record.created)}; wanted UTC such as 2026-11-24T12:30:00Z", "created")
    if record.hardware.device not in ("cpu", "cuda"):
        raise RecordError(f"is {_shown(record.hardware.device)}; wanted cpu or cuda", "hardware.device")
    if any(not 0 < one.share <= 1 for one in record.corpus.mix):
        raise RecordError("holds a share that is not above 0 and at most 1", "corpus.mix")
    if record.code.patch not in (None, "source.patch"):
        raise RecordError(f"is {_shown(record.code.patch)}; wanted null or source.patch", "code.patch")


def is_utc_time(text: str) -> bool:
    import datetime

    if not _CREATED.fullmatch(text):
        return False
    try:
        datetime.datetime.fromisoformat(text)
    except ValueError:
        return False
    return True


def read_fields(cls: Any, value: object) -> Any:
    """Return a `cls` made of the JSON object `value`, each field checked by its annotation."""
    if not isinstance(value, dict):
        raise RecordError(f"is {_shown(value)}; wanted an object")
    found = {}
    for name, check, needed in _checks_of(cls):
        if name in value:
            try:
                found[name] = check(value[name])
            except RecordError as error:
                raise error.within(name) from None
        elif needed:
            raise RecordError("is missing", name)
    return cls(**found)


@cache
def _names_of(cls: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(cls))


@cache
def _checks_of(cls: type) -> tuple[tuple[str, Callable[[Any], Any], bool], ...]:
    """(name, check, must be there) of each field of a dataclass."""
    hints = get_type_hints(cls)
    return tuple(
        (field.name, _check_for(hints[field.name]), field.default is dataclasses.MISSING)
        for field in dataclasses.fields(cls)
    )


def field_checks() -> dict[str, Callable[[Any], Any]]:
    """Return for each field of a record, in their order, what turns its JSON into its value or raises RecordError."""
    return {name: check for name, check, _ in _checks_of(Record)}


def _check_for(hint: Any) -> Callable[[Any], Any]:
    """The function that checks a value against one annotation."""
    simple: dict[Any, Callable[[Any], Any]] = {
        int: _whole_number,
        float: _number,
        str: _text,
        bool: _flag,
        dict[str, Any]: _config,
        dict[str, float]: _clock,
        tuple[ValidationPoint, ...]: _curve,
    }
    if hint in simple:
        return simple[hint]
    if get_origin(hint) is types.UnionType:
        inner = _check_for(get_args(hint)[0])
        return lambda value: None if value is None else inner(value)
    if get_origin(hint) is tuple:
        return partial(_list_of, _check_for(get_args(hint)[0]))
    if get_origin(hint) is list:
        each = _check_for(get_args(hint)[0])
        return lambda value: list(_list_of(each, value))
    return partial(read_fields, hint)


def _shown(value: object) -> str:
    """The start of a value, fit for a message: no control characters, no megabytes."""
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _number(value: object) -> float:
    if type(value) is float and 0.0 <= value < LARGEST_NUMBER:
        return value
    if type(value) is int and 0 <= value < 2**63:
        return float(value)
    raise RecordError(f"is {_shown(value)}; wanted a number of 0 or more and below {LARGEST_NUMBER:g}")


def _whole_number(value: object) -> int:
    if type(value) is int and 0 <= value < 2**63:
        return value
    raise RecordError(f"is {_shown(value)}; wanted a whole number of 0 or more")


def _flag(value: object) -> bool:
    if type(value) is bool:
        return value
    raise RecordError(f"is {_shown(value)}; wanted true or false")


def _text(value: object) -> str:
    if type(value) is not str:
        raise RecordError(f"is {_shown(value)}; wanted a text")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise RecordError(f"is {_shown(value)}, which holds half a character") from None
    return value


def _list_of(check: Callable[[Any], Any], value: object) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise RecordError(f"is {_shown(value)}; wanted a list")
    found = []
    for index, item in enumerate(value):
        try:
            found.append(check(item))
        except RecordError as error:
            raise error.within(f"[{index}]") from None
    return tuple(found)


def _config(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RecordError(f"is {_shown(value)}; wanted an object")
    _check_plain(value, _DEEPEST_CONFIG)
    return value


def _check_plain(value: object, depth: int) -> None:
    """Raise RecordError unless `value` is finite JSON of at most `depth` levels."""
    if depth < 0:
        raise RecordError(f"is nested more than {_DEEPEST_CONFIG} levels deep")
    if isinstance(value, Mapping):
        for name, inner in value.items():
            try:
                _text(name)
                _check_plain(inner, depth - 1)
            except RecordError as error:
                raise error.within(_shown(name).strip("'")) from None
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_plain(inner, depth - 1)
    elif isinstance(value, str):
        _text(value)
    elif isinstance(value, float) and not math.isfinite(value):
        raise RecordError(f"is {value}; wanted a finite number")
    elif not isinstance(value, int | float | None):
        raise RecordError(f"is {_shown(value)}; wanted what JSON can hold")


def _clock(value: object) -> dict[str, float]:
    if not isinstance(value, dict):
        raise RecordError(f"is {_shown(value)}; wanted an object")
    for key in _CLOCK_KEYS:
        if key not in value:
            raise RecordError("is missing", key)
    totals = {}
    for key, seconds in value.items():
        if key.endswith("_seconds"):
            try:
                totals[_text(key)] = _number(seconds)
            except RecordError as error:
                raise error.within(_shown(key).strip("'")) from None
    return totals


def _curve(value: object) -> tuple[ValidationPoint, ...]:
    """The validation points, in order of their steps; there are hundreds, so the good case is kept short."""
    if not isinstance(value, list):
        raise RecordError(f"is {_shown(value)}; wanted a list")
    points = []
    before = -1
    for index, item in enumerate(value):
        try:
            point = ValidationPoint(
                _whole_number(item["step"]),
                _whole_number(item["tokens"]),
                _number(item["train_seconds"]),
                _number(item["val_loss"]),
            )
        except (RecordError, KeyError, TypeError):
            raise _point_error(item).within(f"[{index}]") from None
        if point.step <= before:
            raise RecordError(f"is step {point.step} after step {before}; wanted rising steps", f"[{index}]")
        before = point.step
        points.append(point)
    return tuple(points)


def _point_error(item: object) -> RecordError:
    """What is wrong with a validation point that could not be read."""
    if not isinstance(item, dict):
        return RecordError(f"is {_shown(item)}; wanted an object")
    for name in ValidationPoint._fields:
        if name not in item:
            return RecordError("is missing", name)
        try:
            (_whole_number if name in ("step", "tokens") else _number)(item[name])
        except RecordError as error:
            return error.within(name)
    raise AssertionError(f"nothing is wrong with {item}")


def _fitting_json(record: Record) -> str:
    """record.json, its curve thinned as far as its size asks; it then says how many points it lacks."""
    text = layout_json(record.to_dict())
    every = 1
    while len(text.encode()) >= MAX_BYTES and every < len(record.validation):
        every *= 2
        points = _thinned(record, every)
        left_out = record.validation_left_out + len(record.validation) - len(points)
        text = layout_json(
            dataclasses.replace(record, validation=points, validation_left_out=left_out).to_dict()
        )
    if len(text.encode()) >= MAX_BYTES:
        raise UserError(
            f"record.json would have {len(text.encode()):,} bytes even without its curve, and a record has "
            f"fewer than {MAX_BYTES:,}; shorten what the config holds"
        )
    return text


def _thinned(record: Record, every: int) -> tuple[ValidationPoint, ...]:
    """Each `every`-th point, and those that mean something: first, crossing, best and last."""
    points = record.validation
    crossing = record.reached.step if record.reached else None
    best = min(points, key=lambda point: point.val_loss)
    last = len(points) - 1
    return tuple(
        point
        for index, point in enumerate(points)
        if index % every == 0 or index == last or point.step == crossing or point is best
    )


def layout_json(content: Mapping[str, Any]) -> str:
    """Return JSON with one line for each field and each point of `validation`: short, and kind to diffs."""
    points = ",\n".join("  " + _json(point) for point in content["validation"])
    lines = []
    for name, value in content.items():
        body = f"[\n{points}\n ]" if name == "validation" and value else _json(value)
        lines.append(f' "{name}": {body}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _curve_csv(record: Record) -> str:
    rows = [",".join(ValidationPoint._fields)]
    rows += [",".join(map(repr, point)) for point in record.validation]
    return "\n".join(rows) + "\n"


def _fill(folder: Path, files: Mapping[str, str]) -> None:
    """Write the files into a new folder and see them onto the disk."""
    folder.mkdir()
    for name, text in files.items():
        with open(folder / name, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
