"""What became of a record's claim: claimed, reproduced or contested, computed from the files beside it.

`<record>/reproductions/<date>-<id8>.json` holds one reproduction or one objection, written once by whoever made
it. Nothing in it is believed further than it can be checked: its name holds a hash of its content, it names the
content of the record that it is about, and its verdict has to follow from its own numbers.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from nanorun.errors import UserError, nearest, printable
from nanorun.records.agreement import (
    Agreement,
    loss_contradiction,
    losses_by_step,
    seconds_are_near,
    widest_share,
)
from nanorun.records.record import (
    MAX_BYTES,
    RECORD_ID,
    Code,
    Hardware,
    Record,
    RecordError,
    Skipped,
    Software,
    ValidationPoint,
    check_version,
    is_utc_time,
    load_json,
    read_fields,
)

FOLDER = "reproductions"
STATES_VERSION = 1
MOST_FILES = 1000
"""Files of one record's folder of reproductions that are read; those beyond are named."""
LONGEST_NAME = 80
LONGEST_REASON = 1000
ROUNDING = 1e-9
"""Share by which arithmetic may miss a tolerance."""

_FILE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}-([0-9a-f]{8})\.json")

StateName = Literal["claimed", "reproduced", "contested"]


@dataclasses.dataclass(frozen=True)
class Reproduction:
    """A record's run made again: by whom, when, where, with which code, and what came out."""

    format_version: int
    kind: str
    """`reproduction`"""
    record: str
    """The record's id."""
    record_sha256: str
    """Of the record's content, as `content_sha256` takes it."""
    by: str
    created: str
    """ISO 8601 in UTC."""
    seed: int
    hardware: Hardware
    software: Software
    code: Code
    differences: tuple[str, ...]
    """What was otherwise when the record was made."""
    initial_weights_sha256: str
    final_weights_sha256: str
    steps: int
    validation: tuple[ValidationPoint, ...]
    final_val_loss: float
    clock: dict[str, float]
    peak_memory_mib: float
    agreement: Agreement

    def describe(self) -> str:
        """One short text: by whom, when, where and, where it disagrees, why."""
        text = f"by {short(self.by)}, {self.created[:10]}, {short(self.hardware.label)}"
        return text if self.agreement.verdict == "agrees" else f"{text}: {_why_not(self.agreement)}"


@dataclasses.dataclass(frozen=True)
class Objection:
    """Somebody's reason not to believe a record."""

    format_version: int
    kind: str
    """`objection`"""
    record: str
    record_sha256: str
    by: str
    created: str
    reason: str

    def describe(self) -> str:
        """One short text: by whom, when and why."""
        return f"by {short(self.by)}, {self.created[:10]}: {short(self.reason, 200)}"


def _why_not(found: Agreement) -> str:
    if not found.loss_agrees:
        return (
            f"loss {found.recorded_val_loss:.4f} recorded, {found.reproduced_val_loss:.4f} there "
            f"(allowed {found.loss_tolerance:.4f})"
        )
    return f"{found.recorded_seconds:.1f} s recorded, {found.reproduced_seconds:.1f} s there"


@dataclasses.dataclass(frozen=True)
class State:
    """What others found of a record."""

    reproductions: tuple[Reproduction, ...] = ()
    objections: tuple[Objection, ...] = ()
    broken: tuple[Skipped, ...] = ()
    """Files that cannot be believed, and why; they decide nothing."""

    @property
    def name(self) -> StateName:
        """contested where anybody disagrees or objects; reproduced where somebody agrees; else claimed."""
        if self.objections or any(one.agreement.verdict != "agrees" for one in self.reproductions):
            return "contested"
        return "reproduced" if self.reproductions else "claimed"

    def describe(self) -> str:
        """One line: the state, and of what decided it the newest, by whom, when and where."""
        against = [one for one in self.reproductions if one.agreement.verdict != "agrees"]
        decisive: list[Reproduction | Objection] = [*against, *self.objections] or [*self.reproductions]
        if not decisive:
            return self.name
        newest = max(decisive, key=lambda one: one.created)
        more = f" (and {len(decisive) - 1} more)" if len(decisive) > 1 else ""
        return f"{self.name} {newest.describe()}{more}"

    def to_dict(self) -> dict[str, Any]:
        """The state as JSON has it."""
        return {
            "state": self.name,
            "says": self.describe(),
            "reproductions": [_as_content(one) for one in self.reproductions],
            "objections": [_as_content(one) for one in self.objections],
            "broken": [{"path": str(path), "why": why} for path, why in self.broken],
        }


CLAIMED = State()


def state_of(folder: Path) -> State:
    """Return the state of the record in `folder`, whatever lies beside it."""
    names, broken = _file_names(folder / FOLDER)
    if not names:
        return State(broken=tuple(broken)) if broken else CLAIMED
    try:
        content = load_json(folder / "record.json")
        of_record, record = content_sha256(content), Record.from_dict(content)
    except RecordError as error:
        return State(broken=(*broken, Skipped(folder / "record.json", error.why)))
    reproductions, objections = [], []
    for name in names:
        path = folder / FOLDER / name
        try:
            one = _read_one(path, folder.name, of_record)
            if isinstance(one, Reproduction):
                _check_agreement(one, record)
        except RecordError as error:
            broken.append(Skipped(path, str(error)))
            continue
        if isinstance(one, Reproduction):
            reproductions.append(one)
        else:
            objections.append(one)
    return State(tuple(reproductions), tuple(objections), tuple(broken))


def _file_names(folder: Path) -> tuple[list[str], list[Skipped]]:
    """Names of the visible files, in order, and what stands in the way of reading all of them."""
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except FileNotFoundError:
        return [], []
    except OSError as error:
        return [], [Skipped(folder, f"cannot be read: {error.strerror}")]
    left = len(names) - MOST_FILES
    too_many = [Skipped(folder, f"holds {left} files beyond {MOST_FILES}; they were not read")]
    return names[:MOST_FILES], too_many if left > 0 else []


def _read_one(path: Path, record: str, record_sha256: str) -> Reproduction | Objection:
    """Return what one file says. Raises RecordError."""
    named = _FILE.fullmatch(path.name)
    if not named:
        raise RecordError("is no name of a reproduction; wanted the form 2026-11-24-1a2b3c4d.json")
    content = load_json(path)
    check_version(content, "the file")
    assert isinstance(content, dict)
    kinds = {"reproduction": Reproduction, "objection": Objection}
    kind = content.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise RecordError(f"is {ascii(kind)[:60]}; wanted reproduction or objection", "kind")
    one: Reproduction | Objection = read_fields(kinds[kind], content)
    if content_sha256(content)[:8] != named[1]:
        raise RecordError("was altered: its content does not have the hash in its name")
    if one.record != record:
        raise RecordError(f"is {ascii(one.record)[:60]}, beside the record {ascii(record)[:80]}", "record")
    if one.record_sha256 != record_sha256:
        raise RecordError(
            "is another than that of the record.json here, which has changed since", "record_sha256"
        )
    _check_sense(one)
    return one


def _check_sense(one: Reproduction | Objection) -> None:
    """Raise RecordError where fields that are each well formed contradict one another."""
    if not is_utc_time(one.created):
        raise RecordError(f"is {ascii(one.created)[:60]}; wanted UTC such as 2026-11-24T12:30:00Z", "created")
    if not one.by.strip():
        raise RecordError("is empty; wanted a name", "by")
    if isinstance(one, Objection):
        if not one.reason.strip():
            raise RecordError("is empty; wanted the reason", "reason")
        return
    if one.hardware.device not in ("cpu", "cuda"):
        raise RecordError(f"is {ascii(one.hardware.device)[:60]}; wanted cpu or cuda", "hardware.device")


def _check_agreement(one: Reproduction, record: Record) -> None:
    """Raise RecordError where the verdict does not follow from the record, the file's curve and its clock."""
    found = one.agreement
    agrees = found.loss_agrees and found.seconds_agree is not False
    if found.verdict != ("agrees" if agrees else "disagrees"):
        raise RecordError(
            f"is {ascii(found.verdict)[:60]}, and its own numbers say otherwise", "agreement.verdict"
        )
    apart = abs(found.recorded_val_loss - found.reproduced_val_loss)
    if found.loss_agrees and apart > found.loss_tolerance:
        raise RecordError(f"is true of losses {apart:.4g} apart", "agreement.loss_agrees")
    same_initial = one.initial_weights_sha256 == record.initial_weights_sha256
    same_final = one.final_weights_sha256 == record.final_weights_sha256
    seconds = record.clock["train_seconds"], one.clock["train_seconds"]
    expected = {
        "same_initial_weights": same_initial,
        "same_final_weights": same_final,
        "recorded_seconds": seconds[0],
        "reproduced_seconds": seconds[1],
        **_compared_losses(one, record),
    }
    for name, value in expected.items():
        if getattr(found, name) != value:
            said = ascii(getattr(found, name))[:60]
            raise RecordError(f"is {said}; the record and the run beside it say {value}", f"agreement.{name}")
    if found.seconds_agree not in (None, seconds_are_near(*seconds)):
        said = f"is {found.seconds_agree}, of {seconds[0]:.4g} and {seconds[1]:.4g} seconds"
        raise RecordError(said, "agreement.seconds_agree")
    share, kind = widest_share(record, one.seed, same_initial, same_final and one.steps == record.steps)
    widest = share * found.recorded_val_loss
    if found.loss_tolerance > widest * (1 + ROUNDING):
        said = f"is {found.loss_tolerance:.4g}; wanted at most {widest:.4g}, for {kind}"
        raise RecordError(said, "agreement.loss_tolerance")
    reproduced = losses_by_step(one.steps, one.final_val_loss, one.validation)
    against = loss_contradiction(record, reproduced, share, found.loss_tolerance)
    if found.loss_agrees and against:
        raise RecordError(f"is true, and {against}", "agreement.loss_agrees")


def _compared_losses(one: Reproduction, record: Record) -> dict[str, float]:
    """The agreement's step and losses as the record and the file's own curve have them; none without a common step."""
    recorded = losses_by_step(record.steps, record.final_val_loss, record.validation)
    reproduced = losses_by_step(one.steps, one.final_val_loss, one.validation)
    step = max(recorded.keys() & reproduced.keys(), default=None)
    if step is None:
        return {}
    return {
        "compared_step": step,
        "recorded_val_loss": recorded[step],
        "reproduced_val_loss": reproduced[step],
    }


def content_sha256(content: object) -> str:
    """Return the hash of JSON content, whatever its layout; an `id` in it is left out, as in a record's id."""
    body = (
        {key: value for key, value in content.items() if key != "id"}
        if isinstance(content, dict)
        else content
    )
    try:
        canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except RecursionError:
        raise RecordError("is nested too deeply") from None
    return hashlib.sha256(canonical.encode()).hexdigest()


def _as_content(one: Reproduction | Objection) -> dict[str, Any]:
    """The file's content as JSON has it."""
    content = dataclasses.asdict(one)
    if isinstance(one, Reproduction):
        content["validation"] = [point._asdict() for point in one.validation]
    return content


def _thinned(points: list[dict[str, Any]], every: int, agreement: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each `every`-th point of a reproduction's curve, and those that its verdict follows from."""
    needed = (agreement["compared_step"], agreement["crossing_step"], points[-1]["step"])
    return [point for place, point in enumerate(points) if place % every == 0 or point["step"] in needed]


class Written(NamedTuple):
    """A file beside a record, and what it makes of the record."""

    path: Path
    state: State


def write_beside(folder: Path, one: Reproduction | Objection) -> Written:
    """Leave `one` in the record's folder of reproductions, whole or not at all, and never over another file.

    Raises UserError when the disk refuses, when the same file is there already, or where the folder is a link: a
    record that somebody sent may have one that leads anywhere.
    """
    if os.path.islink(folder / FOLDER):
        raise UserError(
            f"{folder / FOLDER} is a link to {short(os.readlink(folder / FOLDER))!r}, and nothing is written through "
            "one; remove the link, or make it a folder"
        )
    content = json.loads(json.dumps(_as_content(one), allow_nan=False))
    text = json.dumps(content, indent=1, ensure_ascii=False)
    points, every = content.get("validation", []), 1
    while len(text.encode()) >= MAX_BYTES and every < len(points):
        every *= 2
        content["validation"] = _thinned(points, every, content["agreement"])
        text = json.dumps(content, indent=1, ensure_ascii=False)
    name = f"{one.created[:10]}-{content_sha256(content)[:8]}.json"
    path = folder / FOLDER / name
    beside = path.with_name(f".writing-{name}-{os.getpid()}")
    try:
        path.parent.mkdir(exist_ok=True)
        with open(beside, "x", encoding="utf-8", newline="\n") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        _take_name(beside, path)
    except FileExistsError:
        raise UserError(
            f"{path} exists already, and such a file is written once; remove it to write it again"
        ) from None
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); nothing of it was left. Make room or permission "
            "for it, or copy the record's folder to where you may write, under its track's name"
        ) from None
    finally:
        with suppress(OSError):
            beside.unlink()
    return Written(path, state_of(folder))


def _take_name(beside: Path, path: Path) -> None:
    """Give the finished file its name; FileExistsError where that is taken."""
    try:
        os.link(beside, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if os.path.lexists(path):
            raise FileExistsError(17, "File exists", str(path)) from None
        beside.rename(path)


def contest(text: str, *, records: Path, reason: str, by: str | None) -> dict[str, Any]:
    """Write an objection beside the record that `text` names; return what `--json` prints of it."""
    folder = find_record(text, records)
    kept = short(reason.strip(), LONGEST_REASON)
    if not kept:
        raise UserError(
            "--reason is empty: say what is wrong with the record, in a sentence that others can check"
        )
    objection = Objection(
        format_version=STATES_VERSION,
        kind="objection",
        record=folder.name,
        record_sha256=content_sha256(load_json(folder / "record.json")),
        by=who(by),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        reason=kept,
    )
    path, state = write_beside(folder, objection)
    return {"record": str(folder), "file": str(path), **state.to_dict()}


def find_record(text: str, root: Path) -> Path:
    """Return the folder of the record that `text` names: its folder, its record.json, or its id under `root`.

    Raises UserError.
    """
    given = Path(text)
    with suppress(OSError, ValueError):
        for folder in (given, given.parent if given.name == "record.json" else given):
            if (folder / "record.json").is_file():
                return folder.resolve()
    if not RECORD_ID.fullmatch(text):
        raise UserError(
            f"{short(text)!r} is neither a record's folder (it holds no record.json) nor an id such as "
            "2026-11-24-muon-1a2b3c4d"
        )
    found = sorted(path.parent for path in root.glob(f"*/{text}/record.json"))
    if len(found) == 1:
        return found[0].resolve()
    if found:
        raise UserError(f"{text} lies in {' and in '.join(map(str, found))}: give the folder that you mean")
    known = [path.parent.name for path in root.glob("*/*/record.json")]
    raise UserError(f"no record {text} under {root}: name the folder with --records.{nearest(text, known)}")


def who(by: str | None) -> str:
    """Return the name to sign with: `by`, else git's user.name, else `anonymous`; cleaned. Raises UserError."""
    if by is not None:
        name = short(" ".join(by.split()), LONGEST_NAME)
        if not name:
            raise UserError("--by is empty: give a name that others know you by, or leave it out")
        return name
    import subprocess

    try:
        done = subprocess.run(
            ["git", "config", "user.name"], capture_output=True, text=True, errors="replace", timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return "anonymous"
    return short(" ".join(done.stdout.split()), LONGEST_NAME) or "anonymous"


def short(text: str, longest: int = LONGEST_NAME) -> str:
    """Text fit for one line: control characters and direction marks as escapes, cut to `longest`."""
    shown = printable(text[: longest + 1]).replace("\n", " ")
    return shown if len(shown) <= longest else shown[: longest - 3] + "..."


def states_of(root: Path, records: Iterable[Record]) -> dict[str, State]:
    """Return the states of records under `root` by `state_key`; those that are claimed and no more are left out."""
    states = {state_key(record): state_of(root / record.track / record.id) for record in records}
    return {key: state for key, state in states.items() if state != CLAIMED}


def state_key(record: Record) -> str:
    """Return `<track>/<id>`: an id alone may lie in several tracks, with another state in each."""
    return f"{record.track}/{record.id}"
