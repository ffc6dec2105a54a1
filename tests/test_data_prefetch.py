"""One call ahead: the same values in any order of asking, errors as themselves, and no thread that stays."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

import nanorun
from nanorun.data.prefetch import OneAhead


def ahead_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("nanorun-ahead")]


class Working:
    """Squares a number, and keeps which numbers it was asked for, and on which threads."""

    def __init__(self):
        self.asked, self.threads = [], []

    def __call__(self, key):
        self.asked.append(key)
        self.threads.append(threading.current_thread())
        if key < 0:
            raise LookupError(f"nothing below 0, and {key} is")
        return key * key


@pytest.fixture
def made():
    """A function with one that is ahead of it, closed at the end."""
    work = Working()
    ahead = OneAhead(work)
    yield work, ahead
    ahead.close()
    assert not ahead_threads()


def test_values_are_the_functions_own_whatever_was_announced(made):
    _, ahead = made
    asked = [(1, 2), (2, 3), (3, None), (4, 9), (5, 6), (6, 6), (6, 7), (1, 2)]
    assert [ahead.take(key, then) for key, then in asked] == [key * key for key, _ in asked]


def test_what_was_announced_is_worked_out_once_and_on_the_thread(made):
    work, ahead = made
    for key in range(4):
        ahead.take(key, key + 1 if key < 3 else None)
    assert work.asked == [0, 1, 2, 3]
    assert work.threads[0] is threading.current_thread()
    assert all(thread is not threading.current_thread() for thread in work.threads[1:])
    assert len(set(work.threads)) == 2


def test_it_works_while_the_caller_does(made):
    _, ahead = made
    begun, go_on = threading.Event(), threading.Event()

    def slow(key):
        if key == 2:
            begun.set()
            assert go_on.wait(10)
        return key

    ahead._make = slow
    assert ahead.take(1, 2) == 1
    assert begun.wait(10)  # it has begun, and this thread is free
    go_on.set()
    assert ahead.take(2) == 2


def test_nothing_that_was_not_announced_is_begun(made):
    work, ahead = made
    ahead.take(1)
    assert work.asked == [1]
    assert not ahead_threads()
    ahead.take(2, 3)
    ahead.close()
    assert set(work.asked) <= {1, 2, 3}


def test_an_error_on_the_thread_is_raised_as_itself_where_its_key_is_asked_for(made):
    _, ahead = made
    assert ahead.take(3, -1) == 9
    with pytest.raises(LookupError, match="nothing below 0, and -1 is"):
        ahead.take(-1, 5)
    assert ahead.take(5) == 25


def test_an_error_of_what_nobody_asks_for_is_forgotten(made):
    _, ahead = made
    ahead.take(1, -1)
    assert ahead.take(2, 3) == 4
    assert ahead.take(3) == 9


def test_a_key_that_no_longer_waits_is_worked_out_when_it_is_asked_for(made):
    work, ahead = made
    ahead.take(1, 2)
    ahead.close()
    assert not ahead_threads()
    assert ahead.take(2) == 4
    assert work.threads[-1] is threading.current_thread()
    assert ahead.take(4, 5) == 16
    assert ahead.take(5) == 25


ENDING = """
import threading
from nanorun.data.prefetch import OneAhead

def make(key):
    if key == 2:
        begun.set()
        threading.Event().wait(0.2)
    return key

begun = threading.Event()
ahead = OneAhead(make)
ahead.take(1, 2)
assert begun.wait(10)
{end}
"""


@pytest.mark.parametrize(
    ("end", "code"), [("", 0), ("raise KeyError('x')", 1), ("raise KeyboardInterrupt", -2)]
)
def test_a_process_that_ends_with_work_under_way_does_not_hang(end, code):
    done = subprocess.run(
        [sys.executable, "-c", ENDING.format(end=end)],
        timeout=30,
        capture_output=True,
        text=True,
        cwd=Path(nanorun.__file__).parent.parent,
    )
    assert done.returncode == code, done.stderr
