"""Kill runs at random moments, take them up again, and compare each with a run that was never killed.

Every preset of the optimizer track, on a tiny model, with accumulation, dropout, averages and a mix of corpora in turn;
a checkpoint is saved every few steps, so that many kills come while one is written. A killed run is a process that
got SIGKILL; it is taken up by the same command, `nanorun train --run NAME …`. In the end these have to be the same, to
the bit: weights, optimizers' state, every row of the metrics and the record, but for seconds and what they name; and
each run has one record.

    python scripts/kill_runs.py --kills 100 --out records/benchmarks/kills.json

The moments are drawn from --seed, as shares of the time that the run takes when nobody kills it; what a process was
doing then depends on the machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from figures import write_figures

from nanorun import cli
from nanorun.tables import read_toml
from nanorun.training import checkpoint

PRESETS = Path(__file__).resolve().parent.parent / "configs" / "sotu"
TRACK = """
summary = "A tiny model whose runs are killed"
kind = "open"
target_val_loss = 2.0
scored_in = "steps"
[significance]
rule = "t"
n = 3
alpha = 0.05
[fixed.data]
corpus = "sotu"
tokenizer = "byte"
"""
SIZE = {
    "train.steps": 120,
    "train.batch_tokens": 512,
    "train.warmup_steps": 10,
    "train.length_schedule": [],
    "model.n_layer": 1,
    "model.n_head": 2,
    "model.n_embd": 32,
    "model.context_len": 64,
    "validation.every_steps": 7,
    "validation.from_step": 0,
    "validation.tokens": 2048,
    "validation.stride": 64,
    "checkpoint.every_steps": 3,
    "log.every_steps": 1,
}
EXTRAS = {
    "": [],
    "accumulation": ["--set", "train.micro_batch_rows=3"],
    "dropout": ["--set", "model.dropout=0.2"],
    "queue": ["--set", "average.kind=queue", "--set", "average.every_steps=4"],
    "ema": ["--set", "average.kind=ema", "--set", "average.every_steps=4"],
    "mix": ["--mix", "sotu:0.6,shakespeare:0.4"],
    "lengths": ["--set", "train.length_schedule=[16, 32, 64]", "--set", "model.dropout=0.2"],
    "cyclic": ["--set", "train.schedule=cyclic", "--set", "train.cycles=3"],
    "ngrams": [
        *(
            "--set",
            "model.ngrams=[2, 4]",
            "--set",
            "model.ngram_buckets=4096",
            "--set",
            "model.ngram_dropout=0.3",
        ),
        *("--set", "optim.table.name=sparse_adam", "--set", "optim.table.lr=0.01"),
    ],
}
MOST_COMPILED_KILLS = 2
OTHER_EACH_TIME = {"id", "created", "clock", "resumed", "peak_memory_mib"}
"""What a record says of a run's time and place."""


class Case(NamedTuple):
    """A run: a preset, and what it has besides."""

    preset: str
    extra: str
    compiled: bool = False

    @property
    def name(self) -> str:
        return " + ".join(filter(None, [self.preset, self.extra, "compiled" * self.compiled]))

    def words(self, folder: str) -> list[str]:
        """Return the command of the run that lies in runs/FOLDER."""
        settings = [word for key, value in SIZE.items() for word in ("--set", f"{key}={value}")]
        compiled = ["--compile", "on" if self.compiled else "off"]
        words = ["train", "--track", "kills", "--optim", self.preset, "--run-name", folder, "--json"]
        return [*words, *settings, *compiled, *EXTRAS[self.extra]]


class Outcome(NamedTuple):
    """What became of a case."""

    case: str
    kills: int
    while_saving: int
    """Kills that left a checkpoint half written."""
    differs: list[str]
    seconds: float
    """Of the run that nobody killed, in all."""
    lost_seconds: float


def make_cases(n_compiled: int) -> list[Case]:
    """Return a case of each preset, then the compiled ones; averages stay with presets that have none."""
    cases = []
    extras = itertools.cycle(EXTRAS)
    for path in sorted(PRESETS.glob("*.toml")):
        if path.stem == "track":
            continue
        config = read_toml(path)
        taken = {"queue", "ema"} if "average" in config else set()
        taken |= {"cyclic"} if config["train"].get("schedule") == "cyclic" else set()
        cases.append(Case(path.stem, next(extra for extra in extras if extra not in taken)))
    return cases + [Case(name, "accumulation", True) for name in ("muon", "adamw")[:n_compiled]]


def share_out(kills: int, cases: Sequence[Case]) -> list[int]:
    """Return the kills of each case: as many for each, but few where every start compiles."""
    compiled = min(MOST_COMPILED_KILLS, kills // len(cases)) if len(cases) > 1 else kills
    left = kills - compiled * sum(case.compiled for case in cases)
    n_eager = sum(not case.compiled for case in cases)
    shares = (
        iter(left // n_eager + (number < left % n_eager) for number in range(n_eager))
        if n_eager
        else iter(())
    )
    return [compiled if case.compiled else next(shares) for case in cases]


def make_place(folder: Path) -> None:
    """Lay out the track of these runs and its presets under `folder`."""
    place = folder / "configs" / "kills"
    shutil.copytree(PRESETS, place, ignore=shutil.ignore_patterns("search"))
    (place / "track.toml").write_text(TRACK)


@contextmanager
def a_place() -> Iterator[Path]:
    """Work inside in a new folder with that track; what a process still writes there may stay behind."""
    # Stated, so that no run chooses a number of its own and with it other bits.
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name, chdir(name):
        make_place(Path(name))
        yield Path(name)


def start(words: Sequence[str], log: Path) -> int:
    """Return the process id of `nanorun WORDS`, forked from this one, which has imported everything already."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.argv = ["nanorun", *words]
        cli.main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(process: int, seconds: float | None) -> int | None:
    """Return the exit code of a process, or None where it was killed after `seconds`."""
    ends = None if seconds is None else time.monotonic() + seconds
    while True:
        done, status = os.waitpid(process, 0 if ends is None else os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if ends is not None and time.monotonic() >= ends:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return None
        time.sleep(0.002)


def run_to_the_end(words: Sequence[str], log: Path) -> None:
    if code := wait(start(words, log), None):
        sys.exit(f"nanorun {' '.join(words)} ended with {code}:\n{log.read_text()}")


def kill_and_compare(case: Case, number: int, kills: int, chance: random.Random, log: Path) -> Outcome:
    """Return what `kills` kills of a case came to."""
    whole, killed = f"whole-{number}", f"killed-{number}"
    before = records()
    began = time.monotonic()
    run_to_the_end(case.words(whole), log)
    seconds = time.monotonic() - began
    done = while_saving = 0
    while done < kills:
        code = wait(start(case.words(killed), log), chance.uniform(0.0, 1.1) * seconds)
        if code == 0:
            # It ended before its moment came: what is left of the kills goes to a run from the beginning.
            if differs := with_records(whole, killed, before):
                return Outcome(case.name, done, while_saving, differs, seconds, lost(killed))
            forget(Path("runs") / killed)
        elif code is not None:
            sys.exit(f"{case.name} ended with {code} after {done} kills:\n{log.read_text()}")
        else:
            done += 1
            while_saving += any(Path("runs", killed, "checkpoints").glob(".step-*"))
    run_to_the_end(case.words(killed), log)
    differs = with_records(whole, killed, before)
    return Outcome(case.name, done, while_saving, differs, seconds, lost(killed))


def forget(run: Path) -> None:
    shutil.rmtree(json.loads((run / "result.json").read_text())["record"])
    shutil.rmtree(run)


def lost(run: str) -> float:
    result = json.loads(Path("runs", run, "result.json").read_text())
    return float(result["clock"].get("lost_seconds", 0.0))


def records() -> set[Path]:
    """Return the folders of all records; what a kill left half written beside them is none."""
    return {path.parent for path in Path("records").glob("*/[!.]*/record.json")}


def with_records(whole: str, killed: str, before: set[Path]) -> list[str]:
    """Return what differs between two finished runs that should be the same, their records' number included.

    `before` are the records that were there before them.
    """
    runs = [Path("runs") / name for name in (whole, killed)]
    n_new = len(records() - before)
    return [*differences(*runs), *([] if n_new == 2 else [f"{n_new} records of 2 runs"])]


def differences(one: Path, other: Path) -> list[str]:
    """Return what differs between what two finished runs left."""
    found = []
    results = [json.loads((run / "result.json").read_text()) for run in (one, other)]
    found += [
        key
        for key in ("final_weights_sha256", "initial_weights_sha256", "final_val_loss", "steps")
        if results[0][key] != results[1][key]
    ]
    if rows_of(one) != rows_of(other):
        found.append("metrics")
    records = [json.loads((Path(result["record"]) / "record.json").read_text()) for result in results]
    found += [f"record: {key}" for key in without_time(records[0]) if differ(records, key)]
    states = [checkpoint.newest_of(run)[0].optimizer for run in (one, other)]
    if not same(*states):
        found.append("optimizers' state")
    return found


def differ(records: Sequence[dict[str, Any]], key: str) -> bool:
    return bool(without_time(records[0]).get(key) != without_time(records[1]).get(key))


def without_time(value: Any) -> Any:
    """Return a record, or a part of it, without seconds and without what names this run alone."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if k not in OTHER_EACH_TIME and not re.search("seconds$", k)}
        return {key: without_time(one) for key, one in kept.items()}
    return [without_time(one) for one in value] if isinstance(value, list) else value


def rows_of(run: Path) -> list[dict[str, Any]]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [without_time(row) for row in rows]


def same(one: Any, other: Any) -> bool:
    """Return whether two nested containers hold the same, tensors to the bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other) and one.dtype == other.dtype
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=0, help="how many cases, from the first on; 0: all")
    parser.add_argument("--only", default="", help="only cases whose names contain this")
    parser.add_argument("--compiled", type=int, default=1, help="how many compiled cases, 0 to 2")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    arguments = parser.parse_args(words)
    cases = [case for case in make_cases(arguments.compiled) if arguments.only in case.name]
    cases = cases[: arguments.cases or None]
    chance, outcomes = random.Random(arguments.seed), []
    with a_place() as folder:
        for number, (case, kills) in enumerate(zip(cases, share_out(arguments.kills, cases), strict=True)):
            outcome = kill_and_compare(case, number, kills, chance, folder / "log")
            outcomes.append(outcome)
            says = ", ".join(outcome.differs) or "same bits"
            print(
                f"{outcome.case:36} {outcome.kills:3} kills, {outcome.while_saving:2} while saving, "
                f"{outcome.lost_seconds:6.2f} s of work lost: {says}",
                flush=True,
            )
    total, saving = sum(one.kills for one in outcomes), sum(one.while_saving for one in outcomes)
    good = sum(one.kills for one in outcomes if not one.differs)
    print(f"{total} kills, {saving} of them while a checkpoint was written; {good} left no trace")
    if arguments.out:
        cases_found = [one._asdict() for one in outcomes]
        write_figures(arguments.out, "kill_runs.py", words, cases=cases_found)
    return 0 if good == total else 1


if __name__ == "__main__":
    sys.exit(main())
