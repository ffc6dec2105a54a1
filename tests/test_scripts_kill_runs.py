"""Killed runs end as those never killed, and the script that says so can tell the difference."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scripts_loader import script

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture
def kill_runs():
    with script("kill_runs") as module:
        yield module


def run_script(name, *words, folder):
    """Run a script in a process of its own: it forks, which a process with threads had better not."""
    command = [sys.executable, str(SCRIPTS / name), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "words",
    [
        ["--kills", "2", "--cases", "1", "--compiled", "0"],
        pytest.param(["--kills", "10", "--cases", "5", "--compiled", "0"], marks=pytest.mark.slow),
    ],
)
def test_killed_runs_end_with_the_bits_of_runs_never_killed(words, tmp_path):
    done = run_script("kill_runs.py", *words, "--out", str(tmp_path / "kills.json"), folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "kills.json").read_text())
    assert sum(case["kills"] for case in figures["cases"]) == int(words[1])
    assert not any(case["differs"] for case in figures["cases"])


@pytest.mark.slow
def test_disks_that_fill_lose_nothing(tmp_path):
    done = run_script("fill_disk.py", "--disks", "4", "--out", str(tmp_path / "disks.json"), folder=tmp_path)
    if done.stdout.startswith("skipped"):
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    disks = json.loads((tmp_path / "disks.json").read_text())["disks"]
    assert disks[0]["code"] == 2
    assert not any(disk["faults"] for disk in disks)


def test_every_preset_of_the_track_has_a_case(kill_runs):
    names = {path.stem for path in kill_runs.PRESETS.glob("*.toml")} - {"track"}
    assert {case.preset for case in kill_runs.make_cases(0)} == names
    assert {case.extra for case in kill_runs.make_cases(0)} == set(kill_runs.EXTRAS)


@pytest.mark.parametrize("kills", [0, 3, 10, 100])
def test_kills_are_shared_out_with_few_where_every_start_compiles(kill_runs, kills):
    cases = kill_runs.make_cases(1)
    shares = kill_runs.share_out(kills, cases)
    assert sum(shares) == kills
    assert all(share <= 2 for share, case in zip(shares, cases, strict=True) if case.compiled)
    eager = [share for share, case in zip(shares, cases, strict=True) if not case.compiled]
    assert max(eager) - min(eager) <= 1


def make_run(folder, kill_runs, loss=2.0, seconds=1.0, weights="a", exp_avg=1.0):
    """Leave what a finished run leaves, as far as it is compared."""
    record = folder / "record"
    record.mkdir(parents=True)
    result = {"final_weights_sha256": weights, "initial_weights_sha256": "0", "final_val_loss": loss}
    (folder / "result.json").write_text(json.dumps({**result, "steps": 1, "record": str(record)}))
    (folder / "metrics.jsonl").write_text(
        json.dumps({"step": 1, "loss": loss, "train_seconds": seconds}) + "\n"
    )
    content = {"id": folder.name, "validation": [{"val_loss": loss, "train_seconds": seconds}]}
    (record / "record.json").write_text(json.dumps(content))
    (folder / "config.toml").write_text("")
    kill_runs.checkpoint.write(
        folder / "checkpoints",
        kill_runs.checkpoint.Snapshot.of(
            1,
            model=torch.nn.Linear(1, 1).state_dict(),
            optimizer={"state": [{"exp_avg": torch.tensor(exp_avg)}]},
            state={"step": 1},
        ),
        run=kill_runs.checkpoint.identity(folder),
        keep=2,
    )
    return folder


def test_runs_that_differ_in_seconds_alone_are_the_same(kill_runs, tmp_path):
    one, other = (make_run(tmp_path / f"{s}", kill_runs, seconds=s) for s in (1.0, 2.0))
    assert kill_runs.differences(one, other) == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"loss": 2.0000001}, ["final_val_loss", "metrics", "record: validation"]),
        ({"weights": "b"}, ["final_weights_sha256"]),
        ({"exp_avg": 1.0000001}, ["optimizers' state"]),
    ],
)
def test_what_differs_between_runs_is_named(kill_runs, tmp_path, change, named):
    one, other = make_run(tmp_path / "1", kill_runs), make_run(tmp_path / "2", kill_runs, **change)
    assert kill_runs.differences(one, other) == named


@pytest.mark.parametrize(("others", "said"), [([], []), (["twice"], ["3 records of 2 runs"])])
def test_a_second_record_of_a_killed_run_is_told(kill_runs, tmp_path, monkeypatch, others, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kill_runs, "differences", lambda *runs: [])

    def leave(*names):
        for name in names:
            folder = Path("records/kills", name)
            folder.mkdir(parents=True)
            (folder / "record.json").touch()

    leave("earlier")
    before = kill_runs.records()
    leave("whole", "killed", ".writing-killed-7", *others)
    assert kill_runs.with_records("whole-0", "killed-0", before) == said
