"""Records while others write them: nothing half written is counted, nothing is lost, nothing is kept twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from records_samples import a_record
from runs_samples import put_record, write_log

from nanorun.errors import UserError
from nanorun.records.index import indexed_records
from nanorun.records.record import read_records
from nanorun.records.runs import read_runs

WRITE = """
import sys
from pathlib import Path
from runs_samples import put_record
root, first, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
for seed in range(first, last):
    put_record(root, seed=seed)
"""


def python(*words, cwd=None):
    """Start a python that finds the tests' samples."""
    here = str(Path(__file__).parent)
    paths = os.pathsep.join([here, str(Path(__file__).parent.parent)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        env=environment,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def ended(children):
    return [(*(part.decode() for part in child.communicate()), child.returncode) for child in children]


def read_while(children, root, readers):
    """Read as long as any child lives; return for each reader how many records it saw each time."""
    seen = {name: [] for name in readers}
    while any(child.poll() is None for child in children):
        for name, read in readers.items():
            records, skipped = read(root)
            assert skipped == []
            seen[name].append(len(records))
    return seen


def reading(root):
    return read_records(root)


def reading_with_the_index(root):
    return indexed_records(root, None, lambda track: None)


def comparing(root):
    try:
        found = read_runs([root / "sotu"], records=root)
    except UserError:
        return [], []
    return found.runs, found.skipped


def check_readers(root, n_writers, each):
    put_record(root, seed=10**6)
    children = [python("-c", WRITE, root, n * each, (n + 1) * each) for n in range(n_writers)]
    readers = {one.__name__: one for one in (reading, reading_with_the_index, comparing)}
    seen = read_while(children, root, readers)
    assert [code for _, _, code in ended(children)] == [0] * n_writers
    for name, read in readers.items():
        assert seen[name] == sorted(seen[name]), name
        assert len(read(root)[0]) == n_writers * each + 1
    assert [path.name for path in (root / "sotu").iterdir() if path.name[0] in "._"] == []


def test_readers_see_whole_records_alone_while_two_writers_write(tmp_path):
    check_readers(tmp_path, n_writers=2, each=15)


@pytest.mark.slow
def test_readers_see_whole_records_alone_while_four_writers_write_many(tmp_path):
    check_readers(tmp_path, n_writers=4, each=100)


def test_runs_that_end_in_the_same_second_under_one_name_are_all_kept(tmp_path):
    # They differ in what they measured, as two runs always do.
    changes = [{"clock": {**a_record().clock, "train_seconds": 40 + n / 1e4}} for n in range(16)]
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda one: put_record(tmp_path, **one), changes))
    assert len(set(folders)) == 16
    assert len(read_records(tmp_path)[0]) == 16


IMPORT = ("-m", "nanorun", "import", "logs", "--track", "sotu", "--json")


def test_two_imports_at_once_keep_each_run_once(tmp_path):
    for n in range(4):
        write_log(tmp_path / "logs" / f"{n}.txt", 3.2 + n / 100)
    outcomes = ended([python(*IMPORT, cwd=tmp_path) for _ in range(2)])
    assert [code for _, _, code in outcomes] == [0, 0], outcomes
    written = [len(json.loads(out)["written"]) for out, _, _ in outcomes]
    known = [len(json.loads(out)["known"]) for out, _, _ in outcomes]
    assert sorted(written) == [0, 4]
    assert sorted(known) == [0, 4]
    assert len(list((tmp_path / "records/sotu").iterdir())) == 4


def test_two_reports_into_one_readme_leave_it_whole(tmp_path):
    put_record(tmp_path / "records", seed=1)
    words = ("-m", "nanorun", "report", "--readme")
    outcomes = ended([python(*words, cwd=tmp_path) for _ in range(2)])
    assert [code for _, _, code in outcomes] == [0, 0], outcomes
    (check,) = ended([python(*words, "--check", cwd=tmp_path)])
    assert check[2] == 0, check
    assert sorted(path.name for path in (tmp_path / "records").iterdir()) == ["README.md", "sotu"]
