"""Which run a command means: a new one, or one begun before that it takes up again."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from nanorun.config import RunConfig, make_config
from nanorun.errors import UserError, shown
from nanorun.files import LOCK_NAME, write_whole
from nanorun.records.record import RecordError, load_json
from nanorun.tables import flattened, read_toml, to_toml
from nanorun.training import checkpoint
from nanorun.training.distributed import Ranks

RESTARTS = ".torchrun"
"""Under the folder of runs: which run each of torchrun's workers was on, by torchrun's id and the run's config."""
INTERRUPTIONS = "interruptions.jsonl"
METRICS = "metrics.jsonl"
MOST_LOST_SECONDS = 1e9
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Begun:
    """A run's folder as it was found."""

    folder: str = ""
    """Where the run lies or shall lie; "" lets it take a new folder."""
    resumes: bool = False
    """There is a checkpoint to go on from."""
    again: bool = False
    """A run began there that ended before it saved anything; it begins once more."""
    result: dict[str, Any] | None = None
    """What a finished run ended with."""


def check_run_name(name: str) -> None:
    """Raise UserError unless `name` is that of a folder right under the folder of runs."""
    if not _RUN_NAME.fullmatch(name):
        raise UserError(
            f"--run-name {shown(name)[:100]!r}: wanted the name of one folder, of letters, digits, dots, dashes and "
            "underscores, at most 100, a letter or digit first"
        )


def begun_before(config: RunConfig, *, runs: Path, name: str, ranks: Ranks) -> Begun:
    """Return what is there already of the run that `name` names, or that torchrun restarts; all ranks agree.

    Raises UserError where the folder of that name holds a run with another config.
    """
    found = Begun()
    # Between hosts only the torchrun whose ranks died counts a restart.
    restarted = ranks.any(bool(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") or 0)))
    if ranks.leads:
        if name:
            found = _look_into(runs / name, config)
        elif restarted:
            with suppress(OSError):
                noted = _note(runs, config).read_text(errors="replace")
                if noted not in ("", "..") and noted == Path(noted).name:
                    found = _look_into(runs / noted, config)
        else:
            _forget_earlier_jobs(runs)
    return Begun(**json.loads(ranks.broadcast_text(json.dumps(asdict(found)))))


def note_for_restarts(folder: Path, config: RunConfig) -> None:
    """Note which folder a new run has, so that torchrun's restart of it finds it again."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        write_whole(_note(folder.parent, config), folder.name, mend="free some disk")


def _forget_earlier_jobs(runs: Path) -> None:
    """Remove the notes of a torchrun that had the same id before this one: its seeds are not ours to take up."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    with suppress(OSError, psutil.Error):
        began = psutil.Process(os.getppid()).create_time()
        for note in (runs / RESTARTS).glob(f"{_job()}-{'[0-9a-f]' * 16}"):
            if note.stat().st_mtime < began:
                note.unlink()


def _note(runs: Path, config: RunConfig) -> Path:
    return runs / RESTARTS / f"{_job()}-{checkpoint.hash_of_text(to_toml(config.model_dump()))[:16]}"


def _job() -> str:
    # Without an id of its own a torchrun is told from others by its process, which outlives its workers.
    agent = os.environ["TORCHELASTIC_RUN_ID"]
    agent = f"{agent}-{os.getppid()}" if agent == "none" else agent
    return re.sub(r"[^A-Za-z0-9._-]", "_", agent)[:80]


def _look_into(folder: Path, config: RunConfig) -> Begun:
    if not (folder / "config.toml").is_file():
        _check_holds_nothing(folder)
        return Begun(str(folder))
    _check_same_config(folder, config)
    if not (folder / "result.json").exists():
        resumes = bool(checkpoint.checkpoints(folder / "checkpoints"))
        return Begun(str(folder), resumes=resumes, again=not resumes)
    try:
        result = load_json(folder / "result.json")
        if not isinstance(result, dict) or type(result.get("final_val_loss")) not in (int, float):
            raise RecordError("holds no result of a run")
    except RecordError as error:
        raise UserError(
            f"{folder}/result.json is broken ({error}): remove it to end the run once more"
        ) from None
    return Begun(str(folder), result=result)


def _check_holds_nothing(folder: Path) -> None:
    """Raise UserError for a folder that holds something and no run: what lies there is the user's own."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    # A run that was killed as it began may have left these.
    own = [name for name in names if name != LOCK_NAME and not re.fullmatch(r"\.config\..*\.partial", name)]
    if own:
        raise UserError(
            f"{folder} holds no run (no config.toml there), but {shown(own[0])}: choose another --run NAME, or move "
            "that folder away"
        )


@contextmanager
def leaving_no_empty_folder(folder: Path, ranks: Ranks, begun: Begun) -> Iterator[None]:
    """Remove the folder of a new run that ends before its first step: it holds nothing to resume."""
    try:
        yield
    except BaseException:
        if ranks.leads and not begun.resumes and not begun.again:
            remove_new_run(folder)
        raise


def remove_new_run(folder: Path) -> None:
    """Remove the files of a run that came to nothing: the config last, the lock, which is held still, not at all.

    What is removed half way is a run that begins again. Whoever holds the lock removes it, and the empty folder.
    """
    with suppress(OSError):
        for path in sorted(folder.iterdir(), key=lambda path: path.name == "config.toml"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != LOCK_NAME:
                path.unlink()
        folder.rmdir()


def _check_same_config(folder: Path, config: RunConfig) -> None:
    """Raise UserError that names what differs between a run's config and the one asked for."""
    path = folder / "config.toml"
    # Keys that came later than the run have their defaults in it: what it did before there was a choice.
    begun = make_config(read_toml(path), where=str(path))
    there, asked = (flattened(tomllib.loads(to_toml(one.model_dump()))) for one in (begun, config))
    keys = [key for key in {**there, **asked} if there.get(key) != asked.get(key)]
    if keys:
        key = keys[0]
        more = f", and {len(keys) - 1} more" if len(keys) > 1 else ""
        raise UserError(
            f"{folder} is another run: {key} = {there.get(key)!r} there, and {asked.get(key)!r} is asked for{more}. "
            "Choose another --run-name NAME, or leave the option out"
        )


def note_interruption(folder: Path, *, after_step: int, saved: float) -> tuple[float, int]:
    """Note that the run in `folder` is taken up; return the seconds of work lost so far and how often that was.

    Lost is what lies between a checkpoint, written at `saved` (Unix time), or the beginning of the part that
    ended, and the last sign of life, which is the newest line of the metrics.
    """
    path = folder / INTERRUPTIONS
    entries = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        with suppress(ValueError, KeyError, TypeError, RecursionError):  # a line cut off
            one = json.loads(line)
            at, lost = float(one["at"]), float(one["lost_seconds"])
            if math.isfinite(at) and 0 <= lost < MOST_LOST_SECONDS:
                entries.append({"at": at, "after_step": one["after_step"], "lost_seconds": lost})
    alive = saved
    with suppress(OSError):
        alive = max(saved, (folder / METRICS).stat().st_mtime)
    part_began = entries[-1]["at"] if entries else 0.0
    lost = max(0.0, alive - max(saved, part_began))
    entries.append({"at": time.time(), "after_step": after_step, "lost_seconds": round(lost, 3)})
    write_whole(path, "".join(json.dumps(one) + "\n" for one in entries), mend="free some disk")
    return sum(one["lost_seconds"] for one in entries), len(entries)
