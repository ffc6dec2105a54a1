"""Which run a command means: a new one, or one begun before that it takes up again."""

from __future__ import annotations

import json
import os
import re
import time
import tomllib
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from nanorun.config import RunConfig
from nanorun.errors import UserError, shown
from nanorun.files import write_whole
from nanorun.tables import flattened, read_toml, to_toml
from nanorun.training import checkpoint
from nanorun.training.distributed import Ranks

RESTARTS = ".torchrun"
"""Under the folder of runs: which run each of torchrun's workers was on, by torchrun's id and the run's config."""
INTERRUPTIONS = "interruptions.jsonl"
METRICS = "metrics.jsonl"
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Begun:
    """A run's folder as it was found."""

    folder: str = ""
    """Where the run lies or shall lie; "" lets it take a new folder."""
    resumes: bool = False
    """There is a checkpoint to go on from."""
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
                found = _look_into(runs / _note(runs, config).read_text(), config)
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
        return Begun(str(folder))
    _check_same_config(folder, config)
    try:
        return Begun(str(folder), result=json.loads((folder / "result.json").read_text()))
    except FileNotFoundError:
        return Begun(str(folder), resumes=bool(checkpoint.checkpoints(folder / "checkpoints")))
    except ValueError as error:
        raise UserError(
            f"{folder}/result.json is broken ({error}): remove it to end the run once more"
        ) from None


def _check_same_config(folder: Path, config: RunConfig) -> None:
    """Raise UserError that names what differs between a run's config and the one asked for."""
    there = flattened(read_toml(folder / "config.toml"))
    asked = flattened(tomllib.loads(to_toml(config.model_dump())))
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
    with suppress(OSError):
        for line in path.read_text().splitlines():
            with suppress(ValueError, KeyError, TypeError):  # a line cut off
                one = json.loads(line)
                entries.append({"at": float(one["at"]), "lost_seconds": float(one["lost_seconds"]), **one})
    alive = saved
    with suppress(OSError):
        alive = max(saved, (folder / METRICS).stat().st_mtime)
    part_began = entries[-1]["at"] if entries else 0.0
    lost = max(0.0, alive - max(saved, part_began))
    entries.append({"at": time.time(), "after_step": after_step, "lost_seconds": round(lost, 3)})
    write_whole(path, "".join(json.dumps(one) + "\n" for one in entries), mend="free some disk")
    return sum(one["lost_seconds"] for one in entries), len(entries)
