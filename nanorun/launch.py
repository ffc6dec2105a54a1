"""A run as a job of a cluster: a batch script for Slurm, a task file for SkyPilot.

Both name the run's folder with `--run`, so that the job that is queued again takes up the run it was. Whether to
queue again is read from the exit code of the ranks, which they write down themselves: torchrun ends with 1 whatever
they end with. What comes from outside reaches the shell quoted, and a directive only if it is a plain word.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from nanorun.errors import UserError, shown

SLURM, SKY = "slurm.sh", "sky.yaml"
TEMPLATES = Path(__file__).parent / "launch_templates"
KEPT = "/nanorun-kept"
"""Where a cloud machine mounts the bucket that outlives it."""

_PLAIN = re.compile(r"[A-Za-z0-9_.,:+/@%=\[\]*&|~^()-]+")
_COMMAND = re.compile(r"[A-Za-z0-9_.,:+/@%= -]+")
_KEY = re.compile(r"[a-z][a-z-]*")
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
_BUCKET = re.compile(r"[a-z0-9]+://[A-Za-z0-9._/-]+")
_OURS = frozenset(
    {"job-name", "nodes", "ntasks-per-node", "cpus-per-task", "gpus-per-node", "time", "partition"}
)
_OURS |= {"account", "signal", "requeue", "no-requeue", "open-mode", "array", "wrap", "ntasks", "chdir"}


@dataclass(frozen=True)
class Training:
    """What a job trains: the words of `nanorun train`, checked, and what the script has to know of them."""

    words: tuple[str, ...]
    name: str
    """Of the run's folder under `runs`."""
    runs: str
    n_seeds: int = 1
    """Runs, one after the other; with more than one, each has a folder `name-s<seed>`."""
    prepare: str = ""
    """The command that prepares the data; "" where the run does so by itself, or --data says where they are."""
    takes_input: bool = False
    """Whether that command has to be told of files of the user's."""


@dataclass(frozen=True)
class Shape:
    """What a job runs on."""

    nodes: int = 1
    gpus_per_node: int = 1
    ranks_per_node: int = 1
    cpus_per_rank: int = 4
    max_restarts: int = 0
    """How often torchrun starts the ranks again after one died, within a job."""

    @property
    def many(self) -> bool:
        """Whether there is more than one rank, and so torchrun between the job and them."""
        return self.nodes * self.ranks_per_node > 1


@dataclass(frozen=True)
class Slurm:
    """What a batch script asks of Slurm."""

    time: str | None = None
    partition: str | None = None
    account: str | None = None
    warn_seconds: int = 120
    """How long before the end of its time the job is warned, and stops with a checkpoint."""
    directives: tuple[str, ...] = ()
    """More of them, `key=value` or `key`."""
    before: tuple[str, ...] = ()
    """Lines of shell that come first, such as `module load cuda`."""


@dataclass(frozen=True)
class Sky:
    """What a task file asks of SkyPilot."""

    bucket: str
    accelerator: str | None = None
    infra: str | None = None
    spot: bool = True
    install: str | None = None
    """What pip installs; the folder the task is launched from without it."""
    before: tuple[str, ...] = ()


def slurm_script(training: Training, shape: Shape, slurm: Slurm, *, folder: Path, python: str) -> str:
    """Return the batch script of a run that is trained in `folder` by the interpreter `python`."""
    directives: dict[str, Any] = {
        "job-name": training.name,
        "nodes": shape.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": shape.ranks_per_node * shape.cpus_per_rank,
        **({"gpus-per-node": shape.gpus_per_node} if shape.gpus_per_node else {}),
        **{
            key: getattr(slurm, key)
            for key in ("time", "partition", "account")
            if getattr(slurm, key) is not None
        },
        "signal": f"B:USR1@{slurm.warn_seconds}",
        "requeue": None,
        "open-mode": "append",
    }
    _check_time(slurm)
    for text in slurm.directives:
        key, equals, value = text.partition("=")
        if not _KEY.fullmatch(key) or key in _OURS:
            raise UserError(
                f"--sbatch {shown(text)}: wanted key=value with a long option of sbatch that launch has no option of "
                f"its own for, such as mem=64G; launch sets {', '.join(sorted(_OURS))}"
            )
        directives[key] = value if equals else None
    return _filled(
        SLURM,
        training,
        shape,
        before=_lines(slurm.before),
        directives=[
            f"--{key}" if value is None else f"--{key}={_plain(key, value)}"
            for key, value in directives.items()
        ],
        folder=quoted(folder),
        python=quoted(python),
        run=quoted(f"{training.runs}/{training.name}"),
        words=_words(training.words),
    )


def sky_task(training: Training, shape: Shape, sky: Sky) -> str:
    """Return the task file of a managed job whose run lies in a bucket, where the next machine finds it."""
    if not _BUCKET.fullmatch(sky.bucket):
        raise UserError(f"--bucket {shown(sky.bucket)}: wanted an address such as s3://mine/nanorun")
    if shape.gpus_per_node and not sky.accelerator:
        raise UserError(
            "--accelerator is missing: name the kind of GPU, such as H100, or give --gpus-per-node 0"
        )
    for option in ("accelerator", "infra"):
        if getattr(sky, option) is not None:
            _plain(option, getattr(sky, option))
    places = ("--runs", f"{KEPT}/runs", "--records", f"{KEPT}/records")
    return _filled(
        SKY,
        training,
        shape,
        before=_lines(sky.before),
        sky=sky,
        kept=KEPT,
        install=quoted(sky.install or "."),
        python="python",
        words=_words((*training.words, *places)),
    )


def _filled(template: str, training: Training, shape: Shape, **values: Any) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(training=training, shape=shape, **values)


def training_of(
    words: Sequence[str], given: Mapping[str, Any], settings: Sequence[str], *, sky: bool
) -> Training:
    """Return what a job trains, after checking its words as `nanorun train` would: UserError names what is wrong.

    `given` are the values of train's options that `words` say, `settings` all changes to the config among them.
    """
    import torch

    from nanorun.model import GPT
    from nanorun.optim.build import build_optimizers
    from nanorun.training.run import configs_of
    from nanorun.training.taking_up import check_run_name
    from nanorun.training.trust import check_trusted, names_on_the_command_line

    if given["resume"] is not None:
        raise UserError("--resume in a job: leave it out, and name the run's folder with --run-name NAME")
    track, configs = configs_of(given["track"], given["optim"], settings, given["seed"], given["seeds"])
    config = configs[0]
    check_trusted(
        config,
        named=names_on_the_command_line(given["optim"], settings),
        trust_code=given["trust_code"],
        where=f"preset {config.name!r} of track {track.name!r}",
    )
    with torch.device("meta"):
        build_optimizers(GPT(config.model, 256), config.optim_by_role)
    if sky and (str(given["runs"]) != "runs" or str(given["records"]) != "records"):
        raise UserError(
            f"--runs or --records in a task: leave them out, both lie in the bucket, under {KEPT}"
        )
    name = given["run"] or f"{track.name}-{config.name}-s{config.seed}-{datetime.now():%Y%m%d-%H%M%S}"
    check_run_name(name)
    return Training(
        words=(*words, *(() if given["run"] else ("--run", name))),
        name=name,
        runs=str(given["runs"]),
        n_seeds=len(configs),
        **({} if str(given["data"]) != "data" else _preparing(config.data.corpus, config.data.tokenizer)),
    )


def _preparing(corpus: str, tokenizer: str) -> dict[str, Any]:
    """Return `prepare` and `takes_input` of a corpus; nothing for one that comes with nanorun."""
    from nanorun.data.prepare import prepare_command
    from nanorun.data.sources import load_source, source_names

    if corpus.partition(":")[0] not in source_names() or load_source(corpus).EMBEDDED:
        return {}
    command = prepare_command(corpus, tokenizer)
    if not _COMMAND.fullmatch(command):
        raise UserError(
            f"the data would be made with {shown(command)}: prepare them by hand, and name them with --data"
        )
    return {"prepare": command, "takes_input": " PATH" in command}


def quoted(word: str | os.PathLike[str]) -> str:
    """Return `word` as bash reads it back, on one line: what does not print becomes escapes of its bytes."""
    text = os.fspath(word)
    if text.isprintable():
        return shlex.quote(text)
    letters = (
        f"\\{chr(byte)}" if chr(byte) in "\\'" else chr(byte) if 32 <= byte < 127 else f"\\x{byte:02x}"
        for byte in os.fsencode(text)
    )
    # An escape takes at most two digits, so that what follows it is not taken along.
    return f"$'{''.join(letters)}'"


def _words(words: Sequence[str]) -> str:
    return " ".join(map(quoted, words))


def _plain(option: str, value: object) -> str:
    text = str(value)
    if not _PLAIN.fullmatch(text):
        raise UserError(
            f"--{option} {shown(text)!r}: wanted one word of letters, digits and . , : + / @ % = [ ] * - _"
        )
    return text


def _lines(before: Sequence[str]) -> Sequence[str]:
    for line in before:
        if not line.isprintable():
            raise UserError(f"--before {shown(line)!r}: wanted one line of shell; repeat --before for more")
    return before


def _check_time(slurm: Slurm) -> None:
    """Raise UserError where the time is none, or over before the warning can come."""
    if slurm.warn_seconds > 65535:
        raise UserError(f"--warn-seconds {slurm.warn_seconds}: Slurm takes up to 65535")
    if slurm.time is None or slurm.time.upper() in ("UNLIMITED", "INFINITE"):
        return
    found = _TIME.fullmatch(slurm.time)
    if not found:
        raise UserError(
            f"--time {shown(slurm.time)}: wanted minutes, hours:minutes:seconds or days-hours:minutes:seconds, such "
            "as 90 or 4:00:00"
        )
    days, first, second, third = (int(part or 0) for part in found.groups())
    if found[1]:
        seconds = days * 86400 + first * 3600 + second * 60 + third
    elif found[4]:
        seconds = first * 3600 + second * 60 + third
    else:
        seconds = first * 60 + second
    if seconds <= slurm.warn_seconds:
        raise UserError(
            f"--time {slurm.time} is {seconds} s, and the warning comes {slurm.warn_seconds} s before its end: give "
            "more time, or less --warn-seconds"
        )
