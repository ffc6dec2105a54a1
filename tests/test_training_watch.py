"""A rank that is gone, hangs or failed is named, and the others end."""

import pytest

from nanorun.errors import UserError
from nanorun.training.watch import DONE, LOST, PATIENCE, Beat, Sightings, hang_seconds

HANG = 20.0


def beat(rank, number=1, marks=1, *, step=12, phase="train", signs=None, ending=""):
    return Beat(
        number, marks if signs is None else signs, marks, step, phase, f"host{rank}", 100 + rank, ending
    )


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
