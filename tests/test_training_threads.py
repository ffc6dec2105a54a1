"""The number of threads follows from steps' seconds, the machine's limits and what others take; nothing is timed."""

import itertools
from contextlib import nullcontext
from statistics import median

import pytest
import torch

from nanorun.training import threads
from nanorun.training.compilation import compile_if_it_pays
from nanorun.training.distributed import Ranks
from nanorun.training.threads import Cores, Others, Watcher, fastest, quota, seconds_of_others, settle, told


def timing(seconds):
    """Return a function from threads to seconds, and the list of what it was asked."""
    asked = []

    def step_seconds(n):
        asked.append(n)
        return seconds[n]

    return step_seconds, asked


@pytest.mark.parametrize(
    ("seconds", "cores", "taken", "wanted"),
    [
        ({2: 0.07, 1: 0.12}, Cores(2, 2), 0, 2),
        ({2: 0.003, 1: 0.002}, Cores(2, 2), 0, 1),
        ({2: 0.30, 1: 0.12}, Cores(2, 2), 1, 1),
        ({4: 0.10, 8: 0.08, 2: 0.18}, Cores(4, 8), 0, 8),
        ({4: 0.10, 8: 0.13, 2: 0.18}, Cores(4, 8), 0, 4),
        ({8: 0.30, 7: 0.10, 4: 0.15}, Cores(8, 8), 1, 7),
        ({64: 0.08, 32: 0.05, 16: 0.03, 8: 0.028, 4: 0.04}, Cores(64, 64), 0, 16),
    ],
    ids=["quiet", "tiny steps", "neighbour", "second threads", "no second threads", "one of eight", "many"],
)
def test_the_number_with_the_shortest_steps_is_taken(seconds, cores, taken, wanted):
    assert fastest(timing(seconds)[0], cores, taken) == (wanted, seconds[wanted])


def test_a_gain_that_may_be_chance_leaves_one_thread_for_each_physical_core():
    assert fastest(timing({2: 0.100, 1: 0.093})[0], Cores(2, 2))[0] == 2


def test_what_is_clearly_slower_costs_one_step_and_a_long_step_is_tried_with_nothing_else():
    step_seconds, asked = timing({2: 0.07, 1: 0.12})
    fastest(step_seconds, Cores(2, 2))
    assert asked == [2, 2, 1]
    step_seconds, asked = timing({2: 1.5})
    assert fastest(step_seconds, Cores(2, 2)) == (2, 1.5)
    assert asked == [2, 2]


def test_beside_a_neighbour_what_it_slows_down_is_stepped_no_more_than_it_takes_to_compare():
    step_seconds, asked = timing({2: 3.0, 1: 0.1})
    assert fastest(step_seconds, Cores(2, 2), taken=1) == (1, 0.1)
    assert asked == [1, 2, 1, 2, 1]


def test_two_numbers_take_turns_twice_where_that_settles_it():
    for one in (0.05, 0.068, 0.08):
        step_seconds, asked = timing({2: 0.07, 1: one})
        fastest(step_seconds, Cores(2, 2))
        assert asked == [2, 2, 1, 2, 1]


def test_a_third_reading_is_left_out_only_where_it_could_not_change_what_the_medians_say():
    values = (0.085, 0.1, 0.12)
    counts = set()
    for theirs, mine in itertools.product(itertools.product(values, repeat=3), repeat=2):
        readings = {2: iter((9.0, *theirs)), 1: iter(mine)}
        asked = []

        def step_seconds(n, readings=readings, asked=asked):
            asked.append(n)
            return next(readings[n])

        found = fastest(step_seconds, Cores(2, 2))[0]
        if mine[0] > 1.25 * theirs[0]:
            assert (found, asked) == (2, [2, 2, 1])
            continue
        assert found == (1 if median(mine) < 0.9 * median(theirs) else 2)
        counts.add(len(asked))
    assert counts == {5, 7}


def test_programs_that_compute_are_counted_and_those_that_sleep_are_not():
    readings = iter([{1: 5.0, 2: 0.0, 3: 9.0, 4: 1.0}, {1: 6.8, 2: 0.01, 3: 10.0, 5: 70.0}])
    times = iter([0.0, 2.0])
    others = Watcher(lambda: next(readings), lambda: next(times)).others()
    assert others.n_busy == 2
    assert others.cores == pytest.approx(1.405)


def test_this_process_is_none_of_the_others():
    import os

    found = seconds_of_others()
    assert os.getpid() not in found
    assert found


@pytest.mark.parametrize(
    ("files", "own", "wanted"),
    [
        ({"cpu.max": "150000 100000"}, "0::/\n", 1.5),
        ({"a/cpu.max": "max 100000", "cpu.max": "400000 100000"}, "0::/a\n", 4.0),
        ({"cpu.max": "max 100000"}, "0::/\n", float("inf")),
        (
            {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"},
            "3:cpu,cpuacct:/docker/1\n",
            0.5,
        ),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "1:cpu:/\n", float("inf")),
        ({}, "5:memory:/x\n", float("inf")),
    ],
)
def test_the_limit_of_the_control_groups_is_found(tmp_path, files, own, wanted):
    for name, text in files.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(text)
    (tmp_path / "cgroup").write_text(own)
    assert quota(tmp_path / "root", tmp_path / "cgroup") == wanted


def test_a_group_that_allows_half_a_core_leaves_one_thread_and_ranks_share_what_there_is(monkeypatch):
    monkeypatch.setattr(threads, "quota", lambda: 0.5)
    assert threads.usable_cores() == Cores(1, 1)
    monkeypatch.setattr(threads, "quota", lambda: float("inf"))
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: set(range(1000, 1008)))
    monkeypatch.setattr(threads.psutil, "cpu_count", lambda logical: 4)
    assert threads.usable_cores() == Cores(4, 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert threads.usable_cores() == Cores(2, 4)


class FakeStepper:
    ranks = Ranks()

    def __init__(self):
        self.asked = []

    def rehearsing(self):
        return nullcontext()

    def warm_up(self):
        self.asked.append(torch.get_num_threads())
        return {1: 0.1, 2: 0.3}[self.asked[-1]]


@pytest.fixture
def on_two_cores(monkeypatch):
    """Two cores and one other program on them; the number of threads is put back."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    for name in threads.STATED_IN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "usable_cores", lambda: Cores(2, 2))
    readings, times = iter([{7: 0.0}, {7: 1.0}]), iter([0.0, 1.0])
    yield Watcher(lambda: next(readings), lambda: next(times))
    torch.set_num_threads(before)


def test_a_busy_neighbour_is_told_of_with_the_threads_that_were_chosen_beside_it(on_two_cores):
    line, step_seconds = settle(FakeStepper(), on_two_cores)
    assert step_seconds == 0.1
    assert torch.get_num_threads() == 1
    assert line.startswith(
        "note: 1 other program takes 1.0 of the 2 cores: training with 1 thread, which is faster"
    )


@pytest.mark.parametrize("asked", [0, 2], ids=["in the environment", "by the run"])
def test_what_was_stated_stays_and_nothing_is_tried(on_two_cores, monkeypatch, asked):
    if not asked:
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
    stepper = FakeStepper()
    line, step_seconds = settle(stepper, on_two_cores, asked)
    assert (torch.get_num_threads(), stepper.asked, step_seconds) == (2, [], None)
    assert "1.0 of the 2 cores: training with 2 threads; seconds will not compare" in line


def test_a_number_that_was_asked_for_is_not_said_to_be_faster(on_two_cores):
    line = settle(FakeStepper(), on_two_cores, 1).line
    assert torch.get_num_threads() == 1
    assert "faster" not in line


def test_what_is_stated_on_another_rank_is_not_tried_here(on_two_cores, monkeypatch):
    monkeypatch.setattr(Ranks, "any", lambda self, flag: True)
    stepper = FakeStepper()
    settle(stepper, on_two_cores)
    assert stepper.asked == []


def test_on_a_quiet_machine_only_another_number_than_torchs_is_told():
    quiet, four = Others(0.05, 0), Cores(4, 4)
    assert told(quiet, four, usual=4, chosen=4) == ""
    assert (
        told(quiet, four, usual=4, chosen=2) == "training with 2 threads, which is faster here than torch's 4"
    )
    assert told(Others(1.0, 1), four, usual=2, chosen=2) == ""


def test_a_start_steps_for_its_threads_and_no_more_for_its_choice_of_code_and_copies_once(
    make_stepper, monkeypatch
):
    for name in threads.STATED_IN:
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "usable_cores", lambda: Cores(1, 1))
    stepper = make_stepper()
    steps, copies = [], []
    update, state = stepper.update, stepper.optimizers.own_state_dict
    monkeypatch.setattr(stepper, "update", lambda *given, **named: steps.append(update(*given, **named)))
    monkeypatch.setattr(stepper.optimizers, "own_state_dict", lambda: copies.append(state()) or copies[-1])
    with stepper.rehearsing():
        settled = settle(stepper, Watcher(dict))
        compiled, line = compile_if_it_pays(stepper, "auto", steps=6, eager=settled.step_seconds)
    torch.set_num_threads(before)
    assert (compiled, line[:10], len(steps), len(copies)) == (False, "eager code", 2, 1)
