"""A rank that is gone, hangs or failed is named, and the others end."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nanorun.errors import UserError
from nanorun.training.watch import DONE, LOST, PATIENCE, Beat, Sightings, Watch, hang_seconds

HANG = 20.0


def beat(rank, number=1, marks=1, *, step=12, phase="train", signs=None, **words):
    signs = marks if signs is None else signs
    return Beat(number, signs, marks, step, phase, f"host{rank}", 100 + rank, **words)


def watched(*later, n_ranks=3):
    """Return sightings that began at 0 s, and took in each (seconds, beats) of `later`."""
    sightings = Sightings([beat(rank) for rank in range(n_ranks)], HANG, 0.0)
    for now, beats in later:
        sightings.see(beats, now)
    return sightings


def going_on(rank, n, **words):
    return beat(rank, number=n, marks=n, **words)


def test_ranks_that_move_are_let_be():
    sightings = watched(*((now, [going_on(rank, now) for rank in range(3)]) for now in range(2, 100)))
    assert sightings.hung(99.0) == ("", [])
    assert sightings.lost(99.0) == ""


def test_a_rank_that_is_not_heard_of_is_named_after_the_stated_time():
    beats = [(now, [going_on(0, now), going_on(1, min(now, 5)), going_on(2, now)]) for now in range(2, 26)]
    assert watched(*beats[:-1]).hung(24.9) == ("", [])
    text, blamed = watched(*beats).hung(25.0)
    assert text.startswith("rank 1 (host1, pid 101) has not been heard of for 20 s, last at step 12: killed,")
    assert blamed == [1]


def test_the_rank_that_the_others_wait_for_is_named_and_not_those_that_wait():
    waiting = [(now, [beat(0, now, 8), beat(1, now, 7), beat(2, now, 8)]) for now in range(2, 23)]
    assert watched(*waiting[:-1]).hung(21.9) == ("", [])
    text, blamed = watched(*waiting).hung(22.0)
    assert text == "rank 1 (host1, pid 101) has not moved since step 12, 20 s ago, and the others wait for it"
    assert blamed == [1]


def test_where_no_rank_is_ahead_all_are_named():
    stuck = [(now, [beat(rank, now, 8) for rank in range(2)]) for now in range(2, 23)]
    text, blamed = watched(*stuck, n_ranks=2).hung(22.0)
    assert text.startswith(
        "rank 0 (host0, pid 100) and rank 1 (host1, pid 101) have not moved since step 12, 20 s"
    )
    assert blamed == [0, 1]


@pytest.mark.parametrize("phase", ["setup", "compile", "validation", "checkpoint"])
def test_what_is_no_step_may_take_longer(phase):
    long = round(HANG * PATIENCE)
    beats = [
        (now, [beat(0, now, 7, phase=phase), beat(1, now, 8, phase=phase)]) for now in range(2, 3 + long)
    ]
    assert watched(*beats, n_ranks=2).hung(1.9 + long) == ("", [])
    text, blamed = watched(*beats, n_ranks=2).hung(2.0 + long)
    assert text.startswith(f"rank 0 (host0, pid 100) has not moved since step 12 ({phase}), 200 s ago")
    assert blamed == [0]


def test_a_long_step_is_let_be_as_long_as_its_micro_batches_come():
    beats = [(now, [beat(0, now, 7, signs=7 + now // 15), beat(1, now, 8)]) for now in range(2, 100)]
    assert watched(*beats, n_ranks=2).hung(99.0) == ("", [])


@pytest.mark.parametrize(("warm_up", "limit"), [(2.0, 20), (15.0, 45), (500.0, 200)])
def test_a_micro_batch_may_take_as_long_as_the_warm_up_says_up_to_a_limit(warm_up, limit):
    beats = [(now, [beat(0, now, 7, warm_up=warm_up), beat(1, now, 8)]) for now in range(2, 3 + limit)]
    assert watched(*beats, n_ranks=2).hung(1.9 + limit) == ("", [])
    text, blamed = watched(*beats, n_ranks=2).hung(2.0 + limit)
    assert text.startswith(f"rank 0 (host0, pid 100) has not moved since step 12, {limit} s ago")
    assert blamed == [0]


def test_a_rank_tells_the_shortest_of_its_warm_ups():
    class Store(dict):
        def set(self, key, value):
            self[key] = value

    store = Store()
    watch = Watch(store, 0, 1, HANG)
    for seconds in (30.0, 4.0, 5.0):
        watch.warmed_up(seconds)
    watch._tell()
    assert json.loads(store["beat/0"])["warm_up"] == 4.0


def test_a_store_that_does_not_answer_is_its_keepers_fault_and_nobody_elses():
    sightings = watched((2.0, [going_on(rank, 2) for rank in range(3)]))
    assert sightings.hung(21.9) == ("", [])
    text, blamed = sightings.hung(22.0)
    assert text.startswith("rank 0 (host0, pid 100), or the launcher beside it that keeps the ranks' store")
    assert blamed == [0]


def test_time_in_which_the_watching_process_was_stopped_is_held_against_nobody():
    sightings = watched((2.0, [going_on(rank, 2) for rank in range(3)]))
    sightings.forgive(1000.0)
    assert sightings.hung(1021.9) == ("", [])
    assert sightings.hung(1022.0)[1] == [0]


def test_a_failed_collective_is_put_down_to_the_rank_that_failed_and_not_to_those_it_took_along():
    sightings = watched(
        (2.0, [going_on(0, 2), going_on(1, 2, ending="UserError: no such file"), going_on(2, 2, ending=LOST)])
    )
    assert sightings.lost(2.0, gone=[1, 2]) == "rank 1 (host1, pid 101) failed: UserError: no such file"


def test_a_failed_collective_is_put_down_to_the_rank_that_has_no_process_any_more():
    sightings = watched((2.0, [going_on(0, 2), going_on(1, 2, ending=LOST), going_on(2, 2)]))
    assert sightings.lost(2.0, gone=[1, 2]) == "rank 2 (host2, pid 102) has been killed, last seen at step 12"


def test_a_rank_that_failed_while_others_wait_is_named():
    beats = [(now, [going_on(0, now), beat(1, 2, 2, ending="RuntimeError: boom")]) for now in range(2, 30)]
    assert watched(*beats, n_ranks=2).hung(29.0) == (
        "rank 1 (host1, pid 101) failed: RuntimeError: boom",
        [1],
    )


def test_ranks_that_are_done_are_not_waited_for():
    beats = [(now, [going_on(0, now), beat(1, 2, 2, ending=DONE)]) for now in range(2, 30)]
    assert watched(*beats, n_ranks=2).hung(29.0) == ("", [])


@pytest.mark.parametrize("asked", ["soon", "-1", "3", "nan", "inf"])
def test_a_time_that_is_none_is_refused(monkeypatch, asked):
    monkeypatch.setenv("NANORUN_HANG_SECONDS", asked)
    with pytest.raises(UserError, match=f"NANORUN_HANG_SECONDS='{asked}': wanted the seconds"):
        hang_seconds()


@pytest.mark.parametrize(("asked", "seconds"), [("", 120.0), ("8", 8.0), ("0", 0.0)])
def test_the_time_comes_from_the_environment(monkeypatch, asked, seconds):
    monkeypatch.setenv("NANORUN_HANG_SECONDS", asked)
    assert hang_seconds() == seconds


SCRIPTS = Path(__file__).parent.parent / "scripts"
AT_STEP_FOUR = """
import os, signal
from nanorun.errors import UserError
from nanorun.training.step import Stepper

def turn():
    while True:
        pass

def refuse():
    raise UserError("no such thing")

DEEDS = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "turning": turn,
    "refusing": refuse,
    "warned": lambda: os.kill(os.getpid(), signal.SIGUSR1),
}
real = Stepper.step

def step(self, number, *words, **options):
    if number == 3 and self.ranks.rank == 1:
        DEEDS[os.environ["DEED"]]()
    return real(self, number, *words, **options)

Stepper.step = step
from nanorun.cli import main
main()
"""


def two_ranks(folder, deed, tiny_settings, *launcher):
    """Return the torchrun of a run whose rank 1 does `deed` in its fourth step; `told` gets the exit code it tells."""
    (folder / "told").touch()
    (folder / "deed.py").write_text(AT_STEP_FOUR)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += ["--shutdown-timeout", "2", *launcher, "deed.py", "train", "--track", "shakespeare-sprint"]
    words += [word for setting in tiny_settings for word in ("--set", setting)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DEED": deed, "NANORUN_HANG_SECONDS": "8"}
    environment["NANORUN_EXIT_CODE"] = str(folder / "told")
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=180)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("deed", "says", "told"),
    [
        ("killed", r"has been killed", ""),
        ("stopped", r"has not been heard of for \d+ s", ""),
        ("turning", r"has not moved since step 3, \d+ s ago, and the others wait for it", ""),
        ("refusing", r"failed: UserError: no such thing", "2"),
    ],
)
def test_a_rank_that_does_its_part_no_more_is_named_by_the_other(tmp_path, tiny_settings, deed, says, told):
    done = two_ranks(tmp_path, deed, tiny_settings)
    assert done.returncode == 1
    assert re.search(rf"nanorun: failed: rank 1 \(\S+, pid \d+\) {says}", done.stderr), done.stderr[-3000:]
    # Of a rank that was killed a job must not read that it would end alike once more.
    assert (tmp_path / "told").read_text() == told


@pytest.mark.slow
def test_ranks_of_which_one_is_warned_stop_together_and_are_not_started_again(tmp_path, tiny_settings):
    done = two_ranks(tmp_path, "warned", tiny_settings, "--max-restarts", "3")
    assert done.returncode == 1  # torchrun has no other code
    # Its vote travels with the gradients of the step after the signal.
    said = re.findall(
        r"nanorun: (stopped after step \d+ of 6; a checkpoint is saved)", done.stderr + done.stdout
    )
    assert set(said) == {"stopped after step 5 of 6; a checkpoint is saved"}, done.stderr[-3000:]
    (folder,) = (path for path in (tmp_path / "runs").iterdir() if not path.name.startswith("."))
    assert [path.name for path in (folder / "checkpoints").glob("step-*")] == ["step-00000005"]
    assert not (folder / "result.json").exists()


def run_script(folder, name, *words):
    """Return a script's run and the figures it left, or skip with the reason that it gives."""
    out = folder / "figures.json"
    command = [sys.executable, str(SCRIPTS / name), *words, "--out", str(out)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500)
    if done.stdout.startswith("skipped"):
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


@pytest.mark.slow
def test_ranks_that_are_killed_come_back_and_end_with_the_bits_of_ranks_never_killed(tmp_path):
    figures = run_script(tmp_path, "kill_ranks.py", "--kills", "2", "--steps", "120")
    assert sum(len(run["kills"]) for run in figures["runs"]) == 2
    assert not any(run["differs"] for run in figures["runs"])


@pytest.mark.slow
def test_two_hosts_train_as_one_and_mend_after_their_link_was_cut(tmp_path):
    figures = run_script(tmp_path, "two_hosts.py")
    assert figures["named"] == [1, 0]
    assert not figures["apart_differs"]
    assert not figures["healed_differs"]
