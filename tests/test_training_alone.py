"""Two at once: one run in a folder, and nothing half written read by anybody."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest
from hostile_samples import QUIET, SETTINGS, copied, stopped_run

from nanorun.errors import UserError
from nanorun.training.alone import PATIENCE_SECONDS, alone
from nanorun.training.distributed import Ranks
from nanorun.training.run import resume_run, train_seeds

HOLD = (
    "import sys; from pathlib import Path; from nanorun.training.alone import alone\n"
    "from nanorun.training.distributed import Ranks\n"
    "with alone(Path(sys.argv[1]), Ranks()):\n"
    "    print('held', flush=True); sys.stdin.read()\n"
)


@pytest.fixture(scope="module")
def run_of_module(tmp_path_factory, shakespeare_folder):
    return stopped_run(tmp_path_factory.mktemp("run"), shakespeare_folder)


@pytest.fixture
def holder():
    """A function that has another process hold a folder."""

    def hold(folder):
        command = [sys.executable, "-c", HOLD, str(folder)]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        children.append(child)
        assert child.stdout.readline() == "held\n"
        return child

    children = []
    yield hold
    for child in children:
        child.kill()
        child.communicate()


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch):
    monkeypatch.setattr("nanorun.training.alone.PATIENCE_SECONDS", 0.0)


def test_a_second_run_in_a_folder_is_refused_with_the_first_ones_process_and_host(
    holder, run_of_module, tmp_path, nanorun
):
    run = copied(run_of_module, tmp_path)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    first = holder(run)
    code, _, err = nanorun("train", "--resume", run)
    assert code == 2
    assert f"{run}: another run is in this folder, process {first.pid} on {socket.gethostname()!a}" in err
    assert {path: path.read_bytes() for path in before} == before


def test_a_name_given_twice_at_once_is_refused_the_second_time(holder, tmp_path, shakespeare_folder):
    first = holder(tmp_path / "runs" / "mine")
    options = {"runs": tmp_path / "runs", "data": shakespeare_folder, "run": "mine"}
    with pytest.raises(UserError, match=f"another run is in this folder, process {first.pid}"):
        train_seeds("shakespeare-sprint", "adamw", ["train.steps=1"], 0, 1, options, QUIET)


def test_a_killed_holder_leaves_its_file_and_no_lock(holder, run_of_module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = copied(run_of_module, tmp_path)
    first = holder(run)
    first.kill()
    first.wait()
    assert (run / ".lock").exists()
    assert resume_run(run, QUIET)["steps"] == 6
    assert not (run / ".lock").exists()


def test_a_holder_that_ends_within_moments_is_waited_for(holder, tmp_path, monkeypatch):
    monkeypatch.setattr("nanorun.training.alone.PATIENCE_SECONDS", PATIENCE_SECONDS)
    first = holder(tmp_path)

    def nap(seconds):
        first.kill()
        first.wait()

    with alone(tmp_path, Ranks(), sleep=nap):
        pass


def test_a_refusal_reaches_every_rank(tmp_path):
    said = []

    class Two(Ranks):
        def broadcast_text(self, text):
            said.append(text)
            return text or "another run is in this folder"

    with pytest.raises(UserError, match="another run"), alone(tmp_path / "run", Two(rank=1, n_ranks=2)):
        pass
    assert said == [""]
    assert not (tmp_path / "run").exists()


def test_a_child_that_outlives_the_run_does_not_keep_its_folder(tmp_path):
    # A compiler's worker may: the lock's descriptor closes where a new program begins.
    with alone(tmp_path, Ranks()):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    try:
        with alone(tmp_path, Ranks()):
            pass
    finally:
        child.kill()
        child.communicate()


def test_a_run_that_came_to_nothing_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"runs": tmp_path / "runs", "data": tmp_path / "none", "run": "mine"}
    with pytest.raises(UserError, match="prepare-data"):
        train_seeds("text", "adamw", [], 0, 1, options, QUIET)
    assert not (tmp_path / "runs/mine").exists()


@pytest.mark.slow
def test_of_five_that_resume_one_run_at_once_one_does_and_four_are_refused(run_of_module, tmp_path):
    run = copied(run_of_module, tmp_path)
    command = [sys.executable, "-m", "nanorun", "train", "--resume", str(run), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    children = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment
        )
        for _ in range(5)
    ]
    ended = [(*child.communicate(), child.returncode) for child in children]
    results = [json.loads(out) for out, _, code in ended if code == 0]
    refusals = [err for _, err, code in ended if code == 2]
    assert (len(results), len(refusals)) == (1, 4)
    assert all("another run is in this folder" in one or "is finished" in one for one in refusals)
    assert len(list((tmp_path / "records").glob("*/*/record.json"))) == 1


KILLED_ONCE = """
import os, signal
from nanorun.training.step import Stepper
real = Stepper.step
def step(self, number, *words, **options):
    if number == 3 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, number, *words, **options)
Stepper.step = step
from nanorun.cli import main
main()
"""


def on_two_ranks(place, data, *program, restarts=0):
    """Return how `nanorun train --run mine` ended under torchrun, which takes --run for its own without a `--`."""
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", restarts)
    settings = [word for one in (*SETTINGS, "checkpoint.every_steps=1") for word in ("--set", one)]
    words = ("--track", "shakespeare-sprint", "--run", "mine", "--data", data, *settings)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    command = [sys.executable, *map(str, (*launcher, *program, "train", *words))]
    return subprocess.run(command, capture_output=True, text=True, cwd=place, env=environment, timeout=150)


@pytest.mark.slow
def test_every_rank_of_a_run_that_is_refused_ends_by_itself(holder, tmp_path, shakespeare_folder):
    first = holder(tmp_path / "runs" / "mine")
    done = on_two_ranks(tmp_path, shakespeare_folder, "-m", "--", "nanorun")
    assert done.returncode != 0
    said = f"another run is in this folder, process {first.pid} on {socket.gethostname()!a}"
    assert done.stderr.count(said) == 2


@pytest.mark.slow
def test_the_folder_is_free_at_once_for_the_restart_of_a_rank_that_was_killed(tmp_path, shakespeare_folder):
    (tmp_path / "killed.py").write_text(KILLED_ONCE)
    done = on_two_ranks(tmp_path, shakespeare_folder, "--", "killed.py", restarts=1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "another run" not in done.stderr
    assert json.loads((tmp_path / "runs/mine/result.json").read_text())["steps"] == 6
    assert not (tmp_path / "runs/mine/.lock").exists()
