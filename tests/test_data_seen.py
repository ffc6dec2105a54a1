"""The set of documents met before."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nanorun.data import seen
from nanorun.data.seen import Seen

BATCHES = st.lists(st.lists(st.integers(0, 60), max_size=30), max_size=12)


def _told(batches, scratch):
    found = Seen(scratch)
    told = [found.add(np.array(batch, dtype=np.uint64)).tolist() for batch in batches]
    found.close()
    return told


@given(BATCHES)
def test_each_key_is_new_exactly_once(batches):
    known: set[int] = set()
    expected = []
    for batch in batches:
        expected.append([not (key in known or known.add(key)) for key in batch])
    assert _told(batches, None) == expected


def test_runs_on_disk_tell_the_same_and_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(seen, "LONGEST_RUN", 50)
    draws = np.random.default_rng(0).integers(0, 3000, size=(60, 40), dtype=np.uint64)
    known: set[int] = set()
    found = Seen(tmp_path)
    for batch in draws:
        expected = [not (key in known or known.add(key)) for key in batch.tolist()]
        assert found.add(batch).tolist() == expected
    assert len(list(tmp_path.iterdir())) > 3
    found.close()
    assert list(tmp_path.iterdir()) == []


def test_the_largest_key_is_a_key_like_others(tmp_path):
    top = 2**64 - 1
    assert _told([[top, 0, top], [top, 1], [0]], tmp_path) == [[True, True, False], [False, True], [False]]
